//! The Llama architecture: Llama 1 to 3, SmolLM2, and in GGUF files also Mistral and Mixtral.

use super::{Architecture, HfConfig, gguf_metadata};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

/// `LlamaForCausalLM`.
pub struct Llama;

impl Architecture for Llama {
    fn hf_names(&self) -> &'static [&'static str] {
        &["LlamaForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &["llama"]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        true
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let mut spec = config.llama_like_spec(config.architecture()?)?;
        let attention_bias = config.flag("attention_bias")?;
        spec.qkv_bias = attention_bias;
        spec.o_bias = attention_bias;
        spec.mlp_bias = config.flag("mlp_bias")?;
        Ok(spec)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        let mut spec = gguf_metadata::moe_spec(gguf, "LlamaForCausalLM", true)?;
        if spec.moe.is_some() {
            spec.architecture = "MixtralForCausalLM".into();
        }
        Ok(spec)
    }
}

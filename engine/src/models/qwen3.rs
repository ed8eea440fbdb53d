//! The Qwen3 architecture: Llama with RMSNorm on each head of q and k before the rotation.

use super::{Architecture, HfConfig, gguf_metadata};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

/// `Qwen3ForCausalLM`.
pub struct Qwen3;

/// The head's width of transformers' `Qwen3Config` where the file does not say, whatever the hidden size.
const DEFAULT_HEAD_DIM: usize = 128;

impl Architecture for Qwen3 {
    fn hf_names(&self) -> &'static [&'static str] {
        &["Qwen3ForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &["qwen3"]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        false
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let mut spec = config.llama_like_spec(config.architecture()?)?;
        if !config.has("head_dim") {
            spec.head_dim = DEFAULT_HEAD_DIM;
            super::model::check_dimensions(&spec).map_err(|message| config.error(message))?;
        }
        spec.qk_norm = true;
        spec.qkv_bias = config.flag("attention_bias")?;
        spec.o_bias = spec.qkv_bias;
        spec.sliding_window = config.window_of_layers(spec.n_layers)?;
        Ok(spec)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        let mut spec = gguf_metadata::llama_like_spec(gguf, "Qwen3ForCausalLM")?;
        spec.qk_norm = true;
        Ok(spec)
    }
}

//! The Qwen2 architecture (Qwen2, Qwen2.5): Llama with biases on q, k and v.

use super::{Architecture, HfConfig, gguf_metadata};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

/// `Qwen2ForCausalLM`.
pub struct Qwen2;

impl Architecture for Qwen2 {
    fn hf_names(&self) -> &'static [&'static str] {
        &["Qwen2ForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &["qwen2"]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        false
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let mut spec = config.llama_like_spec(config.architecture()?)?;
        spec.qkv_bias = true;
        spec.sliding_window = config.window_of_layers(spec.n_layers)?;
        Ok(spec)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        let spec = gguf_metadata::llama_like_spec(gguf, "Qwen2ForCausalLM")?;
        if !spec.qkv_bias {
            return Err(gguf.error("tensor 'blk.0.attn_q.bias' is missing"));
        }
        Ok(spec)
    }
}

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
        if config.flag("use_sliding_window")? {
            // Layers from `max_window_layers` on use the window.
            let first = config.get("max_window_layers").and_then(|v| v.as_u64()).unwrap_or(28) as usize;
            spec.sliding_window = match config.count("sliding_window")? {
                window if first == 0 => window,
                Some(_) if first < spec.n_layers => {
                    return Err(config.error(format!(
                        "'max_window_layers' is {first} of {} layers: a sliding window in only some layers is not \
                         supported",
                        spec.n_layers
                    )));
                }
                _ => None,
            };
        }
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

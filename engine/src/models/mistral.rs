//! The Mistral architecture: Llama with a sliding window. Its GGUF files are of the architecture `llama`.

use super::{Architecture, HfConfig, gguf_metadata};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

/// `MistralForCausalLM`.
pub struct Mistral;

/// The window of transformers' `MistralConfig` where the file does not say; null turns it off.
const DEFAULT_WINDOW: usize = 4096;

impl Architecture for Mistral {
    fn hf_names(&self) -> &'static [&'static str] {
        &["MistralForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        true
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let mut spec = config.llama_like_spec(config.architecture()?)?;
        spec.sliding_window = match config.has("sliding_window") {
            true => config.count("sliding_window")?,
            false => Some(DEFAULT_WINDOW),
        };
        Ok(spec)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        gguf_metadata::llama_like_spec(gguf, "MistralForCausalLM")
    }
}

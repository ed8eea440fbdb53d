//! The Qwen3-MoE architecture (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3 with a mixture of experts in place of the MLP.

use super::{Architecture, HfConfig, experts, gguf_metadata, qwen3::Qwen3};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

/// `Qwen3MoeForCausalLM`.
pub struct Qwen3Moe;

impl Architecture for Qwen3Moe {
    fn hf_names(&self) -> &'static [&'static str] {
        &["Qwen3MoeForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &["qwen3moe"]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        false
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let spec = Qwen3.spec_from_config(config)?;
        let moe = experts::from_qwen_config(config, spec.n_layers)?;
        config.with_experts(spec, moe)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        let mut spec = gguf_metadata::moe_spec(gguf, "Qwen3MoeForCausalLM", true)?;
        spec.qk_norm = true;
        Ok(spec)
    }
}

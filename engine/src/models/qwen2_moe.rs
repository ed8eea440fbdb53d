//! The Qwen2-MoE architecture (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): Qwen2 with a mixture of experts in place of the MLP,
//! beside a shared expert whose output is scaled by a sigmoid.

use super::{Architecture, HfConfig, experts, gguf_metadata};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

/// `Qwen2MoeForCausalLM`.
pub struct Qwen2Moe;

impl Architecture for Qwen2Moe {
    fn hf_names(&self) -> &'static [&'static str] {
        &["Qwen2MoeForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &["qwen2moe"]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        false
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let mut spec = config.llama_like_spec(config.architecture()?)?;
        spec.qkv_bias = config.optional_flag("qkv_bias")?.unwrap_or(true);
        if config.flag("use_sliding_window")? {
            return Err(config.error("'use_sliding_window' is true: a sliding window in some layers is not supported"));
        }
        let mut moe = experts::from_qwen_config(config, spec.n_layers)?;
        moe.shared_intermediate_size = Some(config.required_count("shared_expert_intermediate_size")?);
        config.with_experts(spec, moe)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        gguf_metadata::moe_spec(gguf, "Qwen2MoeForCausalLM", false)
    }
}

//! The Mixtral architecture: Mistral with a mixture of experts in place of the MLP. Its GGUF files are of the
//! architecture `llama`.

use super::{Architecture, HfConfig, gguf_metadata, hf_weight_name};
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Weight},
    weights::gguf::Gguf,
};

/// `MixtralForCausalLM`.
pub struct Mixtral;

impl Architecture for Mixtral {
    fn hf_names(&self) -> &'static [&'static str] {
        &["MixtralForCausalLM"]
    }

    fn gguf_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn gguf_interleaved_rope(&self) -> bool {
        true
    }

    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error> {
        let mut spec = config.llama_like_spec(config.architecture()?)?;
        spec.sliding_window = config.count("sliding_window")?;
        let moe = Moe {
            n_experts: config.required_count("num_local_experts")?,
            n_experts_per_token: config.required_count("num_experts_per_tok")?,
            intermediate_size: spec.intermediate_size,
            shared_intermediate_size: None,
            norm_topk_prob: true,
            dense_layers: Vec::new(),
        };
        config.with_experts(spec, moe)
    }

    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error> {
        gguf_metadata::moe_spec(gguf, "MixtralForCausalLM", true)
    }

    fn hf_weight_name(&self, weight: Weight) -> String {
        match weight {
            Weight::Layer(layer, LayerWeight::Router) => format!("model.layers.{layer}.block_sparse_moe.gate.weight"),
            Weight::Expert(layer, expert, weight) => {
                let name = match weight {
                    ExpertWeight::Gate => "w1",
                    ExpertWeight::Down => "w2",
                    ExpertWeight::Up => "w3",
                };
                format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")
            }
            other => hf_weight_name(other),
        }
    }
}

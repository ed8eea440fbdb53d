//! Model architectures: one trait, one file per architecture, one row in [`ARCHITECTURES`].

#[cfg(test)]
mod checkpoint_tests;
mod experts;
mod generation_defaults;
mod gguf_metadata;
mod hf_config;
mod llama;
mod mistral;
mod mixtral;
mod model;
mod quantization;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rope;

pub use generation_defaults::GenerationDefaults;
pub use hf_config::HfConfig;
pub use model::Model;
pub(crate) use model::{Location, locate};

use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Weight},
    weights::gguf::Gguf,
};

/// How one family of models describes itself in its files.
pub trait Architecture: Send + Sync {
    /// Values of config.json's `architectures` that this row reads.
    fn hf_names(&self) -> &'static [&'static str];

    /// Values of GGUF's `general.architecture` that this row reads.
    fn gguf_names(&self) -> &'static [&'static str];

    /// Whether GGUF files store q and k with the halves of rotated pairs side by side.
    fn gguf_interleaved_rope(&self) -> bool;

    /// The model of a config.json.
    ///
    /// # Errors
    /// [`Error::Model`] naming a field that is missing or has a value that is not supported.
    fn spec_from_config(&self, config: &HfConfig) -> Result<DecoderSpec, Error>;

    /// The model of a GGUF file's metadata.
    ///
    /// # Errors
    /// [`Error::Model`] naming a key that is missing or has a value that is not supported.
    fn spec_from_gguf(&self, gguf: &Gguf) -> Result<DecoderSpec, Error>;

    /// Name of `weight` in safetensors files.
    fn hf_weight_name(&self, weight: Weight) -> String {
        hf_weight_name(weight)
    }
}

/// Every architecture that Ember runs.
pub const ARCHITECTURES: &[&dyn Architecture] = &[
    &llama::Llama,
    &mistral::Mistral,
    &mixtral::Mixtral,
    &qwen2::Qwen2,
    &qwen2_moe::Qwen2Moe,
    &qwen3::Qwen3,
    &qwen3_moe::Qwen3Moe,
];

/// The architecture that reads a config.json of the class `name`.
pub(crate) fn by_hf_name(name: &str) -> Option<&'static dyn Architecture> {
    ARCHITECTURES.iter().copied().find(|architecture| architecture.hf_names().contains(&name))
}

/// The class that generates text with the decoder of class `name`, which has no output projection: `LlamaForCausalLM` of
/// `LlamaModel`; `None` if Ember does not run it.
pub(crate) fn generating_name(name: &str) -> Option<String> {
    let name = format!("{}ForCausalLM", name.strip_suffix("Model")?);
    by_hf_name(&name).map(|_| name)
}

/// Whether tokens of a GGUF file's model see only those before them, if it says so.
///
/// # Errors
/// [`Error::Model`] if the value is no bool.
pub(crate) fn is_causal(gguf: &Gguf) -> Result<Option<bool>, Error> {
    gguf.bool(&format!("{}.attention.causal", gguf.string("general.architecture")?.unwrap_or_default()))
}

/// The names that most decoder-only models of Hugging Face transformers use.
fn hf_weight_name(weight: Weight) -> String {
    use LayerWeight::*;
    let (layer, weight) = match weight {
        Weight::Embedding => return "model.embed_tokens.weight".into(),
        Weight::FinalNorm => return "model.norm.weight".into(),
        Weight::LmHead => return "lm_head.weight".into(),
        Weight::Layer(layer, weight) => (layer, weight),
        Weight::Expert(layer, expert, weight) => {
            let name = match weight {
                ExpertWeight::Gate => "gate_proj",
                ExpertWeight::Up => "up_proj",
                ExpertWeight::Down => "down_proj",
            };
            return format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
        }
    };
    let name = match weight {
        InputNorm => "input_layernorm.weight",
        QProj => "self_attn.q_proj.weight",
        KProj => "self_attn.k_proj.weight",
        VProj => "self_attn.v_proj.weight",
        QBias => "self_attn.q_proj.bias",
        KBias => "self_attn.k_proj.bias",
        VBias => "self_attn.v_proj.bias",
        QNorm => "self_attn.q_norm.weight",
        KNorm => "self_attn.k_norm.weight",
        OProj => "self_attn.o_proj.weight",
        OBias => "self_attn.o_proj.bias",
        PostAttentionNorm => "post_attention_layernorm.weight",
        GateProj => "mlp.gate_proj.weight",
        UpProj => "mlp.up_proj.weight",
        DownProj => "mlp.down_proj.weight",
        GateBias => "mlp.gate_proj.bias",
        UpBias => "mlp.up_proj.bias",
        DownBias => "mlp.down_proj.bias",
        Router => "mlp.gate.weight",
        SharedGateProj => "mlp.shared_expert.gate_proj.weight",
        SharedUpProj => "mlp.shared_expert.up_proj.weight",
        SharedDownProj => "mlp.shared_expert.down_proj.weight",
        SharedRouter => "mlp.shared_expert_gate.weight",
    };
    format!("model.layers.{layer}.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_across_the_table() {
        let hf: Vec<_> = ARCHITECTURES.iter().flat_map(|a| a.hf_names()).collect();
        let gguf: Vec<_> = ARCHITECTURES.iter().flat_map(|a| a.gguf_names()).collect();
        for names in [hf, gguf] {
            assert!(!names.is_empty());
            for name in &names {
                assert_eq!(names.iter().filter(|n| n == &name).count(), 1, "{name}");
            }
        }
    }
}

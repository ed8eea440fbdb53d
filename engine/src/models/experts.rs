//! Reads mixtures of experts from config.json and GGUF metadata.

use serde_json::Value;

use super::HfConfig;
use crate::{Error, decoder::Moe, weights::gguf::Gguf};

/// The experts of Qwen's config.json: `num_experts`, `num_experts_per_tok`, `moe_intermediate_size`, `norm_topk_prob`,
/// and which of `n_layers` have them. As in transformers, those are the layers whose number, counted from 1, is a
/// multiple of `decoder_sparse_step`, without those of `mlp_only_layers`. Without a shared expert.
///
/// # Errors
/// [`Error::Model`] naming the field that is missing or has a value that is not supported.
pub(super) fn from_qwen_config(config: &HfConfig, n_layers: usize) -> Result<Moe, Error> {
    let step = config.count("decoder_sparse_step")?.unwrap_or(1);
    let mut mlp_only = Vec::new();
    if let Some(value) = config.get("mlp_only_layers") {
        let layers = value.as_array().and_then(|layers| layers.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
        mlp_only = layers.ok_or_else(|| config.error("'mlp_only_layers' must be a list of layer numbers"))?;
    }
    let is_dense = |&layer: &usize| !(layer + 1).is_multiple_of(step) || mlp_only.contains(&(layer as u64));
    let n_experts = match config.count("num_experts")? {
        Some(n) => n,
        None => config.required_count("num_local_experts")?,
    };
    Ok(Moe {
        n_experts,
        n_experts_per_token: config.required_count("num_experts_per_tok")?,
        intermediate_size: config.required_count("moe_intermediate_size")?,
        shared_intermediate_size: None,
        norm_topk_prob: config.flag("norm_topk_prob")?,
        dense_layers: (0..n_layers).filter(is_dense).collect(),
    })
}

/// The experts of a GGUF file with the metadata prefix `prefix`; `None` if it has none. Sizes are those of the tensors.
/// `norms` says whether the architecture's routing weights are scaled to a sum of 1 where the file does not say.
///
/// # Errors
/// [`Error::Model`] naming the key or tensor that is missing or has a value that is not supported.
pub(super) fn from_gguf(gguf: &Gguf, prefix: &str, (n_layers, norms): (usize, bool)) -> Result<Option<Moe>, Error> {
    let key = |name: &str| format!("{prefix}.{name}");
    let Some(n_experts) = gguf.integer(&key("expert_count"))?.filter(|&n| n > 0) else {
        return Ok(None);
    };
    let used = gguf.integer(&key("expert_used_count"))?;
    let used = used.ok_or_else(|| gguf.error(format!("metadata key '{}' is missing", key("expert_used_count"))))?;
    // 1 is softmax in llama.cpp's `llama_expert_gating_func_type`.
    if let Some(function) = gguf.integer(&key("expert_gating_func"))?.filter(|&function| function > 1) {
        return Err(gguf.error(format!(
            "'{}' is {function}, which is not supported; supported is 1 (softmax)",
            key("expert_gating_func")
        )));
    }
    if let Some(scale) = gguf.float(&key("expert_weights_scale"))?.filter(|&scale| scale != 0.0 && scale != 1.0) {
        let name = key("expert_weights_scale");
        return Err(gguf.error(format!("'{name}' is {scale}, which is not supported; supported is 1")));
    }
    let has_experts = |layer: &usize| gguf.tensor_shape(&format!("blk.{layer}.ffn_gate_inp.weight")).is_some();
    let first = (0..n_layers).find(has_experts);
    let first = first.ok_or_else(|| gguf.error("no tensor 'blk.N.ffn_gate_inp.weight' routes to the experts"))?;
    let name = format!("blk.{first}.ffn_gate_exps.weight");
    let Some(&[_, intermediate_size, _]) = gguf.tensor_shape(&name) else {
        return Err(gguf.error(format!(
            "tensor '{name}' is missing or not three-dimensional; convert the model again with a newer llama.cpp"
        )));
    };
    let shared = gguf.tensor_shape(&format!("blk.{first}.ffn_gate_shexp.weight")).and_then(|shape| shape.first());
    Ok(Some(Moe {
        n_experts,
        n_experts_per_token: used,
        intermediate_size,
        shared_intermediate_size: shared.copied(),
        norm_topk_prob: gguf.bool(&key("expert_weights_norm"))?.unwrap_or(norms),
        dense_layers: (0..n_layers).filter(|layer| !has_experts(layer)).collect(),
    }))
}

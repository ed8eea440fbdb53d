//! Reads what the families of the Llama line have in common from GGUF metadata.

use crate::{
    Error,
    decoder::{DecoderSpec, Rope, RopeScaling},
    weights::gguf::Gguf,
};

/// A spec named `architecture` from the keys under `general.architecture`'s prefix. Biases are found by the
/// tensors that are there.
///
/// # Errors
/// [`Error::Model`] naming a key that is missing or not supported.
pub(super) fn llama_like_spec(gguf: &Gguf, architecture: &str) -> Result<DecoderSpec, Error> {
    let prefix = gguf.string("general.architecture")?.unwrap_or_default();
    let key = |name: &str| format!("{prefix}.{name}");
    let integer = |name: &str| gguf.integer(&key(name));
    let required =
        |name: &str| integer(name)?.ok_or_else(|| gguf.error(format!("metadata key '{}' is missing", key(name))));

    if integer("expert_count")?.is_some_and(|n| n > 0) {
        return Err(gguf.error(format!("'{}': mixtures of experts are not supported", key("expert_count"))));
    }
    let hidden_size = required("embedding_length")?;
    let n_heads = required("attention.head_count")?;
    let head_dim = match integer("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(n_heads).unwrap_or(0),
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(n) = integer(name)?
            && n != head_dim
        {
            return Err(gguf.error(format!(
                "'{}' is {n}, which is not supported; supported is the head's width {head_dim}",
                key(name)
            )));
        }
    }
    // The embedding is the truth about the vocabulary; `vocab_size` is not always there.
    let Some(&[vocab_size, _]) = gguf.tensor_shape("token_embd.weight") else {
        return Err(gguf.error("tensor 'token_embd.weight' is missing or not two-dimensional"));
    };
    let spec = DecoderSpec {
        architecture: architecture.to_owned(),
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        n_layers: required("block_count")?,
        n_heads,
        n_kv_heads: integer("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        vocab_size,
        max_position: required("context_length")?,
        norm_eps: gguf.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6) as f32,
        rope: rope(gguf, &key, head_dim)?,
        tie_embeddings: gguf.tensor_shape("output.weight").is_none(),
        qkv_bias: gguf.tensor_shape("blk.0.attn_q.bias").is_some(),
        o_bias: gguf.tensor_shape("blk.0.attn_output.bias").is_some(),
        mlp_bias: gguf.tensor_shape("blk.0.ffn_gate.bias").is_some(),
        qk_norm: false,
        sliding_window: integer("attention.sliding_window")?.filter(|&n| n > 0),
    };
    super::model::check_dimensions(&spec).map_err(|message| gguf.error(message))?;
    Ok(spec)
}

fn rope(gguf: &Gguf, key: &impl Fn(&str) -> String, head_dim: usize) -> Result<Rope, Error> {
    let theta = gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0) as f32;
    if !(theta.is_finite() && theta > 0.0) {
        return Err(gguf.error(format!("'{}' must be positive, not {theta}", key("rope.freq_base"))));
    }
    if gguf.tensor_shape("rope_freqs.weight").is_some() {
        let factors = gguf.tensor("rope_freqs.weight")?.to_f32().into_owned();
        if factors.len() != head_dim / 2 || !factors.iter().all(|f| f.is_finite() && *f > 0.0) {
            return Err(gguf.error(format!("tensor 'rope_freqs.weight' must hold {} positive numbers", head_dim / 2)));
        }
        return Ok(Rope { theta, scaling: RopeScaling::Factors(factors) });
    }
    let scaling = match gguf.string(&key("rope.scaling.type"))? {
        None | Some("none") => RopeScaling::None,
        Some("linear") => match gguf.float(&key("rope.scaling.factor"))? {
            Some(factor) if factor.is_finite() && factor > 0.0 => RopeScaling::Linear(factor as f32),
            other => {
                return Err(gguf.error(format!("'{}' must be positive, not {other:?}", key("rope.scaling.factor"))));
            }
        },
        Some(other) => {
            let name = key("rope.scaling.type");
            return Err(
                gguf.error(format!("'{name}' is '{other}', which is not supported; supported are none, linear"))
            );
        }
    };
    Ok(Rope { theta, scaling })
}

//! Reads what the families of the Llama line have in common from GGUF metadata.

use super::{experts, rope};
use crate::{Error, decoder::DecoderSpec, weights::gguf::Gguf};

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
    let (rope, max_position) = rope::from_gguf(gguf, prefix, (head_dim, required("context_length")?))?;
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
        max_position,
        norm_eps: gguf.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6) as f32,
        rope,
        tie_embeddings: gguf.tensor_shape("output.weight").is_none(),
        qkv_bias: gguf.tensor_shape("blk.0.attn_q.bias").is_some(),
        o_bias: gguf.tensor_shape("blk.0.attn_output.bias").is_some(),
        mlp_bias: gguf.tensor_shape("blk.0.ffn_gate.bias").is_some(),
        qk_norm: false,
        sliding_window: integer("attention.sliding_window")?.filter(|&n| n > 0),
        moe: None,
    };
    super::model::check_dimensions(&spec).map_err(|message| gguf.error(message))?;
    Ok(spec)
}

/// As [`llama_like_spec`], with the file's experts, if it has any. `norms`: as in [`experts::from_gguf`].
///
/// # Errors
/// As [`llama_like_spec`].
pub(super) fn moe_spec(gguf: &Gguf, architecture: &str, norms: bool) -> Result<DecoderSpec, Error> {
    let mut spec = llama_like_spec(gguf, architecture)?;
    let prefix = gguf.string("general.architecture")?.unwrap_or_default();
    spec.moe = experts::from_gguf(gguf, prefix, (spec.n_layers, norms))?;
    super::model::check_dimensions(&spec).map_err(|message| gguf.error(message))?;
    Ok(spec)
}

//! [`Product`]: the matrix products of a model and their sizes.

use crate::decoder::DecoderSpec;

/// A product of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    /// To q, k and v: bf16.
    Qkv,
    /// Of the attention's output: added to the residual stream.
    O,
    /// Gate and up projections.
    GateUp,
    /// Of the MLP's activations: added to the residual stream.
    Down,
    /// To logits: float32.
    Logits,
}

impl Product {
    /// Those of a layer, in order.
    pub(super) const LAYER: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
    /// All, in order.
    pub(super) const ALL: [Self; 5] = [Self::Qkv, Self::O, Self::GateUp, Self::Down, Self::Logits];

    /// Rows of the weights and their length.
    pub(super) fn size(self, spec: &DecoderSpec) -> (usize, usize) {
        let (q, kv) = (spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim);
        let (h, inter) = (spec.hidden_size, spec.intermediate_size);
        match self {
            Self::Qkv => (q + 2 * kv, h),
            Self::O => (h, q),
            Self::GateUp => (2 * inter, h),
            Self::Down => (h, inter),
            Self::Logits => (spec.vocab_size, h),
        }
    }
}

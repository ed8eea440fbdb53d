//! [`GgufSource`]: a GGUF file's tensors under Ember's names.

use std::{borrow::Cow, sync::Arc};

use super::Gguf;
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Weight},
    weights::{StoredTensor, TensorView, WeightSource},
};

/// The weights of a decoder in a GGUF file.
pub struct GgufSource {
    gguf: Arc<Gguf>,
    spec: DecoderSpec,
    interleaved_rope: bool,
}

impl GgufSource {
    /// The weights of `spec` in `gguf`. With `interleaved_rope`, rows of q and k are stored with the two halves
    /// of each rotated pair side by side, as llama.cpp's converter does for the llama architecture.
    ///
    /// # Errors
    /// [`Error::Model`] if a tensor is missing, of another shape or of an unsupported type.
    pub fn new(gguf: Arc<Gguf>, spec: DecoderSpec, interleaved_rope: bool) -> Result<Self, Error> {
        let source = Self { gguf, spec, interleaved_rope };
        source.spec.weights().try_for_each(|weight| source.stored(weight).map(drop))?;
        Ok(source)
    }

    fn stored(&self, weight: Weight) -> Result<TensorView<'_>, Error> {
        let name = tensor_name(weight);
        let shape =
            self.spec.shape(weight).ok_or_else(|| self.gguf.error(format!("the model has no tensor '{name}'")))?;
        // How the file has it: a layer's experts in one tensor, a single row as a vector.
        let stored_shape = match weight {
            Weight::Expert(layer, ..) => {
                let n_experts = self.spec.moe_of(layer).map_or(0, |moe| moe.n_experts);
                [&[n_experts], shape.as_slice()].concat()
            }
            Weight::Layer(_, LayerWeight::SharedRouter) => vec![shape[1]],
            _ => shape.clone(),
        };
        let mut tensor = self.gguf.tensor(&name)?;
        if tensor.shape != stored_shape {
            return Err(self.gguf.error(format!(
                "tensor '{name}' has shape {:?}, but the metadata imply {stored_shape:?}",
                tensor.shape
            )));
        }
        tensor.shape = shape;
        if let (Weight::Expert(_, expert, _), Cow::Borrowed(data)) = (weight, &tensor.data) {
            let n_bytes = tensor.shape[0] * tensor.row_bytes();
            tensor.data = Cow::Borrowed(&data[expert * n_bytes..][..n_bytes]);
        }
        Ok(tensor)
    }
}

impl WeightSource for GgufSource {
    fn get(&self, weight: Weight) -> Result<TensorView<'_>, Error> {
        use LayerWeight::{KBias, KProj, QBias, QProj};
        let mut tensor = self.stored(weight)?;
        if self.interleaved_rope && matches!(weight, Weight::Layer(_, QProj | KProj | QBias | KBias)) {
            tensor.data = Cow::Owned(rotate_half_rows(&tensor, self.spec.head_dim));
        }
        Ok(tensor)
    }

    fn keep(&self, weight: Weight) -> Result<StoredTensor, Error> {
        Ok(StoredTensor::new(self.get(weight)?, self.gguf.map(&tensor_name(weight))))
    }
}

/// Reorders rows (or elements of a bias) within each head from `(pair, half)` to `(half, pair)`.
fn rotate_half_rows(tensor: &TensorView<'_>, head_dim: usize) -> Vec<u8> {
    let row_bytes = tensor.data.len() / tensor.shape[0];
    let mut out = Vec::with_capacity(tensor.data.len());
    for head in tensor.data.chunks_exact(head_dim * row_bytes) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                out.extend_from_slice(&head[(2 * pair + half) * row_bytes..][..row_bytes]);
            }
        }
    }
    out
}

/// llama.cpp's name of the tensor that holds `weight` (gguf-py's `TENSOR_NAMES`).
pub(crate) fn tensor_name(weight: Weight) -> String {
    use LayerWeight::*;
    let (layer, weight) = match weight {
        Weight::Embedding => return "token_embd.weight".into(),
        Weight::FinalNorm => return "output_norm.weight".into(),
        Weight::LmHead => return "output.weight".into(),
        Weight::Layer(layer, weight) => (layer, weight),
        Weight::Expert(layer, _, weight) => {
            let name = match weight {
                ExpertWeight::Gate => "gate",
                ExpertWeight::Up => "up",
                ExpertWeight::Down => "down",
            };
            return format!("blk.{layer}.ffn_{name}_exps.weight");
        }
    };
    let name = match weight {
        InputNorm => "attn_norm.weight",
        QProj => "attn_q.weight",
        KProj => "attn_k.weight",
        VProj => "attn_v.weight",
        QBias => "attn_q.bias",
        KBias => "attn_k.bias",
        VBias => "attn_v.bias",
        QNorm => "attn_q_norm.weight",
        KNorm => "attn_k_norm.weight",
        OProj => "attn_output.weight",
        OBias => "attn_output.bias",
        PostAttentionNorm => "ffn_norm.weight",
        GateProj => "ffn_gate.weight",
        UpProj => "ffn_up.weight",
        DownProj => "ffn_down.weight",
        GateBias => "ffn_gate.bias",
        UpBias => "ffn_up.bias",
        DownBias => "ffn_down.bias",
        Router => "ffn_gate_inp.weight",
        SharedGateProj => "ffn_gate_shexp.weight",
        SharedUpProj => "ffn_up_shexp.weight",
        SharedDownProj => "ffn_down_shexp.weight",
        SharedRouter => "ffn_gate_inp_shexp.weight",
    };
    format!("blk.{layer}.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_become_rotate_half() {
        // Two heads of width 6; llama.cpp's converter put HF row (half, pair) at (pair, half).
        let hf: Vec<u8> = (0..12).collect();
        let interleaved = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let two_byte_rows: Vec<u8> = interleaved.iter().flat_map(|&row| [row, row]).collect();
        let q8 = TensorView { dtype: crate::weights::DType::BF16, shape: vec![12, 1], data: Cow::Owned(two_byte_rows) };
        assert_eq!(rotate_half_rows(&q8, 6), hf.iter().flat_map(|&row| [row, row]).collect::<Vec<u8>>());
    }

    #[test]
    fn every_weight_has_its_own_name() {
        let names: std::collections::HashSet<_> =
            LayerWeight::ALL.iter().map(|w| tensor_name(Weight::Layer(7, *w))).collect();
        assert_eq!(names.len(), LayerWeight::ALL.len());
        assert!(names.contains("blk.7.attn_q.weight"));
    }
}

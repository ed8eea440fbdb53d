//! [`BertFiles`]: an encoder's tensors, by the names of Hugging Face transformers.

use crate::{
    Error,
    weights::{TensorView, gguf::Gguf, safetensors::SafetensorsFolder},
};

/// Names of GGUF tensors beside the layers' (gguf-py's `TENSOR_NAMES`).
const GGUF_NAMES: [(&str, &str); 4] = [
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.LayerNorm", "token_embd_norm"),
];
/// The same within `blk.N`, here `encoder.layer.N`.
const GGUF_LAYER_NAMES: [(&str, &str); 8] = [
    ("attention.self.query", "attn_q"),
    ("attention.self.key", "attn_k"),
    ("attention.self.value", "attn_v"),
    ("attention.output.dense", "attn_output"),
    ("attention.output.LayerNorm", "attn_output_norm"),
    ("intermediate.dense", "ffn_up"),
    ("output.dense", "ffn_down"),
    ("output.LayerNorm", "layer_output_norm"),
];

/// Where an encoder's tensors are.
#[derive(Clone, Copy)]
pub enum BertFiles<'a> {
    /// In the safetensors of a folder.
    Folder(&'a SafetensorsFolder),
    /// In a GGUF file.
    Gguf(&'a Gguf),
}

impl BertFiles<'_> {
    /// Name of the element type that most weights are stored in; for logs.
    pub(super) fn element_type(&self) -> String {
        match self {
            Self::Folder(_) => "F32".into(),
            Self::Gguf(gguf) => {
                gguf.tensor("blk.0.ffn_up.weight").map_or_else(|_| "unknown".into(), |it| it.dtype.name().to_owned())
            }
        }
    }

    /// Tensor `name`, which must have this shape.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing, of another shape or of a type that Ember does not read.
    pub(super) fn tensor(&self, name: &str, shape: Vec<usize>) -> Result<TensorView<'_>, Error> {
        match self {
            Self::Folder(files) => {
                // Models with a head on top keep the encoder under this name.
                let prefix = if files.contains("embeddings.word_embeddings.weight") { "" } else { "bert." };
                files.tensor(&format!("{prefix}{name}"), shape)
            }
            Self::Gguf(gguf) => {
                let name = gguf_name(name);
                let tensor = gguf.tensor(&name)?;
                if tensor.shape != shape {
                    let message =
                        format!("tensor '{name}' has shape {:?}, but the metadata imply {shape:?}", tensor.shape);
                    return Err(gguf.error(message));
                }
                Ok(tensor)
            }
        }
    }
}

/// What GGUF files call the tensor `name`.
pub(super) fn gguf_name(name: &str) -> String {
    let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
    let find = |names: &[(&str, &'static str)], module: &str| {
        names.iter().find(|(ours, _)| *ours == module).map_or("", |(_, theirs)| theirs)
    };
    match module.strip_prefix("encoder.layer.").and_then(|rest| rest.split_once('.')) {
        Some((layer, module)) => format!("blk.{layer}.{}.{kind}", find(&GGUF_LAYER_NAMES, module)),
        None => format!("{}.{kind}", find(&GGUF_NAMES, module)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_has_a_name_in_gguf_files() {
        for (name, expected) in [
            ("embeddings.word_embeddings.weight", "token_embd.weight"),
            ("embeddings.LayerNorm.bias", "token_embd_norm.bias"),
            ("encoder.layer.11.attention.self.query.bias", "blk.11.attn_q.bias"),
            ("encoder.layer.0.output.LayerNorm.weight", "blk.0.layer_output_norm.weight"),
            ("encoder.layer.3.attention.output.dense.weight", "blk.3.attn_output.weight"),
        ] {
            assert_eq!(gguf_name(name), expected);
        }
    }
}

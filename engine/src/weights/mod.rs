//! Where weights come from: one trait, one file per format.

pub mod dummy;
mod fp8;
pub mod gguf;
pub mod safetensors;
mod tensor;

pub use tensor::{DType, StoredTensor, TensorView};

use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Weight},
};

/// A model's weights by format-independent name, with q and k in rotate-half order.
pub trait WeightSource: Send + Sync {
    /// The tensor `weight`, checked against the model's [`crate::decoder::DecoderSpec::shape`].
    ///
    /// # Errors
    /// [`Error::Model`] naming the file and the tensor if it is missing or of another shape.
    fn get(&self, weight: Weight) -> Result<TensorView<'_>, Error>;

    /// The tensor `weight`, to be kept longer than the source; memory-mapped files are not copied.
    ///
    /// # Errors
    /// As [`WeightSource::get`].
    fn keep(&self, weight: Weight) -> Result<StoredTensor, Error> {
        Ok(StoredTensor::new(self.get(weight)?, None))
    }

    /// Name of the element type that most weights are stored in, such as `BF16`; for logs.
    ///
    /// # Errors
    /// As [`WeightSource::get`].
    fn typical_type(&self, spec: &DecoderSpec) -> Result<String, Error> {
        Ok(self.get(typical_weight(spec))?.dtype.name().to_owned())
    }
}

/// The weight whose stored element type stands for the whole model's.
fn typical_weight(spec: &DecoderSpec) -> Weight {
    match spec.moe_of(0) {
        Some(_) => Weight::Expert(0, 0, ExpertWeight::Up),
        None => Weight::Layer(0, LayerWeight::UpProj),
    }
}

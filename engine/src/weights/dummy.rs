//! [`DummySource`]: seeded random weights of any dimensions, made when they are asked for.
//!
//! For benchmarks: speed and memory are those of the real model, the text is noise.

use std::borrow::Cow;

use half::{bf16, f16};
use rayon::prelude::*;

use super::{DType, TensorView, WeightSource};
use crate::{
    Error,
    decoder::{DecoderSpec, LayerWeight, Weight},
};

/// Distinct values of a tensor: bfloat16 has 256 per binade, and the table stays in the L1 cache.
const N_LEVELS: usize = 4096;
/// Random numbers cut from one 64-bit draw.
const PER_DRAW: usize = 5;
/// Elements made by one task; a multiple of [`PER_DRAW`].
const CHUNK: usize = 64 * 1024 / PER_DRAW * PER_DRAW;

/// Random weights. Norms are 1; projections and embeddings are uniform in `±1/sqrt(columns)`, so that
/// activations stay finite through any depth; biases are uniform in ±0.01.
pub struct DummySource {
    spec: DecoderSpec,
    seed: u64,
    dtype: DType,
}

impl DummySource {
    /// Weights for `spec`; the same `seed` and `dtype` always give the same weights. `dtype` is the stored
    /// type of every tensor.
    ///
    /// # Errors
    /// [`Error::Config`] if `dtype` is quantised.
    pub fn new(spec: DecoderSpec, seed: u64, dtype: DType) -> Result<Self, Error> {
        if let DType::Quant(format) = dtype {
            return Err(Error::config("--load-format", format!("dummy weights cannot be {}", format.name())));
        }
        Ok(Self { spec, seed, dtype })
    }
}

impl WeightSource for DummySource {
    fn get(&self, weight: Weight) -> Result<TensorView<'_>, Error> {
        use LayerWeight::*;
        let shape = self.spec.shape(weight);
        let shape = shape.ok_or_else(|| Error::model("dummy weights", format!("the model has no {weight:?}")))?;
        let n_elements = shape.iter().product();
        let bound = match weight {
            Weight::FinalNorm | Weight::Layer(_, InputNorm | PostAttentionNorm | QNorm | KNorm) => None,
            Weight::Layer(_, QBias | KBias | VBias | OBias | GateBias | UpBias | DownBias) => Some(0.01),
            _ => Some(1.0 / (shape[shape.len() - 1] as f32).sqrt()),
        };
        let value = |level: usize| match bound {
            None => 1.0,
            Some(bound) => bound * ((2 * level + 1) as f32 / N_LEVELS as f32 - 1.0),
        };
        let key = split_mix(self.seed ^ split_mix(weight_number(weight)));
        let data = match self.dtype {
            DType::F32 => fill(n_elements, key, |level| value(level).to_le_bytes()),
            DType::F16 => fill(n_elements, key, |level| f16::from_f32(value(level)).to_le_bytes()),
            _ => fill(n_elements, key, |level| bf16::from_f32(value(level)).to_le_bytes()),
        };
        Ok(TensorView { dtype: self.dtype, shape, data: Cow::Owned(data) })
    }
}

/// `n_elements` elements of `N` bytes, each a random one of `value`'s levels.
fn fill<const N: usize>(n_elements: usize, key: u64, value: impl Fn(usize) -> [u8; N]) -> Vec<u8> {
    let mut levels = [[0; N]; N_LEVELS];
    levels.iter_mut().enumerate().for_each(|(level, bytes)| *bytes = value(level));
    let mut data = vec![0u8; n_elements * N];
    data.par_chunks_mut(CHUNK * N).enumerate().for_each(|(i, chunk)| {
        let first_draw = (i * CHUNK / PER_DRAW) as u64;
        for (draw, group) in chunk.chunks_mut(PER_DRAW * N).enumerate() {
            let mut bits = split_mix(key.wrapping_add(first_draw + draw as u64));
            for element in group.as_chunks_mut::<N>().0 {
                *element = levels[bits as usize % N_LEVELS];
                bits >>= N_LEVELS.trailing_zeros();
            }
        }
    });
    data
}

/// SplitMix64's output function on a counter (Steele, Lea and Flood 2014).
fn split_mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number for each weight, so that no two tensors are alike.
fn weight_number(weight: Weight) -> u64 {
    match weight {
        Weight::Embedding => 1,
        Weight::FinalNorm => 2,
        Weight::LmHead => 3,
        Weight::Layer(layer, weight) => ((layer as u64 + 1) << 8) | weight as u64,
        Weight::Expert(layer, expert, weight) => {
            ((layer as u64 + 1) << 40) | ((expert as u64 + 1) << 8) | weight as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::{Rope, RopeScaling};

    fn spec() -> DecoderSpec {
        DecoderSpec {
            architecture: "LlamaForCausalLM".into(),
            hidden_size: 256,
            intermediate_size: 512,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            vocab_size: 1000,
            max_position: 128,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            tie_embeddings: false,
            qkv_bias: true,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            moe: None,
        }
    }

    fn values(source: &DummySource, weight: Weight) -> Vec<f32> {
        source.get(weight).expect("in the model").to_f32().into_owned()
    }

    #[test]
    fn weights_are_seeded_and_spread_as_promised() {
        let of = |seed, dtype| DummySource::new(spec(), seed, dtype).expect("not quantised");
        let (a, same, other) = (of(1, DType::F32), of(1, DType::F32), of(2, DType::F32));
        let down = Weight::Layer(1, LayerWeight::DownProj);
        let v = values(&a, down);
        assert_eq!(v, values(&same, down));
        assert_ne!(v, values(&other, down));
        assert_ne!(v, values(&a, Weight::Layer(0, LayerWeight::DownProj)));
        let bound = 1.0 / 512f32.sqrt();
        assert!(v.iter().all(|x| x.abs() <= bound));
        let n = v.len() as f32;
        let mean = v.iter().sum::<f32>() / n;
        let variance = v.iter().map(|x| x * x).sum::<f32>() / n;
        assert!(mean.abs() < 0.01 * bound, "{mean}");
        assert!((variance - bound * bound / 3.0).abs() < 0.02 * bound * bound, "{variance}");
        // Neighbours are independent.
        let covariance = v.windows(2).map(|w| w[0] * w[1]).sum::<f32>() / n;
        assert!(covariance.abs() < 0.01 * bound * bound, "{covariance}");

        assert!(values(&a, Weight::FinalNorm).iter().all(|x| *x == 1.0));
        assert!(values(&a, Weight::Layer(0, LayerWeight::QBias)).iter().all(|x| x.abs() <= 0.01));
        assert!(a.get(Weight::Layer(2, LayerWeight::QProj)).is_err());
        let brains = values(&of(1, DType::BF16), down);
        assert!(brains.iter().zip(&v).all(|(b, x)| (b - x).abs() <= x.abs() / 256.0));
    }

    #[test]
    fn every_tensor_has_its_shape() {
        let source = DummySource::new(spec(), 0, DType::F16).expect("not quantised");
        for weight in spec().weights() {
            let tensor = source.get(weight).expect("in the model");
            assert_eq!(Some(tensor.shape.clone()), spec().shape(weight));
            assert_eq!(tensor.data.len(), 2 * tensor.n_elements());
        }
    }
}

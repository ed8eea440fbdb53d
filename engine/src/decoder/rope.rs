//! [`Rope`]: rotary position embeddings and their changes for long contexts; [`Rotary`]: the cosines and sines that
//! every executor uses.

use std::f64::consts::TAU;

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// Change of the rotary frequencies for contexts longer than those of pre-training. Below, `f[i] = theta^(-2 i / d)` are
/// the frequencies without scaling, `d` is the head's width. The formulas are those of `transformers`'
/// `modeling_rope_utils.py`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by this factor (Chen et al. 2023, arXiv:2306.15595).
    Linear(f32),
    /// "Dynamic NTK" for a context `s` times that of pre-training: the base becomes `theta (s^2 - s + 1)^(d / (d - 2))`.
    ///
    /// `transformers` computes the base anew for the length `n` of each forward pass, `theta (s n / N - s + 1)^(d / (d -
    /// 2))` with `N` the context of pre-training; then keys in the cache are of other bases than the queries. As vLLM,
    /// Ember takes the longest context, `n = s N`, for all lengths.
    Dynamic(f32),
    /// YaRN.
    Yarn(Yarn),
    /// Llama 3.1's scaling by wavelength.
    Llama3 {
        /// Divides low frequencies.
        factor: f32,
        /// Wavelengths above `original_max_position / low_freq_factor` are scaled in full.
        low_freq_factor: f32,
        /// Wavelengths below `original_max_position / high_freq_factor` are left alone.
        high_freq_factor: f32,
        /// Context length of pre-training.
        original_max_position: usize,
    },
    /// One divisor per frequency, `[head_dim / 2]` (GGUF's `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies with more than `beta_fast` turns in the context of
/// pre-training stay, those with less than `beta_slow` are divided by `factor`, a linear ramp over the index leads from
/// one to the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// Longest context over that of pre-training.
    pub factor: f32,
    /// Context length of pre-training.
    pub original_max_position: usize,
    /// Turns from which on a frequency stays; 32 in the paper.
    pub beta_fast: f32,
    /// Turns below which a frequency is divided; 1 in the paper.
    pub beta_slow: f32,
    /// Multiplies cosines and sines; [`Yarn::default_attention_factor`] in the paper.
    pub attention_factor: f32,
    /// The ramp begins and ends at whole indices.
    pub truncate: bool,
}

impl Yarn {
    /// The paper's `0.1 mscale ln(factor) + 1`, with `mscale` 1 unless a model says otherwise; 1 for factors up to 1.
    pub fn default_attention_factor(factor: f32, mscale: f32) -> f32 {
        if factor <= 1.0 { 1.0 } else { (0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0) as f32 }
    }

    /// `f` scaled; `theta` is its base, `d` the head's width.
    fn scale(&self, f: &[f64], theta: f64, d: f64) -> Vec<f64> {
        // The index whose frequency makes so many turns in the context of pre-training.
        let index_of = |n_turns: f32| {
            d * (self.original_max_position as f64 / (f64::from(n_turns) * TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (index_of(self.beta_fast), index_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d - 1.0));
        if low == high {
            high += 0.001;
        }
        let scaled = f.iter().enumerate().map(|(i, f)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            f / f64::from(self.factor) * ramp + f * (1.0 - ramp)
        });
        scaled.collect()
    }
}

impl Rope {
    /// Angular frequencies, `[head_dim / 2]`, radians per position.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let (theta, d) = (f64::from(self.theta), head_dim as f64);
        let frequencies = |theta: f64| (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / d)).collect::<Vec<f64>>();
        let base = frequencies(theta);
        let scaled = match &self.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear(factor) => base.iter().map(|f| f / f64::from(*factor)).collect(),
            RopeScaling::Dynamic(factor) => {
                let s = f64::from(*factor);
                frequencies(theta * (s * s - s + 1.0).powf(d / (d - 2.0)))
            }
            RopeScaling::Yarn(yarn) => yarn.scale(&base, theta, d),
            RopeScaling::Factors(factors) => base.iter().zip(factors).map(|(f, d)| f / f64::from(*d)).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let (factor, low, high) =
                    (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let n = *original_max_position as f64;
                base.iter()
                    .map(|&f| {
                        let wavelength = TAU / f;
                        if wavelength < n / high {
                            f
                        } else if wavelength > n / low {
                            f / factor
                        } else {
                            let smooth = (n / wavelength - low) / (high - low);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    })
                    .collect()
            }
        };
        scaled.into_iter().map(|f| f as f32).collect()
    }

    /// What cosines and sines are multiplied with.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        }
    }

    /// The rotations of heads of width `head_dim`.
    pub fn rotary(&self, head_dim: usize) -> Rotary {
        Rotary { inv_freq: self.inv_freq(head_dim), attention_factor: self.attention_factor() }
    }

    /// Cosines and sines of the first positions, each `[n_positions, head_dim / 2]`, float32.
    pub fn cos_sin(&self, head_dim: usize, n_positions: usize) -> (Vec<f32>, Vec<f32>) {
        let rotary = self.rotary(head_dim);
        let half = head_dim / 2;
        let (mut cos, mut sin) = (vec![0.0; n_positions * half], vec![0.0; n_positions * half]);
        for (position, (cos, sin)) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).enumerate() {
            rotary.at(position, cos, sin);
        }
        (cos, sin)
    }
}

/// Rotations by position.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `[head_dim / 2]`.
    inv_freq: Vec<f32>,
    attention_factor: f32,
}

impl Rotary {
    /// Writes the cosines and sines of `position`, `[head_dim / 2]` each.
    pub fn at(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
            let (s, c) = (position as f32 * freq).sin_cos();
            (*cos, *sin) = (c * self.attention_factor, s * self.attention_factor);
        }
    }
}

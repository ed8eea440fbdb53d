//! [`DecoderSpec`]: the one description of a decoder-only transformer that executors interpret.

/// Dimensions and options of a decoder-only transformer. All of a model that is not weights.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Upstream name, such as `LlamaForCausalLM`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding and of the output projection.
    pub vocab_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_position: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    /// Rotary position embedding; always in rotate-half (NeoX) order: loaders reorder interleaved weights.
    pub rope: Rope,
    /// The output projection is the embedding.
    pub tie_embeddings: bool,
    /// q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The attention output projection has a bias.
    pub o_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// q and k are RMS-normalised per head before the rotation (Qwen3).
    pub qk_norm: bool,
    /// Tokens see only this many tokens back, themselves included.
    pub sliding_window: Option<usize>,
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// Change of the rotary frequencies for contexts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by this factor.
    Linear(f32),
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

impl Rope {
    /// Angular frequencies, `[head_dim / 2]`, radians per position.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let base = (0..head_dim / 2)
            .map(|i| 1.0 / f64::from(self.theta).powf(2.0 * i as f64 / head_dim as f64))
            .collect::<Vec<f64>>();
        let scaled = match &self.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear(factor) => base.iter().map(|f| f / f64::from(*factor)).collect(),
            RopeScaling::Factors(factors) => base.iter().zip(factors).map(|(f, d)| f / f64::from(*d)).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let (factor, low, high) =
                    (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let n = *original_max_position as f64;
                base.iter()
                    .map(|&f| {
                        let wavelength = std::f64::consts::TAU / f;
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

    /// Cosines and sines, each `[n_positions, head_dim / 2]`, float32.
    pub fn cos_sin(&self, head_dim: usize, n_positions: usize) -> (Vec<f32>, Vec<f32>) {
        let inv_freq = self.inv_freq(head_dim);
        let angles = (0..n_positions).flat_map(|p| inv_freq.iter().map(move |f| p as f32 * f));
        angles.map(|a| (a.cos(), a.sin())).unzip()
    }
}

/// Name of a weight, independent of the file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Weight {
    /// `[vocab_size, hidden_size]`.
    Embedding,
    /// `[hidden_size]`.
    FinalNorm,
    /// `[vocab_size, hidden_size]`; absent when embeddings are tied.
    LmHead,
    /// A weight of the layer of this index.
    Layer(usize, LayerWeight),
}

/// Name of a weight within a layer. Projections are `[out_features, in_features]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerWeight {
    /// RMSNorm before attention, `[hidden_size]`.
    InputNorm,
    /// `[n_heads * head_dim, hidden_size]`.
    QProj,
    /// `[n_kv_heads * head_dim, hidden_size]`.
    KProj,
    /// `[n_kv_heads * head_dim, hidden_size]`.
    VProj,
    /// `[n_heads * head_dim]`.
    QBias,
    /// `[n_kv_heads * head_dim]`.
    KBias,
    /// `[n_kv_heads * head_dim]`.
    VBias,
    /// `[head_dim]`.
    QNorm,
    /// `[head_dim]`.
    KNorm,
    /// `[hidden_size, n_heads * head_dim]`.
    OProj,
    /// `[hidden_size]`.
    OBias,
    /// RMSNorm before the MLP, `[hidden_size]`.
    PostAttentionNorm,
    /// `[intermediate_size, hidden_size]`.
    GateProj,
    /// `[intermediate_size, hidden_size]`.
    UpProj,
    /// `[hidden_size, intermediate_size]`.
    DownProj,
    /// `[intermediate_size]`.
    GateBias,
    /// `[intermediate_size]`.
    UpBias,
    /// `[hidden_size]`.
    DownBias,
}

impl LayerWeight {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::InputNorm,
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::QNorm,
        Self::KNorm,
        Self::OProj,
        Self::OBias,
        Self::PostAttentionNorm,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
        Self::GateBias,
        Self::UpBias,
        Self::DownBias,
    ];
}

impl DecoderSpec {
    /// Shape of `weight`, `[rows, columns]` or `[n]`; `None` if the model does not have it.
    pub fn shape(&self, weight: Weight) -> Option<Vec<usize>> {
        use LayerWeight::*;
        let (h, inter) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let when = |has: bool, shape: Vec<usize>| has.then_some(shape);
        match weight {
            Weight::Embedding => Some(vec![self.vocab_size, h]),
            Weight::FinalNorm => Some(vec![h]),
            Weight::LmHead => when(!self.tie_embeddings, vec![self.vocab_size, h]),
            Weight::Layer(layer, _) if layer >= self.n_layers => None,
            Weight::Layer(_, w) => match w {
                InputNorm | PostAttentionNorm => Some(vec![h]),
                QProj => Some(vec![q, h]),
                KProj | VProj => Some(vec![kv, h]),
                QBias => when(self.qkv_bias, vec![q]),
                KBias | VBias => when(self.qkv_bias, vec![kv]),
                QNorm | KNorm => when(self.qk_norm, vec![self.head_dim]),
                OProj => Some(vec![h, q]),
                OBias => when(self.o_bias, vec![h]),
                GateProj | UpProj => Some(vec![inter, h]),
                DownProj => Some(vec![h, inter]),
                GateBias | UpBias => when(self.mlp_bias, vec![inter]),
                DownBias => when(self.mlp_bias, vec![h]),
            },
        }
    }

    /// Every weight of the model.
    pub fn weights(&self) -> impl Iterator<Item = Weight> + '_ {
        let layers =
            (0..self.n_layers).flat_map(|layer| LayerWeight::ALL.into_iter().map(move |w| Weight::Layer(layer, w)));
        [Weight::Embedding, Weight::FinalNorm, Weight::LmHead]
            .into_iter()
            .chain(layers)
            .filter(|&w| self.shape(w).is_some())
    }

    /// Parameters of the model.
    pub fn n_parameters(&self) -> usize {
        self.weights().filter_map(|w| self.shape(w)).map(|s| s.iter().product::<usize>()).sum()
    }

    /// Bytes of KV cache per token, for elements of `element_size` bytes.
    pub fn kv_bytes_per_token(&self, element_size: usize) -> usize {
        2 * self.n_layers * self.n_kv_heads * self.head_dim * element_size
    }
}

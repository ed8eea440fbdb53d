//! [`DecoderSpec`]: the one description of a decoder-only transformer that executors interpret.

mod moe;
mod rope;

pub use moe::{Moe, Route};
pub use rope::{Rope, RopeScaling, Rotary, Yarn};

/// Dimensions and options of a decoder-only transformer. All of a model that is not weights.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Upstream name, such as `LlamaForCausalLM`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP of layers without experts.
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
    /// Mixture of experts in place of the MLP, in all layers or some.
    pub moe: Option<Moe>,
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
    /// A weight of an expert: layer, expert.
    Expert(usize, usize, ExpertWeight),
}

/// Name of a projection of one expert's gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpertWeight {
    /// `[intermediate_size, hidden_size]` of [`Moe`].
    Gate,
    /// `[intermediate_size, hidden_size]` of [`Moe`].
    Up,
    /// `[hidden_size, intermediate_size]` of [`Moe`].
    Down,
}

impl ExpertWeight {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
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
    /// Logits of the experts, `[n_experts, hidden_size]`.
    Router,
    /// `[shared_intermediate_size, hidden_size]` of [`Moe`].
    SharedGateProj,
    /// `[shared_intermediate_size, hidden_size]` of [`Moe`].
    SharedUpProj,
    /// `[hidden_size, shared_intermediate_size]` of [`Moe`].
    SharedDownProj,
    /// Logit of the shared expert's share, `[1, hidden_size]`.
    SharedRouter,
}

impl LayerWeight {
    /// All of them.
    pub const ALL: [Self; 23] = [
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
        Self::Router,
        Self::SharedGateProj,
        Self::SharedUpProj,
        Self::SharedDownProj,
        Self::SharedRouter,
    ];
}

impl DecoderSpec {
    /// Shape of `weight`, `[rows, columns]` or `[n]`; `None` if the model does not have it.
    pub fn shape(&self, weight: Weight) -> Option<Vec<usize>> {
        use LayerWeight::*;
        let (h, inter) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let when = |has: bool, shape: Vec<usize>| has.then_some(shape);
        let moe = |layer| self.moe_of(layer);
        match weight {
            Weight::Embedding => Some(vec![self.vocab_size, h]),
            Weight::FinalNorm => Some(vec![h]),
            Weight::LmHead => when(!self.tie_embeddings, vec![self.vocab_size, h]),
            Weight::Layer(layer, _) | Weight::Expert(layer, ..) if layer >= self.n_layers => None,
            Weight::Expert(layer, expert, w) => {
                let moe = moe(layer).filter(|moe| expert < moe.n_experts)?;
                Some(match w {
                    ExpertWeight::Gate | ExpertWeight::Up => vec![moe.intermediate_size, h],
                    ExpertWeight::Down => vec![h, moe.intermediate_size],
                })
            }
            Weight::Layer(layer, w) => match w {
                InputNorm | PostAttentionNorm => Some(vec![h]),
                QProj => Some(vec![q, h]),
                KProj | VProj => Some(vec![kv, h]),
                QBias => when(self.qkv_bias, vec![q]),
                KBias | VBias => when(self.qkv_bias, vec![kv]),
                QNorm | KNorm => when(self.qk_norm, vec![self.head_dim]),
                OProj => Some(vec![h, q]),
                OBias => when(self.o_bias, vec![h]),
                GateProj | UpProj => when(moe(layer).is_none(), vec![inter, h]),
                DownProj => when(moe(layer).is_none(), vec![h, inter]),
                GateBias | UpBias => when(self.mlp_bias && moe(layer).is_none(), vec![inter]),
                DownBias => when(self.mlp_bias && moe(layer).is_none(), vec![h]),
                Router => Some(vec![moe(layer)?.n_experts, h]),
                SharedGateProj | SharedUpProj => Some(vec![moe(layer)?.shared_intermediate_size?, h]),
                SharedDownProj => Some(vec![h, moe(layer)?.shared_intermediate_size?]),
                SharedRouter => moe(layer)?.shared_intermediate_size.map(|_| vec![1, h]),
            },
        }
    }

    /// The mixture of experts of `layer`; `None` if it has a plain MLP.
    pub fn moe_of(&self, layer: usize) -> Option<&Moe> {
        self.moe.as_ref().filter(|moe| !moe.dense_layers.contains(&layer))
    }

    /// Every weight of the model.
    pub fn weights(&self) -> impl Iterator<Item = Weight> + '_ {
        let layers = (0..self.n_layers).flat_map(|layer| {
            let n_experts = self.moe_of(layer).map_or(0, |moe| moe.n_experts);
            let experts = (0..n_experts).flat_map(move |e| ExpertWeight::ALL.map(|w| Weight::Expert(layer, e, w)));
            LayerWeight::ALL.into_iter().map(move |w| Weight::Layer(layer, w)).chain(experts)
        });
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

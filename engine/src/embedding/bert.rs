//! [`Bert`]: the encoder of Devlin et al. 2018 (arXiv:1810.04805) in Burn tensors, float32.
//!
//! The texts of a batch lie one after the other, `[n_tokens, hidden_size]`, without padding; only attention looks at
//! each on its own.

use burn::tensor::{
    Device, Int, Tensor, TensorData,
    activation::{gelu, relu, softmax},
};

use super::{BATCH_TOKENS, BertFiles, Encoder, Pooling, pooling::Pool};
use crate::{Error, models::HfConfig, weights::gguf::Gguf};

/// Sizes in GGUF files that are taken for broken above this.
const MAX_GGUF_SIZE: usize = 1 << 24;

/// The sizes of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct BertSpec {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Encoder layers.
    pub n_layers: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Rows of the position embedding.
    pub max_position: usize,
    /// Rows of the segment embedding, 0 if there is none; all tokens are of segment 0.
    pub n_segments: usize,
    /// Added to variances.
    pub norm_eps: f32,
    activation: Activation,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Activation {
    Gelu,
    Relu,
}

impl BertSpec {
    /// The model of a config.json.
    ///
    /// # Errors
    /// [`Error::Model`] naming a field that is missing or has a value that is not supported.
    pub fn from_config(config: &HfConfig) -> Result<Self, Error> {
        let activation = match config.text("hidden_act")?.unwrap_or("gelu") {
            "gelu" => Activation::Gelu,
            "relu" => Activation::Relu,
            other => return Err(config.error(format!("hidden_act: '{other}' is not supported; gelu and relu are"))),
        };
        if let Some(kind) = config.text("position_embedding_type")?
            && kind != "absolute"
        {
            return Err(config.error(format!("position_embedding_type: '{kind}' is not supported; absolute is")));
        }
        let spec = Self {
            vocab_size: config.required_count("vocab_size")?,
            hidden_size: config.required_count("hidden_size")?,
            n_layers: config.required_count("num_hidden_layers")?,
            n_heads: config.required_count("num_attention_heads")?,
            intermediate_size: config.required_count("intermediate_size")?,
            max_position: config.required_count("max_position_embeddings")?,
            n_segments: config.count("type_vocab_size")?.unwrap_or(2),
            norm_eps: config.number("layer_norm_eps")?.unwrap_or(1e-12),
            activation,
        };
        if !spec.hidden_size.is_multiple_of(spec.n_heads) {
            return Err(config.error("num_attention_heads: must divide hidden_size"));
        }
        Ok(spec)
    }

    /// The model of a GGUF file's metadata.
    ///
    /// # Errors
    /// [`Error::Model`] naming a key that is missing or has a value that is not supported.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, Error> {
        let count = |name: &str| match gguf.integer(&format!("bert.{name}"))? {
            Some(n) if (1..=MAX_GGUF_SIZE).contains(&n) => Ok(n),
            Some(n) => Err(gguf.error(format!("'bert.{name}' is {n}; it must be between 1 and {MAX_GGUF_SIZE}"))),
            None => Err(gguf.error(format!("metadata key 'bert.{name}' is missing"))),
        };
        if gguf.bool("bert.attention.causal")? == Some(true) {
            return Err(gguf.error("'bert.attention.causal' is true, which is not supported"));
        }
        let rows = |name: &str| match gguf.tensor_shape(name) {
            Some(&[n, _]) if n > 0 => Ok(n),
            _ => Err(gguf.error(format!("tensor '{name}' is missing or not two-dimensional"))),
        };
        let spec = Self {
            vocab_size: rows("token_embd.weight")?,
            hidden_size: count("embedding_length")?,
            n_layers: count("block_count")?,
            n_heads: count("attention.head_count")?,
            intermediate_size: count("feed_forward_length")?,
            max_position: count("context_length")?,
            n_segments: gguf.tensor_shape("token_types.weight").map_or(Ok(0), |_| rows("token_types.weight"))?,
            norm_eps: gguf.float("bert.attention.layer_norm_epsilon")?.unwrap_or(1e-12) as f32,
            activation: Activation::Gelu,
        };
        if !spec.hidden_size.is_multiple_of(spec.n_heads) {
            return Err(gguf.error("'bert.attention.head_count' must divide 'bert.embedding_length'"));
        }
        Ok(spec)
    }

    /// Parameters of the encoder.
    pub fn n_parameters(&self) -> usize {
        let (h, inter) = (self.hidden_size, self.intermediate_size);
        let layer = 4 * (h * h + h) + 2 * h * inter + inter + h + 4 * h;
        (self.vocab_size + self.max_position + self.n_segments + 2) * h + self.n_layers * layer
    }
}

/// `y = x W^T + b`.
struct Linear {
    /// `[in_features, out_features]`.
    weight: Tensor<2>,
    /// `[1, out_features]`.
    bias: Tensor<2>,
}

impl Linear {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        x.matmul(self.weight.clone()) + self.bias.clone()
    }
}

struct LayerNorm {
    /// `[1, hidden_size]`.
    weight: Tensor<2>,
    bias: Tensor<2>,
    eps: f32,
}

impl LayerNorm {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let centred = x.clone() - x.mean_dim(1);
        let variance = (centred.clone() * centred.clone()).mean_dim(1);
        centred / (variance + self.eps).sqrt() * self.weight.clone() + self.bias.clone()
    }
}

struct Layer {
    /// Query, key and value rows, one after the other.
    qkv: Linear,
    attention_out: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

/// A loaded encoder.
pub struct Bert {
    spec: BertSpec,
    device: Device,
    /// `[vocab_size, hidden_size]`.
    words: Tensor<2>,
    /// `[max_position, hidden_size]`: positions, with segment 0 added.
    positions: Tensor<2>,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl Bert {
    /// Loads the weights of `spec` from `files`.
    ///
    /// # Errors
    /// [`Error::Model`] naming a tensor that is missing or of another shape.
    pub fn load(spec: BertSpec, files: BertFiles<'_>, device: &Device) -> Result<Self, Error> {
        let loader = Loader { spec: &spec, files, device };
        let h = spec.hidden_size;
        let mut positions = loader.matrix("embeddings.position_embeddings.weight", [spec.max_position, h])?;
        if spec.n_segments > 0 {
            let segments = loader.matrix("embeddings.token_type_embeddings.weight", [spec.n_segments, h])?;
            positions = positions + segments.slice([0..1, 0..h]);
        }
        Ok(Self {
            words: loader.matrix("embeddings.word_embeddings.weight", [spec.vocab_size, h])?,
            positions,
            norm: loader.norm("embeddings.LayerNorm")?,
            layers: (0..spec.n_layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?,
            device: device.clone(),
            spec,
        })
    }

    /// The sizes.
    pub fn spec(&self) -> &BertSpec {
        &self.spec
    }

    /// The last hidden states of each text, `[n_tokens, hidden_size]`. `texts`: token ids, none empty, none longer than
    /// `max_position`, all in the vocabulary.
    pub fn forward(&self, texts: &[&[u32]]) -> Vec<Tensor<2>> {
        let ints = |values: Vec<i64>| {
            let n = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [n]), &self.device)
        };
        let ids = ints(texts.iter().flat_map(|text| text.iter().map(|&id| i64::from(id))).collect());
        let positions = ints(texts.iter().flat_map(|text| 0..text.len() as i64).collect());
        let x = self.words.clone().select(0, ids) + self.positions.clone().select(0, positions);
        let mut x = self.norm.forward(x);
        let ends: Vec<usize> = texts
            .iter()
            .scan(0, |end, text| {
                *end += text.len();
                Some(*end)
            })
            .collect();
        let ranges: Vec<_> = ends.iter().zip(texts).map(|(&end, text)| end - text.len()..end).collect();
        let h = self.spec.hidden_size;
        for layer in &self.layers {
            let qkv = layer.qkv.forward(x.clone());
            let attended = ranges.iter().map(|range| self.attend(qkv.clone().slice([range.clone(), 0..3 * h])));
            let attended = layer.attention_out.forward(Tensor::cat(attended.collect(), 0));
            x = layer.attention_norm.forward(attended + x);
            let up = layer.up.forward(x.clone());
            let up = match self.spec.activation {
                Activation::Gelu => gelu(up),
                Activation::Relu => relu(up),
            };
            x = layer.norm.forward(layer.down.forward(up) + x);
        }
        ranges.into_iter().map(|range| x.clone().slice([range, 0..h])).collect()
    }

    /// `[n, 3 * hidden_size]` of one text to `[n, hidden_size]`: every token sees every token.
    fn attend(&self, qkv: Tensor<2>) -> Tensor<2> {
        let (h, n_heads) = (self.spec.hidden_size, self.spec.n_heads);
        let [n, _] = qkv.dims();
        let heads = |part: usize| -> Tensor<3> {
            qkv.clone().slice([0..n, part * h..(part + 1) * h]).reshape([n, n_heads, h / n_heads]).swap_dims(0, 1)
        };
        let scale = 1.0 / ((h / n_heads) as f32).sqrt();
        let scores = heads(0).matmul(heads(1).swap_dims(1, 2)) * scale;
        softmax(scores, 2).matmul(heads(2)).swap_dims(0, 1).reshape([n, h])
    }
}

impl Encoder for Bert {
    fn encode(&mut self, texts: &[&[u32]], pooling: Pooling) -> Result<Vec<Vec<f32>>, Error> {
        let mut vectors = Vec::with_capacity(texts.len());
        let mut rest = texts;
        while !rest.is_empty() {
            let mut n_tokens = 0;
            let fits = |text: &&&[u32]| {
                n_tokens += text.len();
                n_tokens <= BATCH_TOKENS
            };
            let n = rest.iter().take_while(fits).count().max(1);
            for states in self.forward(&rest[..n]) {
                let data = states.try_into_data().map_err(|e| Error::Device(e.to_string()))?;
                let states: Vec<f32> =
                    data.try_into_vec().map_err(|e| Error::Device(format!("hidden states are not float32: {e:?}")))?;
                let mut pool = Pool::new(pooling, self.spec.hidden_size);
                pool.add(&states);
                vectors.push(pool.finish());
            }
            rest = &rest[n..];
        }
        Ok(vectors)
    }
}

struct Loader<'a> {
    spec: &'a BertSpec,
    files: BertFiles<'a>,
    device: &'a Device,
}

impl Loader<'_> {
    fn values(&self, name: &str, shape: Vec<usize>) -> Result<Vec<f32>, Error> {
        Ok(self.files.tensor(name, shape)?.to_f32().into_owned())
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Tensor<2>, Error> {
        Ok(Tensor::from_data(TensorData::new(self.values(name, shape.to_vec())?, shape), self.device))
    }

    fn row(&self, name: &str, n: usize) -> Result<Tensor<2>, Error> {
        Ok(Tensor::from_data(TensorData::new(self.values(name, vec![n])?, [1, n]), self.device))
    }

    fn linear(&self, name: &str, (n_in, n_out): (usize, usize)) -> Result<Linear, Error> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), [n_out, n_in])?.transpose(),
            bias: self.row(&format!("{name}.bias"), n_out)?,
        })
    }

    fn norm(&self, name: &str) -> Result<LayerNorm, Error> {
        let h = self.spec.hidden_size;
        Ok(LayerNorm {
            weight: self.row(&format!("{name}.weight"), h)?,
            bias: self.row(&format!("{name}.bias"), h)?,
            eps: self.spec.norm_eps,
        })
    }

    fn layer(&self, layer: usize) -> Result<Layer, Error> {
        let (h, inter) = (self.spec.hidden_size, self.spec.intermediate_size);
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let parts = ["query", "key", "value"].map(|part| self.linear(&name(&format!("attention.self.{part}")), (h, h)));
        let [q, k, v] = parts;
        let parts = [q?, k?, v?];
        let join = |of: fn(&Linear) -> Tensor<2>| Tensor::cat(parts.iter().map(of).collect(), 1);
        Ok(Layer {
            qkv: Linear { weight: join(|it| it.weight.clone()), bias: join(|it| it.bias.clone()) },
            attention_out: self.linear(&name("attention.output.dense"), (h, h))?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"))?,
            up: self.linear(&name("intermediate.dense"), (h, inter))?,
            down: self.linear(&name("output.dense"), (inter, h))?,
            norm: self.norm(&name("output.LayerNorm"))?,
        })
    }
}

//! Weights and forward pass of a [`DecoderSpec`] in Burn tensors.

use std::ops::Range;

use ::burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData, activation::silu};

use super::{attention::AttentionPlan, experts::Experts, int_tensor};
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Weight},
    executors::Capacity,
    step::{PAGE_SIZE, StepInput},
    weights::WeightSource,
};

/// `y = x W^T + b`.
pub(super) struct Linear {
    /// `[out_features, in_features]`.
    weight: Tensor<2>,
    /// `[1, out_features]`.
    bias: Option<Tensor<2>>,
}

impl Linear {
    // x: [n_tokens, in_features] -> [n_tokens, out_features]
    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = x.matmul(self.weight.clone().transpose());
        match &self.bias {
            Some(bias) => y + bias.clone(),
            None => y,
        }
    }
}

/// `down(silu(gate(x)) * up(x))`.
pub(super) struct GatedMlp {
    /// Gate rows, then up rows.
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

impl GatedMlp {
    // h: [n_tokens, hidden_size] -> [n_tokens, hidden_size]
    pub(super) fn forward(&self, h: Tensor<2>) -> Tensor<2> {
        let gate_up = self.gate_up.forward(h);
        let [n_tokens, width] = gate_up.dims();
        let gate = gate_up.clone().slice([0..n_tokens, 0..width / 2]);
        let up = gate_up.slice([0..n_tokens, width / 2..width]);
        self.down.forward(silu(gate) * up)
    }
}

enum Mlp {
    Dense(Box<GatedMlp>),
    Experts(Box<Experts>),
}

struct Layer {
    input_norm: Tensor<2>,
    /// q, k and v rows, one after the other.
    qkv: Linear,
    /// Per-head norms of q and k, each `[1, 1, head_dim]`.
    qk_norm: Option<(Tensor<3>, Tensor<3>)>,
    o: Linear,
    post_attention_norm: Tensor<2>,
    mlp: Mlp,
    /// `[n_pages * PAGE_SIZE, n_kv_heads * head_dim]`.
    k_cache: Tensor<2>,
    v_cache: Tensor<2>,
}

pub(super) struct BurnModel {
    spec: DecoderSpec,
    device: Device,
    /// `[vocab_size, hidden_size]`.
    embedding: Tensor<2>,
    layers: Vec<Layer>,
    final_norm: Tensor<2>,
    /// `None` if tied to the embedding.
    lm_head: Option<Linear>,
    /// `[max_model_len, head_dim / 2]`.
    cos: Tensor<2>,
    sin: Tensor<2>,
}

impl BurnModel {
    pub(super) fn load(
        spec: &DecoderSpec,
        weights: &dyn WeightSource,
        capacity: &Capacity,
        device: &Device,
    ) -> Result<Self, Error> {
        let loader = Loader { spec, weights, device };
        let n_slots = capacity.n_pages * PAGE_SIZE;
        let (cos, sin) = spec.rope.cos_sin(spec.head_dim, capacity.max_model_len);
        let table =
            |values| Tensor::from_data(TensorData::new(values, [capacity.max_model_len, spec.head_dim / 2]), device);
        Ok(Self {
            embedding: loader.matrix(&[Weight::Embedding])?,
            layers: (0..spec.n_layers).map(|layer| loader.layer(layer, n_slots)).collect::<Result<_, _>>()?,
            final_norm: loader.row(&[Weight::FinalNorm])?,
            lm_head: if spec.tie_embeddings { None } else { Some(loader.linear(&[Weight::LmHead], &[])?) },
            cos: table(cos),
            sin: table(sin),
            spec: spec.clone(),
            device: device.clone(),
        })
    }

    pub(super) fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Hidden states before the final norm, `[n_tokens, hidden_size]`.
    pub(super) fn forward(&mut self, step: &StepInput, plan: &AttentionPlan) -> Result<Tensor<2>, Error> {
        let ints = |values: &mut dyn Iterator<Item = i64>| int_tensor(values.collect(), &self.device);
        // This executor runs one step at a time, so every token is known.
        let token_ids = ints(&mut step.token_ids.iter().map(|&t| i64::from(t)));
        let positions = ints(&mut step.positions.iter().map(|&p| i64::from(p)));
        let slots = ints(&mut step.slot_mapping.iter().map(|&s| i64::from(s)));

        let eps = self.spec.norm_eps;
        let rotation = Rotation {
            cos: self.cos.clone().select(0, positions.clone()).unsqueeze_dim(1),
            sin: self.sin.clone().select(0, positions).unsqueeze_dim(1),
        };
        let mut x = self.embedding.clone().select(0, token_ids);
        for layer in &mut self.layers {
            let h = rms_norm(x.clone(), &layer.input_norm, eps);
            x = x + layer.attention(h, (&rotation, &slots), &self.spec, plan);
            let h = rms_norm(x.clone(), &layer.post_attention_norm, eps);
            x = x + match &layer.mlp {
                Mlp::Dense(mlp) => mlp.forward(h),
                Mlp::Experts(experts) => experts.forward(h)?,
            };
        }
        Ok(x)
    }

    /// The final norm of `hidden`, `[n_rows, hidden_size]`.
    pub(super) fn norm(&self, hidden: Tensor<2>) -> Tensor<2> {
        rms_norm(hidden, &self.final_norm, self.spec.norm_eps)
    }

    /// `hidden`: `[n_rows, hidden_size]`; result: `[n_rows, vocab_size]`.
    pub(super) fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let h = self.norm(hidden);
        match &self.lm_head {
            Some(head) => head.forward(h),
            None => h.matmul(self.embedding.clone().transpose()),
        }
    }
}

impl Layer {
    // h: [n_tokens, hidden_size] -> [n_tokens, hidden_size]
    fn attention(
        &mut self,
        h: Tensor<2>,
        (rotation, slots): (&Rotation, &Tensor<1, Int>),
        spec: &DecoderSpec,
        plan: &AttentionPlan,
    ) -> Tensor<2> {
        let (n_q, n_kv, d) = (spec.n_heads, spec.n_kv_heads, spec.head_dim);
        let [n_tokens, _] = h.dims();
        let qkv = self.qkv.forward(h);
        let heads = |columns: Range<usize>| {
            let n = columns.len();
            qkv.clone().slice([0..n_tokens, columns.start * d..columns.end * d]).reshape([n_tokens, n, d])
        };
        let (mut q, mut k) = (heads(0..n_q), heads(n_q..n_q + n_kv));
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = rms_norm_heads(q, q_norm, spec.norm_eps);
            k = rms_norm_heads(k, k_norm, spec.norm_eps);
        }
        let (q, k) = (rotation.apply(q), rotation.apply(k));
        let v = qkv.slice([0..n_tokens, (n_q + n_kv) * d..(n_q + 2 * n_kv) * d]);
        let k = k.reshape([n_tokens, n_kv * d]);
        self.k_cache.inplace(|c| c.select_assign(0, slots.clone(), k, IndexingUpdateOp::Assign));
        self.v_cache.inplace(|c| c.select_assign(0, slots.clone(), v, IndexingUpdateOp::Assign));
        self.o.forward(plan.attend(q, &self.k_cache, &self.v_cache))
    }
}

/// Rotary embedding of the step's rows; each `[n_tokens, 1, head_dim / 2]`.
struct Rotation {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

impl Rotation {
    // x: [n_tokens, n_heads, head_dim] -> same
    fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, _, d] = x.dims();
        let (a, b) = (x.clone().narrow(2, 0, d / 2), x.narrow(2, d / 2, d / 2));
        let (cos, sin) = (&self.cos, &self.sin);
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos.clone() + a * sin.clone();
        Tensor::cat(vec![first, second], 2)
    }
}

// x: [n_tokens, hidden_size], weight: [1, hidden_size]
fn rms_norm(x: Tensor<2>, weight: &Tensor<2>, eps: f32) -> Tensor<2> {
    let scale = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    x * scale * weight.clone()
}

// x: [n_tokens, n_heads, head_dim], weight: [1, 1, head_dim]
fn rms_norm_heads(x: Tensor<3>, weight: &Tensor<3>, eps: f32) -> Tensor<3> {
    let scale = (x.clone() * x.clone()).mean_dim(2).add_scalar(eps).sqrt().recip();
    x * scale * weight.clone()
}

struct Loader<'a> {
    spec: &'a DecoderSpec,
    weights: &'a dyn WeightSource,
    device: &'a Device,
}

impl Loader<'_> {
    fn layer(&self, layer: usize, n_slots: usize) -> Result<Layer, Error> {
        use LayerWeight::*;
        let of = |w: LayerWeight| Weight::Layer(layer, w);
        let spec = self.spec;
        let kv_dim = spec.n_kv_heads * spec.head_dim;
        // Zeroed by the allocator, so pages that no sequence ever used cost no memory.
        let cache = || Tensor::from_data(TensorData::new(vec![0f32; n_slots * kv_dim], [n_slots, kv_dim]), self.device);
        let head_norm = |w| self.row(&[of(w)]).map(|t| t.unsqueeze_dim(0));
        Ok(Layer {
            input_norm: self.row(&[of(InputNorm)])?,
            qkv: self.linear(&[of(QProj), of(KProj), of(VProj)], &[of(QBias), of(KBias), of(VBias)])?,
            qk_norm: if spec.qk_norm { Some((head_norm(QNorm)?, head_norm(KNorm)?)) } else { None },
            o: self.linear(&[of(OProj)], &[of(OBias)])?,
            post_attention_norm: self.row(&[of(PostAttentionNorm)])?,
            mlp: match spec.moe_of(layer) {
                Some(moe) => Mlp::Experts(Box::new(self.experts(layer, moe)?)),
                None => Mlp::Dense(Box::new(GatedMlp {
                    gate_up: self.linear(&[of(GateProj), of(UpProj)], &[of(GateBias), of(UpBias)])?,
                    down: self.linear(&[of(DownProj)], &[of(DownBias)])?,
                })),
            },
            k_cache: cache(),
            v_cache: cache(),
        })
    }

    fn experts(&self, layer: usize, moe: &Moe) -> Result<Experts, Error> {
        use LayerWeight::{Router, SharedDownProj, SharedGateProj, SharedRouter, SharedUpProj};
        let of = |w: LayerWeight| Weight::Layer(layer, w);
        let mlp = |gate: Weight, up: Weight, down: Weight| -> Result<GatedMlp, Error> {
            Ok(GatedMlp { gate_up: self.linear(&[gate, up], &[])?, down: self.linear(&[down], &[])? })
        };
        let expert = |expert: usize| {
            let [gate, up, down] = ExpertWeight::ALL.map(|w| Weight::Expert(layer, expert, w));
            mlp(gate, up, down)
        };
        Ok(Experts {
            router: self.linear(&[of(Router)], &[])?,
            experts: (0..moe.n_experts).map(expert).collect::<Result<_, _>>()?,
            shared: match moe.shared_intermediate_size {
                Some(_) => Some((
                    self.linear(&[of(SharedRouter)], &[])?,
                    mlp(of(SharedGateProj), of(SharedUpProj), of(SharedDownProj))?,
                )),
                None => None,
            },
            moe: moe.clone(),
        })
    }

    /// The projections `weights`, one below the other, with those of `biases` that the model has.
    fn linear(&self, weights: &[Weight], biases: &[Weight]) -> Result<Linear, Error> {
        let has_bias = biases.iter().any(|&b| self.spec.shape(b).is_some());
        Ok(Linear { weight: self.matrix(weights)?, bias: if has_bias { Some(self.row(biases)?) } else { None } })
    }

    fn matrix(&self, weights: &[Weight]) -> Result<Tensor<2>, Error> {
        let (values, n_columns) = self.read(weights)?;
        let n_rows = values.len() / n_columns;
        Ok(Tensor::from_data(TensorData::new(values, [n_rows, n_columns]), self.device))
    }

    fn row(&self, weights: &[Weight]) -> Result<Tensor<2>, Error> {
        let (values, _) = self.read(weights)?;
        let n = values.len();
        Ok(Tensor::from_data(TensorData::new(values, [1, n]), self.device))
    }

    fn read(&self, weights: &[Weight]) -> Result<(Vec<f32>, usize), Error> {
        let views = weights.iter().map(|&w| self.weights.get(w)).collect::<Result<Vec<_>, _>>()?;
        let mut values = vec![0.0; views.iter().map(|v| v.n_elements()).sum()];
        let mut rest = values.as_mut_slice();
        for view in &views {
            let (part, after) = rest.split_at_mut(view.n_elements());
            view.read_f32_into(part);
            rest = after;
        }
        Ok((values, views.first().map_or(1, |v| v.n_columns())))
    }
}

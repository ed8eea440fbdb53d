//! Weights and forward pass of a [`DecoderSpec`] on plain slices.

use super::{
    activations::Activations,
    arena::Arena,
    attention::{Attention, AttentionInput, AttentionPlan},
    disjoint::Disjoint,
    experts::{ExpertBuffers, Experts},
    kernels::Kernels,
    kv_cache::{KvCache, KvLayout},
    linear::Linear,
    mlp::{GatedMlp, MlpBuffers},
    pool::Pool,
};
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Rotary, Weight},
    executors::Capacity,
    quant::QuantFormat,
    step::StepInput,
    weights::{StoredTensor, WeightSource},
};

/// Rows of logits that are computed at once: those of a whole prompt may be larger than the model.
pub const LOGIT_ROWS: usize = 64;

struct Layer {
    input_norm: Vec<f32>,
    /// q, k and v rows, one after the other.
    qkv: Linear,
    /// Per-head norms of q and k, `[head_dim]`.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    o: Linear,
    post_attention_norm: Vec<f32>,
    mlp: Mlp,
    cache: KvCache,
}

/// What comes after attention.
enum Mlp {
    Dense(GatedMlp),
    Experts(Box<Experts>),
}

/// How a model is kept in memory.
#[derive(Clone, Copy)]
pub struct Storage {
    /// Keys and values.
    pub kv_layout: KvLayout,
    /// What float weights of projections are rounded to.
    pub quantization: Option<&'static dyn QuantFormat>,
}

/// A model and the buffers of a step.
pub struct CpuModel {
    spec: DecoderSpec,
    kernels: &'static Kernels,
    pool: Pool,
    /// `[vocab_size, hidden_size]`.
    embedding: StoredTensor,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    lm_head: Linear,
    rotary: Rotary,
    attention: Attention,
    buffers: Buffers,
}

/// What a step computes with; memory that no step reaches is never touched.
struct Buffers {
    /// The residual stream, `[n_tokens, hidden_size]`.
    x: Vec<f32>,
    /// Input of the projections of width `hidden_size`.
    hidden: Activations,
    /// `[n_tokens, (n_heads + 2 * n_kv_heads) * head_dim]`.
    qkv: Vec<f32>,
    /// `[n_tokens, n_heads * head_dim]`.
    attended: Vec<f32>,
    /// Input of the attention's output projection.
    o_input: Activations,
    /// Of layers without experts.
    mlp: MlpBuffers,
    /// `None` if no layer has experts.
    experts: Option<ExpertBuffers>,
    /// `[n_tokens, head_dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Input of the output projection, `[LOGIT_ROWS, hidden_size]`.
    head_input: Activations,
    /// `[LOGIT_ROWS, vocab_size]`.
    logits: Vec<f32>,
}

impl CpuModel {
    /// Loads `weights` for steps of the size that `capacity` allows.
    pub fn load(
        spec: &DecoderSpec,
        weights: &dyn WeightSource,
        (capacity, storage): (&Capacity, Storage),
        (kernels, pool): (&'static Kernels, Pool),
    ) -> Result<Self, Error> {
        let mut loader = Loader { spec, weights, storage, arena: Arena::default(), n_threads: pool.n_threads() };
        let embedding = weights.keep(Weight::Embedding)?;
        let head = if spec.tie_embeddings { embedding.clone() } else { weights.keep(Weight::LmHead)? };
        let lm_head = Linear::new(vec![loader.rounded(head)], None, (&mut loader.arena, pool.n_threads()))?;
        let layers =
            (0..spec.n_layers).map(|layer| loader.layer(layer, capacity.n_pages)).collect::<Result<Vec<_>, _>>()?;

        let n = capacity.max_num_batched_tokens;
        let (q, kv) = (spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim);
        let dense: Vec<&GatedMlp> = layers.iter().filter_map(Layer::dense_mlp).collect();
        let any_experts = |wants: fn(&Experts) -> bool| {
            layers.iter().any(|layer| matches!(&layer.mlp, Mlp::Experts(experts) if wants(experts)))
        };
        let dense_size = if dense.is_empty() { 0 } else { spec.intermediate_size };
        let experts = spec.moe.as_ref().map(|moe| {
            let integers = [
                any_experts(|e| e.experts.iter().any(|mlp| mlp.gate_up.wants_integers())),
                any_experts(|e| e.experts.iter().any(|mlp| mlp.down.wants_integers())),
                any_experts(|e| e.shared.as_ref().is_some_and(|mlp| mlp.down.wants_integers())),
            ];
            ExpertBuffers::new(spec, moe, n, integers)
        });
        let hidden = match spec.moe {
            None => {
                let of = layers.iter().map(|l| &l.qkv).chain(dense.iter().map(|mlp| &mlp.gate_up));
                Linear::inputs(of, n, spec.hidden_size)
            }
            // Rows go on to the experts as floats.
            Some(_) => {
                let integers = layers.iter().any(|l| l.qkv.wants_integers())
                    || dense.iter().any(|mlp| mlp.gate_up.wants_integers())
                    || any_experts(|e| e.router.wants_integers())
                    || any_experts(|e| e.shared.as_ref().is_some_and(|mlp| mlp.gate_up.wants_integers()));
                Activations::new(n, spec.hidden_size, integers)
            }
        };
        let buffers = Buffers {
            x: vec![0.0; n * spec.hidden_size],
            hidden,
            qkv: vec![0.0; n * (q + 2 * kv)],
            attended: vec![0.0; n * q],
            o_input: Linear::inputs(layers.iter().map(|l| &l.o), n, q),
            mlp: MlpBuffers::new(dense_size, Linear::inputs(dense.iter().map(|mlp| &mlp.down), n, dense_size), n),
            experts,
            cos: vec![0.0; n * (spec.head_dim / 2)],
            sin: vec![0.0; n * (spec.head_dim / 2)],
            head_input: Linear::inputs([&lm_head], LOGIT_ROWS, spec.hidden_size),
            logits: vec![0.0; LOGIT_ROWS * spec.vocab_size],
        };
        Ok(Self {
            kernels,
            pool,
            embedding,
            layers,
            final_norm: loader.values(Weight::FinalNorm)?,
            lm_head,
            rotary: spec.rope.rotary(spec.head_dim),
            attention: Attention::new(spec),
            buffers,
            spec: spec.clone(),
        })
    }

    /// Elements of a logits row.
    pub fn vocab_size(&self) -> usize {
        self.spec.vocab_size
    }

    /// The inner loops in use.
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Bytes of weights in memory, without what lies in memory maps.
    pub fn weight_bytes(&self) -> usize {
        let of = |l: &Layer| {
            let mlp = match &l.mlp {
                Mlp::Dense(mlp) => mlp.n_bytes(),
                Mlp::Experts(experts) => experts.n_bytes(),
            };
            l.qkv.n_bytes() + l.o.n_bytes() + mlp
        };
        self.layers.iter().map(of).sum::<usize>() + self.lm_head.n_bytes()
    }

    /// Computes the hidden states before the final norm, which stay in the model's buffers.
    pub fn forward(&mut self, step: &StepInput) {
        let plan = AttentionPlan::new(&self.spec, step);
        self.embed(step);
        let n = step.n_tokens();
        let (kernels, spec, eps) = (self.kernels, &self.spec, self.spec.norm_eps);
        let (pool, b) = (&mut self.pool, &mut self.buffers);
        let h = spec.hidden_size;
        let q_width = spec.n_heads * spec.head_dim;
        for layer in &mut self.layers {
            let x = &b.x;
            b.hidden.fill(pool, kernels, n, &|m, row| kernels.rms_norm(&x[m * h..][..h], &layer.input_norm, eps, row));
            layer.qkv.run(pool, kernels, &b.hidden, (&mut b.qkv, false));
            let rotation = Rotation { cos: &b.cos, sin: &b.sin };
            layer.rotate_and_store((pool, kernels), spec, (step, &rotation), &mut b.qkv);
            let input = AttentionInput { queries: &b.qkv, q_stride: layer.qkv.n_rows(), cache: &layer.cache };
            self.attention.run((pool, kernels), (&plan, step), &input, &mut b.attended);
            let attended = &b.attended;
            b.o_input.fill(pool, kernels, n, &|m, row| row.copy_from_slice(&attended[m * q_width..][..q_width]));
            layer.o.run(pool, kernels, &b.o_input, (&mut b.x, true));

            let x = &b.x;
            let norm = &layer.post_attention_norm;
            b.hidden.fill(pool, kernels, n, &|m, row| kernels.rms_norm(&x[m * h..][..h], norm, eps, row));
            match &layer.mlp {
                Mlp::Dense(mlp) => mlp.run((pool, kernels), &b.hidden, &mut b.mlp, (&mut b.x, true)),
                Mlp::Experts(experts) => {
                    let buffers = b.experts.as_mut().expect("made for the model's experts");
                    experts.run((pool, kernels), &b.hidden, buffers, &mut b.x);
                }
            }
        }
    }

    /// Logits of at most [`LOGIT_ROWS`] query rows, `[rows.len(), vocab_size]`, after
    /// [`CpuModel::forward`], and the threads to work on them.
    pub fn logits(&mut self, rows: &[usize]) -> (&mut [f32], &mut Pool) {
        let (kernels, eps, h) = (self.kernels, self.spec.norm_eps, self.spec.hidden_size);
        let (pool, b) = (&mut self.pool, &mut self.buffers);
        let (x, norm) = (&b.x, &self.final_norm);
        b.head_input
            .fill(pool, kernels, rows.len(), &|m, out| kernels.rms_norm(&x[rows[m] * h..][..h], norm, eps, out));
        self.lm_head.run(pool, kernels, &b.head_input, (&mut b.logits, false));
        (&mut b.logits[..rows.len() * self.spec.vocab_size], pool)
    }

    /// Hidden states of the first `n` rows after the final norm, `[n, hidden_size]`, after [`CpuModel::forward`].
    pub fn normed(&mut self, n: usize) -> Vec<f32> {
        let (kernels, eps, h) = (self.kernels, self.spec.norm_eps, self.spec.hidden_size);
        let (x, norm) = (&self.buffers.x, &self.final_norm);
        let mut out = vec![0.0; n * h];
        let rows = Disjoint::new(&mut out);
        self.pool.run(n, &|m| {
            // SAFETY: each row belongs to one task.
            let row = unsafe { rows.range(m * h..(m + 1) * h) };
            kernels.rms_norm(&x[m * h..][..h], norm, eps, row);
        });
        out
    }

    /// Fills the residual stream with embeddings, and the rotations of the step's positions.
    fn embed(&mut self, step: &StepInput) {
        let (h, half) = (self.spec.hidden_size, self.spec.head_dim / 2);
        let row_bytes = self.embedding.bytes().len() / self.spec.vocab_size;
        let b = &mut self.buffers;
        for (m, (&token, &position)) in step.token_ids.iter().zip(&step.positions).enumerate() {
            // This executor runs one step at a time, so every token is known.
            let stored = &self.embedding.bytes()[token as usize * row_bytes..][..row_bytes];
            self.embedding.dtype().decode(stored, &mut b.x[m * h..][..h]);
            self.rotary.at(position as usize, &mut b.cos[m * half..][..half], &mut b.sin[m * half..][..half]);
        }
    }
}

/// Rotations of the step's rows, `[n_tokens, head_dim / 2]` each.
struct Rotation<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Layer {
    fn dense_mlp(&self) -> Option<&GatedMlp> {
        match &self.mlp {
            Mlp::Dense(mlp) => Some(mlp),
            Mlp::Experts(_) => None,
        }
    }

    /// Normalises (if the model does) and rotates queries and keys of `qkv` in place, and writes keys and values to the
    /// cache.
    fn rotate_and_store(
        &mut self,
        (pool, kernels): (&mut Pool, &Kernels),
        spec: &DecoderSpec,
        (step, rotation): (&StepInput, &Rotation<'_>),
        qkv: &mut [f32],
    ) {
        let (n_q, n_kv, d) = (spec.n_heads, spec.n_kv_heads, spec.head_dim);
        let width = (n_q + 2 * n_kv) * d;
        let n = step.n_tokens();
        let qkv = Disjoint::new(qkv);
        let cache = self.cache.writer();
        let qk_norm = &self.qk_norm;
        let per_task = n.div_ceil(4 * pool.n_threads()).max(1);
        pool.run(n.div_ceil(per_task), &|task| {
            let mut normed = vec![0f32; d];
            for m in task * per_task..((task + 1) * per_task).min(n) {
                // SAFETY: each row belongs to one task.
                let row = unsafe { qkv.range(m * width..(m + 1) * width) };
                let (qk, v) = row.split_at_mut((n_q + n_kv) * d);
                let (cos, sin) = (&rotation.cos[m * (d / 2)..][..d / 2], &rotation.sin[m * (d / 2)..][..d / 2]);
                for (i, head) in qk.chunks_exact_mut(d).enumerate() {
                    if let Some((q_norm, k_norm)) = qk_norm {
                        kernels.rms_norm(head, if i < n_q { q_norm } else { k_norm }, spec.norm_eps, &mut normed);
                        head.copy_from_slice(&normed);
                    }
                    kernels.rotate(head, cos, sin);
                }
                for (i, (k, v)) in qk[n_q * d..].chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
                    // SAFETY: each row of a step has a slot of its own.
                    unsafe { cache.write(kernels, (step.slot_mapping[m], i), k, v) };
                }
            }
        });
    }
}

struct Loader<'a> {
    spec: &'a DecoderSpec,
    weights: &'a dyn WeightSource,
    storage: Storage,
    arena: Arena,
    n_threads: usize,
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize, n_pages: usize) -> Result<Layer, Error> {
        use LayerWeight::*;
        let of = |w: LayerWeight| Weight::Layer(layer, w);
        let qkv = self.linear(&[of(QProj), of(KProj), of(VProj)], &[of(QBias), of(KBias), of(VBias)])?;
        let o = self.linear(&[of(OProj)], &[of(OBias)])?;
        let mlp = match self.spec.moe_of(layer) {
            Some(moe) => Mlp::Experts(Box::new(self.experts(layer, moe)?)),
            None => Mlp::Dense(GatedMlp {
                gate_up: self.linear(&[of(GateProj), of(UpProj)], &[of(GateBias), of(UpBias)])?,
                down: self.linear(&[of(DownProj)], &[of(DownBias)])?,
            }),
        };
        Ok(Layer {
            input_norm: self.values(of(InputNorm))?,
            qkv,
            qk_norm: match self.spec.qk_norm {
                true => Some((self.values(of(QNorm))?, self.values(of(KNorm))?)),
                false => None,
            },
            o,
            post_attention_norm: self.values(of(PostAttentionNorm))?,
            mlp,
            cache: KvCache::new(self.storage.kv_layout, n_pages),
        })
    }

    fn experts(&mut self, layer: usize, moe: &Moe) -> Result<Experts, Error> {
        use LayerWeight::{Router, SharedDownProj, SharedGateProj, SharedRouter, SharedUpProj};
        let of = |w: LayerWeight| Weight::Layer(layer, w);
        let is_shared = moe.shared_intermediate_size.is_some();
        let routers = [of(Router), of(SharedRouter)];
        let router = self.linear(if is_shared { &routers } else { &routers[..1] }, &[])?;
        let mut experts = Vec::with_capacity(moe.n_experts);
        for expert in 0..moe.n_experts {
            let of = |w: ExpertWeight| Weight::Expert(layer, expert, w);
            let gate_up = self.linear(&[of(ExpertWeight::Gate), of(ExpertWeight::Up)], &[])?;
            experts.push(GatedMlp { gate_up, down: self.linear(&[of(ExpertWeight::Down)], &[])? });
        }
        let shared = match is_shared {
            true => Some(GatedMlp {
                gate_up: self.linear(&[of(SharedGateProj), of(SharedUpProj)], &[])?,
                down: self.linear(&[of(SharedDownProj)], &[])?,
            }),
            false => None,
        };
        Ok(Experts { moe: moe.clone(), router, experts, shared })
    }

    /// The projections `weights`, one below the other, with those of `biases` that the model has.
    fn linear(&mut self, weights: &[Weight], biases: &[Weight]) -> Result<Linear, Error> {
        use LayerWeight::{Router, SharedRouter};
        // A rounded router would choose other experts.
        let routes = |w: &Weight| matches!(w, Weight::Layer(_, Router | SharedRouter));
        let keep = |&w: &Weight| {
            let tensor = self.weights.keep(w)?;
            Ok(if routes(&w) { tensor } else { self.rounded(tensor) })
        };
        let tensors = weights.iter().map(keep).collect::<Result<Vec<_>, Error>>()?;
        let has_bias = biases.iter().any(|&w| self.spec.shape(w).is_some());
        let bias = match has_bias {
            true => Some(biases.iter().map(|&w| self.values(w)).collect::<Result<Vec<_>, _>>()?.concat()),
            false => None,
        };
        Linear::new(tensors, bias, (&mut self.arena, self.n_threads))
    }

    /// `tensor` as it is to be kept.
    fn rounded(&self, tensor: StoredTensor) -> StoredTensor {
        let quantized = self.storage.quantization.and_then(|format| tensor.view().quantize(format));
        quantized.map_or(tensor, |quantized| StoredTensor::new(quantized, None))
    }

    fn values(&self, weight: Weight) -> Result<Vec<f32>, Error> {
        Ok(self.weights.get(weight)?.to_f32().into_owned())
    }
}

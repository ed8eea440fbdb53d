//! An independent decoder in float32: plain loops over dequantised weights, one token at a time, no
//! batching, no paging, no tensor library. Slow and easy to check against the papers.

use ember_engine::decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, RopeScaling, Weight};

pub struct Oracle {
    spec: DecoderSpec,
    embedding: Vec<f32>,
    final_norm: Vec<f32>,
    lm_head: Option<Vec<f32>>,
    layers: Vec<Layer>,
    inv_freq: Vec<f32>,
}

struct Layer {
    input_norm: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Of q, k and v.
    biases: Option<[Vec<f32>; 3]>,
    /// Of q and k, one element per element of a head.
    qk_norms: Option<[Vec<f32>; 2]>,
    o: Vec<f32>,
    post_attention_norm: Vec<f32>,
    mlp: Mlp,
}

enum Mlp {
    Dense(GatedMlp),
    Experts(Experts),
}

struct GatedMlp {
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

struct Experts {
    moe: Moe,
    router: Vec<f32>,
    experts: Vec<GatedMlp>,
    /// The logit of its share, and the MLP.
    shared: Option<(Vec<f32>, GatedMlp)>,
}

/// Keys and values of one sequence, per layer `[n_tokens * n_kv_heads * head_dim]`.
pub struct Cache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Oracle {
    /// The model `spec` with the weights that `read` gives, in rotate-half order.
    pub fn new(spec: &DecoderSpec, read: impl Fn(Weight) -> Vec<f32>) -> Self {
        let spec = spec.clone();
        assert!(!spec.o_bias && !spec.mlp_bias && spec.rope.scaling == RopeScaling::None, "not written");
        let layer = |i: usize| {
            let of = |w: LayerWeight| read(Weight::Layer(i, w));
            Layer {
                input_norm: of(LayerWeight::InputNorm),
                q: of(LayerWeight::QProj),
                k: of(LayerWeight::KProj),
                v: of(LayerWeight::VProj),
                biases: spec.qkv_bias.then(|| [LayerWeight::QBias, LayerWeight::KBias, LayerWeight::VBias].map(of)),
                qk_norms: spec.qk_norm.then(|| [LayerWeight::QNorm, LayerWeight::KNorm].map(of)),
                o: of(LayerWeight::OProj),
                post_attention_norm: of(LayerWeight::PostAttentionNorm),
                mlp: match spec.moe_of(i) {
                    None => Mlp::Dense(GatedMlp {
                        gate: of(LayerWeight::GateProj),
                        up: of(LayerWeight::UpProj),
                        down: of(LayerWeight::DownProj),
                    }),
                    Some(moe) => Mlp::Experts(Experts::new(moe, i, &read)),
                },
            }
        };
        Self {
            embedding: read(Weight::Embedding),
            final_norm: read(Weight::FinalNorm),
            lm_head: (!spec.tie_embeddings).then(|| read(Weight::LmHead)),
            layers: (0..spec.n_layers).map(layer).collect(),
            inv_freq: (0..spec.head_dim / 2)
                .map(|i| spec.rope.theta.powf(-2.0 * i as f32 / spec.head_dim as f32))
                .collect(),
            spec,
        }
    }

    pub fn cache(&self) -> Cache {
        Cache { keys: vec![Vec::new(); self.spec.n_layers], values: vec![Vec::new(); self.spec.n_layers] }
    }

    /// Hidden state of `token` at the next position of `cache`, after the last layer.
    pub fn forward(&self, token: u32, cache: &mut Cache) -> Vec<f32> {
        let spec = &self.spec;
        let (hidden, d) = (spec.hidden_size, spec.head_dim);
        let position = cache.keys[0].len() / (spec.n_kv_heads * d);
        let mut x = self.embedding[token as usize * hidden..][..hidden].to_vec();
        for (i, layer) in self.layers.iter().enumerate() {
            let h = rms_norm(&x, &layer.input_norm, spec.norm_eps);
            let mut q = multiply(&layer.q, &h);
            let mut k = multiply(&layer.k, &h);
            let mut v = multiply(&layer.v, &h);
            if let Some([q_bias, k_bias, v_bias]) = &layer.biases {
                add(&mut q, q_bias);
                add(&mut k, k_bias);
                add(&mut v, v_bias);
            }
            if let Some([q_norm, k_norm]) = &layer.qk_norms {
                q = q.chunks_exact(d).flat_map(|head| rms_norm(head, q_norm, spec.norm_eps)).collect();
                k = k.chunks_exact(d).flat_map(|head| rms_norm(head, k_norm, spec.norm_eps)).collect();
            }
            q.chunks_exact_mut(d).chain(k.chunks_exact_mut(d)).for_each(|head| self.rotate(head, position));
            cache.keys[i].extend(k);
            cache.values[i].extend(v);
            let attended = self.attend(&q, &cache.keys[i], &cache.values[i]);
            add(&mut x, &multiply(&layer.o, &attended));

            let h = rms_norm(&x, &layer.post_attention_norm, spec.norm_eps);
            match &layer.mlp {
                Mlp::Dense(mlp) => add(&mut x, &mlp.forward(&h)),
                Mlp::Experts(experts) => add(&mut x, &experts.forward(&h)),
            }
        }
        x
    }

    /// Log-probabilities of the token after `hidden`, `[vocab_size]`.
    pub fn log_probs(&self, hidden: &[f32]) -> Vec<f32> {
        let h = rms_norm(hidden, &self.final_norm, self.spec.norm_eps);
        let logits = multiply(self.lm_head.as_ref().unwrap_or(&self.embedding), &h);
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let log_sum = max + logits.iter().map(|l| (l - max).exp()).sum::<f32>().ln();
        logits.into_iter().map(|l| l - log_sum).collect()
    }

    fn rotate(&self, head: &mut [f32], position: usize) {
        let half = head.len() / 2;
        for i in 0..half {
            let (sin, cos) = (position as f32 * self.inv_freq[i]).sin_cos();
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }

    fn attend(&self, q: &[f32], keys: &[f32], values: &[f32]) -> Vec<f32> {
        let (d, n_kv) = (self.spec.head_dim, self.spec.n_kv_heads);
        let per_kv = self.spec.n_heads / n_kv;
        let n_tokens = keys.len() / (n_kv * d);
        // With a window of one, a token sees itself alone.
        let first = n_tokens - n_tokens.min(self.spec.sliding_window.unwrap_or(n_tokens));
        let mut out = vec![0.0; q.len()];
        for (head, (q, out)) in q.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
            let at = |t: usize| (t * n_kv + head / per_kv) * d;
            let scores: Vec<f32> = (first..n_tokens).map(|t| dot(q, &keys[at(t)..][..d]) / (d as f32).sqrt()).collect();
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f32 = weights.iter().sum();
            for (t, weight) in (first..).zip(&weights) {
                for (o, v) in out.iter_mut().zip(&values[at(t)..][..d]) {
                    *o += weight / total * v;
                }
            }
        }
        out
    }
}

impl GatedMlp {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let (gate, up) = (multiply(&self.gate, x), multiply(&self.up, x));
        let activated: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g * sigmoid(*g) * u).collect();
        multiply(&self.down, &activated)
    }
}

impl Experts {
    fn new(moe: &Moe, layer: usize, read: impl Fn(Weight) -> Vec<f32>) -> Self {
        let of = |w: LayerWeight| read(Weight::Layer(layer, w));
        let expert = |expert: usize| {
            let [gate, up, down] = ExpertWeight::ALL.map(|w| read(Weight::Expert(layer, expert, w)));
            GatedMlp { gate, up, down }
        };
        let shared = moe.shared_intermediate_size.map(|_| {
            let mlp = GatedMlp {
                gate: of(LayerWeight::SharedGateProj),
                up: of(LayerWeight::SharedUpProj),
                down: of(LayerWeight::SharedDownProj),
            };
            (of(LayerWeight::SharedRouter), mlp)
        });
        let experts = (0..moe.n_experts).map(expert).collect();
        Self { moe: moe.clone(), router: of(LayerWeight::Router), experts, shared }
    }

    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let logits = multiply(&self.router, x);
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        let mut chosen: Vec<(usize, f32)> = logits.iter().map(|logit| logit.exp() / total).enumerate().collect();
        chosen.sort_by(|a, b| b.1.total_cmp(&a.1));
        chosen.truncate(self.moe.n_experts_per_token);
        let sum: f32 = if self.moe.norm_topk_prob { chosen.iter().map(|(_, weight)| weight).sum() } else { 1.0 };
        let mut out = vec![0.0; x.len()];
        let mut add_scaled = |weight: f32, y: &[f32]| out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
        for (expert, weight) in chosen {
            add_scaled(weight / sum, &self.experts[expert].forward(x));
        }
        if let Some((router, mlp)) = &self.shared {
            add_scaled(sigmoid(dot(router, x)), &mlp.forward(x));
        }
        out
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `y = W x`, with `W` of `x.len()` columns.
fn multiply(w: &[f32], x: &[f32]) -> Vec<f32> {
    w.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums, so that the compiler may use vector registers.
    let mut sums = [0.0f32; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let tail = a.len() - a.len() % 8;
    sums.iter().sum::<f32>() + a[tail..].iter().zip(&b[tail..]).map(|(a, b)| a * b).sum::<f32>()
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let scale = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32 + eps).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

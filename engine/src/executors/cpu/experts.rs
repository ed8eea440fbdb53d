//! [`Experts`]: the mixture of experts of a layer. A step's rows are grouped by expert, so that the weights of each
//! expert that a row goes to are read once, whatever the batch; experts that no row goes to are not touched.

use super::{
    activations::Activations,
    disjoint::Disjoint,
    kernels::Kernels,
    linear::Linear,
    mlp::{GatedMlp, MlpBuffers},
    pool::Pool,
};
use crate::decoder::{DecoderSpec, Moe, Route};

/// The weights of a layer's experts.
pub struct Experts {
    pub moe: Moe,
    /// `[n_experts, hidden_size]`, and a row more with a shared expert: the logit of its share.
    pub router: Linear,
    pub experts: Vec<GatedMlp>,
    pub shared: Option<GatedMlp>,
}

/// What [`Experts`] compute with.
pub struct ExpertBuffers {
    hidden_size: usize,
    /// `[n_tokens, n_experts]`, a column more with a shared expert.
    logits: Vec<f32>,
    /// `[n_tokens, n_experts_per_token]`.
    routes: Vec<Route>,
    /// Row of the grouped rows for each of `routes`.
    slots: Vec<usize>,
    /// Token of each grouped row, `[n_tokens * n_experts_per_token]`.
    tokens: Vec<usize>,
    /// Rows grouped by expert, `[n_tokens * n_experts_per_token, hidden_size]`.
    grouped: Activations,
    mlp: MlpBuffers,
    /// Results of `grouped`.
    out: Vec<f32>,
    shared: MlpBuffers,
    /// `[n_tokens, hidden_size]`.
    shared_out: Vec<f32>,
}

impl ExpertBuffers {
    /// For steps of `n_tokens` tokens; `integers` says whether the experts' two projections and the shared expert's
    /// second want their input as integers.
    pub fn new(spec: &DecoderSpec, moe: &Moe, n_tokens: usize, integers: [bool; 3]) -> Self {
        let (h, k) = (spec.hidden_size, moe.n_experts_per_token);
        let shared = moe.shared_intermediate_size;
        let mlp = |n: usize, width: usize, integers| MlpBuffers::new(width, Activations::new(n, width, integers), n);
        Self {
            hidden_size: h,
            logits: vec![0.0; n_tokens * (moe.n_experts + 1)],
            routes: vec![Route { expert: 0, weight: 0.0 }; n_tokens * k],
            slots: vec![0; n_tokens * k],
            tokens: vec![0; n_tokens * k],
            grouped: Activations::new(n_tokens * k, h, integers[0]),
            mlp: mlp(n_tokens * k, moe.intermediate_size, integers[1]),
            out: vec![0.0; n_tokens * k * h],
            shared: mlp(n_tokens, shared.unwrap_or(0), integers[2]),
            shared_out: vec![0.0; if shared.is_some() { n_tokens * h } else { 0 }],
        }
    }

    /// Groups the routes of `n_tokens` tokens by expert: the experts that are wanted, and how many rows each gets.
    fn group(&mut self, moe: &Moe, n_tokens: usize) -> Vec<(usize, usize)> {
        let k = moe.n_experts_per_token;
        let routes = &self.routes[..n_tokens * k];
        let mut counts = vec![0; moe.n_experts];
        routes.iter().for_each(|route| counts[route.expert] += 1);
        let mut n_rows = 0;
        let mut next: Vec<usize> = counts
            .iter()
            .map(|count| {
                n_rows += count;
                n_rows - count
            })
            .collect();
        for (i, route) in routes.iter().enumerate() {
            let slot = next[route.expert];
            next[route.expert] += 1;
            self.slots[i] = slot;
            self.tokens[slot] = i / k;
        }
        counts.into_iter().enumerate().filter(|&(_, count)| count > 0).collect()
    }
}

impl Experts {
    /// Bytes of memory, without what lies in memory maps.
    pub fn n_bytes(&self) -> usize {
        let mlps = self.experts.iter().chain(&self.shared);
        self.router.n_bytes() + mlps.map(GatedMlp::n_bytes).sum::<usize>()
    }

    /// Adds the experts' outputs for the rows of `x`, which are of one segment, to `out`, `[n_tokens, hidden_size]`.
    pub fn run(&self, (pool, kernels): (&mut Pool, &Kernels), x: &Activations, b: &mut ExpertBuffers, out: &mut [f32]) {
        let rows = x.segment(0);
        let (n, h, k) = (rows.n_rows(), b.hidden_size, self.moe.n_experts_per_token);
        self.router.run(pool, kernels, x, (&mut b.logits, false));
        let (logits, n_logits) = (&b.logits, self.router.n_rows());
        let routes = Disjoint::new(&mut b.routes);
        let per_task = n.div_ceil(4 * pool.n_threads()).max(1);
        pool.run(n.div_ceil(per_task), &|task| {
            for m in task * per_task..((task + 1) * per_task).min(n) {
                // SAFETY: each token belongs to one task.
                let routes = unsafe { routes.range(m * k..(m + 1) * k) };
                self.moe.route(&logits[m * n_logits..][..self.moe.n_experts], routes);
            }
        });

        let wanted = b.group(&self.moe, n);
        let tokens = &b.tokens;
        let lengths = wanted.iter().map(|&(_, count)| count);
        b.grouped.fill_segments(pool, kernels, lengths, &|m, row| row.copy_from_slice(rows.floats(tokens[m], 1)));
        let mlps: Vec<&GatedMlp> = wanted.iter().map(|&(expert, _)| &self.experts[expert]).collect();
        GatedMlp::run_grouped(&mlps, (pool, kernels), &b.grouped, &mut b.mlp, &mut b.out);
        if let Some(shared) = &self.shared {
            shared.run((pool, kernels), x, &mut b.shared, (&mut b.shared_out, false));
        }

        let b = &*b;
        let out = Disjoint::new(out);
        pool.run(n.div_ceil(per_task), &|task| {
            for m in task * per_task..((task + 1) * per_task).min(n) {
                // SAFETY: each token belongs to one task.
                let out = unsafe { out.range(m * h..(m + 1) * h) };
                let mut add = |weight: f32, row: &[f32]| out.iter_mut().zip(row).for_each(|(o, v)| *o += weight * v);
                // In the order of the routes, whatever else is in the batch.
                for (route, slot) in b.routes[m * k..][..k].iter().zip(&b.slots[m * k..]) {
                    add(route.weight, &b.out[slot * h..][..h]);
                }
                if self.shared.is_some() {
                    let logit = b.logits[m * n_logits + self.moe.n_experts];
                    add(1.0 / (1.0 + (-logit).exp()), &b.shared_out[m * h..][..h]);
                }
            }
        });
    }
}

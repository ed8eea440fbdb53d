//! [`Moe`]: a mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) in place of a layer's MLP, and the choice of a
//! token's experts.

/// Experts of a decoder's layers, all alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts that compute each token.
    pub n_experts_per_token: usize,
    /// Width of an expert's gated MLP.
    pub intermediate_size: usize,
    /// Width of one more MLP that computes every token; its output is scaled by a sigmoid (Qwen2-MoE).
    pub shared_intermediate_size: Option<usize>,
    /// The weights of a token's experts are scaled to a sum of 1.
    pub norm_topk_prob: bool,
    /// Layers that have a plain MLP instead, in order.
    pub dense_layers: Vec<usize>,
}

/// One of a token's experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Route {
    /// Index of the expert.
    pub expert: usize,
    /// What its output is multiplied with.
    pub weight: f32,
}

impl Moe {
    /// The experts of a token, the most probable first, of equally probable ones the lower index first: softmax over
    /// all `logits`, `[n_experts]`, then the best of them, as `transformers` does for Qwen2-MoE, Qwen3-MoE and Mixtral.
    /// Writes `routes`, `[n_experts_per_token]`.
    pub fn route(&self, logits: &[f32], routes: &mut [Route]) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
        let mut n_found = 0;
        for (expert, &logit) in logits.iter().enumerate() {
            let route = Route { expert, weight: (logit - max).exp() / total };
            let at = routes[..n_found].partition_point(|found| found.weight >= route.weight);
            if at < routes.len() {
                n_found = (n_found + 1).min(routes.len());
                routes[at..n_found].rotate_right(1);
                routes[at] = route;
            }
        }
        if self.norm_topk_prob {
            let sum: f32 = routes.iter().map(|route| route.weight).sum();
            routes.iter_mut().for_each(|route| route.weight /= sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(logits: &[f32], norm_topk_prob: bool) -> Vec<(usize, f32)> {
        let moe = Moe {
            n_experts: logits.len(),
            n_experts_per_token: 2,
            intermediate_size: 1,
            shared_intermediate_size: None,
            norm_topk_prob,
            dense_layers: vec![],
        };
        let mut routes = [Route { expert: 0, weight: 0.0 }; 2];
        moe.route(logits, &mut routes);
        routes.iter().map(|route| (route.expert, route.weight)).collect()
    }

    #[test]
    fn the_best_experts_come_first_and_ties_go_to_the_lower_index() {
        let ln = f32::ln;
        let near = |got: &[(usize, f32)], want: &[(usize, f32)]| {
            assert!(got.iter().zip(want).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6), "{got:?}, not {want:?}");
        };
        let logits = [ln(0.1), ln(0.4), ln(0.2), ln(0.3)];
        near(&route(&logits, false), &[(1, 0.4), (3, 0.3)]);
        near(&route(&logits, true), &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        near(&route(&[1.0, 5.0, 5.0, 5.0], true), &[(1, 0.5), (2, 0.5)]);
        // Large logits do not overflow.
        near(&route(&[1e4, 1e4, -1e4], false), &[(0, 0.5), (1, 0.5)]);
    }
}

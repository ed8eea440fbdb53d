//! The mixture of experts of a layer in Burn tensors: each expert computes the rows that go to it.

use ::burn::tensor::{IndexingUpdateOp, Tensor, TensorData, activation::sigmoid};

use super::{
    int_tensor,
    model::{GatedMlp, Linear},
    to_host,
};
use crate::{
    Error,
    decoder::{Moe, Route},
};

pub(super) struct Experts {
    pub(super) moe: Moe,
    pub(super) router: Linear,
    pub(super) experts: Vec<GatedMlp>,
    /// The logit of its share, and the MLP.
    pub(super) shared: Option<(Linear, GatedMlp)>,
}

impl Experts {
    // h: [n_tokens, hidden_size] -> [n_tokens, hidden_size]
    pub(super) fn forward(&self, h: Tensor<2>) -> Result<Tensor<2>, Error> {
        let device = h.device();
        let logits = to_host(self.router.forward(h.clone()))?;
        // Tokens of each expert, and the weights of its outputs.
        let mut rows = vec![(Vec::new(), Vec::new()); self.moe.n_experts];
        for (token, logits) in logits.chunks_exact(self.moe.n_experts).enumerate() {
            let mut routes = vec![Route { expert: 0, weight: 0.0 }; self.moe.n_experts_per_token];
            self.moe.route(logits, &mut routes);
            for Route { expert, weight } in routes {
                rows[expert].0.push(token as i64);
                rows[expert].1.push(weight);
            }
        }
        let mut out = h.zeros_like();
        for (expert, (tokens, weights)) in self.experts.iter().zip(rows) {
            if tokens.is_empty() {
                continue;
            }
            let n = tokens.len();
            let tokens = int_tensor(tokens, &device);
            let weights = Tensor::<2>::from_data(TensorData::new(weights, [n, 1]), &device);
            let outputs = expert.forward(h.clone().select(0, tokens.clone())) * weights;
            out = out.select_assign(0, tokens, outputs, IndexingUpdateOp::Add);
        }
        if let Some((router, shared)) = &self.shared {
            out = out + sigmoid(router.forward(h.clone())) * shared.forward(h);
        }
        Ok(out)
    }
}

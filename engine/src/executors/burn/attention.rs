//! Attention over the paged KV cache in Burn tensors: keys and values are gathered by page, then
//! attended to as dense batches.

use ::burn::tensor::{Bool, Device, Int, Tensor, TensorData, module::attention, ops::AttentionModuleOptions};

use super::int_tensor;
use crate::{
    decoder::DecoderSpec,
    step::{PAGE_SIZE, StepInput, StepSeq},
};

/// How a step's query rows meet the KV cache; the same for every layer.
pub(super) struct AttentionPlan {
    n_heads: usize,
    n_kv_heads: usize,
    groups: Vec<Group>,
    /// Row of the groups' joined output for each query row; `None` if that is the same order.
    order: Option<Tensor<1, Int>>,
}

/// Sequences of equal query length and similar context length, attended to as one dense batch.
struct Group {
    n_seqs: usize,
    query_len: usize,
    kv_len: usize,
    /// `[n_seqs * query_len]`: query rows.
    rows: Tensor<1, Int>,
    /// `[n_seqs * kv_len]`: KV cache rows, padded by repeating the first.
    kv_rows: Tensor<1, Int>,
    /// `[n_seqs, n_kv_heads, n_heads / n_kv_heads * query_len, kv_len]`, true where a query must not look.
    mask: Option<Tensor<4, Bool>>,
}

impl AttentionPlan {
    pub(super) fn new(spec: &DecoderSpec, step: &StepInput, device: &Device) -> Self {
        let mut order: Vec<usize> = (0..step.seqs.len()).collect();
        order.sort_by_key(|&i| batch_key(&step.seqs[i]));
        let mut groups = Vec::new();
        let mut rows_in_order = Vec::new();
        for batch in order.chunk_by(|&a, &b| batch_key(&step.seqs[a]) == batch_key(&step.seqs[b])) {
            // Long chunks are attended to one at a time: their scores would not fit together.
            let n_at_once = if step.seqs[batch[0]].query_len == 1 { batch.len() } else { 1 };
            for seqs in batch.chunks(n_at_once) {
                let seqs: Vec<&StepSeq> = seqs.iter().map(|&i| &step.seqs[i]).collect();
                rows_in_order.extend(seqs.iter().flat_map(|s| s.query_start..s.query_start + s.query_len));
                groups.push(Group::new(spec, step, &seqs, device));
            }
        }
        let in_order = rows_in_order.is_sorted();
        let order = (!in_order).then(|| {
            let mut inverse = vec![0; rows_in_order.len()];
            for (at, &row) in rows_in_order.iter().enumerate() {
                inverse[row as usize] = at as i64;
            }
            int_tensor(inverse, device)
        });
        Self { n_heads: spec.n_heads, n_kv_heads: spec.n_kv_heads, groups, order }
    }

    // q: [n_tokens, n_heads, head_dim]; caches: [n_slots, n_kv_heads * head_dim]
    // -> [n_tokens, n_heads * head_dim]
    pub(super) fn attend(&self, q: Tensor<3>, k_cache: &Tensor<2>, v_cache: &Tensor<2>) -> Tensor<2> {
        let [n_tokens, n_heads, head_dim] = q.dims();
        let q = q.reshape([n_tokens, n_heads * head_dim]);
        let outputs: Vec<Tensor<2>> =
            self.groups.iter().map(|group| self.attend_group(group, &q, k_cache, v_cache)).collect();
        let output =
            if outputs.len() == 1 { outputs.into_iter().next().expect("one") } else { Tensor::cat(outputs, 0) };
        match &self.order {
            Some(order) => output.select(0, order.clone()),
            None => output,
        }
    }

    fn attend_group(&self, group: &Group, q: &Tensor<2>, k_cache: &Tensor<2>, v_cache: &Tensor<2>) -> Tensor<2> {
        let (b, t, l, kv) = (group.n_seqs, group.query_len, group.kv_len, self.n_kv_heads);
        let per_kv = self.n_heads / kv;
        let [_, width] = q.dims();
        let d = width / self.n_heads;
        let gathered = |cache: &Tensor<2>| {
            // [b * l, kv * d] -> [b, kv, l, d]
            cache.clone().select(0, group.kv_rows.clone()).reshape([b, l, kv, d]).swap_dims(1, 2)
        };
        // Query heads that share a key/value head become rows of one matrix: [b, kv, per_kv * t, d].
        let q = q
            .clone()
            .select(0, group.rows.clone())
            .reshape([b, t, kv, per_kv, d])
            .permute([0, 2, 3, 1, 4])
            .reshape([b, kv, per_kv * t, d]);
        let out = attention(
            q,
            gathered(k_cache),
            gathered(v_cache),
            group.mask.clone(),
            None,
            AttentionModuleOptions::default(),
        );
        out.reshape([b, kv, per_kv, t, d]).permute([0, 3, 1, 2, 4]).reshape([b * t, width])
    }
}

/// Sequences of equal key are batched: decoding ones whose contexts round up to the same length.
fn batch_key(seq: &StepSeq) -> (u32, u32) {
    let pages = seq.context_len.div_ceil(PAGE_SIZE as u32);
    (seq.query_len, if seq.query_len == 1 { pages.next_power_of_two() } else { pages })
}

impl Group {
    fn new(spec: &DecoderSpec, step: &StepInput, seqs: &[&StepSeq], device: &Device) -> Self {
        let query_len = seqs[0].query_len as usize;
        let kv_len = seqs.iter().map(|s| s.context_len as usize).max().unwrap_or(0);
        let mut kv_rows = Vec::with_capacity(seqs.len() * kv_len);
        for seq in seqs {
            let pages = step.pages(seq);
            let row = |t: usize| i64::from(pages[t / PAGE_SIZE]) * PAGE_SIZE as i64 + (t % PAGE_SIZE) as i64;
            kv_rows.extend((0..seq.context_len as usize).map(row));
            kv_rows.resize(kv_rows.len() + kv_len - seq.context_len as usize, row(0));
        }
        let rows = seqs.iter().flat_map(|s| s.query_start..s.query_start + s.query_len);
        let window = spec.sliding_window.unwrap_or(usize::MAX);
        let hidden = |seq: &StepSeq, t: usize, j: usize| {
            let position = (seq.context_len - seq.query_len) as usize + t;
            j > position || position - j >= window
        };
        let needs_mask = seqs
            .iter()
            .any(|s| (s.context_len as usize) < kv_len || s.query_len > 1 || window < s.context_len as usize);
        let mask = needs_mask.then(|| {
            let mut bits = Vec::with_capacity(seqs.len() * query_len * kv_len);
            for seq in seqs {
                for t in 0..query_len {
                    bits.extend((0..kv_len).map(|j| hidden(seq, t, j)));
                }
            }
            let (b, kv, per_kv) = (seqs.len(), spec.n_kv_heads, spec.n_heads / spec.n_kv_heads);
            Tensor::<3, Bool>::from_data(TensorData::new(bits, [b, query_len, kv_len]), device)
                .reshape([b, 1, 1, query_len, kv_len])
                .expand([b, kv, per_kv, query_len, kv_len])
                .reshape([b, kv, per_kv * query_len, kv_len])
        });
        Self {
            n_seqs: seqs.len(),
            query_len,
            kv_len,
            rows: int_tensor(rows.map(i64::from).collect(), device),
            kv_rows: int_tensor(kv_rows, device),
            mask,
        }
    }
}

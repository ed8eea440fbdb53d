//! [`DecoderEncoder`]: a decoder's hidden states after its final norm as a text's.

use super::{Encoder, Pooling, pooling::Pool};
use crate::{
    Error,
    executors::Executor,
    step::{PAGE_SIZE, StepInput, StepSeq},
};

/// A decoder that runs texts as prompts and samples nothing.
pub(super) struct DecoderEncoder {
    executor: Box<dyn Executor>,
    hidden_size: usize,
}

impl DecoderEncoder {
    pub(super) fn new(executor: Box<dyn Executor>, hidden_size: usize) -> Self {
        Self { executor, hidden_size }
    }

    /// How many of `texts` fit into a step, with pages for each; at least one, of which a step takes a part.
    fn n_at_once(&self, texts: &[&[u32]]) -> usize {
        let capacity = self.executor.capacity();
        let (mut n_tokens, mut n_pages) = (0, 0);
        let fits = |text: &&&[u32]| {
            n_tokens += text.len();
            n_pages += text.len().div_ceil(PAGE_SIZE);
            n_tokens <= capacity.max_num_batched_tokens && n_pages <= capacity.n_pages
        };
        texts.iter().take(capacity.max_num_seqs).take_while(fits).count().max(1)
    }

    /// Runs `texts`, several that fit into a step or one, and fills their pools.
    fn run(&mut self, texts: &[&[u32]], pools: &mut [Pool]) -> Result<(), Error> {
        let budget = self.executor.capacity().max_num_batched_tokens;
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(budget) {
            let (step, order) = step(texts, start..start + budget);
            let states = self.executor.hidden_states(&step)?;
            for (seq, index) in step.seqs.iter().zip(order) {
                let rows = seq.query_start as usize..(seq.query_start + seq.query_len) as usize;
                pools[index].add(&states[rows.start * self.hidden_size..rows.end * self.hidden_size]);
            }
        }
        Ok(())
    }
}

impl Encoder for DecoderEncoder {
    fn encode(&mut self, texts: &[&[u32]], pooling: Pooling) -> Result<Vec<Vec<f32>>, Error> {
        let mut pools: Vec<Pool> = texts.iter().map(|_| Pool::new(pooling, self.hidden_size)).collect();
        let mut done = 0;
        while done < texts.len() {
            let end = done + self.n_at_once(&texts[done..]);
            self.run(&texts[done..end], &mut pools[done..end])?;
            done = end;
        }
        Ok(pools.into_iter().map(Pool::finish).collect())
    }
}

/// A step of the tokens `range` of each of `texts`, and whose text each of its sequences is: those of one token first.
pub(crate) fn step(texts: &[&[u32]], range: std::ops::Range<usize>) -> (StepInput, Vec<usize>) {
    let of = |text: &[u32]| range.start.min(text.len())..range.end.min(text.len());
    let mut order: Vec<usize> = (0..texts.len()).filter(|&i| !of(texts[i]).is_empty()).collect();
    order.sort_by_key(|&i| of(texts[i]).len() != 1);
    let mut first_pages = Vec::with_capacity(texts.len());
    let mut n_pages = 0u32;
    for text in texts {
        first_pages.push(n_pages);
        n_pages += text.len().div_ceil(PAGE_SIZE) as u32;
    }
    let mut step = StepInput::default();
    for (slot, &i) in order.iter().enumerate() {
        let range = of(texts[i]);
        let query_start = step.token_ids.len() as u32;
        step.token_ids.extend(texts[i][range.clone()].iter().map(|&id| id as i32));
        step.positions.extend(range.start as u32..range.end as u32);
        let first_slot = first_pages[i] * PAGE_SIZE as u32;
        step.slot_mapping.extend(range.clone().map(|position| first_slot + position as u32));
        let block_start = step.block_tables.len();
        step.block_tables.extend(first_pages[i]..first_pages[i] + range.end.div_ceil(PAGE_SIZE) as u32);
        step.seqs.push(StepSeq {
            slot: slot as u32,
            query_start,
            query_len: range.len() as u32,
            context_len: range.end as u32,
            block_table: block_start..step.block_tables.len(),
            prompt_logprobs: None,
        });
    }
    (step, order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_have_single_tokens_first_and_pages_of_their_own() {
        let (long, short, last): (Vec<u32>, Vec<u32>, Vec<u32>) = ((0..20).collect(), vec![7], (100..118).collect());
        let texts = [long.as_slice(), &short, &last];
        let (whole, order) = step(&texts, 0..64);
        assert_eq!(order, [1, 0, 2]);
        assert_eq!(whole.seqs.iter().map(|seq| seq.query_len).collect::<Vec<_>>(), [1, 20, 18]);
        assert_eq!(whole.seqs.iter().map(|seq| whole.pages(seq)).collect::<Vec<_>>(), [&[2][..], &[0, 1], &[3, 4]]);
        assert_eq!((whole.slot_mapping[0], whole.slot_mapping[20], whole.slot_mapping[21]), (32, 19, 48));
        let (part, order) = step(&texts, 19..38);
        assert_eq!((order, part.token_ids, part.positions), (vec![0], vec![19], vec![19]));
        assert_eq!((part.seqs[0].context_len, part.seqs[0].query_len), (20, 1));
    }
}

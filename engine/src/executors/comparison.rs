//! Runs two executors on the same batches, so that every log-probability can be compared: prompts of awkward lengths,
//! whole and in chunks, alone and together. One executor chooses the tokens, the other is made to take them.

use std::sync::Arc;

use super::Executor;
use crate::{
    Error, SamplingParams,
    request::TokenLogprobs,
    step::{PAGE_SIZE, PromptLogprobs, SampleRow, StepInput, StepSeq},
};

/// Tokens decoded after each prompt.
const N_DECODE: usize = 12;

/// One batch: prompt lengths, and the most prompt tokens of a step.
pub struct Batch {
    /// The case's name.
    pub name: &'static str,
    /// Length of each prompt.
    pub prompts: Vec<usize>,
    /// Most tokens of a step.
    pub chunk: usize,
}

/// Log-probabilities of a batch, by sequence.
pub struct Scores {
    /// Of each prompt's tokens but the first.
    pub prompts: Vec<Vec<TokenLogprobs>>,
    /// Of each sampled token.
    pub outputs: Vec<Vec<TokenLogprobs>>,
}

impl Scores {
    /// The sampled tokens.
    pub fn tokens(&self) -> Vec<Vec<u32>> {
        self.outputs.iter().map(|output| output.iter().map(|entry| entry.token_id).collect()).collect()
    }

    /// Greatest difference over all positions; infinite if positions are missing or not numbers.
    pub fn difference(&self, other: &Self) -> f32 {
        let both = |s: &Self| -> Vec<(u32, f32)> {
            s.prompts.iter().chain(&s.outputs).flatten().map(|entry| (entry.token_id, entry.logprob)).collect()
        };
        let (a, b) = (both(self), both(other));
        if a.len() != b.len() {
            return f32::INFINITY;
        }
        let difference = |((id_a, a), (id_b, b)): (&(u32, f32), &(u32, f32))| {
            if id_a == id_b && (a - b).is_finite() { (a - b).abs() } else { f32::INFINITY }
        };
        a.iter().zip(&b).map(difference).fold(0.0, f32::max)
    }
}

/// Token `position` of prompt `seq`.
pub fn prompt_token(seq: usize, position: usize, vocab: usize) -> u32 {
    ((seq * 7919 + position * 104_729 + 17) % vocab) as u32
}

/// Runs `batch` to its end, greedily, or taking `forced` tokens: the ones that only may be sampled.
///
/// # Errors
/// The executor's.
pub fn run(
    executor: &mut dyn Executor,
    batch: &Batch,
    vocab: usize,
    forced: Option<&[Vec<u32>]>,
) -> Result<Scores, Error> {
    let n = batch.prompts.len();
    let mut tokens: Vec<Vec<u32>> = (0..n)
        .map(|seq| (0..batch.prompts[seq]).map(|position| prompt_token(seq, position, vocab)).collect())
        .collect();
    let pages_per_seq = (batch.prompts.iter().max().unwrap_or(&0) + N_DECODE).div_ceil(PAGE_SIZE);
    let mut scores = Scores { prompts: vec![Vec::new(); n], outputs: vec![Vec::new(); n] };
    let mut done = vec![0usize; n];
    while scores.outputs.iter().any(|output| output.len() < N_DECODE) {
        let mut plan: Vec<(usize, usize)> = (0..n)
            .filter(|&seq| scores.outputs[seq].len() < N_DECODE)
            .map(|seq| (seq, tokens[seq].len() - done[seq]))
            .collect();
        plan.sort_by_key(|&(_, n_tokens)| n_tokens != 1);
        let mut budget = batch.chunk;
        let mut step = StepInput::default();
        for (seq, n_tokens) in plan {
            let n_tokens = n_tokens.min(budget);
            if n_tokens == 0 {
                continue;
            }
            budget -= n_tokens;
            let end = done[seq] + n_tokens;
            let first_page = (seq * pages_per_seq) as u32;
            let query_start = step.token_ids.len() as u32;
            for (position, &token) in tokens[seq].iter().enumerate().take(end).skip(done[seq]) {
                step.token_ids.push(token as i32);
                step.positions.push(position as u32);
                let page = first_page + (position / PAGE_SIZE) as u32;
                step.slot_mapping.push(page * PAGE_SIZE as u32 + (position % PAGE_SIZE) as u32);
            }
            let block_start = step.block_tables.len();
            step.block_tables.extend(first_page..first_page + end.div_ceil(PAGE_SIZE) as u32);
            let n_prompt = batch.prompts[seq];
            let targets = tokens[seq][(done[seq] + 1).min(n_prompt)..(end + 1).min(n_prompt)].to_vec();
            step.seqs.push(StepSeq {
                slot: seq as u32,
                query_start,
                query_len: n_tokens as u32,
                context_len: end as u32,
                block_table: block_start..step.block_tables.len(),
                prompt_logprobs: (!targets.is_empty()).then_some(PromptLogprobs { n_top: 1, targets }),
            });
            done[seq] = end;
            if end == tokens[seq].len() {
                let n_output = scores.outputs[seq].len();
                let allowed = forced.map(|forced| vec![forced[seq][n_output]]);
                step.samples.push(SampleRow {
                    seq: step.seqs.len() - 1,
                    seq_id: seq as u64,
                    params: Arc::new(SamplingParams {
                        temperature: 0.0,
                        logprobs: Some(1),
                        allowed_token_ids: allowed,
                        ..SamplingParams::default()
                    }),
                    seed: 0,
                    n_output: n_output as u32,
                    banned: None,
                    history: None,
                });
            }
        }
        let of_prompt: Vec<usize> =
            step.seqs.iter().filter(|s| s.prompt_logprobs.is_some()).map(|s| s.slot as usize).collect();
        let sampled: Vec<usize> = step.samples.iter().map(|row| step.seqs[row.seq].slot as usize).collect();
        executor.launch(step)?;
        let output = executor.collect()?;
        for (seq, entries) in of_prompt.into_iter().zip(output.prompt_logprobs) {
            scores.prompts[seq].extend(entries);
        }
        for (seq, token) in sampled.into_iter().zip(output.tokens) {
            tokens[seq].push(token.token_id);
            scores.outputs[seq].extend(token.logprobs);
        }
    }
    Ok(scores)
}

//! Runs two executors on the same batches, so that every log-probability can be compared: prompts of awkward lengths,
//! whole and in chunks, alone and together. One executor chooses the tokens, the other is made to take them.

use std::sync::Arc;

use super::Executor;
use crate::{
    Error, SamplingParams,
    grammar::TokenMask,
    request::TokenLogprobs,
    step::{Banned, PAGE_SIZE, PromptLogprobs, SampleRow, StepInput, StepSeq, TokenHistory},
};

/// One batch: prompt lengths, and the most prompt tokens of a step.
pub struct Batch {
    /// The case's name.
    pub name: &'static str,
    /// Length of each prompt.
    pub prompts: Vec<usize>,
    /// Most tokens of a step.
    pub chunk: usize,
    /// Tokens chosen after each prompt.
    pub n_outputs: usize,
    /// Whether some of the sequences whose logits are edited draw their tokens at random.
    pub draws: bool,
}

impl Batch {
    /// Of twelve tokens after each prompt, random ones, too.
    pub fn new(name: &'static str, prompts: Vec<usize>, chunk: usize) -> Self {
        Self { name, prompts, chunk, n_outputs: 12, draws: true }
    }
}

/// How a batch's tokens are chosen.
#[derive(Debug, Clone, Copy)]
pub enum Choice<'a> {
    /// The best ones.
    Greedy,
    /// These: the only ones that may be sampled.
    Forced(&'a [Vec<u32>]),
    /// The same, and the prompts' log-probabilities are not asked for.
    ForcedOutputs(&'a [Vec<u32>]),
    /// The best ones or random ones, after each sequence's logits were edited in a way of its own. With log-probabilities
    /// of them or without; those of the prompts are not asked for.
    Edited { logprobs: bool },
}

/// Tokens and log-probabilities of a batch, by sequence.
pub struct Scores {
    /// The sampled tokens.
    pub tokens: Vec<Vec<u32>>,
    /// Of each prompt's tokens but the first.
    pub prompts: Vec<Vec<TokenLogprobs>>,
    /// Of each sampled token.
    pub outputs: Vec<Vec<TokenLogprobs>>,
}

impl Scores {
    /// The sampled tokens alone.
    #[must_use]
    pub fn without_prompts(self) -> Self {
        Self { prompts: Vec::new(), ..self }
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

/// Parameters, seed, bans and history of sequence `seq` of `batch`, which has `tokens` so far.
fn edited_row(row: &mut SampleRow, batch: &Batch, seq: usize, tokens: &[u32]) {
    let n_prompt = batch.prompts[seq];
    let mut params = SamplingParams { temperature: 0.0, logprobs: row.params.logprobs, ..SamplingParams::default() };
    let step = tokens.len() - n_prompt;
    match seq % 6 {
        0 => params.repetition_penalty = 1.7,
        1 => (params.presence_penalty, params.frequency_penalty) = (0.7, 0.4),
        2 => params.logit_bias = (0..40).map(|id| (id * 3, if id % 2 == 0 { 1.5 } else { -2.0 })).collect(),
        3 => params.allowed_token_ids = Some((0..200).map(|id| id * 5 + 1).collect()),
        4 => row.banned = Some(Banned::of((0..100).map(|id| id * 2 + step as u32).collect::<Vec<_>>())),
        _ => {
            params.frequency_penalty = -0.5;
            let bits = (0..60).map(|word| 0x1111_1111 << (word % 4)).collect();
            row.banned = Some(Banned { mask: Some(Arc::new(TokenMask::of_bits(bits))), ..Banned::default() });
        }
    }
    row.history = params
        .has_penalties()
        .then(|| TokenHistory { prompt: tokens[..n_prompt].into(), output: tokens[n_prompt..].to_vec() });
    if batch.draws && !seq.is_multiple_of(5) {
        (params.temperature, row.seed) = (1.3 - 0.2 * (seq % 5) as f32, 7 << 32 | seq as u64);
        match seq % 7 {
            0 => params.top_k = 40,
            1 => params.top_p = 0.9,
            2 => params.min_p = 0.05,
            3 => (params.top_k, params.top_p) = (50, 0.8),
            4 => (params.top_p, params.min_p) = (0.95, 0.02),
            _ => {}
        }
    }
    row.params = Arc::new(params);
}

/// Runs `batch` to its end.
///
/// # Errors
/// The executor's; [`Error::Config`] if it has not the slots or the pages that the batch takes.
pub fn run(executor: &mut dyn Executor, batch: &Batch, vocab: usize, choice: Choice<'_>) -> Result<Scores, Error> {
    let n = batch.prompts.len();
    let mut tokens: Vec<Vec<u32>> = (0..n)
        .map(|seq| (0..batch.prompts[seq]).map(|position| prompt_token(seq, position, vocab)).collect())
        .collect();
    let pages_per_seq = (batch.prompts.iter().max().unwrap_or(&0) + batch.n_outputs).div_ceil(PAGE_SIZE);
    let (n_pages, capacity) = (n * pages_per_seq, executor.capacity());
    if n > capacity.max_num_seqs || n_pages > capacity.n_pages {
        let message = format!(
            "the batch {:?} takes {n} slots and {n_pages} pages, and there are {} and {}",
            batch.name, capacity.max_num_seqs, capacity.n_pages
        );
        return Err(Error::config("kv_cache_memory_bytes", message));
    }
    let mut scores = Scores { tokens: vec![Vec::new(); n], prompts: vec![Vec::new(); n], outputs: vec![Vec::new(); n] };
    let mut done = vec![0usize; n];
    while scores.tokens.iter().any(|output| output.len() < batch.n_outputs) {
        let mut plan: Vec<(usize, usize)> = (0..n)
            .filter(|&seq| scores.tokens[seq].len() < batch.n_outputs)
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
            let is_scored = !targets.is_empty() && matches!(choice, Choice::Greedy | Choice::Forced(_));
            step.seqs.push(StepSeq {
                slot: seq as u32,
                query_start,
                query_len: n_tokens as u32,
                context_len: end as u32,
                block_table: block_start..step.block_tables.len(),
                prompt_logprobs: is_scored.then_some(PromptLogprobs { n_top: 1, targets }),
            });
            done[seq] = end;
            if end == tokens[seq].len() {
                let n_output = scores.tokens[seq].len();
                let allowed = match choice {
                    Choice::Forced(tokens) | Choice::ForcedOutputs(tokens) => Some(vec![tokens[seq][n_output]]),
                    _ => None,
                };
                let logprobs = (!matches!(choice, Choice::Edited { logprobs: false })).then_some(1);
                let mut row = SampleRow {
                    seq: step.seqs.len() - 1,
                    seq_id: seq as u64,
                    params: Arc::new(SamplingParams {
                        temperature: 0.0,
                        logprobs,
                        allowed_token_ids: allowed,
                        ..SamplingParams::default()
                    }),
                    seed: 0,
                    n_output: n_output as u32,
                    banned: None,
                    history: None,
                };
                if matches!(choice, Choice::Edited { .. }) {
                    edited_row(&mut row, batch, seq, &tokens[seq]);
                }
                step.samples.push(row);
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
            scores.tokens[seq].push(token.token_id);
            scores.outputs[seq].extend(token.logprobs);
        }
    }
    Ok(scores)
}

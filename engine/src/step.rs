//! One forward step as flat arrays: the waist between the scheduler and the executors.

use std::sync::Arc;

use crate::{
    grammar::TokenMask,
    request::{SamplingParams, TokenLogprobs},
};

/// Tokens per KV page, on every executor.
pub const PAGE_SIZE: usize = 16;

/// One step: a batch of prompt chunks and decoding sequences, one query row per token.
#[derive(Debug, Clone, Default)]
pub struct StepInput {
    /// `[n_tokens]`. A value `>= 0` is a token id. A negative value `-1 - slot` stands for the token
    /// sampled last for that slot, still unknown to the host (only with executors whose
    /// `max_in_flight` is above 1).
    pub token_ids: Vec<i32>,
    /// `[n_tokens]`: position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[n_tokens]`: where each token's key and value go, `page * PAGE_SIZE + offset`.
    pub slot_mapping: Vec<u32>,
    /// The sequences, decoding ones (`query_len == 1`) first, of these the longest contexts first.
    pub seqs: Vec<StepSeq>,
    /// Pages of all sequences, one after the other; see [`StepSeq::block_table`].
    pub block_tables: Vec<u32>,
    /// Rows to sample, in the order of their sequences.
    pub samples: Vec<SampleRow>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone)]
pub struct StepSeq {
    /// Row of the executor's per-sequence state, below `max_num_seqs`, fixed while the sequence runs.
    pub slot: u32,
    /// First query row; the rows are `query_start .. query_start + query_len`.
    pub query_start: u32,
    /// Tokens of this sequence in this step.
    pub query_len: u32,
    /// Tokens in the KV cache after this step, this step's included.
    pub context_len: u32,
    /// Range of [`StepInput::block_tables`]: page of tokens `0..16`, of `16..32`, ...
    pub block_table: std::ops::Range<usize>,
    /// Log-probabilities wanted of the prompt tokens that follow these rows.
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// Which prompt log-probabilities a sequence wants from this step.
#[derive(Debug, Clone)]
pub struct PromptLogprobs {
    /// How many best tokens beside the target.
    pub n_top: u32,
    /// Target token of the sequence's first `targets.len()` query rows: the prompt token after each.
    pub targets: Vec<u32>,
}

/// A row whose logits are sampled: always the last query row of its sequence.
#[derive(Debug, Clone)]
pub struct SampleRow {
    /// Index into [`StepInput::seqs`].
    pub seq: usize,
    /// Unique for the life of the engine; tells a new sequence in a reused slot from the old one.
    pub seq_id: u64,
    /// The request's parameters.
    pub params: Arc<SamplingParams>,
    /// Key of the random numbers.
    pub seed: u64,
    /// Counter of the random numbers: index of the token to sample in the output.
    pub n_output: u32,
    /// Tokens that must not be sampled now; `None` if all may.
    pub banned: Option<Banned>,
    /// Tokens so far, for penalties; `None` if the request has none.
    pub history: Option<TokenHistory>,
}

/// Tokens that must not be sampled.
#[derive(Debug, Clone, Default)]
pub struct Banned {
    /// These: end-of-sequence ids while below `min_tokens`, and ends of bad words.
    pub ids: Arc<[u32]>,
    /// And all that a grammar does not allow. It outranks `ids` if the two leave nothing.
    pub mask: Option<Arc<TokenMask>>,
}

impl Banned {
    /// These ids.
    pub fn of(ids: impl Into<Arc<[u32]>>) -> Self {
        Self { ids: ids.into(), mask: None }
    }
}

/// Tokens that penalties look at.
#[derive(Debug, Clone)]
pub struct TokenHistory {
    /// The prompt.
    pub prompt: Arc<[u32]>,
    /// Output tokens known to the host; tokens of steps in flight are missing.
    pub output: Vec<u32>,
}

/// What a step produced.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// One per [`StepInput::samples`] row.
    pub tokens: Vec<SampledToken>,
    /// For each sequence with [`StepSeq::prompt_logprobs`], in order: one entry per target.
    pub prompt_logprobs: Vec<Vec<TokenLogprobs>>,
}

/// One sampled token.
#[derive(Debug, Clone)]
pub struct SampledToken {
    /// Its id.
    pub token_id: u32,
    /// Its log-probabilities, if `params.logprobs` asked for them.
    pub logprobs: Option<TokenLogprobs>,
}

impl StepInput {
    /// Query rows in the step.
    pub fn n_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Query row whose logits `sample` is drawn from: the last of its sequence.
    pub fn sample_row(&self, sample: &SampleRow) -> usize {
        let seq = &self.seqs[sample.seq];
        (seq.query_start + seq.query_len - 1) as usize
    }

    /// Whether the last row of sequence `seq` is sampled.
    pub fn is_sampled(&self, seq: usize) -> bool {
        self.samples.binary_search_by_key(&seq, |sample| sample.seq).is_ok()
    }

    /// Pages of `seq`, in token order.
    pub fn pages(&self, seq: &StepSeq) -> &[u32] {
        &self.block_tables[seq.block_table.clone()]
    }
}

//! One sequence's tokens and state. Knows nothing of text, pages' contents or time.

use std::sync::Arc;

use ember_common::FinishReason;

use crate::{
    grammar::{Grammar, TokenMask},
    kv_pool::BlockTable,
    request::{SamplingParams, TokenLogprobs},
    step::Banned,
    thinking::Thinking,
};

/// Unique for the life of an engine.
pub type SeqId = u64;

/// What a sequence is made from.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// The prompt; not empty, and shorter than `max_len`.
    pub prompt: Arc<[u32]>,
    /// The request's parameters.
    pub params: Arc<SamplingParams>,
    /// Key of its random numbers.
    pub seed: u64,
    /// Prompt + output never exceed this many tokens.
    pub max_len: usize,
    /// Tokens that end the sequence unless `ignore_eos`, primary first.
    pub eos_token_ids: Arc<[u32]>,
    /// Mixed into the prefix-cache lookup.
    pub cache_salt: Option<String>,
    /// Lower goes first.
    pub priority: i64,
    /// What the output must look like; of this sequence alone.
    pub grammar: Option<Grammar>,
    /// Token sequences that must not be in the output.
    pub bad_words: Arc<[Vec<u32>]>,
}

/// How a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceEnd {
    /// Why.
    pub reason: FinishReason,
    /// The stop token, unless it is the primary end-of-sequence token.
    pub stop_token: Option<u32>,
    /// Whether the last token is part of the text; a stop token is not.
    pub shows_token: bool,
}

/// A sequence from its arrival to its end.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) new: NewSequence,
    /// Prompt and known output.
    pub(crate) tokens: Vec<u32>,
    /// Tokens whose keys and values are computed or being computed.
    pub(crate) n_scheduled: usize,
    /// Output tokens being sampled by steps in flight.
    pub(crate) n_in_flight: usize,
    pub(crate) table: BlockTable,
    /// Set while in the batch.
    pub(crate) slot: Option<u32>,
    /// Prompt tokens that came from the prefix cache when it first entered the batch.
    pub(crate) n_cached: Option<usize>,
    /// Times it was put back to recompute.
    pub(crate) n_preemptions: u32,
    /// Prompt log-probabilities so far, if asked for.
    pub(crate) prompt_logprobs: Vec<TokenLogprobs>,
    /// Set once the grammar has failed; the sequence ends with it.
    pub(crate) grammar_error: Option<String>,
    banned_until_min_tokens: Option<Arc<[u32]>>,
    thinking: Option<Thinking>,
}

impl Sequence {
    pub(crate) fn new(new: NewSequence) -> Self {
        let mut stop_ids = new.params.stop_token_ids.clone();
        if !new.params.ignore_eos {
            stop_ids.extend_from_slice(&new.eos_token_ids);
        }
        let banned = (new.params.min_tokens > 0 && !stop_ids.is_empty()).then(|| stop_ids.into());
        let thinking = new.params.thinking_budget.clone().map(|budget| Thinking::new(budget, &new.prompt));
        Self {
            tokens: new.prompt.to_vec(),
            new,
            n_scheduled: 0,
            n_in_flight: 0,
            table: BlockTable::default(),
            slot: None,
            n_cached: None,
            n_preemptions: 0,
            prompt_logprobs: Vec::new(),
            grammar_error: None,
            banned_until_min_tokens: banned,
            thinking,
        }
    }

    /// Tokens, those still being sampled included.
    pub(crate) fn virtual_len(&self) -> usize {
        self.tokens.len() + self.n_in_flight
    }

    /// Output tokens, those still being sampled included.
    pub(crate) fn n_output(&self) -> usize {
        self.virtual_len() - self.new.prompt.len()
    }

    /// Most tokens this sequence may come to.
    pub(crate) fn len_limit(&self) -> usize {
        let asked = self.new.params.max_tokens.map_or(usize::MAX, |n| self.new.prompt.len() + n as usize);
        asked.min(self.new.max_len)
    }

    /// Tokens that wait for a step.
    pub(crate) fn n_to_schedule(&self) -> usize {
        // The last token is already being sampled, or the next one depends on it.
        if self.n_in_flight > 0 && (self.virtual_len() >= self.len_limit() || self.needs_known_tokens()) {
            return 0;
        }
        self.virtual_len() - self.n_scheduled
    }

    /// Whether which tokens are banned depends on the one before.
    fn needs_known_tokens(&self) -> bool {
        self.new.grammar.is_some()
            || self.new.bad_words.iter().any(|word| word.len() > 1)
            || self.thinking.as_ref().is_some_and(|thinking| thinking.depends_on_next(self.n_in_flight))
    }

    /// What must not be sampled for output token number `n_output`.
    pub(crate) fn banned(&self) -> Option<Banned> {
        let is_early = self.n_output() < self.new.params.min_tokens as usize;
        let until_min_tokens = self.banned_until_min_tokens.as_ref().filter(|_| is_early);
        let mask = match self.thinking.as_ref().and_then(Thinking::forced) {
            Some(id) => Some(Arc::new(TokenMask::only(id))),
            None => self.new.grammar.as_ref().map(|grammar| Arc::new(grammar.mask())),
        };
        if self.new.bad_words.is_empty() {
            let ids = until_min_tokens.cloned();
            // An empty list sends the row to the host's sampler, wherever it runs: only that one knows log-probabilities
            // of chosen tokens.
            let is_for_host = !self.new.params.logprob_token_ids.is_empty();
            return (ids.is_some() || mask.is_some() || is_for_host)
                .then(|| Banned { ids: ids.unwrap_or_default(), mask });
        }
        let output = &self.tokens[self.new.prompt.len()..];
        let ends = self.new.bad_words.iter().filter_map(|word| {
            let (last, before) = word.split_last()?;
            output.ends_with(before).then_some(*last)
        });
        Some(Banned {
            ids: until_min_tokens.into_iter().flat_map(|ids| ids.iter().copied()).chain(ends).collect(),
            mask,
        })
    }

    /// Appends a sampled token and says whether it was the last.
    pub(crate) fn push(&mut self, token: u32) -> Option<SequenceEnd> {
        self.tokens.push(token);
        self.n_in_flight = self.n_in_flight.saturating_sub(1);
        if let Some(thinking) = &mut self.thinking {
            thinking.push(&self.tokens[self.new.prompt.len()..]);
        }
        let is_complete = match self.new.grammar.as_ref().map(|grammar| grammar.push(token)) {
            None => false,
            Some(Ok(is_complete)) => is_complete,
            Some(Err(message)) => {
                self.grammar_error = Some(message);
                return Some(SequenceEnd { reason: FinishReason::Abort, stop_token: None, shows_token: false });
            }
        };
        let params = &self.new.params;
        let n_output = self.tokens.len() - self.new.prompt.len();
        let is_eos = self.new.eos_token_ids.contains(&token);
        if is_complete {
            // Nothing can follow, whatever `ignore_eos` and `min_tokens` say.
            return Some(SequenceEnd { reason: FinishReason::Stop, stop_token: None, shows_token: !is_eos });
        }
        if n_output >= params.min_tokens as usize {
            if !params.ignore_eos
                && let Some(i) = self.new.eos_token_ids.iter().position(|&id| id == token)
            {
                return Some(SequenceEnd {
                    reason: FinishReason::Stop,
                    stop_token: (i > 0).then_some(token),
                    shows_token: false,
                });
            }
            if params.stop_token_ids.contains(&token) {
                return Some(SequenceEnd { reason: FinishReason::Stop, stop_token: Some(token), shows_token: false });
            }
            let output = &self.tokens[self.new.prompt.len()..];
            if params.repetition_detection.is_some_and(|detection| detection.finds(output)) {
                return Some(SequenceEnd { reason: FinishReason::Repetition, stop_token: None, shows_token: true });
            }
        }
        (self.tokens.len() >= self.len_limit()).then_some(SequenceEnd {
            reason: FinishReason::Length,
            stop_token: None,
            shows_token: true,
        })
    }
}

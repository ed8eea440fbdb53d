//! What callers ask for and what they get: requests, sampling parameters, events.

use std::time::Duration;

use ember_common::FinishReason;

use crate::{Error, RepetitionDetection, StructuredOutputs, ThinkingBudget};

/// A prompt, as text or as token ids that bypass the tokenizer.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Plain text. Special tokens in it are not parsed; the tokenizer adds its own (BOS).
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// One request: one prompt, `params.n` sequences.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// The prompt.
    pub prompt: Prompt,
    /// How to continue it.
    pub params: SamplingParams,
    /// Mixed into the prefix-cache hashes, so that only requests of equal salt share pages.
    pub cache_salt: Option<String>,
    /// Lower goes first; equal ones in order of arrival. Only with [`crate::SchedulingPolicy::Priority`].
    pub priority: i64,
}

impl GenerateRequest {
    /// A request with no cache salt and priority 0.
    pub fn new(prompt: impl Into<Prompt>, params: SamplingParams) -> Self {
        Self { prompt: prompt.into(), params, cache_salt: None, priority: 0 }
    }
}

/// How to choose tokens and when to stop. Names, defaults and ranges are vLLM's
/// `SamplingParams`; [`SamplingParams::validate`] checks them.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Sequences per prompt.
    pub n: u32,
    /// 0 (below 1e-5) is greedy.
    pub temperature: f32,
    /// Nucleus sampling: smallest set of tokens whose probabilities add up to this.
    pub top_p: f32,
    /// Keep only this many best tokens; 0 keeps all.
    pub top_k: u32,
    /// Drop tokens less probable than this share of the best token's probability.
    pub min_p: f32,
    /// Subtracted once from each token already in the output.
    pub presence_penalty: f32,
    /// Subtracted from each token's logit per occurrence in the output.
    pub frequency_penalty: f32,
    /// Divides positive (multiplies negative) logits of tokens in prompt or output.
    pub repetition_penalty: f32,
    /// Added to the logits of these token ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these token ids may be sampled.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Texts that must not be in the output, as the tokenizer spells them with and without a space before.
    pub bad_words: Vec<String>,
    /// What the output must look like.
    pub structured_outputs: Option<StructuredOutputs>,
    /// Same seed, same tokens, whatever else runs. `None` draws one.
    pub seed: Option<u64>,
    /// Output ends before any of these strings.
    pub stop: Vec<String>,
    /// Output ends with any of these tokens.
    pub stop_token_ids: Vec<u32>,
    /// Leave the stop string in the text.
    pub include_stop_str_in_output: bool,
    /// Do not stop at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// End-of-sequence and stop tokens are banned until this many tokens came.
    pub min_tokens: u32,
    /// End an output that goes round in circles.
    pub repetition_detection: Option<RepetitionDetection>,
    /// End reasoning that takes too long.
    pub thinking_budget: Option<ThinkingBudget>,
    /// Most output tokens; `None` means up to the context's end. Clamped to the context.
    pub max_tokens: Option<u32>,
    /// Log-probabilities of the sampled token and of this many best ones (`Some(0)`: sampled only).
    pub logprobs: Option<u32>,
    /// With `logprobs`: log-probabilities of these tokens in place of the best ones'.
    pub logprob_token_ids: Vec<u32>,
    /// The same for each prompt token.
    pub prompt_logprobs: Option<u32>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            structured_outputs: None,
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            min_tokens: 0,
            repetition_detection: None,
            thinking_budget: None,
            max_tokens: None,
            logprobs: None,
            logprob_token_ids: Vec::new(),
            prompt_logprobs: None,
            skip_special_tokens: true,
        }
    }
}

impl SamplingParams {
    /// Most [`SamplingParams::logprob_token_ids`].
    pub const MAX_LOGPROB_TOKEN_IDS: usize = 128;
    /// Below this temperature sampling is greedy (vLLM's `_SAMPLING_EPS`).
    pub const GREEDY_BELOW: f32 = 1e-5;

    /// Whether the best token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature < Self::GREEDY_BELOW
    }

    /// Whether any penalty needs the tokens seen so far.
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// How many tokens there are log-probabilities of at each position of the output, beside the sampled one; `None`
    /// for none at all.
    pub fn n_logprobs(&self) -> Option<usize> {
        self.logprobs.map(|n| if self.logprob_token_ids.is_empty() { n as usize } else { self.logprob_token_ids.len() })
    }

    /// Checks every range against `vocab_size` token ids.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] naming the first field out of range, in vLLM's wording.
    pub fn validate(&self, vocab_size: usize) -> Result<(), Error> {
        let range = |ok: bool, param: &'static str, rule: &str, value: f32| {
            if ok { Ok(()) } else { Err(Error::invalid(param, format!("{param} must be {rule}, got {value}."))) }
        };
        range((1..=16_384).contains(&self.n), "n", "between 1 and 16384", self.n as f32)?;
        range(
            self.temperature.is_finite() && (0.0..=2.0).contains(&self.temperature),
            "temperature",
            "in [0, 2]",
            self.temperature,
        )?;
        if self.is_greedy() && self.n > 1 {
            return Err(Error::invalid("n", format!("n must be 1 when using greedy sampling, got {}.", self.n)));
        }
        range(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)?;
        range((0.0..=1.0).contains(&self.min_p), "min_p", "in [0, 1]", self.min_p)?;
        range((-2.0..=2.0).contains(&self.presence_penalty), "presence_penalty", "in [-2, 2]", self.presence_penalty)?;
        range(
            (-2.0..=2.0).contains(&self.frequency_penalty),
            "frequency_penalty",
            "in [-2, 2]",
            self.frequency_penalty,
        )?;
        range(
            self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
            "repetition_penalty",
            "greater than zero",
            self.repetition_penalty,
        )?;
        if self.max_tokens == Some(0) {
            return Err(Error::invalid("max_tokens", "max_tokens must be at least 1, got 0."));
        }
        if let Some(max_tokens) = self.max_tokens
            && self.min_tokens > max_tokens
        {
            return Err(Error::invalid(
                "min_tokens",
                format!("min_tokens must be less than or equal to max_tokens={max_tokens}, got {}.", self.min_tokens),
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "stop cannot contain an empty string."));
        }
        let in_vocab = |param: &'static str, mut ids: Box<dyn Iterator<Item = u32> + '_>| match ids
            .find(|&id| id as usize >= vocab_size)
        {
            Some(id) => {
                Err(Error::invalid(param, format!("{param}: token id {id} is out of vocabulary (size {vocab_size}).")))
            }
            None => Ok(()),
        };
        in_vocab("stop_token_ids", Box::new(self.stop_token_ids.iter().copied()))?;
        in_vocab("logit_bias", Box::new(self.logit_bias.iter().map(|&(id, _)| id)))?;
        if let Some(allowed) = &self.allowed_token_ids {
            if allowed.is_empty() {
                return Err(Error::invalid("allowed_token_ids", "allowed_token_ids is not None and empty!"));
            }
            in_vocab("allowed_token_ids", Box::new(allowed.iter().copied()))?;
        }
        in_vocab("logprob_token_ids", Box::new(self.logprob_token_ids.iter().copied()))?;
        if self.logprob_token_ids.len() > Self::MAX_LOGPROB_TOKEN_IDS {
            let (most, n) = (Self::MAX_LOGPROB_TOKEN_IDS, self.logprob_token_ids.len());
            return Err(Error::invalid(
                "logprob_token_ids",
                format!("logprob_token_ids has {n} ids; at most {most} are allowed."),
            ));
        }
        if self.logprobs.is_none() && !self.logprob_token_ids.is_empty() {
            return Err(Error::invalid("logprob_token_ids", "logprob_token_ids needs `logprobs`."));
        }
        if self.bad_words.iter().any(|word| word.trim().is_empty()) {
            return Err(Error::invalid("bad_words", "bad_words cannot contain an empty string."));
        }
        Ok(())
    }
}

/// One position's log-probabilities, from the raw logits (before penalties and temperature).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token at this position.
    pub token_id: u32,
    /// Its log-probability, natural logarithm.
    pub logprob: f32,
    /// Its 1-based rank in the vocabulary.
    pub rank: u32,
    /// The best tokens and their log-probabilities, best first; as many as asked for. With
    /// [`SamplingParams::logprob_token_ids`] those, in their order.
    pub top: Vec<(u32, f32)>,
}

/// What made a sequence stop, beside its [`FinishReason`].
#[derive(Debug, Clone, PartialEq)]
pub enum StopReason {
    /// One of `stop_token_ids` or a secondary end-of-sequence token.
    Token(u32),
    /// One of the `stop` strings, or `repetition_detected`.
    Text(String),
}

/// The end of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// Why it ended.
    pub reason: FinishReason,
    /// What ended it; `None` for the primary end-of-sequence token and for length.
    pub stop_reason: Option<StopReason>,
}

/// The prompt's part of an answer; the first event of every generation.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptEvent {
    /// The prompt's tokens.
    pub token_ids: std::sync::Arc<[u32]>,
    /// How many of them came from the prefix cache.
    pub n_cached: usize,
    /// From the request's arrival to its first step.
    pub queue_time: Duration,
    /// From its first step to its first token.
    pub prefill_time: Duration,
    /// With `prompt_logprobs`: one entry per prompt token, the first `None`.
    pub logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

/// New output of one sequence.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Which of the request's `n` sequences.
    pub index: usize,
    /// New text; may be empty while half a character or a possible stop string is held back.
    pub text: String,
    /// New tokens, usually one. Tokens cut off by a stop string are still counted here.
    pub token_ids: Vec<u32>,
    /// One per new token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Set on the sequence's last delta.
    pub finish: Option<Finish>,
}

/// What a [`crate::Generation`] yields.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt has been processed. Comes once, before any delta.
    Prompt(PromptEvent),
    /// New output.
    Delta(Delta),
}

/// A finished sequence, from [`crate::Engine::generate`].
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Index of the prompt in the call.
    pub prompt_index: usize,
    /// Which of the prompt's `n` sequences.
    pub index: usize,
    /// The prompt's tokens.
    pub prompt_token_ids: std::sync::Arc<[u32]>,
    /// The generated text.
    pub text: String,
    /// The generated tokens, end-of-sequence included.
    pub token_ids: Vec<u32>,
    /// One per token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub finish: Finish,
}

//! [`UsageMeter`]: counts a stream's tokens and says what of it goes on the wire.

use ember_common::openai::{CompletionTokensDetails, PromptTokensDetails, StreamOptions, StreamUsage, Usage};
use ember_engine::PromptEvent;

use crate::{config::AppConfig, generation::Finished};

/// Counts a request's tokens.
#[derive(Debug, Clone)]
pub struct UsageMeter {
    /// Choices per prompt.
    n: usize,
    prompt_lens: Vec<usize>,
    n_cached: usize,
    completion_lens: Vec<usize>,
    /// Tokens of reasoning; `None` without a reasoning parser.
    pub n_reasoning: Option<usize>,
    with_details: bool,
    /// Count prompts alone: the output is not sent.
    pub only_prompts: bool,
    /// End with a usage chunk.
    pub at_end: bool,
    /// Usage on every chunk.
    pub continuous: bool,
}

impl UsageMeter {
    /// A meter for `n_prompts` prompts of `n` choices each.
    pub fn new(config: &AppConfig, options: Option<StreamOptions>, n_prompts: usize, n: usize) -> Self {
        let options = options.unwrap_or_default();
        let at_end = config.enable_force_include_usage || options.include_usage == Some(true);
        let continuous = config.enable_force_include_usage || options.continuous_usage_stats == Some(true);
        Self {
            n,
            prompt_lens: vec![0; n_prompts],
            n_cached: 0,
            completion_lens: vec![0; n_prompts * n],
            n_reasoning: None,
            with_details: config.enable_prompt_tokens_details,
            only_prompts: false,
            at_end,
            continuous: at_end && continuous,
        }
    }

    /// Counts a prompt.
    pub fn prompt(&mut self, prompt_idx: usize, prompt: &PromptEvent) {
        self.prompt_lens[prompt_idx] = prompt.token_ids.len();
        self.n_cached += prompt.n_cached;
    }

    /// Counts all of a request with one choice per prompt.
    pub fn finished(&mut self, finished: &Finished) {
        for (idx, prompt) in finished.prompts.iter().enumerate() {
            if let Some(prompt) = prompt {
                self.prompt(idx, prompt);
            }
        }
        finished.choices.iter().for_each(|choice| self.output(choice.index, choice.token_ids.len()));
    }

    /// Counts output tokens.
    pub fn output(&mut self, choice_idx: usize, n_tokens: usize) {
        if !self.only_prompts {
            self.completion_lens[choice_idx] += n_tokens;
        }
    }

    /// One choice so far, if wanted on every chunk.
    pub fn so_far(&self, choice_idx: usize) -> Option<StreamUsage> {
        self.continuous
            .then(|| Usage::new(self.prompt_lens[choice_idx / self.n], self.completion_lens[choice_idx]).into())
    }

    /// Everything.
    pub fn total(&self) -> Usage {
        let mut usage = Usage::new(self.prompt_lens.iter().sum(), self.completion_lens.iter().sum());
        usage.completion_tokens_details =
            self.n_reasoning.map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens });
        usage.prompt_tokens_details = self
            .with_details
            .then(|| PromptTokensDetails { cached_tokens: self.n_cached, ..PromptTokensDetails::default() });
        usage
    }
}

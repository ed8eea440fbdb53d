//! Token counts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Token counts of a whole answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Prompt and completion.
    pub total_tokens: usize,
    /// Tokens of all choices.
    pub completion_tokens: usize,
    /// Where the prompt's tokens came from.
    pub prompt_tokens_details: Option<PromptTokensDetails>,
    /// Only with a reasoning parser.
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

impl Usage {
    /// Counts without details.
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens, ..Self::default() }
    }
}

impl std::iter::Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, usage| {
            sum.prompt_tokens += usage.prompt_tokens;
            sum.total_tokens += usage.total_tokens;
            sum.completion_tokens += usage.completion_tokens;
            if let Some(details) = usage.prompt_tokens_details {
                sum.prompt_tokens_details.get_or_insert_default().cached_tokens += details.cached_tokens;
            }
            if let Some(details) = usage.completion_tokens_details {
                sum.completion_tokens_details.get_or_insert_default().reasoning_tokens += details.reasoning_tokens;
            }
            sum
        })
    }
}

/// What the completion's tokens were for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct CompletionTokensDetails {
    /// Tokens of the reasoning part.
    pub reasoning_tokens: usize,
}

/// Where the prompt's tokens came from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct PromptTokensDetails {
    /// Tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// Not counted.
    pub created_cache_tokens: Option<usize>,
    /// Not counted.
    pub multimodal_tokens: Option<usize>,
}

/// Token counts on a stream chunk, where unused keys are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StreamUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt and completion.
    pub total_tokens: usize,
    /// Tokens so far.
    pub completion_tokens: usize,
    /// Where the prompt's tokens came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
    /// What the completion's tokens were for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

impl From<Usage> for StreamUsage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            total_tokens: usage.total_tokens,
            completion_tokens: usage.completion_tokens,
            prompt_tokens_details: usage.prompt_tokens_details,
            completion_tokens_details: usage.completion_tokens_details,
        }
    }
}

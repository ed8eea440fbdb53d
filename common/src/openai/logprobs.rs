//! Log-probabilities in their three wire shapes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::OrderedMap;

/// Stands for minus infinity, which JSON cannot say.
pub const MIN_LOGPROB: f32 = -9999.0;

/// Log-probabilities of a chat choice.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct ChatLogprobs {
    /// One entry per token.
    pub content: Vec<ChatTokenLogprob>,
}

/// One token of a chat choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ChatTokenLogprob {
    /// The token's text, or `token_id:N`.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Option<Vec<u8>>,
    /// Candidates, the sampled token first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One candidate at a position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TopLogprob {
    /// The token's text, or `token_id:N`.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The token's bytes.
    pub bytes: Option<Vec<u8>>,
}

/// Log-probabilities of a completion choice; the lists run in parallel, one entry per token.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct CompletionLogprobs {
    /// Where each token starts in the text, in characters.
    pub text_offset: Vec<usize>,
    /// `None` for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// Candidates by text, the sampled token first.
    pub top_logprobs: Vec<Option<OrderedMap<f32>>>,
}

/// One entry per prompt token, the first `None`; candidates by token id.
pub type PromptLogprobs = Vec<Option<OrderedMap<PromptLogprob>>>;

/// One candidate at a prompt position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptLogprob {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1-based rank in the vocabulary.
    pub rank: u32,
    /// The token's text.
    pub decoded_token: String,
}

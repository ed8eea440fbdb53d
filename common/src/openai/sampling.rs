//! Request fields that chat and completions share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::OrderedMap;

/// Request fields that chat and completions share, as sent. `None` is absent or `null`; ranges are
/// not checked here. Fields held as [`Value`] are ones that a server may have to refuse by name.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct SamplingFields {
    pub model: Option<String>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub seed: Option<i64>,
    pub n: Option<i64>,
    pub stop: Option<OneOrMany<String>>,
    pub stop_token_ids: Option<Vec<i64>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub min_tokens: Option<i64>,
    pub max_tokens: Option<i64>,
    pub logit_bias: Option<OrderedMap<f32>>,
    pub allowed_token_ids: Option<Vec<i64>>,
    pub prompt_logprobs: Option<i64>,
    pub skip_special_tokens: Option<bool>,
    pub truncate_prompt_tokens: Option<i64>,
    pub truncation_side: Option<String>,
    pub add_special_tokens: Option<bool>,
    pub echo: Option<bool>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub stream_interval: Option<i64>,
    pub cache_salt: Option<String>,
    pub return_tokens_as_token_ids: Option<bool>,
    pub return_token_ids: Option<bool>,
    pub request_id: Option<String>,
    pub bad_words: Option<Vec<String>>,
    pub priority: Option<i64>,
    pub structured_outputs: Option<super::StructuredOutputsFields>,
    pub response_format: Option<super::ResponseFormat>,
    /// The best `n` outputs of a search that keeps `n` at each step, in place of sampling.
    pub use_beam_search: Option<bool>,
    /// With `use_beam_search`: above 1 prefers long outputs.
    pub length_penalty: Option<f64>,
    pub repetition_detection: Option<RepetitionDetectionFields>,
    /// Without effect: nothing is put between special tokens.
    pub spaces_between_special_tokens: Option<bool>,
    /// With log-probabilities: those of these tokens in place of the best ones'.
    pub logprob_token_ids: Option<Vec<i64>>,
    /// Most tokens of reasoning; -1 sets no limit.
    pub thinking_token_budget: Option<i64>,
    pub watermarking: Option<Value>,
    pub kv_transfer_params: Option<Value>,
    pub ec_transfer_params: Option<Value>,
    pub vllm_xargs: Option<Value>,
    pub return_weight_versions: Option<bool>,
    pub guided_json: Option<Value>,
    pub guided_regex: Option<Value>,
    pub guided_choice: Option<Value>,
    pub guided_grammar: Option<Value>,
}

/// When an output that goes round in circles is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct RepetitionDetectionFields {
    /// Tokens of the longest pattern that is looked for; 0 looks for none.
    #[serde(default)]
    pub max_pattern_size: u32,
    /// Tokens of the shortest; 0 counts as 1.
    #[serde(default)]
    pub min_pattern_size: u32,
    /// Times that a pattern must follow itself, at least 2.
    #[serde(default)]
    pub min_count: u32,
}

/// What a stream carries beside text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
pub struct StreamOptions {
    /// End with a chunk of token counts.
    pub include_usage: Option<bool>,
    /// Token counts on every chunk; only with `include_usage`.
    pub continuous_usage_stats: Option<bool>,
}

/// A value or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// A value.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// As a list.
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// What ended a choice beside its finish reason: a stop token or a stop string.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// A token of `stop_token_ids` or a secondary end-of-sequence token.
    Token(u32),
    /// A string of `stop`.
    Text(String),
}

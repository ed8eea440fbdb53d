//! `POST /tokenize` and `POST /detokenize`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The body of `POST /tokenize`: either `prompt` or `messages`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct TokenizeFields {
    pub model: Option<String>,
    pub prompt: Option<String>,
    pub messages: Option<Vec<Value>>,
    pub tools: Option<Vec<Value>>,
    /// Default true for `prompt`, false for `messages`.
    pub add_special_tokens: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub chat_template: Option<Value>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub return_token_strs: Option<bool>,
}

/// The answer of `POST /tokenize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Tokenized {
    /// Length of `tokens`.
    pub count: usize,
    /// Longest prompt + output in tokens.
    pub max_model_len: usize,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The vocabulary's spelling of each token, if asked for.
    pub token_strs: Option<Vec<String>>,
}

/// The body of `POST /detokenize`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
pub struct DetokenizeFields {
    /// A served name.
    pub model: Option<String>,
    /// Token ids.
    pub tokens: Vec<u32>,
}

/// The answer of `POST /detokenize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}

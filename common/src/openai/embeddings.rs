//! `POST /v1/embeddings`, `/score` and `/rerank`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PromptInput;

/// The body of `POST /v1/embeddings`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct EmbeddingFields {
    pub model: Option<String>,
    /// One text or several, as text or token ids.
    pub input: PromptInput,
    /// `float` (default) or `base64`.
    pub encoding_format: Option<String>,
    /// With `base64`: `float32` (default), `float16` or `bfloat16`.
    pub embed_dtype: Option<String>,
    /// With `base64`: `native` (default), `little` or `big`.
    pub endianness: Option<String>,
    /// Only what the model has: there is no model here that can be cut.
    pub dimensions: Option<i64>,
    /// Keep at most this many tokens of each text; -1: as many as the model takes.
    pub truncate_prompt_tokens: Option<i64>,
    /// Which end goes: `right` (default) or `left`.
    pub truncation_side: Option<String>,
    pub add_special_tokens: Option<bool>,
    /// Without effect: there is no cache, and texts are taken in their order.
    pub cache_salt: Option<String>,
    /// The same.
    pub priority: Option<i64>,
    pub request_id: Option<String>,
    /// Not supported; `input` is.
    #[schemars(skip)]
    pub messages: Option<Value>,
    /// Not supported: the model's own configuration says it.
    #[schemars(skip)]
    pub normalize: Option<Value>,
    /// Only `true`, for the same reason.
    #[schemars(skip)]
    pub use_activation: Option<bool>,
    /// Not supported: vectors do not depend on it.
    #[schemars(skip)]
    pub padding: Option<Value>,
}

/// The answer of `POST /v1/embeddings`.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct EmbeddingList {
    pub id: String,
    /// `list`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: String,
    pub data: Vec<Embedding>,
    pub usage: PoolingUsage,
}

/// One text's vector.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Embedding {
    pub index: usize,
    /// `embedding`.
    pub object: &'static str,
    pub embedding: EmbeddingValue,
}

/// A vector in one of its encodings.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbeddingValue {
    /// Numbers.
    Floats(Vec<f32>),
    /// Little-endian float32.
    Base64(String),
}

/// Tokens that were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct PoolingUsage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
    /// 0.
    pub completion_tokens: usize,
}

impl PoolingUsage {
    /// Of `n` tokens.
    pub fn of(n: usize) -> Self {
        Self { prompt_tokens: n, total_tokens: n, completion_tokens: 0 }
    }
}

/// The body of `POST /score`: one query against several documents, or as many of both.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ScoreFields {
    pub model: Option<String>,
    #[serde(alias = "text_1", alias = "data_1")]
    pub queries: OneOrSeveral,
    #[serde(alias = "text_2", alias = "data_2", alias = "items")]
    pub documents: OneOrSeveral,
    pub truncate_prompt_tokens: Option<i64>,
    /// Keep at most this many tokens of each query, beside those that the tokenizer adds; 0 (default): all.
    pub max_tokens_per_query: Option<i64>,
    /// The same of each document.
    pub max_tokens_per_doc: Option<i64>,
    pub request_id: Option<String>,
}

/// One text, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
#[allow(missing_docs)]
pub enum OneOrSeveral {
    One(String),
    Several(Vec<String>),
}

impl OneOrSeveral {
    /// The texts.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Several(texts) => texts,
        }
    }
}

/// The answer of `POST /score`.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ScoreList {
    pub id: String,
    /// `list`.
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub data: Vec<Score>,
    pub usage: PoolingUsage,
}

/// How near a pair of texts is.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Score {
    pub index: usize,
    /// `score`.
    pub object: &'static str,
    /// The cosine of their vectors.
    pub score: f32,
}

/// The body of `POST /rerank`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct RerankFields {
    pub model: Option<String>,
    pub query: String,
    pub documents: Vec<String>,
    /// The best so many; 0 (default): all.
    pub top_n: Option<usize>,
    pub truncate_prompt_tokens: Option<i64>,
    /// Keep at most this many tokens of the query, beside those that the tokenizer adds; 0 (default): all.
    pub max_tokens_per_query: Option<i64>,
    /// The same of each document.
    pub max_tokens_per_doc: Option<i64>,
    pub request_id: Option<String>,
}

/// The answer of `POST /rerank`, best first.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Ranking {
    pub id: String,
    pub model: String,
    pub usage: PoolingUsage,
    pub results: Vec<Ranked>,
}

/// One document.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Ranked {
    /// Its place in the request.
    pub index: usize,
    pub document: RankedDocument,
    /// The cosine of its vector and the query's.
    pub relevance_score: f32,
}

/// The document itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct RankedDocument {
    pub text: String,
    /// Always null: documents are texts.
    pub multi_modal: Option<Value>,
}

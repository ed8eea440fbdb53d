//! `GET /v1/models`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The body of `GET /v1/models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// One card per served name.
    pub data: Vec<ModelCard>,
}

/// One served name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelCard {
    /// The served name.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// The server software.
    pub owned_by: String,
    /// The model folder or file.
    #[serde(default)]
    pub root: Option<String>,
    /// The base model of an adapter.
    #[serde(default)]
    pub parent: Option<String>,
    /// Longest prompt + output in tokens.
    #[serde(default)]
    pub max_model_len: Option<usize>,
    /// What clients may do with it.
    #[serde(default)]
    pub permission: Vec<ModelPermission>,
}

/// What clients may do with a model; constant, kept for clients that read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ModelPermission {
    pub id: String,
    pub object: String,
    pub created: u64,
    pub allow_create_engine: bool,
    pub allow_sampling: bool,
    pub allow_logprobs: bool,
    pub allow_search_indices: bool,
    pub allow_view: bool,
    pub allow_fine_tuning: bool,
    pub organization: String,
    pub group: Option<String>,
    pub is_blocking: bool,
}

impl ModelPermission {
    /// The permission that every model has.
    pub fn new(id: String, created: u64) -> Self {
        Self {
            id,
            object: "model_permission".into(),
            created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*".into(),
            group: None,
            is_blocking: false,
        }
    }
}

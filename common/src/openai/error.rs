//! Error bodies.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The body of every failed request but a rejected API key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorResponse {
    /// What went wrong.
    pub error: ErrorBody,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// For people.
    pub message: String,
    /// The kind of error, such as `BadRequestError`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The request field at fault.
    pub param: Option<String>,
    /// The HTTP status.
    pub code: u16,
}

//! Why a sequence ended.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a sequence ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token, stop token or stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The model called tools.
    ToolCalls,
    /// Cancelled.
    Abort,
    /// It went round in circles, and the request had asked to end it then.
    Repetition,
}

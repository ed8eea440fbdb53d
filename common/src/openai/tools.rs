//! Tool definitions and calls.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A tool that the model may call. The chat template sees it as it was sent.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct Tool {
    /// `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The function.
    pub function: FunctionTool,
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct FunctionTool {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments; `None` is any object.
    pub parameters: Option<Value>,
}

/// Whether and which tools are to be called.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected \"none\", \"auto\", \"required\" or an object that names a function")]
pub enum ToolChoice {
    /// `none`, `auto` or `required`.
    Mode(String),
    /// One function.
    Named {
        /// `function`.
        #[serde(rename = "type")]
        kind: String,
        /// The function.
        function: FunctionName,
    },
}

/// The name of a function.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct FunctionName {
    /// The name.
    pub name: String,
}

/// A call in a finished message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ToolCall {
    /// Unique.
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The call.
    pub function: FunctionCall,
}

/// What is called with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FunctionCall {
    /// The function.
    pub name: String,
    /// JSON as text.
    pub arguments: String,
}

/// A part of a call in a stream: its head once, then more of its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct ToolCallDelta {
    /// With the head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// With the head: `function`.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Which of the message's calls.
    pub index: usize,
    /// What is new.
    pub function: FunctionCallDelta,
}

/// What is new of a call.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct FunctionCallDelta {
    /// With the head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// To append.
    pub arguments: String,
}

//! Wire types of Anthropic's `POST /v1/messages`. They know JSON, not the engine.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::openai::Usage;

/// The body of `POST /v1/messages`, and of its `count_tokens` but for `max_tokens`. Fields held as [`Value`] are
/// ones that a server may have to refuse by name; unknown ones are ignored.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct MessagesFields {
    pub model: Option<String>,
    pub messages: Vec<InputMessage>,
    pub max_tokens: Option<i64>,
    pub system: Option<Content>,
    pub stop_sequences: Option<Vec<String>>,
    pub stream: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<MessagesToolChoice>,
    pub thinking: Option<Value>,
    pub container: Option<Value>,
    pub mcp_servers: Option<Value>,
    pub context_management: Option<Value>,
    pub output_config: Option<Value>,
    pub output_format: Option<Value>,
}

/// A turn of the conversation.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct InputMessage {
    /// `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: Content,
}

/// A text, or blocks of several kinds.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or a list of content blocks")]
pub enum Content {
    /// One text.
    Text(String),
    /// Blocks with `type`: `text`, `thinking`, `tool_use`, `tool_result`.
    Blocks(Vec<Map<String, Value>>),
}

/// Whether and which tools are to be called.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct MessagesToolChoice {
    /// `auto`, `any`, `tool` or `none`.
    #[serde(rename = "type")]
    pub kind: String,
    /// With `tool`.
    pub name: Option<String>,
    pub disable_parallel_tool_use: Option<bool>,
}

/// The answer, whole or as a stream begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Message {
    pub id: String,
    /// `message`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `assistant`.
    pub role: String,
    pub model: String,
    pub content: Vec<ContentBlock>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`.
    pub stop_reason: Option<String>,
    pub stop_sequence: Option<String>,
    pub usage: MessageUsage,
}

/// A part of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum ContentBlock {
    Thinking { thinking: String, signature: String },
    Text { text: String },
    ToolUse { id: String, name: String, input: Value },
}

/// Token counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MessageUsage {
    /// Tokens of the prompt that were computed.
    pub input_tokens: usize,
    /// Not counted.
    pub cache_creation_input_tokens: usize,
    /// Tokens of the prompt that were found in the prefix cache, if the server says so.
    pub cache_read_input_tokens: usize,
    /// Tokens of the answer.
    pub output_tokens: usize,
}

impl From<Usage> for MessageUsage {
    fn from(usage: Usage) -> Self {
        let n_cached = usage.prompt_tokens_details.map_or(0, |details| details.cached_tokens);
        Self {
            input_tokens: usage.prompt_tokens - n_cached,
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: n_cached,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// The answer of `POST /v1/messages/count_tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenCount {
    /// Tokens of the prompt.
    pub input_tokens: usize,
}

/// One frame of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum MessageEvent {
    MessageStart { message: Message },
    ContentBlockStart { index: usize, content_block: ContentBlock },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageEnd, usage: MessageUsage },
    MessageStop,
    Error { error: MessageError },
}

impl MessageEvent {
    /// Its `type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
            Self::Error { .. } => "error",
        }
    }
}

/// What is new of a block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum BlockDelta {
    ThinkingDelta { thinking: String },
    TextDelta { text: String },
    InputJsonDelta { partial_json: String },
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct MessageEnd {
    pub stop_reason: Option<String>,
    pub stop_sequence: Option<String>,
}

/// The body of a failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MessageErrorResponse {
    /// `error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What went wrong.
    pub error: MessageError,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MessageError {
    /// The kind of error, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For people.
    pub message: String,
}

//! `POST /v1/responses`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{ChatTokenLogprob, PromptTokensDetails, Usage};

/// The fields that responses have beside [`super::SamplingFields`]. Fields held as [`Value`] are ones that a
/// server may have to refuse by name.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ResponsesFields {
    pub input: ResponseInput,
    /// Goes before the conversation as a system message.
    pub instructions: Option<String>,
    pub max_output_tokens: Option<i64>,
    pub tools: Option<Vec<Value>>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub reasoning: Option<ReasoningOptions>,
    pub text: Option<TextOptions>,
    /// `message.output_text.logprobs` asks for log-probabilities.
    pub include: Option<Vec<String>>,
    /// Of how many likeliest tokens, beside the one that came.
    pub top_logprobs: Option<i64>,
    /// `disabled`.
    pub truncation: Option<String>,
    pub background: Option<bool>,
    pub metadata: Option<Map<String, Value>>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub previous_response_id: Option<Value>,
    pub conversation: Option<Value>,
    pub prompt: Option<Value>,
    pub max_tool_calls: Option<Value>,
}

/// What to answer.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string or a list of items")]
pub enum ResponseInput {
    /// One message of the user.
    Text(String),
    /// A conversation.
    Items(Vec<Value>),
}

impl Default for ResponseInput {
    fn default() -> Self {
        Self::Items(Vec::new())
    }
}

/// How to reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ReasoningOptions {
    pub effort: Option<String>,
    pub summary: Option<Value>,
}

/// What the text must look like.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct TextOptions {
    pub format: Option<TextFormat>,
}

/// What the text must look like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TextFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    pub kind: String,
    /// With `json_schema`: for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// With `json_schema`: the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
}

/// The answer, whole or so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ModelResponse {
    pub id: String,
    /// `response`.
    pub object: String,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    pub status: String,
    pub background: bool,
    pub error: Option<ResponseError>,
    pub incomplete_details: Option<IncompleteDetails>,
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u32>,
    pub max_tool_calls: Option<u32>,
    pub model: String,
    pub output: Vec<OutputItem>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<String>,
    pub reasoning: ReasoningOptions,
    pub service_tier: Option<String>,
    pub store: bool,
    pub temperature: f32,
    pub text: ResponseText,
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub top_logprobs: u32,
    pub top_p: f32,
    pub truncation: String,
    pub usage: Option<ResponseUsage>,
    pub user: Option<String>,
    pub metadata: Map<String, Value>,
}

/// What the text was to look like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ResponseText {
    pub format: TextFormat,
}

/// Why an answer failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ResponseError {
    pub code: String,
    pub message: String,
}

/// Why an answer is incomplete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`.
    pub reason: String,
}

/// A part of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum OutputItem {
    /// Thoughts.
    Reasoning { id: String, summary: Vec<ContentPart>, content: Vec<ContentPart>, status: String },
    /// Text.
    Message { id: String, status: String, role: String, content: Vec<ContentPart> },
    /// A tool call; `arguments` is JSON as text.
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: String },
}

/// A part of an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum ContentPart {
    OutputText { text: String, annotations: [(); 0], logprobs: Vec<ChatTokenLogprob> },
    ReasoningText { text: String },
}

/// Token counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ResponseUsage {
    pub input_tokens: usize,
    pub input_tokens_details: InputTokensDetails,
    pub output_tokens: usize,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: usize,
}

/// Where the input's tokens came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct InputTokensDetails {
    pub cached_tokens: usize,
}

/// What the output's tokens were for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: usize,
}

impl From<Usage> for ResponseUsage {
    fn from(usage: Usage) -> Self {
        let cached = |details: PromptTokensDetails| details.cached_tokens;
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens: usage.prompt_tokens_details.map_or(0, cached) },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputTokensDetails {
                reasoning_tokens: usage.completion_tokens_details.map_or(0, |details| details.reasoning_tokens),
            },
            total_tokens: usage.total_tokens,
        }
    }
}

/// One frame of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResponseEvent {
    /// What happened.
    #[serde(flatten)]
    pub kind: ResponseEventKind,
    /// Counts frames from 0.
    pub sequence_number: u64,
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type")]
#[allow(missing_docs)]
pub enum ResponseEventKind {
    #[serde(rename = "response.created")]
    Created { response: Box<ModelResponse> },
    #[serde(rename = "response.in_progress")]
    InProgress { response: Box<ModelResponse> },
    #[serde(rename = "response.output_item.added")]
    ItemAdded { output_index: usize, item: OutputItem },
    #[serde(rename = "response.output_item.done")]
    ItemDone { output_index: usize, item: OutputItem },
    #[serde(rename = "response.content_part.added")]
    PartAdded { item_id: String, output_index: usize, content_index: usize, part: ContentPart },
    #[serde(rename = "response.content_part.done")]
    PartDone { item_id: String, output_index: usize, content_index: usize, part: ContentPart },
    #[serde(rename = "response.output_text.delta")]
    TextDelta {
        item_id: String,
        output_index: usize,
        content_index: usize,
        delta: String,
        logprobs: Vec<ChatTokenLogprob>,
    },
    #[serde(rename = "response.output_text.done")]
    TextDone {
        item_id: String,
        output_index: usize,
        content_index: usize,
        text: String,
        logprobs: Vec<ChatTokenLogprob>,
    },
    #[serde(rename = "response.reasoning_text.delta")]
    ReasoningDelta { item_id: String, output_index: usize, content_index: usize, delta: String },
    #[serde(rename = "response.reasoning_text.done")]
    ReasoningDone { item_id: String, output_index: usize, content_index: usize, text: String },
    #[serde(rename = "response.function_call_arguments.delta")]
    ArgumentsDelta { item_id: String, output_index: usize, delta: String },
    #[serde(rename = "response.function_call_arguments.done")]
    ArgumentsDone { item_id: String, output_index: usize, name: String, arguments: String },
    #[serde(rename = "response.completed")]
    Completed { response: Box<ModelResponse> },
    #[serde(rename = "response.incomplete")]
    Incomplete { response: Box<ModelResponse> },
    #[serde(rename = "response.failed")]
    Failed { response: Box<ModelResponse> },
}

impl ResponseEventKind {
    /// Its `type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "response.created",
            Self::InProgress { .. } => "response.in_progress",
            Self::ItemAdded { .. } => "response.output_item.added",
            Self::ItemDone { .. } => "response.output_item.done",
            Self::PartAdded { .. } => "response.content_part.added",
            Self::PartDone { .. } => "response.content_part.done",
            Self::TextDelta { .. } => "response.output_text.delta",
            Self::TextDone { .. } => "response.output_text.done",
            Self::ReasoningDelta { .. } => "response.reasoning_text.delta",
            Self::ReasoningDone { .. } => "response.reasoning_text.done",
            Self::ArgumentsDelta { .. } => "response.function_call_arguments.delta",
            Self::ArgumentsDone { .. } => "response.function_call_arguments.done",
            Self::Completed { .. } => "response.completed",
            Self::Incomplete { .. } => "response.incomplete",
            Self::Failed { .. } => "response.failed",
        }
    }
}

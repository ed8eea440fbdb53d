//! Wire types of OpenAI's HTTP API with vLLM's extensions. They know JSON, not the engine.
//!
//! Requests: a generation body is read twice, once for the [`SamplingFields`] that chat and
//! completions share and once for the endpoint's own fields; unknown fields are ignored.
//! Responses: keys that vLLM always sends are always written, `null` when unused.

mod chat;
mod completion;
mod embeddings;
mod error;
mod logprobs;
mod models;
mod ordered_map;
mod responses;
mod sampling;
mod structured;
mod tokenize;
mod tools;
mod usage;

pub use chat::{ChatChoice, ChatCompletion, ChatCompletionChunk, ChatFields, ChatMessage, ChunkChoice, ChunkDelta};
pub use completion::{
    Completion, CompletionChoice, CompletionChunk, CompletionChunkChoice, CompletionFields, PromptInput,
};
pub use embeddings::{
    Embedding, EmbeddingFields, EmbeddingList, EmbeddingValue, OneOrSeveral, PoolingUsage, Ranked, RankedDocument,
    Ranking, RerankFields, Score, ScoreFields, ScoreList,
};
pub use error::{ErrorBody, ErrorResponse};
pub use logprobs::{
    ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, MIN_LOGPROB, PromptLogprob, PromptLogprobs, TopLogprob,
};
pub use models::{ModelCard, ModelList, ModelPermission};
pub use ordered_map::OrderedMap;
pub use responses::{
    ContentPart, IncompleteDetails, InputTokensDetails, ModelResponse, OutputItem, OutputTokensDetails,
    ReasoningOptions, ResponseError, ResponseEvent, ResponseEventKind, ResponseInput, ResponseText, ResponseUsage,
    ResponsesFields, TextFormat, TextOptions,
};
pub use sampling::{OneOrMany, RepetitionDetectionFields, SamplingFields, StopReason, StreamOptions};
pub use structured::{JsonSchemaFormat, ResponseFormat, StructuralTagFields, Structure, StructuredOutputsFields};
pub use tokenize::{DetokenizeFields, Detokenized, TokenizeFields, Tokenized};
pub use tools::{
    FunctionCall, FunctionCallDelta, FunctionName, FunctionTool, Tool, ToolCall, ToolCallDelta, ToolChoice,
};
pub use usage::{CompletionTokensDetails, PromptTokensDetails, StreamUsage, Usage};

//! What the command line comes to: validated once, then read only.

use std::{path::PathBuf, time::Duration};

use ember_engine::EngineConfig;
use serde_json::{Map, Value};
use tower_http::cors::CorsLayer;

use crate::{
    output::{ReasoningFormat, ToolFormat},
    sampling_defaults::SamplingDefaults,
};

/// Log-probabilities per position that requests may ask for unless the operator says otherwise.
pub const DEFAULT_MAX_LOGPROBS: u32 = 20;

/// Everything that `ember serve` needs.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// The model folder or file.
    pub model: PathBuf,
    /// Options of the engine.
    pub engine: EngineConfig,
    /// Options of the endpoints.
    pub app: AppConfig,
    /// Where to listen.
    pub listen: Listen,
    /// Files of the certificate chain and its key; `None` speaks plain HTTP.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// How long a client may leave sent data lying before it is cut.
    pub write_timeout: Duration,
    /// How long requests in flight may take after SIGTERM.
    pub shutdown_timeout: Duration,
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// On a host's port; 0 takes a free one.
    Tcp(String, u16),
    /// On a Unix socket.
    Unix(PathBuf),
}

/// Options of the endpoints.
#[derive(Debug, Clone)]
pub struct AppConfig {
    /// Names that requests may use, at least one; the first is echoed and labels metrics.
    pub served_model_names: Vec<String>,
    /// Keys that requests may use; empty leaves the server open.
    pub api_keys: Vec<String>,
    /// Path prefix of a proxy, without a slash at its end; requests may have it or not.
    pub root_path: String,
    /// What browsers are told; `None` allows no other origin.
    pub cors: Option<CorsLayer>,
    /// How long a request may take in all; `None` is no limit.
    pub request_timeout: Option<Duration>,
    /// How long a stream may be silent before a comment is sent; `None` never sends one.
    pub sse_keep_alive_interval: Option<Duration>,
    /// Sequences that may wait beside a full batch; `None` is no limit.
    pub max_num_queued_reqs: Option<usize>,
    /// Put `prompt_tokens_details` into usage.
    pub enable_prompt_tokens_details: bool,
    /// Send usage on every stream, with every chunk.
    pub enable_force_include_usage: bool,
    /// Send `X-Request-Id` with every response.
    pub enable_request_id_headers: bool,
    /// Tokens per stream chunk.
    pub stream_interval: usize,
    /// Let the model call tools where a request offers some and says no more.
    pub enable_auto_tool_choice: bool,
    /// How the model writes tool calls; `None` refuses them.
    pub tool_call_parser: Option<&'static ToolFormat>,
    /// How the model marks reasoning; `None` leaves it in the content.
    pub reasoning_parser: Option<&'static ReasoningFormat>,
    /// For sampling fields that a request leaves open.
    pub sampling_defaults: SamplingDefaults,
    /// Variables of the chat template that requests may override.
    pub default_chat_template_kwargs: Map<String, Value>,
    /// Most log-probabilities per position; `None` is the whole vocabulary.
    pub max_logprobs: Option<u32>,
    /// For the metrics: as given to the engine.
    pub gpu_memory_utilization: f32,
    /// For the metrics: as given to the engine.
    pub enable_prefix_caching: bool,
}

impl Default for AppConfig {
    fn default() -> Self {
        Self {
            served_model_names: vec!["default".into()],
            api_keys: Vec::new(),
            root_path: String::new(),
            cors: None,
            request_timeout: None,
            sse_keep_alive_interval: None,
            max_num_queued_reqs: None,
            enable_prompt_tokens_details: false,
            enable_force_include_usage: false,
            enable_request_id_headers: false,
            stream_interval: 1,
            enable_auto_tool_choice: false,
            tool_call_parser: None,
            reasoning_parser: None,
            sampling_defaults: SamplingDefaults::default(),
            default_chat_template_kwargs: Map::new(),
            max_logprobs: Some(DEFAULT_MAX_LOGPROBS),
            gpu_memory_utilization: 0.9,
            enable_prefix_caching: true,
        }
    }
}

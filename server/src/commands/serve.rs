//! `ember serve`: loads a model, then answers HTTP until it is told to stop.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::Args;
use ember_engine::Engine;
use serde_json::{Map, Value};
use tokio::signal::unix::{SignalKind, signal};

use super::{engine_args::EngineArgs, runner::RunnerArgs};
use crate::{
    App, Backend, Error,
    config::{AppConfig, DEFAULT_MAX_LOGPROBS, Listen, ServeConfig},
    cors,
    embedding_backend::EmbeddingBackend,
    listener::{self, End},
    output::{self, ReasoningFormat, ToolFormat},
    sampling_defaults::SamplingDefaults,
    tls,
};

/// Options of `ember serve`, as typed.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A Hugging Face model folder or a GGUF file.
    #[arg(env = "EMBER_MODEL", required_unless_present = "model_option")]
    pub model: Option<PathBuf>,

    /// The same as an option, for configuration files.
    #[arg(long = "model", hide = true, value_name = "MODEL")]
    pub model_option: Option<PathBuf>,

    /// A YAML file of options by their names (`max-model-len: 8k`); what is typed wins.
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub config: Option<PathBuf>,

    /// Address to listen on.
    #[arg(long, env = "EMBER_HOST", default_value = "0.0.0.0", help_heading = "Server")]
    pub host: String,

    /// Port to listen on; 0 takes a free one.
    #[arg(long, env = "EMBER_PORT", default_value_t = 8000, help_heading = "Server")]
    pub port: u16,

    /// Listen on this Unix socket instead.
    #[arg(long, env = "EMBER_UDS", value_name = "PATH", help_heading = "Server")]
    pub uds: Option<PathBuf>,

    /// Certificate chain in PEM; with --ssl-keyfile the server speaks HTTPS.
    #[arg(long, env = "EMBER_SSL_CERTFILE", value_name = "PATH", requires = "ssl_keyfile", help_heading = "Server")]
    pub ssl_certfile: Option<PathBuf>,

    /// The certificate's private key in PEM.
    #[arg(long, env = "EMBER_SSL_KEYFILE", value_name = "PATH", requires = "ssl_certfile", help_heading = "Server")]
    pub ssl_keyfile: Option<PathBuf>,

    /// Path prefix of a proxy in front of the server, such as /llm.
    #[arg(long, env = "EMBER_ROOT_PATH", default_value = "", value_name = "PATH", help_heading = "Server")]
    pub root_path: String,

    /// Origins of web pages that may use the server, or `*`; a list or a JSON array [default: none].
    #[arg(long, env = "EMBER_ALLOWED_ORIGINS", num_args = 1.., value_name = "ORIGIN", help_heading = "Server")]
    pub allowed_origins: Vec<String>,

    /// Methods that such pages may use.
    #[arg(long, env = "EMBER_ALLOWED_METHODS", num_args = 1.., default_value = "*", value_name = "METHOD", help_heading = "Server")]
    pub allowed_methods: Vec<String>,

    /// Request headers that such pages may send.
    #[arg(long, env = "EMBER_ALLOWED_HEADERS", num_args = 1.., default_value = "*", value_name = "HEADER", help_heading = "Server")]
    pub allowed_headers: Vec<String>,

    /// Let such pages send credentials.
    #[arg(long, env = "EMBER_ALLOW_CREDENTIALS", help_heading = "Server")]
    pub allow_credentials: bool,

    /// Names that requests may use; the first is echoed [default: MODEL as typed].
    #[arg(long, env = "EMBER_SERVED_MODEL_NAME", num_args = 1.., value_delimiter = ',', value_name = "NAME", help_heading = "Server")]
    pub served_model_name: Vec<String>,

    /// Keys of which requests to /v1 must carry one as `Authorization: Bearer KEY`.
    #[arg(long, env = "EMBER_API_KEY", hide_env_values = true, num_args = 1.., value_delimiter = ',', value_name = "KEY", help_heading = "Server")]
    pub api_key: Vec<String>,

    /// Requests that may wait beside a full batch; more are answered 503 [default: no limit].
    #[arg(long, env = "EMBER_MAX_NUM_QUEUED_REQS", help_heading = "Server")]
    pub max_num_queued_reqs: Option<usize>,

    /// Seconds that a request may take in all, streams included [default: no limit].
    #[arg(long, env = "EMBER_REQUEST_TIMEOUT", value_name = "SECONDS", help_heading = "Server")]
    pub request_timeout: Option<f64>,

    /// Seconds that a client may leave sent data lying before it is cut off.
    #[arg(long, env = "EMBER_WRITE_TIMEOUT", default_value_t = 60.0, value_name = "SECONDS", help_heading = "Server")]
    pub write_timeout: f64,

    /// Seconds that a stream may be silent before a comment keeps it alive; 0 never sends one.
    #[arg(
        long,
        env = "EMBER_SSE_KEEP_ALIVE_INTERVAL",
        default_value_t = 0.0,
        value_name = "SECONDS",
        help_heading = "Server"
    )]
    pub sse_keep_alive_interval: f64,

    /// Tokens per stream chunk.
    #[arg(long, env = "EMBER_STREAM_INTERVAL", default_value_t = 1, help_heading = "Server")]
    pub stream_interval: usize,

    /// Let the model call tools where a request offers some and says no more; needs --tool-call-parser.
    #[arg(long, env = "EMBER_ENABLE_AUTO_TOOL_CHOICE", help_heading = "Server")]
    pub enable_auto_tool_choice: bool,

    /// How the model writes tool calls: hermes (Qwen too) or llama3_json.
    #[arg(long, env = "EMBER_TOOL_CALL_PARSER", value_name = "NAME", value_parser = output::tool_format, help_heading = "Server")]
    pub tool_call_parser: Option<&'static ToolFormat>,

    /// How the model marks reasoning: deepseek_r1 or qwen3.
    #[arg(long, env = "EMBER_REASONING_PARSER", value_name = "NAME", value_parser = output::reasoning_format, help_heading = "Server")]
    pub reasoning_parser: Option<&'static ReasoningFormat>,

    /// Variables of the chat template that requests may override, such as '{"enable_thinking": false}'.
    #[arg(long, env = "EMBER_DEFAULT_CHAT_TEMPLATE_KWARGS", value_name = "JSON", value_parser = parse_object, help_heading = "Server")]
    pub default_chat_template_kwargs: Option<Map<String, Value>>,

    /// Defaults of sampling fields: auto (the model's generation_config.json), vllm (none), or a folder with that file.
    #[arg(
        long,
        env = "EMBER_GENERATION_CONFIG",
        default_value = "auto",
        value_name = "SOURCE",
        help_heading = "Server"
    )]
    pub generation_config: String,

    /// More of them, such as '{"temperature": 0.5}'; `max_new_tokens` caps every request.
    #[arg(long, env = "EMBER_OVERRIDE_GENERATION_CONFIG", value_name = "JSON", help_heading = "Server")]
    pub override_generation_config: Option<String>,

    /// Most log-probabilities per position that a request may ask for; -1 is the whole vocabulary.
    #[arg(long, env = "EMBER_MAX_LOGPROBS", default_value_t = i64::from(DEFAULT_MAX_LOGPROBS), allow_negative_numbers = true, value_name = "N", help_heading = "Server")]
    pub max_logprobs: i64,

    /// Say in usage.prompt_tokens_details how much of the prompt was cached.
    #[arg(long, env = "EMBER_ENABLE_PROMPT_TOKENS_DETAILS", help_heading = "Server")]
    pub enable_prompt_tokens_details: bool,

    /// Send usage with every chunk of every stream.
    #[arg(long, env = "EMBER_ENABLE_FORCE_INCLUDE_USAGE", help_heading = "Server")]
    pub enable_force_include_usage: bool,

    /// Send X-Request-Id with every response.
    #[arg(long, env = "EMBER_ENABLE_REQUEST_ID_HEADERS", help_heading = "Server")]
    pub enable_request_id_headers: bool,

    /// Seconds that requests in flight may take after SIGTERM or SIGINT; a second signal ends them at once.
    #[arg(long, env = "EMBER_SHUTDOWN_TIMEOUT", default_value_t = 30, value_name = "SECONDS", help_heading = "Server")]
    pub shutdown_timeout: u64,

    /// error, warn, info, debug, trace, or a filter such as `info,ember_server=debug`.
    #[arg(long, env = "EMBER_LOG_LEVEL", default_value = "info", help_heading = "Server")]
    pub log_level: String,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub runner: RunnerArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub engine: EngineArgs,
}

impl ServeArgs {
    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn resolve(&self) -> Result<ServeConfig, Error> {
        let model = self.model.clone().or(self.model_option.clone()).unwrap_or_default();
        let mut served_model_names: Vec<String> = self.served_model_name.clone();
        if served_model_names.is_empty() {
            served_model_names.push(model.display().to_string());
        }
        if served_model_names.iter().any(String::is_empty) {
            return Err(Error::config("--served-model-name", "a name cannot be empty"));
        }
        // An empty EMBER_API_KEY must not open the server to an empty key.
        let api_keys: Vec<String> = self.api_key.iter().filter(|key| !key.is_empty()).cloned().collect();
        if self.stream_interval == 0 {
            return Err(Error::config("--stream-interval", "must be at least 1"));
        }
        if self.enable_auto_tool_choice && self.tool_call_parser.is_none() {
            return Err(Error::config("--enable-auto-tool-choice", "needs --tool-call-parser"));
        }
        self.runner.check()?;
        let engine = self.engine.resolve(&served_model_names[0])?;
        Ok(ServeConfig {
            model,
            app: AppConfig {
                served_model_names,
                api_keys,
                root_path: root_path(&self.root_path)?,
                cors: cors::layer(
                    &list("--allowed-origins", &self.allowed_origins)?,
                    &list("--allowed-methods", &self.allowed_methods)?,
                    &list("--allowed-headers", &self.allowed_headers)?,
                    self.allow_credentials,
                )?,
                request_timeout: self.request_timeout.map(|s| seconds("--request-timeout", s)).transpose()?,
                sse_keep_alive_interval: match self.sse_keep_alive_interval {
                    0.0 => None,
                    interval => Some(seconds("--sse-keep-alive-interval", interval)?),
                },
                max_num_queued_reqs: self.max_num_queued_reqs,
                enable_prompt_tokens_details: self.enable_prompt_tokens_details,
                enable_force_include_usage: self.enable_force_include_usage,
                enable_request_id_headers: self.enable_request_id_headers,
                stream_interval: self.stream_interval,
                enable_auto_tool_choice: self.enable_auto_tool_choice,
                sampling_defaults: SamplingDefaults::new(
                    &self.generation_config,
                    self.override_generation_config.as_deref(),
                )?,
                default_chat_template_kwargs: self.default_chat_template_kwargs.clone().unwrap_or_default(),
                tool_call_parser: self.tool_call_parser,
                reasoning_parser: self.reasoning_parser,
                max_logprobs: max_logprobs(self.max_logprobs)?,
                gpu_memory_utilization: engine.gpu_memory_utilization,
                enable_prefix_caching: engine.enable_prefix_caching,
            },
            engine,
            listen: match &self.uds {
                Some(path) => Listen::Unix(path.clone()),
                None => Listen::Tcp(self.host.clone(), self.port),
            },
            tls: self.ssl_certfile.clone().zip(self.ssl_keyfile.clone()),
            write_timeout: seconds("--write-timeout", self.write_timeout)?,
            shutdown_timeout: Duration::from_secs(self.shutdown_timeout),
        })
    }
}

fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

fn seconds(flag: &'static str, seconds: f64) -> Result<Duration, Error> {
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| Error::config(flag, format!("{seconds} is not a number of seconds above 0")))
}

/// -1 is no limit.
fn max_logprobs(value: i64) -> Result<Option<u32>, Error> {
    match value {
        -1 => Ok(None),
        n => u32::try_from(n)
            .map(Some)
            .map_err(|_| Error::config("--max-logprobs", format!("{n} is neither a number from 0 nor -1 (no limit)"))),
    }
}

/// `/llm/` as `/llm`.
fn root_path(path: &str) -> Result<String, Error> {
    let path = path.trim_end_matches('/');
    if path.is_empty() || path.starts_with('/') {
        Ok(path.to_owned())
    } else {
        Err(Error::config("--root-path", format!("`{path}` does not begin with a slash")))
    }
}

/// Values as typed one after the other, separated by commas, or as a JSON array.
fn list(flag: &'static str, values: &[String]) -> Result<Vec<String>, Error> {
    let mut all = Vec::new();
    for value in values {
        if value.trim_start().starts_with('[') {
            let parsed: Vec<String> = serde_json::from_str(value)
                .map_err(|error| Error::config(flag, format!("`{value}` is not a JSON array of texts: {error}")))?;
            all.extend(parsed);
        } else {
            all.extend(value.split(',').map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()));
        }
    }
    Ok(all)
}

/// Runs the server to its end.
///
/// # Errors
/// What the operator has to mend, or [`Error::EngineDied`].
pub fn run(args: ServeArgs) -> Result<ExitCode, Error> {
    let config = args.resolve()?;
    start_log(&args.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // Bound first, so that a taken port costs no time; accepted from once the model is there.
        let socket = match &config.listen {
            Listen::Tcp(host, port) => listener::bind(host, *port).await?,
            Listen::Unix(path) => listener::bind_unix(path)?,
        };
        let tls = config.tls.as_ref().map(|(certfile, keyfile)| tls::acceptor(certfile, keyfile)).transpose()?;
        let socket = socket.with_tls(tls).with_write_timeout(config.write_timeout);
        let mut signals = Signals::new()?;
        let started = std::time::Instant::now();
        let (model, engine, runner) = (config.model.clone(), config.engine.clone(), args.runner);
        let load = tokio::task::spawn_blocking(move || -> Result<Arc<dyn Backend>, ember_engine::Error> {
            Ok(match runner.makes_vectors(&model)? {
                true => Arc::new(EmbeddingBackend::load(&model, engine)?),
                false => Arc::new(Engine::load(model, engine)?),
            })
        });
        let engine = tokio::select! {
            engine = load => engine.map_err(std::io::Error::other)??,
            () = signals.next() => std::process::exit(0),
        };
        let info = engine.info();
        tracing::info!(
            model = config.app.served_model_names[0],
            architecture = info.architecture,
            parameters = info.n_parameters,
            executor = info.executor,
            kv_tokens = info.n_kv_tokens,
            max_model_len = info.max_model_len,
            max_num_seqs = info.max_num_seqs,
            load_seconds = (started.elapsed().as_secs_f64() * 100.0).round() / 100.0,
            address = %socket.url(),
            "ready"
        );
        let app = App::new(engine, config.app);
        let signals = std::sync::Arc::new(tokio::sync::Mutex::new(signals));
        let stop = async { signals.lock().await.next().await };
        let abort = async { signals.lock().await.next().await };
        match listener::serve(socket, app, stop, abort, config.shutdown_timeout).await {
            End::Drained => tracing::info!("stopped"),
            End::Aborted => tracing::warn!("stopped; requests in flight were cut off"),
            End::EngineDied => return Err(Error::EngineDied),
        }
        Ok(())
    })?;
    // Requests that were cut off must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(ExitCode::SUCCESS)
}

/// SIGTERM and SIGINT.
struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

/// Logs to stderr.
fn start_log(filter: &str) -> Result<(), Error> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| Error::config("--log-level", format!("{error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

//! [`FakeEngine`]: a backend with one token per byte that always says the same text, and the requests
//! that tests send.

use std::{
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use ember_common::FinishReason;
use ember_engine::{
    Delta, EngineInfo, EngineStats, Error, Event, Finish, GenerateRequest, Prompt, PromptEvent, SamplingParams,
    StopReason, TokenLogprobs, text::ChatOptions,
};
use ember_server::{App, Backend, EventStream, Task, config::AppConfig, output};
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, StatusCode};
use serde_json::Value;
use tower::ServiceExt;

/// What every choice says, then it stops.
pub const TEXT: &str = "Hi \"é\"\n!";
pub const MAX_MODEL_LEN: usize = 64;
const BOS: u32 = 256;
const EOS: u32 = 257;

/// Says one text. A prompt that contains `panic`, `die`, `hang` or `wait` makes it panic, fail
/// after the first token, stop after the first token, or never start.
pub struct FakeEngine {
    info: EngineInfo,
    defaults: SamplingParams,
    text: String,
    /// What it is for; all if empty.
    tasks: Vec<Task>,
    /// Of the last request.
    pub last_params: Mutex<SamplingParams>,
    pub is_healthy: AtomicBool,
    /// Streams that were not dropped.
    pub n_live: Arc<AtomicUsize>,
}

impl FakeEngine {
    pub fn saying(text: &str) -> Self {
        let info = EngineInfo {
            model_path: "/models/fake".into(),
            architecture: "FakeForCausalLM".into(),
            n_parameters: 1,
            file_dtype: "F32".into(),
            vocab_size: 258,
            max_model_len: MAX_MODEL_LEN,
            max_num_seqs: 2,
            max_num_batched_tokens: 64,
            max_logprobs: 258,
            n_kv_tokens: 1024,
            executor: "fake".into(),
            eos_token_ids: vec![EOS],
            created: 1,
        };
        let defaults = SamplingParams { temperature: 0.6, ..SamplingParams::default() };
        Self {
            info,
            defaults,
            text: text.into(),
            tasks: Vec::new(),
            last_params: Mutex::default(),
            is_healthy: AtomicBool::new(true),
            n_live: Arc::default(),
        }
    }
}

/// That of a token that was sampled for `params`.
fn sampled_logprobs(id: u32, params: &SamplingParams) -> Option<TokenLogprobs> {
    let all = logprobs(id, params.logprobs?);
    match params.logprob_token_ids.as_slice() {
        [] => Some(all),
        ids => Some(TokenLogprobs { top: ids.iter().map(|&id| (id, -1.5)).collect(), ..all }),
    }
}

fn logprobs(id: u32, n_top: u32) -> TokenLogprobs {
    let others = (0..n_top).map(|i| ((u32::from(b'a') + i) % 258, if i == 1 { f32::NEG_INFINITY } else { -0.5 }));
    TokenLogprobs { token_id: id, logprob: -0.25, rank: 1, top: others.collect() }
}

struct Live(Arc<AtomicUsize>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Backend for FakeEngine {
    fn submit(&self, request: GenerateRequest) -> Result<EventStream, Error> {
        let params = request.params;
        params.validate(self.info.vocab_size)?;
        *self.last_params.lock().unwrap() = params.clone();
        let Prompt::Tokens(prompt) = request.prompt else { panic!("the server tokenises") };
        let text = self.decode(&prompt, true)?;
        assert!(!text.contains("panic"), "asked to panic");
        let prompt_logprobs = params.prompt_logprobs.map(|n_top| {
            let known = prompt.iter().skip(1).map(|&id| Some(logprobs(id, n_top)));
            std::iter::once(None).chain(known).collect()
        });
        let prompt_len = prompt.len();
        let mut events = vec![Ok(Event::Prompt(PromptEvent {
            token_ids: prompt.into(),
            n_cached: prompt_len.min(3),
            queue_time: Duration::from_secs(2),
            prefill_time: Duration::from_secs(1),
            logprobs: prompt_logprobs,
        }))];
        let ids: Vec<u32> = self.text.bytes().map(u32::from).chain([EOS]).collect();
        let n_tokens = params.max_tokens.map_or(ids.len(), |max| ids.len().min(max as usize));
        let mut pending_bytes = Vec::new();
        for (at, &id) in ids[..n_tokens].iter().enumerate() {
            pending_bytes.extend(u8::try_from(id).ok());
            let text = String::from_utf8(pending_bytes.clone()).unwrap_or_default();
            if !text.is_empty() {
                pending_bytes.clear();
            }
            let stop = params.stop.iter().find(|stop| text.contains(stop.as_str()));
            let reason = match () {
                () if stop.is_some() || id == EOS || params.stop_token_ids.contains(&id) => Some(FinishReason::Stop),
                () if at + 1 == n_tokens => Some(FinishReason::Length),
                () => None,
            };
            let stop_reason = match stop {
                Some(stop) => Some(StopReason::Text(stop.clone())),
                None => params.stop_token_ids.contains(&id).then_some(StopReason::Token(id)),
            };
            for index in 0..params.n as usize {
                events.push(Ok(Event::Delta(Delta {
                    index,
                    text: if stop.is_some() { String::new() } else { text.clone() },
                    token_ids: vec![id],
                    logprobs: sampled_logprobs(id, &params).into_iter().collect(),
                    finish: reason.map(|reason| Finish { reason, stop_reason: stop_reason.clone() }),
                })));
            }
            if reason.is_some() {
                break;
            }
        }
        let keep = |n: usize| n.min(events.len());
        let (n_events, then_hangs) = match () {
            () if text.contains("wait") => (0, true),
            () if text.contains("hang") => (keep(2), true),
            () if text.contains("die") => (keep(2), false),
            () => (events.len(), false),
        };
        if n_events < events.len() && !then_hangs {
            events[n_events] = Err(Error::Device("secret /dev/nvidia0".into()));
            events.truncate(n_events + 1);
        } else {
            events.truncate(n_events);
        }
        self.n_live.fetch_add(1, Ordering::SeqCst);
        let live = Live(self.n_live.clone());
        let tail = if then_hangs { stream::pending().boxed() } else { stream::empty().boxed() };
        Ok(stream::iter(events)
            .chain(tail)
            .map(move |event| {
                let _ = &live;
                event
            })
            .boxed())
    }

    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        EngineStats {
            n_running: 2,
            n_waiting: 1,
            n_pages_in_use: 16,
            n_pages: 64,
            n_prefix_hits: 5,
            ..EngineStats::default()
        }
    }

    fn does(&self, task: Task) -> bool {
        self.tasks.is_empty() || self.tasks.contains(&task)
    }

    /// The number of tokens, the last one, and one.
    fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
        let vector = |ids: &Vec<u32>| vec![ids.len() as f32, ids.last().map_or(0.0, |&id| id as f32), 1.0];
        Ok(texts.iter().map(vector).collect())
    }

    fn take_step_sizes(&self) -> Vec<u32> {
        vec![1, 64, 9]
    }

    fn is_healthy(&self) -> bool {
        self.is_healthy.load(Ordering::SeqCst)
    }

    fn default_sampling_params(&self) -> &SamplingParams {
        &self.defaults
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        Ok(add_special_tokens.then_some(BOS).into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    fn n_added_tokens(&self) -> (usize, usize) {
        (1, 0)
    }

    fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, false)
    }

    fn decode(&self, ids: &[u32], _: bool) -> Result<String, Error> {
        let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        u8::try_from(id).into_iter().collect()
    }

    fn token_piece(&self, id: u32) -> Option<String> {
        Some(format!("<{id}>"))
    }

    fn render_chat(&self, messages: &[Value], options: &ChatOptions<'_>) -> Result<String, Error> {
        let mut text: String = messages
            .iter()
            .map(|message| {
                format!("{}:{}\n", message["role"].as_str().unwrap(), message["content"].as_str().unwrap_or(""))
            })
            .collect();
        if options.continue_final_message {
            text.pop();
        } else if options.add_generation_prompt {
            text.push_str("assistant:");
        }
        Ok(text)
    }
}

/// An app over a fake engine.
pub fn app(config: AppConfig) -> (Arc<App>, Arc<FakeEngine>) {
    let engine = Arc::new(FakeEngine::saying(TEXT));
    (App::new(engine.clone(), config), engine)
}

/// An app over a fake engine that says `text`.
pub fn app_saying(text: &str, config: AppConfig) -> Arc<App> {
    App::new(Arc::new(FakeEngine::saying(text)), config)
}

/// An app over a fake engine that is for `task` alone.
pub fn app_for(task: Task, config: AppConfig) -> Arc<App> {
    App::new(Arc::new(FakeEngine { tasks: vec![task], ..FakeEngine::saying(TEXT) }), config)
}

/// An app that looks for calls and reasoning in what the fake engine says: `text`.
pub fn app_that_reads(text: &str) -> Arc<App> {
    app_saying(text, config_that_reads())
}

/// The options of [`app_that_reads`].
pub fn config_that_reads() -> AppConfig {
    AppConfig {
        enable_auto_tool_choice: true,
        tool_call_parser: Some(output::tool_format("hermes").unwrap()),
        reasoning_parser: Some(output::reasoning_format("qwen3").unwrap()),
        ..config()
    }
}

/// The options that most tests use.
pub fn config() -> AppConfig {
    AppConfig { served_model_names: vec!["tiny".into(), "alias".into()], ..AppConfig::default() }
}

pub fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("content-type", "application/json; charset=utf-8")
        .header("x-request-id", "test")
        .body(Full::new(body.into()))
        .unwrap()
}

pub fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).body(Full::default()).unwrap()
}

/// Sends one request and reads the whole answer.
pub async fn send(app: &Arc<App>, request: Request<Full<Bytes>>) -> (StatusCode, String) {
    let response = app.service().oneshot(request).await.unwrap();
    (response.status(), read(response).await)
}

pub async fn read(response: Response<ember_server::Body>) -> String {
    let body = tokio::time::timeout(Duration::from_secs(10), response.into_body().collect());
    String::from_utf8(body.await.expect("the answer ends").unwrap().to_bytes().to_vec()).unwrap()
}

/// Sends JSON to the default app and reads the answer.
pub async fn ask(path: &str, body: &Value) -> (StatusCode, String) {
    static APP: LazyLock<Arc<App>> = LazyLock::new(|| app(config()).0);
    send(&APP, post(path, serde_json::to_vec(body).unwrap())).await
}

/// What differs between runs, made equal.
pub fn redacted(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) =
        ["\"created\":", "\"system_fingerprint\":\""].iter().filter_map(|key| Some(rest.find(key)? + key.len())).min()
    {
        out.push_str(&rest[..at]);
        rest = rest[at..].trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.');
        out.push('*');
    }
    out + rest
}

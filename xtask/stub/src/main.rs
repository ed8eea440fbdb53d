//! `ember-stub`: Ember's HTTP server over an engine that answers at once, for `cargo xtask http-bench`.

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use ember_common::FinishReason;
use ember_engine::{
    Delta, EngineInfo, EngineStats, Error, Event, Finish, GenerateRequest, Prompt, PromptEvent, SamplingParams,
    text::ChatOptions,
};
use ember_server::{
    App, Backend, EventStream,
    config::AppConfig,
    listener::{self, End},
};
use futures_util::{StreamExt, stream};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

/// Every token says this.
const WORD: &str = " word";
const MAX_MODEL_LEN: usize = 1 << 20;

#[derive(Parser)]
struct Cli {
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    #[arg(long)]
    port: u16,
    /// Let the server write each token before the next one comes, as a model does.
    #[arg(long)]
    one_by_one: bool,
}

/// Says one word per token, as many as were asked for. One prompt token per byte.
struct StubEngine {
    info: EngineInfo,
    defaults: SamplingParams,
    one_by_one: bool,
}

impl StubEngine {
    fn new(one_by_one: bool) -> Self {
        let info = EngineInfo {
            model_path: "stub".into(),
            architecture: "Stub".into(),
            n_parameters: 0,
            file_dtype: "none".into(),
            vocab_size: 256,
            max_model_len: MAX_MODEL_LEN,
            max_num_seqs: 1024,
            max_num_batched_tokens: MAX_MODEL_LEN,
            max_logprobs: 0,
            n_kv_tokens: 0,
            executor: "none".into(),
            eos_token_ids: Vec::new(),
            created: 0,
        };
        Self { info, defaults: SamplingParams::default(), one_by_one }
    }
}

impl Backend for StubEngine {
    fn submit(&self, GenerateRequest { prompt, params, .. }: GenerateRequest) -> Result<EventStream, Error> {
        params.validate(self.info.vocab_size)?;
        let token_ids = match prompt {
            Prompt::Tokens(ids) => ids.into(),
            Prompt::Text(text) => self.encode(&text, true)?.into(),
        };
        let prompt = PromptEvent {
            token_ids,
            n_cached: 0,
            queue_time: Duration::ZERO,
            prefill_time: Duration::ZERO,
            logprobs: None,
        };
        let (n, n_tokens) = (params.n as usize, params.max_tokens.unwrap_or(16) as usize);
        let deltas = (0..n * n_tokens).map(move |i| Delta {
            index: i % n,
            text: WORD.to_owned(),
            token_ids: vec![0],
            logprobs: Vec::new(),
            finish: (i / n + 1 == n_tokens).then_some(Finish { reason: FinishReason::Length, stop_reason: None }),
        });
        let events = std::iter::once(Event::Prompt(prompt)).chain(deltas.map(Event::Delta));
        let events = stream::iter(events.map(Ok));
        Ok(match self.one_by_one {
            true => events
                .then(async |event| {
                    tokio::task::yield_now().await;
                    event
                })
                .boxed(),
            false => events.boxed(),
        })
    }

    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    fn take_step_sizes(&self) -> Vec<u32> {
        Vec::new()
    }

    fn is_healthy(&self) -> bool {
        true
    }

    fn default_sampling_params(&self) -> &SamplingParams {
        &self.defaults
    }

    fn encode(&self, text: &str, _: bool) -> Result<Vec<u32>, Error> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn n_added_tokens(&self) -> (usize, usize) {
        (0, 0)
    }

    fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, false)
    }

    fn decode(&self, ids: &[u32], _: bool) -> Result<String, Error> {
        Ok(WORD.repeat(ids.len()))
    }

    fn token_bytes(&self, _: u32) -> Vec<u8> {
        WORD.into()
    }

    fn token_piece(&self, _: u32) -> Option<String> {
        Some(WORD.to_owned())
    }

    fn render_chat(&self, messages: &[Value], _: &ChatOptions<'_>) -> Result<String, Error> {
        Ok(messages.iter().filter_map(|message| message["content"].as_str()).collect())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { host, port, one_by_one } = Cli::parse();
    let (listener, mut stop) = match (listener::bind(&host, port).await, signal(SignalKind::terminate())) {
        (Ok(listener), Ok(stop)) => (listener, stop),
        (Err(error), _) => return fail(&error),
        (_, Err(error)) => return fail(&error),
    };
    let app = App::new(Arc::new(StubEngine::new(one_by_one)), AppConfig::default());
    let stop = async { _ = stop.recv().await };
    match listener::serve(listener, app, stop, std::future::pending(), Duration::from_secs(5)).await {
        End::Drained => ExitCode::SUCCESS,
        End::Aborted | End::EngineDied => ExitCode::FAILURE,
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

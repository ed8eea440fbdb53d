//! [`Tracker`]: times one request and records its metrics and log line where it ends.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ember_common::FinishReason;
use ember_engine::{Delta, PromptEvent};

use crate::app::App;

/// Times one request. Records when dropped, so that cancelled requests count too.
pub struct Tracker {
    app: Arc<App>,
    id: String,
    started: Instant,
    max_tokens: Option<u32>,
    /// Sequences per prompt.
    n: usize,
    /// Prompt tokens by prompt; 0 until the prompt has been processed.
    prompt_lens: Vec<usize>,
    /// By prompt.
    queue_times: Vec<Duration>,
    /// By choice index.
    sequences: Vec<SequenceTimes>,
    failed: bool,
}

#[derive(Clone, Default)]
struct SequenceTimes {
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    n_tokens: usize,
    finish: Option<FinishReason>,
}

impl Tracker {
    /// Starts the clock for `n_prompts` prompts of `n` sequences each.
    pub fn start(app: Arc<App>, id: String, n_prompts: usize, n: usize, max_tokens: Option<u32>) -> Self {
        Self {
            app,
            id,
            started: Instant::now(),
            max_tokens,
            n,
            prompt_lens: vec![0; n_prompts],
            queue_times: vec![Duration::ZERO; n_prompts],
            sequences: vec![SequenceTimes::default(); n_prompts * n],
            failed: false,
        }
    }

    /// The server's shared state.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// A prompt has been processed.
    pub fn prompt(&mut self, prompt_idx: usize, prompt: &PromptEvent) {
        self.prompt_lens[prompt_idx] = prompt.token_ids.len();
        self.queue_times[prompt_idx] = prompt.queue_time;
        let metrics = &self.app.metrics;
        metrics.queue_time.record(prompt.queue_time);
        metrics.prefill_time.record(prompt.prefill_time);
        metrics.computed_prompt_tokens.record((prompt.token_ids.len() - prompt.n_cached) as f64);
    }

    /// Output came for choice `choice_idx`.
    pub fn delta(&mut self, choice_idx: usize, delta: &Delta) {
        let metrics = &self.app.metrics;
        let sequence = &mut self.sequences[choice_idx];
        if !delta.token_ids.is_empty() {
            let now = Instant::now();
            match sequence.last_token {
                None => {
                    sequence.first_token = Some(now);
                    metrics.time_to_first_token.record(now - self.started);
                }
                Some(last) => metrics.inter_token_latency.record(now - last),
            }
            sequence.last_token = Some(now);
            sequence.n_tokens += delta.token_ids.len();
        }
        if let Some(finish) = &delta.finish {
            sequence.finish = Some(finish.reason);
        }
    }

    /// The engine failed.
    pub fn fail(&mut self) {
        self.failed = true;
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        let metrics = &self.app.metrics;
        let now = Instant::now();
        metrics.params_n.record(self.n as f64);
        let longest = self.sequences.iter().map(|sequence| sequence.n_tokens).max().unwrap_or(0);
        metrics.max_generation_tokens.record(longest as f64);
        for (idx, sequence) in self.sequences.iter().enumerate() {
            metrics.request_finished(sequence.finish, self.failed);
            if sequence.finish.is_none() {
                continue;
            }
            let latency = sequence.last_token.unwrap_or(now) - self.started;
            metrics.e2e_latency.record(latency);
            metrics.inference_time.record(latency.saturating_sub(self.queue_times[idx / self.n]));
            metrics.request_prompt_tokens.record(self.prompt_lens[idx / self.n] as f64);
            metrics.request_generation_tokens.record(sequence.n_tokens as f64);
            if let Some(max_tokens) = self.max_tokens {
                metrics.params_max_tokens.record(f64::from(max_tokens));
            }
            if let (Some(first), Some(last)) = (sequence.first_token, sequence.last_token) {
                metrics.decode_time.record(last - first);
                if sequence.n_tokens > 1 {
                    metrics.time_per_output_token.record((last - first).as_secs_f64() / (sequence.n_tokens - 1) as f64);
                }
            }
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            let first = self.sequences.iter().filter_map(|sequence| sequence.first_token).min();
            tracing::debug!(
                id = self.id,
                prompt_tokens = self.prompt_lens.iter().sum::<usize>(),
                output_tokens = self.sequences.iter().map(|sequence| sequence.n_tokens).sum::<usize>(),
                ttft_ms = first.map(|first| (first - self.started).as_secs_f64() * 1e3),
                latency_ms = (now - self.started).as_secs_f64() * 1e3,
                finish = ?self.sequences.iter().map(|sequence| sequence.finish).collect::<Vec<_>>(),
                failed = self.failed,
                "request"
            );
        }
    }
}

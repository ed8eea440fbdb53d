//! Prometheus metrics under vLLM's names, so that existing dashboards work unchanged.
//!
//! Each `Metrics` has a recorder of its own (no global one), and its handles are looked up once.

use std::time::Duration;

use ember_common::FinishReason;
use ember_engine::{EngineInfo, EngineStats, step::PAGE_SIZE};
use hyper::{Method, StatusCode};
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::config::AppConfig;

const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const TOKEN_LATENCY_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_LATENCY_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const N_BUCKETS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const ITERATION_BUCKETS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const HTTP_BUCKETS: &[f64] = &[0.1, 0.5, 1.0];
const FINISH_REASONS: [&str; 5] = ["stop", "length", "abort", "error", "repetition"];
const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

/// The server's metrics.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// By [`FINISH_REASONS`].
    request_success: [Counter; FINISH_REASONS.len()],
    engine: EngineMetrics,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) time_per_output_token: Histogram,
    pub(crate) e2e_latency: Histogram,
    pub(crate) decode_time: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) prefill_time: Histogram,
    pub(crate) inference_time: Histogram,
    pub(crate) computed_prompt_tokens: Histogram,
    iteration_tokens: Histogram,
    pub(crate) admission_rejections: Counter,
    pub(crate) request_prompt_tokens: Histogram,
    pub(crate) request_generation_tokens: Histogram,
    pub(crate) max_generation_tokens: Histogram,
    pub(crate) params_max_tokens: Histogram,
    pub(crate) params_n: Histogram,
}

/// What is read from the engine when somebody asks.
struct EngineMetrics {
    n_running: Gauge,
    n_waiting: Gauge,
    n_waiting_for_capacity: Gauge,
    kv_cache_usage: Gauge,
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
    prompt_tokens: Counter,
    prompt_tokens_cached: Counter,
    generation_tokens: Counter,
}

/// Registers metrics that have the engine's labels.
struct Registrar<'a> {
    recorder: &'a PrometheusRecorder,
    labels: &'a [Label],
}

impl Registrar<'_> {
    fn key(&self, name: &'static str, extra: &[Label]) -> Key {
        Key::from_parts(name, [self.labels, extra].concat())
    }

    fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        self.recorder.describe_counter(name.into(), None, SharedString::const_str(help));
        self.recorder.register_counter(&self.key(name, &[]), &METADATA)
    }

    fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        self.recorder.describe_gauge(name.into(), None, SharedString::const_str(help));
        self.recorder.register_gauge(&self.key(name, &[]), &METADATA)
    }

    fn histogram(&self, name: &'static str, help: &'static str) -> Histogram {
        self.recorder.describe_histogram(name.into(), None, SharedString::const_str(help));
        self.recorder.register_histogram(&self.key(name, &[]), &METADATA)
    }
}

impl EngineMetrics {
    fn new(r: &Registrar<'_>) -> Self {
        Self {
            n_running: r.gauge("vllm:num_requests_running", "Number of requests in model execution batches."),
            n_waiting: r.gauge("vllm:num_requests_waiting", "Number of requests waiting to be processed."),
            n_waiting_for_capacity: {
                let name = "vllm:num_requests_waiting_by_reason";
                let help =
                    SharedString::const_str("Number of requests waiting to be processed, by what they wait for.");
                r.recorder.describe_gauge(name.into(), None, help);
                // Nothing here ever waits for anything else.
                r.recorder.register_gauge(&r.key(name, &[Label::new("reason", "deferred")]), &METADATA).set(0.0);
                r.recorder.register_gauge(&r.key(name, &[Label::new("reason", "capacity")]), &METADATA)
            },
            kv_cache_usage: r.gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."),
            prefix_queries: r.counter("vllm:prefix_cache_queries_total", "Prefix cache queries, in tokens."),
            prefix_hits: r.counter("vllm:prefix_cache_hits_total", "Prefix cache hits, in tokens."),
            preemptions: r.counter("vllm:num_preemptions_total", "Preemptions by the scheduler."),
            prompt_tokens: r.counter("vllm:prompt_tokens_total", "Prefill tokens processed."),
            prompt_tokens_cached: r.counter("vllm:prompt_tokens_cached_total", "Prompt tokens from the prefix cache."),
            generation_tokens: r.counter("vllm:generation_tokens_total", "Generation tokens processed."),
        }
    }

    fn set(&self, stats: &EngineStats) {
        self.n_running.set(stats.n_running as f64);
        self.n_waiting.set(stats.n_waiting as f64);
        self.n_waiting_for_capacity.set(stats.n_waiting as f64);
        self.kv_cache_usage.set(stats.n_pages_in_use as f64 / stats.n_pages.max(1) as f64);
        self.prefix_queries.absolute(stats.n_prefix_queries);
        self.prefix_hits.absolute(stats.n_prefix_hits);
        self.preemptions.absolute(stats.n_preemptions);
        self.prompt_tokens.absolute(stats.n_prompt_tokens);
        self.prompt_tokens_cached.absolute(stats.n_prefix_hits);
        self.generation_tokens.absolute(stats.n_generation_tokens);
    }
}

impl Metrics {
    /// All metrics, at zero.
    pub fn new(info: &EngineInfo, config: &AppConfig) -> Self {
        let recorder = recorder(info.max_model_len);
        let labels = [Label::new("model_name", config.served_model_names[0].clone()), Label::new("engine", "0")];
        let r = Registrar { recorder: &recorder, labels: &labels };
        set_cache_config(&r, info, config);
        let success = "vllm:request_success_total";
        recorder.describe_counter(
            success.into(),
            None,
            SharedString::const_str("Count of successfully processed requests."),
        );
        let request_success = FINISH_REASONS.map(|reason| {
            recorder.register_counter(&r.key(success, &[Label::new("finished_reason", reason)]), &METADATA)
        });
        Self {
            request_success,
            engine: EngineMetrics::new(&r),
            time_to_first_token: r.histogram("vllm:time_to_first_token_seconds", "Time to first token in seconds."),
            inter_token_latency: r.histogram("vllm:inter_token_latency_seconds", "Inter-token latency in seconds."),
            time_per_output_token: r.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Time per output token in seconds per request.",
            ),
            e2e_latency: r.histogram("vllm:e2e_request_latency_seconds", "End-to-end request latency in seconds."),
            decode_time: r.histogram("vllm:request_decode_time_seconds", "Time from first to last token in seconds."),
            queue_time: r.histogram("vllm:request_queue_time_seconds", "Time in the waiting queue in seconds."),
            prefill_time: r.histogram(
                "vllm:request_prefill_time_seconds",
                "Time from a request's first step to its first token in seconds.",
            ),
            inference_time: r.histogram(
                "vllm:request_inference_time_seconds",
                "Time from a request's first step to its last token in seconds.",
            ),
            computed_prompt_tokens: r.histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Number of prompt tokens that were computed, those from the prefix cache excluded.",
            ),
            iteration_tokens: r.histogram("vllm:iteration_tokens_total", "Number of tokens of each engine step."),
            admission_rejections: {
                let name = "vllm:admission_rejections_total";
                let help = SharedString::const_str("Requests that were refused because the queue was full.");
                recorder.describe_counter(name.into(), None, help);
                recorder.register_counter(&r.key(name, &[Label::new("reason", "max_num_queued_reqs")]), &METADATA)
            },
            request_prompt_tokens: r.histogram("vllm:request_prompt_tokens", "Number of prefill tokens processed."),
            request_generation_tokens: r
                .histogram("vllm:request_generation_tokens", "Number of generation tokens processed."),
            max_generation_tokens: r.histogram(
                "vllm:request_max_num_generation_tokens",
                "Maximum number of generation tokens of a request's choices.",
            ),
            params_max_tokens: r.histogram("vllm:request_params_max_tokens", "The max_tokens request parameter."),
            params_n: r.histogram("vllm:request_params_n", "The n request parameter."),
            handle: recorder.handle(),
            recorder,
        }
    }

    /// Counts steps of these numbers of tokens.
    pub fn steps(&self, n_tokens: &[u32]) {
        n_tokens.iter().for_each(|&n| self.iteration_tokens.record(f64::from(n)));
    }

    /// The Prometheus text, with the engine's state now.
    pub fn render(&self, stats: &EngineStats) -> String {
        self.engine.set(stats);
        self.handle.render()
    }

    /// Folds what was recorded since the last call into the histograms.
    pub fn run_upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Counts a sequence's end; `None` is one that was cancelled, or lost if `failed`.
    pub(crate) fn request_finished(&self, finish: Option<FinishReason>, failed: bool) {
        let reason = match finish {
            Some(FinishReason::Stop | FinishReason::ToolCalls) => 0,
            Some(FinishReason::Length) => 1,
            None if failed => 3,
            Some(FinishReason::Abort) | None => 2,
            Some(FinishReason::Repetition) => 4,
        };
        self.request_success[reason].increment(1);
    }

    /// Counts an answered request; a stream is answered when it starts.
    pub(crate) fn http_request(&self, path: &'static str, method: &Method, status: StatusCode, took: Duration) {
        let handler = Label::new("handler", path);
        let method = Label::new("method", method.as_str().to_owned());
        let status = Label::new("status", format!("{}xx", status.as_u16() / 100));
        let total = Key::from_parts("http_requests_total", vec![handler.clone(), method.clone(), status]);
        self.recorder.register_counter(&total, &METADATA).increment(1);
        let duration = Key::from_parts("http_request_duration_seconds", vec![handler, method]);
        self.recorder.register_histogram(&duration, &METADATA).record(took);
    }
}

fn recorder(max_model_len: usize) -> PrometheusRecorder {
    let token_buckets = token_buckets(max_model_len);
    let buckets: [(&str, &[f64]); 16] = [
        ("vllm:time_to_first_token_seconds", TTFT_BUCKETS),
        ("vllm:inter_token_latency_seconds", TOKEN_LATENCY_BUCKETS),
        ("vllm:request_time_per_output_token_seconds", TOKEN_LATENCY_BUCKETS),
        ("vllm:e2e_request_latency_seconds", REQUEST_LATENCY_BUCKETS),
        ("vllm:request_decode_time_seconds", REQUEST_LATENCY_BUCKETS),
        ("vllm:request_queue_time_seconds", REQUEST_LATENCY_BUCKETS),
        ("vllm:request_prefill_time_seconds", REQUEST_LATENCY_BUCKETS),
        ("vllm:request_inference_time_seconds", REQUEST_LATENCY_BUCKETS),
        ("vllm:request_prefill_kv_computed_tokens", &token_buckets),
        ("vllm:iteration_tokens_total", ITERATION_BUCKETS),
        ("vllm:request_prompt_tokens", &token_buckets),
        ("vllm:request_generation_tokens", &token_buckets),
        ("vllm:request_max_num_generation_tokens", &token_buckets),
        ("vllm:request_params_max_tokens", &token_buckets),
        ("vllm:request_params_n", N_BUCKETS),
        ("http_request_duration_seconds", HTTP_BUCKETS),
    ];
    let builder = buckets.into_iter().fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder
            .set_buckets_for_metric(Matcher::Full(name.into()), buckets)
            .expect("every list of buckets has at least one")
    });
    builder.build_recorder()
}

/// 1, 2, 5, 10, 20, 50, ... up to the context's length.
fn token_buckets(max_model_len: usize) -> Vec<f64> {
    let powers = std::iter::successors(Some(1_usize), |power| power.checked_mul(10));
    let buckets = powers.flat_map(|power| [1, 2, 5].map(|digit| power.saturating_mul(digit)));
    buckets.take_while(|&bucket| bucket <= max_model_len.max(1)).map(|bucket| bucket as f64).collect()
}

fn set_cache_config(r: &Registrar<'_>, info: &EngineInfo, config: &AppConfig) {
    let name = "vllm:cache_config_info";
    r.recorder.describe_gauge(name.into(), None, SharedString::const_str("The KV cache's configuration, as labels."));
    let labels = [
        Label::new("block_size", PAGE_SIZE.to_string()),
        Label::new("num_gpu_blocks", (info.n_kv_tokens / PAGE_SIZE).to_string()),
        Label::new("gpu_memory_utilization", config.gpu_memory_utilization.to_string()),
        Label::new("enable_prefix_caching", config.enable_prefix_caching.to_string()),
        Label::new("cache_dtype", "auto"),
    ];
    r.recorder.register_gauge(&r.key(name, &labels), &METADATA).set(1.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_buckets_end_at_the_context() {
        assert_eq!(token_buckets(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(token_buckets(1), [1.0]);
        assert_eq!(token_buckets(131_072).last(), Some(&100_000.0));
    }
}

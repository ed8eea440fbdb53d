//! Owns the figures of a run: computed from its raw rows, and from nothing else.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::record::RequestRecord;
use crate::store::Run;

/// Percentiles that reports give.
pub const PERCENTILES: [usize; 8] = [50, 66, 75, 80, 90, 95, 98, 99];

/// Runs of at most this many successes have percentiles that say little.
pub const FEW_SUCCESSES: usize = 8;

/// Figures of one run: the JSON summary. Times in seconds, rates per second; null means "does not apply".
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub run_id: i64,
    pub dataset: String,
    pub synthetic: bool,
    pub parallel: Option<i64>,
    pub rate: Option<f64>,
    pub number: i64,
    pub total_requests: usize,
    pub succeeded: usize,
    pub failed: usize,
    /// First intended send to last end.
    pub wall_s: f64,
    pub qps: f64,
    pub output_tok_s: f64,
    pub total_tok_s: f64,
    pub input_tok_s: f64,
    pub avg_latency_s: Option<f64>,
    pub avg_ttft_s: Option<f64>,
    pub avg_tpot_s: Option<f64>,
    /// Mean of all gaps pooled.
    pub avg_itl_s: Option<f64>,
    /// Wall time over all output tokens: EvalScope's "average time per output token" of 2024.
    pub wall_per_output_token_s: Option<f64>,
    pub avg_input_tokens: Option<f64>,
    pub avg_output_tokens: Option<f64>,
    pub percentiles: LatencyPercentiles,
    /// How often each failure happened.
    pub errors: BTreeMap<String, usize>,
    pub model: Option<String>,
    /// The run was stopped by hand or cut off.
    pub interrupted: bool,
    pub streamed: usize,
    /// To the first message with `choices`, even an empty one: EvalScope's present TTFT.
    pub avg_evalscope_ttft_s: Option<f64>,
    /// Messages of a stream (EvalScope 2024: packages).
    pub avg_packages: Option<f64>,
    pub avg_package_latency_s: Option<f64>,
    /// Share of prompt tokens that the server took from its cache, where it says so.
    pub cached_share: Option<f64>,
    /// Successes whose token counts are unknown: they count as 0 tokens.
    pub without_usage: usize,
}

/// Percentiles of each kind of time, in seconds.
#[derive(Debug, Clone, Serialize)]
pub struct LatencyPercentiles {
    pub ttft: Percentiles,
    pub latency: Percentiles,
    pub tpot: Percentiles,
    pub itl: Percentiles,
    /// How late requests left: sent - intended.
    pub lag: Percentiles,
}

/// Values by name, `p50` to `p99`; null where there are no samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Percentiles(pub [Option<f64>; PERCENTILES.len()]);

impl Serialize for Percentiles {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(PERCENTILES.iter().map(|percent| format!("p{percent}")).zip(&self.0))
    }
}

impl Percentiles {
    /// Nearest rank on a zero-based index, `sorted[n * p / 100]`, as EvalScope does; no interpolation.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        Self(PERCENTILES.map(|percent| values.get(values.len() * percent / 100).copied()))
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Computes the figures of `run` from its rows. Failed requests count in the totals and the wall time only.
pub fn summarise(run: &Run, records: &[RequestRecord]) -> Summary {
    let successes: Vec<&RequestRecord> = records.iter().filter(|record| record.success).collect();
    let collect = |value: fn(&RequestRecord) -> f64| successes.iter().map(|record| value(record)).collect::<Vec<f64>>();
    let sum_tokens = |tokens: fn(&RequestRecord) -> Option<i64>| {
        successes.iter().filter_map(|record| tokens(record)).sum::<i64>() as f64
    };
    let start_s = records.iter().map(|record| record.intended_s).min_by(f64::total_cmp).unwrap_or_default();
    let end_s = records.iter().map(|record| record.end_s).max_by(f64::total_cmp).unwrap_or_default();
    let wall_s = end_s - start_s;
    let per_second = |amount: f64| if wall_s > 0.0 { amount / wall_s } else { 0.0 };
    let n = successes.len() as f64;
    let per_success = |amount: f64| (n > 0.0).then(|| amount / n);
    let (input, output) = (sum_tokens(|record| record.prompt_tokens), sum_tokens(|record| record.completion_tokens));
    let cached = successes.iter().any(|record| record.cached_tokens.is_some());

    let (latency, ttft) = (collect(RequestRecord::latency_s), collect(RequestRecord::ttft_s));
    let tpot: Vec<f64> = successes.iter().filter_map(|record| record.tpot_s()).collect();
    let itl: Vec<f64> = successes.iter().flat_map(|record| record.itl_s()).collect();
    let packages = Packages::of(&successes);
    let mut errors = BTreeMap::new();
    for error in records.iter().filter_map(|record| record.error.as_ref()) {
        *errors.entry(error.clone()).or_default() += 1;
    }
    Summary {
        run_id: run.id,
        dataset: run.dataset.clone(),
        synthetic: run.synthetic,
        parallel: run.parallel,
        rate: run.rate,
        number: run.number,
        total_requests: records.len(),
        succeeded: successes.len(),
        failed: records.len() - successes.len(),
        wall_s,
        qps: per_second(n),
        output_tok_s: per_second(output),
        total_tok_s: per_second(input + output),
        input_tok_s: per_second(input),
        avg_latency_s: mean(&latency),
        avg_ttft_s: mean(&ttft),
        avg_tpot_s: mean(&tpot),
        avg_itl_s: mean(&itl),
        wall_per_output_token_s: (output > 0.0).then(|| wall_s / output),
        avg_input_tokens: per_success(input),
        avg_output_tokens: per_success(output),
        percentiles: LatencyPercentiles {
            ttft: Percentiles::of(ttft),
            latency: Percentiles::of(latency),
            tpot: Percentiles::of(tpot),
            itl: Percentiles::of(itl),
            lag: Percentiles::of(records.iter().map(|record| record.sent_s - record.intended_s).collect()),
        },
        errors,
        model: run.model.clone(),
        interrupted: run.interrupted || run.ended_at.is_none(),
        streamed: successes.iter().filter(|record| record.streamed).count(),
        avg_evalscope_ttft_s: mean(&collect(RequestRecord::evalscope_ttft_s)),
        avg_packages: packages.per_request,
        avg_package_latency_s: packages.latency_s,
        cached_share: (cached && input > 0.0).then(|| sum_tokens(|record| record.cached_tokens) / input),
        without_usage: successes.iter().filter(|record| record.completion_tokens.is_none()).count(),
    }
}

/// The package figures of EvalScope's 2024 report.
struct Packages {
    per_request: Option<f64>,
    latency_s: Option<f64>,
}

impl Packages {
    /// Of a stream's messages the first and last are left out of count and time; a whole answer is one package.
    fn of(successes: &[&RequestRecord]) -> Self {
        let (mut n_messages, mut n_packages, mut time_s) = (0, 0, 0.0);
        for record in successes {
            n_messages += record.n_messages;
            if record.streamed {
                n_packages += (record.n_messages - 2).max(0);
                let ends = record.penultimate_message_s.zip(record.first_message_s);
                time_s += ends.map_or(0.0, |(last, first)| last - first);
            } else {
                n_packages += 1;
                time_s += record.latency_s();
            }
        }
        let n = successes.len();
        Self {
            per_request: (n > 0).then(|| n_messages as f64 / n as f64),
            latency_s: (n_packages > 0).then(|| time_s / n_packages as f64),
        }
    }
}

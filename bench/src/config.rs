//! Owns the checked configuration of a `perf` run: every flag resolved once, before anything is sent.

use std::path::PathBuf;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value, json};
use time::macros::format_description;

use crate::api::{self, Api, Generation};
use crate::cli::{OutputArgs, PerfArgs};
use crate::dataset::{self, DataOptions, Dataset};
use crate::endpoint::Endpoint;
use crate::{Error, Result};

/// Header values that are never stored.
const SECRET_HEADERS: &[&str] = &["authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"];

/// Everything a `perf` run needs to know.
pub struct Config {
    pub model: Option<String>,
    pub api: &'static dyn Api,
    pub endpoint: Endpoint,
    pub headers: HeaderMap,
    pub timeouts: Timeouts,
    pub points: Vec<Point>,
    pub warmup: usize,
    pub dataset: &'static dyn Dataset,
    /// What reports call the data: the dataset's name, or `prompt`.
    pub dataset_name: String,
    pub data: DataOptions,
    pub generation: Generation,
    pub min_tokens: Option<u32>,
    /// Answer lengths to draw from.
    pub max_tokens: (u32, u32),
    pub ignore_eos: bool,
    pub stream: bool,
    pub template: Option<Value>,
    pub extra: Map<String, Value>,
    pub name: String,
    pub out: Option<PathBuf>,
    pub db: PathBuf,
    pub output: OutputArgs,
    pub log_every: usize,
    pub allow_failures: bool,
    /// The configuration as stored: without secrets.
    pub recorded: Value,
}

/// Limits of one request.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    pub connect: Duration,
    /// Longest silence of the socket.
    pub read: Option<Duration>,
    pub total: Duration,
}

/// One point of a sweep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// None: one pass over the data.
    pub number: Option<usize>,
    /// Requests in flight at most; None: no limit (open loop only).
    pub parallel: Option<usize>,
    /// Arrivals per second; None: closed loop.
    pub rate: Option<f64>,
}

impl Config {
    /// Checks the flags and resolves them.
    ///
    /// # Errors
    /// The first flag that cannot work, by name.
    pub fn new(args: PerfArgs) -> Result<Self> {
        let api = api::find(&args.api)?;
        let dataset = dataset::find(&args.dataset)?;
        let token_prompts = dataset.sends_token_ids() && args.prompt.is_none();
        let endpoint = Endpoint::parse(&args.url, api.completion(token_prompts))?;
        if args.model.is_none() && args.api != "custom" && args.dataset != "line_by_line" {
            return Err(Error::flag("--model", "is needed: the name the server serves its model under"));
        }
        let max_tokens = match *args.max_tokens {
            [] => None,
            [one] => Some((one, one)),
            [low, high] if low <= high => Some((low, high)),
            _ => {
                return Err(Error::flag("--max-tokens", "of two numbers, the first must not be larger"));
            }
        };
        if max_tokens.is_some_and(|(low, _)| low == 0) {
            return Err(Error::flag("--max-tokens", "must be at least 1"));
        }
        if let (Some(min), Some((_, max))) = (args.min_tokens, max_tokens)
            && min > max
        {
            return Err(Error::flag("--min-tokens", format!("{min} is more than --max-tokens {max}")));
        }
        if args.min_prompt_length > args.max_prompt_length {
            return Err(Error::flag("--min-prompt-length", "is more than --max-prompt-length"));
        }
        let tokenizer = args.tokenizer_path.as_deref().map(dataset::load_tokenizer).transpose()?;
        let stamp = timestamp();
        let name = args.name.clone().unwrap_or_else(|| {
            let model = args.model.as_deref().unwrap_or(&args.api);
            model.rsplit('/').find(|part| !part.is_empty()).unwrap_or("model").to_owned()
        });
        let db = args.db.clone().unwrap_or_else(|| {
            let file: String = format!("{name}_benchmark_{stamp}.db").replace(['/', '\\'], "_");
            args.out.clone().unwrap_or_default().join(file)
        });
        Ok(Self {
            api,
            dataset,
            headers: headers(&args, api)?,
            timeouts: Timeouts {
                connect: seconds("--connect-timeout", args.connect_timeout)?,
                read: args.read_timeout.map(|value| seconds("--read-timeout", value)).transpose()?,
                total: seconds("--total-timeout", args.total_timeout)?,
            },
            points: points(&args)?,
            warmup: args.warmup,
            dataset_name: if args.prompt.is_some() { "prompt".into() } else { args.dataset.clone() },
            data: DataOptions {
                path: args.dataset_path.clone(),
                prompt: args.prompt.as_deref().map(|text| text_or_file("--prompt", text)).transpose()?,
                min_prompt_length: args.min_prompt_length,
                max_prompt_length: args.max_prompt_length,
                tokenizer,
                random_vocab_size: args.random_vocab_size,
                length_distribution: args.length_distribution.clone(),
                seed: args.data_seed,
                max_tokens,
                min_tokens: args.min_tokens,
            },
            generation: Generation {
                temperature: args.temperature,
                top_p: args.top_p,
                top_k: args.top_k,
                frequency_penalty: args.frequency_penalty,
                logprobs: args.logprobs,
                n_choices: args.n_choices,
                seed: args.seed,
                stop: args.stop.clone(),
                stop_token_ids: args.stop_token_ids.clone(),
            },
            min_tokens: args.min_tokens,
            max_tokens: max_tokens.unwrap_or((2048, 2048)),
            ignore_eos: args.ignore_eos,
            stream: !args.no_stream,
            template: args.query_template.as_deref().map(template).transpose()?,
            extra: args.extra_args.as_deref().map(extra_args).transpose()?.unwrap_or_default(),
            log_every: args.log_every_n_query.max(1),
            allow_failures: args.allow_failures,
            recorded: recorded(&args, &endpoint),
            endpoint,
            model: args.model,
            name,
            out: args.out,
            db,
            output: args.output,
        })
    }
}

/// `--number`, `--parallel` and `--rate` side by side: lists of one length, or single values repeated.
fn points(args: &PerfArgs) -> Result<Vec<Point>> {
    let n_points = args.number.len().max(args.parallel.len()).max(args.rate.len()).max(1);
    for (flag, len) in
        [("--number", args.number.len()), ("--parallel", args.parallel.len()), ("--rate", args.rate.len())]
    {
        if len > 1 && len != n_points {
            return Err(Error::flag(
                flag,
                format!("has {len} values where another list has {n_points}; give 1 or {n_points}"),
            ));
        }
    }
    fn pick<T: Copy>(values: &[T], i: usize) -> Option<T> {
        if values.len() == 1 { values.first().copied() } else { values.get(i).copied() }
    }
    let point = |i| {
        let (number, parallel) = (pick(&args.number, i), pick(&args.parallel, i));
        let rate = match pick(&args.rate, i) {
            Some(rate) if rate > 0.0 && rate.is_finite() => Some(rate),
            None | Some(-1.0) => None,
            Some(rate) => {
                return Err(Error::flag("--rate", format!("{rate} is neither positive nor -1")));
            }
        };
        if number == Some(0) {
            return Err(Error::flag("--number", "must be at least 1"));
        }
        if parallel == Some(0) {
            return Err(Error::flag("--parallel", "must be at least 1"));
        }
        Ok(Point { number, parallel: if rate.is_none() { parallel.or(Some(1)) } else { parallel }, rate })
    };
    (0..n_points).map(point).collect()
}

fn headers(args: &PerfArgs, api: &dyn Api) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    headers.insert("user-agent", HeaderValue::from_static(concat!("ember-bench/", env!("CARGO_PKG_VERSION"))));
    headers.extend(
        api.headers(!args.no_stream)
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))),
    );
    if let Some(key) = &args.api_key {
        let value = HeaderValue::try_from(format!("Bearer {key}"));
        let value = value.map_err(|_| Error::flag("--api-key", "has characters that a header cannot carry"))?;
        headers.insert("authorization", value);
    }
    for pair in &args.headers {
        let wrong = |what: &str| Error::flag("--headers", format!("{what}; give KEY=VALUE"));
        let (name, value) = pair.split_once('=').ok_or_else(|| wrong("a header has no \"=\""))?;
        let name = HeaderName::try_from(name).map_err(|_| wrong(&format!("{name:?} is not a header name")))?;
        let value =
            HeaderValue::try_from(value).map_err(|_| wrong(&format!("the value of {name} is not printable")))?;
        headers.insert(name, value);
    }
    Ok(headers)
}

fn seconds(flag: &'static str, value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| Error::flag(flag, format!("{value} is not a positive number of seconds")))
}

fn text_or_file(flag: &'static str, value: &str) -> Result<String> {
    match value.strip_prefix('@') {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|error| Error::flag(flag, format!("cannot read {path:?}: {error}")))
        }
        None => Ok(value.to_owned()),
    }
}

fn template(value: &str) -> Result<Value> {
    let text = text_or_file("--query-template", value)?;
    match serde_json::from_str(&text) {
        Ok(template @ Value::Object(_)) => Ok(template),
        Ok(_) => Err(Error::flag("--query-template", "must be a JSON object")),
        Err(error) => {
            Err(Error::flag("--query-template", format!("not JSON: {error} (a file needs @ before its name)")))
        }
    }
}

fn extra_args(value: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(value).map_err(|error| Error::flag("--extra-args", format!("not a JSON object: {error}")))
}

fn recorded(args: &PerfArgs, endpoint: &Endpoint) -> Value {
    let headers: Vec<String> = args
        .headers
        .iter()
        .map(|pair| match pair.split_once('=') {
            Some((name, _)) if SECRET_HEADERS.contains(&name.to_ascii_lowercase().as_str()) => {
                format!("{name}=***")
            }
            _ => pair.clone(),
        })
        .collect();
    json!({
        "model": args.model, "url": endpoint.url(), "api": args.api, "headers": headers,
        "connect_timeout": args.connect_timeout, "read_timeout": args.read_timeout, "total_timeout": args.total_timeout,
        "number": args.number, "parallel": args.parallel, "rate": args.rate, "warmup": args.warmup,
        "dataset": args.dataset, "dataset_path": args.dataset_path, "prompt": args.prompt,
        "query_template": args.query_template, "min_prompt_length": args.min_prompt_length,
        "max_prompt_length": args.max_prompt_length, "tokenizer_path": args.tokenizer_path,
        "random_vocab_size": args.random_vocab_size, "length_distribution": args.length_distribution,
        "data_seed": args.data_seed, "max_tokens": args.max_tokens, "min_tokens": args.min_tokens,
        "ignore_eos": args.ignore_eos, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
        "frequency_penalty": args.frequency_penalty, "logprobs": args.logprobs, "n_choices": args.n_choices,
        "seed": args.seed, "stop": args.stop, "stop_token_ids": args.stop_token_ids, "stream": !args.no_stream,
        "extra_args": args.extra_args, "name": args.name,
    })
}

fn timestamp() -> String {
    let format = format_description!("[year][month][day]_[hour][minute][second]");
    time::OffsetDateTime::now_utc().format(&format).expect("the format has only parts that a date has")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn config(flags: &str) -> Result<Config> {
        let args = format!("ember-bench perf --model m {flags}");
        match Cli::try_parse_from(args.split_whitespace()).unwrap().command {
            Command::Perf(args) => Config::new(*args),
            Command::Report(_) => unreachable!("perf was asked for"),
        }
    }

    #[test]
    fn lists_are_zipped_and_single_values_repeated() {
        let point = |number, parallel, rate| Point { number: Some(number), parallel, rate };
        let check = |flags: &str, expected: &[Point]| assert_eq!(config(flags).unwrap().points, expected, "{flags}");
        check("-n 5", &[point(5, Some(1), None)]);
        check("-n 5,6 --parallel 2 4", &[point(5, Some(2), None), point(6, Some(4), None)]);
        check("-n 5 --parallel 1,8", &[point(5, Some(1), None), point(5, Some(8), None)]);
        check("-n 5 --rate 2.5", &[point(5, None, Some(2.5))]);
        check("-n 5 --rate -1", &[point(5, Some(1), None)]);
        check("-n 5 --rate 2 --parallel 3", &[point(5, Some(3), Some(2.0))]);
        let message = config("-n 1,2,3 --parallel 1,2").err().unwrap().to_string();
        assert!(message.starts_with("--parallel: has 2 values"), "{message}");
    }

    #[test]
    fn flags_that_cannot_work_are_named() {
        let check = |flags: &str, start: &str| {
            let message = config(flags).err().unwrap().to_string();
            assert!(message.starts_with(start), "{message:?} does not start with {start:?}");
        };
        check("--rate 0", "--rate: ");
        check("--number 0", "--number: ");
        check("--parallel 0", "--parallel: ");
        check("--headers novalue", "--headers: ");
        check("--max-tokens 9 3", "--max-tokens: ");
        check("--max-tokens 5 --min-tokens 6", "--min-tokens: ");
        check("--extra-args [1]", "--extra-args: ");
        check("--query-template {", "--query-template: ");
        check("--prompt @/nowhere", "--prompt: ");
        check("--read-timeout 0", "--read-timeout: ");
        check("--api soap", "--api: ");
        check("--dataset nope", "--dataset: ");
        check("--min-prompt-length 9 --max-prompt-length 3", "--min-prompt-length: ");
        check("--tokenizer-path /nowhere", "--tokenizer-path /nowhere");
    }

    #[test]
    fn secrets_are_sent_but_not_recorded() {
        let config = config("--api-key s3cret --headers Authorization=s3cret X-Team=a --wandb-api-key s3cret").unwrap();
        assert_eq!(config.headers["authorization"], "s3cret");
        let recorded = config.recorded.to_string();
        assert!(!recorded.contains("s3cret"), "{recorded}");
        assert!(recorded.contains("X-Team=a"), "{recorded}");
    }
}

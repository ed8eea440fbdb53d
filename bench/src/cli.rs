//! Owns the command line as typed; `config` checks and resolves it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Measures how well a server of large language models serves.
#[derive(Debug, Parser)]
#[command(name = "ember-bench", version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load a server with requests and measure its answers
    Perf(Box<PerfArgs>),
    /// Print recorded runs again, computed from the raw rows
    Report(ReportArgs),
}

/// Flags of `ember-bench perf`.
#[derive(Debug, Args)]
pub struct PerfArgs {
    /// Model name sent with each request
    #[arg(long, help_heading = "Server")]
    pub model: Option<String>,
    /// Server address; a bare host gets /v1/chat/completions (or /v1/completions for token prompts)
    #[arg(long, default_value = "http://127.0.0.1:8000", help_heading = "Server")]
    pub url: String,
    /// Shape of requests and answers: openai, dashscope, custom
    #[arg(long, default_value = "openai", help_heading = "Server")]
    pub api: String,
    /// Sent as "Authorization: Bearer KEY"; never stored
    #[arg(long, env = "EMBER_BENCH_API_KEY", hide_env_values = true, help_heading = "Server")]
    pub api_key: Option<String>,
    /// Extra request headers
    #[arg(long, value_name = "KEY=VALUE", num_args = 1.., help_heading = "Server")]
    pub headers: Vec<String>,
    /// Seconds to wait for a connection
    #[arg(long, default_value_t = 120.0, help_heading = "Server")]
    pub connect_timeout: f64,
    /// Seconds a socket may stay silent during a request; not limited when left out
    #[arg(long, help_heading = "Server")]
    pub read_timeout: Option<f64>,
    /// Seconds a whole request may take
    #[arg(long, default_value_t = 21600.0, help_heading = "Server")]
    pub total_timeout: f64,

    /// Requests per run, a list for a sweep. Default: one pass over a --dataset-path file, else 1000
    #[arg(short, long, num_args = 1.., value_delimiter = ',', help_heading = "Load")]
    pub number: Vec<usize>,
    /// Requests in flight, a list for a sweep. Default 1; with --rate it is a cap, and left out there is none
    #[arg(long, num_args = 1.., value_delimiter = ',', help_heading = "Load")]
    pub parallel: Vec<usize>,
    /// Arrivals per second (Poisson), a list for a sweep; -1 sends without pacing
    #[arg(long, num_args = 1.., value_delimiter = ',', allow_negative_numbers = true, help_heading = "Load")]
    pub rate: Vec<f64>,
    /// Requests sent and finished before measuring starts, left out of every figure
    #[arg(long, default_value_t = 0, help_heading = "Load")]
    pub warmup: usize,

    /// Where prompts come from: openqa, longalpaca, line_by_line, custom, random
    #[arg(long, default_value = "openqa", help_heading = "Data")]
    pub dataset: String,
    /// Dataset file; without it openqa and longalpaca are synthesised
    #[arg(long, help_heading = "Data")]
    pub dataset_path: Option<PathBuf>,
    /// One prompt for all requests: text, or @FILE
    #[arg(long, help_heading = "Data")]
    pub prompt: Option<String>,
    /// Body that requests start from: JSON, or @FILE
    #[arg(long, help_heading = "Data")]
    pub query_template: Option<String>,
    /// Shortest prompt: tokens with --tokenizer-path or --dataset random, else characters
    #[arg(long, default_value_t = 0, help_heading = "Data")]
    pub min_prompt_length: usize,
    /// Longest prompt, in the same unit
    #[arg(long, default_value_t = 131_072, help_heading = "Data")]
    pub max_prompt_length: usize,
    /// tokenizer.json, or a folder with one: counts prompts, and answers that carry no usage
    #[arg(long, help_heading = "Data")]
    pub tokenizer_path: Option<PathBuf>,
    /// Vocabulary size of random prompts, in place of --tokenizer-path
    #[arg(long, help_heading = "Data")]
    pub random_vocab_size: Option<u32>,
    /// Lengths of random prompts and answers: uniform, lognormal, openqa, longalpaca
    #[arg(long, default_value = "uniform", help_heading = "Data")]
    pub length_distribution: String,
    /// Seed of synthesised data, random prompts and arrival times
    #[arg(long, default_value_t = 0, help_heading = "Data")]
    pub data_seed: u64,

    /// Most tokens of an answer; two numbers: drawn uniformly per request. Default 2048
    #[arg(long, num_args = 1..=2, value_delimiter = ',', help_heading = "Generation")]
    pub max_tokens: Vec<u32>,
    /// Fewest tokens of an answer
    #[arg(long, help_heading = "Generation")]
    pub min_tokens: Option<u32>,
    /// Do not end an answer at the end-of-text token
    #[arg(long, help_heading = "Generation")]
    pub ignore_eos: bool,
    #[arg(long, default_value_t = 0.0, help_heading = "Generation")]
    pub temperature: f64,
    #[arg(long, help_heading = "Generation")]
    pub top_p: Option<f64>,
    #[arg(long, allow_negative_numbers = true, help_heading = "Generation")]
    pub top_k: Option<i64>,
    #[arg(long, allow_negative_numbers = true, help_heading = "Generation")]
    pub frequency_penalty: Option<f64>,
    /// Ask for log probabilities
    #[arg(long, help_heading = "Generation")]
    pub logprobs: bool,
    /// Answers per request (`n`)
    #[arg(long, help_heading = "Generation")]
    pub n_choices: Option<u32>,
    /// Sampling seed sent to the server
    #[arg(long, help_heading = "Generation")]
    pub seed: Option<i64>,
    #[arg(long, num_args = 1.., help_heading = "Generation")]
    pub stop: Vec<String>,
    #[arg(long, num_args = 1.., value_delimiter = ',', help_heading = "Generation")]
    pub stop_token_ids: Vec<u32>,
    /// Stream answers (the default)
    #[arg(long, overrides_with = "no_stream", help_heading = "Generation")]
    pub stream: bool,
    /// Ask for whole answers
    #[arg(long, help_heading = "Generation")]
    pub no_stream: bool,
    /// JSON object laid over each request body last
    #[arg(long, value_name = "JSON", help_heading = "Generation")]
    pub extra_args: Option<String>,

    /// Name of the run
    #[arg(long, help_heading = "Results")]
    pub name: Option<String>,
    /// Folder of the results
    #[arg(long, help_heading = "Results")]
    pub out: Option<PathBuf>,
    /// Results database; runs are added to an existing one
    #[arg(long, help_heading = "Results")]
    pub db: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
    /// Progress line every N requests when not on a terminal
    #[arg(long, default_value_t = 100, help_heading = "Results")]
    pub log_every_n_query: usize,
    /// Exit with 0 even if requests failed
    #[arg(long, help_heading = "Results")]
    pub allow_failures: bool,
    /// Log each request and each message of its answer
    #[arg(long, help_heading = "Results")]
    pub debug: bool,
    /// Accepted for compatibility; experiment tracking comes later
    #[arg(long, hide_env_values = true, help_heading = "Results")]
    pub wandb_api_key: Option<String>,
}

/// Flags of `ember-bench report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Results database
    pub db: PathBuf,
    /// Run to print; all of them when left out
    #[arg(long)]
    pub run: Option<i64>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Files a report may also go to.
#[derive(Debug, Default, Clone, Args)]
pub struct OutputArgs {
    /// Also write the summaries as a JSON array
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    pub json: Option<PathBuf>,
    /// Also write the summaries as Markdown tables
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    pub markdown: Option<PathBuf>,
}

//! `cargo xtask head-of-line`: how much long prompts hold up the streams that run beside them, on the CPU.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::bench::{build_release, read_results};
use crate::child::{self, Guarded, Interrupt, Server};
use crate::{model, table, target_dir};

const READY_LIMIT: Duration = Duration::from_secs(120);
/// Times that the latency between tokens may be that of a quiet server, at the 99th percentile.
const MAX_RATIO: f64 = 3.0;

#[derive(Args)]
pub struct HeadOfLineArgs {
    /// Streams that run.
    #[arg(long, default_value_t = 16)]
    streams: u32,
    /// Tokens of each stream.
    #[arg(long, default_value_t = 400)]
    tokens: u32,
    /// Tokens of a long prompt; one arrives every second.
    #[arg(long, default_value_t = 8000)]
    prompt: u32,
    /// Run the binaries in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

pub fn run(args: &HeadOfLineArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None => build_release(&["ember-server", "ember-bench"], false, &interrupt)?,
    };
    let out = target_dir().join("head-of-line");
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let mut command = Command::new(bin_dir.join("ember"));
    command.arg("serve").arg(model::fetch("smollm2")?).args(["--served-model-name", "smollm2", "--device", "cpu"]);
    let server = Server::start(command, &out.join("server.log"), READY_LIMIT, &interrupt)?;
    let url = format!("http://127.0.0.1:{}/v1/completions", server.port);
    let perf = |name: &str| {
        let mut command = Command::new(bin_dir.join("ember-bench"));
        command.args(["perf", "--url", &url, "--model", "smollm2", "--stream", "--ignore-eos"]);
        command.arg("--db").arg(out.join(format!("{name}.db"))).arg("--json").arg(out.join(format!("{name}.json")));
        command
    };
    let streams = |name: &str| -> Result<Vec<String>> {
        let (n, n_tokens) = (args.streams.to_string(), args.tokens.to_string());
        let mut command = perf(name);
        command.args(["--dataset", "openqa", "--parallel", &n, "--number", &n, "--max-tokens", &n_tokens]);
        child::run_ok(&mut command, &interrupt, name)?;
        row(name, &out.join(format!("{name}.json")))
    };
    let quiet = streams("quiet")?;
    let mut prompts = perf("prompts");
    let n_tokens = args.prompt.to_string();
    prompts.args(["--dataset", "random", "--random-vocab-size", "40000", "--rate", "1", "--number", "600"]);
    prompts.args(["--min-prompt-length", &n_tokens, "--max-prompt-length", &n_tokens, "--max-tokens", "1"]);
    prompts.stdout(Stdio::null()).stderr(Stdio::null());
    let prompts = Guarded::spawn(&mut prompts)?;
    let beside = streams("beside");
    drop(prompts);
    let beside = beside?;
    server.stop()?;
    let p99 = |row: &[String]| row[3].parse::<f64>().context("no latency between tokens was measured");
    let ratio = p99(&beside)? / p99(&quiet)?;
    println!("{}", table::markdown(&["streams", "ITL p50 ms", "p90", "p99", "tokens/s"], &[quiet, beside]));
    println!("p99 beside prompts of {} tokens, one a second, by quiet: {ratio:.2} (bar {MAX_RATIO})", args.prompt);
    if ratio >= MAX_RATIO {
        bail!("long prompts hold up the streams beside them");
    }
    Ok(())
}

fn row(name: &str, json: &Path) -> Result<Vec<String>> {
    let results = read_results(json)?;
    let latency = |percentile: &str| match results[0]["percentiles"]["itl"][percentile].as_f64() {
        Some(seconds) => format!("{:.1}", seconds * 1e3),
        None => "-".to_owned(),
    };
    let rate = results[0]["output_tok_s"].as_f64().unwrap_or_default();
    Ok(vec![name.to_owned(), latency("p50"), latency("p90"), latency("p99"), format!("{rate:.1}")])
}

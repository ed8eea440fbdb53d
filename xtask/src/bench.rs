//! `cargo xtask bench`: one command from a fresh checkout to a table of measured figures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::child::{self, Interrupt, Server};
use crate::{model, project_root, table, target_dir};

/// Loading a model from a slow disk, or compiling kernels, may take a while.
const READY_LIMIT: Duration = Duration::from_secs(600);

/// Without --gpu and --framework url=…, the defaults are sized so that the whole command, after the build, takes
/// a few minutes on 2 CPU cores.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure: self (starts this checkout's server), or url=URL (a server that already runs).
    #[arg(long, default_value = "self", value_parser = parse_framework)]
    framework: Framework,
    /// Model folder or GGUF file, or the name of a small model to fetch; with url=URL the model's name there.
    #[arg(long, default_value = "smollm2")]
    model: String,
    /// Datasets, each run at each --parallel.
    #[arg(long, value_delimiter = ',', default_value = "openqa,longalpaca")]
    dataset: Vec<String>,
    /// Requests in flight, a list for a sweep.
    #[arg(long, value_delimiter = ',', default_value = "1,8", value_parser = clap::value_parser!(u32).range(1..))]
    parallel: Vec<u32>,
    /// Requests per point. Default: the parallelism, at least 8; on a GPU or for url=URL five times that.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    number: Option<u32>,
    /// Most tokens of one answer. Default: 64; on a GPU or for url=URL 512.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Prompts longer than this many characters are left out. Default: 20000 on the CPU, which keeps longalpaca's
    /// prompts within what 2 cores read in the time; on a GPU or for url=URL 131072.
    #[arg(long)]
    max_prompt_length: Option<u32>,
    /// Build with CUDA and run on this GPU.
    #[arg(long, value_name = "N")]
    gpu: Option<u32>,
    /// Folder of the results. Default: bench-results/<time>.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Run the binaries in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
enum Framework {
    Own,
    Url(String),
}

fn parse_framework(text: &str) -> Result<Framework, String> {
    match text.split_once('=') {
        None if text == "self" => Ok(Framework::Own),
        Some(("url", url)) if url.starts_with("http://") || url.starts_with("https://") => {
            Ok(Framework::Url(url.to_owned()))
        }
        _ => Err("expected self, or url=http://HOST:PORT".to_owned()),
    }
}

/// One dataset at one parallelism.
struct Point {
    dataset: String,
    parallel: u32,
    number: u32,
}

/// Everything the points share, resolved.
struct Plan {
    points: Vec<Point>,
    max_tokens: u32,
    max_prompt_length: u32,
    out: PathBuf,
}

impl Plan {
    fn new(args: &BenchArgs) -> Result<Plan> {
        let is_small = args.framework == Framework::Own && args.gpu.is_none();
        let default_number = |parallel: u32| parallel.max(8) * if is_small { 1 } else { 5 };
        let mut points = Vec::new();
        for dataset in &args.dataset {
            for &parallel in &args.parallel {
                let number = args.number.unwrap_or_else(|| default_number(parallel));
                points.push(Point { dataset: dataset.clone(), parallel, number });
            }
        }
        let out = match &args.out {
            Some(dir) => dir.clone(),
            None => project_root().join("bench-results").join(timestamp()?),
        };
        Ok(Plan {
            points,
            max_tokens: args.max_tokens.unwrap_or(if is_small { 64 } else { 512 }),
            max_prompt_length: args.max_prompt_length.unwrap_or(if is_small { 20_000 } else { 131_072 }),
            out,
        })
    }
}

pub fn run(args: &BenchArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let plan = Plan::new(args)?;
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None => build(args, &interrupt)?,
    };
    fs::create_dir_all(&plan.out).with_context(|| format!("cannot create {}", plan.out.display()))?;

    let (mut server, url, name) = match &args.framework {
        Framework::Url(url) => (None, url.trim_end_matches('/').to_owned(), args.model.clone()),
        Framework::Own => {
            let (path, name) = resolve_model(&args.model)?;
            let server = start_server(&bin_dir.join("ember"), &path, (&name, args.gpu), (&plan.out, &interrupt))?;
            println!("server ready after {:.1} s", server.ready.as_secs_f64());
            let url = format!("http://127.0.0.1:{}", server.port);
            (Some(server), url, name)
        }
    };
    let mut results = Vec::new();
    let mut problems = Vec::new();
    for point in &plan.points {
        println!("\n== {} at parallel {}: {} requests", point.dataset, point.parallel, point.number);
        let mut command = perf_command(&bin_dir, &plan, point);
        command.args(["--url", &format!("{url}/v1/chat/completions"), "--model", &name]);
        match run_point(&mut command, &plan, point, &interrupt) {
            Ok(rows) => results.extend(rows),
            Err(err) => problems.push(format!("{} at parallel {}: {err:#}", point.dataset, point.parallel)),
        }
        interrupt.check()?;
        if let Some(server) = &mut server
            && let Err(err) = server.check_alive()
        {
            problems.push(format!("{err:#}"));
            break;
        }
    }
    let mut about = json!({ "model": name, "url": url, "max_tokens": plan.max_tokens, "max_prompt_length": plan.max_prompt_length });
    if let Some(server) = server {
        about["ready_s"] = json!(server.ready.as_secs_f64());
        about["server_peak_memory_mib"] = json!(server.peak_memory_mib());
        if let Err(err) = server.stop() {
            problems.push(format!("{err:#}"));
        }
    }
    about["problems"] = json!(problems);
    write_summary(&plan.out, &about, &results)?;

    let n_failed: u64 = results.iter().map(|it| it["failed"].as_u64().unwrap_or(0)).sum();
    if n_failed > 0 {
        problems
            .push(format!("{n_failed} requests failed (their messages are in {}/summary.json)", plan.out.display()));
    }
    if !problems.is_empty() {
        bail!("{}", problems.join("\n"));
    }
    Ok(())
}

/// Builds the binaries; returns their folder.
fn build(args: &BenchArgs, interrupt: &Interrupt) -> Result<PathBuf> {
    let mut packages = vec!["ember-bench"];
    if args.framework == Framework::Own {
        packages.push("ember-server");
    }
    build_release(&packages, args.gpu.is_some(), interrupt)
}

/// Builds packages in release mode; returns the folder of the binaries. CUDA builds have a target folder of their
/// own, so that going back and forth between the two rebuilds nothing.
pub fn build_release(packages: &[&str], cuda: bool, interrupt: &Interrupt) -> Result<PathBuf> {
    println!("building {} …", packages.join(" and "));
    let target_dir = if cuda { target_dir().join("cuda") } else { target_dir() };
    let mut command = Command::new(crate::cargo());
    command.current_dir(project_root()).args(["build", "--release"]).arg("--target-dir").arg(&target_dir);
    for package in packages {
        command.args(["-p", package]);
    }
    if cuda {
        command.args(["--features", "ember-server/cuda"]);
    }
    child::run_ok(&mut command, interrupt, "the build")?;
    Ok(target_dir.join("release"))
}

/// The model's path and the name it is served under.
fn resolve_model(model: &str) -> Result<(PathBuf, String)> {
    let path = PathBuf::from(model);
    if path.exists() {
        let path = path.canonicalize()?;
        let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
        return Ok((path.clone(), stem.unwrap_or_default().to_string_lossy().into_owned()));
    }
    if model.contains('/') || model.ends_with(".gguf") {
        bail!("--model {model}: no such file or folder");
    }
    Ok((model::fetch(model)?, model.to_owned()))
}

fn start_server(
    ember: &Path,
    model: &Path,
    (name, gpu): (&str, Option<u32>),
    (out, interrupt): (&Path, &Interrupt),
) -> Result<Server> {
    let mut command = Command::new(ember);
    command.arg("serve").arg(model).args(["--served-model-name", name]);
    match gpu {
        Some(idx) => command.env("CUDA_VISIBLE_DEVICES", idx.to_string()).args(["--device", "cuda"]),
        None => command.args(["--device", "cpu"]),
    };
    Server::start(command, &out.join("server.log"), READY_LIMIT, interrupt)
}

fn perf_command(bin_dir: &Path, plan: &Plan, point: &Point) -> Command {
    let mut command = Command::new(bin_dir.join("ember-bench"));
    command.args(["perf", "--dataset", &point.dataset, "--stream"]);
    command.args(["--parallel", &point.parallel.to_string(), "--number", &point.number.to_string()]);
    command.args(["--max-tokens", &plan.max_tokens.to_string()]);
    command.args(["--max-prompt-length", &plan.max_prompt_length.to_string()]);
    // Failed requests are counted from the results, so that one of them does not hide the others' figures.
    command.arg("--allow-failures");
    command.arg("--db").arg(plan.out.join("bench.db"));
    command.arg("--json").arg(point_json(plan, point));
    command
}

fn point_json(plan: &Plan, point: &Point) -> PathBuf {
    plan.out.join(format!("{}-p{}.json", point.dataset, point.parallel))
}

fn run_point(command: &mut Command, plan: &Plan, point: &Point, interrupt: &Interrupt) -> Result<Vec<Value>> {
    child::run_ok(command, interrupt, "ember-bench perf")?;
    read_results(&point_json(plan, point))
}

/// The array of results that `ember-bench perf --json` wrote.
pub fn read_results(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("ember-bench wrote no {}", path.display()))?;
    match serde_json::from_str(&text).with_context(|| path.display().to_string())? {
        Value::Array(rows) if !rows.is_empty() => Ok(rows),
        _ => bail!("{} is not an array of results", path.display()),
    }
}

fn write_summary(out: &Path, about: &Value, results: &[Value]) -> Result<()> {
    let text = summary_table(results);
    let summary = json!({ "about": about, "results": results });
    fs::write(out.join("summary.json"), serde_json::to_string_pretty(&summary)? + "\n")?;
    let is_synthetic = results.iter().any(|it| it["synthetic"] == json!(true));
    let note = if is_synthetic { "\nPrompts are synthetic, with the dataset's length statistics.\n" } else { "" };
    fs::write(out.join("summary.md"), format!("{text}{note}"))?;
    println!("\n{text}{note}\nresults: {}", out.display());
    Ok(())
}

/// One row per result; times in milliseconds.
fn summary_table(results: &[Value]) -> String {
    let header = [
        "dataset",
        "parallel",
        "requests",
        "failed",
        "in tok",
        "out tok",
        "output tok/s",
        "input tok/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "ITL p99",
        "latency p50",
    ];
    let row = |it: &Value| {
        let number = |pointer: &str, scale: f64, n_digits: usize| match it.pointer(pointer).and_then(Value::as_f64) {
            Some(value) => format!("{:.n_digits$}", value * scale),
            None => "-".to_owned(),
        };
        vec![
            it["dataset"].as_str().unwrap_or("?").to_owned(),
            number("/parallel", 1.0, 0),
            number("/total_requests", 1.0, 0),
            number("/failed", 1.0, 0),
            number("/avg_input_tokens", 1.0, 0),
            number("/avg_output_tokens", 1.0, 0),
            number("/output_tok_s", 1.0, 1),
            number("/input_tok_s", 1.0, 1),
            number("/percentiles/ttft/p50", 1e3, 0),
            number("/percentiles/ttft/p99", 1e3, 0),
            number("/percentiles/tpot/p50", 1e3, 1),
            number("/percentiles/itl/p99", 1e3, 1),
            number("/percentiles/latency/p50", 1e3, 0),
        ]
    };
    table::markdown(&header, &results.iter().map(row).collect::<Vec<_>>())
}

/// `20261124-121503`, in UTC.
fn timestamp() -> Result<String> {
    let output = Command::new("date").args(["-u", "+%Y%m%d-%H%M%S"]).output().context("cannot run date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn plan(flags: &str) -> Plan {
        let words = std::iter::once("bench").chain(flags.split_whitespace());
        Plan::new(&Cli::try_parse_from(words).unwrap().args).unwrap()
    }

    #[test]
    fn cpu_defaults_are_small_and_cover_the_parallelism() {
        let plan = plan("--parallel 1,128");
        let numbers: Vec<_> = plan.points.iter().map(|it| (it.dataset.as_str(), it.parallel, it.number)).collect();
        assert_eq!(numbers, [("openqa", 1, 8), ("openqa", 128, 128), ("longalpaca", 1, 8), ("longalpaca", 128, 128)]);
        assert_eq!((plan.max_tokens, plan.max_prompt_length), (64, 20_000));
    }

    #[test]
    fn gpu_and_url_have_larger_defaults_and_flags_win() {
        let gpu = plan("--gpu 0 --parallel 128 --dataset openqa");
        assert_eq!((gpu.points[0].number, gpu.max_tokens), (640, 512));
        let url = plan("--framework url=http://127.0.0.1:9 --number 3 --max-tokens 7 --max-prompt-length 9");
        assert_eq!((url.points[0].number, url.max_tokens, url.max_prompt_length), (3, 7, 9));
    }

    #[test]
    fn framework_is_checked() {
        assert_eq!(parse_framework("self"), Ok(Framework::Own));
        for bad in ["vllm", "url=", "url=localhost:8000", "self=1"] {
            assert!(parse_framework(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unknown_model_names_the_flag_or_the_choices() {
        let err = resolve_model("./no/such.gguf").unwrap_err().to_string();
        assert!(err.contains("--model"), "{err}");
        let err = resolve_model("gpt9").unwrap_err().to_string();
        assert!(err.contains("smollm2"), "{err}");
    }

    #[test]
    fn missing_figures_show_as_dashes_and_seconds_become_milliseconds() {
        let result = json!({
            "dataset": "openqa", "parallel": 8, "total_requests": 8, "failed": 0, "avg_output_tokens": 63.6,
            "output_tok_s": 101.25, "percentiles": { "ttft": { "p50": 0.25, "p99": null } },
        });
        let text = summary_table(&[result]);
        let cells: Vec<_> = text.lines().nth(2).unwrap().split('|').map(str::trim).collect();
        assert_eq!(cells[1..10], ["openqa", "8", "8", "0", "-", "64", "101.2", "-", "250"]);
        assert_eq!(cells[10], "-");
    }
}

//! The `ember-bench` binary: parses the command line and turns the outcome into an exit status.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use ember_bench::cli::{Cli, Command, PerfArgs};
use ember_bench::config::Config;
use ember_bench::{perf, report};
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    match cli.command {
        Command::Perf(args) => runtime.block_on(run_perf(*args)),
        Command::Report(args) => {
            runtime.block_on(report::command(&args))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn run_perf(args: PerfArgs) -> anyhow::Result<ExitCode> {
    let default_level = if args.debug { "ember_bench=debug" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    if args.wandb_api_key.is_some() {
        eprintln!("--wandb-api-key: experiment tracking comes later; the run goes on without it");
    }
    let config = Config::new(args)?;
    let allow_failures = config.allow_failures;
    let reports = perf::command(config).await?;
    let failed = reports.iter().any(|report| report.summary.failed > 0 || report.summary.interrupted);
    Ok(if failed && !allow_failures { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

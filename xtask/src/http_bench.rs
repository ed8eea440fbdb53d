//! `cargo xtask http-bench`: what the HTTP layer alone bears, the load generator on the same machine included.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::bench::{build_release, read_results};
use crate::child::{self, Interrupt, Server};
use crate::{table, target_dir};

const READY_LIMIT: Duration = Duration::from_secs(10);

/// One load and the figure that it must reach on two cores.
struct Load {
    name: &'static str,
    path: &'static str,
    /// Of the server.
    server_flags: &'static [&'static str],
    flags: &'static [&'static str],
    /// In the results of `ember-bench perf --json`.
    figure: &'static str,
    least: f64,
}

const LOADS: &[Load] = &[
    Load {
        name: "whole completions/s (16 tokens)",
        path: "/v1/completions",
        server_flags: &[],
        flags: &["--no-stream", "--max-tokens", "16", "--parallel", "32", "--number", "50000"],
        figure: "qps",
        least: 5_000.0,
    },
    Load {
        name: "streamed tokens/s (256 a completion)",
        path: "/v1/completions",
        server_flags: &[],
        flags: &["--stream", "--max-tokens", "256", "--parallel", "32", "--number", "10000"],
        figure: "output_tok_s",
        least: 100_000.0,
    },
    Load {
        name: "streamed tokens/s (256 a chat answer)",
        path: "/v1/chat/completions",
        server_flags: &[],
        flags: &["--stream", "--max-tokens", "256", "--parallel", "32", "--number", "10000"],
        figure: "output_tok_s",
        least: 100_000.0,
    },
    Load {
        name: "the same, each token written alone",
        path: "/v1/chat/completions",
        server_flags: &["--one-by-one"],
        flags: &["--stream", "--max-tokens", "256", "--parallel", "32", "--number", "5000"],
        figure: "output_tok_s",
        least: 100_000.0,
    },
];

#[derive(Args)]
pub struct HttpBenchArgs {
    /// Run the binaries in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

pub fn run(args: &HttpBenchArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None => build_release(&["ember-stub", "ember-bench"], false, &interrupt)?,
    };
    let out = target_dir().join("http-bench");
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let mut rows = Vec::new();
    let mut n_short = 0;
    for load in LOADS {
        let mut stub = Command::new(bin_dir.join("ember-stub"));
        stub.args(load.server_flags);
        let server = Server::start(stub, &out.join("server.log"), READY_LIMIT, &interrupt)?;
        let json = out.join("result.json");
        let mut command = Command::new(bin_dir.join("ember-bench"));
        command.args(["perf", "--url", &format!("http://127.0.0.1:{}{}", server.port, load.path)]);
        command
            .args(["--model", "default", "--dataset", "openqa", "--warmup", "200", "--log-every-n-query", "100000"])
            .args(load.flags);
        // A database of its own: rows of earlier runs cost time.
        let db = out.join("bench.db");
        let _ = std::fs::remove_file(&db);
        command.arg("--db").arg(db).arg("--json").arg(&json);
        child::run_ok(&mut command, &interrupt, load.name)?;
        server.stop()?;
        let results = read_results(&json)?;
        let reached = results[0][load.figure].as_f64().with_context(|| format!("no {} in the results", load.figure))?;
        n_short += usize::from(reached < load.least);
        rows.push(vec![load.name.to_owned(), format!("{reached:.0}"), format!("{:.0}", load.least)]);
    }
    println!("\n{}", table::markdown(&["load", "reached", "bar"], &rows));
    if n_short > 0 {
        bail!("{n_short} loads are below their bar");
    }
    Ok(())
}

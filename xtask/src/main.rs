//! The project's own commands (`cargo xtask …`). Runs the built binaries; links none of the workspace's crates.

mod bench;
mod child;
mod ci;
mod clients;
mod dummy_model;
mod fuzz;
mod gpu_check;
mod gpu_pack;
mod head_of_line;
mod http_bench;
mod kernels;
mod model;
mod pypi;
mod sanitizer;
mod soak;
mod table;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Ember's development commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build server and load generator, fetch the model, measure, and write tables.
    Bench(bench::BenchArgs),
    /// Run strangers' clients, schemathesis and a browser against the built server.
    Clients(clients::ClientsArgs),
    /// Run every check that a change must pass, cheapest first.
    Ci(ci::CiArgs),
    /// Run the fuzz targets, each for a while.
    Fuzz(fuzz::FuzzArgs),
    /// Measure how much long prompts hold up the streams beside them.
    HeadOfLine(head_of_line::HeadOfLineArgs),
    /// Measure the HTTP layer over an engine that answers at once.
    HttpBench(http_bench::HttpBenchArgs),
    /// Fetch a small real model into the cache folder and print its path.
    Model(model::ModelArgs),
    /// Compile every CUDA kernel for each supported architecture; needs no GPU and no CUDA installation.
    Kernels(kernels::KernelsArgs),
    /// Put a server under mixed load for a long time: nothing may fail or leak.
    Soak(soak::SoakArgs),
    /// Build and pack what a GPU machine without a Rust toolchain needs.
    GpuPack(gpu_pack::GpuPackArgs),
    /// On a GPU machine: correctness, sanitizer and speed in one run, one table.
    GpuCheck(gpu_check::GpuCheckArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Bench(args) => bench::run(&args),
        Command::Ci(args) => ci::run(&args),
        Command::Clients(args) => clients::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::HeadOfLine(args) => head_of_line::run(&args),
        Command::HttpBench(args) => http_bench::run(&args),
        Command::Model(args) => model::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::GpuPack(args) => gpu_pack::run(&args),
        Command::GpuCheck(args) => gpu_check::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root folder.
fn project_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// The cargo that runs this program.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// Cargo's target folder, wherever CARGO_TARGET_DIR or a configuration file has put it: the one this program is in.
fn target_dir() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    match this.ancestors().find(|it| it.join("CACHEDIR.TAG").is_file()) {
        Some(dir) => dir.to_path_buf(),
        None => project_root().join("target"),
    }
}

/// `$XDG_CACHE_HOME/ember`, else `~/.cache/ember`.
fn cache_dir() -> anyhow::Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|it| !it.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => match std::env::var_os("HOME").filter(|it| !it.is_empty()) {
            Some(home) => PathBuf::from(home).join(".cache"),
            None => anyhow::bail!("neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder to use"),
        },
    };
    Ok(base.join("ember"))
}

//! The project's own commands (`cargo xtask …`). Runs the built binaries; links none of the workspace's crates.

mod kernels;
mod model;
mod pypi;
mod table;

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
    /// Fetch a small real model into the cache folder and print its path.
    Model(model::ModelArgs),
    /// Compile every CUDA kernel for each supported architecture; needs no GPU and no CUDA installation.
    Kernels(kernels::KernelsArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Model(args) => model::run(&args),
        Command::Kernels(args) => kernels::run(&args),
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
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
}

/// `$XDG_CACHE_HOME/ember`, else `~/.cache/ember`.
fn cache_dir() -> anyhow::Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|it| !it.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => match std::env::var_os("HOME").filter(|it| !it.is_empty()) {
            Some(home) => PathBuf::from(home).join(".cache"),
            None => anyhow::bail!(
                "neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder to use"
            ),
        },
    };
    Ok(base.join("ember"))
}

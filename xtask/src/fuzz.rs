//! `cargo xtask fuzz`: runs fuzz targets under libFuzzer, on the stable compiler.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::child::{self, Interrupt};
use crate::{cargo, project_root, table, target_dir};

/// Folder of the package, which has the targets' inputs in `corpus`.
const PACKAGE: &str = "xtask/fuzz";
/// What one input may take before it counts as a hang, and before it counts as a leak.
const LIMITS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=3000"];

#[derive(Args)]
pub struct FuzzArgs {
    /// Only these targets: folders of xtask/fuzz/corpus.
    #[arg(long, value_delimiter = ',')]
    target: Vec<String>,
    /// For each target.
    #[arg(long, default_value_t = 600)]
    seconds: u32,
}

pub fn run(args: &FuzzArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let known = targets()?;
    if let Some(name) = args.target.iter().find(|it| !known.contains(it)) {
        bail!("--target {name}: no such target; known: {}", known.join(", "));
    }
    let mut build = Command::new(cargo());
    build.current_dir(project_root()).args(["build", "--release", "-p", "ember-fuzz", "--features", "libfuzzer"]);
    // Only the workspace's own crates are instrumented: those of others stay as built.
    build.env("RUSTC_WORKSPACE_WRAPPER", project_root().join(PACKAGE).join("rustc.sh"));
    child::run_ok(&mut build, &interrupt, "the build")?;

    let mut rows = Vec::new();
    for name in known.iter().filter(|it| args.target.is_empty() || args.target.contains(it)) {
        // What is found goes to a folder that is kept, so that the next run starts from it.
        let found = target_dir().join("fuzz").join(name);
        fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
        let mut command = Command::new(target_dir().join("release/ember-fuzz"));
        command.env("EMBER_FUZZ_TARGET", name).args(LIMITS);
        command.args([&format!("-max_total_time={}", args.seconds), "-print_final_stats=1"]);
        command.arg(format!("-artifact_prefix={}/crash-", target_dir().join("fuzz").display()));
        command.arg(&found).arg(project_root().join(PACKAGE).join("corpus").join(name));
        let status = child::run(&mut command, &interrupt)?;
        rows.push(vec![name.clone(), if status.success() { "clean" } else { "FAILED" }.to_owned()]);
    }
    println!("\n{}", table::markdown(&["target", "result"], &rows));
    if rows.iter().any(|it| it[1] != "clean") {
        bail!("inputs that failed are in {}", target_dir().join("fuzz").display());
    }
    Ok(())
}

/// The targets are the folders of the corpus.
fn targets() -> Result<Vec<String>> {
    let corpus = project_root().join(PACKAGE).join("corpus");
    let entries = fs::read_dir(&corpus).with_context(|| corpus.display().to_string())?;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

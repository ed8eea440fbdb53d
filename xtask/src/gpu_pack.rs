//! `cargo xtask gpu-pack`: what a GPU machine without a Rust toolchain needs, in one folder.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::bench::build_release;
use crate::child::{self, Interrupt};
use crate::project_root;

#[derive(Args)]
pub struct GpuPackArgs {
    /// The pack's folder. Default: .gpu in the checkout.
    #[arg(long)]
    out: Option<PathBuf>,
}

const BINARIES: &[&str] = &["ember", "ember-bench", "xtask"];

const RUN_SCRIPT: &str = r#"#!/usr/bin/env bash
# Unpacks the binaries beside this script and checks the GPU: correctness, sanitizer, speed.
# Arguments go to the check; `run.sh --help` lists them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${EMBER_GPU_BIN:-$here/bin}
mkdir -p "$bin"
for packed in "$here"/*.gz; do
    binary=$bin/$(basename "$packed" .gz)
    if [ ! -x "$binary" ] || [ "$packed" -nt "$binary" ]; then
        gzip -dc "$packed" >"$binary.part"
        chmod +x "$binary.part"
        mv "$binary.part" "$binary"
    fi
done
if [ -z "${CUDA_PATH:-}" ] && [ -d /usr/local/cuda ]; then
    export CUDA_PATH=/usr/local/cuda
fi
exec "$bin/xtask" gpu-check --bin-dir "$bin" "$@"
"#;

pub fn run(args: &GpuPackArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let bin_dir = build_release(&["ember-server", "ember-bench", "xtask"], true, &interrupt)?;
    let out = args.out.clone().unwrap_or_else(|| project_root().join(".gpu"));
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    for name in BINARIES {
        // The release profile strips already.
        let packed = out.join(format!("{name}.gz"));
        let file = fs::File::create(&packed).with_context(|| format!("cannot create {}", packed.display()))?;
        let mut gzip = Command::new("gzip");
        gzip.args(["-9", "-n", "-c"]).arg(bin_dir.join(name)).stdout(file);
        child::run_ok(&mut gzip, &interrupt, "gzip")?;
        println!("{:>9} KiB  {}", packed.metadata()?.len() / 1024, packed.display());
    }
    let script = out.join("run.sh");
    fs::write(&script, RUN_SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    println!("copy {} to the GPU machine and run {} there", out.display(), script.display());
    Ok(())
}

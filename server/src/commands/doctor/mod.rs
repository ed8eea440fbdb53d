//! `ember doctor`: says what this machine has for serving, and what to install.

mod cuda;
mod gpu_test;
mod host;

use std::{io::Write, process::ExitCode};

use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use ember_engine::DeviceChoice;
use serde::Serialize;

use super::engine_args::{check_device, parse_device};
use crate::Error;

/// Width of the table in characters.
const WIDTH: u16 = 110;

/// Options of `ember doctor`, as typed.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Exit with an error unless this device can serve: auto, cpu, cuda or cuda:N. cuda and cuda:N are tested, too:
    /// kernels, a tiny model against float32 on the CPU, memory bandwidth and matrix products.
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,

    /// One JSON object instead of the table.
    #[arg(long)]
    pub json: bool,
}

/// One thing that was looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked for.
    pub item: &'static str,
    /// What is there; empty if nothing.
    pub found: String,
    /// What to do about it, if something is missing.
    pub remedy: Option<String>,
}

impl Finding {
    fn found(item: &'static str, found: impl Into<String>) -> Self {
        Self { item, found: found.into(), remedy: None }
    }

    fn missing(item: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { item, found: found.into(), remedy: Some(remedy.into()) }
    }
}

#[derive(Serialize)]
struct Report {
    findings: Vec<Finding>,
    /// Devices that this build can serve on, as `--device` takes them.
    usable_devices: Vec<String>,
}

/// Looks and prints.
///
/// # Errors
/// [`Error::Config`] if the device that was asked for cannot serve.
pub fn run(args: &DoctorArgs) -> Result<ExitCode, Error> {
    let cuda = cuda::probe();
    let mut findings = host::findings();
    findings.push(build_finding());
    findings.extend(cuda.findings);
    let mut usable_devices = vec!["cpu".to_owned()];
    if cfg!(feature = "cuda") && cuda.is_complete {
        usable_devices.extend((0..cuda.n_devices).map(|idx| format!("cuda:{idx}")));
    }
    let wanted = match args.device {
        DeviceChoice::Cuda(idx) if usable_devices.contains(&format!("cuda:{idx}")) => Some(idx),
        _ => None,
    };
    let tested = wanted.map(gpu_test::findings);
    findings.extend(tested.iter().flatten().cloned());
    let report = Report { findings, usable_devices };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report).map_err(std::io::Error::from)?)?;
    } else {
        writeln!(out, "{}\n\nEmber can serve on: {}", table(&report), report.usable_devices.join(", "))?;
    }
    check_device(args.device)?;
    if let DeviceChoice::Cuda(idx) = args.device
        && !report.usable_devices.contains(&format!("cuda:{idx}"))
    {
        return Err(Error::config("--device", format!("cuda:{idx} cannot serve here; see what is missing above")));
    }
    if tested.iter().flatten().any(|finding| finding.remedy.is_some()) {
        return Err(Error::config("--device", "the device's self-test failed; see above"));
    }
    Ok(ExitCode::SUCCESS)
}

fn build_finding() -> Finding {
    let version = env!("CARGO_PKG_VERSION");
    if cfg!(feature = "cuda") {
        Finding::found("ember", format!("{version}, with CUDA"))
    } else {
        Finding::missing(
            "ember",
            format!("{version}, CPU only"),
            "for NVIDIA GPUs build with `cargo build --release -p ember-server --features cuda`",
        )
    }
}

fn table(report: &Report) -> Table {
    let mut table = Table::new();
    table.set_width(WIDTH);
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["item", "found", "to do"]);
    for finding in &report.findings {
        let found = if finding.found.is_empty() { "not found" } else { &finding.found };
        table.add_row([finding.item, found, finding.remedy.as_deref().unwrap_or("-")]);
    }
    table
}

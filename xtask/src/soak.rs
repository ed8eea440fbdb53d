//! `cargo xtask soak`: a server under mixed load for a long time. Nothing may fail, nothing may leak.

mod client;

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::bench::build_release;
use crate::child::{Interrupt, Server, http_get};
use crate::{model, table, target_dir};

use client::{Client, Tally};

const READY_LIMIT: Duration = Duration::from_secs(120);
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);
/// Part of the time in which memory may grow: caches fill.
const WARM_UP: f64 = 0.25;
const MAX_MIB_PER_MINUTE: f64 = 1.0;
/// So small that it is in use as a whole after the warm-up.
const KV_CACHE: &str = "96M";
/// How long pages may stay in use after the last client has gone.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct SoakArgs {
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    #[arg(long, default_value_t = 64)]
    clients: u32,
    /// Run the binary in this folder instead of building it.
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

/// Resident memory at one time.
struct Sample {
    minutes: f64,
    mib: f64,
}

pub fn run(args: &SoakArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let bin_dir = match &args.bin_dir {
        Some(dir) => dir.clone(),
        None => build_release(&["ember-server"], false, &interrupt)?,
    };
    let out = target_dir().join("soak");
    std::fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let mut command = Command::new(bin_dir.join("ember"));
    command.arg("serve").arg(model::fetch("smollm2")?).args(["--served-model-name", "smollm2", "--device", "cpu"]);
    // Fewer places than clients: some wait. Requests that wait for long are not failed ones.
    command.args(["--max-num-seqs", "32", "--max-model-len", "4096", "--kv-cache-memory-bytes", KV_CACHE]);
    let mut server = Server::start(command, &out.join("server.log"), READY_LIMIT, &interrupt)?;

    let start = Instant::now();
    let end = Duration::from_secs_f64(args.minutes * 60.0);
    let is_over = AtomicBool::new(false);
    let tally = Mutex::new(Tally::default());
    let mut samples = Vec::new();
    let watched: Result<()> = std::thread::scope(|scope| {
        for number in 0..args.clients {
            let (is_over, tally, port) = (&is_over, &tally, server.port);
            scope.spawn(move || {
                let mut client = Client::new(port, number);
                while !is_over.load(Ordering::Relaxed) {
                    let outcome = client.turn();
                    tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(outcome);
                }
            });
        }
        let mut watch = || -> Result<()> {
            while start.elapsed() < end {
                sleep(SAMPLE_INTERVAL);
                interrupt.check()?;
                server.check_alive()?;
                samples.push(Sample { minutes: start.elapsed().as_secs_f64() / 60.0, mib: server.resident_mib()? });
            }
            Ok(())
        };
        let watched = watch();
        is_over.store(true, Ordering::Relaxed);
        watched
    });
    watched?;
    let leftovers = settle(server.port)?;
    server.stop()?;
    write_samples(&out.join("resident.csv"), &samples)?;
    let warm = &samples[(samples.len() as f64 * WARM_UP) as usize..];
    let slope = slope(warm).context("too few samples: give more --minutes")?;
    let tally = tally.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut rows = tally.rows();
    rows.push(vec!["resident MiB after the warm-up, at the end".into(), ends(warm)]);
    rows.push(vec!["growth after the warm-up, MiB a minute".into(), format!("{slope:.3}")]);
    rows.push(vec!["sequences and pages in use at the end".into(), leftovers.to_string()]);
    println!("{}", table::markdown(&["soak", "figure"], &rows));
    for failure in &tally.failures {
        eprintln!("failed: {failure}");
    }
    if !tally.failures.is_empty() || slope >= MAX_MIB_PER_MINUTE || leftovers > 0.0 {
        bail!("the server did not hold: see the table above and {}", out.display());
    }
    Ok(())
}

/// What is still in use once nobody asks for anything: running and waiting sequences and the share of pages.
fn settle(port: u16) -> Result<f64> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        let (_, text) = http_get(port, "/metrics")?;
        let names = ["vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{"];
        let values = names.map(|name| {
            let line =
                text.lines().find(|it| it.starts_with(name)).with_context(|| format!("/metrics has no {name}"))?;
            line.rsplit(' ').next().and_then(|it| it.parse::<f64>().ok()).with_context(|| format!("no number: {line}"))
        });
        let mut in_use = 0.0;
        for value in values {
            in_use += value?;
        }
        if in_use == 0.0 || Instant::now() > deadline {
            return Ok(in_use);
        }
        sleep(Duration::from_millis(100));
    }
}

/// By least squares, in MiB a minute.
fn slope(samples: &[Sample]) -> Option<f64> {
    let n = samples.len() as f64;
    let (mean_x, mean_y) =
        (samples.iter().map(|it| it.minutes).sum::<f64>() / n, samples.iter().map(|it| it.mib).sum::<f64>() / n);
    let covariance: f64 = samples.iter().map(|it| (it.minutes - mean_x) * (it.mib - mean_y)).sum();
    let variance: f64 = samples.iter().map(|it| (it.minutes - mean_x).powi(2)).sum();
    (variance > 0.0).then(|| covariance / variance)
}

fn ends(samples: &[Sample]) -> String {
    match (samples.first(), samples.last()) {
        (Some(first), Some(last)) => format!("{:.1}, {:.1}", first.mib, last.mib),
        _ => "-".to_owned(),
    }
}

fn write_samples(path: &std::path::Path, samples: &[Sample]) -> Result<()> {
    use std::io::Write;
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    writeln!(file, "minutes,resident_mib")?;
    for Sample { minutes, mib } in samples {
        writeln!(file, "{minutes:.3},{mib:.2}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_the_line_through_the_samples() {
        let line = |rate: f64| -> Vec<_> {
            (0..20).map(|i| Sample { minutes: f64::from(i) / 2.0, mib: 100.0 + rate * f64::from(i) / 2.0 }).collect()
        };
        assert!((slope(&line(1.5)).unwrap() - 1.5).abs() < 1e-9);
        assert!(slope(&line(0.0)).unwrap().abs() < 1e-9);
        let mut noisy = line(0.0);
        noisy.iter_mut().step_by(2).for_each(|it| it.mib += 4.0);
        assert!(slope(&noisy).unwrap().abs() < 0.5);
        assert_eq!(slope(&line(1.0)[..1]), None);
    }
}

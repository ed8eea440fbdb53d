//! [`Sanitizer`]: the kernel tests under NVIDIA's compute-sanitizer, as many parts of them side by side as there are cores.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::child::{Interrupt, run_within};

/// For a part. The tool slows some kernels down a thousandfold.
const LIMIT: Duration = Duration::from_secs(540);

/// One of the tools, and what it watches.
pub struct Sanitizer {
    pub program: PathBuf,
    /// `memcheck`, `racecheck`, ...
    pub tool: &'static str,
    pub ember: PathBuf,
    /// Which GPU.
    pub gpu: u32,
}

impl Sanitizer {
    /// Runs every part of `ember cuda-test` in a process of its own, with its output in a file of `logs`, and tells how it
    /// went. One that fails, or does not end, is an error once all have ended.
    pub fn run(&self, logs: &Path, interrupt: &Interrupt) -> Result<()> {
        fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let parts = self.parts()?;
        let (waiting, n_failed) = (Mutex::new(parts.iter().enumerate()), Mutex::new(0));
        let next = || waiting.lock().expect("no thread panics").next();
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while let Some((i, part)) = next() {
                        let verdict = self.watch(part, &logs.join(format!("{i}.log")), interrupt);
                        *n_failed.lock().expect("no thread panics") += usize::from(verdict.is_err());
                        println!("{part:<56} {}", verdict.unwrap_or_else(|err| format!("FAILED: {err:#}")));
                    }
                });
            }
        });
        interrupt.check()?;
        let n_failed = n_failed.into_inner().expect("no thread panics");
        ensure!(n_failed == 0, "{} failed for {n_failed} of {} parts of the kernel tests", self.tool, parts.len());
        Ok(())
    }

    fn parts(&self) -> Result<Vec<String>> {
        let output = Command::new(&self.ember).args(["cuda-test", "--list"]).output();
        let output = output.with_context(|| format!("cannot start {}", self.ember.display()))?;
        let parts: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
        ensure!(output.status.success() && !parts.is_empty(), "`ember cuda-test --list` names nothing");
        Ok(parts)
    }

    /// Runs one part; the tool's last line.
    fn watch(&self, part: &str, log: &Path, interrupt: &Interrupt) -> Result<String> {
        let started = Instant::now();
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = Command::new(&self.program);
        command.args(["--tool", self.tool, "--error-exitcode", "9", "--print-limit", "20"]);
        command.arg(&self.ember).args(["cuda-test", "--only", part]);
        command.env("CUDA_VISIBLE_DEVICES", self.gpu.to_string()).stderr(file.try_clone()?).stdout(file);
        match run_within(&mut command, LIMIT, interrupt)? {
            None => bail!("it did not end within {} s ({})", LIMIT.as_secs(), log.display()),
            Some(status) if !status.success() => bail!("{status} ({})", log.display()),
            Some(_) => {}
        }
        let text = fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))?;
        let summary = text.lines().rfind(|line| line.contains("SUMMARY")).context("the tool says no summary")?;
        Ok(format!("{} ({} s)", summary.trim_start_matches(['=', ' ']), started.elapsed().as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sanitizer whose program and `ember` are one shell script.
    fn scripted(dir: &Path, script: &str) -> Sanitizer {
        use std::os::unix::fs::PermissionsExt;
        let program = dir.join("tool");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).expect("a script");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("its mode");
        Sanitizer { ember: program.clone(), program, tool: "memcheck", gpu: 0 }
    }

    #[test]
    fn every_part_is_watched_and_one_failure_is_told() -> Result<()> {
        let dir = xshell::Shell::new()?.create_temp_dir()?;
        let interrupt = Interrupt::install()?;
        let list = "[ \"$2\" = --list ] && { echo one; echo two; exit 0; }";
        let clean = scripted(dir.path(), &format!("{list}\necho '========= ERROR SUMMARY: 0 errors'"));
        clean.run(&dir.path().join("clean"), &interrupt)?;
        assert_eq!(fs::read_dir(dir.path().join("clean"))?.count(), 2);
        let broken = format!("{list}\n[ \"${{10}}\" = two ] && exit 9\necho '========= ERROR SUMMARY: 0 errors'");
        let err = scripted(dir.path(), &broken).run(&dir.path().join("broken"), &interrupt).expect_err("an error");
        assert_eq!(err.to_string(), "memcheck failed for 1 of 2 parts of the kernel tests");
        Ok(())
    }
}

//! [`Sanitizer`]: the kernel tests under NVIDIA's compute-sanitizer, their groups side by side.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::child::{Interrupt, run_within};

/// For a group. The tool slows some kernels down a thousandfold.
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
    /// Runs every group of `ember cuda-test` in a process of its own, with its output in a file of `logs`, and tells how
    /// each went. One that fails, or does not end, is an error once all have ended.
    pub fn run(&self, logs: &Path, interrupt: &Interrupt) -> Result<()> {
        fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let groups = self.groups()?;
        let verdicts: Vec<Result<String>> = thread::scope(|scope| {
            let watched: Vec<_> = groups
                .iter()
                .enumerate()
                .map(|(i, group)| scope.spawn(move || self.watch(group, &logs.join(format!("{i}.log")), interrupt)))
                .collect();
            watched.into_iter().map(|it| it.join().expect("watching a group does not panic")).collect()
        });
        let mut n_failed = 0;
        for (group, verdict) in groups.iter().zip(verdicts) {
            n_failed += usize::from(verdict.is_err());
            println!("{group:<32} {}", verdict.unwrap_or_else(|err| format!("FAILED: {err:#}")));
        }
        interrupt.check()?;
        ensure!(n_failed == 0, "{} failed for {n_failed} of {} groups of kernel tests", self.tool, groups.len());
        Ok(())
    }

    fn groups(&self) -> Result<Vec<String>> {
        let output = Command::new(&self.ember).args(["cuda-test", "--list"]).output();
        let output = output.with_context(|| format!("cannot start {}", self.ember.display()))?;
        let groups: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
        ensure!(output.status.success() && !groups.is_empty(), "`ember cuda-test --list` names no groups");
        Ok(groups)
    }

    /// Runs one group; the tool's last line.
    fn watch(&self, group: &str, log: &Path, interrupt: &Interrupt) -> Result<String> {
        let started = Instant::now();
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = Command::new(&self.program);
        command.args(["--tool", self.tool, "--error-exitcode", "9", "--print-limit", "20"]);
        command.arg(&self.ember).args(["cuda-test", "--only", group]);
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
    fn every_group_is_watched_and_one_failure_is_told() -> Result<()> {
        let dir = xshell::Shell::new()?.create_temp_dir()?;
        let interrupt = Interrupt::install()?;
        let list = "[ \"$2\" = --list ] && { echo one; echo two; exit 0; }";
        let clean = scripted(dir.path(), &format!("{list}\necho '========= ERROR SUMMARY: 0 errors'"));
        clean.run(&dir.path().join("clean"), &interrupt)?;
        assert_eq!(fs::read_dir(dir.path().join("clean"))?.count(), 2);
        let broken = format!("{list}\n[ \"${{10}}\" = two ] && exit 9\necho '========= ERROR SUMMARY: 0 errors'");
        let err = scripted(dir.path(), &broken).run(&dir.path().join("broken"), &interrupt).expect_err("an error");
        assert_eq!(err.to_string(), "memcheck failed for 1 of 2 groups of kernel tests");
        Ok(())
    }
}

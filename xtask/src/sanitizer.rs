//! [`Sanitizer`]: the kernel tests under NVIDIA's compute-sanitizer, as many parts of them side by side as there are cores.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::child::{Interrupt, run_within};

/// For parts that share a process. The tool slows some kernels down a thousandfold.
const LIMIT: Duration = Duration::from_secs(1800);
/// Most parts of a model in one process: its start costs as much as some parts, and all cores should have work.
const MOST_PARTS: usize = 6;
/// Hazards that racecheck leaves room for. It goes through all of the room after each launch: three times as long with
/// its default, ten million.
const MOST_HAZARDS: (&str, &str) = ("NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS", "10000");
/// Of racecheck: cuBLASLt's kernels fail under it, and as many threads of its own as there are cores hold up the other
/// processes.
const RACECHECK_ARGS: [&str; 4] = ["--kernel-name-exclude", "kns=nvjet", "--racecheck-num-workers", "2"];

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
    /// Runs every part of `ember cuda-test`, briefly, a few of a model in each process, with their output in a file of
    /// `logs`, and tells how it went. One that fails, or does not end, is an error once all have ended.
    pub fn run(&self, logs: &Path, interrupt: &Interrupt) -> Result<()> {
        fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let parts = self.parts()?;
        let of_models: Vec<&[String]> = parts.chunk_by(|a, b| model_of(a) == model_of(b)).collect();
        let groups: Vec<&[String]> = of_models.iter().flat_map(|parts| parts.chunks(MOST_PARTS)).collect();
        let (waiting, n_failed) = (Mutex::new(groups.iter().enumerate()), Mutex::new(0));
        let next = || waiting.lock().expect("no thread panics").next();
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while let Some((i, group)) = next() {
                        let verdict = self.watch(group, &logs.join(format!("{i}.log")), interrupt);
                        *n_failed.lock().expect("no thread panics") += usize::from(verdict.is_err());
                        println!("{}", group.join("\n"));
                        println!("    {}", verdict.unwrap_or_else(|err| format!("FAILED: {err:#}")));
                    }
                });
            }
        });
        interrupt.check()?;
        let n_failed = n_failed.into_inner().expect("no thread panics");
        ensure!(n_failed == 0, "{} failed in {n_failed} of {} processes of kernel tests", self.tool, groups.len());
        Ok(())
    }

    fn parts(&self) -> Result<Vec<String>> {
        let output = Command::new(&self.ember).args(["cuda-test", "--list"]).output();
        let output = output.with_context(|| format!("cannot start {}", self.ember.display()))?;
        let parts: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
        ensure!(output.status.success() && !parts.is_empty(), "`ember cuda-test --list` names nothing");
        Ok(parts)
    }

    /// Runs some parts; the tool's last line.
    fn watch(&self, parts: &[String], log: &Path, interrupt: &Interrupt) -> Result<String> {
        let started = Instant::now();
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = Command::new(&self.program);
        command.args(["--tool", self.tool, "--error-exitcode", "9", "--print-limit", "20"]);
        if self.tool == "racecheck" {
            command.args(RACECHECK_ARGS).env(MOST_HAZARDS.0, MOST_HAZARDS.1);
        }
        command.arg(&self.ember).args(["cuda-test", "--brief"]);
        for part in parts {
            command.args(["--only", part]);
        }
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

/// What comes before the colon of a part's name.
fn model_of(part: &str) -> &str {
    part.split_once(':').map_or(part, |(model, _)| model)
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
        let list = "[ \"$2\" = --list ] && { seq -f 'llama: %g' 8; echo 'qwen2: one'; echo experts; exit 0; }";
        let clean = scripted(dir.path(), &format!("{list}\necho \"$@\"\necho '========= ERROR SUMMARY: 0 errors'"));
        clean.run(&dir.path().join("clean"), &interrupt)?;
        let logs = |i| fs::read_to_string(dir.path().join(format!("clean/{i}.log")));
        let logs = [logs(0)?, logs(1)?, logs(2)?, logs(3)?];
        assert!(logs[0].contains("cuda-test --brief --only llama: 1 --only llama: 2 "), "{}", logs[0]);
        assert!(logs[1].contains("--brief --only llama: 7 --only llama: 8\n"), "{}", logs[1]);
        assert!(logs[2].contains("--only qwen2: one\n") && logs[3].contains("--only experts\n"), "{logs:?}");
        let broken = format!("{list}\n[ \"${{11}}\" = experts ] && exit 9\necho '========= ERROR SUMMARY: 0 errors'");
        let err = scripted(dir.path(), &broken).run(&dir.path().join("broken"), &interrupt).expect_err("an error");
        assert_eq!(err.to_string(), "memcheck failed in 1 of 4 processes of kernel tests");
        Ok(())
    }
}

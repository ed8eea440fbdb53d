//! [`Sanitizer`]: the kernel tests under NVIDIA's compute-sanitizer, several parts of them side by side.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::child::{Interrupt, run_within};

/// For parts that share a process. The tools slow some kernels down a thousandfold.
const LIMIT: Duration = Duration::from_secs(1800);
/// Most parts of a model in one process: its start costs as much as some of them, and there should be several processes.
const MOST_PARTS: usize = 3;

/// One of compute-sanitizer's tools.
#[derive(Clone, Copy, PartialEq)]
pub enum Tool {
    Memcheck,
    Racecheck,
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Self::Memcheck => "memcheck",
            Self::Racecheck => "racecheck",
        }
    }

    /// The earliest version that gets through the tests, if not every one does: before it, racecheck fails at cuBLASLt's
    /// kernels or, told to leave them out, at others.
    fn least_version(self) -> Option<(u32, u32)> {
        match self {
            Self::Memcheck => None,
            Self::Racecheck => Some((2026, 4)),
        }
    }

    /// Side by side. More than four on a GPU are no faster together under racecheck: its kernels fill it.
    fn n_processes(self, n_gpus: usize) -> usize {
        match self {
            Self::Memcheck => thread::available_parallelism().map_or(1, usize::from),
            Self::Racecheck => 4 * n_gpus,
        }
    }

    fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(["--tool", self.name(), "--error-exitcode", "9", "--print-limit", "20"]);
        if self == Self::Racecheck {
            // cuBLASLt's kernels fail under it; threads of its own for each core hold up the other processes.
            command.args(["--kernel-name-exclude", "kns=nvjet", "--racecheck-num-workers", "2"]);
            // It goes through all of the room for hazards after each launch: with its default, ten million, for two thirds
            // of the time.
            command.env("NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS", "10000");
        }
        command
    }

    /// Of `ember cuda-test`.
    fn test_args(self) -> &'static [&'static str] {
        match self {
            Self::Memcheck => &[],
            Self::Racecheck => &["--brief"],
        }
    }
}

/// compute-sanitizer with one of its tools, and what it watches.
pub struct Sanitizer {
    pub program: PathBuf,
    pub tool: Tool,
    pub ember: PathBuf,
    /// Processes take them in turns.
    pub gpus: Vec<u32>,
}

impl Sanitizer {
    /// Runs every part of `ember cuda-test`, a few of a model in each process, with their output in a file of `logs`, and
    /// tells how it went. One that fails, or does not end, is an error once all have ended.
    pub fn run(&self, logs: &Path, interrupt: &Interrupt) -> Result<()> {
        self.check_version()?;
        fs::create_dir_all(logs).with_context(|| format!("cannot create {}", logs.display()))?;
        let parts = self.parts()?;
        let of_models = parts.chunk_by(|a, b| model_of(a) == model_of(b));
        let groups: Vec<&[String]> = of_models.flat_map(|parts| parts.chunks(MOST_PARTS)).collect();
        let (waiting, n_failed) = (Mutex::new(groups.iter().enumerate()), Mutex::new(0));
        let next = || waiting.lock().expect("no thread panics").next();
        thread::scope(|scope| {
            for gpu in self.gpus.iter().cycle().take(self.tool.n_processes(self.gpus.len())) {
                scope.spawn(|| {
                    while let Some((i, group)) = next() {
                        let verdict = self.watch(group, *gpu, &logs.join(format!("{i}.log")), interrupt);
                        *n_failed.lock().expect("no thread panics") += usize::from(verdict.is_err());
                        let verdict = verdict.unwrap_or_else(|err| format!("FAILED: {err:#}"));
                        println!("{}\n    {verdict}", group.join("\n"));
                    }
                });
            }
        });
        interrupt.check()?;
        let n_failed = n_failed.into_inner().expect("no thread panics");
        ensure!(
            n_failed == 0,
            "{} failed in {n_failed} of {} processes of kernel tests",
            self.tool.name(),
            groups.len()
        );
        Ok(())
    }

    fn check_version(&self) -> Result<()> {
        let Some(least) = self.tool.least_version() else { return Ok(()) };
        let output = Command::new(&self.program).arg("--version").output();
        let output = output.with_context(|| format!("cannot start {}", self.program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().find_map(|line| line.strip_prefix("Version "));
        let mut numbers = version.unwrap_or_default().split('.').map(str::parse::<u32>);
        let (Some(Ok(year)), Some(Ok(release))) = (numbers.next(), numbers.next()) else {
            bail!("{} --version tells no version", self.program.display());
        };
        ensure!(
            (year, release) >= least,
            "{} needs compute-sanitizer {}.{} or later, and {} is {year}.{release}: name another with --sanitizer",
            self.tool.name(),
            least.0,
            least.1,
            self.program.display()
        );
        Ok(())
    }

    fn parts(&self) -> Result<Vec<String>> {
        let output = Command::new(&self.ember).args(["cuda-test", "--list"]).args(self.tool.test_args()).output();
        let output = output.with_context(|| format!("cannot start {}", self.ember.display()))?;
        let parts: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
        ensure!(output.status.success() && !parts.is_empty(), "`ember cuda-test --list` names nothing");
        Ok(parts)
    }

    /// Runs some parts; the tool's last line.
    fn watch(&self, parts: &[String], gpu: u32, log: &Path, interrupt: &Interrupt) -> Result<String> {
        let started = Instant::now();
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = self.tool.command(&self.program);
        command.arg(&self.ember).arg("cuda-test").args(self.tool.test_args());
        for part in parts {
            command.args(["--only", part]);
        }
        command.env("CUDA_VISIBLE_DEVICES", gpu.to_string()).stderr(file.try_clone()?).stdout(file);
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

    /// Racecheck of a program of this version that, like `ember`, is a shell script.
    fn scripted(dir: &Path, version: &str, script: &str) -> Sanitizer {
        let (text, program) = (dir.join("text"), dir.join("tool"));
        let list = "[ \"$2\" = --list ] && { seq -f 'llama: %g' 5; echo 'qwen2: one'; echo experts; exit 0; }";
        let version = format!("[ \"$1\" = --version ] && {{ echo 'Version {version}'; exit 0; }}");
        fs::write(&text, format!("#!/bin/sh\n{version}\n{list}\n{script}\n")).expect("a script");
        // A file that this process has open for writing while another test starts a child cannot be run.
        let status = Command::new("install").args(["-m", "755"]).args([&text, &program]).status();
        assert!(status.expect("coreutils").success());
        Sanitizer { ember: program.clone(), program, tool: Tool::Racecheck, gpus: vec![2, 3] }
    }

    #[test]
    fn every_part_is_watched_and_one_failure_is_told() -> Result<()> {
        let dir = xshell::Shell::new()?.create_temp_dir()?;
        let interrupt = Interrupt::install()?;
        let script = "echo \"GPU $CUDA_VISIBLE_DEVICES, $*\"\necho '========= ERROR SUMMARY: 0 errors'";
        let clean = scripted(dir.path(), "2026.4.0.0", script);
        clean.run(&dir.path().join("clean"), &interrupt)?;
        let logs = |i| fs::read_to_string(dir.path().join(format!("clean/{i}.log")));
        let logs = [logs(0)?, logs(1)?, logs(2)?, logs(3)?];
        assert!(logs[0].contains("cuda-test --brief --only llama: 1 --only llama: 2 "), "{}", logs[0]);
        assert!(logs[1].contains("--brief --only llama: 4 --only llama: 5\n"), "{}", logs[1]);
        assert!(logs.iter().all(|log| log.starts_with("GPU 2, ") || log.starts_with("GPU 3, ")), "{logs:?}");
        assert!(logs[2].contains("--only qwen2: one\n") && logs[3].contains("--only experts\n"), "{logs:?}");
        let script = "case \"$*\" in *experts*) exit 9;; esac\necho '========= ERROR SUMMARY: 0 errors'";
        let broken = scripted(dir.path(), "2027.1.0.0", script);
        let err = broken.run(&dir.path().join("broken"), &interrupt).expect_err("an error");
        assert_eq!(err.to_string(), "racecheck failed in 1 of 4 processes of kernel tests");
        Ok(())
    }

    #[test]
    fn a_version_that_cannot_do_it_is_refused() -> Result<()> {
        let dir = xshell::Shell::new()?.create_temp_dir()?;
        let old = scripted(dir.path(), "2025.3.1.0 (build 1) (public-release)", "exit 1");
        let err = old.check_version().expect_err("an error").to_string();
        assert!(err.starts_with("racecheck needs compute-sanitizer 2026.4 or later, and "), "{err}");
        assert!(err.ends_with("/tool is 2025.3: name another with --sanitizer"), "{err}");
        assert!(Sanitizer { tool: Tool::Memcheck, ..old }.check_version().is_ok());
        let none = scripted(dir.path(), "", "exit 1");
        assert!(none.check_version().expect_err("an error").to_string().ends_with("--version tells no version"));
        Ok(())
    }
}

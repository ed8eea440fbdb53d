//! `cargo xtask ci`: every check that a change must pass, cheapest first, each timed.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use crate::child::{self, Interrupt};
use crate::{cargo, clients, kernels, model, project_root, table, tidy};

#[derive(Args)]
pub struct CiArgs {
    /// Only these steps.
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = step_names())]
    only: Vec<String>,
    /// All steps but these.
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = step_names())]
    skip: Vec<String>,
    /// Run the remaining steps after one has failed.
    #[arg(long)]
    keep_going: bool,
}

struct Step {
    name: &'static str,
    check: Check,
}

enum Check {
    /// Arguments of cargo.
    Cargo(&'static [&'static str]),
    /// As `Cargo`, with the documentation tool's warnings denied.
    Doc(&'static [&'static str]),
    Own(fn(&Interrupt) -> Result<()>),
}

const STEPS: &[Step] = &[
    Step { name: "format", check: Check::Cargo(&["fmt", "--all", "--check"]) },
    Step { name: "tidy", check: Check::Own(|_| tidy::check(project_root())) },
    Step { name: "guards", check: Check::Own(|_| check_guards()) },
    Step { name: "kernels", check: Check::Own(|_| kernels::check_all()) },
    Step { name: "clippy", check: Check::Cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]) },
    Step { name: "doc", check: Check::Doc(&["doc", "--no-deps", "-p", "ember-engine"]) },
    // Needs no CUDA installation: the driver and libraries are loaded at run time.
    Step {
        name: "cuda",
        check: Check::Cargo(&[
            "clippy",
            "-p",
            "ember-engine",
            "-p",
            "ember-server",
            "--all-targets",
            "--features",
            "ember-server/cuda",
            "--",
            "-D",
            "warnings",
        ]),
    },
    Step {
        name: "model",
        check: Check::Own(|_| ["minilm", "smollm2"].into_iter().try_for_each(|name| model::fetch(name).map(drop))),
    },
    Step { name: "test", check: Check::Cargo(&["test", "--workspace"]) },
    // What of the CUDA executor runs without a device: plans, tiles, layouts, packing.
    Step {
        name: "cuda-test",
        check: Check::Cargo(&["test", "-p", "ember-engine", "--features", "cuda", "--lib", "executors::cuda"]),
    },
    // Runs the server that the tests have built.
    Step { name: "clients", check: Check::Own(clients::check_all) },
];

fn step_names() -> Vec<&'static str> {
    STEPS.iter().map(|it| it.name).collect()
}

pub fn run(args: &CiArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let mut rows = Vec::new();
    let mut n_failed = 0;
    for step in STEPS {
        let name = step.name.to_owned();
        if args.skip.contains(&name) || (!args.only.is_empty() && !args.only.contains(&name)) {
            continue;
        }
        if n_failed > 0 && !args.keep_going {
            rows.push(vec![name, "not run".to_owned(), "-".to_owned()]);
            continue;
        }
        println!("\n== {name}");
        let start = Instant::now();
        let res = step.run(&interrupt);
        let verdict = if res.is_ok() { "ok" } else { "FAILED" };
        if let Err(err) = res {
            eprintln!("{name}: {err:#}");
            n_failed += 1;
        }
        rows.push(vec![name, verdict.to_owned(), seconds(start.elapsed())]);
        interrupt.check()?;
    }
    println!("\n{}", table::markdown(&["step", "result", "s"], &rows));
    if n_failed > 0 {
        bail!("{n_failed} steps failed");
    }
    Ok(())
}

fn seconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64())
}

impl Step {
    fn run(&self, interrupt: &Interrupt) -> Result<()> {
        let mut command = Command::new(cargo());
        command.current_dir(project_root());
        match self.check {
            Check::Own(check) => return check(interrupt),
            Check::Cargo(args) => command.args(args),
            Check::Doc(args) => command.args(args).env("RUSTDOCFLAGS", "-D warnings"),
        };
        child::run_ok(&mut command, interrupt, &format!("cargo {}", self.name))
    }
}

/// A rule about what a package links. The present ones are the controls: they prove that the question is put in a
/// way that can be answered with yes.
struct Guard {
    package: &'static str,
    dependency: &'static str,
    is_present: bool,
}

const fn absent(package: &'static str, dependency: &'static str) -> Guard {
    Guard { package, dependency, is_present: false }
}

const fn present(package: &'static str, dependency: &'static str) -> Guard {
    Guard { package, dependency, is_present: true }
}

const GUARDS: &[Guard] = &[
    absent("ember-common", "burn"),
    absent("ember-common", "tokio"),
    present("ember-common", "serde"),
    absent("ember-engine", "hyper"),
    absent("ember-engine", "tower"),
    present("ember-engine", "burn"),
    absent("ember-bench", "burn"),
    absent("ember-bench", "ember-engine"),
    present("ember-bench", "ember-common"),
    absent("xtask", "ember-bench"),
    absent("xtask", "ember-common"),
    absent("xtask", "ember-engine"),
    absent("xtask", "ember-server"),
    present("xtask", "anyhow"),
    present("ember-server", "ember-engine"),
    present("ember-server", "hyper"),
];

fn check_guards() -> Result<()> {
    let mut broken = Vec::new();
    for guard in GUARDS {
        let Guard { package, dependency, is_present } = guard;
        if links(package, dependency)? != *is_present {
            let verb = if *is_present { "must link (control)" } else { "must not link" };
            broken.push(format!("{package} {verb} {dependency}: see `cargo tree -p {package} -i {dependency}`"));
        }
    }
    if !broken.is_empty() {
        bail!("{}", broken.join("\n"));
    }
    println!("{} dependency rules hold", GUARDS.len());
    Ok(())
}

/// Whether a package's normal dependencies, all features on, reach another.
fn links(package: &str, dependency: &str) -> Result<bool> {
    let output = Command::new(cargo())
        .current_dir(project_root())
        .args(["tree", "--all-features", "-e", "normal", "-p", package, "-i", dependency])
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(!output.stdout.is_empty());
    }
    if stderr.contains("did not match any packages") {
        return Ok(false);
    }
    // Several versions of it are linked.
    if stderr.contains("is ambiguous") {
        return Ok(true);
    }
    bail!("cargo tree: {stderr}");
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn step_names_are_unique() {
        assert_eq!(step_names().into_iter().collect::<BTreeSet<_>>().len(), STEPS.len());
    }

    #[test]
    fn each_guarded_package_has_a_control() {
        for guard in GUARDS {
            assert!(GUARDS.iter().any(|it| it.package == guard.package && it.is_present), "{}", guard.package);
        }
    }
}

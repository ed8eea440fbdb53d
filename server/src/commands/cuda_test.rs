//! `ember cuda-test`: the CUDA executor's self-test, for a machine that has nothing but the binary.

use std::process::ExitCode;

use clap::Args;

use crate::Error;

/// Arguments of `ember cuda-test`.
#[derive(Debug, Args)]
pub struct CudaTestArgs {
    /// Index of the device, after CUDA_VISIBLE_DEVICES.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Run the cases alone whose `MODEL: BATCH` contains this, and measure nothing. Can be given more than once.
    #[arg(long, value_name = "NAME", group = "parts")]
    only: Vec<String>,
    /// Make fewer and shorter runs of the cases, all of which together still take every kernel: for a sanitizer, under
    /// which a step takes seconds.
    #[arg(long, requires = "parts")]
    brief: bool,
    /// Print names for `--only` that make up all cases (those that `--brief` leaves), one a line, and run nothing.
    #[arg(long, group = "parts")]
    list: bool,
}

/// Runs the self-test and prints its report; fails if a kernel is wrong.
///
/// # Errors
/// What the device or its libraries lack.
#[cfg(feature = "cuda")]
pub fn run(args: &CudaTestArgs) -> Result<ExitCode, Error> {
    use ember_engine::executors::cuda::{Extent, self_test, self_test_parts};

    if args.list {
        self_test_parts(args.brief).iter().for_each(|part| println!("{part}"));
        return Ok(ExitCode::SUCCESS);
    }
    let extent = match args.only.as_slice() {
        [] => Extent::Full,
        names => Extent::Only { names: names.to_vec(), is_brief: args.brief },
    };
    let report = self_test(args.device, &extent)?;
    println!("{report}");
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says that this build cannot.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub fn run(args: &CudaTestArgs) -> Result<ExitCode, Error> {
    Err(Error::config("--device", format!("no cuda:{} in this build; build with `--features cuda`", args.device)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        _args: CudaTestArgs,
    }

    #[test]
    fn brief_runs_are_of_chosen_parts() {
        let is_taken = |flags: &[&str]| Cli::try_parse_from([&["cuda-test"], flags].concat()).is_ok();
        assert!(is_taken(&[]) && is_taken(&["--list"]) && is_taken(&["--only", "a", "--only", "b"]));
        assert!(is_taken(&["--brief", "--only", "a"]) && is_taken(&["--brief", "--list"]));
        assert!(!is_taken(&["--brief"]) && !is_taken(&["--device", "0", "--brief"]));
        assert!(!is_taken(&["--list", "--only", "a"]));
    }
}

//! `ember cuda-test`: the CUDA executor's self-test, for a machine that has nothing but the binary.

use std::process::ExitCode;

use clap::Args;

use crate::Error;

/// Arguments of `ember cuda-test`.
#[derive(Debug, Args)]
#[group(id = "what", args = ["only", "list"])]
pub struct CudaTestArgs {
    /// Index of the device, after CUDA_VISIBLE_DEVICES.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Run the cases alone whose `MODEL: BATCH` contains this, and measure nothing. Can be given more than once.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Make fewer and shorter runs of the cases, all of which together still take every kernel: for a sanitizer, under
    /// which a step takes seconds.
    #[arg(long, requires = "what")]
    brief: bool,
    /// Print names for `--only` that make up all cases (those that `--brief` leaves), one a line, and run nothing.
    #[arg(long, conflicts_with = "only")]
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

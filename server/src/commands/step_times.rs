//! `ember step-times`: milliseconds of steps of chosen shapes, without a scheduler or HTTP around them.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use ember_engine::executors::{StepLoad, step_times};

use super::engine_args::EngineArgs;
use crate::Error;

/// Options of `ember step-times`, as typed.
#[derive(Debug, Args)]
pub struct StepTimesArgs {
    /// A Hugging Face model folder or a GGUF file.
    model: PathBuf,

    /// Sequences of a step: `128@280` decode at 280 tokens, `16@64..640` at contexts between, `+2048/8192` is a chunk of
    /// 2,048 prompt tokens that ends at 8,192. May be given several times.
    #[arg(long = "load", value_name = "LOAD", required = true)]
    loads: Vec<StepLoad>,

    /// Steps to time of each.
    #[arg(long, default_value_t = 50)]
    steps: usize,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Prints one line for each load.
///
/// # Errors
/// Those of loading; a load that does not fit the executor.
pub fn run(args: &StepTimesArgs) -> Result<ExitCode, Error> {
    let config = args.engine.resolve(&args.model.display().to_string())?;
    for time in step_times(&args.model, &config, &args.loads, args.steps.max(1))? {
        println!("{:<32} {:>9.3} ms", time.load.to_string(), time.milliseconds);
    }
    Ok(ExitCode::SUCCESS)
}

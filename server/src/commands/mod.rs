//! The subcommands. One file each.

pub mod cuda_test;
pub mod doctor;
pub mod engine_args;
pub mod generate;
pub mod runner;
pub mod serve;

use std::process::ExitCode;

use clap::Subcommand;

use crate::Error;

/// What `ember` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over HTTP, with OpenAI's API and vLLM's extensions.
    Serve(Box<serve::ServeArgs>),
    /// Continue prompts without a server, as one batch.
    Generate(Box<generate::GenerateArgs>),
    /// Say what this machine has for serving, and what to install.
    Doctor(doctor::DoctorArgs),
    /// Check the CUDA kernels on a device against the portable executor.
    #[command(hide = true)]
    CudaTest(cuda_test::CudaTestArgs),
}

impl Command {
    /// Runs it to its end.
    ///
    /// # Errors
    /// What the operator has to mend.
    pub fn run(self) -> Result<ExitCode, Error> {
        match self {
            Self::Serve(args) => serve::run(*args),
            Self::Generate(args) => generate::run(*args),
            Self::Doctor(args) => doctor::run(&args),
            Self::CudaTest(args) => cuda_test::run(&args),
        }
    }
}

//! The subcommands. One file each.

pub mod doctor;
pub mod engine_args;
pub mod generate;
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
}

impl Command {
    /// As typed.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Serve(_) => "serve",
            Self::Generate(_) => "generate",
            Self::Doctor(_) => "doctor",
        }
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// What the operator has to mend.
    pub fn run(self) -> Result<ExitCode, Error> {
        match self {
            Self::Serve(args) => serve::run(*args),
            Self::Generate(args) => generate::run(*args),
            Self::Doctor(args) => doctor::run(&args),
        }
    }
}

//! [`Cli`]: the command line as typed. Every option of `serve` is also a variable `EMBER_...`.

use clap::Parser;

use crate::{commands::Command, config_file};

/// Serves large language models.
#[derive(Debug, Parser)]
#[command(name = "ember", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The process's command line. Prints help or a usage error and exits if there is nothing to run.
    pub fn from_env() -> Self {
        Self::try_from_args(std::env::args()).unwrap_or_else(|error| error.exit())
    }

    /// The command line `args`, with the options of a `--config` file.
    ///
    /// # Errors
    /// The usage error, or help.
    pub fn try_from_args<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Result<Self, clap::Error> {
        let args = config_file::expand(args.into_iter().map(|arg| hyphenated(arg.into())).collect());
        Self::try_parse_from(args.map_err(|message| clap::Error::raw(clap::error::ErrorKind::Io, message + "\n"))?)
    }
}

/// `--max_model_len=8k` is `--max-model-len=8k`, as in vLLM.
fn hyphenated(arg: String) -> String {
    match arg.strip_prefix("--") {
        Some(rest) if !rest.is_empty() => match rest.split_once('=') {
            Some((flag, value)) => format!("--{}={value}", flag.replace('_', "-")),
            None => format!("--{}", rest.replace('_', "-")),
        },
        _ => arg,
    }
}

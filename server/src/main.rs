//! The `ember` binary: reads the command line and runs one subcommand.

use std::process::ExitCode;

use ember_server::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::from_env();
    cli.command.run().unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

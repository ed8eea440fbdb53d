//! The `ember` binary: reads the command line and runs one subcommand.

use anyhow::Context;
use ember_server::cli::Cli;

fn main() -> anyhow::Result<std::process::ExitCode> {
    let cli = Cli::from_env();
    let name = cli.command.name();
    cli.command.run().with_context(|| format!("ember {name}"))
}

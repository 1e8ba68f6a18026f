//! `understudy image`: disk images.

mod create;

use std::process::ExitCode;

use clap::{Args, Subcommand};

/// Options of `image`.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Make an image of a stock system from its packages, without root.
    Create(create::CreateArgs),
}

/// Does what was asked.
pub(crate) fn run(args: ImageArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ImageCommand::Create(args) => create::run(args),
    }
}

//! `understudy image`: disk images.

mod create;
mod tools;

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
    /// Say what an image is.
    Info(tools::InfoArgs),
    /// Copy a disk into an image of another format or at another place; what is zero takes no room.
    Convert(tools::ConvertArgs),
    /// Make a disk bigger, or smaller, that no VM uses.
    Resize(tools::ResizeArgs),
    /// Check an image that no VM uses. It is only read.
    Check(tools::CheckArgs),
}

/// Does what was asked.
pub(crate) fn run(args: ImageArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        ImageCommand::Create(args) => create::run(args),
        ImageCommand::Info(args) => tools::info(&args),
        ImageCommand::Convert(args) => tools::convert(&args),
        ImageCommand::Resize(args) => tools::resize(&args),
        ImageCommand::Check(args) => tools::check(&args),
    }
}

//! `understudy image create`: a stock Debian on a disk image, installed by its own packages in a VM.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use host::config::parse_size;

use crate::cli::failure;

/// Systems that can be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum System {
    /// Debian for riscv64.
    Debian,
}

/// Options of `image create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The system.
    system: System,
    /// The image to make.
    out: PathBuf,
    /// Size of the disk.
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    size: u64,
}

/// Makes the image.
pub(crate) fn run(args: CreateArgs) -> anyhow::Result<ExitCode> {
    let CreateArgs { system: System::Debian, out, size: _ } = args;
    Err(failure(1, format!("{}: this build cannot make images yet", out.display())))
}

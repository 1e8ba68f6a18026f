//! `understudy replay`: run a recorded VM again, and see that it is the same.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use host::one_line::one_line;
use host::recording::{ReplayEnd, ReplayOptions, replay};
use machine::engine::EngineKind;

use super::terminal::show;
use super::{engine_line, failure, say};

/// Options of `replay`.
#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// The recording: a directory that `understudy run --record` made.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Only compare: the console is not shown.
    #[arg(long)]
    verify: bool,
    /// Steps that the machine runs at a time. Makes no difference, as tests show with it.
    #[arg(long, value_name = "N", default_value_t = 10_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    slice: u64,
    /// Drop every cache of the machine after so many steps. Makes no difference but to the time that it takes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    drop_caches_every: Option<u64>,
    /// The engine [default: the fastest that this host can have]. Makes no difference but to the time that it takes.
    #[arg(long, value_name = "interpreter|jit")]
    engine: Option<EngineKind>,
    /// Say at the end what the engine had in memory and has done.
    #[arg(long)]
    stats: bool,
}

/// Replays at full speed to the end of the recording, or to where it is cut off, damaged or differs.
pub(crate) fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let options = ReplayOptions {
        slice: args.slice,
        drop_caches_every: args.drop_caches_every,
        engine: args.engine,
        until: None,
    };
    let console = |bytes: &[u8]| {
        if !args.verify {
            show(bytes);
        }
    };
    let replayed = replay(&args.dir, options, console).map_err(|e| failure(1, one_line(&e)))?;
    let (steps, digests) = (replayed.icount, replayed.digests);
    say(&format!(
        "replayed {steps} steps, {} records; {digests} digests are as recorded",
        replayed.records
    ));
    if args.stats {
        say(&engine_line(&replayed.engine));
    }
    match replayed.end {
        Some(ReplayEnd::Whole) | None => Ok(ExitCode::SUCCESS),
        Some(end) => Err(failure(1, end.to_string())),
    }
}

//! How long it takes to replay a machine that did nothing, and what its log grows by.

use std::path::Path;
use std::time::{Duration, Instant};

use guest::FileTree;

use super::{BOOT_MAX, END_MAX, Known, READY, RecordArgs, record_debian, replay};
use crate::bench::engine::Guests;
use crate::bench::figure::{Figure, Section, Target, listed, median};
use crate::demo::progress::Progress;

/// A recording that is as long as this is an hour's.
const HOUR: Duration = Duration::from_secs(3600);
/// Longest that replaying an idle hour may take, in seconds: "seconds", and not a minute.
const REPLAY_MAX: f64 = 10.0;

/// Replays the recording that is given, or one that is made for it.
pub(super) fn run(
    dir: &Path,
    guests: &Guests,
    args: &RecordArgs,
    section: &mut Section,
) -> anyhow::Result<()> {
    let engine = args.engine.as_deref();
    let recording = match &args.idle {
        Some(given) => given.clone(),
        None => {
            let made = dir.join("idle");
            record_debian(&made, &guests.debian, &FileTree::new(), args.idle_seconds, engine)?;
            made
        }
    };
    let known = Known::of(&recording)?;
    let [mut all, mut behind] = [const { Vec::new() }; 2];
    let progress = Progress::new();
    for turn in 1..=args.turns {
        let begun = Instant::now();
        let mut running = replay(&recording, engine)?;
        // Only of the recording that was made here is it known when the boot ended.
        let up = match args.idle {
            Some(_) => None,
            None => Some(running.wait_for(READY, BOOT_MAX).map(|_| Instant::now())?),
        };
        running.wait_for_end(END_MAX)?;
        let took = begun.elapsed().as_secs_f64();
        all.push(took);
        behind.extend(up.map(|up| up.elapsed().as_secs_f64()));
        progress.say(&format!("turn {turn}: idle machine replayed in {took:.2} s"));
    }
    let seconds = known.guest.as_secs_f64();
    let figure =
        Figure::new(format!("replay of {seconds:.0} s, most of it idle"), median(all.clone()), "s");
    let is_hour = known.guest >= HOUR;
    section.figures.push(if is_hour { figure.aim(Target::AtMost(REPLAY_MAX)) } else { figure });
    if args.idle.is_none() {
        let name = format!("replay of the {} idle seconds behind the boot", args.idle_seconds);
        section.figures.push(Figure::new(name, median(behind), "s"));
    }
    let growth = known.log_bytes as f64 / seconds;
    section.figures.push(Figure::new("log of an idle machine, with its boot", growth, "bytes/s"));
    section.notes.push(format!("idle: {}; replayed in {} s", known.line(), listed(&all)));
    Ok(())
}

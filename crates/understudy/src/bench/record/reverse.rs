//! How long a debugger waits for a step back, a way back to a breakpoint, and a place far off.
//!
//! # Determinism
//! The places are drawn by a fixed generator, so that two builds go to the same ones of a recording.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest::FileTree;
use host::recording::{Stop, Timeline};
use machine::engine::EngineKind;

use super::{Known, RecordArgs, record_debian};
use crate::bench::engine::Guests;
use crate::bench::figure::{Figure, Section, Target, sorted};
use crate::demo::progress::Progress;
use crate::demo::report::percentile;

/// Places that are gone to, anywhere in the recording.
const PLACES: usize = 12;
/// How often the machine runs on from each.
const RUNS: usize = 4;
/// Longest that it runs on, in steps.
const RUN_MAX: u64 = 300_000_000;
/// Steps back from each place, and each time that it has run on.
const STEPS: usize = 5;
/// Longest search; one that takes longer is given up, and counted with this time.
const SEARCH_MAX: Duration = Duration::from_secs(60);
/// Longest that half of the steps back may take, in milliseconds.
const STEP_MAX_MS: f64 = 100.0;

/// What keeps the guest busy: processes, memory, the page cache, and some rest.
const LOAD: &str = "\
[Service]
ExecStart=/bin/sh -c 'while :; do tar cf - /usr/lib/systemd | gzip -1 | sha256sum; find / -xdev | wc -l; sleep 0.2; done'
[Install]
WantedBy=multi-user.target
";

/// Goes back in the recording that is given, or in one that is made for it.
pub(super) fn run(
    dir: &Path,
    guests: &Guests,
    args: &RecordArgs,
    section: &mut Section,
) -> anyhow::Result<()> {
    let engine = args.engine.as_deref();
    let recording = match &args.reverse {
        Some(given) => given.clone(),
        None => {
            let (made, mut files) = (dir.join("load"), FileTree::new());
            let unit = "etc/systemd/system/load.service";
            files.add_file(unit, 0o644, LOAD.into());
            files.add_symlink(
                "etc/systemd/system/multi-user.target.wants/load.service",
                "/etc/systemd/system/load.service",
            );
            record_debian(&made, &guests.debian, &files, args.load_seconds, engine)?;
            made
        }
    };
    let known = Known::of(&recording)?;
    section.notes.push(format!("reverse: {}", known.line()));
    let engine = engine.map(str::parse::<EngineKind>).transpose()?;
    let begun = Instant::now();
    let timeline = Timeline::open(&recording, engine)?;
    let mut back = Back { timeline, state: known.steps, progress: Progress::new() };
    section.figures.push(milliseconds("opening a recording", begun.elapsed()));
    back.measure(section)?;
    let kept = back.timeline.checkpoints();
    let bytes: usize = kept.iter().map(|checkpoint| checkpoint.bytes).sum();
    section.notes.push(format!("reverse: {} checkpoints with {bytes} bytes of pages", kept.len()));
    Ok(())
}

fn milliseconds(what: &str, time: Duration) -> Figure {
    Figure::new(what, time.as_secs_f64() * 1000.0, "ms")
}

/// p50 and p99 of what was timed, in milliseconds.
fn spread(what: &str, times: &[f64], aim: Option<Target>) -> [Figure; 2] {
    let times = sorted(times.iter().copied());
    let value = |percent| (!times.is_empty()).then(|| percentile(&times, percent));
    let half = Figure::new(format!("{what}, p50"), value(50), "ms");
    let most = Figure::new(format!("{what}, p99"), value(99), "ms");
    [if let Some(aim) = aim { half.aim(aim) } else { half }, most]
}

struct Back {
    timeline: Timeline,
    /// Of the generator.
    state: u64,
    progress: Progress,
}

impl Back {
    /// A step of the recording, none more likely than another.
    fn draw(&mut self) -> u64 {
        self.state =
            self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let (first, last) = (self.timeline.first() + 1, self.timeline.last());
        first + (self.state >> 16) % (last - first).max(1)
    }

    /// Goes somewhere; the time that it took, in milliseconds.
    fn go(&mut self, to: u64) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let stop = self.timeline.goto(to, &AtomicBool::new(false));
        ensure!(stop == Stop::Reached && self.timeline.icount() == to, "step {to}: {stop:?}");
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    }

    /// Steps back from where the machine stands; the times, in milliseconds.
    fn step_back(&mut self) -> anyhow::Result<Vec<f64>> {
        let mut times = Vec::new();
        for _ in 0..STEPS {
            let (here, begun) = (self.timeline.icount(), Instant::now());
            let stop = self.timeline.reverse_step(0, &AtomicBool::new(false));
            times.push(begun.elapsed().as_secs_f64() * 1000.0);
            let is_there = match stop {
                Stop::Done { hart: 0 } => self.timeline.icount() < here,
                Stop::Begin => true,
                _ => false,
            };
            ensure!(is_there, "a step back from step {here}: {stop:?}");
        }
        Ok(times)
    }

    /// Runs on for some time.
    fn run_on(&mut self) -> anyhow::Result<()> {
        let here = self.timeline.icount();
        let until = here + self.draw() % RUN_MAX;
        let stop = self.timeline.resume(Some(until), &AtomicBool::new(false));
        let is_there = matches!(stop, Stop::Reached | Stop::End { .. });
        ensure!(is_there, "on from step {here} to step {until}: {stop:?}");
        Ok(())
    }

    /// Goes to many places, runs on there, and goes back.
    fn measure(&mut self, section: &mut Section) -> anyhow::Result<()> {
        let [mut ways, mut firsts, mut all, mut searches] = [const { Vec::new() }; 4];
        for place in 1..=PLACES {
            let to = self.draw();
            ways.push(self.go(to)?);
            for run in 0..=RUNS {
                if run > 0 {
                    self.run_on()?;
                }
                let times = self.step_back()?;
                firsts.push(times[0]);
                all.extend(times);
            }
            searches.push(self.search_back(section)?);
            self.progress.say(&format!("went back at {place} of {PLACES} places"));
        }
        let aim = Target::AtMost(STEP_MAX_MS);
        section.figures.extend(spread("reverse step", &all, Some(aim)));
        section.figures.extend(spread("first reverse step after running on", &firsts, None));
        let what = "reverse continue to the same instruction";
        section.figures.extend(spread(what, &searches, None));
        section.figures.extend(spread("going to any step", &ways, None));
        Ok(())
    }

    /// Looks for the last time that the instruction here was executed before; the time that it took, in milliseconds.
    fn search_back(&mut self, section: &mut Section) -> anyhow::Result<f64> {
        let here = self.timeline.icount();
        let hart = self.timeline.machine().harts().first().context("there is a hart")?;
        self.timeline.set_breakpoints(BTreeSet::from([hart.pc]));
        let begun = Instant::now();
        let stop = self.search();
        let time = begun.elapsed();
        self.timeline.set_breakpoints(BTreeSet::new());
        match stop {
            Stop::Breakpoint { .. } | Stop::Begin => {}
            Stop::Interrupted => {
                let seconds = SEARCH_MAX.as_secs();
                let line =
                    format!("reverse: a way back from step {here} was given up after {seconds} s");
                section.notes.push(line);
            }
            other => anyhow::bail!("back from step {here} to a breakpoint: {other:?}"),
        }
        Ok(time.as_secs_f64() * 1000.0)
    }

    fn search(&mut self) -> Stop {
        let is_enough = AtomicBool::new(false);
        let (found, waits) = channel::<()>();
        std::thread::scope(|scope| {
            let is_enough = &is_enough;
            scope.spawn(move || {
                if waits.recv_timeout(SEARCH_MAX) == Err(RecvTimeoutError::Timeout) {
                    is_enough.store(true, Ordering::Relaxed);
                }
            });
            let stop = self.timeline.reverse_resume(is_enough);
            drop(found);
            stop
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_times_is_judged_and_the_slowest_told() {
        let times: Vec<f64> = (1..=100).map(f64::from).collect();
        let [half, most] = spread("x", &times, Some(Target::AtMost(50.0)));
        assert_eq!((half.measured, half.met), (Some(50.0), Some(true)));
        assert_eq!((most.measured, most.met), (Some(99.0), None));
        assert_eq!(spread("x", &[], None)[0].measured, None);
    }
}

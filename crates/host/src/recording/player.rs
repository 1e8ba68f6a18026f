//! Runs a recorded machine again, forward: the machine and its place in the log.
//!
//! # Place
//! Called by the command line, by [`super::Timeline`] and by the search for a divergence, on the caller's thread. The
//! recording is only read.
//!
//! # Invariants
//! - INV-REPLAY-1: nothing but the recording enters the machine.
//! - INV-REPLAY-2: [`ReplayEnd::Whole`] is the answer only if the log was read to its clean end and every digest on the
//!   way was the machine's.
//! - INV-REPLAY-3: a player that stands at a step has applied no record of that step that it was not asked to pass.
//!
//! # Failure
//! A log that is cut off or damaged is replayed up to there. A machine that differs is not run on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use eventlog::{Entry, LogPos, Record};
use machine::debug::WatchHit;
use machine::engine::EngineKind;
use machine::io::{Input, Output, OutputKind};
use machine::machine::Exit;
use machine::ram::SnapshotPage;
use machine::{Machine, MachineSaved};

use super::cursor::{Cursor, ReplayEnd};
use super::dir::{OpenRecordingError, RecordingDir};
use crate::one_line::one_line;
use crate::vm::EngineUse;

/// Steps between two looks at whether somebody wants the replay to stop.
const BURST: u64 = 20_000_000;

/// Sees what crosses the machine's border in a replay, in order. `mtime` is guest time in ticks of 100 ns.
pub trait Observer {
    /// The machine made an output.
    fn output(&mut self, mtime: u64, output: &Output);
    /// An input was applied.
    fn input(&mut self, mtime: u64, icount: u64, input: &Input);
}

/// Where a replay stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ran {
    /// At the step that it was to run to.
    Reached,
    /// Somebody asked.
    Interrupted,
    /// Before an instruction with a breakpoint.
    Breakpoint {
        /// The hart that is about to execute it.
        hart: u8,
    },
    /// Behind an access to memory that is watched, or behind the input that made it.
    Watchpoint {
        /// The hart that ran.
        hart: u8,
        /// Guest physical address.
        gpa: u64,
        /// Whether it was written.
        is_write: bool,
        /// An input made the access; otherwise the last step did.
        by_input: bool,
    },
    /// It can go no further.
    End(ReplayEnd),
}

/// A machine that runs again.
#[derive(Debug)]
pub struct Player {
    machine: Machine,
    place: Place,
    /// Most steps that the machine runs without a look at its outputs.
    slice: u64,
    /// Every cache of the machine is dropped after so many steps; with the step of the next time.
    drop_caches: Option<(u64, u64)>,
    /// A breakpoint at this step was told, or is where somebody resumed.
    passed: Option<u64>,
}

/// A state that a player can be taken back to, beside what pages held there.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    pub(crate) saved: MachineSaved,
    place: Place,
}

/// A player's place in the log.
#[derive(Debug, Clone)]
pub(super) struct Place {
    cursor: Cursor,
    /// Read, and not yet applied.
    next: Option<Record>,
    /// Records that were applied.
    pub(super) records: u64,
    /// Digests that were the machine's.
    pub(super) digests: u64,
    /// Step of the last record that was applied.
    applied_at: Option<u64>,
}

impl Place {
    /// Whether nothing that the log has for a step was applied.
    pub(super) fn is_before_records_of(&self, icount: u64) -> bool {
        self.applied_at != Some(icount)
    }
}

impl Player {
    /// A player that stands at the latest beginning of a segment that is not after `icount`, or at the first one.
    ///
    /// # Errors
    /// [`OpenRecordingError`].
    pub fn open(
        recording: &Arc<RecordingDir>,
        icount: u64,
        engine: Option<EngineKind>,
    ) -> Result<Self, OpenRecordingError> {
        let mut tell = |e: &crate::snapshot::SnapshotError| {
            crate::log::line(&format!("{}; replay begins earlier", one_line(e)));
        };
        for problem in recording.problems() {
            crate::log::line(&format!("{problem}; replay does not begin there"));
        }
        let (mut machine, segment) = recording.machine_before(icount, &mut tell)?;
        crate::vm::choose_engine(&mut machine, engine, "replay");
        let cursor = Cursor::open(recording, segment)?;
        // A snapshot on the way may lie between two records of its step.
        let is_first = recording.start_steps().first() == Some(&machine.icount());
        let applied_at = (!is_first).then(|| machine.icount());
        let place = Place { cursor, next: None, records: 0, digests: 0, applied_at };
        Ok(Self { machine, place, slice: u64::MAX, drop_caches: None, passed: None })
    }

    /// Runs the machine so many steps at a time, and drops its caches after so many. No choice here may make a difference.
    #[must_use]
    pub fn with_slices(mut self, slice: u64, drop_caches_every: Option<u64>) -> Self {
        self.slice = slice.max(1);
        self.drop_caches = drop_caches_every.map(|every| (every.max(1), every));
        self
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine, for debuggers: what is changed here makes the replay diverge.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// The machine alone.
    #[must_use]
    pub fn into_machine(self) -> Machine {
        self.machine
    }

    /// Step that the machine stands at.
    #[must_use]
    pub fn icount(&self) -> u64 {
        self.machine.icount()
    }

    /// Position of the records that were applied.
    #[must_use]
    pub fn position(&self) -> LogPos {
        let end = self.place.cursor.position();
        let waiting = u64::from(self.place.next.is_some());
        LogPos { lsn: end.lsn.wrapping_sub(waiting), icount: self.machine.icount() }
    }

    /// Records that were applied.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.place.records
    }

    /// Digests that were the machine's.
    #[must_use]
    pub fn digests(&self) -> u64 {
        self.place.digests
    }

    /// A breakpoint that the machine stands at is passed over when it runs.
    pub fn pass_breakpoint(&mut self) {
        self.passed = Some(self.machine.icount());
    }

    /// A breakpoint is told wherever the machine comes to it.
    pub(super) fn heed_breakpoints(&mut self) {
        self.passed = None;
    }

    /// Whether nothing that the log has for this step was applied.
    pub(super) fn is_before_records(&self) -> bool {
        self.place.is_before_records_of(self.machine.icount())
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Goes on from another place, which the machine was taken to.
    pub(super) fn set_place(&mut self, place: Place) {
        self.place = place;
    }

    /// Where it stands.
    pub(crate) fn mark(&mut self) -> Mark {
        Mark { saved: self.machine.save(), place: self.place.clone() }
    }

    /// Goes to where it stood; `pages` are those whose contents were others there.
    pub(crate) fn back_to(&mut self, mark: &Mark, pages: &[SnapshotPage]) {
        let rewound = self.machine.rewind(&mark.saved, pages);
        rewound.expect("the state was this machine's own");
        self.place = mark.place.clone();
    }

    fn peek(&mut self) -> Result<u64, ReplayEnd> {
        if self.place.next.is_none() {
            self.place.next = Some(self.place.cursor.next()?);
        }
        Ok(self.place.next.as_ref().map_or(u64::MAX, |record| record.icount))
    }

    /// Runs until the machine has made `until` steps, before what the log has for that step; or to the end of the log.
    pub fn run(&mut self, until: u64, interrupt: &AtomicBool, observer: &mut dyn Observer) -> Ran {
        self.forward(until, u64::MAX, interrupt, observer)
    }

    /// Runs to behind the next digest of the log: [`Ran::Reached`] says that it is the machine's.
    pub(crate) fn run_to_digest(
        &mut self,
        interrupt: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Ran {
        self.forward(u64::MAX, self.place.digests + 1, interrupt, observer)
    }

    fn forward(
        &mut self,
        until: u64,
        digests: u64,
        interrupt: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Ran {
        while self.machine.icount() < until && self.place.digests < digests {
            let at = match self.peek() {
                Ok(at) => at,
                Err(end) => return Ran::End(end),
            };
            if at > self.machine.icount() {
                if let Some(stop) = self.run_machine(until.min(at), interrupt, observer) {
                    return stop;
                }
                continue;
            }
            let Some(record) = self.place.next.take() else { continue };
            if let Err(end) = self.apply(record, observer) {
                return Ran::End(end);
            }
            if let Some(hit) = self.machine.take_watch_hit() {
                let WatchHit { gpa, is_write } = hit;
                return Ran::Watchpoint { hart: 0, gpa, is_write, by_input: true };
            }
        }
        Ran::Reached
    }

    fn diverged(&self, reason: String) -> ReplayEnd {
        ReplayEnd::Diverged { icount: self.machine.icount(), reason }
    }

    fn apply(&mut self, record: Record, observer: &mut dyn Observer) -> Result<(), ReplayEnd> {
        match record.entry {
            Entry::Mark => {}
            Entry::Digest(recorded) => {
                let here = self.machine.digest();
                if here != recorded {
                    let reason =
                        format!("digest {here:#018x} here, {recorded:#018x} in the recording");
                    return Err(self.diverged(reason));
                }
                self.place.digests += 1;
            }
            Entry::Input(input) => {
                if let Err(e) = self.machine.apply(&input) {
                    return Err(self.diverged(format!("an input cannot be applied: {e}")));
                }
                observer.input(self.machine.mtime(), record.icount, &input);
                self.collect(observer);
            }
            Entry::BlkReadLocal { dev, id } => {
                return Err(
                    self.diverged(format!("the log lacks the data of request {id} of disk {dev}"))
                );
            }
        }
        self.place.records += 1;
        self.place.applied_at = Some(record.icount);
        Ok(())
    }

    /// Runs the machine up to `until`; nothing when it came there.
    fn run_machine(
        &mut self,
        until: u64,
        interrupt: &AtomicBool,
        observer: &mut dyn Observer,
    ) -> Option<Ran> {
        let never = AtomicBool::new(false);
        while self.machine.icount() < until {
            let here = self.machine.icount();
            let mut stop_at = until.min(here.saturating_add(self.slice.min(BURST)));
            if let Some((every, at)) = &mut self.drop_caches {
                if here >= *at {
                    self.machine.drop_caches();
                    *at = here.saturating_add(*every);
                }
                stop_at = stop_at.min(*at);
            }
            // The machine itself passes over one at the first step of each run.
            if self.passed != Some(here)
                && let Some(hart) = self.machine.breakpoint_ahead()
            {
                return Some(Ran::Breakpoint { hart });
            }
            let exit = self.machine.run(stop_at, &never);
            self.collect(observer);
            match exit {
                Exit::Reached | Exit::Output | Exit::Stopped => {}
                Exit::Breakpoint { hart } => return Some(Ran::Breakpoint { hart }),
                Exit::Watchpoint { hart, gpa, is_write } => {
                    return Some(Ran::Watchpoint { hart, gpa, is_write, by_input: false });
                }
                Exit::Idle | Exit::Halted if self.machine.icount() < until => {
                    let reason =
                        format!("the machine is {exit:?}, the log runs to step {until} or beyond");
                    return Some(Ran::End(self.diverged(reason)));
                }
                Exit::Idle | Exit::Halted => {}
            }
            if interrupt.load(Ordering::Relaxed) {
                return Some(Ran::Interrupted);
            }
        }
        None
    }

    fn collect(&mut self, observer: &mut dyn Observer) {
        let clock = self.machine.clock();
        for output in self.machine.take_outputs() {
            observer.output(clock.mtime(output.icount), &output);
        }
    }
}

/// How to replay. No choice here may make a difference to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayOptions {
    /// Most steps that the machine runs without a look at its outputs; at least 1.
    pub slice: u64,
    /// Every cache of the machine is dropped after so many steps; `None`: never.
    pub drop_caches_every: Option<u64>,
    /// The engine; `None`: the fastest that this host can have.
    pub engine: Option<EngineKind>,
    /// The step to stop at; `None`: at the end.
    pub until: Option<u64>,
}

/// What a replay came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// Step at which it began.
    pub from: u64,
    /// Step that the machine stands at.
    pub icount: u64,
    /// Records of the log that were replayed.
    pub records: u64,
    /// Digests that were the machine's.
    pub digests: u64,
    /// The engine, and what it had at the end.
    pub engine: EngineUse,
    /// How it ended; nothing when it came to the step that it was to stop at.
    pub end: Option<ReplayEnd>,
}

/// Shows the UART's output, and nothing else.
struct UartOnly<F>(F);

impl<F: FnMut(&[u8])> Observer for UartOnly<F> {
    fn output(&mut self, _: u64, output: &Output) {
        if let OutputKind::Console { dev: 0, bytes } = &output.kind {
            (self.0)(bytes);
        }
    }

    fn input(&mut self, _: u64, _: u64, _: &Input) {}
}

/// Replays the recording in `dir` from its beginning; `console` gets what the guest writes to its UART.
///
/// # Errors
/// [`OpenRecordingError`], when there is nothing to replay.
pub fn replay(
    dir: &Path,
    options: ReplayOptions,
    console: impl FnMut(&[u8]),
) -> Result<Replayed, OpenRecordingError> {
    let recording = Arc::new(RecordingDir::open(dir)?);
    let player = Player::open(&recording, 0, options.engine)?;
    let (replayed, _) = play(player, options, &mut UartOnly(console));
    Ok(replayed)
}

/// Runs a player as the options say; gives it back where it came to.
pub fn play(
    player: Player,
    options: ReplayOptions,
    observer: &mut dyn Observer,
) -> (Replayed, Player) {
    let mut player = player.with_slices(options.slice, options.drop_caches_every);
    let from = player.icount();
    let never = AtomicBool::new(false);
    let ran = player.run(options.until.unwrap_or(u64::MAX), &never, observer);
    let end = match ran {
        Ran::End(end) => Some(end),
        Ran::Reached | Ran::Interrupted | Ran::Breakpoint { .. } | Ran::Watchpoint { .. } => None,
    };
    let replayed = Replayed {
        from,
        icount: player.icount(),
        records: player.records(),
        digests: player.digests(),
        engine: EngineUse::of(&player.machine),
        end,
    };
    (replayed, player)
}

#[cfg(test)]
mod tests;

//! A recording as a debugger sees it: a machine that goes to and fro in its own past.
//!
//! # Place
//! Driven by `understudy debug` and by the search for a divergence.
//!
//! # States
//! The machine stands at a step, before what the log has for that step, with the checkpoints that it can be taken back to:
//! each is the saved machine, the place in the log, and what pages held that were written since (RAM's undo log).
//! ```text
//! checkpoint --pages--> checkpoint --pages--> ... --pages--> machine
//! ```
//! Going back means putting those pages back, newest first, and running forward from there to the step wanted.
//!
//! # Invariants
//! - INV-TIMELINE-1: where the machine stands is a function of the step alone, whatever way it came there.
//! - INV-TIMELINE-2: checkpoints lie the closer, the nearer they are to where the machine stands: their number grows with
//!   the logarithm of the steps behind it, and their pages have a bound in bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use eventlog::ClockBase;
use machine::debug::{WatchKind, Watchpoint};
use machine::engine::EngineKind;
use machine::io::{Input, Output, OutputKind};
use machine::ram::{PAGE_SIZE, SnapshotPage};
use machine::{Machine, MachineSaved};

use super::cursor::ReplayEnd;
use super::dir::{OpenRecordingError, RecordingDir};
use super::info::RecordingInfo;
use super::player::{Observer, Place, Player, Ran};
use crate::snapshot::{SnapshotError, SnapshotHead};

/// Steps between checkpoints on the way forward.
const INTERVAL: u64 = 64_000_000;
/// Checkpoints are no closer than this.
const FINE: u64 = 2_000;
/// Most bytes of pages in checkpoints.
const BYTES_MAX: usize = 1 << 30;
/// A snapshot of the recording is gone to if it saves so many steps.
const JUMP_STEPS: u64 = 500_000_000;
/// A step of a hart that does not come in so many steps of the machine is looked for in bigger ones.
const SINGLE_STEPS_MAX: u64 = 65_536;

/// Memory that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// The hart through whose page tables the address is looked up, each time that the machine is resumed; none: it is
    /// physical.
    pub hart: Option<usize>,
    /// Its address.
    pub va: u64,
    /// Length in bytes.
    pub len: u64,
    /// Which accesses.
    pub kind: WatchKind,
}

/// A state that the machine can be taken back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Step of the machine.
    pub icount: u64,
    /// Bytes of pages that are kept for it.
    pub bytes: usize,
}

/// Why the machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// Before an instruction with a breakpoint.
    Breakpoint {
        /// The hart that is about to execute it.
        hart: usize,
    },
    /// At an access to memory that is watched: behind it on the way forward, before it on the way back.
    Watchpoint {
        /// The hart that ran.
        hart: usize,
        /// Its address, as it was given.
        va: u64,
        /// Which accesses it was for.
        kind: WatchKind,
        /// The step at which the machine stood before the access.
        before: u64,
    },
    /// The hart has made its step.
    Done {
        /// The hart.
        hart: usize,
    },
    /// At the step asked for.
    Reached,
    /// At the beginning of the recording.
    Begin,
    /// It can go no further.
    End {
        /// Why.
        how: ReplayEnd,
    },
    /// Somebody asked.
    Interrupted,
}

struct Kept {
    icount: u64,
    saved: MachineSaved,
    place: Place,
    /// What pages held here that were written before the next checkpoint, by page; the last one's are in RAM.
    undo: Vec<SnapshotPage>,
    /// Bytes of `undo`.
    bytes: usize,
}

impl Kept {
    /// Adds pages that were written later.
    fn add(&mut self, later: Vec<SnapshotPage>) {
        self.undo = merged(std::mem::take(&mut self.undo), later);
        let full = self.undo.iter().filter(|p| p.data.is_some()).count();
        self.bytes = full * PAGE_SIZE + self.undo.len() * size_of::<SnapshotPage>();
    }
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("icount", &self.icount).finish_non_exhaustive()
    }
}

/// What the guest wrote to its UART, by the step that wrote it, as far as that was run.
#[derive(Debug, Default)]
struct Console(BTreeMap<u64, Vec<u8>>);

impl Observer for Console {
    fn output(&mut self, _: u64, output: &Output) {
        if let OutputKind::Console { dev: 0, bytes } = &output.kind {
            self.0.entry(output.icount).or_insert_with(|| bytes.clone());
        }
    }

    fn input(&mut self, _: u64, _: u64, _: &Input) {}
}

/// See the module documentation.
#[derive(Debug)]
pub struct Timeline {
    recording: Arc<RecordingDir>,
    info: RecordingInfo,
    engine: Option<EngineKind>,
    player: Player,
    /// By step; never empty.
    kept: Vec<Kept>,
    breakpoints: BTreeSet<u64>,
    watches: Vec<Watch>,
    console: Console,
}

impl Timeline {
    /// Opens a recording; the machine stands at its beginning.
    ///
    /// # Errors
    /// [`OpenRecordingError`].
    pub fn open(dir: &Path, engine: Option<EngineKind>) -> Result<Self, OpenRecordingError> {
        let recording = Arc::new(RecordingDir::open(dir)?);
        let info = RecordingInfo::scan(&recording)?;
        let player = Player::open(&recording, 0, engine)?;
        let mut timeline = Self {
            recording,
            info,
            engine,
            player,
            kept: Vec::new(),
            breakpoints: BTreeSet::new(),
            watches: Vec::new(),
            console: Console::default(),
        };
        timeline.begin();
        Ok(timeline)
    }

    /// The first checkpoint of a machine that was just made.
    fn begin(&mut self) {
        self.kept.clear();
        self.player.machine_mut().ram_mut().begin_undo();
        self.keep();
    }

    /// The machine. It is the past: it must not be changed.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        self.player.machine()
    }

    /// The recording.
    #[must_use]
    pub fn recording(&self) -> &RecordingDir {
        &self.recording
    }

    /// What its log holds.
    #[must_use]
    pub fn info(&self) -> &RecordingInfo {
        &self.info
    }

    /// Step that the machine stands at.
    #[must_use]
    pub fn icount(&self) -> u64 {
        self.player.icount()
    }

    /// First step of the recording.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.info.first.icount
    }

    /// Last step of the recording.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.info.last.icount
    }

    /// Guest time in ticks of 100 ns.
    #[must_use]
    pub fn mtime(&self) -> u64 {
        self.machine().mtime()
    }

    /// The guest's wall clock in nanoseconds since the Unix epoch.
    #[must_use]
    pub fn wall_clock_ns(&self) -> u64 {
        let ns = self.mtime().saturating_mul(100);
        self.machine().config().rtc_base_ns.saturating_add(ns)
    }

    /// Digests of the recording that were the machine's, since it was last made.
    #[must_use]
    pub fn digests(&self) -> u64 {
        self.player.digests()
    }

    /// Hash of the machine's state.
    pub fn digest(&mut self) -> u64 {
        self.player.machine_mut().digest()
    }

    /// Virtual addresses before which harts stop.
    pub fn set_breakpoints(&mut self, breakpoints: BTreeSet<u64>) {
        self.breakpoints = breakpoints;
    }

    /// Memory accesses to which stop the machine.
    pub fn set_watchpoints(&mut self, watches: Vec<Watch>) {
        self.watches = watches;
    }

    /// What the guest wrote to its UART up to here, as far as that was run since the recording was opened.
    #[must_use]
    pub fn console(&self) -> Vec<u8> {
        self.console.0.range(..=self.icount()).flat_map(|(_, bytes)| bytes).copied().collect()
    }

    /// States that the machine can be taken back to.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.kept.iter().map(|k| Checkpoint { icount: k.icount, bytes: k.bytes }).collect()
    }

    /// Writes the machine as it is to a snapshot file.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn save_snapshot(&mut self, path: &Path) -> Result<u64, SnapshotError> {
        let unfit = |reason| SnapshotError::Unfit { path: path.to_owned(), reason };
        let (pos, mtime) = (self.player.position(), self.mtime());
        let machine = self.player.machine_mut();
        let clock = ClockBase { mtime, at: pos.icount, rate: machine.clock().rate() };
        let images = super::start::image_hashes(machine.images());
        let head = SnapshotHead::of(machine, pos, clock).map_err(unfit)?;
        crate::snapshot::write_machine(path, &SnapshotHead { images, ..head }, machine)
    }

    // --- Checkpoints -------------------------------------------------------------------------------------------

    /// Keeps the present state.
    fn keep(&mut self) {
        let icount = self.player.icount();
        if self.kept.last().is_some_and(|k| k.icount == icount) {
            return;
        }
        self.close_last();
        let place = self.player.place().clone();
        let saved = self.player.machine_mut().save();
        self.kept.push(Kept { icount, saved, place, undo: Vec::new(), bytes: 0 });
        self.thin();
    }

    /// Takes the pages written since the last checkpoint from RAM.
    fn close_last(&mut self) {
        let mut undo = self.player.machine_mut().ram_mut().take_undo();
        let Some(last) = self.kept.last_mut() else { return };
        undo.sort_by_key(|page| page.page);
        last.add(undo);
    }

    /// Drops checkpoints that lie closer than they need to, and what is too much.
    fn thin(&mut self) {
        let here = self.player.icount();
        let mut at = self.kept.len().saturating_sub(2);
        while at > 0 {
            let gap = self.kept[at + 1].icount - self.kept[at - 1].icount;
            if gap <= (here - self.kept[at + 1].icount) / 8 {
                self.drop_kept(at);
            }
            at -= 1;
        }
        let total = |kept: &[Kept]| kept.iter().map(|k| k.bytes).sum::<usize>();
        let mut bytes = total(&self.kept);
        while bytes > BYTES_MAX && self.kept.len() > 2 {
            // The one whose loss makes the way back longest in proportion goes last.
            let cost = |at: &usize| {
                let gap = self.kept[at + 1].icount - self.kept[at - 1].icount;
                u128::from(gap) * 1024 / u128::from(here - self.kept[at + 1].icount + INTERVAL)
            };
            let Some(at) = (1..self.kept.len() - 1).min_by_key(cost) else { break };
            self.drop_kept(at);
            if total(&self.kept) == bytes {
                self.kept.remove(0);
            }
            bytes = total(&self.kept);
        }
    }

    fn drop_kept(&mut self, at: usize) {
        let dropped = self.kept.remove(at);
        self.kept[at - 1].add(dropped.undo);
    }

    /// Takes the machine back to a checkpoint.
    fn back_to(&mut self, at: usize) {
        self.close_last();
        let mut pages = BTreeMap::new();
        for kept in self.kept.drain(at + 1..).rev() {
            pages.extend(kept.undo.into_iter().map(|page| (page.page, page)));
        }
        let kept = &mut self.kept[at];
        kept.bytes = 0;
        pages.extend(std::mem::take(&mut kept.undo).into_iter().map(|page| (page.page, page)));
        let pages: Vec<SnapshotPage> = pages.into_values().collect();
        let rewound = self.player.machine_mut().rewind(&kept.saved, &pages);
        rewound.expect("the state was this machine's own");
        self.player.set_place(kept.place.clone());
    }

    /// Takes the machine to a state not after `icount` from which that is reached soonest.
    fn go_before(&mut self, icount: u64) -> Result<(), Stop> {
        let starts = self.recording.start_steps();
        // Before all that the log has for that step: a snapshot of it may be behind some.
        let start = starts.iter().rev().find(|s| **s < icount).copied().unwrap_or(0);
        let here = self.player.icount();
        let is_before = |k: &Kept| {
            k.icount < icount || k.icount == icount && k.place.is_before_records_of(icount)
        };
        let kept = self.kept.iter().rposition(is_before);
        let stays = here < icount || here == icount && self.player.is_before_records();
        let nearest = if stays { Some(here) } else { kept.map(|at| self.kept[at].icount) };
        if nearest.is_none_or(|near| start > near.saturating_add(JUMP_STEPS)) {
            let opened = Player::open(&self.recording, icount.saturating_sub(1), self.engine);
            self.player = opened.map_err(|e| Stop::End {
                how: ReplayEnd::Corrupt {
                    path: self.recording.path().to_owned(),
                    reason: crate::one_line::one_line(&e),
                },
            })?;
            self.begin();
        } else if let Some(at) = kept.filter(|_| !stays) {
            self.back_to(at);
        }
        Ok(())
    }

    // --- Moving ------------------------------------------------------------------------------------------------

    fn arm(&mut self) {
        let watchpoints: Vec<Watchpoint> = self.watchpoints().map(|(_, point)| point).collect();
        let machine = self.player.machine_mut();
        machine.set_breakpoints(&self.breakpoints);
        machine.set_watchpoints(&watchpoints);
    }

    fn disarm(&mut self) {
        let machine = self.player.machine_mut();
        machine.set_breakpoints(&BTreeSet::new());
        machine.set_watchpoints(&[]);
    }

    /// What is watched in physical memory, page by page.
    fn watchpoints(&self) -> impl Iterator<Item = (&Watch, Watchpoint)> {
        let page = PAGE_SIZE as u64;
        self.watches.iter().flat_map(move |watch| {
            let (mut va, mut left) = (watch.va, watch.len);
            let next = move || {
                let len = left.min(page - va % page);
                let piece = (left > 0).then_some((va, len));
                va = va.wrapping_add(len);
                left -= len;
                piece
            };
            let pieces = std::iter::from_fn(next).take(1024);
            pieces.filter_map(move |(va, len)| {
                let gpa = match watch.hart {
                    Some(hart) => self.machine().debug_translate(hart, va)?,
                    None => va,
                };
                Some((watch, Watchpoint { gpa, len, kind: watch.kind }))
            })
        })
    }

    /// The watch that an access belongs to.
    fn watch_at(&self, gpa: u64, is_write: bool) -> Option<Watch> {
        let fits = |kind| match kind {
            WatchKind::Write => is_write,
            WatchKind::Read => !is_write,
            WatchKind::Access => true,
        };
        let found = self
            .watchpoints()
            .find(|(watch, point)| gpa.wrapping_sub(point.gpa) < point.len && fits(watch.kind));
        found.map(|(watch, _)| *watch)
    }

    /// Runs to `until`, keeping checkpoints on the way, closer and closer to it if it is known to be where to stop.
    fn advance(&mut self, until: u64, is_goal: bool, interrupt: &AtomicBool) -> Ran {
        loop {
            let here = self.player.icount();
            let last = self.kept.last().map_or(here, |k| k.icount);
            let mut stop = last.saturating_add(INTERVAL).max(here.saturating_add(1));
            let left = until.saturating_sub(here);
            if is_goal && left <= INTERVAL && left > FINE {
                stop = stop.min(here + left / 2);
            }
            let stop = stop.min(until);
            match self.player.run(stop, interrupt, &mut self.console) {
                Ran::Reached if self.player.icount() >= until => return Ran::Reached,
                Ran::Reached => self.keep(),
                other => return other,
            }
        }
    }

    /// Runs to exactly a step, from wherever that is nearest.
    fn go_to(&mut self, icount: u64, interrupt: &AtomicBool) -> Result<(), Stop> {
        self.disarm();
        self.go_before(icount)?;
        match self.advance(icount, true, interrupt) {
            Ran::Reached => Ok(()),
            other => Err(self.stop_of(other)),
        }
    }

    fn stop_of(&self, ran: Ran) -> Stop {
        match ran {
            Ran::Reached => Stop::Reached,
            Ran::Interrupted => Stop::Interrupted,
            Ran::Breakpoint { hart } => Stop::Breakpoint { hart: usize::from(hart) },
            Ran::Watchpoint { hart, gpa, is_write, by_input } => {
                let watch = self.watch_at(gpa, is_write);
                let (va, kind) = watch.map_or((gpa, WatchKind::Access), |w| (w.va, w.kind));
                let before = self.player.icount() - u64::from(!by_input);
                Stop::Watchpoint { hart: usize::from(hart), va, kind, before }
            }
            Ran::End(how) => Stop::End { how },
        }
    }

    /// Goes to a step, as far as the recording has it.
    pub fn goto(&mut self, icount: u64, interrupt: &AtomicBool) -> Stop {
        let icount = icount.clamp(self.first(), self.last());
        match self.go_to(icount, interrupt) {
            Ok(()) => Stop::Reached,
            Err(stop) => stop,
        }
    }

    /// Runs forward to a breakpoint, a watchpoint, `until` or the end of the recording.
    pub fn resume(&mut self, until: Option<u64>, interrupt: &AtomicBool) -> Stop {
        self.arm();
        self.player.pass_breakpoint();
        let ran = self.advance(until.unwrap_or(u64::MAX), false, interrupt);
        let stop = self.stop_of(ran);
        self.disarm();
        stop
    }

    fn steps_of(&self, hart: usize) -> u64 {
        self.machine().harts().get(hart).map_or(0, |h| h.steps)
    }

    /// Runs forward until a hart has made a step.
    pub fn step(&mut self, hart: usize, interrupt: &AtomicBool) -> Stop {
        self.arm();
        self.player.pass_breakpoint();
        let (start, steps) = (self.player.icount(), self.steps_of(hart));
        let mut size = 1;
        let stop = loop {
            let here = self.player.icount();
            if here - start > SINGLE_STEPS_MAX {
                self.keep();
                size = INTERVAL;
            }
            match self.advance(here + size, false, interrupt) {
                Ran::Reached if self.steps_of(hart) == steps => {}
                Ran::Reached if size == 1 => break Stop::Done { hart },
                Ran::Reached => {
                    // Somewhere in between: just behind its last moment before the step.
                    break match self.find_step(hart, here, self.player.icount(), steps, interrupt) {
                        Ok(before) => match self.go_to(before + 1, interrupt) {
                            Ok(()) => Stop::Done { hart },
                            Err(stop) => stop,
                        },
                        Err(stop) => stop,
                    };
                }
                other => break self.stop_of(other),
            }
        };
        self.disarm();
        stop
    }

    /// The last step in `low..high` at which a hart had made `steps`; it has made more at `high`.
    fn find_step(
        &mut self,
        hart: usize,
        mut low: u64,
        mut high: u64,
        steps: u64,
        interrupt: &AtomicBool,
    ) -> Result<u64, Stop> {
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            self.go_to(middle, interrupt)?;
            if self.steps_of(hart) <= steps {
                low = middle;
                self.keep();
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Goes back to before the last step that a hart has made.
    pub fn reverse_step(&mut self, hart: usize, interrupt: &AtomicBool) -> Stop {
        let (here, steps) = (self.player.icount(), self.steps_of(hart));
        let result = self.step_back(hart, here, steps, interrupt);
        match result {
            Ok(stop) | Err(stop) => stop,
        }
    }

    fn step_back(
        &mut self,
        hart: usize,
        here: u64,
        steps: u64,
        interrupt: &AtomicBool,
    ) -> Result<Stop, Stop> {
        let first = self.first();
        if here <= first || steps == 0 {
            self.go_to(first, interrupt)?;
            return Ok(Stop::Begin);
        }
        self.go_to(here - 1, interrupt)?;
        if self.steps_of(hart) < steps {
            return Ok(Stop::Done { hart });
        }
        // Another hart made that one: look for this one's, in ever bigger steps back.
        let mut high = here - 1;
        let mut span = SINGLE_STEPS_MAX;
        loop {
            let low = high.saturating_sub(span).max(first);
            self.go_to(low, interrupt)?;
            if self.steps_of(hart) < steps {
                let before = self.find_step(hart, low, high, steps - 1, interrupt)?;
                self.go_to(before, interrupt)?;
                return Ok(Stop::Done { hart });
            }
            if low == first {
                return Ok(Stop::Begin);
            }
            (high, span) = (low, span.saturating_mul(4));
        }
    }

    /// Goes back to the last breakpoint or watched access before the present step, or to the beginning.
    pub fn reverse_resume(&mut self, interrupt: &AtomicBool) -> Stop {
        let result = self.resume_back(interrupt);
        self.disarm();
        match result {
            Ok(stop) | Err(stop) => stop,
        }
    }

    fn resume_back(&mut self, interrupt: &AtomicBool) -> Result<Stop, Stop> {
        let mut high = self.player.icount();
        // What is watched is where it is now, not where it was.
        let watchpoints: Vec<Watchpoint> = self.watchpoints().map(|(_, point)| point).collect();
        while high > self.first() {
            self.disarm();
            self.go_before(high - 1)?;
            // Some of what the log has for the step of a snapshot may lie before that.
            let low = self.player.icount() + u64::from(!self.player.is_before_records());
            self.player.heed_breakpoints();
            let machine = self.player.machine_mut();
            machine.set_breakpoints(&self.breakpoints);
            machine.set_watchpoints(&watchpoints);
            if let Some((icount, stop)) = self.last_stop_before(high, interrupt)? {
                self.go_to(icount, interrupt)?;
                return Ok(stop);
            }
            high = low;
        }
        self.go_to(self.first(), interrupt)?;
        Ok(Stop::Begin)
    }

    /// Runs forward to `high` and says what stopped the machine last on the way, and where.
    fn last_stop_before(
        &mut self,
        high: u64,
        interrupt: &AtomicBool,
    ) -> Result<Option<(u64, Stop)>, Stop> {
        let mut found = None;
        loop {
            match self.advance(high, false, interrupt) {
                Ran::Reached => return Ok(found),
                ran @ Ran::Breakpoint { .. } => {
                    found = Some((self.player.icount(), self.stop_of(ran)));
                    self.player.pass_breakpoint();
                }
                ran @ Ran::Watchpoint { .. } => {
                    let stop = self.stop_of(ran);
                    if let Stop::Watchpoint { before, .. } = stop {
                        found = Some((before, stop));
                    }
                }
                other => return Err(self.stop_of(other)),
            }
        }
    }
}

/// Both, by page; of a page that is in both, the first one's contents.
pub(crate) fn merged(first: Vec<SnapshotPage>, second: Vec<SnapshotPage>) -> Vec<SnapshotPage> {
    if first.is_empty() || second.is_empty() {
        return if first.is_empty() { second } else { first };
    }
    let mut out = Vec::with_capacity(first.len() + second.len());
    let (mut first, mut second) = (first.into_iter().peekable(), second.into_iter().peekable());
    while let (Some(a), Some(b)) = (first.peek(), second.peek()) {
        let (a, b) = (a.page, b.page);
        if a <= b {
            out.extend(first.next());
        }
        if b < a {
            out.extend(second.next());
        } else if a == b {
            second.next();
        }
    }
    out.extend(first);
    out.extend(second);
    out
}

#[cfg(test)]
mod tests;

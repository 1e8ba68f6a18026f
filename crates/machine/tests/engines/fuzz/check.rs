//! The comparison: two machines with one program, stopped at the same steps, one of them disturbed in between.
//!
//! # Invariants
//! - INV-FUZZ-1: what is done to the machines is a function of the program's seed and the segment's number, so that a
//!   run that is cut short is the start of the whole one.

use std::sync::atomic::AtomicBool;

use machine::engine::{EngineConfig, EngineKind};
use machine::io::{Input, Output};
use machine::ram::{GuestRam, PAGE_SIZE, RAM_BASE, SnapshotStep};
use machine::{Exit, Machine};

use crate::fuzz::program::Program;
use crate::fuzz::report;
use crate::rng::Rng;

/// What runs on the machines.
pub(crate) trait Guest {
    /// Name of the theme, for people.
    fn name(&self) -> &str;
    fn seed(&self) -> u64;
    /// A machine at the start.
    fn machine(&self, engine: EngineConfig) -> Machine;
    /// A machine with this state and empty RAM.
    fn restored(&self, saved: &machine::MachineSaved) -> Machine {
        Machine::restore(saved, crate::fuzz::program::images()).expect("it was saved by a machine")
    }
    /// Goes on elsewhere, so that no program gets stuck.
    fn restart(&self, _m: &mut Machine, _rng: &mut Rng) {}
}

impl Guest for Program {
    fn name(&self) -> &str {
        self.theme.name
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn machine(&self, engine: EngineConfig) -> Machine {
        Program::machine(self, engine)
    }

    fn restart(&self, m: &mut Machine, rng: &mut Rng) {
        Program::restart(self, m, rng);
    }
}

/// The reference's engine.
pub(crate) fn reference() -> EngineConfig {
    EngineConfig::new(EngineKind::Interpreter)
}

/// The JIT with settings that make its seldom paths frequent.
fn under_test(rng: &mut Rng) -> EngineConfig {
    EngineConfig {
        kind: EngineKind::Jit,
        hot_after: rng.pick(&[0, 0, 1, 2, 3, 8]),
        block_max: rng.pick(&[64, 64, 64, 5, 2, 1]),
        code_bytes: rng.pick(&[32 << 20, 1 << 20, 64 << 10, 16 << 10]),
        counts_twice: rng.one_in(4),
    }
}

/// A snapshot under way: the digest of RAM when it was armed, and the pages so far.
#[derive(Debug)]
struct Sweep {
    digest: u64,
    copy: GuestRam,
}

/// One of the two machines.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) m: Machine,
    outputs: Vec<Output>,
    sweep: Option<Sweep>,
    is_reference: bool,
    /// Whether its code stays until the engine itself drops it.
    keeps_code: bool,
    /// Blocks and evictions of engines that it had.
    past: (u64, u64),
}

/// Steps to run together, and how.
#[derive(Debug, Clone, Copy)]
struct Segment {
    number: u64,
    start: u64,
    end: u64,
}

/// What one pair did, for who asks.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Summary {
    pub(crate) steps: u64,
    pub(crate) stops: u64,
    pub(crate) blocks: u64,
    pub(crate) evictions: u64,
}

impl Summary {
    /// Adds another pair's.
    pub(crate) fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.stops += other.stops;
        self.blocks += other.blocks;
        self.evictions += other.evictions;
    }
}

fn segment_rng(seed: u64, number: u64, role: u64) -> Rng {
    let mut rng = Rng::new(seed.wrapping_mul(0x9e37) ^ number << 32 ^ role << 56);
    rng.next();
    rng
}

/// Runs to `until`; when all harts wait, time goes on to the next timer. False when nothing can happen any more.
pub(crate) fn run_to(m: &mut Machine, until: u64) -> bool {
    let stop = AtomicBool::new(false);
    loop {
        match m.run(until, &stop) {
            Exit::Idle => {
                let Some(mtime) = m.next_timer() else { return false };
                let rate = m.clock().rate();
                m.apply(&Input::Clock { mtime, rate }).expect("there is a clock");
            }
            Exit::Reached => return true,
            Exit::Halted => return false,
            Exit::Output | Exit::Stopped => {}
            Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
        }
    }
}

impl Side {
    fn new(guest: &dyn Guest, engine: EngineConfig, is_reference: bool) -> Self {
        let keeps_code = segment_rng(guest.seed(), 0, 5).one_in(3);
        let m = guest.machine(engine);
        Self { m, outputs: vec![], sweep: None, is_reference, keeps_code, past: (0, 0) }
    }

    /// Runs a segment as far as `until`, in slices of chance with disturbances between them.
    fn run(&mut self, guest: &dyn Guest, segment: Segment, until: u64) {
        let mut rng = segment_rng(guest.seed(), segment.number, 1 + u64::from(self.is_reference));
        let calm = rng.one_in(if self.is_reference { 2 } else { 3 });
        let short = rng.one_in(2);
        while self.m.icount() < until {
            let slice = match rng.below(4) {
                _ if calm => u64::MAX >> 1,
                0 => 1 + rng.below(4),
                1 | 2 if short => 1 + rng.below(50),
                1 => 1 + rng.below(300),
                _ => 1 + rng.below(3000),
            };
            let to = (self.m.icount() + slice).min(until);
            if !run_to(&mut self.m, to) {
                break;
            }
            if !calm {
                self.disturb(guest, &mut rng);
            }
        }
        self.outputs.extend(self.m.take_outputs());
    }

    /// Does something to the machine that it must not notice.
    fn disturb(&mut self, guest: &dyn Guest, rng: &mut Rng) {
        match rng.below(24) {
            0 | 7 | 8 if self.keeps_code => {}
            0 => self.m.drop_caches(),
            1 => drop(self.m.digest()),
            2 => drop(self.m.save()),
            3 if self.sweep.is_none() && rng.one_in(8) => {
                let digest = self.m.ram_mut().digest();
                self.m.ram_mut().arm_snapshot(None);
                self.sweep = Some(Sweep { digest, copy: GuestRam::new(self.m.ram().size()) });
            }
            4 | 5 => self.snapshot_pages(),
            6 if rng.one_in(8) => {
                self.m.ram_mut().disarm_snapshot();
                self.sweep = None;
            }
            7 if rng.one_in(8) && self.sweep.is_none() => self.restore(guest, rng),
            8 if !self.is_reference && rng.one_in(4) => {
                let engine = if rng.one_in(3) { reference() } else { under_test(rng) };
                self.leave_engine();
                self.m.set_engine(engine);
            }
            _ => {}
        }
    }

    fn leave_engine(&mut self) {
        let stats = self.m.engine_stats();
        self.past.0 += stats.blocks;
        self.past.1 += stats.evictions;
    }

    fn snapshot_pages(&mut self) {
        let Some(under_way) = &mut self.sweep else { return };
        let mut budget = 4000;
        loop {
            match self.m.ram_mut().next_snapshot_page(&mut budget) {
                SnapshotStep::Page(p) => {
                    let Some(data) = p.data else { continue };
                    let gpa = RAM_BASE + u64::from(p.page) * PAGE_SIZE as u64;
                    under_way.copy.write(gpa, &data).expect("the copy is as large");
                }
                SnapshotStep::OutOfBudget => return,
                SnapshotStep::Done => break,
            }
        }
        assert_eq!(under_way.copy.digest(), under_way.digest, "a snapshot is of its moment");
        self.sweep = None;
    }

    /// Goes on with a machine that has the same state and nothing else in common.
    fn restore(&mut self, guest: &dyn Guest, rng: &mut Rng) {
        self.outputs.extend(self.m.take_outputs());
        self.leave_engine();
        let mut other = guest.restored(&self.m.save());
        other.set_engine(if self.is_reference || rng.one_in(4) {
            reference()
        } else {
            under_test(rng)
        });
        for (page, data) in (0..).zip(self.m.ram().bytes().chunks_exact(PAGE_SIZE)) {
            if !machine::ram::is_zero(data) {
                other.load_page(page, data).expect("RAM is as large");
            }
        }
        self.m = other;
    }
}

/// Two machines with one program.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) reference: Side,
    pub(crate) tested: Side,
}

impl Pair {
    fn new(guest: &dyn Guest) -> Self {
        let mut rng = segment_rng(guest.seed(), 0, 7);
        Self {
            reference: Side::new(guest, reference(), true),
            tested: Side::new(guest, under_test(&mut rng), false),
        }
    }

    /// Runs a segment, or its start.
    fn run(&mut self, guest: &dyn Guest, segment: Segment, until: u64) {
        self.reference.run(guest, segment, until);
        self.tested.run(guest, segment, until);
    }

    /// Whether the states differ; `memory` says to look at RAM, too.
    pub(crate) fn differs(&mut self, memory: bool) -> bool {
        let (a, b) = (&mut self.reference, &mut self.tested);
        a.m.save() != b.m.save()
            || a.m.harts().iter().zip(b.m.harts()).any(|(a, b)| a.x[..32] != b.x[..32])
            || a.outputs != b.outputs
            || memory && a.m.digest() != b.m.digest()
    }

    /// Applies to both what comes from outside behind a segment.
    fn inputs(&mut self, guest: &dyn Guest, segment: Segment) {
        let rng = segment_rng(guest.seed(), segment.number, 4);
        let stuck = self.reference.m.icount() < segment.end;
        for side in [&mut self.reference, &mut self.tested] {
            let mut rng = rng.clone();
            side.outputs.clear();
            match rng.below(16) {
                0 => {
                    let (mtime, rate) =
                        (side.m.mtime() + rng.below(300), rng.pick(&[1 << 11, 1 << 14, 1 << 16]));
                    side.m.apply(&Input::Clock { mtime, rate }).expect("there is a clock");
                }
                1 | 2 => {
                    let bytes = vec![rng.bits(7) as u8; 1 + rng.below(3) as usize];
                    side.m.apply(&Input::Console { dev: 0, bytes }).expect("there is a UART");
                }
                _ => {}
            }
            if stuck || rng.one_in(12) {
                guest.restart(&mut side.m, &mut rng);
            }
        }
    }
}

/// The segment behind `start`.
fn segment(seed: u64, number: u64, start: u64) -> Segment {
    let mut rng = segment_rng(seed, number, 3);
    let length = 1 + match rng.below(8) {
        0..=2 => rng.below(50),
        3 | 4 => rng.below(1000),
        _ => rng.below(9000),
    };
    Segment { number, start, end: start + length }
}

/// Runs a program on both engines for about `steps` steps.
///
/// # Errors
/// A report of the first difference.
pub(crate) fn check(guest: &dyn Guest, steps: u64) -> Result<Summary, String> {
    let mut pair = Pair::new(guest);
    let mut summary = Summary::default();
    for number in 0.. {
        let at = pair.reference.m.icount();
        if at >= steps || pair.reference.m.halted().is_some() {
            break;
        }
        let segment = segment(guest.seed(), number, at);
        pair.run(guest, segment, segment.end);
        if pair.differs(looks_at_memory(segment)) {
            return Err(locate(guest, segment));
        }
        pair.inputs(guest, segment);
        summary.stops += 1;
    }
    if pair.differs(true) {
        return Err(format!("{}: memory differs at the end only", report::command(guest)));
    }
    summary.steps = pair.reference.m.icount();
    pair.tested.leave_engine();
    (summary.blocks, summary.evictions) = pair.tested.past;
    Ok(summary)
}

fn looks_at_memory(segment: Segment) -> bool {
    segment.end - segment.start > 500 || segment.number.is_multiple_of(4)
}

/// A pair that stands at `until`, in the segment of this number.
fn replay(guest: &dyn Guest, last: u64, until: u64) -> Pair {
    let mut pair = Pair::new(guest);
    for number in 0..last {
        let at = pair.reference.m.icount();
        let segment = segment(guest.seed(), number, at);
        pair.run(guest, segment, segment.end);
        pair.differs(looks_at_memory(segment));
        pair.inputs(guest, segment);
    }
    let at = pair.reference.m.icount();
    pair.run(guest, segment(guest.seed(), last, at), until);
    pair
}

/// Finds the first step behind which the machines differ, and says what happened there.
fn locate(guest: &dyn Guest, found: Segment) -> String {
    // Memory is not looked at everywhere: go back to where all is well.
    let (mut number, mut low, mut high) = (found.number, found.start, found.end);
    while number > 0 && replay(guest, number, low).differs(true) {
        number -= 1;
        let mut pair = replay(guest, number, 0);
        high = low;
        low = pair.reference.m.icount();
        if !pair.differs(true) {
            break;
        }
    }
    if !replay(guest, number, high).differs(true) {
        return format!(
            "{}\nthe machines differed somewhere in steps {low} to {high}, but not again",
            report::command(guest)
        );
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if replay(guest, number, middle).differs(true) {
            high = middle;
        } else {
            low = middle;
        }
    }
    let mut pair = replay(guest, number, high);
    let mut before =
        replay(guest, number, high.saturating_sub(report::HISTORY).max(found.start.min(low)));
    report::report(guest, &mut before.reference.m, &mut pair, high)
}

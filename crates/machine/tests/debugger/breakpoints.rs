//! Breakpoints: a run stops before the instructions that it should, on either engine, and is otherwise the run without.
//!
//! What should happen is read off single steps of the interpreter, which nothing stops.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use machine::engine::{EngineConfig, EngineKind};
use machine::hart::{Hart, Mode, cause};
use machine::io::Input;
use machine::ram::RAM_BASE;
use machine::{Exit, Machine};

use crate::asm::{NOP, addi, jal};
use crate::fuzz::check::{Guest, reference, run_to};
use crate::rng::Rng;
use crate::{engine, guests};

/// Steps of a program.
const STEPS: u64 = 15_000;

/// By icount, the hart that makes the next step and the address of its instruction; `None` for an interrupt.
type Trace = Vec<Option<(u8, u64)>>;

/// What of a hart says what its next step was.
struct Before {
    id: u8,
    pc: u64,
    steps: u64,
    mstatus: u64,
    x: [u64; 32],
}

impl Before {
    fn new(hart: &Hart) -> Self {
        let (id, pc, steps, mstatus) = (hart.id, hart.pc, hart.steps, hart.csr.mstatus);
        Self { id, pc, steps, mstatus, x: hart.x[..32].try_into().unwrap() }
    }
}

/// Whether what the hart did was to take an interrupt.
fn took_interrupt(before: &Before, after: &Hart) -> bool {
    let handled = match after.mode {
        Mode::Machine => (after.csr.mcause, after.csr.mepc, after.csr.mtvec),
        _ => (after.csr.scause, after.csr.sepc, after.csr.stvec),
    };
    let (why, from, handler) = handled;
    let vector = (handler & !3) + if handler & 1 != 0 { 4 * (why & 0x3f) } else { 0 };
    why & cause::INTERRUPT != 0
        && from == before.pc
        && after.pc == vector
        && before.x == after.x[..32]
        && before.mstatus != after.csr.mstatus
}

fn trace(guest: &dyn Guest) -> Trace {
    let mut m = guest.machine(reference());
    let mut trace = vec![];
    while m.icount() < STEPS {
        let before: Vec<Before> = m.harts().iter().map(Before::new).collect();
        if !run_to(&mut m, trace.len() as u64 + 1) {
            break;
        }
        let mut pairs = before.iter().zip(m.harts());
        let (before, after) = pairs.find(|(before, after)| before.steps != after.steps).unwrap();
        trace.push((!took_interrupt(before, after)).then_some((before.id, before.pc)));
    }
    trace
}

/// Some addresses that the program comes to, and some that look like them.
fn breakpoints(trace: &Trace, from: u64, rng: &mut Rng) -> BTreeSet<u64> {
    let mut set = BTreeSet::new();
    for _ in 0..rng.below(6) {
        let span = rng.pick(&[20, 300, STEPS]);
        let at = (from + rng.below(span)) as usize % trace.len();
        // At the end of a page there may be an instruction that ends on the next one.
        let mut ends = trace[at..].iter().flatten().filter(|step| step.1 & 0xfff == 0xffe);
        let end = if rng.one_in(4) { ends.next().copied() } else { None };
        if let Some((_, pc)) = end.or(trace[at]) {
            let other = rng.pick(&[0x1000, 0x10_0000, 2, 4, 1 << 40]);
            set.insert(if rng.one_in(4) { pc.wrapping_add(other) } else { pc });
        }
    }
    set
}

/// What a guest does is compared stop by stop.
struct Compared<'a> {
    guest: &'a dyn Guest,
    trace: Trace,
    m: Machine,
    reference: Machine,
    set: BTreeSet<u64>,
    hits: u64,
    /// Those of instructions of four bytes at the end of a page.
    straddling: u64,
}

impl Compared<'_> {
    /// The hart at a breakpoint at an icount.
    fn expected(&self, icount: u64) -> Option<u8> {
        let (hart, pc) = (*self.trace.get(icount as usize)?)?;
        self.set.contains(&pc).then_some(hart)
    }

    /// Runs once, and says why it ended.
    fn run(&mut self, until: u64) -> Exit {
        let start = self.m.icount();
        let exit = self.m.run(until, &AtomicBool::new(false));
        let at = self.m.icount();
        let name =
            format!("{} {} from {start} to {at}: {exit:?}", self.guest.name(), self.guest.seed());
        for passed in start + 1..at {
            assert_eq!(self.expected(passed), None, "{name}: {passed} was passed");
        }
        match exit {
            Exit::Breakpoint { hart } => {
                assert!(at > start, "{name}: the first step of a run is made");
                assert_eq!(self.expected(at), Some(hart), "{name}");
                assert_eq!(self.m.breakpoint_ahead(), Some(hart), "{name}");
                self.hits += 1;
                let pc = self.m.harts()[usize::from(hart)].pc;
                let low =
                    self.m.debug_translate(hart.into(), pc).map(|gpa| self.m.ram().read_u16(gpa));
                let is_long = matches!(low, Some(Ok(low)) if low & 3 == 3);
                self.straddling += u64::from(is_long && pc & 0xfff == 0xffe);
            }
            Exit::Idle => {
                if let Some(mtime) = self.m.next_timer() {
                    let rate = self.m.clock().rate();
                    self.m.apply(&Input::Clock { mtime, rate }).unwrap();
                }
            }
            Exit::Halted => {}
            _ if at < self.trace.len() as u64 => {
                assert_eq!(self.m.breakpoint_ahead(), self.expected(at), "{name}");
            }
            _ => {}
        }
        exit
    }

    fn compare(&mut self, memory: bool) {
        let at = self.m.icount();
        run_to(&mut self.reference, at);
        let name = || format!("{} {} at {at}", self.guest.name(), self.guest.seed());
        assert_eq!(self.m.save(), self.reference.save(), "{}", name());
        if memory {
            assert_eq!(self.m.digest(), self.reference.digest(), "{}", name());
        }
    }
}

/// Runs a program with breakpoints that come and go; returns how often it stopped at one, and at one that
/// ends on the next page.
fn stop_and_go(guest: &dyn Guest, trace: Trace, rng: &mut Rng) -> (u64, u64) {
    let (m, reference) = (guest.machine(engine(rng)), guest.machine(reference()));
    let mut run =
        Compared { guest, trace, m, reference, set: BTreeSet::new(), hits: 0, straddling: 0 };
    let end = run.trace.len() as u64;
    while run.m.icount() < end {
        let at = run.m.icount();
        if rng.one_in(8) {
            run.set = breakpoints(&run.trace, at, rng);
            run.m.set_breakpoints(&run.set);
        } else if rng.one_in(8) {
            run.m.set_breakpoints(&BTreeSet::new());
            run.m.set_breakpoints(&run.set);
        }
        let length = rng.pick(&[1, 50, 1000, 5000]);
        match run.run((at + 1 + rng.below(length)).min(end)) {
            Exit::Halted => break,
            // The reference is not woken before it goes on.
            Exit::Idle => {}
            _ if rng.one_in(4) => run.compare(rng.one_in(4)),
            _ => {}
        }
    }
    run.compare(true);
    (run.hits, run.straddling)
}

#[test]
fn run_stops_where_it_should_and_is_the_run_without() {
    let (mut hits, mut straddling) = (0, 0);
    for guest in guests(12) {
        let trace = trace(&*guest);
        for round in 0..2 {
            let mut rng = Rng::new(guest.seed() ^ round << 32 ^ 0xb4ea_0000);
            let stops = stop_and_go(&*guest, trace.clone(), &mut rng);
            (hits, straddling) = (hits + stops.0, straddling + stops.1);
        }
    }
    assert!(hits > 8000 && straddling > 50, "{hits} stops, {straddling} across pages");
}

/// A loop of two pages, in which a register counts.
fn looping(kind: EngineKind) -> Machine {
    let mut m =
        guests(1).next().unwrap().machine(EngineConfig { hot_after: 0, ..EngineConfig::new(kind) });
    let mut code = vec![addi(5, 5, 1), addi(6, 6, 1), addi(7, 7, 1), jal(0, 0x1000 - 12)];
    code.resize(0x400, NOP);
    code.push(jal(0, -0x1000));
    m.ram_mut()
        .write(LOOP, &code.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>())
        .unwrap();
    let hart = &mut m.harts_mut()[0];
    (hart.pc, hart.mode, hart.csr.mie) = (LOOP, Mode::Machine, 0);
    hart.x[5] = 0;
    m
}

const LOOP: u64 = RAM_BASE + 0x10_0000;
const ROUND: u64 = 5;

/// Code stops where breakpoints once were until it has done so in vain too often. Whatever it does about that, those that
/// are there are found.
#[test]
fn breakpoints_of_the_past_are_forgotten_and_new_ones_found() {
    for kind in [EngineKind::Interpreter, EngineKind::Jit] {
        let mut m = looping(kind);
        let never = AtomicBool::new(false);
        let start = m.icount();
        for round in 0..20 {
            let at = LOOP + 4 * (round % 3);
            m.set_breakpoints(&[at, LOOP + 0x800].into());
            for _ in 0..3 {
                let here = m.icount();
                assert_eq!(m.run(u64::MAX, &never), Exit::Breakpoint { hart: 0 });
                assert_eq!(m.harts()[0].pc, at);
                assert!(m.icount() - here <= ROUND);
            }
            // None that the loop comes to, for longer than code may stop in vain.
            m.set_breakpoints(&[LOOP + 0x800].into());
            let until = m.icount() + 6000 * ROUND;
            assert_eq!(m.run(until, &never), Exit::Reached);
        }
        assert_eq!(m.harts()[0].x[5], (m.icount() - start).div_ceil(ROUND));
    }
}

#[test]
fn breakpoints_that_come_back_cost_no_code() {
    let mut m = looping(EngineKind::Jit);
    if m.engine() != EngineKind::Jit {
        return;
    }
    let never = AtomicBool::new(false);
    let set = [LOOP + 4, LOOP + 0x1000].into();
    let stop = |m: &mut Machine| {
        m.set_breakpoints(&set);
        assert_eq!(m.run(u64::MAX, &never), Exit::Breakpoint { hart: 0 });
        m.set_breakpoints(&BTreeSet::new());
        m.engine_stats().blocks
    };
    let blocks = (0..10).map(|_| stop(&mut m)).last().unwrap();
    assert!(blocks > 0);
    for _ in 0..50 {
        assert_eq!(stop(&mut m), blocks);
    }
}

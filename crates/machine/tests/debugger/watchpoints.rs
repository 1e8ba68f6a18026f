//! Watchpoints: a run stops behind exactly the accesses that it should, on either engine, and is otherwise the run without.
//!
//! What should happen is read off single steps of the interpreter: the instruction, its registers and the page tables before
//! the step say what it accesses.

use std::sync::atomic::AtomicBool;

use isa::{Insn, Op};
use machine::config::MachineConfig;
use machine::debug::{WatchHit, WatchKind, Watchpoint};
use machine::engine::{EngineConfig, EngineKind};
use machine::hart::{Hart, Mode, Reservation};
use machine::io::Input;
use machine::ram::RAM_BASE;
use machine::{Exit, Machine, mmu};

use crate::asm::{addi, fld, fsd, jal, ld, s, sd};
use crate::fuzz::check::{Guest, reference, run_to};
use crate::fuzz::program::images;
use crate::fuzz::report::next_instruction;
use crate::rng::Rng;
use crate::{engine, guests};

/// Steps of a program.
const STEPS: u64 = 12_000;

/// A part of what an instruction accesses, within one page.
#[derive(Debug, Clone, Copy)]
struct Part {
    gpa: u64,
    len: u64,
    is_write: bool,
}

/// What the next step accesses, if it is that of this instruction and succeeds.
fn parts(m: &Machine, hart: &Hart, insn: Insn) -> Vec<Part> {
    let x = |r: u8| hart.x[usize::from(r)];
    let at = x(insn.rs1).wrapping_add(i64::from(insn.imm) as u64);
    let wide = insn.op >= Op::LrD;
    let (va, len, reads, writes) = match insn.op {
        Op::Lb | Op::Lbu => (at, 1, true, false),
        Op::Lh | Op::Lhu => (at, 2, true, false),
        Op::Lw | Op::Lwu | Op::Flw => (at, 4, true, false),
        Op::Ld | Op::Fld => (at, 8, true, false),
        Op::Sb => (at, 1, false, true),
        Op::Sh => (at, 2, false, true),
        Op::Sw | Op::Fsw => (at, 4, false, true),
        Op::Sd | Op::Fsd => (at, 8, false, true),
        Op::CboZero => (x(insn.rs1) & !63, 64, false, true),
        Op::LrW | Op::LrD => (x(insn.rs1), if wide { 8 } else { 4 }, true, false),
        Op::ScW | Op::ScD => (x(insn.rs1), if wide { 8 } else { 4 }, false, true),
        op if op > Op::LrW && op <= Op::AmoMaxuD => {
            (x(insn.rs1), if wide { 8 } else { 4 }, true, true)
        }
        _ => return vec![],
    };
    let satp = if hart.data_mode() == Mode::Machine { 0 } else { hart.csr.satp };
    let first = len.min(0x1000 - (va & 0xfff));
    let pieces = [(va, first), (va.wrapping_add(first), len - first)];
    let places: Option<Vec<(u64, u64)>> = pieces
        .into_iter()
        .filter(|piece| piece.1 != 0)
        .map(|(va, len)| Some((mmu::peek(m.ram(), satp, va)?, len)))
        .collect();
    let places = places.unwrap_or_default();
    if matches!(insn.op, Op::ScW | Op::ScD) && !is_held(m, hart, places.first(), wide) {
        return vec![];
    }
    // Of an instruction that does both, the write comes first.
    let kinds = [(true, writes), (false, reads)].into_iter().filter(|kind| kind.1);
    kinds
        .flat_map(|(is_write, _)| places.iter().map(move |&(gpa, len)| Part { gpa, len, is_write }))
        .collect()
}

/// Whether an SC to this place succeeds.
fn is_held(m: &Machine, hart: &Hart, place: Option<&(u64, u64)>, wide: bool) -> bool {
    let Some(&(gpa, _)) = place else { return false };
    let value = match wide {
        true => m.ram().read_u64(gpa),
        false => m.ram().read_u32(gpa).map(|v| v as i32 as u64),
    };
    value.is_ok_and(|value| hart.reservation() == Some(Reservation { gpa, value }))
}

/// The hart that makes a step, the instruction if it accesses something, and what.
#[derive(Debug, Clone)]
struct Step {
    hart: u8,
    op: Option<Op>,
    parts: Vec<Part>,
}

/// Steps by icount.
type Trace = Vec<Step>;

fn trace(guest: &dyn Guest) -> Trace {
    let mut m = guest.machine(reference());
    let mut trace = vec![];
    while m.icount() < STEPS {
        let before: Vec<_> = m
            .harts()
            .iter()
            .map(|hart| {
                let insn = next_instruction(&m, hart);
                let after = hart.pc.wrapping_add(insn.map_or(0, |insn| insn.len.into()));
                let parts = insn.map_or(vec![], |insn| parts(&m, hart, insn));
                (hart.steps, after, Step { hart: hart.id, op: insn.map(|insn| insn.op), parts })
            })
            .collect();
        if !run_to(&mut m, trace.len() as u64 + 1) {
            break;
        }
        let mut pairs = m.harts().iter().zip(before);
        let (hart, (_, after, step)) = pairs.find(|(hart, b)| hart.steps != b.0).unwrap();
        // None of these instructions jumps: elsewhere is a trap.
        let parts = if hart.pc == after { step.parts } else { vec![] };
        trace.push(Step { parts, ..step });
    }
    trace
}

/// Some places that the program accesses, and some beside them.
fn watchpoints(trace: &Trace, from: u64, rng: &mut Rng) -> Vec<Watchpoint> {
    let mut points = vec![];
    for _ in 0..rng.below(5) {
        let kind = rng.pick(&[WatchKind::Write, WatchKind::Read, WatchKind::Access]);
        let span = rng.pick(&[20, 300, STEPS]);
        let at = (from + rng.below(span)) as usize % trace.len();
        let (far, least) = rng.pick(&[(50, 1), (50, 1), (3000, 2)]);
        let near = trace[at..].iter().take(far).find(|step| step.parts.len() >= least);
        let Some(part) = near.map(|step| rng.pick(&step.parts)) else { continue };
        let gpa = part.gpa.wrapping_add(rng.pick(&[0, 0, 0, 1, 8, 64])).wrapping_sub(rng.below(3));
        points.push(Watchpoint { gpa, len: rng.pick(&[1, 2, 4, 8, 100, 0]), kind });
    }
    points
}

fn hit(points: &[Watchpoint], parts: &[Part]) -> Option<WatchHit> {
    parts.iter().find_map(|part| {
        let touched = points.iter().find(|point| {
            let kind = match point.kind {
                WatchKind::Write => part.is_write,
                WatchKind::Read => !part.is_write,
                WatchKind::Access => true,
            };
            kind && (part.gpa..part.gpa + part.len)
                .any(|byte| byte.wrapping_sub(point.gpa) < point.len)
        });
        touched.map(|point| WatchHit { gpa: point.gpa.max(part.gpa), is_write: part.is_write })
    })
}

/// Runs a program with watchpoints that come and go; returns the steps behind which it stopped at one.
fn stop_and_go(guest: &dyn Guest, trace: &Trace, rng: &mut Rng) -> Vec<Step> {
    let (mut m, mut unwatched) = (guest.machine(engine(rng)), guest.machine(reference()));
    let (mut points, mut hits) = (vec![], vec![]);
    let end = trace.len() as u64;
    while m.icount() < end {
        let start = m.icount();
        if points.is_empty() || rng.one_in(8) {
            points = watchpoints(trace, start, rng);
            m.set_watchpoints(&points);
        }
        let length = rng.pick(&[1, 50, 1000, 5000]);
        let exit = m.run((start + 1 + rng.below(length)).min(end), &AtomicBool::new(false));
        let at = m.icount();
        let name = format!("{} {} {start} to {at}: {exit:?}", guest.name(), guest.seed());
        let expected = |step: u64| {
            let step = &trace[step as usize];
            hit(&points, &step.parts).map(|hit| (step.hart, hit))
        };
        let last = if matches!(exit, Exit::Watchpoint { .. }) { at - 1 } else { at };
        for passed in start..last {
            assert_eq!(expected(passed), None, "{name}: {passed} was passed");
        }
        match exit {
            Exit::Watchpoint { hart, gpa, is_write } => {
                assert_eq!(expected(last), Some((hart, WatchHit { gpa, is_write })), "{name}");
                hits.push(trace[last as usize].clone());
            }
            Exit::Idle => {
                let mtime = m.next_timer().unwrap();
                let rate = m.clock().rate();
                m.apply(&Input::Clock { mtime, rate }).unwrap();
                continue;
            }
            Exit::Halted => break,
            _ => {}
        }
        if rng.one_in(4) {
            run_to(&mut unwatched, at);
            assert_eq!(m.save(), unwatched.save(), "{name}");
            assert!(rng.one_in(2) || m.digest() == unwatched.digest(), "{name}: memory differs");
        }
    }
    hits
}

#[test]
fn run_stops_behind_what_it_should_and_is_the_run_without() {
    let mut hits = vec![];
    for guest in guests(16) {
        let trace = trace(&*guest);
        for round in 0..2 {
            let mut rng = Rng::new(guest.seed() ^ round << 32 ^ 0x3a7c_0000);
            hits.extend(stop_and_go(&*guest, &trace, &mut rng));
        }
    }
    let count = |is: &dyn Fn(&Step) -> bool| hits.iter().filter(|step| is(step)).count();
    let of_ops = |from: Op, to: Op| count(&|s| s.op.is_some_and(|op| (from..=to).contains(&op)));
    let straddling = count(&|s| s.parts.len() == 2 && s.parts[0].is_write == s.parts[1].is_write);
    let devices = count(&|s| s.parts[0].gpa < RAM_BASE);
    let counts = [
        (hits.len(), 3000),
        (straddling, 10),
        (devices, 10),
        (of_ops(Op::Lb, Op::Lwu), 500),
        (of_ops(Op::Sb, Op::Sd), 500),
        (of_ops(Op::LrW, Op::LrW) + of_ops(Op::LrD, Op::LrD), 20),
        (of_ops(Op::ScW, Op::ScW) + of_ops(Op::ScD, Op::ScD), 10),
        (of_ops(Op::AmoSwapW, Op::AmoMaxuW) + of_ops(Op::AmoSwapD, Op::AmoMaxuD), 50),
        (of_ops(Op::Flw, Op::Fsw) + of_ops(Op::Fld, Op::Fsd), 50),
        (of_ops(Op::CboZero, Op::CboZero), 5),
    ];
    assert!(counts.iter().all(|(count, least)| count >= least), "{counts:?}");
}

const DEVICE: u64 = machine::board::VIRTIO_BASE;
const RINGS: u64 = RAM_BASE + 0x10_0000;
const BUFFER: u64 = RAM_BASE + 0x20_0000;

/// What a driver writes to a virtio console: both queues with one buffer, and that there is something to send.
fn driver() -> Vec<(u64, u32)> {
    let mut writes: Vec<(u64, u32)> = vec![];
    for (offset, value) in [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
        writes.push((DEVICE + offset, value));
    }
    for queue in 0..2 {
        let ring = RINGS + u64::from(queue) * 0x1000;
        // One descriptor; the device may write the one for what it receives.
        let flags = if queue == 0 { 2 } else { 0 };
        let buffer = BUFFER + u64::from(queue) * 0x1000;
        writes.extend([(ring, buffer as u32), (ring + 8, 16), (ring + 12, flags)]);
        writes.push((ring + 0x400, 1 << 16));
        let rings = [(0x80, ring), (0x90, ring + 0x400), (0xa0, ring + 0x800)];
        writes.extend([(DEVICE + 0x30, queue), (DEVICE + 0x38, 8)]);
        writes.extend(rings.map(|(offset, at)| (DEVICE + offset, at as u32)));
        writes.push((DEVICE + 0x44, 1));
    }
    writes.extend([(DEVICE + 0x70, 15), (DEVICE + 0x50, 0), (DEVICE + 0x50, 1)]);
    writes
}

/// A machine that makes these writes, five steps for each.
fn machine_with_console(writes: &[(u64, u32)], kind: EngineKind) -> Machine {
    let config = MachineConfig {
        harts: 1,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 1,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    let mut m = Machine::new(config, images()).unwrap();
    m.set_engine(EngineConfig { hot_after: 0, ..EngineConfig::new(kind) });
    let code = [ld(5, 8, 0), ld(6, 8, 8), s(0x23, 2, 5, 6, 0), addi(8, 8, 16), jal(0, -16)];
    m.ram_mut().write(RAM_BASE, &code.map(u32::to_le_bytes).concat()).unwrap();
    let table = RAM_BASE + 0x1000;
    for (at, &(gpa, value)) in (table..).step_by(16).zip(writes) {
        m.ram_mut().write(at, &gpa.to_le_bytes()).unwrap();
        m.ram_mut().write(at + 8, &u64::from(value).to_le_bytes()).unwrap();
    }
    m.harts_mut()[0].pc = RAM_BASE;
    m.harts_mut()[0].x[8] = table;
    m
}

#[test]
fn what_devices_write_is_told_of() {
    let writes = driver();
    let used = RINGS + 0x1800;
    let mut unwatched = machine_with_console(&writes, EngineKind::Interpreter);
    while unwatched.ram().read_u16(used + 2) == Ok(0) {
        let next = unwatched.icount() + 1;
        run_to(&mut unwatched, next);
    }
    let written = unwatched.icount();
    for kind in [EngineKind::Interpreter, EngineKind::Jit] {
        let mut m = machine_with_console(&writes, kind);
        m.set_watchpoints(&[
            Watchpoint { gpa: used + 2, len: 2, kind: WatchKind::Write },
            Watchpoint { gpa: BUFFER, len: 8, kind: WatchKind::Access },
        ]);
        let stop = AtomicBool::new(false);
        let expected = Exit::Watchpoint { hart: 0, gpa: used + 2, is_write: true };
        assert_eq!(m.run(10_000, &stop), expected, "{kind}");
        assert_eq!(m.icount(), written, "{kind}");
        assert_eq!(m.ram().read_u16(used + 2), Ok(1));
        assert_eq!(m.run(5 * writes.len() as u64, &stop), Exit::Reached);
        assert_eq!(m.take_watch_hit(), None);
        m.apply(&Input::Console { dev: 1, bytes: b"abc".to_vec() }).unwrap();
        assert_eq!(m.take_watch_hit(), Some(WatchHit { gpa: BUFFER, is_write: true }));
        assert_eq!(m.take_watch_hit(), None);
        assert_eq!(m.ram().read_u16(BUFFER), Ok(u16::from_le_bytes(*b"ab")));
    }
}

#[test]
fn what_is_done_to_a_devices_register_is_told_of() {
    for kind in [EngineKind::Interpreter, EngineKind::Jit] {
        let mut m = machine_with_console(&driver(), kind);
        m.set_watchpoints(&[Watchpoint { gpa: DEVICE + 0x50, len: 4, kind: WatchKind::Write }]);
        for _ in 0..2 {
            let exit = m.run(10_000, &AtomicBool::new(false));
            let expected = Exit::Watchpoint { hart: 0, gpa: DEVICE + 0x50, is_write: true };
            assert_eq!(exit, expected, "{kind}");
        }
        assert_eq!(m.icount(), 5 * driver().len() as u64 - 2);
    }
}

#[test]
fn either_side_of_an_access_across_pages_is_told_of() {
    const AT: u64 = BUFFER + 0xffc;
    let accesses =
        [(ld(5, 8, 0), false), (sd(5, 8, 0), true), (fld(5, 8, 0), false), (fsd(5, 8, 0), true)];
    for kind in [EngineKind::Interpreter, EngineKind::Jit] {
        for (word, is_write) in accesses {
            let mut m = machine_with_console(&[], kind);
            let code = [word, jal(0, -4)].map(u32::to_le_bytes).concat();
            m.ram_mut().write(RAM_BASE, &code).unwrap();
            m.harts_mut()[0].x[8] = AT;
            m.harts_mut()[0].csr.mstatus |= 3 << 13;
            for round in 0..60 {
                let (gpa, len) =
                    [(AT - 1, 2), (AT + 3, 2), (AT + 4, 1), (AT + 7, 9), (AT + 8, 1)][round % 5];
                m.set_watchpoints(&[Watchpoint { gpa, len, kind: WatchKind::Access }]);
                let start = m.icount();
                let exit = m.run(start + 20, &AtomicBool::new(false));
                if gpa == AT + 8 {
                    assert_eq!((exit, m.icount()), (Exit::Reached, start + 20));
                } else {
                    let gpa = gpa.max(AT);
                    assert_eq!(
                        exit,
                        Exit::Watchpoint { hart: 0, gpa, is_write },
                        "{kind} {word:#x}"
                    );
                    assert_eq!(m.icount() % 2, 1);
                }
            }
        }
    }
}

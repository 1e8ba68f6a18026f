//! What the shell does to a machine between two steps is chance and must not be seen: lengths of slices, dropped
//! caches, digests, snapshots, saving and restoring, another engine. The programs are those of the comparison with QEMU for one hart,
//! and harts that race on shared memory with timers and interrupts between them for several.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "qemu_oracle/asm.rs"]
mod asm;
#[path = "qemu_oracle/case.rs"]
mod case;
#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "qemu_oracle/exceptions.rs"]
mod exceptions;
#[path = "qemu_oracle/paging.rs"]
mod paging;
#[path = "qemu_oracle/payload.rs"]
mod payload;
#[path = "qemu_oracle/privileged.rs"]
mod privileged;
#[path = "qemu_oracle/rng.rs"]
mod rng;
#[path = "qemu_oracle/user.rs"]
mod user;

use std::sync::atomic::AtomicBool;

use asm::*;
use case::{Case, Image};
use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::io::Input;
use machine::ram::{GuestRam, PAGE_SIZE, RAM_BASE, SnapshotStep};
use machine::{Exit, Machine};
use rng::Rng;

/// Offset of the first instruction of a hart in [`common`].
const START: u64 = 256;
const RATE: u32 = 1 << 14;

fn images() -> BootImages {
    BootImages { bios: Some(vec![0x13u8, 0, 0, 0].into()), ..BootImages::default() }
}

fn machine(harts: u8) -> Machine {
    let config = MachineConfig {
        harts,
        ram_size: payload::RAM,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    Machine::new(config, images()).unwrap()
}

/// Runs to `until` or for as long as anything happens; when all harts wait, time goes on to the next timer.
fn run_to(m: &mut Machine, until: u64) {
    let stop = AtomicBool::new(false);
    loop {
        match m.run(until, &stop) {
            Exit::Idle => {
                let Some(mtime) = m.next_timer() else { return };
                m.apply(&Input::Clock { mtime, rate: RATE }).unwrap();
            }
            Exit::Reached | Exit::Halted => return,
            Exit::Output | Exit::Stopped => {}
            Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
        }
    }
}

/// A snapshot under way: the digest of RAM when it was armed, and the pages so far.
struct Sweep {
    digest: u64,
    copy: GuestRam,
}

/// An engine; should it be the JIT, one that translates early and has room for little.
fn engine(rng: &mut Rng) -> EngineConfig {
    if rng.one_in(3) {
        return EngineConfig::new(EngineKind::Interpreter);
    }
    let hot_after = rng.below(4) as u8;
    EngineConfig { hot_after, code_bytes: 256 << 10, ..EngineConfig::new(EngineKind::Jit) }
}

/// Does something to the machine that it must not notice.
fn disturb(m: &mut Machine, rng: &mut Rng, sweep: &mut Option<Sweep>) {
    match rng.below(9) {
        8 if rng.one_in(4) => m.set_engine(engine(rng)),
        0 => m.drop_caches(),
        1 => drop(m.digest()),
        2 => drop(m.save()),
        3 if sweep.is_none() => {
            let digest = m.ram_mut().digest();
            m.ram_mut().arm_snapshot(None);
            *sweep = Some(Sweep { digest, copy: GuestRam::new(payload::RAM) });
        }
        4 | 5 => {
            let Some(under_way) = sweep else { return };
            let mut budget = 4000;
            loop {
                match m.ram_mut().next_snapshot_page(&mut budget) {
                    SnapshotStep::Page(p) => {
                        let gpa = RAM_BASE + u64::from(p.page) * PAGE_SIZE as u64;
                        under_way.copy.write(gpa, &p.data.unwrap()).unwrap();
                    }
                    SnapshotStep::OutOfBudget => return,
                    SnapshotStep::Done => break,
                }
            }
            assert_eq!(under_way.copy.digest(), under_way.digest, "a snapshot is of its moment");
            *sweep = None;
        }
        6 if rng.one_in(8) => {
            m.ram_mut().disarm_snapshot();
            *sweep = None;
        }
        _ => {}
    }
}

/// A machine with the same state and nothing else in common.
fn twin(m: &mut Machine) -> Machine {
    let saved = m.save();
    let mut other = Machine::restore(&saved, images()).unwrap();
    for (page, data) in (0..).zip(m.ram().bytes().chunks_exact(PAGE_SIZE)) {
        if !machine::ram::is_zero(data) {
            other.load_page(page, data).unwrap();
        }
    }
    other
}

/// Length of a slice: mostly short, so that every place of a loop is an end of one.
fn slice(rng: &mut Rng) -> u64 {
    1 + match rng.below(4) {
        0 => rng.below(4),
        1 => rng.below(100),
        2 => rng.below(3000),
        _ => rng.below(20_000),
    }
}

/// Compares a run in one go on the interpreter with a run in disturbed slices that begins on the JIT, and with restored
/// twins, at several points.
fn check(make: &dyn Fn() -> Machine, end: u64, points: u64, seed: u64) {
    let (mut whole, mut sliced) = (make(), make());
    whole.set_engine(EngineConfig::new(EngineKind::Interpreter));
    let mut rng = Rng::new(seed);
    let mut sweep = None;
    for point in 1..=points {
        let until = end * point / points - rng.below(end / points / 2);
        run_to(&mut whole, until);
        while sliced.icount() < until && sliced.halted().is_none() {
            let start = sliced.icount();
            run_to(&mut sliced, (start + slice(&mut rng)).min(until));
            if sliced.icount() == start {
                break;
            }
            disturb(&mut sliced, &mut rng, &mut sweep);
        }
        assert_eq!(whole.icount(), sliced.icount(), "seed {seed}");
        if whole.digest() != sliced.digest() {
            let (a, b) = (whole.save(), sliced.save());
            assert_eq!(a, b, "seed {seed}: harts or devices differ at {}", whole.icount());
            panic!("seed {seed}: memory differs at {}", whole.icount());
        }
        if point % 2 == 0 && sweep.is_none() {
            sliced = twin(&mut sliced);
            sliced.set_engine(engine(&mut rng));
        }
    }
}

/// Cases of every group of the comparison with QEMU, on one hart.
fn single(seed: u64, cases: usize) -> Image {
    let generators: [fn(&mut Rng, &mut Image) -> Case; 13] = [
        user::integer,
        user::compressed,
        user::atomic,
        user::float,
        user::words,
        privileged::csr_values,
        privileged::csr_interrupts,
        privileged::traps,
        privileged::interrupts,
        privileged::wait_for_interrupt,
        paging::translated,
        paging::modified_privilege,
        paging::code,
    ];
    let mut rng = Rng::new(seed);
    let mut image = Image::new();
    let mut all: Vec<Case> =
        (0..cases).map(|i| generators[i % generators.len()](&mut rng, &mut image)).collect();
    case::assemble(&mut image, &mut all);
    image
}

#[test]
fn a_hart_does_not_notice_slices_caches_snapshots_and_restoring() {
    for seed in 1..=4 {
        let image = single(seed, 13 * 12);
        let make = || {
            let mut m = machine(1);
            m.ram_mut().write(RAM_BASE, &image.bytes).unwrap();
            m
        };
        let mut m = make();
        run_to(&mut m, u64::MAX);
        assert!(m.halted().is_some());
        check(&make, m.icount() + 1, 8, seed);
    }
}

/// Code that all harts have: how they start, at [`START`], and the M-mode handler. An exception goes on at the next slot; an interrupt sets the next timer and withdraws the software
/// interrupt. It may spoil x28 to x31.
fn common() -> Vec<u8> {
    let mut a = Asm::default();
    a.op(csrr(31, 0x342));
    a.branch(4, 31, 0, "interrupt");
    a.ops(&[csrr(31, 0x341), andi(31, 31, -16), addi(31, 31, 16), csrw(0x341, 31), MRET]);
    a.label("interrupt");
    a.ops(&[csrr(30, 0xf14), lui(31, 0x2004), slli(29, 30, 3), r(0x33, 0, 0, 31, 31, 29)]);
    a.ops(&[csrr(29, 0xc01), addi(29, 29, 200), sd(29, 31, 0)]);
    a.ops(&[
        lui(31, 0x2000),
        slli(29, 30, 2),
        r(0x33, 0, 0, 31, 31, 29),
        s(0x23, 2, 31, 0, 0),
        MRET,
    ]);
    a.label("end");
    for _ in (a.offset("end")..START).step_by(4) {
        a.op(NOP);
    }
    a.ops(&[csrr(30, 0xf14), lui(31, 0x2004), slli(29, 30, 3), r(0x33, 0, 0, 31, 31, 29)]);
    a.ops(&[addi(29, 30, 100), sd(29, 31, 0), csr(6, 0, 0x300, 8), jalr(0, 26, 0)]);
    a.finish()
}

/// Something between harts: IPIs, waiting, giving up the turn, counters, code written under the others' feet.
fn shared_slot(rng: &mut Rng, harts: u8) -> Vec<u32> {
    let other = 4 * rng.below(u64::from(harts)) as i32;
    match rng.below(9) {
        0 => vec![lui(31, 0x2000), addi(30, 0, 1), s(0x23, 2, 31, 30, other)],
        1 => vec![WFI],
        2 => vec![0x0100_000f, 0x0100_000f], // pause
        3 => vec![csrr(28, 0xb00), csrr(29, 0xc01), csrr(30, 0xc02), r(0x33, 4, 0, 7, 28, 29)],
        4 => vec![
            r(0x2f, 3, 2 << 2, 6, 8, 0),
            addi(6, 6, 1),
            r(0x2f, 3, 3 << 2, 7, 8, 6),
            sd(7, 8, 64),
        ],
        5 => vec![r(0x2f, 2, 2 << 2, 6, 8, 0), 0x0100_000f, r(0x2f, 2, 3 << 2, 7, 8, 6)],
        6 => vec![r(0x2f, 3, 0, 7, 8, 6), r(0x2f, 2, 1 << 2, 6, 8, 7)],
        7 => vec![csr(6, 0, 0x300, 8), csr(6, 7, 0x344, 2), csr(7, 7, 0x344, 2)],
        _ => vec![ld(30, 8, 128), andi(30, 30, 0x7f8), slli(30, 30, 20), srli(30, 30, 20)],
    }
}

/// Harts that run random code in circles on the same data; some of the code is written while it runs.
fn several(seed: u64, harts: u8) -> Machine {
    let mut rng = Rng::new(seed);
    let mut image = Image::new();
    let code = image.alloc(0x1000, 0x1000);
    image.put(code, &common());
    let mut starts = vec![];
    let mut data = 0;
    for _ in 0..harts {
        let mut case = user::integer(&mut rng, &mut image);
        let more =
            [user::float, user::compressed, user::atomic].map(|g| g(&mut rng, &mut image).code);
        for part in more {
            let words = shared_slot(&mut rng, harts);
            case.slot(&words);
            case.code.extend(part);
        }
        for _ in 0..24 {
            let words = shared_slot(&mut rng, harts);
            case.slot(&words);
        }
        // Over the first slot, by every hart but to its own address and then to the first hart's.
        let at = image.alloc(case.code.len() as u64 + 64, 4096);
        let first = starts.first().map_or(at, |s: &(u64, [u64; 32])| s.0);
        case.x[27] = first;
        case.slot(&[ld(7, 27, 0), sd(7, 27, 0), sd(7, 27, 16), FENCE_I]);
        let back = -(case.code.len() as i32);
        case.slot(&[jal(0, back)]);
        image.put(at, &case.code);
        data = if data == 0 { case.data_gpa() } else { data };
        case.x[8] = data + 0x400;
        case.x[9] = data + 0xffc;
        case.x[2] = data + 0x800;
        starts.push((at, case.x));
    }
    let mut m = machine(harts);
    m.ram_mut().write(RAM_BASE, &image.bytes).unwrap();
    for (hart, (pc, x)) in m.harts_mut().iter_mut().zip(starts) {
        hart.pc = code + START;
        hart.x[1..32].copy_from_slice(&x[1..]);
        hart.x[26] = pc;
        hart.csr.mtvec = code;
        hart.csr.mie = 0x88;
        hart.csr.mstatus |= 0x6000;
    }
    m.apply(&Input::Clock { mtime: 0, rate: RATE }).unwrap();
    m
}

#[test]
fn several_harts_do_not_notice_slices_caches_snapshots_and_restoring() {
    for seed in 1..=4 {
        for harts in 2..=4 {
            check(&|| several(seed, harts), 400_000, 6, seed);
        }
    }
}

#[test]
fn several_harts_really_race() {
    let mut m = several(1, 4);
    run_to(&mut m, 400_000);
    assert!(m.halted().is_none());
    assert!(m.harts().iter().all(|h| h.steps > 20_000), "every hart gets its turns");
}

#[test]
fn each_single_step_is_of_generated_code_when_that_is_wanted() {
    let mut m = machine(1);
    let config = EngineConfig::new(EngineKind::Jit);
    m.set_engine(EngineConfig { hot_after: 0, block_max: 1, ..config });
    let code: Vec<u8> = (0..20).flat_map(|i| addi(5, 5, i).to_le_bytes()).collect();
    m.ram_mut().write(RAM_BASE + START, &code).unwrap();
    m.harts_mut()[0].pc = RAM_BASE + START;
    for step in 1..=20 {
        let until = m.icount() + 1;
        run_to(&mut m, until);
        assert_eq!(m.harts()[0].pc, RAM_BASE + START + 4 * step);
        let blocks = m.engine_stats().blocks;
        assert!(!jit::is_supported() || blocks >= step, "{blocks} blocks after {step} steps");
    }
    assert_eq!(m.harts()[0].x[5], (0..20).sum::<u64>());
}

//! Translation for a debugger: what the hart itself would get, and no trace of the question.

use machine::engine::{EngineConfig, EngineKind};
use machine::hart::{Mode, cause};
use machine::ram::RAM_BASE;
use machine::{Machine, MachineSaved};

use crate::asm::{NOP, jal, ld};
use crate::fuzz::check::run_to;
use crate::guests;

const TABLES: u64 = RAM_BASE + 0x10_0000;
const CODE: u64 = RAM_BASE + 0x20_0000;
const V: u64 = 1;
const RWX: u64 = 7 << 1;
const A: u64 = 1 << 6;
const NAPOT: u64 = 1 << 63;

fn pte(gpa: u64, flags: u64) -> u64 {
    gpa >> 12 << 10 | flags
}

fn table(number: u64) -> u64 {
    TABLES + number * 0x1000
}

fn put(m: &mut Machine, table: u64, index: u64, pte: u64) {
    m.ram_mut().write(table + 8 * index, &pte.to_le_bytes()).unwrap();
}

/// A hart in S-mode with tables for Sv39 from 1 on and for Sv48 from 0 on, which hold the same.
fn machine(satp_mode: u64) -> Machine {
    let mut m = guests(1).next().unwrap().machine(EngineConfig::new(EngineKind::Interpreter));
    put(&mut m, table(0), 0, pte(table(1), V));
    put(&mut m, table(0), 511, pte(table(1), V));
    // 1 GiB where it is, and one that does not begin where it may.
    put(&mut m, table(1), 2, pte(RAM_BASE, V | RWX | A));
    put(&mut m, table(1), 3, pte(RAM_BASE + 0x20_0000, V | RWX | A));
    put(&mut m, table(1), 0, pte(table(2), V));
    put(&mut m, table(1), 511, pte(table(2), V));
    // 2 MiB, and pages.
    put(&mut m, table(2), 1, pte(RAM_BASE + 0x40_0000, V | RWX | A));
    put(&mut m, table(2), 0, pte(table(3), V));
    put(&mut m, table(3), 5, pte(CODE + 0x3000, V | RWX));
    put(&mut m, table(3), 6, pte(CODE + 0x4000, RWX));
    for page in 16..32 {
        put(&mut m, table(3), page, pte(CODE + 0x1_8000, V | RWX | A | NAPOT));
    }
    // Execute only, and user's.
    put(&mut m, table(3), 7, pte(CODE + 0x5000, V | 1 << 3 | 1 << 4));
    let hart = &mut m.harts_mut()[0];
    hart.mode = Mode::Supervisor;
    let root = table(if satp_mode == 9 { 0 } else { 1 });
    hart.csr.satp = satp_mode << 60 | root >> 12;
    m
}

const HIGH: u64 = 0xffff_ffc0_0000_0000;

#[test]
fn pages_of_all_sizes_are_found() {
    for mode in [8, 9] {
        let m = machine(mode);
        let high = if mode == 8 { 0xffff_ffff_c000_0000 } else { HIGH | 0x3f_c000_0000 };
        for base in [0, high] {
            for (va, gpa) in [
                (0x5123, Some(CODE + 0x3123)),
                (0x6000, None),
                (0x7ffe, Some(CODE + 0x5ffe)),
                (0x8000, None),
                (0x1_0000, Some(CODE + 0x1_0000)),
                (0x1_7abc, Some(CODE + 0x1_7abc)),
                (0x20_0000, Some(RAM_BASE + 0x40_0000)),
                (0x3f_ffff, Some(RAM_BASE + 0x5f_ffff)),
                (0x40_0000, None),
            ] {
                assert_eq!(m.debug_translate(0, base + va), gpa, "{mode} {:#x}", base + va);
            }
        }
        assert_eq!(m.debug_translate(0, 0x8123_4567), Some(0x8123_4567));
        assert_eq!(m.debug_translate(0, 0xc000_0000), None);
        assert_eq!(m.debug_translate(0, 1 << 50), None);
        assert_eq!(m.debug_translate(0, 0x4000_0000), None);
        assert_eq!(m.debug_translate(1, 0), None);
    }
    let mut m = machine(0);
    assert_eq!(m.debug_translate(0, 1 << 50), Some(1 << 50));
    m = machine(8);
    m.harts_mut()[0].mode = Mode::Machine;
    for (va, gpa) in [(0x6000, 0x6000), (0x5123, CODE + 0x3123), (CODE, CODE), (1 << 50, 1 << 50)] {
        assert_eq!(m.debug_translate(0, va), Some(gpa), "in M-mode: {va:#x}");
    }
}

/// The state after some steps in which the accessed bit of the page at 0x5000 is set.
fn run(asks: bool, engine: EngineKind) -> (MachineSaved, u64) {
    let mut m = machine(8);
    m.set_engine(EngineConfig { hot_after: 0, ..EngineConfig::new(engine) });
    let code = [NOP, NOP, ld(5, 6, 0), jal(0, -4)].map(u32::to_le_bytes).concat();
    m.ram_mut().write(CODE, &code).unwrap();
    let hart = &mut m.harts_mut()[0];
    (hart.pc, hart.x[6]) = (CODE, 0x5008);
    hart.csr.mie = 0;
    hart.csr.medeleg = 0;
    let start = m.icount();
    let mut digests = 0;
    for steps in 1..200 {
        if asks {
            assert_eq!(m.debug_translate(0, 0x5008), Some(CODE + 0x3008));
        }
        run_to(&mut m, start + steps);
        digests ^= m.digest().rotate_left(steps as u32);
    }
    assert_eq!(m.harts()[0].mode, Mode::Supervisor, "{}", m.harts()[0].csr.mcause);
    assert_ne!(m.harts()[0].csr.mcause, cause::LOAD_PAGE);
    (m.save(), digests)
}

#[test]
fn a_question_leaves_no_trace() {
    for engine in [EngineKind::Interpreter, EngineKind::Jit] {
        assert_eq!(run(false, engine), run(true, engine));
    }
}

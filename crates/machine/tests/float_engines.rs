//! Every instruction of F, D and Zfa as generated code against the interpreter: special and random operands, every
//! rounding mode, flags raised and not, floating-point state in every condition. All registers and the memory that
//! results and flags went to must be the same.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "qemu_oracle/asm.rs"]
mod asm;
#[path = "qemu_oracle/rng.rs"]
mod rng;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use asm::*;
use isa::Op;
use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use rng::Rng;

const RAM: u64 = 64 << 20;
const CODE: u64 = 0x8001_0000;
const HANDLER: u64 = 0x8001_1000;
const TABLE: u64 = 0x8020_0000;

const FCSR: u32 = 3;
const MSTATUS: u32 = 0x300;
const MEPC: u32 = 0x341;
const FS: u64 = 3 << 13;

/// What a program does with one row of the table.
mod row {
    pub(super) const FCSR: i32 = 0;
    pub(super) const FS: i32 = 8;
    /// Three operands, in floating-point registers.
    pub(super) const FLOATS: i32 = 16;
    /// One, in an integer register.
    pub(super) const INTEGER: i32 = 40;
    pub(super) const FCSR_AFTER: i32 = 48;
    pub(super) const MSTATUS_AFTER: i32 = 56;
    pub(super) const F_AFTER: i32 = 64;
    pub(super) const X_AFTER: i32 = 104;
    /// Stored between the instructions.
    pub(super) const BETWEEN: i32 = 144;
    pub(super) const SIZE: u64 = 160;
}

/// Registers that the instruction under test uses: two sources, a third, two destinations.
const REGISTERS: [[u32; 5]; 3] = [[11, 12, 13, 14, 15], [20, 21, 22, 23, 24], [9, 27, 18, 0, 25]];

/// An instruction under test, its fields for registers being zero.
#[derive(Debug, Clone, Copy)]
struct Template {
    op: Op,
    word: u32,
    has_rs2: bool,
    has_rs3: bool,
}

impl Template {
    fn with(self, rd: u32, rs1: u32, rs2: u32, rs3: u32) -> u32 {
        let rs2 = if self.has_rs2 { rs2 } else { 0 };
        let rs3 = if self.has_rs3 { rs3 } else { 0 };
        self.word | rd << 7 | rs1 << 15 | rs2 << 20 | rs3 << 27
    }
}

/// Every instruction, with each rounding mode that its encoding has.
fn templates() -> Vec<Template> {
    let mut found = BTreeMap::new();
    for word in [0x2007u32, 0x3007, 0x2027, 0x3027] {
        let (op, has_rs2) = (isa::decode(word).op, word & 0x20 != 0);
        found.insert(word, Template { op, word, has_rs2, has_rs3: false });
    }
    for rm in 0..8 {
        for opcode in [0x43u32, 0x47, 0x4b, 0x4f] {
            for format in 0..2 {
                let word = opcode | rm << 12 | format << 25;
                let op = isa::decode(word).op;
                found.insert(word, Template { op, word, has_rs2: true, has_rs3: true });
            }
        }
        for upper in 0..1 << 12 {
            let word = 0x53 | rm << 12 | upper << 20;
            let op = isa::decode(word).op;
            // No selector is as large.
            let has_rs2 = isa::decode(word | 31 << 20).op == op;
            if op >= Op::Flw && (!has_rs2 || upper & 31 == 0) {
                found.insert(word, Template { op, word, has_rs2, has_rs3: false });
            }
        }
    }
    found.into_values().filter(|t| t.op != Op::Illegal).collect()
}

const DOUBLES: [u64; 21] = [
    0,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x3690_0000_0000_0000, // half the smallest single
    0x3810_0000_0000_0000, // the smallest normal single
    0x3810_0000_0000_0001,
    0x3fdf_ffff_ffff_ffff,
    0x3fe0_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0x3ff0_0000_0000_0001,
    0x4004_0000_0000_0000,
    0x41df_ffff_ffe0_0000, // 2^31 - 0.5
    0x41ef_ffff_ffff_ffff,
    0x43df_ffff_ffff_ffff,
    0x43e0_0000_0000_0000,
    0x47ef_ffff_f000_0000, // rounds to more than a single
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0x7ff8_0000_0000_0001,
    0x7ff4_0000_0000_0000,
];

const SINGLES: [u32; 21] = [
    0,
    1,
    0x007f_ffff,
    0x0080_0000,
    0x0080_0001,
    0x1f80_0000, // its square is the smallest normal number
    0x1f7f_ffff,
    0x3eff_ffff,
    0x3f00_0000,
    0x3f80_0000,
    0x3f80_0001,
    0x4020_0000,
    0x4eff_ffff,
    0x4f00_0000,
    0x4f7f_ffff,
    0x4f80_0000,
    0x5f00_0000,
    0x7f7f_ffff,
    0x7f80_0000,
    0x7fc0_0001,
    0x7fa0_0000,
];

const INTEGERS: [u64; 10] = [
    0,
    1,
    u64::MAX,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 53 | 1,
    0x7fff_ffff_ffff_fe00,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_fc01,
];

/// Addresses: aligned, not, across a page, of no memory.
const ADDRESSES: [u64; 8] = [
    0x8010_0000,
    0x8010_0008,
    0x8010_0013,
    0x8010_0ffc,
    0x8010_1fff,
    0x8010_1fe0,
    0x7fff_f000,
    0x4000_0000_8010_0000,
];

/// Special operands of a format, of both signs.
fn specials(double: bool) -> Vec<u64> {
    if double {
        DOUBLES.iter().flat_map(|&v| [v, v | 1 << 63]).collect()
    } else {
        let boxed = |v: u32| 0xffff_ffff_0000_0000 | u64::from(v);
        let mut all: Vec<_> = SINGLES.iter().flat_map(|&v| [v, v | 1 << 31]).map(boxed).collect();
        all.push(0xffff_fffe_3f80_0000);
        all
    }
}

/// Rows of operands: all pairs of special ones in some rounding modes, and some by chance.
fn rows(t: Template, rng: &mut Rng) -> Vec<u8> {
    let double = t.op >= Op::Fld && t.op != Op::FcvtDS || t.op == Op::FcvtSD;
    let special = specials(double);
    let moves = matches!(t.op, Op::Flw | Op::Fsw | Op::Fld | Op::Fsd);
    let integers = if moves { &ADDRESSES[..] } else { &INTEGERS[..] };
    let modes: &[u64] = if t.word >> 12 & 7 == 7 { &[0, 1, 2, 3, 4] } else { &[0] };
    let mut bytes = vec![];
    let mut put = |rng: &mut Rng, frm: u64, floats: [u64; 3], integer: u64| {
        let frm = if rng.one_in(16) { rng.below(8) } else { frm };
        let flags = if rng.one_in(2) { rng.below(32) } else { 0 };
        let fs = if rng.one_in(4) { rng.below(4) } else { 3 };
        for v in [frm << 5 | flags, fs << 13, floats[0], floats[1], floats[2], integer] {
            bytes.extend_from_slice(&v.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(row::SIZE as usize), 0);
    };
    for &frm in modes {
        for &a in &special {
            for &b in &special {
                let (c, integer) = (rng.pick(&special), rng.pick(integers));
                put(rng, frm, [a, b, c], integer);
            }
        }
        for _ in 0..400 {
            let mut float = || {
                let boxed = 0xffff_ffff_0000_0000 | u64::from(rng.single());
                if double || rng.one_in(16) { rng.float() } else { boxed }
            };
            let floats = [float(), float(), float()];
            let integer = if moves { rng.pick(integers) } else { rng.integer() };
            put(rng, frm, floats, integer);
        }
    }
    bytes
}

/// A loop over the rows. `fs`: with floating-point state made what the row says just before the instruction.
fn program(t: Template, registers: [u32; 5], fs: bool) -> Vec<u8> {
    let [a, b, c, d, e] = registers;
    let mut p = Asm::default();
    p.label("loop");
    p.ops(&[ld(6, 5, row::FCSR), ld(7, 5, row::FS), csr(2, 0, MSTATUS, 8), csrw(FCSR, 6)]);
    p.ops(&[ld(a, 5, row::INTEGER), addi(b, a, 1), slli(c, a, 32), addi(e, a, -1)]);
    for (k, r) in (0..).zip([a, b, c]) {
        p.op(fld(r, 5, row::FLOATS + 8 * k));
    }
    if fs {
        p.ops(&[csr(3, 0, MSTATUS, 8), csr(2, 0, MSTATUS, 7)]);
    }
    p.ops(&[t.with(d, a, b, c), t.with(e, d, a, b), fsd(d, 5, row::BETWEEN)]);
    p.ops(&[t.with(a, a, a, c), fsd(e, 5, row::BETWEEN + 8), t.with(b, e, b, d)]);
    p.ops(&[csrr(6, FCSR), csrr(7, MSTATUS), csr(2, 0, MSTATUS, 8)]);
    p.ops(&[sd(6, 5, row::FCSR_AFTER), sd(7, 5, row::MSTATUS_AFTER)]);
    for (k, r) in (0..).zip([a, b, c, d, e]) {
        p.ops(&[fsd(r, 5, row::F_AFTER + 8 * k), sd(r, 5, row::X_AFTER + 8 * k)]);
    }
    p.op(addi(5, 5, row::SIZE as i32));
    p.branch(1, 5, 28, "loop");
    p.label("end");
    p.jump("end");
    p.finish()
}

/// Skips what traps, and counts.
fn handler() -> Vec<u8> {
    let words = [csrr(30, MEPC), addi(30, 30, 4), csrw(MEPC, 30), addi(29, 29, 1), MRET];
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn machine(kind: EngineKind) -> Machine {
    let config = MachineConfig {
        harts: 1,
        ram_size: RAM,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    let images = BootImages { bios: Some(vec![0x13u8, 0, 0, 0].into()), ..BootImages::default() };
    let mut m = Machine::new(config, images).unwrap();
    m.set_engine(EngineConfig { hot_after: 0, ..EngineConfig::new(kind) });
    m.ram_mut().write(HANDLER, &handler()).unwrap();
    m
}

/// Runs the loop over all rows.
fn run(m: &mut Machine, code: &[u8], rows: &[u8], seed: u64) {
    m.ram_mut().write(CODE, code).unwrap();
    m.ram_mut().write(TABLE, rows).unwrap();
    let mut rng = Rng::new(seed);
    let hart = &mut m.harts_mut()[0];
    hart.pc = CODE;
    for r in 0..32 {
        hart.f[r] = rng.float();
        hart.x[r] = if r == 0 { 0 } else { rng.integer() };
    }
    hart.x[5] = TABLE;
    hart.x[8] = FS;
    hart.x[28] = TABLE + rows.len() as u64;
    hart.x[29] = 0;
    hart.csr.mtvec = HANDLER;
    // Every step may trap; what is left the program spends waiting.
    let until = m.icount() + rows.len() as u64 / row::SIZE * 60 + 1000;
    m.run(until, &AtomicBool::new(false));
    assert_eq!(m.harts()[0].pc, CODE + code.len() as u64 - 4, "the program came to its end");
}

/// Says in which row the machines differ first.
fn assert_same(t: Template, rows: &[u8], reference: &mut Machine, jit: &mut Machine) {
    let name = format!("{:?} with rm {}", t.op, t.word >> 12 & 7);
    for at in (0..rows.len() as u64).step_by(row::SIZE as usize) {
        let read = |m: &Machine| -> Vec<u64> {
            (0..row::SIZE / 8).map(|k| m.ram().read_u64(TABLE + at + 8 * k).unwrap()).collect()
        };
        let (a, b) = (read(reference), read(jit));
        assert!(a == b, "{name}:\ninterpreter {a:x?}\njit         {b:x?}");
    }
    let (a, b) = (&reference.harts()[0], &jit.harts()[0]);
    assert_eq!((a.f, &a.x[..32], &a.csr), (b.f, &b.x[..32], &b.csr), "{name}");
    assert_eq!(reference.icount(), jit.icount());
    assert_eq!(reference.digest(), jit.digest(), "{name}");
}

fn compare(filter: impl Fn(Op) -> bool) {
    let mut rng = Rng::new(1);
    let (mut reference, mut jit) = (machine(EngineKind::Interpreter), machine(EngineKind::Jit));
    for t in templates().into_iter().filter(|t| filter(t.op)) {
        let rows = rows(t, &mut rng);
        for (k, registers) in REGISTERS.into_iter().enumerate() {
            let code = program(t, registers, k != 0);
            let (seed, before) = (rng.next(), jit.engine_stats().blocks);
            run(&mut reference, &code, &rows, seed);
            run(&mut jit, &code, &rows, seed);
            assert_same(t, &rows, &mut reference, &mut jit);
            let is_jit = jit.engine() == EngineKind::Jit;
            assert!(!is_jit || jit.engine_stats().blocks > before, "it ran as generated code");
        }
    }
}

#[test]
fn single_precision_is_the_same() {
    compare(|op| op < Op::Fld);
}

#[test]
fn double_precision_is_the_same() {
    compare(|op| op >= Op::Fld);
}

#[test]
fn every_instruction_is_under_test() {
    let all = templates();
    let mut number = Op::Flw as u8;
    while Op::from_number(number) != Op::Illegal {
        let op = Op::from_number(number);
        assert!(all.iter().any(|t| t.op == op), "{op:?}");
        number += 1;
    }
}

//! The program in M-mode that runs one case after the other and logs the state at each trap.
//!
//! ```text
//! 0x8000_0000 jump | +0x8000 payload | +0xc000 globals | +0x1_0000 S-mode handler | +0x10_0000 cases | +LOG log
//! ```
//! A case is a run of 16-byte slots. Each trap writes a record of [`RECORD`] bytes; an exception then goes on with the
//! next slot, an interrupt with its `mie` bit cleared. A trap outside the case's code goes on at `ra` if that is in
//! it. The case ends with a trap at its last slot, outside of everything, or with one trap too many; then the record
//! is followed by one with floating-point registers and further CSRs.

use crate::asm::*;

pub(crate) const BASE: u64 = 0x8000_0000;
pub(crate) const RAM: u64 = 128 << 20;
/// Not at the start of RAM: 2^31 is a likely number in cases, and stores go there.
pub(crate) const PAYLOAD: u64 = BASE + 0x8000;
pub(crate) const GLOBALS: u64 = PAYLOAD + 0x4000;
/// A page of `ecall`: the S-mode handler, whatever the vector.
pub(crate) const S_HANDLER: u64 = BASE + 0x1_0000;
pub(crate) const CASES: u64 = BASE + 0x10_0000;
pub(crate) const LOG: u64 = BASE + (64 << 20);
/// Bytes of a record.
pub(crate) const RECORD: usize = 512;
pub(crate) const SLOT: u64 = 16;

pub(crate) const FINISHER: u64 = 0x10_0000;
pub(crate) const MSIP: u64 = 0x200_0000;
pub(crate) const MTIMECMP: u64 = 0x200_4000;

/// CSRs that a case starts with, in the order of its descriptor from double word 0 on.
pub(crate) const START_CSRS: [(&str, u32); 18] = [
    ("menvcfg", 0x30a),
    ("senvcfg", 0x10a),
    ("medeleg", 0x302),
    ("mideleg", 0x303),
    ("mcounteren", 0x306),
    ("scounteren", 0x106),
    ("stvec", 0x105),
    ("sscratch", 0x140),
    ("sepc", 0x141),
    ("scause", 0x142),
    ("stval", 0x143),
    ("satp", 0x180),
    ("stimecmp", 0x14d),
    ("mip", 0x344),
    ("mcause", 0x342),
    ("mtval", 0x343),
    ("fcsr", 0x003),
    ("mepc", 0x341),
];
pub(crate) const D_MIE: usize = 18;
pub(crate) const D_MSTATUS: usize = 19;
pub(crate) const D_CODE_BASE: usize = 20;
pub(crate) const D_CODE_SIZE: usize = 21;
pub(crate) const D_S_PAGE: usize = 22;
pub(crate) const D_END: usize = 23;
pub(crate) const D_TRAPS_MAX: usize = 24;
pub(crate) const D_X: usize = 32;
pub(crate) const D_F: usize = 64;
/// Double words of a descriptor.
pub(crate) const D_LEN: usize = 96;

/// CSRs of a record, from double word 32 on.
pub(crate) const RECORD_CSRS: [(&str, u32); 14] = [
    ("mcause", 0x342),
    ("mepc", 0x341),
    ("mtval", 0x343),
    ("mstatus", 0x300),
    ("scause", 0x142),
    ("sepc", 0x141),
    ("stval", 0x143),
    ("mip", 0x344),
    ("mie", 0x304),
    ("sscratch", 0x140),
    ("satp", 0x180),
    ("sstatus", 0x100),
    ("sie", 0x104),
    ("fcsr", 0x003),
];
/// CSRs of the record at the end, behind the floating-point registers.
pub(crate) const END_CSRS: [(&str, u32); 7] = [
    ("mideleg", 0x303),
    ("medeleg", 0x302),
    ("mcounteren", 0x306),
    ("scounteren", 0x106),
    ("stvec", 0x105),
    ("senvcfg", 0x10a),
    ("stimecmp", 0x14d),
];

const G_LOG: i32 = 0;
const G_DESC: i32 = 8;
const G_INDEX: i32 = 16;
const G_COUNT: i32 = 24;
const G_TRAPS: i32 = 32;
const G_TMP: i32 = 40;
const G_FINISHER: i32 = 48;
const G_MTIMECMP: i32 = 56;
const G_PMPADDR: i32 = 64;
const G_PMPCFG: i32 = 136;
const G_TRAP: i32 = 152;
const G_MSIP: i32 = 160;

/// PMP entry 0 is the finisher's, off until the end; entry 1 is the start of the first range. Then come ranges by
/// their ends, and whether all, reading and writing or nothing is allowed. They are locked, so that no wild access of a
/// case reaches a device that says what differs.
const RANGES: [(u64, u8); 6] = [
    (MSIP, 0),
    (MSIP + 0x1000, 3),
    (MTIMECMP, 0),
    (MTIMECMP + 0x1000, 3),
    (BASE, 0),
    (BASE + RAM, 7),
];
const FIRST_RANGE: usize = 2;
/// NAPOT, readable and writable.
const FINISHER_OPEN: i32 = 0x1b;

fn dword(index: usize) -> i32 {
    index as i32 * 8
}

/// The globals' initial contents: value by offset.
pub(crate) fn globals(cases: u64, first_descriptor: u64, trap: u64) -> Vec<(u64, u64)> {
    let mut cfg = [0u8; 16];
    let mut all = vec![];
    for (i, (end, allow)) in (FIRST_RANGE..).zip(&RANGES) {
        cfg[i] = 0x88 | allow;
        all.push((G_PMPADDR as u64 + 8 * i as u64, end >> 2));
    }
    all.push((G_PMPADDR as u64, FINISHER >> 2 | 0x1ff));
    all.push((G_PMPADDR as u64 + 64, (1 << 54) - 1));
    cfg[8] = 0x98; // the rest: NAPOT over everything
    let cfg = |i: usize| u64::from_le_bytes(cfg[i..i + 8].try_into().unwrap());
    all.extend([
        (G_LOG as u64, LOG),
        (G_DESC as u64, first_descriptor),
        (G_COUNT as u64, cases),
        (G_FINISHER as u64, FINISHER),
        (G_MTIMECMP as u64, MTIMECMP),
        (G_MSIP as u64, MSIP),
        (G_PMPCFG as u64, cfg(0)),
        (G_PMPCFG as u64 + 8, cfg(8)),
        (G_TRAP as u64, trap),
    ]);
    all
}

/// The payload's bytes and the offset of its trap handler.
pub(crate) fn build() -> (Vec<u8>, u64) {
    let mut a = Asm::default();
    boot(&mut a);
    load_case(&mut a);
    a.label("trap");
    save(&mut a);
    dispatch(&mut a);
    resume(&mut a);
    end_case(&mut a);
    let trap = a.offset("trap");
    (a.finish(), trap)
}

fn boot(a: &mut Asm) {
    a.ops(&[auipc(31, 0), lui(30, 4), r(0x33, 0, 0, 31, 31, 30)]);
    a.ops(&[ld(1, 31, G_TRAP), csrw(0x305, 1)]);
    for i in 0..9 {
        a.ops(&[ld(1, 31, G_PMPADDR + 8 * i), csrw(0x3b0 + i as u32, 1)]);
    }
    a.ops(&[ld(1, 31, G_PMPCFG), csrw(0x3a0, 1), ld(1, 31, G_PMPCFG + 8), csrw(0x3a2, 1)]);
}

fn load_case(a: &mut Asm) {
    a.label("load");
    a.ops(&[ld(29, 31, G_DESC), sd(0, 31, G_TRAPS), lui(1, 6), csrw(0x300, 1), csrw(0x304, 0)]);
    a.ops(&[ld(1, 31, G_MTIMECMP), addi(2, 0, -1), sd(2, 1, 0)]);
    a.ops(&[ld(1, 31, G_MSIP), s(0x23, 2, 1, 0, 0)]);
    for (i, (_, number)) in START_CSRS.iter().enumerate() {
        a.ops(&[ld(1, 29, dword(i)), csrw(*number, 1)]);
    }
    a.ops(&[ld(1, 29, dword(D_MIE)), csrw(0x304, 1)]);
    for f in 0..32 {
        a.op(fld(f, 29, dword(D_F + f as usize)));
    }
    a.ops(&[SFENCE, FENCE_I, ld(1, 29, dword(D_MSTATUS)), csrw(0x300, 1), csrw(0x340, 31)]);
    for x in (1..32).filter(|&x| x != 29).chain([29]) {
        a.op(ld(x, 29, dword(D_X + x as usize)));
    }
    a.op(MRET);
}

/// Writes the record. Then x31 is the globals, x30 the record, x29 the descriptor, x2 mcause, x3 mstatus.
fn save(a: &mut Asm) {
    a.ops(&[csr(1, 31, 0x340, 31), sd(30, 31, G_TMP), ld(30, 31, G_LOG)]);
    for x in 1..30 {
        a.op(sd(x, 30, dword(x as usize)));
    }
    a.ops(&[ld(1, 31, G_TMP), sd(1, 30, dword(30)), csrr(1, 0x340), sd(1, 30, dword(31))]);
    a.ops(&[csrw(0x340, 31), csrr(3, 0x300), lui(1, 6), csr(2, 0, 0x300, 1)]);
    for (i, (name, number)) in RECORD_CSRS.iter().enumerate() {
        if *name == "mstatus" {
            a.op(addi(1, 3, 0));
        } else {
            a.op(csrr(1, *number));
        }
        a.op(sd(1, 30, dword(32 + i)));
    }
    a.ops(&[ld(29, 31, G_DESC), ld(1, 31, G_INDEX), sd(1, 30, 0)]);
    a.ops(&[addi(1, 30, RECORD as i32), sd(1, 31, G_LOG)]);
    a.ops(&[ld(1, 31, G_TRAPS), addi(1, 1, 1), sd(1, 31, G_TRAPS)]);
    a.ops(&[csrr(2, 0x342), csrr(6, 0x341), addi(7, 2, 0)]);
    a.op(ld(4, 29, dword(D_TRAPS_MAX)));
    a.branch(6, 1, 4, "few");
    a.jump("end");
    a.label("few");
}

/// Decides where to go on: x6 becomes the new pc, x3 the new mstatus.
fn dispatch(a: &mut Asm) {
    // An ecall of the S-mode handler stands for the trap that was delegated to it.
    a.op(addi(4, 0, 9));
    a.branch(1, 2, 4, "taken");
    a.ops(&[ld(8, 29, dword(D_S_PAGE)), r(0x33, 0, 0x20, 9, 6, 8), srli(9, 9, 12)]);
    a.branch(1, 9, 0, "taken");
    a.ops(&[csrr(7, 0x142), csrr(6, 0x141)]);
    a.ops(&[srli(4, 3, 8), andi(4, 4, 1), slli(4, 4, 11), lui(5, 2), addi(5, 5, -0x800)]);
    a.ops(&[i(0x13, 4, 5, 5, -1), r(0x33, 7, 0, 3, 3, 5), r(0x33, 6, 0, 3, 3, 4)]);
    a.ops(&[srli(4, 3, 5), andi(4, 4, 1), slli(4, 4, 1), andi(3, 3, -3), r(0x33, 6, 0, 3, 3, 4)]);
    a.ops(&[i(0x13, 6, 3, 3, 0x20), andi(3, 3, -0x101)]);
    a.label("taken");
    a.ops(&[ld(8, 29, dword(D_CODE_BASE)), ld(9, 29, dword(D_CODE_SIZE))]);
    a.branch(5, 7, 0, "exception");
    a.ops(&[addi(4, 0, 1), r(0x33, 1, 0, 4, 4, 7), csr(3, 0, 0x304, 4)]);
    a.jump("go");
    a.label("exception");
    a.op(ld(4, 29, dword(D_END)));
    a.branch(1, 6, 4, "not last");
    a.jump("end");
    a.label("not last");
    a.op(r(0x33, 0, 0x20, 10, 6, 8));
    a.branch(6, 10, 9, "inside");
    a.ops(&[ld(6, 30, 8), r(0x33, 0, 0x20, 10, 6, 8)]);
    a.branch(6, 10, 9, "go");
    a.jump("end");
    a.label("inside");
    a.ops(&[andi(6, 6, -16), addi(6, 6, 16)]);
    a.label("go");
}

fn resume(a: &mut Asm) {
    a.ops(&[csrw(0x341, 6), csrw(0x300, 3)]);
    for x in (1..32).filter(|&x| x != 30).chain([30]) {
        a.op(ld(x, 30, dword(x as usize)));
    }
    a.op(MRET);
}

fn end_case(a: &mut Asm) {
    a.label("end");
    a.ops(&[addi(30, 30, RECORD as i32), lui(1, 6), csrw(0x304, 0), csrw(0x300, 1)]);
    a.ops(&[ld(1, 31, G_INDEX), i(0x13, 6, 1, 1, -0x800), sd(1, 30, 0)]);
    for f in 0..32u32 {
        a.op(fsd(f, 30, dword(1 + f as usize)));
    }
    for (i, (_, number)) in END_CSRS.iter().enumerate() {
        a.ops(&[csrr(1, *number), sd(1, 30, dword(40 + i))]);
    }
    a.ops(&[addi(1, 30, RECORD as i32), sd(1, 31, G_LOG)]);
    a.ops(&[ld(1, 31, G_INDEX), addi(1, 1, 1), sd(1, 31, G_INDEX)]);
    a.ops(&[addi(29, 29, dword(D_LEN)), sd(29, 31, G_DESC), ld(2, 31, G_COUNT)]);
    a.branch(0, 1, 2, "finish");
    a.jump("load");
    a.label("finish");
    a.ops(&[addi(1, 0, FINISHER_OPEN), csrw(0x3a0, 1)]);
    a.ops(&[ld(1, 31, G_FINISHER), lui(2, 5), addi(2, 2, 0x555), s(0x23, 2, 1, 2, 0)]);
    a.label("forever");
    a.jump("forever");
}

//! Cases of CSRs, traps, returns and interrupts.

use crate::asm::*;
use crate::case::*;
use crate::exceptions;
use crate::payload::{MSIP, MTIMECMP};
use crate::rng::Rng;
use crate::user::dest;

const T0: u32 = 6;
const T1: u32 = 7;
/// As in the table of exceptions.
const SIP_COMPARED: i32 = 0x202;

/// CSRs without part in traps under way.
const PLAIN: [u32; 44] = [
    0x001, 0x002, 0x003, 0x100, 0x105, 0x106, 0x10a, 0x140, 0x141, 0x142, 0x143, 0x14d, 0x180,
    0x300, 0x301, 0x305, 0x306, 0x30a, 0x320, 0x340, 0x341, 0x342, 0x343, 0x3a0, 0x3a2, 0x3a4,
    0x3a1, 0x3b9, 0x3ba, 0x3bf, 0x3c0, 0xb00, 0xb02, 0xc00, 0xc01, 0xc02, 0xf11, 0xf12, 0xf13,
    0xf14, 0xf15, 0x310, 0x7b0, 0x5a8,
];
/// CSRs that decide about traps and interrupts.
const TRAPS: [u32; 14] = [
    0x100, 0x104, 0x144, 0x300, 0x302, 0x303, 0x304, 0x344, 0x141, 0x142, 0x143, 0x14d, 0x180,
    0x140,
];

/// A value to write to a CSR; what the two machines may differ in is left out.
fn value(rng: &mut Rng, number: u32) -> u64 {
    let v = match number {
        0x302 => rng.integer() & !0x200, // the S-mode handler's ecall goes to M-mode
        0x3a0..=0x3af => {
            let v = rng.next();
            v | v >> 1 & 0x0101_0101_0101_0101 // W without R is reserved
        }
        0x14d => rng.pick(&[0, 1, u64::MAX, u64::MAX >> 1]),
        0x180 => rng.pick(&[0, 0, 8, 9, 10, 1, 15]) << 60 | rng.next() >> 4,
        0x100 | 0x300 if rng.one_in(2) => rng.next() & rng.next(),
        _ => rng.integer(),
    };
    v & exceptions::write_mask(number)
}

fn swap_slot(case: &mut Case, rng: &mut Rng, number: u32) {
    let c = case.constant(rng.integer() & exceptions::write_mask(number));
    case.slot(&[ld(T0, POOL, c), csr(1, T1, number, T0), csr(1, T0, number, T1)]);
}

/// Accesses a CSR; the result is masked by what must be the same.
fn csr_slot(case: &mut Case, rng: &mut Rng, number: u32) {
    let mut v = value(rng, number);
    let mut f3 = rng.pick(&[1, 1, 2, 3, 5, 6, 7]);
    if number == 0x30a && f3 == 5 {
        f3 = 6;
    }
    if number == 0x30a {
        let keep = if case.stce() { STCE } else { 0 };
        v = if f3 == 3 { v & !keep } else { v & !STCE | keep };
    }
    if number >> 4 == 0x3a {
        f3 = rng.pick(&[1, 5]);
    }
    if number <= 3 {
        v |= 1; // see the exception about writes that set or clear nothing
    }
    if number == 0x14d && !case.stce() {
        return csr_slot(case, rng, 0x140);
    }
    if number == 0x180 && (case.mode == S || case.kind != "csr values") && f3 < 5 {
        v &= u64::MAX >> 4; // a random root would end the case here
        f3 = rng.pick(&[1, 3]);
    }
    let rs1 = if f3 >= 5 {
        rng.bits(5) & exceptions::write_mask(number) as u32
    } else {
        rng.pick(&[T0, T0, T0, 0])
    };
    let rs1 = if number >> 4 == 0x3a && f3 == 5 { rs1 & !2 } else { rs1 }; // W without R is reserved
    let rs1 = if number == 0x30a && f3 == 1 { T0 } else { rs1 };
    let rd = if rng.one_in(8) { 0 } else { T1 };
    // Entry 0 is not locked, since the payload ends with its help: only read.
    let (f3, rs1) = if matches!(number, 0x3a0 | 0x3b0) { (2, 0) } else { (f3, rs1) };
    let (c, mask) = (case.constant(v), case.constant(exceptions::read_mask(number)));
    case.slot(&[
        ld(T0, POOL, c),
        csr(f3, rd, number, rs1),
        ld(T0, POOL, mask),
        r(0x33, 7, 0, T1, T1, T0),
    ]);
}

/// Every CSR that takes no part in traps, and numbers at random.
pub(crate) fn csr_values(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 48;
    let mode = rng.pick(&[M, M, M, S, U]);
    let mut case = Case::new("csr values", mode, slots + 1, rng, image);
    case.mstatus = rng.next() & 0x7e_6000 & !(1 << 17);
    case.set_csr("mcounteren", rng.next());
    case.set_csr("scounteren", rng.next());
    case.set_csr("menvcfg", rng.next() & !STCE | rng.pick(&[0, STCE]));
    for name in ["sscratch", "sepc", "scause", "stval", "mcause", "mtval"] {
        case.set_csr(name, rng.integer());
    }
    for _ in 0..slots {
        let number = match rng.below(6) {
            0 => rng.bits(12),
            _ => rng.pick(&PLAIN),
        };
        match number {
            0x305 | 0x340 => swap_slot(&mut case, rng, number),
            n if TRAPS.contains(&n) && !PLAIN.contains(&n) => csr_slot(&mut case, rng, 0x140),
            n if exceptions::is_left_out(n) => csr_slot(&mut case, rng, 0x140),
            n => csr_slot(&mut case, rng, n),
        }
    }
    case
}

/// CSRs that decide about traps, with interrupts that become pending and enabled in between.
pub(crate) fn csr_interrupts(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 40;
    let mode = rng.pick(&[M, M, S, S, U]);
    let mut case = Case::new("csr interrupts", mode, slots + 1, rng, image);
    start_interrupts(&mut case, rng);
    for _ in 0..slots {
        let number = rng.pick(&TRAPS);
        csr_slot(&mut case, rng, number);
    }
    case
}

fn start_interrupts(case: &mut Case, rng: &mut Rng) {
    case.mstatus = FS_DIRTY | rng.next() & 0x7c_01a2;
    case.mie = rng.next() & 0xaaa;
    case.set_csr("mip", rng.next() & 0x222);
    case.set_csr("mideleg", rng.pick(&[0, 0x222, rng.clone().next() & 0x222]));
    case.set_csr("medeleg", rng.next() & 0xb1ff & exceptions::write_mask(0x302));
    case.set_csr("menvcfg", rng.next() & !STCE | rng.pick(&[0, STCE]));
    if case.stce() {
        case.set_csr("stimecmp", rng.pick(&[0, u64::MAX]));
    }
}

/// A return to the slot behind, by way of `mepc` or `sepc` and a status with random fields.
fn return_slots(case: &mut Case, rng: &mut Rng, machine: bool) {
    let (epc, status) = if machine { (0x341, 0x300) } else { (0x141, 0x100) };
    let back = case.here() + 32 + 16 * rng.below(2);
    let v = (rng.next() & rng.next() & 0x7e_01aa | FS_DIRTY | rng.below(4) << 11)
        & exceptions::write_mask(0x300);
    let (to, v) = (case.constant(back), case.constant(v));
    // Both in the slot of the return: a return to where the last trap was would loop.
    case.slot(&[ld(T1, POOL, v), csrw(status, T1)]);
    case.slot(&[ld(T0, POOL, to), csrw(epc, T0), if machine { MRET } else { SRET }]);
}

/// Traps of every sort with delegation, and returns from them, allowed or not.
pub(crate) fn traps(rng: &mut Rng, image: &mut Image) -> Case {
    let rounds = 16;
    let mode = rng.pick(&[M, M, S, U]);
    let mut case = Case::new("traps", mode, 2 * rounds + 3, rng, image);
    case.traps_max = 2 * rounds + 12;
    start_interrupts(&mut case, rng);
    if rng.one_in(2) {
        case.mie = 0;
    }
    for _ in 0..rounds {
        match rng.below(10) {
            0 => case.slot(&[ECALL]),
            1 => case.slot(&[EBREAK]),
            2 => case.slot_bytes(&[2, 0x90]), // c.ebreak
            3 => case.slot(&[rng.pick(&[MRET, SRET]) ^ 1 << rng.pick(&[7, 15, 20, 31])]),
            4 => case.slot(&[
                SFENCE | rng.bits(5) << 15,
                csrr(dest(rng), 0x180),
                csrr(T1, 0xc01),
                addi(T1, 0, 0),
            ]),
            5 | 6 => return_slots(&mut case, rng, true),
            7 => return_slots(&mut case, rng, false),
            8 => {
                // Accesses that fault: outside RAM, and misaligned there.
                let at =
                    case.constant(rng.pick(&[0, 0x1000_0001, 1 << 40, 0x9000_0002, u64::MAX - 3]));
                case.slot(&[
                    ld(T0, POOL, at),
                    rng.pick(&[ld(T1, T0, 0), sd(T1, T0, 0), r(0x2f, 3, 0, T1, T0, T1)]),
                ]);
            }
            _ => {
                let n = rng.pick(&TRAPS);
                csr_slot(&mut case, rng, n);
            }
        }
    }
    // A jump to nowhere comes last: `ra` is not in the code.
    let at = case.constant(rng.pick(&[0, 2, 1 << 20, 0x9000_0000, u64::MAX - 1]));
    case.slot(&[ld(T0, POOL, at), jalr(0, T0, 0)]);
    case
}

/// Interrupt lines of all sorts raised in M-mode, then taken by priority in another.
pub(crate) fn interrupts(rng: &mut Rng, image: &mut Image) -> Case {
    let mut case = Case::new("interrupts", M, 32, rng, image);
    case.traps_max = 48;
    case.mstatus = FS_DIRTY | rng.next() & 0x22;
    case.set_csr("medeleg", rng.pick(&[0, 0xb1ff & exceptions::write_mask(0x302)]));
    case.set_csr("menvcfg", rng.next() & !STCE | rng.pick(&[0, STCE]));
    (case.x[11], case.x[12]) = (MSIP, MTIMECMP);
    let write = |case: &mut Case, number: u32, v: u64, second: u32, w: u64| {
        let (v, w) = (case.constant(v), case.constant(w));
        case.slot(&[ld(T0, POOL, v), csrw(number, T0), ld(T1, POOL, w), csrw(second, T1)]);
    };
    let at_random = rng.next();
    let deleg = rng.pick(&[0x222, 0, rng.clone().next() & 0x222]);
    let enabled = rng.pick(&[0xaaa, rng.clone().next() & 0xaaa]);
    write(&mut case, 0x303, deleg, 0x304, enabled);
    let pending = rng.next() & 0x222;
    if case.stce() {
        let at = rng.pick(&[0, u64::MAX]);
        write(&mut case, 0x344, pending, 0x14d, at);
    } else {
        write(&mut case, 0x344, pending, 0x140, at_random);
    }
    let (msip, at) = (case.constant(rng.below(2)), case.constant(rng.pick(&[0, u64::MAX])));
    case.slot(&[ld(T0, POOL, msip), s(0x23, 2, 11, T0, 0), ld(T1, POOL, at), sd(T1, 12, 0)]);
    case.slot(&[csrr(dest(rng), 0x344), csrr(dest(rng), 0x304), csrr(dest(rng), 0x104)]);
    if rng.one_in(3) {
        case.slot(&[csr(6, 0, 0x300, 8)]); // now, in M-mode
        case.slot(&[csr(7, 0, 0x300, 8)]);
    }
    let status = FS_DIRTY | rng.next() & 0x1aa | rng.pick(&[0, 1, 3]) << 11;
    let back = case.here() + 32;
    write(&mut case, 0x341, back, 0x300, status & !8);
    case.slot(&[MRET]);
    for _ in 0..8 {
        match rng.below(5) {
            0 => case.slot(&[csr(6, T1, 0x100, 2)]), // sstatus.SIE
            1 => case.slot(&[csr(rng.pick(&[6, 7]), T1, 0x144, 2), andi(T1, T1, SIP_COMPARED)]), // sip.SSIP
            2 => {
                let v = rng.next() & 0x222;
                let w = rng.next() & 0x222;
                write(&mut case, 0x104, v, 0x144, w);
            }
            3 => {
                let v = rng.next() & 0x222;
                write(&mut case, 0x344, v, 0x304, 0xaaa);
            }
            _ => case.slot(&[csrr(T1, 0x144), andi(T1, T1, SIP_COMPARED), ECALL]),
        }
    }
    case
}

/// WFI with an interrupt pending that is enabled but not taken, so that it never waits; allowed or not.
pub(crate) fn wait_for_interrupt(rng: &mut Rng, image: &mut Image) -> Case {
    let mode = rng.pick(&[M, S, U]);
    let mut case = Case::new("wfi", mode, 9, rng, image);
    case.mstatus = FS_DIRTY | rng.below(2) << 21;
    if mode != U {
        case.mie = 2;
        case.set_csr("mip", 2);
        case.set_csr("mideleg", rng.pick(&[2, 0x222]));
    }
    for _ in 0..8 {
        case.slot(&[WFI, csrr(dest(rng), 0x344)]);
    }
    case
}

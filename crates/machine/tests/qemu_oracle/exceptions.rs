//! Where the two machines differ and both are right, or QEMU is not: the only differences that the generators avoid.

use crate::case::{ADUE, ENVCFG, PBMTE, STCE};

/// A difference: what it is about, and why ours may stay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exception {
    pub(crate) what: &'static str,
    pub(crate) why: &'static str,
    /// CSRs concerned, from and to.
    csrs: (u32, u32),
    /// Bits of them that are written and compared; 0 compares only whether the access is legal, `None` leaves them out.
    compared: Option<u64>,
}

const fn csr(
    what: &'static str,
    why: &'static str,
    csrs: (u32, u32),
    compared: Option<u64>,
) -> Exception {
    Exception { what, why, csrs, compared }
}

const fn other(what: &'static str, why: &'static str) -> Exception {
    csr(what, why, (0x1000, 0), None)
}

/// All of them. Clauses are of the privileged specification unless said otherwise.
pub(crate) const EXCEPTIONS: &[Exception] = &[
    csr(
        "mstatus.UXL, SXL",
        "WARL; a hart need not offer RV32 to lower modes (3.1.6.3), QEMU does",
        (0x300, 0x300),
        Some(!(0xf << 32)),
    ),
    csr("sstatus.UXL", "as mstatus.UXL", (0x100, 0x100), Some(!(0xf << 32))),
    csr(
        "medeleg",
        "WARL; QEMU also delegates causes that need extensions absent here, and cause 11",
        (0x302, 0x302),
        Some(0xb3ff & !(1 << 11)),
    ),
    csr(
        "menvcfg.CBIE",
        "the reserved value 2 is not kept here (3.1.18); QEMU keeps it, so that of the field one bit is written",
        (0x30a, 0x30a),
        Some(STCE | PBMTE | ADUE | ENVCFG),
    ),
    csr("senvcfg.CBIE", "as menvcfg", (0x10a, 0x10a), Some(ENVCFG)),
    csr(
        "sepc, mepc",
        "bit 0 is always zero (3.1.14); QEMU 10.0 keeps it",
        (0x141, 0x141),
        Some(!1),
    ),
    csr("mepc", "as sepc", (0x341, 0x341), Some(!1)),
    csr("mcounteren", "no HPM counters here", (0x306, 0x306), Some(7)),
    csr("scounteren", "no HPM counters here", (0x106, 0x106), Some(7)),
    csr(
        "mie",
        "QEMU keeps enable bits of interrupts that do not exist",
        (0x304, 0x304),
        Some(0xaaa),
    ),
    csr("sie", "as mie", (0x104, 0x104), Some(0x222)),
    csr(
        "mip",
        "QEMU keeps pending bits of interrupts that do not exist",
        (0x344, 0x344),
        Some(0xaaa),
    ),
    csr(
        "sip",
        "as mip; and with AIA's aliases QEMU does not show STIP of stimecmp",
        (0x144, 0x144),
        Some(0x202),
    ),
    csr("mideleg", "as mie", (0x303, 0x303), Some(0x222)),
    csr(
        "mcountinhibit",
        "WARL; counters that cannot be stopped read as zero (3.1.12)",
        (0x320, 0x320),
        Some(0),
    ),
    csr(
        "pmpcfg: A = NA4, RW = 01, L",
        "the reserved combination is not kept here; NA4 is not selectable with a grain of 4 KiB (3.7.1); L would spoil later cases",
        (0x3a0, 0x3af),
        Some(0x0f0f_0f0f_0f0f_0f0f),
    ),
    csr(
        "pmpaddr",
        "bits below the grain of 4 KiB (3.7.1)",
        (0x3b0, 0x3ef),
        Some(!0x3ff & ((1 << 54) - 1)),
    ),
    csr("mcycle", "counts differ", (0xb00, 0xb00), Some(0)),
    csr("minstret", "counts differ", (0xb02, 0xb02), Some(0)),
    csr("cycle, time, instret", "counts differ", (0xc00, 0xc02), Some(0)),
    csr("mhpmcounter", "there are no events; QEMU counts some", (0xb03, 0xb1f), None),
    csr("hpmcounter", "Zihpm is absent here", (0xc03, 0xc1f), None),
    csr("mhpmevent", "there are no events; QEMU has some", (0x323, 0x33f), None),
    csr(
        "Sdtrig",
        "QEMU has triggers; reads of tselect and tdata are zero here, which says that there are none",
        (0x7a0, 0x7af),
        None,
    ),
    other(
        "stimecmp without menvcfg.STCE",
        "mip.STIP is then the bit that software wrote (Sstc); QEMU's timer changes it all the same",
    ),
    other(
        "interrupt priority",
        "MEI, MSI, MTI, SEI, SSI, STI (3.1.9); QEMU without AIA takes the lowest number, so that AIA is on where priority counts",
    ),
    other(
        "reservation",
        "an SC whose width or address is not the LR's may fail or not (unprivileged 13.2), and whether a failing one faults is unspecified",
    ),
    other("sfence.w.inval and sfence.inval.ir in U-mode", "illegal (Svinval); QEMU lets them pass"),
    other(
        "TOR entry with pmpaddr 0",
        "matches nothing (3.7.1); in QEMU 10.0 its end wraps around and it matches all above its start",
    ),
    other(
        "stores to code",
        "need a fence.i before they count (Zifencei); here they always count, in QEMU not within a translated block",
    ),
    other(
        "PTE with memory type 3",
        "reserved (Svpbmt), which faults; QEMU 10.0 takes it for a type",
    ),
    other(
        "PTE with N and a reserved size",
        "faults without a change (12.3.2); QEMU sets accessed and dirty bits before it faults",
    ),
    other(
        "devices",
        "their widths of access and what they read are not the subject: cases hold no likely pointers to them",
    ),
    other(
        "fflags, frm and fcsr",
        "csrrs and csrrc of a register that holds zero write (unprivileged 6.1) and make FS dirty here; QEMU does not",
    ),
    other(
        "fround and froundnx",
        "raise flags whatever becomes of the result (Zfa); QEMU 10.0 leaves them out when their result is not used",
    ),
    other(
        "cbo.* that menvcfg or senvcfg forbids",
        "the instruction is in mtval or stval as for every illegal one; QEMU writes zero there",
    ),
    other(
        "FS",
        "flags raised by an instruction with an integer result make FS dirty here (3.1.6.6); QEMU forgets it",
    ),
];

/// The table as text, for who looks at a difference.
pub(crate) fn text() -> String {
    EXCEPTIONS.iter().map(|e| format!("  {}: {}\n", e.what, e.why)).collect()
}

fn bits(number: u32) -> Option<u64> {
    let found = EXCEPTIONS.iter().find(|e| (e.csrs.0..=e.csrs.1).contains(&number));
    found.map_or(Some(u64::MAX), |e| e.compared)
}

/// Whether the CSR is not touched at all.
pub(crate) fn is_left_out(number: u32) -> bool {
    bits(number).is_none()
}

/// Bits that may be written.
pub(crate) fn write_mask(number: u32) -> u64 {
    bits(number).unwrap_or(0)
}

/// Bits that must read the same.
pub(crate) fn read_mask(number: u32) -> u64 {
    bits(number).unwrap_or(0)
}

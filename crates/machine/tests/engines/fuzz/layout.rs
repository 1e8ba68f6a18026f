//! What every program rests on: its places in RAM, the trap handlers, the page tables of three address spaces.
//!
//! ```text
//! 0x8000_0000 M handler | +1000 S handler | +2000 save areas | +3000 entries | +4000 registers | +1_0000 page tables
//! +2_0000 page tables as they were | +4_0000 code | +6_0000 code, slightly other | +8_0000 data | +9_0000 constants
//! ```
//! All of it lies in 2 MiB, which the address spaces show in windows: space A at its own address and in the upper half
//! for S-mode, [`USER`] above for U-mode, page by page; space B the same with the other code, by a superpage and by
//! gigapages; Sv48 leads to the tables of A. [`CHAOS`] maps pages at random with all sorts of flags.

use crate::asm::*;
use crate::fuzz::code::Code;
use crate::rng::Rng;

pub(crate) const RAM: u64 = 32 << 20;
pub(crate) const BASE: u64 = 0x8000_0000;
pub(crate) const S_HANDLER: u64 = BASE + 0x1000;
const SAVES: u64 = BASE + 0x2000;
pub(crate) const ENTRIES: u64 = BASE + 0x3000;
pub(crate) const REGISTERS: u64 = BASE + 0x4000;
pub(crate) const TABLES: u64 = BASE + 0x1_0000;
/// Distance from the tables to what they were at the start.
const PRISTINE: u64 = 0x1_0000;
pub(crate) const CODE: u64 = BASE + 0x4_0000;
pub(crate) const CODE_BYTES: u64 = 0x1_0000;
/// Distance to the other code, which space B shows in place of the first.
pub(crate) const OTHER: u64 = 0x2_0000;
pub(crate) const DATA: u64 = BASE + 0x8_0000;
pub(crate) const DATA_BYTES: u64 = 0x1_0000;
pub(crate) const POOL: u64 = BASE + 0x9_0000;
pub(crate) const POOL_BYTES: u64 = 0x1_0000;
/// Distance from a place in RAM to where U-mode sees it.
pub(crate) const USER: u64 = 0x4000_0000;
/// Window of random translations in space A; RAM by a gigapage in space B.
pub(crate) const CHAOS: u64 = 0x4000_0000;
/// The window in the upper half.
pub(crate) const UPPER: u64 = 0xffff_ffff_0000_0000;

pub(crate) const UART: u64 = 0x1000_0000;
pub(crate) const CLINT: u64 = 0x200_0000;
pub(crate) const PLIC: u64 = 0xc00_0000;

const V: u64 = 1;
const RWX: u64 = 0xe;
const U: u64 = 0x10;
const AD: u64 = 0xc0;

/// Tables by number; the last four are those of single pages.
const ROOT_A: u64 = 0;
const ROOT_B: u64 = 1;
const ROOT_48: u64 = 2;
const MIDDLE_A: u64 = 3;
const MIDDLE_A_USER: u64 = 4;
const MIDDLE_B: u64 = 5;
const MIDDLE_B_USER: u64 = 6;
const MIDDLE_CHAOS: u64 = 7;
const DEVICES: u64 = 8;
const DEVICES_USER: u64 = 9;
const LEAVES_A: u64 = 10;
const LEAVES_A_USER: u64 = 11;
const LEAVES_B: u64 = 12;
const LEAVES_CHAOS: u64 = 13;
const TABLE_COUNT: u64 = 14;
/// Tables of single pages, one behind the other.
pub(crate) const LEAF_TABLES: u64 = 4;

pub(crate) fn table(number: u64) -> u64 {
    TABLES + number * 0x1000
}

/// The first table of single pages.
pub(crate) fn leaves() -> u64 {
    table(LEAVES_A)
}

/// Places of entries for superpages: the windows' of A and B.
pub(crate) const SUPERPAGES: [u64; 3] =
    [TABLES + MIDDLE_A * 0x1000, TABLES + MIDDLE_B * 0x1000, TABLES + MIDDLE_A_USER * 0x1000];

/// `satp` of the spaces A, B and Sv48, and without translation.
pub(crate) fn satps() -> [u64; 4] {
    let root = |mode: u64, asid: u64, number: u64| mode << 60 | asid << 44 | table(number) >> 12;
    [root(8, 1, ROOT_A), root(8, 2, ROOT_B), root(9, 3, ROOT_48), 0]
}

pub(crate) fn pte(gpa: u64, flags: u64) -> u64 {
    gpa >> 12 << 10 | flags
}

/// Contents of RAM, from [`BASE`] on.
#[derive(Debug, Clone)]
pub(crate) struct Image(pub(crate) Vec<u8>);

impl Image {
    pub(crate) fn put(&mut self, gpa: u64, bytes: &[u8]) {
        let at = (gpa - BASE) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn put64(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// Zeroes but for the handlers.
    pub(crate) fn new() -> Self {
        let mut image = Self(vec![0; (POOL + POOL_BYTES - BASE) as usize]);
        image.put(BASE, &m_handler());
        image.put(S_HANDLER, &s_handler());
        image
    }

    /// The page tables, with and without accessed and dirty bits.
    pub(crate) fn put_tables(&mut self, rng: &mut Rng) {
        let link = |number: u64| pte(table(number), V);
        let mut put = |number: u64, index: u64, entry: u64| {
            self.put64(table(number) + 8 * index, entry);
            self.put64(table(number) + PRISTINE + 8 * index, entry);
        };
        let giga = |flags: u64| pte(BASE, V | RWX | AD | flags);
        for (index, to) in
            [(0, DEVICES), (1, MIDDLE_CHAOS), (2, MIDDLE_A), (3, MIDDLE_A_USER), (510, MIDDLE_A)]
        {
            put(ROOT_A, index, link(to));
        }
        for (index, to) in [(0, DEVICES_USER), (2, MIDDLE_B), (3, MIDDLE_B_USER)] {
            put(ROOT_B, index, link(to));
        }
        put(ROOT_B, 1, giga(0));
        put(ROOT_B, 510, giga(0));
        put(ROOT_48, 0, link(ROOT_A));
        put(ROOT_48, 511, link(ROOT_A));
        put(MIDDLE_A, 0, link(LEAVES_A));
        put(MIDDLE_A_USER, 0, link(LEAVES_A_USER));
        put(MIDDLE_B, 0, link(LEAVES_B));
        put(MIDDLE_B_USER, 0, giga(U));
        put(MIDDLE_CHAOS, 0, link(LEAVES_CHAOS));
        for (number, flags) in [(DEVICES, 0), (DEVICES_USER, U)] {
            for device in [CLINT, PLIC, PLIC + 0x20_0000, UART] {
                put(number, device >> 21, pte(device, V | 6 | AD | flags));
            }
        }
        for page in 0..(POOL + POOL_BYTES - BASE) >> 12 {
            let gpa = BASE + (page << 12);
            let is_code = (CODE..CODE + CODE_BYTES).contains(&gpa);
            let mut flags = || V | RWX | rng.pick(&[AD, AD, 0x40, 0]) | rng.pick(&[0, 0, 0x20]);
            put(LEAVES_A, page, pte(gpa, flags()));
            put(LEAVES_A_USER, page, pte(gpa, flags() | U));
            put(LEAVES_B, page, pte(if is_code { gpa + OTHER } else { gpa }, flags()));
        }
        for page in 0..512 {
            put(LEAVES_CHAOS, page, chaos(rng));
        }
    }
}

/// An entry with random flags for a page of data, rarely of code, rarely of nothing.
pub(crate) fn chaos(rng: &mut Rng) -> u64 {
    let gpa = match rng.below(16) {
        0 => CODE + (rng.below(CODE_BYTES) & !0xfff),
        1 => rng.pick(&[UART, 0, 1 << 40]),
        _ => DATA + (rng.below(DATA_BYTES) & !0xfff),
    };
    let mut flags = V | rng.pick(&[2, 6, 0xe, 0xe, 6, 8, 0xa, rng.clone().below(8) << 1]);
    flags |= rng.pick(&[0, U]) | rng.pick(&[AD, AD, 0x40, 0, 0x80]);
    if rng.one_in(16) {
        flags &= !V;
    }
    match rng.below(24) {
        0 => flags |= 1 << (54 + rng.below(10)),
        1 => flags |= (1 + rng.below(2)) << 61,
        // 64 KiB of pages in one entry; or nearly.
        2 | 3 => {
            let number = rng.pick(&[8, 8, 8, 0]);
            return pte(gpa & !0xffff, flags | 1 << 63) | number << 10;
        }
        _ => {}
    }
    pte(gpa, flags)
}

/// Registers of a hart's save area.
const SAVED: [(u32, i32); 3] = [(28, 0), (29, 8), (30, 16)];
const INSIDE: i32 = 24;
const COUNTER: i32 = 32;
const MTIMECMP_AT: i32 = 40;
const MSIP_AT: i32 = 48;
const CLAIM_AT: i32 = 56;
const ENTRIES_AT: i32 = 64;
const REGISTERS_AT: i32 = 72;
/// Mask over the handler's counter: where it is 0, a timer goes on at another entry.
const RESTART_MASK: i32 = 80;
/// Least steps of guest time between two timers.
const TIMER_LEAST: i32 = 88;
/// Bytes of a save area.
const SAVE_BYTES: u64 = 256;

/// Entries of a hart, and double words of one: the CSRs of [`ENTRY_CSRS`], in this order.
pub(crate) const ENTRY_COUNT: u64 = 16;
pub(crate) const ENTRY_BYTES: u64 = 64;
pub(crate) const ENTRY_CSRS: [u32; 7] = [0x341, 0x300, 0x180, 0x302, 0x303, 0x304, 0x105];
/// Sets of registers of a hart.
pub(crate) const SET_COUNT: u64 = 4;
pub(crate) const SET_BYTES: u64 = 256;

/// Where the save area of a hart is.
pub(crate) fn save_area(hart: u64) -> u64 {
    SAVES + hart * SAVE_BYTES
}

pub(crate) fn entry(hart: u64, number: u64) -> u64 {
    ENTRIES + (hart * ENTRY_COUNT + number) * ENTRY_BYTES
}

pub(crate) fn registers(hart: u64, set: u64) -> u64 {
    REGISTERS + (hart * SET_COUNT + set) * SET_BYTES
}

/// The save area of a hart at the start.
pub(crate) fn put_save_area(image: &mut Image, hart: u64, restart_mask: u64, timer_least: u64) {
    let at = save_area(hart);
    for (offset, value) in [
        (MTIMECMP_AT, CLINT + 0x4000 + 8 * hart),
        (MSIP_AT, CLINT + 4 * hart),
        (CLAIM_AT, PLIC + 0x20_0004 + 0x2000 * hart),
        (ENTRIES_AT, entry(hart, 0)),
        (REGISTERS_AT, registers(hart, 0)),
        (RESTART_MASK, restart_mask),
        (TIMER_LEAST, timer_least),
    ] {
        image.put64(at + offset as u64, value);
    }
}

/// The M-mode handler: repairs, skips, or goes on at another entry. It spoils x31; `mscratch` is the save area.
fn m_handler() -> Vec<u8> {
    let mut a = Asm::default();
    a.ops(&[lui(31, 0x20), csr(3, 0, 0x300, 31), csrr(31, 0x340)]); // MPRV off
    for (x, at) in SAVED {
        a.op(sd(x, 31, at));
    }
    a.ops(&[ld(29, 31, INSIDE), ld(28, 31, COUNTER), addi(28, 28, 1), sd(28, 31, COUNTER)]);
    a.branch(1, 29, 0, "restart");
    a.ops(&[addi(29, 0, 1), sd(29, 31, INSIDE), csrr(30, 0x342)]);
    a.branch(4, 30, 0, "interrupt");
    for cause in [0, 1] {
        a.op(addi(29, 0, cause));
        a.branch(0, 30, 29, "restart");
    }
    // Page faults are repaired half of the time; else fetches go on elsewhere and accesses are skipped.
    a.ops(&[addi(29, 30, -12), andi(28, 28, 1)]);
    a.branch(6, 30, 29, "skip");
    a.branch(1, 28, 0, "repair");
    a.branch(0, 29, 0, "restart");
    skip(&mut a);
    interrupt(&mut a);
    repair(&mut a);
    restart(&mut a);
    a.finish()
}

/// Goes on behind the instruction, whose length is read with MPRV and MXR: a fault there goes on elsewhere.
fn skip(a: &mut Asm) {
    a.label("skip");
    a.ops(&[csrr(29, 0x341), lui(30, 0xa0), csr(2, 28, 0x300, 30)]);
    a.ops(&[
        i(0x03, 5, 30, 29, 0),
        csrw(0x300, 28),
        andi(30, 30, 3),
        addi(30, 30, -3),
        addi(29, 29, 2),
    ]);
    a.branch(1, 30, 0, "short");
    a.op(addi(29, 29, 2));
    a.label("short");
    a.op(csrw(0x341, 29));
    a.label("leave");
    a.op(sd(0, 31, INSIDE));
    for (x, at) in SAVED {
        a.op(ld(x, 31, at));
    }
    a.op(MRET);
}

fn interrupt(a: &mut Asm) {
    a.label("interrupt");
    a.op(andi(30, 30, 15));
    for (number, to) in [(7, "timer"), (3, "software"), (11, "external")] {
        a.op(addi(29, 0, number));
        a.branch(0, 30, 29, to);
    }
    // An interrupt of S-mode that was not delegated: bits off, S-mode's timer later.
    a.ops(&[
        addi(29, 0, 0x222),
        csr(3, 0, 0x344, 29),
        csrr(29, 0xc01),
        addi(29, 29, 0x200),
        csrw(0x14d, 29),
    ]);
    a.op(addi(29, 0, 9));
    a.branch(0, 30, 29, "external");
    a.jump("leave");
    a.label("software");
    a.ops(&[ld(30, 31, MSIP_AT), s(0x23, 2, 30, 0, 0)]);
    a.jump("leave");
    a.label("external"); // claim and complete for M-mode and S-mode
    a.ops(&[ld(30, 31, CLAIM_AT), i(0x03, 2, 29, 30, 0), s(0x23, 2, 30, 29, 0), lui(29, 1)]);
    a.ops(&[r(0x33, 0, 0, 30, 30, 29), i(0x03, 2, 29, 30, 0), s(0x23, 2, 30, 29, 0)]);
    // If the line stays high it is masked.
    a.ops(&[
        csrr(29, 0x344),
        lui(30, 1),
        addi(30, 30, -0x600),
        r(0x33, 7, 0, 29, 29, 30),
        csr(3, 0, 0x304, 29),
    ]);
    a.jump("leave");
    a.label("timer");
    a.ops(&[slli(29, 28, 5), i(0x13, 4, 29, 29, 0x2a5), andi(29, 29, 0xff)]);
    a.ops(&[
        ld(30, 31, TIMER_LEAST),
        r(0x33, 0, 0, 29, 29, 30),
        csrr(30, 0xc01),
        r(0x33, 0, 0, 29, 29, 30),
    ]);
    a.ops(&[
        ld(30, 31, MTIMECMP_AT),
        sd(29, 30, 0),
        ld(29, 31, RESTART_MASK),
        r(0x33, 7, 0, 28, 28, 29),
    ]);
    a.branch(0, 28, 0, "restart");
    a.jump("leave");
}

/// Writes the entries for the page in every table of single pages as they were.
fn repair(a: &mut Asm) {
    a.label("repair");
    a.ops(&[csrr(29, 0x343), srli(29, 29, 12), andi(29, 29, 0x1ff), slli(29, 29, 3)]);
    let high = (leaves() >> 12) as u32;
    a.ops(&[lui(30, high), slli(30, 30, 32), srli(30, 30, 32), r(0x33, 0, 0, 29, 29, 30)]);
    for _ in 0..LEAF_TABLES {
        a.ops(&[
            lui(30, (PRISTINE >> 12) as u32),
            r(0x33, 0, 0, 30, 30, 29),
            ld(30, 30, 0),
            sd(30, 29, 0),
        ]);
        a.ops(&[lui(30, 1), r(0x33, 0, 0, 29, 29, 30)]);
    }
    a.jump("leave");
}

/// Goes on at the entry and with the registers that the counter names.
fn restart(a: &mut Asm) {
    a.label("restart");
    a.ops(&[sd(0, 31, INSIDE), ld(28, 31, COUNTER), andi(29, 28, ENTRY_COUNT as i32 - 1)]);
    a.ops(&[slli(29, 29, 6), ld(30, 31, ENTRIES_AT), r(0x33, 0, 0, 30, 30, 29)]);
    for (k, number) in (0..).zip(ENTRY_CSRS) {
        a.ops(&[ld(29, 30, 8 * k), csrw(number, 29)]);
    }
    a.ops(&[srli(28, 28, 3), andi(29, 28, SET_COUNT as i32 - 1), slli(29, 29, 8)]);
    a.ops(&[ld(30, 31, REGISTERS_AT), r(0x33, 0, 0, 31, 30, 29)]);
    for x in 1..32 {
        a.op(ld(x, 31, 8 * x as i32));
    }
    a.op(MRET);
}

/// The S-mode handler: skips exceptions, puts interrupts off. It spoils x31.
fn s_handler() -> Vec<u8> {
    let mut a = Code::new(S_HANDLER);
    let (interrupt, timer, external) = (a.label(), a.label(), a.label());
    a.word(csrr(31, 0x142));
    a.branch(4, 31, 0, interrupt);
    a.words(&[csrr(31, 0x141), addi(31, 31, 4), csrw(0x141, 31), SRET]);
    a.bind(interrupt);
    a.words(&[andi(31, 31, 15), addi(31, 31, -5)]);
    a.branch(0, 31, 0, timer);
    a.branch(5, 31, 0, external);
    a.words(&[csr(7, 0, 0x144, 2), SRET]);
    a.bind(timer);
    a.words(&[csrr(31, 0xc01), addi(31, 31, 0x180), csrw(0x14d, 31), SRET]);
    a.bind(external);
    a.words(&[addi(31, 0, 0x200), csr(3, 0, 0x104, 31), SRET]);
    a.finish()
}

const _: () = assert!(TABLE_COUNT * 0x1000 <= PRISTINE);

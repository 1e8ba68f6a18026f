//! Cases of address translation: random page tables, accesses and fetches through them.
//!
//! Two gigapages stand in every set of tables: RAM at its own address for S-mode, and [`ALIAS`] above it for U-mode.
//! Every other leaf maps the data pages of the case, which begin with returns to `ra` for the sake of fetches.

use crate::asm::*;
use crate::case::*;
use crate::rng::Rng;
use crate::user::dest;

/// Distance of the user alias of RAM.
const ALIAS: u64 = 0x4000_0000;
const T0: u32 = 6;
const T1: u32 = 7;

const V: u64 = 1;
const R: u64 = 2;
const W: u64 = 4;
const X: u64 = 8;
const USER: u64 = 0x10;
const AD: u64 = 0xc0;
const NAPOT: u64 = 1 << 63;
const TYPE_SHIFT: u32 = 61;

/// The tables of a case.
struct Tables {
    four_levels: bool,
    root: u64,
    /// Level of gigapages, of 2 MiB, of 4 KiB.
    l2: u64,
    l1: [u64; 2],
    l0: [u64; 2],
    data: u64,
    used: [Vec<u64>; 3],
}

fn flags(rng: &mut Rng) -> u64 {
    let mut f =
        V | rng.pick(&[R, R | W, R | W | X, X, R | X, R | W, R | W | X, rng.clone().below(8) << 1]);
    f |= (rng.below(4) << 8) | (rng.below(2) << 5);
    f |= rng.pick(&[USER, 0]);
    f |= rng.pick(&[AD, AD, 0x40, 0, 0x80]);
    if rng.one_in(24) {
        f &= !V;
    }
    // Type 3 is left out: see the table of exceptions.
    match rng.below(24) {
        0 => f |= 1 << (54 + rng.below(9)),
        1..=3 => f |= rng.below(3) << TYPE_SHIFT,
        _ => {}
    }
    f
}

fn pte(gpa: u64, flags: u64) -> u64 {
    gpa >> 12 << 10 | flags
}

impl Tables {
    fn new(data: u64, rng: &mut Rng, image: &mut Image) -> Self {
        let mut page = || image.alloc(0x1000, 0x1000);
        let (root, l2, l1, l0) = (page(), page(), [page(), page()], [page(), page()]);
        let four_levels = rng.one_in(2);
        let in_data = |shift: u32| data >> shift & 511;
        let t = Self {
            four_levels,
            root: if four_levels { root } else { l2 },
            l2,
            l1,
            l0,
            data,
            used: [
                vec![0, 1, 511, 510, in_data(12), in_data(12) + 1],
                vec![0, 1, 511, in_data(21)],
                vec![0, 1, 4, 256, 510, 511],
            ],
        };
        t.fill(rng, image);
        t
    }

    /// A pointer to a table, rarely a bad one.
    fn pointer(rng: &mut Rng, to: u64) -> u64 {
        match rng.below(16) {
            0 => pte(to, V | rng.pick(&[0x10, 0x40, 0x80])),
            1 => pte(rng.pick(&[1 << 40, 0x1000, 0x9000_0000]), V),
            2 => pte(to, V) | 1 << (54 + rng.below(10)),
            3 => pte(to, 0),
            _ => pte(to, V | rng.below(4) << 8 | rng.below(2) << 5),
        }
    }

    /// A leaf at `level` that covers the data, rarely misaligned or outside RAM.
    fn leaf(&self, rng: &mut Rng, level: u32) -> u64 {
        let page = self.data + (rng.below(2) << 12);
        let covers = page >> (12 + 9 * level) << (12 + 9 * level);
        let gpa = match rng.below(12) {
            0 if level > 0 => covers | 0x1000 << rng.below(u64::from(9 * level)),
            1 if level == 0 => rng.pick(&[0x1000, 1 << 40, 0x9000_0000]),
            _ => covers,
        };
        pte(gpa, flags(rng))
    }

    /// The leaf at `index` of the lowest level as one of a range of 64 KiB. Only where it maps a page of the data, the range
    /// has a legal size.
    fn range(&self, rng: &mut Rng, index: u64, leaf: u64) -> u64 {
        let page = self.data >> 12;
        let is_data = index == page & 511 || index == (page & 511) + 1 && page & 15 != 15;
        let size = if is_data && !rng.one_in(6) { 8 } else { rng.pick(&[0, 1, 4, 9, 10, 12, 15]) };
        // See the exception about accessed and dirty bits.
        let bits = if size == 8 { 0 } else { AD };
        (page & !15 | size) << 10 | leaf & 0x7f00_0000_0000_03ff | bits | NAPOT
    }

    fn fill(&self, rng: &mut Rng, image: &mut Image) {
        if self.four_levels {
            image.put64(self.root, pte(self.l2, V));
            for i in [1, 255, 256, 511] {
                let e = rng.pick(&[
                    Self::pointer(&mut rng.clone(), self.l2),
                    pte(self.l2, V),
                    pte(1 << 39, flags(&mut rng.clone()) | V),
                ]);
                rng.next();
                image.put64(self.root + 8 * i, e);
            }
        }
        image.put64(self.l2 + 8 * 2, pte(0x8000_0000, V | R | W | X | AD));
        image.put64(self.l2 + 8 * 3, pte(0x8000_0000, V | R | W | X | AD | USER));
        for &i in &self.used[2] {
            let to = rng.pick(&self.l1);
            let e = if rng.one_in(4) { self.leaf(rng, 2) } else { Self::pointer(rng, to) };
            image.put64(self.l2 + 8 * i, e);
        }
        for table in self.l1 {
            for &i in &self.used[1] {
                let to = rng.pick(&self.l0);
                let e = if rng.one_in(3) { self.leaf(rng, 1) } else { Self::pointer(rng, to) };
                image.put64(table + 8 * i, e);
            }
        }
        for table in self.l0 {
            for &i in &self.used[0] {
                let mut e = self.leaf(rng, 0);
                if rng.one_in(4) {
                    e = self.range(rng, i, e);
                }
                image.put64(table + 8 * (i & 511), e);
            }
        }
    }

    /// An address that the tables say something about: below a superpage it lies in the data.
    fn address(&self, rng: &mut Rng, image: &Image, offset: u64) -> u64 {
        let entry = |table: u64, i: u64| {
            let at = (table - crate::payload::BASE + 8 * i) as usize;
            u64::from_le_bytes(image.bytes[at..at + 8].try_into().unwrap())
        };
        let is_leaf = |e: u64| e & V != 0 && e & (R | X | W) != 0;
        let own = |shift: u32| self.data >> shift & 511;
        let i2 = rng.pick(&self.used[2]);
        let (mut i1, mut i0) = (rng.pick(&self.used[1]), rng.pick(&self.used[0]) & 511);
        let e2 = entry(self.l2, i2);
        if is_leaf(e2) {
            (i1, i0) = (own(21), own(12));
        } else if is_leaf(entry(
            if e2 >> 10 == self.l1[0] >> 12 { self.l1[0] } else { self.l1[1] },
            i1,
        )) {
            i0 = own(12);
        }
        let va = i2 << 30 | i1 << 21 | i0 << 12 | offset;
        let (bits, va) = if self.four_levels {
            (48, va | rng.pick(&[0, 0, 0, 1, 255, 256, 511]) << 39)
        } else {
            (39, va)
        };
        let va = ((va << (64 - bits)) as i64 >> (64 - bits)) as u64;
        if rng.one_in(24) { va ^ 1 << (bits + rng.below(64 - bits)) } else { va }
    }
}

/// Offset of a data access in its page: clear of the code there, sometimes across the end.
fn data_offset(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => 0xff9 + rng.below(7),
        1 => 0x400 + rng.below(0xbf0),
        _ => 0x400 + (rng.below(0xbf0) & !7),
    }
}

fn code_offset(rng: &mut Rng) -> u64 {
    if rng.one_in(3) { 0xffe } else { rng.below(0x400) & !1 }
}

fn access(rng: &mut Rng) -> Vec<u32> {
    match rng.below(12) {
        10 | 11 => vec![i(0x0f, 2, 0, T0, rng.pick(&[0, 1, 2, 4]))], // cbo.inval, clean, flush, zero
        0..=3 => vec![i(0x03, rng.below(7) as u32, T1, T0, 0)],
        4..=6 => vec![s(0x23, rng.below(4) as u32, T0, rng.bits(5), 0)],
        7 => vec![i(0x07, rng.pick(&[2, 3]), rng.bits(5), T0, 0), s(0x27, 3, T0, rng.bits(5), 0)],
        8 => vec![r(0x2f, rng.pick(&[2, 3]), rng.pick(&[0, 1, 8, 28]) << 2, T1, T0, rng.bits(5))],
        _ => {
            let width = rng.pick(&[2, 3]);
            vec![
                r(0x2f, width, 2 << 2, T1, T0, 0),
                r(0x2f, width, 3 << 2, dest(rng), T0, rng.bits(5)),
            ]
        }
    }
}

fn prepare(
    kind: &'static str,
    mode: u64,
    slots: u64,
    rng: &mut Rng,
    image: &mut Image,
) -> (Case, Tables) {
    let mut case = Case::new(kind, mode, slots, rng, image);
    let data = case.data_gpa();
    for page in [data, data + 0x1000] {
        (0..0x400).step_by(2).for_each(|at| image.put(page + at, &[0x82, 0x80])); // c.jr ra
        image.put(page, &[0, 0]); // the end of jr ra, which starts on the page before
        image.put(page + 0xffe, &[0x67, 0x80]);
    }
    let tables = Tables::new(data, rng, image);
    case.owns.1 = tables.l0[1] + 0x1000;
    case.set_csr(
        "satp",
        if tables.four_levels { 9 } else { 8 } << 60 | rng.below(16) << 44 | tables.root >> 12,
    );
    case.set_csr("medeleg", rng.pick(&[0, 0xb1ff, rng.clone().next() & 0xb1ff]));
    case.mstatus = FS_DIRTY | rng.below(4) << 18;
    if mode == U {
        case.code_va_offset = ALIAS;
        for x in [SP, POOL, D0, D1] {
            case.x[x as usize] += ALIAS;
        }
    }
    (case, tables)
}

/// Accesses and fetches from S-mode and U-mode, changes of SUM, MXR and PTEs.
pub(crate) fn translated(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 32;
    let mode = rng.pick(&[S, U]);
    let (mut case, tables) = prepare("translated", mode, slots + 1, rng, image);
    for _ in 0..slots {
        match rng.below(12) {
            0..=2 => {
                let offset = code_offset(rng);
                let at = case.constant(tables.address(rng, image, offset));
                case.slot(&[ld(T0, POOL, at), jalr(1, T0, 0), addi(T1, T1, 1)]);
            }
            3 if mode == S => {
                let c = case.constant(rng.below(4) << 18);
                case.slot(&[ld(T0, POOL, c), csrw(0x100, T0)]);
            }
            4 if mode == S => {
                let place = rng.pick(&tables.l0) + 8 * (rng.pick(&tables.used[0]) & 511);
                let (at, e) = (case.constant(place), case.constant(tables.leaf(rng, 0)));
                case.slot(&[ld(T0, POOL, at), ld(T1, POOL, e), sd(T1, T0, 0), SFENCE]);
            }
            _ => {
                let offset = data_offset(rng);
                let at = case.constant(tables.address(rng, image, offset));
                let mut words = vec![ld(T0, POOL, at)];
                words.extend(access(rng));
                case.slot(&words);
            }
        }
    }
    case
}

/// Accesses from M-mode with MPRV.
pub(crate) fn modified_privilege(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 32;
    let (mut case, tables) = prepare("mprv", M, 2 * slots + 1, rng, image);
    case.traps_max = 2 * slots;
    for _ in 0..slots {
        let offset = data_offset(rng);
        let at = case.constant(tables.address(rng, image, offset));
        let status = FS_DIRTY | 1 << 17 | rng.below(4) << 18 | rng.pick(&[0, 1, 3]) << 11;
        let status = case.constant(status);
        case.slot(&[ld(T1, POOL, status), ld(T0, POOL, at), csrw(0x300, T1), access(rng)[0]]);
        case.slot(&[lui(T0, 0x20), csr(3, 0, 0x300, T0)]);
    }
    case
}

/// Code written and run again after `fence.i`, in data pages and in the slots ahead; instructions across pages.
pub(crate) fn code(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 24;
    let mode = rng.pick(&[M, S, U]);
    let mut case = Case::new("code", mode, slots + 1, rng, image);
    let data = case.data_gpa();
    let ret = u64::from(jalr(0, 1, 0));
    // Places that do not overlap; the first lies across the two pages or next to their border.
    let places = [rng.pick(&[0xffa, 0xffe, 0xffc, 0xff6]), 0x100, 0x800];
    for k in 0..slots {
        let word = u64::from(addi(T1, T1, rng.bits(11) as i32));
        if rng.one_in(3) && k + 3 < slots {
            // Over the slot after the next.
            let at = case.constant(case.here() + 32);
            let new = case.constant(word | u64::from(addi(3, 3, 5)) << 32);
            // Other registers than below: a slot that lost its loads must not jump into the code.
            case.slot(&[ld(28, POOL, at), ld(29, POOL, new), sd(29, 28, 0), FENCE_I]);
        } else {
            // Into the data, often so that an instruction lies across the two pages.
            let place = data + rng.pick(&places);
            let at = case.constant(place);
            let new = case.constant(word | ret << 32);
            case.slot(&[ld(T0, POOL, at), ld(T1, POOL, new), sd(T1, T0, 0), FENCE_I]);
            case.slot(&[jalr(1, T0, 0), addi(4, T1, 0)]);
        }
        if case.code.len() as u64 >= slots * 16 {
            break;
        }
    }
    while (case.code.len() as u64) < slots * 16 {
        case.slot(&[NOP]);
    }
    case.code.truncate(slots as usize * 16);
    case
}

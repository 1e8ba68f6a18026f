//! Address translation: the page-table walker for Sv39 and Sv48.
//!
//! # Invariants
//! - INV-MMU-1: the result is as if every access walked the tables anew: every page that a valid PTE was read from is
//!   marked in [`GuestRam`], which raises its generation when such a PTE changes.
//! - INV-MMU-2: with `menvcfg.ADUE`, accessed and dirty bits are set by the walk that needs them, before the access;
//!   without it the walk faults, and a translation says `writable` only when the dirty bit is set.
//!
//! # References
//! Privileged Architecture 1.13, section 12.3.2 "Virtual Address Translation Process"; Svadu and Svade for accessed and
//! dirty bits; Svnapot; Svpbmt, whose memory types change nothing here, where there are no caches.

use crate::hart::csr::envcfg;
use crate::hart::pmp::{Access, Pmp};
use crate::hart::{Mode, Trap, cause};
use crate::ram::{GuestRam, PAGE_SHIFT, RAM_BASE, TableUse};

const PTE_V: u64 = 1;
const PTE_R: u64 = 1 << 1;
const PTE_W: u64 = 1 << 2;
const PTE_X: u64 = 1 << 3;
const PTE_U: u64 = 1 << 4;
const PTE_A: u64 = 1 << 6;
const PTE_D: u64 = 1 << 7;
/// Memory type (Svpbmt); the value 3 is reserved.
const PTE_PBMT: u64 = 3 << 61;
/// A naturally aligned power of two of pages (Svnapot).
const PTE_N: u64 = 1 << 63;
/// Bits that must be zero in every PTE.
const PTE_RESERVED: u64 = 0x7f << 54;
/// Low bits of the PPN in a PTE of a range of 64 KiB, the only one that Svnapot has.
const NAPOT_64K: u64 = 8;
const NAPOT_MASK: u64 = 0xf;

/// What a translation depends on beside the address.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    /// Effective privilege of the access.
    pub mode: Mode,
    /// `mstatus.SUM`.
    pub sum: bool,
    /// `mstatus.MXR`.
    pub mxr: bool,
    /// `satp`.
    pub satp: u64,
    /// `menvcfg`.
    pub menvcfg: u64,
}

/// A translated page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest physical address of the byte asked for.
    pub gpa: u64,
    /// Stores to the page need no further walk: it is writable and its dirty bit is set.
    pub writable: bool,
}

/// The exception for a failed access of this kind at `va`.
fn page_fault(access: Access, va: u64) -> Trap {
    let cause = match access {
        Access::Read => cause::LOAD_PAGE,
        Access::Write => cause::STORE_PAGE,
        Access::Execute => cause::FETCH_PAGE,
    };
    Trap { cause, tval: va }
}

/// The access-fault exception of this kind at `va`.
#[must_use]
pub fn access_fault(access: Access, va: u64) -> Trap {
    let cause = match access {
        Access::Read => cause::LOAD_ACCESS,
        Access::Write => cause::STORE_ACCESS,
        Access::Execute => cause::FETCH_ACCESS,
    };
    Trap { cause, tval: va }
}

/// Translates `va` and checks every permission, PMP included.
///
/// # Errors
/// The exception to raise.
pub fn translate(
    ram: &mut GuestRam,
    pmp: &Pmp,
    ctx: Context,
    va: u64,
    access: Access,
) -> Result<Translation, Trap> {
    let found = if ctx.mode == Mode::Machine || ctx.satp >> 60 == 0 {
        Translation { gpa: va, writable: true }
    } else {
        walk(ram, pmp, ctx, va, access)?
    };
    if !pmp.allows(found.gpa, ctx.mode, access) {
        return Err(access_fault(access, va));
    }
    let writable = found.writable && pmp.allows(found.gpa, ctx.mode, Access::Write);
    Ok(Translation { writable, ..found })
}

/// What `va` is mapped to with this value of `satp`, whatever the permissions, and without a trace: for debuggers.
#[must_use]
pub fn peek(ram: &GuestRam, satp: u64, va: u64) -> Option<u64> {
    if satp >> 60 == 0 {
        return Some(va);
    }
    let levels = levels(satp, va)?;
    let mut table = root(satp);
    for level in (0..levels).rev() {
        let pte = ram.read_u64(pte_address(table, level, va)).ok()?;
        if pte & PTE_V == 0 {
            return None;
        }
        if pte & (PTE_R | PTE_W | PTE_X) != 0 {
            return mapped(pte, level, va);
        }
        table = pte_ppn(pte) << PAGE_SHIFT;
    }
    None
}

/// Levels of the tables; `None` when `va` is not an address at all.
fn levels(satp: u64, va: u64) -> Option<u32> {
    let levels: u32 = if satp >> 60 == 9 { 4 } else { 3 };
    let sign = (va as i64) >> (PAGE_SHIFT + 9 * levels - 1);
    (sign == 0 || sign == -1).then_some(levels)
}

fn root(satp: u64) -> u64 {
    (satp & ((1 << 44) - 1)) << PAGE_SHIFT
}

fn pte_address(table: u64, level: u32, va: u64) -> u64 {
    let index = va >> (PAGE_SHIFT + 9 * level) & 0x1ff;
    table + index * 8
}

fn pte_ppn(pte: u64) -> u64 {
    pte >> 10 & ((1 << 44) - 1)
}

/// What a leaf PTE maps `va` to; `None` when it is not one that this level can have.
fn mapped(pte: u64, level: u32, va: u64) -> Option<u64> {
    // Bits of the PPN that come from the address, and what must stand in their place.
    let (low, expected) = match (pte & PTE_N != 0, level) {
        (false, _) => ((1u64 << (9 * level)) - 1, 0),
        (true, 0) => (NAPOT_MASK, NAPOT_64K),
        (true, _) => return None,
    };
    let offset_mask = low << PAGE_SHIFT | ((1 << PAGE_SHIFT) - 1);
    (pte_ppn(pte) & low == expected)
        .then(|| pte_ppn(pte) << PAGE_SHIFT & !offset_mask | va & offset_mask)
}

fn walk(
    ram: &mut GuestRam,
    pmp: &Pmp,
    ctx: Context,
    va: u64,
    access: Access,
) -> Result<Translation, Trap> {
    let levels = levels(ctx.satp, va).ok_or(page_fault(access, va))?;
    let mut table = root(ctx.satp);
    for level in (0..levels).rev() {
        let pte_gpa = pte_address(table, level, va);
        if !pmp.allows(pte_gpa, Mode::Supervisor, Access::Read) {
            return Err(access_fault(access, va));
        }
        let pte = ram.read_u64(pte_gpa).map_err(|_| access_fault(access, va))?;
        if pte & PTE_V == 0 || pte & (PTE_R | PTE_W) == PTE_W || has_reserved_bits(pte, ctx) {
            return Err(page_fault(access, va));
        }
        let pte_page = ((pte_gpa - RAM_BASE) >> PAGE_SHIFT) as u32;
        if pte & (PTE_R | PTE_X) == 0 {
            if pte & (PTE_A | PTE_D | PTE_U | PTE_PBMT | PTE_N) != 0 {
                return Err(page_fault(access, va));
            }
            ram.mark_page_table(pte_page, TableUse::OTHER);
            table = pte_ppn(pte) << PAGE_SHIFT;
            continue;
        }
        let gpa = leaf(pte, level, ctx, va, access)?;
        let wanted = pte | PTE_A | if access == Access::Write { PTE_D } else { 0 };
        if wanted != pte {
            if ctx.menvcfg & envcfg::ADUE == 0 {
                return Err(page_fault(access, va));
            }
            if !pmp.allows(pte_gpa, Mode::Supervisor, Access::Write) {
                return Err(access_fault(access, va));
            }
            ram.update_pte_flags(pte_gpa, wanted);
        }
        let table_use = match level {
            // A PTE of a range maps others' pages, too.
            0 if pte & PTE_N == 0 => TableUse { va: va & !0x1f_ffff, satp: ctx.satp },
            _ => TableUse::OTHER,
        };
        ram.mark_page_table(pte_page, table_use);
        let writable = wanted & (PTE_W | PTE_D) == PTE_W | PTE_D;
        return Ok(Translation { gpa, writable });
    }
    Err(page_fault(access, va))
}

/// Whether bits are set that stand for nothing.
fn has_reserved_bits(pte: u64, ctx: Context) -> bool {
    let types = if ctx.menvcfg & envcfg::PBMTE != 0 { PTE_PBMT } else { 0 };
    pte & (PTE_RESERVED | PTE_PBMT & !types) != 0 || pte & PTE_PBMT == PTE_PBMT
}

/// Checks a leaf PTE and returns the address it maps `va` to.
fn leaf(pte: u64, level: u32, ctx: Context, va: u64, access: Access) -> Result<u64, Trap> {
    let user = pte & PTE_U != 0;
    let mode_allows = match (ctx.mode, user) {
        (Mode::User, user) => user,
        (_, true) => ctx.sum && access != Access::Execute,
        (_, false) => true,
    };
    let allowed = match access {
        Access::Read => pte & PTE_R != 0 || (ctx.mxr && pte & PTE_X != 0),
        Access::Write => pte & PTE_W != 0,
        Access::Execute => pte & PTE_X != 0,
    };
    mapped(pte, level, va).filter(|_| mode_allows && allowed).ok_or(page_fault(access, va))
}

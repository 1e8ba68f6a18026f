//! Address translation: the page-table walker for Sv39 and Sv48.
//!
//! # Invariants
//! - INV-MMU-1: the result is as if every access walked the tables anew: every page that a valid PTE was read from is
//!   marked in [`GuestRam`], which raises its generation when such a PTE changes.
//! - INV-MMU-2: accessed and dirty bits are set by the walk that needs them, before the access.
//!
//! # References
//! Privileged Architecture 1.13, section 12.3.2 "Virtual Address Translation Process"; Svadu for hardware A/D.

use crate::hart::pmp::{Access, Pmp};
use crate::hart::{Mode, Trap, cause};
use crate::ram::{GuestRam, PAGE_SHIFT, RAM_BASE};

const PTE_V: u64 = 1;
const PTE_R: u64 = 1 << 1;
const PTE_W: u64 = 1 << 2;
const PTE_X: u64 = 1 << 3;
const PTE_U: u64 = 1 << 4;
const PTE_A: u64 = 1 << 6;
const PTE_D: u64 = 1 << 7;
/// Reserved, PBMT and N bits: must be zero without Svpbmt and Svnapot.
const PTE_RESERVED: u64 = 0x3ff << 54;

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
}

/// A translated page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest physical address of the byte asked for.
    pub gpa: u64,
    /// Stores to the page need no further walk: it is writable and its dirty bit is set.
    pub writable: bool,
    /// A valid PTE page was writable at full speed until this walk: cached write permissions must be dropped.
    pub tracked_new: bool,
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
        Translation { gpa: va, writable: true, tracked_new: false }
    } else {
        walk(ram, pmp, ctx, va, access)?
    };
    if !pmp.allows(found.gpa, ctx.mode, access) {
        return Err(access_fault(access, va));
    }
    let writable = found.writable && pmp.allows(found.gpa, ctx.mode, Access::Write);
    Ok(Translation { writable, ..found })
}

fn walk(
    ram: &mut GuestRam,
    pmp: &Pmp,
    ctx: Context,
    va: u64,
    access: Access,
) -> Result<Translation, Trap> {
    let levels: u32 = if ctx.satp >> 60 == 9 { 4 } else { 3 };
    let va_bits = PAGE_SHIFT + 9 * levels;
    let sign = (va as i64) >> (va_bits - 1);
    if sign != 0 && sign != -1 {
        return Err(page_fault(access, va));
    }
    let mut table = (ctx.satp & ((1 << 44) - 1)) << PAGE_SHIFT;
    let mut tracked_new = false;
    for level in (0..levels).rev() {
        let index = va >> (PAGE_SHIFT + 9 * level) & 0x1ff;
        let pte_gpa = table + index * 8;
        if !pmp.allows(pte_gpa, Mode::Supervisor, Access::Read) {
            return Err(access_fault(access, va));
        }
        let pte = ram.read_u64(pte_gpa).map_err(|_| access_fault(access, va))?;
        if pte & PTE_V == 0 || pte & (PTE_R | PTE_W) == PTE_W || pte & PTE_RESERVED != 0 {
            return Err(page_fault(access, va));
        }
        let pte_page = ((pte_gpa - RAM_BASE) >> PAGE_SHIFT) as u32;
        if pte & (PTE_R | PTE_X) == 0 {
            if pte & (PTE_A | PTE_D | PTE_U) != 0 {
                return Err(page_fault(access, va));
            }
            tracked_new |= ram.mark_page_table(pte_page);
            table = (pte >> 10 & ((1 << 44) - 1)) << PAGE_SHIFT;
            continue;
        }
        let gpa = leaf(pte, level, ctx, va, access)?;
        let wanted = pte | PTE_A | if access == Access::Write { PTE_D } else { 0 };
        if wanted != pte {
            if !pmp.allows(pte_gpa, Mode::Supervisor, Access::Write) {
                return Err(access_fault(access, va));
            }
            ram.update_pte_flags(pte_gpa, wanted);
        }
        tracked_new |= ram.mark_page_table(pte_page);
        let writable = wanted & (PTE_W | PTE_D) == PTE_W | PTE_D;
        return Ok(Translation { gpa, writable, tracked_new });
    }
    Err(page_fault(access, va))
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
    let ppn = pte >> 10 & ((1 << 44) - 1);
    let low = (1u64 << (9 * level)) - 1;
    if !mode_allows || !allowed || ppn & low != 0 {
        return Err(page_fault(access, va));
    }
    let offset_mask = (1u64 << (PAGE_SHIFT + 9 * level)) - 1;
    Ok(ppn << PAGE_SHIFT & !offset_mask | va & offset_mask)
}

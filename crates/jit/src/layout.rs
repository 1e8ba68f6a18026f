//! Where generated code finds a hart's state, relative to its base register.
//!
//! # Invariants
//! - INV-LAYOUT-1: generated code holds distances from the base register, of any hart that is laid out as the one that it was
//!   made for; that is checked whenever it is entered.
//! - INV-LAYOUT-2: no guest register has RAX, RCX or RDX, which hold what is between, nor the base or the budget's register.

use std::mem::offset_of;

use crate::asm::{Mem, Reg};
use crate::runtime::{CSRS, Csr, State};
use crate::tables::{DataEntry, FetchEntry, Tables};

/// Base register of a hart's state: points at `x[16]`, so that every integer register is within a byte's displacement.
pub(crate) const BASE: Reg = Reg::Rbp;
/// Steps left.
pub(crate) const BUDGET: Reg = Reg::R15;

/// Distances from `x[16]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    f: i32,
    tables: i32,
    csrs: [i32; CSRS],
}

impl Layout {
    /// The layout of a hart's state; harts of one type have one layout.
    pub(crate) fn of(state: &State<'_>) -> Option<Self> {
        let base = std::ptr::from_ref(&state.x[16]) as usize;
        let distance = |address: usize| {
            i32::try_from(address.wrapping_sub(base) as isize).ok().filter(|d| d.abs() < 1 << 28)
        };
        let mut csrs = [0; CSRS];
        for (to, csr) in csrs.iter_mut().zip(&state.csrs) {
            *to = distance(std::ptr::from_ref(*csr) as usize)?;
        }
        Some(Self {
            f: distance(state.f.as_ptr() as usize)?,
            tables: distance(std::ptr::from_ref(state.tables) as usize)?,
            csrs,
        })
    }

    /// Whether a hart's state is laid out like this.
    #[inline]
    pub(crate) fn fits(&self, state: &State<'_>) -> bool {
        let base = std::ptr::from_ref(&state.x[16]) as usize;
        let is = |address: usize, at: i32| address.wrapping_sub(base) as isize == at as isize;
        let csrs = state.csrs.iter().zip(self.csrs);
        csrs.fold(true, |fits, (csr, at)| fits & is(std::ptr::from_ref(*csr) as usize, at))
            & is(state.f.as_ptr() as usize, self.f)
            & is(std::ptr::from_ref(state.tables) as usize, self.tables)
    }

    /// An integer register.
    pub(crate) const fn x(r: u8) -> Mem {
        Mem::new(BASE, (r as i32 - 16) * 8)
    }

    /// A floating-point register.
    pub(crate) const fn f(&self, r: u8) -> Mem {
        Mem::new(BASE, self.f + r as i32 * 8)
    }

    /// A field of [`Tables`] by its offset.
    pub(crate) const fn table(&self, offset: usize) -> Mem {
        Mem::new(BASE, self.tables + offset as i32)
    }

    /// A control and status register.
    pub(crate) const fn csr(&self, csr: Csr) -> Mem {
        Mem::new(BASE, self.csrs[csr as usize])
    }

    /// A field of the data TLB's entry that `index` (scaled) selects.
    pub(crate) const fn data(&self, index: Reg, field: usize) -> Mem {
        let at = self.tables + (offset_of!(Tables, data) + field) as i32;
        Mem::indexed(BASE, index, at)
    }

    /// The mark of breakpoints that `index` (scaled) selects.
    pub(crate) const fn stop_page(&self, index: Reg) -> Mem {
        let at = self.tables + offset_of!(Tables, stop_pages) as i32;
        Mem::indexed(BASE, index, at)
    }

    /// A field of the fetch TLB's entry that `index` (scaled) selects.
    pub(crate) const fn fetch(&self, index: Reg, field: usize) -> Mem {
        let at = self.tables + (offset_of!(Tables, fetch) + field) as i32;
        Mem::indexed(BASE, index, at)
    }
}

pub(crate) const READ: usize = offset_of!(DataEntry, read);
pub(crate) const WRITE: usize = offset_of!(DataEntry, write);
pub(crate) const ADD: usize = offset_of!(DataEntry, add);
pub(crate) const FETCH_TAG: usize = offset_of!(FetchEntry, tag);
pub(crate) const FETCH_TABLE: usize = offset_of!(FetchEntry, table);

/// Guest registers that have a host register of their own while generated code runs.
pub(crate) const MAPPED: [(u8, Reg); 10] = [
    (2, Reg::Rbx),  // sp
    (8, Reg::R12),  // s0
    (9, Reg::R13),  // s1
    (18, Reg::R14), // s2
    (10, Reg::Rsi), // a0
    (11, Reg::Rdi), // a1
    (12, Reg::R8),  // a2
    (13, Reg::R9),  // a3
    (14, Reg::R10), // a4
    (15, Reg::R11), // a5
];

/// The host register of a guest register.
pub(crate) fn mapped(r: u8) -> Option<Reg> {
    match r {
        2 => Some(Reg::Rbx),
        8 => Some(Reg::R12),
        9 => Some(Reg::R13),
        10 => Some(Reg::Rsi),
        11 => Some(Reg::Rdi),
        12 => Some(Reg::R8),
        13 => Some(Reg::R9),
        14 => Some(Reg::R10),
        15 => Some(Reg::R11),
        18 => Some(Reg::R14),
        _ => None,
    }
}

/// Guest floating-point registers that have a host register of their own, from XMM4 on, while `Tables::fp_live` is 1:
/// those that compilers take first.
pub(crate) const MAPPED_F: [(u8, u8); 12] = [
    (0, 4),   // ft0
    (1, 5),   // ft1
    (2, 6),   // ft2
    (3, 7),   // ft3
    (8, 8),   // fs0
    (9, 9),   // fs1
    (10, 10), // fa0
    (11, 11), // fa1
    (12, 12), // fa2
    (13, 13), // fa3
    (14, 14), // fa4
    (15, 15), // fa5
];

/// The host register of a guest floating-point register.
pub(crate) fn mapped_f(r: u8) -> Option<u8> {
    match r {
        0..=3 => Some(r + 4),
        8..=15 => Some(r),
        _ => None,
    }
}

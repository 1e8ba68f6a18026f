//! What a debugger wants to be told of.
//!
//! # Place
//! [`crate::Machine`] keeps it, the engines look at it. A live machine has none of it.
//!
//! # Invariants
//! - INV-DEBUG-1: nothing here is visible to the guest, in a digest or in a saved machine: a run that stops at breakpoints
//!   is, stop by stop, the run that does not.
//! - INV-DEBUG-2: a page of RAM whose code is reached through a page with breakpoints has code, decoded or translated, that
//!   asks at their offsets; what is known of addresses is dropped when breakpoints are added.

use std::collections::{BTreeMap, BTreeSet};

use jit::Stops;

const OFFSET: u64 = 0xfff;

/// Virtual addresses of instructions, of whatever hart and address space, that a run stops before.
#[derive(Debug, Default)]
pub struct Breakpoints {
    /// Offsets by the page's address.
    pages: BTreeMap<u64, Stops>,
    /// Number of this set; the empty one at the start is 0.
    serial: u64,
}

impl Breakpoints {
    /// Takes these instead. Says whether there are any that were not there before.
    pub(crate) fn set(&mut self, addresses: &BTreeSet<u64>) -> bool {
        let mut pages: BTreeMap<u64, Stops> = BTreeMap::new();
        for &va in addresses {
            pages.entry(va & !OFFSET).or_default().insert((va & OFFSET) as u16);
        }
        let known = |(va, stops)| self.on_page(va).is_some_and(|known| known.includes(stops));
        let all_known = pages.iter().all(|(&va, stops)| known((va, stops)));
        if pages != self.pages {
            self.pages = pages;
            self.serial += 1;
        }
        !all_known
    }

    /// Offsets of the breakpoints on the page of `va`, if it has any.
    #[inline]
    #[must_use]
    pub fn on_page(&self, va: u64) -> Option<&Stops> {
        if self.pages.is_empty() { None } else { self.pages.get(&(va & !OFFSET)) }
    }

    /// Whether there is one at this address.
    #[inline]
    #[must_use]
    pub fn is_at(&self, va: u64) -> bool {
        self.on_page(va).is_some_and(|stops| stops.contains((va & OFFSET) as u16))
    }

    /// Whether there are none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Number of this set: another one has another.
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    /// Addresses of the pages that have some.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> {
        self.pages.keys().copied()
    }
}

/// What is told of a watched place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// Writes, by instructions and by devices.
    Write,
    /// Reads by instructions.
    Read,
    /// Both.
    Access,
}

/// A watched place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// Guest physical address, of RAM or of a device's register.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is told of.
    pub kind: WatchKind,
}

impl Watchpoint {
    /// The address behind it.
    pub(crate) fn end(&self) -> u64 {
        self.gpa.saturating_add(self.len)
    }
}

/// An access to a watched place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchHit {
    /// The first of the watched bytes that were accessed.
    pub gpa: u64,
    /// Whether it was written.
    pub is_write: bool,
}

/// The length in bytes and the text of the instruction in `raw`, which stands at `pc`; of a compressed one the low half
/// counts.
#[must_use]
pub fn disassemble(pc: u64, raw: u32) -> (u8, String) {
    let insn = isa::decode(raw);
    (insn.len, isa::disassemble(pc, &insn))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_told_of() {
        let mut b = Breakpoints::default();
        assert!(!b.set(&BTreeSet::new()));
        assert_eq!(b.serial(), 0);
        assert!(b.set(&[0x1ffe, 0x2000, u64::MAX - 1].into()));
        assert!(b.is_at(0x1ffe) && b.is_at(0x2000) && b.is_at(u64::MAX - 1));
        assert!(!b.is_at(0x3000) && !b.is_at(0x1000) && !b.is_at(0x2ffe));
        let serial = b.serial();
        assert!(!b.set(&[0x2000].into()));
        assert!(!b.is_at(0x1ffe) && b.serial() > serial);
        assert!(b.set(&[0x2000, 0x2002].into()));
    }
}

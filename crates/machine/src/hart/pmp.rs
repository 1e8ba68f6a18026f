//! Physical memory protection, 16 entries, with a grain of one page.
//!
//! A grain of 4 KiB (G = 10, privileged specification section 3.7.1) makes permissions uniform within a page, so that
//! one cached translation carries them; firmware discovers the grain by writing and reading `pmpaddr`.

use serde::{Deserialize, Serialize};

use super::Mode;

/// Number of entries.
pub const ENTRIES: usize = 16;
/// Bits of `pmpaddr` below the grain.
const GRAIN_BITS: u64 = (1 << 10) - 1;
const ADDR_MASK: u64 = (1 << 54) - 1;

const R: u8 = 1;
const W: u8 = 2;
const X: u8 = 4;
const A: u8 = 0x18;
const A_TOR: u8 = 0x08;
const A_NA4: u8 = 0x10;
const A_NAPOT: u8 = 0x18;
const L: u8 = 0x80;

/// PMP registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pmp {
    cfg: Vec<u8>,
    addr: Vec<u64>,
}

impl Default for Pmp {
    fn default() -> Self {
        Self { cfg: vec![0; ENTRIES], addr: vec![0; ENTRIES] }
    }
}

/// What an access wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store or AMO.
    Write,
    /// Instruction fetch.
    Execute,
}

impl Pmp {
    /// One entry that allows everything, as firmware leaves it for a supervisor.
    #[must_use]
    pub fn allow_all() -> Self {
        let mut p = Self::default();
        p.cfg[0] = R | W | X | A_NAPOT;
        p.addr[0] = ADDR_MASK;
        p
    }

    /// Whether a deserialised value has the right shape.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        self.cfg.len() == ENTRIES && self.addr.len() == ENTRIES
    }

    /// Reads `pmpcfg{index}`; RV64 has only even ones.
    #[must_use]
    pub fn read_cfg(&self, index: usize) -> u64 {
        let bytes = self.cfg.get(index * 4..index * 4 + 8);
        bytes.map_or(0, |b| u64::from_le_bytes(b.try_into().expect("8 bytes")))
    }

    /// Writes `pmpcfg{index}`.
    pub fn write_cfg(&mut self, index: usize, value: u64) {
        for (i, mut new) in (index * 4..).zip(value.to_le_bytes()) {
            let Some(old) = self.cfg.get_mut(i) else { continue };
            if *old & L != 0 {
                continue;
            }
            new &= L | A | R | W | X;
            if new & (R | W) == W {
                new &= !W; // reserved combination
            }
            if new & A == A_NA4 {
                new = new & !A | *old & A; // not selectable with this grain
            }
            *old = new;
        }
    }

    /// Reads `pmpaddr{index}`.
    #[must_use]
    pub fn read_addr(&self, index: usize) -> u64 {
        let Some(&addr) = self.addr.get(index) else { return 0 };
        if self.cfg[index] & A == A_NAPOT { addr | GRAIN_BITS >> 1 } else { addr & !GRAIN_BITS }
    }

    /// Writes `pmpaddr{index}`.
    pub fn write_addr(&mut self, index: usize, value: u64) {
        if index >= ENTRIES || self.cfg[index] & L != 0 {
            return;
        }
        let next = self.cfg.get(index + 1).copied().unwrap_or(0);
        if next & L != 0 && next & A == A_TOR {
            return;
        }
        self.addr[index] = value & ADDR_MASK;
    }

    /// Whether `mode` may do `access` at the page of `gpa`.
    #[must_use]
    pub fn allows(&self, gpa: u64, mode: Mode, access: Access) -> bool {
        let word = gpa >> 2;
        for i in 0..ENTRIES {
            let cfg = self.cfg[i];
            let hit = match cfg & A {
                A_TOR => {
                    let lo = if i == 0 { 0 } else { self.addr[i - 1] & !GRAIN_BITS };
                    (lo..self.addr[i] & !GRAIN_BITS).contains(&word)
                }
                A_NAPOT => {
                    let addr = self.addr[i] | GRAIN_BITS >> 1;
                    let mask = addr ^ addr.wrapping_add(1);
                    word & !mask == addr & !mask
                }
                _ => false,
            };
            if hit {
                if mode == Mode::Machine && cfg & L == 0 {
                    return true;
                }
                let want = match access {
                    Access::Read => R,
                    Access::Write => W,
                    Access::Execute => X,
                };
                return cfg & want != 0;
            }
        }
        mode == Mode::Machine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn napot_tor_and_default() {
        let mut p = Pmp::default();
        assert!(p.allows(0x8000_0000, Mode::Machine, Access::Write));
        assert!(!p.allows(0x8000_0000, Mode::Supervisor, Access::Read));
        p.write_addr(0, (0x8000_0000 >> 2) | ((0x2_0000 >> 3) - 1)); // 128 KiB NAPOT
        p.write_addr(1, u64::MAX);
        p.write_cfg(0, 0x1f00 | u64::from(A_NAPOT | L));
        assert!(!p.allows(0x8001_ffff, Mode::Supervisor, Access::Read));
        assert!(!p.allows(0x8001_ffff, Mode::Machine, Access::Read), "locked entries bind M-mode");
        assert!(p.allows(0x8002_0000, Mode::User, Access::Execute));
        p.write_cfg(0, 0);
        assert!(!p.allows(0x8001_ffff, Mode::Supervisor, Access::Read), "locked until reset");
    }

    #[test]
    fn grain_is_discoverable() {
        let mut p = Pmp::default();
        p.write_addr(0, u64::MAX);
        assert_eq!(p.read_addr(0), ADDR_MASK & !GRAIN_BITS);
    }

    #[test]
    fn tor_covers_up_to_but_not_including() {
        let mut p = Pmp::default();
        p.write_addr(0, 0x8000_0000 >> 2);
        p.write_addr(1, 0x8010_0000 >> 2);
        p.write_cfg(0, u64::from(A_TOR | R) << 8);
        assert!(p.allows(0x800f_ffff, Mode::User, Access::Read));
        assert!(!p.allows(0x8010_0000, Mode::User, Access::Read));
        assert!(!p.allows(0x7fff_ffff, Mode::User, Access::Read));
        assert!(!p.allows(0x8000_0000, Mode::User, Access::Write));
    }
}

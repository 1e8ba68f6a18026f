//! Core-local interruptor: software interrupts and the timer comparators of M-mode.
//!
//! # Determinism
//! `mtime` reads as the time of the access, which is a function of icount and logged clock inputs. Writes to `mtime`
//! are ignored: guest time comes from the log alone.

use super::BusFault;
use super::state::{ClintState, LoadBoardError};

/// Bytes of the register region.
pub(super) const CLINT_SIZE: u64 = 0x1_0000;

const MTIMECMP_BASE: u64 = 0x4000;
const MTIME: u64 = 0xbff8;

#[derive(Debug)]
pub(super) struct Clint {
    state: ClintState,
}

impl Clint {
    pub(super) fn new(harts: u8) -> Self {
        let harts = usize::from(harts);
        Self { state: ClintState { msip: vec![false; harts], mtimecmp: vec![u64::MAX; harts] } }
    }

    pub(super) fn save(&self) -> ClintState {
        self.state.clone()
    }

    pub(super) fn load(harts: u8, state: &ClintState) -> Result<Self, LoadBoardError> {
        let harts = usize::from(harts);
        if state.msip.len() != harts || state.mtimecmp.len() != harts {
            return Err(LoadBoardError::Device("clint"));
        }
        Ok(Self { state: state.clone() })
    }

    pub(super) fn msip(&self, hart: usize) -> bool {
        self.state.msip.get(hart).copied().unwrap_or(false)
    }

    pub(super) fn mtimecmp(&self, hart: usize) -> u64 {
        self.state.mtimecmp.get(hart).copied().unwrap_or(u64::MAX)
    }

    pub(super) fn read(&self, offset: u64, size: u8, mtime: u64) -> Result<u64, BusFault> {
        check(offset, size)?;
        Ok(match offset {
            0..MTIMECMP_BASE => u64::from(self.msip((offset / 4) as usize)),
            MTIMECMP_BASE..MTIME => {
                let hart = ((offset - MTIMECMP_BASE) / 8) as usize;
                part(self.state.mtimecmp.get(hart).copied().unwrap_or(0), offset, size)
            }
            MTIME.. => part(if offset < MTIME + 8 { mtime } else { 0 }, offset, size),
        })
    }

    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64) -> Result<(), BusFault> {
        check(offset, size)?;
        if offset < MTIMECMP_BASE {
            if let Some(msip) = self.state.msip.get_mut((offset / 4) as usize) {
                *msip = value & 1 != 0;
            }
        } else if offset < MTIME {
            let hart = ((offset - MTIMECMP_BASE) / 8) as usize;
            if let Some(cmp) = self.state.mtimecmp.get_mut(hart) {
                *cmp = match (size, offset % 8) {
                    (8, _) => value,
                    (_, 0) => *cmp & !0xffff_ffff | value & 0xffff_ffff,
                    _ => *cmp & 0xffff_ffff | value << 32,
                };
            }
        }
        Ok(())
    }
}

fn check(offset: u64, size: u8) -> Result<(), BusFault> {
    let known = size == 4 || (size == 8 && offset >= MTIMECMP_BASE);
    if known && offset.is_multiple_of(u64::from(size)) { Ok(()) } else { Err(BusFault) }
}

fn part(value: u64, offset: u64, size: u8) -> u64 {
    match (size, offset % 8) {
        (8, _) => value,
        (_, 0) => value & 0xffff_ffff,
        _ => value >> 32,
    }
}

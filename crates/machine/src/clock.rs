//! Guest time: a pure function of icount between clock inputs.
//!
//! # Invariants
//! - INV-CLOCK-1: `mtime(icount)` never decreases, whatever inputs come.
//! - INV-CLOCK-2: `icount_at(t)` is the first icount with `mtime(icount) >= t`, so that a timer interrupt is derived,
//!   never logged.

use serde::{Deserialize, Serialize};

use crate::io::ClockRate;

/// Ticks of `mtime` in a second; the device tree's `timebase-frequency`, as on QEMU's `virt`.
pub const TICKS_PER_SECOND: u64 = 10_000_000;

/// The clock between two clock inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    base_mtime: u64,
    base_icount: u64,
    rate: ClockRate,
}

impl Default for Clock {
    /// Before the first clock input time passes at one tick for each 32 steps.
    fn default() -> Self {
        Self { base_mtime: 0, base_icount: 0, rate: 1 << 11 }
    }
}

impl Clock {
    /// Guest time in ticks at `icount`.
    #[inline]
    #[must_use]
    pub fn mtime(&self, icount: u64) -> u64 {
        let steps = u128::from(icount.saturating_sub(self.base_icount));
        self.base_mtime.saturating_add(((steps * u128::from(self.rate)) >> 16) as u64)
    }

    /// Ticks for each 2^16 steps.
    #[must_use]
    pub fn rate(&self) -> ClockRate {
        self.rate
    }

    /// First icount at which guest time is at least `mtime`; `None` when it never is without a clock input.
    #[must_use]
    pub fn icount_at(&self, mtime: u64) -> Option<u64> {
        if mtime <= self.base_mtime {
            return Some(self.base_icount);
        }
        if self.rate == 0 {
            return None;
        }
        let ticks = u128::from(mtime - self.base_mtime);
        let steps = (ticks << 16).div_ceil(u128::from(self.rate));
        u64::try_from(steps).ok()?.checked_add(self.base_icount)
    }

    /// Applies a clock input at `icount`.
    pub fn set(&mut self, icount: u64, mtime: u64, rate: ClockRate) {
        let now = self.mtime(icount);
        *self = Self { base_mtime: mtime.max(now), base_icount: icount, rate };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn icount_at_is_the_first_icount_of_that_time(mtime in 0u64..1 << 50, at in 0u64..1 << 50, rate in 1u32..1 << 20, t in 0u64..1 << 51) {
            let mut c = Clock::default();
            c.set(at, mtime, rate);
            let i = c.icount_at(t).unwrap();
            prop_assert!(c.mtime(i) >= t);
            if i > at {
                prop_assert!(c.mtime(i - 1) < t);
            }
        }

        #[test]
        fn time_never_goes_back(m1: u64, m2: u64, at in 0u64..1 << 60, rate: u32) {
            let mut c = Clock::default();
            c.set(at, m1, rate);
            let before = c.mtime(at + 1000);
            c.set(at + 1000, m2, rate);
            prop_assert!(c.mtime(at + 1000) >= before);
        }
    }
}

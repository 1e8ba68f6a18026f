//! Goldfish real-time clock: wall-clock time in nanoseconds and one alarm.
//!
//! # Determinism
//! Time is `rtc_base_ns + mtime * 100`, plus an offset when the guest has set the clock: nothing of the host enters
//! but the base (drawn once, part of the configuration) and `mtime` (from the log).

use super::BusFault;
use super::plic::check_word;
use super::state::RtcState;

/// Bytes of the register region.
pub(super) const RTC_SIZE: u64 = 0x1000;

/// Nanoseconds of one tick of `mtime`.
const NS_PER_TICK: u64 = 100;
const TIME_LOW: u64 = 0x00;
const TIME_HIGH: u64 = 0x04;
const ALARM_LOW: u64 = 0x08;
const ALARM_HIGH: u64 = 0x0c;
const IRQ_ENABLED: u64 = 0x10;
const CLEAR_ALARM: u64 = 0x14;
const ALARM_STATUS: u64 = 0x18;
const CLEAR_INTERRUPT: u64 = 0x1c;

#[derive(Debug)]
pub(super) struct Rtc {
    base_ns: u64,
    state: RtcState,
}

impl Rtc {
    pub(super) fn new(base_ns: u64) -> Self {
        Self { base_ns, state: RtcState::default() }
    }

    pub(super) fn save(&self) -> RtcState {
        self.state.clone()
    }

    pub(super) fn load(base_ns: u64, state: &RtcState) -> Self {
        Self { base_ns, state: state.clone() }
    }

    pub(super) fn irq(&self) -> bool {
        self.state.irq_pending && self.state.irq_enabled
    }

    /// The `mtime` at which the alarm goes off.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.state.alarm_mtime
    }

    /// Sets the alarm off when its time has come.
    pub(super) fn poll(&mut self, mtime: u64) {
        if self.state.alarm_mtime.is_some_and(|at| at <= mtime) {
            self.state.alarm_mtime = None;
            self.state.irq_pending = true;
        }
    }

    fn now_ns(&self, mtime: u64) -> u64 {
        self.base_ns
            .wrapping_add(self.state.offset_ns)
            .wrapping_add(mtime.wrapping_mul(NS_PER_TICK))
    }

    fn arm(&mut self, mtime: u64) {
        let wait_ns = self.state.alarm_ns.saturating_sub(self.now_ns(mtime));
        self.state.alarm_mtime = Some(mtime.saturating_add(wait_ns.div_ceil(NS_PER_TICK)));
        self.poll(mtime);
    }

    pub(super) fn read(&mut self, offset: u64, size: u8, mtime: u64) -> Result<u64, BusFault> {
        check_word(offset, size)?;
        Ok(match offset {
            TIME_LOW => {
                let now = self.now_ns(mtime);
                self.state.time_high = (now >> 32) as u32;
                now & 0xffff_ffff
            }
            TIME_HIGH => u64::from(self.state.time_high),
            ALARM_LOW => self.state.alarm_ns & 0xffff_ffff,
            ALARM_HIGH => self.state.alarm_ns >> 32,
            IRQ_ENABLED => u64::from(self.state.irq_enabled),
            ALARM_STATUS => u64::from(self.state.alarm_mtime.is_some()),
            _ => 0,
        })
    }

    pub(super) fn write(
        &mut self,
        offset: u64,
        size: u8,
        value: u64,
        mtime: u64,
    ) -> Result<(), BusFault> {
        check_word(offset, size)?;
        match offset {
            TIME_LOW | TIME_HIGH => {
                let now = self.now_ns(mtime);
                let new =
                    if offset == TIME_LOW { with_low(now, value) } else { with_high(now, value) };
                self.state.offset_ns = self.state.offset_ns.wrapping_add(new.wrapping_sub(now));
                if self.state.alarm_mtime.is_some() {
                    self.arm(mtime);
                }
            }
            // The driver writes the upper half first: the lower one arms the alarm.
            ALARM_LOW => {
                self.state.alarm_ns = with_low(self.state.alarm_ns, value);
                self.arm(mtime);
            }
            ALARM_HIGH => self.state.alarm_ns = with_high(self.state.alarm_ns, value),
            IRQ_ENABLED => self.state.irq_enabled = value & 1 != 0,
            CLEAR_ALARM => self.state.alarm_mtime = None,
            CLEAR_INTERRUPT => self.state.irq_pending = false,
            _ => {}
        }
        Ok(())
    }
}

fn with_low(old: u64, value: u64) -> u64 {
    old & !0xffff_ffff | value & 0xffff_ffff
}

fn with_high(old: u64, value: u64) -> u64 {
    old & 0xffff_ffff | value << 32
}

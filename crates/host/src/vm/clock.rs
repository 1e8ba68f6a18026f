//! The host's clock as guest time, and how fast guest time passes between clock inputs.
//!
//! # Invariants
//! - INV-CLOCKHOST-1: guest time is set anew when it is behind by more than [`SLACK`], and all but stands still while it
//!   is ahead by more than [`AHEAD_MAX`]: it cannot go back, and a guest that is ahead sees its timers late by as much.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use machine::clock::TICKS_PER_SECOND;
use machine::io::{ClockRate, Input};

/// Nanoseconds in a tick of guest time.
const NS_PER_TICK: u64 = 1_000_000_000 / TICKS_PER_SECOND;
/// Most that guest time jumps at go-live to make up for the time that the failover took.
const JUMP_MAX: Duration = Duration::from_secs(10);

/// Guest time is set anew when the host's is this far ahead, in ticks of 100 ns.
const SLACK: u64 = 2_000;
/// Guest time may be this far ahead of the host's, in ticks of 100 ns.
const AHEAD_MAX: u64 = 10_000;
/// The rate of guest time that waits for the host's.
const CRAWL: ClockRate = 1;

/// The wall clock's base for a machine that goes on at `mtime` after a long pause: its real-time clock shows the host's time
/// from there on. A short pause is made up for in guest time instead, see [`HostClock::attach`]; and no clock goes back.
pub(crate) fn rtc_base_after_pause(mtime: u64, rtc_base_ns: u64) -> u64 {
    let behind_ns = (wall_ns().saturating_sub(rtc_base_ns) / NS_PER_TICK)
        .saturating_sub(mtime)
        .saturating_mul(NS_PER_TICK);
    let is_short = u128::from(behind_ns) < JUMP_MAX.as_nanos();
    if is_short { rtc_base_ns } else { rtc_base_ns.saturating_add(behind_ns) }
}

fn wall_ns() -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX)
}

/// Maps the host's monotonic clock to guest time.
#[derive(Debug)]
pub(crate) struct HostClock {
    base: Instant,
    base_mtime: u64,
    steps_per_us: f64,
}

impl HostClock {
    /// Attaches the host's clock to a machine at `mtime`. When the wall clock says that guest time is a little behind
    /// (a failover took that long), the difference is made up.
    pub(crate) fn attach(mtime: u64, rtc_base_ns: u64) -> Self {
        let by_wall = wall_ns().saturating_sub(rtc_base_ns) / NS_PER_TICK;
        let behind = by_wall.saturating_sub(mtime);
        let jump = if behind < JUMP_MAX.as_nanos() as u64 / NS_PER_TICK { behind } else { 0 };
        Self { base: Instant::now(), base_mtime: mtime + jump, steps_per_us: 200.0 }
    }

    /// Guest time that the host's clock shows.
    pub(crate) fn mtime(&self, now: Instant) -> u64 {
        let ns = now.saturating_duration_since(self.base).as_nanos();
        self.base_mtime.saturating_add(u64::try_from(ns).unwrap_or(u64::MAX) / NS_PER_TICK)
    }

    /// The moment at which guest time will be `mtime`.
    pub(crate) fn instant_of(&self, mtime: u64) -> Instant {
        let ticks = mtime.saturating_sub(self.base_mtime).min(TICKS_PER_SECOND * 3600);
        self.base + Duration::from_nanos(ticks * NS_PER_TICK)
    }

    /// Notes that the machine made `steps` in `took`.
    pub(crate) fn observe(&mut self, steps: u64, took: Duration) {
        let us = took.as_secs_f64() * 1e6;
        if steps >= 10_000 && us > 1.0 {
            let sample = (steps as f64 / us).clamp(1.0, 20_000.0);
            self.steps_per_us += (sample - self.steps_per_us) / 16.0;
        }
    }

    /// Steps that take about `us` microseconds.
    pub(crate) fn steps_in(&self, us: f64) -> u64 {
        (self.steps_per_us * us) as u64
    }

    /// The clock input that a machine at `mtime` needs now, with guest time passing at `rate`. It gets ahead where the
    /// engine is much faster than it was when the rate was set.
    pub(crate) fn correction(&self, now: Instant, mtime: u64, rate: ClockRate) -> Option<Input> {
        let host = self.mtime(now);
        if host > mtime.saturating_add(SLACK) {
            return Some(self.input(now));
        }
        let is_ahead = mtime > host.saturating_add(AHEAD_MAX);
        (is_ahead && rate > CRAWL).then_some(Input::Clock { mtime, rate: CRAWL })
    }

    /// The clock input for now: guest time from the host, passing a little slower than the host's until the next one, so
    /// that it never runs ahead for long.
    pub(crate) fn input(&self, now: Instant) -> Input {
        let ticks_per_step = TICKS_PER_SECOND as f64 / 1e6 / self.steps_per_us;
        // A coarse rate is the same from input to input, which keeps the log small.
        Input::Clock { mtime: self.mtime(now), rate: quantised(ticks_per_step * 65536.0 * 0.9) }
    }
}

/// Keeps the three leading bits.
fn quantised(rate: f64) -> ClockRate {
    let r = rate as u32;
    let keep = r.checked_ilog2().map_or(0, |n| n.saturating_sub(2));
    (r >> keep << keep).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_stays_below_the_hosts_pace_and_is_coarse() {
        let mut c = HostClock::attach(0, u64::MAX);
        for _ in 0..200 {
            c.observe(300_000, Duration::from_millis(1));
        }
        let Input::Clock { rate, .. } = c.input(Instant::now()) else { panic!() };
        let exact = 65536.0 * 10.0 / 300.0;
        assert!(f64::from(rate) < exact && f64::from(rate) > exact * 0.6, "{rate} {exact}");
        assert_eq!(quantised(f64::from(rate) * 1.02), rate);
    }

    #[test]
    fn real_time_clock_catches_up_with_a_long_pause_and_never_goes_back() {
        let (now, mtime) = (wall_ns(), 50 * TICKS_PER_SECOND);
        let shown = |base: u64| rtc_base_after_pause(mtime, base) + mtime * NS_PER_TICK;
        let pause = Duration::from_secs(3600).as_nanos() as u64;
        let late = shown(now - mtime * NS_PER_TICK - pause);
        assert!(late >= now - NS_PER_TICK && late < now + pause / 2, "{late} {now}");
        for base in [now, now - mtime * NS_PER_TICK, now - mtime * NS_PER_TICK - 3_000_000_000] {
            assert_eq!(rtc_base_after_pause(mtime, base), base);
        }
    }

    #[test]
    fn guest_time_that_is_ahead_waits_for_the_hosts() {
        let c = HostClock::attach(1_000_000, u64::MAX);
        let now = c.base;
        assert_eq!(c.correction(now, 1_000_000, 500), None);
        assert_eq!(c.correction(now, 1_000_000 + AHEAD_MAX, 500), None);
        let ahead = 1_000_001 + AHEAD_MAX;
        let crawl = Input::Clock { mtime: ahead, rate: CRAWL };
        assert_eq!(c.correction(now, ahead, 500), Some(crawl));
        assert_eq!(c.correction(now, ahead, CRAWL), None);
        // Until the host's time has come.
        let later = now + Duration::from_nanos((ahead + SLACK + 1 - 1_000_000) * NS_PER_TICK);
        assert_eq!(c.correction(later, ahead, CRAWL), Some(c.input(later)));
    }
}

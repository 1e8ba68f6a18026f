//! How far behind the secondary is, in time.

use std::collections::VecDeque;

use crate::config::MonoTime;

const ENTRIES_MAX: usize = 1024;
const SPACING_US: u64 = 2_000;

/// Remembers when the primary was where.
#[derive(Debug, Clone, Default)]
pub(crate) struct LagMeter {
    /// (icount, when the log reached it), rising in both.
    produced: VecDeque<(u64, MonoTime)>,
}

impl LagMeter {
    /// The log reached `icount`.
    pub(crate) fn on_produced(&mut self, now: MonoTime, icount: u64) {
        let spaced = match self.produced.back() {
            None => true,
            Some(&(last, at)) => icount > last && now.micros_since(at) >= SPACING_US,
        };
        // When it is full, the front still tells how old the oldest unreplayed position is.
        if spaced && self.produced.len() < ENTRIES_MAX {
            self.produced.push_back((icount, now));
        }
    }

    /// The secondary has replayed up to `icount`.
    pub(crate) fn on_replayed(&mut self, icount: u64) {
        while self.produced.front().is_some_and(|&(at, _)| at <= icount) {
            self.produced.pop_front();
        }
    }

    /// Age of the oldest position that is not replayed, in microseconds.
    pub(crate) fn lag_us(&self, now: MonoTime) -> u64 {
        self.produced.front().map_or(0, |&(_, at)| now.micros_since(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_the_age_of_the_oldest_unreplayed_position() {
        let mut lag = LagMeter::default();
        for i in 1..=2000u64 {
            lag.on_produced(MonoTime(i * 2_000), i * 10);
        }
        assert_eq!(lag.produced.len(), ENTRIES_MAX);
        assert_eq!(lag.lag_us(MonoTime(4_000_000)), 3_998_000);
        lag.on_replayed(25);
        assert_eq!(lag.lag_us(MonoTime(4_000_000)), 3_994_000);
        lag.on_replayed(20_000);
        assert_eq!(lag.lag_us(MonoTime(4_000_000)), 0);
    }
}

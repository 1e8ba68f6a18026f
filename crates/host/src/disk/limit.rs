//! Limits of a disk's requests and bytes for each second: two token buckets.
//!
//! # Place
//! The disk's thread asks before it starts a request. A host with a follower's copy does not limit it: the requests there
//! are the live machine's, which are limited where it runs.
//!
//! # Invariants
//! - INV-LIMIT-1: in any time t, at most `rate * t` and a burst and one request more are started.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Without a burst of its own, a limit allows what comes in this part of a second at once.
const BURST_PARTS: u64 = 10;
/// Longest wait that is told at once.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Limits of a disk; none: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Reads, writes and discards in a second.
    pub iops: Option<u64>,
    /// Bytes read and written in a second.
    pub bytes_per_second: Option<u64>,
    /// Requests that may come at once after a pause.
    pub iops_burst: Option<u64>,
    /// Bytes that may come at once after a pause.
    pub bytes_burst: Option<u64>,
}

impl Limits {
    /// Whether there is any.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.iops.is_some() || self.bytes_per_second.is_some()
    }
}

#[derive(Debug)]
struct Bucket {
    rate: f64,
    burst: f64,
    level: f64,
}

impl Bucket {
    fn new(rate: u64, burst: Option<u64>) -> Self {
        let burst = burst.unwrap_or(rate / BURST_PARTS).max(1) as f64;
        Self { rate: rate.max(1) as f64, burst, level: burst }
    }

    fn fill(&mut self, time: Duration) {
        self.level = (self.level + self.rate * time.as_secs_f64()).min(self.burst);
    }

    /// How long until a request may start; a request takes more than there is, and those after it wait for that.
    fn wait(&self) -> Duration {
        if self.level > 0.0 {
            return Duration::ZERO;
        }
        let seconds = (1.0 - self.level) / self.rate;
        Duration::from_secs_f64(seconds.min(WAIT_MAX.as_secs_f64())).max(Duration::from_micros(1))
    }
}

/// Counts what is started.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    at: Option<Instant>,
}

impl Limiter {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            requests: limits.iops.map(|rate| Bucket::new(rate, limits.iops_burst)),
            bytes: limits.bytes_per_second.map(|rate| Bucket::new(rate, limits.bytes_burst)),
            at: None,
        }
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.requests.iter_mut().chain(&mut self.bytes)
    }

    pub(super) fn is_any(&self) -> bool {
        self.requests.is_some() || self.bytes.is_some()
    }

    /// How long a request has to wait now.
    pub(super) fn wait(&mut self, now: Instant) -> Duration {
        let time = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        self.buckets().for_each(|bucket| bucket.fill(time));
        self.buckets().map(|bucket| bucket.wait()).max().unwrap_or_default()
    }

    /// A request with this many bytes of data starts.
    pub(super) fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.requests {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.level -= bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of so many bytes that start within a time.
    fn started(limits: Limits, bytes: u64, time: Duration) -> u64 {
        let mut limiter = Limiter::new(limits);
        let begin = Instant::now();
        let mut now = begin;
        for count in 0.. {
            loop {
                let wait = limiter.wait(now);
                if wait.is_zero() {
                    break;
                }
                now += wait;
                if now >= begin + time {
                    return count;
                }
            }
            limiter.take(bytes);
        }
        0
    }

    #[test]
    fn no_more_is_started_than_the_limits_say() {
        let ten = Duration::from_secs(10);
        let iops = Limits { iops: Some(500), ..Limits::default() };
        assert!((5000..=5051).contains(&started(iops, 4096, ten)));
        let burst = Limits { iops_burst: Some(2000), ..iops };
        assert!((6999..=7001).contains(&started(burst, 4096, ten)));
        let bytes = Limits { bytes_per_second: Some(1 << 20), ..Limits::default() };
        assert!((2560..=2590).contains(&started(bytes, 4096, ten)));
        // A request bigger than the burst passes, and what follows waits for it.
        assert!((2..=4).contains(&started(bytes, 4 << 20, ten)));
        let both = Limits { iops: Some(10), ..bytes };
        assert!((100..=102).contains(&started(both, 4096, ten)));
        assert!(!Limiter::new(Limits::default()).is_any());
    }
}

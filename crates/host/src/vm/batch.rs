//! Log that waits a moment, so that a busy guest's outputs go to the secondary together.
//!
//! # Place
//! [`super::shared::Shared`] has one, under its lock. The vCPU thread puts log in, and takes it out when it is due or when
//! the machine has nothing to do; every event of the core's takes it out as well, but for acknowledgements.
//!
//! # Invariants
//! - INV-BATCH-1: log with outputs waits until [`OUTPUTS_US`] after log was sent last, and not at all when the guest goes
//!   idle: what a guest answers that was waiting for the question leaves at once.
//! - INV-BATCH-2: log without outputs, for which nobody waits, does so until [`MARKS_US`] after log was sent last.
//! - INV-BATCH-3: but for acknowledgements, the core hears of no event before it has heard of the log that was made before.

use replica::{Event, LogPos, MonoTime};

/// Least time between two messages with log for outputs, in microseconds, while the guest runs. A message costs both hosts
/// some tens of microseconds, and one output's client more than that.
const OUTPUTS_US: u64 = 250;
/// The same for log without outputs: the secondary replays so much later.
const MARKS_US: u64 = 3_000;
/// Bytes that do not wait for more.
const BYTES_MAX: usize = 64 << 10;

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// Where the log ends, if any waits.
    end: Option<LogPos>,
    outputs_up_to: Option<u64>,
    /// When log was sent last.
    sent_at: MonoTime,
}

impl Batch {
    /// More log, with outputs up to a step if there are any.
    pub(crate) fn add(&mut self, bytes: Vec<u8>, end: LogPos, outputs_up_to: Option<u64>) {
        if self.bytes.is_empty() {
            self.bytes = bytes;
        } else {
            self.bytes.extend_from_slice(&bytes);
        }
        self.end = Some(end);
        self.outputs_up_to = outputs_up_to.or(self.outputs_up_to);
    }

    /// Microseconds for which what is there may wait for more; none when it is due.
    pub(crate) fn may_wait_us(&self, now: MonoTime) -> Option<u64> {
        let least = if self.outputs_up_to.is_some() { OUTPUTS_US } else { MARKS_US };
        let left = least.saturating_sub(now.micros_since(self.sent_at));
        (left > 0 && self.bytes.len() < BYTES_MAX).then_some(left)
    }

    /// What waits, for the core.
    pub(crate) fn take(&mut self, now: MonoTime) -> Option<Event> {
        let end = self.end.take()?;
        self.sent_at = now;
        let (bytes, outputs_up_to) = (std::mem::take(&mut self.bytes), self.outputs_up_to.take());
        Some(Event::LogProduced { bytes, end, outputs_up_to })
    }

    /// Forgets what waits: its machine is gone.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pos(lsn: u64) -> LogPos {
        LogPos { lsn, icount: lsn * 10 }
    }

    #[test]
    fn log_waits_only_behind_log_that_was_just_sent() {
        let mut batch = Batch::default();
        let now = MonoTime(1_000_000);
        batch.add(vec![1], pos(1), None);
        assert_eq!(batch.may_wait_us(now), None, "nothing was sent for long");
        assert!(batch.take(now).is_some());
        batch.add(vec![2], pos(2), None);
        assert_eq!(batch.may_wait_us(now.after(100)), Some(MARKS_US - 100));
        batch.add(vec![3], pos(3), Some(30));
        assert_eq!(batch.may_wait_us(now.after(100)), Some(OUTPUTS_US - 100));
        assert_eq!(batch.may_wait_us(now.after(OUTPUTS_US)), None);
        batch.add(vec![0; BYTES_MAX], pos(4), None);
        assert_eq!(batch.may_wait_us(now.after(100)), None, "enough has gathered");
    }

    #[test]
    fn what_waited_leaves_together_and_once() {
        let mut batch = Batch::default();
        batch.add(vec![1, 2], pos(1), Some(10));
        batch.add(vec![3], pos(2), None);
        let expected =
            Event::LogProduced { bytes: vec![1, 2, 3], end: pos(2), outputs_up_to: Some(10) };
        assert_eq!(batch.take(MonoTime(5)), Some(expected));
        assert_eq!(batch.take(MonoTime(6)), None);
        batch.add(vec![4], pos(3), None);
        batch.clear();
        assert_eq!(batch.take(MonoTime(7)), None);
    }
}

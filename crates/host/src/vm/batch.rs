//! Log that waits a moment, so that a busy guest's outputs go to the secondary together.
//!
//! # Place
//! [`super::shared::Shared`] has one, under its lock. The vCPU thread puts log in, and takes it out when it is due or when
//! the machine has nothing to do; every event of the core's takes it out as well, but for acknowledgements.
//!
//! # Invariants
//! - INV-BATCH-1: log with outputs is sent at once, as long as that was done no more often than [`BURST`] and one time for
//!   every [`OUTPUTS_US`]; when it was, it waits for the next such time, and not at all when the guest goes idle: what a
//!   guest answers that was waiting for the question leaves at once.
//! - INV-BATCH-2: log without outputs, for which nobody waits, does so until [`MARKS_US`] after log was sent last.
//! - INV-BATCH-3: but for acknowledgements, the core hears of no event before it has heard of the log that was made before.

use replica::{Event, LogPos, MonoTime};

/// Time between two messages with log for outputs, in microseconds, of a guest that runs and makes many: with wake-ups and
/// acknowledgement a message costs either host up to a hundred microseconds.
const OUTPUTS_US: u64 = 1_000;
/// Messages that a guest may be ahead of that: one that makes outputs now and then waits for nothing.
const BURST: u64 = 8;
/// The same for log without outputs, that the secondary replays so much later. A message wakes threads on either host, which
/// costs a busy guest more in what they leave of its caches than in their time. Nothing waits for it: what a primary
/// that is lost had not sent yet, nobody has seen. A heartbeat takes it along; with the usual detection time they
/// are more frequent than this.
const MARKS_US: u64 = 30_000;
/// Bytes of log that do not wait for more.
const BYTES_MAX: usize = 64 << 10;
/// Bytes of outputs that do not: a stream is not to stop and go.
const OUTPUT_BYTES_MAX: usize = 256 << 10;

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// Where the log ends, if any waits.
    end: Option<LogPos>,
    outputs_up_to: Option<u64>,
    output_bytes: usize,
    /// When log was sent last.
    sent_at: MonoTime,
    /// From when on log with outputs may be sent: [`OUTPUTS_US`] later with each time that it was.
    outputs_from: MonoTime,
}

impl Batch {
    /// More log, with so many bytes of outputs up to a step if there are any.
    pub(crate) fn add(&mut self, bytes: Vec<u8>, end: LogPos, outputs: Option<(u64, usize)>) {
        if self.bytes.is_empty() {
            self.bytes = bytes;
        } else {
            self.bytes.extend_from_slice(&bytes);
        }
        self.end = Some(end);
        if let Some((up_to, bytes)) = outputs {
            self.outputs_up_to = Some(up_to);
            self.output_bytes += bytes;
        }
    }

    /// Microseconds for which what is there may wait for more; none when it is due.
    pub(crate) fn may_wait_us(&self, now: MonoTime) -> Option<u64> {
        let from = match self.outputs_up_to {
            Some(_) => self.outputs_from,
            None => self.sent_at.after(MARKS_US),
        };
        let left = from.micros_since(now);
        let is_much = self.bytes.len() >= BYTES_MAX || self.output_bytes >= OUTPUT_BYTES_MAX;
        (left > 0 && !is_much).then_some(left)
    }

    /// What waits, for the core.
    pub(crate) fn take(&mut self, now: MonoTime) -> Option<Event> {
        let end = self.end.take()?;
        let (bytes, outputs_up_to) = (std::mem::take(&mut self.bytes), self.outputs_up_to.take());
        self.sent_at = now;
        self.output_bytes = 0;
        if outputs_up_to.is_some() {
            let earliest = MonoTime(now.0.saturating_sub((BURST - 1) * OUTPUTS_US));
            self.outputs_from =
                self.outputs_from.max(earliest).after(OUTPUTS_US).min(now.after(OUTPUTS_US));
        }
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
    fn log_without_outputs_waits_behind_log_that_was_just_sent() {
        let mut batch = Batch::default();
        let now = MonoTime(1_000_000);
        batch.add(vec![1], pos(1), None);
        assert_eq!(batch.may_wait_us(now), None, "nothing was sent for long");
        assert!(batch.take(now).is_some());
        batch.add(vec![2], pos(2), None);
        assert_eq!(batch.may_wait_us(now.after(100)), Some(MARKS_US - 100));
        assert_eq!(batch.may_wait_us(now.after(MARKS_US)), None);
        batch.add(vec![0; BYTES_MAX], pos(4), None);
        assert_eq!(batch.may_wait_us(now.after(100)), None, "enough has gathered");
    }

    #[test]
    fn outputs_wait_when_there_are_many_of_them() {
        let mut batch = Batch::default();
        let now = MonoTime(1_000_000);
        for n in 0..BURST {
            batch.add(vec![1], pos(n), Some((n, 1)));
            assert_eq!(batch.may_wait_us(now), None, "the {n}th");
            assert!(batch.take(now).is_some());
        }
        batch.add(vec![1], pos(10), Some((10, 1)));
        assert_eq!(batch.may_wait_us(now.after(100)), Some(OUTPUTS_US - 100));
        assert_eq!(batch.may_wait_us(now.after(OUTPUTS_US)), None);
        let stream = Some((10, OUTPUT_BYTES_MAX));
        batch.add(vec![1], pos(10), stream);
        assert_eq!(batch.may_wait_us(now.after(100)), None);
        assert!(batch.take(now.after(100)).is_some());
        // The guest went idle early: that delays the next ones by no more than once.
        for _ in 0..3 {
            batch.add(vec![1], pos(11), Some((11, 1)));
            assert!(batch.take(now.after(200)).is_some());
        }
        batch.add(vec![1], pos(12), Some((12, 1)));
        assert_eq!(batch.may_wait_us(now.after(200)), Some(OUTPUTS_US));
        // After a while there are as many again, and no more.
        let later = now.after(10 * BURST * OUTPUTS_US);
        let sent = std::iter::repeat_with(|| {
            batch.add(vec![1], pos(13), Some((13, 1)));
            batch.may_wait_us(later).is_none() && batch.take(later).is_some()
        });
        assert_eq!(sent.take_while(|is_sent| *is_sent).count() as u64, BURST);
    }

    #[test]
    fn what_waited_leaves_together_and_once() {
        let mut batch = Batch::default();
        batch.add(vec![1, 2], pos(1), Some((10, 1)));
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

//! Which chunks of a disk were written since when.
//!
//! # Place
//! Owned by the disk's thread, which marks what it is about to write.
//!
//! # Invariants
//! - INV-CHANGES-1: a chunk that differs from what it was at the beginning of an interval is written in that interval or
//!   in a later one.

use super::bitmap::Bitmap;
use super::copy::CHUNK_BYTES;

/// The interval that begins when a disk is opened.
pub const OPENED: u32 = 1;

/// For each chunk the number of the interval in which it was last written; 0: in none.
#[derive(Debug)]
pub(super) struct Changes {
    written: Vec<u32>,
    interval: u32,
    size: u64,
}

impl Changes {
    pub(super) fn new(size: u64) -> Self {
        Self { written: vec![0; chunks(size)], interval: OPENED, size }
    }

    /// The disk has grown, by zeroes. A last chunk that was shorter is another one now.
    pub(super) fn grow(&mut self, size: u64) {
        if size <= self.size {
            return;
        }
        if !self.size.is_multiple_of(CHUNK_BYTES)
            && let Some(last) = self.written.last_mut()
        {
            *last = self.interval;
        }
        self.written.resize(chunks(size), 0);
        self.size = size;
    }

    /// The range, which is within the disk, is about to be written.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|len| (offset + len) / CHUNK_BYTES) else { return };
        let chunks = (offset / CHUNK_BYTES) as usize..=last as usize;
        self.written[chunks].fill(self.interval);
    }

    /// Begins an interval; numbers rise.
    pub(super) fn begin(&mut self, interval: u32) {
        self.interval = interval;
    }

    /// Chunks written since the interval began.
    pub(super) fn since(&self, interval: u32) -> Bitmap {
        let mut changed = Bitmap::empty(self.written.len() as u64);
        for (index, _) in (0u64..).zip(&self.written).filter(|(_, at)| **at >= interval) {
            changed.set(index);
        }
        changed
    }
}

fn chunks(size: u64) -> usize {
    usize::try_from(size.div_ceil(CHUNK_BYTES)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_count_from_the_interval_that_they_are_in() {
        let mut changes = Changes::new(10 * CHUNK_BYTES - 512);
        let found = |changes: &Changes, since| -> Vec<u64> {
            let map = changes.since(since);
            std::iter::successors(map.next(0), |i| map.next(i + 1)).collect()
        };
        changes.mark(CHUNK_BYTES - 1, 2);
        changes.begin(2);
        changes.mark(9 * CHUNK_BYTES, CHUNK_BYTES - 512);
        changes.mark(512, 0);
        changes.begin(3);
        changes.mark(CHUNK_BYTES, 512);
        assert_eq!(found(&changes, OPENED), [0, 1, 9]);
        assert_eq!(found(&changes, 2), [1, 9]);
        assert_eq!(found(&changes, 3), [1]);
        assert!(found(&changes, 4).is_empty());
        changes.begin(4);
        changes.grow(20 * CHUNK_BYTES);
        changes.grow(512);
        assert_eq!(found(&changes, 4), [9]);
        changes.mark(19 * CHUNK_BYTES, CHUNK_BYTES);
        assert_eq!(found(&changes, 4), [9, 19]);
    }
}

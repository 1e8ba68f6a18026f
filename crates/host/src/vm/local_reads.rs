//! Reads of a shared disk that the secondary makes itself: what keeps writes off what it has yet to read.
//!
//! # Place
//! One for each shared disk with `reads = "local"`, on the live host. The vCPU thread gives it reads; writes come with their
//! release, from whichever thread that is.
//!
//! # Invariants
//! - INV-LOCALREAD-1: between a read of the primary and the secondary's read of the same blocks no write to them is carried
//!   out that the primary's read did not see. A read is known here before its disk has it, and a write looks for reads
//!   that it overlaps in the same moment in which its disk gets it; the disk keeps overlapping requests in order.
//! - INV-LOCALREAD-2: writes and flushes that wait keep their order, with all that come after them.
//! - INV-LOCALREAD-3: a read that was not known here from its beginning goes with its data in the log.
//!
//! The secondary reads when its replay comes to the read's completion, which the primary logged after its own read; so it
//! sees all that the primary saw. What waits is let go when the secondary has told that it replayed that completion, or when
//! there is none that could: the arbitration is won, and this host goes on alone.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use machine::io::BlkOp;

/// Most reads that are known; further ones go with their data in the log.
const READS_MAX: usize = 4096;

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct LocalReads(Mutex<State>);

/// Guarded by a lock under which requests are submitted, but nothing else is waited for. Taken after the VM's lock.
#[derive(Debug, Default)]
struct State {
    /// Whether there is a secondary that could read by itself.
    is_on: bool,
    reads: BTreeMap<u64, Read>,
    /// Writes and flushes that wait, in order.
    parked: VecDeque<(u64, BlkOp)>,
}

#[derive(Debug)]
struct Read {
    range: Range<u64>,
    /// The log's length with its completion.
    completed: Option<u64>,
}

impl State {
    fn must_wait(&self, op: &BlkOp) -> bool {
        let range = match op {
            BlkOp::Write { offset, data } => *offset..offset.saturating_add(data.len() as u64),
            BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
                *offset..offset.saturating_add(*len)
            }
            BlkOp::Read { .. } | BlkOp::Flush => return false,
        };
        self.reads.values().any(|r| r.range.start < range.end && range.start < r.range.end)
    }

    fn unpark(&mut self, submit: &mut dyn FnMut(u64, BlkOp)) {
        while let Some((_, op)) = self.parked.front()
            && !self.must_wait(op)
        {
            let Some((id, op)) = self.parked.pop_front() else { return };
            submit(id, op);
        }
    }
}

impl LocalReads {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a secondary in sync, or none any more. What is known of earlier reads stays known.
    pub(crate) fn set_on(&self, is_on: bool) {
        self.lock().is_on = is_on;
    }

    /// The machine reads.
    pub(crate) fn read(&self, id: u64, op: BlkOp, submit: &mut dyn FnMut(u64, BlkOp)) {
        let mut state = self.lock();
        if let BlkOp::Read { offset, len } = op
            && state.is_on
            && state.reads.len() < READS_MAX
        {
            let range = offset..offset.saturating_add(len.into());
            state.reads.insert(id, Read { range, completed: None });
        }
        submit(id, op);
    }

    /// A write or a flush may leave; it waits here if it has to.
    pub(crate) fn write(&self, id: u64, op: BlkOp, submit: &mut dyn FnMut(u64, BlkOp)) {
        let mut state = self.lock();
        if !state.parked.is_empty() || state.must_wait(&op) {
            state.parked.push_back((id, op));
        } else {
            submit(id, op);
        }
    }

    /// Whether the secondary may make this read itself.
    pub(crate) fn is_known(&self, id: u64) -> bool {
        self.lock().reads.contains_key(&id)
    }

    /// A read's completion is in the log, which is that long with it.
    pub(crate) fn completed(&self, id: u64, lsn: u64) {
        if let Some(read) = self.lock().reads.get_mut(&id) {
            read.completed = Some(lsn);
        }
    }

    /// Nobody waits for this read any more, or its result is in the log.
    pub(crate) fn forget(&self, id: u64, submit: &mut dyn FnMut(u64, BlkOp)) {
        let mut state = self.lock();
        if state.reads.remove(&id).is_some() {
            state.unpark(submit);
        }
    }

    /// The secondary has replayed the log up to this length.
    pub(crate) fn replayed(&self, lsn: u64, submit: &mut dyn FnMut(u64, BlkOp)) {
        let mut state = self.lock();
        let before = state.reads.len();
        state.reads.retain(|_, read| read.completed.is_none_or(|at| at > lsn));
        if state.reads.len() < before {
            state.unpark(submit);
        }
    }

    /// There is no secondary, and this host goes on alone.
    pub(crate) fn clear(&self, submit: &mut dyn FnMut(u64, BlkOp)) {
        let mut state = self.lock();
        state.is_on = false;
        state.reads.clear();
        state.unpark(submit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, len: usize) -> BlkOp {
        BlkOp::Write { offset, data: vec![1; len] }
    }

    #[test]
    fn write_waits_for_the_read_that_it_overlaps_and_all_after_it_wait_too() {
        let reads = LocalReads::default();
        let seen = std::cell::RefCell::new(Vec::new());
        let mut submit = |id: u64, _: BlkOp| seen.borrow_mut().push(id);
        let took = || std::mem::take(&mut *seen.borrow_mut());
        // Without a secondary nothing is known, so nothing waits.
        reads.read(1, BlkOp::Read { offset: 0, len: 512 }, &mut submit);
        reads.write(2, write(0, 512), &mut submit);
        assert!(!reads.is_known(1));
        assert_eq!(took(), [1, 2]);
        reads.set_on(true);
        reads.read(3, BlkOp::Read { offset: 512, len: 1024 }, &mut submit);
        reads.read(4, BlkOp::Read { offset: 4096, len: 512 }, &mut submit);
        reads.write(5, write(0, 512), &mut submit);
        assert_eq!(took(), [3, 4, 5]);
        for (id, op) in [
            (6, write(1024, 4)),
            (7, BlkOp::Flush),
            (8, BlkOp::Discard { offset: 0, len: 4608 }),
            (9, write(8192, 512)),
        ] {
            reads.write(id, op, &mut submit);
        }
        assert!(took().is_empty());
        reads.completed(3, 100);
        reads.replayed(99, &mut submit);
        assert!(took().is_empty() && reads.is_known(3));
        reads.replayed(100, &mut submit);
        assert_eq!(took(), [6, 7]);
        reads.forget(4, &mut submit);
        assert_eq!(took(), [8, 9]);
    }

    #[test]
    fn all_that_waits_goes_when_this_host_is_alone() {
        let reads = LocalReads::default();
        reads.set_on(true);
        reads.read(1, BlkOp::Read { offset: 0, len: 512 }, &mut |_, _| {});
        reads.write(2, BlkOp::WriteZeroes { offset: 0, len: 1 }, &mut |_, _| panic!("it waits"));
        let mut seen = Vec::new();
        reads.clear(&mut |id, _| seen.push(id));
        assert_eq!(seen, [2]);
        reads.read(3, BlkOp::Read { offset: 0, len: 512 }, &mut |_, _| {});
        assert!(!reads.is_known(3));
    }
}

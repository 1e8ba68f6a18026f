//! Which requests of a disk may be carried out at once: a pure decision, without threads or files.
//!
//! # Place
//! The disk's thread adds requests in the order of submission, starts what may start, and says what is done.
//!
//! # Invariants
//! - INV-ORDER-1: of two requests that overlap, one of them writing, the later one starts when the earlier one is done.
//! - INV-ORDER-2: a flush starts when everything before it is done; nothing waits for a flush.
//! - INV-ORDER-3: what may start does so in the order of submission.

use std::collections::VecDeque;
use std::ops::Range;

/// What a request touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Extent {
    Read(Range<u64>),
    Write(Range<u64>),
    /// All writes before it.
    Flush,
}

impl Extent {
    /// Whether a request of this extent has to wait for an earlier one.
    fn waits_for(&self, earlier: &Self) -> bool {
        match (earlier, self) {
            (_, Self::Flush) => true,
            (Self::Flush, _) | (Self::Read(_), Self::Read(_)) => false,
            (Self::Read(a) | Self::Write(a), Self::Read(b) | Self::Write(b)) => {
                a.start < b.end && b.start < a.end
            }
        }
    }
}

/// Names a request while it is here; numbers rise.
pub(super) type Ticket = u64;

#[derive(Debug)]
struct Entry<T> {
    ticket: Ticket,
    extent: Extent,
    /// Earlier requests that it waits for.
    blockers: usize,
    /// What is to be done; taken when it starts.
    work: Option<T>,
}

/// The requests that are not done, by the order of submission.
#[derive(Debug)]
pub(super) struct Order<T> {
    entries: VecDeque<Entry<T>>,
    next: Ticket,
    /// Requests that have not started.
    waiting: usize,
}

impl<T> Order<T> {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new(), next: 0, waiting: 0 }
    }

    /// Requests that are not done.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds a request behind all others.
    pub(super) fn add(&mut self, extent: Extent, work: T) {
        let blockers = self.entries.iter().filter(|e| extent.waits_for(&e.extent)).count();
        let ticket = self.next;
        self.next += 1;
        self.waiting += 1;
        self.entries.push_back(Entry { ticket, extent, blockers, work: Some(work) });
    }

    /// What has not started.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().filter_map(|e| e.work.as_ref())
    }

    fn first(&self) -> Option<usize> {
        if self.waiting == 0 {
            return None;
        }
        self.entries.iter().position(|e| e.blockers == 0 && e.work.is_some())
    }

    /// The request that may start next.
    pub(super) fn peek(&self) -> Option<&T> {
        self.first().and_then(|at| self.entries[at].work.as_ref())
    }

    /// Starts the request that [`Self::peek`] shows.
    pub(super) fn start(&mut self) -> Option<(Ticket, T)> {
        let at = self.first()?;
        let entry = &mut self.entries[at];
        let work = entry.work.take()?;
        self.waiting -= 1;
        Some((entry.ticket, work))
    }

    /// A request that was started is done.
    pub(super) fn finish(&mut self, ticket: Ticket) {
        let Ok(at) = self.entries.binary_search_by_key(&ticket, |e| e.ticket) else { return };
        let Some(done) = self.entries.remove(at) else { return };
        for later in self.entries.iter_mut().skip(at) {
            if later.extent.waits_for(&done.extent) {
                later.blockers -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(order: &mut Order<u32>) -> Vec<(Ticket, u32)> {
        std::iter::from_fn(|| order.start()).collect()
    }

    #[test]
    fn only_what_overlaps_waits() {
        let mut order = Order::new();
        order.add(Extent::Write(0..10), 0);
        order.add(Extent::Read(10..20), 1);
        order.add(Extent::Read(5..6), 2);
        order.add(Extent::Read(5..6), 3);
        order.add(Extent::Write(5..6), 4);
        order.add(Extent::Write(20..30), 5);
        assert_eq!(started(&mut order), [(0, 0), (1, 1), (5, 5)]);
        order.finish(0);
        assert_eq!(started(&mut order), [(2, 2), (3, 3)]);
        order.finish(2);
        assert_eq!(order.peek(), None);
        order.finish(3);
        assert_eq!(started(&mut order), [(4, 4)]);
        for ticket in [1, 4, 5, 5, 99] {
            order.finish(ticket);
        }
        assert!(order.is_empty());
    }

    #[test]
    fn flush_waits_for_all_before_it_and_holds_up_nobody() {
        let mut order = Order::new();
        order.add(Extent::Write(0..10), 0);
        order.add(Extent::Flush, 1);
        order.add(Extent::Write(10..20), 2);
        order.add(Extent::Flush, 3);
        assert_eq!(started(&mut order), [(0, 0), (2, 2)]);
        order.finish(0);
        assert_eq!(started(&mut order), [(1, 1)]);
        order.finish(2);
        assert_eq!(order.peek(), None);
        order.finish(1);
        assert_eq!(started(&mut order), [(3, 3)]);
    }
}

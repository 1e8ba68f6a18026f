//! A first-in first-out queue between threads, bounded in entries and in bytes.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug)]
struct State<T> {
    entries: VecDeque<(T, usize)>,
    bytes: usize,
}

/// The queue. Its mutex guards the entries alone, and no other lock is taken while it is held.
#[derive(Debug)]
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
    drained: Condvar,
    entries_max: usize,
    bytes_max: usize,
}

impl<T> Queue<T> {
    pub(super) fn new(entries_max: usize, bytes_max: usize) -> Self {
        Self {
            state: Mutex::new(State { entries: VecDeque::new(), bytes: 0 }),
            filled: Condvar::new(),
            drained: Condvar::new(),
            entries_max,
            bytes_max,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends, after waiting for room. An entry that alone has more bytes than the bound goes in when it is alone.
    pub(super) fn push(&self, entry: T, bytes: usize) {
        let mut state = self.lock();
        while state.entries.len() >= self.entries_max
            || (state.bytes > 0 && state.bytes.saturating_add(bytes) > self.bytes_max)
        {
            state = self.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.bytes += bytes;
        state.entries.push_back((entry, bytes));
        self.filled.notify_one();
    }

    /// Appends at once: for the few entries that are no requests.
    pub(super) fn push_unbounded(&self, entry: T) {
        self.lock().entries.push_back((entry, 0));
        self.filled.notify_one();
    }

    /// The first entry, or none when `wait` is over before there is one; without `wait`, waits for as long as it takes.
    pub(super) fn pop(&self, wait: Option<Duration>) -> Option<T> {
        let state = self.lock();
        let empty = |s: &mut State<T>| s.entries.is_empty();
        let mut state = match wait {
            None => self.filled.wait_while(state, empty).unwrap_or_else(PoisonError::into_inner),
            Some(Duration::ZERO) => state,
            Some(wait) => {
                let waited = self.filled.wait_timeout_while(state, wait, empty);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        let (entry, bytes) = state.entries.pop_front()?;
        state.bytes -= bytes;
        self.drained.notify_all();
        Some(entry)
    }

    pub(super) fn len(&self) -> usize {
        self.lock().entries.len()
    }
}

//! What comes to a disk's thread from others: messages, first in first out, bounded in entries and in bytes; and notes,
//! which overtake them.
//!
//! # Invariants
//! - INV-QUEUE-1: a thread that waits is woken by whatever it waits for, also where it waits in the kernel for something
//!   else, with [`Queue::listen`].

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug)]
struct State<T, N> {
    entries: VecDeque<(T, usize)>,
    bytes: usize,
    notes: Vec<N>,
    /// Whether the thread waits at the bell, and whether for entries too.
    listens: Option<bool>,
}

/// The queue. Its mutex guards the entries alone, and no other lock is taken while it is held.
#[derive(Debug)]
pub(super) struct Queue<T, N> {
    state: Mutex<State<T, N>>,
    filled: Condvar,
    drained: Condvar,
    entries_max: usize,
    bytes_max: usize,
    /// An event counter that is rung for a thread that waits in the kernel.
    bell: Option<Arc<OwnedFd>>,
}

impl<T, N> Queue<T, N> {
    pub(super) fn new(entries_max: usize, bytes_max: usize, bell: Option<Arc<OwnedFd>>) -> Self {
        let (entries, notes) = (VecDeque::new(), Vec::new());
        Self {
            state: Mutex::new(State { entries, bytes: 0, notes, listens: None }),
            filled: Condvar::new(),
            drained: Condvar::new(),
            entries_max,
            bytes_max,
            bell,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T, N>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut state: MutexGuard<'_, State<T, N>>, is_entry: bool) {
        match state.listens {
            Some(for_entries) if for_entries || !is_entry => {
                state.listens = None;
                drop(state);
                if let Some(bell) = &self.bell {
                    // An event counter that only this writes to is never full.
                    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
                }
            }
            Some(_) => {}
            None => {
                drop(state);
                self.filled.notify_one();
            }
        }
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
        self.wake(state, true);
    }

    /// Appends at once: for the few entries that are no requests.
    pub(super) fn push_unbounded(&self, entry: T) {
        let mut state = self.lock();
        state.entries.push_back((entry, 0));
        self.wake(state, true);
    }

    /// Leaves a note. There are no more of them than the thread has given out work, and a few.
    pub(super) fn note(&self, note: N) {
        let mut state = self.lock();
        state.notes.push(note);
        self.wake(state, false);
    }

    /// The first entry, if there is one.
    pub(super) fn pop(&self) -> Option<T> {
        let mut state = self.lock();
        let (entry, bytes) = state.entries.pop_front()?;
        state.bytes -= bytes;
        self.drained.notify_all();
        Some(entry)
    }

    /// All notes.
    pub(super) fn take_notes(&self) -> Vec<N> {
        std::mem::take(&mut self.lock().notes)
    }

    /// Waits for a note, for an entry if those are wanted, or until the time is over; without one, for as long as it takes.
    pub(super) fn wait(&self, for_entries: bool, time: Option<Duration>) {
        let state = self.lock();
        let nothing =
            |s: &mut State<T, N>| s.notes.is_empty() && (!for_entries || s.entries.is_empty());
        match time {
            None => drop(self.filled.wait_while(state, nothing)),
            Some(Duration::ZERO) => {}
            Some(time) => drop(self.filled.wait_timeout_while(state, time, nothing)),
        }
    }

    /// The thread is about to wait for the bell and for other things; false: there is something here already.
    pub(super) fn listen(&self, for_entries: bool) -> bool {
        let mut state = self.lock();
        if !state.notes.is_empty() || (for_entries && !state.entries.is_empty()) {
            return false;
        }
        state.listens = Some(for_entries);
        true
    }

    /// The thread does not wait for the bell any more.
    pub(super) fn stop_listening(&self) {
        self.lock().listens = None;
    }

    pub(super) fn len(&self) -> usize {
        self.lock().entries.len()
    }
}

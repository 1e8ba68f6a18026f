//! Threads that carry out the requests of one disk, where the kernel has no better way.
//!
//! # Place
//! The disk's thread gives out work; what came of it is left as a note in its queue.
//!
//! # Invariants
//! - INV-POOL-1: everything given out is carried out, and its result told, before the pool is gone.
//! - There are at most [`THREADS_MAX`] threads, and none before there is work for them.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use machine::io::BlkOp;

use super::order::Ticket;
use super::worker::{Notes, carry_out};
use super::{Image, Note};

/// Most threads of a disk.
const THREADS_MAX: usize = 16;

#[derive(Debug, Default)]
struct State {
    work: VecDeque<(Ticket, BlkOp)>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that wait for work.
    idle: usize,
    is_closed: bool,
}

/// Guards the work alone; no other lock is taken while it is held.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    filled: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<(Ticket, BlkOp)> {
        let mut state = self.lock();
        loop {
            if let Some(work) = state.work.pop_front() {
                return Some(work);
            }
            if state.is_closed {
                return None;
            }
            state.idle += 1;
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

#[derive(Debug)]
pub(super) struct Pool {
    name: String,
    image: Arc<Image>,
    notes: Notes,
    shared: Arc<Shared>,
    #[cfg(test)]
    fault: Option<super::tests::Fault>,
}

impl Pool {
    pub(super) fn new(name: String, image: Arc<Image>, notes: Notes) -> Self {
        let shared = Arc::new(Shared::default());
        #[cfg(test)]
        let pool = Self { name, image, notes, shared, fault: None };
        #[cfg(not(test))]
        let pool = Self { name, image, notes, shared };
        pool
    }

    #[cfg(test)]
    pub(super) fn set_fault(&mut self, fault: Option<super::tests::Fault>) {
        self.fault = fault;
    }

    /// Gives out a request. It is carried out by the caller where the system allows no thread at all.
    pub(super) fn submit(&self, ticket: Ticket, op: BlkOp) {
        let mut state = self.shared.lock();
        state.work.push_back((ticket, op));
        if state.idle < state.work.len() && state.threads.len() < THREADS_MAX {
            match self.start_thread() {
                Ok(thread) => state.threads.push(thread),
                Err(_) if state.threads.is_empty() => {
                    let work = state.work.pop_back();
                    drop(state);
                    if let Some((ticket, op)) = work {
                        let result = carry_out(&self.image, op);
                        self.notes.note(Note::Finished { ticket, result });
                    }
                    return;
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.shared.filled.notify_one();
    }

    fn start_thread(&self) -> std::io::Result<JoinHandle<()>> {
        let (shared, image) = (Arc::clone(&self.shared), Arc::clone(&self.image));
        let notes = Arc::clone(&self.notes);
        #[cfg(test)]
        let fault = self.fault.clone();
        std::thread::Builder::new().name(self.name.clone()).spawn(move || {
            while let Some((ticket, op)) = shared.take() {
                #[cfg(test)]
                if let Some(error) = fault.as_ref().and_then(|fault| fault.of(&op)) {
                    notes.note(Note::Finished { ticket, result: Err(error) });
                    continue;
                }
                let result = carry_out(&image, op);
                notes.note(Note::Finished { ticket, result });
            }
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.shared.lock();
            state.is_closed = true;
            std::mem::take(&mut state.threads)
        };
        self.shared.filled.notify_all();
        for thread in threads {
            // A panic of the thread was already reported by the panic hook.
            drop(thread.join());
        }
    }
}

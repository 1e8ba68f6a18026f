//! What other threads tell the vCPU thread.
//!
//! # Invariants
//! - INV-MAILBOX-1: after a post, `stop` is set until the vCPU thread has taken the mail, so that a running machine comes
//!   back within a few thousand steps.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// A queue with a wake-up, and the flags that the vCPU thread looks at.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    queue: Mutex<VecDeque<T>>,
    arrived: Condvar,
    stop: AtomicBool,
    paused: AtomicBool,
    throttle_permille: AtomicU32,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self {
            queue: Mutex::new(VecDeque::new()),
            arrived: Condvar::new(),
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            throttle_permille: AtomicU32::new(0),
        }
    }
}

impl<T> Mailbox<T> {
    /// Puts mail at the end and wakes the vCPU thread.
    pub(crate) fn post(&self, mail: T) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back(mail);
        self.stop.store(true, Ordering::Relaxed);
        drop(queue);
        self.arrived.notify_one();
    }

    /// Puts mail at the end unless `limit` pieces wait already; says whether it did.
    pub(crate) fn post_bounded(&self, mail: T, limit: usize) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= limit {
            return false;
        }
        queue.push_back(mail);
        self.stop.store(true, Ordering::Relaxed);
        drop(queue);
        self.arrived.notify_one();
        true
    }

    /// Takes everything that waits, without waiting.
    pub(crate) fn take(&self) -> VecDeque<T> {
        if !self.stop.load(Ordering::Relaxed) {
            return VecDeque::new();
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        self.stop.store(false, Ordering::Relaxed);
        std::mem::take(&mut *queue)
    }

    /// Waits until there is mail or `deadline` has passed.
    pub(crate) fn wait(&self, deadline: Option<Instant>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.is_empty() {
            let Some(deadline) = deadline else {
                queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue =
                self.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The flag that [`machine::Machine::run`] looks at.
    pub(crate) fn stop_flag(&self) -> &AtomicBool {
        &self.stop
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    pub(crate) fn set_throttle(&self, permille: u32) {
        self.throttle_permille.store(permille.min(950), Ordering::Relaxed);
    }

    pub(crate) fn throttle(&self) -> u32 {
        self.throttle_permille.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn post_raises_stop_until_taken() {
        let m = Mailbox::default();
        assert!(m.take().is_empty());
        m.post(1);
        m.post(2);
        assert!(!m.post_bounded(3, 2));
        assert!(m.stop_flag().load(Ordering::Relaxed));
        m.wait(None);
        assert_eq!(m.take(), [1, 2]);
        assert!(!m.stop_flag().load(Ordering::Relaxed));
        m.wait(Some(Instant::now()));
    }
}

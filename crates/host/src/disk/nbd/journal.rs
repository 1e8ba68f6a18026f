//! What was written to a server and is not covered by a flush yet, to be written again when the server was lost.
//!
//! # Invariants
//! - A change is in the journal from before it is sent until a flush that was sent after its success has succeeded.
//! - Changes that overlap are not under way at once (who calls sees to that), so their order here is the order in which
//!   they were made.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Past this, a change waits for a flush of our own.
const BYTES_MAX: usize = 64 << 20;
const CHANGES_MAX: usize = 16 << 10;

/// A change of the disk.
#[derive(Debug)]
pub(super) enum Change {
    Write { offset: u64, data: Vec<u8> },
    Zero { offset: u64, len: u32 },
}

impl Change {
    fn bytes(&self) -> usize {
        match self {
            Self::Write { data, .. } => data.len(),
            Self::Zero { .. } => 0,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// By number, in the order in which they began; whether each has succeeded.
    changes: BTreeMap<u64, (Change, bool)>,
    next: u64,
    bytes: usize,
}

/// See the module documentation. Its mutex guards the changes; a connection's locks are taken while they are written again.
#[derive(Debug)]
pub(super) struct Journal {
    state: Mutex<State>,
    /// Servers without a flush promise that what succeeded is durable.
    is_kept: bool,
}

impl Journal {
    pub(super) fn new(is_kept: bool) -> Self {
        Self { state: Mutex::default(), is_kept }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a flush is due before the next change.
    pub(super) fn is_full(&self) -> bool {
        let state = self.lock();
        state.bytes > BYTES_MAX || state.changes.len() > CHANGES_MAX
    }

    /// A change is about to be sent.
    pub(super) fn begin(&self, change: impl FnOnce() -> Change) -> u64 {
        if !self.is_kept {
            return 0;
        }
        let change = change();
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.bytes += change.bytes();
        state.changes.insert(number, (change, false));
        number
    }

    /// It ended so.
    pub(super) fn end(&self, number: u64, has_succeeded: bool) {
        let mut state = self.lock();
        if has_succeeded {
            if let Some((_, done)) = state.changes.get_mut(&number) {
                *done = true;
            }
        } else if let Some((change, _)) = state.changes.remove(&number) {
            state.bytes -= change.bytes();
        }
    }

    /// What a flush that is sent now will cover.
    pub(super) fn covered(&self) -> Vec<u64> {
        self.lock().changes.iter().filter(|(_, (_, done))| *done).map(|(n, _)| *n).collect()
    }

    /// A flush has covered these.
    pub(super) fn forget(&self, covered: &[u64]) {
        let mut state = self.lock();
        for number in covered {
            if let Some((change, _)) = state.changes.remove(number) {
                state.bytes -= change.bytes();
            }
        }
    }

    /// Calls `f` for each change in order, up to the first error.
    pub(super) fn each(
        &self,
        f: &mut dyn FnMut(&Change) -> Result<(), String>,
    ) -> Result<(), String> {
        self.lock().changes.values().try_for_each(|(change, _)| f(change))
    }
}

//! The arbiter: a compare-and-set register that remembers its history for the checkers.

use replica::{ArbiterReply, Record};

/// A question under way.
#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Read,
    Cas { expected: u64, new: Record },
}

/// The register.
#[derive(Debug, Default)]
pub(crate) struct Arbiter {
    /// Every record there ever was; the last one is in force.
    pub(crate) history: Vec<Record>,
    pub(crate) is_down: bool,
}

impl Arbiter {
    pub(crate) fn current(&self) -> Option<&Record> {
        self.history.last()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.current().map_or(0, |record| record.generation)
    }

    /// Answers, and says whether the record changed.
    pub(crate) fn answer(&mut self, ask: Ask) -> (ArbiterReply, bool) {
        match ask {
            Ask::Read => (ArbiterReply::Read(self.current().cloned()), false),
            Ask::Cas { expected, new } if expected == self.generation() => {
                self.history.push(new);
                (ArbiterReply::Won, true)
            }
            Ask::Cas { .. } => (ArbiterReply::Lost(self.current().cloned()), false),
        }
    }
}

//! The journal of a disk on the disk's thread, and what it is told there.

use super::journal::Journal;
use super::record::{CheckpointId, Statement};

/// Told that the copy is stated to be what it is at a checkpoint.
pub type Stated = Box<dyn FnMut(CheckpointId) + Send>;

/// Something for the journal, at this point in the order of requests.
pub enum KeeperOrder {
    /// Keep it from here on.
    Keep {
        /// What is known about the disk's copy.
        journal: Box<Journal>,
        /// Hears of what is stated.
        stated: Stated,
    },
    /// A checkpoint is here.
    Checkpoint {
        /// Its name.
        id: CheckpointId,
        /// The host that has it, too.
        peer: String,
    },
    /// Make the checkpoint durable if it is not.
    Flush {
        /// Its name.
        id: CheckpointId,
    },
    /// Both hosts have stated it.
    Settle {
        /// Its name.
        id: CheckpointId,
    },
    /// The copy has everything that the VM did in this generation.
    Generation {
        /// Of the arbiter's record.
        generation: u64,
        /// Keep a record if there is none.
        create: bool,
    },
}

impl std::fmt::Debug for KeeperOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Keep { journal, .. } => f.debug_tuple("Keep").field(journal).finish(),
            Self::Checkpoint { id, peer } => {
                f.debug_struct("Checkpoint").field("id", id).field("peer", peer).finish()
            }
            Self::Flush { id } => f.debug_tuple("Flush").field(id).finish(),
            Self::Settle { id } => f.debug_tuple("Settle").field(id).finish(),
            Self::Generation { generation, .. } => {
                f.debug_tuple("Generation").field(generation).finish()
            }
        }
    }
}

/// The journal, if one is kept.
#[derive(Default)]
pub(super) struct Keeper(Option<(Box<Journal>, Stated)>);

impl Keeper {
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.0.as_ref().map(|(journal, _)| &**journal)
    }

    pub(super) fn journal_mut(&mut self) -> Option<&mut Journal> {
        self.0.as_mut().map(|(journal, _)| &mut **journal)
    }

    /// Takes an order; `flush` makes everything durable that was written before it.
    pub(super) fn take(
        &mut self,
        order: KeeperOrder,
        flush: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), String> {
        let order = match order {
            KeeperOrder::Keep { journal, stated } => {
                self.0 = Some((journal, stated));
                return Ok(());
            }
            order => order,
        };
        let Some((journal, _)) = &mut self.0 else { return Ok(()) };
        match order {
            KeeperOrder::Keep { .. } => {}
            KeeperOrder::Checkpoint { id, peer } => journal.checkpoint(id, &peer),
            KeeperOrder::Settle { id } => journal.settle(id)?,
            KeeperOrder::Generation { generation, create } => {
                if create || journal.is_kept() {
                    journal.set_generation(generation)?;
                }
            }
            KeeperOrder::Flush { id } => {
                if journal.pending() == Some(id) {
                    flush()?;
                    self.flushed(Some(id))?;
                }
            }
        }
        Ok(())
    }

    /// The range is about to be written; `upcoming` are those of requests that wait.
    pub(super) fn before_write(
        &mut self,
        offset: u64,
        len: u64,
        upcoming: impl FnOnce() -> Vec<(u64, u64)>,
    ) -> Result<(), String> {
        match &mut self.0 {
            Some((journal, _)) => journal.before_write(offset, len, upcoming),
            None => Ok(()),
        }
    }

    /// The disk has grown.
    pub(super) fn grown(&mut self, size: u64) -> Result<(), String> {
        self.journal_mut().map_or(Ok(()), |journal| journal.grown(size))
    }

    /// To be given to [`Self::flushed`] when a flush that begins now has succeeded.
    pub(super) fn flush_begins(&self) -> Option<CheckpointId> {
        self.journal().and_then(Journal::pending)
    }

    /// A flush has succeeded before which all writes were done that came before it.
    pub(super) fn flushed(&mut self, begun: Option<CheckpointId>) -> Result<(), String> {
        if let Some((journal, stated)) = &mut self.0
            && let Some(id) = journal.flushed(begun)?
        {
            stated(id);
        }
        Ok(())
    }

    /// Begins a checkpoint, and says what is known of the contents there, for the host `peer`.
    pub(super) fn mirror_point(&mut self, point: &MirrorPoint) -> Vec<Statement> {
        let Some((journal, _)) = &mut self.0 else { return Vec::new() };
        journal.checkpoint(point.id, &point.peer);
        journal.export(&point.host, &point.peer)
    }

    /// Nothing will be written any more.
    pub(super) fn close(&mut self) {
        if let Some((mut journal, _)) = self.0.take() {
            journal.close();
        }
    }
}

/// The point in the order of requests that a mirror ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorPoint {
    /// Its name.
    pub id: CheckpointId,
    /// This host.
    pub host: String,
    /// The one that gets the mirror.
    pub peer: String,
}

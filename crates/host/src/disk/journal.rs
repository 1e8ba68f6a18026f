//! Keeps the record of a mirrored disk's copy true: before an extent is written that the record does not name as written
//! since a checkpoint, the record names it, durably.
//!
//! # Place
//! Owned by the disk's thread, which calls [`Journal::before_write`] for each write before it gives that to the image;
//! by the receiving side of a copy, for which a chunk that arrives is a write like any other.
//!
//! # States
//! For each checkpoint:
//! ```text
//!   pending --all writes before it durable here--> stated in the record --the other host has stated it too--> settled
//! ```
//! When one is settled, what was said of earlier ones for the sake of that host is forgotten. Until then both are kept, so
//! that two hosts always have a checkpoint in common, whichever of them crashes at whichever step.
//!
//! # Invariants
//! - INV-JOURNAL-1: at any moment, after a power cut too, the copy differs from the disk's contents at a checkpoint that its
//!   record speaks of at most in the extents that are marked there.
//! - INV-JOURNAL-2: two copies with a checkpoint in common differ at most in what either has marked since. This needs no
//!   agreement on who was right in the meantime: it holds for two copies that both went on alone.
//! - INV-JOURNAL-3: a copy into which a resync writes is marked as being copied before its first byte changes, and no
//!   longer once all of it is durable.
//!
//! # Cost
//! A mark costs one synced write of a few kilobytes to another file. So marks of all requests that wait are set together,
//! a stream of writes marks ahead, and extents written between the last two checkpoints are marked at once in the next.
//!
//! # Failure
//! Where a mark cannot be stored, the record is removed and the guest's write goes on: the copy is one that nothing is
//! known about. Where it cannot be removed either, the write fails.

use std::path::{Path, PathBuf};

use super::bitmap::Bitmap;
use super::copy::CHUNK_BYTES;
use super::record::{
    self, CHECKPOINTS_MAX, CheckpointId, CopyState, Found, Record, RecordFile, Statement,
    extent_bytes, extents,
};

/// Extents that are marked at once because they were written of late.
const HOT_MAX: u64 = 32;
/// Extents that a stream of writes marks ahead.
const AHEAD_MAX: u64 = 16;

/// What is known about the copy and one checkpoint.
#[derive(Debug, Clone)]
struct Known {
    id: CheckpointId,
    peer: String,
    /// Extents, as the record has them or is to have them.
    marks: Bitmap,
    /// Chunks in which the copy differs, as long as this process lives.
    fine: Bitmap,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Journal {
    image: PathBuf,
    path: PathBuf,
    file: Option<RecordFile>,
    record: Record,
    /// The newest first.
    known: Vec<Known>,
    pending: Option<Known>,
    /// What the last resync from here built on.
    base: Option<CheckpointId>,
    /// Extents written since the last checkpoint.
    written: Bitmap,
    /// Where a stream of writes would go on, and how far it marks ahead.
    stream: (u64, u64),
    /// Why nothing is known about the copy, if so.
    unknown: Option<String>,
    stores: u64,
}

impl Journal {
    /// Of the copy at `image`, with what its record says, if there is one that is about it.
    #[must_use]
    pub fn open(image: &Path, state_dir: &Path, vm: &str, disk: u8, size: u64) -> Self {
        let found = record::find(image, state_dir, vm, disk, size);
        let (file, record, unknown) = match found {
            Found::Record(file, record) => (Some(file), record, None),
            Found::Unknown(why) => (None, Record::new(vm, disk, size), Some(why)),
        };
        let mut journal = Self {
            image: image.to_owned(),
            path: record::record_path(image, state_dir),
            file,
            record,
            known: Vec::new(),
            pending: None,
            base: None,
            written: Bitmap::empty(extents(size)),
            stream: (0, 0),
            unknown,
            stores: 0,
        };
        let statements = std::mem::take(&mut journal.record.statements);
        journal.known = statements.iter().filter_map(|s| journal.learn(s)).collect();
        journal
    }

    fn learn(&self, statement: &Statement) -> Option<Known> {
        let marks = Bitmap::from_bytes(extents(self.record.size), &statement.marks)?;
        let fine = chunks_of(&marks, self.record.size);
        Some(Known { id: statement.id, peer: statement.peer.clone(), marks, fine })
    }

    /// Whether there is a record.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.file.is_some()
    }

    /// Why nothing is known about the copy, if so.
    #[must_use]
    pub fn unknown(&self) -> Option<&str> {
        self.unknown.as_deref()
    }

    /// Whether the copy can be used.
    #[must_use]
    pub fn state(&self) -> CopyState {
        self.record.state
    }

    /// The generation whose deeds the copy has.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.record.generation
    }

    /// How often the record was stored.
    #[must_use]
    pub fn stores(&self) -> u64 {
        self.stores
    }

    /// What can be said about the copy, with the checkpoint under way: for the host `peer`, which has the same disk at
    /// this very point in the order of requests. `host` is this one.
    #[must_use]
    pub fn export(&self, host: &str, peer: &str) -> Vec<Statement> {
        let all = self.pending.iter().chain(&self.known);
        let told = all.map(|known| Statement {
            id: known.id,
            peer: if known.peer == peer { host } else { &known.peer }.to_owned(),
            marks: known.marks.to_bytes(),
        });
        let mut told: Vec<_> = told.collect();
        fit(&mut told, self.base, |statement| statement.id);
        told
    }

    /// What the record says, for a host that knows the disk as it is now.
    #[must_use]
    pub fn statements(&self) -> Vec<Statement> {
        let told = self.known.iter().map(|known| Statement {
            id: known.id,
            peer: known.peer.clone(),
            marks: known.marks.to_bytes(),
        });
        told.collect()
    }

    /// The chunks in which this copy can differ from another one of which `theirs` is said, with the checkpoint that tells;
    /// nothing when there is none in common.
    pub fn differing(&mut self, theirs: &[Statement]) -> Option<(CheckpointId, Bitmap)> {
        let size = self.record.size;
        let common = self.pending.iter().chain(&self.known).filter_map(|known| {
            let statement = theirs.iter().find(|s| s.id == known.id)?;
            let marks = Bitmap::from_bytes(extents(size), &statement.marks)?;
            let mut differing = chunks_of(&marks, size);
            differing.unite(&known.fine);
            Some((known.id, differing))
        });
        let found = common.min_by_key(|(_, differing)| differing.ones());
        self.base = found.as_ref().map(|(id, _)| *id);
        found
    }

    /// The range is about to be written. `upcoming` are the ranges of requests that wait behind it.
    ///
    /// # Errors
    /// One line: it must not be written.
    pub fn before_write(
        &mut self,
        offset: u64,
        len: u64,
        upcoming: impl FnOnce() -> Vec<(u64, u64)>,
    ) -> Result<(), String> {
        self.grown(offset.saturating_add(len))?;
        if len == 0 || (self.known.is_empty() && self.pending.is_none() && !self.is_closed()) {
            return Ok(());
        }
        let (first, last) = (offset / self.extent(), (offset + len - 1) / self.extent());
        for known in self.known.iter_mut().chain(&mut self.pending) {
            known.fine.set_range(offset / CHUNK_BYTES, (offset + len - 1) / CHUNK_BYTES + 1);
        }
        self.written.set_range(first, last + 1);
        if let Some(pending) = &mut self.pending {
            pending.marks.set_range(first, last + 1);
        }
        let is_marked = |known: &Known| (first..=last).all(|e| known.marks.get(e));
        if self.known.iter().all(is_marked) && !self.is_closed() {
            return Ok(());
        }
        self.mark(first, last, &upcoming());
        self.store_or_forget()
    }

    /// The disk has `size` bytes at least: if that is more than it had, what is known of it is of another disk.
    ///
    /// # Errors
    /// As [`Self::before_write`].
    pub fn grown(&mut self, size: u64) -> Result<(), String> {
        if size <= self.record.size {
            return Ok(());
        }
        self.record.size = size;
        self.known.clear();
        self.pending = None;
        self.written = Bitmap::empty(extents(size));
        if self.is_kept() { self.store_or_forget() } else { Ok(()) }
    }

    /// Marks extents, those that are about to follow as well.
    fn mark(&mut self, first: u64, last: u64, upcoming: &[(u64, u64)]) {
        let (extent, count) = (self.extent(), self.written.len());
        let (next, ahead) = self.stream;
        let ahead = if first == next { (ahead * 2).clamp(2, AHEAD_MAX) } else { 0 };
        self.stream = (last + 1 + ahead, ahead);
        for known in &mut self.known {
            known.marks.set_range(first, last + 1 + ahead);
            for (offset, len) in upcoming.iter().filter(|(_, len)| *len > 0) {
                let end = offset.saturating_add(len - 1) / extent;
                known.marks.set_range((offset / extent).min(count), end.saturating_add(1));
            }
        }
    }

    /// Begins a checkpoint at this point in the order of requests, which `peer` has as well; one under way is given up.
    pub fn checkpoint(&mut self, id: CheckpointId, peer: &str) {
        let count = self.written.len();
        let written = std::mem::replace(&mut self.written, Bitmap::empty(count));
        let hot = if written.ones() <= HOT_MAX { written } else { Bitmap::empty(count) };
        let fine = Bitmap::empty(self.record.size.div_ceil(CHUNK_BYTES));
        self.pending = Some(Known { id, peer: peer.to_owned(), marks: hot, fine });
    }

    /// The checkpoint that a flush which begins now will make durable.
    #[must_use]
    pub fn pending(&self) -> Option<CheckpointId> {
        self.pending.as_ref().map(|pending| pending.id)
    }

    /// A flush ended that began when `id` was [`Self::pending`] and all writes before it were done: the copy is durable at
    /// that checkpoint. Says so if it is stated now.
    ///
    /// # Errors
    /// As [`Self::before_write`].
    pub fn flushed(&mut self, id: Option<CheckpointId>) -> Result<Option<CheckpointId>, String> {
        let Some(pending) = self.pending.take_if(|pending| Some(pending.id) == id) else {
            return Ok(None);
        };
        let id = pending.id;
        self.known.insert(0, pending);
        fit(&mut self.known, self.base, |known| known.id);
        self.store_or_forget()?;
        Ok(self.known.iter().any(|known| known.id == id).then_some(id))
    }

    /// The other host has stated `id`, and so has this one: earlier checkpoints are no longer needed for it.
    ///
    /// # Errors
    /// As [`Self::before_write`].
    pub fn settle(&mut self, id: CheckpointId) -> Result<(), String> {
        let Some(at) = self.known.iter().position(|known| known.id == id) else { return Ok(()) };
        let peer = self.known[at].peer.clone();
        let before = self.known.len();
        let mut index = 0;
        self.known.retain(|known| {
            index += 1;
            index <= at + 1 || known.peer != peer
        });
        if self.known.len() == before { Ok(()) } else { self.store_or_forget() }
    }

    /// The copy has everything that the VM did in `generation`.
    ///
    /// # Errors
    /// As [`Self::before_write`].
    pub fn set_generation(&mut self, generation: u64) -> Result<(), String> {
        if self.file.is_some() && self.record.generation == generation {
            return Ok(());
        }
        self.record.generation = generation;
        self.store_or_forget()
    }

    /// A resync begins that writes into this copy, as far as known in `extents`.
    ///
    /// # Errors
    /// One line: the record cannot be stored, so nothing must be written.
    pub fn begin_resync(&mut self, extents: &Bitmap) -> Result<(), String> {
        self.record.state = CopyState::BeingCopied;
        self.pending = None;
        let fine = chunks_of(extents, self.record.size);
        for known in &mut self.known {
            known.marks.unite(extents);
            known.fine.unite(&fine);
        }
        self.store()
    }

    /// A copy of everything is about to be written into this one.
    ///
    /// # Errors
    /// As [`Self::begin_resync`].
    pub fn begin_whole(&mut self) -> Result<(), String> {
        self.record.state = CopyState::BeingCopied;
        self.pending = None;
        self.known.clear();
        self.store()
    }

    /// The copy is complete and durable: it is the disk at the first checkpoint of `statements`, and differs from it at
    /// the others as is said there.
    ///
    /// # Errors
    /// One line: the record cannot be stored, and the copy is not to be used.
    pub fn complete(&mut self, statements: &[Statement], generation: u64) -> Result<(), String> {
        self.pending = None;
        self.known = statements.iter().filter_map(|s| self.learn(s)).collect();
        fit(&mut self.known, None, |known| known.id);
        self.record.state = CopyState::Whole;
        self.record.generation = generation;
        self.store()
    }

    /// Nothing will be written any more.
    pub fn close(&mut self) {
        if self.file.is_some() && !self.is_closed() {
            self.record.closed = record::modified(&self.image);
            // Without it the record says just as well what it said.
            if let Err(e) = self.store_as_is() {
                crate::log::line(&format!("{}: {e}", self.path.display()));
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.record.closed.is_some()
    }

    fn extent(&self) -> u64 {
        extent_bytes(self.record.size)
    }

    fn store(&mut self) -> Result<(), String> {
        self.record.closed = None;
        self.store_as_is()
    }

    fn store_as_is(&mut self) -> Result<(), String> {
        let fail = |path: &Path, e| format!("cannot write {}: {e}", path.display());
        self.record.statements = self.statements();
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                self.record.file = record::file_id(&self.image);
                let created = RecordFile::create(&self.path);
                none.insert(created.map_err(|e| fail(&self.path, e))?)
            }
        };
        self.stores += 1;
        let stored = file.store(&mut self.record);
        self.record.statements.clear();
        stored.map_err(|e| fail(&self.path, e))
    }

    /// Stores the record, or sees to it that there is none.
    fn store_or_forget(&mut self) -> Result<(), String> {
        let Err(e) = self.store() else { return Ok(()) };
        if self.record.state == CopyState::BeingCopied {
            return Err(e);
        }
        record::remove(&self.path).map_err(|_| e.clone())?;
        crate::log::line(&format!("{e}; the copy of this disk will be copied whole"));
        self.file = None;
        self.known.clear();
        self.pending = None;
        self.unknown = Some(e);
        Ok(())
    }
}

/// Leaves out the newest but one, and not `base`, until there is room: what is older the other host may have as well.
fn fit<T>(list: &mut Vec<T>, base: Option<CheckpointId>, id: impl Fn(&T) -> CheckpointId) {
    while list.len() > CHECKPOINTS_MAX {
        let at = if base == list.get(1).map(&id) { 2 } else { 1 };
        list.remove(at);
    }
}

/// The chunks that lie in `extents` of a disk.
fn chunks_of(extents: &Bitmap, size: u64) -> Bitmap {
    let in_extent = extent_bytes(size) / CHUNK_BYTES;
    let mut chunks = Bitmap::empty(size.div_ceil(CHUNK_BYTES));
    for extent in extents.iter() {
        chunks.set_range(extent * in_extent, (extent + 1) * in_extent);
    }
    chunks
}

/// The extents that `chunks` of a disk lie in.
#[must_use]
pub fn extents_of(chunks: &Bitmap, size: u64) -> Bitmap {
    let in_extent = extent_bytes(size) / CHUNK_BYTES;
    let mut marks = Bitmap::empty(extents(size));
    for chunk in chunks.iter() {
        marks.set(chunk / in_extent);
    }
    marks
}

#[cfg(test)]
mod tests;

//! Takes a snapshot of a machine that runs on.
//!
//! # Place
//! The thread that owns the machine begins a [`Sweep`] and calls [`Sweep::pump`] after each slice. A thread of the
//! sweep's own compresses and writes; disks, where a snapshot has any, give it their chunks through [`DiskItems`].
//!
//! # Invariants
//! - INV-SNAPSHOT-3: what the queue does not take waits here, as do pages saved before a write.
//! - INV-SNAPSHOT-4: once all pages were handed over the machine's memory is left alone: it may be armed for another.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use machine::Machine;
use machine::ram::{Epoch, GuestRam, SnapshotStep};

use super::{SnapshotHead, SnapshotId, SnapshotItem, SnapshotWriter};
use crate::disk::copy::{CHUNK_BYTES, ChunkSink, CopyItem, Refused};
use crate::one_line::one_line;

/// Pieces that wait for the writer.
const QUEUE_ITEMS: usize = 16;
/// Pages in a piece.
const PAGES_PER_ITEM: usize = 128;
/// Pages that are looked at after a slice.
const LOOKS_PER_SLICE: u32 = 4096;
/// Pieces handed over after a slice.
const ITEMS_PER_SLICE: usize = 4;

/// Why there is no snapshot when the machine is gone.
pub(crate) const GIVEN_UP: &str = "it was given up";

/// What goes to the writer.
#[derive(Debug)]
enum Piece {
    Item(SnapshotItem),
    /// All of the machine, or of a disk.
    End,
    Failed(String),
}

/// What a writer has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Length of the file.
    pub(crate) bytes: u64,
    pub(crate) pages: u64,
    /// Bytes of disks, those that are all zero now included.
    pub(crate) disk_bytes: u64,
}

/// A snapshot that is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) id: SnapshotId,
    pub(crate) path: PathBuf,
    /// When the machine was in that state, to build the next snapshot on.
    pub(crate) epoch: Epoch,
}

/// A snapshot that is being taken.
#[derive(Debug)]
pub(crate) struct Sweep {
    queue: Option<SyncSender<Piece>>,
    waiting: Option<Piece>,
    /// Every page was handed over.
    is_swept: bool,
    epoch: Epoch,
    thread: Option<JoinHandle<Result<Written, String>>>,
    id: SnapshotId,
    path: PathBuf,
}

/// Gives a disk's chunks to a snapshot.
#[derive(Debug)]
pub(crate) struct DiskItems {
    dev: u8,
    queue: SyncSender<Piece>,
}

impl ChunkSink for DiskItems {
    fn offer(&mut self, item: CopyItem) -> Result<(), Refused> {
        let point = if let CopyItem::End { point } = &item { *point } else { 0 };
        let chunk = |index, data| SnapshotItem::Chunk { dev: self.dev, index, data };
        let piece = match item {
            CopyItem::Chunk { index, data } => Piece::Item(chunk(index, Some(data))),
            CopyItem::Zero { index } => Piece::Item(chunk(index, None)),
            CopyItem::End { .. } => Piece::End,
            CopyItem::Failed { reason } => Piece::Failed(reason),
            // What a mirror begins and ends with concerns no snapshot.
            CopyItem::Start { .. } | CopyItem::Stated { .. } => return Ok(()),
        };
        self.queue.try_send(piece).map_err(|e| match e {
            TrySendError::Full(piece) => Refused::Full(match piece {
                Piece::Item(SnapshotItem::Chunk { index, data: Some(data), .. }) => {
                    CopyItem::Chunk { index, data }
                }
                Piece::Item(SnapshotItem::Chunk { index, data: None, .. }) => {
                    CopyItem::Zero { index }
                }
                Piece::Item(SnapshotItem::Pages(_)) => unreachable!("a disk has no pages"),
                Piece::End => CopyItem::End { point },
                Piece::Failed(reason) => CopyItem::Failed { reason },
            }),
            TrySendError::Disconnected(_) => Refused::Gone,
        })
    }
}

impl Sweep {
    /// Arms the machine's memory and starts the writer: from here on the snapshot is of this very moment. What has not
    /// changed since `base`, the state that `head.parent` is of, is left out. A sweep under way must not be disturbed:
    /// [`Self::is_free`] says when.
    ///
    /// # Errors
    /// The writer's thread could not be started.
    pub(crate) fn begin(
        machine: &mut Machine,
        head: SnapshotHead,
        base: Option<Epoch>,
        path: PathBuf,
    ) -> std::io::Result<Self> {
        Self::begin_told(machine, head, base, path, |_| ())
    }

    /// As [`Self::begin`]; `told` hears how it ended, on the writer's thread.
    ///
    /// # Errors
    /// The writer's thread could not be started.
    pub(crate) fn begin_told(
        machine: &mut Machine,
        head: SnapshotHead,
        base: Option<Epoch>,
        path: PathBuf,
        told: impl FnOnce(&Result<Written, String>) + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::begin_prepared(machine, head, base, path, || Ok(()), told)
    }

    /// As [`Self::begin_told`]; `prepare` makes the file's place, on the writer's thread, or says why there is none.
    ///
    /// # Errors
    /// The writer's thread could not be started.
    pub(crate) fn begin_prepared(
        machine: &mut Machine,
        head: SnapshotHead,
        base: Option<Epoch>,
        path: PathBuf,
        prepare: impl FnOnce() -> Result<(), String> + Send + 'static,
        told: impl FnOnce(&Result<Written, String>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (queue, pieces) = sync_channel(QUEUE_ITEMS);
        let id = head.id;
        let parts = 1 + head.disks.iter().filter(|bytes| **bytes > 0).count();
        let target = path.clone();
        let write = move || {
            crate::background::enter();
            let written = prepare().and_then(|()| write(&head, &target, &pieces, parts));
            told(&written);
            written
        };
        let thread = std::thread::Builder::new().name("snapshot".to_owned()).spawn(write)?;
        let epoch = machine.ram_mut().arm_snapshot(base);
        Ok(Self {
            queue: Some(queue),
            waiting: None,
            is_swept: false,
            epoch,
            thread: Some(thread),
            id,
            path,
        })
    }

    /// Whether no other snapshot of this machine is under way.
    pub(crate) fn is_free(machine: &Machine) -> bool {
        machine.ram().snapshot_cursor().is_none()
    }

    /// When the machine was in the state that is written.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Where the chunks of a disk of the snapshot go, until [`Self::pump`] has said that there is no more to do.
    pub(crate) fn disk(&self, dev: u8) -> Option<DiskItems> {
        self.queue.clone().map(|queue| DiskItems { dev, queue })
    }

    /// Hands over some pages; false when all of them are, or nobody takes any.
    pub(crate) fn pump(&mut self, ram: &mut GuestRam) -> bool {
        let mut budget = LOOKS_PER_SLICE;
        for _ in 0..ITEMS_PER_SLICE {
            let Some(queue) = self.queue.clone() else { return false };
            let waiting = self.waiting.take();
            let Some(piece) = waiting.or_else(|| self.next_piece(ram, &mut budget)) else {
                return true;
            };
            let is_end = matches!(piece, Piece::End);
            match queue.try_send(piece) {
                Ok(()) if is_end => self.queue = None,
                Ok(()) => {}
                Err(TrySendError::Full(piece)) => {
                    self.waiting = Some(piece);
                    return true;
                }
                Err(TrySendError::Disconnected(_)) => self.disarm(ram),
            }
        }
        self.queue.is_some()
    }

    /// Gives it up; nothing is left of it.
    pub(crate) fn abandon(mut self, ram: &mut GuestRam) {
        self.disarm(ram);
        // It was wanted by nobody any more.
        drop(self.join());
    }

    /// Gives it up without a wait for its writer, which leaves nothing of it either.
    pub(crate) fn leave(mut self, ram: &mut GuestRam) {
        self.disarm(ram);
    }

    fn disarm(&mut self, ram: &mut GuestRam) {
        if self.queue.take().is_some() && !self.is_swept {
            ram.disarm_snapshot();
        }
    }

    /// The next pages, or the end; none when enough were looked at for now.
    fn next_piece(&mut self, ram: &mut GuestRam, budget: &mut u32) -> Option<Piece> {
        let mut pages = Vec::new();
        while pages.len() < PAGES_PER_ITEM && !self.is_swept {
            match ram.next_snapshot_page(budget) {
                SnapshotStep::Page(page) => pages.push((page.page, page.data)),
                SnapshotStep::OutOfBudget => break,
                SnapshotStep::Done => self.is_swept = true,
            }
        }
        if pages.is_empty() {
            return self.is_swept.then_some(Piece::End);
        }
        Some(Piece::Item(SnapshotItem::Pages(pages)))
    }

    /// How it ended, once it has; asked until then.
    pub(crate) fn outcome(&mut self) -> Option<Result<Taken, String>> {
        if self.thread.as_ref().is_none_or(|thread| thread.is_finished()) {
            return Some(self.join());
        }
        None
    }

    /// Waits for the writer.
    pub(crate) fn join(&mut self) -> Result<Taken, String> {
        let written = self.thread.take().map(JoinHandle::join);
        match written {
            Some(Ok(written)) => written?,
            Some(Err(_)) | None => return Err("the snapshot's writer is gone".to_owned()),
        };
        Ok(Taken { id: self.id, path: self.path.clone(), epoch: self.epoch })
    }
}

fn write(
    head: &SnapshotHead,
    path: &std::path::Path,
    pieces: &Receiver<Piece>,
    parts: usize,
) -> Result<Written, String> {
    let mut writer = SnapshotWriter::create(path, head).map_err(|e| one_line(&e))?;
    let (mut ended, mut disk_bytes) = (0, 0);
    while ended < parts {
        match pieces.recv() {
            Ok(Piece::Item(item)) => {
                if let SnapshotItem::Chunk { data, .. } = &item {
                    disk_bytes += data.as_ref().map_or(CHUNK_BYTES, |data| data.len() as u64);
                }
                writer.item(&item).map_err(|e| one_line(&e))?;
            }
            Ok(Piece::End) => ended += 1,
            Ok(Piece::Failed(reason)) => return Err(reason),
            Err(_) => return Err(GIVEN_UP.to_owned()),
        }
    }
    let pages = writer.pages();
    let bytes = writer.finish().map_err(|e| one_line(&e))?;
    Ok(Written { bytes, pages, disk_bytes })
}

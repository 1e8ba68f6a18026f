//! Copies a disk that is in use, so that the copy ends with the contents at one point in the order of requests.
//!
//! # Place
//! Runs on the disk's thread, in slices between requests; at the freeze no request is under way.
//!
//! # States
//! ```text
//! Passes --few chunks left, or too many passes--> Converged --freeze--> Frozen --all sent--> ended
//!    \---------------------------freeze----------------------------------^
//! ```
//! The copy for a snapshot is frozen from the start.
//!
//! # Invariants
//! - INV-COPY-1: the receiver differs from the disk at most in the chunks marked `pending`, and in those that are being
//!   written, which are marked again when that has ended.
//! - INV-COPY-2: once frozen, a pending chunk is saved before it is written, so what is sent is what it held at the
//!   point of the freeze.
//! - The guest never waits for the receiver of a mirror: where the saved chunks exceed a bound, the copy fails, not the
//!   guest. For a snapshot, a write waits for room, but no longer than [`PATIENCE`].
//!
//! # Failure
//! A disk that cannot be read, a sink that is gone and a receiver that is too slow end the copy; the reason is in
//! [`CopyProgress`]. The receiver is told by [`CopyItem::Failed`] where it still listens.

use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::bitmap::Bitmap;
use super::journal::{Journal, extents_of};
use super::record::{CheckpointId, Statement};
use super::{Image, SINK_FULL_WAIT};

/// Bytes in a chunk; the last one of a disk may be shorter.
pub const CHUNK_BYTES: u64 = 64 << 10;
/// The passes end when no more chunks than this are left (4 MiB).
const PENDING_FEW: u64 = 64;
/// The passes end after this many, whatever is left.
const PASSES_MAX: u32 = 6;
/// Most chunks saved before a write and not yet taken by the sink (64 MiB).
const SAVED_CHUNKS_MAX: usize = 1024;
/// How long a write waits for the receiver of a snapshot.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time over which a copy keeps to its limit.
const PACE_WINDOW: Duration = Duration::from_millis(100);
/// Chunks read in one slice.
const CHUNKS_PER_SLICE: u32 = 4;
/// Chunks looked at in one slice.
const LOOKS_PER_SLICE: u32 = 4096;

/// What the receiver gets, in this order of time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyItem {
    /// Contents of a chunk.
    Chunk {
        /// Index of the chunk.
        index: u64,
        /// [`CHUNK_BYTES`], or less for the last one.
        data: Vec<u8>,
    },
    /// A chunk sent before is now all zero. Chunks that were always zero are not sent at all.
    Zero {
        /// Index of the chunk.
        index: u64,
    },
    /// The copy is complete.
    End {
        /// What [`super::DiskHandle::freeze_copy`] was called with.
        point: u64,
    },
    /// The copy will not be completed.
    Failed {
        /// One line for people.
        reason: String,
    },
    /// Before all else, of a copy for a mirror: what it builds on.
    Start {
        /// The checkpoint at which the receiver's own copy is what it has marked, so that it is to be written in place;
        /// none for a copy of everything.
        base: Option<CheckpointId>,
        /// Extents that are to be sent, as far as known.
        extents: Vec<u8>,
    },
    /// Before the end, of a copy for a mirror: what is known of the contents that it ends with.
    Stated {
        /// The first is that they are those of its checkpoint.
        statements: Vec<Statement>,
    },
}

/// What a copy for a mirror begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorPlan {
    /// The receiving host.
    pub peer: String,
    /// What it says of the copy that it has, or why there is none that can be used.
    pub theirs: Result<Vec<Statement>, String>,
    /// Most bytes in a second while the guest writes.
    pub limit: Option<u64>,
}

/// Why a sink did not take an item.
#[derive(Debug)]
pub enum Refused {
    /// No room now; the item comes back.
    Full(CopyItem),
    /// Nobody wants any more.
    Gone,
}

/// Where copied chunks go.
pub trait ChunkSink: Send + std::fmt::Debug {
    /// Takes an item, or refuses it at once: it must not wait.
    ///
    /// # Errors
    /// See [`Refused`].
    fn offer(&mut self, item: CopyItem) -> Result<(), Refused>;
}

impl ChunkSink for SyncSender<CopyItem> {
    fn offer(&mut self, item: CopyItem) -> Result<(), Refused> {
        self.try_send(item).map_err(|e| match e {
            TrySendError::Full(item) => Refused::Full(item),
            TrySendError::Disconnected(_) => Refused::Gone,
        })
    }
}

/// Where a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyPhase {
    /// Copying while requests go on.
    Passes,
    /// Waiting for the freeze.
    Converged,
    /// Sending what is left of the frozen contents.
    Frozen,
    /// Complete.
    Done,
    /// Given up.
    Failed,
}

/// How far a copy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyProgress {
    /// Where it is.
    pub phase: CopyPhase,
    /// Chunks that the disk has.
    pub chunks_total: u64,
    /// Chunks still to be looked at.
    pub chunks_pending: u64,
    /// Chunks sent, those sent again included.
    pub chunks_sent: u64,
    /// The host that gets it, if it is for a mirror.
    pub peer: Option<String>,
    /// Why everything is copied; nothing when only what has changed is.
    pub whole_because: Option<String>,
    /// Bytes of the chunks that differed at the beginning; of all chunks when everything is copied.
    pub bytes_to_copy: u64,
    /// Passes completed.
    pub passes: u32,
    /// Why it failed, as one line.
    pub error: Option<String>,
}

/// What is to be done after a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    More,
    SinkFull,
    Waiting,
    Ended,
}

#[derive(Debug)]
pub(super) struct Copier {
    sink: Box<dyn ChunkSink>,
    size: u64,
    phase: CopyPhase,
    point: u64,
    pending: Bitmap,
    /// Chunks that the receiver may hold something else than zeroes for.
    sent: Bitmap,
    cursor: u64,
    /// Writes wait for room rather than that the copy fails.
    delays_writes: bool,
    /// Items ready to be offered: chunks saved before a write, and the one that the sink refused last.
    ready: VecDeque<CopyItem>,
    chunks_sent: u64,
    passes: u32,
    error: Option<String>,
    peer: Option<String>,
    whole_because: Option<String>,
    chunks_to_copy: u64,
    /// What the receiver is told before the end.
    statements: Option<Vec<Statement>>,
    pace: Option<Pace>,
}

/// Keeps a copy to a number of bytes in a second, over a tenth of a second.
#[derive(Debug)]
struct Pace {
    limit: u64,
    since: Instant,
    sent: u64,
}

impl Pace {
    fn may_send(&mut self) -> bool {
        let passed = self.since.elapsed();
        let allowed = u128::from(self.limit) * passed.as_micros() / 1_000_000;
        if passed > PACE_WINDOW && u128::from(self.sent) <= allowed {
            // What was not used is lost: it does not come as a burst later.
            (self.since, self.sent) = (Instant::now(), 0);
        }
        u128::from(self.sent) <= allowed
    }
}

impl Copier {
    pub(super) fn new(sink: Box<dyn ChunkSink>, size: u64) -> Self {
        let chunks = size.div_ceil(CHUNK_BYTES);
        Self {
            sink,
            size,
            phase: CopyPhase::Passes,
            point: 0,
            pending: Bitmap::full(chunks),
            sent: Bitmap::empty(chunks),
            cursor: 0,
            delays_writes: false,
            ready: VecDeque::new(),
            chunks_sent: 0,
            passes: 0,
            error: None,
            peer: None,
            whole_because: None,
            chunks_to_copy: chunks,
            statements: None,
            pace: None,
        }
    }

    /// Of a disk for a mirror: of what differs from the receiver's copy, where that can be told.
    pub(super) fn for_mirror(
        sink: Box<dyn ChunkSink>,
        size: u64,
        plan: MirrorPlan,
        journal: Option<&mut Journal>,
    ) -> Self {
        let mut copier = Self { peer: Some(plan.peer), ..Self::new(sink, size) };
        let common = plan.theirs.and_then(|theirs| {
            let journal = journal.ok_or("this host keeps no record of the disk")?;
            let none = "its copy and this host's have no checkpoint in common".to_owned();
            journal.differing(&theirs).ok_or(none)
        });
        let (base, extents) = match common {
            Ok((base, differing)) => {
                // It may hold anything anywhere.
                copier.sent = Bitmap::full(differing.len());
                copier.chunks_to_copy = differing.ones();
                let extents = extents_of(&differing, size).to_bytes();
                copier.pending = differing;
                (Some(base), extents)
            }
            Err(why) => {
                copier.whole_because = Some(why);
                (None, Vec::new())
            }
        };
        copier.ready.push_back(CopyItem::Start { base, extents });
        let pace = |limit| Pace { limit, since: Instant::now(), sent: 0 };
        copier.pace = plan.limit.map(pace);
        copier
    }

    /// What the receiver is to be told of the contents that the copy ends with.
    pub(super) fn state(&mut self, statements: Vec<Statement>) {
        self.statements = Some(statements);
    }

    /// Of the contents as they are now: all of them, or the chunks in `changed`, which the receiver may hold other contents
    /// for.
    pub(super) fn frozen(
        sink: Box<dyn ChunkSink>,
        size: u64,
        changed: Option<Bitmap>,
        point: u64,
    ) -> Self {
        let mut copier = Self { delays_writes: true, ..Self::new(sink, size) };
        if let Some(changed) = changed {
            copier.sent = changed.clone();
            copier.pending = changed;
        }
        copier.freeze(point);
        copier
    }

    pub(super) fn progress(&self) -> CopyProgress {
        CopyProgress {
            phase: self.phase,
            chunks_total: self.pending.len(),
            chunks_pending: self.pending.ones(),
            chunks_sent: self.chunks_sent,
            peer: self.peer.clone(),
            whole_because: self.whole_because.clone(),
            bytes_to_copy: self.chunks_to_copy.saturating_mul(CHUNK_BYTES).min(self.size),
            passes: self.passes,
            error: self.error.clone(),
        }
    }

    pub(super) fn freeze(&mut self, point: u64) {
        match self.phase {
            CopyPhase::Passes | CopyPhase::Converged => {
                self.phase = CopyPhase::Frozen;
                self.point = point;
                self.cursor = 0;
            }
            CopyPhase::Frozen | CopyPhase::Done | CopyPhase::Failed => {}
        }
    }

    /// The range is about to be written.
    pub(super) fn before_write(&mut self, image: &Image, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        for index in offset / CHUNK_BYTES..=(offset + len - 1) / CHUNK_BYTES {
            match self.phase {
                CopyPhase::Passes | CopyPhase::Converged => self.pending.set(index),
                CopyPhase::Frozen if self.pending.get(index) => {
                    if self.has_room() {
                        self.take_chunk(image, index);
                    } else {
                        self.fail("the receiver is too slow for the guest's writes".to_owned());
                    }
                }
                CopyPhase::Frozen | CopyPhase::Done | CopyPhase::Failed => {}
            }
        }
    }

    /// The range was written: what was copied of it meanwhile may be neither the old nor the new contents.
    pub(super) fn after_write(&mut self, offset: u64, len: u64) {
        if len == 0 || !matches!(self.phase, CopyPhase::Passes | CopyPhase::Converged) {
            return;
        }
        for index in offset / CHUNK_BYTES..=(offset + len - 1) / CHUNK_BYTES {
            self.pending.set(index);
        }
    }

    /// Whether a chunk more can be saved.
    fn has_room(&mut self) -> bool {
        let start = Instant::now();
        while self.ready.len() >= SAVED_CHUNKS_MAX {
            if !self.delays_writes || start.elapsed() >= PATIENCE {
                return false;
            }
            if let Some(Step::SinkFull) = self.offer_ready() {
                std::thread::sleep(SINK_FULL_WAIT);
            }
        }
        true
    }

    /// Sends for a while: less where requests come, which wait for it.
    pub(super) fn step(&mut self, image: &Image, is_busy: bool) -> Step {
        let mut looks = LOOKS_PER_SLICE;
        for _ in 0..if is_busy { 1 } else { CHUNKS_PER_SLICE } {
            if let Some(step) = self.offer_ready() {
                return step;
            }
            match self.phase {
                CopyPhase::Converged => return Step::Waiting,
                CopyPhase::Done | CopyPhase::Failed => return Step::Ended,
                CopyPhase::Passes if self.pace.as_mut().is_some_and(|pace| !pace.may_send()) => {
                    return Step::SinkFull;
                }
                CopyPhase::Passes | CopyPhase::Frozen => {
                    match self.next_pending(image, &mut looks) {
                        Some(index) => self.take_chunk(image, index),
                        None if looks == 0 => return Step::More,
                        None => self.end_of_pass(),
                    }
                }
            }
        }
        self.offer_ready().unwrap_or(Step::More)
    }

    /// Offers what is ready; says how to go on when the sink did not take it all.
    fn offer_ready(&mut self) -> Option<Step> {
        while let Some(item) = self.ready.pop_front() {
            let last = matches!(item, CopyItem::End { .. } | CopyItem::Failed { .. });
            let is_chunk = matches!(item, CopyItem::Chunk { .. } | CopyItem::Zero { .. });
            match self.sink.offer(item) {
                Ok(()) if last => return Some(Step::Ended),
                Ok(()) => self.chunks_sent += u64::from(is_chunk),
                Err(Refused::Full(item)) => {
                    self.ready.push_front(item);
                    return Some(Step::SinkFull);
                }
                Err(Refused::Gone) => {
                    self.fail("the receiver is gone".to_owned());
                    return Some(Step::Ended);
                }
            }
        }
        None
    }

    /// The next pending chunk of this pass that may hold anything; holes that were never sent are passed over.
    fn next_pending(&mut self, image: &Image, looks: &mut u32) -> Option<u64> {
        while *looks > 0 {
            *looks -= 1;
            let index = self.pending.next(self.cursor)?;
            if self.sent.get(index) {
                self.cursor = index + 1;
                return Some(index);
            }
            let data = image.next_data(index * CHUNK_BYTES).map_or(u64::MAX, |d| d / CHUNK_BYTES);
            if data <= index {
                self.cursor = index + 1;
                return Some(index);
            }
            // Everything before `data` is a hole, so what was not sent needs no sending.
            let end = data.min(self.sent.next(index).unwrap_or(u64::MAX)).min(self.pending.len());
            self.pending.clear_range(index, end);
            self.cursor = end;
        }
        None
    }

    fn end_of_pass(&mut self) {
        self.cursor = 0;
        if self.phase == CopyPhase::Frozen {
            if self.pending.ones() == 0 {
                self.phase = CopyPhase::Done;
                let statements = self.statements.take();
                self.ready.extend(statements.map(|statements| CopyItem::Stated { statements }));
                self.ready.push_back(CopyItem::End { point: self.point });
            }
            return;
        }
        self.passes += 1;
        if self.pending.ones() <= PENDING_FEW || self.passes >= PASSES_MAX {
            self.phase = CopyPhase::Converged;
        }
    }

    /// Reads a pending chunk as it is now and makes it ready to be sent.
    fn take_chunk(&mut self, image: &Image, index: u64) {
        let offset = index * CHUNK_BYTES;
        let len = (self.size - offset).min(CHUNK_BYTES);
        match image.read(offset, usize::try_from(len).unwrap_or(usize::MAX)) {
            Ok(data) => {
                self.pending.clear(index);
                if let Some(pace) = &mut self.pace {
                    pace.sent += len;
                }
                if data.iter().any(|b| *b != 0) {
                    self.sent.set(index);
                    self.ready.push_back(CopyItem::Chunk { index, data });
                } else if self.sent.get(index) {
                    self.ready.push_back(CopyItem::Zero { index });
                }
            }
            Err(reason) => self.fail(reason),
        }
    }

    fn fail(&mut self, reason: String) {
        self.phase = CopyPhase::Failed;
        self.ready.clear();
        self.ready.push_back(CopyItem::Failed { reason: reason.clone() });
        self.error = Some(reason);
    }
}

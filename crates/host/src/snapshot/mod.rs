//! Snapshots in files: a whole machine at one position of its log, or what changed in it since another snapshot.
//!
//! # Place
//! [`Sweep`] takes one of a machine that runs on: the thread that owns the machine arms the copy-on-write of its memory and
//! hands pages to a thread that compresses and writes them. Recordings begin their segments with snapshots, and people
//! take them by name. [`chain`] makes machines from them.
//!
//! # Invariants
//! - INV-SNAPSHOT-1: a file under its final name is complete: it is written beside it, synced, then renamed.
//! - INV-SNAPSHOT-2: a snapshot with a parent holds every page and every chunk of a disk that differs from the parent's,
//!   those that are all zero now included; one without holds all that are not zero.
//! - INV-SNAPSHOT-3: the machine's thread never waits for a file.
//!
//! # Failure
//! A damaged file is refused with what is wrong in it. A disk that is full ends the snapshot, never the machine.
//!
//! # Format
//! In [`file`]. Nobody but the owner may read the files: guest memory is in them.

pub mod chain;
pub mod file;
pub mod store;
mod sweep;

use std::path::{Path, PathBuf};

use eventlog::{ClockBase, LogPos};
use machine::ram::{PAGE_SIZE, is_zero};
use machine::{Machine, MachineSaved};
use serde::{Deserialize, Serialize};

pub use self::file::{SnapshotError, SnapshotItem, SnapshotReader, SnapshotWriter};
pub(crate) use self::sweep::{GIVEN_UP, Sweep, Taken, Written};

/// Pages of memory that are handed to a writer at a time.
const PAGES_PER_PART: usize = 128;
/// Bytes of a SHA-256.
pub const HASH_BYTES: usize = 32;

/// What a snapshot is known by to those that build on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// One that no other snapshot has.
    ///
    /// # Errors
    /// The kernel gave no random numbers.
    pub fn random() -> Result<Self, String> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| format!("no random numbers from the kernel: {e}"))?;
        Ok(Self(id))
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a snapshot is of: everything but pages and chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotHead {
    /// Its identity.
    pub id: SnapshotId,
    /// The snapshot that it builds on.
    pub parent: Option<SnapshotId>,
    /// What people call it; empty in a recording.
    pub name: String,
    /// When it was taken, in milliseconds since the Unix epoch.
    pub taken_unix_ms: u64,
    /// Position in the log.
    pub pos: LogPos,
    /// Clock base for a log that goes on from there: guest time, icount, rate.
    pub clock: (u64, u64, u32),
    /// Harts, devices, configuration.
    pub saved: MachineSaved,
    /// Kernel command line.
    pub append: String,
    /// SHA-256 of firmware, kernel and initial RAM disk, as far as there are any.
    pub images: [Option<[u8; HASH_BYTES]>; 3],
    /// Sizes of the disks whose contents are in it, in bytes; empty when it has no disks.
    pub disks: Vec<u64>,
    /// The VM's definition: text and file.
    pub definition: Option<(String, PathBuf)>,
}

impl SnapshotHead {
    /// Of a machine at `pos`, with its memory alone; `clock` is the log's there.
    ///
    /// # Errors
    /// The kernel gave no random numbers.
    pub fn of(machine: &mut Machine, pos: LogPos, clock: ClockBase) -> Result<Self, String> {
        Ok(Self {
            id: SnapshotId::random()?,
            parent: None,
            name: String::new(),
            taken_unix_ms: crate::recording::unix_ms(),
            pos,
            clock: (clock.mtime, clock.at, clock.rate),
            append: machine.images().append.clone(),
            images: [None; 3],
            disks: Vec::new(),
            definition: None,
            saved: machine.save(),
        })
    }

    /// The log's clock base.
    #[must_use]
    pub fn clock_base(&self) -> ClockBase {
        let (mtime, at, rate) = self.clock;
        ClockBase { mtime, at, rate }
    }
}

/// Writes a machine that stands still to a file; says how long that is.
///
/// # Errors
/// [`SnapshotError`]; nothing of it is left.
pub fn write_machine(
    path: &Path,
    head: &SnapshotHead,
    machine: &Machine,
) -> Result<u64, SnapshotError> {
    let mut writer = SnapshotWriter::create(path, head)?;
    let pages = (0u32..).zip(machine.ram().bytes().chunks(PAGE_SIZE));
    let mut pages = pages.filter(|(_, data)| !is_zero(data)).peekable();
    while pages.peek().is_some() {
        let part = pages.by_ref().take(PAGES_PER_PART);
        let part: Vec<_> = part.map(|(page, data)| (page, Some(data.into()))).collect();
        writer.pages_of(&part)?;
    }
    writer.finish()
}

//! The event log: everything nondeterministic that entered a machine, in order, each entry with its position.
//!
//! # Place
//! Written by the primary's run loop, read by the secondary's and by replay. [`Encoder`] and [`Decoder`] turn records
//! into a byte stream and back, [`SegmentWriter`] and [`SegmentReader`] put that stream into files. All of it works on
//! byte buffers; the host shell does the reading and writing.
//!
//! # Invariants
//! - INV-LOG-1: icount never decreases from record to record.
//! - INV-LOG-2: decoding what was encoded from the same [`LogPos`] and [`ClockBase`] gives the same records.
//! - INV-LOG-3: no byte sequence makes a reader panic, or hold more memory than it was given.
//!
//! # Format
//! The byte layouts are in [`codec`] and [`segment`]; both belong to [`FORMAT_VERSION`].

#![forbid(unsafe_code)]

use machine::io::{BlkStatus, Input};
use serde::{Deserialize, Serialize};

pub mod codec;
pub mod segment;

pub use codec::{AppendError, ClockBase, DATA_MAX, DecodeError, Decoder, Encoder};
pub use segment::{
    HEADER_BYTES, MAX_FRAME, SegmentEnd, SegmentError, SegmentHeader, SegmentReader, SegmentWriter,
};

/// Version of the record encoding and of the segment layout.
pub const FORMAT_VERSION: u32 = 2;

/// A place in the log.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct LogPos {
    /// Number of records before this place, counted since the machine was created.
    pub lsn: u64,
    /// Icount of the last of them.
    pub icount: u64,
}

impl std::fmt::Display for LogPos {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.lsn, self.icount)
    }
}

/// One record of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Position at which the entry applies.
    pub icount: u64,
    /// What happens there.
    pub entry: Entry,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// An input with everything that it carries.
    Input(Input),
    /// A block read ended with [`BlkStatus::Ok`]; each replica takes the data from its own copy of the disk.
    BlkReadLocal {
        /// Index of the block device.
        dev: u8,
        /// Request id.
        id: u64,
    },
    /// The secondary may run up to here.
    Mark,
    /// Digest of the guest-visible state at this position.
    Digest(u64),
}

impl Entry {
    /// The entry that stands for `input` on a mirrored disk, where that is another one: data of a successful read stay
    /// out of the log.
    #[must_use]
    pub fn mirrored(input: &Input) -> Option<Self> {
        match input {
            Input::BlkDone { dev, id, status: BlkStatus::Ok, data } if !data.is_empty() => {
                Some(Self::BlkReadLocal { dev: *dev, id: *id })
            }
            Input::BlkDone { .. }
            | Input::Clock { .. }
            | Input::NetRx { .. }
            | Input::Console { .. }
            | Input::Entropy { .. }
            | Input::PowerOff
            | Input::DiskResized { .. } => None,
        }
    }
}

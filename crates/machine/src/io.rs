//! What crosses the machine's border: inputs that enter it at a position, outputs that leave it.
//!
//! # Determinism
//! Everything nondeterministic that the guest can see is one of [`Input`]; each is logged with the icount at which it
//! was applied. Outputs are a function of the state and carry the icount of the instruction that made them, which is
//! how two replicas name the same output.

use serde::{Deserialize, Serialize};

/// Most bytes of data of a block request that reads. U-Boot reads a whole initial RAM disk by one request.
pub const BLK_READ_MAX: usize = 60 << 20;

/// Ticks of guest time (`mtime`) for each 2^16 steps; see [`Input::Clock`].
pub type ClockRate = u32;

/// An input, applied at a position of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// From here on `mtime` is `mtime + ((icount - here) * rate >> 16)`. A value behind the present `mtime` counts as
    /// the present one: guest time never goes back.
    Clock {
        /// Guest time in ticks of 100 ns.
        mtime: u64,
        /// Ticks for each 2^16 steps from here on.
        rate: ClockRate,
    },
    /// A packet from the network. The device drops what the guest has no buffers for, and what it did not accept to do.
    NetRx {
        /// Index of the network device.
        dev: u8,
        /// A frame with its header, see [`crate::offload`].
        packet: Vec<u8>,
    },
    /// A block request is complete.
    BlkDone {
        /// Index of the block device.
        dev: u8,
        /// Request id, from [`OutputKind::Blk`].
        id: u64,
        /// How it ended.
        status: BlkStatus,
        /// The data of a read that ended with [`BlkStatus::Ok`]; empty otherwise.
        data: Vec<u8>,
    },
    /// Bytes typed at a console. Device 0 is the UART, device `n` the `n-1`th virtio console.
    Console {
        /// Console index.
        dev: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Random bytes for an entropy device that asked for them.
    Entropy {
        /// Index of the entropy device.
        dev: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The operator wants the machine powered off at once.
    PowerOff,
    /// A disk has grown; what is new reads as zeroes.
    DiskResized {
        /// Index of the block device.
        dev: u8,
        /// Its size in bytes from here on: more than before.
        size: u64,
    },
}

/// How a block request ended; virtio 1.2 section 5.2.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlkStatus {
    /// VIRTIO_BLK_S_OK
    Ok,
    /// VIRTIO_BLK_S_IOERR
    IoErr,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported,
}

/// An output and where in the machine's run it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Icount after the instruction that made it.
    pub icount: u64,
    /// What leaves the machine.
    pub kind: OutputKind,
}

/// What leaves the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputKind {
    /// A packet to send.
    NetTx {
        /// Index of the network device.
        dev: u8,
        /// A frame with its header, which the device has checked; see [`crate::offload`].
        packet: Vec<u8>,
    },
    /// A block request. The device keeps it until its [`Input::BlkDone`]. A request never overlaps an outstanding
    /// one where either of the two writes, so that the order of execution does not matter.
    Blk {
        /// Index of the block device.
        dev: u8,
        /// Request id, unique for the device.
        id: u64,
        /// What to do.
        op: BlkOp,
    },
    /// Bytes for a console; indices as in [`Input::Console`].
    Console {
        /// Console index.
        dev: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// An entropy device wants random bytes: answer with [`Input::Entropy`].
    EntropyWanted {
        /// Index of the entropy device.
        dev: u8,
        /// How many.
        len: u32,
    },
}

impl OutputKind {
    /// Whether somebody outside waits for it, so that it is worth leaving the run loop at once.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        !matches!(self, Self::Console { .. })
    }
}

/// What a block request asks for; offsets and lengths in bytes, multiples of 512.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlkOp {
    /// Read `len` bytes.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Write `data`.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// The bytes, as they were when the guest made the request.
        data: Vec<u8>,
    },
    /// Make all completed writes durable.
    Flush,
    /// The range is no longer needed; it may be read as anything that every replica agrees on: zeroes.
    Discard {
        /// Byte offset on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Byte offset on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Why the machine does not run any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HaltReason {
    /// The guest powered off; the code is the test finisher's (0 = pass).
    PowerOff {
        /// Exit code that the guest gave.
        code: u16,
    },
    /// The operator powered the machine off.
    Operator,
    /// The guest did something that the machine cannot go on from.
    GuestFault {
        /// One line for people.
        reason: String,
    },
}

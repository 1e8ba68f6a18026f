//! The saved form of every device: what a snapshot carries and a digest covers.
//!
//! # Format
//! Encoded by postcard in the order of the fields. Changing anything here changes the format of snapshots.
//!
//! # Failure
//! A saved state may come from a peer: loading checks whatever the devices rely on and refuses the rest.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::BoardRequest;
use super::plic::WORDS;
use crate::io::BlkOp;

/// Why a saved state cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadBoardError {
    /// Another number of slots.
    #[error("the saved board has {found} virtio slots instead of {expected}")]
    Slots {
        /// Slots of the board.
        expected: usize,
        /// Slots in the saved state.
        found: usize,
    },
    /// A device is in a state that it cannot be in.
    #[error("the saved state of the {0} is not one that it can be in")]
    Device(&'static str),
}

/// Saved state of the whole board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardSaved {
    /// Interrupt controller.
    pub plic: PlicState,
    /// Software interrupts and comparators.
    pub clint: ClintState,
    /// UART.
    pub uart: UartState,
    /// Real-time clock.
    pub rtc: RtcState,
    /// virtio-mmio slots.
    pub slots: Vec<SlotSaved>,
    /// Request to the machine that was not taken yet.
    pub request: Option<BoardRequest>,
}

/// State of the PLIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlicState {
    /// Priority of each source.
    pub priority: Vec<u32>,
    /// Enabled sources of each context.
    pub enable: Vec<[u32; WORDS]>,
    /// Threshold of each context.
    pub threshold: Vec<u32>,
    /// Sources that were claimed and not completed.
    pub claimed: [u32; WORDS],
}

/// State of the CLINT, an entry for each hart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClintState {
    /// Software interrupt.
    pub msip: Vec<bool>,
    /// Timer comparator.
    pub mtimecmp: Vec<u64>,
}

/// State of the real-time clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// How far the guest has set the clock ahead, wrapping.
    pub offset_ns: u64,
    /// Upper half of the time that was last read.
    pub time_high: u32,
    /// Time of the alarm as written.
    pub alarm_ns: u64,
    /// When the alarm goes off, if it is armed.
    pub alarm_mtime: Option<u64>,
    /// Interrupt enable.
    pub irq_enabled: bool,
    /// Whether the alarm went off.
    pub irq_pending: bool,
}

/// State of the UART.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    /// Interrupt enable.
    pub ier: u8,
    /// FIFO control.
    pub fcr: u8,
    /// Line control.
    pub lcr: u8,
    /// Modem control.
    pub mcr: u8,
    /// Scratch.
    pub scr: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// Whether a byte was lost since the line status was last read.
    pub overrun: bool,
    /// Whether the interrupt of the empty holding register pends.
    pub thr_pending: bool,
    /// Receive FIFO.
    pub fifo: VecDeque<u8>,
    /// Bytes that wait for room in the FIFO.
    pub input: VecDeque<u8>,
}

/// Saved state of a virtio-mmio slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotSaved {
    /// Transport registers.
    pub transport: TransportState,
    /// Device.
    pub device: DeviceSaved,
}

/// Saved state of the device in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceSaved {
    /// No device.
    Empty,
    /// Network.
    Net(NetState),
    /// Block.
    Blk(BlkState),
    /// Console.
    Console(ConsoleState),
    /// Entropy.
    Rng(RngState),
    /// Block, of another size than in the machine's configuration.
    ResizedBlk(ResizedBlkState),
}

/// State of the registers of a virtio-mmio slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status.
    pub status: u8,
    /// Interrupt status.
    pub interrupt: u8,
    /// Selected word of the device's features.
    pub device_features_sel: u32,
    /// Selected word of the driver's features.
    pub driver_features_sel: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Selected queue.
    pub queue_sel: u32,
    /// Queues.
    pub queues: Vec<QueueState>,
}

/// State of a virtqueue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries: a power of two up to the device's maximum.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Index of the next available entry to take.
    pub next_avail: u16,
    /// Index of the next used entry to write.
    pub next_used: u16,
}

/// A piece of guest memory that belongs to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// First address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
}

/// State of a network device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Packets that found no buffer, or that the driver could not take, wrapping.
    pub rx_dropped: u64,
    /// Packets whose length or header was bad, wrapping.
    pub tx_dropped: u64,
}

/// State of a block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Id of the next request.
    pub next_id: u64,
    /// Requests that are not complete, by increasing id.
    pub requests: VecDeque<BlkRequest>,
}

/// State of a block device that has grown since power-on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizedBlkState {
    /// Everything else.
    pub blk: BlkState,
    /// Size in bytes.
    pub size: u64,
    /// How often it has grown, wrapping.
    pub resizes: u32,
}

/// A block request that is not complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkRequest {
    /// Its id.
    pub id: u64,
    /// What to do.
    pub op: BlkOp,
    /// Whether it has left the machine; otherwise it waits for an earlier one that it overlaps.
    pub issued: bool,
    /// Where the answer goes; none when the device was reset since.
    pub reply: Option<BlkReply>,
}

/// Where the answer to a block request goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkReply {
    /// Head of the descriptor chain.
    pub head: u16,
    /// Memory for the data of a read.
    pub data: Vec<Segment>,
    /// Address of the status byte.
    pub status: u64,
}

/// State of a console.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Bytes that wait for a buffer of the guest.
    pub input: VecDeque<u8>,
}

/// State of an entropy device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// The buffer that waits for bytes.
    pub wanted: Option<RngRequest>,
}

/// A buffer that waits for random bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngRequest {
    /// Head of the descriptor chain.
    pub head: u16,
    /// Bytes wanted.
    pub len: u32,
    /// Where they go.
    pub data: Vec<Segment>,
}

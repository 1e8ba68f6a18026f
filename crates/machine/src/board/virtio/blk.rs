//! virtio block device: requests leave the machine in an order that makes their order of execution irrelevant.
//!
//! # States
//! ```text
//! notify → waiting (overlaps an earlier request) → issued (left the machine) → done
//!    └──────────────────────────────────────────────↗  └ device reset: issued, without reply → done, unseen
//! ```
//!
//! # Invariants
//! - INV-BLK-1: of two requests that overlap, one of them writing, the later one is issued when the earlier one is
//!   done, also across a reset of the device or the machine. A flush covers completed writes only, so it never waits.
//! - INV-BLK-2: ids count up over the whole life of the machine.
//! - INV-BLK-4: a disk never shrinks, so a request that was on it stays on it; it keeps its size when the guest resets.
//! - INV-BLK-3: the device holds at most [`REQUESTS_MAX`] requests and takes none while it holds
//!   [`DATA_MAX`] bytes of data or more; the rest stay in the queue.
//!
//! # References
//! virtio 1.2 section 5.2.

use crate::board::state::{
    BlkReply, BlkRequest, BlkState, DeviceSaved, LoadBoardError, ResizedBlkState, Segment,
};
use crate::board::{ApplyError, BusCtx};
use crate::config::DiskConfig;
use crate::io::{BLK_READ_MAX, BlkOp, BlkStatus, OutputKind};

use super::queue::{Chain, gather, part, scatter, total};
use super::transport::Transport;

pub(super) const QUEUE_MAX: u16 = 128;
pub(super) const REQUESTS: usize = 0;

const REQUESTS_MAX: usize = QUEUE_MAX as usize;
const DATA_MAX: usize = 32 << 20;
/// Most bytes of data of a write, and of a read by a driver that heeds [`SIZE_MAX`] and [`SEG_MAX`].
const TRANSFER_MAX: u64 = 4 << 20;
/// Most bytes of data of any read.
const READ_MAX: u64 = BLK_READ_MAX as u64;
const SECTOR: u64 = 512;
const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
const ID_BYTES: usize = 20;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Segments of a request, and bytes of each: together they stay below [`TRANSFER_MAX`].
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = 32 << 10;
/// Sectors of a discard or write-zeroes request: 1 GiB.
const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// What a request comes to before it is queued.
enum Parsed {
    /// It goes out.
    Op(BlkOp),
    /// It is answered at once, with data.
    Answer(Vec<u8>),
    /// It fails at once.
    Fail(BlkStatus),
}

#[derive(Debug)]
pub(super) struct Blk {
    index: u8,
    size: u64,
    /// How often it has grown since power-on, wrapping.
    resizes: u32,
    readonly: bool,
    serial: [u8; ID_BYTES],
    state: BlkState,
}

impl Blk {
    pub(super) fn new(index: u8, config: &DiskConfig) -> Self {
        let mut serial = [0; ID_BYTES];
        serial.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        let size = config.size;
        let (readonly, state) = (config.readonly, BlkState::default());
        Self { index, size, resizes: 0, readonly, serial, state }
    }

    pub(super) fn index(&self) -> u8 {
        self.index
    }

    pub(super) fn features(&self) -> u64 {
        let access = if self.readonly { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | access
    }

    pub(super) fn config_space(&self) -> Vec<u8> {
        let mut space = vec![0; 60];
        let mut put = |at: usize, value: u32| {
            space[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        let sectors = self.size / SECTOR;
        put(0, sectors as u32);
        put(4, (sectors >> 32) as u32);
        put(8, SIZE_MAX);
        put(12, SEG_MAX);
        put(20, SECTOR as u32);
        if !self.readonly {
            put(36, RANGE_SECTORS_MAX);
            put(40, 1);
            put(44, 1);
            put(48, RANGE_SECTORS_MAX);
            put(52, 1);
            put(56, 1);
        }
        space
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The generation of its configuration space.
    pub(super) fn generation(&self) -> u32 {
        self.resizes
    }

    /// It is bigger from here on.
    pub(super) fn grow(&mut self, size: u64, transport: &mut Transport) -> Result<(), ApplyError> {
        if size <= self.size || !size.is_multiple_of(SECTOR) {
            return Err(ApplyError::DiskSize { dev: self.index, size, present: self.size });
        }
        self.size = size;
        self.resizes = self.resizes.wrapping_add(1);
        transport.config_changed();
        Ok(())
    }

    pub(super) fn save(&self) -> DeviceSaved {
        let (blk, size, resizes) = (self.state.clone(), self.size, self.resizes);
        if resizes == 0 {
            return DeviceSaved::Blk(blk);
        }
        DeviceSaved::ResizedBlk(ResizedBlkState { blk, size, resizes })
    }

    /// As [`Self::load`], for a disk that has grown since it was made.
    pub(super) fn load_resized(&mut self, saved: &ResizedBlkState) -> Result<(), LoadBoardError> {
        if saved.size <= self.size || !saved.size.is_multiple_of(SECTOR) || saved.resizes == 0 {
            return Err(LoadBoardError::Device("virtio block device"));
        }
        (self.size, self.resizes) = (saved.size, saved.resizes);
        self.load(&saved.blk)
    }

    pub(super) fn load(&mut self, state: &BlkState) -> Result<(), LoadBoardError> {
        let requests = &state.requests;
        let ids = requests.iter().map(|r| r.id).chain([state.next_id]);
        let is_good = |(at, request): (usize, &BlkRequest)| {
            let blocked = requests.iter().take(at).any(|r| conflict(&r.op, &request.op));
            let data = request.reply.as_ref().map_or(Some(expected(&request.op)), |reply| {
                (reply.data.len() <= REQUESTS_MAX).then(|| total(&reply.data))
            });
            request.issued != blocked
                && (request.issued || request.reply.is_some())
                && data == Some(expected(&request.op))
                && self.is_possible(&request.op)
        };
        let data_held: usize = requests.iter().map(held_bytes).sum();
        if requests.len() > REQUESTS_MAX
            || data_held > DATA_MAX + READ_MAX as usize
            || !ids.is_sorted_by(|a, b| a < b)
            || !requests.iter().enumerate().all(is_good)
        {
            return Err(LoadBoardError::Device("virtio block device"));
        }
        self.state = state.clone();
        Ok(())
    }

    /// Whether the operation can have passed the checks of a request.
    fn is_possible(&self, op: &BlkOp) -> bool {
        let Some((offset, len)) = range(op) else { return true };
        let len_max = match op {
            BlkOp::Read { .. } => READ_MAX,
            BlkOp::Write { .. } => TRANSFER_MAX,
            _ => u64::from(RANGE_SECTORS_MAX) * SECTOR,
        };
        self.is_on_disk(offset, len) && (is_read(op) || !self.readonly) && len <= len_max
    }

    fn is_on_disk(&self, offset: u64, len: u64) -> bool {
        len != 0
            && len.is_multiple_of(SECTOR)
            && offset.is_multiple_of(SECTOR)
            && offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// The guest takes no more answers: what has left the machine stays until it is done, the rest never happened.
    pub(super) fn reset(&mut self) {
        self.state.requests.retain(|request| request.issued);
        self.state.requests.iter_mut().for_each(|request| request.reply = None);
    }

    pub(super) fn outstanding(&self) -> Vec<OutputKind> {
        let issued = self.state.requests.iter().filter(|request| request.issued);
        issued.map(|r| OutputKind::Blk { dev: self.index, id: r.id, op: r.op.clone() }).collect()
    }

    /// Takes requests from the queue as long as there is room.
    pub(super) fn run(&mut self, transport: &mut Transport, ctx: &mut BusCtx<'_>) {
        let mut held: usize = self.state.requests.iter().map(held_bytes).sum();
        for _ in 0..transport.chains_max(REQUESTS) {
            if self.state.requests.len() >= REQUESTS_MAX || held >= DATA_MAX {
                break;
            }
            let Some(chain) = transport.pop(REQUESTS, ctx.ram) else { break };
            let Some(status_at) = total(&chain.writable).checked_sub(1) else {
                // Without a byte for the status there is nothing to tell.
                transport.push(REQUESTS, chain.head, 0, ctx.ram);
                continue;
            };
            let data = part(&chain.writable, 0, status_at);
            let status = part(&chain.writable, status_at, 1).first().map_or(0, |s| s.gpa);
            let mut reply = BlkReply { head: chain.head, data, status };
            match self.parse(&chain, &reply.data, ctx) {
                Parsed::Op(op) => {
                    if !is_read(&op) {
                        reply.data.clear();
                    }
                    held += self.submit(op, reply, ctx);
                }
                Parsed::Answer(data) => finish(&reply, BlkStatus::Ok, &data, transport, ctx),
                Parsed::Fail(status) => finish(&reply, status, &[], transport, ctx),
            }
        }
        transport.want_notify(REQUESTS, ctx.ram);
    }

    fn parse(&self, chain: &Chain, data_in: &[Segment], ctx: &BusCtx<'_>) -> Parsed {
        let io_err = Parsed::Fail(BlkStatus::IoErr);
        let Some(len_out) = total(&chain.readable).checked_sub(HEADER_BYTES) else { return io_err };
        let header = gather(&part(&chain.readable, 0, HEADER_BYTES), ctx.ram);
        let kind = le_u32(&header, 0);
        let offset = le_u64(&header, 8).checked_mul(SECTOR);
        let len_in = total(data_in);
        let out = |len: u64| gather(&part(&chain.readable, HEADER_BYTES, len), ctx.ram);
        let writes = matches!(kind, T_OUT | T_DISCARD | T_WRITE_ZEROES);
        if writes && self.readonly {
            return io_err;
        }
        match kind {
            T_IN | T_OUT => {
                let len = if kind == T_IN { len_in } else { len_out };
                let Some(offset) = offset.filter(|&o| self.is_on_disk(o, len)) else {
                    return io_err;
                };
                if len > if kind == T_IN { READ_MAX } else { TRANSFER_MAX } {
                    return io_err;
                }
                Parsed::Op(if kind == T_IN {
                    BlkOp::Read { offset, len: len as u32 }
                } else {
                    BlkOp::Write { offset, data: out(len) }
                })
            }
            T_FLUSH => Parsed::Op(BlkOp::Flush),
            T_GET_ID if len_in >= ID_BYTES as u64 => Parsed::Answer(self.serial.to_vec()),
            T_GET_ID => io_err,
            T_DISCARD | T_WRITE_ZEROES if len_out == RANGE_BYTES => {
                self.parse_range(kind, &out(RANGE_BYTES))
            }
            T_DISCARD | T_WRITE_ZEROES => io_err,
            _ => Parsed::Fail(BlkStatus::Unsupported),
        }
    }

    fn parse_range(&self, kind: u32, range: &[u8]) -> Parsed {
        let (sectors, flags) = (le_u32(range, 8), le_u32(range, 12));
        let len = u64::from(sectors) * SECTOR;
        // Bit 0 allows a write of zeroes to unmap; everything else is unknown.
        let known = if kind == T_WRITE_ZEROES { 1 } else { 0 };
        if flags & !known != 0 {
            return Parsed::Fail(BlkStatus::Unsupported);
        }
        let offset = le_u64(range, 0).checked_mul(SECTOR);
        match offset.filter(|&o| self.is_on_disk(o, len) && sectors <= RANGE_SECTORS_MAX) {
            None => Parsed::Fail(BlkStatus::IoErr),
            Some(offset) if kind == T_DISCARD => Parsed::Op(BlkOp::Discard { offset, len }),
            Some(offset) => Parsed::Op(BlkOp::WriteZeroes { offset, len }),
        }
    }

    /// Queues a request and issues it unless it has to wait; returns the bytes of data that it holds.
    fn submit(&mut self, op: BlkOp, reply: BlkReply, ctx: &mut BusCtx<'_>) -> usize {
        let id = self.state.next_id;
        self.state.next_id = id.wrapping_add(1);
        let request = BlkRequest { id, op, issued: false, reply: Some(reply) };
        let held = held_bytes(&request);
        self.state.requests.push_back(request);
        self.issue(self.state.requests.len() - 1, ctx);
        held
    }

    /// Issues the requests from `first` on that no earlier one holds back.
    fn issue(&mut self, first: usize, ctx: &mut BusCtx<'_>) {
        for at in first..self.state.requests.len() {
            let request = &self.state.requests[at];
            let mut earlier = self.state.requests.iter().take(at);
            if request.issued || earlier.any(|r| conflict(&r.op, &request.op)) {
                continue;
            }
            let (id, op) = (request.id, request.op.clone());
            self.state.requests[at].issued = true;
            ctx.emit(OutputKind::Blk { dev: self.index, id, op });
        }
    }

    /// A request is done.
    pub(super) fn done(
        &mut self,
        id: u64,
        status: BlkStatus,
        data: &[u8],
        transport: &mut Transport,
        ctx: &mut BusCtx<'_>,
    ) -> Result<(), ApplyError> {
        let dev = self.index;
        let at = self.state.requests.iter().position(|r| r.id == id && r.issued);
        let at = at.ok_or(ApplyError::UnknownRequest { dev, id })?;
        let expected =
            if status == BlkStatus::Ok { expected(&self.state.requests[at].op) } else { 0 };
        if data.len() as u64 != expected {
            return Err(ApplyError::DataLength { dev, id, expected, found: data.len() as u64 });
        }
        if let Some(request) = self.state.requests.remove(at)
            && let Some(reply) = request.reply
        {
            finish(&reply, status, data, transport, ctx);
        }
        self.issue(at, ctx);
        self.run(transport, ctx);
        Ok(())
    }
}

/// Writes data and status into guest memory and hands the chain back.
fn finish(
    reply: &BlkReply,
    status: BlkStatus,
    data: &[u8],
    transport: &mut Transport,
    ctx: &mut BusCtx<'_>,
) {
    let written = scatter(&reply.data, data, ctx.ram);
    let code = match status {
        BlkStatus::Ok => 0,
        BlkStatus::IoErr => 1,
        BlkStatus::Unsupported => 2,
    };
    let byte = Segment { gpa: reply.status, len: 1 };
    let status_written = scatter(&[byte], &[code], ctx.ram);
    transport.push(REQUESTS, reply.head, written + status_written, ctx.ram);
}

fn is_read(op: &BlkOp) -> bool {
    matches!(op, BlkOp::Read { .. })
}

/// Bytes of the disk that an operation touches, as offset and length.
fn range(op: &BlkOp) -> Option<(u64, u64)> {
    match op {
        BlkOp::Read { offset, len } => Some((*offset, u64::from(*len))),
        BlkOp::Write { offset, data } => Some((*offset, data.len() as u64)),
        BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
            Some((*offset, *len))
        }
        BlkOp::Flush => None,
    }
}

/// Whether the order of two operations matters.
fn conflict(a: &BlkOp, b: &BlkOp) -> bool {
    let (Some((a_at, a_len)), Some((b_at, b_len))) = (range(a), range(b)) else { return false };
    let overlap = a_at < b_at.saturating_add(b_len) && b_at < a_at.saturating_add(a_len);
    overlap && !(is_read(a) && is_read(b))
}

/// Bytes of data that come with a completion.
fn expected(op: &BlkOp) -> u64 {
    if let BlkOp::Read { len, .. } = op { u64::from(*len) } else { 0 }
}

/// Bytes of data that a request keeps in memory: a write here, a long read where it is carried out.
fn held_bytes(request: &BlkRequest) -> usize {
    match &request.op {
        BlkOp::Write { data, .. } => data.len(),
        BlkOp::Read { len, .. } if u64::from(*len) > TRANSFER_MAX => *len as usize,
        _ => 0,
    }
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

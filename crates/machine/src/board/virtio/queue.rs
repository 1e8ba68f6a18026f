//! Split virtqueues in guest memory: taking descriptor chains and handing them back.
//!
//! # Failure
//! The guest may put anything there at any time: whatever is not as the specification has it is [`Broken`].

use crate::board::state::{QueueState, Segment};
use crate::ram::{GuestRam, OutsideRam};

const DESC_BYTES: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// The driver broke the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

impl From<OutsideRam> for Broken {
    fn from(_: OutsideRam) -> Self {
        Self
    }
}

/// A request: buffers to read, then buffers to write, all within RAM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) head: u16,
    pub(super) readable: Vec<Segment>,
    pub(super) writable: Vec<Segment>,
}

/// Bytes of all segments together.
pub(super) fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// The part of the segments from byte `skip` on, at most `take` bytes.
pub(super) fn part(segments: &[Segment], mut skip: u64, mut take: u64) -> Vec<Segment> {
    let mut part = Vec::new();
    for s in segments {
        let len = u64::from(s.len);
        let from = skip.min(len);
        skip -= from;
        let bytes = (len - from).min(take);
        take -= bytes;
        if bytes != 0 {
            // At most the length of one segment, which has 32 bits.
            part.push(Segment { gpa: s.gpa.wrapping_add(from), len: bytes as u32 });
        }
    }
    part
}

/// Copies all the segments out of RAM; the caller has bounded [`total`].
pub(super) fn gather(segments: &[Segment], ram: &GuestRam) -> Vec<u8> {
    let mut data = vec![0; total(segments) as usize];
    let mut rest = &mut data[..];
    for s in segments {
        let (piece, tail) = rest.split_at_mut(s.len as usize);
        if ram.read(s.gpa, piece).is_err() {
            // Only a segment from a foreign snapshot can lie outside RAM: it reads as zeroes.
            piece.fill(0);
        }
        rest = tail;
    }
    data
}

/// Copies data into the segments; returns how many bytes found room.
pub(super) fn scatter(segments: &[Segment], data: &[u8], ram: &mut GuestRam) -> u32 {
    let mut rest = data;
    for s in segments {
        let (piece, tail) = rest.split_at(rest.len().min(s.len as usize));
        if ram.write(s.gpa, piece).is_err() {
            break;
        }
        rest = tail;
    }
    (data.len() - rest.len()) as u32
}

pub(super) fn is_aligned(q: &QueueState) -> bool {
    q.desc.is_multiple_of(16) && q.avail.is_multiple_of(2) && q.used.is_multiple_of(4)
}

fn at(base: u64, offset: u64) -> Result<u64, Broken> {
    base.checked_add(offset).ok_or(Broken)
}

/// Takes the next available chain.
pub(super) fn pop(
    q: &mut QueueState,
    indirect: bool,
    ram: &GuestRam,
) -> Result<Option<Chain>, Broken> {
    let available = ram.read_u16(at(q.avail, 2)?)?.wrapping_sub(q.next_avail);
    if available == 0 {
        return Ok(None);
    }
    if available > q.size || q.size == 0 {
        return Err(Broken);
    }
    let slot = u64::from(q.next_avail % q.size);
    let head = ram.read_u16(at(q.avail, 4 + 2 * slot)?)?;
    let chain = walk(q, head, indirect, ram)?;
    q.next_avail = q.next_avail.wrapping_add(1);
    Ok(Some(chain))
}

fn walk(q: &QueueState, head: u16, indirect: bool, ram: &GuestRam) -> Result<Chain, Broken> {
    let mut chain = Chain { head, ..Chain::default() };
    let (mut table, mut entries) = (q.desc, u32::from(q.size));
    let mut index = u32::from(head);
    let mut in_indirect = false;
    // As many steps as there may be buffers, and one for the descriptor that names an indirect table.
    for _ in 0..=q.size {
        if index >= entries {
            return Err(Broken);
        }
        let mut raw = [0; DESC_BYTES as usize];
        ram.read(at(table, u64::from(index) * DESC_BYTES)?, &mut raw)?;
        let (low, high) = raw.split_at(8);
        let gpa = low.try_into().map_or(0, u64::from_le_bytes);
        let len = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
        let flags = u16::from_le_bytes([high[4], high[5]]);
        let next = u16::from_le_bytes([high[6], high[7]]);
        if flags & F_INDIRECT != 0 {
            let count = len / DESC_BYTES as u32;
            let bad_flags = flags & F_NEXT != 0 || in_indirect || !indirect;
            if bad_flags || !len.is_multiple_of(DESC_BYTES as u32) || count == 0 {
                return Err(Broken);
            }
            (table, entries, index, in_indirect) = (gpa, count, 0, true);
            continue;
        }
        add(&mut chain, q, Segment { gpa, len }, flags & F_WRITE != 0, ram)?;
        if flags & F_NEXT == 0 {
            return Ok(chain);
        }
        index = u32::from(next);
    }
    Err(Broken)
}

fn add(
    chain: &mut Chain,
    q: &QueueState,
    segment: Segment,
    writable: bool,
    ram: &GuestRam,
) -> Result<(), Broken> {
    let out_of_order = !writable && !chain.writable.is_empty();
    let too_long = chain.readable.len() + chain.writable.len() >= usize::from(q.size);
    if out_of_order || too_long || ram.offset(segment.gpa, u64::from(segment.len)).is_none() {
        return Err(Broken);
    }
    if writable { &mut chain.writable } else { &mut chain.readable }.push(segment);
    Ok(())
}

/// Hands a chain back; returns whether the driver wants an interrupt.
pub(super) fn push(
    q: &mut QueueState,
    head: u16,
    len: u32,
    event_idx: bool,
    ram: &mut GuestRam,
) -> Result<bool, Broken> {
    if q.size == 0 {
        return Err(Broken);
    }
    let slot = u64::from(q.next_used % q.size);
    let mut element = [0; 8];
    element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
    element[4..].copy_from_slice(&len.to_le_bytes());
    ram.write(at(q.used, 4 + 8 * slot)?, &element)?;
    let old = q.next_used;
    q.next_used = old.wrapping_add(1);
    ram.write(at(q.used, 2)?, &q.next_used.to_le_bytes())?;
    if event_idx {
        // Each push is looked at by itself: the index moves from `old` by one, so it crosses the event just there.
        let used_event = ram.read_u16(at(q.avail, 4 + 2 * u64::from(q.size))?)?;
        return Ok(used_event == old);
    }
    Ok(ram.read_u16(q.avail)? & AVAIL_NO_INTERRUPT == 0)
}

pub(super) fn set_avail_event(q: &QueueState, ram: &mut GuestRam) -> Result<(), Broken> {
    ram.write(at(q.used, 4 + 8 * u64::from(q.size))?, &q.next_avail.to_le_bytes())?;
    Ok(())
}

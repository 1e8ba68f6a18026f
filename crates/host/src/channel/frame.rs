//! Frames with their tags: writer and reader of the format together.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::compress::{self, Packed};
use super::secret::keyed;

/// Longest payload of a frame.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
const HEAD_BYTES: usize = 5;
const TAG_BYTES: usize = 16;
const NUMBER_BYTES: usize = 16;
const KIND_DATA: u8 = 0;
const KIND_GOODBYE: u8 = 1;
const KIND_ACK: u8 = 2;
/// A frame's number and an acknowledgement come first.
const NUMBERED: u8 = 0x10;
/// The payload is compressed.
const COMPRESSED: u8 = 0x20;

/// A frame that is not the peer's next one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is beyond the bound.
    #[error("a frame of {len} bytes is too long")]
    TooLong {
        /// The length given.
        len: u32,
    },
    /// The tag is wrong.
    #[error("frame {sequence} was not sent by the peer, or was changed on its way")]
    NotAuthentic {
        /// Number of the frame in its direction.
        sequence: u64,
    },
    /// A compressed payload is none.
    #[error("frame {sequence} does not decompress")]
    NotCompressed {
        /// Number of the frame in its direction.
        sequence: u64,
    },
    /// A frame is missing.
    #[error("frame {found} of the link came where {expected} was expected")]
    Missing {
        /// The number that it should have.
        expected: u64,
        /// The number that it has.
        found: u64,
    },
    /// The kind is unknown.
    #[error("frame {sequence} has unknown kind {kind}")]
    UnknownKind {
        /// Number of the frame in its direction.
        sequence: u64,
        /// The kind given.
        kind: u8,
    },
}

/// Where a frame is among those of its direction, whatever path each took, and how many of the other direction came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    pub(super) at: u64,
    pub(super) acknowledged: u64,
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    Data(Option<Number>, Vec<u8>),
    Goodbye(Option<Number>),
    /// So many frames of the other direction came.
    Acknowledged(u64),
}

/// What is sent in a frame.
#[derive(Debug, Clone, Copy)]
pub(super) enum Item<'a> {
    Data(Option<Number>, &'a Packed),
    Goodbye(Option<Number>),
    Acknowledged(u64),
}

/// Makes the frames of one direction of one path.
#[derive(Debug)]
pub(super) struct Encoder {
    mac: Hmac<Sha256>,
    sequence: u64,
}

impl Encoder {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self { mac: keyed(key), sequence: 0 }
    }

    /// Appends a frame; the payload is at most [`FRAME_BYTES_MAX`] long.
    pub(super) fn frame(&mut self, item: &Item<'_>, out: &mut Vec<u8>) {
        let start = out.len();
        out.reserve(encoded_len(item));
        let len = u32::try_from(encoded_len(item) - HEAD_BYTES - TAG_BYTES);
        out.extend_from_slice(&len.expect("the caller checked the length").to_le_bytes());
        let mut number = |kind: u8, number: &Option<Number>| {
            out.push(if number.is_some() { kind | NUMBERED } else { kind });
            if let Some(number) = number {
                out.extend_from_slice(&number.at.to_le_bytes());
                out.extend_from_slice(&number.acknowledged.to_le_bytes());
            }
        };
        match item {
            Item::Data(at, packed) => {
                let kind = if packed.length.is_some() { KIND_DATA | COMPRESSED } else { KIND_DATA };
                number(kind, at);
                if let Some(length) = packed.length {
                    out.extend_from_slice(&length.to_le_bytes());
                }
                out.extend_from_slice(&packed.bytes);
            }
            Item::Goodbye(at) => number(KIND_GOODBYE, at),
            Item::Acknowledged(count) => {
                out.push(KIND_ACK);
                out.extend_from_slice(&count.to_le_bytes());
            }
        }
        let tag = tag(&self.mac, self.sequence, &out[start..]).finalize().into_bytes();
        out.extend_from_slice(&tag[..TAG_BYTES]);
        self.sequence += 1;
    }
}

/// Bytes of a frame.
pub(super) fn encoded_len(item: &Item<'_>) -> usize {
    let number = |at: &Option<Number>| if at.is_some() { NUMBER_BYTES } else { 0 };
    let body = match item {
        Item::Data(at, packed) => {
            number(at) + if packed.length.is_some() { 4 } else { 0 } + packed.bytes.len()
        }
        Item::Goodbye(at) => number(at),
        Item::Acknowledged(_) => 8,
    };
    HEAD_BYTES + body + TAG_BYTES
}

fn tag(mac: &Hmac<Sha256>, sequence: u64, framed: &[u8]) -> Hmac<Sha256> {
    mac.clone().chain_update(sequence.to_le_bytes()).chain_update(framed)
}

/// Takes the frames of one direction of one path apart, whatever pieces they come in.
#[derive(Debug)]
pub(super) struct Decoder {
    mac: Hmac<Sha256>,
    sequence: u64,
    buf: Vec<u8>,
    /// Bytes of `buf` that were handed out.
    taken: usize,
}

impl Decoder {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self { mac: keyed(key), sequence: 0, buf: Vec::new(), taken: 0 }
    }

    /// Adds bytes that arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 && (self.taken == self.buf.len() || self.taken >= 1 << 20) {
            self.buf.drain(..self.taken);
            self.taken = 0;
        }
        self.buf.extend_from_slice(bytes);
    }

    /// Whether part of a frame waits for its rest.
    pub(super) fn is_inside_frame(&self) -> bool {
        self.taken < self.buf.len()
    }

    /// The next whole frame.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.buf[self.taken..];
        let Some(head) = rest.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let payload_len = usize::try_from(len).unwrap_or(usize::MAX);
        if payload_len > FRAME_BYTES_MAX + NUMBER_BYTES + 4 {
            return Err(FrameError::TooLong { len });
        }
        let whole = HEAD_BYTES + payload_len + TAG_BYTES;
        let Some(frame) = rest.get(..whole) else { return Ok(None) };
        let (framed, found) = frame.split_at(HEAD_BYTES + payload_len);
        let sequence = self.sequence;
        if tag(&self.mac, sequence, framed).verify_truncated_left(found).is_err() {
            return Err(FrameError::NotAuthentic { sequence });
        }
        let frame = parse(head[4], &framed[HEAD_BYTES..], sequence)?;
        self.sequence += 1;
        self.taken += whole;
        Ok(Some(frame))
    }
}

fn parse(kind: u8, mut body: &[u8], sequence: u64) -> Result<Frame, FrameError> {
    let unknown = FrameError::UnknownKind { sequence, kind };
    let mut word = || {
        let (word, rest) = body.split_first_chunk::<8>()?;
        body = rest;
        Some(u64::from_le_bytes(*word))
    };
    let number = if kind & NUMBERED == 0 {
        None
    } else {
        let words = (word(), word());
        let (Some(at), Some(acknowledged)) = words else { return Err(unknown) };
        Some(Number { at, acknowledged })
    };
    match kind & !NUMBERED {
        KIND_DATA if body.len() <= FRAME_BYTES_MAX => Ok(Frame::Data(number, body.to_vec())),
        COMPRESSED => compress::unpack(body)
            .map(|payload| Frame::Data(number, payload))
            .ok_or(FrameError::NotCompressed { sequence }),
        KIND_GOODBYE => Ok(Frame::Goodbye(number)),
        KIND_ACK => {
            let count = body.first_chunk::<8>().ok_or(unknown)?;
            Ok(Frame::Acknowledged(u64::from_le_bytes(*count)))
        }
        _ => Err(unknown),
    }
}

//! Frames with their tags: writer and reader of the format together.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::secret::keyed;

/// Longest payload of a frame.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
const HEAD_BYTES: usize = 5;
const TAG_BYTES: usize = 16;
const KIND_DATA: u8 = 0;
const KIND_GOODBYE: u8 = 1;

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
    /// The kind is unknown.
    #[error("frame {sequence} has unknown kind {kind}")]
    UnknownKind {
        /// Number of the frame in its direction.
        sequence: u64,
        /// The kind given.
        kind: u8,
    },
}

/// What a frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    Data(Vec<u8>),
    Goodbye,
}

/// Makes the frames of one direction.
#[derive(Debug)]
pub(super) struct Encoder {
    mac: Hmac<Sha256>,
    sequence: u64,
}

impl Encoder {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self { mac: keyed(key), sequence: 0 }
    }

    /// Appends a data frame; the payload is at most [`FRAME_BYTES_MAX`] long.
    pub(super) fn data(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        self.frame(KIND_DATA, payload, out);
    }

    pub(super) fn goodbye(&mut self, out: &mut Vec<u8>) {
        self.frame(KIND_GOODBYE, &[], out);
    }

    fn frame(&mut self, kind: u8, payload: &[u8], out: &mut Vec<u8>) {
        let len = u32::try_from(payload.len()).expect("the caller checked the length");
        let start = out.len();
        out.reserve(encoded_len(payload.len()));
        out.extend_from_slice(&len.to_le_bytes());
        out.push(kind);
        out.extend_from_slice(payload);
        let tag = tag(&self.mac, self.sequence, &out[start..]).finalize().into_bytes();
        out.extend_from_slice(&tag[..TAG_BYTES]);
        self.sequence += 1;
    }
}

/// Bytes of a frame with a payload of `len` bytes.
pub(super) fn encoded_len(len: usize) -> usize {
    HEAD_BYTES + len + TAG_BYTES
}

fn tag(mac: &Hmac<Sha256>, sequence: u64, framed: &[u8]) -> Hmac<Sha256> {
    mac.clone().chain_update(sequence.to_le_bytes()).chain_update(framed)
}

/// Takes the frames of one direction apart, whatever pieces they come in.
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
        if payload_len > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong { len });
        }
        let Some(frame) = rest.get(..encoded_len(payload_len)) else { return Ok(None) };
        let (framed, found) = frame.split_at(HEAD_BYTES + payload_len);
        let sequence = self.sequence;
        if tag(&self.mac, sequence, framed).verify_truncated_left(found).is_err() {
            return Err(FrameError::NotAuthentic { sequence });
        }
        let frame = match head[4] {
            KIND_DATA => Frame::Data(framed[HEAD_BYTES..].to_vec()),
            KIND_GOODBYE => Frame::Goodbye,
            kind => return Err(FrameError::UnknownKind { sequence, kind }),
        };
        self.sequence += 1;
        self.taken += encoded_len(payload_len);
        Ok(Some(frame))
    }
}

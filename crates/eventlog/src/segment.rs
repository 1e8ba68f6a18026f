//! Segments: the file form of the log, with a header that says whose log it is and frames that are checked one by one.
//!
//! # Failure
//! A reader tells three ends apart: a clean one ([`SegmentWriter::finish`] ran), a truncated one (the writer died, and
//! everything before the given offset is good) and corruption ([`SegmentError`], with the offset up to which all is
//! good).
//!
//! # Format
//! Little endian. Header: magic `UNDERLOG`, version `u32`, machine identity 32 bytes, start lsn `u64`, start icount
//! `u64`, clock base (`u64` mtime, `u64` at, `u32` rate), CRC-32C `u32` of all before it. Then frames: length `u32` (1
//! to [`MAX_FRAME`]), CRC-32C `u32` of length and payload, payload. A clean end is a frame of length 0 whose CRC also
//! covers the 16 bytes of the end position (lsn, icount) that follow it.

use crate::{ClockBase, FORMAT_VERSION, LogPos};

/// Most bytes in one frame; larger payloads are split by the writer.
pub const MAX_FRAME: usize = 1 << 20;
/// Length of the header of a segment.
pub const HEADER_BYTES: usize = 84;

const MAGIC: [u8; 8] = *b"UNDERLOG";
/// Bytes before the payload of a frame.
pub const FRAME_HEAD: usize = 8;
const TRAILER: usize = 16;

/// What the start of a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Hash of the configuration of the machine that this is the log of.
    pub identity: [u8; 32],
    /// Position before the first record.
    pub start: LogPos,
    /// Clock base for the decoder.
    pub clock: ClockBase,
}

impl SegmentHeader {
    fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&self.identity);
        for v in [self.start.lsn, self.start.icount, self.clock.mtime, self.clock.at] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        out.extend_from_slice(&self.clock.rate.to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, SegmentError> {
        if bytes[..8] != MAGIC {
            return Err(SegmentError::NotASegment);
        }
        let version = u32_at(bytes, 8);
        if version != FORMAT_VERSION {
            return Err(SegmentError::Version { found: version });
        }
        if crc32c::crc32c(&bytes[..HEADER_BYTES - 4]) != u32_at(bytes, HEADER_BYTES - 4) {
            return Err(SegmentError::Corrupt { offset: 0 });
        }
        let mut identity = [0; 32];
        identity.copy_from_slice(&bytes[12..44]);
        Ok(Self {
            identity,
            start: LogPos { lsn: u64_at(bytes, 44), icount: u64_at(bytes, 52) },
            clock: ClockBase {
                mtime: u64_at(bytes, 60),
                at: u64_at(bytes, 68),
                rate: u32_at(bytes, 76),
            },
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Why a segment cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The bytes do not start like a segment.
    #[error("not a log segment")]
    NotASegment,
    /// The segment has another version of the format.
    #[error("log segment has version {found}, this build reads {FORMAT_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The bytes from `offset` on are damaged; everything before is good.
    #[error("log segment is corrupt at byte {offset}")]
    Corrupt {
        /// Offset in the file.
        offset: u64,
    },
}

/// How a segment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentEnd {
    /// The writer finished it.
    Clean {
        /// Position after the last record.
        end: LogPos,
    },
    /// The writer did not finish it.
    Truncated {
        /// Everything before this offset in the file is good.
        offset: u64,
    },
}

/// Produces the bytes of a segment.
#[derive(Debug)]
pub struct SegmentWriter {
    finished: bool,
}

impl SegmentWriter {
    /// Starts a segment: its header is appended to `out`.
    #[must_use]
    pub fn new(header: SegmentHeader, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&header.to_bytes());
        Self { finished: false }
    }

    /// Appends frames with `payload`, which is what [`crate::Encoder::append`] wrote. A crash between the frames of a
    /// payload leaves a part of a record at the end, which the decoder then just waits for.
    pub fn frame(&mut self, payload: &[u8], out: &mut Vec<u8>) {
        for (head, part) in Self::frames(payload) {
            out.extend_from_slice(&head);
            out.extend_from_slice(part);
        }
    }

    /// What [`Self::frame`] appends, without a copy: what stands before each part of the payload, and the part.
    pub fn frames(payload: &[u8]) -> impl Iterator<Item = ([u8; FRAME_HEAD], &[u8])> {
        payload.chunks(MAX_FRAME).map(|part| {
            let len = (part.len() as u32).to_le_bytes();
            let crc = crc32c::crc32c_append(crc32c::crc32c(&len), part);
            let mut head = [0; FRAME_HEAD];
            head[..4].copy_from_slice(&len);
            head[4..].copy_from_slice(&crc.to_le_bytes());
            (head, part)
        })
    }

    /// Appends the mark of a clean end; calling it again writes nothing.
    pub fn finish(&mut self, end: LogPos, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let mut raw = [0; 4 + TRAILER];
        raw[4..12].copy_from_slice(&end.lsn.to_le_bytes());
        raw[12..].copy_from_slice(&end.icount.to_le_bytes());
        out.extend_from_slice(&raw[..4]);
        out.extend_from_slice(&crc32c::crc32c(&raw).to_le_bytes());
        out.extend_from_slice(&raw[4..]);
    }
}

/// Consumes the bytes of a segment, in whatever pieces they come.
#[derive(Debug, Clone, Default)]
pub struct SegmentReader {
    buf: Vec<u8>,
    taken: usize,
    /// Offset in the file of `buf[taken]`.
    offset: u64,
    header: Option<SegmentHeader>,
    end: Option<LogPos>,
    failed: Option<SegmentError>,
}

impl SegmentReader {
    /// A reader at the start of a segment.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The header, once [`Self::next`] has seen it.
    #[must_use]
    pub fn header(&self) -> Option<&SegmentHeader> {
        self.header.as_ref()
    }

    /// Adds bytes of the file.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.taken > self.buf.len() / 2 {
            self.buf.drain(..self.taken);
            self.taken = 0;
        }
        self.buf.extend_from_slice(bytes);
    }

    /// The payload of the next frame, or `None` when more bytes are needed or the segment is at its clean end.
    ///
    /// # Errors
    /// [`SegmentError`], again on every later call.
    #[expect(
        clippy::should_implement_trait,
        reason = "a reader that waits for bytes is no iterator"
    )]
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, SegmentError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let result = self.step();
        if let Err(error) = result {
            self.failed = Some(error);
            self.buf = Vec::new();
            self.taken = 0;
        }
        result
    }

    fn step(&mut self) -> Result<Option<Vec<u8>>, SegmentError> {
        if self.header.is_none() {
            let Some(raw) = self.buf[self.taken..].first_chunk::<HEADER_BYTES>() else {
                return Ok(None);
            };
            self.header = Some(SegmentHeader::from_bytes(raw)?);
            self.consume(HEADER_BYTES);
        }
        let corrupt = SegmentError::Corrupt { offset: self.offset };
        let rest = &self.buf[self.taken..];
        if self.end.is_some() {
            return if rest.is_empty() { Ok(None) } else { Err(corrupt) };
        }
        if rest.len() < FRAME_HEAD {
            return Ok(None);
        }
        let len = u32_at(rest, 0) as usize;
        if len > MAX_FRAME {
            return Err(corrupt);
        }
        let body = if len == 0 { TRAILER } else { len };
        let Some(payload) = rest[FRAME_HEAD..].get(..body) else { return Ok(None) };
        if crc32c::crc32c_append(crc32c::crc32c(&rest[..4]), payload) != u32_at(rest, 4) {
            return Err(corrupt);
        }
        if len == 0 {
            self.end = Some(LogPos { lsn: u64_at(payload, 0), icount: u64_at(payload, 8) });
            self.consume(FRAME_HEAD + TRAILER);
            return if self.buf.len() == self.taken {
                Ok(None)
            } else {
                Err(SegmentError::Corrupt { offset: self.offset })
            };
        }
        let payload = payload.to_vec();
        self.consume(FRAME_HEAD + len);
        Ok(Some(payload))
    }

    fn consume(&mut self, len: usize) {
        self.taken += len;
        self.offset += len as u64;
    }

    /// How the segment ended, once the whole file was pushed and [`Self::next`] gave `None`.
    #[must_use]
    pub fn finish(&self) -> SegmentEnd {
        match self.end {
            Some(end) => SegmentEnd::Clean { end },
            None => SegmentEnd::Truncated { offset: self.offset },
        }
    }
}

#[cfg(test)]
mod tests;

//! Encoding of records as a byte stream; encoder and decoder side by side.
//!
//! # Invariants
//! INV-LOG-1, INV-LOG-2 and INV-LOG-3 of the crate.
//!
//! # Failure
//! A decoder that met bytes which no encoder writes stays failed: what comes after them cannot be trusted.
//!
//! # Format
//! One record is a tag, the icount delta to the record before it as a varint, and a body. The low four bits of the tag
//! are the kind; the high four bits are the device index of kinds that have one, 15 meaning that the index follows the
//! tag as a byte (15 or more), and 0 for the other kinds. Varints are LEB128, at most ten bytes, shortest form only.
//!
//! | kind | entry | body |
//! |---|---|---|
//! | 0 | mark | |
//! | 1 | digest | 8 bytes, little endian |
//! | 2 | clock, rate as before | zigzag varint: mtime less the value derived from the clock before |
//! | 3 | clock, new rate | as 2, then the rate as a varint |
//! | 4 | received packet | length as a varint, bytes: a frame with its header, see [`machine::offload`] |
//! | 5 | block completion with data | id as a varint, status, length as a varint, bytes |
//! | 6 | block completion without data | id as a varint, status |
//! | 7 | block read, data from the local disk | id as a varint |
//! | 8 | console bytes | length as a varint, bytes |
//! | 9 | entropy | length as a varint, bytes |
//! | 10 | power off | |
//! | 11 | disk resized | size in bytes as a varint |
//!
//! Kind 11 came later than version 2, within it: a log without it is as before, and an older build refuses one that has it.

use machine::io::{BLK_READ_MAX, BlkStatus, Input};

use crate::{Entry, LogPos, Record};

/// Most bytes that one record carries: what the longest read of a disk gives.
pub const DATA_MAX: usize = BLK_READ_MAX;

const MARK: u8 = 0;
const DIGEST: u8 = 1;
const CLOCK: u8 = 2;
const CLOCK_RATE: u8 = 3;
const NET_RX: u8 = 4;
const BLK_DATA: u8 = 5;
const BLK_DONE: u8 = 6;
const BLK_LOCAL: u8 = 7;
const CONSOLE: u8 = 8;
const ENTROPY: u8 = 9;
const POWER_OFF: u8 = 10;
const DISK_RESIZED: u8 = 11;
const DEV_FOLLOWS: u8 = 15;

/// What the clock input before a record said; clock entries are coded as the difference to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockBase {
    /// Guest time at `at`.
    pub mtime: u64,
    /// Position of the clock input.
    pub at: u64,
    /// Ticks for each 2^16 steps since then.
    pub rate: u32,
}

impl ClockBase {
    /// Guest time at `icount` if no other clock input came.
    #[must_use]
    pub fn derived(&self, icount: u64) -> u64 {
        let ticks = (u128::from(icount.wrapping_sub(self.at)) * u128::from(self.rate)) >> 16;
        self.mtime.wrapping_add(ticks as u64)
    }
}

/// A record that cannot be in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The record lies before the end of the log.
    #[error("record at icount {icount} comes after {end}")]
    IcountDecreased {
        /// Icount of the record.
        icount: u64,
        /// End of the log.
        end: LogPos,
    },
    /// The record carries more than [`DATA_MAX`] bytes.
    #[error("record carries {len} bytes, at most {DATA_MAX} are allowed")]
    TooLong {
        /// Length of the data.
        len: usize,
    },
}

/// Bytes that no encoder writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The tag is not one of this version.
    #[error("unknown record tag {tag:#x} after {at}")]
    UnknownTag {
        /// The tag.
        tag: u8,
        /// Last good position.
        at: LogPos,
    },
    /// A number is too big for its field, or not in its shortest form.
    #[error("number out of range in the record after {at}")]
    BadNumber {
        /// Last good position.
        at: LogPos,
    },
    /// The record claims to carry more than [`DATA_MAX`] bytes.
    #[error("record after {at} claims {len} bytes, at most {DATA_MAX} are allowed")]
    TooLong {
        /// Claimed length.
        len: u64,
        /// Last good position.
        at: LogPos,
    },
    /// The status of a block completion is unknown.
    #[error("unknown block status {status} in the record after {at}")]
    BadStatus {
        /// The status.
        status: u8,
        /// Last good position.
        at: LogPos,
    },
}

/// Turns records into bytes.
#[derive(Debug, Clone)]
pub struct Encoder {
    end: LogPos,
    clock: ClockBase,
}

impl Encoder {
    /// An encoder for the records after `start`; `clock` is the clock input in force there, or the default when the
    /// decoder is made with the default too.
    #[must_use]
    pub fn new(start: LogPos, clock: ClockBase) -> Self {
        Self { end: start, clock }
    }

    /// Position after the last record.
    #[must_use]
    pub fn end(&self) -> LogPos {
        self.end
    }

    /// Clock base after the last record: what a decoder needs to start from [`Self::end`].
    #[must_use]
    pub fn clock(&self) -> ClockBase {
        self.clock
    }

    /// Appends the encoding of `record` to `out` and returns the new end of the log.
    ///
    /// # Errors
    /// [`AppendError`]; nothing is written then.
    pub fn append(&mut self, record: &Record, out: &mut Vec<u8>) -> Result<LogPos, AppendError> {
        let icount = record.icount;
        match &record.entry {
            Entry::Input(input) => return self.append_input(icount, input, out),
            Entry::Mark => head(out, MARK, None, self.delta(icount)?),
            Entry::Digest(digest) => {
                head(out, DIGEST, None, self.delta(icount)?);
                out.extend_from_slice(&digest.to_le_bytes());
            }
            Entry::BlkReadLocal { dev, id } => {
                head(out, BLK_LOCAL, Some(*dev), self.delta(icount)?);
                put_varint(out, *id);
            }
        }
        Ok(self.appended(icount))
    }

    /// As [`Self::append`] of an [`Entry::Input`], without a copy of the input.
    ///
    /// # Errors
    /// [`AppendError`]; nothing is written then.
    pub fn append_input(
        &mut self,
        icount: u64,
        input: &Input,
        out: &mut Vec<u8>,
    ) -> Result<LogPos, AppendError> {
        let delta = self.delta(icount)?;
        let len = match input {
            Input::NetRx { packet: data, .. } | Input::BlkDone { data, .. } => data.len(),
            Input::Console { bytes, .. } | Input::Entropy { bytes, .. } => bytes.len(),
            Input::Clock { .. } | Input::PowerOff | Input::DiskResized { .. } => 0,
        };
        if len > DATA_MAX {
            return Err(AppendError::TooLong { len });
        }
        self.input(icount, delta, input, out);
        Ok(self.appended(icount))
    }

    fn delta(&self, icount: u64) -> Result<u64, AppendError> {
        let end = self.end;
        icount.checked_sub(end.icount).ok_or(AppendError::IcountDecreased { icount, end })
    }

    fn appended(&mut self, icount: u64) -> LogPos {
        self.end = LogPos { lsn: self.end.lsn.wrapping_add(1), icount };
        self.end
    }

    fn input(&mut self, icount: u64, delta: u64, input: &Input, out: &mut Vec<u8>) {
        match input {
            Input::Clock { mtime, rate } => {
                let same = *rate == self.clock.rate;
                head(out, if same { CLOCK } else { CLOCK_RATE }, None, delta);
                put_varint(out, zigzag(mtime.wrapping_sub(self.clock.derived(icount))));
                if !same {
                    put_varint(out, u64::from(*rate));
                }
                self.clock = ClockBase { mtime: *mtime, at: icount, rate: *rate };
            }
            Input::NetRx { dev, packet } => {
                head(out, NET_RX, Some(*dev), delta);
                put_bytes(out, packet);
            }
            Input::BlkDone { dev, id, status, data } => {
                let kind = if data.is_empty() { BLK_DONE } else { BLK_DATA };
                head(out, kind, Some(*dev), delta);
                put_varint(out, *id);
                out.push(status_code(*status));
                if !data.is_empty() {
                    put_bytes(out, data);
                }
            }
            Input::Console { dev, bytes } => {
                head(out, CONSOLE, Some(*dev), delta);
                put_bytes(out, bytes);
            }
            Input::Entropy { dev, bytes } => {
                head(out, ENTROPY, Some(*dev), delta);
                put_bytes(out, bytes);
            }
            Input::PowerOff => head(out, POWER_OFF, None, delta),
            Input::DiskResized { dev, size } => {
                head(out, DISK_RESIZED, Some(*dev), delta);
                put_varint(out, *size);
            }
        }
    }
}

fn head(out: &mut Vec<u8>, kind: u8, dev: Option<u8>, delta: u64) {
    match dev {
        None => out.push(kind),
        Some(dev) if dev < DEV_FOLLOWS => out.push(kind | dev << 4),
        Some(dev) => out.extend_from_slice(&[kind | DEV_FOLLOWS << 4, dev]),
    }
    put_varint(out, delta);
}

fn status_code(status: BlkStatus) -> u8 {
    match status {
        BlkStatus::Ok => 0,
        BlkStatus::IoErr => 1,
        BlkStatus::Unsupported => 2,
    }
}

fn put_bytes(out: &mut Vec<u8>, data: &[u8]) {
    put_varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

fn put_varint(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn zigzag(v: u64) -> u64 {
    (v << 1) ^ ((v as i64 >> 63) as u64)
}

fn unzigzag(v: u64) -> u64 {
    (v >> 1) ^ (v & 1).wrapping_neg()
}

/// Turns bytes into records, whatever the pieces in which they come.
#[derive(Debug, Clone)]
pub struct Decoder {
    pos: LogPos,
    clock: ClockBase,
    buf: Vec<u8>,
    taken: usize,
    failed: Option<DecodeError>,
}

impl Decoder {
    /// A decoder for what an encoder made with the same arguments writes.
    #[must_use]
    pub fn new(start: LogPos, clock: ClockBase) -> Self {
        Self { pos: start, clock, buf: Vec::new(), taken: 0, failed: None }
    }

    /// Position after the last record that [`Self::next`] gave.
    #[must_use]
    pub fn position(&self) -> LogPos {
        self.pos
    }

    /// Bytes pushed and not yet decoded.
    #[must_use]
    pub fn bytes_pending(&self) -> usize {
        self.buf.len() - self.taken
    }

    /// Adds bytes to decode.
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

    /// The next record, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`DecodeError`], again on every later call.
    #[expect(
        clippy::should_implement_trait,
        reason = "a decoder that waits for bytes is no iterator"
    )]
    pub fn next(&mut self) -> Result<Option<Record>, DecodeError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let mut cursor = Cursor { bytes: &self.buf[self.taken..], at: self.pos };
        match cursor.record(&self.clock) {
            Ok(record) => {
                self.taken = self.buf.len() - cursor.bytes.len();
                if let Entry::Input(Input::Clock { mtime, rate }) = record.entry {
                    self.clock = ClockBase { mtime, at: record.icount, rate };
                }
                self.pos = LogPos { lsn: self.pos.lsn.wrapping_add(1), icount: record.icount };
                Ok(Some(record))
            }
            Err(Stop::NeedMore) => Ok(None),
            Err(Stop::Bad(error)) => {
                self.failed = Some(error);
                self.buf = Vec::new();
                self.taken = 0;
                Err(error)
            }
        }
    }
}

enum Stop {
    NeedMore,
    Bad(DecodeError),
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: LogPos,
}

impl Cursor<'_> {
    fn record(&mut self, clock: &ClockBase) -> Result<Record, Stop> {
        let tag = self.byte()?;
        let unknown = Stop::Bad(DecodeError::UnknownTag { tag, at: self.at });
        let (kind, nibble) = (tag & 15, tag >> 4);
        let has_dev = matches!(
            kind,
            NET_RX | BLK_DATA | BLK_DONE | BLK_LOCAL | CONSOLE | ENTROPY | DISK_RESIZED
        );
        if kind > DISK_RESIZED || (!has_dev && nibble != 0) {
            return Err(unknown);
        }
        let dev = if has_dev && nibble == DEV_FOLLOWS { self.byte()? } else { nibble };
        if nibble == DEV_FOLLOWS && dev < DEV_FOLLOWS {
            return Err(self.bad_number());
        }
        let delta = self.varint()?;
        let icount = self.at.icount.checked_add(delta).ok_or_else(|| self.bad_number())?;
        let entry = match kind {
            MARK => Entry::Mark,
            DIGEST => Entry::Digest(self.u64_le()?),
            CLOCK | CLOCK_RATE => {
                let mtime = clock.derived(icount).wrapping_add(unzigzag(self.varint()?));
                let rate = if kind == CLOCK { clock.rate } else { self.new_rate(clock.rate)? };
                Entry::Input(Input::Clock { mtime, rate })
            }
            NET_RX => Entry::Input(Input::NetRx { dev, packet: self.data()? }),
            BLK_DATA | BLK_DONE => {
                let id = self.varint()?;
                let status = self.status()?;
                let data = if kind == BLK_DONE { Vec::new() } else { self.data()? };
                if kind == BLK_DATA && data.is_empty() {
                    return Err(self.bad_number());
                }
                Entry::Input(Input::BlkDone { dev, id, status, data })
            }
            BLK_LOCAL => Entry::BlkReadLocal { dev, id: self.varint()? },
            CONSOLE => Entry::Input(Input::Console { dev, bytes: self.data()? }),
            ENTROPY => Entry::Input(Input::Entropy { dev, bytes: self.data()? }),
            POWER_OFF => Entry::Input(Input::PowerOff),
            DISK_RESIZED => Entry::Input(Input::DiskResized { dev, size: self.varint()? }),
            _ => return Err(unknown),
        };
        Ok(Record { icount, entry })
    }

    fn bad_number(&self) -> Stop {
        Stop::Bad(DecodeError::BadNumber { at: self.at })
    }

    fn take(&mut self, len: usize) -> Result<&[u8], Stop> {
        let (head, tail) = self.bytes.split_at_checked(len).ok_or(Stop::NeedMore)?;
        self.bytes = tail;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8, Stop> {
        Ok(self.take(1)?[0])
    }

    fn u64_le(&mut self) -> Result<u64, Stop> {
        let mut raw = [0; 8];
        raw.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(raw))
    }

    fn varint(&mut self) -> Result<u64, Stop> {
        let mut value = 0u64;
        for index in 0..10 {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let too_big = index == 9 && bits > 1;
            let not_shortest = index > 0 && byte == 0;
            if too_big || not_shortest {
                return Err(self.bad_number());
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.bad_number())
    }

    fn new_rate(&mut self, before: u32) -> Result<u32, Stop> {
        let rate = u32::try_from(self.varint()?).map_err(|_| self.bad_number())?;
        if rate == before { Err(self.bad_number()) } else { Ok(rate) }
    }

    fn status(&mut self) -> Result<BlkStatus, Stop> {
        match self.byte()? {
            0 => Ok(BlkStatus::Ok),
            1 => Ok(BlkStatus::IoErr),
            2 => Ok(BlkStatus::Unsupported),
            status => Err(Stop::Bad(DecodeError::BadStatus { status, at: self.at })),
        }
    }

    fn data(&mut self) -> Result<Vec<u8>, Stop> {
        let len = self.varint()?;
        match usize::try_from(len) {
            Ok(n) if n <= DATA_MAX => Ok(self.take(n)?.to_vec()),
            Ok(_) | Err(_) => Err(Stop::Bad(DecodeError::TooLong { len, at: self.at })),
        }
    }
}

#[cfg(test)]
mod tests;

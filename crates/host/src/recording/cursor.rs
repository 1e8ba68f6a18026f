//! Reads the records of a recording, over all its segments, until one of the ends that a log has.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use eventlog::{DecodeError, Decoder, LogPos, Record, SegmentEnd, SegmentError, SegmentReader};

use super::dir::RecordingDir;
use super::recorder::segment_name;

const READ_BYTES: usize = 64 << 10;

/// How a replay ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplayEnd {
    /// At the end of the recording.
    Whole,
    /// The log is cut off: its writer did not finish it.
    Truncated {
        /// The log.
        path: PathBuf,
        /// Everything before this byte is good.
        offset: u64,
    },
    /// The log is damaged.
    Corrupt {
        /// The log.
        path: PathBuf,
        /// One line, with the offset up to which it is good.
        reason: String,
    },
    /// The machine is not the recorded one any more.
    Diverged {
        /// Where that was seen.
        icount: u64,
        /// One line.
        reason: String,
    },
}

impl std::fmt::Display for ReplayEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole => f.write_str("the recording is whole"),
            Self::Truncated { path, offset } => {
                write!(f, "{}: the log is truncated at byte {offset}", path.display())
            }
            Self::Corrupt { path, reason } => write!(f, "{}: {reason}", path.display()),
            Self::Diverged { icount, reason } => {
                write!(f, "the replay diverged at step {icount}: {reason}")
            }
        }
    }
}

/// A place between two records. A copy of it goes on from the same place.
#[derive(Debug, Clone)]
pub(super) struct Cursor {
    recording: Arc<RecordingDir>,
    /// Index of the segment.
    segment: usize,
    file: Arc<File>,
    /// Bytes of the file that were read.
    read: u64,
    reader: SegmentReader,
    /// Made when the segment's header has been read.
    decoder: Option<Decoder>,
}

impl Cursor {
    /// At the beginning of a segment.
    pub(super) fn open(
        recording: &Arc<RecordingDir>,
        segment: usize,
    ) -> Result<Self, super::OpenRecordingError> {
        let path = match recording.segments().get(segment) {
            Some(segment) => segment.path.clone(),
            None => recording.path().join("log"),
        };
        let file =
            File::open(&path).map_err(|source| super::OpenRecordingError::Io { path, source })?;
        Ok(Self {
            recording: Arc::clone(recording),
            segment,
            file: Arc::new(file),
            read: 0,
            reader: SegmentReader::new(),
            decoder: None,
        })
    }

    fn path(&self) -> PathBuf {
        self.recording.segments()[self.segment].path.clone()
    }

    /// Where the last record that was read ends.
    pub(super) fn position(&self) -> LogPos {
        match &self.decoder {
            Some(decoder) => decoder.position(),
            None => self.recording.segments()[self.segment].start().unwrap_or_default(),
        }
    }

    /// The next record.
    pub(super) fn next(&mut self) -> Result<Record, ReplayEnd> {
        loop {
            if let Some(decoder) = &mut self.decoder {
                match decoder.next() {
                    Ok(Some(record)) => return Ok(record),
                    Ok(None) => {}
                    Err(e) => return Err(self.undecodable(&e)),
                }
            }
            match self.reader.next() {
                Ok(Some(payload)) => self.take(&payload)?,
                Ok(None) => self.read_more()?,
                Err(e) => return Err(self.corrupt(&e)),
            }
        }
    }

    fn take(&mut self, payload: &[u8]) -> Result<(), ReplayEnd> {
        if self.decoder.is_none() {
            self.check_header()?;
        }
        if let Some(decoder) = &mut self.decoder {
            decoder.push(payload);
        }
        Ok(())
    }

    fn check_header(&mut self) -> Result<(), ReplayEnd> {
        let identity = self.recording.identity;
        let header = self.reader.header().filter(|header| header.identity == identity);
        let Some(header) = header else {
            let reason = "the log is of another machine than this recording's".to_owned();
            return Err(ReplayEnd::Corrupt { path: self.path(), reason });
        };
        self.decoder = Some(Decoder::new(header.start, header.clock));
        Ok(())
    }

    fn read_more(&mut self) -> Result<(), ReplayEnd> {
        let mut bytes = vec![0; READ_BYTES];
        loop {
            match self.file.read_at(&mut bytes, self.read) {
                Ok(0) => return self.end(),
                Ok(len) => {
                    self.read += len as u64;
                    self.reader.push(&bytes[..len]);
                    return Ok(());
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let reason = format!("the log cannot be read on: {e}");
                    return Err(ReplayEnd::Corrupt { path: self.path(), reason });
                }
            }
        }
    }

    /// The file is at its end: on to the next segment, if there is one and this one is complete.
    fn end(&mut self) -> Result<(), ReplayEnd> {
        let path = self.path();
        let end = match self.reader.finish() {
            SegmentEnd::Truncated { offset } => return Err(ReplayEnd::Truncated { path, offset }),
            SegmentEnd::Clean { end } => end,
        };
        if self.decoder.is_none() {
            self.check_header()?;
        }
        let pending = self.decoder.as_ref().map_or(0, Decoder::bytes_pending);
        let reached = self.position();
        if reached != end || pending != 0 {
            let reason = format!("the log ends at {reached}, not at {end} as it says");
            return Err(ReplayEnd::Corrupt { path, reason });
        }
        let Some(next) = self.recording.segments().get(self.segment + 1) else {
            return Err(self.last_end());
        };
        if let Some(Ok(header)) = next.header
            && header.start != end
        {
            let reason = format!("it begins at {}, the one before ends at {end}", header.start);
            return Err(ReplayEnd::Corrupt { path: next.path.clone(), reason });
        }
        let cannot = |e: super::OpenRecordingError| ReplayEnd::Corrupt {
            path: next.path.clone(),
            reason: crate::one_line::one_line(&e),
        };
        *self = Self::open(&self.recording, self.segment + 1).map_err(cannot)?;
        Ok(())
    }

    /// How a log ends whose last segment is complete: a snapshot behind the beginning of that one is the beginning of
    /// another, which is not there.
    fn last_end(&self) -> ReplayEnd {
        let begin = self.recording.segments()[self.segment].icount;
        let missing = self.recording.snapshots().iter().find(|s| s.pos.icount > begin);
        missing.map_or(ReplayEnd::Whole, |snapshot| ReplayEnd::Truncated {
            path: self.recording.path().join(segment_name(snapshot.pos.icount)),
            offset: 0,
        })
    }

    fn corrupt(&self, error: &SegmentError) -> ReplayEnd {
        ReplayEnd::Corrupt { path: self.path(), reason: error.to_string() }
    }

    fn undecodable(&self, error: &DecodeError) -> ReplayEnd {
        let at = match self.reader.finish() {
            SegmentEnd::Truncated { offset } => format!(" before byte {offset}"),
            SegmentEnd::Clean { .. } => String::new(),
        };
        let reason = format!("the log is corrupt{at}: {error}");
        ReplayEnd::Corrupt { path: self.path(), reason }
    }
}

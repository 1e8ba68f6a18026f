//! A recording on the disk: what is in its directory, checked as far as that takes no reading of logs.
//!
//! # Invariants
//! - INV-RECDIR-1: nothing of another recording is taken for a part of this one: segments name its identity.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use eventlog::{HEADER_BYTES, LogPos, SegmentError, SegmentHeader, SegmentReader};
use machine::Machine;
use machine::config::BootImages;
use machine::machine::{MODEL_VERSION, NewMachineError};
use sha2::{Digest as _, Sha256};

use super::start::{About, IMAGE_FILES, MACHINE_FILE, Start, StartError};
use crate::one_line::one_line;
use crate::snapshot::{HASH_BYTES, SnapshotError, SnapshotHead, SnapshotId, SnapshotReader, chain};

/// Largest `machine` file that is read.
const MACHINE_BYTES_MAX: u64 = 1 << 20;
/// Longest image that is read.
const IMAGE_BYTES_MAX: u64 = 2 << 30;
/// Most files of a recording that are looked at.
const FILES_MAX: usize = 1 << 20;
/// The log of a recording of version 1.
const LOG_V1: &str = "log";

/// Why a recording cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenRecordingError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file that describes the machine is no good.
    #[error("{}: {reason}", path.display())]
    Start {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It was made by another machine model.
    #[error("{} is of machine model {found}, this build has model {MODEL_VERSION}", path.display())]
    Model {
        /// The recording.
        path: PathBuf,
        /// Its model.
        found: u32,
    },
    /// A boot image is not the one that was recorded.
    #[error("{} is not what the recorded machine booted", .0.display())]
    Image(PathBuf),
    /// The machine cannot be made.
    #[error("{}: the recorded machine cannot be made", path.display())]
    Machine {
        /// The recording.
        path: PathBuf,
        /// Why.
        #[source]
        source: NewMachineError,
    },
    /// No machine to begin with.
    #[error(
        "{} has neither its beginning nor a complete snapshot: it ended before the first one was taken",
        .0.display()
    )]
    NoStart(PathBuf),
    /// A snapshot is no good.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// A segment of the log.
#[derive(Debug, Clone)]
pub struct SegmentFile {
    /// The file.
    pub path: PathBuf,
    /// Step at which it begins, by its name.
    pub icount: u64,
    /// Its header, or what is wrong with it; nothing when the file ends before it does.
    pub header: Option<Result<SegmentHeader, SegmentError>>,
    /// Length in bytes when the directory was read.
    pub bytes: u64,
}

impl SegmentFile {
    /// Where it begins.
    #[must_use]
    pub fn start(&self) -> Option<LogPos> {
        Some(self.header?.ok()?.start)
    }

    /// What is wrong with its beginning.
    fn problem(&self) -> Option<String> {
        let path = self.path.display();
        match self.header {
            Some(Ok(_)) => None,
            Some(Err(e)) => Some(format!("{path}: {e}")),
            None => Some(format!("{path}: it ends before byte {HEADER_BYTES}")),
        }
    }
}

/// A snapshot in the recording.
#[derive(Debug, Clone)]
pub struct SnapshotFile {
    /// The file.
    pub path: PathBuf,
    /// Its identity.
    pub id: SnapshotId,
    /// What it builds on.
    pub parent: Option<SnapshotId>,
    /// Where it is.
    pub pos: LogPos,
    /// When it was taken.
    pub taken_unix_ms: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A recording. Reading it changes nothing.
#[derive(Debug, Clone)]
pub struct RecordingDir {
    path: PathBuf,
    start: Start,
    about: Option<About>,
    pub(super) identity: [u8; HASH_BYTES],
    images: BootImages,
    segments: Vec<SegmentFile>,
    snapshots: Vec<SnapshotFile>,
    problems: Vec<String>,
}

impl RecordingDir {
    /// Opens the recording in `path`.
    ///
    /// # Errors
    /// [`OpenRecordingError`], when there is nothing to replay.
    pub fn open(path: &Path) -> Result<Self, OpenRecordingError> {
        let (start, about, identity) = read_start(path)?;
        if start.model != MODEL_VERSION {
            return Err(OpenRecordingError::Model { path: path.to_owned(), found: start.model });
        }
        let images = read_images(path, &start)?;
        let mut problems = Vec::new();
        let (segments, snapshots) = read_files(path, about.is_none(), &mut problems)?;
        let path = path.to_owned();
        Ok(Self { path, start, about, identity, images, segments, snapshots, problems })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the machine is.
    #[must_use]
    pub fn start(&self) -> &Start {
        &self.start
    }

    /// Who recorded it; nothing for a recording of version 1.
    #[must_use]
    pub fn about(&self) -> Option<&About> {
        self.about.as_ref()
    }

    /// Segments of the log, by where they begin.
    #[must_use]
    pub fn segments(&self) -> &[SegmentFile] {
        &self.segments
    }

    /// Snapshots, by position.
    #[must_use]
    pub fn snapshots(&self) -> &[SnapshotFile] {
        &self.snapshots
    }

    /// Snapshots and beginnings of segments that cannot be read, and why: replay does not begin with them.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The machine as it was at the latest beginning of a segment that is not after `icount`, or at the first one, with
    /// the index of the segment. A snapshot that cannot be used is passed over for an earlier one, and named to `tell`.
    ///
    /// # Errors
    /// [`OpenRecordingError`]: there is no machine to begin with.
    pub fn machine_before(
        &self,
        icount: u64,
        tell: &mut dyn FnMut(&SnapshotError),
    ) -> Result<(Machine, usize), OpenRecordingError> {
        let candidates = self.starts();
        let at = candidates.partition_point(|(_, start, _)| *start <= icount);
        let (before, after) = candidates.split_at(at);
        for (index, start, snapshot) in before.iter().rev().chain(after.first()) {
            let Some(snapshot) = snapshot else {
                debug_assert_eq!(*start, 0);
                return Ok((self.power_on()?, *index));
            };
            match self.load(snapshot) {
                Ok((machine, _)) => return Ok((machine, *index)),
                Err(e) => tell(&e),
            }
        }
        Err(OpenRecordingError::NoStart(self.path.clone()))
    }

    /// Steps at which the machine can be made, in order.
    #[must_use]
    pub fn start_steps(&self) -> Vec<u64> {
        self.starts().into_iter().map(|(_, icount, _)| icount).collect()
    }

    /// Segments that replay can begin with: index, step, snapshot (none at power-on).
    fn starts(&self) -> Vec<(usize, u64, Option<&SnapshotFile>)> {
        let mut starts = Vec::new();
        for (index, segment) in self.segments.iter().enumerate() {
            let Some(start) = segment.start() else { continue };
            let snapshot = self.snapshots.iter().find(|s| s.pos == start);
            if snapshot.is_some() || start == LogPos::default() {
                starts.push((index, start.icount, snapshot));
            }
        }
        // A recording whose only segment is damaged at its very start begins at power-on all the same.
        if starts.is_empty() && self.segments.first().is_some_and(|s| s.icount == 0) {
            starts.push((0, 0, None));
        }
        starts
    }

    fn power_on(&self) -> Result<Machine, OpenRecordingError> {
        let machine = Machine::new(self.start.config.clone(), self.images.clone());
        let machine = machine
            .map_err(|source| OpenRecordingError::Machine { path: self.path.clone(), source })?;
        crate::huge::advise(machine.ram().bytes());
        Ok(machine)
    }

    fn load(&self, snapshot: &SnapshotFile) -> Result<(Machine, SnapshotHead), SnapshotError> {
        let file_of = |id| self.snapshots.iter().find(|s| s.id == id).map(|s| s.path.clone());
        let files = chain::chain_of(&snapshot.path, file_of)?;
        let (machine, head) = chain::load(&files, self.images.clone())?;
        if machine.config() != &self.start.config || machine.icount() != snapshot.pos.icount {
            let reason = "it is of another machine than this recording's".to_owned();
            return Err(SnapshotError::Unfit { path: snapshot.path.clone(), reason });
        }
        Ok((machine, head))
    }
}

fn read_start(dir: &Path) -> Result<(Start, Option<About>, [u8; HASH_BYTES]), OpenRecordingError> {
    let path = dir.join(MACHINE_FILE);
    let mut bytes = Vec::new();
    let read =
        File::open(&path).and_then(|file| file.take(MACHINE_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|source| OpenRecordingError::Io { path: path.clone(), source })?;
    let refuse = |e: StartError| OpenRecordingError::Start { path, reason: e.to_string() };
    Start::from_bytes(&bytes).map_err(refuse)
}

fn read_images(dir: &Path, start: &Start) -> Result<BootImages, OpenRecordingError> {
    let mut images: [Option<Arc<[u8]>>; 3] = [None, None, None];
    for ((slot, name), hash) in images.iter_mut().zip(IMAGE_FILES).zip(&start.images) {
        let Some(hash) = hash else { continue };
        let path = dir.join(name);
        let bytes = read_image(&path)
            .map_err(|source| OpenRecordingError::Io { path: path.clone(), source })?;
        if Sha256::digest(&bytes)[..] != hash[..] {
            return Err(OpenRecordingError::Image(path));
        }
        *slot = Some(bytes.into());
    }
    let [bios, kernel, initrd] = images;
    Ok(BootImages { bios, kernel, initrd, append: start.append.clone() })
}

/// Reads an image, which is a file of a bounded length.
fn read_image(path: &Path) -> std::io::Result<Vec<u8>> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() || meta.len() > IMAGE_BYTES_MAX {
        return Err(std::io::Error::other("it is no file, or longer than any image"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(IMAGE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Segments and snapshots of a recording, of version 1 or of a later one.
fn read_files(
    dir: &Path,
    is_v1: bool,
    problems: &mut Vec<String>,
) -> Result<(Vec<SegmentFile>, Vec<SnapshotFile>), OpenRecordingError> {
    let fail = |source| OpenRecordingError::Io { path: dir.to_owned(), source };
    if is_v1 {
        return Ok((vec![read_segment(dir.join(LOG_V1), 0)?], Vec::new()));
    }
    let (mut segments, mut snapshots) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir).map_err(fail)?.take(FILES_MAX) {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let step = |prefix| name.strip_prefix(prefix).and_then(|icount: &str| icount.parse().ok());
        if let Some(icount) = step("log-") {
            let segment = read_segment(entry.path(), icount)?;
            problems.extend(segment.problem());
            segments.push(segment);
        } else if step("snapshot-").is_some_and(|_: u64| true) {
            match read_snapshot(entry.path()) {
                Ok(snapshot) => snapshots.push(snapshot),
                Err(e) => problems.push(one_line(&e)),
            }
        }
    }
    segments.sort_by_key(|s| s.icount);
    snapshots.sort_by_key(|s| s.pos);
    Ok((segments, snapshots))
}

fn read_segment(path: PathBuf, icount: u64) -> Result<SegmentFile, OpenRecordingError> {
    let mut head = Vec::new();
    let read = File::open(&path).and_then(|file| {
        let bytes = file.metadata()?.len();
        file.take(HEADER_BYTES as u64).read_to_end(&mut head)?;
        Ok(bytes)
    });
    let bytes = read.map_err(|source| OpenRecordingError::Io { path: path.clone(), source })?;
    let mut reader = SegmentReader::new();
    reader.push(&head);
    let header = match reader.next() {
        Ok(_) => reader.header().map(|header| Ok(*header)),
        Err(e) => Some(Err(e)),
    };
    Ok(SegmentFile { path, icount, header, bytes })
}

fn read_snapshot(path: PathBuf) -> Result<SnapshotFile, SnapshotError> {
    let reader = SnapshotReader::open(&path)?;
    let head = reader.head();
    if !head.disks.is_empty() {
        let reason = "it has disks, which a recording has not".to_owned();
        return Err(SnapshotError::Unfit { path, reason });
    }
    let (id, parent, pos, taken_unix_ms) = (head.id, head.parent, head.pos, head.taken_unix_ms);
    let bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
    Ok(SnapshotFile { path, id, parent, pos, taken_unix_ms, bytes })
}

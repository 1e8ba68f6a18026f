//! Recordings: a directory with everything that a machine needs to run again, step by step, anywhere.
//!
//! # Place
//! The live machine's loop tells a [`Recording`] each input, digest and mark; a thread of its own writes them.
//! [`super::replay`] reads the directory.
//!
//! # Invariants
//! - INV-RECORD-1: the log holds every input with all that it carries, the data of disk reads as well, so that a
//!   recording needs no disk. A copy of the disk would be smaller in the long run, but takes as long as the disk is
//!   large, and would have to be replayed with it.
//! - INV-RECORD-2: recording never holds up the guest and never stops it. What cannot be written ends the recording,
//!   with one line; what was written until then replays.
//!
//! # Failure
//! A recording whose VM died is one that is cut off: it replays up to there. Nothing is left behind of a recording that
//! could not be started.
//!
//! # Format
//! `machine`: magic `UNDERREC`, version `u32` little endian, [`Start`] in postcard, SHA-256 of all before it. `bios`,
//! `kernel`, `initrd`: what the machine boots, as far as it has them. `log`: one segment of [`eventlog`] that starts at
//! icount 0; its identity is the SHA-256 at the end of `machine`. Nobody but the owner may read them: guest memory can
//! be had from them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use eventlog::{ClockBase, Encoder, Entry, LogPos, Record, SegmentHeader, SegmentWriter};
use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::io::Input;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// File with the machine's configuration.
pub(super) const MACHINE_FILE: &str = "machine";
/// File with the log.
pub(super) const LOG_FILE: &str = "log";
/// Files with what it boots, in the order of [`Start::images`].
pub(super) const IMAGE_FILES: [&str; 3] = ["bios", "kernel", "initrd"];
/// Bytes of a SHA-256.
pub(super) const HASH_BYTES: usize = 32;

const MAGIC: [u8; 8] = *b"UNDERREC";
const VERSION: u32 = 1;
const PREFIX_BYTES: usize = 12;
/// Bytes that may wait for the disk; a disk that is further behind than this ends the recording.
const WAITING_BYTES_MAX: usize = 256 << 20;
/// Log is written at the latest after this time.
const GATHER_TIME: Duration = Duration::from_millis(20);
/// Log is written at once when this much waits.
const GATHER_BYTES: usize = 256 << 10;

/// Why no recording was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartRecordingError {
    /// The directory holds something.
    #[error("cannot record into {}: it is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// The operating system said no.
    #[error("cannot record into {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Why `machine` of a recording cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StartError {
    /// It does not start like one.
    #[error("it is not the start of a recording")]
    NotARecording,
    /// It is of another version.
    #[error("it has version {found}, this build reads {VERSION}")]
    Version { found: u32 },
    /// Its hash does not fit.
    #[error("it is damaged")]
    Damaged,
}

/// What the machine was at power-on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Start {
    /// [`machine::machine::MODEL_VERSION`].
    pub(super) model: u32,
    pub(super) config: MachineConfig,
    pub(super) append: String,
    /// SHA-256 of each image that it has.
    pub(super) images: [Option<[u8; HASH_BYTES]>; 3],
}

impl Start {
    fn of(machine: &Machine) -> Self {
        let images = machine.images();
        Self {
            model: machine::machine::MODEL_VERSION,
            config: machine.config().clone(),
            append: images.append.clone(),
            images: image_bytes(images)
                .map(|image| image.map(|bytes| Sha256::digest(bytes).into())),
        }
    }

    /// The file's bytes.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&postcard::to_stdvec(self).expect("a configuration is plain data"));
        let hash = Sha256::digest(&out);
        out.extend_from_slice(&hash);
        out
    }

    /// Reads the file's bytes; with the identity that the log has to name.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<(Self, [u8; HASH_BYTES]), StartError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(StartError::NotARecording);
        }
        let version = bytes.get(MAGIC.len()..PREFIX_BYTES).and_then(|raw| raw.try_into().ok());
        let found = u32::from_le_bytes(version.ok_or(StartError::Damaged)?);
        if found != VERSION {
            return Err(StartError::Version { found });
        }
        let (body, hash) = bytes.split_last_chunk::<HASH_BYTES>().ok_or(StartError::Damaged)?;
        if Sha256::digest(body)[..] != hash[..] {
            return Err(StartError::Damaged);
        }
        let start = body.get(PREFIX_BYTES..).and_then(|raw| postcard::from_bytes(raw).ok());
        Ok((start.ok_or(StartError::Damaged)?, *hash))
    }
}

/// The images in the order of [`IMAGE_FILES`].
fn image_bytes(images: &BootImages) -> [Option<&[u8]>; 3] {
    [images.bios.as_deref(), images.kernel.as_deref(), images.initrd.as_deref()]
}

/// A recording of a live machine, or none.
#[derive(Debug, Default)]
pub(crate) struct Recording(Option<Active>);

#[derive(Debug)]
struct Active {
    encoder: Encoder,
    /// Encoded, not yet given to the thread.
    bytes: Vec<u8>,
    queue: Option<Sender<Vec<u8>>>,
    /// Bytes in the queue.
    waiting: Arc<AtomicUsize>,
    is_failed: Arc<AtomicBool>,
    end: Arc<std::sync::Mutex<LogPos>>,
    thread: Option<JoinHandle<()>>,
    dir: PathBuf,
}

impl Recording {
    /// Starts to record `machine`, which has not run yet, into `dir`, which must be empty or not exist.
    ///
    /// # Errors
    /// [`StartRecordingError`]; nothing is left behind.
    pub(crate) fn start(dir: &Path, machine: &Machine) -> Result<Self, StartRecordingError> {
        let fail = |source| StartRecordingError::Io { path: dir.to_owned(), source };
        let is_new = make_empty_dir(dir)?;
        match Active::start(dir, machine) {
            Ok(active) => Ok(Self(Some(active))),
            Err(source) => {
                for name in IMAGE_FILES.into_iter().chain([MACHINE_FILE, LOG_FILE]) {
                    drop(fs::remove_file(dir.join(name)));
                }
                if is_new {
                    drop(fs::remove_dir(dir));
                }
                Err(fail(source))
            }
        }
    }

    /// Whether there is anything to tell it.
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// An input was applied.
    pub(crate) fn input(&mut self, icount: u64, input: &Input) {
        if let Some(active) = &mut self.0 {
            active.append(icount, Entry::Input(input.clone()));
        }
    }

    /// The machine has this digest.
    pub(crate) fn digest(&mut self, icount: u64, digest: u64) {
        if let Some(active) = &mut self.0 {
            active.append(icount, Entry::Digest(digest));
        }
    }

    /// The machine has come here.
    pub(crate) fn mark(&mut self, icount: u64) {
        let Some(active) = &mut self.0 else { return };
        active.append(icount, Entry::Mark);
        if !active.hand_over() {
            self.0 = None;
        }
    }

    /// The machine is off: a last digest, and everything is written when this comes back.
    pub(crate) fn finish(&mut self, machine: &mut Machine) {
        if self.is_on() {
            let digest = machine.digest();
            self.digest(machine.icount(), digest);
            self.mark(machine.icount());
            self.0 = None;
        }
    }
}

/// Makes the directory if need be; says whether it did.
fn make_empty_dir(dir: &Path) -> Result<bool, StartRecordingError> {
    let fail = |source| StartRecordingError::Io { path: dir.to_owned(), source };
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            match fs::read_dir(dir).map_err(fail)?.next() {
                None => Ok(false),
                Some(_) => Err(StartRecordingError::NotEmpty(dir.to_owned())),
            }
        }
        Err(e) => Err(fail(e)),
    }
}

fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

impl Active {
    fn start(dir: &Path, machine: &Machine) -> std::io::Result<Self> {
        for (name, image) in IMAGE_FILES.into_iter().zip(image_bytes(machine.images())) {
            if let Some(bytes) = image {
                create(&dir.join(name))?.write_all(bytes)?;
            }
        }
        let start = Start::of(machine).to_bytes();
        create(&dir.join(MACHINE_FILE))?.write_all(&start)?;
        let mut identity = [0; HASH_BYTES];
        identity.copy_from_slice(&start[start.len() - HASH_BYTES..]);
        let header =
            SegmentHeader { identity, start: LogPos::default(), clock: ClockBase::default() };
        let mut head = Vec::new();
        let segment = SegmentWriter::new(header, &mut head);
        let mut file = create(&dir.join(LOG_FILE))?;
        file.write_all(&head)?;

        let (queue, chunks) = channel();
        let (waiting, is_failed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let end = Arc::default();
        let writer = LogWriter {
            file,
            segment,
            chunks,
            waiting: Arc::clone(&waiting),
            is_failed: Arc::clone(&is_failed),
            end: Arc::clone(&end),
            dir: dir.to_owned(),
        };
        let thread =
            std::thread::Builder::new().name("record".to_owned()).spawn(move || writer.run())?;
        let encoder = Encoder::new(LogPos::default(), ClockBase::default());
        let (queue, thread) = (Some(queue), Some(thread));
        let dir = dir.to_owned();
        Ok(Self { encoder, bytes: Vec::new(), queue, waiting, is_failed, end, thread, dir })
    }

    fn append(&mut self, icount: u64, entry: Entry) {
        if let Err(e) = self.encoder.append(&Record { icount, entry }, &mut self.bytes) {
            unreachable!("own input does not fit the log: {e}");
        }
    }

    /// Gives what was encoded to the thread; false when the recording has ended.
    fn hand_over(&mut self) -> bool {
        if self.is_failed.load(Ordering::Relaxed) {
            return false;
        }
        let bytes = std::mem::take(&mut self.bytes);
        let waiting = self.waiting.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
        if waiting > WAITING_BYTES_MAX {
            self.is_failed.store(true, Ordering::Relaxed);
            stopped(&self.dir, &"the disk is too slow");
            return false;
        }
        self.queue.as_ref().is_some_and(|queue| queue.send(bytes).is_ok())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        *self.end.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = self.encoder.end();
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // The thread has said what it had to say.
            drop(thread.join());
        }
    }
}

fn stopped(dir: &Path, why: &dyn std::fmt::Display) {
    crate::log::line(&format!("recording into {} stopped: {why}; the VM goes on", dir.display()));
}

/// The thread that writes the log.
struct LogWriter {
    file: File,
    segment: SegmentWriter,
    chunks: Receiver<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    is_failed: Arc<AtomicBool>,
    end: Arc<std::sync::Mutex<LogPos>>,
    dir: PathBuf,
}

impl LogWriter {
    fn run(mut self) {
        if let Err(e) = self.write_all()
            && !self.is_failed.swap(true, Ordering::Relaxed)
        {
            stopped(&self.dir, &e);
        }
    }

    fn write_all(&mut self) -> std::io::Result<()> {
        let mut out = Vec::new();
        while let Ok(first) = self.chunks.recv() {
            let payload = self.gather(first);
            self.segment.frame(&payload, &mut out);
            self.file.write_all(&out)?;
            out.clear();
            self.waiting.fetch_sub(payload.len(), Ordering::Relaxed);
        }
        if self.is_failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let end = *self.end.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.segment.finish(end, &mut out);
        self.file.write_all(&out)?;
        self.file.sync_all()
    }

    /// What comes in the next moments makes one frame.
    fn gather(&self, first: Vec<u8>) -> Vec<u8> {
        let (mut payload, until) = (first, Instant::now() + GATHER_TIME);
        while payload.len() < GATHER_BYTES {
            match self.chunks.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(more) => payload.extend_from_slice(&more),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        payload
    }
}

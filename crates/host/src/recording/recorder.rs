//! The live side of a recording: what the machine's thread tells it.
//!
//! # Place
//! Owned by the loop that runs the machine. The log is written by [`super::log_writer`], snapshots by
//! [`crate::snapshot`], what is too old is dropped by [`super::trim`], each on a thread of its own.
//!
//! # States
//! ```text
//! segment --rotation is due, no snapshot under way--> segment + sweep --snapshot complete--> segment
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use eventlog::{ClockBase, Encoder, LogPos, SegmentHeader};
use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::io::Input;
use machine::ram::Epoch;

use super::limit::RecordLimit;
use super::log_writer::LogThread;
use super::start::{About, IMAGE_FILES, MACHINE_FILE, Start, image_bytes};
use super::trim::{Segment, Trimmer};
use crate::snapshot::{HASH_BYTES, SnapshotHead, SnapshotId, Sweep};

/// A recording without a limit takes a snapshot no sooner than after so many steps: they replay in a few seconds.
const SNAPSHOT_STEPS_MIN: u64 = 2_000_000_000;
/// A limit in bytes is kept by segments of this part of it.
const SEGMENTS_PER_LIMIT: u32 = 4;
/// Shortest segment of a recording whose limit is a time.
const SEGMENT_TIME_MIN: Duration = Duration::from_secs(1);
/// A snapshot that would build on this many others builds on none, so that each is soon loaded.
const CHAIN_MAX: usize = 64;
/// Time between snapshots unless something else is asked for.
pub const SNAPSHOT_INTERVAL_DEFAULT: Duration = Duration::from_secs(60);

/// Why no recording was started.
#[derive(Debug, thiserror::Error)]
pub enum StartRecordingError {
    /// The directory holds something.
    #[error("cannot record into {}: it is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// The operating system said no.
    #[error("cannot record into {}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

/// What to record into, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordOptions {
    /// A directory that is empty or does not exist.
    pub dir: PathBuf,
    /// What may be kept.
    pub limit: RecordLimit,
    /// Time between snapshots; zero: none but those that a limit needs.
    pub snapshot_interval: Duration,
    /// Who records.
    pub about: About,
}

/// A recording of a machine, or none.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Option<Box<Active>>);

#[derive(Debug)]
struct Active {
    options: RecordOptions,
    identity: [u8; HASH_BYTES],
    encoder: Encoder,
    /// Encoded, not yet given to the thread.
    bytes: Vec<u8>,
    log: LogThread,
    trimmer: Trimmer,
    sweep: Option<UnderWay>,
    /// The last snapshot that is complete: the next one builds on it.
    base: Option<(SnapshotId, Epoch)>,
    /// How many others that one builds on, itself included, as far as they were not merged.
    chain: usize,
    began: Instant,
    began_icount: u64,
    /// Bytes of log in this segment.
    segment_bytes: u64,
    last_mark: u64,
    /// Nothing is written any more: to be let go of where the machine is at hand, whose memory may be armed.
    is_over: bool,
}

#[derive(Debug)]
struct UnderWay {
    sweep: Sweep,
    is_pumping: bool,
}

/// A directory with all that a recording has before its log: what a machine is, and what it boots.
#[derive(Debug)]
pub(crate) struct Prepared {
    options: RecordOptions,
    identity: [u8; HASH_BYTES],
    is_new: bool,
}

impl Prepared {
    /// Makes the directory for a recording of a machine like this. Takes the time that its images take to be hashed and
    /// written.
    ///
    /// # Errors
    /// [`StartRecordingError`]; nothing is left behind.
    pub(crate) fn new(
        mut options: RecordOptions,
        config: &MachineConfig,
        images: &BootImages,
    ) -> Result<Self, StartRecordingError> {
        let dir = options.dir.clone();
        let is_new = make_empty_dir(&dir)?;
        match write_machine(&mut options, config, images) {
            Ok(identity) => Ok(Self { options, identity, is_new }),
            Err(source) => {
                clean(&dir, is_new);
                Err(StartRecordingError::Io { path: dir, source })
            }
        }
    }
}

/// Removes what [`Prepared::new`] has made.
fn clean(dir: &Path, is_new: bool) {
    for name in IMAGE_FILES.into_iter().chain([MACHINE_FILE]) {
        drop(fs::remove_file(dir.join(name)));
    }
    if is_new {
        drop(fs::remove_dir(dir));
    }
}

/// Writes what the machine is and what it boots; gives the recording's identity.
fn write_machine(
    options: &mut RecordOptions,
    config: &MachineConfig,
    images: &BootImages,
) -> std::io::Result<[u8; HASH_BYTES]> {
    for (name, image) in IMAGE_FILES.into_iter().zip(image_bytes(images)) {
        if let Some(bytes) = image {
            create(&options.dir.join(name))?.write_all(bytes)?;
        }
    }
    options.about.started_unix_ms = unix_ms();
    rustix::rand::getrandom(&mut options.about.nonce, rustix::rand::GetRandomFlags::empty())?;
    let start = Start::of(config, images).to_bytes(&options.about);
    create(&options.dir.join(MACHINE_FILE))?.write_all(&start)?;
    let mut identity = [0; HASH_BYTES];
    identity.copy_from_slice(&start[start.len() - HASH_BYTES..]);
    Ok(identity)
}

impl Recorder {
    /// Starts to record `machine` from here on. A machine that has run before is recorded from a snapshot, which is taken
    /// while it runs on.
    ///
    /// # Errors
    /// [`StartRecordingError`]; nothing is left behind.
    pub(crate) fn start(
        options: RecordOptions,
        machine: &mut Machine,
    ) -> Result<Self, StartRecordingError> {
        let images = machine.images().clone();
        Self::begin(Prepared::new(options, machine.config(), &images)?, machine)
    }

    /// As [`Self::start`], of a machine for which all was prepared that takes time.
    ///
    /// # Errors
    /// [`StartRecordingError`]; nothing is left behind.
    pub(crate) fn begin(
        prepared: Prepared,
        machine: &mut Machine,
    ) -> Result<Self, StartRecordingError> {
        let (dir, is_new) = (prepared.options.dir.clone(), prepared.is_new);
        match Active::start(prepared, machine) {
            Ok(active) => Ok(Self(Some(Box::new(active)))),
            Err(source) => {
                drop(fs::remove_file(dir.join(segment_name(machine.icount()))));
                clean(&dir, is_new);
                Err(StartRecordingError::Io { path: dir, source })
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
            let appended = active.encoder.append_input(icount, input, &mut active.bytes);
            appended.expect("own inputs are cut to what the log takes");
        }
    }

    /// The machine has this digest.
    pub(crate) fn digest(&mut self, icount: u64, digest: u64) {
        if let Some(active) = &mut self.0 {
            active.append(icount, eventlog::Entry::Digest(digest));
        }
    }

    /// The machine has come here.
    pub(crate) fn mark(&mut self, icount: u64) {
        let Some(active) = &mut self.0 else { return };
        if icount == active.last_mark && active.bytes.is_empty() {
            return;
        }
        active.append(icount, eventlog::Entry::Mark);
        active.last_mark = icount;
        active.is_over |= !active.hand_over();
    }

    /// Goes on with a snapshot under way, or begins one when it is due. Called after each slice, when all that the machine
    /// has made was told. Says whether there is more to do at once.
    pub(crate) fn pump(&mut self, machine: &mut Machine) -> bool {
        let Some(active) = &mut self.0 else { return false };
        if !active.is_over {
            match active.pump(machine) {
                Ok(more) => return more,
                Err(reason) if active.log.fail() => stopped(&active.options.dir, &reason),
                // Why was said.
                Err(_) => {}
            }
        }
        self.leave(machine);
        false
    }

    /// The machine is off, or not recorded any more: a last digest, and everything is written when this comes back.
    pub(crate) fn finish(&mut self, machine: &mut Machine) {
        if self.is_on() {
            let digest = machine.digest();
            self.digest(machine.icount(), digest);
            self.end(machine);
        }
    }

    /// As [`Self::finish`], without a digest: of a machine that is not the recorded one any more.
    pub(crate) fn end(&mut self, machine: &mut Machine) {
        let Some(active) = &self.0 else { return };
        let at = active.encoder.end().icount.max(machine.icount());
        self.mark(at);
        if let Some(active) = self.0.as_mut().filter(|active| !active.is_over) {
            active.complete_snapshot(machine);
        }
        self.stop(machine);
    }

    /// The directory that it writes into.
    pub(crate) fn dir(&self) -> Option<PathBuf> {
        self.0.as_ref().map(|active| active.options.dir.clone())
    }

    /// Ends the recording where the last mark is, without a wait: the thread that completes it is left to itself.
    pub(crate) fn land(&mut self, machine: &mut Machine) {
        if let Some(active) = &mut self.0 {
            active.append(active.encoder.end().icount, eventlog::Entry::Mark);
            self.leave(machine);
        }
    }

    /// Lets go of the recording: the machine's memory is free for other snapshots, and a thread waits for those that write.
    fn leave(&mut self, machine: &mut Machine) {
        let Some(mut active) = self.0.take() else { return };
        if active.sweep.as_ref().is_some_and(|under_way| under_way.is_pumping) {
            machine.ram_mut().disarm_snapshot();
        }
        let dir = active.options.dir.clone();
        let complete = move || {
            active.hand_over();
            drop(active);
        };
        if let Err(e) = std::thread::Builder::new().name("landing".to_owned()).spawn(complete) {
            stopped(&dir, &e);
        }
    }

    fn stop(&mut self, machine: &mut Machine) {
        if let Some(active) = &mut self.0
            && let Some(under_way) = active.sweep.take()
        {
            under_way.sweep.abandon(machine.ram_mut());
        }
        self.0 = None;
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

pub(super) fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Name of the segment that begins at a step.
pub(super) fn segment_name(icount: u64) -> String {
    format!("log-{icount:020}")
}

/// Name of the snapshot at a step.
pub(super) fn snapshot_name(icount: u64) -> String {
    format!("snapshot-{icount:020}")
}

impl Active {
    fn start(prepared: Prepared, machine: &mut Machine) -> std::io::Result<Self> {
        let Prepared { options, identity, .. } = prepared;
        let dir = options.dir.clone();
        let icount = machine.icount();
        let pos = LogPos { lsn: 0, icount };
        let clock = ClockBase { mtime: machine.mtime(), at: icount, rate: machine.clock().rate() };
        let header = SegmentHeader { identity, start: pos, clock };
        let path = dir.join(segment_name(icount));
        let log = LogThread::start(&dir, &path, header)?;
        let trimmer = Trimmer::start(dir, options.limit, Segment::new(path))?;
        let mut active = Self {
            identity,
            encoder: Encoder::new(pos, header.clock),
            bytes: Vec::new(),
            log,
            trimmer,
            sweep: None,
            base: None,
            chain: 0,
            began: Instant::now(),
            began_icount: icount,
            segment_bytes: 0,
            last_mark: icount,
            is_over: false,
            options,
        };
        if icount > 0 {
            active.begin_snapshot(machine).map_err(std::io::Error::other)?;
        }
        Ok(active)
    }

    fn append(&mut self, icount: u64, entry: eventlog::Entry) {
        let record = eventlog::Record { icount, entry };
        if let Err(e) = self.encoder.append(&record, &mut self.bytes) {
            unreachable!("own records do not fit the log: {e}");
        }
    }

    /// Gives what was encoded to the thread; false when the recording has ended.
    fn hand_over(&mut self) -> bool {
        let bytes = std::mem::take(&mut self.bytes);
        self.segment_bytes += bytes.len() as u64;
        self.log.write(bytes) && !self.trimmer.has_failed()
    }

    fn pump(&mut self, machine: &mut Machine) -> Result<bool, String> {
        if let Some(under_way) = &mut self.sweep {
            if under_way.is_pumping && under_way.sweep.pump(machine.ram_mut()) {
                return Ok(true);
            }
            under_way.is_pumping = false;
            if let Some(outcome) = under_way.sweep.outcome() {
                self.sweep = None;
                self.taken(outcome?);
            }
            return Ok(false);
        }
        if !Sweep::is_free(machine) {
            return Ok(false);
        }
        if self.is_due(machine.icount()) {
            self.rotate(machine.icount())?;
            self.begin_snapshot(machine)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn taken(&mut self, taken: crate::snapshot::Taken) {
        self.base = Some((taken.id, taken.epoch));
        self.trimmer.snapshot_taken(taken.path);
    }

    /// Waits for a snapshot under way, so that a recording that ends has it.
    fn complete_snapshot(&mut self, machine: &mut Machine) {
        let Some(mut under_way) = self.sweep.take() else { return };
        while under_way.is_pumping && under_way.sweep.pump(machine.ram_mut()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        match under_way.sweep.join() {
            Ok(taken) => self.taken(taken),
            // Without it the recording is as good; a later segment than its first one has others before it.
            Err(reason) => crate::log::line(&format!(
                "{}: a snapshot was not taken: {reason}",
                self.options.dir.display()
            )),
        }
    }

    /// Whether a new segment is due.
    fn is_due(&self, icount: u64) -> bool {
        let steps = icount - self.began_icount;
        if steps == 0 {
            return false;
        }
        let elapsed = self.began.elapsed();
        let interval = self.options.snapshot_interval;
        let is_worth_it = !interval.is_zero() && elapsed >= interval && steps >= SNAPSHOT_STEPS_MIN;
        let RecordLimit { bytes, time } = self.options.limit;
        let is_long =
            time.is_some_and(|keep| elapsed >= (keep / SEGMENTS_PER_LIMIT).max(SEGMENT_TIME_MIN));
        let is_big = bytes.is_some_and(|m| self.segment_bytes >= m / u64::from(SEGMENTS_PER_LIMIT));
        is_worth_it || is_long || is_big
    }

    /// Begins a segment.
    fn rotate(&mut self, icount: u64) -> Result<(), String> {
        self.append(icount, eventlog::Entry::Mark);
        self.last_mark = icount;
        if !self.hand_over() {
            return Err("the log could not be written".to_owned());
        }
        let (start, clock) = (self.encoder.end(), self.encoder.clock());
        let path = self.options.dir.join(segment_name(icount));
        self.log.rotate(&path, SegmentHeader { identity: self.identity, start, clock });
        self.trimmer.segment_began(Segment::new(path));
        self.began = Instant::now();
        self.began_icount = icount;
        self.segment_bytes = 0;
        Ok(())
    }

    /// Begins the snapshot that the segment begins with.
    fn begin_snapshot(&mut self, machine: &mut Machine) -> Result<(), String> {
        let icount = machine.icount();
        let base = self.base.filter(|_| self.chain < CHAIN_MAX);
        self.chain = if base.is_some() { self.chain + 1 } else { 1 };
        let (pos, clock) = (self.encoder.end(), self.encoder.clock());
        let images = machine.images();
        let head = SnapshotHead {
            id: SnapshotId::random()?,
            parent: base.map(|(id, _)| id),
            name: String::new(),
            taken_unix_ms: unix_ms(),
            pos,
            clock: (clock.mtime, clock.at, clock.rate),
            append: images.append.clone(),
            // The recording has them.
            images: [None; 3],
            disks: Vec::new(),
            definition: None,
            saved: machine.save(),
        };
        let path = self.options.dir.join(snapshot_name(icount));
        let base = base.map(|(_, epoch)| epoch);
        let sweep = Sweep::begin(machine, head, base, path).map_err(|e| e.to_string())?;
        self.sweep = Some(UnderWay { sweep, is_pumping: true });
        Ok(())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.log.finish(self.encoder.end());
    }
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A recording ends before its machine.
pub(super) fn stopped(dir: &Path, why: &dyn std::fmt::Display) {
    crate::log::line(&format!("recording into {} stopped: {why}; the VM goes on", dir.display()));
}

#[cfg(test)]
mod tests;

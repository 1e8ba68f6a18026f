//! Replay of a recording: the machine runs again from its log, and every digest is compared.
//!
//! # Place
//! Called by the command line, on the caller's thread. The directory is only read.
//!
//! # Invariants
//! - INV-REPLAY-1: nothing but the directory enters the machine.
//! - INV-REPLAY-2: [`ReplayEnd::Whole`] is the answer only if the log was read to its clean end and every digest in it
//!   was the machine's.
//!
//! # Failure
//! A log that is cut off or damaged is replayed up to there. A machine that differs is not run on.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use eventlog::{DecodeError, Decoder, Entry, Record, SegmentEnd, SegmentError, SegmentReader};
use machine::Machine;
use machine::config::BootImages;
use machine::engine::EngineKind;
use machine::io::OutputKind;
use machine::machine::{Exit, MODEL_VERSION, NewMachineError};
use sha2::{Digest as _, Sha256};

use super::engine::{self, EngineUse};
use super::record::{HASH_BYTES, IMAGE_FILES, LOG_FILE, MACHINE_FILE, Start, StartError};

const READ_BYTES: usize = 256 << 10;
/// Largest `machine` file that is read.
const MACHINE_BYTES_MAX: u64 = 1 << 20;

/// Why a recording cannot be replayed at all.
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
}

/// How to replay. No choice here may make a difference to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayOptions {
    /// Most steps that the machine runs without a look at its outputs; at least 1.
    pub slice: u64,
    /// Every cache of the machine is dropped after so many steps; `None`: never.
    pub drop_caches_every: Option<u64>,
    /// The engine; `None`: the fastest that this host can have.
    pub engine: Option<EngineKind>,
}

/// What a replay came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// Steps that the machine made.
    pub icount: u64,
    /// Records of the log that were replayed.
    pub records: u64,
    /// Digests that were the machine's.
    pub digests: u64,
    /// The engine, and what it had at the end.
    pub engine: EngineUse,
    /// How it ended.
    pub end: ReplayEnd,
}

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

/// Replays the recording in `dir`; `console` gets what the guest writes to its UART.
///
/// # Errors
/// [`OpenRecordingError`], when there is nothing to replay.
pub fn replay(
    dir: &Path,
    options: ReplayOptions,
    console: impl FnMut(&[u8]),
) -> Result<Replayed, OpenRecordingError> {
    let (mut machine, identity) = open_machine(dir)?;
    engine::choose(&mut machine, options.engine, "replay");
    let path = dir.join(LOG_FILE);
    let file = File::open(&path)
        .map_err(|source| OpenRecordingError::Io { path: path.clone(), source })?;
    let log = LogFile { path, file, segment: SegmentReader::new(), decoder: None, identity };
    let next_drop = options.drop_caches_every;
    let mut replayer = Replayer { machine, options, console, next_drop, digests: 0 };
    let (end, records) = replayer.run(log);
    let (icount, engine) = (replayer.machine.icount(), EngineUse::of(&replayer.machine));
    Ok(Replayed { icount, records, digests: replayer.digests, engine, end })
}

fn open_machine(dir: &Path) -> Result<(Machine, [u8; HASH_BYTES]), OpenRecordingError> {
    let path = dir.join(MACHINE_FILE);
    let mut bytes = Vec::new();
    let read =
        File::open(&path).and_then(|file| file.take(MACHINE_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|source| OpenRecordingError::Io { path: path.clone(), source })?;
    let refuse =
        |e: StartError| OpenRecordingError::Start { path: path.clone(), reason: e.to_string() };
    let (start, identity) = Start::from_bytes(&bytes).map_err(refuse)?;
    if start.model != MODEL_VERSION {
        return Err(OpenRecordingError::Model { path: dir.to_owned(), found: start.model });
    }
    let mut images: [Option<Arc<[u8]>>; 3] = [None, None, None];
    for ((slot, name), hash) in images.iter_mut().zip(IMAGE_FILES).zip(&start.images) {
        let Some(hash) = hash else { continue };
        let path = dir.join(name);
        let bytes = fs::read(&path)
            .map_err(|source| OpenRecordingError::Io { path: path.clone(), source })?;
        if Sha256::digest(&bytes)[..] != hash[..] {
            return Err(OpenRecordingError::Image(path));
        }
        *slot = Some(bytes.into());
    }
    let [bios, kernel, initrd] = images;
    let machine =
        Machine::new(start.config, BootImages { bios, kernel, initrd, append: start.append })
            .map_err(|source| OpenRecordingError::Machine { path: dir.to_owned(), source })?;
    Ok((machine, identity))
}

/// Reads records from the log until one of the ends that a log has.
struct LogFile {
    path: PathBuf,
    file: File,
    segment: SegmentReader,
    /// Made when the segment's header has been read.
    decoder: Option<Decoder>,
    identity: [u8; HASH_BYTES],
}

impl LogFile {
    fn next(&mut self) -> Result<Record, ReplayEnd> {
        loop {
            if let Some(decoder) = &mut self.decoder {
                match decoder.next() {
                    Ok(Some(record)) => return Ok(record),
                    Ok(None) => {}
                    Err(e) => return Err(self.undecodable(&e)),
                }
            }
            match self.segment.next() {
                Ok(Some(payload)) => self.take(&payload)?,
                Ok(None) => self.read_more()?,
                Err(e) => return Err(self.corrupt(&e)),
            }
        }
    }

    fn take(&mut self, payload: &[u8]) -> Result<(), ReplayEnd> {
        if self.decoder.is_none() {
            let header = self.segment.header().filter(|header| header.identity == self.identity);
            let Some(header) = header else {
                let reason = "the log is of another machine than this recording's".to_owned();
                return Err(ReplayEnd::Corrupt { path: self.path.clone(), reason });
            };
            self.decoder = Some(Decoder::new(header.start, header.clock));
        }
        if let Some(decoder) = &mut self.decoder {
            decoder.push(payload);
        }
        Ok(())
    }

    fn read_more(&mut self) -> Result<(), ReplayEnd> {
        let mut bytes = vec![0; READ_BYTES];
        loop {
            match self.file.read(&mut bytes) {
                Ok(0) => return Err(self.end()),
                Ok(len) => {
                    self.segment.push(&bytes[..len]);
                    return Ok(());
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => {
                    let reason = format!("the log cannot be read on: {e}");
                    return Err(ReplayEnd::Corrupt { path: self.path.clone(), reason });
                }
            }
        }
    }

    fn end(&self) -> ReplayEnd {
        let path = self.path.clone();
        match self.segment.finish() {
            SegmentEnd::Truncated { offset } => ReplayEnd::Truncated { path, offset },
            SegmentEnd::Clean { end } => {
                let reached = self.decoder.as_ref().map(Decoder::position).unwrap_or_default();
                let pending = self.decoder.as_ref().map_or(0, Decoder::bytes_pending);
                if reached == end && pending == 0 {
                    return ReplayEnd::Whole;
                }
                ReplayEnd::Corrupt {
                    path,
                    reason: format!("the log ends at {reached}, not at {end} as it says"),
                }
            }
        }
    }

    fn corrupt(&self, error: &SegmentError) -> ReplayEnd {
        ReplayEnd::Corrupt { path: self.path.clone(), reason: error.to_string() }
    }

    fn undecodable(&self, error: &DecodeError) -> ReplayEnd {
        let at = match self.segment.finish() {
            SegmentEnd::Truncated { offset } => format!(" before byte {offset}"),
            SegmentEnd::Clean { .. } => String::new(),
        };
        ReplayEnd::Corrupt {
            path: self.path.clone(),
            reason: format!("the log is corrupt{at}: {error}"),
        }
    }
}

struct Replayer<F> {
    machine: Machine,
    options: ReplayOptions,
    console: F,
    /// Icount at which the caches are dropped next.
    next_drop: Option<u64>,
    digests: u64,
}

impl<F: FnMut(&[u8])> Replayer<F> {
    fn run(&mut self, mut log: LogFile) -> (ReplayEnd, u64) {
        let mut records = 0;
        loop {
            let done = log.next().and_then(|record| self.replay_record(record));
            self.collect();
            match done {
                Ok(()) => records += 1,
                Err(end) => return (end, records),
            }
        }
    }

    fn replay_record(&mut self, record: Record) -> Result<(), ReplayEnd> {
        self.run_to(record.icount)?;
        match record.entry {
            Entry::Mark => {}
            Entry::Digest(recorded) => {
                let here = self.machine.digest();
                if here != recorded {
                    let reason =
                        format!("digest {here:#018x} here, {recorded:#018x} in the recording");
                    return Err(self.diverged(reason));
                }
                self.digests += 1;
            }
            Entry::Input(input) => {
                if let Err(e) = self.machine.apply(&input) {
                    return Err(self.diverged(format!("an input cannot be applied: {e}")));
                }
            }
            Entry::BlkReadLocal { dev, id } => {
                return Err(
                    self.diverged(format!("the log lacks the data of request {id} of disk {dev}"))
                );
            }
        }
        Ok(())
    }

    fn diverged(&self, reason: String) -> ReplayEnd {
        ReplayEnd::Diverged { icount: self.machine.icount(), reason }
    }

    fn run_to(&mut self, until: u64) -> Result<(), ReplayEnd> {
        let never = AtomicBool::new(false);
        while self.machine.icount() < until {
            let here = self.machine.icount();
            let mut stop_at = until.min(here.saturating_add(self.options.slice.max(1)));
            if let (Some(at), Some(every)) = (self.next_drop, self.options.drop_caches_every) {
                if here >= at {
                    self.machine.drop_caches();
                    self.next_drop = Some(here.saturating_add(every.max(1)));
                } else {
                    stop_at = stop_at.min(at);
                }
            }
            let exit = self.machine.run(stop_at, &never);
            self.collect();
            if let Exit::Idle | Exit::Halted = exit
                && self.machine.icount() < until
            {
                return Err(
                    self.diverged(format!("the machine is {exit:?}, the log runs to step {until}"))
                );
            }
        }
        Ok(())
    }

    fn collect(&mut self) {
        for output in self.machine.take_outputs() {
            if let OutputKind::Console { dev: 0, bytes } = output.kind {
                (self.console)(&bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use machine::config::MachineConfig;
    use machine::io::Input;

    use super::super::record::Recording;
    use super::*;

    const PLAIN: ReplayOptions =
        ReplayOptions { slice: u64::MAX, drop_caches_every: None, engine: None };

    /// Counts, for ever.
    fn counting_machine() -> Machine {
        let code = [0x0012_8293u32, 0xffdf_f06f].map(u32::to_le_bytes).concat();
        let config = MachineConfig {
            harts: 1,
            ram_size: 32 << 20,
            nets: vec![],
            disks: vec![],
            consoles: 0,
            rngs: 0,
            rtc_base_ns: 5,
            rng_seed: vec![1, 2, 3],
        };
        let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
        Machine::new(config, images).unwrap()
    }

    fn run_to(machine: &mut Machine, until: u64) {
        assert_eq!(machine.run(until, &AtomicBool::new(false)), Exit::Reached);
    }

    /// Records inputs at 1000 and 2000 and digests after them; the one at 2000 is changed by `error`.
    fn record(dir: &Path, error: u64) {
        let mut machine = counting_machine();
        let mut recording = Recording::start(dir, &machine).unwrap();
        for at in [1000, 2000] {
            run_to(&mut machine, at);
            let input = Input::Console { dev: 0, bytes: b"typed".to_vec() };
            machine.apply(&input).unwrap();
            recording.input(at, &input);
            let wrong = if at == 2000 { error } else { 0 };
            recording.digest(at, machine.digest() ^ wrong);
            recording.mark(at);
        }
        run_to(&mut machine, 3000);
        recording.finish(&mut machine);
        assert!(!recording.is_on());
    }

    fn again(dir: &Path, options: ReplayOptions) -> Replayed {
        replay(dir, options, |_| {}).unwrap()
    }

    #[test]
    fn recording_replays_whole_whatever_the_slices() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("recording");
        record(&dir, 0);
        for slice in [1, 7, 1024, u64::MAX] {
            for drop_caches_every in [None, Some(1), Some(333)] {
                for engine in [None, Some(EngineKind::Interpreter)] {
                    let all = again(&dir, ReplayOptions { slice, drop_caches_every, engine });
                    assert_eq!((all.icount, all.records, all.digests), (3000, 8, 3));
                    assert_eq!(all.end, ReplayEnd::Whole);
                    assert!(engine.is_none_or(|engine| all.engine.kind == engine));
                }
            }
        }
    }

    #[test]
    fn digest_that_differs_is_divergence_where_it_stands() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("recording");
        record(&dir, 1);
        let part = again(&dir, PLAIN);
        assert_eq!((part.icount, part.digests), (2000, 1));
        assert!(matches!(part.end, ReplayEnd::Diverged { icount: 2000, .. }), "{}", part.end);
    }

    #[test]
    fn log_cut_or_changed_anywhere_is_reported_and_never_taken_for_whole() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("recording");
        record(&dir, 0);
        let path = dir.join(LOG_FILE);
        let log = fs::read(&path).unwrap();
        for at in 0..log.len() {
            fs::write(&path, &log[..at]).unwrap();
            let cut = again(&dir, PLAIN);
            assert!(
                matches!(cut.end, ReplayEnd::Truncated { offset, .. } if offset <= at as u64),
                "{}",
                cut.end
            );
            let mut bytes = log.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, &bytes).unwrap();
            let changed = again(&dir, PLAIN);
            let is_found =
                matches!(changed.end, ReplayEnd::Corrupt { .. } | ReplayEnd::Truncated { .. });
            assert!(is_found, "byte {at}: {}", changed.end);
            assert!(cut.icount <= 3000 && changed.icount <= 3000);
        }
    }

    #[test]
    fn what_is_no_recording_is_refused_with_the_file_that_is_wrong() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("recording");
        let refusal = || crate::one_line::one_line(&replay(&dir, PLAIN, |_| {}).unwrap_err());
        assert!(refusal().contains("recording/machine"), "{}", refusal());
        record(&dir, 0);
        let (path, bios) = (dir.join(MACHINE_FILE), dir.join(IMAGE_FILES[0]));
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(refusal().contains("recording/machine: it "), "byte {at}: {}", refusal());
        }
        fs::write(&path, &good).unwrap();
        fs::write(&bios, b"another").unwrap();
        assert!(refusal().contains("recording/bios is not what"), "{}", refusal());
        fs::remove_file(&bios).unwrap();
        assert!(
            refusal().contains("cannot read") && refusal().contains("recording/bios"),
            "{}",
            refusal()
        );
    }

    #[test]
    fn directory_in_use_is_left_alone_and_a_failed_start_leaves_nothing() {
        let work = tempfile::tempdir().unwrap();
        let dir = work.path().join("recording");
        let start = |dir: &Path| Recording::start(dir, &counting_machine());
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("mine"), b"mine").unwrap();
        assert!(start(&dir).unwrap_err().to_string().ends_with("it is not empty"));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        assert!(start(&dir.join("no/such")).is_err());
        assert_eq!(fs::read_dir(work.path()).unwrap().count(), 1);
    }
}

//! The thread that writes the segments of a recording.
//!
//! # Failure
//! What cannot be written ends the recording with one line; the machine's thread hears of it at its next hand-over.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use eventlog::{LogPos, SegmentHeader, SegmentWriter};

use super::recorder::{create, stopped};

/// Bytes that may wait for the disk; a disk that is further behind than this ends the recording.
const WAITING_BYTES_MAX: usize = 256 << 20;
/// Log is written at the latest after this time.
const GATHER_TIME: Duration = Duration::from_millis(20);
/// Log is written at once when this much waits.
const GATHER_BYTES: usize = 256 << 10;

enum Job {
    Write(Vec<u8>),
    /// The segment is complete, another one follows.
    Rotate {
        path: PathBuf,
        header: SegmentHeader,
    },
    Finish(LogPos),
}

/// The machine's end of it. Dropped without [`Self::finish`], it leaves the log as one that was cut off.
#[derive(Debug)]
pub(super) struct LogThread {
    queue: Option<Sender<Job>>,
    /// Bytes in the queue.
    waiting: Arc<AtomicUsize>,
    is_failed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    dir: PathBuf,
}

impl LogThread {
    /// Begins the first segment.
    pub(super) fn start(dir: &Path, path: &Path, header: SegmentHeader) -> std::io::Result<Self> {
        let (file, segment) = begin(path, header)?;
        let (queue, jobs) = channel();
        let (waiting, is_failed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let writer = Writer {
            file,
            segment,
            jobs,
            waiting: Arc::clone(&waiting),
            is_failed: Arc::clone(&is_failed),
            dir: dir.to_owned(),
        };
        let thread =
            std::thread::Builder::new().name("record".to_owned()).spawn(move || writer.run())?;
        Ok(Self {
            queue: Some(queue),
            waiting,
            is_failed,
            thread: Some(thread),
            dir: dir.to_owned(),
        })
    }

    /// Appends to the segment; false when the recording has ended.
    pub(super) fn write(&self, bytes: Vec<u8>) -> bool {
        if self.is_failed.load(Ordering::Relaxed) {
            return false;
        }
        let waiting = self.waiting.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
        if waiting > WAITING_BYTES_MAX {
            if self.fail() {
                stopped(&self.dir, &"the disk is too slow");
            }
            return false;
        }
        self.send(Job::Write(bytes))
    }

    /// Completes the segment and begins another one, where it ends.
    pub(super) fn rotate(&self, path: &Path, header: SegmentHeader) {
        self.send(Job::Rotate { path: path.to_owned(), header });
    }

    fn send(&self, job: Job) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.send(job).is_ok())
    }

    /// The recording ends here, as one that is cut off; says whether it had not before.
    pub(super) fn fail(&self) -> bool {
        !self.is_failed.swap(true, Ordering::Relaxed)
    }

    /// Completes the log; everything is written when this comes back.
    pub(super) fn finish(&mut self, end: LogPos) {
        self.send(Job::Finish(end));
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // The thread has said what it had to say.
            drop(thread.join());
        }
    }
}

fn begin(path: &Path, header: SegmentHeader) -> std::io::Result<(File, SegmentWriter)> {
    let mut head = Vec::new();
    let segment = SegmentWriter::new(header, &mut head);
    let mut file = create(path)?;
    file.write_all(&head)?;
    // Without its name on the disk, what is written would be lost although the segment before is complete.
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok((file, segment))
}

struct Writer {
    file: File,
    segment: SegmentWriter,
    jobs: Receiver<Job>,
    waiting: Arc<AtomicUsize>,
    is_failed: Arc<AtomicBool>,
    dir: PathBuf,
}

impl Writer {
    fn run(mut self) {
        if let Err(e) = self.write_all()
            && !self.is_failed.swap(true, Ordering::Relaxed)
        {
            stopped(&self.dir, &e);
        }
    }

    fn write_all(&mut self) -> std::io::Result<()> {
        let mut next = None;
        while let Some(job) = next.take().or_else(|| self.jobs.recv().ok()) {
            match job {
                Job::Write(first) => {
                    let (payload, after) = self.gather(first);
                    for (head, part) in SegmentWriter::frames(&payload) {
                        self.file.write_all(&head)?;
                        self.file.write_all(part)?;
                    }
                    self.waiting.fetch_sub(payload.len(), Ordering::Relaxed);
                    next = after;
                }
                Job::Rotate { path, header } => {
                    // A segment that is complete while nothing follows it is the end of a recording: not so after a
                    // crash between the two.
                    let next = begin(&path, header)?;
                    self.end(header.start)?;
                    (self.file, self.segment) = next;
                }
                Job::Finish(end) => self.end(end)?,
            }
        }
        Ok(())
    }

    /// Completes the segment, unless the recording has failed: then it is one that is cut off.
    fn end(&mut self, end: LogPos) -> std::io::Result<()> {
        if self.is_failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut out = Vec::new();
        self.segment.finish(end, &mut out);
        self.file.write_all(&out)?;
        self.file.sync_all()
    }

    /// What comes in the next moments makes one frame; with a job that is not for it.
    fn gather(&self, first: Vec<u8>) -> (Vec<u8>, Option<Job>) {
        let (mut payload, until) = (first, Instant::now() + GATHER_TIME);
        while payload.len() < GATHER_BYTES {
            match self.jobs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Job::Write(more)) => payload.extend_from_slice(&more),
                Ok(other) => return (payload, Some(other)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        (payload, None)
    }
}

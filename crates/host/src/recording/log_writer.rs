//! The thread that writes the segments of a recording.
//!
//! # Invariants
//! - INV-LOG-WRITER-1: log that comes while some waits wakes nobody: a wake-up costs the machine's thread more than a
//!   record does, and there is a record for every slice.
//!
//! # Failure
//! What cannot be written ends the recording with one line; the machine's thread hears of it at its next hand-over.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use eventlog::{LogPos, SegmentHeader, SegmentWriter};

use super::recorder::{create, stopped};

/// Bytes that may wait for the disk; a disk that is further behind than this ends the recording.
const WAITING_BYTES_MAX: usize = 256 << 20;
/// Log is written at the latest after this time.
const GATHER_TIME: Duration = Duration::from_millis(50);
/// Log is written at once when this much waits.
const GATHER_BYTES: usize = 256 << 10;

#[derive(Debug)]
enum Job {
    Write(Vec<u8>),
    /// The segment is complete, another one follows.
    Rotate {
        path: PathBuf,
        header: SegmentHeader,
    },
    Finish(LogPos),
}

/// What the thread has to do.
#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Bytes of log that are not written yet.
    waiting: usize,
    /// Nothing more comes.
    is_closed: bool,
}

#[derive(Debug, Default)]
struct Common {
    queue: Mutex<Queue>,
    arrived: Condvar,
    is_failed: AtomicBool,
}

impl Common {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_failed(&self) -> bool {
        self.is_failed.load(Ordering::Relaxed)
    }
}

impl Queue {
    /// Puts it at the end; says whether the thread is to hear of it.
    fn push(&mut self, job: Job) -> bool {
        let was_empty = self.jobs.is_empty();
        match (self.jobs.back_mut(), job) {
            // What a slow disk leaves waiting is not moved again and again: it stays in pieces of about that size.
            (Some(Job::Write(bytes)), Job::Write(more)) if bytes.len() < GATHER_BYTES => {
                bytes.extend_from_slice(&more);
                bytes.len() >= GATHER_BYTES
            }
            (_, job @ Job::Write(_)) => {
                self.jobs.push_back(job);
                was_empty
            }
            (_, job @ (Job::Rotate { .. } | Job::Finish(_))) => {
                self.jobs.push_back(job);
                true
            }
        }
    }

    /// Whether nothing that comes would be written with what is there.
    fn is_ripe(&self) -> bool {
        self.is_closed
            || self.jobs.len() > 1
            || !matches!(self.jobs.front(), Some(Job::Write(bytes)) if bytes.len() < GATHER_BYTES)
    }
}

/// The machine's end of it. Dropped without [`Self::finish`], it leaves the log as one that was cut off.
#[derive(Debug)]
pub(super) struct LogThread {
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
    dir: PathBuf,
}

impl LogThread {
    /// Begins the first segment.
    pub(super) fn start(dir: &Path, path: &Path, header: SegmentHeader) -> std::io::Result<Self> {
        let (file, segment) = begin(path, header)?;
        let common = Arc::<Common>::default();
        let writer = Writer { file, segment, common: Arc::clone(&common), dir: dir.to_owned() };
        let thread =
            std::thread::Builder::new().name("record".to_owned()).spawn(move || writer.run())?;
        Ok(Self { common, thread: Some(thread), dir: dir.to_owned() })
    }

    /// Appends to the segment; false when the recording has ended.
    pub(super) fn write(&self, bytes: Vec<u8>) -> bool {
        if self.common.is_failed() {
            return false;
        }
        if bytes.is_empty() {
            return true;
        }
        let mut queue = self.common.queue();
        queue.waiting += bytes.len();
        if queue.waiting > WAITING_BYTES_MAX {
            drop(queue);
            if self.fail() {
                stopped(&self.dir, &"the disk is too slow");
            }
            return false;
        }
        self.push(queue, Job::Write(bytes));
        true
    }

    /// Completes the segment and begins another one, where it ends.
    pub(super) fn rotate(&self, path: &Path, header: SegmentHeader) {
        self.push(self.common.queue(), Job::Rotate { path: path.to_owned(), header });
    }

    fn push(&self, mut queue: MutexGuard<'_, Queue>, job: Job) {
        let is_told = queue.push(job);
        drop(queue);
        if is_told {
            self.common.arrived.notify_one();
        }
    }

    /// The recording ends here, as one that is cut off; says whether it had not before.
    pub(super) fn fail(&self) -> bool {
        !self.common.is_failed.swap(true, Ordering::Relaxed)
    }

    /// Completes the log; everything is written when this comes back.
    pub(super) fn finish(&mut self, end: LogPos) {
        self.push(self.common.queue(), Job::Finish(end));
        self.close();
        if let Some(thread) = self.thread.take() {
            // The thread has said what it had to say.
            drop(thread.join());
        }
    }

    fn close(&self) {
        self.common.queue().is_closed = true;
        self.common.arrived.notify_one();
    }
}

impl Drop for LogThread {
    fn drop(&mut self) {
        self.close();
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
    common: Arc<Common>,
    dir: PathBuf,
}

impl Writer {
    fn run(mut self) {
        if let Err(e) = self.write_all()
            && !self.common.is_failed.swap(true, Ordering::Relaxed)
        {
            stopped(&self.dir, &e);
        }
    }

    fn write_all(&mut self) -> std::io::Result<()> {
        while let Some(job) = self.next() {
            match job {
                Job::Write(payload) => {
                    for (head, part) in SegmentWriter::frames(&payload) {
                        self.file.write_all(&head)?;
                        self.file.write_all(part)?;
                    }
                    self.common.queue().waiting -= payload.len();
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

    /// Waits for something to do; log waits for more of it, [`GATHER_TIME`] at most, so that it makes one frame.
    fn next(&self) -> Option<Job> {
        let mut queue = self.common.queue();
        while queue.jobs.is_empty() && !queue.is_closed {
            queue = self.common.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let gathered = self.common.arrived.wait_timeout_while(queue, GATHER_TIME, |q| !q.is_ripe());
        let (mut queue, _) = gathered.unwrap_or_else(PoisonError::into_inner);
        queue.jobs.pop_front()
    }

    /// Completes the segment, unless the recording has failed: then it is one that is cut off.
    fn end(&mut self, end: LogPos) -> std::io::Result<()> {
        if self.common.is_failed() {
            return Ok(());
        }
        let mut out = Vec::new();
        self.segment.finish(end, &mut out);
        self.file.write_all(&out)?;
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_behind_log_that_waits_wakes_nobody_until_there_is_much() {
        let mut queue = Queue::default();
        assert!(queue.push(Job::Write(vec![1])));
        assert!(!queue.push(Job::Write(vec![2])));
        assert!(!queue.is_ripe());
        assert!(queue.push(Job::Write(vec![0; GATHER_BYTES])));
        assert!(queue.is_ripe());
        assert!(!queue.push(Job::Write(vec![3])));
        let Some(Job::Write(bytes)) = queue.jobs.pop_front() else { panic!("it is log") };
        assert_eq!((bytes.len(), bytes[0], bytes[1]), (GATHER_BYTES + 2, 1, 2));
        let Some(Job::Write(bytes)) = queue.jobs.pop_front() else { panic!("it is log") };
        assert_eq!(bytes, [3]);
        assert!(queue.push(Job::Write(vec![4])));
        assert!(queue.push(Job::Finish(LogPos::default())));
        assert!(queue.is_ripe());
    }
}

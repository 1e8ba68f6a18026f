//! Disks: requests are carried out strictly in the order of submission, by one thread for each disk.
//!
//! # Place
//! The run loop opens an [`Image`], starts a [`DiskHandle`] and submits requests; completions come back through the
//! function given at the start, called on the disk's thread, which therefore must not wait for the run loop.
//! [`copy`] reads a disk for a new mirror while requests go on; [`mirror`] is the receiving side.
//!
//! # Invariants
//! - INV-DISK-1: request n+1 starts after request n ended, so two disks given the same requests have the same contents.
//! - INV-DISK-2: a flush that ended with [`BlkStatus::Ok`] comes after fdatasync of all writes before it.
//! - A discarded range reads as zeroes, on every host.
//!
//! # Failure
//! A request that fails is completed with [`BlkStatus::IoErr`] and one line that names the file; the disk goes on.
//! Dropping the handle carries out what was submitted, then ends the thread.

mod changes;
pub mod copy;
mod format;
mod image;
pub mod lock;
pub mod mirror;
pub mod qcow2;
mod queue;
mod raw;
mod source;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use machine::io::{BlkOp, BlkStatus};

use self::changes::Changes;
pub use self::changes::OPENED;
use self::copy::{ChunkSink, Copier, CopyProgress, Step};
pub use self::format::{DiskFormat, looks_like};
pub use self::image::{Image, OpenImageError, OpenMode};
use self::queue::Queue;
pub(crate) use self::raw::write_zeroes;
pub use self::source::{DiskSource, Place};

/// Most requests waiting for one disk; a submission waits beyond that.
pub const REQUESTS_MAX: usize = 1024;
/// Most bytes of waiting writes; a submission waits beyond that.
pub const REQUEST_BYTES_MAX: usize = 128 << 20;
/// Longest read that is carried out.
pub const READ_BYTES_MAX: u32 = 32 << 20;
/// While a copy is under way and requests keep coming, a slice of it follows this many requests.
const REQUESTS_PER_SLICE: u32 = 4;
/// How long a copy waits before it offers a chunk again to a sink that was full.
const SINK_FULL_WAIT: Duration = Duration::from_millis(1);

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Index of the block device.
    pub dev: u8,
    /// The request's id.
    pub id: u64,
    /// Status for the guest.
    pub status: BlkStatus,
    /// The data of a read that succeeded.
    pub data: Vec<u8>,
    /// One line for people when it failed.
    pub error: Option<String>,
}

/// What is known about a disk, for status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskStatus {
    /// Requests that failed since the start.
    pub errors: u64,
    /// The last failure, as one line.
    pub last_error: Option<String>,
    /// The copy for a mirror under way or the last one, if any.
    pub copy: Option<CopyProgress>,
    /// The same for snapshots.
    pub snapshot: Option<CopyProgress>,
}

#[derive(Debug)]
enum Message {
    Request { id: u64, op: BlkOp },
    BeginCopy { sink: Box<dyn ChunkSink> },
    FreezeCopy { point: u64 },
    AbortCopy,
    Snapshot { sink: Box<dyn ChunkSink>, number: u32, base: Option<u32> },
    Stop,
}

/// A disk with its thread.
#[derive(Debug)]
pub struct DiskHandle {
    queue: Arc<Queue<Message>>,
    status: Arc<Status>,
    size: u64,
    thread: Option<JoinHandle<()>>,
}

/// Guards what the disk's thread tells and anybody may ask; no other lock is taken while it is held.
#[derive(Debug, Default)]
struct Status(Mutex<DiskStatus>);

impl Status {
    fn lock(&self) -> MutexGuard<'_, DiskStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskHandle {
    /// Starts the disk's thread; `done` is called there for each completion.
    ///
    /// # Errors
    /// The thread could not be created.
    pub fn start(
        dev: u8,
        image: Image,
        done: impl FnMut(Completion) + Send + 'static,
    ) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::new(REQUESTS_MAX, REQUEST_BYTES_MAX));
        let status = Arc::new(Status::default());
        let size = image.size();
        let worker = Worker {
            dev,
            image,
            done: Box::new(done),
            queue: Arc::clone(&queue),
            status: Arc::clone(&status),
            copier: None,
            changes: Changes::new(size),
            saver: None,
        };
        let thread =
            std::thread::Builder::new().name(format!("disk{dev}")).spawn(move || worker.run())?;
        Ok(Self { queue, status, size, thread: Some(thread) })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Puts a request at the end of the queue. Waits while the queue is full.
    pub fn submit(&self, id: u64, op: BlkOp) {
        let bytes = if let BlkOp::Write { data, .. } = &op { data.len() } else { 0 };
        self.queue.push(Message::Request { id, op }, bytes);
    }

    /// Requests that wait; the one being carried out is not counted.
    #[must_use]
    pub fn waiting_count(&self) -> usize {
        self.queue.len()
    }

    /// Starts to copy the disk to `sink` while requests go on; a copy under way is dropped. Progress is in
    /// [`Self::status`].
    pub fn begin_copy(&self, sink: Box<dyn ChunkSink>) {
        // Whoever looks before the disk's thread has begun must not see how an earlier copy went.
        self.status.lock().copy = None;
        self.queue.push_unbounded(Message::BeginCopy { sink });
    }

    /// Fixes the contents that the copy ends with: those after every request submitted before this call and none
    /// submitted after it. `point` is handed to the sink with the end of the copy.
    pub fn freeze_copy(&self, point: u64) {
        self.queue.push_unbounded(Message::FreezeCopy { point });
    }

    /// Drops the copy under way, if any; its sink is dropped without an end.
    pub fn abort_copy(&self) {
        self.queue.push_unbounded(Message::AbortCopy);
    }

    /// Gives the contents to `sink` that the disk has after every request submitted before this call and none submitted
    /// after it, while requests go on; a snapshot under way is dropped. Only chunks that may have changed since `base`, the
    /// number of an earlier call or [`OPENED`], if there is one. Numbers rise from call to call.
    pub fn begin_snapshot(&self, sink: Box<dyn ChunkSink>, number: u32, base: Option<u32>) {
        self.status.lock().snapshot = None;
        self.queue.push_unbounded(Message::Snapshot { sink, number, base });
    }

    /// What is known now.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        self.status.lock().clone()
    }
}

impl Drop for DiskHandle {
    fn drop(&mut self) {
        self.queue.push_unbounded(Message::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the disk's thread was already reported by the panic hook.
            drop(thread.join());
        }
    }
}

struct Worker {
    dev: u8,
    image: Image,
    done: Box<dyn FnMut(Completion) + Send>,
    queue: Arc<Queue<Message>>,
    status: Arc<Status>,
    /// Copies to a mirror.
    copier: Option<Copier>,
    changes: Changes,
    /// Copies into a snapshot.
    saver: Option<Copier>,
}

impl Worker {
    fn run(mut self) {
        let mut since_slice = 0;
        // How long the queue may be waited for; without a copy under way there is nothing else to do.
        let mut wait = None;
        loop {
            match self.queue.pop(wait) {
                Some(Message::Request { id, op }) => {
                    self.serve(id, op);
                    since_slice += 1;
                    if since_slice < REQUESTS_PER_SLICE {
                        continue;
                    }
                }
                Some(Message::BeginCopy { sink }) => {
                    self.copier = Some(Copier::new(sink, self.image.size()));
                }
                Some(Message::FreezeCopy { point }) => {
                    if let Some(copier) = &mut self.copier {
                        copier.freeze(point);
                    }
                }
                Some(Message::AbortCopy) => self.copier = None,
                Some(Message::Snapshot { sink, number, base }) => {
                    let changed = base.map(|base| self.changes.since(base));
                    self.changes.begin(number);
                    let size = self.image.size();
                    self.saver = Some(Copier::frozen(sink, size, changed, u64::from(number)));
                }
                Some(Message::Stop) => return,
                None => {}
            }
            since_slice = 0;
            wait = self.copy_slice();
        }
    }

    /// Copies for a while; returns how long the queue may then be waited for.
    fn copy_slice(&mut self) -> Option<Duration> {
        let (copy, mirror_wait) = slice(&mut self.copier, &self.image);
        let (snapshot, snapshot_wait) = slice(&mut self.saver, &self.image);
        let mut known = self.status.lock();
        known.copy = copy.or(known.copy.take());
        known.snapshot = snapshot.or(known.snapshot.take());
        mirror_wait.into_iter().chain(snapshot_wait).min()
    }

    fn serve(&mut self, id: u64, op: BlkOp) {
        if let Some((offset, len)) = written_range(&op)
            && self.image.check_write(offset, len).is_ok()
        {
            for copier in self.copier.iter_mut().chain(&mut self.saver) {
                copier.before_write(&self.image, offset, len);
            }
            self.changes.mark(offset, len);
        }
        let result = match op {
            BlkOp::Read { offset, len } if len > READ_BYTES_MAX => {
                Err(self.image.fail("read", offset, &"the request is too long"))
            }
            BlkOp::Read { offset, len } => self.image.read(offset, len as usize),
            BlkOp::Write { offset, data } => self.image.write(offset, &data).map(|()| Vec::new()),
            BlkOp::Flush => self.image.flush().map(|()| Vec::new()),
            BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
                self.image.zero(offset, len).map(|()| Vec::new())
            }
        };
        let (status, data, error) = match result {
            Ok(data) => (BlkStatus::Ok, data, None),
            Err(error) => (BlkStatus::IoErr, Vec::new(), Some(error)),
        };
        if let Some(error) = &error {
            let mut known = self.status.lock();
            known.errors += 1;
            known.last_error = Some(error.clone());
        }
        (self.done)(Completion { dev: self.dev, id, status, data, error });
    }
}

/// Goes on with a copy, if there is one; says how far it is, and how long the queue may then be waited for.
fn slice(copier: &mut Option<Copier>, image: &Image) -> (Option<CopyProgress>, Option<Duration>) {
    let Some(copy) = copier else { return (None, None) };
    let step = copy.step(image);
    let progress = copy.progress();
    let wait = match step {
        Step::More => Some(Duration::ZERO),
        Step::SinkFull => Some(SINK_FULL_WAIT),
        Step::Waiting => None,
        Step::Ended => {
            *copier = None;
            None
        }
    };
    (Some(progress), wait)
}

fn written_range(op: &BlkOp) -> Option<(u64, u64)> {
    match op {
        BlkOp::Write { offset, data } => Some((*offset, data.len() as u64)),
        BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
            Some((*offset, *len))
        }
        BlkOp::Read { .. } | BlkOp::Flush => None,
    }
}

#[cfg(test)]
mod tests;

//! Disks: requests are carried out many at once, and those whose order matters in the order of submission.
//!
//! # Place
//! The run loop opens an [`Image`], starts a [`DiskHandle`] and submits requests; completions come back through the
//! function given at the start, called on the disk's thread or within the submission, which therefore must not wait for the
//! run loop. `worker` is the disk's thread, `order` decides what may start, `uring` and `pool` carry out what takes longer,
//! `limit` slows down. [`copy`] reads a disk for a new mirror while requests go on; [`mirror`] is the receiving side.
//!
//! # Invariants
//! - INV-DISK-1: requests that overlap, one of them writing, are carried out in the order of submission, so two disks given
//!   the same requests have the same contents.
//! - INV-DISK-2: a flush that ended with [`BlkStatus::Ok`] comes after fdatasync of all writes submitted before it.
//! - INV-DISK-3: a copy or snapshot has the contents after every request submitted before its moment, and none after it.
//! - A discarded range reads as zeroes, on every host.
//!
//! # Failure
//! A request that fails is completed with [`BlkStatus::IoErr`] and one line that names the file; the disk goes on.
//! Dropping the handle carries out what was submitted, then ends the thread.

pub mod bitmap;
mod changes;
pub mod convert;
pub mod copy;
mod format;
mod image;
pub mod journal;
pub mod keeper;
mod limit;
pub mod lock;
pub mod mirror;
mod nbd;
mod order;
mod pool;
pub mod qcow2;
mod queue;
mod raw;
pub mod record;
pub mod resync;
mod source;
mod uring;
mod worker;

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use machine::io::{BlkOp, BlkStatus};

pub use self::changes::OPENED;
use self::copy::{ChunkSink, CopyProgress, MirrorPlan};
pub use self::format::{DiskFormat, looks_like};
pub use self::image::{Image, OpenImageError, OpenMode};
use self::keeper::{KeeperOrder, MirrorPoint};
use self::limit::Limiter;
pub use self::limit::Limits;
pub use self::nbd::{NbdError, NbdUrl, PATIENCE_DEFAULT};
use self::order::Ticket;
use self::pool::Pool;
use self::queue::Queue;
pub(crate) use self::raw::write_zeroes;
pub use self::source::{DiskSource, Place};
use self::uring::Ring;
use self::worker::{Common, Done, Executors, Notes, Worker};

/// Most requests waiting for one disk; a submission waits beyond that.
pub const REQUESTS_MAX: usize = 1024;
/// Most bytes of waiting writes; a submission waits beyond that.
pub const REQUEST_BYTES_MAX: usize = 128 << 20;
/// Longest read that is carried out.
pub const READ_BYTES_MAX: u32 = machine::io::BLK_READ_MAX as u32;
/// Longest read that is carried out within the submission, where the page cache has its data.
const READ_AT_ONCE_BYTES_MAX: u32 = 128 << 10;
/// How long whoever has a disk grow waits for the requests before that.
const GROW_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a copy waits before it offers a chunk again to a sink that was full.
const SINK_FULL_WAIT: Duration = Duration::from_millis(1);

/// What carries out requests that take longer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aio {
    /// io_uring where the image is a file and the kernel allows it, threads otherwise.
    #[default]
    Auto,
    /// io_uring; a disk that cannot have it is not started.
    IoUring,
    /// Threads.
    Threads,
}

impl std::str::FromStr for Aio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "threads" => Ok(Self::Threads),
            _ => Err(format!("{text:?} is none of auto, io_uring and threads")),
        }
    }
}

/// How a disk is run on this host; nothing of it is seen by the guest.
#[derive(Debug, Clone, Default)]
pub struct DiskOptions {
    /// What carries out requests that take longer.
    pub aio: Aio,
    /// Limits.
    pub limits: Limits,
    /// Called before a request is carried out, in place of whatever is faster than threads; may give its error.
    #[cfg(test)]
    pub(in crate::disk) fault: Option<tests::Fault>,
}

impl DiskOptions {
    /// These.
    #[must_use]
    pub fn new(aio: Aio, limits: Limits) -> Self {
        Self {
            aio,
            limits,
            #[cfg(test)]
            fault: None,
        }
    }
}

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
    /// In force for requests that have not started.
    pub limits: Limits,
}

#[derive(Debug)]
enum Message {
    Request { id: u64, op: BlkOp },
    BeginCopy { sink: Box<dyn ChunkSink>, plan: Option<MirrorPlan> },
    FreezeCopy { point: u64, mirror: Option<MirrorPoint> },
    Keeper(KeeperOrder),
    AbortCopy,
    Snapshot { sink: Box<dyn ChunkSink>, number: u32, base: Option<u32> },
    Grow { size: u64, told: SyncSender<Result<u64, String>> },
    Stop,
}

/// What overtakes messages.
#[derive(Debug)]
enum Note {
    Finished { ticket: Ticket, result: Result<Vec<u8>, String> },
    Limits(Limits),
}

/// A disk with its thread.
pub struct DiskHandle {
    dev: u8,
    queue: Notes,
    common: Arc<Common>,
    done: Done,
    status: Arc<Status>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskHandle").field("common", &self.common).finish_non_exhaustive()
    }
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
    /// Starts the disk's thread; `done` is called for each completion, there or within the submission.
    ///
    /// # Errors
    /// The thread could not be created, or the io_uring that the options ask for.
    pub fn start(
        dev: u8,
        image: Image,
        options: DiskOptions,
        done: impl Fn(Completion) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        #[cfg(test)]
        let fault = options.fault.clone();
        #[cfg(not(test))]
        let fault: Option<()> = None;
        let is_direct = fault.is_none();
        let (image, done): (_, Done) = (Arc::new(image), Arc::new(done));
        let (ring, bell) = ring(&image, options.aio, is_direct)?;
        let queue = Arc::new(Queue::new(REQUESTS_MAX, REQUEST_BYTES_MAX, bell));
        let limits = options.limits;
        let status = Arc::new(Status(Mutex::new(DiskStatus { limits, ..DiskStatus::default() })));
        let common = Arc::new(Common::new(Arc::clone(&image), is_direct, limits.is_any()));
        #[cfg_attr(not(test), expect(unused_mut, reason = "tests change it"))]
        let mut pool = Pool::new(format!("disk{dev}-io"), image, Arc::clone(&queue));
        #[cfg(test)]
        pool.set_fault(fault);
        let executors = Executors { ring, pool, is_direct };
        let worker = Worker::new(
            (dev, Arc::clone(&common)),
            Arc::clone(&done),
            Arc::clone(&queue),
            Arc::clone(&status),
            executors,
            Limiter::new(limits),
        );
        let thread =
            std::thread::Builder::new().name(format!("disk{dev}")).spawn(move || worker.run())?;
        Ok(Self { dev, queue, common, done, status, thread: Some(thread) })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.common.image.size()
    }

    /// Puts a request at the end of the queue. Waits while the queue is full. A read whose data are at hand, with nothing
    /// before it, ends within this call.
    pub fn submit(&self, id: u64, op: BlkOp) {
        let common = &self.common;
        if let BlkOp::Read { offset, len } = op
            && len <= READ_AT_ONCE_BYTES_MAX
            && common.outstanding.load(Ordering::Acquire) == 0
            && !common.is_limited.load(Ordering::Relaxed)
            && let Some(data) = common.read_cached(offset, len)
        {
            let (dev, status) = (self.dev, BlkStatus::Ok);
            return (self.done)(Completion { dev, id, status, data, error: None });
        }
        common.outstanding.fetch_add(1, Ordering::AcqRel);
        let bytes = if let BlkOp::Write { data, .. } = &op { data.len() } else { 0 };
        self.queue.push(Message::Request { id, op }, bytes);
    }

    /// Changes the limits, for requests that have not started too.
    pub fn set_limits(&self, limits: Limits) {
        self.status.lock().limits = limits;
        self.common.is_limited.store(limits.is_any(), Ordering::Relaxed);
        self.queue.note(Note::Limits(limits));
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
        self.queue.push_unbounded(Message::BeginCopy { sink, plan: None });
    }

    /// As [`Self::begin_copy`], for a host that may have a copy already.
    pub fn begin_mirror(&self, sink: Box<dyn ChunkSink>, plan: MirrorPlan) {
        self.status.lock().copy = None;
        self.queue.push_unbounded(Message::BeginCopy { sink, plan: Some(plan) });
    }

    /// As [`Self::freeze_copy`], with a checkpoint there.
    pub fn freeze_mirror(&self, point: u64, mirror: MirrorPoint) {
        self.queue.push_unbounded(Message::FreezeCopy { point, mirror: Some(mirror) });
    }

    /// Tells the disk's journal something, at this point in the order of requests.
    pub fn keep(&self, order: KeeperOrder) {
        self.queue.push_unbounded(Message::Keeper(order));
    }

    /// Fixes the contents that the copy ends with: those after every request submitted before this call and none
    /// submitted after it. `point` is handed to the sink with the end of the copy.
    pub fn freeze_copy(&self, point: u64) {
        self.queue.push_unbounded(Message::FreezeCopy { point, mirror: None });
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

    /// Makes the disk have at least `size` bytes, after every request submitted before this call: a file grows, anything
    /// else has to have grown by now. Waits for that; says how many bytes it has.
    ///
    /// # Errors
    /// One line: it cannot, or a copy of it is under way.
    pub fn grow(&self, size: u64) -> Result<u64, String> {
        let (told, answer) = sync_channel(1);
        self.queue.push_unbounded(Message::Grow { size, told });
        let grown = answer.recv_timeout(GROW_TIME_MAX);
        grown.unwrap_or_else(|_| Err(format!("disk {} does not answer", self.dev)))
    }

    /// What is known now.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        self.status.lock().clone()
    }
}

/// The ring of an image, with the bell that wakes who waits there.
fn ring(
    image: &Arc<Image>,
    aio: Aio,
    is_direct: bool,
) -> std::io::Result<(Option<Ring>, Option<Arc<OwnedFd>>)> {
    let is_wanted = match aio {
        Aio::Auto => is_direct && image.raw_file().is_some(),
        Aio::IoUring => true,
        Aio::Threads => false,
    };
    if !is_wanted {
        return Ok((None, None));
    }
    let bell = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?);
    match Ring::new(Arc::clone(image), Arc::clone(&bell)) {
        Ok(ring) => Ok((Some(ring), Some(bell))),
        Err(_) if aio == Aio::Auto => Ok((None, None)),
        Err(e) => Err(e),
    }
}

impl Drop for DiskHandle {
    fn drop(&mut self) {
        self.queue.note(Note::Limits(Limits::default()));
        self.queue.push_unbounded(Message::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the disk's thread was already reported by the panic hook.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests;

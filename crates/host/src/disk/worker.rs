//! The thread of one disk: it takes requests, says which may start, and carries them out or has them carried out.
//!
//! # Place
//! [`super::DiskHandle`] starts it and talks to it through the [`Queue`]. What is sure not to wait it does itself: what the
//! page cache has (a read with RWF_NOWAIT), and writes into it as long as they are quick. A wake-up of another thread, or a
//! turn of io_uring, takes longer than that. The rest goes to an io_uring or, for what has no file or where the kernel has
//! none, to threads.
//!
//! # Invariants
//! - INV-WORKER-1: a write is announced (copies see the old contents, bitmaps are marked) before it starts, and copies in
//!   passes take its chunks again after it has ended.
//! - INV-WORKER-2: the beginning of a copy, its freeze, a snapshot and a change of size are barriers: what was submitted
//!   before is done, and nothing submitted later has started.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use machine::io::{BlkOp, BlkStatus};
use rustix::io::{Errno, ReadWriteFlags};

use super::changes::Changes;
use super::copy::{Copier, CopyProgress, Step};
use super::journal::Journal;
use super::keeper::Keeper;
use super::limit::Limiter;
use super::order::{Extent, Order, Ticket};
use super::pool::Pool;
use super::queue::Queue;
use super::record::CheckpointId;
use super::uring::{Ring, RingDone, RingOp};
use super::{Completion, Image, Message, Note, READ_BYTES_MAX, SINK_FULL_WAIT, Status};

/// While a copy is under way and requests keep coming, a slice of it follows this many requests.
const REQUESTS_PER_SLICE: u32 = 4;
/// Most requests that are looked at, to be carried out at once where they may; the others wait in the queue.
const REQUESTS_AT_ONCE_MAX: usize = 128;
/// Most bytes of their writes.
const BYTES_AT_ONCE_MAX: usize = 64 << 20;
/// A write that took longer was waiting for the disk: for a while others are not waited for here.
const QUICK_WRITE: Duration = Duration::from_millis(1);
/// After a request, others are likely to come for so long.
const BUSY_TIME: Duration = Duration::from_millis(10);
/// How long such a while is.
const SLOW_TIME: Duration = Duration::from_millis(100);

pub(super) type Notes = Arc<Queue<Message, Note>>;
pub(super) type Done = Arc<dyn Fn(Completion) + Send + Sync>;

/// What a disk's thread and those who submit requests share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) image: Arc<Image>,
    /// Requests submitted and not done.
    pub(super) outstanding: AtomicUsize,
    /// Whether reads can ask for what the page cache has.
    has_cached: AtomicBool,
    /// Whether every request has to pass the disk's thread.
    pub(super) is_limited: AtomicBool,
}

impl Common {
    pub(super) fn new(image: Arc<Image>, has_cached: bool, is_limited: bool) -> Self {
        let has_cached = AtomicBool::new(has_cached && image.raw_file().is_some());
        let is_limited = AtomicBool::new(is_limited);
        Self { image, outstanding: AtomicUsize::new(0), has_cached, is_limited }
    }

    /// Reads what is in the page cache as a whole; nothing where it is not, or nobody knows.
    pub(super) fn read_cached(&self, offset: u64, len: u32) -> Option<Vec<u8>> {
        let file = self.image.raw_file().filter(|_| self.has_cached.load(Ordering::Relaxed))?;
        if len > READ_BYTES_MAX || offset.checked_add(len.into())? > self.image.size() {
            return None;
        }
        let mut data = vec![0; len as usize];
        let slices = &mut [IoSliceMut::new(&mut data)];
        match rustix::io::preadv2(file, slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(n) if n == len as usize => Some(data),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.has_cached.store(false, Ordering::Relaxed);
                None
            }
            Ok(_) | Err(_) => None,
        }
    }
}

/// A request that has not started.
#[derive(Debug)]
pub(super) struct Work {
    id: u64,
    op: BlkOp,
}

/// A request that has started.
#[derive(Debug)]
struct Running {
    id: u64,
    written: Option<(u64, u64)>,
    bytes: usize,
    /// The checkpoint that it makes durable.
    flushes: Option<CheckpointId>,
}

/// What carries out what this thread does not.
#[derive(Debug)]
pub(super) struct Executors {
    pub(super) ring: Option<Ring>,
    pub(super) pool: Pool,
    /// Whether requests may be carried out on the disk's thread.
    pub(super) is_direct: bool,
}

pub(super) struct Worker {
    pub(super) dev: u8,
    pub(super) common: Arc<Common>,
    pub(super) done: Done,
    pub(super) queue: Notes,
    pub(super) status: Arc<Status>,
    order: Order<Work>,
    running: BTreeMap<Ticket, Running>,
    /// Bytes of the writes in `order`.
    held_bytes: usize,
    executors: Executors,
    limiter: Limiter,
    /// What waits for everything before it.
    barrier: Option<Message>,
    /// Whether writes can be tried without waiting.
    has_quick_writes: bool,
    /// When a request last started, while there is a copy.
    last_request: Option<Instant>,
    /// Until when writes are not waited for here.
    slow_until: Option<Instant>,
    /// Copies to a mirror.
    copier: Option<Copier>,
    changes: Changes,
    /// Copies into a snapshot.
    saver: Option<Copier>,
    /// What the copy may differ in from those on other hosts.
    keeper: Keeper,
}

impl Worker {
    pub(super) fn new(
        (dev, common): (u8, Arc<Common>),
        done: Done,
        queue: Notes,
        status: Arc<Status>,
        executors: Executors,
        limiter: Limiter,
    ) -> Self {
        let changes = Changes::new(common.image.size());
        Self {
            dev,
            common,
            done,
            queue,
            status,
            order: Order::new(),
            running: BTreeMap::new(),
            held_bytes: 0,
            executors,
            limiter,
            barrier: None,
            has_quick_writes: true,
            last_request: None,
            slow_until: None,
            copier: None,
            changes,
            saver: None,
            keeper: Keeper::default(),
        }
    }

    pub(super) fn run(mut self) {
        loop {
            for note in self.queue.take_notes() {
                match note {
                    Note::Finished { ticket, result } => self.finish(ticket, result),
                    Note::Limits(limits) => self.limiter = Limiter::new(limits),
                }
            }
            self.take_from_ring();
            self.admit();
            let start_wait = self.start_requests();
            if self.order.is_empty()
                && let Some(message) = self.barrier.take()
            {
                if matches!(message, Message::Stop) {
                    return self.close();
                }
                self.pass_barrier(message);
                continue;
            }
            let copy_wait = self.copy_slice();
            self.wait(start_wait.into_iter().chain(copy_wait).min());
        }
    }

    fn wants_more(&self) -> bool {
        self.barrier.is_none()
            && self.order.len() < REQUESTS_AT_ONCE_MAX
            && self.held_bytes < BYTES_AT_ONCE_MAX
    }

    /// Takes from the queue what may be looked at.
    fn admit(&mut self) {
        while self.wants_more() {
            match self.queue.pop() {
                None => return,
                Some(Message::Request { id, op }) => {
                    self.held_bytes += data_bytes(&op);
                    self.order.add(extent(&op), Work { id, op });
                }
                Some(barrier) => self.barrier = Some(barrier),
            }
        }
    }

    /// Starts what may start; says how long to wait at most before the next look.
    fn start_requests(&mut self) -> Option<Duration> {
        let is_copying = self.copier.is_some() || self.saver.is_some();
        let is_stopping = matches!(self.barrier, Some(Message::Stop));
        let mut started = 0;
        while let Some(work) = self.order.peek() {
            if is_copying && started == REQUESTS_PER_SLICE {
                return Some(Duration::ZERO);
            }
            if self.limiter.is_any() && !is_stopping {
                let bytes = limited_bytes(&work.op);
                let wait = self.limiter.wait(Instant::now());
                match bytes {
                    Some(_) if !wait.is_zero() => return Some(wait),
                    Some(bytes) => self.limiter.take(bytes),
                    None => {}
                }
            }
            let Some((ticket, work)) = self.order.start() else { break };
            self.start(ticket, work);
            started += 1;
            if is_copying {
                self.last_request = Some(Instant::now());
            }
        }
        None
    }

    fn start(&mut self, ticket: Ticket, Work { id, op }: Work) {
        let image = Arc::clone(&self.common.image);
        let written = written_range(&op).filter(|(at, len)| image.check_write(*at, *len).is_ok());
        let mut noted = Ok(());
        if let Some((offset, len)) = written {
            for copier in self.copier.iter_mut().chain(&mut self.saver) {
                copier.before_write(&image, offset, len);
            }
            self.changes.mark(offset, len);
            let order = &self.order;
            let upcoming = || order.waiting().filter_map(|work| written_range(&work.op)).collect();
            noted = self.keeper.before_write(offset, len, upcoming);
        }
        let flushes = if op == BlkOp::Flush { self.keeper.flush_begins() } else { None };
        self.running.insert(ticket, Running { id, written, bytes: data_bytes(&op), flushes });
        if let Err(reason) = noted {
            return self.finish(ticket, Err(reason));
        }
        match self.try_here(op) {
            Ok(result) => self.finish(ticket, result),
            Err(op) => self.give_out(ticket, op),
        }
    }

    /// Carries a request out here if it is sure, or likely, not to wait for the disk; otherwise gives it back.
    fn try_here(&mut self, op: BlkOp) -> Result<Result<Vec<u8>, String>, BlkOp> {
        let image = &self.common.image;
        let Some(file) = image.raw_file().filter(|_| self.executors.is_direct) else {
            return Err(op);
        };
        match op {
            BlkOp::Read { offset, len } => {
                self.common.read_cached(offset, len).map(Ok).ok_or(BlkOp::Read { offset, len })
            }
            BlkOp::Write { offset, data } => {
                if let Err(reason) = image.check_write(offset, data.len() as u64) {
                    return Ok(Err(reason));
                }
                if self.has_quick_writes {
                    let slices = &[IoSlice::new(&data)];
                    match rustix::io::pwritev2(file, slices, offset, ReadWriteFlags::NOWAIT) {
                        Ok(n) if n == data.len() => return Ok(Ok(Vec::new())),
                        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                            self.has_quick_writes = false;
                        }
                        Ok(_) | Err(_) => return Err(BlkOp::Write { offset, data }),
                    }
                }
                let now = Instant::now();
                if self.slow_until.is_some_and(|until| now < until) {
                    return Err(BlkOp::Write { offset, data });
                }
                let result = image.write(offset, &data).map(|()| Vec::new());
                let end = Instant::now();
                self.slow_until = (end - now > QUICK_WRITE).then(|| end + SLOW_TIME);
                Ok(result)
            }
            op @ (BlkOp::Flush | BlkOp::Discard { .. } | BlkOp::WriteZeroes { .. }) => Err(op),
        }
    }

    /// Has a request carried out.
    fn give_out(&mut self, ticket: Ticket, op: BlkOp) {
        let op = match &mut self.executors.ring {
            Some(ring) => give_to_ring(ring, &self.common.image, ticket, op),
            None => Some(op),
        };
        if let Some(op) = op {
            self.executors.pool.submit(ticket, op);
        }
    }

    fn take_from_ring(&mut self) {
        let Some(ring) = &mut self.executors.ring else { return };
        if ring.len() == 0 {
            return;
        }
        for done in ring.take() {
            let (ticket, result) = (done.ticket, self.ring_result(done));
            self.finish(ticket, result);
        }
    }

    /// What a result of the ring comes to. What the kernel did in part is done here to the end.
    fn ring_result(&self, done: RingDone) -> Result<Vec<u8>, String> {
        let image = &self.common.image;
        let RingDone { op, mut buffer, result, .. } = done;
        let retries = |e: &Errno| matches!(*e, Errno::INTR | Errno::AGAIN);
        match (op, result) {
            (RingOp::Read { .. }, Ok(n)) if n == buffer.len() => Ok(buffer),
            (RingOp::Write { .. }, Ok(n)) if n == buffer.len() => Ok(Vec::new()),
            (RingOp::Flush, Ok(_)) => Ok(Vec::new()),
            (RingOp::Flush, Err(e)) if !retries(&e) => Err(image.fail("flush", 0, &e)),
            (RingOp::Read { offset }, Err(e)) if !retries(&e) => {
                Err(image.fail("read", offset, &e))
            }
            (RingOp::Write { offset }, Err(e)) if !retries(&e) => {
                Err(image.fail("write", offset, &e))
            }
            (RingOp::Flush, Err(_)) => image.flush().map(|()| Vec::new()),
            (RingOp::Read { offset }, rest) => {
                let n = rest.unwrap_or(0);
                let tail = image.read(offset + n as u64, buffer.len() - n)?;
                buffer[n..].copy_from_slice(&tail);
                Ok(buffer)
            }
            (RingOp::Write { offset }, rest) => {
                let n = rest.unwrap_or(0);
                image.write(offset + n as u64, &buffer[n..]).map(|()| Vec::new())
            }
        }
    }

    /// A request has ended.
    fn finish(&mut self, ticket: Ticket, result: Result<Vec<u8>, String>) {
        self.order.finish(ticket);
        let Some(Running { id, written, bytes, flushes }) = self.running.remove(&ticket) else {
            return;
        };
        let result = match result {
            Ok(data) if flushes.is_some() => self.keeper.flushed(flushes).map(|()| data),
            result => result,
        };
        self.held_bytes -= bytes;
        if let Some((offset, len)) = written {
            for copier in self.copier.iter_mut().chain(&mut self.saver) {
                copier.after_write(offset, len);
            }
        }
        let (status, data, error) = match result {
            Ok(data) => (BlkStatus::Ok, data, None),
            Err(error) => (BlkStatus::IoErr, Vec::new(), Some(error)),
        };
        if let Some(error) = &error {
            self.note_error(error);
        }
        self.common.outstanding.fetch_sub(1, Ordering::AcqRel);
        (self.done)(Completion { dev: self.dev, id, status, data, error });
    }

    fn note_error(&self, error: &str) {
        let mut known = self.status.lock();
        known.errors += 1;
        known.last_error = Some(error.to_owned());
    }

    /// Nothing will be written any more.
    fn close(mut self) {
        let is_kept = self.keeper.journal().is_some_and(Journal::is_kept);
        if is_kept && self.common.image.flush().is_ok() {
            self.keeper.close();
        }
    }

    /// Everything submitted before this message is done.
    fn pass_barrier(&mut self, message: Message) {
        let size = self.common.image.size();
        match message {
            Message::BeginCopy { sink, plan } => {
                self.copier = Some(match plan {
                    Some(plan) => Copier::for_mirror(sink, size, plan, self.keeper.journal_mut()),
                    None => Copier::new(sink, size),
                });
            }
            Message::FreezeCopy { point, mirror } => {
                let statements = mirror.map(|point| self.keeper.mirror_point(&point));
                if let Some(copier) = &mut self.copier {
                    statements.into_iter().for_each(|s| copier.state(s));
                    copier.freeze(point);
                }
            }
            Message::Keeper(order) => {
                let image = Arc::clone(&self.common.image);
                if let Err(e) = self.keeper.take(order, || image.flush()) {
                    self.note_error(&e);
                }
            }
            Message::AbortCopy => self.copier = None,
            Message::Snapshot { sink, number, base } => {
                let changed = base.map(|base| self.changes.since(base));
                self.changes.begin(number);
                self.saver = Some(Copier::frozen(sink, size, changed, u64::from(number)));
            }
            Message::Grow { size, told } => {
                // Who asked may not wait any more.
                let _ = told.try_send(self.grow(size));
            }
            Message::Request { .. } | Message::Stop => {}
        }
    }

    fn grow(&mut self, size: u64) -> Result<u64, String> {
        let image = &self.common.image;
        if self.copier.is_some() || self.saver.is_some() {
            return Err("the disk is being copied; try again when that is done".to_owned());
        }
        if image.size() < size && image.refresh_size()? < size {
            image.resize(size)?;
        }
        self.changes.grow(image.size());
        self.keeper.grown(image.size())?;
        Ok(image.size())
    }

    /// Copies for a while, if there is a copy; returns how long may then be waited.
    fn copy_slice(&mut self) -> Option<Duration> {
        if self.copier.is_none() && self.saver.is_none() {
            return None;
        }
        let image = &self.common.image;
        let is_busy = self.last_request.is_some_and(|at| at.elapsed() < BUSY_TIME);
        let (copy, mirror_wait) = slice(&mut self.copier, image, is_busy);
        let (snapshot, snapshot_wait) = slice(&mut self.saver, image, is_busy);
        let mut known = self.status.lock();
        known.copy = copy.or(known.copy.take());
        known.snapshot = snapshot.or(known.snapshot.take());
        mirror_wait.into_iter().chain(snapshot_wait).min()
    }

    /// Waits for whatever comes first.
    fn wait(&mut self, time: Option<Duration>) {
        let for_entries = self.wants_more();
        match &mut self.executors.ring {
            Some(ring) if ring.len() > 0 => {
                if time == Some(Duration::ZERO) {
                    ring.submit();
                } else if self.queue.listen(for_entries) {
                    ring.wait(time);
                    self.queue.stop_listening();
                } else {
                    ring.submit();
                }
            }
            _ => self.queue.wait(for_entries, time),
        }
    }
}

/// Gives a request to the ring, or back when that cannot take it.
fn give_to_ring(ring: &mut Ring, image: &Image, ticket: Ticket, op: BlkOp) -> Option<BlkOp> {
    match op {
        BlkOp::Read { offset, len } if image.check_read(offset, len).is_ok() => {
            let pushed = ring.push(ticket, RingOp::Read { offset }, vec![0; len as usize]);
            pushed.is_err().then_some(BlkOp::Read { offset, len })
        }
        BlkOp::Write { offset, data } if image.check_write(offset, data.len() as u64).is_ok() => {
            let pushed = ring.push(ticket, RingOp::Write { offset }, data);
            pushed.err().map(|data| BlkOp::Write { offset, data })
        }
        BlkOp::Flush if !image.is_readonly() => {
            ring.push(ticket, RingOp::Flush, Vec::new()).is_err().then_some(BlkOp::Flush)
        }
        op => Some(op),
    }
}

/// Carries out a request, however long it takes.
pub(super) fn carry_out(image: &Image, op: BlkOp) -> Result<Vec<u8>, String> {
    match op {
        BlkOp::Read { offset, len } => {
            image.check_read(offset, len)?;
            image.read(offset, len as usize)
        }
        BlkOp::Write { offset, data } => image.write(offset, &data).map(|()| Vec::new()),
        BlkOp::Flush => image.flush().map(|()| Vec::new()),
        BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
            image.zero(offset, len).map(|()| Vec::new())
        }
    }
}

/// Goes on with a copy, if there is one; says how far it is, and how long may then be waited.
fn slice(
    copier: &mut Option<Copier>,
    image: &Image,
    is_busy: bool,
) -> (Option<CopyProgress>, Option<Duration>) {
    let Some(copy) = copier else { return (None, None) };
    let step = copy.step(image, is_busy);
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

/// What is held of a write.
fn data_bytes(op: &BlkOp) -> usize {
    if let BlkOp::Write { data, .. } = op { data.len() } else { 0 }
}

/// Bytes that count for a limit; none: the request counts for none.
fn limited_bytes(op: &BlkOp) -> Option<u64> {
    match op {
        BlkOp::Read { len, .. } => Some(u64::from(*len)),
        BlkOp::Write { data, .. } => Some(data.len() as u64),
        BlkOp::Discard { .. } | BlkOp::WriteZeroes { .. } => Some(0),
        BlkOp::Flush => None,
    }
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

fn extent(op: &BlkOp) -> Extent {
    match (op, written_range(op)) {
        (BlkOp::Read { offset, len }, _) => {
            Extent::Read(*offset..offset.saturating_add(u64::from(*len)))
        }
        (_, Some((offset, len))) => Extent::Write(offset..offset.saturating_add(len)),
        (_, None) => Extent::Flush,
    }
}

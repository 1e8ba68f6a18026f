//! A disk on an NBD server: requests are asked again on a new connection when one is lost, for a bounded time.
//!
//! # Place
//! Behind [`super::Image`]; requests are carried out on the callers' threads, several over one connection at once.
//!
//! # Invariants
//! - INV-NBD-2: a flush that succeeded covers every write that had succeeded before it, whatever became of connections and
//!   servers in between: writes are kept until a flush covers them, and are written again on each new connection.
//! - What was written before the disk's lock was lost is not written again: each repetition asks the lock.
//! - INV-NBD-3: a request ends within the disk's patience, or twice that when the server comes back and is lost again.
//! - A range that was discarded reads as zeroes: discards are sent as write-zeroes, which may make holes; a trim promises
//!   nothing about what is read afterwards.
//!
//! # Failure
//! A server that is gone longer than the patience, and errors that it tells, are errors of the request. What a server had
//! under way when its connection broke could still be carried out by it later; a server that goes on after its
//! connection is gone is beyond what a client can see.
//!
//! # References
//! doc/proto.md of the NBD project.

mod connection;
mod journal;
mod proto;
#[cfg(test)]
mod tests;
mod url;

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use self::connection::{CallError, Connection};
use self::journal::{Change, Journal};
pub use self::proto::NbdError;
use self::proto::{
    BLOCK_STATUS, CAN_FLUSH, CAN_READ_ONLY, CAN_WRITE_ZEROES, Export, FLUSH, READ, Reply, WRITE,
    WRITE_ZEROES,
};
pub use self::url::NbdUrl;
use super::lock::ImageLock;

/// How long a request is asked again when nothing else is said.
pub const PATIENCE_DEFAULT: Duration = Duration::from_secs(30);
const RECONNECT_WAIT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_WAIT_MAX: Duration = Duration::from_secs(1);
/// Most bytes zeroed, and most bytes whose holes are asked for, in one request.
const STEP_BYTES_MAX: u64 = 128 << 20;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct NbdImage {
    url: NbdUrl,
    patience: Duration,
    /// What was agreed on when the disk was opened; later connections have to offer the same.
    export: Export,
    size: AtomicU64,
    /// The connection in use. Held while a new one is made; the journal's lock is taken under it.
    connection: Mutex<Option<Arc<Connection>>>,
    /// Held shared by writes of whole blocks, and alone by those that read a block to change a part of it. Taken before all
    /// other locks here.
    blocks: RwLock<()>,
    journal: Journal,
    /// Says whether the disk may be written to, if other hosts use it.
    lock: Option<Arc<ImageLock>>,
}

impl NbdImage {
    pub(super) fn open(
        url: &NbdUrl,
        patience: Duration,
        is_writable: bool,
    ) -> Result<Self, NbdError> {
        let connection = Connection::open(url, patience)?;
        let export = connection.export.clone();
        if is_writable && export.can(CAN_READ_ONLY) {
            connection.close();
            let text = "the export can only be read: say `readonly`, or make it writable";
            return Err(NbdError::Unfit(text.to_owned()));
        }
        Ok(Self {
            url: url.clone(),
            patience,
            size: AtomicU64::new(export.size),
            journal: Journal::new(is_writable && export.can(CAN_FLUSH)),
            export,
            connection: Mutex::new(Some(connection)),
            blocks: RwLock::default(),
            lock: None,
        })
    }

    /// Asks this lock before a request that changes the disk is sent again, or made again from the journal.
    pub(super) fn set_lock(&mut self, lock: Arc<ImageLock>) {
        self.lock = Some(lock);
    }

    fn check_lock(&self) -> Result<(), String> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.check())
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection, a new one if need be.
    fn connected(&self, deadline: Instant) -> Result<Arc<Connection>, String> {
        let mut slot = self.slot();
        if let Some(connection) = slot.as_ref().filter(|c| !c.is_lost()) {
            return Ok(Arc::clone(connection));
        }
        *slot = None;
        let mut wait = RECONNECT_WAIT_MIN;
        loop {
            match self.reconnect(deadline) {
                Ok(connection) => {
                    *slot = Some(Arc::clone(&connection));
                    return Ok(connection);
                }
                Err(why) if Instant::now() + wait >= deadline => return Err(why),
                // Who has lost the lock keeps nobody waiting who wants it.
                Err(why) if self.check_lock().is_err() => return Err(why),
                Err(_) => std::thread::sleep(wait),
            }
            wait = (wait * 2).min(RECONNECT_WAIT_MAX);
        }
    }

    /// Makes a connection that has everything that earlier ones took.
    fn reconnect(&self, deadline: Instant) -> Result<Arc<Connection>, String> {
        let opened = Connection::open(&self.url, self.patience);
        let connection = opened.map_err(|e| crate::one_line::one_line(&e))?;
        let replayed = self.check_same(&connection.export).and_then(|()| {
            self.journal.each(&mut |change| {
                self.check_lock()?;
                let answer = match change {
                    Change::Write { offset, data } => {
                        connection.call(WRITE, *offset, length(data.len()), data, deadline)
                    }
                    Change::Zero { offset, len } => {
                        connection.call(WRITE_ZEROES, *offset, *len, &[], deadline)
                    }
                };
                answer_of(answer).map(drop).map_err(|e| e.to_string())
            })
        });
        match replayed {
            Ok(()) => Ok(connection),
            Err(why) => {
                connection.close();
                Err(why)
            }
        }
    }

    fn check_same(&self, now: &Export) -> Result<(), String> {
        let (was, size) = (&self.export, self.size());
        if now.size < size {
            return Err(format!("the export has {} bytes now, and had {size}", now.size));
        }
        if now.block > was.block || now.payload_max < was.payload_max || now.flags != was.flags {
            return Err("the export has other properties than before".to_owned());
        }
        Ok(())
    }

    /// Carries a request out, on new connections where one is lost.
    fn ask(&self, command: u16, offset: u64, len: u32, payload: &[u8]) -> Result<Reply, String> {
        let deadline = Instant::now() + self.patience;
        let mut lost = String::new();
        // A server that dies of a request is not asked as fast as it is started again.
        let mut wait = RECONNECT_WAIT_MIN;
        loop {
            let gone = |why: &dyn Display| {
                let secs = self.patience.as_secs_f32();
                format!("the NBD server was not there for {secs} s: {why}")
            };
            if !lost.is_empty() {
                if Instant::now() + wait >= deadline {
                    return Err(gone(&lost));
                }
                std::thread::sleep(wait);
                wait = (wait * 2).min(RECONNECT_WAIT_MAX);
            }
            let connection = self.connected(deadline).map_err(|why| gone(&why))?;
            if !lost.is_empty() && matches!(command, WRITE | WRITE_ZEROES) {
                self.check_lock()?;
            }
            let answer = connection.call(command, offset, len, payload, deadline);
            match answer_of(answer) {
                Ok(reply) => return Ok(reply),
                Err(AskError::Lost(why)) => lost = why,
                Err(e) => return Err(e.to_string()),
            }
        }
    }

    /// The blocks that the range touches.
    fn widen(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = u64::from(self.export.block);
        let start = offset / block * block;
        (start, (offset + len).next_multiple_of(block).min(self.size()))
    }

    pub(super) fn read(&self, data: &mut [u8], offset: u64) -> Result<(), String> {
        let (start, end) = self.widen(offset, data.len() as u64);
        let mut at = start;
        while at < end {
            let len = (end - at).min(u64::from(self.export.payload_max));
            let reply = self.ask(READ, at, u32::try_from(len).unwrap_or(0), &[])?;
            // What of this piece was asked for.
            let from = at.max(offset);
            let to = (at + len).min(offset + data.len() as u64);
            if from < to {
                let piece = &reply.data[index(from - at)..index(to - at)];
                data[index(from - offset)..index(to - offset)].copy_from_slice(piece);
            }
            at += len;
        }
        Ok(())
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<(), String> {
        let (start, end) = self.widen(offset, data.len() as u64);
        if (start, end) == (offset, offset + data.len() as u64) {
            let _shared = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_blocks(data, offset);
        }
        let _alone = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        // The parts of blocks at both ends that stay as they are.
        let mut whole = vec![0; index(offset - start)];
        self.read(&mut whole, start)?;
        whole.extend(data);
        let tail = whole.len();
        whole.resize(index(end - start), 0);
        self.read(&mut whole[tail..], start + tail as u64)?;
        self.write_blocks(&whole, start)
    }

    fn write_blocks(&self, data: &[u8], mut offset: u64) -> Result<(), String> {
        for piece in data.chunks(self.export.payload_max as usize) {
            let change = || Change::Write { offset, data: piece.to_vec() };
            self.change(change, WRITE, offset, length(piece.len()), piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// A request that changes the disk.
    fn change(
        &self,
        change: impl FnOnce() -> Change,
        command: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
    ) -> Result<(), String> {
        if self.journal.is_full() {
            self.flush()?;
        }
        let number = self.journal.begin(change);
        let asked = self.ask(command, offset, len, payload);
        self.journal.end(number, asked.is_ok());
        asked.map(drop)
    }

    pub(super) fn zero(&self, offset: u64, len: u64) -> Result<(), String> {
        let block = u64::from(self.export.block);
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(block).min(end), end / block * block);
        if !self.export.can(CAN_WRITE_ZEROES) || first >= last {
            return self.write_zeroes(offset, len);
        }
        self.write_zeroes(offset, first - offset)?;
        let mut at = first;
        while at < last {
            let len = u32::try_from((last - at).min(STEP_BYTES_MAX)).unwrap_or(0);
            let _shared = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            self.change(|| Change::Zero { offset: at, len }, WRITE_ZEROES, at, len, &[])?;
            at += u64::from(len);
        }
        self.write_zeroes(last, end - last)
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64) -> Result<(), String> {
        let zeroes = vec![0; index(len.min(1 << 20))];
        while len > 0 {
            let step = len.min(zeroes.len() as u64);
            self.write(&zeroes[..index(step)], offset)?;
            (offset, len) = (offset + step, len - step);
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), String> {
        if !self.export.can(CAN_FLUSH) {
            return Ok(());
        }
        let covered = self.journal.covered();
        self.ask(FLUSH, 0, 0, &[])?;
        self.journal.forget(&covered);
        Ok(())
    }

    /// Where the next data is, at `offset` or behind.
    pub(super) fn next_data(&self, mut offset: u64) -> Option<u64> {
        let size = self.size();
        let has_extents = self.export.context.is_some();
        while offset < size {
            let (start, end) = self.widen(offset, (size - offset).min(STEP_BYTES_MAX));
            let len = u32::try_from(end - start).unwrap_or(0);
            let reply = has_extents.then(|| self.ask(BLOCK_STATUS, start, len, &[]).ok()).flatten();
            // Who reads it finds out why.
            let Some(reply) = reply else { return Some(offset) };
            let mut at = start;
            for (len, is_zero) in &reply.extents {
                let next = at.saturating_add(u64::from(*len));
                if !is_zero && next > offset {
                    return Some(offset.max(at));
                }
                at = next;
            }
            if at <= offset {
                return Some(offset);
            }
            offset = at;
        }
        None
    }

    /// Looks at the export's size again, which can have grown, while no request is under way. A server keeps to the size that
    /// a connection began with, so a new one takes the place of the old.
    pub(super) fn refresh_size(&self) -> Result<u64, String> {
        let mut slot = self.slot();
        let connection = self.reconnect(Instant::now() + self.patience)?;
        let size = connection.export.size;
        if let Some(old) = slot.replace(connection) {
            old.close();
        }
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// Properties for people.
    pub(super) fn describe(&self) -> String {
        let Export { block, payload_max, is_structured, context, .. } = &self.export;
        format!(
            "block size {block}, at most {payload_max} bytes a request, flush {}, write-zeroes {}, structured replies {}, holes {}",
            on(self.export.can(CAN_FLUSH)),
            on(self.export.can(CAN_WRITE_ZEROES)),
            on(*is_structured),
            on(context.is_some()),
        )
    }
}

fn on(is_on: bool) -> &'static str {
    if is_on { "yes" } else { "no" }
}

impl Drop for NbdImage {
    fn drop(&mut self) {
        if let Some(connection) = self.slot().take() {
            connection.close();
        }
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("the connection to the NBD server was lost: {0}")]
    Lost(String),
    #[error("the NBD server does not answer")]
    TimedOut,
    #[error("the NBD server says: {0}")]
    Told(String),
}

/// The server is about to end.
const SHUTDOWN: u32 = 108;

fn answer_of(answer: Result<Reply, CallError>) -> Result<Reply, AskError> {
    match answer {
        Ok(Reply { error: None, .. }) => answer.map_err(|_| AskError::TimedOut),
        Ok(Reply { error: Some(SHUTDOWN), .. }) => Err(AskError::Lost("it ends".to_owned())),
        Ok(Reply { error: Some(error), .. }) => {
            let error = i32::try_from(error).map(std::io::Error::from_raw_os_error);
            Err(AskError::Told(error.map_or("an unknown error".to_owned(), |e| e.to_string())))
        }
        Err(CallError::Lost(why)) => Err(AskError::Lost(why)),
        Err(CallError::TimedOut) => Err(AskError::TimedOut),
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// An index in a buffer that is at most as long as one of ours.
fn index(at: u64) -> usize {
    usize::try_from(at).unwrap_or(usize::MAX)
}

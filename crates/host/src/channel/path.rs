//! One connection of a link: what sends on it, without waiting for the network, and what reads from it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::frame::{Decoder, Encoder, Item, encoded_len};
use super::link::SendError;

/// Bytes that may wait in a sender; beyond that a send waits.
pub(super) const WAITING_BYTES_MAX: usize = 32 << 20;
/// How long a send waits for room.
const SEND_WAIT_MAX: Duration = Duration::from_millis(200);
/// How long a dropped sender tries to get rid of what waits.
const GOODBYE_TIME_MAX: Duration = Duration::from_millis(500);
/// A peer that acknowledges nothing for this long is gone, says the kernel.
const USER_TIMEOUT_MS: u32 = 10_000;

pub(super) fn set_options(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, USER_TIMEOUT_MS)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepcnt(stream, 4)?;
    Ok(())
}

/// What sender and writer thread share. The mutex guards the bytes that wait; no other lock is taken while it is held,
/// and nothing waits for the network.
#[derive(Debug)]
struct Shared {
    stream: Arc<TcpStream>,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// Bytes that the writer thread took and has not sent yet; while there are any, only it may send.
    in_flight: usize,
    is_closing: bool,
    failed: Option<String>,
}

impl Waiting {
    fn len(&self) -> usize {
        self.bytes.len() + self.in_flight
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending half.
#[derive(Debug)]
pub(super) struct PathSender {
    shared: Arc<Shared>,
    encoder: Encoder,
    scratch: Vec<u8>,
    writer: Option<JoinHandle<()>>,
}

impl PathSender {
    pub(super) fn start(stream: Arc<TcpStream>, key: &[u8; 32]) -> io::Result<Self> {
        let waiting = Mutex::new(Waiting::default());
        let shared = Arc::new(Shared { stream, waiting, changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("channel-writer".to_owned())
            .spawn(move || write_waiting(&theirs))?;
        Ok(Self { shared, encoder: Encoder::new(key), scratch: Vec::new(), writer: Some(writer) })
    }

    /// Sends a frame: straight into the socket where it has room, else through the writer thread. Waits, for a fifth
    /// of a second at most, only while very much waits to be sent. Says how many bytes it has.
    pub(super) fn send(&mut self, item: &Item<'_>) -> Result<usize, SendError> {
        let len = encoded_len(item);
        let full = |w: &mut Waiting| {
            w.failed.is_none() && w.len() > 0 && w.len().saturating_add(len) > WAITING_BYTES_MAX
        };
        let guard = self.shared.lock();
        let (mut waiting, _) = self
            .shared
            .changed
            .wait_timeout_while(guard, SEND_WAIT_MAX, full)
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &waiting.failed {
            return Err(SendError::Closed { reason: reason.clone() });
        }
        if full(&mut waiting) {
            return Err(SendError::Full { waiting: waiting.len() });
        }
        if waiting.len() > 0 {
            self.encoder.frame(item, &mut waiting.bytes);
            return Ok(len);
        }
        self.scratch.clear();
        self.encoder.frame(item, &mut self.scratch);
        match send_now(&self.shared.stream, &self.scratch) {
            Ok(sent) if sent == self.scratch.len() => {}
            Ok(sent) => {
                waiting.bytes.extend_from_slice(&self.scratch[sent..]);
                self.shared.changed.notify_all();
            }
            Err(e) => {
                let reason = e.to_string();
                waiting.failed = Some(reason.clone());
                self.shared.changed.notify_all();
                return Err(SendError::Closed { reason });
            }
        }
        Ok(len)
    }

    /// Bytes that wait for room in the socket; none when nothing can be sent any more.
    pub(super) fn waiting_bytes(&self) -> usize {
        let waiting = self.shared.lock();
        if waiting.failed.is_some() { 0 } else { waiting.len() }
    }

    /// Whether that is the other half of this path.
    pub(super) fn is_of(&self, receiver: &PathReceiver) -> bool {
        Arc::ptr_eq(&self.shared.stream, &receiver.stream)
    }

    pub(super) fn abort(&self) {
        let mut waiting = self.shared.lock();
        waiting.failed.get_or_insert_with(|| "it was ended here".to_owned());
        waiting.bytes = Vec::new();
        // A connection that is over already cannot be shut down again.
        drop(self.shared.stream.shutdown(Shutdown::Both));
        self.shared.changed.notify_all();
    }

    /// A last frame, whatever waits.
    pub(super) fn say_last(&mut self, item: &Item<'_>) {
        let mut waiting = self.shared.lock();
        if waiting.failed.is_none() {
            self.encoder.frame(item, &mut waiting.bytes);
        }
    }

    /// Both ends of the connection, as this side sees them.
    pub(super) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((self.shared.stream.local_addr().ok()?, self.shared.stream.peer_addr().ok()?))
    }
}

impl Drop for PathSender {
    /// Sends what waits, and gives up on a peer that takes nothing.
    fn drop(&mut self) {
        let mut waiting = self.shared.lock();
        waiting.is_closing = true;
        self.shared.changed.notify_all();
        let pending = |w: &mut Waiting| w.failed.is_none() && w.len() > 0;
        let (waiting, _) = self
            .shared
            .changed
            .wait_timeout_while(waiting, GOODBYE_TIME_MAX, pending)
            .unwrap_or_else(PoisonError::into_inner);
        // The receiving half may still be in use, unless the peer takes nothing any more.
        let how = if waiting.len() == 0 { Shutdown::Write } else { Shutdown::Both };
        drop(self.shared.stream.shutdown(how));
        drop(waiting);
        if let Some(writer) = self.writer.take() {
            // A panic of the writer was already reported by the panic hook.
            drop(writer.join());
        }
    }
}

fn send_now(stream: &TcpStream, bytes: &[u8]) -> Result<usize, Errno> {
    let mut sent = 0;
    while sent < bytes.len() {
        match rustix::net::send(stream, &bytes[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => sent += n,
            Err(Errno::WOULDBLOCK) => break,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sent)
}

/// The writer thread: sends what the sender left waiting.
fn write_waiting(shared: &Shared) {
    let mut taken = Vec::new();
    loop {
        {
            let idle = |w: &mut Waiting| w.bytes.is_empty() && !w.is_closing && w.failed.is_none();
            let guard = shared.lock();
            let mut waiting =
                shared.changed.wait_while(guard, idle).unwrap_or_else(PoisonError::into_inner);
            if waiting.failed.is_some() || waiting.bytes.is_empty() {
                return;
            }
            std::mem::swap(&mut waiting.bytes, &mut taken);
            waiting.in_flight = taken.len();
        }
        let mut sent = 0;
        while sent < taken.len() {
            let step = wait_writable(&shared.stream)
                .and_then(|()| send_now(&shared.stream, &taken[sent..]));
            let mut waiting = shared.lock();
            match step {
                Ok(n) => sent += n,
                Err(e) => {
                    waiting.failed.get_or_insert_with(|| e.to_string());
                }
            }
            waiting.in_flight = taken.len() - sent;
            shared.changed.notify_all();
            if waiting.failed.is_some() {
                return;
            }
        }
        taken.clear();
    }
}

fn wait_writable(stream: &TcpStream) -> Result<(), Errno> {
    loop {
        match poll(&mut [PollFd::new(stream, PollFlags::OUT)], None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct PathReceiver {
    pub(super) slot: usize,
    pub(super) stream: Arc<TcpStream>,
    pub(super) decoder: Decoder,
}

/// What a look into the socket found.
pub(super) enum Read {
    Some,
    Nothing,
    End,
}

impl PathReceiver {
    /// Reads what is there.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<Read> {
        loop {
            match rustix::net::recv(&*self.stream, &mut *buf, RecvFlags::DONTWAIT).map(|(n, _)| n) {
                Ok(0) => return Ok(Read::End),
                Ok(n) => {
                    self.decoder.push(&buf[..n]);
                    return Ok(Read::Some);
                }
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Ok(Read::Nothing),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Waits until one of the descriptors is readable or the deadline is over; whether one is.
pub(super) fn wait_readable(
    fds: &mut [PollFd<'_>],
    deadline: Option<Instant>,
) -> Result<bool, Errno> {
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let timeout = left.map(|l| rustix::event::Timespec {
            tv_sec: i64::try_from(l.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(l.subsec_nanos()),
        });
        match poll(fds, timeout.as_ref()) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

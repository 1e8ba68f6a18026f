//! A link's two halves: the sender, which does not wait for the network, and the receiver.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::frame::{Decoder, Encoder, FRAME_BYTES_MAX, Frame, FrameError, encoded_len};
use super::handshake::Agreed;

/// Bytes that may wait in a sender; beyond that a send waits.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// How long a send waits for room.
const SEND_WAIT_MAX: Duration = Duration::from_millis(200);
/// How long a dropped sender tries to get rid of what waits.
const GOODBYE_TIME_MAX: Duration = Duration::from_millis(500);
/// A peer that acknowledges nothing for this long is gone, says the kernel.
const USER_TIMEOUT_MS: u32 = 10_000;
const READ_BYTES: usize = 256 << 10;

/// An authenticated connection.
#[derive(Debug)]
pub struct Link {
    /// The peer's name, as it gave it; whoever knows the secret may give any.
    pub peer: String,
    /// The peer's address.
    pub address: SocketAddr,
    /// What the connecting side wants it for.
    pub purpose: String,
    /// The sending half.
    pub sender: Sender,
    /// The receiving half.
    pub receiver: Receiver,
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The peer takes nothing; the frame was not sent and may be offered again.
    #[error("the peer does not keep up: {waiting} bytes wait to be sent")]
    Full {
        /// Bytes that wait.
        waiting: usize,
    },
    /// The frame is longer than [`FRAME_BYTES_MAX`].
    #[error("a frame of {len} bytes is too long to be sent")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// The connection is over.
    #[error("the connection is over: {reason}")]
    Closed {
        /// The reason, as one line.
        reason: String,
    },
}

/// What a receive found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A frame.
    Frame(Vec<u8>),
    /// Nothing, for as long as was asked.
    TimedOut,
    /// The end.
    Closed {
        /// Whether the peer said goodbye; without, its process or host went away.
        is_clean: bool,
    },
}

/// Why nothing more can be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection failed.
    #[error("connection failed")]
    Io(#[source] io::Error),
    /// The connection ended inside a frame.
    #[error("the connection ended in the middle of a frame")]
    Truncated,
    /// The bytes are not the peer's.
    #[error("what arrived is not the peer's")]
    Frame(#[source] FrameError),
}

impl Link {
    pub(super) fn new(stream: TcpStream, agreed: Agreed) -> io::Result<Self> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        set_options(&stream)?;
        let address = stream.peer_addr()?;
        let stream = Arc::new(stream);
        Ok(Self {
            peer: agreed.peer,
            address,
            purpose: agreed.purpose,
            sender: Sender::start(Arc::clone(&stream), &agreed.send_key)?,
            receiver: Receiver {
                stream,
                decoder: Decoder::new(&agreed.receive_key),
                buf: vec![0; READ_BYTES],
                end: None,
            },
        })
    }
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
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
pub struct Sender {
    shared: Arc<Shared>,
    encoder: Encoder,
    scratch: Vec<u8>,
    writer: Option<JoinHandle<()>>,
}

impl Sender {
    fn start(stream: Arc<TcpStream>, key: &[u8; 32]) -> io::Result<Self> {
        let waiting = Mutex::new(Waiting::default());
        let shared = Arc::new(Shared { stream, waiting, changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("channel-writer".to_owned())
            .spawn(move || write_waiting(&theirs))?;
        Ok(Self { shared, encoder: Encoder::new(key), scratch: Vec::new(), writer: Some(writer) })
    }

    /// Sends a frame: straight into the socket where it has room, else through the writer thread. Waits, for a fifth
    /// of a second at most, only while very much waits to be sent.
    ///
    /// # Errors
    /// See [`SendError`]; a frame that was refused is not sent in part.
    pub fn send(&mut self, payload: &[u8]) -> Result<(), SendError> {
        if payload.len() > FRAME_BYTES_MAX {
            return Err(SendError::TooLong { len: payload.len() });
        }
        let len = encoded_len(payload.len());
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
            self.encoder.data(payload, &mut waiting.bytes);
            return Ok(());
        }
        self.scratch.clear();
        self.encoder.data(payload, &mut self.scratch);
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
        Ok(())
    }

    /// Bytes that wait for room in the socket.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.shared.lock().len()
    }

    /// Ends the connection at once in both directions, without goodbye: both receivers see the end.
    pub fn abort(&self) {
        let mut waiting = self.shared.lock();
        waiting.failed.get_or_insert_with(|| "it was ended here".to_owned());
        waiting.bytes = Vec::new();
        // A connection that is over already cannot be shut down again.
        drop(self.shared.stream.shutdown(Shutdown::Both));
        self.shared.changed.notify_all();
    }
}

impl Drop for Sender {
    /// Says goodbye after what waits, and gives up on a peer that takes nothing.
    fn drop(&mut self) {
        let mut waiting = self.shared.lock();
        if waiting.failed.is_none() {
            self.encoder.goodbye(&mut waiting.bytes);
        }
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
            let step = wait_until(&shared.stream, PollFlags::OUT, None)
                .and_then(|_| send_now(&shared.stream, &taken[sent..]));
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

/// Waits until the socket is ready or the deadline is over; whether it is ready.
fn wait_until(
    stream: &TcpStream,
    flags: PollFlags,
    deadline: Option<Instant>,
) -> Result<bool, Errno> {
    loop {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let timeout = left.map(|l| Timespec {
            tv_sec: i64::try_from(l.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(l.subsec_nanos()),
        });
        match poll(&mut [PollFd::new(stream, flags)], timeout.as_ref()) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    stream: Arc<TcpStream>,
    decoder: Decoder,
    buf: Vec<u8>,
    end: Option<bool>,
}

impl Receiver {
    /// Waits for the next frame, for no longer than `timeout` when there is one; with a timeout of zero it only looks.
    ///
    /// # Errors
    /// See [`ReceiveError`]; the link is of no more use then.
    pub fn recv(&mut self, timeout: Option<Duration>) -> Result<Received, ReceiveError> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        loop {
            if let Some(is_clean) = self.end {
                return Ok(Received::Closed { is_clean });
            }
            match self.decoder.next().map_err(ReceiveError::Frame)? {
                Some(Frame::Data(payload)) => return Ok(Received::Frame(payload)),
                Some(Frame::Goodbye) => {
                    self.end = Some(true);
                    continue;
                }
                None => {}
            }
            let read = rustix::net::recv(&*self.stream, &mut self.buf[..], RecvFlags::DONTWAIT);
            match read.map(|(n, _)| n) {
                Ok(0) if self.decoder.is_inside_frame() => return Err(ReceiveError::Truncated),
                Ok(0) => self.end = Some(false),
                Ok(n) => self.decoder.push(&self.buf[..n]),
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => {
                    let ready = wait_until(&self.stream, PollFlags::IN, deadline)
                        .map_err(|e| ReceiveError::Io(e.into()))?;
                    if !ready {
                        return Ok(Received::TimedOut);
                    }
                }
                Err(e) => return Err(ReceiveError::Io(e.into())),
            }
        }
    }
}

impl AsFd for Receiver {
    /// For poll: readable when [`Receiver::recv`] may find something, provided that it last found nothing.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

//! One connection to an NBD server, over which several threads have requests under way at once.
//!
//! # Place
//! A caller sends its request itself and waits for the reply, which the connection's own thread reads and hands to it.
//!
//! # Failure
//! Whatever goes wrong on the connection ends it for good: everybody who waits learns that it is lost, and may ask again
//! on another one.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use super::proto::{DISCONNECT, Export, Head, NbdError, Reply, negotiate, request};
use super::url::{NbdUrl, Server};

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
const NEGOTIATION_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the network may be silent with something under way.
const USER_TIMEOUT_MS: u32 = 10_000;

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(server: &Server, deadline: Instant) -> io::Result<Self> {
        match server {
            Server::Unix(path) => Ok(Self::Unix(UnixStream::connect(path)?)),
            Server::Tcp { host, port } => {
                let mut failed = io::Error::other("the name has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    let time = time_left(deadline)?.min(CONNECT_TIME_MAX);
                    match TcpStream::connect_timeout(&address, time) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
                            sockopt::set_socket_keepalive(&stream, true)?;
                            sockopt::set_tcp_keepidle(&stream, Duration::from_secs(4))?;
                            sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(2))?;
                            sockopt::set_tcp_keepcnt(&stream, 3)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(e) => failed = e,
                    }
                }
                Err(failed)
            }
        }
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(read).and_then(|()| s.set_write_timeout(write)),
            Self::Unix(s) => s.set_read_timeout(read).and_then(|()| s.set_write_timeout(write)),
        }
    }

    fn shut(&self) {
        // One that is not connected any more needs no end.
        drop(match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        });
    }
}

/// What is left until then, or the error that nothing is.
fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A stream that is good until a moment, however slowly the other side goes on.
struct Timed<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_timeouts(Some(time_left(self.deadline)?), None)?;
        self.stream.read(buf)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_timeouts(None, Some(time_left(self.deadline)?))?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(buf),
            Stream::Unix(stream) => (&mut &*stream).read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(buf),
            Stream::Unix(stream) => (&mut &*stream).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a request got no answer.
#[derive(Debug)]
pub(super) enum CallError {
    /// The connection is gone; the request may have been carried out or not.
    Lost(String),
    /// Nothing came in time, and the connection was given up.
    TimedOut,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    pub(super) export: Export,
    /// Held while a request is sent. No other lock is taken while it is held.
    sending: Mutex<()>,
    waiting: Mutex<Waiting>,
}

/// Guards who waits for what. Nothing is sent or read, and no other lock taken, while it is held.
#[derive(Debug, Default)]
struct Waiting {
    calls: BTreeMap<u64, Call>,
    next_cookie: u64,
    /// Why the connection ended, if it did.
    lost: Option<String>,
}

#[derive(Debug)]
struct Call {
    reply: Reply,
    done: SyncSender<Reply>,
}

impl Connection {
    /// Connects, agrees on the export, and starts to read replies.
    pub(super) fn open(url: &NbdUrl, patience: Duration) -> Result<Arc<Self>, NbdError> {
        let deadline = Instant::now() + patience.min(NEGOTIATION_TIME_MAX);
        let stream = Stream::connect(&url.server, deadline)?;
        let export = negotiate(&mut Timed { stream: &stream, deadline }, &url.export)?;
        stream.set_timeouts(None, Some(patience))?;
        let connection =
            Arc::new(Self { stream, export, sending: Mutex::default(), waiting: Mutex::default() });
        let reader = Arc::clone(&connection);
        std::thread::Builder::new().name("nbd".to_owned()).spawn(move || reader.read_replies())?;
        Ok(connection)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.waiting().lost.is_some()
    }

    /// Sends a request and waits for its reply until `deadline`.
    pub(super) fn call(
        &self,
        command: u16,
        offset: u64,
        len: u32,
        payload: &[u8],
        deadline: Instant,
    ) -> Result<Reply, CallError> {
        let (done, answer) = sync_channel(1);
        let reply = Reply::to(command, offset, len, self.export.context);
        let cookie = {
            let mut waiting = self.waiting();
            if let Some(why) = &waiting.lost {
                return Err(CallError::Lost(why.clone()));
            }
            let cookie = waiting.next_cookie;
            waiting.next_cookie += 1;
            waiting.calls.insert(cookie, Call { reply, done });
            cookie
        };
        let sent = {
            let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
            let head = request(command, cookie, offset, len);
            (&self.stream).write_all(&head).and_then(|()| (&self.stream).write_all(payload))
        };
        if let Err(e) = sent {
            self.lose(format!("cannot send to the server: {e}"));
        }
        match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Disconnected) => {
                Err(CallError::Lost(self.waiting().lost.clone().unwrap_or_default()))
            }
            Err(RecvTimeoutError::Timeout) => {
                // Were the connection kept, the request could still be carried out when the guest has given it up long ago.
                self.lose("the server does not answer".to_owned());
                Err(CallError::TimedOut)
            }
        }
    }

    /// Ends the connection in good order.
    pub(super) fn close(&self) {
        // The server takes an end without a word as well.
        if let Ok(_sending) = self.sending.try_lock() {
            drop((&self.stream).write_all(&request(DISCONNECT, 0, 0, 0)));
        }
        self.lose("it was closed".to_owned());
    }

    fn lose(&self, why: String) {
        let calls = {
            let mut waiting = self.waiting();
            waiting.lost.get_or_insert(why);
            std::mem::take(&mut waiting.calls)
        };
        self.stream.shut();
        // Everybody who waits finds the other end of its channel gone.
        drop(calls);
    }

    fn read_replies(&self) {
        let mut from = BufReader::with_capacity(64 << 10, &self.stream);
        loop {
            if let Err(e) = self.read_reply(&mut from) {
                return self.lose(crate::one_line::one_line(&e));
            }
        }
    }

    fn read_reply(&self, from: &mut impl Read) -> Result<(), NbdError> {
        let head = Head::read(from)?;
        let call = self.waiting().calls.remove(&head.cookie());
        let Some(mut call) = call else {
            return Err(NbdError::Nonsense("it answers what was not asked"));
        };
        if call.reply.take(head, from)? {
            // Who asked may have given up.
            drop(call.done.send(call.reply));
            return Ok(());
        }
        let mut waiting = self.waiting();
        if waiting.lost.is_none() {
            waiting.calls.insert(head.cookie(), call);
        }
        Ok(())
    }
}

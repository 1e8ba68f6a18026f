//! Makes links: by connecting, and by listening with a bounded number of strangers at a time.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::handshake::{HandshakeError, as_client, as_server};
use super::link::Link;
use super::secret::Secret;

/// Most handshakes at a time; connections beyond that are closed at once.
const HANDSHAKES_MAX: usize = 32;
/// Most links and failures that wait for [`Listener::next`].
const BACKLOG: usize = 64;

/// Connects to a listener and proves the secret. `timeout` is for the connection of each address; the handshake has
/// its own.
///
/// # Errors
/// The address cannot be reached, or see [`HandshakeError`].
pub fn connect(
    address: &str,
    secret: &Secret,
    name: &str,
    purpose: &str,
    timeout: Duration,
) -> Result<Link, HandshakeError> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs().map_err(HandshakeError::Io)? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(mut stream) => {
                stream.set_nodelay(true).map_err(HandshakeError::Io)?;
                let agreed = as_client(&mut stream, secret, name, purpose)?;
                return Link::new(stream, agreed).map_err(HandshakeError::Io);
            }
            Err(e) => last = e,
        }
    }
    Err(HandshakeError::Io(last))
}

/// A connection that came in: a link, or who failed and why.
pub type Incoming = Result<Link, (SocketAddr, HandshakeError)>;

/// Accepts connections on a thread of its own; each handshake has a thread, too, so that no stranger delays a peer.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    incoming: Receiver<Incoming>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

struct Gate {
    secret: Secret,
    name: String,
    handshakes: AtomicUsize,
    done: SyncSender<Incoming>,
}

impl Listener {
    /// Listens on `address`; `name` is what peers are told.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn bind(address: impl ToSocketAddrs, secret: Secret, name: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (done, incoming) = sync_channel(BACKLOG);
        let name = name.to_owned();
        let gate = Arc::new(Gate { secret, name, handshakes: AtomicUsize::new(0), done });
        let theirs = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("channel-listener".to_owned())
            .spawn(move || accept(&listener, &theirs, &gate))?;
        Ok(Self { address, incoming, stop, thread: Some(thread) })
    }

    /// The address in use; its port is the one chosen when none was given.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection that completed its handshake or failed in it; none when `timeout` is over first.
    pub fn next(&self, timeout: Duration) -> Option<Incoming> {
        self.incoming.recv_timeout(timeout).ok()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // An eventfd takes a small number at any time.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported by the panic hook.
            drop(thread.join());
        }
    }
}

fn accept(listener: &TcpListener, stop: &OwnedFd, gate: &Arc<Gate>) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        let polled = poll(&mut fds, None);
        if !fds[1].revents().is_empty() || !matches!(polled, Ok(_) | Err(rustix::io::Errno::INTR)) {
            return;
        }
        match listener.accept() {
            Ok((stream, address)) => admit(stream, address, gate),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // No file descriptor is free, or the connection is gone: the others wait for a moment, unless it is over.
            Err(_) => {
                let pause = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&pause));
            }
        }
    }
}

fn admit(mut stream: TcpStream, address: SocketAddr, gate: &Arc<Gate>) {
    if gate.handshakes.fetch_add(1, Ordering::Relaxed) >= HANDSHAKES_MAX {
        gate.handshakes.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let theirs = Arc::clone(gate);
    let spawned =
        std::thread::Builder::new().name("channel-handshake".to_owned()).spawn(move || {
            let result = greet(&mut stream, &theirs)
                .and_then(|agreed| Link::new(stream, agreed).map_err(HandshakeError::Io));
            theirs.handshakes.fetch_sub(1, Ordering::Relaxed);
            // When nobody asks for connections, dropping this one tells the peer.
            match theirs.done.try_send(result.map_err(|e| (address, e))) {
                Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
            }
        });
    if spawned.is_err() {
        gate.handshakes.fetch_sub(1, Ordering::Relaxed);
    }
}

fn greet(stream: &mut TcpStream, gate: &Gate) -> Result<super::handshake::Agreed, HandshakeError> {
    stream.set_nonblocking(false).map_err(HandshakeError::Io)?;
    stream.set_nodelay(true).map_err(HandshakeError::Io)?;
    as_server(stream, &gate.secret, &gate.name)
}

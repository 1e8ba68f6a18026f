//! Makes links from connections that come in, with a bounded number of strangers at a time; second paths find their links.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::bond::Bond;
use super::dial::JOIN;
use super::handshake::{Agreed, HandshakeError, as_server};
use super::link::Link;
use super::secret::Secret;

/// Most handshakes at a time; connections beyond that are closed at once.
const HANDSHAKES_MAX: usize = 32;
/// Most links and failures that wait for [`Listener::next`].
const BACKLOG: usize = 64;

/// A connection that came in: a link, or who failed and why.
pub type Incoming = Result<Link, (SocketAddr, HandshakeError)>;

/// Accepts connections on a thread of its own; each handshake has a thread, too, so that no stranger delays a peer.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    incoming: Receiver<Incoming>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct Gate {
    secret: Secret,
    name: String,
    compresses: bool,
    /// Links that a second path may come for, by their names. The mutex guards the map alone.
    bonds: Mutex<BTreeMap<String, Weak<Bond>>>,
    handshakes: AtomicUsize,
    done: SyncSender<Incoming>,
}

impl Listener {
    /// Listens on `address`; `name` is what peers are told, and `compresses` whether what is sent is made shorter.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn bind(
        address: impl ToSocketAddrs,
        secret: Secret,
        name: &str,
        compresses: bool,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (done, incoming) = sync_channel(BACKLOG);
        let (name, handshakes, bonds) = (name.to_owned(), AtomicUsize::new(0), Mutex::default());
        let gate = Arc::new(Gate { secret, name, compresses, bonds, handshakes, done });
        let mut this = Self { address, incoming, stop, threads: Vec::new(), gate };
        this.start(listener)?;
        Ok(this)
    }

    /// Listens on another address, too.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn also(&mut self, address: impl ToSocketAddrs) -> io::Result<()> {
        self.start(TcpListener::bind(address)?)
    }

    fn start(&mut self, listener: TcpListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let (theirs, gate) = (Arc::clone(&self.stop), Arc::clone(&self.gate));
        let thread = std::thread::Builder::new()
            .name("channel-listener".to_owned())
            .spawn(move || accept(&listener, &theirs, &gate))?;
        self.threads.push(thread);
        Ok(())
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
        for thread in self.threads.drain(..) {
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
                .and_then(|agreed| theirs.link(stream, agreed).map_err(HandshakeError::Io));
            theirs.handshakes.fetch_sub(1, Ordering::Relaxed);
            // When nobody asks for connections, dropping this one tells the peer.
            match result.map_err(|e| (address, e)).transpose() {
                // A second path is nobody's news.
                None => {}
                Some(incoming) => match theirs.done.try_send(incoming) {
                    Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
                },
            }
        });
    if spawned.is_err() {
        gate.handshakes.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gate {
    /// A new link, or nothing when it is a path of one that is there.
    fn link(&self, stream: TcpStream, agreed: Agreed) -> io::Result<Option<Link>> {
        let mut bonds = self.bonds.lock().unwrap_or_else(PoisonError::into_inner);
        bonds.retain(|_, bond| bond.strong_count() > 0);
        if let Some(id) = agreed.purpose.strip_prefix(JOIN) {
            let bond = bonds.get(id).and_then(Weak::upgrade);
            drop(bonds);
            let gone = || io::Error::new(io::ErrorKind::NotFound, "its link is gone");
            bond.ok_or_else(gone)?.add_path(stream, &agreed)?;
            return Ok(None);
        }
        let id = agreed.is_bonded.then(|| agreed.id.clone());
        let (link, bond) = Link::new(stream, agreed)?;
        if let Some(id) = id {
            bonds.insert(id, Arc::downgrade(&bond));
        }
        Ok(Some(link))
    }
}

fn greet(stream: &mut TcpStream, gate: &Gate) -> Result<Agreed, HandshakeError> {
    stream.set_nonblocking(false).map_err(HandshakeError::Io)?;
    stream.set_nodelay(true).map_err(HandshakeError::Io)?;
    as_server(stream, &gate.secret, &gate.name, gate.compresses)
}

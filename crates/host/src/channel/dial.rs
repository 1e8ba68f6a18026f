//! Makes links by connecting: over the first route that works, and with the second one standing by.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, connect as start_connect, socket_with, sockopt,
};

use super::bond::{Bond, PATHS};
use super::handshake::{HandshakeError, Offer, as_client};
use super::link::Link;
use super::path::wait_readable;
use super::secret::Secret;

/// Purpose of a second path, before the link's name.
pub(super) const JOIN: &str = "join:";
/// Pause between two tries to have a second path.
const JOIN_PAUSE: Duration = Duration::from_secs(1);
/// How often that is left off because the link is over.
const LOOK: Duration = Duration::from_millis(100);

/// A way to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its address, with port.
    pub address: String,
    /// The address of this host that is used; any when there is none.
    pub source: Option<IpAddr>,
}

impl Route {
    /// A way by whatever this host uses.
    #[must_use]
    pub fn to(address: &str) -> Self {
        Self { address: address.to_owned(), source: None }
    }
}

/// Connects this host to others.
#[derive(Debug, Clone)]
pub struct Dialer {
    /// The secret that all hosts share.
    pub secret: Secret,
    /// What peers are told of this host.
    pub name: String,
    /// Time for the connection to each address; the handshake has its own.
    pub timeout: Duration,
    /// Whether what is sent is made shorter.
    pub compresses: bool,
}

impl Dialer {
    /// Connects over the first route that works, and proves the secret.
    ///
    /// # Errors
    /// The address cannot be reached, or see [`HandshakeError`]; those of the last route.
    pub fn connect(&self, routes: &[Route], purpose: &str) -> Result<Link, HandshakeError> {
        self.first(routes, purpose, false).map(|(link, _, _)| link)
    }

    /// As [`Self::connect`], with a link that has both routes as its paths as far as they work, and goes over the first
    /// that did. With one route it is a link as any other.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_bonded(&self, routes: &[Route], purpose: &str) -> Result<Link, HandshakeError> {
        let routes = &routes[..routes.len().min(PATHS)];
        if routes.len() < PATHS {
            return self.connect(routes, purpose);
        }
        let (link, bond, id) = self.first(routes, purpose, true)?;
        let (this, routes, weak) = (self.clone(), routes.to_vec(), Arc::downgrade(&bond));
        let join = move || this.keep_joined(&routes, &weak, &id);
        std::thread::Builder::new()
            .name("channel-join".to_owned())
            .spawn(join)
            .map_err(HandshakeError::Io)?;
        Ok(link)
    }

    fn first(
        &self,
        routes: &[Route],
        purpose: &str,
        is_bonded: bool,
    ) -> Result<(Link, Arc<Bond>, String), HandshakeError> {
        let nowhere = io::Error::new(io::ErrorKind::NotFound, "there is no route to the peer");
        let mut last = HandshakeError::Io(nowhere);
        for (slot, route) in routes.iter().enumerate() {
            let offer = Offer { compresses: self.compresses, is_bonded, slot };
            match self.open(route) {
                Ok(mut stream) => {
                    let agreed = as_client(&mut stream, &self.secret, &self.name, purpose, offer)?;
                    let id = agreed.id.clone();
                    let (link, bond) = Link::new(stream, agreed).map_err(HandshakeError::Io)?;
                    return Ok((link, bond, id));
                }
                Err(e) => last = HandshakeError::Io(e),
            }
        }
        Err(last)
    }

    /// Connects the paths that a link has not, for as long as it is there.
    fn keep_joined(&self, routes: &[Route], weak: &Weak<Bond>, id: &str) {
        let purpose = format!("{JOIN}{id}");
        loop {
            let Some(missing) = weak.upgrade().map(|bond| bond.missing()) else { return };
            for slot in missing {
                let offer = Offer { compresses: self.compresses, is_bonded: true, slot };
                // What does not work now may later.
                let Ok(mut stream) = self.open(&routes[slot]) else { continue };
                let joined = as_client(&mut stream, &self.secret, &self.name, &purpose, offer);
                if let (Ok(agreed), Some(bond)) = (joined, weak.upgrade()) {
                    drop(bond.add_path(stream, &agreed));
                }
            }
            let until = Instant::now() + JOIN_PAUSE;
            while Instant::now() < until {
                if weak.upgrade().is_none_or(|bond| bond.is_closed()) {
                    return;
                }
                std::thread::sleep(LOOK);
            }
        }
    }

    fn open(&self, route: &Route) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in route.address.to_socket_addrs()? {
            match open(address, route.source, self.timeout) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    }
}

fn open(to: SocketAddr, source: Option<IpAddr>, timeout: Duration) -> io::Result<TcpStream> {
    let Some(source) = source else { return TcpStream::connect_timeout(&to, timeout) };
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddr::new(source, 0))?;
    match start_connect(&socket, &to) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
            if !wait_readable(&mut fds, Instant::now().checked_add(timeout))? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "connection timed out"));
            }
            sockopt::socket_error(&socket)??;
        }
        Err(e) => return Err(e.into()),
    }
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connects to one address, without more.
///
/// # Errors
/// See [`Dialer::connect`].
#[cfg(test)]
pub(super) fn connect(
    address: &str,
    secret: &Secret,
    name: &str,
    purpose: &str,
    timeout: Duration,
) -> Result<Link, HandshakeError> {
    let (secret, name) = (secret.clone(), name.to_owned());
    Dialer { secret, name, timeout, compresses: false }.connect(&[Route::to(address)], purpose)
}

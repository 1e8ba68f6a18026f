//! A link's two halves: the sender, which does not wait for the network, and the receiver.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::bond::Bond;
use super::frame::{FRAME_BYTES_MAX, Frame, FrameError};
use super::handshake::Agreed;
use super::path::{PathReceiver, Read, wait_readable};

const READ_BYTES: usize = 256 << 10;

/// An authenticated connection, of one path or two.
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

/// A path of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathUse {
    /// 0: the first one of the configuration, 1: the second.
    pub slot: usize,
    /// This side's address.
    pub local: SocketAddr,
    /// The peer's address.
    pub peer: SocketAddr,
    /// It carries the frames; another one stands by.
    pub is_active: bool,
    /// Nothing has come on it for a while.
    pub is_silent: bool,
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
    pub(super) fn new(stream: TcpStream, agreed: Agreed) -> io::Result<(Self, Arc<Bond>)> {
        let address = stream.peer_addr()?;
        let (bond, path) = Bond::start(stream, &agreed)?;
        let receiver = Receiver {
            bond: Arc::clone(&bond),
            paths: vec![path],
            buf: vec![0; READ_BYTES],
            end: None,
        };
        let sender = Sender { bond: Arc::clone(&bond) };
        let Agreed { peer, purpose, .. } = agreed;
        Ok((Self { peer, address, purpose, sender, receiver }, bond))
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Sender {
    bond: Arc<Bond>,
}

impl Sender {
    /// Sends a frame: straight into the socket where it has room, else through the writer thread. Waits, for a fifth
    /// of a second at most, only while very much waits to be sent.
    ///
    /// # Errors
    /// See [`SendError`]; a frame that was refused is not sent in part.
    pub fn send(&mut self, payload: &[u8]) -> Result<(), SendError> {
        if payload.len() > FRAME_BYTES_MAX {
            return Err(SendError::TooLong { len: payload.len() });
        }
        self.bond.send(payload)
    }

    /// Bytes that wait for room in the socket.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.bond.waiting_bytes()
    }

    /// Bytes that were sent, with all that frames have around them.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.bond.wire_bytes()
    }

    /// The paths that there are, if there may be more than one.
    #[must_use]
    pub fn paths(&self) -> Vec<PathUse> {
        if self.bond.is_bonded { self.bond.paths() } else { Vec::new() }
    }

    /// How often another path had to be taken.
    #[must_use]
    pub fn switches(&self) -> u64 {
        self.bond.switches()
    }

    /// How long a path may be silent before the other one is tried.
    pub fn set_patience(&self, patience: Duration) {
        self.bond.set_patience(patience);
    }

    /// Ends the connection at once in both directions, without goodbye: both receivers see the end.
    pub fn abort(&self) {
        self.bond.abort();
    }
}

impl Drop for Sender {
    /// Says goodbye after what waits, and gives up on a peer that takes nothing.
    fn drop(&mut self) {
        self.bond.close();
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    bond: Arc<Bond>,
    paths: Vec<PathReceiver>,
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
            if let Some(payload) = self.next_frame()? {
                return Ok(Received::Frame(payload));
            }
            if self.end.is_some() || self.read()? {
                continue;
            }
            let mut fds: Vec<PollFd<'_>> =
                self.paths.iter().map(|path| PollFd::new(&path.stream, PollFlags::IN)).collect();
            if self.bond.is_bonded {
                fds.push(PollFd::new(&self.bond.wake, PollFlags::IN));
            }
            let ready =
                wait_readable(&mut fds, deadline).map_err(|e| ReceiveError::Io(e.into()))?;
            let has_news =
                self.bond.is_bonded && fds.last().is_some_and(|wake| !wake.revents().is_empty());
            drop(fds);
            if has_news {
                let mut count = [0; 8];
                // Whatever it is, the paths are here.
                let _ = rustix::io::read(&self.bond.wake, &mut count);
                self.welcome();
            } else if !ready {
                return Ok(Received::TimedOut);
            }
        }
    }

    /// New paths; one that was in the place of one of them is gone.
    fn welcome(&mut self) {
        for path in self.bond.take_arrivals() {
            self.paths.retain(|old| old.slot != path.slot);
            self.paths.push(path);
        }
    }

    /// The next whole frame that is for the caller.
    fn next_frame(&mut self) -> Result<Option<Vec<u8>>, ReceiveError> {
        let Self { bond, paths, end, .. } = self;
        for path in paths {
            while let Some(frame) = path.decoder.next().map_err(ReceiveError::Frame)? {
                match frame {
                    Frame::Data(None, payload) if !bond.is_bonded => return Ok(Some(payload)),
                    Frame::Data(Some(number), payload) if bond.is_bonded => {
                        let is_next = bond.take(number, payload.len()).map_err(|expected| {
                            let found = number.at;
                            ReceiveError::Frame(FrameError::Missing { expected, found })
                        })?;
                        if is_next {
                            return Ok(Some(payload));
                        }
                    }
                    Frame::Goodbye(_) => {
                        *end = Some(true);
                        return Ok(None);
                    }
                    Frame::Acknowledged(count) => bond.acknowledged(count),
                    Frame::Data(..) => {
                        let error = FrameError::UnknownKind { sequence: 0, kind: 0 };
                        return Err(ReceiveError::Frame(error));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Reads what is there, of all paths; whether there was something.
    fn read(&mut self) -> Result<bool, ReceiveError> {
        let (mut is_some, mut at) = (false, 0);
        while at < self.paths.len() {
            let path = &mut self.paths[at];
            let found = path.read(&mut self.buf);
            if let Ok(Read::Some) = found {
                self.bond.note_heard(path.slot);
                is_some = true;
            }
            if matches!(found, Ok(Read::Some | Read::Nothing)) {
                at += 1;
                continue;
            }
            if self.bond.is_bonded {
                let reason =
                    found.err().map_or_else(|| "it was closed".to_owned(), |e| e.to_string());
                let path = self.paths.remove(at);
                if !self.bond.path_ended(&path, &reason) {
                    self.end = Some(false);
                    return Ok(true);
                }
                is_some = true;
                continue;
            }
            match found {
                Ok(_) if path.decoder.is_inside_frame() => return Err(ReceiveError::Truncated),
                Ok(_) => self.end = Some(false),
                Err(e) => return Err(ReceiveError::Io(e)),
            }
            return Ok(true);
        }
        Ok(is_some)
    }
}

impl AsFd for Receiver {
    /// For poll: readable when [`Receiver::recv`] may find something on a link of one path, provided that it last found
    /// nothing.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.paths.first().map_or_else(|| self.bond.wake.as_fd(), |path| path.stream.as_fd())
    }
}

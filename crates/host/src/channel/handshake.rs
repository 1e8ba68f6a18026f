//! Mutual proof of the shared secret by challenge and response, within a time and a number of bytes.
//!
//! # Place
//! First thing on a connection, on both sides; see [`super::listen`].
//!
//! # Invariants
//! - Each side's fresh nonce is part of what both prove, so nothing recorded earlier is of use.
//! - The proofs of the two roles differ, so a side's own proof sent back to it proves nothing.
//! - Version, purpose and names are part of the transcript, so nobody in between can change them.
//!
//! # Format
//! The connecting side sends first; numbers are little-endian, the texts padded with zeroes.
//! ```text
//! hello (both):   magic "USTUDYCH" | version u16 | purpose_len u8 | name_len u8 | nonce [32] | purpose [32] | name [64]
//!                 | offer u8: 1 it understands LZ4, 2 there may be a second path (client), 4 this is it (client)
//! proof (client): HMAC-SHA256(secret, "understudy client" | SHA-256(client hello | server hello))
//! proof (server): the same with "understudy server"
//! ```
//! Magic and version come first in every version, and a side that finds another version still sends its own hello, so
//! that both can say both versions.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::secret::Secret;
use super::{CHANNEL_VERSION, HANDSHAKE_TIME_MAX};

const MAGIC: &[u8; 8] = b"USTUDYCH";
const PREAMBLE_BYTES: usize = 10;
const HELLO_BYTES: usize = 141;
const OFFER_LZ4: u8 = 1;
const OFFER_BOND: u8 = 2;
const OFFER_SECOND: u8 = 4;
/// Bytes of a link's name, so that it fits a purpose in hexadecimal.
const ID_BYTES: usize = 13;
const PURPOSE_BYTES_MAX: usize = 32;
const NAME_BYTES_MAX: usize = 64;
const CLIENT: &str = "understudy client";
const SERVER: &str = "understudy server";

/// Why a handshake ended without a link.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed.
    #[error("connection failed during the handshake")]
    Io(#[source] io::Error),
    /// The peer took too long.
    #[error("the peer did not complete the handshake within 2 s")]
    TimedOut,
    /// The peer closed the connection before it said who it is.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// What came is not this protocol.
    #[error("the peer does not speak this protocol (it sent {start:02x?})")]
    NotUnderstudy {
        /// The first bytes.
        start: Vec<u8>,
    },
    /// The peer speaks another version.
    #[error(
        "channel version {theirs} at the peer, {ours} here: run the same release on both hosts"
    )]
    OtherVersion {
        /// This side's version.
        ours: u16,
        /// The peer's version.
        theirs: u16,
    },
    /// A field of the peer's hello makes no sense.
    #[error("the peer's hello is malformed: {reason}")]
    Malformed {
        /// What is wrong.
        reason: &'static str,
    },
    /// The peer has another secret.
    #[error("the peer has another secret: the secret files of the two hosts differ")]
    WrongSecret,
}

/// What a handshake agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    pub(super) peer: String,
    pub(super) purpose: String,
    pub(super) send_key: [u8; 32],
    pub(super) receive_key: [u8; 32],
    /// This side compresses what it sends.
    pub(super) compresses: bool,
    /// A second path may come.
    pub(super) is_bonded: bool,
    /// 0 for the first path, 1 for the second.
    pub(super) slot: usize,
    /// What a second path calls the link.
    pub(super) id: String,
}

/// What the connecting side wants beside a connection.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Offer {
    /// To compress what it sends.
    pub(super) compresses: bool,
    pub(super) is_bonded: bool,
    pub(super) slot: usize,
}

impl Offer {
    fn bits(self) -> u8 {
        let bonded = if self.is_bonded { OFFER_BOND } else { 0 };
        OFFER_LZ4 | bonded | if self.slot == 0 { 0 } else { OFFER_SECOND }
    }
}

struct Hello {
    purpose: String,
    name: String,
    offer: u8,
}

/// The connecting side.
pub(super) fn as_client(
    stream: &mut TcpStream,
    secret: &Secret,
    name: &str,
    purpose: &str,
    offer: Offer,
) -> Result<Agreed, HandshakeError> {
    let mut io = Timed { stream, deadline: Instant::now() + HANDSHAKE_TIME_MAX };
    let ours = hello(purpose, name, offer)?;
    io.write(&ours)?;
    let (theirs, peer) = io.read_hello()?;
    let transcript = transcript(&ours, &theirs);
    io.write(&secret.derive(CLIENT, &transcript))?;
    let mut proof = [0; 32];
    // A server that does not like the proof closes, and has nothing to say to a stranger.
    match io.read(&mut proof) {
        Err(HandshakeError::Closed) => return Err(HandshakeError::WrongSecret),
        Err(HandshakeError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => {
            return Err(HandshakeError::WrongSecret);
        }
        other => other?,
    }
    if !secret.is_derived(SERVER, &transcript, &proof) {
        return Err(HandshakeError::WrongSecret);
    }
    Ok(Agreed {
        peer: peer.name,
        purpose: purpose.to_owned(),
        send_key: secret.derive("key to server", &transcript),
        receive_key: secret.derive("key to client", &transcript),
        compresses: offer.compresses && peer.offer & OFFER_LZ4 != 0,
        is_bonded: offer.is_bonded,
        slot: offer.slot,
        id: id(secret, &transcript),
    })
}

/// The listening side.
pub(super) fn as_server(
    stream: &mut TcpStream,
    secret: &Secret,
    name: &str,
    compresses: bool,
) -> Result<Agreed, HandshakeError> {
    let mut io = Timed { stream, deadline: Instant::now() + HANDSHAKE_TIME_MAX };
    let ours = hello("", name, Offer::default())?;
    let (theirs, peer) = match io.read_hello() {
        Err(e @ HandshakeError::OtherVersion { .. }) => {
            io.write(&ours)?;
            io.drain();
            return Err(e);
        }
        other => other?,
    };
    io.write(&ours)?;
    let transcript = transcript(&theirs, &ours);
    let mut proof = [0; 32];
    io.read(&mut proof)?;
    if !secret.is_derived(CLIENT, &transcript, &proof) {
        return Err(HandshakeError::WrongSecret);
    }
    io.write(&secret.derive(SERVER, &transcript))?;
    Ok(Agreed {
        peer: peer.name,
        purpose: peer.purpose,
        send_key: secret.derive("key to client", &transcript),
        receive_key: secret.derive("key to server", &transcript),
        compresses: compresses && peer.offer & OFFER_LZ4 != 0,
        is_bonded: peer.offer & OFFER_BOND != 0,
        slot: usize::from(peer.offer & OFFER_SECOND != 0),
        id: id(secret, &transcript),
    })
}

fn id(secret: &Secret, transcript: &[u8; 32]) -> String {
    let hash = secret.derive("name of the link", transcript);
    hash[..ID_BYTES].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn transcript(client: &[u8], server: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(client).chain_update(server).finalize().into()
}

fn hello(purpose: &str, name: &str, offer: Offer) -> Result<[u8; HELLO_BYTES], HandshakeError> {
    let too_long = HandshakeError::Malformed { reason: "purpose or name is too long" };
    if purpose.len() > PURPOSE_BYTES_MAX || name.len() > NAME_BYTES_MAX {
        return Err(too_long);
    }
    let mut bytes = [0; HELLO_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..10].copy_from_slice(&CHANNEL_VERSION.to_le_bytes());
    bytes[10] = u8::try_from(purpose.len()).unwrap_or(u8::MAX);
    bytes[11] = u8::try_from(name.len()).unwrap_or(u8::MAX);
    rustix::rand::getrandom(&mut bytes[12..44], rustix::rand::GetRandomFlags::empty())
        .map_err(|e| HandshakeError::Io(e.into()))?;
    bytes[44..44 + purpose.len()].copy_from_slice(purpose.as_bytes());
    bytes[76..76 + name.len()].copy_from_slice(name.as_bytes());
    bytes[HELLO_BYTES - 1] = offer.bits();
    Ok(bytes)
}

fn parse(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, HandshakeError> {
    let text = |field: &[u8], len: u8, reason| {
        let bad = HandshakeError::Malformed { reason };
        match field.get(..usize::from(len)).map(std::str::from_utf8) {
            Some(Ok(text)) if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(text.to_owned()),
            _ => Err(bad),
        }
    };
    Ok(Hello {
        purpose: text(&bytes[44..76], bytes[10], "purpose")?,
        name: text(&bytes[76..HELLO_BYTES - 1], bytes[11], "name")?,
        offer: bytes[HELLO_BYTES - 1],
    })
}

/// A stream with one deadline for everything, so that a byte now and then does not keep a stranger connected.
struct Timed<'a> {
    stream: &'a mut TcpStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn time_left(&self) -> Result<std::time::Duration, HandshakeError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(HandshakeError::TimedOut) } else { Ok(left) }
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<(), HandshakeError> {
        let mut done = 0;
        while done < buf.len() {
            let left = self.time_left()?;
            self.stream.set_read_timeout(Some(left)).map_err(HandshakeError::Io)?;
            match self.stream.read(&mut buf[done..]) {
                Ok(0) => return Err(HandshakeError::Closed),
                Ok(n) => done += n,
                Err(e) if is_retry(&e) => {}
                Err(e) => return Err(HandshakeError::Io(e)),
            }
        }
        Ok(())
    }

    /// Everything written during a handshake fits the socket's buffer.
    fn write(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let left = self.time_left()?;
        self.stream.set_write_timeout(Some(left)).map_err(HandshakeError::Io)?;
        self.stream.write_all(bytes).map_err(|e| {
            if is_retry(&e) { HandshakeError::TimedOut } else { HandshakeError::Io(e) }
        })
    }

    /// Reads what the peer still sends, up to a bound: closing with bytes unread would reset the connection, and the
    /// peer might never see what was written last.
    fn drain(&mut self) {
        if self.stream.shutdown(Shutdown::Write).is_ok() {
            // Whichever way it ends, the connection is over.
            drop(self.read(&mut [0; 1024]));
        }
    }

    fn read_hello(&mut self) -> Result<([u8; HELLO_BYTES], Hello), HandshakeError> {
        let mut bytes = [0; HELLO_BYTES];
        self.read(&mut bytes[..PREAMBLE_BYTES])?;
        if &bytes[..8] != MAGIC {
            return Err(HandshakeError::NotUnderstudy { start: bytes[..8].to_vec() });
        }
        let theirs = u16::from_le_bytes([bytes[8], bytes[9]]);
        if theirs != CHANNEL_VERSION {
            return Err(HandshakeError::OtherVersion { ours: CHANNEL_VERSION, theirs });
        }
        self.read(&mut bytes[PREAMBLE_BYTES..])?;
        let hello = parse(&bytes)?;
        Ok((bytes, hello))
    }
}

fn is_retry(e: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(e.kind(), Interrupted | TimedOut | WouldBlock)
}

//! An authenticated, ordered stream of frames between two hosts that know the same secret.
//!
//! # Place
//! The daemon has one [`Listener`]; each log, bulk or control link is a [`Link`] of its own, told apart by its
//! purpose. [`Sender`] and [`Receiver`] are used by different threads.
//!
//! # Invariants
//! - INV-CHANNEL-1: no byte of a frame is handed out unless the peer knows the secret and the frame is the next one
//!   that the peer sent in this direction of this link.
//! - INV-CHANNEL-2: a stranger costs a bounded number of bytes, threads and seconds.
//! - INV-BOND-1: on a link with two paths, each frame arrives as long as one path does (see `bond.rs`).
//! - [`Sender::send`] takes a whole frame or nothing, and waits no longer than a bound.
//!
//! # Failure
//! A peer that says goodbye, one that goes away without, silence, and bytes that are not the peer's are told apart; see
//! [`Received`] and [`ReceiveError`]. Secrecy is not given: frames are authenticated, not encrypted.
//!
//! # Format
//! Handshake: see [`handshake`]. Then, in each direction, `len: u32 LE | kind: u8 | payload | tag: 16 bytes`, where
//! `tag` is the start of HMAC-SHA256(direction key, sequence number as u64 LE | len | kind | payload). `len` is that of
//! the payload. Kind 0 is data, kind 1 is goodbye, kind 2 is an acknowledgement: a count of frames as u64 LE. In a kind with
//! 0x10 added the payload begins with the frame's number and such a count: all frames of kinds 0 and 1 on bonded links. In a
//! kind with 0x20 added, what follows is the length of the data as u32 LE and an LZ4 block.

mod bond;
mod compress;
mod dial;
mod frame;
pub mod handshake;
mod link;
mod listen;
mod path;
mod secret;

use std::time::Duration;

pub use self::dial::{Dialer, Route};
pub use self::frame::{FRAME_BYTES_MAX, FrameError};
pub use self::handshake::HandshakeError;
pub use self::link::{Link, PathUse, ReceiveError, Received, Receiver, SendError, Sender};
pub use self::listen::{Incoming, Listener};
pub use self::secret::{SECRET_BYTES_MIN, Secret, SecretError};

/// Version of handshake and frames.
pub const CHANNEL_VERSION: u16 = 2;
/// Time for a whole handshake.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests;

//! Messages between a primary and its secondary, on one ordered connection.
//!
//! # Format
//! postcard (variants are numbered in the order below, integers are varints); the frame around it is the shell's. The
//! version is in [`Message::Hello`], whose layout up to it never changes.

use eventlog::LogPos;
use serde::{Deserialize, Serialize};

use crate::config::{HostId, VmId};

/// Version of the messages.
pub const PROTOCOL_VERSION: u8 = 2;
/// Most bytes of an encoded message.
pub const MESSAGE_MAX: usize = 64 << 20;

/// A message. P and S say who sends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// P: be my secondary. The first message.
    Hello {
        /// [`PROTOCOL_VERSION`].
        version: u8,
        /// The VM.
        vm: VmId,
        /// The sender.
        host: HostId,
        /// Generation of the record that the sender is live by.
        generation: u64,
        /// Position of the snapshot.
        start: LogPos,
    },
    /// S: no.
    Refused {
        /// Why.
        reason: RefuseReason,
    },
    /// S: the snapshot is loaded.
    Loaded,
    /// P: the record names you, go live when I am lost.
    Protected {
        /// Generation of that record.
        generation: u64,
    },
    /// P: log.
    Log {
        /// The records.
        bytes: Vec<u8>,
        /// Position after them.
        end: LogPos,
        /// Icount up to which outputs have left.
        released: u64,
    },
    /// S: where I am; sent for every log and heartbeat.
    Ack {
        /// End of the log that is in memory here.
        received: LogPos,
        /// What of it is replayed.
        replayed: LogPos,
        /// Number of the last heartbeat that came.
        echo: u64,
    },
    /// P: I am alive.
    Heartbeat {
        /// Counts up from 1.
        seq: u64,
        /// Icount up to which outputs have left.
        released: u64,
    },
    /// S: your digest is not mine; I stop.
    Diverged {
        /// Where.
        at: LogPos,
        /// Digest of the secondary.
        secondary: u64,
        /// Digest in the log.
        primary: u64,
    },
    /// S: I cannot go on.
    SecondaryFailed {
        /// For people.
        reason: String,
    },
    /// P: my machine stands at the end of the log; go live.
    SwitchOver {
        /// That end.
        at: LogPos,
    },
    /// S: I am live.
    Switched {
        /// Generation of the record.
        generation: u64,
    },
    /// P: you are not needed any more.
    Stop {
        /// The VM is off, by the record of this generation, and the log that came before is all that it did.
        off: Option<u64>,
    },
    /// Both: what the shells tell each other about their disks. It decides nothing, and the core passes it by.
    Disks {
        /// The shells' own encoding.
        note: Vec<u8>,
    },
}

/// Why a host does not become secondary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RefuseReason {
    /// It speaks another version.
    #[error("the hosts run different versions of the protocol")]
    Version,
    /// It is not about this VM, or from this host.
    #[error("the request is not for this VM and host")]
    WrongVm,
    /// It has the VM in another role.
    #[error("the host still has the VM in another role")]
    Busy,
}

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeMessageError {
    /// More bytes than [`MESSAGE_MAX`].
    #[error("message of {len} bytes, at most {MESSAGE_MAX} are allowed")]
    TooLong {
        /// How many.
        len: usize,
    },
    /// Not the encoding of a message.
    #[error("malformed message")]
    Malformed(#[source] postcard::Error),
    /// Bytes follow the message.
    #[error("{len} bytes after the message")]
    Trailing {
        /// How many.
        len: usize,
    },
}

/// The bytes of a message.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    postcard::to_stdvec(message).expect("messages hold only what postcard can encode")
}

/// The message that `bytes` are.
///
/// # Errors
/// [`DecodeMessageError`].
pub fn decode(bytes: &[u8]) -> Result<Message, DecodeMessageError> {
    let len = bytes.len();
    if len > MESSAGE_MAX {
        return Err(DecodeMessageError::TooLong { len });
    }
    let (message, rest) =
        postcard::take_from_bytes(bytes).map_err(DecodeMessageError::Malformed)?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(DecodeMessageError::Trailing { len: rest.len() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_bytes_have_not_changed() {
        let pos = |lsn, icount| LogPos { lsn, icount };
        let hello = Message::Hello {
            version: 2,
            vm: VmId([7; 16]),
            host: HostId("a".into()),
            generation: 300,
            start: pos(1, 2),
        };
        let mut want = vec![0, 2];
        want.extend([7; 16]);
        want.extend([1, b'a', 0xac, 2, 1, 2]);
        for (message, want) in [
            (hello, want),
            (Message::Refused { reason: RefuseReason::Busy }, vec![1, 2]),
            (Message::Loaded, vec![2]),
            (Message::Protected { generation: 5 }, vec![3, 5]),
            (
                Message::Log { bytes: vec![9, 8], end: pos(3, 4), released: 6 },
                vec![4, 2, 9, 8, 3, 4, 6],
            ),
            (
                Message::Ack { received: pos(1, 2), replayed: pos(3, 4), echo: 5 },
                vec![5, 1, 2, 3, 4, 5],
            ),
            (Message::Heartbeat { seq: 1, released: 2 }, vec![6, 1, 2]),
            (Message::Diverged { at: pos(1, 2), secondary: 3, primary: 4 }, vec![7, 1, 2, 3, 4]),
            (Message::SecondaryFailed { reason: "x".into() }, vec![8, 1, b'x']),
            (Message::SwitchOver { at: pos(1, 2) }, vec![9, 1, 2]),
            (Message::Switched { generation: 3 }, vec![10, 3]),
            (Message::Stop { off: None }, vec![11, 0]),
            (Message::Stop { off: Some(5) }, vec![11, 1, 5]),
            (Message::Disks { note: vec![7, 8] }, vec![12, 2, 7, 8]),
        ] {
            assert_eq!(encode(&message), want, "{message:?}");
            assert_eq!(decode(&want).unwrap(), message);
        }
    }

    #[test]
    fn trailing_and_missing_bytes_are_refused() {
        assert_eq!(decode(&[2, 0]), Err(DecodeMessageError::Trailing { len: 1 }));
        assert!(matches!(decode(&[4, 200]), Err(DecodeMessageError::Malformed(_))));
        assert!(matches!(decode(&[13]), Err(DecodeMessageError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = decode(&bytes) {
                prop_assert_eq!(decode(&encode(&message)).unwrap(), message);
            }
        }
    }
}

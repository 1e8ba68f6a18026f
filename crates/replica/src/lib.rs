//! The decisions of the replication protocol for one VM on one host: who runs it, what may leave it, who takes over.
//!
//! # Place
//! The host shell owns one [`Node`] for each VM. It feeds everything that happens to [`Node::handle`] as an [`Event`],
//! with the time, and executes the [`Command`]s that come back, in order. The core does no I/O and keeps no log: log
//! bytes pass through it as they are.
//!
//! # States
//! ```text
//!   Idle --Start--> Starting --claim won--> Live --claim lost--> Halted --Reset--> Idle
//!    |                                       ^
//!    '--Hello--> Following --primary lost--> GoingLive --claim lost--> Idle
//!
//!   Live: NeedSecondary -> Starting -> Admitting -> Protected -> Dropping -> NeedSecondary
//!         (outputs leave at once)     (outputs wait for acks)   (outputs wait for the arbiter)
//! ```
//!
//! # Invariants
//! - INV-REPLICA-1: an output leaves a protected primary only when its secondary has acknowledged the log up to it.
//! - INV-REPLICA-2: a host goes live, and a primary goes on alone, only by winning a compare-and-set on the arbiter's
//!   record; generations only rise.
//! - INV-REPLICA-3: a host is named as secondary only after outputs were held for its acknowledgements from a position
//!   on which it has acknowledged itself; only a host named in this session goes live.
//! - INV-REPLICA-4: a secondary goes live only after it replayed everything that it acknowledged.
//! - INV-REPLICA-5: acknowledgements release output only when they prove contact within the detection time.
//! - INV-REPLICA-6: when faults stop, a live VM that is wanted protected becomes protected.
//!
//! # Failure
//! Losing a link, a peer, messages of the arbiter or time (a paused process) is a matter of the state machine. A peer's
//! nonsense costs it the link. An unreachable arbiter means waiting, with outputs held.

#![forbid(unsafe_code)]

mod arbitration;
mod config;
mod event;
mod following;
mod lag;
mod live;
mod message;
mod node;
mod peer;
mod protection;
mod status;

pub use arbitration::{ArbiterReply, Record};
pub use config::{Config, HostId, LinkId, MonoTime, Mutation, VmId};
pub use event::{Command, DropReason, Event, HaltReason};
pub use eventlog::LogPos;
pub use message::{
    DecodeMessageError, MESSAGE_MAX, Message, PROTOCOL_VERSION, RefuseReason, decode, encode,
};
pub use node::Node;
pub use status::{FailoverTiming, LossReason, NotProtected, Protection, Role, Status};

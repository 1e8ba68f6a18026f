//! What the shell tells the core, and what the core tells the shell to do.

use eventlog::LogPos;

use crate::arbitration::{ArbiterReply, Record};
use crate::config::{HostId, LinkId};
use crate::message::{Message, RefuseReason};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time passed; at the latest when [`crate::Node::next_wakeup`] says.
    Tick,
    /// The operator wants the VM started here, from its disks.
    Start,
    /// The VM is to stop, or its guest powered off; the machine is not running any more.
    Stop,
    /// Whether the VM is wanted protected, and the hosts to try for it in this order (this host is left out).
    SetProtection {
        /// Wanted.
        wanted: bool,
        /// Hosts that could be the secondary.
        candidates: Vec<HostId>,
    },
    /// The operator wants the roles switched.
    SwitchOver,
    /// A halted node may be used again; its machine is gone.
    Reset,
    /// The arbiter answered.
    ArbiterReply {
        /// The number of the question.
        op: u64,
        /// The answer.
        reply: ArbiterReply,
    },
    /// A message came. The first on an accepted link is a [`Message::Hello`].
    Message {
        /// Where.
        link: LinkId,
        /// What.
        message: Message,
    },
    /// A link is gone.
    LinkClosed {
        /// Which.
        link: LinkId,
    },
    /// The machine of the primary made log. It must hold a mark at or after `outputs_up_to`.
    LogProduced {
        /// The records.
        bytes: Vec<u8>,
        /// End of the log with them.
        end: LogPos,
        /// Icount of the last output that the shell now holds, if there are new ones.
        outputs_up_to: Option<u64>,
    },
    /// The snapshot for a new secondary was taken at `at` and the link to it is up. Everything after `at`, and nothing
    /// before it, comes as [`Event::LogProduced`] after this event.
    ProtectStarted {
        /// From [`Command::StartProtect`].
        attempt: u64,
        /// The link for messages.
        link: LinkId,
        /// Position of the snapshot.
        at: LogPos,
    },
    /// The new secondary cannot be reached or refused the snapshot.
    ProtectFailed {
        /// From [`Command::StartProtect`].
        attempt: u64,
        /// For people.
        reason: String,
    },
    /// The whole snapshot was sent.
    SnapshotSent {
        /// From [`Command::StartProtect`].
        attempt: u64,
    },
    /// The machine stands still after [`Command::StopMachine`]; all its log was given in [`Event::LogProduced`].
    MachineStopped,
    /// The secondary's machine has its snapshot.
    SnapshotLoaded {
        /// From [`Command::LoadSnapshot`].
        link: LinkId,
    },
    /// The secondary's machine has replayed up to here.
    Replayed {
        /// Position.
        to: LogPos,
    },
    /// The digest in the log differs from the one of the secondary's machine.
    Diverged {
        /// Where.
        at: LogPos,
        /// Digest of this machine.
        ours: u64,
        /// Digest in the log.
        theirs: u64,
    },
    /// The secondary cannot go on: no memory, disk error, log that does not decode.
    ReplicaFailed {
        /// For people.
        reason: String,
    },
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Send it at once.
    Send {
        /// Where.
        link: LinkId,
        /// What.
        message: Message,
    },
    /// Close the link after sending what was given to send before. No [`Event::LinkClosed`] is needed.
    DropLink {
        /// Which.
        link: LinkId,
        /// Why.
        reason: DropReason,
    },
    /// Read the arbiter's record.
    ArbiterRead {
        /// To name in the reply.
        op: u64,
    },
    /// Replace the arbiter's record if its generation is `expected` (0: there is none). May be asked again.
    ArbiterCas {
        /// To name in the reply.
        op: u64,
        /// Generation that must be found.
        expected: u64,
        /// The new record.
        new: Record,
    },
    /// Start the VM from its disks.
    RunFresh {
        /// Generation of the record.
        generation: u64,
    },
    /// The VM may not be started here: the record says that another host has it.
    StartRefused {
        /// The record.
        current: Option<Record>,
    },
    /// The VM is stopped and the record says so.
    Stopped,
    /// All outputs made at or before this icount may leave.
    Release {
        /// Icount.
        up_to_icount: u64,
    },
    /// Take this much of the vCPUs' time away.
    Throttle {
        /// Thousandths, 0 for full speed.
        permille: u32,
    },
    /// Stop the vCPUs until [`Command::ResumeVcpu`].
    PauseVcpu,
    /// Go on.
    ResumeVcpu,
    /// Stop the machine at a position of its choice and say [`Event::MachineStopped`]; [`Command::ResumeVcpu`] may follow.
    StopMachine,
    /// Connect to the host, take a snapshot, send it.
    StartProtect {
        /// To name in the events.
        attempt: u64,
        /// Where to.
        host: HostId,
    },
    /// Stop doing so and free the snapshot.
    AbandonProtect {
        /// Which.
        attempt: u64,
    },
    /// Take the snapshot that comes with this link, then say [`Event::SnapshotLoaded`].
    LoadSnapshot {
        /// The link.
        link: LinkId,
        /// Position of the snapshot, for the log's decoder.
        at: LogPos,
    },
    /// Replay the records after what came before; comes while the snapshot still loads, too.
    Replay {
        /// The records.
        bytes: Vec<u8>,
        /// Position after them: the machine may run up to there.
        end: LogPos,
    },
    /// Everything is replayed up to `at` and the right to run is won: send again the outputs after `resend_after`,
    /// issue outstanding block requests, announce addresses, attach the clock, run.
    GoLive {
        /// Generation of the record.
        generation: u64,
        /// Where the log ends.
        at: LogPos,
        /// Icount of the last output that is known to have left.
        resend_after: u64,
    },
    /// Throw the machine away: this host is not the secondary any more.
    Discard {
        /// Save its state for study first.
        keep_state: bool,
    },
    /// Another host has the VM: stop the machine, drop all held outputs, release nothing, ever.
    Halt {
        /// Why.
        reason: HaltReason,
    },
}

/// Why a link is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// The peer said what no correct peer says.
    #[error("the peer broke the protocol: {0}")]
    Nonsense(&'static str),
    /// The hello was refused.
    #[error("refused: {0}")]
    Refused(RefuseReason),
    /// The session is over.
    #[error("the session is over")]
    Over,
}

/// Why a primary has to stop.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HaltReason {
    /// The arbiter's record is for another host.
    #[error("another host won the arbitration")]
    LostArbitration {
        /// The record.
        current: Option<Record>,
    },
}

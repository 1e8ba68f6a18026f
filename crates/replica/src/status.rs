//! What people are shown.

use crate::config::HostId;
use crate::config::MonoTime;

/// What this host is to the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It has no copy.
    Spare,
    /// It runs the VM, or is about to.
    Primary,
    /// It follows a primary.
    Secondary,
    /// It follows no one any more and is about to run the VM.
    GoingLive,
    /// It ran the VM; another host does now.
    Halted,
}

/// Whether the VM survives the loss of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protection {
    /// It does.
    Protected,
    /// It does not.
    NotProtected(NotProtected),
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotProtected {
    /// A secondary is being made.
    Starting {
        /// Where.
        host: HostId,
    },
    /// There is none.
    NeedSecondary {
        /// What happened to the one before, or to the last attempt to make one.
        reason: Option<LossReason>,
    },
    /// The arbiter does not answer, so that nothing can be decided.
    AwaitingArbiter,
    /// Nobody asked for it.
    Disabled,
    /// The VM does not run.
    VmNotRunning,
}

/// How a secondary was lost.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LossReason {
    /// Its connection is closed.
    #[error("the connection to the secondary was closed")]
    LinkClosed,
    /// It is silent.
    #[error("the secondary did not answer within the detection time")]
    Silent,
    /// Its state differs.
    #[error("the secondary diverged at step {icount}; both states are kept")]
    Diverged {
        /// Where.
        icount: u64,
    },
    /// It gave up.
    #[error("the secondary failed: {reason}")]
    Failed {
        /// What it said.
        reason: String,
    },
    /// It could not be made.
    #[error("the secondary could not be started: {reason}")]
    NotStarted {
        /// What the shell, or the host, said.
        reason: String,
    },
    /// It broke the protocol.
    #[error("the secondary broke the protocol: {what}")]
    Nonsense {
        /// How.
        what: &'static str,
    },
    /// It did not get in sync.
    #[error("the secondary did not catch up")]
    TooSlow,
    /// It did not go live in a planned failover.
    #[error("the secondary did not take over in time")]
    SwitchOverTimedOut,
    /// Protection was switched off.
    #[error("protection was disabled")]
    Disabled,
}

impl NotProtected {
    /// What somebody can do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Starting { .. } => "wait until the secondary has caught up",
            Self::NeedSecondary { reason: Some(LossReason::Diverged { .. }) } => {
                "a new secondary is made by itself; report the kept states"
            }
            Self::NeedSecondary { .. } => "check that another host is up, reachable and has room",
            Self::AwaitingArbiter => "make the arbiter reachable; output is held until then",
            Self::Disabled => "enable protection",
            Self::VmNotRunning => "start the VM, unless another host runs it",
        }
    }
}

/// When the parts of the last failover to this host happened, on this host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailoverTiming {
    /// The last sign of life of the primary.
    pub last_heard: MonoTime,
    /// The primary was taken for lost, or asked for the switch.
    pub detected: MonoTime,
    /// The arbitration was won.
    pub arbitrated: MonoTime,
    /// The log was replayed to its end.
    pub caught_up: MonoTime,
    /// The command to go live was given.
    pub live: MonoTime,
}

/// The state of a VM on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// This host's part.
    pub role: Role,
    /// Whether the VM is protected, as far as this host knows.
    pub protection: Protection,
    /// Generation of the last record that is known here.
    pub generation: u64,
    /// The host on the other end.
    pub peer: Option<HostId>,
    /// vLockstep interval: how far the secondary is behind, in microseconds; known on the primary.
    pub lag_us: u64,
    /// Batches of output that wait.
    pub held: usize,
    /// How much the primary is slowed, in thousandths.
    pub throttle_permille: u32,
    /// The last failover to this host.
    pub last_failover: Option<FailoverTiming>,
}

//! Where a primary stands with its secondary, and what each stage gives leave to do.
//!
//! # States
//! ```text
//!   Alone -> Starting -> Admitting -> Protected -> Dropping -> Alone
//!                                     Protected -> Switching -> (spare) or Dropping
//!   any -> Stopping -> (stopped)
//! ```

use eventlog::LogPos;

use crate::arbitration::Inquiry;
use crate::config::{HostId, LinkId, MonoTime};
use crate::peer::Peer;
use crate::status::LossReason;

/// Where the primary stands with its secondary.
#[derive(Debug)]
pub(crate) enum Protection {
    /// No secondary, and the record says so.
    Alone { reason: Option<LossReason>, retry_at: MonoTime },
    /// A secondary is being made.
    Starting { attempt: u64, host: HostId, peer: Option<Peer>, since: MonoTime },
    /// It is in sync; outputs are held for it.
    Admitting { peer: Peer, step: Admission },
    /// The record names it.
    Protected { peer: Peer },
    /// It is lost, or not wanted any more: waiting for the right to go on alone.
    Dropping { inquiry: Inquiry, reason: LossReason, link: Option<LinkId> },
    /// Planned failover.
    Switching { peer: Option<Peer>, step: Switch },
    /// The VM is stopped, the record does not say so yet.
    Stopping { inquiry: Inquiry, peer: Option<Peer> },
}

/// Steps from in sync to named.
#[derive(Debug)]
pub(crate) enum Admission {
    /// Outputs are held; it has yet to acknowledge what was released before.
    AwaitingAck { armed: LogPos },
    /// Asking the arbiter to name it.
    Claiming(Inquiry),
}

/// Steps of a planned failover.
#[derive(Debug)]
pub(crate) enum Switch {
    /// The machine is about to stand still.
    Draining,
    /// It does; what is held waits for its acknowledgements.
    Releasing { until: MonoTime },
    /// Nothing is held, and the secondary was told to go live.
    Handed { until: MonoTime },
}

impl Protection {
    pub(crate) fn peer(&self) -> Option<&Peer> {
        match self {
            Self::Alone { .. } | Self::Dropping { .. } => None,
            Self::Starting { peer, .. }
            | Self::Switching { peer, .. }
            | Self::Stopping { peer, .. } => peer.as_ref(),
            Self::Admitting { peer, .. } | Self::Protected { peer } => Some(peer),
        }
    }

    pub(crate) fn peer_mut(&mut self) -> Option<&mut Peer> {
        match self {
            Self::Alone { .. } | Self::Dropping { .. } => None,
            Self::Starting { peer, .. }
            | Self::Switching { peer, .. }
            | Self::Stopping { peer, .. } => peer.as_mut(),
            Self::Admitting { peer, .. } | Self::Protected { peer } => Some(peer),
        }
    }

    pub(crate) fn inquiry_mut(&mut self) -> Option<&mut Inquiry> {
        match self {
            Self::Admitting { step: Admission::Claiming(inquiry), .. }
            | Self::Dropping { inquiry, .. }
            | Self::Stopping { inquiry, .. } => Some(inquiry),
            Self::Admitting { step: Admission::AwaitingAck { .. }, .. }
            | Self::Alone { .. }
            | Self::Starting { .. }
            | Self::Protected { .. }
            | Self::Switching { .. } => None,
        }
    }

    /// Whether outputs need nobody's leave.
    pub(crate) fn is_alone(&self) -> bool {
        match self {
            Self::Alone { .. } | Self::Starting { .. } => true,
            Self::Admitting { .. }
            | Self::Protected { .. }
            | Self::Dropping { .. }
            | Self::Switching { .. }
            | Self::Stopping { .. } => false,
        }
    }
}

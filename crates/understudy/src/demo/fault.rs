//! What the demo does to a host.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A way for a host to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fault {
    /// SIGKILL for the host's daemon and all its processes: peers see closed connections.
    Kill,
    /// SIGSTOP: silence, and a host that believes to be live when it wakes up.
    Freeze,
    /// The host's switch port goes down, both directions; the host runs on, alone.
    Partition,
    /// The switch port goes down and the daemon dies in the same moment: nothing tells the peers.
    Power,
}

impl Fault {
    /// All of them, in the order in which `--fault all` goes through them.
    pub(crate) const ALL: [Self; 4] = [Self::Kill, Self::Freeze, Self::Partition, Self::Power];

    /// Word for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::Partition => "partition",
            Self::Power => "power",
        }
    }

    /// Itself in every round.
    pub(crate) fn always(self) -> FaultChoice {
        match self {
            Self::Kill => FaultChoice::Kill,
            Self::Freeze => FaultChoice::Freeze,
            Self::Partition => FaultChoice::Partition,
            Self::Power => FaultChoice::Power,
        }
    }

    /// Whether the host's daemon is gone after it.
    pub(crate) fn kills(self) -> bool {
        matches!(self, Self::Kill | Self::Power)
    }

    /// Whether the host's switch port goes down.
    pub(crate) fn cuts(self) -> bool {
        matches!(self, Self::Partition | Self::Power)
    }
}

/// `--fault`: one of them, or all in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FaultChoice {
    /// Kill the live host's processes.
    Kill,
    /// Stop the live host's processes, and let them go on later.
    Freeze,
    /// Cut the live host off the network, and connect it again later.
    Partition,
    /// Cut the live host off and kill it at once, as a power cut does.
    Power,
    /// All of them in turn.
    All,
}

impl FaultChoice {
    /// The fault of a round, counted from 0.
    pub(crate) fn for_round(self, round: u32) -> Fault {
        match self {
            Self::Kill => Fault::Kill,
            Self::Freeze => Fault::Freeze,
            Self::Partition => Fault::Partition,
            Self::Power => Fault::Power,
            Self::All => Fault::ALL[round as usize % Fault::ALL.len()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_goes_through_every_fault_in_turn() {
        let names: Vec<&str> =
            (0..5).map(|round| FaultChoice::All.for_round(round).name()).collect();
        assert_eq!(names, ["kill", "freeze", "partition", "power", "kill"]);
        assert_eq!(FaultChoice::Power.for_round(3), Fault::Power);
    }
}

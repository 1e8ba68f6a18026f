//! Which engine runs a machine here: the operator's wish, and what this host can have.
//!
//! # Invariants
//! - INV-HOSTENGINE-1: the choice is the host's, not the VM's: no replica knows or cares what the others run with.

use machine::Machine;
use machine::engine::{EngineConfig, EngineKind, EngineStats};

/// An engine in use, and what it had when that was last looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineUse {
    /// The engine.
    pub kind: EngineKind,
    /// What it has in memory and has done.
    pub stats: EngineStats,
}

impl EngineUse {
    /// Of a machine, now.
    pub(crate) fn of(machine: &Machine) -> Self {
        Self { kind: machine.engine(), stats: machine.engine_stats() }
    }
}

/// Gives `machine` the engine that is wanted, or else what this host can have, with a line that says so; `None` is the
/// fastest. `who` is whose machine it is.
pub(crate) fn choose(machine: &mut Machine, wanted: Option<EngineKind>, who: &str) -> EngineKind {
    let Some(kind) = wanted else { return machine.engine() };
    if machine.engine() != kind {
        machine.set_engine(EngineConfig::new(kind));
    }
    if machine.engine() != kind {
        let served = machine.engine();
        crate::log::line(&format!("{who}: this host cannot have the {kind}; the {served} serves"));
    }
    machine.engine()
}

//! Names, time and the limits that the shell sets.

use serde::{Deserialize, Serialize};

/// Lag at which a primary waits, in microseconds, unless a VM's secondary may be that far behind.
pub(crate) const LAG_HARD_US: u64 = 2_000_000;

/// A VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VmId(pub [u8; 16]);

/// A host, by the name that the arbiter's record has for it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostId(pub String);

impl std::fmt::Display for HostId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A connection between two hosts, numbered by the shell; never used twice in one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// A reading of the host's monotonic clock, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct MonoTime(pub u64);

impl MonoTime {
    /// Microseconds from `earlier` to here; 0 when it is not earlier.
    #[must_use]
    pub fn micros_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `micros` later.
    #[must_use]
    pub fn after(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros))
    }
}

/// What is fixed for a node. Times are in microseconds.
#[derive(Debug, Clone)]
pub struct Config {
    /// The VM.
    pub vm: VmId,
    /// This host.
    pub host: HostId,
    /// Drawn at random by the shell for each process: makes this node's claims different from all others.
    pub nonce_seed: u64,
    /// Silence after which the other side is taken for lost.
    pub detection_us: u64,
    /// The same while a secondary is being made, unless the detection time is longer: nothing depends on it yet.
    pub starting_detection_us: u64,
    /// A new secondary whose lag has not become less for this long needs a slower primary.
    pub catch_up_stall_us: u64,
    /// Between two heartbeats.
    pub heartbeat_us: u64,
    /// After which an unanswered question to the arbiter is asked again.
    pub arbiter_timeout_us: u64,
    /// First pause after the arbiter was unreachable; doubled up to `arbiter_backoff_max_us`.
    pub arbiter_backoff_us: u64,
    /// Longest pause between two attempts to reach the arbiter.
    pub arbiter_backoff_max_us: u64,
    /// Pause before a new secondary is tried.
    pub protect_retry_us: u64,
    /// Longest time that a new secondary may take until it is in sync.
    pub protect_timeout_us: u64,
    /// Log that a new secondary may have to keep while it loads its snapshot, in bytes.
    pub catch_up_bytes_max: u64,
    /// Lag below which a new secondary is in sync.
    pub lag_admit_us: u64,
    /// Lag at which the primary loses a third of the time that it loses at most; from half of it on it loses any.
    pub lag_soft_us: u64,
    /// Lag at which the primary waits.
    pub lag_hard_us: u64,
    /// Held batches of output at which the primary waits.
    pub held_max: usize,
    /// Longest wait for the other side to go live in a planned failover.
    pub switchover_timeout_us: u64,
    /// A rule to break, so that the simulator can show that it would notice.
    #[cfg(feature = "mutations")]
    pub mutation: Option<Mutation>,
}

impl Config {
    /// The defaults: losses are detected within 100 ms.
    #[must_use]
    pub fn new(vm: VmId, host: HostId, nonce_seed: u64) -> Self {
        Self {
            vm,
            host,
            nonce_seed,
            detection_us: 100_000,
            starting_detection_us: 3_000_000,
            catch_up_stall_us: 500_000,
            heartbeat_us: 20_000,
            arbiter_timeout_us: 1_000_000,
            arbiter_backoff_us: 20_000,
            arbiter_backoff_max_us: 1_000_000,
            protect_retry_us: 500_000,
            protect_timeout_us: 3_600_000_000,
            catch_up_bytes_max: 1 << 30,
            lag_admit_us: 100_000,
            lag_soft_us: 300_000,
            lag_hard_us: LAG_HARD_US,
            held_max: 4096,
            switchover_timeout_us: 3_000_000,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }

    #[cfg(feature = "mutations")]
    pub(crate) fn breaks(&self, rule: Mutation) -> bool {
        self.mutation == Some(rule)
    }

    #[cfg(not(feature = "mutations"))]
    pub(crate) fn breaks(&self, _rule: Mutation) -> bool {
        false
    }
}

/// A rule of the protocol that the simulator can break on purpose; has no effect without the feature `mutations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Outputs leave a protected primary at once (INV-REPLICA-1).
    ReleaseBeforeAck,
    /// A secondary goes live without asking the arbiter (INV-REPLICA-2).
    GoLiveUnasked,
    /// A primary that lost its secondary goes on alone without asking the arbiter (INV-REPLICA-2).
    AloneUnasked,
    /// A secondary is named without outputs having been held for it first (INV-REPLICA-3).
    AdmitUnheld,
    /// A secondary claims without being named (INV-REPLICA-3).
    ClaimUnnamed,
    /// A secondary goes live before its replay is at the end (INV-REPLICA-4).
    GoLiveEarly,
    /// Old acknowledgements release outputs (INV-REPLICA-5).
    StaleAcks,
    /// A lost secondary is never replaced (INV-REPLICA-6).
    NeverReplace,
}

//! Divergences: what is kept when two replicas differ, and the search for what made them.
//!
//! # Place
//! [`report`] is what the loops of the machines write when digests differ. [`analysis`] is `understudy divergence`: it runs
//! the secondary's recording again, on each engine, on the caller's thread, and says which of these happened:
//!
//! ```text
//! the engines make something else of one state       -> search: the first instruction, both register files
//! they agree with the log, the kept state does not   -> compare: what was changed from outside the machine
//! they agree with the secondary                      -> the primary was changed from outside the machine
//! ```
//!
//! # Invariants
//! - INV-DIVERGENCE-1: a machine is taken for right only where a digest of the log is right that was computed over all of its
//!   memory, or follows from there: one that is kept up to date sees only what the guest has written.

pub mod analysis;
mod bench;
pub mod compare;
pub mod report;
mod search;

pub use self::analysis::{Analysis, Cause, analyse, analyse_recording};
pub use self::bench::{Manner, Step};
pub use self::report::{Part, Report, Side};

#[cfg(test)]
mod tests;

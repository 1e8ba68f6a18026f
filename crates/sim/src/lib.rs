//! Seeded simulator of the replication protocol: the real core on three hosts, all else simulated, in one thread.
//!
//! # Place
//! A test tool. [`run`] plays one history: hosts that crash, pause and lose time, links that stall and break, an
//! arbiter that is slow, forgetful about answers, or down. The checkers in [`checks`] watch every step.
//!
//! # Determinism
//! Everything follows from the seed: the same seed and the same build give the same history.
//!
//! # Invariants
//! Those of the crate `replica`, INV-REPLICA-1 to INV-REPLICA-6; each has its checker.

#![forbid(unsafe_code)]

pub mod checks;

mod arbiter;
mod faults;
mod net;
mod rng;
mod shell;
mod toy;
mod world;

pub use checks::Violation;
pub use replica::Mutation;
pub use world::{Options, Report, run, run_told, run_with};

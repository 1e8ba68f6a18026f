//! The shell around the pure core: everything that touches files, sockets, devices, terminals or clocks.
//!
//! # Place
//! Called by the binary; calls the machine and the replica core. Threads, no async. Each module here is a part with
//! its own interface; the run loops tie them together.
//!
//! # Determinism
//! Nothing in this crate is deterministic, so nothing here may reach the guest but as a logged input.

pub mod announce;
pub mod arbiter;
mod background;
pub mod channel;
pub mod config;
pub mod console;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod divergence;
pub mod fat;
pub mod fence;
mod huge;
pub mod log;
pub mod macvtap;
pub mod name;
mod nic;
pub mod offload;
pub mod one_line;
pub mod passt;
mod priority;
pub mod recording;
pub mod snapshot;
pub mod tap;
pub mod vm;

//! The deterministic machine: a pure function of its snapshot and its inputs.
//!
//! # Place
//! The heart of the project. The shell drives a [`Machine`] from one thread; nothing here knows of threads, sockets,
//! files or the host's clock.
//!
//! # Invariants
//! Those of [`machine`](crate::machine) (INV-MACHINE), [`ram`] (INV-RAM), [`mmu`] (INV-MMU), [`interp`] (INV-ENGINE),
//! [`clock`] (INV-CLOCK), [`hart`] (INV-HART), [`offload`] (INV-OFFLOAD) and [`debug`] (INV-DEBUG).

#![forbid(unsafe_code)]

pub mod board;
pub mod clock;
pub mod config;
pub mod debug;
pub mod engine;
pub mod hart;
pub mod interp;
pub mod io;
pub mod machine;
pub mod mmu;
pub mod offload;
pub mod ram;
mod sbi;

pub use self::machine::{Exit, Machine, MachineSaved};

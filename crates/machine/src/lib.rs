//! The deterministic machine: a pure function of its snapshot and its inputs.

#![forbid(unsafe_code)]

pub mod board;
pub mod config;
pub mod io;
pub mod ram;

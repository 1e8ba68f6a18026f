//! Random programs on two engines, compared in full: the generator, the comparison, and who is wrong where.
//!
//! A program is a function of a theme and a seed; how it is run (where it stops, what is done to the machine there) is
//! one of the seed alone, so that a seed reproduces everything.

pub(crate) mod cases;
pub(crate) mod check;
pub(crate) mod code;
mod fragments;
pub(crate) mod generate;
pub(crate) mod layout;
pub(crate) mod ops;
pub(crate) mod program;
pub(crate) mod report;
pub(crate) mod stats;
pub(crate) mod theme;

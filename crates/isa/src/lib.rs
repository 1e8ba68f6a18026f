//! Instructions of the machine (RV64GC and the extensions in the table) and their arithmetic as pure functions: one
//! instruction table, a decoder, a disassembler, bit manipulation, AES and SHA, and exact floating point.
//!
//! # Place
//! The bottom of the tree: the engines decode with [`decode`] and compute with [`bits`], [`crypto`] and [`float`];
//! people read [`disassemble`]'s text. Nothing here knows of harts or memory.
//!
//! # Invariants
//! - INV-ISA-1: every function is total: no word and no operand panics.
//! - INV-ISA-2: results are functions of the arguments alone; host floating point is never used.
#![forbid(unsafe_code)]

pub mod bits;
mod compressed;
pub mod crypto;
mod disasm;
pub mod float;
mod insn;
mod table;

pub use disasm::disassemble;
pub use insn::{Insn, decode};
pub use table::Op;

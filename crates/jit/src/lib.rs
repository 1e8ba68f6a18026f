//! The JIT: translates RISC-V code, a page's blocks at a time, to x86-64 code that does exactly the same, step for step.
//!
//! # Place
//! Below `machine`, whose dispatcher asks for a page's code, enters it with a budget of steps, and interprets what is cold,
//! rare or left over. Generated code calls back for every instruction that it does not do itself.
//!
//! # Design
//! A template assembler: each instruction becomes its own piece of host code, with ten guest registers in host registers
//! throughout and the others in memory, so that the state at the border of every block, and of every instruction that can
//! leave it, is the same. Loads and stores go through a software TLB inline. Jumps within a page are patched to go from
//! block to block; jumps to other pages, and indirect ones, look the page up in a second TLB and the entry point in the
//! page's table. Code belongs to a page of RAM, whatever virtual addresses that has, and dies with it.
//!
//! # Invariants
//! - INV-JIT-1: at most the budget's steps are made, and the count is exact when generated code leaves.
//! - INV-JIT-2: thresholds, cache sizes, evictions and invalidations change nothing but speed.
//! - INV-JIT-3: jumps that are patched stay within their page's code, which is dropped as a whole.
//!
//! and those of [`arena`], [`asm`], [`emit`], [`stubs`] and [`tables`].
//!
//! # References
//! `../shared/jit-findings.md` (measurements of a prototype).

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod arena;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod asm;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod cache;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod emit;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod enter;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod features;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod layout;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod pack;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod stubs;
pub mod tables;

/// Whether there is a translator for this kind of host at all.
pub const IS_SUPPORTED: bool = cfg!(all(target_arch = "x86_64", target_os = "linux"));

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub use self::cache::{Entry, Found, Jit, Stats};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub use self::enter::{Answer, Exit, Runtime};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub use self::layout::{CSRS, Csr, State};
pub use self::tables::Tables;

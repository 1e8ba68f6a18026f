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
//! page's table. Code belongs to a page of RAM, whatever virtual addresses that has, and dies with it. Where a debugger may
//! want to stop, a block begins with a look whether it does at this virtual page: other code has nothing of breakpoints.
//!
//! # Invariants
//! - INV-JIT-1: at most the budget's steps are made, and the count is exact when generated code leaves.
//! - INV-JIT-2: thresholds, cache sizes, evictions and invalidations change nothing but speed.
//! - INV-JIT-3: jumps that are patched stay within their page's code, which is dropped as a whole.
//!
//! and those of the modules.
//!
//! # Other hosts
//! Where the host is none of x86-64 with Linux, or the feature `no-jit` says so, `absent` stands for the translator: it cannot
//! be made, and the interpreter serves.
//!
//! # References
//! `../shared/jit-findings.md` (measurements of a prototype).

#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit"))),
    expect(dead_code, reason = "the translator is not there to use it")
)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit"))))]
mod absent;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod arena;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod asm;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod cache;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod emit;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod enter;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod features;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod layout;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod pack;
mod runtime;
mod stops;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
mod stubs;
pub mod tables;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit"))))]
pub use self::absent::{Jit, is_supported};
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(feature = "no-jit")))]
pub use self::cache::{Jit, is_supported};
pub use self::runtime::{Answer, CSRS, Csr, Entry, Exit, Found, Link, Runtime, State, Stats};
pub use self::stops::Stops;
pub use self::tables::Tables;

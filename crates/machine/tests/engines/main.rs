//! The JIT against the interpreter: random programs and the cases of the comparison with QEMU run on both, and all of
//! the state is compared at random steps.
//!
//! The same programs, and more of them, run with `cargo run --release -p machine --example fuzz_engines`, which also
//! says which one it was when generated code brings the process down: here the first failing seed is the only trace.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../qemu_oracle/asm.rs"]
mod asm;
#[path = "../qemu_oracle/case.rs"]
mod case;
#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "../qemu_oracle/exceptions.rs"]
mod exceptions;
mod fuzz;
#[path = "../qemu_oracle/paging.rs"]
mod paging;
#[path = "../qemu_oracle/payload.rs"]
mod payload;
#[path = "../qemu_oracle/privileged.rs"]
mod privileged;
#[path = "../qemu_oracle/rng.rs"]
mod rng;
#[path = "../qemu_oracle/user.rs"]
mod user;

use fuzz::cases::Cases;
use fuzz::check::{self, Guest, Summary};
use fuzz::program::Program;
use fuzz::stats::Stats;
use fuzz::theme::THEMES;
use machine::engine::{EngineConfig, EngineKind};

/// Steps of a program.
const STEPS: u64 = 60_000;

fn run(theme: &str, programs: u64) {
    let theme = THEMES.iter().find(|t| t.name == theme).unwrap();
    compare((1..=programs).map(|seed| Program::new(theme, seed)));
}

/// Compares the engines on each of the programs; where this host has a JIT, it must have had a part in it.
fn compare<G: Guest>(guests: impl Iterator<Item = G>) {
    let mut sum = Summary::default();
    let mut has_jit = false;
    for guest in guests {
        has_jit |= guest.machine(EngineConfig::new(EngineKind::Jit)).engine() == EngineKind::Jit;
        match check::check(&guest, STEPS) {
            Ok(summary) => sum.add(summary),
            Err(report) => panic!("{report}"),
        }
    }
    assert!(!has_jit || sum.blocks > 0, "nothing was translated: {sum:?}");
}

#[test]
fn cases_of_the_comparison_with_qemu() {
    compare((1..=8).map(Cases::new));
}

#[test]
fn integer_programs() {
    run("integer", 60);
}

#[test]
fn memory_programs() {
    run("memory", 60);
}

#[test]
fn float_programs() {
    run("float", 60);
}

#[test]
fn programs_that_change_their_code() {
    run("smc", 60);
}

#[test]
fn programs_with_paging() {
    run("paging", 80);
}

#[test]
fn programs_with_traps() {
    run("traps", 60);
}

#[test]
fn programs_on_several_harts() {
    run("harts", 60);
}

#[test]
fn programs_of_everything() {
    run("all", 80);
}

#[test]
fn programs_really_do_what_they_are_for() {
    let mut stats = Stats::default();
    for theme in THEMES {
        for seed in 1..=20 {
            stats.count(&Program::new(theme, seed), 20_000);
        }
    }
    assert!(stats.missing().is_empty(), "missing: {:?}\n{}", stats.missing(), stats.text());
}

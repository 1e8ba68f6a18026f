//! The JIT against the interpreter: random programs and the cases of the comparison with QEMU run on both, and all of
//! the state is compared at random steps.
//!
//! The same programs run for longer with `cargo run --release -p machine --example fuzz_engines`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "../qemu_oracle/asm.rs"]
mod asm;
mod fuzz;
#[path = "../qemu_oracle/rng.rs"]
mod rng;

use fuzz::check;
use fuzz::program::Program;
use fuzz::stats::Stats;
use fuzz::theme::THEMES;

/// Steps of a program.
const STEPS: u64 = 60_000;

fn run(theme: &str, programs: u64) {
    let theme = THEMES.iter().find(|t| t.name == theme).unwrap();
    for seed in 1..=programs {
        let program = Program::new(theme, seed);
        if let Err(report) = check::check(&program, STEPS) {
            panic!("{report}");
        }
    }
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

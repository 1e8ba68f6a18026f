//! Instruction semantics against QEMU 10: random instruction streams run on `qemu-system-riscv64` and on our machine,
//! and every register, CSR and byte of memory afterwards must be the same.
//!
//! Needs the Debian package qemu-system-misc. A failure names the group and its seed; the generators are functions of
//! the seed alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod asm;
mod case;
mod compare;
mod payload;
mod rng;
mod user;

use case::{Case, Image};
use rng::Rng;

type Generator = fn(&mut Rng, &mut Image) -> Case;

/// Most cases of a run: the log's marker has 11 bits for the index.
const CASES_MAX: usize = 1024;

fn run(name: &str, generator: Generator, cases: usize) {
    run_seeded(name, generator, cases, 1);
}

fn run_seeded(name: &str, generator: Generator, cases: usize, seed: u64) {
    assert!(cases <= CASES_MAX);
    let mut rng = Rng::new(seed);
    let mut image = Image::new();
    let mut all: Vec<Case> = (0..cases).map(|_| generator(&mut rng, &mut image)).collect();
    case::assemble(&mut image, &mut all);
    let qemu = compare::on_qemu(name, &image.bytes);
    let ours = compare::on_machine(name, &image.bytes);
    compare::compare(name, seed, &all, &qemu, &ours);
}

#[test]
fn integer_instructions() {
    run("integer", user::integer, 1000);
}

#[test]
fn compressed_instructions() {
    run("compressed", user::compressed, 1000);
}

#[test]
fn atomic_instructions() {
    run("atomic", user::atomic, 600);
}

#[test]
fn floating_point_instructions() {
    run("float", user::float, 1000);
}

#[test]
fn words_that_are_mostly_no_instructions() {
    run("words", user::words, 1000);
}

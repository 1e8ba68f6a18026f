//! Instruction semantics against QEMU 10: random instruction streams run on `qemu-system-riscv64` and on our machine, with
//! either engine, and every register, CSR and byte of memory afterwards must be the same.
//!
//! Needs the Debian package qemu-system-misc. A failure names the group and its seed; the generators are functions of
//! the seed alone.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod asm;
mod case;
mod compare;
mod cpu;
mod exceptions;
mod extensions;
mod paging;
mod payload;
mod privileged;
mod rng;
mod user;

use case::{Case, Image};
use machine::engine::EngineKind;
use rng::Rng;

/// A function of chance alone that puts a case into an image.
type Generator = fn(&mut Rng, &mut Image) -> Case;

/// Seeds of the runs; more of them for a longer search.
const SEEDS: &[u64] = &[1];
/// Most cases of a run: the log's marker has 11 bits for the index.
const CASES_MAX: usize = 1024;

fn run(name: &str, generator: Generator, cases: usize) {
    run_with(name, generator, cases, "");
}

/// QEMU takes interrupts by the architecture's priorities with AIA only.
fn run_with_aia(name: &str, generator: Generator, cases: usize) {
    run_with(name, generator, cases, ",smaia=on,ssaia=on");
}

fn run_with(name: &str, generator: Generator, cases: usize, extensions: &str) {
    assert!(cases <= CASES_MAX);
    for &seed in SEEDS {
        let mut rng = Rng::new(seed);
        let mut image = Image::new();
        let mut all: Vec<Case> = (0..cases).map(|_| generator(&mut rng, &mut image)).collect();
        case::assemble(&mut image, &mut all);
        let qemu = compare::on_qemu(name, extensions, &image.bytes);
        for engine in [EngineKind::Interpreter, EngineKind::Jit] {
            let ours = compare::on_machine(name, engine, &image.bytes);
            compare::compare(&format!("{name} on the {engine}"), seed, &all, &qemu, &ours);
        }
    }
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

#[test]
fn bit_manipulation() {
    run("registers", extensions::registers, 1000);
}

#[test]
fn words_one_bit_off_bit_manipulation() {
    run("near-misses", extensions::near_misses, 1000);
}

#[test]
fn csr_values() {
    run("csr-values", privileged::csr_values, 1000);
}

#[test]
fn csr_writes_that_raise_interrupts() {
    run_with_aia("csr-interrupts", privileged::csr_interrupts, 1000);
}

#[test]
fn traps_and_returns() {
    run_with_aia("traps", privileged::traps, 1000);
}

#[test]
fn interrupts_by_priority() {
    run_with_aia("interrupts", privileged::interrupts, 1000);
}

#[test]
fn wait_for_interrupt_allowed_or_not() {
    run("wfi", privileged::wait_for_interrupt, 100);
}

#[test]
fn translation_of_accesses_and_fetches() {
    run("translated", paging::translated, 700);
}

#[test]
fn translation_with_mprv() {
    run("mprv", paging::modified_privilege, 500);
}

#[test]
fn code_that_is_written_and_fetched() {
    run("code", paging::code, 500);
}

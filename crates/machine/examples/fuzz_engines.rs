//! Random programs on the JIT and the interpreter, for as long as wanted.
//!
//! ```text
//! fuzz_engines [--seconds N] [--seed S] [--theme T] [--programs N] [--steps N] [--stats] [--verbose]
//! ```
//! A difference, a crash or a program that hangs ends the run with exit code 1, and how to see it again is said.

#![expect(clippy::disallowed_types, reason = "the bound of the run is in the host's time")]
#![expect(clippy::disallowed_methods, reason = "a thread waits for a process that may hang")]
#![allow(clippy::unwrap_used, reason = "the generators are those of tests")]

#[path = "../tests/qemu_oracle/asm.rs"]
mod asm;
#[path = "../tests/qemu_oracle/case.rs"]
mod case;
#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "../tests/qemu_oracle/exceptions.rs"]
mod exceptions;
#[path = "../tests/engines/fuzz/mod.rs"]
mod fuzz;
#[path = "../tests/qemu_oracle/paging.rs"]
mod paging;
#[path = "../tests/qemu_oracle/payload.rs"]
mod payload;
#[path = "../tests/qemu_oracle/privileged.rs"]
mod privileged;
#[path = "../tests/qemu_oracle/rng.rs"]
mod rng;
#[path = "../tests/qemu_oracle/user.rs"]
mod user;

use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use fuzz::cases::{self, Cases};
use fuzz::check::{self, Guest};
use fuzz::program::Program;
use fuzz::report::command;
use fuzz::stats::Stats;
use fuzz::theme::THEMES;

/// A program that takes longer than this hangs.
const PROGRAM_TIME_MAX: Duration = Duration::from_secs(120);

/// The command line.
struct Options {
    seconds: u64,
    seed: u64,
    programs: u64,
    steps: u64,
    theme: Option<String>,
    stats: bool,
    verbose: bool,
    /// Set by the program itself: this process runs what may bring it down.
    inside: bool,
}

fn themes() -> Vec<&'static str> {
    THEMES.iter().map(|t| t.name).chain([cases::NAME]).collect()
}

fn options() -> Result<Options, String> {
    let mut o = Options {
        seconds: 60,
        seed: 1,
        programs: u64::MAX,
        steps: 100_000,
        theme: None,
        stats: false,
        verbose: false,
        inside: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            let value = args.next().ok_or(format!("{arg} needs a value"))?;
            value.parse::<u64>().map_err(|e| format!("{arg}: {e}"))
        };
        match arg.as_str() {
            "--seconds" => o.seconds = number()?,
            "--seed" => o.seed = number()?,
            "--programs" => o.programs = number()?,
            "--steps" => o.steps = number()?,
            "--stats" => o.stats = true,
            "--verbose" => o.verbose = true,
            "--inside" => o.inside = true,
            "--theme" => {
                let name = args.next().filter(|name| themes().contains(&name.as_str()));
                o.theme = Some(name.ok_or(format!("the themes are {}", themes().join(", ")))?);
            }
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    Ok(o)
}

/// The program of a theme and a seed.
fn guest(theme: &str, seed: u64) -> Box<dyn Guest> {
    match THEMES.iter().find(|t| t.name == theme) {
        Some(theme) => Box::new(Program::new(theme, seed)),
        None => Box::new(Cases::new(seed)),
    }
}

fn run(o: &Options) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(o.seconds);
    let (mut programs, mut sum) = (0, check::Summary::default());
    let mut stats = Stats::default();
    'seeds: for seed in o.seed.. {
        for theme in themes().into_iter().filter(|t| o.theme.as_deref().is_none_or(|o| o == *t)) {
            if programs >= o.programs || Instant::now() >= end {
                break 'seeds;
            }
            let guest = guest(theme, seed);
            eprintln!("{}", command(&*guest));
            if o.stats {
                stats.count(&*guest, o.steps.min(20_000));
            }
            sum.add(check::check(&*guest, o.steps)?);
            programs += 1;
        }
    }
    if o.stats {
        println!("{}missing: {}", stats.text(), stats.missing().join(", "));
    }
    let check::Summary { steps, stops, blocks, evictions } = sum;
    println!(
        "{programs} programs, {steps} steps on each engine, compared at {stops} of them: no difference; \
         {blocks} blocks translated, {evictions} evictions"
    );
    Ok(())
}

/// Runs the programs in a process of their own, which generated code may bring down or hang, and passes on what it says.
fn supervise(verbose: bool) -> Result<ExitCode, String> {
    let fail = |e: std::io::Error| format!("cannot run the programs: {e}");
    let mut command = Command::new(std::env::current_exe().map_err(fail)?);
    command.args(std::env::args().skip(1)).arg("--inside").stderr(Stdio::piped());
    let mut child = command.spawn().map_err(fail)?;
    let words = BufReader::new(child.stderr.take().ok_or("no standard error")?);
    let (sender, lines) = channel();
    // It ends when the child has.
    std::thread::spawn(move || {
        words.lines().map_while(Result::ok).try_for_each(|l| sender.send(l))
    });
    let mut last = String::new();
    let mut has_report = false;
    loop {
        match lines.recv_timeout(PROGRAM_TIME_MAX) {
            Ok(line) if line.starts_with("cargo run") && !has_report => {
                if verbose {
                    eprintln!("{line}");
                }
                last = line;
            }
            Ok(line) => {
                if !std::mem::replace(&mut has_report, true) {
                    eprintln!("{last}");
                }
                eprintln!("{line}");
            }
            Err(RecvTimeoutError::Timeout) => {
                drop(child.kill());
                return Err(format!("{last}\nit hangs"));
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = child.wait().map_err(fail)?;
    match status.code() {
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        None => Err(format!("{last}\nit ended by {status}")),
    }
}

fn main() -> ExitCode {
    let outcome = options().map_err(|e| (2, e)).and_then(|o| {
        let done =
            if o.inside { run(&o).map(|()| ExitCode::SUCCESS) } else { supervise(o.verbose) };
        done.map_err(|e| (1, e))
    });
    outcome.unwrap_or_else(|(code, text)| {
        eprintln!("{text}");
        ExitCode::from(code)
    })
}

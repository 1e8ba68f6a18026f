//! Random programs on the JIT and the interpreter, for as long as wanted.
//!
//! ```text
//! fuzz_engines [--seconds N] [--seed S] [--theme T] [--programs N] [--steps N] [--stats] [--verbose]
//! ```
//! A difference ends the run with exit code 1 and says how to see it again.

#![expect(clippy::disallowed_types, reason = "the bound of the run is in the host's time")]

#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "../tests/qemu_oracle/asm.rs"]
mod asm;
#[path = "../tests/engines/fuzz/mod.rs"]
mod fuzz;
#[path = "../tests/qemu_oracle/rng.rs"]
mod rng;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use fuzz::check;
use fuzz::program::Program;
use fuzz::stats::Stats;
use fuzz::theme::{THEMES, Theme};

/// The command line.
struct Options {
    seconds: u64,
    seed: u64,
    programs: u64,
    steps: u64,
    themes: Vec<&'static Theme>,
    stats: bool,
    verbose: bool,
}

fn options() -> Result<Options, String> {
    let mut o = Options {
        seconds: 60,
        seed: 1,
        programs: u64::MAX,
        steps: 100_000,
        themes: THEMES.iter().collect(),
        stats: false,
        verbose: false,
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
            "--theme" => {
                let name = args.next().ok_or("--theme needs a name")?;
                let names: Vec<&str> = THEMES.iter().map(|t| t.name).collect();
                let theme = THEMES.iter().find(|t| t.name == name);
                o.themes = vec![theme.ok_or(format!("the themes are {}", names.join(", ")))?];
            }
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    Ok(o)
}

/// Says on the way out of a panic which program it was.
struct Running<'a>(&'a Program);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fuzz::report::command(self.0));
        }
    }
}

fn run(o: &Options) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(o.seconds);
    let (mut programs, mut steps, mut stops, mut blocks, mut evictions) = (0, 0, 0, 0, 0);
    let mut stats = Stats::default();
    'seeds: for seed in o.seed.. {
        for theme in &o.themes {
            if programs >= o.programs || Instant::now() >= end {
                break 'seeds;
            }
            let program = Program::new(theme, seed);
            if o.verbose {
                eprintln!("{}", fuzz::report::command(&program));
            }
            let _running = Running(&program);
            if o.stats {
                stats.count(&program, o.steps.min(20_000));
            }
            let summary = check::check(&program, o.steps)?;
            programs += 1;
            steps += summary.steps;
            stops += summary.stops;
            blocks += summary.blocks;
            evictions += summary.evictions;
        }
    }
    if o.stats {
        println!("{}missing: {}", stats.text(), stats.missing().join(", "));
    }
    println!(
        "{programs} programs, {steps} steps on each engine, compared at {stops} of them: no difference; \
         {blocks} blocks translated, {evictions} evictions"
    );
    Ok(())
}

fn main() -> ExitCode {
    let outcome = options().map_err(|e| (2, e)).and_then(|o| run(&o).map_err(|e| (1, e)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, text)) => {
            eprintln!("{text}");
            ExitCode::from(code)
        }
    }
}

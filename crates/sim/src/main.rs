//! Plays histories: `sim SEED` one, told event by event, `sim FROM TO` a range, and prints what happened.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "this is what it is for")]

use std::process::ExitCode;

fn main() -> ExitCode {
    let numbers: Result<Vec<u64>, _> = std::env::args().skip(1).map(|arg| arg.parse()).collect();
    let (from, to) = match numbers.as_deref() {
        Ok([seed]) => (*seed, *seed),
        Ok([from, to]) => (*from, *to),
        Ok(_) | Err(_) => {
            println!("usage: sim SEED | sim FROM TO");
            return ExitCode::from(2);
        }
    };
    let mut is_good = true;
    let (mut lost, mut failovers, mut slowest) = (0u64, 0u64, 0u64);
    for seed in from..=to {
        let result = if from == to {
            sim::run_told(seed, sim::Options::default(), |line| println!("{line}"))
        } else {
            sim::run(seed)
        };
        match result {
            Ok(report) => {
                lost += u64::from(report.is_lost);
                failovers += report.failovers;
                if !report.is_lost {
                    slowest = slowest.max(report.healed_in_us);
                }
                if from == to {
                    println!("seed {seed}: {report:?}");
                }
            }
            Err(violation) => {
                is_good = false;
                println!("seed {seed}: {violation}");
            }
        }
    }
    println!(
        "{} seeds, {failovers} failovers, {lost} lost, healed in {slowest} us at most",
        to - from + 1
    );
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! Recording and replay beside running: the workloads of the engine's bench, without QEMU.
//!
//! # Invariants
//! - INV-RECORDED-2: the log of machines without a disk and a network is that of the compute workloads alone: those with
//!   devices run on machines of their own.

use std::path::Path;

use super::RecordArgs;
use crate::bench::comparison::{Comparison, Ratio, geometric_mean};
use crate::bench::engine::running::Clock;
use crate::bench::engine::side::Side;
use crate::bench::engine::workload::{self, Needs, Workload};
use crate::bench::engine::{Guests, Measured, Plan, Recorded, measure};
use crate::bench::figure::{Figure, Section, Target};

/// The machines that run.
const LIVE: [Side; 2] = [Side::Ours, Side::Recording];
/// The columns of the table.
const SIDES: [Side; 3] = [Side::Ours, Side::Recording, Side::Replay];
/// Slowest that a machine may be that is recorded.
const SPEED_MIN: f64 = 0.95;
/// Fastest that a log may grow, in bytes for each 1,000 steps.
const LOG_MAX: f64 = 0.5;

/// Measures it; see the module documentation.
pub(super) fn run(
    dir: &Path,
    guests: &Guests,
    args: &RecordArgs,
    section: &mut Section,
) -> anyhow::Result<()> {
    let workloads = workload::chosen(&args.only).map_err(anyhow::Error::msg)?;
    let (compute, io): (Vec<Workload>, Vec<Workload>) =
        workloads.iter().partition(|workload| workload.needs == Needs::Nothing);
    let plan = |workloads| Plan {
        engine: args.engine.as_deref(),
        sides: LIVE.to_vec(),
        workloads,
        turns: args.turns,
    };
    let mut measured = measure(dir, guests, &plan(compute))?;
    section.figures.push(log_growth(&measured.recordings));
    if !io.is_empty() {
        let more = measure(dir, guests, &plan(io))?;
        measured.times.extend(more.times);
        measured.failures.extend(more.failures);
        measured.notes.extend(more.notes);
    }
    for (clock, name) in [(Clock::Cpu, "CPU time"), (Clock::Wall, "time")] {
        section.figures.extend(figures(&comparison(&measured, &workloads, clock), name));
    }
    section.comparison = Some(comparison(&measured, &workloads, Clock::Wall));
    section.notes.push(format!(
        "speed: medians of {} turns; one vCPU, 1 GiB; each turn starts every machine anew",
        args.turns
    ));
    section.notes.append(&mut measured.notes);
    let failed = measured.failures.len();
    section.notes.append(&mut measured.failures);
    anyhow::ensure!(failed == 0, "{failed} measurements failed");
    Ok(())
}

fn comparison(measured: &Measured, workloads: &[Workload], clock: Clock) -> Comparison {
    let ratio = |name: &str, of: usize, to: usize| Ratio { name: name.into(), of, to };
    Comparison {
        machines: SIDES.iter().map(|side| side.name().to_owned()).collect(),
        ratios: vec![ratio("recording / not", 1, 0), ratio("replay / recording", 2, 1)],
        rows: measured.rows(workloads, &SIDES, clock),
    }
}

/// Bytes of log for each 1,000 steps, over all recordings.
fn log_growth(recordings: &[Recorded]) -> Figure {
    let bytes: u64 = recordings.iter().map(|recorded| recorded.log_bytes).sum();
    let steps: u64 = recordings.iter().map(|recorded| recorded.steps).sum();
    let growth = (steps > 0).then(|| bytes as f64 * 1000.0 / steps as f64);
    Figure::new("log for each 1,000 steps without disk and network", growth, "bytes")
        .aim(Target::AtMost(LOG_MAX))
}

/// The geometric mean and the worst workload of each ratio.
fn figures(comparison: &Comparison, clock: &str) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (ratio, aim) in comparison.ratios.iter().zip([Some(SPEED_MIN), None]) {
        let values = comparison.values(ratio);
        let mean = geometric_mean(values.iter().map(|(_, value)| *value));
        let name = format!("{} by {clock}, geometric mean of {}", ratio.name, values.len());
        let figure = Figure::new(name, mean, "");
        figures.push(match aim {
            Some(limit) => figure.aim(Target::AtLeast(limit)),
            None => figure,
        });
        let worst = values.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let worst_name = worst.map_or("none", |(name, _)| name);
        let name = format!("{} by {clock}, worst ({worst_name})", ratio.name);
        figures.push(Figure::new(name, worst.map(|(_, value)| *value), ""));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::comparison::Row;

    #[test]
    fn growth_is_of_all_recordings_and_unknown_of_none() {
        let recordings = [(300, 1_000_000), (100, 1_000_000)]
            .map(|(log_bytes, steps)| Recorded { log_bytes, steps });
        let figure = log_growth(&recordings);
        assert_eq!((figure.measured, figure.met), (Some(0.2), Some(true)));
        assert_eq!(log_growth(&[]).measured, None);
    }

    #[test]
    fn cost_of_recording_has_an_aim_and_replay_has_none() {
        let row = Row {
            name: "slow".into(),
            what: String::new(),
            seconds: vec![vec![1.0], vec![1.25], vec![1.0]],
        };
        let workloads = workload::chosen(&[]).unwrap();
        let mut comparison = comparison(&Measured::default(), &workloads, Clock::Wall);
        comparison.rows = vec![row];
        let found: Vec<_> =
            figures(&comparison, "time").iter().map(|f| (f.measured, f.met)).collect();
        assert_eq!(found[0], (Some(0.8), Some(false)));
        assert_eq!(found[2], (Some(1.25), None));
    }
}

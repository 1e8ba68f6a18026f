//! Four loads in the guest without and with a secondary, and the same programs on this host: the paper's Table 1.
//!
//! # Invariants
//! - INV-LOADS-1: the ratio of protected to unprotected is of the same machine in the same run, and the ratio to native of
//!   the same load on the same CPU, in the same run.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::Options;
use super::load::{self, Files, Load, Place, Rate};
use super::native::Native;
use super::postgres;
use crate::bench::console::Console;
use crate::bench::engine::workload;
use crate::bench::figure::{Figure, Section, Target, largest, listed, median};
use crate::bench::speed::{cpu_seconds, pin};
use crate::bench::stage::{Material, Stage};
use crate::demo::control::Control;
use crate::demo::lab::VM;

/// The CPU of the primary, of the clients and of what runs natively; the secondary has the other one.
pub(super) const PRIMARY_CPU: &str = "0";
/// Memory of the machine.
const MEMORY: &str = "1G";
/// Slowest that a protected machine may be.
const RATIO_MIN: f64 = 0.95;
/// Time to settle after protection changed.
const CALM: Duration = Duration::from_secs(2);
/// How often log and lag are looked at.
const SAMPLE: Duration = Duration::from_millis(250);

/// What was measured of a load in one manner, turn by turn.
#[derive(Debug, Clone, Default)]
struct Measured {
    /// Of the load in a second.
    rates: Vec<f64>,
    /// Of the load in a second of the primary's CPU time.
    by_cpu: Vec<f64>,
    /// The guest's million steps for each of the load.
    steps: Vec<f64>,
    latencies: Vec<f64>,
    log_mbit: Vec<f64>,
    lags_ms: Vec<f64>,
}

/// A load, and how it went in each manner.
#[derive(Debug, Clone)]
struct Row {
    load: Load,
    amount: Option<u32>,
    native_amount: Option<u32>,
    unprotected: Measured,
    protected: Measured,
    native: Measured,
}

/// The guest as a place for loads.
struct Guest {
    console: Console,
    commands: u32,
}

impl Place for Guest {
    fn address(&self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, 10))
    }

    fn files(&self) -> Files {
        let [kernels, work, object] = ["/bench/kernels", "/srv/work.c", "/tmp/work.o"];
        Files { kernels: kernels.into(), work: work.into(), object: object.into() }
    }

    fn time(&mut self, command: &str, bound: Duration) -> anyhow::Result<Duration> {
        self.commands += 1;
        let name = format!("c{}", self.commands);
        self.console.type_line(&format!("{name} {command}"))?;
        self.console.wait_for(&format!("understudy: run {name}"), bound)?;
        let begun = Instant::now();
        self.console.wait_for(&format!("understudy: exit 0 {name}"), bound)?;
        Ok(begun.elapsed())
    }
}

/// Measures it; see the module documentation.
pub(super) fn run(dir: &Path, material: &Material, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("tables");
    let mut material = material.clone();
    let initrd = dir.join("initrd");
    guest::write_with_files(&material.guest, &workload::files(dir)?, &initrd)?;
    material.guest.initrd = initrd;
    let stage = Stage::start_with(dir, &material, MEMORY, false)?;
    let mut rows = Load::ALL.map(|load| {
        let [unprotected, protected, native] = [(); 3].map(|()| Measured::default());
        Row { load, amount: None, native_amount: None, unprotected, protected, native }
    });
    let result = measure(dir, &stage, options, &mut rows, &mut section);
    section.figures = rows.iter().flat_map(figures).collect();
    section.notes.extend(rows.iter().map(Row::line));
    section.notes.push(format!(
        "taskset: the primary, the clients and what runs natively on CPU {PRIMARY_CPU}, the secondary on the other \
         one, in all modes; {MEMORY} of memory, a mirrored disk; {} turns of {} s for each load",
        options.turns, options.seconds
    ));
    section.notes.push(format!(
        "pgbench -s {} -c {} -j 1, redis-benchmark -c {} -t set,get -d 100; native: this host's programs of Debian, \
         PostgreSQL's data on the disk that has the guest's image",
        load::SCALE,
        load::PGBENCH_CLIENTS,
        load::REDIS_CLIENTS
    ));
    if let Err(error) = result {
        eprint!("{}", stage.lab.log_tails());
        section.failure = Some(host::one_line::flatten(&format!("{error:#}")));
    }
    Ok(section)
}

fn measure(
    dir: &Path,
    stage: &Stage,
    options: &Options,
    rows: &mut [Row],
    section: &mut Section,
) -> anyhow::Result<()> {
    postgres::wait_ready(&stage.progress)?;
    let mut native = Native::new(&dir.join("native"))?;
    for started in [native.start_redis(&stage.progress), native.start_postgres(&stage.progress)] {
        section.notes.extend(started.err().map(|error| format!("native: {error:#}")));
    }
    pin(stage)?;
    let mut guest = Guest { console: stage.console("understudy: services ready")?, commands: 0 };
    for row in rows.iter_mut() {
        stage.progress.say(&format!("warming {} up", row.load.name()));
        row.amount = Some(load::warm_up(row.load, &mut guest, options.seconds)?);
        let amount = load::warm_up(row.load, &mut native, options.seconds);
        match amount {
            Ok(amount) => row.native_amount = Some(amount),
            Err(error) => section.notes.push(format!("native {}: {error:#}", row.load.name())),
        }
    }
    for turn in 1..=options.turns {
        for row in rows.iter_mut() {
            let Some(amount) = row.native_amount else { continue };
            let rate = load::run(row.load, &mut native, amount)?;
            row.native.note(rate);
        }
        all_loads(stage, &mut guest, rows, false, turn)?;
        stage.protect()?;
        pin(stage)?;
        std::thread::sleep(CALM);
        let generation = stage.view()?.generation;
        all_loads(stage, &mut guest, rows, true, turn)?;
        anyhow::ensure!(
            stage.view()?.generation == generation,
            "the machine failed over in turn {turn}"
        );
        stage.unprotect()?;
        std::thread::sleep(CALM);
    }
    Ok(())
}

/// One turn in one manner.
fn all_loads(
    stage: &Stage,
    guest: &mut Guest,
    rows: &mut [Row],
    is_protected: bool,
    turn: u32,
) -> anyhow::Result<()> {
    for row in rows {
        let amount = row.amount.context("it was warmed up")?;
        let (live, process) = stage.live()?;
        let sampler = Sampler::start(live)?;
        let look = || anyhow::Ok((cpu_seconds(process)?, stage.view()?.icount));
        let (cpu_before, steps_before) = look()?;
        let rate = load::run(row.load, guest, amount)?;
        let (cpu_after, steps_after) = look()?;
        let cpu = cpu_after - cpu_before;
        let samples = sampler.finish()?;
        let measured = if is_protected { &mut row.protected } else { &mut row.unprotected };
        measured.note(rate);
        measured.by_cpu.push(rate.done / cpu.max(0.01));
        let steps = steps_after.saturating_sub(steps_before) as f64;
        measured.steps.push(steps / 1e6 / rate.done.max(1.0));
        let log = samples.iter().map(|sample| sample.0).sum::<f64>() / samples.len().max(1) as f64;
        measured.log_mbit.push(log * 8.0 / 1e6);
        measured.lags_ms.push(largest(samples.iter().map(|sample| sample.1)).unwrap_or(0.0));
        let manner = if is_protected { "protected" } else { "unprotected" };
        stage.progress.say(&format!(
            "turn {turn}, {manner}: {} {:.2} {}",
            row.load.name(),
            rate.done / rate.seconds,
            row.load.unit()
        ));
    }
    Ok(())
}

impl Measured {
    fn note(&mut self, rate: Rate) {
        self.rates.push(rate.done / rate.seconds.max(0.001));
        self.latencies.extend(rate.latency_ms);
    }
}

impl Row {
    /// Single values, for those who want to know how far they are apart.
    fn line(&self) -> String {
        let Self { load, unprotected, protected, native, .. } = self;
        let rounded = |values: &[f64]| {
            let digits = if values.iter().any(|value| *value < 100.0) { 100.0 } else { 1.0 };
            listed(&values.iter().map(|v| (v * digits).round() / digits).collect::<Vec<_>>())
        };
        format!(
            "{}, {}: unprotected {}; protected {}, largest lag {} ms; native {}",
            load.name(),
            load.unit(),
            rounded(&unprotected.rates),
            rounded(&protected.rates),
            largest(protected.lags_ms.iter().copied()).unwrap_or(0.0),
            rounded(&native.rates)
        )
    }
}

fn figures(row: &Row) -> Vec<Figure> {
    let Row { load, unprotected, protected, native, .. } = row;
    let middle = |values: &[f64]| median(values.iter().copied());
    let ratio = |of: &[f64], to: &[f64]| Some(middle(of)? / middle(to)?);
    let name = |what: &str| format!("{} {what}", load.name());
    let mut figures = vec![
        Figure::new(name("unprotected"), middle(&unprotected.rates), load.unit()),
        Figure::new(name("protected"), middle(&protected.rates), load.unit()),
        Figure::new(
            name("protected / unprotected"),
            ratio(&protected.rates, &unprotected.rates),
            "",
        )
        .aim(Target::AtLeast(RATIO_MIN)),
        Figure::new(
            name("the same per second of the primary's CPU time"),
            ratio(&protected.by_cpu, &unprotected.by_cpu),
            "",
        ),
        Figure::new(
            name("the guest's steps for each, protected / unprotected"),
            ratio(&protected.steps, &unprotected.steps),
            "",
        ),
        Figure::new(name("log"), middle(&protected.log_mbit), "Mbit/s"),
    ];
    if !unprotected.latencies.is_empty() {
        figures.extend([
            Figure::new(name("latency unprotected"), middle(&unprotected.latencies), "ms"),
            Figure::new(name("latency protected"), middle(&protected.latencies), "ms"),
        ]);
    }
    figures.extend([
        Figure::new(name("native"), middle(&native.rates), load.unit()),
        Figure::new(name("unprotected / native"), ratio(&unprotected.rates, &native.rates), ""),
    ]);
    figures
}

/// Bytes of log a second, and milliseconds of lag.
type Sample = (f64, f64);

/// Looks at log and lag while a load runs.
struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Sampler {
    fn start(live: &Control) -> anyhow::Result<Self> {
        let (live, stop) = (live.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let work = move || {
            let mut samples = Vec::new();
            let begun = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(SAMPLE);
                // The daemon tells what there was in the second before.
                if begun.elapsed() > Duration::from_secs(1)
                    && let Some(view) = live.view(VM)
                {
                    samples.push((view.log_bytes_per_s as f64, view.lag_ms as f64));
                }
            }
            samples
        };
        let thread = std::thread::Builder::new().name("sampler".into()).spawn(work)?;
        Ok(Self { stop, thread })
    }

    fn finish(self) -> anyhow::Result<Vec<Sample>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the sampler stopped"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians_and_missing_natives_are_not_figures() {
        let measured = |rates: &[f64]| Measured { rates: rates.to_vec(), ..Measured::default() };
        let row = Row {
            load: Load::Postgres,
            amount: None,
            native_amount: None,
            unprotected: measured(&[100.0, 101.0, 50.0]),
            protected: measured(&[96.0, 10.0, 200.0]),
            native: measured(&[]),
        };
        let figures = figures(&row);
        let of = |what: &str| figures.iter().find(|f| f.what == what).map(|f| (f.measured, f.met));
        assert_eq!(of("pgbench protected / unprotected"), Some((Some(0.96), Some(true))));
        assert_eq!(of("pgbench unprotected / native"), Some((None, None)));
        assert!(row.line().contains("unprotected 100, 101, 50; protected"), "{}", row.line());
    }
}

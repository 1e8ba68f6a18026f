//! Four loads in the guest without and with a secondary, and the same programs on this host: the paper's Table 1.
//!
//! # Invariants
//! - INV-LOADS-1: the ratio of protected to unprotected is of the same machine in the same turn, and the ratio to native of
//!   the same load on the same CPU, in the same turn.
//! - INV-LOADS-2: what is compared with a protected machine shares this computer with as much as that does; see
//!   [`super::guests`].

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::Options;
use super::guests::{Guest, Neighbour};
use super::load::{self, Load, Rate};
use super::native::Native;
use super::postgres;
use super::sampler::Sampler;
use crate::bench::engine::workload;
use crate::bench::figure::{Figure, Section, Target, largest, listed, median};
use crate::bench::speed::{cpu_seconds, pin};
use crate::bench::stage::{Material, Stage};
use crate::demo::net;

/// The CPU of the primary, and of what runs natively.
pub(super) const PRIMARY_CPU: &str = "0";
/// The CPU of the secondary, and of the machine that is there instead.
pub(super) const SECONDARY_CPU: &str = "1";
/// The CPU of all clients. Not the primary's: a guest stands still there while its client works, so that a server finds the
/// next request before it has gone to sleep, as if there were no network between the two.
pub(super) const CLIENT_CPU: &str = "1";
/// Memory of the machine.
const MEMORY: &str = "1G";
/// Slowest that a protected machine may be.
const RATIO_MIN: f64 = 0.95;
/// Time to settle after protection changed.
const CALM: Duration = Duration::from_secs(2);

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
    /// See [`super::sampler::Samples::slower_cpu`].
    slower_cpu: Vec<f64>,
}

/// How a load runs in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Unprotected, with nothing else on this computer.
    Alone,
    /// Unprotected, with a second machine that does the same on the other CPU.
    Beside,
    /// With a secondary there.
    Protected,
}

/// A load, and how it went in each manner.
#[derive(Debug, Clone)]
struct Row {
    load: Load,
    amount: Option<u32>,
    native_amount: Option<u32>,
    alone: Measured,
    beside: Measured,
    protected: Measured,
    native: Measured,
}

/// Measures it; see the module documentation.
pub(super) fn run(dir: &Path, material: &Material, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("tables");
    let mut material = material.clone();
    let initrd = dir.join("initrd");
    guest::write_with_files(&material.guest, &workload::files(dir)?, &initrd)?;
    material.guest.initrd = initrd;
    let stage = Stage::start_prepared(dir, &material, (MEMORY, 100), false, |lab| {
        lab.set_lag_ms(options.lag_ms);
        Ok(())
    })?;
    let row = |&load| {
        let [alone, beside, protected, native] = [(); 4].map(|()| Measured::default());
        Row { load, amount: None, native_amount: None, alone, beside, protected, native }
    };
    let mut rows: Vec<_> = options.loads.iter().map(row).collect();
    let result = measure(dir, &stage, options, &mut rows, &mut section);
    section.figures = rows.iter().flat_map(figures).collect();
    section.notes.extend(rows.iter().map(Row::line));
    section.notes.push(format!(
        "taskset: the primary, and what runs natively, on CPU {PRIMARY_CPU}; the secondary, or a second machine, on CPU \
         {SECONDARY_CPU}; clients on CPU {CLIENT_CPU}; {MEMORY} of memory, a mirrored disk; {} turns of {} s for each load",
        options.turns, options.seconds
    ));
    if let Some(lag_ms) = options.lag_ms {
        section.notes.push(format!("the secondary may be behind: lag_ms = {lag_ms}"));
    }
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
    let mut guest = Guest::measured(stage)?;
    let mut neighbour = Neighbour::start(stage)?;
    for row in rows.iter_mut() {
        let load = row.load;
        stage.progress.say(&format!("warming {} up", load.name()));
        row.amount = std::thread::scope(|scope| {
            let other = scope.spawn(|| neighbour.warm_up(load, options.seconds));
            let amount = load::warm_up(load, &mut guest, options.seconds)?;
            other.join().map_err(|_| anyhow!("the neighbour's load stopped"))??;
            anyhow::Ok(Some(amount))
        })?;
        let amount = load::warm_up(load, &mut native, options.seconds);
        match amount {
            Ok(amount) => row.native_amount = Some(amount),
            Err(error) => section.notes.push(format!("native {}: {error:#}", load.name())),
        }
    }
    neighbour.stand_back()?;
    if let Some(arbiter) = stage.lab.arbiter_id() {
        // It has a computer of its own elsewhere; here it shares the primary's, in all manners.
        net::run("taskset", &["-a", "-c", "-p", PRIMARY_CPU, &arbiter.to_string()])?;
    }
    for turn in 1..=options.turns {
        for row in rows.iter_mut() {
            let Some(amount) = row.native_amount else { continue };
            let rate = load::run(row.load, &mut native, amount)?;
            row.native.note(rate);
        }
        let mut manners = [Manner::Alone, Manner::Beside, Manner::Protected];
        if turn % 2 == 0 {
            // What changes with time is in all of them, and no secondary is made twice.
            manners.reverse();
        }
        for manner in manners {
            change_to(stage, &mut guest, rows, manner)?;
            let generation = stage.view()?.generation;
            for row in rows.iter_mut() {
                one_load(stage, &mut guest, &mut neighbour, row, manner, turn)?;
            }
            anyhow::ensure!(
                stage.view()?.generation == generation,
                "the machine failed over in turn {turn}"
            );
        }
    }
    Ok(())
}

/// Has the machine protected or not. A new secondary does each load first: what it translates once is not to be measured.
fn change_to(stage: &Stage, guest: &mut Guest, rows: &[Row], manner: Manner) -> anyhow::Result<()> {
    let is_protected = manner == Manner::Protected;
    if is_protected == stage.is_protected()? {
        return Ok(());
    }
    if is_protected {
        stage.protect()?;
        pin(stage)?;
        for row in rows {
            let amount = row.amount.context("it was warmed up")?;
            load::run(row.load, guest, amount)?;
        }
    } else {
        stage.unprotect()?;
    }
    std::thread::sleep(CALM);
    Ok(())
}

/// One load in one turn and manner.
fn one_load(
    stage: &Stage,
    guest: &mut Guest,
    neighbour: &mut Neighbour,
    row: &mut Row,
    manner: Manner,
    turn: u32,
) -> anyhow::Result<()> {
    let load = row.load;
    let amount = row.amount.context("it was warmed up")?;
    let (live, process) = stage.live()?;
    let secondary = match manner {
        Manner::Alone | Manner::Beside => None,
        Manner::Protected => {
            let (_, other) = stage.pair()?;
            Some((stage.lab.control(other)?.clone(), stage.lab.daemon_id(other)?))
        }
    };
    let sampler = Sampler::start((live.clone(), process), secondary)?;
    let look = || anyhow::Ok((cpu_seconds(process)?, stage.view()?.icount));
    let mut seen = None;
    let mut work = || {
        let before = look()?;
        let rate = load::run(load, guest, amount)?;
        seen = Some((before, look()?));
        Ok(rate)
    };
    let (measured, rate, name) = match manner {
        Manner::Alone => (&mut row.alone, work(), "unprotected"),
        Manner::Beside => (&mut row.beside, neighbour.beside(load, work), "beside another one"),
        Manner::Protected => (&mut row.protected, work(), "protected"),
    };
    let (rate, samples) = (rate?, sampler.finish()?);
    let ((cpu_before, steps_before), (cpu_after, steps_after)) = seen.context("it has run")?;
    measured.note(rate);
    measured.by_cpu.push(rate.done / (cpu_after - cpu_before).max(0.01));
    let steps = steps_after.saturating_sub(steps_before) as f64;
    measured.steps.push(steps / 1e6 / rate.done.max(1.0));
    measured.log_mbit.extend(samples.log_mbit());
    measured.lags_ms.extend(samples.lag_ms());
    measured.slower_cpu.extend(samples.slower_cpu());
    let per_second = rate.done / rate.seconds;
    stage.progress.say(&format!(
        "turn {turn}, {name}: {} {per_second:.2} {}",
        load.name(),
        load.unit()
    ));
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
        let Self { load, alone, beside, protected, native, .. } = self;
        let rounded = |of: &Measured| {
            let digits = if of.rates.iter().any(|value| *value < 100.0) { 100.0 } else { 1.0 };
            listed(&of.rates.iter().map(|v| (v * digits).round() / digits).collect::<Vec<_>>())
        };
        format!(
            "{}, {}: unprotected {}; beside another machine {}; protected {}, largest lag {} ms; native {}",
            load.name(),
            load.unit(),
            rounded(alone),
            rounded(beside),
            rounded(protected),
            largest(protected.lags_ms.iter().copied()).unwrap_or(0.0),
            rounded(native)
        )
    }
}

fn figures(row: &Row) -> Vec<Figure> {
    let Row { load, alone, beside, protected, native, .. } = row;
    let middle = |values: &[f64]| median(values.iter().copied());
    // Turn by turn: what changes with time on this computer is in both.
    let ratio = |of: &[f64], to: &[f64]| median(of.iter().zip(to).map(|(of, to)| of / to));
    let name = |what: &str| format!("{} {what}", load.name());
    let mut figures = vec![
        Figure::new(name("unprotected"), middle(&alone.rates), load.unit()),
        Figure::new(name("unprotected, another beside it"), middle(&beside.rates), load.unit()),
        Figure::new(name("protected"), middle(&protected.rates), load.unit()),
        Figure::new(
            name("protected / unprotected, another beside it"),
            ratio(&protected.rates, &beside.rates),
            "",
        )
        .aim(Target::AtLeast(RATIO_MIN)),
        Figure::new(
            name("protected / unprotected, nothing beside it"),
            ratio(&protected.rates, &alone.rates),
            "",
        ),
        Figure::new(
            name("per second of the primary's CPU time, another beside it"),
            ratio(&protected.by_cpu, &beside.by_cpu),
            "",
        ),
        Figure::new(
            name("the guest's steps for each, protected / unprotected"),
            ratio(&protected.steps, &beside.steps),
            "",
        ),
        Figure::new(
            name("steps in a second of CPU time, the slower replica's / the primary's"),
            middle(&protected.slower_cpu),
            "",
        ),
        Figure::new(name("log"), middle(&protected.log_mbit), "Mbit/s"),
    ];
    if !alone.latencies.is_empty() {
        figures.extend([
            Figure::new(name("latency unprotected"), middle(&alone.latencies), "ms"),
            Figure::new(name("latency, another beside it"), middle(&beside.latencies), "ms"),
            Figure::new(name("latency protected"), middle(&protected.latencies), "ms"),
        ]);
    }
    figures.extend([
        Figure::new(name("native"), middle(&native.rates), load.unit()),
        Figure::new(name("unprotected / native"), ratio(&alone.rates, &native.rates), ""),
    ]);
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_turns_and_missing_natives_are_not_figures() {
        let measured = |rates: &[f64]| Measured { rates: rates.to_vec(), ..Measured::default() };
        let row = Row {
            load: Load::Postgres,
            amount: None,
            native_amount: None,
            alone: measured(&[110.0, 120.0, 130.0]),
            beside: measured(&[100.0, 101.0, 50.0]),
            protected: measured(&[96.0, 150.0, 40.0]),
            native: measured(&[]),
        };
        const BESIDE: &str = "pgbench protected / unprotected, another beside it";
        let figures = figures(&row);
        let of = |what: &str| figures.iter().find(|f| f.what == what).map(|f| (f.measured, f.met));
        assert_eq!(of(BESIDE), Some((Some(0.96), Some(true))));
        assert_eq!(of("pgbench unprotected / native"), Some((None, None)));
        assert!(
            row.line().contains("beside another machine 100, 101, 50; protected"),
            "{}",
            row.line()
        );
    }
}

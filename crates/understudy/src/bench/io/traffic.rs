//! TCP through a tap, unprotected and protected, over log links of two shapes: the paper's Table 2.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::Options;
use super::relay::{ADDRESS, FIRST_PORT, Relay, SHAPES, Shape};
use crate::bench::figure::{Figure, Section, Target, listed, median};
use crate::bench::speed::cpu_seconds;
use crate::bench::stage::{Material, Stage};
use crate::demo::lab::{CLIENT, HOSTS, LogLink, VM};
use crate::demo::net;

/// What the client's network card carries, as in the paper: more would say what the log link cannot carry.
const CLIENT_RATE: &str = "1gbit";
/// Memory of the machine.
const MEMORY: &str = "512M";
const GUEST: &str = "10.77.0.10";
/// Longest boot to iperf3.
const BOOT_MAX: Duration = Duration::from_secs(300);
/// Time beyond its own that iperf3 gets.
const SLACK: Duration = Duration::from_secs(30);
/// Time to settle after protection changed.
const CALM: Duration = Duration::from_secs(2);
/// How often iperf3 is started, at most, for one figure.
const TRIES: u32 = 3;
const DETECTION_MS: u32 = 1000;
/// Protected over unprotected, by direction and link, as the paper has it.
const TARGETS: [[f64; 2]; 2] = [[0.64, 0.91], [0.91, 0.99]];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Receive,
    Transmit,
}

impl Direction {
    const ALL: [Self; 2] = [Self::Receive, Self::Transmit];

    fn name(self) -> &'static str {
        match self {
            Self::Receive => "receive",
            Self::Transmit => "transmit",
        }
    }
}

/// One run of iperf3.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    mbit: f64,
    /// For a second of the primary's CPU time.
    mbit_cpu: f64,
    log_mbit: f64,
    wire_mbit: f64,
}

/// All runs of one direction on one link.
#[derive(Debug, Default)]
struct Runs {
    off: Vec<Sample>,
    on: Vec<Sample>,
}

/// Measures it; see the module documentation.
pub(super) fn run(dir: &Path, material: &Material, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("net");
    section.notes.push(format!("the client's network card has {CLIENT_RATE}/s, as in the paper"));
    section.notes.push(
        "primary, secondary, relay and client share this computer's CPUs: where there are two, they are the limit, not the \
         link; 'per CPU second' is the same for a second of the primary's CPU time"
            .to_owned(),
    );
    if let Err(error) = measure_all(dir, material, options, &mut section) {
        section.failure = Some(host::one_line::flatten(&format!("{error:#}")));
    }
    Ok(section)
}

/// On the first host, then on the second, which compresses its log.
fn measure_all(
    dir: &Path,
    material: &Material,
    options: &Options,
    section: &mut Section,
) -> anyhow::Result<()> {
    let mut relay = None;
    let [first, second, _] = HOSTS;
    let setting = (MEMORY, DETECTION_MS);
    let stage = Stage::start_prepared(dir, material, setting, false, |lab| {
        relay = Some(Relay::start()?);
        let via = Some((ADDRESS, FIRST_PORT));
        lab.set_log_link(LogLink { via, compressing: Some(second) });
        Ok(())
    })?;
    let relay = relay.context("the relay was made")?;
    net::limit_rate(CLIENT, CLIENT_RATE)?;
    let on_both = |section: &mut Section| -> anyhow::Result<()> {
        wait_for_iperf(&stage)?;
        measure(&stage, &relay, options, false, section)?;
        stage.protect()?;
        stage.lab.control(first)?.fail_over(VM)?;
        let pause = Duration::from_millis(200);
        stage.progress.wait_for("the other host", SLACK, pause, |_| {
            Ok((stage.view()?.live_host.as_deref() == Some(second)).then_some(()))
        })?;
        // The machine's definition wants no secondary: the new host makes none by itself.
        measure(&stage, &relay, options, true, section)
    };
    let measured = on_both(section);
    if measured.is_err() {
        eprint!("{}", stage.lab.log_tails());
    }
    measured
}

fn measure(
    stage: &Stage,
    relay: &Relay,
    options: &Options,
    compresses: bool,
    section: &mut Section,
) -> anyhow::Result<()> {
    let log = if compresses { "lz4" } else { "no compression" };
    for (at, shape) in SHAPES.into_iter().enumerate() {
        let round_trip = relay.shape(shape)?.unwrap_or(0.0);
        let note = format!("{}, {log}: round trip of the link {round_trip:.0} us", shape.name);
        section.notes.push(note);
        let mut runs = [Runs::default(), Runs::default()];
        for turn in 1..=options.turns {
            turn_of(stage, options.seconds, &mut runs).with_context(|| format!("turn {turn}"))?;
            let last = |runs: &Runs| Some((runs.off.last()?.mbit, runs.on.last()?.mbit));
            for (direction, runs) in Direction::ALL.iter().zip(&runs) {
                let (off, on) = last(runs).unwrap_or_default();
                let name = direction.name();
                let line = format!(
                    "{}, {log}, turn {turn}: {name} {off:.0} Mbit/s, protected {on:.0}",
                    shape.name
                );
                stage.progress.say(&line);
            }
        }
        for ((direction, runs), targets) in Direction::ALL.iter().zip(&runs).zip(TARGETS) {
            report(*direction, shape, log, runs, targets[at], section);
        }
    }
    Ok(())
}

fn turn_of(stage: &Stage, seconds: u32, runs: &mut [Runs; 2]) -> anyhow::Result<()> {
    for is_on in [false, true] {
        if is_on {
            stage.protect()?;
        }
        std::thread::sleep(CALM);
        for (direction, runs) in Direction::ALL.iter().zip(runs.iter_mut()) {
            let generation = stage.view()?.generation;
            let sample = sample(stage, *direction, seconds)?;
            ensure!(stage.view()?.generation == generation, "the machine failed over meanwhile");
            if is_on { &mut runs.on } else { &mut runs.off }.push(sample);
        }
    }
    stage.unprotect()
}

fn wait_for_iperf(stage: &Stage) -> anyhow::Result<()> {
    let pause = Duration::from_millis(500);
    stage.progress.wait_for("iperf3 in the machine", BOOT_MAX, pause, |_| {
        let answers = net::inside(CLIENT, || {
            let address = std::net::SocketAddr::from(([10, 77, 0, 10], 5201));
            std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })?;
        Ok(answers.then_some(()))
    })
}

/// The server in the guest serves one client, and needs a moment after each; the bench looks into its port, too.
fn sample(stage: &Stage, direction: Direction, seconds: u32) -> anyhow::Result<Sample> {
    let mut last = None;
    for _ in 0..TRIES {
        match run_iperf(stage, direction, seconds) {
            Ok(sample) => return Ok(sample),
            Err(error) => last = Some(error),
        }
        std::thread::sleep(CALM);
    }
    Err(last.context("it was tried")?)
}

fn run_iperf(stage: &Stage, direction: Direction, seconds: u32) -> anyhow::Result<Sample> {
    let (_, process) = stage.live()?;
    let before = cpu_seconds(process)?;
    let mut command = net::command_in(CLIENT, "iperf3");
    command.args(["-c", GUEST, "-J", "-t", &seconds.to_string()]);
    if direction == Direction::Transmit {
        command.arg("-R");
    }
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.context("cannot run iperf3 (Debian package iperf3)")?;
    let watched = watch(stage, &mut child, Duration::from_secs(seconds.into()) + SLACK);
    if watched.is_err() {
        drop(child.kill());
    }
    let (log_mbit, wire_mbit) = watched?;
    let mut text = String::new();
    child.stdout.take().context("iperf3 has an output")?.read_to_string(&mut text)?;
    child.wait()?;
    let used = (cpu_seconds(process)? - before).max(0.01);
    let told: serde_json::Value = serde_json::from_str(&text).context("what iperf3 says")?;
    let received = &told["end"]["sum_received"];
    let (Some(bits), Some(bytes)) =
        (received["bits_per_second"].as_f64(), received["bytes"].as_f64())
    else {
        bail!("iperf3 measured nothing: {}", told["error"]);
    };
    Ok(Sample { mbit: bits / 1e6, mbit_cpu: bytes * 8.0 / 1e6 / used, log_mbit, wire_mbit })
}

/// What the log was, of seconds in which traffic was under way.
fn watch(stage: &Stage, child: &mut Child, limit: Duration) -> anyhow::Result<(f64, f64)> {
    let begun = Instant::now();
    let (mut log, mut wire) = (Vec::new(), Vec::new());
    while child.try_wait()?.is_none() {
        ensure!(begun.elapsed() < limit, "iperf3 does not end");
        std::thread::sleep(Duration::from_millis(300));
        // The rates are those of the second before.
        if begun.elapsed() > Duration::from_secs(2) {
            let view = stage.view()?;
            log.push(view.log_bytes_per_s as f64 * 8.0 / 1e6);
            wire.push(view.wire_bytes_per_s.unwrap_or(0) as f64 * 8.0 / 1e6);
        }
    }
    Ok((median(log).unwrap_or(0.0), median(wire).unwrap_or(0.0)))
}

fn report(
    direction: Direction,
    shape: Shape,
    log: &str,
    runs: &Runs,
    target: f64,
    section: &mut Section,
) {
    let name = format!("{}, {}, {log}", direction.name(), shape.name);
    let of = |runs: &[Sample], value: fn(&Sample) -> f64| median(runs.iter().map(value));
    let ratio = |value: fn(&Sample) -> f64| Some(of(&runs.on, value)? / of(&runs.off, value)?);
    let figure = |what: &str, value: Option<f64>, unit: &str| {
        Figure::new(format!("{name}: {what}"), value.map(|v| (v * 1000.0).round() / 1000.0), unit)
    };
    section.figures.extend([
        figure("unprotected", of(&runs.off, |s| s.mbit.round()), "Mbit/s"),
        figure("protected", of(&runs.on, |s| s.mbit.round()), "Mbit/s"),
        figure("protected / unprotected", ratio(|s| s.mbit), "").aim(Target::AtLeast(target)),
        figure("the same per CPU second", ratio(|s| s.mbit_cpu), ""),
        figure("log", of(&runs.on, |s| s.log_mbit.round()), "Mbit/s"),
        figure("log on the wire", of(&runs.on, |s| s.wire_mbit.round()), "Mbit/s"),
    ]);
    let all = |runs: &[Sample]| listed(&runs.iter().map(|s| s.mbit.round()).collect::<Vec<_>>());
    let note = format!("{name}: unprotected {}; protected {}", all(&runs.off), all(&runs.on));
    section.notes.push(note);
}

//! How fast the machine computes, beside QEMU: the same workloads in the same guests, timed from outside.
//!
//! # Place
//! Called by the bench, inside its namespaces. [`workload`] has what is run, [`side`] the machines that run it.
//!
//! # Invariants
//! - INV-SIDES-1: a workload runs on one machine after the other within seconds, and the order changes each turn; the
//!   others are idle meanwhile.
//! - INV-SIDES-2: each turn starts every machine anew, so that no turn profits from code translated in another.
//! - INV-SIDES-3: a workload prints the same on every machine, or the comparison failed.
//!
//! # Failure
//! A workload that fails on a machine has no time there, and the section says why; that machine is started again for the
//! next one.

mod inside;
mod net;
pub(in crate::bench) mod running;
pub(in crate::bench) mod side;
pub(in crate::bench) mod workload;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use guest::GuestFiles;
use serde::{Deserialize, Serialize};

use super::comparison::{Comparison, Ratio, Row, geometric_mean};
use super::figure::{Figure, Section, Target, largest, median};
use crate::demo::progress::Progress;
use net::Net;
pub(crate) use running::Clock;
use running::{Running, Span};
use side::{QEMU, Setting, Side};
use workload::{Boot, Kind, Needs, Workload};

/// Longest run of one workload, and of one boot.
const WORKLOAD_MAX: Duration = Duration::from_secs(300);
/// Longest time that a machine takes to power off.
const END_MAX: Duration = Duration::from_secs(60);
/// What is read from and written to.
const DISK_BYTES: u64 = 128 << 20;
/// Why some cells are empty whenever QEMU records.
const NOT_RECORDED: &str = "QEMU's recording answers each disk request a tenth of a second later, so that the stream \
    takes minutes: disk and network are not measured there, as that would flatter the mean";
/// Ctrl-a x, which ends `understudy run`.
const STOP: &[u8] = b"\x01x";

/// The guests that are booted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Guests {
    /// Boots to a shell.
    pub(crate) minimal: GuestFiles,
    /// Boots to a login prompt.
    pub(crate) debian: GuestFiles,
    /// Runs the workloads.
    pub(crate) bench: GuestFiles,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Options {
    /// Understudy's engine, if not its default.
    pub(crate) engine: Option<String>,
    /// Whether recording and replay are measured too.
    pub(crate) has_record: bool,
    /// Names of workloads; none: all.
    pub(crate) only: Vec<String>,
    /// How often.
    pub(crate) turns: u32,
    /// What time is measured by.
    pub(crate) clock: Clock,
}

/// Refuses names of workloads that are not there.
pub(crate) fn check(only: &[String]) -> Result<(), String> {
    workload::chosen(only).map(drop)
}

/// A machine that waits for the name of a workload.
struct Session {
    running: Running,
    recording: PathBuf,
    done: Vec<Workload>,
}

/// What is run where.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Plan<'a> {
    /// Understudy's engine, if not its default.
    pub(in crate::bench) engine: Option<&'a str>,
    /// The machines; one that records is replayed as well.
    pub(in crate::bench) sides: Vec<Side>,
    /// The rows.
    pub(in crate::bench) workloads: Vec<Workload>,
    /// How often.
    pub(in crate::bench) turns: u32,
}

/// A recording that was made on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) struct Recorded {
    /// Bytes of its log, without snapshots.
    pub(in crate::bench) log_bytes: u64,
    /// Steps of the machine.
    pub(in crate::bench) steps: u64,
}

/// What came of it.
#[derive(Debug, Default)]
pub(in crate::bench) struct Measured {
    /// How long each row took on each machine, turn by turn.
    pub(in crate::bench) times: BTreeMap<(&'static str, Side), Vec<Span>>,
    /// Bytes that the engine had for code and tables after each boot of Debian.
    pub(in crate::bench) engine_bytes: Vec<f64>,
    /// The recordings.
    pub(in crate::bench) recordings: Vec<Recorded>,
    /// What failed, one line each.
    pub(in crate::bench) failures: Vec<String>,
    /// What else is to be known.
    pub(in crate::bench) notes: Vec<String>,
}

impl Measured {
    /// The times on one clock, for a table whose columns are `sides`.
    pub(in crate::bench) fn rows(
        &self,
        workloads: &[Workload],
        sides: &[Side],
        clock: Clock,
    ) -> Vec<Row> {
        let seconds = |name: &'static str, side: Side| {
            let spans = self.times.get(&(name, side)).map_or(&[][..], Vec::as_slice);
            spans.iter().map(|span| span.seconds(clock)).collect()
        };
        let row = |workload: &Workload| Row {
            name: workload.name.to_owned(),
            what: workload.what.to_owned(),
            seconds: sides.iter().map(|&side| seconds(workload.name, side)).collect(),
        };
        workloads.iter().map(row).collect()
    }
}

struct Bench<'a> {
    dir: &'a Path,
    guests: &'a Guests,
    plan: &'a Plan<'a>,
    initrd: PathBuf,
    has_disk: bool,
    net: Option<Net>,
    progress: Progress,
    starts: u32,
    printed: BTreeMap<&'static str, String>,
    measured: Measured,
}

/// The figures of a comparison with QEMU.
pub(crate) fn run(dir: &Path, guests: &Guests, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("engine");
    let workloads = workload::chosen(&options.only).map_err(anyhow::Error::msg)?;
    let version = Command::new(QEMU).arg("--version").output();
    let version =
        version.with_context(|| format!("cannot run {QEMU} (Debian package qemu-system-riscv)"))?;
    let version = String::from_utf8_lossy(&version.stdout);
    section.notes.push(version.lines().next().unwrap_or_default().to_owned());
    let mut sides = vec![Side::Ours, Side::Qemu];
    if options.has_record {
        sides.extend([Side::Recording, Side::QemuRecording]);
    }
    let plan = Plan { engine: options.engine.as_deref(), sides, workloads, turns: options.turns };
    let measured = measure(dir, guests, &plan)?;
    Ok(conclude(guests, options, plan, measured, section))
}

/// Every workload, so many times on every machine, in turn.
pub(in crate::bench) fn measure(
    dir: &Path,
    guests: &Guests,
    plan: &Plan<'_>,
) -> anyhow::Result<Measured> {
    let initrd = dir.join("initrd");
    guest::write_with_files(&guests.bench, &workload::files(dir)?, &initrd)?;
    let mut measured = Measured::default();
    let needs = |what: Needs| plan.workloads.iter().any(|workload| workload.needs == what);
    let net = if needs(Needs::Net) {
        Net::start(&plan.sides)
            .map_err(|error| measured.notes.push(format!("no network: {error:#}")))
            .ok()
    } else {
        None
    };
    let mut bench = Bench {
        dir,
        guests,
        plan,
        initrd,
        has_disk: needs(Needs::Disk),
        net,
        progress: Progress::new(),
        starts: 0,
        printed: BTreeMap::new(),
        measured,
    };
    for turn in 1..=plan.turns {
        bench.turn(turn, &plan.workloads);
    }
    Ok(bench.measured)
}

impl Bench<'_> {
    fn turn(&mut self, turn: u32, chosen: &[Workload]) {
        let mut order = self.plan.sides.clone();
        if turn.is_multiple_of(2) {
            order.reverse();
        }
        let mut sessions = BTreeMap::new();
        for workload in chosen {
            for &side in &order {
                if !self.can_run(side, workload) {
                    continue;
                }
                let span = match workload.kind {
                    Kind::Script(_) => self.script(&mut sessions, side, workload),
                    Kind::Boot(boot) => self.boot(side, boot, workload),
                };
                self.note(turn, side, workload, span);
            }
        }
        for (side, session) in sessions {
            if let Err(error) = self.finish(turn, side, session) {
                self.fail(turn, side, "the end", &error);
            }
        }
    }

    fn can_run(&self, side: Side, workload: &Workload) -> bool {
        match workload.needs {
            Needs::Nothing => true,
            Needs::Disk => side.has_devices(),
            Needs::Net => side.has_devices() && self.net.is_some(),
        }
    }

    fn note(&mut self, turn: u32, side: Side, workload: &Workload, span: anyhow::Result<Span>) {
        match span {
            Ok(span) => {
                let (name, wall, cpu) = (workload.name, span.wall_seconds, span.cpu_seconds);
                let side_name = side.name();
                self.progress.say(&format!(
                    "turn {turn}: {name} on {side_name}: {wall:.2} s, {cpu:.2} s of CPU time"
                ));
                self.measured.times.entry((name, side)).or_default().push(span);
            }
            Err(error) => self.fail(turn, side, workload.name, &error),
        }
    }

    fn fail(&mut self, turn: u32, side: Side, what: &str, error: &anyhow::Error) {
        let error = host::one_line::flatten(&format!("{error:#}"));
        let line = format!("turn {turn}: {what} on {} failed: {error}", side.name());
        self.progress.say(&line);
        self.measured.failures.push(line);
    }

    /// Starts a machine with a guest; for the workloads with a disk and, if there is one, the network.
    fn start(
        &mut self,
        side: Side,
        guest: &GuestFiles,
        initrd: &Path,
        is_equipped: bool,
    ) -> anyhow::Result<(Running, PathBuf)> {
        self.starts += 1;
        let recording = self.dir.join(format!("recording-{}", self.starts));
        let has_disk = is_equipped && self.has_disk;
        let disk = has_disk.then(|| self.dir.join(format!("disk-{}", side.index())));
        if let Some(disk) = &disk {
            // Anew each time, and without holes.
            let mut file = File::create(disk).context("make a disk")?;
            let zeros = std::io::Read::take(std::io::repeat(0x5A), DISK_BYTES);
            std::io::copy(&mut { zeros }, &mut file).context("fill a disk")?;
        }
        let setting = Setting {
            kernel: &guest.kernel,
            initrd,
            append: &guest.append,
            disk,
            has_net: is_equipped && self.net.is_some(),
            recording: &recording,
            engine: self.plan.engine,
        };
        Ok((Running::start(setting.command(side)?)?, recording))
    }

    fn script(
        &mut self,
        sessions: &mut BTreeMap<Side, Session>,
        side: Side,
        workload: &Workload,
    ) -> anyhow::Result<Span> {
        // It comes back when nothing went wrong.
        let mut session = match sessions.remove(&side) {
            Some(session) => session,
            None => {
                let (guests, initrd) = (self.guests, self.initrd.clone());
                let equipped = side.has_devices();
                let (mut running, recording) =
                    self.start(side, &guests.bench, &initrd, equipped)?;
                running.wait_for("understudy: bench ready", WORKLOAD_MAX)?;
                Session { running, recording, done: Vec::new() }
            }
        };
        session.running.type_line(workload.name)?;
        let (span, printed) = timed(&mut session.running, workload)?;
        session.done.push(*workload);
        sessions.insert(side, session);
        self.compare(workload, printed)?;
        Ok(span)
    }

    fn compare(&mut self, workload: &Workload, printed: String) -> anyhow::Result<()> {
        let first = self.printed.entry(workload.name).or_insert_with(|| printed.clone());
        ensure!(*first == printed, "it printed {printed:?}, elsewhere {first:?}");
        Ok(())
    }

    /// Powers a machine off; one that recorded is replayed.
    fn finish(&mut self, turn: u32, side: Side, mut session: Session) -> anyhow::Result<()> {
        if side != Side::Recording {
            return Ok(());
        }
        session.running.type_line("end")?;
        session.running.wait_for_end(END_MAX)?;
        let mut running = self.replay(&session.recording)?;
        for workload in &session.done {
            let (span, printed) = timed(&mut running, workload)?;
            self.compare(workload, printed)?;
            self.note(turn, Side::Replay, workload, Ok(span));
        }
        self.finish_replay(running, &session.recording)
    }

    /// Lets a replay come to its end, and removes the recording.
    fn finish_replay(&mut self, mut running: Running, recording: &Path) -> anyhow::Result<()> {
        running.wait_for_end(END_MAX)?;
        let words = running.words();
        let steps = words.lines().find_map(steps_replayed);
        let steps = steps.with_context(|| format!("no steps in {words:?}"))?;
        let log_bytes = log_bytes(recording).context("look at a recording")?;
        self.measured.recordings.push(Recorded { log_bytes, steps });
        fs::remove_dir_all(recording).context("remove a recording")
    }

    fn replay(&self, recording: &Path) -> anyhow::Result<Running> {
        let none = Path::new("");
        let setting = Setting {
            kernel: none,
            initrd: none,
            append: "",
            disk: None,
            has_net: false,
            recording,
            engine: self.plan.engine,
        };
        Running::start(setting.command(Side::Replay)?)
    }

    /// From the start of the process until the guest is up.
    fn boot(&mut self, side: Side, boot: Boot, workload: &Workload) -> anyhow::Result<Span> {
        let guests = self.guests;
        let guest = match boot {
            Boot::Minimal => &guests.minimal,
            Boot::Debian => &guests.debian,
        };
        let (mut running, recording) = self.start(side, guest, &guest.initrd, false)?;
        let (at, _) = running.wait_for(boot.ready(), WORKLOAD_MAX)?;
        let span = at.since(running.begun);
        if side == Side::Ours && boot == Boot::Debian {
            running.type_bytes(STOP)?;
            running.wait_for_end(END_MAX)?;
            let words = running.words();
            let bytes = words.lines().find_map(engine_bytes);
            self.measured
                .engine_bytes
                .push(bytes.with_context(|| format!("no statistics in {words:?}"))?);
        }
        if side == Side::Recording {
            running.type_bytes(STOP)?;
            running.wait_for_end(END_MAX)?;
            let mut running = self.replay(&recording)?;
            let (at, _) = running.wait_for(boot.ready(), WORKLOAD_MAX)?;
            let span = at.since(running.begun);
            self.finish_replay(running, &recording)?;
            self.measured.times.entry((workload.name, Side::Replay)).or_default().push(span);
        }
        Ok(span)
    }
}

/// What is measured without QEMU.
fn inside(guest: &GuestFiles, turns: u32, section: &mut Section, failures: &mut Vec<String>) {
    let progress = Progress::new();
    progress.say("cost of counting steps");
    match inside::counting(guest, turns) {
        Ok(ratios) => {
            let cost = median(ratios).map(|ratio| (ratio - 1.0) * 100.0);
            let figure = Figure::new("cost of exact counting, by counting twice", cost, "%");
            section.figures.push(figure.aim(Target::AtMost(3.0)));
        }
        Err(error) => failures.push(format!("cost of counting: {error:#}")),
    }
    progress.say("stops by another thread");
    match inside::stops(guest) {
        Ok(delays) => {
            for (name, rank, aim) in
                [("p50", 0.5, None), ("p99", 0.99, Some(100.0)), ("max", 1.0, None)]
            {
                let at = ((delays.len() - 1) as f64 * rank) as usize;
                let name = format!("asynchronous stop, {name}");
                let figure = Figure::new(name, delays[at], "us");
                section.figures.push(match aim {
                    Some(limit) => figure.aim(Target::AtMost(limit)),
                    None => figure,
                });
            }
        }
        Err(error) => failures.push(format!("asynchronous stop: {error:#}")),
    }
}

fn conclude(
    guests: &Guests,
    options: &Options,
    plan: Plan<'_>,
    mut measured: Measured,
    mut section: Section,
) -> Section {
    let mut sides = plan.sides;
    if options.has_record {
        sides.push(Side::Replay);
    }
    sides.sort();
    let comparison = Comparison {
        rows: measured.rows(&plan.workloads, &sides, options.clock),
        machines: sides.iter().map(|side| side.name().to_owned()).collect(),
        ratios: ratios(options.has_record),
    };
    section.notes.append(&mut measured.notes);
    section.figures = figures(&comparison);
    if let Some(bytes) = largest(measured.engine_bytes.iter().copied()) {
        let name = "engine's code and tables after a Debian boot";
        let figure = Figure::new(name, bytes / f64::from(1 << 20), "MiB");
        section.figures.push(figure.aim(Target::AtMost(64.0)));
    }
    let mut failures = measured.failures;
    if options.only.is_empty() {
        inside(&guests.minimal, options.turns, &mut section, &mut failures);
    }
    if options.has_record {
        section.notes.push(NOT_RECORDED.to_owned());
    }
    if options.clock == Clock::Cpu {
        section.notes.push("seconds are CPU time of the machine's process".to_owned());
    }
    section.notes.push(format!(
        "medians of {} turns; one vCPU, 1 GiB; nothing pinned; each turn starts every machine anew",
        options.turns
    ));
    section.notes.extend((0..sides.len()).filter_map(|at| comparison.spread(at)));
    if !failures.is_empty() {
        section.failure = Some(format!("{} measurements failed", failures.len()));
    }
    section.notes.append(&mut failures);
    section.comparison = Some(comparison);
    section
}

/// Steps in the line that `understudy replay` ends with.
fn steps_replayed(line: &str) -> Option<u64> {
    line.strip_prefix("replayed ")?.split_once(" steps")?.0.parse().ok()
}

/// Bytes of a recording's log, in however many segments.
pub(in crate::bench) fn log_bytes(recording: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(recording)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("log") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Bytes of code and tables in the line that `understudy run --stats` ends with.
fn engine_bytes(line: &str) -> Option<f64> {
    let (_, rest) = line.strip_prefix("engine ")?.split_once(": ")?;
    let (code, rest) = rest.split_once(" bytes of code, ")?;
    let (tables, _) = rest.split_once(" bytes of tables")?;
    Some(code.parse::<f64>().ok()? + tables.parse::<f64>().ok()?)
}

/// How long a workload takes that starts now, and what it prints.
fn timed(running: &mut Running, workload: &Workload) -> anyhow::Result<(Span, String)> {
    let (begun, _) =
        running.wait_for(&format!("understudy: run {}\r\n", workload.name), WORKLOAD_MAX)?;
    let (ended, printed) = running.wait_for("understudy: exit ", WORKLOAD_MAX)?;
    let (_, rest) = running.wait_for("\n", WORKLOAD_MAX)?;
    let code = rest.split(' ').next().unwrap_or_default();
    ensure!(code == "0", "it ended with status {code}, and printed {printed:?}");
    // The kernel may have a word to say at any time.
    let printed = printed.lines().filter(|line| !line.starts_with('[')).collect::<Vec<_>>();
    Ok((ended.since(begun), printed.join("\n")))
}

/// What is compared with what.
fn ratios(has_record: bool) -> Vec<Ratio> {
    let ratio = |name: &str, of: Side, to: Side| Ratio {
        name: name.into(),
        of: of.index(),
        to: to.index(),
    };
    let mut ratios = vec![ratio("speed / QEMU's", Side::Ours, Side::Qemu)];
    if has_record {
        ratios.extend([
            ratio("recording / QEMU's recording", Side::Recording, Side::QemuRecording),
            ratio("replay / recording", Side::Replay, Side::Recording),
            ratio("recording / not", Side::Recording, Side::Ours),
        ]);
    }
    ratios
}

/// What the issue aims at, ratio by ratio: the geometric mean and the worst workload.
fn figures(comparison: &Comparison) -> Vec<Figure> {
    let aims = [(Some(2.0), Some(1.0)), (Some(2.5), None), (Some(1.0), None), (None, None)];
    let mut figures = Vec::new();
    for (ratio, (mean_aim, worst_aim)) in comparison.ratios.iter().zip(aims) {
        let values = comparison.values(ratio);
        let worst = values.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let worst_name = worst.map_or("none", |(name, _)| name);
        let aim = |figure: Figure, limit: Option<f64>| match limit {
            Some(limit) => figure.aim(Target::AtLeast(limit)),
            None => figure,
        };
        let mean = geometric_mean(values.iter().map(|(_, value)| *value));
        let name = &ratio.name;
        figures.extend([
            aim(
                Figure::new(format!("{name}, geometric mean of {}", values.len()), mean, ""),
                mean_aim,
            ),
            aim(
                Figure::new(
                    format!("{name}, worst ({worst_name})"),
                    worst.map(|(_, value)| *value),
                    "",
                ),
                worst_aim,
            ),
        ]);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worst_workload_is_named_and_judged_by_itself() {
        let row = |name: &str, ours: f64| Row {
            name: name.into(),
            what: String::new(),
            seconds: vec![vec![ours], vec![2.0]],
        };
        let comparison = Comparison {
            machines: vec!["understudy".into(), "QEMU TCG".into()],
            ratios: ratios(false),
            rows: vec![row("fast", 0.2), row("slow", 4.0)],
        };
        let found = figures(&comparison);
        let figures: Vec<_> = found.iter().map(|f| (f.what.as_str(), f.measured, f.met)).collect();
        assert_eq!(figures[1], ("speed / QEMU's, worst (slow)", Some(0.5), Some(false)));
        assert!(
            (figures[0].1.unwrap() - 5.0_f64.sqrt()).abs() < 1e-9 && figures[0].2 == Some(true)
        );
    }

    #[test]
    fn bytes_of_code_and_tables_are_added() {
        let line = "engine jit: 5 bytes of code, 7 bytes of tables, 2 blocks, 0 evictions";
        assert_eq!(engine_bytes(line), Some(12.0));
        assert_eq!(engine_bytes("engine jit: none"), None);
    }

    #[test]
    fn steps_of_a_replay_are_found() {
        let line = "replayed 17 steps, 3 records; 1 digests are as recorded";
        assert_eq!(steps_replayed(line), Some(17));
        assert_eq!(steps_replayed("replayed to the end"), None);
    }

    #[test]
    fn ratios_of_a_run_with_recording_have_an_aim_each() {
        let rows = vec![];
        let comparison = Comparison { machines: vec![], ratios: ratios(true), rows };
        assert_eq!(figures(&comparison).len(), 2 * ratios(true).len());
    }
}

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
mod running;
mod side;
mod workload;

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
use running::Running;
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

struct Bench<'a> {
    dir: &'a Path,
    guests: &'a Guests,
    options: &'a Options,
    sides: Vec<Side>,
    initrd: PathBuf,
    net: Option<Net>,
    progress: Progress,
    starts: u32,
    times: BTreeMap<(&'static str, Side), Vec<f64>>,
    printed: BTreeMap<&'static str, String>,
    /// Bytes that the engine had for code and tables after each boot of Debian.
    engine_bytes: Vec<f64>,
    failures: Vec<String>,
}

/// Every workload, `turns` times on every machine, in turn.
pub(crate) fn run(dir: &Path, guests: &Guests, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("engine");
    let chosen = workload::chosen(&options.only).map_err(anyhow::Error::msg)?;
    let version = Command::new(QEMU).arg("--version").output();
    let version =
        version.with_context(|| format!("cannot run {QEMU} (Debian package qemu-system-riscv)"))?;
    let version = String::from_utf8_lossy(&version.stdout);
    section.notes.push(version.lines().next().unwrap_or_default().to_owned());
    let mut sides = vec![Side::Ours, Side::Qemu];
    if options.has_record {
        sides.extend([Side::Recording, Side::QemuRecording]);
    }
    let initrd = dir.join("initrd");
    guest::write_with_files(&guests.bench, &workload::files(dir)?, &initrd)?;
    let net = if chosen.iter().any(|workload| workload.needs == Needs::Net) {
        Net::start(&sides)
            .map_err(|error| section.notes.push(format!("no network: {error:#}")))
            .ok()
    } else {
        None
    };
    let mut bench = Bench {
        dir,
        guests,
        options,
        sides,
        initrd,
        net,
        progress: Progress::new(),
        starts: 0,
        times: BTreeMap::new(),
        printed: BTreeMap::new(),
        engine_bytes: Vec::new(),
        failures: Vec::new(),
    };
    for turn in 1..=options.turns {
        bench.turn(turn, &chosen);
    }
    bench.conclude(&chosen, section)
}

impl Bench<'_> {
    fn turn(&mut self, turn: u32, chosen: &[Workload]) {
        let mut order = self.sides.clone();
        if turn.is_multiple_of(2) {
            order.reverse();
        }
        let mut sessions = BTreeMap::new();
        for workload in chosen {
            for &side in &order {
                if !self.can_run(side, workload) {
                    continue;
                }
                let time = match workload.kind {
                    Kind::Script(_) => self.script(&mut sessions, side, workload),
                    Kind::Boot(boot) => self.boot(side, boot, workload),
                };
                self.note(turn, side, workload, time);
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

    fn note(&mut self, turn: u32, side: Side, workload: &Workload, time: anyhow::Result<f64>) {
        match time {
            Ok(time) => {
                let name = workload.name;
                self.progress.say(&format!("turn {turn}: {name} on {}: {time:.2} s", side.name()));
                self.times.entry((name, side)).or_default().push(time);
            }
            Err(error) => self.fail(turn, side, workload.name, &error),
        }
    }

    fn fail(&mut self, turn: u32, side: Side, what: &str, error: &anyhow::Error) {
        let error = host::one_line::flatten(&format!("{error:#}"));
        let line = format!("turn {turn}: {what} on {} failed: {error}", side.name());
        self.progress.say(&line);
        self.failures.push(line);
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
        let disk = is_equipped.then(|| self.dir.join(format!("disk-{}", side.index())));
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
            engine: self.options.engine.as_deref(),
        };
        Ok((Running::start(setting.command(side)?)?, recording))
    }

    fn script(
        &mut self,
        sessions: &mut BTreeMap<Side, Session>,
        side: Side,
        workload: &Workload,
    ) -> anyhow::Result<f64> {
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
        let (time, printed) = timed(&mut session.running, workload, self.options.clock)?;
        session.done.push(*workload);
        sessions.insert(side, session);
        self.compare(workload, printed)?;
        Ok(time)
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
            let (time, printed) = timed(&mut running, workload, self.options.clock)?;
            self.compare(workload, printed)?;
            self.note(turn, Side::Replay, workload, Ok(time));
        }
        running.wait_for_end(END_MAX)?;
        fs::remove_dir_all(&session.recording).context("remove a recording")
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
            engine: self.options.engine.as_deref(),
        };
        Running::start(setting.command(Side::Replay)?)
    }

    /// Seconds from the start of the process until the guest is up.
    fn boot(&mut self, side: Side, boot: Boot, workload: &Workload) -> anyhow::Result<f64> {
        let guests = self.guests;
        let guest = match boot {
            Boot::Minimal => &guests.minimal,
            Boot::Debian => &guests.debian,
        };
        let (mut running, recording) = self.start(side, guest, &guest.initrd, false)?;
        let (at, _) = running.wait_for(boot.ready(), WORKLOAD_MAX)?;
        let time = at.seconds_since(running.begun, self.options.clock);
        if side == Side::Ours && boot == Boot::Debian {
            running.type_bytes(STOP)?;
            running.wait_for_end(END_MAX)?;
            let words = running.words();
            let bytes = words.lines().find_map(engine_bytes);
            self.engine_bytes.push(bytes.with_context(|| format!("no statistics in {words:?}"))?);
        }
        if side == Side::Recording {
            running.type_bytes(STOP)?;
            running.wait_for_end(END_MAX)?;
            let mut running = self.replay(&recording)?;
            let (at, _) = running.wait_for(boot.ready(), WORKLOAD_MAX)?;
            let time = at.seconds_since(running.begun, self.options.clock);
            running.wait_for_end(END_MAX)?;
            self.times.entry((workload.name, Side::Replay)).or_default().push(time);
            fs::remove_dir_all(&recording).context("remove a recording")?;
        }
        Ok(time)
    }

    /// What is measured without QEMU.
    fn inside(&mut self, section: &mut Section) {
        let guest = &self.guests.minimal;
        self.progress.say("cost of counting steps");
        match inside::counting(guest, self.options.turns) {
            Ok(ratios) => {
                let cost = median(ratios).map(|ratio| (ratio - 1.0) * 100.0);
                let figure = Figure::new("cost of exact counting, by counting twice", cost, "%");
                section.figures.push(figure.aim(Target::AtMost(3.0)));
            }
            Err(error) => self.failures.push(format!("cost of counting: {error:#}")),
        }
        self.progress.say("stops by another thread");
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
            Err(error) => self.failures.push(format!("asynchronous stop: {error:#}")),
        }
    }

    fn conclude(mut self, chosen: &[Workload], mut section: Section) -> anyhow::Result<Section> {
        if self.options.has_record {
            self.sides.push(Side::Replay);
        }
        self.sides.sort();
        let rows = chosen.iter().map(|workload| Row {
            name: workload.name.to_owned(),
            what: workload.what.to_owned(),
            seconds: self
                .sides
                .iter()
                .map(|&side| self.times.remove(&(workload.name, side)).unwrap_or_default())
                .collect(),
        });
        let comparison = Comparison {
            rows: rows.collect(),
            machines: self.sides.iter().map(|side| side.name().to_owned()).collect(),
            ratios: ratios(self.options.has_record),
        };
        section.figures = figures(&comparison);
        if let Some(bytes) = largest(self.engine_bytes.iter().copied()) {
            let name = "engine's code and tables after a Debian boot";
            let figure = Figure::new(name, bytes / f64::from(1 << 20), "MiB");
            section.figures.push(figure.aim(Target::AtMost(64.0)));
        }
        if self.options.only.is_empty() {
            self.inside(&mut section);
        }
        if self.options.has_record {
            section.notes.push(NOT_RECORDED.to_owned());
        }
        if self.options.clock == Clock::Cpu {
            section.notes.push("seconds are CPU time of the machine's process".to_owned());
        }
        section.notes.push(format!(
            "medians of {} turns; one vCPU, 1 GiB; nothing pinned; each turn starts every machine anew",
            self.options.turns
        ));
        section.notes.extend((0..self.sides.len()).filter_map(|at| comparison.spread(at)));
        if !self.failures.is_empty() {
            section.failure = Some(format!("{} measurements failed", self.failures.len()));
        }
        section.notes.append(&mut self.failures);
        section.comparison = Some(comparison);
        Ok(section)
    }
}

/// Bytes of code and tables in the line that `understudy run --stats` ends with.
fn engine_bytes(line: &str) -> Option<f64> {
    let (_, rest) = line.strip_prefix("engine ")?.split_once(": ")?;
    let (code, rest) = rest.split_once(" bytes of code, ")?;
    let (tables, _) = rest.split_once(" bytes of tables")?;
    Some(code.parse::<f64>().ok()? + tables.parse::<f64>().ok()?)
}

/// Seconds that a workload takes that starts now, and what it prints.
fn timed(
    running: &mut Running,
    workload: &Workload,
    clock: Clock,
) -> anyhow::Result<(f64, String)> {
    let (begun, _) =
        running.wait_for(&format!("understudy: run {}\r\n", workload.name), WORKLOAD_MAX)?;
    let (ended, printed) = running.wait_for("understudy: exit ", WORKLOAD_MAX)?;
    let (_, rest) = running.wait_for("\n", WORKLOAD_MAX)?;
    let code = rest.split(' ').next().unwrap_or_default();
    ensure!(code == "0", "it ended with status {code}, and printed {printed:?}");
    // The kernel may have a word to say at any time.
    let printed = printed.lines().filter(|line| !line.starts_with('[')).collect::<Vec<_>>();
    Ok((ended.seconds_since(begun, clock), printed.join("\n")))
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
    fn ratios_of_a_run_with_recording_have_an_aim_each() {
        let rows = vec![];
        let comparison = Comparison { machines: vec![], ratios: ratios(true), rows };
        assert_eq!(figures(&comparison).len(), 2 * ratios(true).len());
    }
}

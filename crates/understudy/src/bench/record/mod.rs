//! What it costs to record a machine, how soon a recording is run again, how long it takes to go back in one, and how long
//! a snapshot takes.
//!
//! # Place
//! Called by the bench, inside its namespaces. Machines and workloads are those of [`super::engine`]; recordings are read
//! with [`host::recording`], in this process.
//!
//! # Invariants
//! - INV-RECORDED-1: nothing is scaled: a time is that of the recording that was replayed, whose length stands beside it.

mod idle;
mod pause;
mod reverse;
mod speed;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use guest::{FileTree, GuestFiles};
use host::recording::{RecordingDir, RecordingInfo};
use serde::{Deserialize, Serialize};

use super::engine::Guests;
use super::engine::running::Running;
use super::engine::side::{Setting, Side};
use super::figure::Section;
use crate::demo::progress::Progress;

/// Longest boot.
const BOOT_MAX: Duration = Duration::from_secs(300);
/// Longest time that a machine takes to stop.
const END_MAX: Duration = Duration::from_secs(60);
/// Ctrl-a x, which ends `understudy run`.
const STOP: &[u8] = b"\x01x";
/// What Debian's console shows when it is up.
const READY: &str = "login: ";

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Part {
    /// Recording and replay beside running, and what a log grows by.
    Speed,
    /// Replay of a machine that did nothing.
    Idle,
    /// Going back.
    Reverse,
    /// Snapshots of a busy machine.
    Snapshot,
}

/// What is measured, and of what.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub(crate) struct RecordArgs {
    /// These parts only.
    #[arg(long = "part", value_name = "PART", value_enum, value_delimiter = ',')]
    parts: Vec<Part>,
    /// The engine [default: the fastest that this host can have].
    #[arg(long, value_name = "NAME")]
    engine: Option<String>,
    /// Speed: these workloads only.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Speed: how often each workload is measured. Idle: how often the recording is replayed. Snapshot: 5 for each.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// Idle: a recording of an idle machine [default: one of Debian is made].
    #[arg(long, value_name = "DIR")]
    idle: Option<PathBuf>,
    /// Idle: how long the machine is idle that is recorded.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    idle_seconds: u32,
    /// Reverse: a recording [default: one of Debian is made, its boot and then load].
    #[arg(long, value_name = "DIR")]
    reverse: Option<PathBuf>,
    /// Reverse: how long the machine is busy that is recorded.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    load_seconds: u32,
}

impl Default for RecordArgs {
    fn default() -> Self {
        let (parts, engine, only, idle, reverse) = (vec![], None, vec![], None, None);
        Self { parts, engine, only, turns: 3, idle, idle_seconds: 60, reverse, load_seconds: 60 }
    }
}

impl RecordArgs {
    fn has(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// The same, for a process that stands elsewhere.
    pub(crate) fn with_whole_paths(mut self) -> std::io::Result<Self> {
        for path in [&mut self.idle, &mut self.reverse].into_iter().flatten() {
            *path = std::path::absolute(&path)?;
        }
        Ok(self)
    }
}

/// Measures all parts that are asked for; one that fails is told of, and the others go on.
pub(crate) fn run(dir: &Path, guests: &Guests, args: &RecordArgs) -> anyhow::Result<Section> {
    let mut section = Section::new("record");
    let mut failures = Vec::new();
    type Measure = fn(&Path, &Guests, &RecordArgs, &mut Section) -> anyhow::Result<()>;
    let parts: [(Part, Measure); 4] = [
        (Part::Speed, speed::run),
        (Part::Idle, idle::run),
        (Part::Reverse, reverse::run),
        (Part::Snapshot, pause::run),
    ];
    for (part, measure) in parts.into_iter().filter(|(part, _)| args.has(*part)) {
        if let Err(error) = measure(dir, guests, args, &mut section) {
            failures.push(host::one_line::flatten(&format!("{part:?}: {error:#}")));
        }
    }
    if !failures.is_empty() {
        section.failure = Some(failures.join("; "));
    }
    Ok(section)
}

/// What is known of a recording before it is replayed.
#[derive(Debug)]
struct Known {
    /// Guest time from its first step to its last.
    guest: Duration,
    steps: u64,
    /// Of the log, without snapshots.
    log_bytes: u64,
    snapshots: usize,
}

impl Known {
    fn of(dir: &Path) -> anyhow::Result<Self> {
        let recording = Arc::new(RecordingDir::open(dir)?);
        let info = RecordingInfo::scan(&recording)?;
        Ok(Self {
            guest: Duration::from_nanos(info.duration_ns()),
            steps: info.last.icount - info.first.icount,
            log_bytes: super::engine::log_bytes(dir).context("look at a recording")?,
            snapshots: recording.snapshots().len(),
        })
    }

    /// For people.
    fn line(&self) -> String {
        format!(
            "{:.1} s of guest time, {:.2} thousand million steps, {} bytes of log, {} snapshots",
            self.guest.as_secs_f64(),
            self.steps as f64 / 1e9,
            self.log_bytes,
            self.snapshots
        )
    }
}

/// Records a boot of Debian with `files` added to it, and so long a time behind it.
fn record_debian(
    dir: &Path,
    debian: &GuestFiles,
    files: &FileTree,
    seconds: u32,
    engine: Option<&str>,
) -> anyhow::Result<()> {
    let initrd = dir.with_extension("initrd");
    guest::write_with_files(debian, files, &initrd)?;
    let setting = Setting {
        kernel: &debian.kernel,
        initrd: &initrd,
        append: &debian.append,
        disk: None,
        has_net: false,
        recording: dir,
        engine,
    };
    let progress = Progress::new();
    progress.say(&format!("recording a boot of Debian and {seconds} s behind it"));
    let mut running = Running::start(setting.command(Side::Recording)?)?;
    running.wait_for(READY, BOOT_MAX)?;
    std::thread::sleep(Duration::from_secs(seconds.into()));
    running.type_bytes(STOP)?;
    running.wait_for_end(END_MAX)
}

/// `understudy replay` of a recording.
fn replay(dir: &Path, engine: Option<&str>) -> anyhow::Result<Running> {
    let none = Path::new("");
    let setting = Setting {
        kernel: none,
        initrd: none,
        append: "",
        disk: None,
        has_net: false,
        recording: dir,
        engine,
    };
    Running::start(setting.command(Side::Replay)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_are_measured_unless_some_are_named() {
        let some = RecordArgs { parts: vec![Part::Idle], ..RecordArgs::default() };
        assert!(RecordArgs::default().has(Part::Reverse));
        assert!(some.has(Part::Idle) && !some.has(Part::Speed));
    }
}

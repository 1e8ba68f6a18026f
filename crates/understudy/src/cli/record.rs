//! `understudy record`: what recordings there are, and what is in them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use host::one_line::one_line;
use host::recording::{BadWhen, EntryKind, RecordingDir, RecordingInfo, ReplayEnd, When, rfc3339};
use host::vm::flight::flights;

use super::client::Format;
use super::{failure, print, say, usage};

/// `record`
#[derive(Debug, Args)]
pub(crate) struct RecordArgs {
    #[command(subcommand)]
    command: RecordCommand,
}

#[derive(Debug, Subcommand)]
enum RecordCommand {
    /// Say what is in a recording: duration, positions, snapshots, bytes of each kind of entry.
    Info {
        /// The recording.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// How it is printed.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
    /// List what this host's flight recorder has kept of a VM, as its secondary.
    List {
        /// The VM.
        vm: String,
        #[command(flatten)]
        state_dir: StateDir,
        /// How it is printed.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
}

/// The recordings that a host's flight recorder has of a VM.
#[derive(Debug, Args)]
pub(crate) struct StateDir {
    /// The daemon's directory (`state_dir` in its configuration).
    #[arg(long, value_name = "DIR", default_value = "/var/lib/understudy")]
    pub(crate) state_dir: PathBuf,
}

/// Runs the command.
pub(crate) fn run(args: &RecordArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        RecordCommand::Info { dir, output } => show_info(dir, *output),
        RecordCommand::List { vm, state_dir, output } => list(vm, &state_dir.state_dir, *output),
    }
}

/// A recording by its directory, or by a VM and a moment: `VM@2026-01-31T12:00:00Z`, `VM@30s` (before its end), `VM@`. With
/// the step of the moment.
///
/// # Errors
/// One line; exit status 3 when there is no such recording.
pub(crate) fn find(target: &str, state_dir: &StateDir) -> anyhow::Result<(PathBuf, Option<u64>)> {
    let dir = PathBuf::from(target);
    let Some((vm, when)) = target.split_once('@').filter(|_| !dir.exists()) else {
        return Ok((dir, None));
    };
    let dirs = flights(&state_dir.state_dir, vm);
    if dirs.is_empty() {
        let place = state_dir.state_dir.display();
        return Err(failure(3, format!("no recording of VM {vm} under {place} on this host")));
    }
    let when = match when {
        "" => When::Elapsed(Duration::ZERO),
        text => text.parse().map_err(|e: BadWhen| usage(e.to_string()))?,
    };
    for dir in dirs.into_iter().rev() {
        let Ok((_, info)) = open(&dir) else { continue };
        let (first, last) = (info.first.icount, info.last.icount);
        let icount = match when {
            When::Elapsed(before_end) => {
                let end = info.wall_ns_at(last);
                let before = u64::try_from(before_end.as_nanos()).unwrap_or(u64::MAX);
                info.position_at(When::Wall(end.saturating_sub(before)))
            }
            When::Wall(ns) if ns < info.wall_ns_at(first) => continue,
            When::Icount(icount) if icount < first => continue,
            When::Wall(_) | When::Icount(_) => info.position_at(when),
        };
        return Ok((dir, Some(icount)));
    }
    Err(failure(
        3,
        format!(
            "the recordings of VM {vm} on this host begin later than that; see `understudy record list {vm}`"
        ),
    ))
}

fn open(dir: &Path) -> anyhow::Result<(Arc<RecordingDir>, RecordingInfo)> {
    let recording = RecordingDir::open(dir).map_err(|e| failure(1, one_line(&e)))?;
    let recording = Arc::new(recording);
    let info = RecordingInfo::scan(&recording).map_err(|e| failure(1, one_line(&e)))?;
    Ok((recording, info))
}

fn list(vm: &str, state_dir: &Path, output: Format) -> anyhow::Result<ExitCode> {
    let dirs = flights(state_dir, vm);
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for dir in &dirs {
        match open(dir) {
            Ok((recording, info)) => {
                let (from, to) =
                    (info.wall_ns_at(info.first.icount), info.wall_ns_at(info.last.icount));
                let span = seconds(info.duration_ns());
                rows.push(format!(
                    "{}  {}  {span:>9.1} s  {}",
                    date(from),
                    date(to),
                    dir.display()
                ));
                values.push(json(&recording, &info));
            }
            Err(e) => {
                rows.push(format!("{}: {e}", dir.display()));
                values.push(serde_json::json!({ "dir": dir, "error": e.to_string() }));
            }
        }
    }
    match output {
        Format::Json => {
            print(&serde_json::to_string_pretty(&serde_json::json!({ "recordings": values }))?)?;
        }
        Format::Table if rows.is_empty() => {
            say(&format!("no recording of VM {vm} under {}", state_dir.display()));
        }
        Format::Table => print(&rows.join("\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `record info`; exit status 1 when the log is damaged or cut off, after all that is known was said.
fn show_info(dir: &Path, output: Format) -> anyhow::Result<ExitCode> {
    let (recording, info) = open(dir)?;
    match output {
        Format::Json => print(&serde_json::to_string_pretty(&json(&recording, &info))?)?,
        Format::Table => print(&table(&recording, &info))?,
    }
    match info.end {
        ReplayEnd::Whole => Ok(ExitCode::SUCCESS),
        end => Err(failure(1, end.to_string())),
    }
}

fn date(ns: u64) -> String {
    rfc3339(ns / 1_000_000)
}

fn seconds(ns: u64) -> f64 {
    (ns / 1_000_000) as f64 / 1000.0
}

/// Bytes of log for each thousand steps.
fn per_thousand(info: &RecordingInfo) -> f64 {
    let steps = info.last.icount - info.first.icount;
    info.bytes() as f64 * 1000.0 / steps.max(1) as f64
}

fn bytes_on_disk(recording: &RecordingDir) -> (u64, u64) {
    let log = recording.segments().iter().map(|s| s.bytes).sum();
    (log, recording.snapshots().iter().map(|s| s.bytes).sum())
}

fn table(recording: &RecordingDir, info: &RecordingInfo) -> String {
    let config = &recording.start().config;
    let (first, last) = (info.first.icount, info.last.icount);
    let (log, snapshots) = bytes_on_disk(recording);
    let mut rows = vec![("Recording", recording.path().display().to_string())];
    if let Some(about) = recording.about() {
        rows.push(("VM", about.vm.clone()));
        rows.push(("Recorded on", format!("{}, by {}, {}", about.host, about.build, about.engine)));
    }
    rows.extend([
        (
            "Machine",
            format!(
                "{} harts, {} MiB, {} disks, {} networks, model {}",
                config.harts,
                config.ram_size >> 20,
                config.disks.len(),
                config.nets.len(),
                recording.start().model
            ),
        ),
        ("Guest time", format!("{:.3} s", seconds(info.duration_ns()))),
        ("From", format!("{}, step {first}", date(info.wall_ns_at(first)))),
        ("To", format!("{}, step {last}", date(info.wall_ns_at(last)))),
        ("Steps", (last - first).to_string()),
        ("Log ends", info.end.to_string()),
        ("Log", format!("{log} bytes in {} segments", recording.segments().len())),
        ("Snapshots", format!("{snapshots} bytes in {}", recording.snapshots().len())),
        ("Log for 1000 steps", format!("{:.4} bytes", per_thousand(info))),
    ]);
    rows.extend(recording.problems().iter().map(|problem| ("Problem", problem.clone())));
    let line = |(name, value): &(&str, String)| format!("{name:24}{value}");
    let mut text: Vec<String> = rows.iter().map(line).collect();
    text.push(String::new());
    text.push(format!("{:24}{:>12} {:>14}", "Entries", "number", "bytes"));
    for (kind, totals) in EntryKind::ALL.into_iter().zip(info.kinds) {
        if totals.records > 0 {
            text.push(format!("{:24}{:>12} {:>14}", kind.name(), totals.records, totals.bytes));
        }
    }
    if !recording.snapshots().is_empty() {
        text.push(String::new());
        text.push(format!("{:24}{:>12} {:>14}", "Snapshot at step", "guest s", "bytes"));
        for s in recording.snapshots() {
            let at = info.wall_ns_at(s.pos.icount) - info.wall_ns_at(first);
            text.push(format!("{:<24}{:>12.3} {:>14}", s.pos.icount, seconds(at), s.bytes));
        }
    }
    text.join("\n")
}

fn json(recording: &RecordingDir, info: &RecordingInfo) -> serde_json::Value {
    let (log_bytes, snapshot_bytes) = bytes_on_disk(recording);
    let entries: serde_json::Map<_, _> = EntryKind::ALL
        .into_iter()
        .zip(info.kinds)
        .map(|(kind, totals)| {
            let value = serde_json::json!({ "records": totals.records, "bytes": totals.bytes });
            (kind.name().to_owned(), value)
        })
        .collect();
    let snapshots: Vec<_> = recording
        .snapshots()
        .iter()
        .map(|s| serde_json::json!({ "icount": s.pos.icount, "bytes": s.bytes }))
        .collect();
    serde_json::json!({
        "dir": recording.path(),
        "vm": recording.about().map(|about| &about.vm),
        "host": recording.about().map(|about| &about.host),
        "build": recording.about().map(|about| &about.build),
        "engine": recording.about().map(|about| &about.engine),
        "model": recording.start().model,
        "harts": recording.start().config.harts,
        "first_icount": info.first.icount,
        "last_icount": info.last.icount,
        "first_time": date(info.wall_ns_at(info.first.icount)),
        "last_time": date(info.wall_ns_at(info.last.icount)),
        "guest_seconds": seconds(info.duration_ns()),
        "end": info.end.to_string(),
        "is_whole": info.end == ReplayEnd::Whole,
        "log_bytes": log_bytes,
        "log_bytes_per_1000_steps": per_thousand(info),
        "snapshot_bytes": snapshot_bytes,
        "entries": entries,
        "snapshots": snapshots,
        "problems": recording.problems(),
    })
}

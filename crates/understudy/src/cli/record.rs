//! `understudy record`: what is in a recording.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use host::one_line::one_line;
use host::recording::{EntryKind, RecordingDir, RecordingInfo, ReplayEnd, rfc3339};

use super::client::Format;
use super::{failure, print};

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
}

/// `record info`; exit status 1 when the log is damaged or cut off, after all that is known was said.
pub(crate) fn run(args: &RecordArgs) -> anyhow::Result<ExitCode> {
    let RecordCommand::Info { dir, output } = &args.command;
    let recording = RecordingDir::open(dir).map_err(|e| failure(1, one_line(&e)))?;
    let recording = Arc::new(recording);
    let info = RecordingInfo::scan(&recording).map_err(|e| failure(1, one_line(&e)))?;
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
    })
}

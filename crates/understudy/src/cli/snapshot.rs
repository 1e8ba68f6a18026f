//! `understudy snapshot`: states of VMs to come back to.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use host::control::{CloneRequest, Progress, Request, Response, SnapshotInfo};

use super::client::{Format, Socket, connect, refuse};
use super::{print, say};

/// `snapshot`
#[derive(Debug, Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Take one of a VM that runs on this host, protected or not, with its disks. Prints its name.
    Create {
        #[command(flatten)]
        socket: Socket,
        /// The VM.
        vm: String,
        /// Its name [default: the time].
        name: Option<String>,
    },
    /// List those on this host; works without a running VM.
    List {
        #[command(flatten)]
        socket: Socket,
        /// The VM; all of them when absent.
        vm: Option<String>,
        /// How it is printed.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Format,
    },
    /// Start a VM that is stopped from one: memory, devices and disks as they were. Prints its configuration file's name.
    Restore(RestoreArgs),
    /// Delete one; those that build on it take over what they need.
    Delete {
        #[command(flatten)]
        socket: Socket,
        /// The VM.
        vm: String,
        /// The snapshot.
        name: String,
    },
}

#[derive(Debug, Args)]
struct RestoreArgs {
    #[command(flatten)]
    socket: Socket,
    /// The VM that it was taken of.
    vm: String,
    /// The snapshot.
    name: String,
    /// Even though what is on the VM's disks now is replaced and lost.
    #[arg(long, conflicts_with = "clone")]
    force: bool,
    /// Start another VM of this name from it: with disks, MAC addresses and a configuration of its own, and without network.
    /// The VM itself may go on.
    #[arg(long = "name", id = "clone", value_name = "NEW")]
    clone: Option<String>,
    /// Where the new VM's disks and configuration go [default: beside those of the VM].
    #[arg(long, value_name = "DIR", requires = "clone")]
    disk_dir: Option<PathBuf>,
    /// Attach the new VM to the networks of the VM. Its guest does not know that it is another one, and has the addresses that
    /// the VM's guest had.
    #[arg(long, requires = "clone")]
    connect: bool,
}

/// Runs the command.
pub(crate) fn run(args: SnapshotArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        SnapshotCommand::Create { socket, vm, name } => create(&socket, vm, name),
        SnapshotCommand::List { socket, vm, output } => list(&socket, vm, output),
        SnapshotCommand::Restore(args) => restore(args),
        SnapshotCommand::Delete { socket, vm, name } => {
            match ask(&socket, &Request::DeleteSnapshot { vm, name })? {
                Response::Done => Ok(ExitCode::SUCCESS),
                other => Err(refuse(other)),
            }
        }
    }
}

/// Asks, and shows people at a terminal how far it is.
fn ask(socket: &Socket, request: &Request) -> anyhow::Result<Response> {
    let mut shown = 0;
    let is_shown = std::io::stderr().is_terminal();
    let mut show = |text: &str| {
        if is_shown && (shown > 0 || !text.is_empty()) {
            // A closed standard error is no reason to fail.
            drop(write!(std::io::stderr().lock(), "\r{text:shown$}\r"));
            shown = text.chars().count();
        }
    };
    let mut tell = |p: &Progress| show(&format!("{}: {} %", p.phase, p.percent));
    let answer = connect(socket)?.call_telling(request, &mut tell);
    show("");
    Ok(answer?)
}

fn create(socket: &Socket, vm: String, name: Option<String>) -> anyhow::Result<ExitCode> {
    match ask(socket, &Request::CreateSnapshot { vm, name })? {
        Response::SnapshotTaken {
            name,
            memory_bytes,
            disk_bytes,
            file_bytes,
            pause_us,
            is_increment,
            ..
        } => {
            let what = if is_increment { "changed since its parent" } else { "in all" };
            say(&format!(
                "snapshot {name}: {} of memory and {} of disks {what}, {} in its file; paused the guest {:.2} ms",
                size(memory_bytes),
                size(disk_bytes),
                size(file_bytes),
                pause_us as f64 / 1000.0
            ));
            print(&name)?;
            Ok(ExitCode::SUCCESS)
        }
        other => Err(refuse(other)),
    }
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 10.0 { format!("{mib:.1} MiB") } else { format!("{mib:.0} MiB") }
}

fn list(socket: &Socket, vm: Option<String>, output: Format) -> anyhow::Result<ExitCode> {
    let snapshots = match ask(socket, &Request::ListSnapshots { vm })? {
        Response::Snapshots { snapshots } => snapshots,
        other => return Err(refuse(other)),
    };
    match output {
        Format::Json => {
            let all = serde_json::json!({ "snapshots": snapshots });
            print(&serde_json::to_string_pretty(&all)?)?;
        }
        Format::Table if snapshots.is_empty() => say("there is no snapshot on this host"),
        Format::Table => print(&table(&snapshots))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn table(snapshots: &[SnapshotInfo]) -> String {
    let head = ["VM", "NAME", "TAKEN", "GUEST TIME", "STEP", "SIZE", "PARENT"];
    let mut rows = vec![head.map(str::to_owned)];
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for s in snapshots {
        rows.push([
            s.vm.clone(),
            s.name.clone(),
            or_dash(s.taken.clone()),
            or_dash(s.guest_ms.map(|ms| format!("{}.{:03} s", ms / 1000, ms % 1000))),
            or_dash(s.icount.map(|icount| icount.to_string())),
            size(s.bytes),
            or_dash(s.parent.clone()),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    let problems = snapshots.iter().filter_map(|s| {
        Some(format!("snapshot {} of VM {} cannot be used: {}", s.name, s.vm, s.problem.as_ref()?))
    });
    lines.chain(problems).collect::<Vec<_>>().join("\n")
}

fn restore(args: RestoreArgs) -> anyhow::Result<ExitCode> {
    let RestoreArgs { socket, vm, name, force, clone, disk_dir, connect } = args;
    let dir = disk_dir.map(std::path::absolute).transpose()?;
    let clone = clone.map(|name| CloneRequest { name, dir, connect });
    let is_clone = clone.is_some();
    let request = Request::RestoreSnapshot { vm, name: name.clone(), force, clone };
    match ask(&socket, &request)? {
        Response::Restored { vm, file } => {
            let network = match (is_clone, connect) {
                (true, false) => ", without network",
                (true, true) => ", on the network with the addresses that its guest had",
                (false, _) => "",
            };
            say(&format!("VM {vm} runs from snapshot {name}{network}"));
            print(&file.display().to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        other => Err(refuse(other)),
    }
}

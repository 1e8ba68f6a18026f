//! Commands that ask this host's daemon.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use host::control::{Client, DiskCopy, ErrorCode, Protection, Request, Response, VmStatus};

use super::terminal::{Keyboard, Typed, show};
use super::{failure, print, say, usage};

/// Where the daemon is.
#[derive(Debug, Args)]
pub(crate) struct Socket {
    /// The daemon's control socket.
    #[arg(long, value_name = "PATH", default_value = "/run/understudy/control.sock")]
    socket: PathBuf,
}

/// A VM of the daemon's.
#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    #[command(flatten)]
    socket: Socket,
    /// The VM.
    vm: String,
}

/// `status`
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    socket: Socket,
    /// The VM; all of them when absent.
    vm: Option<String>,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Exit with status 4 unless every VM shown is protected.
    #[arg(long)]
    check: bool,
}

/// How data are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// `console`
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    #[command(flatten)]
    socket: Socket,
    /// The VM.
    vm: String,
    /// Which console: 0 is the UART, 1 the first virtio console.
    #[arg(long, default_value_t = 0)]
    dev: u8,
}

pub(crate) fn connect(socket: &Socket) -> anyhow::Result<Client> {
    Client::connect(&socket.socket).map_err(|e| {
        anyhow::anyhow!(
            "{}; is the daemon running (understudy host)?",
            host::one_line::one_line(&e)
        )
    })
}

/// An answer that is no success as an error with its exit status.
pub(crate) fn refuse(response: Response) -> anyhow::Error {
    match response {
        Response::Error { code, message } => {
            let code = match code {
                ErrorCode::BadRequest => 2,
                ErrorCode::NotFound => 3,
                ErrorCode::NotProtected => 4,
                ErrorCode::Refused => 5,
                ErrorCode::Failed => 1,
            };
            failure(code, message)
        }
        other => anyhow::anyhow!("the daemon gave an unexpected answer: {other:?}"),
    }
}

/// `start`
pub(crate) fn start(
    socket: &Socket,
    file: &Path,
    force: bool,
    accept_stale: bool,
) -> anyhow::Result<ExitCode> {
    let config = std::fs::read_to_string(file)
        .map_err(|e| usage(format!("{}: cannot be read: {e}", file.display())))?;
    let path = std::path::absolute(file)?;
    host::vm::Definition::parse(config.clone(), path.clone()).map_err(usage)?;
    match connect(socket)?.call(&Request::Start { config, path, force, accept_stale })? {
        Response::Done => Ok(ExitCode::SUCCESS),
        other => Err(refuse(other)),
    }
}

/// Commands that name a VM and are done or not.
pub(crate) fn simple(
    args: &VmArgs,
    request: impl FnOnce(String) -> Request,
) -> anyhow::Result<ExitCode> {
    match connect(&args.socket)?.call(&request(args.vm.clone()))? {
        Response::Done => Ok(ExitCode::SUCCESS),
        other => Err(refuse(other)),
    }
}

fn get_status(socket: &Socket, vm: Option<String>) -> anyhow::Result<Vec<VmStatus>> {
    match connect(socket)?.call(&Request::Status { vm })? {
        Response::Status { vms } => Ok(vms),
        other => Err(refuse(other)),
    }
}

/// `status`
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let vms = get_status(&args.socket, args.vm.clone())?;
    match args.output {
        Format::Json => print(&serde_json::to_string_pretty(&serde_json::json!({ "vms": vms }))?)?,
        Format::Table if vms.is_empty() => say("this host runs and follows no VM"),
        Format::Table => {
            let blocks: Vec<String> = vms.iter().map(table).collect();
            print(&blocks.join("\n\n"))?;
        }
    }
    let protected = vms.iter().all(|v| v.state == Protection::Protected);
    Ok(if args.check && !protected { ExitCode::from(4) } else { ExitCode::SUCCESS })
}

fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A VM's state for people, in the words of vSphere.
fn table(vm: &VmStatus) -> String {
    let mut rows = vec![
        ("VM", vm.name.clone()),
        ("Role of this host", word(vm.role)),
        (
            "Fault Tolerance Status",
            match vm.detail {
                Some(detail) => format!("{} ({})", word(vm.state), word(detail)),
                None => word(vm.state),
            },
        ),
    ];
    if let Some(p) = &vm.progress {
        rows.push(("Progress", format!("{}: {} %", p.phase, p.percent)));
    }
    if let Some(reason) = &vm.reason {
        rows.push(("Reason", reason.clone()));
    }
    if let Some(remedy) = &vm.remedy {
        rows.push(("Remedy", remedy.clone()));
    }
    let host = |h: &Option<String>| h.clone().unwrap_or_else(|| "-".to_owned());
    rows.push(("Live host", host(&vm.live_host)));
    rows.push(("Secondary location", host(&vm.secondary_host)));
    if let Some(engine) = &vm.engine {
        rows.push(("Engine of this host", engine.clone()));
    }
    rows.push(("vLockstep Interval", format!("{} ms", vm.lag_ms)));
    let kbit = |bytes: u64| format!("{:.1} kbit/s", bytes as f64 * 8.0 / 1000.0);
    let wire = vm.wire_bytes_per_s.map(|wire| format!(", {} on the wire", kbit(wire)));
    rows.push(("Log Bandwidth", kbit(vm.log_bytes_per_s) + &wire.unwrap_or_default()));
    if let Some(path) = &vm.log_path {
        rows.push(("Log Path", path.clone()));
    }
    rows.push(("Generation", vm.generation.to_string()));
    rows.push(("Icount", vm.icount.to_string()));
    if let Some(digests) = vm.digests {
        rows.push(("Digests compared", digests.to_string()));
    }
    if let Some(problem) = &vm.disk_problem {
        rows.push(("Disk problem", problem.clone()));
    }
    rows.extend(vm.disk_copies.iter().map(|copy| ("Disk copy", disk_copy(copy))));
    if let Some(f) = &vm.failover {
        let ms = |us: u64| us as f64 / 1000.0;
        rows.push((
            "Last failover",
            format!(
                "detection {:.1} ms, arbitration {:.1} ms, catch-up {:.1} ms, announcement {:.1} ms",
                ms(f.detection_us),
                ms(f.arbitration_us),
                ms(f.catch_up_us),
                ms(f.announce_us)
            ),
        ));
    }
    if let Some(fenced) = &vm.fenced {
        rows.push(("Last fencing", fenced.clone()));
    }
    let line = |(name, value): &(&str, String)| format!("{name:24}{value}");
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// What was copied of a disk, for people.
fn disk_copy(copy: &DiskCopy) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let how = match &copy.whole_because {
        Some(why) => format!("whole: {why}"),
        None => "what differs".to_owned(),
    };
    let (disk, to, size) = (copy.disk, &copy.to, mib(copy.disk_bytes));
    let done = mib(copy.bytes_done);
    if copy.is_done {
        return format!("disk {disk} to {to}: {done:.1} MiB sent of {size:.0} MiB ({how})");
    }
    let total = mib(copy.bytes_total);
    format!("disk {disk} to {to}: {done:.1} of {total:.1} MiB so far, of {size:.0} MiB ({how})")
}

/// `console`
pub(crate) fn console(args: &ConsoleArgs) -> anyhow::Result<ExitCode> {
    let (stream, early) = match connect(&args.socket)?.console(&args.vm, args.dev)? {
        Ok(console) => console,
        Err(refusal) => return Err(refuse(refusal)),
    };
    say(&format!("Connected to VM {}; Ctrl-a d detaches, Ctrl-a h shows help.", args.vm));
    let keyboard = Keyboard::open()?;
    show(&early);
    let mut reading = stream.try_clone().context("cannot use the console's connection")?;
    let viewer = std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(len @ 1..) = reading.read(&mut buf) {
            show(&buf[..len]);
        }
    });
    let mut stop = false;
    while !viewer.is_finished() {
        match keyboard.typed.recv_timeout(Duration::from_millis(200)) {
            Ok(Typed::Bytes(bytes)) => {
                if (&stream).write_all(&bytes).is_err() {
                    break;
                }
            }
            Ok(Typed::Stop) => {
                stop = true;
                break;
            }
            Ok(Typed::Detach | Typed::End) => break,
            Err(_) => {}
        }
    }
    let lost = viewer.is_finished();
    drop(stream.shutdown(Shutdown::Both));
    drop(keyboard);
    say("");
    if stop {
        let vm =
            VmArgs { socket: Socket { socket: args.socket.socket.clone() }, vm: args.vm.clone() };
        return simple(&vm, |vm| Request::Stop { vm });
    }
    say(if lost {
        "The console was closed: the VM stopped, or runs on another host now."
    } else {
        "Detached."
    });
    Ok(ExitCode::SUCCESS)
}

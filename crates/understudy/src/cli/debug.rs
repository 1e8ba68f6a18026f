//! `understudy debug`: a GDB server over a recording.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use clap::Args;
use host::one_line::one_line;
use host::recording::{ReplayEnd, Stop, Timeline, When};
use machine::engine::EngineKind;
use signal_hook::consts::SIGINT;

use super::record::{StateDir, find};
use super::{failure, say};
use crate::debug;

/// GDB for every architecture, as Debian has it.
const GDB: &str = "gdb-multiarch";
/// What a GDB that is started here does for itself, so that it shows the new place after `monitor goto`.
const HOOK: &str =
    r#"python gdb.execute("define hookpost-monitor\nmaintenance flush register-cache\nend")"#;

/// Options of `debug`.
#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    /// The recording: a directory that `understudy run --record` made, or what this host's flight recorder has of a VM at a
    /// date (VM@2026-01-31T12:00:00Z), before its end (VM@30s), or at its end (VM@).
    #[arg(value_name = "DIR|VM@TIME")]
    recording: String,
    #[command(flatten)]
    state_dir: StateDir,
    /// Where GDB finds the server. Whoever can connect can read all of the guest's memory.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:1234")]
    listen: SocketAddr,
    /// The engine [default: the fastest that this host can have]. Makes no difference but to the time that it takes.
    #[arg(long, value_name = "interpreter|jit")]
    engine: Option<EngineKind>,
    /// Where to begin: a step (12345), a time since the start (90s, 1m30s) or a date (2026-01-31T12:00:00Z) [default: the
    /// beginning of the recording].
    #[arg(long, value_name = "ICOUNT|TIME")]
    at: Option<When>,
    /// Start gdb-multiarch in this terminal, and end with it.
    #[arg(long)]
    gdb: bool,
    /// Arguments for it, after `--`: for instance the kernel with its symbols.
    #[arg(last = true, value_name = "ARGS", requires = "gdb")]
    gdb_args: Vec<String>,
}

/// Serves the recording until Ctrl-C, or until the GDB that it started ends.
pub(crate) fn run(args: &DebugArgs) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(args.listen)
        .map_err(|e| failure(1, format!("cannot listen on {}: {e}", args.listen)))?;
    let address = listener.local_addr().context("the address of the server")?;
    let (dir, moment) = find(&args.recording, &args.state_dir)?;
    let timeline = Timeline::open(&dir, args.engine).map_err(|e| failure(1, one_line(&e)))?;
    let mut debuggee = debug::Debuggee::new(timeline);
    if let Some(when) = args.at.or(moment.map(When::Icount))
        && let Stop::End { how } = debuggee.go_to(when)
        && how != ReplayEnd::Whole
    {
        say(&how.to_string());
    }
    let overview = debug::overview(&debuggee);
    say(&format!("{overview}: {GDB} -ex 'target remote {address}' vmlinux"));
    if !args.gdb {
        let error = debug::serve(&listener, &mut debuggee);
        return Err(failure(1, format!("cannot serve on {address}: {error}")));
    }
    // Ctrl-C is for GDB, which shares the terminal.
    signal_hook::flag::register(SIGINT, Arc::new(AtomicBool::new(false)))
        .context("leave Ctrl-C to gdb")?;
    let mut gdb = start_gdb(&args.gdb_args, address)?;
    std::thread::Builder::new()
        .name("gdb server".to_owned())
        .spawn(move || debug::serve(&listener, &mut debuggee))
        .context("start the server's thread")?;
    let status = gdb.wait().context("wait for gdb")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}

fn start_gdb(arguments: &[String], address: SocketAddr) -> anyhow::Result<Child> {
    let connect = format!("target remote {address}");
    let mut command = Command::new(GDB);
    command.args(["-ex", HOOK, "-ex", &connect]).args(arguments);
    command.spawn().map_err(|e| failure(1, format!("cannot start {GDB} (package {GDB}): {e}")))
}

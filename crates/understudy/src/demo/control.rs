//! What the demo asks a host's daemon through its control socket.
//!
//! # Failure
//! A daemon that is dead, stopped or not yet up gives no answer within a bound: never an endless wait. The thread that
//! asked a stopped daemon ends when that goes on or dies.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, bail};
use host::control::{Client, ControlError, Detail, Protection, Request, Response, VmStatus};

/// How long a daemon may take to tell a machine's state.
const STATUS_MAX: Duration = Duration::from_secs(1);
/// How long a daemon may take to write a snapshot.
const SNAPSHOT_MAX: Duration = Duration::from_secs(120);
/// How long a daemon may take to start a machine.
const START_MAX: Duration = Duration::from_secs(30);

/// Whether a secondary can take over at once.
pub(crate) fn is_protected(status: &VmStatus) -> bool {
    status.state == Protection::Protected
}

/// A machine's state as one line for people.
pub(crate) fn words(status: &VmStatus) -> String {
    if is_protected(status) {
        return "Protected".to_owned();
    }
    let mut line = "Not Protected".to_owned();
    if let Some(detail) = status.detail {
        line = format!("{line}, {}", detail_words(detail));
    }
    for more in [&status.reason, &status.remedy].into_iter().flatten() {
        line = format!("{line}, {more}");
    }
    if let Some(progress) = &status.progress {
        line = format!("{line}, {} {} %", progress.phase, progress.percent);
    }
    line
}

fn detail_words(detail: Detail) -> &'static str {
    match detail {
        Detail::Starting => "Starting",
        Detail::NeedSecondary => "Need Secondary",
        Detail::Disabled => "Disabled",
        Detail::VmNotRunning => "VM not Running",
    }
}

/// Asks the daemon behind one control socket.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    socket: PathBuf,
}

impl Control {
    /// For the daemon with this control socket.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Whether the daemon answers at all.
    pub(crate) fn answers(&self) -> bool {
        let all = Request::Status { vm: None };
        matches!(self.ask(all, STATUS_MAX), Ok(Response::Status { .. }))
    }

    /// How the daemon sees the machine `name`.
    pub(crate) fn view(&self, name: &str) -> Option<VmStatus> {
        // All are asked for, since one that a host does not know is no error here.
        match self.ask(Request::Status { vm: None }, STATUS_MAX) {
            Ok(Response::Status { vms }) => vms.into_iter().find(|vm| vm.name == name),
            _ => None,
        }
    }

    /// Has the daemon start the machine that `file` describes.
    pub(crate) fn start(&self, file: &Path) -> anyhow::Result<()> {
        let config =
            std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        self.done(
            Request::Start { config, path: file.to_owned(), force: false, accept_stale: false },
            START_MAX,
        )
    }

    /// Has the daemon make a secondary of the machine `name`.
    pub(crate) fn protect(&self, name: &str, host: Option<&str>) -> anyhow::Result<()> {
        let request = Request::Protect { vm: name.to_owned(), host: host.map(str::to_owned) };
        self.done(request, START_MAX)
    }

    /// Has the daemon give the secondary of the machine `name` up.
    pub(crate) fn unprotect(&self, name: &str) -> anyhow::Result<()> {
        self.done(Request::Unprotect { vm: name.to_owned() }, START_MAX)
    }

    /// Has the secondary of the machine `name` take over.
    pub(crate) fn fail_over(&self, name: &str) -> anyhow::Result<()> {
        self.done(Request::Failover { vm: name.to_owned() }, START_MAX)
    }

    /// Takes a snapshot of the machine `name`; how long the guest stood still, and bytes of memory in it.
    pub(crate) fn snapshot(&self, name: &str) -> anyhow::Result<(Duration, u64)> {
        let request = Request::CreateSnapshot { vm: name.to_owned(), name: None };
        match self.ask(request, SNAPSHOT_MAX)? {
            Response::SnapshotTaken { pause_us, memory_bytes, .. } => {
                Ok((Duration::from_micros(pause_us), memory_bytes))
            }
            Response::Error { message, .. } => bail!("the daemon refuses: {message}"),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// A connection to the first console of the machine `name`, and what came on it already.
    pub(crate) fn console(&self, name: &str) -> anyhow::Result<(UnixStream, Vec<u8>)> {
        match Client::connect(&self.socket)?.console(name, 0)? {
            Ok(console) => Ok(console),
            Err(refusal) => bail!("the daemon refuses the console: {refusal:?}"),
        }
    }

    fn done(&self, request: Request, bound: Duration) -> anyhow::Result<()> {
        match self.ask(request, bound)? {
            Response::Done => Ok(()),
            Response::Error { message, .. } => bail!("the daemon refuses: {message}"),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    fn ask(&self, request: Request, bound: Duration) -> anyhow::Result<Response> {
        let socket = self.socket.clone();
        let (sender, receiver) = channel();
        let call =
            move || -> Result<Response, ControlError> { Client::connect(&socket)?.call(&request) };
        // Nobody receives an answer that comes too late.
        std::thread::Builder::new().name("ask".into()).spawn(move || drop(sender.send(call())))?;
        let answer = receiver.recv_timeout(bound);
        let answer = answer.with_context(|| format!("no answer within {} s", bound.as_secs()))?;
        Ok(answer?)
    }
}

#[cfg(test)]
pub(crate) fn sample(state: Protection, live: &str, secondary: &str) -> VmStatus {
    VmStatus {
        name: "redis".into(),
        role: host::control::Role::Primary,
        state,
        detail: None,
        reason: None,
        remedy: None,
        live_host: Some(live.into()),
        secondary_host: Some(secondary.into()),
        generation: 2,
        lag_ms: 0,
        log_bytes_per_s: 0,
        wire_bytes_per_s: None,
        log_path: None,
        icount: 0,
        digests: None,
        failover: None,
        progress: None,
        protect_pause_us: None,
        engine: None,
        fenced: None,
        disk_problem: None,
        disk_copies: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use host::control::Progress;

    use super::*;

    #[test]
    fn state_is_told_in_one_line() {
        let mut status = sample(Protection::NotProtected, "h1", "");
        status.detail = Some(Detail::Starting);
        status.progress = Some(Progress { phase: "copying memory".into(), percent: 40 });
        assert_eq!(words(&status), "Not Protected, Starting, copying memory 40 %");
        assert_eq!(words(&sample(Protection::Protected, "h1", "h2")), "Protected");
    }

    #[test]
    fn silent_daemon_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let control = Control::new(&socket);
        assert!(!control.answers());
        let _silent = UnixListener::bind(&socket).unwrap();
        let begun = Instant::now();
        let bound = Duration::from_millis(20);
        let error = control.ask(Request::Status { vm: None }, bound).unwrap_err();
        assert_eq!(error.to_string(), "no answer within 0 s");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}

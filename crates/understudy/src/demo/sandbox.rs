//! Runs the demo in namespaces of its own, so that it needs no root and nothing of it stays behind.
//!
//! # Place
//! The outer process prepares what needs the network, then runs itself again inside new user, mount, process and
//! network namespaces and waits. All daemons are children of the inner process's process namespace: the kernel kills
//! them and drops every network device when it ends.
//!
//! # Failure
//! Interrupted (SIGINT, SIGTERM, SIGHUP), the outer process kills the inner one; killed itself, the kernel does it (a
//! parent-death signal at each step).

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// What `unshare` is asked for beside the user namespace.
const SPACES: &[&str] = &["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];

/// A directory that is removed, with all in it, when dropped, unless it is to be kept.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    keep: bool,
}

impl StateDir {
    /// A new one among the temporary files.
    pub(crate) fn new(keep: bool) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("understudy-demo-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self { path, keep })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("state and logs are kept in {}", self.path.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Makes sure that namespaces can be had, before anything takes time.
pub(crate) fn check() -> anyhow::Result<()> {
    let mut probe = unshare();
    let output = probe.arg("true").stdin(Stdio::null()).output();
    let output = output
        .context("cannot run setpriv and unshare (package util-linux), which the demo needs")?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!(
            "the demo needs root or unprivileged user namespaces, and this machine allows neither ({}); run it as \
             root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
            words.trim()
        );
    }
    Ok(())
}

/// Runs this program with `args` inside, to its end.
pub(crate) fn run_inside(args: &[&str]) -> anyhow::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("handle signals")?;
    }
    let exe = std::env::current_exe().context("find this program's file")?;
    let mut child = unshare().arg(exe).args(args).spawn().context("run unshare")?;
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(ExitCode::from(code.unwrap_or(1)));
        }
        if stop.load(Ordering::Relaxed) {
            child.kill().context("stop the demo")?;
            child.wait()?;
            bail!("interrupted");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn unshare() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare"]);
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(SPACES).arg("--");
    command
}

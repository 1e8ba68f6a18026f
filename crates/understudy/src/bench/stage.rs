//! The demo's laboratory as the benches use it: one machine, protected or not, as asked.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use guest::GuestFiles;
use host::control::{Detail, VmStatus};
use serde::{Deserialize, Serialize};

use super::console::Console;
use crate::demo::control::Control;
use crate::demo::lab::{Lab, Plan, VM};
use crate::demo::progress::Progress;
use crate::demo::rounds::{Cluster, wait_protected};

/// Longest wait for protection.
pub(crate) const PROTECTED_MAX: Duration = Duration::from_secs(120);
/// Longest boot to a shell.
const SHELL_MAX: Duration = Duration::from_secs(120);
/// The host that the machine is started on.
const FIRST: &str = "h1";
/// The other one that it is on: the hosts may fail over by themselves where the computer is busy.
const SECOND: &str = "h2";

/// What the laboratory is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Material {
    /// The guest.
    pub(crate) guest: GuestFiles,
    /// The arbiter's program.
    pub(crate) etcd: Option<std::path::PathBuf>,
}

/// The hosts, with the machine on the first of them.
pub(crate) struct Stage {
    /// The hosts.
    pub(crate) lab: Lab,
    /// Where words go.
    pub(crate) progress: Progress,
}

impl Stage {
    /// Makes the hosts below `dir` and starts the machine.
    pub(crate) fn start(
        dir: &Path,
        material: &Material,
        is_protected: bool,
    ) -> anyhow::Result<Self> {
        Self::start_with(dir, material, "512M", is_protected)
    }

    /// The same with so much memory.
    pub(crate) fn start_with(
        dir: &Path,
        material: &Material,
        memory: &str,
        is_protected: bool,
    ) -> anyhow::Result<Self> {
        Self::start_prepared(dir, material, (memory, 100), is_protected, |_| Ok(()))
    }

    /// The same with so much memory, a detection time, and what is to be done once there is a network.
    pub(crate) fn start_prepared(
        dir: &Path,
        material: &Material,
        (memory, detection_ms): (&str, u32),
        is_protected: bool,
        prepare: impl FnOnce(&mut Lab) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let progress = Progress::new();
        let plan = Plan {
            memory: memory.into(),
            harts: 1,
            detection_ms,
            lag_ms: None,
            is_protected,
            has_shared_disk: false,
        };
        let etcd = material.etcd.as_deref();
        let mut lab = Lab::new(dir, material.guest.clone(), etcd, plan, &progress)?;
        prepare(&mut lab)?;
        let started = lab.start(&progress);
        if let Err(error) = started {
            eprint!("{}", lab.log_tails());
            return Err(error);
        }
        Ok(Self { lab, progress })
    }

    /// Waits for the shell on the console.
    pub(crate) fn shell(&self) -> anyhow::Result<Console> {
        self.console("understudy: shell ready")
    }

    /// Waits for a line on the console.
    pub(crate) fn console(&self, line: &str) -> anyhow::Result<Console> {
        let mut console = Console::attach(self.lab.control(FIRST)?, VM)?;
        console.wait_for(line, SHELL_MAX)?;
        Ok(console)
    }

    /// How the machine is, as its live host sees it.
    pub(crate) fn view(&self) -> anyhow::Result<VmStatus> {
        self.lab.view(None).context("no host tells the machine's state")
    }

    /// The daemon of the live host.
    pub(crate) fn live(&self) -> anyhow::Result<(&Control, u32)> {
        let live = self.view()?.live_host.context("the machine is live nowhere")?;
        Ok((self.lab.control(&live)?, self.lab.daemon_id(&live)?))
    }

    /// The live host, and the one that is asked for as its secondary.
    pub(crate) fn pair(&self) -> anyhow::Result<(String, &'static str)> {
        let live = self.view()?.live_host.context("the machine is live nowhere")?;
        let other = if live == SECOND { FIRST } else { SECOND };
        Ok((live, other))
    }

    /// Waits until it is protected.
    pub(crate) fn wait_protected(&self) -> anyhow::Result<VmStatus> {
        wait_protected(&self.lab, None, PROTECTED_MAX, &self.progress)
    }

    /// Whether it is protected, or is to be.
    pub(crate) fn is_protected(&self) -> anyhow::Result<bool> {
        Ok(self.view()?.detail != Some(Detail::Disabled))
    }

    /// Has the other host protect it, and waits; how long that took.
    pub(crate) fn protect(&self) -> anyhow::Result<Duration> {
        let (_, other) = self.pair()?;
        let begun = Instant::now();
        self.live()?.0.protect(VM, Some(other))?;
        self.wait_protected()?;
        Ok(begun.elapsed())
    }

    /// Gives the secondary up, and waits until it is gone.
    pub(crate) fn unprotect(&self) -> anyhow::Result<()> {
        self.live()?.0.unprotect(VM)?;
        let step = Duration::from_millis(20);
        self.progress.wait_for("the end of protection", PROTECTED_MAX, step, |_| {
            Ok((self.view()?.detail == Some(Detail::Disabled)).then_some(()))
        })
    }
}

//! Debian's pgbench at the guest's PostgreSQL: what it does, and what it tells at its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::demo::progress::Progress;

/// Longest time that it takes to end.
const END_MAX: Duration = Duration::from_secs(120);

/// What pgbench tells at its end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Told {
    /// Transactions that it was told are done.
    pub(super) transactions: u64,
    /// Those that failed.
    pub(super) failed: u64,
    /// Transactions a second, without the time to connect.
    pub(super) per_second: f64,
    /// Average latency.
    pub(super) latency_ms: f64,
}

impl Told {
    /// Reads its report.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let behind = |start: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(start))?;
            line.trim().split([' ', '/']).next()
        };
        Some(Self {
            transactions: behind("number of transactions actually processed:")?.parse().ok()?,
            // Versions before 15 do not have that line.
            failed: behind("number of failed transactions:").map_or(Ok(0), str::parse).ok()?,
            per_second: behind("tps =")?.parse().ok()?,
            latency_ms: behind("latency average =")?.parse().ok()?,
        })
    }
}

/// A pgbench that runs.
#[derive(Debug)]
pub(super) struct Pgbench {
    child: Child,
    output: PathBuf,
}

impl Pgbench {
    /// Starts `command`, with what it prints in `output`.
    pub(super) fn start(mut command: Command, output: &Path) -> anyhow::Result<Self> {
        let file = File::create(output).with_context(|| format!("make {}", output.display()))?;
        command.stdout(Stdio::from(file.try_clone()?)).stderr(Stdio::from(file));
        let child = command.spawn().context("start pgbench")?;
        Ok(Self { child, output: output.to_owned() })
    }

    /// What it printed so far.
    pub(super) fn words(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// How many of its clients it has given up: each had one connection.
    pub(super) fn clients_aborted(&self) -> usize {
        self.words().lines().filter(|line| line.contains(" aborted ")).count()
    }

    /// Ends it as the end of its time does: each client finishes its transaction.
    pub(super) fn end(mut self, progress: &Progress) -> anyhow::Result<Told> {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if self.child.try_wait()?.is_none() {
            kill_process(id.context("a process has an id")?, Signal::ALARM)?;
        }
        let step = Duration::from_millis(100);
        let status = progress
            .wait_for("the end of pgbench", END_MAX, step, |_| Ok(self.child.try_wait()?))?;
        let words = self.words();
        let last = words.lines().last().unwrap_or_default();
        ensure!(status.success(), "pgbench ended with {status}: {last}");
        Told::parse(&words).with_context(|| format!("pgbench told nothing: {last}"))
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        // An error means that it ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_is_read_with_and_without_failures() {
        let text = "transaction type: <builtin: TPC-B (sort of)>\nscaling factor: 5\n\
            number of transactions actually processed: 1234\nnumber of failed transactions: 2 (0.162%)\n\
            latency average = 8.123 ms\ninitial connection time = 30.1 ms\n\
            tps = 492.401000 (without initial connection time)\n";
        let told = Told { transactions: 1234, failed: 2, per_second: 492.401, latency_ms: 8.123 };
        assert_eq!(Told::parse(text), Some(told));
        let of_a_number = text.replace("processed: 1234", "processed: 1234/2000");
        assert_eq!(Told::parse(&of_a_number), Some(told));
        assert_eq!(Told::parse("pgbench: error: connection failed"), None);
    }
}

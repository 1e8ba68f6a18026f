//! How fast the machine computes, beside QEMU's TCG: the same kernel, the same initial RAM disk, timed from outside.

use std::io::{BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use guest::GuestFiles;
use serde::{Deserialize, Serialize};

use super::figure::{Figure, Section, Target, listed, median};
use crate::demo::progress::Progress;

/// Longest run of one machine.
const RUN_MAX: Duration = Duration::from_secs(600);
/// Names and commands; all are integer code, and none knows how fast the machine is.
const WORKLOADS: [(&str, &str); 6] = [
    ("shell loop", "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done"),
    ("awk loop", "awk 'BEGIN { for (i = 0; i < 300000; i++) s = s + i % 7; print s }'"),
    ("sha256sum", "dd if=/dev/zero bs=1M count=16 2>/dev/null | sha256sum"),
    ("sort", "seq 60000 | sort -r | md5sum"),
    ("openssl sha512", "dd if=/dev/zero bs=1M count=32 2>/dev/null | openssl dgst -sha512"),
    ("python3", "python3 -c 'print(sum(i * i % 7 for i in range(300000)))'"),
];

/// The guests that are booted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Guests {
    /// Runs the workloads.
    pub(crate) tools: GuestFiles,
    /// Boots to a shell.
    pub(crate) minimal: GuestFiles,
}

/// A machine that runs as a process, with its console on standard input and output.
#[derive(Debug, Clone, Copy)]
enum Machine {
    Understudy,
    Qemu,
}

impl Machine {
    fn name(self) -> &'static str {
        match self {
            Self::Understudy => "understudy",
            Self::Qemu => "QEMU",
        }
    }

    fn command(self, guest: &GuestFiles, initrd: &Path) -> anyhow::Result<Command> {
        let mut command = match self {
            Self::Understudy => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["run", "--memory", "512M", "--smp", "1"]);
                command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(initrd);
                command.args(["--append", &guest.append]);
                command
            }
            Self::Qemu => {
                let mut command = Command::new("qemu-system-riscv64");
                command.args(["-M", "virt", "-accel", "tcg", "-m", "512M", "-smp", "1"]);
                command.args(["-nographic", "-no-reboot"]);
                command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(initrd);
                command.args(["-append", &guest.append]);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        Ok(command)
    }
}

/// A process that is killed when dropped, and its console line by line with the time at which each line ended.
struct Running {
    child: Child,
    begun: Instant,
    lines: Receiver<(Instant, String)>,
}

impl Running {
    fn start(machine: Machine, guest: &GuestFiles, initrd: &Path) -> anyhow::Result<Self> {
        let mut command = machine.command(guest, initrd)?;
        let begun = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let output = child.stdout.take().context("a console is there")?;
        let (sender, lines) = channel();
        let read = move || {
            let mut line = Vec::new();
            for byte in BufReader::new(output).bytes().map_while(Result::ok) {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let text = String::from_utf8_lossy(&line).trim().to_owned();
                line.clear();
                if sender.send((Instant::now(), text)).is_err() {
                    return;
                }
            }
        };
        let running = Self { child, begun, lines };
        std::thread::Builder::new().name("console".into()).spawn(read)?;
        Ok(running)
    }

    /// Waits for a line that `wanted` makes something of.
    fn find<T>(&self, wanted: impl Fn(&str) -> Option<T>) -> anyhow::Result<(Instant, T)> {
        loop {
            let left = RUN_MAX.saturating_sub(self.begun.elapsed());
            match self.lines.recv_timeout(left) {
                Ok((at, line)) => {
                    if let Some(value) = wanted(&line) {
                        return Ok((at, value));
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no end within {} s", RUN_MAX.as_secs()),
                Err(RecvTimeoutError::Disconnected) => bail!("the machine ended too early"),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Every workload `turns` times on both machines, in turn, and boots likewise.
pub(crate) fn run(dir: &Path, guests: &Guests, turns: u32) -> anyhow::Result<Section> {
    let progress = Progress::new();
    let mut section = Section::new("engine");
    let version = Command::new("qemu-system-riscv64").arg("--version").output();
    let version =
        version.context("cannot run qemu-system-riscv64 (Debian package qemu-system-misc)")?;
    let version = String::from_utf8_lossy(&version.stdout);
    section.notes.push(version.lines().next().unwrap_or_default().to_owned());
    let initrd = dir.join("initrd");
    let list: Vec<&str> = WORKLOADS.iter().map(|(_, command)| *command).collect();
    guest::write_with_run_list(&guests.tools, &list.join("\n"), &initrd)?;
    let mut seconds =
        [const { Vec::new() }; WORKLOADS.len() + 1].map(|_: Vec<f64>| [vec![], vec![]]);
    for turn in 1..=turns {
        for (index, machine) in [Machine::Understudy, Machine::Qemu].into_iter().enumerate() {
            progress.say(&format!("turn {turn}: {} runs {} workloads", machine.name(), list.len()));
            let times = run_list(machine, &guests.tools, &initrd)
                .with_context(|| format!("workloads on {}", machine.name()))?;
            let boot = boot(machine, &guests.minimal)
                .with_context(|| format!("boot on {}", machine.name()))?;
            progress.say(&format!("seconds: {}; boot to shell {boot:.2}", listed(&times)));
            for (all, time) in seconds.iter_mut().zip(times.into_iter().chain([boot])) {
                all[index].push(time);
            }
        }
    }
    let names = WORKLOADS.iter().map(|(name, _)| *name).chain(["boot to shell"]);
    let mut ratios = Vec::new();
    for (name, [ours, theirs]) in names.zip(seconds) {
        let (Some(ours), Some(theirs)) = (median(ours), median(theirs)) else { continue };
        section.figures.extend([
            Figure::new(format!("{name}, understudy"), ours, "s"),
            Figure::new(format!("{name}, QEMU"), theirs, "s"),
            Figure::new(format!("{name}, speed of QEMU's"), theirs / ours, ""),
        ]);
        ratios.push(theirs / ours);
    }
    ratios.truncate(WORKLOADS.len());
    let mean =
        Figure::new("integer code, geometric mean of QEMU's speed", geometric_mean(&ratios), "");
    section.figures.push(mean.aim(Target::AtLeast(0.15)));
    section.notes.push(format!("medians of {turns} turns, one hart, plain TCG, nothing pinned"));
    Ok(section)
}

/// Seconds that each workload took.
fn run_list(machine: Machine, guest: &GuestFiles, initrd: &Path) -> anyhow::Result<Vec<f64>> {
    let running = Running::start(machine, guest, initrd)?;
    let mut times = Vec::new();
    for (name, command) in WORKLOADS {
        let (begun, ()) = running
            .find(|line| (line.strip_prefix("understudy: run ") == Some(command)).then_some(()))?;
        let (ended, code) = running.find(|line| {
            let rest = line.strip_prefix("understudy: exit ")?;
            Some(rest.strip_suffix(command)?.trim().to_owned())
        })?;
        ensure!(code == "0", "{name} ended with status {code}");
        times.push(ended.duration_since(begun).as_secs_f64());
    }
    Ok(times)
}

/// Seconds from the start of the process to the shell.
fn boot(machine: Machine, guest: &GuestFiles) -> anyhow::Result<f64> {
    let running = Running::start(machine, guest, &guest.initrd)?;
    let ready = |line: &str| line.contains("understudy: shell ready").then_some(());
    let (at, ()) = running.find(ready)?;
    Ok(at.duration_since(running.begun).as_secs_f64())
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    (!values.is_empty()).then(|| (sum / values.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometric_mean_of_a_value_and_its_inverse_is_one() {
        assert!((geometric_mean(&[4.0, 0.25]).unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn workloads_are_lines_of_their_own() {
        assert!(WORKLOADS.iter().all(|(_, command)| !command.contains('\n')));
    }
}

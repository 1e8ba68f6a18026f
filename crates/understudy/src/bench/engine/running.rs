//! A machine that runs as a process, its console read with the time at which each part of it came.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::bench::speed::cpu_seconds;

/// Most of the console that is kept for an error's message.
const TAIL_BYTES: usize = 160;

/// A moment in a machine's life.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::bench) struct Moment {
    at: Instant,
    cpu_seconds: f64,
}

impl Moment {
    /// How far it lies behind another.
    pub(in crate::bench) fn since(self, earlier: Self) -> Span {
        Span {
            wall_seconds: self.at.duration_since(earlier.at).as_secs_f64(),
            cpu_seconds: self.cpu_seconds - earlier.cpu_seconds,
        }
    }
}

/// What lies between two moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::bench) struct Span {
    /// What passed for everybody.
    pub(in crate::bench) wall_seconds: f64,
    /// What the process computed.
    pub(in crate::bench) cpu_seconds: f64,
}

impl Span {
    /// Seconds on a clock.
    pub(in crate::bench) fn seconds(self, clock: Clock) -> f64 {
        match clock {
            Clock::Wall => self.wall_seconds,
            Clock::Cpu => self.cpu_seconds,
        }
    }
}

/// What time is measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Clock {
    /// What passes for everybody.
    Wall,
    /// What the machine's process computed, in hundredths of a second: for a computer that does other work, too.
    Cpu,
}

/// A process that is killed when dropped.
pub(in crate::bench) struct Running {
    child: Child,
    keyboard: ChildStdin,
    parts: Receiver<(Moment, Vec<u8>)>,
    words: Receiver<String>,
    /// What was read and not yet looked for.
    seen: Vec<u8>,
    /// When the last of it came.
    last: Moment,
    /// When the process was started.
    pub(in crate::bench) begun: Moment,
}

impl Running {
    /// Starts `command`, whose standard streams are pipes.
    pub(in crate::bench) fn start(mut command: Command) -> anyhow::Result<Self> {
        let begun = Moment { at: Instant::now(), cpu_seconds: 0.0 };
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let keyboard = child.stdin.take().context("standard input is a pipe")?;
        let mut output = child.stdout.take().context("standard output is a pipe")?;
        let mut errors = child.stderr.take().context("standard error is a pipe")?;
        let (sender, parts) = channel();
        let process = child.id();
        std::thread::Builder::new().name("console".into()).spawn(move || {
            let mut buffer = [0; 1 << 14];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                // A zombie still tells it, and this process waits for it later.
                let cpu_seconds = cpu_seconds(process).unwrap_or_default();
                let moment = Moment { at: Instant::now(), cpu_seconds };
                if sender.send((moment, buffer[..len].to_vec())).is_err() {
                    return;
                }
            }
        })?;
        let (sender, words) = channel();
        std::thread::Builder::new().name("errors".into()).spawn(move || {
            let mut text = Vec::new();
            drop(errors.read_to_end(&mut text));
            drop(sender.send(String::from_utf8_lossy(&text).into_owned()));
        })?;
        Ok(Self { child, keyboard, parts, words, seen: Vec::new(), last: begun, begun })
    }

    /// Types a line.
    pub(in crate::bench) fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        self.type_bytes(format!("{line}\n").as_bytes())
    }

    /// Types.
    pub(in crate::bench) fn type_bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.keyboard.write_all(bytes).and_then(|()| self.keyboard.flush()).context("type")
    }

    /// Waits until the console shows `text`; when that came, and what came before it.
    pub(in crate::bench) fn wait_for(
        &mut self,
        text: &str,
        bound: Duration,
    ) -> anyhow::Result<(Moment, String)> {
        let limit = Instant::now() + bound;
        let mut from = 0;
        loop {
            let found =
                self.seen[from..].windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found {
                let before = self.seen.drain(..from + at + text.len()).collect::<Vec<u8>>();
                let before = &before[..before.len() - text.len()];
                return Ok((self.last, String::from_utf8_lossy(before).into_owned()));
            }
            from = self.seen.len().saturating_sub(text.len() - 1);
            match self.parts.recv_timeout(limit.saturating_duration_since(Instant::now())) {
                Ok((at, bytes)) => {
                    self.last = at;
                    self.seen.extend(bytes);
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {text:?} within {} s after {}", bound.as_secs(), self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended(text)),
            }
        }
    }

    /// Waits until the process ends.
    pub(in crate::bench) fn wait_for_end(&mut self, bound: Duration) -> anyhow::Result<()> {
        let limit = Instant::now() + bound;
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => return Err(self.ended("the end")),
                None if Instant::now() > limit => {
                    bail!("the machine did not end within {} s", bound.as_secs())
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// What a process that ended wrote to standard error.
    pub(in crate::bench) fn words(&self) -> String {
        self.words.recv_timeout(Duration::from_secs(1)).unwrap_or_default()
    }

    fn ended(&self, text: &str) -> anyhow::Error {
        let words = self.words();
        let words = words.lines().last().unwrap_or("no word").to_owned();
        anyhow!("the machine ended before {text:?} after {}: {words}", self.tail())
    }

    /// The end of what the console shows.
    fn tail(&self) -> String {
        let from = self.seen.len().saturating_sub(TAIL_BYTES);
        format!("{:?}", String::from_utf8_lossy(&self.seen[from..]))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::start(command).unwrap()
    }

    #[test]
    fn text_is_found_part_by_part_and_what_was_before_it() {
        let mut running = shell("echo one; read x; echo \"two $x\"; printf three");
        assert_eq!(running.wait_for("one", BOUND).unwrap().1, "");
        running.type_line("and").unwrap();
        assert_eq!(running.wait_for("wo and", BOUND).unwrap().1, "\nt");
        assert_eq!(running.wait_for("three", BOUND).unwrap().1, "\n");
        running.wait_for_end(BOUND).unwrap();
    }

    #[test]
    fn machine_that_ends_is_told_with_its_last_word() {
        let mut running = shell("echo so far; echo no memory >&2; exit 1");
        let error = running.wait_for("ready", BOUND).unwrap_err().to_string();
        assert!(error.contains("so far") && error.ends_with("no memory"), "{error}");
    }

    #[test]
    fn silent_machine_is_given_up() {
        let error = shell("sleep 20").wait_for("ready", Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().starts_with("no \"ready\" within 0 s"), "{error}");
    }
}

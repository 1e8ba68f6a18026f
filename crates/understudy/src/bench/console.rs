//! A machine's console, read up to a line and typed at, with a bound on every wait.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::demo::control::Control;

/// Most that is kept of what was not looked at.
const UNREAD_BYTES_MAX: usize = 1 << 20;

/// A connection to the console.
#[derive(Debug)]
pub(crate) struct Console {
    stream: UnixStream,
    seen: Vec<u8>,
}

impl Console {
    /// Attaches to the console of `machine` on the host behind `control`; what it wrote before comes first.
    pub(crate) fn attach(control: &Control, machine: &str) -> anyhow::Result<Self> {
        let (stream, seen) = control.console(machine).context("attach to the console")?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { stream, seen })
    }

    /// Types.
    pub(crate) fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        self.stream.write_all(format!("{line}\n").as_bytes()).context("type at the console")
    }

    /// Waits until the machine writes `text`, and forgets everything up to it.
    pub(crate) fn wait_for(&mut self, text: &str, bound: Duration) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut buffer = [0; 4096];
        loop {
            let found = self.seen.windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found {
                self.seen.drain(..at + text.len());
                return Ok(());
            }
            if begun.elapsed() > bound {
                bail!("the console did not show {text:?} within {} s", bound.as_secs());
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the console was closed"),
                Ok(len) => self.seen.extend_from_slice(&buffer[..len]),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("read the console"),
            }
            let spare = self.seen.len().saturating_sub(UNREAD_BYTES_MAX);
            self.seen.drain(..spare);
        }
    }
}

//! Plain lines with the time since the start, so that nobody looks at a silent terminal.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::bail;

/// Longest silence while something is waited for.
const SILENCE_MAX: Duration = Duration::from_millis(1500);

/// Says what goes on, on standard error: standard output is for the result.
#[derive(Debug)]
pub(crate) struct Progress {
    start: Instant,
    last: Cell<Instant>,
}

impl Progress {
    /// Time counts from now.
    pub(crate) fn new() -> Self {
        let start = Instant::now();
        Self { start, last: Cell::new(start) }
    }

    /// One line.
    pub(crate) fn say(&self, text: &str) {
        eprintln!("[{:7.2} s] {text}", self.start.elapsed().as_secs_f64());
        self.last.set(Instant::now());
    }

    /// Calls `poll` every `step` until it gives a value, for at most `bound`; says `what` and what `poll` last noted
    /// when there was nothing to read for a while.
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        bound: Duration,
        step: Duration,
        mut poll: impl FnMut(&mut String) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let begun = Instant::now();
        let mut note = String::new();
        loop {
            note.clear();
            if let Some(value) = poll(&mut note)? {
                return Ok(value);
            }
            let colon = if note.is_empty() { "" } else { ": " };
            if begun.elapsed() > bound {
                bail!("gave up waiting for {what} after {} s{colon}{note}", bound.as_secs());
            }
            if self.last.get().elapsed() > SILENCE_MAX {
                self.say(&format!("waiting for {what}{colon}{note}"));
            }
            std::thread::sleep(step);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_value_or_with_the_last_note() {
        let progress = Progress::new();
        let mut count = 0;
        let got = progress.wait_for("three", Duration::from_secs(5), Duration::ZERO, |_| {
            count += 1;
            Ok((count == 3).then_some(count))
        });
        assert_eq!(got.unwrap(), 3);
        let never = progress.wait_for("it", Duration::ZERO, Duration::from_millis(1), |note| {
            note.push_str("Starting");
            Ok(None::<()>)
        });
        assert_eq!(never.unwrap_err().to_string(), "gave up waiting for it after 0 s: Starting");
    }
}

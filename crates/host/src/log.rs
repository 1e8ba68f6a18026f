//! The daemon's log: one line an event, on standard error, where a service manager collects it.

use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes a line with the time of day in front. A closed standard error is no reason to stop.
pub fn line(text: &str) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (s, ms) = (now.as_secs() % 86_400, now.subsec_millis());
    let line = format!("{:02}:{:02}:{:02}.{ms:03} {text}\n", s / 3600, s / 60 % 60, s % 60);
    drop(std::io::stderr().lock().write_all(line.as_bytes()));
}

//! What it costs to protect a machine that does nothing: bytes of log, and bytes on the wire.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::figure::{Figure, Section, Target};
use super::stage::{Material, Stage};
use crate::demo::lab::VM;

/// Time to settle after the boot.
const CALM: Duration = Duration::from_secs(5);
/// The interface through which a host reaches the others.
const UPLINK: &str = "uplink";

/// Bytes that an interface received and sent, and packets likewise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counters {
    bytes: [u64; 2],
    packets: [u64; 2],
}

/// For `seconds`, after the boot.
pub(crate) fn run(dir: &Path, material: &Material, seconds: u32) -> anyhow::Result<Section> {
    let mut section = Section::new("idle");
    let stage = Stage::start(dir, material, true)?;
    let console = stage.shell()?;
    stage.wait_protected()?;
    drop(console);
    std::thread::sleep(CALM);
    stage.progress.say(&format!("watching the idle machine for {seconds} s"));
    let (live, process) = stage.live()?;
    let status = || live.view(VM).context("the live host does not tell the machine's state");
    let generation = status()?.generation;
    let (begun, before) = (Instant::now(), counters(process)?);
    let steps_before = status()?.icount;
    let mut log = 0;
    for _ in 0..seconds {
        std::thread::sleep(Duration::from_secs(1));
        log += status()?.log_bytes_per_s;
    }
    let (after, took) = (counters(process)?, begun.elapsed().as_secs_f64());
    let steps = status()?.icount - steps_before;
    ensure!(status()?.generation == generation, "the machine failed over meanwhile");
    let per_s = |from: u64, to: u64| (to - from) as f64 / took;
    let kbit = |index: usize| per_s(before.bytes[index], after.bytes[index]) * 8.0 / 1000.0;
    let packets = |index: usize| per_s(before.packets[index], after.packets[index]);
    let log = log as f64 * 8.0 / 1000.0 / f64::from(seconds.max(1));
    section.figures = vec![
        Figure::new("log records", log, "kbit/s").aim(Target::AtMost(50.0)),
        Figure::new("on the wire, primary to secondary", kbit(1), "kbit/s"),
        Figure::new("on the wire, secondary to primary", kbit(0), "kbit/s"),
        Figure::new("packets, primary to secondary", packets(1), "/s"),
        Figure::new("packets, secondary to primary", packets(0), "/s"),
        Figure::new("steps of the guest", steps as f64 / took, "/s"),
    ];
    section.notes.push(
        "the wire is all that the primary's interface counts: heartbeats, acknowledgements, Ethernet, IP and TCP headers"
            .to_owned(),
    );
    Ok(section)
}

/// Of the interface to the other hosts, in the network namespace of `process`.
fn counters(process: u32) -> anyhow::Result<Counters> {
    let path = format!("/proc/{process}/net/dev");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse(&text).with_context(|| format!("{path} does not count {UPLINK}"))
}

fn parse(text: &str) -> Option<Counters> {
    let (_, line) = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == UPLINK)?;
    let values: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let at = |index: usize| values.get(index).copied();
    Some(Counters { bytes: [at(0)?, at(8)?], packets: [at(1)?, at(9)?] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_those_of_the_uplink() {
        let text = "Inter-| Receive | Transmit\n face |bytes packets\n    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
                    uplink: 10 20 0 0 0 0 0 0 30 40 0 0 0 0 0 0\n";
        let expected = Counters { bytes: [10, 30], packets: [20, 40] };
        assert_eq!(parse(text), Some(expected));
        assert_eq!(parse("    lo: 1 2"), None);
    }
}

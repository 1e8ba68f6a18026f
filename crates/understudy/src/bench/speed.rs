//! How fast a busy guest runs, without and with a secondary.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::figure::{Figure, Section, Target, listed, median};
use super::stage::{Material, Stage};
use crate::demo::lab::VM;
use crate::demo::net;

/// What [`pin`] does.
const PINNED: &str =
    "taskset: the primary's daemon on CPU 0, the secondary's on CPU 1, in both modes";
/// Time to settle after protection changed.
const CALM: Duration = Duration::from_secs(2);

/// An integer loop in the guest, measured for `seconds` without and with protection, `turns` times each.
pub(crate) fn run(
    dir: &Path,
    material: &Material,
    seconds: u32,
    turns: u32,
) -> anyhow::Result<Section> {
    let mut section = Section::new("speed");
    let stage = Stage::start(dir, material, false)?;
    let mut console = stage.shell()?;
    console.type_line("while :; do :; done &")?;
    console.type_line("echo loop$((40 + 2))runs")?;
    console.wait_for("loop42runs", Duration::from_secs(30))?;
    section.notes.push(PINNED.to_owned());
    let (mut off, mut on) = (Vec::new(), Vec::new());
    let (mut off_cpu, mut on_cpu) = (Vec::new(), Vec::new());
    for turn in 1..=turns {
        if turn > 1 {
            stage.unprotect()?;
        }
        pin(&stage)?;
        std::thread::sleep(CALM);
        let without = measure(&stage, seconds)?;
        stage.protect()?;
        std::thread::sleep(CALM);
        let generation = stage.view()?.generation;
        let with = measure(&stage, seconds)?;
        if stage.view()?.generation != generation {
            let line = format!("turn {turn} does not count: the machine failed over meanwhile");
            stage.progress.say(&line);
            section.notes.push(line);
            stage.wait_protected()?;
            continue;
        }
        stage.progress.say(&format!(
            "turn {turn}: {:.1} million steps a second unprotected, {:.1} protected",
            without.0, with.0
        ));
        off.push(without.0);
        on.push(with.0);
        off_cpu.push(without.1);
        on_cpu.push(with.1);
    }
    let ratio =
        |on: &[f64], off: &[f64]| Some(median(on.iter().copied())? / median(off.iter().copied())?);
    let million = "million/s";
    section.figures = vec![
        Figure::new("steps unprotected, median", median(off.iter().copied()), million),
        Figure::new("steps protected, median", median(on.iter().copied()), million),
        Figure::new("protected / unprotected", ratio(&on, &off), "").aim(Target::AtLeast(0.95)),
        Figure::new("the same per second of the primary's CPU time", ratio(&on_cpu, &off_cpu), ""),
    ];
    section.notes.push(format!("unprotected: {}; protected: {}", listed(&off), listed(&on)));
    Ok(section)
}

/// One core for each replica.
pub(super) fn pin(stage: &Stage) -> anyhow::Result<()> {
    let (live, other) = stage.pair()?;
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    ensure!(cpus > 1, "there is one CPU for both replicas");
    for (cpu, host) in [("0", live.as_str()), ("1", other)] {
        let process = stage.lab.daemon_id(host)?.to_string();
        net::run("taskset", &["-a", "-c", "-p", cpu, &process])?;
    }
    Ok(())
}

/// Million steps in a second of time, and in a second of the primary's CPU time.
fn measure(stage: &Stage, seconds: u32) -> anyhow::Result<(f64, f64)> {
    let (live, process) = stage.live()?;
    let look = || -> anyhow::Result<(u64, Instant, f64)> {
        let steps =
            live.view(VM).context("the live host does not tell the machine's state")?.icount;
        Ok((steps, Instant::now(), cpu_seconds(process)?))
    };
    let before = look()?;
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = look()?;
    let steps = after.0.saturating_sub(before.0) as f64 / 1e6;
    let took = after.1.duration_since(before.1).as_secs_f64();
    Ok((steps / took, steps / (after.2 - before.2).max(0.01)))
}

/// CPU time that a process used.
pub(super) fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse_stat(&text).with_context(|| format!("{path} tells no CPU time"))
}

/// User and system time are fields 14 and 15, in hundredths of a second on every Linux that Rust runs on.
fn parse_stat(text: &str) -> Option<f64> {
    let (_, fields) = text.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    let (user, system) = (times.next()?.ok()?, times.next()?.ok()?);
    Some((user + system) as f64 / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let text = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 1 0 5 6";
        assert!((parse_stat(text).unwrap() - 3.0).abs() < 1e-9);
        assert_eq!(parse_stat("7 (x) S 1"), None);
    }
}

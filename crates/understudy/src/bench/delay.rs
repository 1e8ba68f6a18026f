//! How much later an output leaves when the machine is protected: PING to Redis in a closed loop, without and with.

use std::path::Path;
use std::time::Duration;

use super::figure::{Figure, Section, Target, sorted};
use super::ping;
use super::stage::{Material, Stage};
use crate::demo::lab::{CLIENT, redis_address};
use crate::demo::net;
use crate::demo::report::percentile;

/// Time to settle after protection changed.
const CALM: Duration = Duration::from_secs(2);

/// `requests` without and with protection, `turns` times each, on one connection.
pub(crate) fn run(
    dir: &Path,
    material: &Material,
    requests: u32,
    turns: u32,
) -> anyhow::Result<Section> {
    let mut section = Section::new("delay");
    let stage = Stage::start(dir, material, false)?;
    stage.lab.wait_redis(&stage.progress)?;
    let (mut off, mut on) = (Vec::new(), Vec::new());
    // The stage stays with this thread, the connection with one in the client's namespace.
    let mut connection = net::inside(CLIENT, || ping::open(redis_address()))??;
    for turn in 1..=turns {
        if turn > 1 {
            stage.unprotect()?;
        }
        std::thread::sleep(CALM);
        let without = ping::round_trips_us(&mut connection, requests)?;
        stage.protect()?;
        std::thread::sleep(CALM);
        let with = ping::round_trips_us(&mut connection, requests)?;
        let note = |name: &str, values: &[f64]| {
            let values = sorted(values.iter().copied());
            let [p50, p99] = [50, 99].map(|rank| percentile(&values, rank));
            format!("turn {turn}, {name}: p50 {p50:.0} us, p99 {p99:.0} us")
        };
        for line in [note("unprotected", &without), note("protected", &with)] {
            stage.progress.say(&line);
            section.notes.push(line);
        }
        off.extend(without);
        on.extend(with);
    }
    let (off, on) = (sorted(off), sorted(on));
    for (rank, target) in [(50, Some(300.0)), (99, None)] {
        let (without, with) = (percentile(&off, rank), percentile(&on, rank));
        let added = Figure::new(format!("added delay p{rank}"), with - without, "us");
        section.figures.extend([
            Figure::new(format!("unprotected round trip p{rank}"), without, "us"),
            Figure::new(format!("protected round trip p{rank}"), with, "us"),
            match target {
                Some(limit) => added.aim(Target::AtMost(limit)),
                None => added,
            },
        ]);
    }
    section
        .notes
        .push(format!("{requests} PINGs in each turn, one TCP connection, nothing pinned"));
    Ok(section)
}

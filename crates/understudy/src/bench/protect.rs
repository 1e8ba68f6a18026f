//! What it costs a running machine with much memory in use to become protected, and how long it takes.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::figure::{Figure, Section, Target, largest, listed, median};
use super::ping::{self, Pinger};
use super::stage::{Material, PROTECTED_MAX, Stage};
use crate::demo::fault::Fault;
use crate::demo::lab::{CLIENT, redis_address};
use crate::demo::net;
use crate::demo::rounds::{Cluster, wait_protected};

/// Memory that is written in the guest.
const FILL_MIB: u32 = 300;
/// Time around what is looked at.
const AROUND: Duration = Duration::from_millis(500);

/// Protects a machine `turns` times, then fails its host.
pub(crate) fn run(dir: &Path, material: &Material, turns: u32) -> anyhow::Result<Section> {
    let mut section = Section::new("protect");
    // A host that goes live goes by the definition: it has to want protection, for the kill at the end.
    let mut stage = Stage::start(dir, material, true)?;
    stage.lab.wait_redis(&stage.progress)?;
    stage.wait_protected()?;
    stage.unprotect()?;
    stage.progress.say(&format!("filling {FILL_MIB} MiB of the guest's memory"));
    net::inside(CLIENT, fill)??;
    let pinger = Pinger::start(redis_address())?;
    let turned = turn(&stage, &pinger, turns, &mut section);
    let failed = turned.and_then(|()| fail(&mut stage, &pinger, &mut section));
    if failed.is_err() {
        eprint!("{}", stage.lab.log_tails());
    }
    let whole = failed.and_then(|()| pinger.finish().context("the client's connection broke"));
    section.failure = whole.err().map(|error| host::one_line::flatten(&format!("{error:#}")));
    section.notes.push(format!(
        "512 MiB guest, {FILL_MIB} MiB of it filled with random bytes by Redis SET; PING in a closed loop all the time"
    ));
    Ok(section)
}

fn turn(stage: &Stage, pinger: &Pinger, turns: u32, section: &mut Section) -> anyhow::Result<()> {
    let [mut pauses, mut with, mut without, mut took] = [const { Vec::new() }; 4];
    for turn in 1..=turns {
        if turn > 1 {
            stage.unprotect()?;
            std::thread::sleep(AROUND * 2);
        }
        let begun = Instant::now();
        std::thread::sleep(AROUND);
        let time = stage.protect()?;
        std::thread::sleep(AROUND);
        with.push(pinger.gap_ms(begun));
        let pause = stage.view()?.protect_pause_us.context("the daemon tells no pause")?;
        pauses.push(pause as f64 / 1000.0);
        took.push(time.as_secs_f64());
        stage.unprotect()?;
        std::thread::sleep(AROUND * 2);
        let begun = Instant::now();
        std::thread::sleep(AROUND * 2 + time);
        without.push(pinger.gap_ms(begun));
        stage.progress.say(&format!("turn {turn}: protected after {:.2} s", time.as_secs_f64()));
        stage.protect()?;
    }
    let pause = Figure::new("guest pause, by the daemon, max", largest(pauses.clone()), "ms");
    section.figures.extend([
        pause.aim(Target::AtMost(20.0)),
        Figure::new(
            "longest client gap while protection starts, median",
            median(with.clone()),
            "ms",
        ),
        Figure::new("longest client gap while protection starts, max", largest(with.clone()), "ms"),
        Figure::new("longest client gap without, median", median(without.clone()), "ms"),
        Figure::new("longest client gap without, max", largest(without.clone()), "ms"),
        Figure::new("time to Protected, median", median(took.clone()), "s"),
    ]);
    section.notes.push(format!("guest pauses by the daemon, ms: {}", listed(&pauses)));
    section.notes.push(format!("client gaps with, ms: {}", listed(&with)));
    section.notes.push(format!("client gaps without, ms: {}", listed(&without)));
    section.notes.push(format!("times to Protected, s: {}", listed(&took)));
    Ok(())
}

fn fail(stage: &mut Stage, pinger: &Pinger, section: &mut Section) -> anyhow::Result<()> {
    let from = stage.wait_protected()?.live_host.context("a protected machine has a live host")?;
    std::thread::sleep(AROUND * 2);
    let begun = Instant::now();
    stage.progress.say(&format!("killing {from}"));
    stage.lab.inflict(Fault::Kill, &from)?;
    wait_protected(&stage.lab, Some(&from), PROTECTED_MAX, &stage.progress)?;
    let again = begun.elapsed().as_secs_f64();
    std::thread::sleep(AROUND);
    section.figures.extend([
        Figure::new("Protected again after a kill", again, "s").aim(Target::AtMost(10.0)),
        Figure::new("client gap at the kill", pinger.gap_ms(begun), "ms"),
    ]);
    Ok(())
}

/// Has Redis hold [`FILL_MIB`] of bytes that no two pages of which are alike.
fn fill() -> anyhow::Result<()> {
    let mut connection = ping::open(redis_address())?;
    // What is written here is not looked for again, and the disk is small.
    connection.request(&["CONFIG", "SET", "appendonly", "no"])?;
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for index in 0..FILL_MIB {
        let value: String = (0..1 << 16).map(|_| format!("{:016x}", next(&mut state))).collect();
        connection.request(&["SET", &format!("fill:{index}"), &value])?;
    }
    Ok(())
}

/// Marsaglia's xorshift.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

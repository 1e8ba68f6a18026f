//! What a guest and its clients notice while a secondary is made: all of a disk is copied, or what changed since that host
//! left.
//!
//! # Invariants
//! - INV-MEANWHILE-1: the load comes in pieces; one counts for a copy when the machine was not yet protected at its end, or when
//!   there is no other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::Options;
use super::guests::Guest;
use super::load::{self, Load, Place};
use super::postgres;
use super::tables::{PRIMARY_CPU, SECONDARY_CPU};
use crate::bench::figure::{Figure, Section, median, sorted};
use crate::bench::stage::{Material, PROTECTED_MAX, Stage};
use crate::demo::control::is_protected;
use crate::demo::lab::VM;
use crate::demo::net;

/// Memory of the machine.
const MEMORY: &str = "1G";
/// What the guest's disk has beside an empty database, in MiB: nothing that is left out or gets smaller.
const FILL_MIB: u32 = 500;
/// Redis's requests of a piece, as many of each of two kinds.
const REQUESTS: u32 = 3_000;
/// Writes of a piece.
const WRITES: u32 = 1_500;
/// Pieces before a copy begins.
const PIECES: u32 = 7;
/// Longest that a piece takes, and the fill.
const BOUND: Duration = Duration::from_secs(120);

/// What the guest does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Answers.
    Redis,
    /// Writes to the disk that is copied.
    Writes,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Writes => "writes of 4 KiB",
        }
    }

    /// A piece of it; how much in a second.
    fn piece(self, guest: &mut Guest) -> anyhow::Result<f64> {
        match self {
            Self::Redis => {
                let rate = load::run(Load::Redis, guest, REQUESTS)?;
                Ok(rate.done / rate.seconds.max(0.001))
            }
            Self::Writes => {
                let to = "of=/data/speed bs=4k conv=notrunc oflag=direct";
                let command = format!("dd if=/dev/zero {to} count={WRITES} 2> /dev/null");
                let took = guest.time(&command, BOUND)?;
                Ok(f64::from(WRITES) / took.as_secs_f64().max(0.001))
            }
        }
    }
}

/// A secondary that was made.
struct Copy {
    before: Vec<f64>,
    during: Vec<f64>,
    took: Duration,
    /// What the primary said of it.
    words: String,
}

/// Makes secondaries; see the module documentation.
pub(super) fn run(dir: &Path, material: &Material, _options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("resync");
    let stage = Stage::start_with(dir, material, MEMORY, false)?;
    if let Err(error) = measure(&stage, &mut section) {
        eprint!("{}", stage.lab.log_tails());
        section.failure = Some(host::one_line::flatten(&format!("{error:#}")));
    }
    section.notes.push(format!(
        "{MEMORY} of memory, a mirrored disk of 1 GiB with {FILL_MIB} MiB of noise in it; primary and client on CPU \
         {PRIMARY_CPU}, the new secondary on CPU {SECONDARY_CPU}; a rate is the median of pieces of {REQUESTS} requests of two \
         kinds, or {WRITES} writes, direct and one at a time"
    ));
    Ok(section)
}

fn measure(stage: &Stage, section: &mut Section) -> anyhow::Result<()> {
    postgres::wait_ready(&stage.progress)?;
    let mut guest = Guest::measured(stage)?;
    for (host, cpu) in [("h1", PRIMARY_CPU), ("h2", SECONDARY_CPU), ("h3", SECONDARY_CPU)] {
        let process = stage.lab.daemon_id(host)?.to_string();
        net::run("taskset", &["-a", "-c", "-p", cpu, &process])?;
    }
    stage.progress.say(&format!("filling the disk with {FILL_MIB} MiB"));
    let fill = format!("dd if=/dev/urandom of=/data/fill bs=1M count={FILL_MIB} 2> /dev/null");
    guest.time(&format!("{fill} && sync"), BOUND)?;
    let work = [(Work::Redis, "h2"), (Work::Writes, "h3")];
    for kind in ["whole disk", "what changed"] {
        for (work, host) in work {
            let copy = make(stage, &mut guest, work, host)?;
            let name = |what: &str| format!("{}, {kind}: {what}", work.name());
            let middle = |values: &[f64]| median(values.iter().copied());
            let (before, during) = (middle(&copy.before), middle(&copy.during));
            let ratio = before.zip(during).map(|(before, during)| during / before);
            section.figures.extend([
                Figure::new(name("before"), before, "/s"),
                Figure::new(name("while the secondary is made"), during, "/s"),
                Figure::new(name("ratio"), ratio, ""),
                Figure::new(name("until protected"), copy.took.as_secs_f64(), "s"),
            ]);
            let slowest = sorted(copy.during.iter().copied()).first().copied().unwrap_or(0.0);
            section.notes.push(format!(
                "{}, {kind}: {}; {} pieces meanwhile, the slowest {slowest:.0} /s",
                work.name(),
                copy.words,
                copy.during.len()
            ));
        }
    }
    Ok(())
}

/// Has `host` protect the machine while that works, and gives it up again.
fn make(stage: &Stage, guest: &mut Guest, work: Work, host: &str) -> anyhow::Result<Copy> {
    stage.progress.say(&format!("{} before {host} has the machine", work.name()));
    let mut before = Vec::new();
    for _ in 0..PIECES {
        before.push(work.piece(guest)?);
    }
    let (live, _) = stage.live()?;
    let begun = Instant::now();
    live.protect(VM, Some(host))?;
    let mut during = Vec::new();
    loop {
        let rate = work.piece(guest)?;
        let is_over = is_protected(&stage.view()?);
        if !is_over || during.is_empty() {
            during.push(rate);
        }
        if is_over {
            break;
        }
        anyhow::ensure!(begun.elapsed() < PROTECTED_MAX, "{host} did not protect the machine");
    }
    let took = begun.elapsed();
    let log = stage.lab.log("h1")?;
    let about = format!("disk 0 to {host}: ");
    let words = log.lines().rev().find_map(|line| line.split_once(&about)).map(|(_, words)| words);
    let words = words.context("the primary did not say what it copied")?.to_owned();
    stage.progress.say(&format!("{host} protects it: {words}"));
    stage.unprotect()?;
    Ok(Copy { before, during, took, words })
}

//! `understudy bench`: the product's figures, measured and printed beside what is aimed at; it judges nothing.
//!
//! # Place
//! Called by `main`. Each bench runs in namespaces of its own, made as those of the demo ([`crate::demo::sandbox`]), with
//! the demo's laboratory where it needs hosts. It leaves its figures in a file for the outer process, which prints all.
//!
//! # Invariants
//! - INV-BENCH-1: what is compared is measured in the same run, in turns, on the same machine.
//! - INV-BENCH-2: a figure that could not be measured is printed as such.
//!
//! # Failure
//! A bench that fails is reported with its reason, the others go on, and the exit status is 1. Every wait has a bound,
//! and nothing is left running, as with the demo. A missed target is no failure.

mod comparison;
mod console;
mod delay;
mod engine;
mod faults;
mod figure;
mod idle;
mod io;
mod performance;
mod ping;
mod plot;
mod protect;
mod record;
mod speed;
mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use guest::{GuestBuilder, GuestFiles, GuestKind};
use serde::{Deserialize, Serialize};

use crate::cli;
use crate::demo::fault::Fault;
use crate::demo::progress::Progress;
use crate::demo::{aloud, sandbox};
use figure::{Machine, Report, Section};
use stage::Material;

/// Measure the figures that this project aims at, on this computer.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    which: Which,
    /// Where guests are kept [default: the user's cache directory].
    #[arg(long, value_name = "DIR", global = true)]
    cache: Option<PathBuf>,
    /// Keep state and logs at the end.
    #[arg(long, global = true)]
    keep: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value = "table", global = true)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// How often the live host fails in each way.
#[derive(Debug, Clone, Args)]
struct Counts {
    /// Kills.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1000))]
    kills: u32,
    /// Freezes.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=1000))]
    freezes: u32,
    /// Partitions.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=1000))]
    partitions: u32,
    /// Power losses.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=1000))]
    powers: u32,
}

impl Counts {
    fn jobs(&self) -> impl Iterator<Item = Job> {
        let Self { kills, freezes, partitions, powers } = *self;
        let counts = [kills, freezes, partitions, powers];
        let jobs = Fault::ALL.into_iter().zip(counts).filter(|(_, count)| *count > 0);
        jobs.map(|(fault, count)| Job::Faults { fault, count })
    }
}

/// What is compared with QEMU, and how.
#[derive(Debug, Clone, Args)]
struct EngineArgs {
    /// The engine of `understudy run` [default: its own default].
    #[arg(long, value_name = "NAME")]
    engine: Option<String>,
    /// Also recording and replay, beside QEMU's recording.
    #[arg(long)]
    record: bool,
    /// These workloads only.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = TURNS, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// Measure the CPU time of the machines' processes instead of the time that passes: for a computer that does other
    /// work, too.
    #[arg(long)]
    cpu_time: bool,
    /// Write the result to performance.md, performance.json and performance.svg in this directory, too.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl EngineArgs {
    fn job(&self) -> Job {
        let Self { engine, record, only, turns, cpu_time, out: _ } = self.clone();
        let clock = if cpu_time { engine::Clock::Cpu } else { engine::Clock::Wall };
        Job::Engine(engine::Options { engine, has_record: record, only, turns, clock })
    }
}

#[derive(Debug, Clone, Subcommand)]
enum Which {
    /// Fail the live host again and again: writes lost, connections broken, gaps, time to Protected again.
    Faults(Counts),
    /// Added delay of an output over an unprotected VM.
    Delay {
        /// PINGs in each turn.
        #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
        requests: u32,
    },
    /// Log and wire of an idle guest.
    Idle {
        /// How long it is watched.
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
        seconds: u32,
    },
    /// Protected over unprotected speed of a busy guest.
    Speed {
        /// How long each turn is.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
        seconds: u32,
    },
    /// Pause and time when protection starts, 512 MiB guest.
    Protect,
    /// Speed beside QEMU's TCG.
    Engine(EngineArgs),
    /// Cost of recording, size of the log, replay, going back in time, pause for a snapshot.
    Record(record::RecordArgs),
    /// Protected databases, compilers and networks: the paper's tables, and failovers under load.
    Io(io::IoArgs),
    /// All of them.
    All(Counts),
    /// Set by the bench itself, inside its namespaces.
    #[command(hide = true)]
    Inside {
        /// What to do.
        file: PathBuf,
    },
}

/// How often what is compared is measured.
const TURNS: u32 = 3;

/// One bench, in one set of namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Job {
    Faults { fault: Fault, count: u32 },
    Delay { requests: u32 },
    Idle { seconds: u32 },
    Speed { seconds: u32 },
    Protect,
    Engine(engine::Options),
    Record(record::RecordArgs),
    Io(io::Options),
}

impl Job {
    fn name(&self) -> &'static str {
        match self {
            Self::Faults { fault, .. } => fault.name(),
            Self::Delay { .. } => "delay",
            Self::Idle { .. } => "idle",
            Self::Speed { .. } => "speed",
            Self::Protect => "protect",
            Self::Engine(_) => "engine",
            Self::Record(_) => "record",
            Self::Io(options) => options.part.name(),
        }
    }

    /// The guests that it boots, the one in the laboratory first.
    fn guests(&self) -> &'static [GuestKind] {
        match self {
            Self::Faults { .. } | Self::Delay { .. } | Self::Protect => &[GuestKind::Redis],
            Self::Idle { .. } | Self::Speed { .. } => &[GuestKind::Minimal],
            Self::Engine(_) | Self::Record(_) => {
                &[GuestKind::Minimal, GuestKind::Debian, GuestKind::Bench]
            }
            Self::Io(options) => options.part.guests(),
        }
    }
}

fn jobs(which: &Which) -> Vec<Job> {
    match which {
        Which::Faults(counts) => counts.jobs().collect(),
        Which::Delay { requests } => vec![Job::Delay { requests: *requests }],
        Which::Idle { seconds } => vec![Job::Idle { seconds: *seconds }],
        Which::Speed { seconds } => vec![Job::Speed { seconds: *seconds }],
        Which::Protect => vec![Job::Protect],
        Which::Engine(args) => vec![args.job()],
        Which::Record(args) => vec![Job::Record(args.clone())],
        Which::Io(args) => args.jobs().map(Job::Io).collect(),
        Which::All(counts) => {
            let first = [Job::Delay { requests: 3000 }, Job::Idle { seconds: 30 }];
            let options = engine::Options {
                engine: None,
                has_record: false,
                only: vec![],
                turns: TURNS,
                clock: engine::Clock::Wall,
            };
            let record = Job::Record(record::RecordArgs::default());
            let more = [Job::Speed { seconds: 8 }, Job::Protect, Job::Engine(options), record];
            let io = io::IoArgs::default();
            let more = more.into_iter().chain(io.jobs().map(Job::Io));
            first.into_iter().chain(more).chain(counts.jobs()).collect()
        }
        Which::Inside { .. } => Vec::new(),
    }
}

/// What the outer process hands to the inner one.
#[derive(Debug, Serialize, Deserialize)]
struct Prepared {
    job: Job,
    guests: Vec<GuestFiles>,
    etcd: Option<PathBuf>,
    dir: PathBuf,
}

impl Prepared {
    fn result(&self) -> PathBuf {
        self.dir.join("result.json")
    }
}

/// Measures what `args` ask for and prints it; 0 if everything could be measured.
///
/// # Errors
/// When nothing can be set up, or on an interruption.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    if let Which::Inside { file } = &args.which {
        return run_inside(file);
    }
    let mut jobs = jobs(&args.which);
    if jobs.is_empty() {
        return Err(cli::usage("there is nothing to measure"));
    }
    if let Which::Engine(EngineArgs { only, .. }) | Which::Record(record::RecordArgs { only, .. }) =
        &args.which
    {
        engine::check(only).map_err(cli::usage)?;
    }
    for job in &mut jobs {
        if let Job::Record(args) = job {
            *args = args.clone().with_whole_paths()?;
        }
    }
    let progress = Progress::new();
    let machine = Machine::look();
    sandbox::check()?;
    let cache = args.cache.clone().unwrap_or_else(guest::default_cache_dir);
    let builder = GuestBuilder::new(cache);
    let state = sandbox::StateDir::new(args.keep)?;
    let etcd = if jobs.iter().all(|job| matches!(job, Job::Engine(_) | Job::Record(_))) {
        None
    } else {
        let builder = builder.clone();
        let etcd = aloud(&progress, "looking for etcd, the arbiter", move || builder.etcd())?;
        etcd.map_err(|error| progress.say(&format!("etcd cannot be had: {error}"))).ok()
    };
    let mut sections = Vec::new();
    for job in jobs {
        let dir = state.path().join(job.name());
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let guests = job.guests().iter().map(|kind| {
            let (builder, kind) = (builder.clone(), *kind);
            let what = format!("building the guest {} from Debian's packages", kind.name());
            aloud(&progress, &what, move || builder.build(kind))?.context("build the guest")
        });
        let guests = guests.collect::<anyhow::Result<Vec<_>>>()?;
        let prepared = Prepared { job, guests, etcd: etcd.clone(), dir };
        sections.push(run_outside(&prepared, &progress)?);
    }
    let is_whole = sections.iter().all(|section| section.failure.is_none());
    let report = Report { machine, sections };
    if let Which::Engine(EngineArgs { out: Some(out), .. }) = &args.which {
        performance::write(out, &report)?;
    }
    match args.output {
        Output::Table => cli::print(report.table().trim_end())?,
        Output::Json => cli::print(&serde_json::to_string_pretty(&report)?)?,
    }
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs one bench in its namespaces; what it found, or why it found nothing.
fn run_outside(prepared: &Prepared, progress: &Progress) -> anyhow::Result<Section> {
    progress.say(&format!("bench {}", prepared.job.name()));
    let mut section = Section::new(prepared.job.name());
    let file = prepared.dir.join("prepared.json");
    fs::write(&file, serde_json::to_vec(prepared)?).context("write what was prepared")?;
    let file = file.to_str().context("the path of the temporary directory is not UTF-8")?;
    sandbox::run_inside(&["bench", "inside", file])?;
    // It is there unless the inner process was killed.
    match fs::read(prepared.result()) {
        Ok(text) => Ok(serde_json::from_slice(&text).context("read what was measured")?),
        Err(_) => {
            section.failure = Some("it ended without a result".to_owned());
            Ok(section)
        }
    }
}

fn run_inside(file: &Path) -> anyhow::Result<ExitCode> {
    let text = fs::read(file).context("read what was prepared")?;
    let prepared: Prepared = serde_json::from_slice(&text)?;
    let (name, result) = (prepared.job.name(), prepared.result());
    let section = measure(prepared).unwrap_or_else(|error| {
        let mut section = Section::new(name);
        section.failure = Some(host::one_line::flatten(&format!("{error:#}")));
        section
    });
    fs::write(result, serde_json::to_vec(&section)?).context("write what was measured")?;
    Ok(ExitCode::SUCCESS)
}

fn measure(prepared: Prepared) -> anyhow::Result<Section> {
    let Prepared { job, guests, etcd, dir } = prepared;
    let mut guests = guests.into_iter();
    match job {
        Job::Engine(options) => engine::run(&dir, &machines(&mut guests)?, &options),
        Job::Record(args) => record::run(&dir, &machines(&mut guests)?, &args),
        Job::Faults { fault, count } => {
            faults::run(&dir, &material(&mut guests, etcd)?, fault, count)
        }
        Job::Delay { requests } => delay::run(&dir, &material(&mut guests, etcd)?, requests, TURNS),
        Job::Idle { seconds } => idle::run(&dir, &material(&mut guests, etcd)?, seconds),
        Job::Speed { seconds } => speed::run(&dir, &material(&mut guests, etcd)?, seconds, TURNS),
        Job::Io(options) => io::run(&dir, &material(&mut guests, etcd)?, &options),
        Job::Protect => protect::run(&dir, &material(&mut guests, etcd)?, TURNS),
    }
}

/// The guests of benches without hosts.
fn machines(guests: &mut impl Iterator<Item = GuestFiles>) -> anyhow::Result<engine::Guests> {
    let mut next = || guests.next().context("there is a guest");
    Ok(engine::Guests { minimal: next()?, debian: next()?, bench: next()? })
}

/// What a laboratory is made of.
fn material(
    guests: &mut impl Iterator<Item = GuestFiles>,
    etcd: Option<PathBuf>,
) -> anyhow::Result<Material> {
    Ok(Material { guest: guests.next().context("there is a guest")?, etcd })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parsed(words: &[&str]) -> Vec<Job> {
        let words = std::iter::once("x").chain(words.iter().copied());
        jobs(&Line::try_parse_from(words).unwrap().bench.which)
    }

    #[test]
    fn faults_without_rounds_are_left_out() {
        let kinds = parsed(&["faults", "--kills", "2", "--freezes", "0", "--partitions", "0"]);
        let expected = [(Fault::Kill, 2), (Fault::Power, 20)];
        assert_eq!(kinds, expected.map(|(fault, count)| Job::Faults { fault, count }));
    }

    #[test]
    fn all_measures_everything_once() {
        let names: Vec<&str> = parsed(&["all", "-o", "json"]).iter().map(Job::name).collect();
        let kinds = ["kill", "freeze", "partition", "power"];
        assert_eq!(
            names,
            [
                &["delay", "idle", "speed", "protect", "engine", "record"],
                &["tables", "net", "failover", "disk", "resync"][..],
                &kinds[..]
            ]
            .concat()
        );
    }
}

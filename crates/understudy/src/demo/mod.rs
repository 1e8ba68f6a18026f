//! `understudy demo`: a protected Redis on three hosts of one computer, hurt again and again, before a client's eyes.
//!
//! # Place
//! Called by `main`. Uses the guest builder, and this same program as the hosts' daemon and control command. All that it
//! makes lives in namespaces of its own ([`sandbox`]) and in one directory of temporary files.
//!
//! # Invariants
//! - INV-DEMO-1, INV-DEMO-2 in [`client`].
//! - It ends with success only if no acknowledged write is missing and the client's one connection never broke.
//!
//! # Failure
//! Every wait has a bound; on failure the report so far and the last lines of each host's log are shown.

pub(crate) mod client;
pub(crate) mod control;
pub(crate) mod fault;
pub(crate) mod lab;
pub(crate) mod net;
pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod rounds;
pub(crate) mod sandbox;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use guest::{GuestBuilder, GuestFiles, GuestKind};
use machine::engine::EngineKind;
use serde::{Deserialize, Serialize};

use client::Client;
use fault::FaultChoice;
use lab::{Lab, Plan};
use progress::Progress;

/// Longest wait for the first protection.
const PROTECTED_FIRST_MAX: Duration = Duration::from_secs(120);

/// Protect a Redis server on three hosts made of namespaces, and fail the live one again and again.
#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// How often the live host fails.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How it fails.
    #[arg(long, value_enum, default_value = "all")]
    fault: FaultChoice,
    /// Memory of the machine.
    #[arg(long, default_value = "512M", value_parser = memory_size)]
    memory: String,
    /// Harts (virtual CPUs) of the machine.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    harts: u8,
    /// How long a silent peer counts as alive, in milliseconds.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    detection_ms: u32,
    /// The engine of all hosts, or of some by name, as in h1=jit,h2=interpreter [default: the fastest that a host can have].
    #[arg(long, value_name = "ENGINE|HOST=ENGINE,...", value_parser = engines)]
    engine: Option<Engines>,
    /// One disk that all hosts reach, instead of a copy on each.
    #[arg(long)]
    shared_disk: bool,
    /// Where guests are kept [default: the user's cache directory].
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Keep state and logs at the end.
    #[arg(long)]
    keep: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    /// Set by the demo itself, inside its namespaces.
    #[arg(long, hide = true, value_name = "FILE")]
    inside: Option<PathBuf>,
}

/// Engines by host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Engines(BTreeMap<&'static str, EngineKind>);

impl fmt::Display for Engines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(h, e)| format!("{h}={e}")).collect();
        f.write_str(&parts.join(","))
    }
}

/// Accepts an engine for all hosts, or a list for some.
fn engines(text: &str) -> Result<Engines, String> {
    let kind = |name: &str| name.parse::<EngineKind>().map_err(|e| e.to_string());
    if !text.contains('=') {
        let kind = kind(text)?;
        return Ok(Engines(lab::HOSTS.into_iter().map(|host| (host, kind)).collect()));
    }
    let mut engines = BTreeMap::new();
    for part in text.split(',') {
        let (name, engine) = part.split_once('=').ok_or("HOST=ENGINE,... is expected")?;
        let host = lab::HOSTS.into_iter().find(|host| *host == name);
        let host = host.ok_or(format!("the hosts are {}", lab::HOSTS.join(", ")))?;
        engines.insert(host, kind(engine)?);
    }
    Ok(Engines(engines))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// What the outer process hands to the inner one.
#[derive(Debug, Serialize, Deserialize)]
struct Prepared {
    state_dir: PathBuf,
    guest: GuestFiles,
    etcd: Option<PathBuf>,
}

/// Runs the demo to its end; 0 if nothing was lost and nothing broke, 1 otherwise.
///
/// # Errors
/// When the demo cannot be set up, or is interrupted.
pub(crate) fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    match &args.inside {
        Some(file) => run_inside(&args, file),
        None => run_outside(&args),
    }
}

fn run_outside(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    sandbox::check()?;
    let builder = GuestBuilder::new(args.cache.clone().unwrap_or_else(guest::default_cache_dir));
    let guest = {
        let builder = builder.clone();
        aloud(&progress, "building the guest from Debian's packages", move || {
            builder.build(GuestKind::Redis)
        })?
        .context("build the guest")?
    };
    let etcd = aloud(&progress, "looking for etcd, the arbiter", move || builder.etcd())?;
    let etcd = etcd.map_err(|error| progress.say(&format!("etcd cannot be had: {error}"))).ok();
    let state = sandbox::StateDir::new(args.keep)?;
    let prepared = Prepared { state_dir: state.path().to_owned(), guest, etcd };
    let file = state.path().join("prepared.json");
    fs::write(&file, serde_json::to_vec(&prepared)?).context("write what was prepared")?;
    let words = inner_args(args, &file)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    sandbox::run_inside(&words)
}

fn inner_args(args: &DemoArgs, file: &Path) -> anyhow::Result<Vec<String>> {
    let name = |value: Option<clap::builder::PossibleValue>| value.map(|v| v.get_name().to_owned());
    let file = file.to_str().context("the path of the temporary directory is not UTF-8")?;
    let pairs = [
        ("--rounds", args.rounds.to_string()),
        ("--fault", name(args.fault.to_possible_value()).unwrap_or_default()),
        ("--memory", args.memory.clone()),
        ("--harts", args.harts.to_string()),
        ("--detection-ms", args.detection_ms.to_string()),
        ("--output", name(args.output.to_possible_value()).unwrap_or_default()),
        ("--inside", file.to_owned()),
    ];
    let engine = args.engine.as_ref().map(|engines| ("--engine", engines.to_string()));
    let words = pairs.into_iter().chain(engine).flat_map(|(flag, value)| [flag.to_owned(), value]);
    let shared = args.shared_disk.then(|| "--shared-disk".to_owned());
    Ok(std::iter::once("demo".to_owned()).chain(words).chain(shared).collect())
}

/// Does `work` on a thread of its own, and says `what` while it takes time.
pub(crate) fn aloud<T: Send + 'static>(
    progress: &Progress,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    progress.say(what);
    let (sender, receiver) = channel();
    // Nobody receives only if the demo has ended.
    std::thread::Builder::new().spawn(move || drop(sender.send(work())))?;
    loop {
        match receiver.recv_timeout(Duration::from_millis(1500)) {
            Ok(value) => return Ok(value),
            Err(RecvTimeoutError::Timeout) => progress.say(&format!("still {what}")),
            Err(RecvTimeoutError::Disconnected) => {
                anyhow::bail!("{what}: stopped without a result")
            }
        }
    }
}

fn run_inside(args: &DemoArgs, file: &Path) -> anyhow::Result<ExitCode> {
    let progress = Progress::new();
    let prepared: Prepared =
        serde_json::from_slice(&fs::read(file).context("read what was prepared")?)?;
    let plan = Plan {
        memory: args.memory.clone(),
        harts: args.harts,
        detection_ms: args.detection_ms,
        lag_ms: None,
        is_protected: true,
        has_shared_disk: args.shared_disk,
    };
    let mut lab =
        Lab::new(&prepared.state_dir, prepared.guest, prepared.etcd.as_deref(), plan, &progress)?;
    if let Some(engines) = &args.engine {
        lab.set_engines(engines.0.clone());
    }
    let result = perform(&mut lab, args, &progress);
    if !matches!(result, Ok(code) if code == ExitCode::SUCCESS) {
        eprint!("{}", lab.log_tails());
    }
    result
}

fn perform(lab: &mut Lab, args: &DemoArgs, progress: &Progress) -> anyhow::Result<ExitCode> {
    lab.start(progress)?;
    lab.wait_redis(progress)?;
    rounds::wait_protected(lab, None, PROTECTED_FIRST_MAX, progress)?;
    progress.say("Protected");
    let address = lab::redis_address();
    let client = Client::start(address, || net::enter(lab::CLIENT))?;
    let count_lost = |acked| net::inside(lab::CLIENT, || client::count_lost(address, acked))?;
    let choice = (args.fault, args.rounds);
    let (report, failure) = rounds::run_rounds(lab, client, choice, count_lost, progress);
    match args.output {
        Output::Table => print!("{}", report.table()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(if report.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
    }
}

/// Accepts sizes such as `512M` or `1G`.
fn memory_size(text: &str) -> Result<String, String> {
    let digits = text.strip_suffix(['M', 'G']).unwrap_or_default();
    if !digits.is_empty() && digits.len() <= 6 && digits.bytes().all(|b| b.is_ascii_digit()) {
        Ok(text.to_owned())
    } else {
        Err("a number followed by M or G is expected".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        demo: DemoArgs,
    }

    #[test]
    fn inner_command_line_means_the_same_as_the_outer() {
        let line = [
            "x",
            "--rounds",
            "7",
            "--fault",
            "power",
            "--memory",
            "1G",
            "--harts",
            "2",
            "-o",
            "json",
            "--shared-disk",
            "--engine",
            "h1=jit,h3=interpreter",
        ];
        let outer = Line::try_parse_from(line).unwrap().demo;
        let words = inner_args(&outer, Path::new("/tmp/p")).unwrap();
        let inner = Line::try_parse_from(&words).unwrap().demo;
        assert_eq!(words[0], "demo");
        assert_eq!((inner.rounds, inner.fault, inner.harts), (7, FaultChoice::Power, 2));
        assert_eq!(
            (inner.memory.as_str(), inner.detection_ms, inner.output),
            ("1G", 100, Output::Json)
        );
        assert_eq!(inner.inside.as_deref(), Some(Path::new("/tmp/p")));
        assert!(inner.shared_disk);
        assert_eq!((&inner.engine, inner.engine.is_some()), (&outer.engine, true));
    }

    #[test]
    fn one_engine_is_for_all_hosts() {
        assert_eq!(engines("jit"), engines("h1=jit,h2=jit,h3=jit"));
        assert_eq!(engines("h2=interpreter").unwrap().0.len(), 1);
    }

    #[test]
    fn wrong_values_are_refused() {
        for bad in [
            ["--rounds", "0"],
            ["--memory", "lots"],
            ["--harts", "9"],
            ["--detection-ms", "1"],
            ["--engine", "tcg"],
            ["--engine", "h4=jit"],
            ["--engine", "h1=jit,h2"],
        ] {
            assert!(Line::try_parse_from(["x", bad[0], bad[1]]).is_err(), "{bad:?}");
        }
    }
}

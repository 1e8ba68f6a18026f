//! The four loads, wherever they run: in the guest or beside it, on the host itself.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::pgbench::Told;
use super::postgres::{self, SILENCE_MAX, Session};
use super::tables::CLIENT_CPU;
use crate::demo::lab::CLIENT;
use crate::demo::net;

/// pgbench's scale: a hundred thousand rows each.
pub(super) const SCALE: &str = "10";
/// pgbench's connections.
pub(super) const PGBENCH_CLIENTS: &str = "8";
/// redis-benchmark's connections.
pub(super) const REDIS_CLIENTS: &str = "50";
/// Requests of redis-benchmark that show how many a second there are.
const REDIS_FIRST: u32 = 20_000;
/// Bytes of the values that it sets.
const REDIS_BYTES: &str = "100";

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Load {
    /// A program that computes.
    Compute,
    /// A compiler.
    #[value(name = "gcc")]
    Compile,
    /// PostgreSQL and pgbench.
    #[value(name = "pgbench")]
    Postgres,
    /// Redis and redis-benchmark.
    Redis,
}

impl Load {
    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Compile => "gcc",
            Self::Postgres => "pgbench",
            Self::Redis => "redis",
        }
    }

    /// What is counted.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Compute => "runs/s",
            Self::Compile => "files/s",
            Self::Postgres => "transactions/s",
            Self::Redis => "requests/s",
        }
    }
}

/// What there was of a load in a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate {
    /// How much of it was done.
    pub(super) done: f64,
    /// How long it took.
    pub(super) seconds: f64,
    /// What a client waited for an answer: on average for pgbench, the median for Redis.
    pub(super) latency_ms: Option<f64>,
}

/// Where the programs are on that machine.
#[derive(Debug, Clone)]
pub(super) struct Files {
    /// The program that computes.
    pub(super) kernels: String,
    /// The C file.
    pub(super) work: String,
    /// Where its code goes.
    pub(super) object: String,
}

/// A machine that loads run on.
pub(super) trait Place {
    /// Where its servers listen.
    fn address(&self) -> IpAddr;
    /// Where its programs are.
    fn files(&self) -> Files;
    /// Has its shell run a command; how long that took.
    fn time(&mut self, command: &str, bound: Duration) -> anyhow::Result<Duration>;
}

/// Prepares `load` and has it run for a little; how much of it takes `seconds`.
pub(super) fn warm_up(load: Load, place: &mut dyn Place, seconds: u32) -> anyhow::Result<u32> {
    let first = match load {
        Load::Compute | Load::Compile => 1,
        Load::Postgres => {
            fill(place)?;
            return Ok(seconds);
        }
        Load::Redis => REDIS_FIRST,
    };
    // The first time everything is read, and in the guest translated.
    run(load, place, first)?;
    let rate = run(load, place, first)?;
    let amount = rate.done * f64::from(seconds) / rate.seconds.max(0.001);
    Ok(amount.round().clamp(f64::from(first), 1e9) as u32)
}

/// Runs so much of `load`: times, or seconds of pgbench.
pub(super) fn run(load: Load, place: &mut dyn Place, amount: u32) -> anyhow::Result<Rate> {
    let Files { kernels, work, object } = place.files();
    let times = |what: String| format!("for i in $(seq {amount}); do {what} || exit 1; done");
    let command = match load {
        Load::Compute => times(format!("{kernels} integer > /dev/null")),
        Load::Compile => times(format!("gcc -O2 -c {work} -o {object}")),
        Load::Postgres => return pgbench(place, amount),
        Load::Redis => return redis(place, amount),
    };
    let bound = Duration::from_secs(60) + Duration::from_secs(20) * amount.min(1000);
    let took = place.time(&command, bound)?;
    Ok(Rate { done: f64::from(amount), seconds: took.as_secs_f64(), latency_ms: None })
}

/// A program of the client's that speaks to a place.
fn client(program: &Path, place: &dyn Place) -> anyhow::Result<std::process::Command> {
    let mut command = net::command_in(CLIENT, "taskset");
    command.args(["-c", CLIENT_CPU]).arg(program);
    command.arg("-h").arg(place.address().to_string());
    Ok(command)
}

fn fill(place: &dyn Place) -> anyhow::Result<()> {
    let mut command = client(&postgres::program("pgbench")?, place)?;
    command.args(["-U", postgres::USER, "-i", "-q", "-s", SCALE, postgres::USER]);
    postgres::finish(command).map(drop)?;
    pgbench(place, 3).map(drop)
}

fn pgbench(place: &dyn Place, seconds: u32) -> anyhow::Result<Rate> {
    // So that no turn writes what another one has left.
    let address = place.address();
    net::inside(CLIENT, || {
        Session::open(SocketAddr::new(address, postgres::PORT), SILENCE_MAX)?.query("CHECKPOINT")
    })??;
    let mut command = client(&postgres::program("pgbench")?, place)?;
    command.args(["-U", postgres::USER, "-n", "-c", PGBENCH_CLIENTS, "-j", "1", "-T"]);
    command.args([&seconds.to_string(), postgres::USER]);
    let words = postgres::finish(command)?;
    let told = Told::parse(&words).with_context(|| format!("pgbench told nothing: {words}"))?;
    let done = told.transactions as f64;
    Ok(Rate { done, seconds: done / told.per_second, latency_ms: Some(told.latency_ms) })
}

fn redis(place: &dyn Place, requests: u32) -> anyhow::Result<Rate> {
    let mut command = client(Path::new("redis-benchmark"), place)?;
    command.args(["-c", REDIS_CLIENTS, "-d", REDIS_BYTES, "-r", "100000", "-t", "set,get"]);
    command.args(["-n", &requests.to_string(), "--csv"]);
    let words = postgres::finish(command)?;
    parse_redis(&words, requests).with_context(|| format!("redis-benchmark told nothing: {words}"))
}

/// Lines of name, requests a second, average, least and median latency and more, each in quotation marks.
fn parse_redis(text: &str, requests: u32) -> Option<Rate> {
    let (mut rate, mut count) = (Rate { done: 0.0, seconds: 0.0, latency_ms: None }, 0.0);
    let mut latencies = 0.0;
    for line in text.lines().filter(|line| !line.starts_with("\"test\"")) {
        let mut cells = line.split(',').map(|cell| cell.trim_matches('"'));
        let per_second: f64 = cells.nth(1)?.parse().ok()?;
        let median: f64 = cells.nth(2)?.parse().ok()?;
        rate.done += f64::from(requests);
        rate.seconds += f64::from(requests) / per_second;
        latencies += median;
        count += 1.0;
    }
    rate.latency_ms = (count > 0.0).then(|| latencies / count);
    rate.latency_ms.map(|_| rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tests_of_redis_count() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\"\n\
            \"SET\",\"1000.00\",\"2.5\",\"0.1\",\"2.0\",\"4.0\"\n\"GET\",\"4000.00\",\"0.6\",\"0.1\",\"0.5\",\"1.0\"\n";
        let rate = parse_redis(text, 4000).unwrap();
        assert_eq!((rate.done, rate.seconds, rate.latency_ms), (8000.0, 5.0, Some(1.25)));
        assert_eq!(parse_redis("\"test\",\"rps\"\n", 4000), None);
        assert_eq!(parse_redis("Could not connect to Redis", 4000), None);
    }
}

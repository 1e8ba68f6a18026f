//! Failovers of a machine with PostgreSQL on a mirrored disk, under pgbench's load, with clients that check.
//!
//! # Invariants
//! - INV-TAKEOVER-1: a client whose connection breaks does not make another one.
//! - INV-TAKEOVER-2: whether something is missing is asked of the database only for what a client was told before.

use std::path::Path;

use anyhow::Context;

use super::Options;
use super::ledger::{self, Ledger};
use super::pgbench::{Pgbench, Told};
use super::postgres::{self, SILENCE_MAX, Session, server};
use crate::bench::figure::{Figure, Section, Target, largest, listed, median};
use crate::bench::stage::{Material, Stage};
use crate::demo::client::Watched;
use crate::demo::fault::Fault;
use crate::demo::lab::CLIENT;
use crate::demo::report::Round;
use crate::demo::{net, rounds};

/// Memory of the machine.
const MEMORY: &str = "1G";
/// pgbench's scale: a hundred thousand rows each.
const SCALE: &str = "5";
/// pgbench's connections.
const CLIENTS: &str = "4";
/// Clients that keep the ledger.
const WRITERS: usize = 2;
/// Longer than any run: it is ended by a signal.
const FOREVER_S: &str = "100000";

/// What is checked, and with what.
struct Checks {
    session: Session,
    /// Acknowledged entries that were missing, after all failovers together.
    lost: u64,
    /// How often they were counted.
    count: u32,
}

/// Fails the live host again and again; see the module documentation.
pub(super) fn run(dir: &Path, material: &Material, options: &Options) -> anyhow::Result<Section> {
    let mut section = Section::new("failover");
    let mut stage = Stage::start_prepared(dir, material, (MEMORY, 100), true, |lab| {
        lab.set_lag_ms(options.lag_ms);
        Ok(())
    })?;
    let result = measure(dir, &mut stage, options, &mut section);
    if let Err(error) = result {
        eprint!("{}", stage.lab.log_tails());
        section.failure = Some(host::one_line::flatten(&format!("{error:#}")));
    }
    Ok(section)
}

fn measure(
    dir: &Path,
    stage: &mut Stage,
    options: &Options,
    section: &mut Section,
) -> anyhow::Result<()> {
    postgres::wait_ready(&stage.progress)?;
    stage.progress.say("PostgreSQL answers; filling its tables");
    let mut init = postgres::client("pgbench")?;
    init.args(["-i", "-q", "-s", SCALE, postgres::USER]);
    postgres::finish(init)?;
    let mut session = net::inside(CLIENT, || Session::open(server(), SILENCE_MAX))??;
    for statement in [ledger::TABLE, "CREATE EXTENSION amcheck", "CHECKPOINT"] {
        session.query(statement).context("prepare the database")?;
    }
    stage.wait_protected()?;
    let mut load = postgres::client("pgbench")?;
    load.args(["-n", "-c", CLIENTS, "-j", "1", "-T", FOREVER_S, postgres::USER]);
    let load = Pgbench::start(load, &dir.join("pgbench.log"))?;
    let mut ledger = Ledger::start(server(), WRITERS, || net::enter(CLIENT))?;
    let mut checks = Checks { session, lost: 0, count: 0 };
    let mut done = Vec::new();
    let failed = fail(stage, options.failovers, &ledger, &load, &mut checks, &mut done);
    let aborted = load.clients_aborted();
    let told = load.end(&stage.progress);
    ledger.finish();
    let checked = check(&mut checks, &ledger, told.as_ref().ok());
    section.figures = figures(options.failovers, &done, &ledger, &checks, aborted);
    section.notes.extend(ledger.seen().broken);
    section.notes.push(format!(
        "pgbench -s {SCALE} -c {CLIENTS} and {WRITERS} clients with an INSERT each 2 ms at most; {MEMORY} of memory, a \
         mirrored disk, detection 100 ms; faults in turns: {}",
        Fault::ALL.map(Fault::name).join(", ")
    ));
    failed?;
    let told = told?;
    section.figures.extend(checked?);
    let complaints = amcheck()?;
    section.figures.push(
        Figure::new("complaints of pg_amcheck", complaints as f64, "").aim(Target::AtMost(0.0)),
    );
    section.notes.push(format!(
        "pgbench: {:.0} transactions/s, {:.1} ms on average, failovers included",
        told.per_second, told.latency_ms
    ));
    Ok(())
}

/// All failovers; each one's figures in `done`.
fn fail(
    stage: &mut Stage,
    count: u32,
    ledger: &Ledger,
    load: &Pgbench,
    checks: &mut Checks,
    done: &mut Vec<Round>,
) -> anyhow::Result<()> {
    rounds::wait_answers(ledger, 0, &stage.progress)?;
    for index in 0..count {
        let fault = Fault::ALL[index as usize % Fault::ALL.len()];
        let round = rounds::run_round(&mut stage.lab, ledger, index, fault, &stage.progress);
        done.push(round.with_context(|| format!("failover {}", index + 1))?);
        let acked = ledger.acked();
        let lost = ledger::count_lost(&mut checks.session, &acked).context("count entries")?;
        checks.lost += lost;
        checks.count += 1;
        anyhow::ensure!(lost == 0, "{lost} acknowledged entries are missing");
        if let Some(why) = ledger.seen().broken {
            anyhow::bail!("a connection broke: {why}");
        }
        let aborted = load.clients_aborted();
        anyhow::ensure!(aborted == 0, "pgbench gave {aborted} clients up: {}", load.words());
    }
    Ok(())
}

/// What must hold at the end, when nobody writes any more.
fn check(checks: &mut Checks, ledger: &Ledger, told: Option<&Told>) -> anyhow::Result<Vec<Figure>> {
    let zero = |what: &str, value: Option<i64>| {
        Figure::new(what, value.map(|v| v as f64), "").aim(Target::AtMost(0.0))
    };
    let lost = ledger::count_lost(&mut checks.session, &ledger.acked())?;
    checks.lost += lost;
    checks.count += 1;
    let session = &mut checks.session;
    let history = session.number("SELECT count(*) FROM pgbench_history")?;
    let missing = told.map(|told| i64::try_from(told.transactions).unwrap_or(i64::MAX) - history);
    let sums = session.number(
        "SELECT (SELECT count(DISTINCT s) - 1 FROM (SELECT sum(abalance) AS s FROM pgbench_accounts UNION ALL \
         SELECT sum(bbalance) FROM pgbench_branches UNION ALL SELECT sum(tbalance) FROM pgbench_tellers UNION ALL \
         SELECT sum(delta) FROM pgbench_history) AS sums)",
    )?;
    let mut figures =
        vec![Figure::new("transactions of pgbench", told.map(|t| t.transactions as f64), "")];
    figures.push(zero("of them not in its history", missing.map(i64::abs)));
    figures.push(zero(
        "failed transactions",
        told.map(|t| i64::try_from(t.failed).unwrap_or(i64::MAX)),
    ));
    figures.push(zero("sums of its tables that differ", Some(sums)));
    Ok(figures)
}

/// Looks through all tables and indexes; how many lines it has to say.
fn amcheck() -> anyhow::Result<usize> {
    let mut command = postgres::client("pg_amcheck")?;
    command.args(["--heapallindexed", "--parent-check", "--rootdescend", "-d", postgres::USER]);
    let output = command.output().context("run pg_amcheck")?;
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words);
    let lines = words.lines().filter(|line| !line.trim().is_empty()).count();
    if lines > 0 {
        eprint!("{words}");
    }
    Ok(if output.status.success() { lines } else { lines.max(1) })
}

fn figures(
    wanted: u32,
    done: &[Round],
    ledger: &Ledger,
    checks: &Checks,
    aborted: usize,
) -> Vec<Figure> {
    let gaps: Vec<f64> = done.iter().map(|round| round.gap_ms).collect();
    let again: Vec<f64> = done.iter().map(|round| round.protected_again_s).collect();
    let broken = aborted + usize::from(ledger.seen().broken.is_some());
    let acked: u64 = ledger.acked().iter().sum();
    let checked = (checks.count > 0).then_some(checks.lost as f64);
    let mut figures = vec![
        Figure::new("failovers", done.len() as f64, "").aim(Target::AtLeast(f64::from(wanted))),
        Figure::new("entries acknowledged", acked as f64, ""),
        Figure::new("acknowledged entries lost", checked, "").aim(Target::AtMost(0.0)),
        Figure::new("connections broken", broken as f64, "").aim(Target::AtMost(0.0)),
        Figure::new("client-visible gap p50", median(gaps.iter().copied()), "ms"),
        Figure::new("client-visible gap max", largest(gaps.iter().copied()), "ms"),
        Figure::new("protected again p50", median(again.iter().copied()), "s"),
        Figure::new("protected again max", largest(again), "s"),
    ];
    for fault in Fault::ALL {
        let of: Vec<f64> =
            done.iter().filter(|r| r.fault == fault).map(|r| r.gap_ms.round()).collect();
        if !of.is_empty() {
            let what = format!("gap after {}, p50 of {}", fault.name(), listed(&of));
            figures.push(Figure::new(what, median(of.iter().copied()), "ms"));
        }
    }
    figures
}

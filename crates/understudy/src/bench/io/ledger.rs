//! Clients that write down in the database what they were told, so that a loss shows.
//!
//! # Invariants
//! - INV-LEDGER-1: an entry counts as acknowledged only when its transaction's end was told on the writer's one connection;
//!   there is never a second one.
//! - INV-LEDGER-2: a writer's entries are 1, 2, 3 and so on, so the last one acknowledged stands for all of them, and no
//!   entry can be there twice.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::postgres::{SILENCE_MAX, Session};
use crate::demo::client::{Seen, Watched};

/// Shortest time between two entries of a writer: the load is somebody else's.
const PACE: Duration = Duration::from_millis(2);

/// Table for [`Ledger`].
pub(super) const TABLE: &str = "CREATE TABLE ledger (writer int, entry bigint, at timestamptz DEFAULT now(), \
    PRIMARY KEY (writer, entry))";

/// What the writers have seen.
#[derive(Debug, Default)]
struct Shared {
    seen: Seen,
    /// The last entry acknowledged to each writer.
    acked: Vec<u64>,
}

/// The running writers.
#[derive(Debug)]
pub(super) struct Ledger {
    // Guards what the writers and the bench both use; held for a few instructions only.
    shared: Arc<Mutex<Shared>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Ledger {
    /// Connects `writers` clients and lets them write. `enter` is called on each one's thread first.
    pub(super) fn start(
        address: SocketAddr,
        writers: usize,
        enter: fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let shared = Shared { seen: Seen::default(), acked: vec![0; writers] };
        let (shared, stop) = (Arc::new(Mutex::new(shared)), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        for writer in 0..writers {
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
            let work = move || {
                let ended = enter().and_then(|()| write_until(address, writer, &shared, &stop));
                if let Err(error) = ended {
                    let why = format!("writer {writer}: {error:#}");
                    lock(&shared).seen.broken.get_or_insert(why);
                }
            };
            threads.push(std::thread::Builder::new().name(format!("writer {writer}")).spawn(work)?);
        }
        Ok(Self { shared, stop, threads })
    }

    /// The last entry acknowledged to each writer.
    pub(super) fn acked(&self) -> Vec<u64> {
        lock(&self.shared).acked.clone()
    }

    /// Lets the writers finish what is under way, and stops them.
    pub(super) fn finish(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                lock(&self.shared).seen.broken.get_or_insert("a writer stopped".to_owned());
            }
        }
    }
}

impl Watched for Ledger {
    fn seen(&self) -> Seen {
        lock(&self.shared).seen.clone()
    }

    fn begin_window(&self) {
        lock(&self.shared).seen.begin_window();
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // Nobody waits for them here: a connection may be silent.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_until(
    address: SocketAddr,
    writer: usize,
    shared: &Mutex<Shared>,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let mut session = Session::open(address, SILENCE_MAX).context("connect")?;
    let mut entry = 1;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let statement = format!("INSERT INTO ledger (writer, entry) VALUES ({writer}, {entry})");
        session.query(&statement).with_context(|| format!("entry {entry}"))?;
        let mut shared = lock(shared);
        shared.seen.note_ack(Instant::now());
        if let Some(acked) = shared.acked.get_mut(writer) {
            *acked = entry;
        }
        drop(shared);
        entry += 1;
        std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// How many of the entries that were acknowledged to each writer are not in the table.
pub(super) fn count_lost(session: &mut Session, acked: &[u64]) -> io::Result<u64> {
    let mut lost = 0;
    for (writer, acked) in acked.iter().enumerate() {
        let statement =
            format!("SELECT count(*) FROM ledger WHERE writer = {writer} AND entry <= {acked}");
        let there = u64::try_from(session.number(&statement)?).unwrap_or(0);
        lost += acked.saturating_sub(there);
    }
    Ok(lost)
}

#[cfg(test)]
mod tests {
    use super::super::postgres::tests::numbers;
    use super::*;

    #[test]
    fn entries_that_are_not_there_are_lost_and_later_ones_are_not_gained() {
        let lost = |there: &[i64], acked: &[u64]| {
            let mut session = Session::open(numbers(there), SILENCE_MAX).unwrap();
            count_lost(&mut session, acked).unwrap()
        };
        assert_eq!(lost(&[7, 3], &[7, 3]), 0);
        assert_eq!(lost(&[6, 1], &[7, 3]), 3);
        assert_eq!(lost(&[9, 2], &[7, 3]), 1);
    }

    #[test]
    fn closed_connection_is_broken_and_never_opened_again() {
        let mut ledger = Ledger::start(numbers(&[0, 0]), 1, || Ok(())).unwrap();
        while ledger.seen().broken.is_none() {
            std::thread::yield_now();
        }
        ledger.finish();
        assert_eq!(ledger.acked(), [2]);
        assert!(ledger.seen().broken.unwrap().starts_with("writer 0: entry 3"));
    }
}

//! A closed loop of PING and PONG on one TCP connection, as a client sees the machine.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use crate::demo::client::Connection;
use crate::demo::lab::CLIENT;
use crate::demo::net;

/// Longest wait for an answer.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A connection to the server at `address`, made by a thread that is where the client belongs.
pub(crate) fn open(address: SocketAddr) -> anyhow::Result<Connection> {
    Connection::open(address, SILENCE_MAX).context("connect")
}

fn ping(connection: &mut Connection) -> anyhow::Result<()> {
    let answer = connection.request(&["PING"])?;
    ensure!(answer == "+PONG", "unexpected answer {answer:?}");
    Ok(())
}

/// Times of `count` requests, one after the other, in microseconds.
pub(crate) fn round_trips_us(connection: &mut Connection, count: u32) -> anyhow::Result<Vec<f64>> {
    let one = |_| {
        let begun = Instant::now();
        ping(connection)?;
        Ok(begun.elapsed().as_secs_f64() * 1e6)
    };
    (0..count).map(one).collect()
}

/// A client that goes on and on, and remembers when it had each answer.
#[derive(Debug)]
pub(crate) struct Pinger {
    // Guards what the client's thread and the bench's both use; held for a push or a copy only.
    answers: Arc<Mutex<Vec<Instant>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Pinger {
    /// Connects and begins.
    pub(crate) fn start(address: SocketAddr) -> anyhow::Result<Self> {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopped) = (Arc::clone(&answers), Arc::clone(&stop));
        let work = move || {
            net::enter(CLIENT)?;
            let mut connection = open(address)?;
            while !stopped.load(Ordering::Relaxed) {
                ping(&mut connection)?;
                theirs.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("pinger".into()).spawn(work)?;
        Ok(Self { answers, stop, thread: Some(thread) })
    }

    /// Longest time between two answers, in milliseconds, from the last one before `from` to the last one now.
    pub(crate) fn gap_ms(&self, from: Instant) -> f64 {
        longest_gap_ms(&self.answers.lock().unwrap_or_else(PoisonError::into_inner), from)
    }

    /// Ends it; an error if its connection broke.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the client stopped"))?,
            None => Ok(()),
        }
    }
}

fn longest_gap_ms(answers: &[Instant], from: Instant) -> f64 {
    let first = answers.partition_point(|at| *at < from).saturating_sub(1);
    let pairs = answers[first..].windows(2);
    let gaps = pairs.map(|pair| pair[1].duration_since(pair[0]).as_secs_f64() * 1000.0);
    gaps.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gap_counts_from_the_answer_before_the_window() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let answers = [at(0), at(500), at(510), at(600)];
        assert_eq!(longest_gap_ms(&answers, at(505)).round() as u32, 90);
        assert_eq!(longest_gap_ms(&answers, at(400)).round() as u32, 500);
        assert_eq!(longest_gap_ms(&[], at(0)).round() as u32, 0);
    }
}

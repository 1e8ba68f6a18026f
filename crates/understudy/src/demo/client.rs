//! A client with one TCP connection to Redis that counts what it was told: every write, one after the other.
//!
//! # Invariants
//! - INV-DEMO-1: a write counts as acknowledged only when its answer came on the one connection; there is never a second
//!   connection for writes.
//! - INV-DEMO-2: write number `n` must be answered with list length `n`, so that a lost or a repeated write shows at once.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

/// The list that the client appends to.
const KEY: &str = "acked";
/// Shortest time between two writes, so that a long demo fits the guest's disk.
const PACE: Duration = Duration::from_micros(500);
/// A connection that says nothing for this long counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Elements read at once when verifying.
const CHUNK: u64 = 1000;

/// One connection to a Redis server.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects; an answer that takes longer than `silence_max` is an error.
    pub(crate) fn open(address: SocketAddr, silence_max: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(silence_max))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    fn send(&mut self, words: &[&str]) -> io::Result<()> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.get_mut().write_all(request.as_bytes())
    }

    /// One line of an answer, without its end.
    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection",
            ));
        }
        line.truncate(line.trim_end().len());
        if line.starts_with('-') { Err(io::Error::other(line)) } else { Ok(line) }
    }

    /// Sends a request of any words, and takes a one-line answer.
    pub(crate) fn request(&mut self, words: &[&str]) -> io::Result<String> {
        self.send(words)?;
        self.line()
    }

    fn integer(&mut self) -> io::Result<u64> {
        let line = self.line()?;
        number(&line, ':').ok_or_else(|| io::Error::other(format!("unexpected answer {line:?}")))
    }
}

fn number(line: &str, mark: char) -> Option<u64> {
    line.strip_prefix(mark)?.parse().ok()
}

/// What the client has seen so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Writes acknowledged.
    pub(crate) acked: u64,
    /// Why the connection broke.
    pub(crate) broken: Option<String>,
    last_ack: Option<Instant>,
    gap_max: Duration,
}

/// A client whose answers are watched while hosts fail.
pub(crate) trait Watched {
    /// What it has seen so far.
    fn seen(&self) -> Seen;
    /// Forgets gaps that are over; the time since the last acknowledgement counts on.
    fn begin_window(&self);
}

impl Seen {
    /// A write was acknowledged.
    pub(crate) fn note_ack(&mut self, now: Instant) {
        if let Some(last) = self.last_ack {
            self.gap_max = self.gap_max.max(now.duration_since(last));
        }
        self.last_ack = Some(now);
        self.acked += 1;
    }

    /// See [`Watched::begin_window`].
    pub(crate) fn begin_window(&mut self) {
        self.gap_max = Duration::ZERO;
    }

    /// Longest time between two acknowledgements since [`Self::begin_window`], the one still lasting included.
    pub(crate) fn gap(&self, now: Instant) -> Duration {
        let lasting =
            self.last_ack.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.gap_max.max(lasting)
    }
}

/// The running client; see the module documentation.
#[derive(Debug)]
pub(crate) struct Client {
    // Guards what the client's thread and the demo's both use; held for a few instructions only.
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects and starts to write. `enter` is called on the client's thread first and puts it where it belongs.
    pub(crate) fn start(
        address: SocketAddr,
        enter: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let work = move || {
            let ended = enter().and_then(|()| write_until(address, &shared, &stopped));
            if let Err(error) = ended {
                lock(&shared).broken = Some(format!("broken: {error:#}"));
            }
        };
        let thread = std::thread::Builder::new().name("client".into()).spawn(work)?;
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// Lets it finish the write under way, and stops it.
    pub(crate) fn finish(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            lock(&self.seen).broken.get_or_insert_with(|| "broken: the client stopped".to_owned());
        }
        self.seen()
    }
}

impl Watched for Client {
    fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    fn begin_window(&self) {
        lock(&self.seen).begin_window();
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_until(address: SocketAddr, seen: &Mutex<Seen>, stop: &AtomicBool) -> anyhow::Result<()> {
    let mut connection = Connection::open(address, SILENCE_MAX).context("connect")?;
    let mut next = 1u64;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        connection.send(&["RPUSH", KEY, &next.to_string()])?;
        let length = connection.integer()?;
        ensure!(length == next, "write {next} was answered with {length} entries");
        lock(seen).note_ack(Instant::now());
        next += 1;
        std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// Whether Redis answers at `address`; call it where the client belongs.
pub(crate) fn answers(address: SocketAddr) -> bool {
    let ask = || -> io::Result<String> {
        let mut connection = Connection::open(address, Duration::from_secs(2))?;
        connection.request(&["PING"])
    };
    ask().is_ok_and(|answer| answer == "+PONG")
}

/// Reads everything back through a new connection; how many of the `acked` writes are missing.
pub(crate) fn count_lost(address: SocketAddr, acked: u64) -> anyhow::Result<u64> {
    let mut connection = Connection::open(address, Duration::from_secs(30)).context("connect")?;
    let mut wanted = 1..=acked;
    let mut expected = wanted.next();
    let mut lost = 0;
    let mut at = 0u64;
    loop {
        connection.send(&["LRANGE", KEY, &at.to_string(), &(at + CHUNK - 1).to_string()])?;
        let line = connection.line()?;
        let Some(count) = number(&line, '*') else { bail!("unexpected answer {line:?}") };
        for _ in 0..count {
            connection.line()?;
            let value: u64 =
                connection.line()?.parse().context("a value that was never written")?;
            while expected.is_some_and(|n| n < value) {
                lost += 1;
                expected = wanted.next();
            }
            if expected == Some(value) {
                expected = wanted.next();
            }
        }
        if count < CHUNK {
            return Ok(lost + expected.map_or(0, |n| acked - n + 1));
        }
        at += count;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    /// A server that answers each request with the next of `answers`, then closes.
    fn server(answers: Vec<String>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            for answer in answers {
                if stream.read(&mut buffer).unwrap() == 0 {
                    return;
                }
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        address
    }

    fn list(values: &[u64]) -> String {
        let mut text = format!("*{}\r\n", values.len());
        for value in values.iter().map(u64::to_string) {
            text.push_str(&format!("${}\r\n{value}\r\n", value.len()));
        }
        text
    }

    #[test]
    fn missing_values_are_counted_wherever_they_are() {
        assert_eq!(count_lost(server(vec![list(&[1, 2, 3])]), 3).unwrap(), 0);
        assert_eq!(count_lost(server(vec![list(&[2, 4])]), 5).unwrap(), 3);
        assert_eq!(count_lost(server(vec![list(&[])]), 2).unwrap(), 2);
        assert_eq!(count_lost(server(vec![list(&[])]), 0).unwrap(), 0);
        assert_eq!(count_lost(server(vec![list(&[1, 2, 3])]), 2).unwrap(), 0);
    }

    #[test]
    fn closed_connection_is_broken_and_never_opened_again() {
        let client =
            Client::start(server(vec![":1\r\n".into(), ":2\r\n".into()]), || Ok(())).unwrap();
        let seen = loop {
            let seen = client.seen();
            if seen.broken.is_some() {
                break seen;
            }
            std::thread::yield_now();
        };
        assert_eq!(seen.acked, 2);
        assert_eq!(client.finish().acked, 2);
    }

    #[test]
    fn answer_out_of_turn_is_an_error() {
        let client =
            Client::start(server(vec![":1\r\n".into(), ":3\r\n".into()]), || Ok(())).unwrap();
        while client.seen().broken.is_none() {
            std::thread::yield_now();
        }
        let broken = client.finish().broken.unwrap();
        assert_eq!(broken, "broken: write 2 was answered with 3 entries");
    }

    #[test]
    fn gap_counts_from_the_last_acknowledgement_before_the_window() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut seen = Seen::default();
        seen.note_ack(at(0));
        seen.note_ack(at(50));
        seen.begin_window();
        assert_eq!(seen.gap(at(70)), Duration::from_millis(20));
        seen.note_ack(at(300));
        seen.note_ack(at(310));
        assert_eq!(seen.gap(at(320)), Duration::from_millis(250));
    }
}

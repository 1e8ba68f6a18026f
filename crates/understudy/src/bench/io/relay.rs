//! A log link with a rate and a delay of its own: these kernels can shape a rate, but delay nothing.
//!
//! # Place
//! A namespace between the hosts. Their daemons connect to it; each connection goes on to the host that it is for, and what
//! comes leaves again after half a round trip, in order. The rate is the kernel's, on the relay's cable.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::bench::figure::median;
use crate::demo::lab::{CLIENT, HOSTS};
use crate::demo::net::{self, Station};

const NAME: &str = "relay";
/// Where the hosts find it.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 60);
/// The port that leads to the first host; the next ones to the others, and one more to an echo.
pub(super) const FIRST_PORT: u16 = 7701;
const ECHO_PORT: u16 = 7710;
const ECHO_BEHIND: u16 = 7711;
const PINGS: usize = 300;
/// Pieces that are on their way in one direction.
const PIECES: usize = 256;
const PIECE_BYTES: usize = 64 << 10;
/// How often an idle relay looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);

/// A link as the paper has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Name for people.
    pub(super) name: &'static str,
    rate: &'static str,
    round_trip: Duration,
}

/// The two of the paper's Table 2.
pub(super) const SHAPES: [Shape; 2] = [
    Shape { name: "1 Gbit/s", rate: "1gbit", round_trip: Duration::from_micros(150) },
    Shape { name: "10 Gbit/s", rate: "10gbit", round_trip: Duration::from_micros(90) },
];

/// The running relay; over when dropped.
#[derive(Debug)]
pub(super) struct Relay {
    delay_ns: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl Relay {
    /// Makes it, before the hosts start.
    pub(super) fn start() -> anyhow::Result<Self> {
        net::add_station(NAME, Station::Plain, &format!("{ADDRESS}/24"))?;
        let relay = Self { delay_ns: Arc::default(), is_over: Arc::default() };
        for index in 0..HOSTS.len() {
            let last = u8::try_from(index + 1)?;
            let to = SocketAddr::from((Ipv4Addr::new(10, 77, 0, last), 7700));
            relay.listen(FIRST_PORT + u16::from(last) - 1, to)?;
        }
        relay.listen(ECHO_PORT, SocketAddr::from((ADDRESS, ECHO_BEHIND)))?;
        relay.echo()?;
        Ok(relay)
    }

    fn bind(port: u16) -> anyhow::Result<TcpListener> {
        let listener = net::inside(NAME, || TcpListener::bind((ADDRESS, port)))?;
        let listener = listener.with_context(|| format!("listen on port {port} of the relay"))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    fn accept(&self, port: u16, with: impl Fn(TcpStream) + Send + 'static) -> anyhow::Result<()> {
        let listener = Self::bind(port)?;
        let is_over = Arc::clone(&self.is_over);
        let run = move || {
            if net::enter(NAME).is_err() {
                return;
            }
            while !is_over.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => with(stream),
                    Err(_) => std::thread::sleep(LOOK),
                }
            }
        };
        std::thread::Builder::new().name("relay".to_owned()).spawn(run)?;
        Ok(())
    }

    fn listen(&self, port: u16, to: SocketAddr) -> anyhow::Result<()> {
        let delay = Arc::clone(&self.delay_ns);
        self.accept(port, move |client| {
            // A connection that cannot be made is one that breaks.
            let Ok(server) = TcpStream::connect(to) else { return };
            drop(join(&client, &server, &delay).and_then(|()| join(&server, &client, &delay)));
        })
    }

    fn echo(&self) -> anyhow::Result<()> {
        self.accept(ECHO_BEHIND, |mut stream| {
            let mut byte = [0];
            drop(stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true)));
            while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
        })
    }

    /// Gives the link a shape; says what its round trip is, in microseconds.
    pub(super) fn shape(&self, shape: Shape) -> anyhow::Result<Option<f64>> {
        let tbf = ["qdisc", "replace", "dev", "uplink", "root", "tbf", "rate", shape.rate];
        let more = ["burst", "256kb", "latency", "20ms"];
        net::run("tc", &[&["-n", NAME], &tbf[..], &more[..]].concat())?;
        let half = u64::try_from(shape.round_trip.as_nanos() / 2)?;
        // What the computer takes by itself, for the threads of this relay above all, is a part of it.
        self.delay_ns.store(0, Ordering::Relaxed);
        let bare = self.round_trip()?.unwrap_or(0.0) * 1000.0;
        let delay = half.saturating_sub((bare / 2.0) as u64);
        self.delay_ns.store(delay, Ordering::Relaxed);
        self.round_trip()
    }

    fn round_trip(&self) -> anyhow::Result<Option<f64>> {
        let times = net::inside(CLIENT, || -> std::io::Result<Vec<f64>> {
            let mut stream = TcpStream::connect((ADDRESS, ECHO_PORT))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut times = Vec::new();
            for _ in 0..PINGS {
                let begun = Instant::now();
                stream.write_all(&[1])?;
                stream.read_exact(&mut [0])?;
                times.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            Ok(times)
        })??;
        Ok(median(times))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Passes on what comes from `from`, later.
fn join(from: &TcpStream, to: &TcpStream, delay: &Arc<AtomicU64>) -> std::io::Result<()> {
    let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
    from.set_nonblocking(false)?;
    to.set_nodelay(true)?;
    let delay = Arc::clone(delay);
    let (put, taken) = sync_channel(PIECES);
    std::thread::Builder::new().name("relay-in".to_owned()).spawn(move || take(&mut from, &put))?;
    std::thread::Builder::new()
        .name("relay-out".to_owned())
        .spawn(move || give(&mut to, &taken, &delay))?;
    Ok(())
}

fn take(from: &mut TcpStream, put: &SyncSender<(Instant, Vec<u8>)>) {
    let mut buf = vec![0; PIECE_BYTES];
    while let Ok(len @ 1..) = from.read(&mut buf) {
        if put.send((Instant::now(), buf[..len].to_vec())).is_err() {
            break;
        }
    }
    drop(from.shutdown(Shutdown::Read));
}

fn give(to: &mut TcpStream, taken: &Receiver<(Instant, Vec<u8>)>, delay: &AtomicU64) {
    while let Ok((came, bytes)) = taken.recv() {
        let delay = Duration::from_nanos(delay.load(Ordering::Relaxed));
        let left = delay.saturating_sub(came.elapsed());
        if !left.is_zero() {
            std::thread::sleep(left);
        }
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Write));
}

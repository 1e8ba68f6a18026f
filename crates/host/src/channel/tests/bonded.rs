//! Links with two paths, of which any may break, fall silent or come back.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{LIMIT, good};
use crate::channel::{Dialer, Link, Listener, Received, Route};

/// Frames in each stage of a test.
const FRAMES: u64 = 300;

/// A network between two hosts that may be cut without anybody being told, or broken.
struct Cable {
    address: String,
    is_cut: Arc<AtomicBool>,
    is_broken: Arc<AtomicBool>,
}

impl Cable {
    fn to(peer: SocketAddr) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = door.local_addr().unwrap().to_string();
        let (is_cut, is_broken) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let this = Self { address, is_cut: Arc::clone(&is_cut), is_broken: Arc::clone(&is_broken) };
        std::thread::spawn(move || {
            while let Ok((client, _)) = door.accept() {
                if is_broken.load(Ordering::SeqCst) {
                    continue;
                }
                let server = TcpStream::connect(peer).unwrap();
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let (is_cut, is_broken) = (Arc::clone(&is_cut), Arc::clone(&is_broken));
                    std::thread::spawn(move || pass(&mut from, &mut to, &is_cut, &is_broken));
                }
            }
        });
        this
    }

    fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }

    fn break_it(&self, is_broken: bool) {
        self.is_broken.store(is_broken, Ordering::SeqCst);
    }
}

fn pass(from: &mut TcpStream, to: &mut TcpStream, is_cut: &AtomicBool, is_broken: &AtomicBool) {
    from.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    let mut buf = [0; 4096];
    loop {
        if is_broken.load(Ordering::SeqCst) {
            break;
        }
        if is_cut.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        match from.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => {
                if to.write_all(&buf[..n]).is_err() {
                    break;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    for end in [from, to] {
        drop(end.shutdown(Shutdown::Both));
    }
}

struct Pair {
    cables: [Cable; 2],
    client: Link,
    server: Link,
    sent: u64,
    listener: Listener,
}

impl Pair {
    fn new(is_first_broken: bool) -> Self {
        let listener = super::listener();
        let cables = [0, 1].map(|_| Cable::to(listener.address()));
        let routes = [0, 1].map(|slot: usize| Route::to(&cables[slot].address));
        cables[0].break_it(is_first_broken);
        let dialer =
            Dialer { secret: good(), name: "alpha".into(), timeout: LIMIT, compresses: true };
        let mut routes = routes;
        if is_first_broken {
            // Nobody listens there.
            routes[0] = Route::to("127.0.0.1:1");
        }
        let client = dialer.connect_bonded(&routes, "log").unwrap();
        let server = listener.next(LIMIT).unwrap().unwrap();
        Self { cables, client, server, sent: 0, listener }
    }

    fn wait(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !is_so(self) {
            let paths = (self.client.sender.paths(), self.server.sender.paths());
            assert!(Instant::now() < deadline, "{what}: {paths:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn wait_joined(&self) {
        self.wait("two paths", |p| {
            p.client.sender.paths().len() == 2 && p.server.sender.paths().len() == 2
        });
    }

    fn active(&self) -> (usize, usize) {
        let active = |link: &Link| {
            link.sender.paths().iter().find(|path| path.is_active).map_or(9, |path| path.slot)
        };
        (active(&self.client), active(&self.server))
    }

    /// Sends frames both ways; each arrives once and in order. `middle` is done half-way.
    fn exchange(&mut self, middle: impl FnOnce(&Self)) {
        let mut middle = Some(middle);
        let first = self.sent;
        for at in first..first + FRAMES {
            if at == first + FRAMES / 2 {
                (middle.take().unwrap())(self);
            }
            let payload = at.to_le_bytes().repeat(1 + (at % 50) as usize);
            self.client.sender.send(&payload).unwrap();
            self.server.sender.send(&payload).unwrap();
        }
        self.sent += FRAMES;
        for at in first..self.sent {
            let payload = at.to_le_bytes().repeat(1 + (at % 50) as usize);
            for link in [&mut self.server, &mut self.client] {
                let got = link.receiver.recv(Some(LIMIT)).unwrap();
                assert!(got == Received::Frame(payload.clone()), "frame {at}: {got:?}");
            }
        }
    }
}

#[test]
fn first_path_may_fall_silent_and_nobody_notices() {
    let mut pair = Pair::new(false);
    pair.wait_joined();
    pair.exchange(|_| {});
    pair.exchange(|pair| pair.cables[0].cut(true));
    // Which one is in use now is a matter of time: on a busy computer the good one may seem silent for a moment.
    assert!(pair.client.sender.switches() > 0);
    pair.exchange(|_| {});
    // What was under way on it comes late, and is not handed out again.
    pair.cables[0].cut(false);
    pair.exchange(|_| {});
    pair.exchange(|pair| pair.cables[1].cut(true));
}

#[test]
fn paths_break_and_come_back_while_the_link_goes_on() {
    let mut pair = Pair::new(false);
    for turn in 0..4 {
        pair.wait_joined();
        let broken = turn % 2;
        pair.exchange(|pair| pair.cables[broken].break_it(true));
        pair.exchange(|_| {});
        pair.cables[broken].break_it(false);
    }
}

#[test]
fn second_path_serves_when_the_first_cannot_be_had() {
    let mut pair = Pair::new(true);
    pair.exchange(|_| {});
    assert_eq!(pair.active(), (1, 1));
    assert_eq!(pair.client.sender.paths().len(), 1);
}

#[test]
fn end_of_both_paths_is_the_end_at_once() {
    let mut pair = Pair::new(false);
    pair.wait_joined();
    pair.exchange(|_| {});
    pair.client.sender.abort();
    let begun = Instant::now();
    let end = pair.server.receiver.recv(Some(LIMIT)).unwrap();
    assert_eq!(end, Received::Closed { is_clean: false });
    assert!(begun.elapsed() < LIMIT);
    let mut pair = Pair::new(false);
    pair.wait_joined();
    pair.exchange(|_| {});
    drop(pair.client);
    let end = pair.server.receiver.recv(Some(LIMIT)).unwrap();
    assert_eq!(end, Received::Closed { is_clean: true });
}

#[test]
fn stranger_to_the_link_cannot_join_it() {
    let pair = Pair::new(false);
    pair.wait_joined();
    let dialer = Dialer { secret: good(), name: "alpha".into(), timeout: LIMIT, compresses: false };
    let purpose = format!("join:{}", "0".repeat(26));
    let mut link =
        dialer.connect(&[Route::to(&pair.listener.address().to_string())], &purpose).unwrap();
    let end = link.receiver.recv(Some(LIMIT)).unwrap();
    assert!(matches!(end, Received::Closed { .. }), "{end:?}");
}

//! passt: a network for a VM without any right on the host; its connections are those of a process of the user's.
//!
//! # Place
//! Started with the VM's devices; the run loop writes packets, a reader thread waits for them, as with a tap. passt speaks
//! QEMU's framing on a stream socket: length as `u32`, big endian, then an Ethernet frame. It knows no headers, so what a
//! packet leaves undone is done here, by [`crate::offload`].
//!
//! # Invariants
//! - INV-PASST-1: passt ends with the VM: it serves one connection, whose other end nobody else has.
//! - INV-PASST-2: a frame goes whole or not at all, and nothing waits for passt to take one.
//!
//! # Failure
//! What passt has no room for is dropped and counted. If passt ends, the guest's network is dead, and its last words are in
//! the error.
//!
//! # References
//! passt(1).

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machine::offload::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, Work, frame};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};
use serde::Deserialize;

use crate::announce::{Mac, arp_request};
use crate::offload::finish;
use crate::tap::TapWaker;

const PROGRAM: &str = "passt";
/// How long passt may take to say that it serves; it says nothing if nobody asks.
const START_TIME_MAX: Duration = Duration::from_secs(2);
/// How much the kernel keeps for a side that is slower.
const SOCKET_BYTES: usize = 4 << 20;
const LENGTH_BYTES: usize = 4;
/// What passt said last, for when it ends.
const WORDS_LINES_MAX: usize = 4;
const WORD_BYTES_MAX: u64 = 400;
/// Most ports that are forwarded.
pub const PORTS_MAX: usize = 64;

/// Why there is no passt.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error(
        "passt is not installed: install Debian's package passt, or give the VM a tap or a bridge"
    )]
    NotInstalled,
    /// The system refused.
    #[error("cannot {action} passt")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It ended.
    #[error("passt ended: {words}")]
    Ended {
        /// What it said last.
        words: String,
    },
}

/// Protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to one of the guest: `HOST:GUEST`, `ADDRESS:HOST:GUEST`, with `/udp` behind it or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortForward {
    /// Address of the host; all of them when there is none.
    pub address: Option<IpAddr>,
    /// Port of the host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl FromStr for PortForward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let text: String = text.chars().take(60).collect();
            format!(
                "{text:?} is not of the form HOST:GUEST or ADDRESS:HOST:GUEST, such as 8022:22, with /udp for UDP"
            )
        };
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(wrong()),
        };
        let (host, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let (address, host) = match host.rsplit_once(':') {
            None => (None, host),
            Some((address, host)) => {
                let plain = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let address = plain.unwrap_or(address).parse().map_err(|_| wrong())?;
                (Some(address), host)
            }
        };
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0).ok_or_else(wrong);
        Ok(Self { address, host: port(host)?, guest: port(guest)?, protocol })
    }
}

impl<'de> Deserialize<'de> for PortForward {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for PortForward {
    /// As passt's options have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}/")?;
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

/// A running passt. Clones share it.
#[derive(Debug, Clone)]
pub struct Passt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    child: Child,
    words: Arc<Mutex<VecDeque<String>>>,
    /// The end of a frame that the socket had room for in part. The run loop alone writes, so nobody waits for this lock.
    rest: Mutex<Vec<u8>>,
    dropped: AtomicU64,
}

impl Drop for Shared {
    /// It ends by itself when its connection does; this one does not wait for that long.
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Passt {
    /// Starts passt for the guest with this address, and waits until it serves.
    ///
    /// # Errors
    /// See [`PasstError`].
    pub fn start(mac: Mac, ports: &[PortForward]) -> Result<Self, PasstError> {
        let fail = |action| move |source| PasstError::Io { action, source };
        let (ours, theirs) = UnixStream::pair().map_err(fail("make a socket for"))?;
        let mut command = Command::new(PROGRAM);
        // Its standard input is the guest: so it is inherited by this process alone, and by no other child.
        command.args(["--foreground", "--fd", "0"]).stdin(OwnedFd::from(theirs));
        for port in ports {
            let option = if port.protocol == Protocol::Tcp { "-t" } else { "-u" };
            command.arg(option).arg(port.to_string());
        }
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/bin:/usr/sbin";
        command.env("PATH", path).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => PasstError::NotInstalled,
            _ => PasstError::Io { action: "run", source: e },
        })?;
        drop(command);
        let words = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(pipe) = child.stderr.take() {
            let words = Arc::clone(&words);
            let listen = move || gather(pipe, &words);
            let spawned = std::thread::Builder::new().name("passt-words".to_owned()).spawn(listen);
            spawned.map_err(fail("listen to"))?;
        }
        let shared = Shared {
            stream: ours,
            child,
            words,
            rest: Mutex::default(),
            dropped: AtomicU64::new(0),
        };
        sockopt::set_socket_send_buffer_size(&shared.stream, SOCKET_BYTES)
            .map_err(|e| fail("make room for")(e.into()))?;
        let passt = Self { shared: Arc::new(shared) };
        passt.wait_ready(mac)?;
        passt.shared.stream.set_nonblocking(true).map_err(fail("set up"))?;
        Ok(passt)
    }

    /// Asks it who has an address, which it answers for every address but the guest's.
    fn wait_ready(&self, mac: Mac) -> Result<(), PasstError> {
        let fail = |action| move |source| PasstError::Io { action, source };
        let begun = Instant::now();
        let mut stream = &self.shared.stream;
        stream.set_read_timeout(Some(START_TIME_MAX)).map_err(fail("set up"))?;
        self.send(&arp_request(mac)).map_err(fail("ask"))?;
        let mut answer = [0; LENGTH_BYTES + 42];
        match stream.read_exact(&mut answer) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                // It runs, and has its reasons.
            }
            Err(_) => return Err(self.ended(begun)),
        }
        let length = u32::from_be_bytes([answer[0], answer[1], answer[2], answer[3]]);
        let mut more = vec![0; (length as usize).clamp(42, FRAME_BYTES_MAX) - 42];
        stream.read_exact(&mut more).map_err(|_| self.ended(begun))
    }

    /// The error for a passt that closed its connection; its words may come a little later.
    fn ended(&self, begun: Instant) -> PasstError {
        let pause = Duration::from_millis(100).saturating_sub(begun.elapsed());
        std::thread::sleep(pause);
        let words: Vec<String> = lock(&self.shared.words).iter().cloned().collect();
        let words =
            if words.is_empty() { "it did not say why".to_owned() } else { words.join("; ") };
        PasstError::Ended { words }
    }

    /// Sends a packet, or drops it when passt has no room. Whether it was sent, all of it.
    ///
    /// # Errors
    /// [`PasstError`].
    pub fn write(&self, packet: &[u8]) -> Result<bool, PasstError> {
        let Ok(work) = Work::of(packet) else {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        };
        let fail = |source| PasstError::Io { action: "write to", source };
        if let Work::None | Work::Good = work {
            return self.send(frame(packet)).map_err(fail);
        }
        let mut all = true;
        for packet in finish(packet, &work) {
            all &= self.send(frame(&packet)).map_err(fail)?;
        }
        Ok(all)
    }

    fn send(&self, frame: &[u8]) -> io::Result<bool> {
        let mut rest = lock(&self.shared.rest);
        if !rest.is_empty() {
            let sent = self.send_some(&rest)?;
            rest.drain(..sent);
        }
        if !rest.is_empty() {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        }
        let length = u32::try_from(frame.len()).unwrap_or(0).to_be_bytes();
        rest.extend_from_slice(&length);
        rest.extend_from_slice(frame);
        match self.send_some(&rest)? {
            0 => {
                rest.clear();
                self.shared.dropped.fetch_add(1, Ordering::Relaxed);
                Ok(false)
            }
            // The receiver waits for what is left of the frame.
            sent => {
                rest.drain(..sent);
                Ok(true)
            }
        }
    }

    fn send_some(&self, bytes: &[u8]) -> io::Result<usize> {
        match send(&self.shared.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => Ok(sent),
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Frames that were dropped.
    #[must_use]
    pub fn dropped_count(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// A reader for a thread of its own, and what wakes it.
    ///
    /// # Errors
    /// [`PasstError::Io`]: no more descriptors.
    pub fn reader(&self) -> Result<(PasstReader, TapWaker), PasstError> {
        let fail = |source| PasstError::Io { action: "make a waker for", source };
        let (waker, stop) = TapWaker::new().map_err(fail)?;
        let buf = Vec::with_capacity(1 << 16);
        Ok((PasstReader { passt: self.clone(), stop, buf, taken: 0, packet: Vec::new() }, waker))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the last lines that passt says until it ends.
fn gather(pipe: ChildStderr, words: &Mutex<VecDeque<String>>) {
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        match pipe.by_ref().take(WORD_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        let line = String::from_utf8_lossy(&line);
        let line: String = line.trim().chars().filter(|c| !c.is_control()).collect();
        // Where there is no syslog it complains about that in each second line.
        if line.is_empty() || line.contains("to syslog") {
            continue;
        }
        let mut words = lock(words);
        if words.len() == WORDS_LINES_MAX {
            words.pop_front();
        }
        words.push_back(line);
    }
}

/// Waits for packets.
#[derive(Debug)]
pub struct PasstReader {
    passt: Passt,
    stop: Arc<OwnedFd>,
    buf: Vec<u8>,
    /// Bytes of `buf` that were handed out.
    taken: usize,
    packet: Vec<u8>,
}

impl PasstReader {
    /// The next packet, or none once the reader was woken.
    ///
    /// # Errors
    /// [`PasstError`].
    pub fn next_packet(&mut self) -> Result<Option<&[u8]>, PasstError> {
        let length = loop {
            if let Some(length) = self.whole_frame()? {
                break length;
            }
            if !self.fill()? {
                return Ok(None);
            }
        };
        let start = self.taken + LENGTH_BYTES;
        self.packet.clear();
        self.packet.resize(HEADER_BYTES, 0);
        self.packet.extend_from_slice(&self.buf[start..start + length]);
        self.taken = start + length;
        Ok(Some(&self.packet))
    }

    /// Length of the frame that is next, once it is here.
    fn whole_frame(&mut self) -> Result<Option<usize>, PasstError> {
        let rest = &self.buf[self.taken..];
        let Some(head) = rest.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*head) as usize;
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
            let words = format!("it sent a frame of {length} bytes");
            return Err(PasstError::Ended { words });
        }
        Ok((rest.len() >= LENGTH_BYTES + length).then_some(length))
    }

    /// Reads what there is, once there is some; false when the reader was woken.
    fn fill(&mut self) -> Result<bool, PasstError> {
        let fail = |source| PasstError::Io { action: "read from", source };
        self.buf.drain(..self.taken);
        self.taken = 0;
        let had = self.buf.len();
        loop {
            self.buf.resize(had + FRAME_BYTES_MAX, 0);
            match (&self.passt.shared.stream).read(&mut self.buf[had..]) {
                Ok(0) => return Err(self.passt.ended(Instant::now())),
                Ok(read) => {
                    self.buf.truncate(had + read);
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.buf.truncate(had),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(self.passt.ended(Instant::now()));
                }
                Err(source) => return Err(fail(source)),
            }
            let mut fds = [
                PollFd::new(&self.passt.shared.stream, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(fail(e.into())),
            }
            if !fds[1].revents().is_empty() {
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_written_by_people() {
        let read =
            |text: &str| text.parse::<PortForward>().map(|port| (port.to_string(), port.protocol));
        assert_eq!(read("8022:22"), Ok(("8022:22".to_owned(), Protocol::Tcp)));
        assert_eq!(read("127.0.0.1:8080:80"), Ok(("127.0.0.1/8080:80".to_owned(), Protocol::Tcp)));
        assert_eq!(read("[::1]:8080:80/tcp"), Ok(("::1/8080:80".to_owned(), Protocol::Tcp)));
        assert_eq!(read("5353:53/udp"), Ok(("5353:53".to_owned(), Protocol::Udp)));
        for wrong in ["", "22", "0:22", "8022:0", "70000:22", "a:1:2", "1:2:3", "1:2/sctp", ":1:2"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}

//! Tap devices: packets ([`machine::offload`]) between a guest and the host's network.
//!
//! # Place
//! The run loop writes packets; a reader thread of its own waits in [`TapReader::next_packet`] until one comes or it is
//! woken by a [`TapWaker`]. The kernel does what a packet leaves undone, or leaves it undone where nobody needs it, as
//! on the way to another guest. Where it has no headers on taps, [`crate::offload`] does it here.
//!
//! # Invariants
//! - INV-TAP-1: what comes in has no more work left than [`Tap::set_offloads`] said last, none before the first call,
//!   but for what was under way.
//!
//! # Failure
//! A packet that the kernel has no room for is dropped and counted, as on any network. Everything else is a
//! [`TapError`] that names the interface. The interface goes away with its last descriptor unless it is persistent.
//!
//! # References
//! Linux `Documentation/networking/tuntap.rst`; netdevice(7).
#![expect(unsafe_code, reason = "taps have ioctls that no safe wrapper has")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};

use machine::offload::{FRAME_BYTES_MAX, HEADER_BYTES, Offloads, Work, frame};

use crate::macvtap::Made;
use crate::offload::finish;
use crate::one_line::flatten;

const DEVICE: &str = "/dev/net/tun";

/// Why a tap does not work.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is no interface name.
    #[error("{0}")]
    BadName(String),
    /// The system refused.
    #[error("cannot {action} tap {name}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The interface.
        name: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel receives nothing for the guest there.
    #[error(
        "macvtap {name} has the MAC address {found}, the guest has {wanted}: give the guest that of the interface, by mac"
    )]
    OtherAddress {
        /// The interface.
        name: String,
        /// Its address.
        found: String,
        /// The guest's.
        wanted: String,
    },
    /// `ip` refused.
    #[error("`ip {arguments}` failed: {reason}")]
    Ip {
        /// What it was called with.
        arguments: String,
        /// What it said.
        reason: String,
    },
}

/// Checks the name of an interface: 1 to 15 letters, digits, `-`, `_` or `.`, not starting with `-` or `.`.
///
/// # Errors
/// One line.
pub fn check_interface_name(name: &str) -> Result<(), String> {
    let all = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if all && (1..=15).contains(&name.len()) && !name.starts_with(['-', '.']) {
        return Ok(());
    }
    let name: String = name.chars().take(40).collect();
    Err(format!("interface name {name:?} is not 1 to 15 letters, digits, '-', '_' or '.'"))
}

/// An open tap. Clones share it.
#[derive(Debug, Clone)]
pub struct Tap {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    name: String,
    /// The kernel reads and writes packets, not frames.
    has_headers: bool,
    is_macvtap: bool,
    dropped: AtomicU64,
    /// Deletes an interface that was made here; after the file is closed.
    _made: Option<Made>,
}

impl Tap {
    /// Creates the tap, or attaches to an existing one of that name.
    ///
    /// # Errors
    /// See [`TapError`]; it takes CAP_NET_ADMIN, or a persistent tap that belongs to the user.
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_interface_name(name).map_err(TapError::BadName)?;
        let fail = |action, source| TapError::Io { action, name: name.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(DEVICE).map_err(|e| fail("open /dev/net/tun for", e))?;
        let has_headers =
            can_have_headers(&file).map_err(|e| fail("ask for the features of", e))?;
        Self::attach(file, name, has_headers)
    }

    fn attach(file: File, name: &str, has_headers: bool) -> Result<Self, TapError> {
        let fail = |action, source| TapError::Io { action, name: name.to_owned(), source };
        set_interface(&file, name, has_headers).map_err(|e| fail("create or attach to", e))?;
        Self::set_up(file, name, has_headers, false, None)
    }

    /// A tap of the device of a macvtap.
    pub(crate) fn of_macvtap(file: File, name: &str, made: Option<Made>) -> Result<Self, TapError> {
        let fail =
            |source| TapError::Io { action: "set the headers of", name: name.to_owned(), source };
        let has_headers = can_have_headers(&file).map_err(fail)?;
        // Of what this says about the interface, only the flags are looked at.
        set_interface(&file, name, has_headers).map_err(fail)?;
        Self::set_up(file, name, has_headers, true, made)
    }

    fn set_up(
        file: File,
        name: &str,
        has_headers: bool,
        is_macvtap: bool,
        made: Option<Made>,
    ) -> Result<Self, TapError> {
        let fail = |action, source| TapError::Io { action, name: name.to_owned(), source };
        if has_headers {
            set_headers(&file).map_err(|e| fail("set the headers of", e))?;
        }
        let (name, dropped) = (name.to_owned(), AtomicU64::new(0));
        let shared = Shared { file, name, has_headers, is_macvtap, dropped, _made: made };
        let tap = Self { shared: Arc::new(shared) };
        // A persistent tap has those of its last user.
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Says what packets that come in may leave undone.
    ///
    /// # Errors
    /// [`TapError::Io`].
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        if !self.shared.has_headers {
            return Ok(());
        }
        let mut flags = 0;
        let wanted = [
            (true, libc::TUN_F_CSUM),
            (offloads.tcp4, libc::TUN_F_TSO4),
            (offloads.tcp6, libc::TUN_F_TSO6),
        ];
        for (_, flag) in wanted.iter().filter(|(is_on, _)| *is_on && offloads.checksum) {
            flags |= flag;
        }
        // SAFETY: the descriptor is open as long as the file is, and TUNSETOFFLOAD takes a number, no pointer.
        let result = unsafe {
            libc::ioctl(
                self.shared.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        };
        if result < 0 {
            return Err(self.io_error("set the offloads of", io::Error::last_os_error()));
        }
        Ok(())
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether the interface has the guest's MAC address, and so has to be down wherever the guest is not.
    #[must_use]
    pub fn is_macvtap(&self) -> bool {
        self.shared.is_macvtap
    }

    /// Brings the interface up, which takes no right if it is.
    ///
    /// # Errors
    /// [`TapError::Io`].
    pub fn bring_up(&self) -> Result<(), TapError> {
        bring_up(self.name()).map_err(|e| self.io_error("bring up", e))
    }

    /// Attaches the interface to a bridge.
    ///
    /// A bridge takes the lowest address of its ports for its own unless it was given one: the tap gets a high one, or
    /// the host's own address would change with each VM that comes and goes, and its peers would not reach it until
    /// they ask for it again.
    ///
    /// # Errors
    /// [`TapError::BadName`] or [`TapError::Ip`].
    pub fn attach_to_bridge(&self, bridge: &str) -> Result<(), TapError> {
        check_interface_name(bridge).map_err(TapError::BadName)?;
        let mut low = [0; 5];
        rustix::rand::getrandom(&mut low, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| self.io_error("draw an address for", e.into()))?;
        let [a, b, c, d, e] = low;
        let address = format!("fe:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}");
        ip(&["link", "set", "dev", self.name(), "address", &address, "master", bridge])
    }

    /// Sends a packet, or drops it when the kernel has no room. Whether it was sent, all of it.
    ///
    /// # Errors
    /// [`TapError::Io`]; what is no packet is dropped without one.
    pub fn write(&self, packet: &[u8]) -> Result<bool, TapError> {
        let Ok(work) = Work::of(packet) else {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(false);
        };
        if self.shared.has_headers {
            return self.write_bytes(packet);
        }
        if let Work::None | Work::Good = work {
            return self.write_bytes(frame(packet));
        }
        let mut all = true;
        for packet in finish(packet, &work) {
            all &= self.write_bytes(frame(&packet))?;
        }
        Ok(all)
    }

    fn write_bytes(&self, bytes: &[u8]) -> Result<bool, TapError> {
        match (&self.shared.file).write(bytes) {
            Ok(_) => Ok(true),
            Err(e) if is_frame_error(&e) => {
                self.shared.dropped.fetch_add(1, Ordering::Relaxed);
                Ok(false)
            }
            Err(source) => Err(self.io_error("write to", source)),
        }
    }

    /// Packets, or frames, that were dropped.
    #[must_use]
    pub fn dropped_count(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// A reader for a thread of its own, and what wakes it.
    ///
    /// # Errors
    /// [`TapError::Io`]: no more descriptors.
    pub fn reader(&self) -> Result<(TapReader, TapWaker), TapError> {
        let (waker, stop) = TapWaker::new().map_err(|e| self.io_error("make a waker for", e))?;
        let buf = vec![0; HEADER_BYTES + FRAME_BYTES_MAX];
        Ok((TapReader { tap: self.clone(), stop, buf }, waker))
    }

    fn io_error(&self, action: &'static str, source: io::Error) -> TapError {
        TapError::Io { action, name: self.shared.name.clone(), source }
    }
}

/// Errors of a write that concern the frame or the moment, not the tap: no room, a frame that is no frame, and an
/// interface that is down.
fn is_frame_error(e: &io::Error) -> bool {
    const FRAME: [Errno; 6] =
        [Errno::AGAIN, Errno::INVAL, Errno::NOBUFS, Errno::NOMEM, Errno::IO, Errno::MSGSIZE];
    e.kind() == io::ErrorKind::Interrupted
        || FRAME.iter().any(|errno| Some(errno.raw_os_error()) == e.raw_os_error())
}

/// Waits for packets.
#[derive(Debug)]
pub struct TapReader {
    tap: Tap,
    stop: Arc<OwnedFd>,
    buf: Vec<u8>,
}

impl TapReader {
    /// The next packet, or none once the reader was woken.
    ///
    /// # Errors
    /// [`TapError::Io`].
    pub fn next_packet(&mut self) -> Result<Option<&[u8]>, TapError> {
        // Without headers from the kernel the place of the header stays all zeroes: nothing is left to do.
        let start = if self.tap.shared.has_headers { 0 } else { HEADER_BYTES };
        let len = loop {
            match (&self.tap.shared.file).read(&mut self.buf[start..]) {
                Ok(len) => break len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(source) => return Err(self.tap.io_error("read from", source)),
            }
            let mut fds = [
                PollFd::new(&self.tap.shared.file, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(self.tap.io_error("wait for", e.into())),
            }
            if !fds[1].revents().is_empty() {
                return Ok(None);
            }
            if fds[0].revents().contains(PollFlags::ERR) {
                // The interface is down or gone; read says which.
                match (&self.tap.shared.file).read(&mut self.buf[start..]) {
                    Ok(len) => break len,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(source) => return Err(self.tap.io_error("read from", source)),
                }
            }
        };
        Ok(Some(&self.buf[..start + len]))
    }
}

/// Wakes a reader, for good.
#[derive(Debug, Clone)]
pub struct TapWaker {
    event: Arc<OwnedFd>,
}

impl TapWaker {
    /// A waker, and what is readable once it has woken.
    pub(crate) fn new() -> io::Result<(Self, Arc<OwnedFd>)> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok((Self { event: Arc::clone(&event) }, event))
    }

    /// The reader's present wait, or its next one, ends without a packet.
    pub fn wake(&self) {
        // An eventfd that is full is readable as well.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

pub(crate) fn ip(arguments: &[&str]) -> Result<(), TapError> {
    let fail = |reason| TapError::Ip { arguments: arguments.join(" "), reason };
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("ip").args(arguments).env("PATH", path).output();
    let output = output.map_err(|e| fail(format!("{e} (is iproute2 installed?)")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(fail(flatten(&String::from_utf8_lossy(&output.stderr))))
}

/// Whether the kernel can put headers before frames.
fn can_have_headers(file: &File) -> io::Result<bool> {
    let mut features: libc::c_int = 0;
    // SAFETY: the descriptor is open as long as `file` is, and TUNGETFEATURES writes one `int`, which lives through the
    // call and is not used by anybody else.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETFEATURES, &raw mut features) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(features & libc::IFF_VNET_HDR != 0)
}

/// Headers as packets have them: in length, and little endian on every host.
fn set_headers(file: &File) -> io::Result<()> {
    let length = libc::c_int::try_from(HEADER_BYTES).map_err(io::Error::other)?;
    for (request, value) in [(libc::TUNSETVNETHDRSZ, length), (libc::TUNSETVNETLE, 1)] {
        // SAFETY: the descriptor is open as long as `file` is, and both requests read one `int`, which lives through
        // the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Brings the interface up, by itself: a program would take milliseconds, while a guest waits to go live.
fn bring_up(name: &str) -> io::Result<()> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut request = request(name, 0);
    // SAFETY: the socket is open until the end of this function, and SIOCGIFFLAGS reads and writes one `ifreq`, which
    // lives through the call and is not used by anybody else.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS has just written this member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    #[expect(clippy::cast_possible_truncation, reason = "flags fit, as the kernel's ABI has it")]
    let up = libc::IFF_UP as libc::c_short;
    if flags & up != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: as above; SIOCSIFFLAGS only reads it.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn request(name: &str, flags: libc::c_short) -> libc::ifreq {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // One place stays zero, since names have at most 15 bytes.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// Makes `file` the tap `name`; the name was checked.
fn set_interface(file: &File, name: &str, has_headers: bool) -> io::Result<()> {
    let headers = if has_headers { libc::IFF_VNET_HDR } else { 0 };
    #[expect(clippy::cast_possible_truncation, reason = "flags fit, as the kernel's ABI has it")]
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | headers) as libc::c_short;
    let mut request = request(name, flags);
    // SAFETY: the descriptor is open as long as `file` is, and TUNSETIFF reads and writes one `ifreq`, which lives
    // through the call and is not used by anybody else.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use machine::offload::{Family, plain};

    use super::*;
    use crate::announce::rarp;
    use crate::offload::tests::tcp;

    #[test]
    fn interface_names_are_checked() {
        for ok in ["tap0", "us-web-0", "a.1", "123456789012345"] {
            assert_eq!(check_interface_name(ok), Ok(()));
        }
        for bad in ["", "-a", ".", "a b", "a/b", "1234567890123456", "a%d"] {
            assert!(check_interface_name(bad).is_err(), "{bad}");
            assert!(matches!(Tap::open(bad), Err(TapError::BadName(_))));
        }
    }

    /// Reads `count` packets to the MAC address that starts with 6, while `send` is called again and again.
    fn receive(tap: &Tap, count: usize, send: impl Fn()) -> Vec<Vec<u8>> {
        let (mut reader, _waker) = tap.reader().unwrap();
        let thread = std::thread::spawn(move || {
            let mut got = Vec::new();
            while got.len() < count {
                let packet = reader.next_packet().unwrap().unwrap();
                if packet[HEADER_BYTES] == 6 {
                    got.push(packet.to_vec());
                }
            }
            got
        });
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !thread.is_finished() {
            assert!(std::time::Instant::now() < deadline, "the packets did not arrive");
            send();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        thread.join().unwrap()
    }

    /// Throws away what waits to be read.
    fn drain(tap: &Tap) {
        while (&tap.shared.file).read(&mut [0; HEADER_BYTES + FRAME_BYTES_MAX]).is_ok() {}
    }

    /// Packets of TCP, between taps on a bridge: they arrive as the other side takes them, whoever cuts them.
    fn segments_arrive(bridge: &str) {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let old = Tap::attach(options.open(DEVICE).unwrap(), "ustap4", false).unwrap();
        let (one, other) = (Tap::open("ustap2").unwrap(), Tap::open("ustap3").unwrap());
        for tap in [&one, &other, &old] {
            tap.attach_to_bridge(bridge).unwrap();
            tap.bring_up().unwrap();
        }
        let data: Vec<u8> = (0..4000u32).map(|i| (i % 251) as u8).collect();
        for (family, tcp6) in [(Family::V4, false), (Family::V6, true)] {
            let mut packet = tcp(family, false, &data, 1400);
            packet[HEADER_BYTES] = 6;
            let work = Work::of(&packet).unwrap();
            packet[..HEADER_BYTES].copy_from_slice(&work.header());
            let cut = finish(&packet, &work);
            assert_eq!(cut.len(), 3);
            let arrives = |from: &Tap, to: &Tap, expected: &[Vec<u8>]| {
                drain(to);
                let got = receive(to, expected.len(), || assert!(from.write(&packet).unwrap()));
                let what = format!("{family:?} from {} to {}", from.name(), to.name());
                for (got, expected) in got.iter().zip(expected) {
                    assert_eq!(got[..100], expected[..100], "{what}");
                    assert_eq!(got, expected, "{what}");
                }
            };
            // The kernel cuts them, with headers or without, and we do.
            other.set_offloads(Offloads::default()).unwrap();
            arrives(&one, &other, &cut);
            arrives(&one, &old, &cut);
            arrives(&old, &other, &cut);
            // One that is taken whole.
            other.set_offloads(Offloads { checksum: true, tcp4: !tcp6, tcp6 }).unwrap();
            arrives(&one, &other, std::slice::from_ref(&packet));
        }
    }

    /// Runs one of the tests here again, without any capability.
    fn without_rights(name: &str) {
        let output = Command::new("setpriv")
            .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored", "--nocapture"])
            .env("UNDERSTUDY_WITHOUT_RIGHTS", "1")
            .output()
            .expect("this test needs `setpriv`: install Debian's package util-linux");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("all done"), "{text}{words}");
    }

    fn persistent_tap_takes_no_right() {
        ip(&["tuntap", "add", "ustap9", "mode", "tap", "user", "0"]).unwrap();
        ip(&["link", "set", "dev", "ustap9", "up"]).unwrap();
        without_rights("tap::tests::inside_without_rights");
    }

    #[test]
    #[ignore = "is run by frames_pass_a_tap_in_a_namespace_of_its_own"]
    fn inside_without_rights() {
        if std::env::var_os("UNDERSTUDY_WITHOUT_RIGHTS").is_none() {
            return;
        }
        let tap = Tap::open("ustap9").unwrap();
        tap.bring_up().unwrap();
        assert!(tap.write(&plain(&rarp([2; 6]))).unwrap());
        let error = Tap::open("ustap8").unwrap_err().to_string();
        assert!(error.contains("cannot create or attach to tap ustap8"), "{error}");
        println!("without rights: all done");
    }

    /// A macvtap on one end of a cable, as the guest of a host; what comes out of the other end, which is a switch's.
    fn macvtap_is_quiet_until_it_is_brought_up() {
        const GUEST: [u8; 6] = [6, 0, 0, 1, 2, 3];
        if !is_first_user_namespace() {
            println!("macvtap is not tested: its device takes root outside of user namespaces");
            return;
        }
        ip(&["link", "add", "usw0", "type", "veth", "peer", "name", "usw1"]).unwrap();
        ip(&["link", "add", "usbr1", "type", "bridge", "forward_delay", "0"]).unwrap();
        ip(&["link", "set", "dev", "usw1", "master", "usbr1", "up"]).unwrap();
        ip(&["link", "set", "dev", "usw0", "up"]).unwrap();
        let switch = Tap::open("ustap5").unwrap();
        switch.attach_to_bridge("usbr1").unwrap();
        switch.bring_up().unwrap();
        ip(&["link", "set", "dev", "usbr1", "up"]).unwrap();
        let has_learnt = || {
            let seen =
                Command::new("bridge").args(["fdb", "show", "dev", "usw1"]).output().unwrap();
            String::from_utf8_lossy(&seen.stdout).contains("06:00:00:01:02:03")
        };
        // A process that was killed left one behind.
        ip(&["link", "add", "link", "usw0", "name", "usmv0", "type", "macvtap"]).unwrap();
        let tap = crate::macvtap::make("usmv0", "usw0", GUEST).unwrap();
        assert!(tap.is_macvtap());
        let to_guest = [&GUEST[..], &[2; 6], &[0x88, 0xb5], &[7; 60]].concat();
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(switch.write(&plain(&to_guest)).unwrap());
        let mut buf = [0; HEADER_BYTES + FRAME_BYTES_MAX];
        assert!((&tap.shared.file).read(&mut buf).is_err(), "it is down");
        assert!(!has_learnt());
        // Go-live.
        tap.bring_up().unwrap();
        assert!(tap.write(&plain(&rarp(GUEST))).unwrap());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !has_learnt() {
            assert!(std::time::Instant::now() < deadline, "the switch has not learnt the address");
            assert!(tap.write(&plain(&rarp(GUEST))).unwrap());
        }
        let send = || assert!(switch.write(&plain(&to_guest)).unwrap());
        assert_eq!(receive(&tap, 1, send)[0], plain(&to_guest));
        drain(&switch);
        // The kernel cuts what is not a frame of this network.
        let data: Vec<u8> = (0..4000u32).map(|i| (i % 251) as u8).collect();
        let mut packet = tcp(Family::V4, false, &data, 1400);
        packet[HEADER_BYTES] = 6;
        let work = Work::of(&packet).unwrap();
        packet[..HEADER_BYTES].copy_from_slice(&work.header());
        let cut = finish(&packet, &work);
        assert_eq!(receive(&switch, 3, || assert!(tap.write(&packet).unwrap()))[..3], cut);
        let error = crate::macvtap::find("usmv0", [2; 6]).unwrap_err().to_string();
        assert!(error.contains("has the MAC address 06:00:00:01:02:03"), "{error}");
        assert!(crate::macvtap::find("ustap5", GUEST).unwrap().is_none());
        drop(tap);
        assert!(rustix::fs::stat("/sys/class/net/usmv0").is_err());
    }

    /// Whether the file that says which users there are says: all.
    fn is_first_user_namespace() -> bool {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        map.split_whitespace().eq(["0", "0", "4294967295"])
    }

    /// Needs a network namespace of its own: run by the test below.
    #[test]
    #[ignore = "is run by frames_pass_a_tap_in_a_namespace_of_its_own"]
    fn inside_namespace() {
        if std::env::var_os("UNDERSTUDY_IN_NAMESPACE").is_none() {
            return;
        }
        let tap = Tap::open("ustap0").unwrap();
        // While the interface is down, frames are dropped.
        assert!(!tap.write(&plain(&rarp([2; 6]))).unwrap());
        assert_eq!(tap.dropped_count(), 1);
        ip(&["link", "add", "usbr0", "type", "bridge"]).unwrap();
        ip(&["link", "set", "dev", "usbr0", "up"]).unwrap();
        tap.attach_to_bridge("usbr0").unwrap();
        tap.bring_up().unwrap();
        // The bridge takes the lowest address: that of any port that is no tap of ours.
        ip(&[
            "link",
            "add",
            "usv0",
            "address",
            "fa:ff:ff:ff:ff:ff",
            "type",
            "veth",
            "peer",
            "name",
            "usv1",
        ])
        .unwrap();
        ip(&["link", "set", "dev", "usv0", "master", "usbr0"]).unwrap();
        let address = Command::new("ip").args(["-o", "link", "show", "usbr0"]).output().unwrap();
        let address = String::from_utf8_lossy(&address.stdout).into_owned();
        assert!(address.contains("link/ether fa:ff:ff:ff:ff:ff"), "{address}");
        let error = tap.attach_to_bridge("nobridge").unwrap_err().to_string();
        assert!(error.contains("master nobridge") && error.contains("nobridge"), "{error}");
        // A second tap on the same bridge gets what the first one sends.
        let other = Tap::open("ustap1").unwrap();
        other.attach_to_bridge("usbr0").unwrap();
        other.bring_up().unwrap();
        let (mut reader, waker) = other.reader().unwrap();
        let expected = plain(&rarp([2, 0, 0, 0, 0, 9]));
        let thread = std::thread::spawn(move || {
            loop {
                let Some(got) = reader.next_packet().unwrap() else { return false };
                if got == expected {
                    return true;
                }
            }
        });
        // The bridge forwards once its ports are, so the frame is sent until it arrives.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !thread.is_finished() {
            assert!(std::time::Instant::now() < deadline, "the frame did not arrive");
            assert!(tap.write(&plain(&rarp([2, 0, 0, 0, 0, 9]))).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(thread.join().unwrap());
        assert!(!tap.write(&[1, 2, 3]).unwrap());
        // A woken reader ends: the second wait finds the event that the first one left.
        let (mut reader, _waker) = tap.reader().unwrap();
        let stop = TapWaker { event: Arc::clone(&reader.stop) };
        let thread = std::thread::spawn(move || while reader.next_packet().unwrap().is_some() {});
        stop.wake();
        thread.join().unwrap();
        waker.wake();
        segments_arrive("usbr0");
        persistent_tap_takes_no_right();
        macvtap_is_quiet_until_it_is_brought_up();
        println!("inside namespace: all done");
    }

    #[test]
    fn frames_pass_a_tap_in_a_namespace_of_its_own() {
        // The device of a macvtap takes root outside of user namespaces, and a view of its network's interfaces.
        let mut command = Command::new("unshare");
        if rustix::process::geteuid().is_root() {
            command.args(["--net", "--mount", "--", "sh", "-c"]);
            command.args(["mount -t sysfs sysfs /sys && exec \"$@\"", "sh"]);
        } else {
            command.args(["--user", "--map-root-user", "--net", "--"]);
        }
        let output = command
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "tap::tests::inside_namespace", "--ignored", "--nocapture"])
            .env("UNDERSTUDY_IN_NAMESPACE", "1")
            .output()
            .expect("this test needs `unshare`: install Debian's package util-linux");
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "user namespaces and {DEVICE} are needed: {text}");
        assert!(text.contains("all done"), "{text}");
    }
}

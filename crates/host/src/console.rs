//! Consoles: one guest's output to any number of viewers, and the terminal of the person who looks at it.
//!
//! # Place
//! The run loop pushes what the guest writes into a [`ConsoleHub`], which never waits; viewers attach to it, each on
//! its own thread. The command line uses [`RawMode`] and [`EscapeKeys`].
//!
//! # Invariants
//! - A viewer gets the scrollback and then every byte after it, without gap or repetition, or it is dropped.
//! - Memory is bounded: the scrollback by [`SCROLLBACK_BYTES`], a viewer by [`UNFETCHED_BYTES_MAX`].

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// Output kept for viewers to come.
pub const SCROLLBACK_BYTES: usize = 64 << 10;
/// Most viewers of one console.
pub const VIEWERS_MAX: usize = 16;
/// Output that a viewer may leave unfetched before it is dropped: a guest can print a whole boot log, byte by byte, in
/// one slice.
pub const UNFETCHED_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Default)]
struct Hub {
    scrollback: VecDeque<u8>,
    viewers: Vec<Arc<Unfetched>>,
}

/// What a viewer has not fetched. Its mutex is taken while the hub's is held, never the other way round.
#[derive(Debug, Default)]
struct Unfetched {
    state: Mutex<UnfetchedState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct UnfetchedState {
    bytes: Vec<u8>,
    /// Nothing comes any more.
    is_ended: bool,
}

impl Unfetched {
    fn lock(&self) -> MutexGuard<'_, UnfetchedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when the viewer is too slow, or gone.
    fn push(&self, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        if state.bytes.len() + bytes.len() > UNFETCHED_BYTES_MAX {
            state.is_ended = true;
        } else if !state.is_ended {
            state.bytes.extend_from_slice(bytes);
        }
        self.changed.notify_one();
        !state.is_ended
    }

    fn end(&self) {
        self.lock().is_ended = true;
        self.changed.notify_one();
    }
}

/// The output of one console. Clones share it; its mutex guards scrollback and viewers, and nothing is waited for
/// while it is held.
#[derive(Debug, Clone, Default)]
pub struct ConsoleHub {
    hub: Arc<Mutex<Hub>>,
}

/// A viewer.
#[derive(Debug)]
pub struct ConsoleView {
    /// What was written before, as far as it is kept.
    pub scrollback: Vec<u8>,
    unfetched: Arc<Unfetched>,
}

impl Drop for ConsoleView {
    fn drop(&mut self) {
        self.unfetched.end();
    }
}

/// What a viewer found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Viewed {
    /// Output.
    Bytes(Arc<[u8]>),
    /// Nothing, for as long as was asked.
    TimedOut,
    /// The console is gone, or this viewer was too slow.
    Ended,
}

impl ConsoleHub {
    /// A console that nothing was written to.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands output to all viewers; one that did not fetch what came before is dropped.
    pub fn push(&self, bytes: &[u8]) {
        let mut hub = self.lock();
        hub.scrollback.extend(bytes);
        hub.viewers.retain(|viewer| viewer.push(bytes));
        let excess = hub.scrollback.len().saturating_sub(SCROLLBACK_BYTES);
        hub.scrollback.drain(..excess);
    }

    /// A new viewer, or none when there are [`VIEWERS_MAX`] already.
    #[must_use]
    pub fn attach(&self) -> Option<ConsoleView> {
        let mut hub = self.lock();
        hub.viewers.retain(|viewer| !viewer.lock().is_ended);
        if hub.viewers.len() >= VIEWERS_MAX {
            return None;
        }
        let unfetched = Arc::<Unfetched>::default();
        hub.viewers.push(Arc::clone(&unfetched));
        let scrollback = hub.scrollback.iter().copied().collect();
        Some(ConsoleView { scrollback, unfetched })
    }

    /// Ends all viewers: the VM is gone.
    pub fn close(&self) {
        for viewer in self.lock().viewers.drain(..) {
            viewer.end();
        }
    }

    /// Serves a viewer at the other end of a stream until either side ends it: writes scrollback and output there, and
    /// hands what arrives to `typed`.
    ///
    /// # Errors
    /// There are too many viewers, or the stream cannot be used.
    pub fn serve(&self, stream: UnixStream, mut typed: impl FnMut(&[u8]) + Send) -> io::Result<()> {
        let view = self.attach().ok_or_else(|| io::Error::other("too many viewers"))?;
        let mut input = stream.try_clone()?;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut buf = [0; 4096];
                // An error of the stream is an end like any other.
                while let Ok(len @ 1..) = input.read(&mut buf) {
                    typed(&buf[..len]);
                }
                drop(input.shutdown(Shutdown::Both));
            });
            write_view(&view, &stream);
            drop(stream.shutdown(Shutdown::Both));
        });
        Ok(())
    }
}

fn write_view(view: &ConsoleView, mut stream: &UnixStream) {
    /// How often it is looked whether the viewer is still there while the guest is silent.
    const LOOK: Duration = Duration::from_millis(500);
    if stream.write_all(&view.scrollback).is_err() {
        return;
    }
    loop {
        match view.next(LOOK) {
            Viewed::Bytes(bytes) => {
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
            // The input side shuts the stream down when the viewer is gone.
            Viewed::TimedOut if is_shut_down(stream) => return,
            Viewed::TimedOut => {}
            Viewed::Ended => return,
        }
    }
}

fn is_shut_down(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_err()
        || fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

impl ConsoleView {
    /// Waits for output after the scrollback.
    #[must_use]
    pub fn next(&self, timeout: Duration) -> Viewed {
        let deadline = Instant::now() + timeout;
        let mut state = self.unfetched.lock();
        loop {
            if !state.bytes.is_empty() {
                return Viewed::Bytes(std::mem::take(&mut state.bytes).into());
            }
            if state.is_ended {
                return Viewed::Ended;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Viewed::TimedOut;
            }
            let waited = self.unfetched.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A terminal in raw mode, set back when this is dropped.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Sets the terminal to raw mode; none when it is no terminal, so that input from a pipe works as it is.
    ///
    /// # Errors
    /// The terminal cannot be set.
    pub fn enter(terminal: impl AsFd) -> io::Result<Option<Self>> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Flush, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no setting back.
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

/// The key that starts a command: Ctrl-a.
pub const ESCAPE: u8 = 0x01;
/// What Ctrl-a h shows.
pub const ESCAPE_HELP: &str = "\r\n\
    Ctrl-a h  show this help\r\n\
    Ctrl-a x  stop the VM\r\n\
    Ctrl-a d  detach: the VM goes on\r\n\
    Ctrl-a Ctrl-a, Ctrl-a a  send Ctrl-a to the guest\r\n";

/// What a key does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyAction {
    /// Goes to the guest.
    Send(u8),
    /// Nothing yet.
    Nothing,
    /// Stop the VM.
    Stop,
    /// Leave the console.
    Detach,
    /// Show [`ESCAPE_HELP`].
    Help,
}

/// Finds commands among the keys: Ctrl-a and then x, d, a or h, as in QEMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EscapeKeys {
    is_escaped: bool,
}

impl EscapeKeys {
    /// Takes a key. After Ctrl-a, a key that is no command does nothing.
    pub fn feed(&mut self, key: u8) -> KeyAction {
        if !std::mem::take(&mut self.is_escaped) {
            if key != ESCAPE {
                return KeyAction::Send(key);
            }
            self.is_escaped = true;
            return KeyAction::Nothing;
        }
        match key {
            b'x' => KeyAction::Stop,
            b'd' => KeyAction::Detach,
            b'a' | ESCAPE => KeyAction::Send(ESCAPE),
            b'h' | b'?' => KeyAction::Help,
            _ => KeyAction::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn escape_keys_are_those_of_qemu() {
        let mut keys = EscapeKeys::default();
        let mut feed = |text: &[u8]| text.iter().map(|k| keys.feed(*k)).collect::<Vec<_>>();
        use KeyAction::{Detach, Help, Nothing, Send, Stop};
        assert_eq!(feed(b"x\x01x"), [Send(b'x'), Nothing, Stop]);
        assert_eq!(feed(b"\x01d\x01h"), [Nothing, Detach, Nothing, Help]);
        assert_eq!(feed(b"\x01aa"), [Nothing, Send(1), Send(b'a')]);
        assert_eq!(feed(b"\x01\x01\x01"), [Nothing, Send(1), Nothing]);
        assert_eq!(feed(b"qd"), [Nothing, Send(b'd')]);
    }

    #[test]
    fn viewers_get_scrollback_and_then_everything() {
        let hub = ConsoleHub::new();
        hub.push(&[b'-'; SCROLLBACK_BYTES]);
        hub.push(b"boot");
        let (a, b) = (hub.attach().unwrap(), hub.attach().unwrap());
        assert_eq!(a.scrollback.len(), SCROLLBACK_BYTES);
        assert!(a.scrollback.ends_with(b"-boot"));
        hub.push(b"login:");
        for view in [&a, &b] {
            assert_eq!(view.next(LIMIT), Viewed::Bytes(b"login:"[..].into()));
            assert_eq!(view.next(Duration::ZERO), Viewed::TimedOut);
        }
        hub.close();
        assert_eq!(a.next(LIMIT), Viewed::Ended);
    }

    #[test]
    fn a_slow_viewer_is_dropped_and_the_others_stay() {
        let hub = ConsoleHub::new();
        let (slow, quick) = (hub.attach().unwrap(), hub.attach().unwrap());
        for _ in 0..=UNFETCHED_BYTES_MAX {
            hub.push(b"x");
            assert!(matches!(quick.next(LIMIT), Viewed::Bytes(_)));
        }
        let mut fetched = 0;
        while let Viewed::Bytes(bytes) = slow.next(LIMIT) {
            fetched += bytes.len();
        }
        assert_eq!((fetched, slow.next(LIMIT)), (UNFETCHED_BYTES_MAX, Viewed::Ended));
        assert_eq!(hub.lock().viewers.len(), 1);
        let more: Vec<_> = (1..VIEWERS_MAX).map(|_| hub.attach().unwrap()).collect();
        assert!(hub.attach().is_none());
        drop(more);
        assert!(hub.attach().is_some());
    }

    #[test]
    fn a_stream_carries_both_directions_until_the_viewer_leaves() {
        let hub = ConsoleHub::new();
        hub.push(b"old ");
        let (here, mut there) = UnixStream::pair().unwrap();
        there.set_read_timeout(Some(LIMIT)).unwrap();
        let (typed, keys) = std::sync::mpsc::channel();
        let served = hub.clone();
        let thread = std::thread::spawn(move || {
            served.serve(here, move |bytes| drop(typed.send(bytes.to_vec())))
        });
        let mut buf = [0; 4];
        there.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"old ");
        hub.push(b"new!");
        there.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"new!");
        there.write_all(b"ls").unwrap();
        assert_eq!(keys.recv_timeout(LIMIT).unwrap(), b"ls");
        drop(there);
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(RawMode::enter(&a).unwrap().is_none());
    }
}

//! What the two halves of a link share: its paths, and, where there may be two, what the peer has not acknowledged.
//!
//! # Place
//! A link has one path, or is bonded: then it may have two, on two networks, of which one carries the frames and the other
//! stands by. Sender, receiver and a keeper thread, which looks at the time, call this.
//!
//! # Invariants
//! - INV-BOND-1: what was sent and not acknowledged is sent again, in order, on the path that takes over; so each frame
//!   arrives as long as one path does.
//! - INV-BOND-2: a frame is handed out once, in the order of its number, whatever path it came on.
//! - INV-BOND-3: at most [`UNACKNOWLEDGED_BYTES_MAX`] are kept to be sent again; beyond that a link is full.
//! - INV-BOND-4: the end of a path is that of its own two halves, never of those that came in its place.
//!
//! # Failure
//! A path that breaks, or on which nothing comes for the patience while something waits for an answer, is left for the
//! other one, unless that is silent, too: something is said on it now and then. When none is left, the link is over.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::compress::{Packed, Packer};
use super::frame::{Decoder, Item, Number};
use super::handshake::Agreed;
use super::link::{PathUse, SendError};
use super::path::{PathReceiver, PathSender, set_options};

/// Most paths.
pub(super) const PATHS: usize = 2;
/// Bytes that are kept to be sent again: less than a path has room for.
const UNACKNOWLEDGED_BYTES_MAX: usize = 24 << 20;
/// Frames and bytes that come before they are acknowledged at once.
const UNSAID_MAX: u64 = 64;
const UNSAID_BYTES_MAX: u64 = 1 << 20;
/// How often the keeper looks.
const LOOK: Duration = Duration::from_millis(10);
/// How often something is said on the path that stands by, and after what silence it counts as one that does not work.
const PROBE: Duration = Duration::from_millis(500);
const PROBE_SILENCE: Duration = Duration::from_millis(2500);
/// Silence after which the other path is tried, unless told otherwise.
const PATIENCE: Duration = Duration::from_millis(40);

/// A frame that was sent, until it is acknowledged.
#[derive(Debug)]
struct Kept {
    at: u64,
    packed: Packed,
    sent: Instant,
}

impl Kept {
    fn item(&self, acknowledged: u64) -> Item<'_> {
        Item::Data(Some(Number { at: self.at, acknowledged }), &self.packed)
    }
}

#[derive(Debug)]
struct State {
    paths: [Option<PathSender>; PATHS],
    active: usize,
    /// Number of the next frame.
    next: u64,
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    switched: Instant,
    probed: Instant,
    patience: Duration,
    packer: Packer,
    scratch: Packed,
    /// Why the link is over.
    ended: Option<String>,
    /// Bytes sent, of all paths.
    wire_bytes: u64,
    switches: u64,
}

/// See the module documentation. The mutex guards all that is sent; it may be held for as long as a path's send waits.
#[derive(Debug)]
pub(super) struct Bond {
    pub(super) is_bonded: bool,
    begun: Instant,
    state: Mutex<State>,
    /// When something last came on each path, in microseconds.
    heard: [AtomicU64; PATHS],
    /// Frames that came, and for how many of them the peer was told so.
    received: AtomicU64,
    said: AtomicU64,
    unsaid_bytes: AtomicU64,
    /// Receiving halves of new paths, and what wakes the receiver for them.
    arrivals: Mutex<Vec<PathReceiver>>,
    pub(super) wake: OwnedFd,
    is_closed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bond {
    /// A link of one path so far.
    pub(super) fn start(
        stream: TcpStream,
        agreed: &Agreed,
    ) -> io::Result<(Arc<Self>, PathReceiver)> {
        let (sender, receiver) = halves(stream, agreed)?;
        let mut paths = [None, None];
        paths[agreed.slot] = Some(sender);
        let now = Instant::now();
        let state = State {
            paths,
            active: agreed.slot,
            next: 0,
            kept: VecDeque::new(),
            kept_bytes: 0,
            switched: now,
            probed: now,
            patience: PATIENCE,
            packer: Packer::new(agreed.compresses),
            scratch: Packed::default(),
            ended: None,
            wire_bytes: 0,
            switches: 0,
        };
        let bond = Arc::new(Self {
            is_bonded: agreed.is_bonded,
            begun: now,
            state: Mutex::new(state),
            heard: Default::default(),
            received: AtomicU64::new(0),
            said: AtomicU64::new(0),
            unsaid_bytes: AtomicU64::new(0),
            arrivals: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_closed: AtomicBool::new(false),
        });
        if bond.is_bonded {
            let weak = Arc::downgrade(&bond);
            std::thread::Builder::new()
                .name("channel-keeper".to_owned())
                .spawn(move || keep(&weak))?;
        }
        Ok((bond, receiver))
    }

    /// A second path, or another one in the place of one that is lost.
    pub(super) fn add_path(&self, stream: TcpStream, agreed: &Agreed) -> io::Result<()> {
        let (sender, receiver) = halves(stream, agreed)?;
        let old = {
            let mut state = lock(&self.state);
            if self.is_closed() || state.ended.is_some() {
                return Err(io::Error::other("the link is over"));
            }
            let old = state.paths[agreed.slot].replace(sender);
            if let Some(old) = &old {
                old.abort();
            }
            self.note_heard(agreed.slot);
            if state.active == agreed.slot {
                self.resend(&mut state);
            }
            old
        };
        // Outside of the lock: it joins a thread.
        drop(old);
        lock(&self.arrivals).push(receiver);
        self.wake();
        Ok(())
    }

    pub(super) fn take_arrivals(&self) -> Vec<PathReceiver> {
        std::mem::take(&mut *lock(&self.arrivals))
    }

    fn wake(&self) {
        // An eventfd that is full is readable as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    /// Which paths are missing.
    pub(super) fn missing(&self) -> Vec<usize> {
        let state = lock(&self.state);
        (0..PATHS).filter(|slot| state.paths[*slot].is_none()).collect()
    }

    pub(super) fn set_patience(&self, patience: Duration) {
        lock(&self.state).patience = patience;
    }

    pub(super) fn paths(&self) -> Vec<PathUse> {
        let state = lock(&self.state);
        let describe = |(slot, path): (usize, &Option<PathSender>)| {
            let (local, peer) = path.as_ref()?.addresses()?;
            let is_silent = self.silence(slot) > PROBE_SILENCE;
            Some(PathUse { slot, local, peer, is_active: slot == state.active, is_silent })
        };
        state.paths.iter().enumerate().filter_map(describe).collect()
    }

    pub(super) fn wire_bytes(&self) -> u64 {
        lock(&self.state).wire_bytes
    }

    pub(super) fn switches(&self) -> u64 {
        lock(&self.state).switches
    }

    pub(super) fn waiting_bytes(&self) -> usize {
        let state = lock(&self.state);
        state.paths[state.active].as_ref().map_or(0, PathSender::waiting_bytes)
    }

    /// Sends a payload.
    pub(super) fn send(&self, payload: &[u8]) -> Result<(), SendError> {
        let mut state = lock(&self.state);
        if let Some(reason) = &state.ended {
            return Err(SendError::Closed { reason: reason.clone() });
        }
        let state = &mut *state;
        if !self.is_bonded {
            state.packer.pack(payload, &mut state.scratch);
            let Some(path) = &mut state.paths[state.active] else {
                return Err(SendError::Closed { reason: "it has no path".to_owned() });
            };
            state.wire_bytes += path.send(&Item::Data(None, &state.scratch))? as u64;
            return Ok(());
        }
        if state.kept_bytes > 0 && state.kept_bytes + payload.len() > UNACKNOWLEDGED_BYTES_MAX {
            return Err(SendError::Full { waiting: state.kept_bytes });
        }
        let mut packed = Packed::default();
        state.packer.pack(payload, &mut packed);
        self.send_kept(state, packed)
    }

    fn send_kept(&self, state: &mut State, packed: Packed) -> Result<(), SendError> {
        let kept = Kept { at: state.next, packed, sent: Instant::now() };
        let item = kept.item(self.acknowledge());
        let sent = match &mut state.paths[state.active] {
            Some(path) => path.send(&item),
            None => Err(SendError::Closed { reason: "it has no path".to_owned() }),
        };
        if let Err(e @ (SendError::Full { .. } | SendError::TooLong { .. })) = sent {
            return Err(e);
        }
        state.next += 1;
        state.kept_bytes += kept.packed.bytes.len();
        state.kept.push_back(kept);
        match sent {
            Ok(bytes) => state.wire_bytes += bytes as u64,
            Err(e) => {
                let (reason, slot) = (e.to_string(), state.active);
                self.lose(state, slot, &reason);
                if let Some(reason) = &state.ended {
                    return Err(SendError::Closed { reason: reason.clone() });
                }
            }
        }
        Ok(())
    }

    /// Takes the sending half of a path away, and uses the other one.
    fn lose(&self, state: &mut State, slot: usize, reason: &str) {
        if let Some(path) = state.paths[slot].take() {
            path.abort();
            // Dropping it joins a thread that ends at once, since it was aborted.
            drop(path);
        }
        let other = PATHS - 1 - slot;
        if state.paths[other].is_none() {
            state.ended.get_or_insert_with(|| reason.to_owned());
        } else if state.active == slot {
            self.switch(state, other);
        }
    }

    fn switch(&self, state: &mut State, to: usize) {
        state.active = to;
        state.switched = Instant::now();
        state.switches += 1;
        self.resend(state);
    }

    fn resend(&self, state: &mut State) {
        let State { paths, kept, active, wire_bytes, .. } = state;
        let slot = *active;
        let Some(path) = &mut paths[slot] else { return };
        let acknowledged = self.acknowledge();
        let now = Instant::now();
        for kept in kept {
            match path.send(&kept.item(acknowledged)) {
                Ok(bytes) => *wire_bytes += bytes as u64,
                Err(e) => {
                    // What is missing now cannot be made up for on this path. The other one, if there is one, is tried next.
                    return self.lose(state, slot, &e.to_string());
                }
            }
            kept.sent = now;
        }
    }

    /// The receiver found the end of a path; whether the link goes on.
    pub(super) fn path_ended(&self, path: &PathReceiver, reason: &str) -> bool {
        let mut state = lock(&self.state);
        // Another path may be in its place already, whose receiving half is still under way here.
        if state.paths[path.slot].as_ref().is_some_and(|sender| sender.is_of(path)) {
            self.lose(&mut state, path.slot, reason);
        }
        state.ended.is_none()
    }

    /// Something came on a path.
    pub(super) fn note_heard(&self, slot: usize) {
        self.heard[slot].store(self.micros(), Ordering::Relaxed);
    }

    /// For how long nothing has come on a path.
    fn silence(&self, slot: usize) -> Duration {
        let heard = self.heard[slot].load(Ordering::Relaxed);
        Duration::from_micros(self.micros().saturating_sub(heard))
    }

    fn micros(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// How many frames came; whoever asks tells the peer.
    fn acknowledge(&self) -> u64 {
        let received = self.received.load(Ordering::Relaxed);
        self.said.store(received, Ordering::Relaxed);
        self.unsaid_bytes.store(0, Ordering::Relaxed);
        received
    }

    /// A numbered frame came: whether it is to be handed out. The receiver alone calls this.
    pub(super) fn take(&self, number: Number, bytes: usize) -> Result<bool, u64> {
        self.acknowledged(number.acknowledged);
        let expected = self.received.load(Ordering::Relaxed);
        if number.at != expected {
            return if number.at < expected { Ok(false) } else { Err(expected) };
        }
        self.received.store(expected + 1, Ordering::Relaxed);
        let bytes = self.unsaid_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let unsaid = expected + 1 - self.said.load(Ordering::Relaxed);
        if unsaid >= UNSAID_MAX || bytes >= UNSAID_BYTES_MAX {
            self.say(&mut lock(&self.state));
        }
        Ok(true)
    }

    /// The peer has all frames before this one.
    pub(super) fn acknowledged(&self, count: u64) {
        let mut state = lock(&self.state);
        while state.kept.front().is_some_and(|kept| kept.at < count) {
            let len = state.kept.pop_front().map_or(0, |kept| kept.packed.bytes.len());
            state.kept_bytes -= len;
        }
    }

    /// Tells the peer what came.
    fn say(&self, state: &mut State) {
        let count = self.acknowledge();
        self.say_on(state, state.active, count);
    }

    /// Says on a path how many frames came; a path that turns out to be broken is lost.
    fn say_on(&self, state: &mut State, slot: usize, count: u64) {
        let Some(path) = &mut state.paths[slot] else { return };
        match path.send(&Item::Acknowledged(count)) {
            Ok(bytes) => state.wire_bytes += bytes as u64,
            Err(SendError::Closed { reason }) => self.lose(state, slot, &reason),
            // It is said again with what is sent next.
            Err(SendError::Full { .. } | SendError::TooLong { .. }) => {}
        }
    }

    /// Looks whether something has to be said, and whether the path in use is silent.
    fn look(&self) {
        let mut state = lock(&self.state);
        if self.received.load(Ordering::Relaxed) != self.said.load(Ordering::Relaxed) {
            self.say(&mut state);
        }
        self.probe(&mut state);
        let other = PATHS - 1 - state.active;
        let patience = state.patience;
        let is_waiting = state.kept.front().is_some_and(|kept| kept.sent.elapsed() > patience);
        if !is_waiting || state.paths[other].is_none() || state.switched.elapsed() < patience {
            return;
        }
        if self.silence(state.active) > patience && self.silence(other) < PROBE_SILENCE {
            self.switch(&mut state, other);
        }
    }

    /// Says something on each path, so that both sides know whether it works.
    fn probe(&self, state: &mut State) {
        if state.probed.elapsed() < PROBE {
            return;
        }
        state.probed = Instant::now();
        for slot in 0..PATHS {
            if state.paths[slot].as_ref().is_some_and(|path| path.waiting_bytes() == 0) {
                self.say_on(state, slot, self.received.load(Ordering::Relaxed));
            }
        }
    }

    /// Ends the link at once, without goodbye.
    pub(super) fn abort(&self) {
        let mut state = lock(&self.state);
        state.ended.get_or_insert_with(|| "it was ended here".to_owned());
        state.paths.iter().flatten().for_each(PathSender::abort);
        self.is_closed.store(true, Ordering::Relaxed);
    }

    /// Says goodbye after what waits.
    pub(super) fn close(&self) {
        let paths = {
            let mut state = lock(&self.state);
            self.is_closed.store(true, Ordering::Relaxed);
            let number =
                self.is_bonded.then(|| Number { at: state.next, acknowledged: self.acknowledge() });
            let active = state.active;
            if let Some(path) = &mut state.paths[active] {
                path.say_last(&Item::Goodbye(number));
            }
            state.ended.get_or_insert_with(|| "it was ended here".to_owned());
            let mut paths = std::mem::take(&mut state.paths);
            // The one with the goodbye first: the end of the other one says nothing.
            paths.rotate_left(active);
            paths
        };
        drop(paths);
    }
}

fn halves(stream: TcpStream, agreed: &Agreed) -> io::Result<(PathSender, PathReceiver)> {
    set_options(&stream)?;
    let stream = Arc::new(stream);
    let sender = PathSender::start(Arc::clone(&stream), &agreed.send_key)?;
    let decoder = Decoder::new(&agreed.receive_key);
    Ok((sender, PathReceiver { slot: agreed.slot, stream, decoder }))
}

/// The keeper thread.
fn keep(bond: &Weak<Bond>) {
    // Without the right to it, a path that fails on a loaded host is left a little later.
    let _ = crate::priority::realtime();
    while let Some(bond) = bond.upgrade() {
        if bond.is_closed() {
            return;
        }
        bond.look();
        drop(bond);
        std::thread::sleep(LOOK);
    }
}

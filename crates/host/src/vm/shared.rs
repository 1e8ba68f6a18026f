//! One VM on one host, seen from all its threads: the protocol core, the links, and what waits to leave.
//!
//! # Place
//! Every thread of the VM calls [`Shared::feed`]: the vCPU thread with log, link readers with messages, the arbiter
//! thread with answers, the timer thread with time. The caller's own thread executes the commands, under the lock, so
//! that an acknowledgement releases output without a hand-over.
//!
//! # Invariants
//! - INV-SHELL-1: commands are executed in the order in which the core gave them.
//! - INV-SHELL-2: an output is in `held` before the core hears of the log that covers it.
//! - INV-SHELL-3: nothing under the lock waits for another thread of the VM.
//!
//! Lock order: `inner` before the mailbox's lock; nothing takes `inner` while it holds another lock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use machine::config::VIRTIO_SLOTS;
use machine::io::{BlkOp, Output, OutputKind};
use replica::{
    ArbiterReply, Command, Config, Event, HostId, LinkId, LogPos, Message, MonoTime, Node, Record,
    Role, VmId,
};

use super::Env;
use super::batch::Batch;
use super::bulk::Loaded;
use super::copies::Checkpoints;
use super::definition::Definition;
use super::engine::EngineUse;
use super::evidence::Difference;
use super::failures::Failure;
use super::local_reads::LocalReads;
use super::mailbox::Mailbox;
use super::outputs::{OutputQueue, packet_bytes};
use super::owning::Waits;
use super::packets::PacketQueue;
use super::ports::{CONSOLES, Ports};
use super::vcpu::{Mail, tracing};
use crate::channel;
use crate::console::ConsoleHub;
use crate::disk::Limits;
use crate::divergence::report::Digests;

/// Packets, bytes and requests that wait on a secondary for the news that they left; more than this and it is not
/// keeping up with what its primary says.
const TAIL_MAX: usize = 1 << 20;

/// A question for the arbiter thread.
#[derive(Debug)]
pub(crate) enum Question {
    Read {
        op: u64,
    },
    Cas {
        op: u64,
        expected: u64,
        new: Record,
    },
    /// Of the shell itself: what the record is now.
    Confirm {
        answer: mpsc::Sender<ArbiterReply>,
    },
}

/// A request to make this VM's new secondary, for the protect thread.
#[derive(Debug)]
pub(crate) struct ProtectJob {
    pub(crate) attempt: u64,
    pub(crate) host: HostId,
    pub(crate) is_abandoned: Arc<AtomicBool>,
}

/// What happened to a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartOutcome {
    /// It is running here.
    Running,
    /// The arbiter's record is for another host.
    Refused {
        /// That host.
        live: Option<String>,
        /// Its generation.
        generation: u64,
    },
    /// The machine or a device could not be made.
    Failed {
        /// One line.
        reason: String,
    },
}

struct LinkEntry {
    sender: channel::Sender,
    session: u64,
}

/// Timing of the last failover, completed by the shell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Announced {
    pub(crate) announce_us: u64,
    pub(crate) at_unix_ms: u64,
}

pub(crate) struct Inner {
    pub(crate) node: Node,
    links: BTreeMap<LinkId, LinkEntry>,
    held: OutputQueue,
    /// Log that the core has not heard of yet.
    batch: Batch,
    /// On a secondary: outputs that may not have left the primary.
    tail: OutputQueue,
    released: u64,
    pub(crate) ports: Option<Ports>,
    /// The link whose snapshot is wanted.
    loading: Option<LinkId>,
    /// The link of the primary that is followed: nobody else knows what has left.
    pub(crate) primary: Option<LinkId>,
    /// The link of the secondary that replays the log.
    pub(crate) follower: Option<LinkId>,
    pub(crate) checkpoints: Checkpoints,
    /// The VM is off by the record of this generation, as its primary said.
    off: Option<u64>,
    /// Which copy of a disk failed, and whose serves.
    pub(crate) disk_problem: Option<String>,
    pub(crate) failures: BTreeMap<u8, Failure>,
    /// Limits of disks that were set since the VM was started, here or where it was live before.
    pub(crate) limits: BTreeMap<u8, Limits>,
    /// A snapshot that came before it was asked for, by session.
    early: Option<(u64, Box<Loaded>)>,
    protect_running: BTreeMap<u64, (String, Arc<AtomicBool>)>,
    pub(crate) start_outcome: Option<StartOutcome>,
    pub(crate) announced: Announced,
    pub(crate) last_problem: Option<String>,
    /// Why the machine may not run yet.
    pub(crate) waits: Option<Waits>,
    /// How the last fencing of a host went.
    pub(crate) fenced: Option<String>,
    /// The primary that is followed said that it hands the VM over.
    pub(crate) is_handed_over: bool,
    pub(crate) is_closed: bool,
    pub(crate) halted: Option<machine::io::HaltReason>,
    /// The engine that runs the machine here.
    pub(crate) engine: Option<EngineUse>,
    /// What the VM is, once that is known here.
    pub(crate) definition: Option<Definition>,
    /// How long the guest stood still when protection last started.
    pub(crate) arm_pause_us: u64,
    /// To the threads that end when these are gone.
    arbiter: Option<mpsc::Sender<Question>>,
    protect: Option<mpsc::Sender<ProtectJob>>,
}

impl Inner {
    /// For each disk that the secondary reads by itself.
    fn each_local(&self, mut with: impl FnMut(&LocalReads, &mut dyn FnMut(u64, BlkOp))) {
        for disk in self.ports.iter().flat_map(|ports| &ports.disks) {
            if let Some(reads) = &disk.reads {
                with(reads, &mut |id, op| disk.handle.submit(id, op));
            }
        }
    }
}

/// See the module documentation.
pub(crate) struct Shared {
    pub(crate) name: String,
    /// See [`Env::is_terminal`].
    pub(crate) is_terminal: bool,
    pub(crate) host: String,
    inner: Mutex<Inner>,
    pub(crate) mailbox: Mailbox<Mail>,
    /// The UART's and the virtio consoles' output; they outlive machines.
    pub(crate) consoles: Vec<ConsoleHub>,
    /// Packets for the guest, by network device.
    pub(crate) packets: Vec<Arc<PacketQueue>>,
    next_link: AtomicU64,
    /// Counts the openings of disks.
    pub(crate) disk_epoch: AtomicU64,
    pub(crate) log_bytes: AtomicU64,
    /// Log bandwidth in bytes per second, over the last second.
    pub(crate) log_rate: AtomicU64,
    /// The same of what was sent to the other replica, with all around it.
    pub(crate) wire_rate: AtomicU64,
    /// How much of the snapshot under way was looked at, in percent.
    pub(crate) percent: AtomicU64,
    pub(crate) icount: AtomicU64,
    /// Digests of a primary that this host's machine was compared with.
    pub(crate) digests: AtomicU64,
    /// Whether anybody replays the log, so that digests are worth taking.
    pub(crate) has_follower: AtomicBool,
    /// The vCPU thread makes a machine, which may take its time.
    pub(crate) is_making: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Ends a link. Dropping the sender says goodbye after what was sent before, which takes its time with a peer that does
/// not read: not for the thread that holds the lock.
fn retire(entry: LinkEntry) {
    let spawned = std::thread::Builder::new().name("goodbye".to_owned()).spawn(move || drop(entry));
    if let Err(e) = spawned {
        crate::log::line(&format!("cannot start a thread to end a link: {e}"));
    }
}

/// The host's monotonic clock.
pub(crate) fn mono_now() -> MonoTime {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let s = u64::try_from(t.tv_sec).unwrap_or(0);
    let us = u64::try_from(t.tv_nsec / 1000).unwrap_or(0);
    MonoTime(s.saturating_mul(1_000_000).saturating_add(us))
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The number by which messages name a VM.
pub(crate) fn vm_id(name: &str) -> VmId {
    use sha2::Digest as _;
    let hash = sha2::Sha256::digest(name.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&hash[..16]);
    VmId(id)
}

impl Inner {
    /// Sends what needs no answer; a link that does not take it is found out by others.
    pub(crate) fn send_unanswered(&mut self, link: LinkId, message: &Message) {
        if let Some(entry) = self.links.get_mut(&link)
            && entry.sender.send(&replica::encode(message)).is_err()
        {
            entry.sender.abort();
        }
    }

    /// The link to the other replica.
    fn replica_link(&self) -> Option<&LinkEntry> {
        self.links.get(&self.follower.or(self.primary)?)
    }

    /// Bytes sent to the other replica on the present link.
    pub(crate) fn wire_bytes(&self) -> Option<u64> {
        self.replica_link().map(|link| link.sender.wire_bytes())
    }

    /// Which way the log takes, where there may be two.
    pub(crate) fn log_path(&self) -> Option<String> {
        let sender = &self.replica_link()?.sender;
        let paths = sender.paths();
        let active = paths.iter().find(|path| path.is_active)?;
        let (which, other) =
            if active.slot == 0 { ("first", "second") } else { ("second", "first") };
        let (local, peer) = (active.local.ip(), active.peer.ip());
        let other_path = paths.iter().find(|path| !path.is_active);
        let state = match other_path {
            Some(path) if !path.is_silent => "stands by",
            Some(_) => "is silent",
            None => "does not work",
        };
        Some(format!("{which} ({local} to {peer}); the {other} one {state}"))
    }
}

impl Shared {
    pub(crate) fn new(
        name: &str,
        cfg: Config,
        arbiter: mpsc::Sender<Question>,
        protect: mpsc::Sender<ProtectJob>,
        is_terminal: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            is_terminal,
            host: cfg.host.0.clone(),
            inner: Mutex::new(Inner {
                node: Node::new(cfg),
                links: BTreeMap::new(),
                held: OutputQueue::default(),
                batch: Batch::default(),
                tail: OutputQueue::default(),
                released: 0,
                ports: None,
                loading: None,
                primary: None,
                follower: None,
                checkpoints: Checkpoints::default(),
                off: None,
                disk_problem: None,
                failures: BTreeMap::new(),
                limits: BTreeMap::new(),
                early: None,
                protect_running: BTreeMap::new(),
                start_outcome: None,
                announced: Announced::default(),
                last_problem: None,
                waits: None,
                fenced: None,
                is_handed_over: false,
                is_closed: false,
                halted: None,
                engine: None,
                definition: None,
                arm_pause_us: 0,
                arbiter: Some(arbiter),
                protect: Some(protect),
            }),
            mailbox: Mailbox::default(),
            consoles: (0..CONSOLES).map(|_| ConsoleHub::new()).collect(),
            packets: (0..VIRTIO_SLOTS).map(|_| Arc::default()).collect(),
            next_link: AtomicU64::new(1),
            disk_epoch: AtomicU64::new(0),
            log_bytes: AtomicU64::new(0),
            log_rate: AtomicU64::new(0),
            wire_rate: AtomicU64::new(0),
            percent: AtomicU64::new(0),
            icount: AtomicU64::new(0),
            digests: AtomicU64::new(0),
            has_follower: AtomicBool::new(false),
            is_making: AtomicBool::new(false),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the core what happened and does what it says.
    pub(crate) fn feed(&self, event: Event) {
        let mut inner = self.lock();
        self.feed_locked(&mut inner, event);
    }

    pub(crate) fn feed_locked(&self, inner: &mut Inner, event: Event) {
        if inner.is_closed {
            return;
        }
        let is_ack = matches!(&event, Event::Message { message: Message::Ack { .. }, .. });
        let waiting = if is_ack { None } else { inner.batch.take(mono_now()) };
        let mut events: VecDeque<Event> = waiting.into_iter().chain([event]).collect();
        let mut commands = Vec::new();
        while let Some(event) = events.pop_front() {
            inner.node.handle(mono_now(), event, &mut commands);
            for command in commands.drain(..) {
                self.execute(inner, command, &mut events);
            }
        }
        if inner.follower.is_none() && inner.node.is_alone() {
            inner.each_local(|reads, submit| reads.clear(submit));
        }
    }

    /// The primary's vCPU thread made log and outputs. For how many microseconds these may wait for more.
    pub(crate) fn log_produced(
        &self,
        outputs: Vec<Output>,
        bytes: Vec<u8>,
        end: LogPos,
    ) -> Option<u64> {
        self.log_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let bytes_of_outputs = outputs.iter().map(packet_bytes).sum();
        let of_outputs = outputs.last().map(|o| (o.icount, bytes_of_outputs));
        let mut inner = self.lock();
        outputs.into_iter().for_each(|output| inner.held.push(output));
        inner.batch.add(bytes, end, of_outputs);
        let now = mono_now();
        let wait_us = inner.batch.may_wait_us(now).filter(|_| inner.follower.is_some());
        if wait_us.is_none() {
            self.send_log(&mut inner, now);
        }
        wait_us
    }

    /// The machine will not make more log soon: what waits goes now.
    pub(crate) fn flush_log(&self) {
        self.send_log(&mut self.lock(), mono_now());
    }

    /// The machine will not make more log for so long: what becomes due until then goes now.
    pub(crate) fn flush_log_due_in(&self, pause: std::time::Duration) {
        let (mut inner, now) = (self.lock(), mono_now());
        if inner.batch.may_wait_us(now).is_none_or(|us| u128::from(us) <= pause.as_micros()) {
            self.send_log(&mut inner, now);
        }
    }

    fn send_log(&self, inner: &mut Inner, now: MonoTime) {
        if let Some(event) = inner.batch.take(now) {
            self.feed_locked(inner, event);
        }
    }

    /// The secondary's vCPU thread made outputs again that the primary has made.
    pub(crate) fn keep_tail(&self, outputs: Vec<Output>) {
        let mut inner = self.lock();
        for output in outputs {
            if let (OutputKind::NetTx { dev, packet }, Some(ports)) =
                (&output.kind, &mut inner.ports)
            {
                ports.learn(*dev, packet);
            }
            if output.icount > inner.released {
                inner.tail.push_over(output, TAIL_MAX);
            }
        }
    }

    fn note_released(inner: &mut Inner, released: u64) {
        inner.released = inner.released.max(released);
        while inner.tail.pop_until(inner.released).is_some() {}
    }

    /// A message came on a link.
    pub(crate) fn message(&self, link: LinkId, message: Message) {
        let mut inner = self.lock();
        if !inner.links.contains_key(&link) {
            // It was dropped; what a lost peer says late concerns nobody.
            return;
        }
        if let Message::Log { released, .. } | Message::Heartbeat { released, .. } = &message
            && inner.primary == Some(link)
        {
            Self::note_released(&mut inner, *released);
        }
        if let Message::Disks { note } = &message {
            self.take_note(&mut inner, link, note);
        }
        if inner.primary == Some(link) {
            if let Message::Stop { off } = &message {
                inner.off = *off;
            }
            if let Message::Protected { generation } = &message
                && let Some(ports) = &inner.ports
            {
                Self::tell_generation(&ports.disks, *generation);
            }
        }
        if let Message::Diverged { at, secondary, primary } = &message
            && inner.follower == Some(link)
        {
            let icount = at.icount;
            let what =
                format!("the secondary diverged at step {icount}; both states are being kept");
            inner.last_problem = Some(what);
            let digests = Digests { secondary: *secondary, primary: *primary };
            let peer = inner.node.status().peer.map(|host| host.0);
            let seen = Difference { peer, ..Difference::of(*at, digests) };
            self.mailbox.post(Mail::KeepState(Box::new(seen)));
        }
        if let Message::Ack { replayed, .. } = &message
            && inner.follower == Some(link)
        {
            inner.each_local(|reads, submit| reads.replayed(replayed.lsn, submit));
        }
        if matches!(message, Message::SwitchOver { .. }) && inner.primary == Some(link) {
            inner.is_handed_over = true;
        }
        self.feed_locked(&mut inner, Event::Message { link, message });
    }

    /// Registers a link; its messages come by [`Self::message`].
    pub(crate) fn add_link(&self, sender: channel::Sender, session: u64) -> LinkId {
        let id = LinkId(self.next_link.fetch_add(1, Ordering::Relaxed));
        self.lock().links.insert(id, LinkEntry { sender, session });
        id
    }

    /// Forgets a link; says whether it was known. What was sent on it still leaves, as far as the peer takes it: that is
    /// waited for elsewhere, since a peer that is frozen or cut off takes nothing, and the VM must go on at once.
    fn remove_link(&self, inner: &mut Inner, link: LinkId) -> bool {
        let Some(entry) = inner.links.remove(&link) else { return false };
        if inner.follower == Some(link) {
            inner.follower = None;
            inner.each_local(|reads, _| reads.set_on(false));
            self.has_follower.store(false, Ordering::Relaxed);
        }
        if inner.early.as_ref().is_some_and(|(session, _)| *session == entry.session) {
            inner.early = None;
        }
        retire(entry);
        true
    }

    /// The snapshot for a new secondary was taken at `at`.
    pub(crate) fn protect_started(&self, attempt: u64, link: LinkId, at: LogPos) {
        let mut inner = self.lock();
        inner.follower = Some(link);
        self.has_follower.store(true, Ordering::Relaxed);
        self.feed_locked(&mut inner, Event::ProtectStarted { attempt, link, at });
        // After the greeting, by which the new secondary knows whose notes it takes.
        Self::tell_limits(&mut inner);
    }

    /// The link is gone.
    pub(crate) fn link_closed(&self, link: LinkId) {
        let mut inner = self.lock();
        if self.remove_link(&mut inner, link) {
            self.feed_locked(&mut inner, Event::LinkClosed { link });
        }
    }

    /// The snapshot of a session is complete.
    pub(crate) fn loaded(&self, session: u64, loaded: Box<Loaded>) {
        let mut inner = self.lock();
        let wanted =
            inner.loading.filter(|l| inner.links.get(l).is_some_and(|e| e.session == session));
        match wanted {
            Some(link) => self.follow(&mut inner, link, loaded),
            None if inner.links.values().any(|e| e.session == session) => {
                inner.early = Some((session, loaded))
            }
            // Its session is over.
            None => {}
        }
    }

    /// Ends all threads of the VM.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.is_closed = true;
        for link in inner.links.values() {
            link.sender.abort();
        }
        inner.links.clear();
        inner.arbiter = None;
        inner.protect = None;
        for (_, flag) in std::mem::take(&mut inner.protect_running).into_values() {
            flag.store(true, Ordering::SeqCst);
        }
        self.mailbox.post(Mail::Close);
    }

    #[expect(clippy::too_many_lines, reason = "one arm a command")]
    fn execute(&self, inner: &mut Inner, command: Command, events: &mut VecDeque<Event>) {
        match command {
            Command::Send { link, message } => {
                if let Message::Protected { .. } = &message {
                    // From now on it is as far as the primary, nearly.
                    inner.each_local(|reads, _| reads.set_on(true));
                }
                let Some(entry) = inner.links.get_mut(&link) else { return };
                if let Err(e) = entry.sender.send(&replica::encode(&message)) {
                    inner.last_problem = Some(format!("link to peer failed: {e}"));
                    entry.sender.abort();
                    self.remove_link(inner, link);
                    events.push_back(Event::LinkClosed { link });
                }
            }
            Command::DropLink { link, reason } => {
                let status = inner.node.status();
                tracing(
                    self,
                    &format!(
                        "drops a link: {reason} (now {:?}, {:?})",
                        status.role, status.protection
                    ),
                );
                self.remove_link(inner, link);
            }
            Command::ArbiterRead { op } => Self::ask(inner, Question::Read { op }, events),
            Command::ArbiterCas { op, expected, new } => {
                let name = |h: &Option<HostId>| {
                    h.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string)
                };
                let (live, secondary) = (name(&new.live), name(&new.secondary));
                tracing(
                    self,
                    &format!(
                        "claims generation {}: live {live}, secondary {secondary}",
                        new.generation
                    ),
                );
                Self::ask(inner, Question::Cas { op, expected, new }, events);
            }
            Command::RunFresh { generation } => {
                // An earlier machine may have ended while it was paused.
                self.mailbox.set_paused(false);
                self.mailbox.set_throttle(0);
                self.mailbox.post(Mail::Run { generation });
            }
            Command::StartRefused { current } => {
                inner.start_outcome = Some(StartOutcome::Refused {
                    live: current.as_ref().and_then(|r| r.live.clone()).map(|h| h.0),
                    generation: current.map_or(0, |r| r.generation),
                });
            }
            Command::Stopped => self.mailbox.post(Mail::Discard { off: None }),
            Command::Release { up_to_icount } => self.release(inner, up_to_icount),
            Command::Throttle { permille } => self.mailbox.set_throttle(permille),
            Command::PauseVcpu => {
                tracing(self, "the guest waits for its secondary");
                self.mailbox.set_paused(true);
                self.mailbox.post(Mail::Wake);
            }
            Command::ResumeVcpu => {
                tracing(self, "the guest goes on");
                self.mailbox.set_paused(false);
                self.mailbox.post(Mail::Wake);
            }
            Command::StopMachine => self.mailbox.post(Mail::StopMachine),
            Command::StartProtect { attempt, host } => {
                let is_abandoned = Arc::new(AtomicBool::new(false));
                for (_, flag) in std::mem::take(&mut inner.protect_running).into_values() {
                    flag.store(true, Ordering::SeqCst);
                }
                let running = (host.0.clone(), Arc::clone(&is_abandoned));
                inner.protect_running.insert(attempt, running);
                self.percent.store(0, Ordering::Relaxed);
                let job = ProtectJob { attempt, host, is_abandoned };
                if inner.protect.as_ref().is_none_or(|p| p.send(job).is_err()) {
                    let reason = "the VM is being closed".to_owned();
                    events.push_back(Event::ProtectFailed { attempt, reason });
                }
            }
            Command::AbandonProtect { attempt } => {
                if let Some((_, flag)) = inner.protect_running.remove(&attempt) {
                    flag.store(true, Ordering::SeqCst);
                }
                self.mailbox.post(Mail::AbandonSnapshot { attempt });
            }
            Command::LoadSnapshot { link, at: _ } => {
                inner.loading = Some(link);
                inner.is_handed_over = false;
                inner.primary = Some(link);
                (inner.off, inner.disk_problem) = (None, None);
                inner.limits.clear();
                let session = inner.links.get(&link).map(|e| e.session);
                match inner.early.take() {
                    Some((s, loaded)) if Some(s) == session => self.follow(inner, link, loaded),
                    other => inner.early = other,
                }
            }
            Command::Replay { bytes, end } => self.mailbox.post(Mail::Replay { bytes, end }),
            Command::GoLive { generation, at, resend_after } => {
                inner.primary = None;
                if let Some(ports) = &inner.ports {
                    Self::tell_generation(&ports.disks, generation);
                }
                self.mailbox.set_paused(false);
                self.mailbox.set_throttle(0);
                self.mailbox.post(Mail::GoLive { generation, at, resend_after });
            }
            // Whether there is anything to keep the machine's thread knows best.
            Command::Discard { keep_state: _ } => {
                inner.loading = None;
                inner.primary = None;
                inner.early = None;
                self.mailbox.post(Mail::Discard { off: inner.off.take() });
            }
            Command::Halt { reason } => {
                // The vCPU thread closes the devices; what it makes until then is held by nobody's leave.
                inner.held.clear();
                inner.last_problem = Some(reason.to_string());
                // Nor is anything written that waits in the queues of shared disks.
                for lock in
                    inner.ports.iter().flat_map(|p| &p.disks).filter_map(|d| d.lock.as_ref())
                {
                    lock.give_up(&reason.to_string());
                }
                self.mailbox.post(Mail::Halt);
            }
        }
    }

    /// Gives a loaded machine to the vCPU thread, which tells the core once it has it.
    fn follow(&self, inner: &mut Inner, link: LinkId, loaded: Box<Loaded>) {
        inner.loading = None;
        inner.released = loaded.pos.icount;
        inner.tail.clear();
        self.mailbox.post(Mail::Follow { link, loaded });
    }

    /// Asks the arbiter for the shell; when the VM is being closed, nobody answers.
    pub(crate) fn ask_arbiter(&self, question: Question) {
        if let Some(arbiter) = &self.lock().arbiter {
            drop(arbiter.send(question));
        }
    }

    fn ask(inner: &Inner, question: Question, events: &mut VecDeque<Event>) {
        let (Question::Read { op } | Question::Cas { op, .. }) = question else { return };
        if inner.arbiter.as_ref().is_none_or(|a| a.send(question).is_err()) {
            events.push_back(Event::ArbiterReply { op, reply: ArbiterReply::Unreachable });
        }
    }

    /// Lets held outputs leave.
    fn release(&self, inner: &mut Inner, up_to_icount: u64) {
        let Inner { held, ports, released, .. } = inner;
        *released = (*released).max(up_to_icount);
        while let Some(output) = held.pop_until(up_to_icount) {
            if let Some(ports) = ports.as_mut() {
                ports.send(output.kind);
            }
        }
    }

    /// At go-live: sends the outputs again that may not have left, then announces the guest's addresses.
    pub(crate) fn resend_and_announce(&self, resend_after: u64) {
        let mut inner = self.lock();
        let Inner { tail, ports, released, .. } = &mut *inner;
        let Some(ports) = ports.as_mut() else { return };
        ports.announce();
        while let Some(output) = tail.pop() {
            if output.icount <= resend_after {
                continue;
            }
            *released = (*released).max(output.icount);
            ports.send(output.kind);
        }
    }

    /// Drops what a machine left behind: held outputs, tail and open devices.
    pub(crate) fn clear_machine(&self) {
        let mut inner = self.lock();
        inner.held.clear();
        inner.batch.clear();
        inner.tail.clear();
        inner.released = 0;
        inner.waits = None;
        let ports = inner.ports.take();
        drop(inner);
        drop(ports);
    }

    /// What the VM is, and with it whether and where it is to be protected.
    pub(crate) fn define(&self, definition: Definition) {
        self.lock().definition = Some(definition);
    }

    /// See [`super::Vm::set_protection`].
    pub(crate) fn set_protection(&self, env: &Env, wanted: Option<bool>, host: Option<String>) {
        let mut inner = self.lock();
        let section =
            inner.definition.as_ref().map(|d| d.config.protection.clone()).unwrap_or_default();
        let hosts = match host {
            Some(host) => vec![host],
            None if section.hosts.is_empty() => env.peers.keys().cloned().collect(),
            None => section.hosts,
        };
        let candidates = hosts.into_iter().filter(|h| *h != env.host).map(HostId).collect();
        let wanted = wanted.unwrap_or(section.enabled);
        self.feed_locked(&mut inner, Event::SetProtection { wanted, candidates });
    }

    /// The host that an attempt to make a secondary is for.
    pub(crate) fn wanted_peer(&self, attempt: u64) -> String {
        let inner = self.lock();
        inner.protect_running.get(&attempt).map_or_else(String::new, |(host, _)| host.clone())
    }

    /// Whether the session's link is still there.
    pub(crate) fn has_session(&self, session: u64) -> bool {
        self.lock().links.values().any(|e| e.session == session)
    }

    /// Whether the snapshot of the session is waited for.
    pub(crate) fn is_loading(&self, session: u64) -> bool {
        let inner = self.lock();
        inner.loading.is_some_and(|l| inner.links.get(&l).is_some_and(|e| e.session == session))
    }

    /// The snapshot of a session cannot be had.
    pub(crate) fn load_failed(&self, session: u64, reason: String) {
        let mut inner = self.lock();
        let wanted = inner
            .loading
            .is_some_and(|l| inner.links.get(&l).is_some_and(|e| e.session == session));
        if wanted {
            self.feed_locked(&mut inner, Event::ReplicaFailed { reason });
        } else if let Some((&link, _)) = inner.links.iter().find(|(_, e)| e.session == session) {
            self.remove_link(&mut inner, link);
            self.feed_locked(&mut inner, Event::LinkClosed { link });
        }
    }

    /// Whether this host runs the VM or is about to.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.lock().node.status().role, Role::Primary | Role::GoingLive)
    }
}

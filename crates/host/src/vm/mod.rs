//! One VM on one host: threads, machine, protocol core, links and devices tied together.
//!
//! # Place
//! The daemon has a [`Vm`] for each VM that it runs, follows, or was asked to follow.
//!
//! # Threads
//! - vCPU: owns the machine ([`vcpu`], [`primary`], [`secondary`]).
//! - one reader for each link; it acknowledges log and releases output itself ([`shared`]).
//! - arbiter: asks the arbiter, which may take its time.
//! - protect: sends snapshots ([`protect`], [`bulk`]).
//! - timer: tells the core that time passes.
//! - one for each tap and each disk.

mod batch;
mod bulk;
mod clock;
mod copies;
mod definition;
mod disks;
mod engine;
mod evidence;
mod failures;
pub mod flight;
mod local_reads;
mod mailbox;
mod moving;
mod origin;
mod outputs;
mod owning;
mod packets;
mod ports;
mod primary;
mod protect;
mod restore;
mod secondary;
mod shared;
mod snapshots;
pub(crate) mod standing;
mod vcpu;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use machine::engine::EngineKind;
use machine::io::{HaltReason, Input};
use replica::{
    ArbiterReply, Config, Event, HostId, LinkId, LossReason, NotProtected, Protection, Role,
};

pub use self::definition::Definition;
pub use self::disks::ChangeDiskError;
pub use self::engine::EngineUse;
pub(crate) use self::engine::choose as choose_engine;
pub use self::origin::{Origin, Prepared};
pub(crate) use self::protect::{BULK, LOG, Preamble};
pub use self::restore::{Created, RestoreError, Target, prepare};
pub use self::shared::StartOutcome;
pub use self::snapshots::SnapshotTaken;

use self::owning::Waits;
use self::shared::{Question, Shared, mono_now, vm_id};
use self::vcpu::{Mail, Vcpu, tracing};
use crate::arbiter::{self, Arbiter, CasOutcome};
use crate::channel::{Link, Received, Secret};
use crate::config::{ArbiterSection, DiskMode, DiskSection, FenceSection, PeerSection};
use crate::console::ConsoleHub;
use crate::control::{Detail, DiskCopy, FailoverTimes, Progress, VmStatus};
use crate::one_line::one_line;

/// Time for one question to the arbiter.
const ARBITER_TIME_MAX: Duration = Duration::from_secs(1);
/// Mail that may wait for a machine when something is typed.
const TYPED_WAITING_MAX: usize = 1024;
/// How long a start may wait for the arbiter and the devices.
const START_TIME_MAX: Duration = Duration::from_secs(15);

/// What all VMs of a host have in common.
#[derive(Debug)]
pub struct Env {
    /// This host.
    pub host: String,
    /// The secret that all hosts share.
    pub secret: Secret,
    /// Where the other hosts are.
    pub peers: BTreeMap<String, PeerSection>,
    /// This host's address on the network of the log.
    pub log_source: Option<IpAddr>,
    /// Whether what is sent to peers is made shorter.
    pub compresses: bool,
    /// Who decides which host is live.
    pub arbiter: ArbiterSection,
    /// Directory for what has to be remembered.
    pub state_dir: PathBuf,
    /// Detection time unless a VM says otherwise.
    pub detection_ms: u32,
    /// Most bytes of disks that a new secondary is sent in a second, unless a VM says otherwise.
    pub resync_limit: Option<u64>,
    /// The engine that runs machines here; `None`: the fastest that this host can have.
    pub engine: Option<EngineKind>,
    /// How other hosts are kept from writing to shared disks.
    pub fence: FenceSection,
    /// Standard error is a terminal that a person looks at, not a log: only what went wrong is told.
    pub is_terminal: bool,
}

/// A VM on this host.
#[derive(Debug)]
pub struct Vm {
    shared: Arc<Shared>,
    env: Arc<Env>,
    /// Held through a start: no other lock is waited for longer than it takes. Two starts have one outcome each.
    starting: Mutex<()>,
    /// Held while a snapshot is taken; who wants another one is refused meanwhile.
    snapshots: Mutex<snapshots::Known>,
    /// Held while a disk is moved; who wants another one moved is refused meanwhile.
    moving: Mutex<()>,
}

/// Starts a thread. The threads that acknowledge, release and keep time need little, but at once.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let is_prompt = matches!(name, "link" | "timer" | "arbiter");
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Without the right to it, the VM is protected all the same, less well on a loaded host.
        let _ = is_prompt && crate::priority::realtime();
        run();
    });
    thread.map(drop).map_err(|e| format!("cannot start thread {name}: {e}"))
}

impl Vm {
    /// A VM that this host has no copy of yet.
    ///
    /// # Errors
    /// One line: the arbiter cannot be used as configured, or no thread could be started.
    pub fn new(env: &Arc<Env>, name: &str, detection_ms: u32) -> Result<Self, String> {
        let arbiter = arbiter::open(&env.arbiter, ARBITER_TIME_MAX).map_err(|e| one_line(&e))?;
        Self::with_arbiter(env, name, detection_ms, arbiter)
    }

    /// As [`Self::new`], with an arbiter at hand.
    ///
    /// # Errors
    /// One line: no thread could be started.
    pub fn with_arbiter(
        env: &Arc<Env>,
        name: &str,
        detection_ms: u32,
        arbiter: Box<dyn Arbiter>,
    ) -> Result<Self, String> {
        let mut nonce = [0; 8];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| e.to_string())?;
        let detection_us = u64::from(detection_ms) * 1000;
        let config = Config {
            detection_us,
            heartbeat_us: detection_us / 5,
            ..Config::new(vm_id(name), HostId(env.host.clone()), u64::from_le_bytes(nonce))
        };
        let (questions, asked) = mpsc::channel();
        let (protect_jobs, jobs) = mpsc::channel();
        let shared = Shared::new(name, config, questions, protect_jobs, env.is_terminal);
        let vcpu = Vcpu::new(Arc::clone(&shared), Arc::clone(env));
        spawn("vcpu", move || vcpu.run())?;
        let ask = Arc::clone(&shared);
        spawn("arbiter", move || run_arbiter(&ask, arbiter, &asked))?;
        let (timed, theirs) = (Arc::clone(&shared), Arc::clone(env));
        spawn("timer", move || run_timer(&timed))?;
        let protected = Arc::clone(&shared);
        spawn("protect", move || protect::run(&protected, &theirs, &jobs))?;
        Ok(Self {
            shared,
            env: Arc::clone(env),
            starting: Mutex::new(()),
            snapshots: Mutex::default(),
            moving: Mutex::default(),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether it has no copy here.
    #[must_use]
    pub fn is_spare(&self) -> bool {
        self.shared.lock().node.status().role == Role::Spare
    }

    /// Starts it here, and waits until it runs or cannot.
    #[must_use]
    pub fn start(&self, definition: Definition) -> StartOutcome {
        let _one_at_a_time = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_spare() {
            let reason = format!("VM {} is running or followed here already", self.name());
            return StartOutcome::Failed { reason };
        }
        {
            let mut inner = self.shared.lock();
            inner.start_outcome = None;
            inner.halted = None;
            inner.last_problem = None;
        }
        self.shared.mailbox.post(Mail::Define(Box::new(definition.clone())));
        self.shared.define(definition);
        self.set_protection(None, None);
        self.shared.feed(Event::Start);
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            if let Some(outcome) = self.shared.lock().start_outcome.take() {
                return outcome;
            }
            // Once the right to run is won it may take long: disks may have to be written.
            if Instant::now() > deadline && !self.shared.is_making.load(Ordering::SeqCst) {
                self.shared.feed(Event::Stop);
                let reason =
                    "the arbiter does not answer; make it reachable and start again".to_owned();
                return StartOutcome::Failed { reason };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether a secondary is wanted (`None`: as the definition says), and where (`None`: as it says).
    pub fn set_protection(&self, wanted: Option<bool>, host: Option<String>) {
        self.shared.set_protection(&self.env, wanted, host);
    }

    /// Why it cannot have a secondary, if it cannot.
    #[must_use]
    pub fn unprotectable(&self) -> Option<String> {
        self.shared.lock().definition.as_ref()?.config.unprotectable()
    }

    /// A shared disk that it writes to without a lock.
    pub(crate) fn unlocked(&self) -> Option<String> {
        let inner = self.shared.lock();
        let mut disks = inner.definition.as_ref()?.config.disks.iter();
        let is_unlocked =
            |d: &&DiskSection| d.mode == DiskMode::Shared && !d.readonly && !d.is_locked();
        disks.find(is_unlocked).map(DiskSection::place)
    }

    /// Powers it off.
    pub fn power_off(&self) {
        self.shared.mailbox.post(Mail::PowerOff);
    }

    /// Lets the secondary go live.
    pub fn switch_over(&self) {
        self.shared.feed(Event::SwitchOver);
    }

    /// A console's output.
    #[must_use]
    pub fn console(&self, dev: u8) -> Option<&ConsoleHub> {
        self.shared.consoles.get(usize::from(dev))
    }

    /// Types at a console.
    pub fn type_at(&self, dev: u8, bytes: &[u8]) {
        for piece in bytes.chunks(4096) {
            let mail = Mail::Input(Input::Console { dev, bytes: piece.to_vec() });
            // A console that nobody reads loses what is typed, as the UART's FIFO does.
            let _ = self.shared.mailbox.post_bounded(mail, TYPED_WAITING_MAX);
        }
    }

    /// Whether this host runs it or is about to.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.shared.is_live()
    }

    /// A primary connected for log.
    pub(crate) fn accept_log(&self, link: Link, session: u64) {
        if let Err(e) = serve_link(&self.shared, link, session) {
            tracing(&self.shared, &e);
        }
    }

    /// A primary connected to send a snapshot; it is told no unless this host is a spare, or is following it already in
    /// this very session, whose other connection may be quicker.
    pub(crate) fn accept_bulk(&self, mut link: Link, session: u64) -> Result<(), String> {
        if !self.is_spare() && !self.shared.is_loading(session) {
            let reason = format!("VM {} has another role there", self.name());
            drop(bulk::answer(&mut link.sender, &bulk::Answer::Refused(reason)));
            return Err(format!("VM {} has another role here", self.name()));
        }
        let shared = Arc::clone(&self.shared);
        let env = Arc::clone(&self.env);
        let receive = move || {
            let started = Instant::now();
            let go_on =
                || started.elapsed() < Duration::from_secs(2) || shared.has_session(session);
            match bulk::receive(&mut link, &shared, &env.state_dir, go_on) {
                Ok(loaded) => {
                    // The other connection was made first, but its thread may be slower.
                    while go_on() && !shared.has_session(session) {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    // Without it the primary tries again.
                    drop(bulk::answer(&mut link.sender, &bulk::Answer::Taken));
                    shared.loaded(session, Box::new(loaded));
                }
                Err(reason) => {
                    // The primary shows the reason to people; if it is gone, there is nobody to tell.
                    let refused = bulk::Answer::Refused(reason.clone());
                    drop(bulk::answer(&mut link.sender, &refused));
                    tracing(
                        &shared,
                        &format!("the snapshot from {} was not taken: {reason}", link.peer),
                    );
                    shared.load_failed(session, reason);
                }
            }
        };
        spawn("bulk", receive)
    }

    /// Why its machine is off, once it is.
    #[must_use]
    pub fn halted(&self) -> Option<HaltReason> {
        self.shared.lock().halted.clone()
    }

    /// The engine that runs its machine here; with what that had at the end, once the machine is off.
    #[must_use]
    pub fn engine(&self) -> Option<EngineUse> {
        self.shared.lock().engine
    }

    /// Ends it on this host, without a word to anybody.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Its state as this host knows it.
    #[must_use]
    pub fn status(&self) -> VmStatus {
        let inner = self.shared.lock();
        let status = inner.node.status();
        let (state, detail, reason, remedy) = describe(&status.protection);
        // Of a divergence this host knows more than the protocol: where it keeps what.
        let has_diverged = matches!(
            &status.protection,
            Protection::NotProtected(NotProtected::NeedSecondary {
                reason: Some(LossReason::Diverged { .. })
            })
        );
        let reason = match inner.last_problem.clone() {
            Some(problem) if has_diverged => Some(problem),
            problem => reason.or(problem),
        };
        // One that may not run yet is not running, whoever won the arbitration.
        let (detail, reason, remedy) = match inner.waits.clone() {
            Some(Waits { reason, remedy }) => {
                (Some(Detail::VmNotRunning), Some(reason), Some(remedy))
            }
            None => (detail, reason, remedy),
        };
        let role = match status.role {
            Role::Primary => crate::control::Role::Primary,
            Role::Secondary | Role::GoingLive => crate::control::Role::Secondary,
            Role::Spare | Role::Halted => crate::control::Role::Stopped,
        };
        let has_machine = role != crate::control::Role::Stopped;
        let (here, there) =
            (Some(self.env.host.clone()), status.peer.as_ref().map(|h| h.0.clone()));
        let (live_host, secondary_host) = match status.role {
            Role::Primary => (here, there),
            Role::Secondary => (there, here),
            Role::GoingLive | Role::Spare | Role::Halted => (None, None),
        };
        let failover = status.last_failover.map(|t| FailoverTimes {
            detection_us: t.detected.micros_since(t.last_heard),
            arbitration_us: t.arbitrated.micros_since(t.detected),
            catch_up_us: t.caught_up.micros_since(t.arbitrated),
            announce_us: inner.announced.announce_us,
            at_unix_ms: inner.announced.at_unix_ms,
        });
        let starting =
            matches!(status.protection, Protection::NotProtected(NotProtected::Starting { .. }));
        let disk_copies = copies::copies(&inner);
        let digests = self.shared.digests.load(Ordering::Relaxed);
        let has_link = inner.wire_bytes().is_some();
        let percent = u8::try_from(self.shared.percent.load(Ordering::Relaxed)).unwrap_or(100);
        VmStatus {
            name: self.shared.name.clone(),
            role,
            state,
            detail,
            reason,
            remedy,
            live_host,
            secondary_host,
            generation: status.generation,
            lag_ms: status.lag_us / 1000,
            log_bytes_per_s: self.shared.log_rate.load(Ordering::Relaxed),
            wire_bytes_per_s: has_link.then(|| self.shared.wire_rate.load(Ordering::Relaxed)),
            log_path: inner.log_path(),
            icount: self.shared.icount.load(Ordering::Relaxed),
            digests: (digests > 0).then_some(digests),
            failover,
            progress: starting.then(|| progress(&disk_copies, percent)),
            protect_pause_us: (inner.arm_pause_us > 0).then_some(inner.arm_pause_us),
            engine: inner.engine.filter(|_| has_machine).map(|e| e.kind.to_string()),
            fenced: inner.fenced.clone(),
            disk_problem: inner.disk_problem.clone(),
            disk_copies,
        }
    }

    /// Makes a secondary differ from its primary.
    #[cfg(test)]
    pub(crate) fn flip_byte(&self) {
        self.shared.mailbox.post(Mail::Flip);
    }

    /// How far the secondary may be behind.
    #[cfg(test)]
    pub(crate) fn lag_bound_us(&self) -> u64 {
        self.shared.lock().node.lag_bound_us()
    }

    /// A disk of the machine that runs here.
    #[cfg(test)]
    pub(crate) fn disk(&self, dev: usize) -> Option<Arc<crate::disk::DiskHandle>> {
        let inner = self.shared.lock();
        Some(Arc::clone(&inner.ports.as_ref()?.disks.get(dev)?.handle))
    }

    /// How long the guest stood still when protection last started, in microseconds.
    #[must_use]
    pub fn arm_pause_us(&self) -> u64 {
        self.shared.lock().arm_pause_us
    }
}

/// How far a new secondary is: its disks first, then its memory.
fn progress(copies: &[DiskCopy], percent: u8) -> Progress {
    let going_on: Vec<_> = copies.iter().filter(|copy| !copy.is_done).collect();
    if going_on.is_empty() {
        return Progress { phase: "copying memory".to_owned(), percent };
    }
    let sum = |of: fn(&DiskCopy) -> u64| going_on.iter().map(|copy| of(copy)).sum::<u64>();
    let percent = sum(|copy| copy.bytes_done) * 100 / sum(|copy| copy.bytes_total).max(1);
    let percent = u8::try_from(percent.min(100)).unwrap_or(100);
    Progress { phase: "copying disks".to_owned(), percent }
}

/// Words for a state of protection: state, detail, reason, remedy.
fn describe(
    protection: &Protection,
) -> (crate::control::Protection, Option<Detail>, Option<String>, Option<String>) {
    let Protection::NotProtected(why) = protection else {
        return (crate::control::Protection::Protected, None, None, None);
    };
    let (detail, reason) = match why {
        NotProtected::Starting { host } => {
            (Detail::Starting, Some(format!("a secondary is being made on {host}")))
        }
        NotProtected::NeedSecondary { reason } => {
            (Detail::NeedSecondary, reason.as_ref().map(ToString::to_string))
        }
        NotProtected::AwaitingArbiter => {
            (Detail::NeedSecondary, Some("the arbiter does not answer".to_owned()))
        }
        NotProtected::Disabled => (Detail::Disabled, None),
        NotProtected::VmNotRunning => (Detail::VmNotRunning, None),
    };
    let remedy = Some(why.remedy().to_owned());
    (crate::control::Protection::NotProtected, Some(detail), reason, remedy)
}

/// Registers a link and starts its reader.
pub(crate) fn serve_link(shared: &Arc<Shared>, link: Link, session: u64) -> Result<LinkId, String> {
    let Link { sender, mut receiver, peer, .. } = link;
    let id = shared.add_link(sender, session);
    let theirs = Arc::clone(shared);
    let read = move || {
        let why = loop {
            match receiver.recv(None) {
                Ok(Received::Frame(frame)) => match replica::decode(&frame) {
                    Ok(message) => theirs.message(id, message),
                    Err(e) => break format!("it sent no message: {e}"),
                },
                Ok(Received::TimedOut) => {}
                Ok(Received::Closed { is_clean: true }) => break "it said goodbye".to_owned(),
                Ok(Received::Closed { is_clean: false }) => {
                    break "the connection was closed".to_owned();
                }
                Err(e) => break one_line(&e),
            }
        };
        tracing(&theirs, &format!("link to {peer} ended: {why}"));
        theirs.link_closed(id);
    };
    if let Err(e) = spawn("link", read) {
        shared.link_closed(id);
        return Err(e);
    }
    Ok(id)
}

/// Asks the arbiter, one question after the other.
fn run_arbiter(
    shared: &Arc<Shared>,
    mut arbiter: Box<dyn Arbiter>,
    questions: &mpsc::Receiver<Question>,
) {
    while let Ok(question) = questions.recv() {
        if shared.lock().is_closed {
            return;
        }
        let disks = shared.kept_disks();
        let mut freed = None;
        let (op, answer) = match question {
            Question::Confirm { answer } => {
                let found = arbiter.read(&shared.name).map(|r| r.map(from_stored));
                let reply = found.map_or(ArbiterReply::Unreachable, ArbiterReply::Read);
                // Who asked may not be waiting any more.
                drop(answer.send(reply));
                shared.mailbox.post(Mail::Wake);
                continue;
            }
            Question::Read { op } => {
                let found =
                    arbiter.read(&shared.name).map(|r| ArbiterReply::Read(r.map(from_stored)));
                (op, found)
            }
            Question::Cas { op, expected, new } => {
                let expected = (expected != 0).then_some(expected);
                freed = new.live.is_none().then_some(new.generation);
                let new = to_stored(&new, &shared.host);
                let outcome = arbiter.compare_and_set(&shared.name, expected, &new);
                (
                    op,
                    outcome.map(|o| match o {
                        CasOutcome::Won => ArbiterReply::Won,
                        CasOutcome::Lost { current } => {
                            ArbiterReply::Lost(current.map(from_stored))
                        }
                    }),
                )
            }
        };
        let reply = answer.unwrap_or_else(|e| {
            shared.lock().last_problem = Some(one_line(&e));
            ArbiterReply::Unreachable
        });
        let won = matches!(&reply, ArbiterReply::Won);
        shared.feed(Event::ArbiterReply { op, reply });
        // The records follow the arbiter's. Where this host falls before they do, that one names it.
        let status = shared.lock().node.status();
        match freed {
            Some(generation) if won => Shared::tell_generation(&disks, generation),
            _ if status.role == Role::Primary => {
                Shared::tell_generation(&disks, status.generation);
            }
            _ => {}
        }
    }
}

fn from_stored(r: arbiter::Record) -> replica::Record {
    replica::Record {
        generation: r.generation,
        live: r.live.map(HostId),
        secondary: r.secondary.map(HostId),
        nonce: r.nonce,
    }
}

/// As `host` stores it: when nobody runs the VM, whoever says so has all that it did.
fn to_stored(r: &replica::Record, host: &str) -> arbiter::Record {
    arbiter::Record {
        generation: r.generation,
        live: r.live.as_ref().map(|h| h.0.clone()),
        secondary: r.secondary.as_ref().map(|h| h.0.clone()),
        nonce: r.nonce,
        copies: if r.live.is_none() { vec![host.to_owned()] } else { Vec::new() },
    }
}

/// Tells the core that time passes, and measures the log's bandwidth.
fn run_timer(shared: &Arc<Shared>) {
    let mut measured = (Instant::now(), 0, 0);
    loop {
        let wakeup = {
            let inner = shared.lock();
            if inner.is_closed {
                return;
            }
            inner.node.next_wakeup()
        };
        let wait = match wakeup {
            Some(at) => at.micros_since(mono_now()),
            None => 20_000,
        };
        if wait > 0 {
            let before = Instant::now();
            let wait = Duration::from_micros(wait.clamp(500, 100_000));
            std::thread::sleep(wait);
            let late = before.elapsed().saturating_sub(wait);
            if late > Duration::from_millis(50) {
                tracing(
                    shared,
                    &format!("this host did not run its daemon for {} ms", late.as_millis()),
                );
            }
        } else {
            shared.feed(Event::Tick);
        }
        let elapsed = measured.0.elapsed();
        if elapsed >= Duration::from_secs(1) {
            let total = shared.log_bytes.load(Ordering::Relaxed);
            let rate = (total - measured.1) as f64 / elapsed.as_secs_f64();
            shared.log_rate.store(rate as u64, Ordering::Relaxed);
            // A new link counts from zero.
            let wire = shared.lock().wire_bytes().unwrap_or(0);
            let rate = wire.checked_sub(measured.2).unwrap_or(wire) as f64 / elapsed.as_secs_f64();
            shared.wire_rate.store(rate as u64, Ordering::Relaxed);
            measured = (Instant::now(), total, wire);
        }
    }
}

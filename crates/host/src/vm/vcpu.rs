//! The vCPU thread: owns the machine, whatever its role.
//!
//! # States
//! ```text
//!   Idle --Run--> Primary --Halt/Discard--> Idle
//!   Idle --Follow--> Secondary --GoLive--> Primary
//!                        '--GoLive--> Waiting --locks of shared disks--> Primary
//! ```
//!
//! # Invariants
//! - INV-VCPU-1: one thread applies everything that the guest can see.
//! - INV-VCPU-2: log that comes before the snapshot is complete is kept, in order.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use eventlog::{ClockBase, Encoder, LogPos};
use machine::Machine;
use machine::io::{BlkOp, Input};
use replica::{Event, LinkId};

use super::Env;
use super::bulk::{Loaded, RamSender};
use super::definition::Definition;
use super::engine::{self, EngineUse};
use super::evidence::{self, Difference, Evidence, Order as KeepOrder};
use super::flight::FlightPlan;
use super::local_reads::LocalReads;
use super::moving::Switch;
use super::origin::{Origin, log_start};
use super::owning::{Locks, Owned, Owning, Waits};
use super::primary::Primary;
use super::secondary::Secondary;
use super::shared::{Shared, StartOutcome};
use super::snapshots::{Order, Run};
use crate::disk::keeper::KeeperOrder;
use crate::disk::lock::ImageLock;
use crate::disk::record::CheckpointId;
use crate::disk::{Completion, DiskHandle};
use crate::one_line::one_line;
use crate::recording::Recorder;

/// What other threads tell the vCPU thread.
#[derive(Debug)]
pub(crate) enum Mail {
    /// Look at flags again.
    Wake,
    /// Packets for the guest wait in their queue, which was empty.
    Packets,
    /// Something for the guest.
    Input(Input),
    /// A disk finished a request.
    DiskDone {
        /// Which opening of the disks it comes from: requests of another machine may have had the same ids.
        epoch: u64,
        done: Completion,
    },
    /// Let a disk's new image take the place of its old one.
    SwitchDisk(Box<Switch>),
    /// Start the VM from its disks.
    Run { generation: u64 },
    /// Take a snapshot and send it.
    Snapshot { attempt: u64, link: LinkId, sender: Box<RamSender> },
    /// Say what the machine is that runs here.
    DescribeRun(mpsc::Sender<Run>),
    /// Take a snapshot and write it.
    TakeSnapshot(Box<Order>),
    /// The snapshot for a secondary is not wanted any more.
    AbandonSnapshot { attempt: u64 },
    /// The machine to follow with.
    Follow { link: LinkId, loaded: Box<Loaded> },
    /// Log to replay.
    Replay { bytes: Vec<u8>, end: LogPos },
    /// Run live from here.
    GoLive { generation: u64, at: LogPos, resend_after: u64 },
    /// A disk found that the lock of its image is another host's now.
    Overtaken { epoch: u64, reason: String },
    /// Throw the machine away; what shows how it differed is kept.
    Discard {
        /// The VM is off, by the record of this generation, and the log is all that it did: replay it first.
        off: Option<u64>,
    },
    /// On a secondary: there is a checkpoint of the disks at this position of the log.
    Checkpoint { id: CheckpointId, at: LogPos, settled: Option<CheckpointId> },
    /// Another host has the VM.
    Halt,
    /// Stop at a position and say so.
    StopMachine,
    /// The operator wants the VM off.
    PowerOff,
    /// This host's image of a disk has grown: tell the guest.
    DiskGrown { dev: u8, size: u64, told: mpsc::Sender<bool> },
    /// The secondary's state differs: keep this machine's as well.
    KeepState(Box<Difference>),
    /// The VM's definition.
    Define(Box<Definition>),
    /// The VM is being closed: end the thread.
    Close,
    /// A test changes a byte of RAM behind the guest's back.
    #[cfg(test)]
    Flip,
}

/// Disks by device index, with whether each is mirrored.
pub(crate) type Disks = Vec<DiskPort>;

/// An open disk.
#[derive(Debug, Clone)]
pub(crate) struct DiskPort {
    pub(crate) handle: Arc<DiskHandle>,
    /// Each replica has its own copy.
    pub(crate) is_mirrored: bool,
    /// A record is kept of what this one differs in.
    pub(crate) is_kept: bool,
    /// The lock of a shared image that this host may write to.
    pub(crate) lock: Option<Arc<ImageLock>>,
    /// Of a shared disk that the secondary reads by itself.
    pub(crate) reads: Option<Arc<LocalReads>>,
}

impl DiskPort {
    /// Has the machine's request carried out, now that nothing is in its way but reads of the secondary.
    pub(crate) fn submit(&self, id: u64, op: BlkOp) {
        let mut submit = |id, op| self.handle.submit(id, op);
        match (&self.reads, &op) {
            (None, _) => submit(id, op),
            (Some(reads), BlkOp::Read { .. }) => reads.read(id, op, &mut submit),
            (Some(reads), _) => reads.write(id, op, &mut submit),
        }
    }
}

/// Completions of a replica's own disks that the log has not named yet.
pub(crate) type Completions = BTreeMap<(u8, u64), Completion>;

enum Role {
    Idle,
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
    Waiting(Box<Waiting>),
}

/// A secondary that won the arbitration, and waits for the locks of shared disks.
struct Waiting {
    secondary: Box<Secondary>,
    generation: u64,
    at: LogPos,
    resend_after: u64,
    owning: Owning,
    locks: Option<Locks>,
    /// What a live machine is asked to do meanwhile.
    kept: Vec<Mail>,
}

/// The thread's state.
pub(crate) struct Vcpu {
    shared: Arc<Shared>,
    definition: Option<Definition>,
    env: Arc<Env>,
    role: Role,
    /// Log that came before the snapshot.
    early_log: VecDeque<(Vec<u8>, LogPos)>,
    /// Writes what a secondary left behind.
    keeping: Option<JoinHandle<()>>,
}

impl Vcpu {
    pub(crate) fn new(shared: Arc<Shared>, env: Arc<Env>) -> Self {
        let early_log = VecDeque::new();
        Self { shared, definition: None, env, role: Role::Idle, early_log, keeping: None }
    }

    /// The thread's main function.
    pub(crate) fn run(mut self) {
        loop {
            for mail in self.shared.mailbox.take() {
                if matches!(mail, Mail::Close) {
                    self.role = Role::Idle;
                    self.shared.clear_machine();
                    return;
                }
                self.handle(mail);
            }
            match &mut self.role {
                Role::Idle => self.shared.mailbox.wait(None),
                Role::Primary(p) => p.step(&self.shared),
                Role::Secondary(s) => {
                    s.step(&self.shared);
                    if s.is_over() {
                        // What has come since the VM was off is of the next session.
                        self.let_go();
                    }
                }
                Role::Waiting(_) => self.wait_for_locks(),
            }
        }
    }

    fn handle(&mut self, mail: Mail) {
        match (mail, &mut self.role) {
            (Mail::Wake | Mail::Close, _) => {}
            (Mail::Run { generation }, _) => self.start(generation),
            (Mail::Follow { link, loaded }, _) => self.follow(link, loaded),
            (Mail::Replay { bytes, end }, Role::Secondary(s)) if !s.is_off() => s.push(bytes, end),
            (Mail::Replay { bytes, end }, _) => self.early_log.push_back((bytes, end)),
            (Mail::GoLive { generation, at, resend_after }, Role::Secondary(_)) => {
                self.go_live(generation, at, resend_after);
            }
            (Mail::Discard { off: Some(generation) }, Role::Secondary(s)) => {
                self.early_log.clear();
                s.replay_rest(&self.shared, generation);
            }
            (Mail::SwitchDisk(switch), _) => {
                let result = self.switch_disk(&switch);
                switch.tell(result);
            }
            (Mail::Discard { .. }, _) => self.discard(),
            (Mail::Checkpoint { id, at, settled }, Role::Secondary(s)) if !s.is_off() => {
                s.expect_checkpoint(id, at, settled);
            }
            (Mail::Halt, _) => {
                self.discard();
                // The machine is gone: this host may be used as a spare.
                self.shared.feed(Event::Reset);
            }
            #[cfg(test)]
            (Mail::Flip, Role::Secondary(s)) => s.flip_byte(),
            #[cfg(test)]
            (Mail::Flip, _) => {}
            (Mail::Define(definition), _) => self.definition = Some(*definition),
            (Mail::KeepState(seen), Role::Primary(p)) => {
                p.keep_state(KeepOrder::new(&self.env, &self.shared, *seen));
            }
            (Mail::DiskDone { epoch, .. }, _)
                if epoch != self.shared.disk_epoch.load(Ordering::Relaxed) => {}
            (Mail::Overtaken { epoch, .. }, _)
                if epoch != self.shared.disk_epoch.load(Ordering::Relaxed) => {}
            (Mail::DiskDone { done, .. }, Role::Secondary(s)) => s.disk_done(&self.shared, done),
            (Mail::DiskDone { done, .. }, Role::Waiting(w)) => {
                w.secondary.disk_done(&self.shared, done);
            }
            (
                mail @ (Mail::Snapshot { .. }
                | Mail::AbandonSnapshot { .. }
                | Mail::DiskGrown { .. }),
                Role::Waiting(w),
            ) => w.kept.push(mail),
            (Mail::PowerOff, Role::Waiting(_)) => {
                self.give_up("stopped before it ran here".to_owned())
            }
            (mail, Role::Primary(p)) => p.handle(&self.shared, mail),
            // Inputs for a machine that is not live here, and news of what is gone.
            (
                Mail::Input(_)
                | Mail::Packets
                | Mail::DiskDone { .. }
                | Mail::GoLive { .. }
                | Mail::Snapshot { .. }
                | Mail::AbandonSnapshot { .. }
                | Mail::DescribeRun(_)
                | Mail::TakeSnapshot(_)
                | Mail::StopMachine
                | Mail::PowerOff
                | Mail::Overtaken { .. }
                | Mail::DiskGrown { .. }
                | Mail::KeepState(_)
                | Mail::Checkpoint { .. },
                Role::Idle | Role::Secondary(_) | Role::Waiting(_),
            ) => {}
        }
    }

    /// Opens a disk at another place of this host, which has what is here; says where it was.
    fn switch_disk(&mut self, switch: &Switch) -> Result<PathBuf, String> {
        let gone = || "the VM is not here any more".to_owned();
        let index = usize::from(switch.dev);
        let disks = match &mut self.role {
            Role::Primary(p) => p.disks_mut(),
            Role::Secondary(s) => s.disks_mut(),
            Role::Idle | Role::Waiting(_) => return Err(gone()),
        };
        // From here until the end no request goes to the disk: this thread alone has any.
        disks.get(index).ok_or_else(gone)?.handle.freeze_copy(0);
        switch.wait()?;
        let definition = self.shared.lock().definition.clone().ok_or_else(gone)?;
        let from = definition.config.disks[index].path.clone();
        let epoch = self.shared.disk_epoch.load(Ordering::Relaxed);
        let (port, moved) = switch.carry_out(&self.env, &self.shared.name, &from, |to| {
            let mut moved = definition.clone();
            moved.config.disks[index].path = to.to_owned();
            let port = moved.open_disk(&self.shared, index, epoch, None)?;
            moved.keep_record(&self.shared, &self.env, &port.handle, switch.dev)?;
            Ok((port, moved))
        })?;
        // Not to be ended under the lock, which its thread may wait for.
        let old = std::mem::replace(&mut disks[index], port);
        if let Role::Secondary(s) = &mut self.role {
            s.place_disk(index, &moved.config.disks[index].path);
        }
        let disks = match &mut self.role {
            Role::Primary(p) => p.disks_mut().clone(),
            Role::Secondary(s) => s.disks_mut().clone(),
            Role::Idle | Role::Waiting(_) => return Err(gone()),
        };
        {
            let mut inner = self.shared.lock();
            inner.definition = Some(moved.clone());
            if let Some(ports) = &mut inner.ports {
                ports.set_disks(disks.clone());
            }
        }
        if let Role::Primary(_) = &self.role {
            // What is set from here on is set for the new image.
            moved.limit(&self.shared, &disks);
        }
        drop(old);
        self.definition = Some(moved);
        Ok(from)
    }

    fn start(&mut self, generation: u64) {
        // What an earlier machine here still does is not waited for.
        self.discard();
        self.shared.is_making.store(true, Ordering::SeqCst);
        let made = self.make_machine(generation);
        let outcome = match made {
            Ok(primary) => {
                self.role = Role::Primary(Box::new(primary));
                StartOutcome::Running
            }
            Err(reason) => StartOutcome::Failed { reason },
        };
        let failed = matches!(outcome, StartOutcome::Failed { .. });
        tracing(&self.shared, &format!("start in generation {generation}: {outcome:?}"));
        self.shared.lock().start_outcome = Some(outcome);
        self.shared.is_making.store(false, Ordering::SeqCst);
        if failed {
            self.shared.clear_machine();
            self.shared.feed(Event::Stop);
        }
    }

    /// The locks of the shared disks of a machine that is started.
    fn lock_disks(&self, definition: &Definition, generation: u64) -> Result<Locks, String> {
        let Some(mut owning) = Owning::new(&self.env, definition, generation, false) else {
            return Ok(Locks::new());
        };
        if self.env.fence.is_empty() && definition.config.protection.enabled {
            let what = "no [fence] on this host: when another one that holds the lock of a shared disk hangs or is cut off, \
                        taking over waits until it is fenced by hand";
            tracing(&self.shared, what);
        }
        loop {
            match owning.poll(&self.shared) {
                Owned::Yes(locks) => return Ok(locks),
                Owned::Lost(reason) => return Err(reason),
                Owned::NotYet(Waits { reason, remedy }) => {
                    if owning.waited() > LOCKS_TIME_MAX && !owning.is_fencing() {
                        return Err(format!("it {reason}; {remedy}"));
                    }
                }
            }
            std::thread::sleep(owning.pause());
        }
    }

    fn make_machine(&self, generation: u64) -> Result<Primary, String> {
        let definition =
            self.definition.as_ref().ok_or("no definition of this VM is known here")?;
        // Before a disk gets the contents that a state at hand says.
        let locks = self.lock_disks(definition, generation)?;
        let (mut machine, log, restored) = match definition.origin.take()? {
            None => {
                let (config, images) = definition.machine()?;
                let machine = Machine::new(config, images).map_err(|e| e.to_string())?;
                (machine, (LogPos::default(), ClockBase::default()), None)
            }
            Some(prepared) => {
                let (machine, restored) = prepared.begin()?;
                let log = log_start(&machine);
                (machine, log, restored)
            }
        };
        self.choose_engine(&mut machine);
        crate::huge::advise(machine.ram().bytes());
        let disks = definition.open(&self.shared, &self.env, Some(&locks))?;
        let create = definition.config.protection.enabled;
        for disk in &disks {
            disk.handle.keep(KeeperOrder::Generation { generation, create });
        }
        let recording = match &definition.record {
            Some(options) => {
                let mut options = options.clone();
                options.about.engine = machine.engine().to_string();
                Recorder::start(options, &mut machine).map_err(|e| one_line(&e))?
            }
            None => Recorder::default(),
        };
        let encoder = Encoder::new(log.0, log.1);
        if matches!(definition.origin, Origin::State(_))
            && let Some(ports) = &self.shared.lock().ports
        {
            // Its guest believes that the network knows where it is.
            ports.announce();
        }
        definition.bound_lag(&self.shared);
        let primary = Primary::new(machine, disks, encoder, definition).recorded(recording);
        Ok(primary.beginning(restored))
    }

    /// Gives a machine this host's engine.
    fn choose_engine(&self, machine: &mut Machine) {
        engine::choose(machine, self.env.engine, &format!("vm {}", self.shared.name));
        self.shared.lock().engine = Some(EngineUse::of(machine));
    }

    fn follow(&mut self, link: LinkId, mut loaded: Box<Loaded>) {
        if matches!(self.role, Role::Secondary(_)) {
            // It still replays the rest of an earlier log.
            self.role = Role::Idle;
            self.shared.clear_machine();
        }
        let disks = match loaded.definition.open(&self.shared, &self.env, None) {
            Ok(disks) => disks,
            Err(reason) => return self.shared.feed(Event::ReplicaFailed { reason }),
        };
        self.definition = Some(loaded.definition.clone());
        self.shared.define(loaded.definition.clone());
        // Somebody wanted this replica, whatever the definition says: when it goes live, it gets one of its own.
        self.shared.set_protection(&self.env, Some(true), None);
        self.choose_engine(&mut loaded.machine);
        let plan = FlightPlan::of(&self.env, &loaded.definition);
        let flight = plan.map(|plan| plan.prepare(&loaded.machine));
        let mut secondary = Secondary::new(*loaded, disks, flight);
        if evidence::has_differed(&self.env, &self.shared.name) {
            // It may differ again before it has caught up, and no recording would tell why.
            secondary.take_off();
        }
        for (bytes, end) in self.early_log.drain(..) {
            secondary.push(bytes, end);
        }
        self.role = Role::Secondary(Box::new(secondary));
        // Not before: a replica whose devices cannot be opened is none.
        self.shared.feed(Event::SnapshotLoaded { link });
    }

    fn go_live(&mut self, generation: u64, at: LogPos, resend_after: u64) {
        let Role::Secondary(secondary) = std::mem::replace(&mut self.role, Role::Idle) else {
            return;
        };
        let is_handed_over = self.shared.lock().is_handed_over;
        let definition = secondary.definition();
        match Owning::new(&self.env, definition, generation, is_handed_over) {
            None => self.run_live(secondary, generation, at, resend_after),
            Some(owning) => {
                let (locks, kept) = (None, Vec::new());
                let waiting =
                    Waiting { secondary, generation, at, resend_after, owning, locks, kept };
                self.shared.lock().waits = Some(Waits::default());
                self.role = Role::Waiting(Box::new(waiting));
                self.wait_for_locks();
            }
        }
    }

    fn run_live(
        &mut self,
        secondary: Box<Secondary>,
        generation: u64,
        at: LogPos,
        resend_after: u64,
    ) {
        let primary = secondary.into_primary(&self.shared, at, resend_after);
        tracing(&self.shared, &format!("live in generation {generation} from {at}"));
        self.role = Role::Primary(Box::new(primary));
    }

    /// Goes live once this host has the locks of the shared disks; nothing leaves before.
    fn wait_for_locks(&mut self) {
        let Role::Waiting(waiting) = &mut self.role else { return };
        if waiting.locks.is_none() {
            match waiting.owning.poll(&self.shared) {
                Owned::Yes(locks) => waiting.locks = Some(locks),
                Owned::Lost(reason) => return self.give_up(reason),
                Owned::NotYet(waits) => {
                    let pause = waiting.owning.pause();
                    self.shared.lock().waits = Some(waits);
                    return self.shared.mailbox.wait(Some(Instant::now() + pause));
                }
            }
        }
        let Role::Waiting(mut waiting) = std::mem::replace(&mut self.role, Role::Idle) else {
            return;
        };
        let locks = waiting.locks.clone().unwrap_or_default();
        if let Err(reason) = waiting.secondary.own(&self.shared, &locks) {
            let remedy = "make its shared disks usable on this host".to_owned();
            let waits = Waits { reason: format!("waits for its disks: {reason}"), remedy };
            let before = self.shared.lock().waits.replace(waits.clone());
            if before.as_ref() != Some(&waits) {
                tracing(&self.shared, &format!("it {}", waits.reason));
            }
            self.role = Role::Waiting(waiting);
            return self.shared.mailbox.wait(Some(Instant::now() + DISKS_PAUSE));
        }
        self.shared.lock().waits = None;
        let Waiting { secondary, generation, at, resend_after, kept, .. } = *waiting;
        self.run_live(secondary, generation, at, resend_after);
        kept.into_iter().for_each(|mail| self.handle(mail));
    }

    /// A machine that waits to run here is not to: the arbiter says whose it is.
    fn give_up(&mut self, reason: String) {
        tracing(&self.shared, &format!("does not go live: {reason}"));
        let mut inner = self.shared.lock();
        inner.waits = None;
        inner.last_problem = Some(reason);
        drop(inner);
        self.discard();
        self.shared.feed(Event::Stop);
    }

    fn discard(&mut self) {
        self.early_log.clear();
        self.let_go();
    }

    /// Lets the machine go, and what it has open.
    fn let_go(&mut self) {
        let role = std::mem::replace(&mut self.role, Role::Idle);
        if let Role::Waiting(_) = &role {
            self.shared.lock().waits = None;
        }
        if let Role::Secondary(secondary) = role {
            self.keep_evidence(secondary.into_evidence());
        }
        self.shared.clear_machine();
    }

    /// Keeps what a secondary leaves behind that differed.
    fn keep_evidence(&mut self, evidence: Option<Evidence>) {
        let Some(evidence) = evidence else { return };
        if self.keeping.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return tracing(&self.shared, "it diverged again while the state before is written");
        }
        self.keeping = evidence.keep(&self.env, &self.shared);
    }
}

/// A line for the daemon's log.
pub(crate) fn tracing(shared: &Shared, what: &str) {
    if !shared.is_terminal {
        crate::log::line(&format!("vm {} on {}: {what}", shared.name, shared.host));
    }
}

/// How long a wait without a deadline lasts at most, so that a lost wake-up cannot hang a VM.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(1);

/// How long a start waits for the locks of shared disks that somebody has.
const LOCKS_TIME_MAX: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// Pause before disks that could not be opened are tried again.
const DISKS_PAUSE: Duration = Duration::from_millis(500);

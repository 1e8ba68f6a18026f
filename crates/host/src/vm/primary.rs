//! The live machine's loop: run, apply what came, log it, hand outputs to the gate.
//!
//! # Invariants
//! - INV-PRIMARY-1: every input is in the log at the icount at which it was applied, before the machine runs on.
//! - INV-PRIMARY-2: outputs are handed over together with a mark at or after them, so that the log covers them.
//! - INV-PRIMARY-3: while the guest runs, a mark is handed over at least every [`SLICE_US`] microseconds; see
//!   [`super::batch`] for when it is sent.
//!
//! # Determinism
//! The host's clock, the network, disks, consoles and random numbers enter here and nowhere else, as [`Input`]s.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use eventlog::{Encoder, Entry, Record};
use machine::Machine;
use machine::board::NetRoom;
use machine::io::{BlkOp, HaltReason, Input, Output, OutputKind};
use machine::machine::Exit;
use machine::offload::Offloads;
use machine::ram::Epoch;
use replica::{Event, LinkId};

use super::bulk::{RamSender, SnapshotHead};
use super::clock::HostClock;
use super::definition::Definition;
use super::engine::EngineUse;
use super::evidence::{Keeper, Order as KeepOrder};
use super::failures::range_of;
use super::shared::Shared;
use super::snapshots::{Order, Saver};
use super::vcpu::{Completions, Disks, Mail, WAIT_MAX, tracing};
use crate::disk::Completion;
use crate::disk::keeper::{KeeperOrder, MirrorPoint};
use crate::disk::record::CheckpointId;
use crate::recording::Recorder;
use crate::snapshot::{SnapshotId, Sweep};

/// Length of a slice in microseconds of host time.
const SLICE_US: f64 = 1000.0;
/// Log that is handed over at once, in bytes, so that no message gets too long.
const LOG_PIECE_BYTES: usize = 8 << 20;
/// Pause between two parts of a snapshot while the guest does not run: the sender has to keep up anyway.
const PUMP_PAUSE: Duration = Duration::from_micros(200);
/// Digests take no more than this part of the time, as far as [`DIGEST_STRETCH_MAX`] allows.
const DIGEST_SHARE: u32 = 100;
/// A guest that writes to much memory gets digests this much more seldom than it should.
const DIGEST_STRETCH_MAX: u32 = 3;
/// Time between two checkpoints of the disks, where anything was written.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(5);
/// After this long, one that was not answered makes room for the next.
const CHECKPOINT_PATIENCE: Duration = Duration::from_secs(30);
/// A checkpoint that no flush of the guest has made durable for this long gets its own.
pub(super) const FLUSH_AFTER: Duration = Duration::from_secs(3);
/// Time that a slowed guest stands still at once: caches are cold after each.
const THROTTLE_PIECE: Duration = Duration::from_millis(8);
/// Longest that it does before it looks whether the secondary has caught up.
const THROTTLE_PIECE_MAX: Duration = Duration::from_millis(10);
/// Largest request for entropy that is answered, in bytes.
const ENTROPY_MAX: u32 = 65_536;

struct SnapshotUnderWay {
    attempt: u64,
    sender: Box<RamSender>,
}

/// When the disks get checkpoints.
struct Rhythm {
    last: Instant,
    /// Whether anything was written since.
    has_written: bool,
    to_flush: Option<(Instant, CheckpointId)>,
}

/// A live machine.
pub(crate) struct Primary {
    machine: Machine,
    disks: Disks,
    encoder: Encoder,
    recording: Recorder,
    bytes: Vec<u8>,
    /// Outputs that wait for the next hand-over.
    outputs: Vec<Output>,
    clock: HostClock,
    snapshot: Option<SnapshotUnderWay>,
    /// A snapshot for a new secondary that is to follow one for the recording.
    snapshot_next: Option<(LinkId, SnapshotUnderWay)>,
    /// The snapshots that people take.
    saver: Saver,
    /// What is kept of this machine when its secondary differs.
    keeper: Keeper,
    /// What each network device's tap was told that the guest takes; nothing when it was opened.
    offloads: Vec<Offloads>,
    /// Requests that the guest was told are done before this host went live, while its own disk still had them to do.
    settled: BTreeSet<(u8, u64)>,
    last_mark: u64,
    /// Longest next slice in microseconds: until log that waits for more is due.
    slice_us: f64,
    /// How long the guest is still to stand still, so that the secondary keeps up.
    owed: Duration,
    last_digest: (Instant, u64),
    digest_interval: Duration,
    /// How long the last digest took.
    digest_took: Duration,
    is_stopped: bool,
    halt_told: bool,
    /// Why this host had to power the machine off.
    lost: Option<String>,
    rhythm: Rhythm,
    /// Requests that this host's copy failed and the secondary's is to answer.
    withheld: Vec<Completion>,
}

impl Primary {
    /// A machine that goes on from the end of a log.
    pub(crate) fn new(
        machine: Machine,
        disks: Disks,
        encoder: Encoder,
        definition: &Definition,
    ) -> Self {
        let clock = HostClock::attach(machine.mtime(), machine.config().rtc_base_ns);
        Self {
            last_mark: machine.icount(),
            slice_us: SLICE_US,
            owed: Duration::ZERO,
            last_digest: (Instant::now(), machine.icount()),
            offloads: vec![Offloads::default(); machine.config().nets.len()],
            machine,
            disks,
            encoder,
            recording: Recorder::default(),
            bytes: Vec::new(),
            outputs: Vec::new(),
            clock,
            snapshot: None,
            snapshot_next: None,
            saver: Saver::default(),
            keeper: Keeper::default(),
            settled: BTreeSet::new(),
            digest_interval: definition.digest_interval(),
            digest_took: Duration::ZERO,
            is_stopped: false,
            halt_told: false,
            lost: None,
            withheld: Vec::new(),
            rhythm: Rhythm { last: Instant::now(), has_written: false, to_flush: None },
        }
    }

    /// Its disks.
    pub(crate) fn disks_mut(&mut self) -> &mut Disks {
        &mut self.disks
    }

    /// With a recording of everything from here on.
    pub(crate) fn recorded(self, recording: Recorder) -> Self {
        Self { recording, ..self }
    }

    /// As a machine that begins to run here, at power-on or in a state in which it was at an epoch of its memory. What it
    /// waits for there is asked for anew: nobody else has it.
    pub(crate) fn beginning(mut self, restored: Option<(SnapshotId, Epoch)>) -> Self {
        self.saver = Saver::of(restored);
        for kind in self.machine.outstanding() {
            if let OutputKind::Blk { dev, id, op } = kind
                && let Some(disk) = self.disks.get(usize::from(dev)).filter(|d| d.is_mirrored)
            {
                disk.handle.submit(id, op);
            }
        }
        self.answer_outstanding(Completions::new(), BTreeSet::new());
        self
    }

    /// Gives the guest answers to requests that were made before this host went live.
    pub(crate) fn answer_outstanding(
        &mut self,
        mut completions: Completions,
        settled: BTreeSet<(u8, u64)>,
    ) {
        self.settled = settled;
        for kind in self.machine.outstanding() {
            match kind {
                OutputKind::Blk { dev, id, op } => {
                    if let Some(done) = completions.remove(&(dev, id)) {
                        self.disk_done(done);
                    } else if let Some(disk) =
                        self.disks.get(usize::from(dev)).filter(|d| !d.is_mirrored)
                    {
                        disk.handle.submit(id, op);
                    }
                    // A mirrored disk has the request already; its completion will come.
                }
                OutputKind::EntropyWanted { dev, len } => self.entropy(dev, len),
                OutputKind::NetTx { .. } | OutputKind::Console { .. } => {}
            }
        }
    }

    /// Applies an input here and logs it.
    fn input(&mut self, input: &Input) {
        let icount = self.machine.icount();
        if self.apply(icount, input) {
            let appended = self.encoder.append_input(icount, input, &mut self.bytes);
            appended.expect("own inputs are cut to what the log takes");
        }
    }

    /// Applies an input here; says whether it is to be logged.
    fn apply(&mut self, icount: u64, input: &Input) -> bool {
        // If it names what the guest has reset meanwhile, nothing happens, and nothing is logged.
        let is_applied = self.machine.apply(input).is_ok();
        if is_applied {
            self.recording.input(icount, input);
        }
        is_applied
    }

    fn record(&mut self, icount: u64, entry: Entry) {
        let record = Record { icount, entry };
        if let Err(e) = self.encoder.append(&record, &mut self.bytes) {
            // An input larger than the log allows; the shell cuts all of them to size before.
            unreachable!("own input does not fit the log: {e}");
        }
    }

    fn disk_done(&mut self, done: Completion) {
        let disk = self.disks.get(usize::from(done.dev));
        let mirrored = disk.is_some_and(|d| d.is_mirrored);
        let reads = disk.and_then(|d| d.reads.clone()).filter(|reads| reads.is_known(done.id));
        let (dev, id) = (done.dev, done.id);
        let input = Input::BlkDone { dev, id, status: done.status, data: done.data };
        let icount = self.machine.icount();
        match Entry::mirrored(&input).filter(|_| mirrored || reads.is_some()) {
            Some(entry) => {
                if self.apply(icount, &input) {
                    self.record(icount, entry);
                    if let Some(reads) = reads {
                        return reads.completed(id, self.encoder.end().lsn);
                    }
                }
            }
            None => self.input(&input),
        }
        if let (Some(reads), Some(disk)) = (reads, self.disks.get(usize::from(dev))) {
            // One that failed, or that the guest has reset.
            reads.forget(id, &mut |id, op| disk.handle.submit(id, op));
        }
    }

    /// Gives the guest what its networks have for it, as far as it has buffers. Says whether there was anything.
    fn deliver(&mut self, shared: &Shared) -> bool {
        let mut any = false;
        for (dev, queue) in (0u8..).zip(&shared.packets).take(self.offloads.len()) {
            let offloads = self.machine.net_offloads(dev);
            self.follow_offloads(shared, dev, offloads);
            loop {
                let machine = &self.machine;
                let room = |bytes| machine.net_room(dev, bytes) != NetRoom::Full;
                let Some(packet) = queue.take(offloads, room) else { break };
                if machine.net_room(dev, packet.len()) == NetRoom::Down {
                    // Nobody will ever ask for it.
                    continue;
                }
                if !std::mem::replace(&mut any, true) {
                    self.tick(Instant::now());
                }
                let input = Input::NetRx { dev, packet };
                self.input(&input);
                if self.bytes.len() >= LOG_PIECE_BYTES {
                    self.hand_over(shared);
                }
            }
        }
        any
    }

    /// Tells a tap what the guest's driver takes now.
    fn follow_offloads(&mut self, shared: &Shared, dev: u8, offloads: Offloads) {
        let Some(told) = self.offloads.get_mut(usize::from(dev)) else { return };
        if std::mem::replace(told, offloads) == offloads {
            return;
        }
        let nic = shared.lock().ports.as_ref().and_then(|ports| ports.nic(dev));
        if let Some(nic) = nic
            && let Err(e) = nic.set_offloads(offloads)
        {
            // What the guest does not take is done in software.
            tracing(shared, &e);
        }
    }

    /// The own disk is done with what the guest believes done since long: a failure must not stay hidden.
    fn settled_done(&mut self, shared: &Shared, done: Completion) {
        if let Some(error) = done.error {
            let what = format!(
                "stopped: this host's copy of disk {} lost a write before go-live: {error}",
                done.dev
            );
            tracing(shared, &what);
            self.input(&Input::PowerOff);
            self.lost = Some(what);
        }
    }

    fn entropy(&mut self, dev: u8, len: u32) {
        let mut bytes = vec![0; len.min(ENTROPY_MAX) as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::rand::getrandom(
                &mut bytes[filled..],
                rustix::rand::GetRandomFlags::empty(),
            ) {
                Ok(n) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    return crate::log::line(&format!("no random numbers from the kernel: {e}"));
                }
            }
        }
        let input = Input::Entropy { dev, bytes };
        self.input(&input);
    }

    /// Mail for a live machine.
    pub(crate) fn handle(&mut self, shared: &Shared, mail: Mail) {
        match mail {
            Mail::Input(input) => {
                self.tick(Instant::now());
                self.input(&input);
            }
            Mail::DiskDone { done, .. } => {
                self.tick(Instant::now());
                // A message has a bound, and the longest read nearly fills one.
                if self.bytes.len() + done.data.len() > LOG_PIECE_BYTES {
                    self.hand_over(shared);
                }
                if self.settled.remove(&(done.dev, done.id)) {
                    self.settled_done(shared, done);
                } else if !self.withholds(shared, &done) {
                    self.disk_done(done);
                }
                if self.bytes.len() >= LOG_PIECE_BYTES {
                    self.hand_over(shared);
                }
            }
            Mail::Overtaken { reason, .. } => self.overtaken(shared, reason),
            Mail::PowerOff => self.input(&Input::PowerOff),
            Mail::DiskGrown { dev, size, told } => {
                let before = self.encoder.end();
                self.input(&Input::DiskResized { dev, size });
                // Who asked may not wait any more.
                let _ = told.send(self.encoder.end() != before);
            }
            Mail::Snapshot { attempt, link, sender } => {
                self.end_snapshot();
                self.snapshot_next = Some((link, SnapshotUnderWay { attempt, sender }));
            }
            Mail::AbandonSnapshot { attempt } => {
                if self.snapshot_next.as_ref().is_some_and(|(_, s)| s.attempt == attempt) {
                    self.snapshot_next = None;
                }
                if self.snapshot.as_ref().is_some_and(|s| s.attempt == attempt) {
                    self.end_snapshot();
                }
            }
            Mail::DescribeRun(told) => {
                let run = shared.disk_epoch.load(Ordering::Relaxed);
                // Who asked may not wait any more.
                drop(told.send(self.saver.describe(run, &self.machine)));
            }
            Mail::TakeSnapshot(order) => self.saver.order(order),
            Mail::StopMachine => {
                self.collect();
                self.hand_over(shared);
                self.is_stopped = true;
                shared.feed(Event::MachineStopped);
            }
            Mail::Wake => self.is_stopped = self.lost.is_some(),
            // The next step looks for them.
            Mail::Packets => {}
            Mail::Run { .. }
            | Mail::Follow { .. }
            | Mail::Replay { .. }
            | Mail::GoLive { .. }
            | Mail::Discard { .. }
            | Mail::Checkpoint { .. }
            | Mail::SwitchDisk(_)
            | Mail::Halt
            | Mail::KeepState(_)
            | Mail::Define(_)
            | Mail::Close => {}
            #[cfg(test)]
            Mail::Flip => {}
        }
    }

    /// The lock of a shared disk is another host's: this machine stops, and nothing of it leaves any more.
    fn overtaken(&mut self, shared: &Shared, reason: String) {
        if self.lost.is_some() {
            return;
        }
        tracing(shared, &format!("stops: {reason}"));
        self.is_stopped = true;
        shared.lock().last_problem = Some(reason.clone());
        self.lost = Some(reason);
        shared.feed(Event::Stop);
    }

    /// Whether the secondary's copy is to answer a request that failed here: then the guest does not hear of it, and the
    /// roles are switched. The request stays in the device's state, so that the other machine answers it, live.
    fn withholds(&mut self, shared: &Shared, done: &Completion) -> bool {
        let is_mirrored = self.disks.get(usize::from(done.dev)).is_some_and(|d| d.is_mirrored);
        let Some(error) = done.error.as_ref().filter(|_| is_mirrored) else { return false };
        if shared.protected_by().is_none() {
            return false;
        }
        if self.withheld.is_empty() {
            let range = range_of(&self.machine, done.dev, done.id);
            shared.disk_failed(done.dev, error, range);
        }
        self.withheld.push(done.clone());
        true
    }

    /// Gives the guest what was withheld, when nobody else can answer it any more.
    fn give_up_withholding(&mut self, shared: &Shared) {
        if self.withheld.is_empty() || shared.protected_by().is_some() {
            return;
        }
        tracing(shared, "no other copy of the disk can serve: the guest gets the error");
        for done in std::mem::take(&mut self.withheld) {
            self.disk_done(done);
        }
    }

    /// Keeps guest time with the host's.
    fn tick(&mut self, now: Instant) {
        let (mtime, rate) = (self.machine.mtime(), self.machine.clock().rate());
        if let Some(input) = self.clock.correction(now, mtime, rate) {
            self.input(&input);
        }
    }

    /// Takes outputs from the machine: disk requests go to the disks, the rest waits for the hand-over.
    fn collect(&mut self) {
        // An answer given at once may make the next request: a queue has a bound, and the guest does not run here.
        loop {
            let outputs = self.machine.take_outputs();
            if outputs.is_empty() {
                return;
            }
            self.sort_outputs(outputs);
        }
    }

    fn sort_outputs(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output.kind {
                OutputKind::Blk { dev, id, op } => {
                    let Some(disk) = self.disks.get(usize::from(dev)) else { continue };
                    // A write to a disk that both hosts share is an output like any other.
                    if disk.is_mirrored || matches!(op, BlkOp::Read { .. }) {
                        self.rhythm.has_written |=
                            disk.is_kept && !matches!(op, BlkOp::Read { .. } | BlkOp::Flush);
                        disk.submit(id, op);
                    } else {
                        let kind = OutputKind::Blk { dev, id, op };
                        self.outputs.push(Output { icount: output.icount, kind });
                    }
                }
                OutputKind::EntropyWanted { dev, len } => self.entropy(dev, len),
                kind @ (OutputKind::NetTx { .. } | OutputKind::Console { .. }) => {
                    self.outputs.push(Output { icount: output.icount, kind });
                }
            }
        }
    }

    /// Gives log and outputs to the protocol core, with a mark that covers them.
    fn hand_over(&mut self, shared: &Shared) {
        let icount = self.machine.icount();
        if self.outputs.is_empty() && self.bytes.is_empty() && icount == self.last_mark {
            return;
        }
        self.record(icount, Entry::Mark);
        self.recording.mark(icount);
        self.last_mark = icount;
        shared.icount.store(icount, Ordering::Relaxed);
        let outputs = std::mem::take(&mut self.outputs);
        let bytes = std::mem::take(&mut self.bytes);
        let due_us = shared.log_produced(outputs, bytes, self.encoder.end());
        self.slice_us = due_us.map_or(SLICE_US, |us| (us as f64).min(SLICE_US));
    }

    /// One slice, or a wait.
    pub(crate) fn step(&mut self, shared: &Shared) {
        self.give_up_withholding(shared);
        if self.is_stopped || shared.mailbox.is_paused() || self.machine.halted().is_some() {
            self.rest(shared);
            return;
        }
        if self.stands_still(shared) {
            return;
        }
        self.deliver(shared);
        let start = Instant::now();
        self.checkpoint_if_due(shared, start);
        self.tick(start);
        let before = self.machine.icount();
        let budget = self.clock.steps_in(self.slice_us).max(1000);
        let exit = self.machine.run(before.saturating_add(budget), shared.mailbox.stop_flag());
        let took = start.elapsed();
        self.clock.observe(self.machine.icount() - before, took);
        let end = self.encoder.end();
        self.collect();
        // What was answered at once may have woken the guest.
        let is_answered = self.encoder.end() != end;
        if !self.outputs.is_empty() {
            // Outputs do not wait for a digest.
            self.hand_over(shared);
        }
        self.take_digest(shared);
        self.hand_over(shared);
        let pumping = self.pump_snapshot(shared);
        match exit {
            Exit::Idle if !pumping && (is_answered || self.deliver(shared)) => {
                self.slow_down(shared, took)
            }
            Exit::Idle if !pumping => self.wait_idle(shared),
            Exit::Idle if pumping => shared.mailbox.wait(Some(Instant::now() + PUMP_PAUSE)),
            Exit::Halted => self.tell_halt(shared),
            Exit::Idle | Exit::Reached | Exit::Output | Exit::Stopped => {
                self.slow_down(shared, took)
            }
            // Debuggers' alone.
            Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
        }
    }

    /// Stands still: paused, stopped or halted. A snapshot goes on.
    fn rest(&mut self, shared: &Shared) {
        self.collect();
        self.hand_over(shared);
        if self.machine.halted().is_some() {
            self.tell_halt(shared);
        }
        shared.flush_log();
        let pause = if self.pump_snapshot(shared) { PUMP_PAUSE } else { WAIT_MAX };
        shared.mailbox.wait(Some(Instant::now() + pause));
    }

    fn tell_halt(&mut self, shared: &Shared) {
        if std::mem::replace(&mut self.halt_told, true) {
            return;
        }
        let why = match self.machine.halted() {
            Some(HaltReason::PowerOff { code: 0 }) => "the guest powered off".to_owned(),
            Some(HaltReason::PowerOff { code }) => {
                format!("the guest powered off with code {code}")
            }
            Some(HaltReason::Operator) if self.lost.is_some() => {
                self.lost.clone().unwrap_or_default()
            }
            Some(HaltReason::Operator) => "powered off by the operator".to_owned(),
            Some(HaltReason::GuestFault { reason }) => format!("the machine stopped: {reason}"),
            None => return,
        };
        tracing(shared, &why);
        self.recording.finish(&mut self.machine);
        {
            let mut inner = shared.lock();
            inner.last_problem = Some(why);
            inner.engine = Some(EngineUse::of(&self.machine));
            inner.halted = self.machine.halted().cloned();
        }
        shared.feed(Event::Stop);
    }

    /// Waits for the next timer, or for mail.
    fn wait_idle(&mut self, shared: &Shared) {
        self.owed = Duration::ZERO;
        shared.flush_log();
        let now = Instant::now();
        let mut until = now + WAIT_MAX;
        if let Some(timer) = self.machine.next_timer() {
            until = until.min(self.clock.instant_of(timer));
        }
        shared.mailbox.wait(Some(until));
        let now = Instant::now();
        if self.machine.next_timer().is_some_and(|t| self.clock.mtime(now) >= t) {
            let input = self.clock.input(now);
            self.input(&input);
        }
    }

    /// Takes away as much time as the core asks, so that the secondary keeps up.
    fn slow_down(&mut self, shared: &Shared, took: Duration) {
        let permille = shared.mailbox.throttle();
        self.owed += took.mul_f64(f64::from(permille) / f64::from(1000 - permille));
    }

    /// Stands still for what is owed or a part of it, or until there is mail: says whether there is still some.
    fn stands_still(&mut self, shared: &Shared) -> bool {
        if shared.mailbox.throttle() == 0 {
            self.owed = Duration::ZERO;
        }
        if self.owed < THROTTLE_PIECE {
            return false;
        }
        let pause = self.owed.min(THROTTLE_PIECE_MAX);
        shared.flush_log_due_in(pause);
        let start = Instant::now();
        shared.mailbox.wait(Some(start + pause));
        self.owed = self.owed.saturating_sub(start.elapsed());
        self.owed >= THROTTLE_PIECE
    }

    fn take_digest(&mut self, shared: &Shared) {
        let icount = self.machine.icount();
        let (at, last) = self.last_digest;
        let most = self.digest_interval * DIGEST_STRETCH_MAX;
        let pause = (self.digest_took * DIGEST_SHARE).clamp(self.digest_interval, most);
        let due = at.elapsed() >= pause && icount != last;
        let is_wanted = shared.has_follower.load(Ordering::Relaxed) || self.recording.is_on();
        if due && !self.digest_interval.is_zero() && is_wanted {
            let start = Instant::now();
            let digest = self.machine.digest();
            self.digest_took = start.elapsed();
            self.record(icount, Entry::Digest(digest));
            self.recording.digest(icount, digest);
            self.last_digest = (Instant::now(), icount);
        }
    }

    /// Where the secondary has everything that the guest wrote, both copies get a name for what they are now.
    fn checkpoint_if_due(&mut self, shared: &Shared, now: Instant) {
        let rhythm = &mut self.rhythm;
        if let Some((_, id)) = rhythm.to_flush.take_if(|(at, _)| *at <= now) {
            for disk in self.disks.iter().filter(|d| d.is_kept) {
                disk.handle.keep(KeeperOrder::Flush { id });
            }
        }
        let since = now.saturating_duration_since(rhythm.last);
        if since < CHECKPOINT_EVERY || !rhythm.has_written {
            return;
        }
        if since < CHECKPOINT_PATIENCE && shared.is_checkpoint_pending() {
            return;
        }
        rhythm.last = now;
        let Some(peer) = shared.protected_by() else { return };
        let Ok(id) = CheckpointId::draw() else { return };
        self.collect();
        let icount = self.machine.icount();
        self.record(icount, Entry::Mark);
        self.recording.mark(icount);
        for disk in self.disks.iter().filter(|d| d.is_kept) {
            disk.handle.keep(KeeperOrder::Checkpoint { id, peer: peer.clone() });
        }
        shared.checkpoint_begun(id);
        shared.tell_checkpoint(id, self.encoder.end());
        self.rhythm.to_flush = Some((now + FLUSH_AFTER, id));
        self.rhythm.has_written = false;
        self.hand_over(shared);
    }

    /// The copies for a new secondary end with what the disks are now.
    fn freeze_mirrors(&mut self, shared: &Shared, attempt: u64) {
        let id = match CheckpointId::draw() {
            Ok(id) => id,
            Err(e) => return tracing(shared, &e),
        };
        let peer = shared.wanted_peer(attempt);
        shared.checkpoint_begun(id);
        for disk in self.disks.iter().filter(|d| d.is_mirrored) {
            let (host, peer) = (shared.host.clone(), peer.clone());
            disk.handle.freeze_mirror(attempt, MirrorPoint { id, host, peer });
        }
        self.rhythm.to_flush = Some((Instant::now() + FLUSH_AFTER, id));
        self.rhythm.last = Instant::now();
    }

    fn begin_snapshot(&mut self, shared: &Shared, link: LinkId, under_way: SnapshotUnderWay) {
        let SnapshotUnderWay { attempt, mut sender } = under_way;
        self.collect();
        self.hand_over(shared);
        let pause = Instant::now();
        // The log position of the snapshot is that of the machine.
        self.record(self.machine.icount(), Entry::Mark);
        self.hand_over(shared);
        let at = self.encoder.end();
        self.machine.ram_mut().arm_snapshot(None);
        self.freeze_mirrors(shared, attempt);
        let clock = self.encoder.clock();
        let head = SnapshotHead {
            saved: self.machine.save(),
            pos: at,
            clock: (clock.mtime, clock.at, clock.rate),
        };
        sender.begin(head, self.machine.images().clone());
        shared.protect_started(attempt, link, at);
        shared.lock().arm_pause_us = u64::try_from(pause.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.snapshot = Some(SnapshotUnderWay { attempt, sender });
    }

    /// Begins a snapshot for people, of this moment.
    fn begin_save(&mut self, shared: &Shared, order: Order) {
        let since = Instant::now();
        // The log position of the snapshot is that of the machine, and its disks have all its requests.
        self.collect();
        self.record(self.machine.icount(), Entry::Mark);
        self.hand_over(shared);
        let run = shared.disk_epoch.load(Ordering::Relaxed);
        let at = (self.encoder.end(), self.encoder.clock());
        self.saver.begin(order, run, &mut self.machine, &self.disks, at, since);
    }

    fn end_snapshot(&mut self) {
        // The copies of the disks are the protect thread's to abort: by now they may be those of the next attempt.
        if self.snapshot.take().is_some() {
            self.machine.ram_mut().disarm_snapshot();
        }
    }

    /// Sends some pages of the snapshot under way; says whether there is more to do at once.
    fn pump_snapshot(&mut self, shared: &Shared) -> bool {
        let is_busy = self.snapshot.is_some() || self.saver.is_busy() || self.keeper.is_busy();
        if !is_busy && Sweep::is_free(&self.machine) {
            if let Some(order) = self.keeper.take_order() {
                self.begin_keep(shared, *order);
            } else if let Some((link, next)) = self.snapshot_next.take() {
                self.begin_snapshot(shared, link, next);
            } else if let Some(order) = self.saver.take_order() {
                self.begin_save(shared, *order);
            }
        }
        if self.keeper.is_busy() {
            return self.keeper.pump(&mut self.machine, self.snapshot_next.is_some());
        }
        if self.saver.is_busy() {
            return self.saver.pump(&mut self.machine);
        }
        let Some(s) = &mut self.snapshot else { return self.recording.pump(&mut self.machine) };
        let pages = self.machine.ram().pages();
        let seen = self.machine.ram().snapshot_cursor().unwrap_or(pages);
        shared.percent.store(u64::from(seen) * 100 / u64::from(pages.max(1)), Ordering::Relaxed);
        if s.sender.pump(self.machine.ram_mut()) {
            true
        } else {
            self.snapshot = None;
            false
        }
    }

    /// Keeps the machine as it is when its memory is next free to be swept.
    pub(crate) fn keep_state(&mut self, order: KeepOrder) {
        self.keeper.order(order);
    }

    fn begin_keep(&mut self, shared: &Shared, order: KeepOrder) {
        self.collect();
        self.hand_over(shared);
        self.keeper.begin(order, &mut self.machine, self.encoder.end(), self.encoder.clock());
    }
}

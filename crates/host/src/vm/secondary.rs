//! The secondary's loop: replay the log, drop outputs, keep its own disks in step.
//!
//! # Invariants
//! - INV-SECONDARY-1: the machine never runs past the last position that came.
//! - INV-SECONDARY-3: a disk has grown before the machine knows of it.
//! - INV-SECONDARY-2: a mirrored disk gets every request that the machine makes, in order; the data of a read come from
//!   it at the position at which the log says that the read is done.
//!
//! # Failure
//! What does not replay (a log that does not decode, a machine that waits where the log runs on, a disk error of its own)
//! ends this replica, never the VM.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use eventlog::{ClockBase, Decoder, Encoder, Entry, LogPos, Record};
use machine::Machine;
use machine::io::{BlkOp, BlkStatus, Input, Output, OutputKind};
use machine::machine::Exit;
use replica::Event;

use super::bulk::Loaded;
use super::definition::Definition;
use super::evidence::{Difference, Evidence};
use super::failures::range_of;
use super::flight::Flight;
use super::owning::Locks;
use super::primary::FLUSH_AFTER;
use super::primary::Primary;
use super::shared::{Shared, mono_now, unix_ms};
use super::vcpu::{Completions, Disks, WAIT_MAX, tracing};
use crate::disk::Completion;
use crate::disk::keeper::KeeperOrder;
use crate::disk::record::CheckpointId;
use crate::divergence::report::Digests;
use crate::recording::Recorder;

/// Pause between two parts of a snapshot while there is no log to replay.
const PUMP_PAUSE: Duration = Duration::from_micros(500);
/// How often a read of a shared disk is made again, and the pause before.
const READ_TRIES: u32 = 100;
const READ_PAUSE: Duration = Duration::from_millis(50);
/// Time that the rest of the log of a VM that is off may take.
const REST_TIME_MAX: Duration = Duration::from_secs(20);
/// Steps replayed between two looks at the mail.
const BURST: u64 = 2_000_000;

/// A machine that follows.
pub(crate) struct Secondary {
    machine: Machine,
    disks: Disks,
    definition: Definition,
    decoder: Decoder,
    clock: ClockBase,
    /// Ends of the pieces of log that came.
    ends: VecDeque<LogPos>,
    /// A record that the machine has not reached, or that waits for the disk.
    next: Option<Record>,
    /// Completions of the own disks that the log has not named.
    completions: Completions,
    /// Requests that the own disks have and the log has not named.
    submitted: BTreeSet<(u8, u64)>,
    /// Requests that the log has named before the own disk was done.
    settled: BTreeSet<(u8, u64)>,
    /// Reads of shared disks that the machine has made, and that this host may have to make itself.
    shared_reads: BTreeMap<(u8, u64), BlkOp>,
    /// How often in turn such a read failed.
    failed_reads: u32,
    is_failed: bool,
    /// Until it has caught up for the first time: the flight recorder that begins then.
    flight: Option<Flight>,
    recorder: Recorder,
    /// Step at which it was loaded.
    followed_from: u64,
    /// Step of the last digest that was the primary's.
    last_right: Option<u64>,
    /// How it differs from the primary.
    difference: Option<Difference>,
    /// Checkpoints of the disks that the log has not come to.
    checkpoints: VecDeque<(CheckpointId, LogPos)>,
    /// The last one, while it may have to be made durable.
    to_flush: Option<(Instant, CheckpointId)>,
    /// The VM is off by the record of this generation; until when its rest may be replayed.
    off: Option<(u64, Instant)>,
}

impl Secondary {
    pub(crate) fn new(loaded: Loaded, disks: Disks, flight: Option<Flight>) -> Self {
        let clock = ClockBase { mtime: loaded.clock.0, at: loaded.clock.1, rate: loaded.clock.2 };
        let mut secondary = Self {
            machine: loaded.machine,
            disks,
            definition: loaded.definition,
            decoder: Decoder::new(loaded.pos, clock),
            clock,
            ends: VecDeque::new(),
            next: None,
            completions: Completions::new(),
            submitted: BTreeSet::new(),
            settled: BTreeSet::new(),
            shared_reads: BTreeMap::new(),
            failed_reads: 0,
            is_failed: false,
            flight,
            recorder: Recorder::default(),
            followed_from: loaded.pos.icount,
            last_right: None,
            difference: None,
            checkpoints: VecDeque::new(),
            to_flush: None,
            off: None,
        };
        for kind in secondary.machine.outstanding() {
            secondary.submit(kind);
        }
        secondary
    }

    /// More log.
    pub(crate) fn push(&mut self, bytes: Vec<u8>, end: LogPos) {
        self.decoder.push(&bytes);
        self.ends.push_back(end);
    }

    fn submit(&mut self, kind: OutputKind) {
        let OutputKind::Blk { dev, id, op } = kind else { return };
        let Some(disk) = self.disks.get(usize::from(dev)) else { return };
        if disk.is_mirrored {
            self.submitted.insert((dev, id));
            disk.handle.submit(id, op);
        } else if disk.reads.is_some() && matches!(op, BlkOp::Read { .. }) {
            self.shared_reads.insert((dev, id), op);
        }
    }

    /// Makes a read of a shared disk whose completion the log names: the primary has read before, and keeps writes off what
    /// it read until this host has.
    fn read_shared(&mut self, dev: u8, id: u64) {
        let read = self.shared_reads.get(&(dev, id)).cloned();
        if let (Some(op), Some(disk)) = (read, self.disks.get(usize::from(dev)))
            && self.submitted.insert((dev, id))
        {
            disk.handle.submit(id, op);
        }
    }

    /// A read of a shared disk failed on this host alone: it is made again, so often.
    fn read_again(&mut self, shared: &Shared, key: (u8, u64), error: &str) {
        self.failed_reads += 1;
        if self.failed_reads > READ_TRIES {
            return self.fail(shared, format!("it cannot read disk {}: {error}", key.0));
        }
        std::thread::sleep(READ_PAUSE);
        self.submitted.remove(&key);
        self.read_shared(key.0, key.1);
    }

    /// An own disk finished a request.
    pub(crate) fn disk_done(&mut self, shared: &Shared, done: Completion) {
        let key = (done.dev, done.id);
        if let Some(error) = &done.error
            && self.shared_reads.contains_key(&key)
        {
            return self.read_again(shared, key, error);
        }
        if let Some(error) = &done.error {
            let range = range_of(&self.machine, done.dev, done.id);
            shared.note_failure(done.dev, error, range);
            return self.fail(shared, format!("its copy of disk {} failed: {error}", done.dev));
        }
        if !self.settled.remove(&key) {
            self.completions.insert(key, done);
        }
    }

    /// Begins the flight recorder, and waits for what that needs.
    pub(crate) fn take_off(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.recorder = flight.begin(&mut self.machine);
        }
    }

    /// A difference with what this replica knows of its own way.
    fn placed(&self, shared: &Shared, seen: Difference) -> Difference {
        let peer = shared.lock().node.status().peer.map(|host| host.0);
        let (last_right, followed_from) = (self.last_right, Some(self.followed_from));
        Difference { peer, last_right, followed_from, ..seen }
    }

    /// The log does not fit this machine, which shows before a digest does.
    fn differ(&mut self, shared: &Shared, reason: &str) {
        if !self.is_failed {
            let lsn = self.decoder.position().lsn;
            let at = LogPos { lsn, icount: self.machine.icount() };
            self.difference = Some(self.placed(shared, Difference::without_digests(at, reason)));
        }
        self.fail(shared, format!("diverged: {reason}"));
    }

    fn fail(&mut self, shared: &Shared, reason: String) {
        if !std::mem::replace(&mut self.is_failed, true) {
            tracing(shared, &format!("this replica cannot go on: {reason}"));
            shared.feed(Event::ReplicaFailed { reason });
        }
    }

    /// There is a checkpoint of the disks where the log will have come to `at`; both hosts have stated `settled`.
    pub(crate) fn expect_checkpoint(
        &mut self,
        id: CheckpointId,
        at: LogPos,
        settled: Option<CheckpointId>,
    ) {
        if let Some(id) = settled {
            for disk in self.disks.iter().filter(|d| d.is_kept) {
                disk.handle.keep(KeeperOrder::Settle { id });
            }
        }
        self.checkpoints.push_back((id, at));
    }

    /// The machine has come to the position of a mark: so has it to a checkpoint, perhaps.
    fn reach_checkpoint(&mut self, shared: &Shared) {
        let lsn = self.decoder.position().lsn;
        while let Some((id, at)) = self.checkpoints.front().copied()
            && at.lsn <= lsn
        {
            self.checkpoints.pop_front();
            self.collect(shared);
            let peer = shared.lock().node.status().peer.map_or_else(String::new, |host| host.0);
            for disk in self.disks.iter().filter(|d| d.is_kept && at.lsn == lsn) {
                disk.handle.keep(KeeperOrder::Checkpoint { id, peer: peer.clone() });
            }
            self.to_flush = Some((Instant::now() + FLUSH_AFTER, id));
        }
    }

    /// The VM is off, and all its log is here: the copies of its disks are to have all that it did.
    pub(crate) fn replay_rest(&mut self, shared: &Shared, generation: u64) {
        tracing(shared, "the VM is off; its disks here get what is left of its log");
        self.off = Some((generation, Instant::now() + REST_TIME_MAX));
    }

    /// Whether its VM is off: what comes now, log and checkpoints, is of another session.
    pub(crate) fn is_off(&self) -> bool {
        self.off.is_some()
    }

    /// Whether there is nothing left to do for a VM that is off.
    pub(crate) fn is_over(&mut self) -> bool {
        let Some((generation, until)) = self.off else { return false };
        let is_done = self.ends.is_empty() && self.next.is_none();
        if is_done && !self.is_failed {
            Shared::tell_generation(&self.disks, generation);
        }
        is_done || self.is_failed || Instant::now() > until
    }

    fn flush_if_due(&mut self) {
        if let Some((_, id)) = self.to_flush.take_if(|(at, _)| *at <= Instant::now()) {
            for disk in self.disks.iter().filter(|d| d.is_kept) {
                disk.handle.keep(KeeperOrder::Flush { id });
            }
        }
    }

    /// Replays for a while, or waits for log.
    pub(crate) fn step(&mut self, shared: &Shared) {
        self.flush_if_due();
        let is_waiting = self.is_failed || !self.replay(shared);
        if is_waiting && self.off.is_some() && self.ends.is_empty() {
            return;
        }
        // What differed is not what its recording goes on with.
        let is_pumping = self.difference.is_none() && self.recorder.pump(&mut self.machine);
        if is_waiting {
            self.collect(shared);
            let pause = if is_pumping { PUMP_PAUSE } else { WAIT_MAX };
            shared.mailbox.wait(Some(Instant::now() + pause));
        }
    }

    /// Says whether there is more to replay now.
    fn replay(&mut self, shared: &Shared) -> bool {
        let burst_end = self.machine.icount().saturating_add(BURST);
        loop {
            let record = match self.next.take() {
                Some(record) => record,
                None => match self.decoder.next() {
                    Ok(Some(record)) => record,
                    Ok(None) => {
                        self.report(shared);
                        // Where the machine has caught up, the recorder holds up nobody.
                        if self.flight.as_ref().is_some_and(Flight::is_ready) {
                            self.take_off();
                        }
                        return false;
                    }
                    Err(e) => {
                        self.fail(shared, format!("the log does not decode: {e}"));
                        return false;
                    }
                },
            };
            let until = record.icount.min(burst_end);
            if !self.run_to(shared, until) {
                self.next = Some(record);
                return !self.is_failed && self.machine.icount() < until;
            }
            if self.machine.icount() < record.icount {
                self.next = Some(record);
                self.report(shared);
                return true;
            }
            match self.apply(shared, record) {
                Applied::Yes => {}
                Applied::WaitsForDisk(record) => {
                    self.next = Some(record);
                    self.collect(shared);
                    return false;
                }
                Applied::Failed => return false,
            }
        }
    }

    /// Runs the machine to `until`; false when there is mail to look at first, or this replica failed.
    fn run_to(&mut self, shared: &Shared, until: u64) -> bool {
        while self.machine.icount() < until {
            match self.machine.run(until, shared.mailbox.stop_flag()) {
                Exit::Reached => {}
                // Debuggers' alone.
                Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
                Exit::Output => self.collect(shared),
                Exit::Stopped => return false,
                // Off at the very step that the log runs to, as the primary is.
                Exit::Halted if self.machine.icount() == until => {}
                exit @ (Exit::Idle | Exit::Halted) => {
                    let at = self.machine.icount();
                    self.recorder.mark(until);
                    let state = if exit == Exit::Idle { "waits" } else { "is off" };
                    let reason =
                        format!("the machine {state} at step {at}, the log runs to {until}");
                    self.differ(shared, &reason);
                    return false;
                }
            }
        }
        true
    }

    /// Takes the outputs: disk requests go to the own disks, the rest is kept until it has left the primary.
    fn collect(&mut self, shared: &Shared) {
        let outputs = self.machine.take_outputs();
        if outputs.is_empty() {
            return;
        }
        let mut tail = Vec::new();
        for Output { icount, kind } in outputs {
            match kind {
                kind @ OutputKind::Blk { .. } => self.submit(kind),
                OutputKind::EntropyWanted { .. } => {}
                kind @ (OutputKind::NetTx { .. } | OutputKind::Console { .. }) => {
                    tail.push(Output { icount, kind });
                }
            }
        }
        shared.keep_tail(tail);
    }

    /// Tells the core how far replay is.
    fn report(&mut self, shared: &Shared) {
        self.collect(shared);
        shared.icount.store(self.machine.icount(), Ordering::Relaxed);
        // The record that waits is decoded, but not applied.
        let applied = self.decoder.position().lsn - u64::from(self.next.is_some());
        let mut reached = None;
        while self.ends.front().is_some_and(|e| e.lsn <= applied) {
            reached = self.ends.pop_front();
        }
        if let Some(to) = reached {
            shared.feed(Event::Replayed { to });
        }
    }

    fn apply(&mut self, shared: &Shared, record: Record) -> Applied {
        let input = match record.entry {
            Entry::Mark => {
                self.recorder.mark(record.icount);
                self.reach_checkpoint(shared);
                return Applied::Yes;
            }
            Entry::Digest(theirs) => return self.check_digest(shared, theirs),
            Entry::BlkReadLocal { dev, id } => {
                // The request must have reached the disk before it is waited for.
                self.collect(shared);
                self.read_shared(dev, id);
                let Some(done) = self.completions.remove(&(dev, id)) else {
                    if self.submitted.contains(&(dev, id)) {
                        return Applied::WaitsForDisk(record);
                    }
                    // It would be waited for in vain, while the primary waits for this replica.
                    let reason =
                        format!("the log ends read {id} of disk {dev}, which was not made here");
                    self.differ(shared, &reason);
                    return Applied::Failed;
                };
                self.submitted.remove(&(dev, id));
                self.shared_reads.remove(&(dev, id));
                self.failed_reads = 0;
                Input::BlkDone { dev, id, status: BlkStatus::Ok, data: done.data }
            }
            Entry::Input(input) => {
                self.collect(shared);
                self.settle(&input);
                if let Input::DiskResized { dev, size } = input
                    && !self.grow(shared, dev, size)
                {
                    return Applied::Failed;
                }
                input
            }
        };
        if let Input::Clock { mtime, rate } = &input {
            self.clock = ClockBase { mtime: *mtime, at: record.icount, rate: *rate };
        }
        if let Err(e) = self.machine.apply(&input) {
            // In the recording it shows what a machine that is right makes of it.
            self.recorder.input(record.icount, &input);
            self.differ(shared, &format!("an input of the log cannot be applied: {e}"));
            return Applied::Failed;
        }
        self.recorder.input(record.icount, &input);
        Applied::Yes
    }

    /// The own copy of a disk grows before the machine is told.
    fn grow(&mut self, shared: &Shared, dev: u8, size: u64) -> bool {
        let disk = self.disks.get(usize::from(dev));
        match disk.map_or(Ok(size), |disk| disk.handle.grow(size)) {
            Ok(_) => true,
            Err(reason) => {
                self.fail(shared, format!("its copy of disk {dev} cannot grow: {reason}"));
                false
            }
        }
    }

    /// The log says how a request ended; the own disk's answer is not needed any more.
    fn settle(&mut self, input: &Input) {
        if let Input::BlkDone { dev, id, .. } = input {
            self.shared_reads.remove(&(*dev, *id));
        }
        if let Input::BlkDone { dev, id, .. } = input
            && self.submitted.remove(&(*dev, *id))
            && self.completions.remove(&(*dev, *id)).is_none()
        {
            self.settled.insert((*dev, *id));
        }
    }

    fn check_digest(&mut self, shared: &Shared, theirs: u64) -> Applied {
        let ours = self.machine.digest();
        shared.digests.fetch_add(1, Ordering::Relaxed);
        // The recording has the primary's: where it was right, a replay is told from what this replica did.
        self.recorder.digest(self.machine.icount(), theirs);
        if ours == theirs {
            self.last_right = Some(self.machine.icount());
            return Applied::Yes;
        }
        self.is_failed = true;
        let at = self.decoder.position();
        let digests = Digests { secondary: ours, primary: theirs };
        self.difference = Some(self.placed(shared, Difference::of(at, digests)));
        tracing(
            shared,
            &format!("diverged at {at}: digest {ours:#018x} here, {theirs:#018x} in the log"),
        );
        shared.feed(Event::Diverged { at, ours, theirs });
        Applied::Failed
    }

    #[cfg(test)]
    pub(crate) fn flip_byte(&mut self) {
        let last = machine::ram::RAM_BASE + self.machine.ram().size() - 1;
        self.machine.ram_mut().write(last, &[0x5a]).unwrap();
    }

    /// What it leaves behind if it differed.
    pub(crate) fn into_evidence(self: Box<Self>) -> Option<Evidence> {
        let Self { mut machine, mut recorder, difference, .. } = *self;
        let Some(seen) = difference else {
            recorder.land(&mut machine);
            return None;
        };
        Some(Evidence { machine, recorder, seen })
    }

    /// The VM.
    pub(crate) fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Its disks.
    pub(crate) fn disks_mut(&mut self) -> &mut Disks {
        &mut self.disks
    }

    /// A disk is at another place now.
    pub(crate) fn place_disk(&mut self, index: usize, to: &std::path::Path) {
        to.clone_into(&mut self.definition.config.disks[index].path);
    }

    /// Opens the shared disks to write to them: this host has their locks.
    pub(crate) fn own(&mut self, shared: &Arc<Shared>, locks: &Locks) -> Result<(), String> {
        let epoch = shared.disk_epoch.load(Ordering::Relaxed);
        let mut disks = self.disks.clone();
        for (index, lock) in locks {
            let lock = Some(Arc::clone(lock));
            disks[*index] = self.definition.open_disk(shared, *index, epoch, lock)?;
        }
        if let Some(ports) = &mut shared.lock().ports {
            ports.set_disks(disks.clone());
        }
        self.disks = disks;
        Ok(())
    }

    /// Goes live at the end of the log.
    pub(crate) fn into_primary(
        mut self: Box<Self>,
        shared: &Shared,
        at: LogPos,
        resend_after: u64,
    ) -> Primary {
        let start = mono_now();
        self.recorder.land(&mut self.machine);
        self.collect(shared);
        shared.resend_and_announce(resend_after);
        {
            let mut inner = shared.lock();
            inner.announced.announce_us = mono_now().micros_since(start);
            inner.announced.at_unix_ms = unix_ms();
            if let Some(ports) = &mut inner.ports {
                ports.set_live(true);
            }
        }
        let Self { machine, disks, definition, clock, completions, settled, .. } = *self;
        definition.limit(shared, &disks);
        definition.bound_lag(shared);
        let mut primary = Primary::new(machine, disks, Encoder::new(at, clock), &definition);
        primary.answer_outstanding(completions, settled);
        primary
    }
}

enum Applied {
    Yes,
    WaitsForDisk(Record),
    Failed,
}

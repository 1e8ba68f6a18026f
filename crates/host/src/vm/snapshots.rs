//! Snapshots that people take of a VM while it runs.
//!
//! # Place
//! [`Vm::take_snapshot`] waits on the caller's thread. The vCPU thread's part is [`Saver`]; [`crate::snapshot`] and the
//! disks' threads write.
//!
//! # Invariants
//! - INV-SAVER-1: machine, log position and disks of a snapshot are of one moment, between two slices.
//! - INV-SAVER-2: a snapshot builds on one of the same run of the machine on this host, or on none.
//! - INV-SAVER-3: of the snapshots for a new secondary, for people and for a recording, one at a time sweeps memory.
//!
//! # Failure
//! What goes wrong ends the snapshot with one line, and leaves nothing of it; the machine goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use eventlog::{ClockBase, LogPos};
use machine::Machine;
use machine::config::BootImages;
use machine::ram::{Epoch, PAGE_SIZE};

use super::Vm;
use super::vcpu::{DiskPort, Mail};
use crate::disk::OPENED;
use crate::one_line::one_line;
use crate::recording::{image_hashes, unix_ms};
use crate::snapshot::store::Store;
use crate::snapshot::{HASH_BYTES, SnapshotHead, SnapshotId, Sweep, Written};

/// How long a machine may take to say what it is.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(15);
/// Time between two looks at how far a snapshot is.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// A snapshot that would build on this many others builds on none.
const CHAIN_MAX: usize = 64;
/// Why there is none.
const GONE: &str = "the VM stopped here before the snapshot was complete; nothing of it is left";

/// A moment that a snapshot can build on: memory by its epoch, disks by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Base {
    id: SnapshotId,
    epoch: Epoch,
    number: u32,
}

/// What a machine on this host is.
#[derive(Debug)]
pub(crate) struct Run {
    /// Which opening of the VM's devices: another machine has another one.
    number: u64,
    images: BootImages,
    restored: Option<(SnapshotId, Epoch)>,
}

/// What a VM on this host remembers of a run.
#[derive(Debug, Default)]
pub(super) struct Known {
    run: u64,
    hashes: Option<[Option<[u8; HASH_BYTES]>; 3]>,
    /// Number of the latest snapshot.
    number: u32,
    bases: Vec<Base>,
}

/// What the vCPU thread is asked for.
#[derive(Debug)]
pub(crate) struct Order {
    head: Head,
    run: u64,
    base: Option<Base>,
    number: u32,
    path: std::path::PathBuf,
    /// How much of memory was looked at, in percent.
    percent: Arc<AtomicU64>,
    told: mpsc::Sender<Told>,
}

/// The part of a head that is known before.
#[derive(Debug)]
struct Head {
    id: SnapshotId,
    name: String,
    images: [Option<[u8; HASH_BYTES]>; 3],
    definition: Option<(String, std::path::PathBuf)>,
}

/// The moment that a snapshot is of.
#[derive(Debug)]
struct Begun {
    epoch: Epoch,
    pos: LogPos,
    pause: Duration,
    #[cfg(test)]
    digest: u64,
}

#[derive(Debug)]
enum Told {
    /// The machine runs on.
    Begun(Begun),
    /// The writer is done.
    Ended(Result<Written, String>),
    /// It cannot be.
    Refused(String),
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotTaken {
    /// Pages of memory in it, in bytes.
    pub memory_bytes: u64,
    /// Chunks of disks in it, in bytes.
    pub disk_bytes: u64,
    /// Length of its file.
    pub file_bytes: u64,
    /// How long the guest stood still, in microseconds.
    pub pause_us: u64,
    /// What it builds on.
    pub parent: Option<SnapshotId>,
    /// Its position.
    pub pos: LogPos,
    /// The machine's digest at that moment.
    #[cfg(test)]
    pub digest: u64,
}

/// The vCPU thread's part.
#[derive(Debug, Default)]
pub(super) struct Saver {
    next: Option<Box<Order>>,
    sweep: Option<(Sweep, Arc<AtomicU64>)>,
    restored: Option<(SnapshotId, Epoch)>,
}

impl Saver {
    /// Of a machine that was in a snapshot's state at `epoch`.
    pub(super) fn of(restored: Option<(SnapshotId, Epoch)>) -> Self {
        Self { restored, ..Self::default() }
    }

    /// What the machine is; `run` is the number of its devices' opening.
    pub(super) fn describe(&self, run: u64, machine: &Machine) -> Run {
        Run { number: run, images: machine.images().clone(), restored: self.restored }
    }

    /// Takes an order; one that waits already is dropped, which tells who gave it.
    pub(super) fn order(&mut self, order: Box<Order>) {
        self.next = Some(order);
    }

    /// Whether memory is being swept.
    pub(super) fn is_busy(&self) -> bool {
        self.sweep.is_some()
    }

    /// The order that waits.
    pub(super) fn take_order(&mut self) -> Option<Box<Order>> {
        self.next.take()
    }

    /// Takes the snapshot of this moment, at which all requests of the machine are with the disks. The guest has stood
    /// still since `since`.
    pub(super) fn begin(
        &mut self,
        order: Order,
        run: u64,
        machine: &mut Machine,
        disks: &[DiskPort],
        (pos, clock): (LogPos, ClockBase),
        since: Instant,
    ) {
        let Order { head, base, number, path, percent, told, .. } = order;
        // Who asked may be gone; what was asked for is done all the same.
        let tell = |what| drop(told.send(what));
        if order.run != run || machine.halted().is_some() {
            return tell(Told::Refused(GONE.to_owned()));
        }
        let size =
            |(d, size): (&machine::config::DiskConfig, u64)| if d.readonly { 0 } else { size };
        let sizes = machine.config().disks.iter().zip(machine.disk_sizes()).map(size).collect();
        let head = SnapshotHead {
            id: head.id,
            parent: base.map(|base| base.id),
            name: head.name,
            taken_unix_ms: unix_ms(),
            pos,
            clock: (clock.mtime, clock.at, clock.rate),
            append: machine.images().append.clone(),
            images: head.images,
            disks: sizes,
            definition: head.definition,
            saved: machine.save(),
        };
        let sizes = (0u8..).zip(&head.disks);
        let saved: Vec<u8> = sizes.filter(|(_, size)| **size > 0).map(|(dev, _)| dev).collect();
        let ended = told.clone();
        let told_end = move |written: &_| drop(ended.send(Told::Ended(Clone::clone(written))));
        let begun = Sweep::begin_told(machine, head, base.map(|b| b.epoch), path, told_end);
        let sweep = match begun {
            Ok(sweep) => sweep,
            Err(e) => return tell(Told::Refused(format!("no thread can be started: {e}"))),
        };
        for dev in saved {
            let disk = disks.get(usize::from(dev)).zip(sweep.disk(dev));
            let Some((disk, items)) = disk else { continue };
            disk.handle.begin_snapshot(Box::new(items), number, base.map(|b| b.number));
        }
        tell(Told::Begun(Begun {
            epoch: sweep.epoch(),
            pos,
            pause: since.elapsed(),
            #[cfg(test)]
            digest: machine.digest(),
        }));
        self.sweep = Some((sweep, percent));
    }

    /// Hands over some pages; false when there is no more to do.
    pub(super) fn pump(&mut self, machine: &mut Machine) -> bool {
        let Some((sweep, percent)) = &mut self.sweep else { return false };
        let is_pumping = sweep.pump(machine.ram_mut());
        let pages = machine.ram().pages();
        let seen = machine.ram().snapshot_cursor().unwrap_or(pages);
        percent.store(u64::from(seen) * 100 / u64::from(pages.max(1)), Ordering::Relaxed);
        if !is_pumping {
            self.sweep = None;
        }
        is_pumping
    }
}

impl Vm {
    /// Takes a snapshot of the machine that runs here, with its disks, and waits until it is complete and durable. `tell`
    /// hears how far it is: what is going on, and percents.
    ///
    /// # Errors
    /// One line; nothing of the snapshot is left then.
    pub fn take_snapshot(
        &self,
        store: &Store,
        name: &str,
        tell: &mut dyn FnMut(String, u8),
    ) -> Result<SnapshotTaken, String> {
        let mut known = match self.snapshots.try_lock() {
            Ok(known) => known,
            Err(TryLockError::Poisoned(known)) => known.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err("another snapshot is being taken; try again when it is done".to_owned());
            }
        };
        let taken = self.take_snapshot_of(&mut known, store, name, tell);
        if taken.is_err() {
            // What cannot be cleared away now is when the next one is taken.
            drop(store.clean());
            store.remove_if_empty();
        }
        taken
    }

    fn take_snapshot_of(
        &self,
        known: &mut Known,
        store: &Store,
        name: &str,
        tell: &mut dyn FnMut(String, u8),
    ) -> Result<SnapshotTaken, String> {
        let path = store.path_of(name).map_err(|e| one_line(&e))?;
        if path.exists() {
            return Err("there is one of that name already".to_owned());
        }
        let run = self.describe_run()?;
        if known.run != run.number {
            let restored = run.restored.map(|(id, epoch)| Base { id, epoch, number: OPENED });
            let bases = restored.into_iter().collect();
            *known = Known { run: run.number, hashes: None, number: OPENED, bases };
        }
        let images = *known.hashes.get_or_insert_with(|| image_hashes(&run.images));
        store.prepare().map_err(|e| one_line(&e))?;
        store.put_images(&run.images, &images).map_err(|e| one_line(&e))?;
        let base = find_base(known, store)?;
        known.number += 1;
        let definition = self.shared.lock().definition.clone();
        let definition = definition.filter(|d| !d.text.is_empty()).map(|d| (d.text, d.file));
        let id = SnapshotId::random()?;
        let (told, answers) = mpsc::channel();
        let percent = Arc::new(AtomicU64::new(0));
        let order = Order {
            head: Head { id, name: name.to_owned(), images, definition },
            run: run.number,
            base,
            number: known.number,
            path,
            percent: Arc::clone(&percent),
            told,
        };
        self.shared.mailbox.post(Mail::TakeSnapshot(Box::new(order)));
        let (begun, written) = self.wait_for_snapshot(&answers, &percent, tell)?;
        known.bases.push(Base { id, epoch: begun.epoch, number: known.number });
        Ok(SnapshotTaken {
            memory_bytes: written.pages * PAGE_SIZE as u64,
            disk_bytes: written.disk_bytes,
            file_bytes: written.bytes,
            pause_us: u64::try_from(begun.pause.as_micros()).unwrap_or(u64::MAX),
            parent: base.map(|base| base.id),
            pos: begun.pos,
            #[cfg(test)]
            digest: begun.digest,
        })
    }

    fn describe_run(&self) -> Result<Run, String> {
        let (told, answer) = mpsc::channel();
        self.shared.mailbox.post(Mail::DescribeRun(told));
        let run = answer.recv_timeout(ANSWER_TIME_MAX);
        run.map_err(|_| "the VM does not run on this host any more".to_owned())
    }

    /// Waits until a machine that has stopped here has closed its disks.
    pub fn settle(&self) {
        // Its end came before: there is no machine to answer, or it is another one.
        drop(self.describe_run());
    }

    fn wait_for_snapshot(
        &self,
        answers: &mpsc::Receiver<Told>,
        percent: &AtomicU64,
        tell: &mut dyn FnMut(String, u8),
    ) -> Result<(Begun, Written), String> {
        let mut begun = None;
        loop {
            match answers.recv_timeout(LOOK) {
                Ok(Told::Begun(moment)) => begun = Some(moment),
                Ok(Told::Refused(reason)) => return Err(reason),
                // Nobody gave it up but the machine's thread.
                Ok(Told::Ended(Err(reason))) if reason == crate::snapshot::GIVEN_UP => {
                    return Err(GONE.to_owned());
                }
                Ok(Told::Ended(Err(reason))) => {
                    return Err(format!("{reason}; the VM goes on, nothing of it is left"));
                }
                Ok(Told::Ended(Ok(written))) => {
                    // The machine's thread told of the beginning before it handed over the end.
                    return begun.map(|begun| (begun, written)).ok_or_else(|| GONE.to_owned());
                }
                Err(RecvTimeoutError::Disconnected) => return Err(GONE.to_owned()),
                Err(RecvTimeoutError::Timeout) if begun.is_none() => {
                    tell("waiting for another snapshot of its memory".to_owned(), 0);
                }
                Err(RecvTimeoutError::Timeout) => self.tell_progress(percent, tell),
            }
        }
    }

    fn tell_progress(&self, percent: &AtomicU64, tell: &mut dyn FnMut(String, u8)) {
        let swept = percent.load(Ordering::Relaxed);
        if swept < 100 {
            return tell("writing memory".to_owned(), u8::try_from(swept).unwrap_or(100));
        }
        let disks = self.shared.lock().ports.as_ref().map(|p| p.disks.clone()).unwrap_or_default();
        let copies: Vec<_> = disks.iter().filter_map(|d| d.handle.status().snapshot).collect();
        let total: u64 = copies.iter().map(|c| c.chunks_total).sum();
        let pending: u64 = copies.iter().map(|c| c.chunks_pending).sum();
        let done = (total - pending.min(total)) * 100 / total.max(1);
        tell("writing disks".to_owned(), u8::try_from(done).unwrap_or(100));
    }
}

/// The latest snapshot of this run that is still there, unless it builds on too many.
fn find_base(known: &Known, store: &Store) -> Result<Option<Base>, String> {
    let entries = store.entries().map_err(|e| one_line(&e))?;
    let name_of = |id: SnapshotId| {
        entries.iter().find(|e| e.facts.as_ref().is_ok_and(|f| f.id == id)).map(|e| &e.name)
    };
    let found = known.bases.iter().rev().find_map(|base| Some((*base, name_of(base.id)?)));
    Ok(found.and_then(|(base, name)| {
        // A chain that is broken is none to build on.
        let chain = store.chain(name).ok()?;
        (chain.len() < CHAIN_MAX).then_some(base)
    }))
}

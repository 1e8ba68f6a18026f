//! What the two hosts of a VM tell each other of its disks, so that each knows what the other's copy may differ in.
//!
//! # Place
//! Notes go with the link's other messages ([`replica::Message::Disks`]), in order with the log; the core passes them by. The
//! primary's vCPU thread begins checkpoints, the disks' threads say when they are stated.
//!
//! # Invariants
//! - INV-DISKS-1: a checkpoint is at one position of the log, and so at one point in the order of each disk's requests, on
//!   both hosts.
//! - INV-DISKS-2: a host forgets an earlier checkpoint only when both have stated a later one, for all disks.
//! - INV-DISKS-3: a secondary that goes live has heard of the limits that were set while its link was there.
//!
//! # Failure
//! A note that is lost with its link, or an answer that does not come, leaves the checkpoint before in force; more is
//! marked since, and the next one takes its place. A note that does not decode, of a kind that is newer than this build for
//! one, is passed over: every kind is to be such that the hosts do without.
//!
//! # Format
//! [`Note`] in postcard; version: [`replica::PROTOCOL_VERSION`].

use std::collections::{BTreeMap, BTreeSet};

use eventlog::LogPos;
use replica::{Event, LinkId, Message, Role};
use serde::{Deserialize, Serialize};

use super::definition::Definition;
use super::failures::Failure;
use super::shared::{Inner, Shared};
use super::vcpu::{DiskPort, Mail, tracing};
use crate::control::DiskCopy;
use crate::disk::Limits;
use crate::disk::copy::{CHUNK_BYTES, CopyPhase};
use crate::disk::keeper::KeeperOrder;
use crate::disk::record::CheckpointId;

/// What one host tells the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Note {
    /// Primary: there is a checkpoint at this position.
    Checkpoint {
        id: CheckpointId,
        at: LogPos,
        /// The last one that both have stated.
        settled: Option<CheckpointId>,
    },
    /// Primary: both have stated it, for all disks.
    Settled { id: CheckpointId },
    /// Secondary: its copy of the disk is what it is there, durably.
    Stated { dev: u8, id: CheckpointId },
    /// Primary: its copy of the disk failed; the secondary is to take over.
    Failed { dev: u8, reason: String },
    /// Primary: the limits that were set while the VM runs, of all disks that have such. An earlier build as secondary does
    /// not know this note, and goes live with those of the definition.
    Limits { set: BTreeMap<u8, Limits> },
}

/// A checkpoint that is not stated by both for all disks.
#[derive(Debug)]
struct Pending {
    id: CheckpointId,
    own: BTreeSet<u8>,
    theirs: BTreeSet<u8>,
}

/// Where the primary is with its checkpoints.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    pending: Option<Pending>,
    settled: Option<CheckpointId>,
}

fn kept(inner: &Inner) -> impl Iterator<Item = (u8, &DiskPort)> {
    let disks = inner.ports.as_ref().map(|ports| &ports.disks);
    (0u8..).zip(disks.into_iter().flatten()).filter(|(_, disk)| disk.is_kept)
}

/// What was copied of the disks, or is being copied.
pub(crate) fn copies(inner: &Inner) -> Vec<DiskCopy> {
    let disks = inner.ports.as_ref().map(|ports| &ports.disks);
    let all = (0u8..).zip(disks.into_iter().flatten());
    let copies = all.filter_map(|(disk, port)| {
        let copy = port.handle.status().copy?;
        let bytes = copy.chunks_sent.saturating_mul(CHUNK_BYTES);
        Some(DiskCopy {
            disk,
            to: copy.peer?,
            is_done: copy.phase == CopyPhase::Done,
            bytes_done: bytes,
            bytes_total: copy.bytes_to_copy.max(bytes.min(port.handle.size())),
            disk_bytes: port.handle.size(),
            whole_because: copy.whole_because,
        })
    });
    copies.collect()
}

impl Shared {
    fn send_note(inner: &mut Inner, link: Option<LinkId>, note: &Note) {
        if let (Some(link), Ok(note)) = (link, postcard::to_stdvec(note)) {
            inner.send_unanswered(link, &Message::Disks { note });
        }
    }

    /// A note came on a link.
    pub(crate) fn take_note(&self, inner: &mut Inner, link: LinkId, bytes: &[u8]) {
        let Ok(note) = postcard::from_bytes::<Note>(bytes) else { return };
        match note {
            Note::Checkpoint { id, at, settled } if inner.primary == Some(link) => {
                self.mailbox.post(Mail::Checkpoint { id, at, settled });
            }
            Note::Stated { dev, id } if inner.follower == Some(link) => {
                if let Some(pending) = inner.checkpoints.pending.as_mut().filter(|p| p.id == id) {
                    pending.theirs.insert(dev);
                }
                Self::settle_if_stated(inner);
            }
            Note::Settled { id } if inner.primary == Some(link) => {
                for (_, disk) in kept(inner) {
                    disk.handle.keep(KeeperOrder::Settle { id });
                }
            }
            Note::Failed { dev, reason } if inner.primary == Some(link) => {
                let peer = inner.node.status().peer.map_or_else(String::new, |host| host.0);
                let here = &self.host;
                let what = format!(
                    "disk {dev} of host {peer} failed: {reason}; the copy of host {here} serves"
                );
                tracing(self, &what);
                inner.disk_problem = Some(what);
            }
            Note::Limits { set } if inner.primary == Some(link) => inner.limits = set,
            Note::Checkpoint { .. }
            | Note::Limits { .. }
            | Note::Settled { .. }
            | Note::Stated { .. }
            | Note::Failed { .. } => {}
        }
    }

    /// Tells the secondary which limits of disks were set.
    pub(crate) fn tell_limits(inner: &mut Inner) {
        let (follower, set) = (inner.follower, inner.limits.clone());
        Self::send_note(inner, follower, &Note::Limits { set });
    }

    /// A checkpoint begins on the primary.
    pub(crate) fn checkpoint_begun(&self, id: CheckpointId) {
        let pending = Pending { id, own: BTreeSet::new(), theirs: BTreeSet::new() };
        self.lock().checkpoints.pending = Some(pending);
    }

    /// Tells the secondary of a checkpoint; the log up to it has not been sent yet.
    pub(crate) fn tell_checkpoint(&self, id: CheckpointId, at: LogPos) {
        let mut inner = self.lock();
        let (follower, settled) = (inner.follower, inner.checkpoints.settled);
        Self::send_note(&mut inner, follower, &Note::Checkpoint { id, at, settled });
    }

    /// The new secondary has everything: its copies are what they are at the checkpoint that the snapshot began with.
    pub(crate) fn mirrors_taken(&self) {
        let mut inner = self.lock();
        let all: BTreeSet<u8> = kept(&inner).map(|(dev, _)| dev).collect();
        if let Some(pending) = &mut inner.checkpoints.pending {
            pending.theirs = all;
        }
        inner.disk_problem = None;
        Self::settle_if_stated(&mut inner);
    }

    /// The own copy of a disk is stated to be what it is at a checkpoint.
    pub(crate) fn stated(&self, dev: u8, id: CheckpointId) {
        let mut inner = self.lock();
        if inner.node.status().role == Role::Primary {
            if let Some(pending) = inner.checkpoints.pending.as_mut().filter(|p| p.id == id) {
                pending.own.insert(dev);
            }
            Self::settle_if_stated(&mut inner);
        } else {
            let primary = inner.primary;
            Self::send_note(&mut inner, primary, &Note::Stated { dev, id });
        }
    }

    fn settle_if_stated(inner: &mut Inner) {
        let all: BTreeSet<u8> = kept(inner).map(|(dev, _)| dev).collect();
        let is_stated = |p: &mut Pending| p.own.is_superset(&all) && p.theirs.is_superset(&all);
        let Some(done) = inner.checkpoints.pending.take_if(is_stated) else { return };
        inner.checkpoints.settled = Some(done.id);
        for (_, disk) in kept(inner) {
            disk.handle.keep(KeeperOrder::Settle { id: done.id });
        }
        let follower = inner.follower;
        Self::send_note(inner, follower, &Note::Settled { id: done.id });
    }

    /// The host that has everything that this one's machine does.
    pub(crate) fn protected_by(&self) -> Option<String> {
        let status = self.lock().node.status();
        let is_protected = status.protection == replica::Protection::Protected;
        status.peer.filter(|_| is_protected).map(|host| host.0)
    }

    /// A copy of a disk failed here.
    pub(crate) fn note_failure(&self, dev: u8, reason: &str, range: Option<(u64, u64)>) {
        let mut inner = self.lock();
        let before = inner.failures.get(&dev);
        let failure = Failure::after(before, reason.to_owned(), range);
        inner.failures.insert(dev, failure);
    }

    /// A copy of a disk failed under the live machine, and the secondary has another one that is as good.
    pub(crate) fn disk_failed(&self, dev: u8, reason: &str, range: Option<(u64, u64)>) {
        self.note_failure(dev, reason, range);
        let mut inner = self.lock();
        let peer = inner.node.status().peer.map_or_else(String::new, |host| host.0);
        let here = &self.host;
        let what =
            format!("disk {dev} of host {here} failed: {reason}; the copy of host {peer} serves");
        tracing(self, &what);
        inner.disk_problem = Some(what);
        let follower = inner.follower;
        let note = Note::Failed { dev, reason: reason.to_owned() };
        Self::send_note(&mut inner, follower, &note);
        self.feed_locked(&mut inner, Event::SwitchOver);
    }

    /// Looks whether copies of disks that failed here are good again.
    ///
    /// # Errors
    /// One line that says why not.
    pub(crate) fn check_failed_disks(&self, definition: &Definition) -> Result<(), String> {
        // Probing takes its time, which the lock is not held for.
        let failures = self.lock().failures.clone();
        for (dev, mut failure) in failures {
            let section = definition.config.disks.get(usize::from(dev));
            let probed = section.map_or(Ok(()), |section| failure.probe(dev, section));
            self.lock().failures.insert(dev, failure);
            probed?;
        }
        Ok(())
    }

    /// Whether a checkpoint is under way.
    pub(crate) fn is_checkpoint_pending(&self) -> bool {
        self.lock().checkpoints.pending.is_some()
    }

    /// The disks that records are kept of.
    pub(crate) fn kept_disks(&self) -> Vec<DiskPort> {
        kept(&self.lock()).map(|(_, disk)| disk.clone()).collect()
    }

    /// The copies here have everything that the VM did in `generation`.
    pub(crate) fn tell_generation(disks: &[DiskPort], generation: u64) {
        for disk in disks {
            disk.handle.keep(KeeperOrder::Generation { generation, create: false });
        }
    }
}

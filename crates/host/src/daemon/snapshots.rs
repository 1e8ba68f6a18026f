//! Snapshots on request: taken, listed, restored and deleted for people, on their connections' threads.
//!
//! # Place
//! The files are [`crate::snapshot::store`]'s, the machines [`crate::vm`]'s.
//!
//! # Invariants
//! - INV-SNAPREQ-1: while one snapshot of a VM is deleted, no other is taken, restored or deleted.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, TryLockError};

use super::{ARBITER_TIME_MAX, Daemon, live_elsewhere};
use crate::arbiter;
use crate::control::{CloneRequest, ErrorCode, Progress, Response, SnapshotInfo};
use crate::name::check_name;
use crate::one_line::one_line;
use crate::recording::{rfc3339, unix_ms};
use crate::snapshot::store::{Entry, Facts, Store, StoreError};
use crate::vm::{RestoreError, Target, prepare};

/// Ticks of guest time in a millisecond.
const TICKS_PER_MS: u64 = machine::clock::TICKS_PER_SECOND / 1000;

fn refuse(e: &StoreError) -> Response {
    let code = match e {
        StoreError::NotFound { .. } => ErrorCode::NotFound,
        StoreError::Name(_) => ErrorCode::BadRequest,
        StoreError::Snapshot(_) | StoreError::Image { .. } | StoreError::Io { .. } => {
            ErrorCode::Failed
        }
    };
    Response::error(code, one_line(e))
}

fn busy(vm: &str) -> Response {
    let text = format!(
        "snapshots of VM {vm} are being used by another command; try again when it is done"
    );
    Response::error(ErrorCode::Failed, text)
}

/// A name for a snapshot that nobody named: the time, as far as it takes to be the only one.
fn name_for_now(store: &Store) -> Result<String, StoreError> {
    let now = rfc3339(unix_ms()).replace(':', "-");
    let short = now.split('.').next().unwrap_or(&now).to_owned();
    Ok(if store.path_of(&short)?.exists() { now } else { short })
}

impl Daemon {
    fn store_lock(&self, vm: &str) -> Arc<RwLock<()>> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(stores.entry(vm.to_owned()).or_default())
    }

    pub(super) fn create_snapshot(
        &self,
        vm: &str,
        name: Option<String>,
        tell: &mut dyn FnMut(Progress),
    ) -> Response {
        self.try_create(vm, name, tell).unwrap_or_else(|response| response)
    }

    fn try_create(
        &self,
        vm: &str,
        name: Option<String>,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<Response, Response> {
        let (live, _) = self.live(vm)?;
        let store = Store::new(&self.env.state_dir, vm).map_err(|e| refuse(&e))?;
        let lock = self.store_lock(vm);
        let Ok(_shared) = lock.try_read() else { return Err(busy(vm)) };
        let name = name.map_or_else(|| name_for_now(&store), Ok).map_err(|e| refuse(&e))?;
        if store.path_of(&name).map_err(|e| refuse(&e))?.exists() {
            let text =
                format!("there is a snapshot {name} of VM {vm} already: choose another name");
            return Err(Response::error(ErrorCode::BadRequest, text));
        }
        let mut tell = |phase, percent| tell(Progress { phase, percent });
        let taken = live.take_snapshot(&store, &name, &mut tell).map_err(|reason| {
            Response::error(ErrorCode::Failed, format!("snapshot {name} of VM {vm}: {reason}"))
        })?;
        Ok(Response::SnapshotTaken {
            name,
            memory_bytes: taken.memory_bytes,
            disk_bytes: taken.disk_bytes,
            file_bytes: taken.file_bytes,
            pause_us: taken.pause_us,
            is_increment: taken.parent.is_some(),
            icount: taken.pos.icount,
        })
    }

    pub(super) fn list_snapshots(&self, vm: Option<&str>) -> Response {
        let listed = || -> Result<Vec<SnapshotInfo>, StoreError> {
            let stores = match vm {
                Some(vm) => vec![Store::new(&self.env.state_dir, vm)?],
                None => Store::all(&self.env.state_dir)?,
            };
            let mut all = Vec::new();
            for store in stores {
                let entries = store.entries()?;
                all.extend(entries.iter().map(|entry| describe(&store, entry, &entries)));
            }
            Ok(all)
        };
        match listed() {
            Ok(snapshots) => Response::Snapshots { snapshots },
            Err(e) => refuse(&e),
        }
    }

    pub(super) fn delete_snapshot(
        &self,
        vm: &str,
        name: &str,
        tell: &mut dyn FnMut(Progress),
    ) -> Response {
        let lock = self.store_lock(vm);
        let _alone = match lock.try_write() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return busy(vm),
        };
        let mut tell = |phase, percent| tell(Progress { phase, percent });
        let deleted =
            Store::new(&self.env.state_dir, vm).and_then(|store| store.delete(name, &mut tell));
        deleted.map_or_else(|e| refuse(&e), |()| Response::Done)
    }

    pub(super) fn restore_snapshot(
        &self,
        vm: &str,
        name: &str,
        force: bool,
        clone: Option<CloneRequest>,
        tell: &mut dyn FnMut(Progress),
    ) -> Response {
        let target = match clone {
            None => Target::Same { force },
            Some(CloneRequest { name, dir, connect }) => Target::Clone { name, dir, connect },
        };
        self.try_restore(vm, name, &target, tell).unwrap_or_else(|response| response)
    }

    fn try_restore(
        &self,
        vm: &str,
        name: &str,
        target: &Target,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<Response, Response> {
        let started = match target {
            Target::Same { .. } => vm,
            Target::Clone { name, .. } => name,
        };
        let wrong =
            |e: &dyn std::fmt::Display| Response::error(ErrorCode::BadRequest, e.to_string());
        check_name(started).map_err(|e| wrong(&e))?;
        if let Some(known) = self.find(started) {
            if !known.is_spare() {
                let text = format!("VM {started} is running or followed here: stop it first");
                return Err(Response::error(ErrorCode::Failed, text));
            }
            known.settle();
        }
        self.check_not_elsewhere(started)?;
        let store = Store::new(&self.env.state_dir, vm).map_err(|e| refuse(&e))?;
        let lock = self.store_lock(vm);
        let Ok(_shared) = lock.try_read() else { return Err(busy(vm)) };
        let mut tell = |phase, percent| tell(Progress { phase, percent });
        let prepared = prepare(&store, name, target, &mut tell).map_err(|e| match e {
            RestoreError::Store(e) => refuse(&e),
            RestoreError::Usage(text) => Response::error(ErrorCode::BadRequest, text),
            RestoreError::Failed(text) => {
                Response::error(ErrorCode::Failed, format!("snapshot {name} of VM {vm}: {text}"))
            }
        })?;
        let (definition, created) = prepared;
        let file: PathBuf = definition.file.clone();
        match self.start_defined(definition, false, false) {
            Response::Done => {
                created.keep();
                Ok(Response::Restored { vm: started.to_owned(), file })
            }
            other => Err(other),
        }
    }

    /// Spares people the work of restoring what may not be started: the start asks again.
    fn check_not_elsewhere(&self, vm: &str) -> Result<(), Response> {
        let failed = |e: &dyn std::error::Error| Response::error(ErrorCode::Failed, one_line(e));
        let mut arbiter =
            arbiter::open(&self.env.arbiter, ARBITER_TIME_MAX).map_err(|e| failed(&e))?;
        match arbiter.read(vm).map_err(|e| failed(&e))? {
            Some(arbiter::Record { live: Some(host), generation, .. }) if host != self.env.host => {
                Err(live_elsewhere(vm, &host, generation))
            }
            _ => Ok(()),
        }
    }

    /// The answer to a start of a VM of which some disks are those of a snapshot, and others are not.
    pub(super) fn half_restored(&self, vm: &str) -> Option<Response> {
        let name = Store::new(&self.env.state_dir, vm).ok()?.restoring()?;
        let text = format!(
            "VM {vm}: its disks were being replaced by those of snapshot {name} when that was interrupted; \
             do it again: understudy snapshot restore --force {vm} {name}"
        );
        Some(Response::error(ErrorCode::Failed, text))
    }
}

fn describe(store: &Store, entry: &Entry, all: &[Entry]) -> SnapshotInfo {
    let facts: Option<&Facts> = entry.facts.as_ref().ok();
    let parent = facts.and_then(|facts| facts.parent);
    let parent_name = parent.and_then(|id| {
        let is_it = |e: &&Entry| e.facts.as_ref().is_ok_and(|facts| facts.id == id);
        all.iter().find(is_it).map(|e| e.name.clone())
    });
    let problem = match &entry.facts {
        Err(e) => Some(one_line(e)),
        Ok(_) if parent.is_some() && parent_name.is_none() => {
            Some("the snapshot that it builds on is missing".to_owned())
        }
        Ok(_) => None,
    };
    SnapshotInfo {
        vm: store.vm().to_owned(),
        name: entry.name.clone(),
        taken: facts.map(|facts| rfc3339(facts.taken_unix_ms)),
        guest_ms: facts.map(|facts| facts.mtime / TICKS_PER_MS),
        icount: facts.map(|facts| facts.pos.icount),
        parent: parent_name.or_else(|| parent.map(|id| id.to_string())),
        bytes: entry.bytes,
        problem,
    }
}

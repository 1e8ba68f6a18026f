//! A machine that begins in a state that is at hand, rather than at power-on.
//!
//! # Place
//! Made on a caller's thread, which may take its time: a snapshot that is restored ([`super::restore`]), or a replay that
//! goes on live. Given to the vCPU thread in the VM's [`super::Definition`]; it is used once the right to run is won.
//!
//! # Invariants
//! - INV-ORIGIN-1: nothing that other hosts may be using is changed before the right to run is won.
//! - INV-ORIGIN-2: a state is run once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use eventlog::{ClockBase, LogPos};
use machine::Machine;
use machine::ram::Epoch;

use crate::disk::Image;
use crate::disk::copy::CHUNK_BYTES;
use crate::disk::mirror::MirrorWriter;
use crate::one_line::one_line;
use crate::snapshot::store::Store;
use crate::snapshot::{SnapshotId, chain};

/// What a VM's machine begins with.
#[derive(Debug, Clone, Default)]
pub enum Origin {
    /// Its boot images.
    #[default]
    PowerOn,
    /// A state at hand, for one start.
    State(Arc<Mutex<Option<Box<Prepared>>>>),
}

impl Origin {
    /// A state at hand.
    #[must_use]
    pub fn state(prepared: Prepared) -> Self {
        Self::State(Arc::new(Mutex::new(Some(Box::new(prepared)))))
    }

    /// The state, if there is to be one.
    ///
    /// # Errors
    /// It was run already.
    pub(super) fn take(&self) -> Result<Option<Box<Prepared>>, String> {
        match self {
            Self::PowerOn => Ok(None),
            Self::State(state) => {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                let taken = state.take();
                taken.map(Some).ok_or_else(|| "that state was run already".to_owned())
            }
        }
    }
}

/// A machine in the state that it is to run from, and what it takes to run it.
#[derive(Debug)]
pub struct Prepared {
    machine: Machine,
    disks: Vec<StagedDisk>,
    /// The snapshot whose state it is, in whose store the next ones will be.
    snapshot: Option<(Store, String, SnapshotId)>,
}

/// Contents that a disk is to have.
#[derive(Debug)]
pub(super) enum StagedDisk {
    /// Written beside the file; what has the name now is held so that nobody begins to use it.
    File {
        writer: MirrorWriter,
        present: Option<Image>,
        /// The record of the copy that is there now.
        record: PathBuf,
    },
    /// A block device is written over, when it may be.
    Device { image: Image, dev: u8, chain: Vec<PathBuf>, record: PathBuf },
}

impl Prepared {
    /// A machine without disks to be prepared.
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        Self { machine, disks: Vec::new(), snapshot: None }
    }

    /// With contents for its disks.
    pub(super) fn with_disks(self, disks: Vec<StagedDisk>) -> Self {
        Self { disks, ..self }
    }

    /// As the state of a snapshot that later ones can build on.
    pub(super) fn of_snapshot(self, store: Store, name: String, id: SnapshotId) -> Self {
        Self { snapshot: Some((store, name, id)), ..self }
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Gives the disks their contents, and the machine to who runs it, with the moment that snapshots can build on. Called
    /// when the right to run is won.
    pub(super) fn begin(self) -> Result<(Machine, Option<(SnapshotId, Epoch)>), String> {
        let Self { mut machine, disks, snapshot } = self;
        let replaced = snapshot.as_ref().filter(|_| !disks.is_empty());
        if let Some((store, name, _)) = replaced {
            store.begin_restoring(name).map_err(|e| one_line(&e))?;
        }
        disks.into_iter().try_for_each(StagedDisk::put)?;
        if let Some((store, _, _)) = replaced {
            store.end_restoring().map_err(|e| one_line(&e))?;
        }
        let moment = snapshot.map(|(_, _, id)| {
            let epoch = machine.ram_mut().arm_snapshot(None);
            machine.ram_mut().disarm_snapshot();
            (id, epoch)
        });
        Ok((machine, moment))
    }
}

/// Where the log of a machine that begins in a state begins.
pub(super) fn log_start(machine: &Machine) -> (LogPos, ClockBase) {
    (LogPos { lsn: 0, icount: machine.icount() }, ClockBase::default())
}

impl StagedDisk {
    fn put(self) -> Result<(), String> {
        match self {
            Self::File { writer, present, record } => {
                forget(&record)?;
                // The file that is replaced can be let go: it is opened by name once more.
                drop(present);
                writer.finish().map(drop).map_err(|e| one_line(&e))
            }
            Self::Device { image, dev, chain, record } => {
                forget(&record)?;
                write_device(image, dev, &chain)
            }
        }
    }
}

/// What a disk's copy differed in says nothing of other contents.
fn forget(record: &Path) -> Result<(), String> {
    crate::disk::record::remove(record)
        .map_err(|e| format!("cannot remove {}: {e}", record.display()))
}

/// Writes a snapshot's disk over a block device.
fn write_device(image: Image, dev: u8, files: &[PathBuf]) -> Result<(), String> {
    let chunks = image.size().div_ceil(CHUNK_BYTES);
    let mut written: BTreeMap<u64, u64> = BTreeMap::new();
    chain::disk(files, dev, &mut |index, data| {
        *written.entry(index / 64).or_default() |= 1 << (index % 64);
        image.write(index.saturating_mul(CHUNK_BYTES), data)
    })?;
    for index in 0..chunks {
        if written.get(&(index / 64)).is_none_or(|set| set >> (index % 64) & 1 == 0) {
            let offset = index * CHUNK_BYTES;
            image.zero(offset, CHUNK_BYTES.min(image.size() - offset))?;
        }
    }
    image.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::OpenMode;
    use crate::snapshot::{SnapshotHead, SnapshotWriter};
    use machine::config::{BootImages, DiskConfig, MachineConfig};

    const BYTES: u64 = 5 * CHUNK_BYTES + 512;

    fn machine() -> Machine {
        let config = MachineConfig {
            harts: 1,
            ram_size: 32 << 20,
            nets: vec![],
            disks: vec![DiskConfig { size: BYTES, readonly: false, serial: String::new() }],
            consoles: 0,
            rngs: 0,
            rtc_base_ns: 5,
            rng_seed: vec![],
        };
        let code: &[u8] = &[0x6f, 0, 0, 0];
        let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
        Machine::new(config, images).unwrap()
    }

    #[test]
    fn device_gets_the_disk_of_a_chain_and_nothing_else_stays() {
        let work = tempfile::tempdir().unwrap();
        let head = |id: u8, parent: Option<u8>| SnapshotHead {
            id: SnapshotId([id; 16]),
            parent: parent.map(|id| SnapshotId([id; 16])),
            name: String::new(),
            taken_unix_ms: 0,
            pos: LogPos::default(),
            clock: (0, 0, 0),
            append: String::new(),
            images: [None; 3],
            disks: vec![BYTES],
            definition: None,
            saved: machine().save(),
        };
        let full = |byte: u8| vec![byte; CHUNK_BYTES as usize];
        let chain = [work.path().join("new"), work.path().join("old")];
        let mut old = SnapshotWriter::create(&chain[1], &head(1, None)).unwrap();
        for index in 0..3 {
            old.chunk(0, index, Some(&full(1))).unwrap();
        }
        old.chunk(0, 5, Some(&[1; 512])).unwrap();
        old.finish().unwrap();
        let mut new = SnapshotWriter::create(&chain[0], &head(2, Some(1))).unwrap();
        new.chunk(0, 1, Some(&full(2))).unwrap();
        new.chunk(0, 2, None).unwrap();
        new.finish().unwrap();
        let device = work.path().join("device");
        std::fs::write(&device, vec![0xff; BYTES as usize]).unwrap();
        let image = Image::open(&device, OpenMode::Exclusive).unwrap();
        write_device(image, 0, &chain).unwrap();
        let wanted = [full(1), full(2), full(0), full(0), full(0), vec![1; 512]].concat();
        assert!(std::fs::read(&device).unwrap() == wanted);
    }

    #[test]
    fn a_state_is_run_once() {
        let origin = Origin::state(Prepared::new(machine()));
        let again = origin.clone();
        let (machine, moment) = origin.take().unwrap().unwrap().begin().unwrap();
        assert_eq!((log_start(&machine).0, moment), (LogPos { lsn: 0, icount: 0 }, None));
        assert!(again.take().unwrap_err().contains("already"));
        assert!(Origin::PowerOn.take().unwrap().is_none());
    }
}

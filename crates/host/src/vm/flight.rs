//! The flight recorder: the last minutes of a protected VM, kept by the secondary on its own host's disk.
//!
//! # Place
//! The secondary starts a recording when it has caught up, and tells it what it replays; the primary has no part in it. The
//! recording ends when the secondary goes live, differs or is given up, and stays for `understudy debug VM@TIME`.
//!
//! # Invariants
//! - INV-FLIGHT-1: going live waits for nothing here.
//! - INV-FLIGHT-2: of each VM no more than [`FLIGHTS_MAX`] recordings are kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use machine::Machine;
use machine::config::{BootImages, MachineConfig};

use super::Env;
use super::definition::Definition;
use crate::config::ProtectionSection;
use crate::one_line::one_line;
use crate::recording::{About, Prepared, RecordLimit, RecordOptions, Recorder, rfc3339, start};

/// Most recordings of a VM that are kept: of the last secondaries that this host had of it.
pub const FLIGHTS_MAX: usize = 4;

/// What a secondary is to record, and where.
#[derive(Debug)]
pub(crate) struct FlightPlan {
    vm: String,
    host: String,
    /// The VM's recordings.
    dir: PathBuf,
    limit: RecordLimit,
}

/// Where the recordings of a VM are.
fn flights_dir(state_dir: &Path, vm: &str) -> PathBuf {
    state_dir.join("flight").join(vm)
}

/// The recordings that this host has of a VM, oldest first: their names are the dates at which they began.
#[must_use]
pub fn flights(state_dir: &Path, vm: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(flights_dir(state_dir, vm)).into_iter().flatten();
    let mut dirs: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    dirs.retain(|dir| dir.is_dir());
    dirs.sort();
    dirs
}

impl FlightPlan {
    /// The plan for a VM's secondary on this host; none when its definition wants none.
    pub(crate) fn of(env: &Env, definition: &Definition) -> Option<Self> {
        let ProtectionSection { flight_recorder: keep, flight_recorder_size: size, .. } =
            definition.config.protection;
        (!keep.is_zero()).then(|| Self {
            vm: definition.config.name.clone(),
            host: env.host.clone(),
            dir: flights_dir(&env.state_dir, &definition.config.name),
            limit: RecordLimit { time: Some(keep), bytes: Some(size) },
        })
    }

    /// Prepares a recording of `machine`, on a thread of its own: that takes as long as its images are big, and as the disk
    /// is slow.
    pub(crate) fn prepare(self, machine: &Machine) -> Flight {
        let (config, images) = (machine.config().clone(), machine.images().clone());
        let (vm, engine) = (self.vm.clone(), machine.engine().to_string());
        let prepare = move || self.make(engine, &config, &images);
        let thread = std::thread::Builder::new().name("flight".to_owned()).spawn(prepare);
        Flight { vm, thread: thread.map_err(|e| e.to_string()) }
    }

    fn make(
        self,
        engine: String,
        config: &MachineConfig,
        images: &BootImages,
    ) -> Result<Prepared, String> {
        self.make_room().map_err(|e| format!("cannot use {}: {e}", self.dir.display()))?;
        let now = crate::recording::unix_ms();
        let options = RecordOptions {
            dir: self.dir.join(rfc3339(now)),
            limit: self.limit,
            snapshot_interval: Duration::ZERO,
            about: About {
                vm: self.vm.clone(),
                host: self.host.clone(),
                build: start::BUILD.to_owned(),
                engine,
                ..About::default()
            },
        };
        Prepared::new(options, config, images).map_err(|e| one_line(&e))
    }

    fn make_room(&self) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&self.dir)?;
        let mut dirs: Vec<PathBuf> =
            fs::read_dir(&self.dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        dirs.sort();
        let surplus = (dirs.len() + 1).saturating_sub(FLIGHTS_MAX);
        dirs.iter().take(surplus).try_for_each(fs::remove_dir_all)
    }
}

/// A flight recorder that is about to begin.
#[derive(Debug)]
pub(crate) struct Flight {
    vm: String,
    thread: Result<JoinHandle<Result<Prepared, String>>, String>,
}

impl Flight {
    /// Whether [`Self::begin`] has nothing to wait for.
    pub(crate) fn is_ready(&self) -> bool {
        self.thread.as_ref().map_or(true, JoinHandle::is_finished)
    }

    /// Begins to record; what prevents it is told, and concerns the VM in nothing.
    pub(crate) fn begin(self, machine: &mut Machine) -> Recorder {
        let prepared = self.thread.and_then(|thread| {
            thread.join().unwrap_or_else(|_| Err("what prepares it has failed".to_owned()))
        });
        let begun = prepared.and_then(|p| Recorder::begin(p, machine).map_err(|e| one_line(&e)));
        begun.unwrap_or_else(|reason| {
            crate::log::line(&format!("vm {}: no flight recorder: {reason}", self.vm));
            Recorder::default()
        })
    }
}

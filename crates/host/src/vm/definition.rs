//! A VM's definition as the hosts pass it on: the configuration file's text, and what is made from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use machine::config::{BootImages, MachineConfig};

use super::Env;
use super::moving::place_disks;
use super::origin::Origin;
use super::owning::Locks;
use super::ports::Ports;
use super::shared::Shared;
use super::standing;
use super::vcpu::{DiskPort, Disks, Mail};
use crate::config::{DiskMode, DiskSection, Drawn, ReadsFrom, VmConfig};
use crate::disk::journal::Journal;
use crate::disk::keeper::KeeperOrder;
use crate::disk::lock::ImageLock;
use crate::disk::record::CopyState;
use crate::disk::{DiskHandle, DiskOptions, DiskSource, Image, Limits, OpenMode};
use crate::one_line::one_line;
use crate::recording::RecordOptions;

/// Bytes of the seed given to the guest's kernel.
const SEED_BYTES: usize = 64;

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct Definition {
    /// The configuration file's text.
    pub text: String,
    /// The configuration file, absolute: relative paths in it count from its directory, on every host.
    pub file: PathBuf,
    /// What it says.
    pub config: VmConfig,
    /// How to record a machine that is started on this host.
    pub record: Option<RecordOptions>,
    /// What a machine that is started on this host begins with.
    pub origin: Origin,
}

/// Draws what a new machine has of its own.
pub(super) fn draw() -> Result<Drawn, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut rng_seed = vec![0; SEED_BYTES];
    rustix::rand::getrandom(&mut rng_seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| format!("no random numbers from the kernel: {e}"))?;
    Ok(Drawn { rtc_base_ns: u64::try_from(now.as_nanos()).unwrap_or(0), rng_seed })
}

impl Definition {
    /// Reads a definition from its text.
    ///
    /// # Errors
    /// One line that names the file and what is wrong.
    pub fn parse(text: String, file: PathBuf) -> Result<Self, String> {
        let base = file.parent().unwrap_or(Path::new("/"));
        let config =
            VmConfig::parse(&text, &file.display().to_string(), base).map_err(|e| e.to_string())?;
        Ok(Self { text, file, config, record: None, origin: Origin::PowerOn })
    }

    /// Whether it begins in a state at hand, whose disks come with it.
    pub(crate) fn has_state(&self) -> bool {
        matches!(self.origin, Origin::State(_))
    }

    /// The same, with its disks where they are on this host.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn placed(mut self, state_dir: &Path) -> Result<Self, String> {
        place_disks(&mut self.config, state_dir)?;
        Ok(self)
    }

    /// Tells the core how far a secondary may be behind.
    pub(crate) fn bound_lag(&self, shared: &Shared) {
        shared.lock().node.bound_lag(u64::from(self.config.protection.lag_ms) * 1000);
    }

    pub(crate) fn digest_interval(&self) -> Duration {
        Duration::from_millis(u64::from(self.config.protection.digest_interval_ms))
    }

    fn open_image(&self, source: &DiskSource, mode: OpenMode) -> Result<Image, String> {
        Image::open_again(source, mode)
            .map_err(|e| format!("VM {}: {}", self.config.name, one_line(&e)))
    }

    /// Sizes of the disks in bytes. Looks at what they are, where that was not said: no guest has run yet that could have
    /// written what is found.
    pub(crate) fn disk_sizes(&self) -> Result<Vec<u64>, String> {
        let size = |disk: &DiskSection| {
            self.open_image(&disk.source(), OpenMode::ReadOnly).map(|image| image.size())
        };
        self.config.disks.iter().map(size).collect()
    }

    /// What a machine at power-on is made of.
    pub(crate) fn machine(&self) -> Result<(MachineConfig, BootImages), String> {
        self.config.write_seed(true)?;
        let config = self.config.machine_config(&self.disk_sizes()?, draw()?)?;
        Ok((config, self.config.boot_images()?))
    }

    /// Lets a disk keep the record of its copy, unless that is no copy to run from.
    pub(crate) fn keep_record(
        &self,
        shared: &Arc<Shared>,
        env: &Env,
        handle: &DiskHandle,
        dev: u8,
    ) -> Result<(), String> {
        let (name, path) = (&self.config.name, &self.config.disks[usize::from(dev)].path);
        let journal = Journal::open(path, &env.state_dir, name, dev, handle.size());
        if journal.state() == CopyState::BeingCopied {
            return Err(format!("VM {name}: {}", standing::half_copied(path)));
        }
        let weak = Arc::downgrade(shared);
        let stated = move |id| {
            if let Some(shared) = weak.upgrade() {
                shared.stated(dev, id);
            }
        };
        handle.keep(KeeperOrder::Keep { journal: Box::new(journal), stated: Box::new(stated) });
        Ok(())
    }

    /// Opens disks, taps and consoles on this host; with the locks of shared disks, for a machine that is live.
    pub(crate) fn open(
        &self,
        shared: &Arc<Shared>,
        env: &Env,
        locks: Option<&Locks>,
    ) -> Result<Disks, String> {
        self.config.write_seed(false)?;
        let epoch = shared.disk_epoch.fetch_add(1, Ordering::Relaxed) + 1;
        let open = |index| {
            let lock = locks.and_then(|locks| locks.get(&index)).cloned();
            self.open_disk(shared, index, epoch, lock)
        };
        let disks = (0..self.config.disks.len()).map(open).collect::<Result<Disks, _>>()?;
        for (dev, disk) in (0u8..).zip(&disks).filter(|(_, disk)| disk.is_kept) {
            self.keep_record(shared, env, &disk.handle, dev)?;
        }
        if locks.is_some() {
            // Those that were set were for an earlier run.
            shared.lock().limits.clear();
            self.limit(shared, &disks);
        }
        let ports = Ports::open(self, shared, disks.clone(), locks.is_some())?;
        shared.lock().ports = Some(ports);
        Ok(disks)
    }

    /// Opens a disk and starts its thread. A shared one is written to by who has its lock.
    pub(crate) fn open_disk(
        &self,
        shared: &Arc<Shared>,
        index: usize,
        epoch: u64,
        lock: Option<Arc<ImageLock>>,
    ) -> Result<DiskPort, String> {
        let section = &self.config.disks[index];
        let mode = match (section.readonly, section.mode) {
            (true, _) => OpenMode::ReadOnly,
            (false, DiskMode::Mirrored) => OpenMode::Exclusive,
            (false, DiskMode::Shared) if lock.is_some() || !section.is_locked() => OpenMode::Shared,
            (false, DiskMode::Shared) if section.reads == ReadsFrom::Local => OpenMode::Followed,
            (false, DiskMode::Shared) => OpenMode::ReadOnly,
        };
        let mut image = self.open_image(&section.source().settled(), mode)?;
        if let Some(lock) = &lock {
            if section.lock.is_none() && image.is_device() {
                // What is beside the name of a device is on this host alone.
                let path = section.path.display();
                return Err(format!(
                    "VM {}: {path} is a block device: give it lock = \"PATH\", on a file system that all hosts share",
                    self.config.name
                ));
            }
            image = image.with_lock(Arc::clone(lock)).map_err(|e| self.fail(&e))?;
        }
        let weak = Arc::downgrade(shared);
        let theirs = lock.clone();
        let dev = u8::try_from(index).map_err(|_| "too many disks".to_owned())?;
        // A follower's requests are the live machine's, which are limited there: see `limit`.
        let options = DiskOptions::new(section.aio, Limits::default());
        let handle = DiskHandle::start(dev, image, options, move |done| {
            let Some(shared) = weak.upgrade() else { return };
            if let Some(reason) = theirs.as_ref().and_then(|lock| lock.lost()) {
                // The guest of a machine that has lost its place hears of no error: it will hear nothing any more.
                return shared.mailbox.post(Mail::Overtaken { epoch, reason: reason.to_owned() });
            }
            if let Some(error) = &done.error {
                shared.lock().last_problem = Some(error.clone());
            }
            shared.mailbox.post(Mail::DiskDone { epoch, done });
        })
        .map_err(|e| {
            let (vm, path) = (&self.config.name, section.path.display());
            format!("VM {vm}: cannot start disk {path} with aio {:?}: {e}", section.aio)
        })?;
        let is_mirrored = section.mode == DiskMode::Mirrored;
        let is_kept = is_mirrored && !section.readonly;
        let reads = (section.reads == ReadsFrom::Local).then(Arc::default);
        Ok(DiskPort { handle: Arc::new(handle), is_mirrored, is_kept, lock, reads })
    }

    /// Limits the disks of a machine that is live: as was set since it was started, or as defined.
    pub(crate) fn limit(&self, shared: &Shared, disks: &Disks) {
        let inner = shared.lock();
        for ((dev, disk), section) in (0u8..).zip(disks).zip(&self.config.disks) {
            let set = inner.limits.get(&dev).copied();
            disk.handle.set_limits(set.unwrap_or_else(|| section.limits()));
        }
    }

    fn fail(&self, e: &dyn std::error::Error) -> String {
        format!("VM {}: {}", self.config.name, one_line(e))
    }
}

//! A VM's definition as the hosts pass it on: the configuration file's text, and what is made from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use machine::config::{BootImages, MachineConfig};

use super::origin::Origin;
use super::ports::Ports;
use super::shared::Shared;
use super::vcpu::{DiskPort, Disks, Mail};
use crate::config::{DiskMode, DiskSection, Drawn, VmConfig};
use crate::disk::{DiskHandle, DiskSource, Image, OpenMode};
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
        let config = self.config.machine_config(&self.disk_sizes()?, draw()?)?;
        Ok((config, self.config.boot_images()?))
    }

    /// Opens disks, taps and consoles on this host.
    pub(crate) fn open(&self, shared: &Arc<Shared>, is_live: bool) -> Result<Disks, String> {
        let mut disks = Disks::new();
        let epoch = shared.disk_epoch.fetch_add(1, Ordering::Relaxed) + 1;
        for (index, section) in self.config.disks.iter().enumerate() {
            let mode = match (section.readonly, section.mode) {
                (true, _) => OpenMode::ReadOnly,
                (false, DiskMode::Mirrored) => OpenMode::Exclusive,
                (false, DiskMode::Shared) => OpenMode::Shared,
            };
            let image = self.open_image(&section.source().settled(), mode)?;
            let weak = Arc::downgrade(shared);
            let dev = u8::try_from(index).map_err(|_| "too many disks".to_owned())?;
            let handle = DiskHandle::start(dev, image, move |done| {
                if let Some(shared) = weak.upgrade() {
                    if let Some(error) = &done.error {
                        shared.lock().last_problem = Some(error.clone());
                    }
                    shared.mailbox.post(Mail::DiskDone { epoch, done });
                }
            })
            .map_err(|e| format!("VM {}: cannot start a disk's thread: {e}", self.config.name))?;
            let is_mirrored = section.mode == DiskMode::Mirrored;
            disks.push(DiskPort { handle: Arc::new(handle), is_mirrored });
        }
        let ports = Ports::open(self, shared, disks.clone(), is_live)?;
        shared.lock().ports = Some(ports);
        Ok(disks)
    }
}

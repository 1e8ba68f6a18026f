//! What a machine is made of: the part of its identity that never changes while it runs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Most harts a machine can have.
pub const HARTS_MAX: u8 = 8;
/// virtio-mmio slots of the board, as on QEMU's `virt`.
pub const VIRTIO_SLOTS: usize = 8;

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// MAC address of the guest's side.
    pub mac: [u8; 6],
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Size in bytes at power-on, a multiple of 512; see [`crate::io::Input::DiskResized`].
    pub size: u64,
    /// Whether the guest may write.
    pub readonly: bool,
    /// Serial number that the guest reads (VIRTIO_BLK_T_GET_ID), at most 20 bytes.
    pub serial: String,
}

/// Everything about a machine that is fixed at its creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Number of harts, 1 to [`HARTS_MAX`].
    pub harts: u8,
    /// RAM in bytes, a multiple of 2 MiB, at least 32 MiB.
    pub ram_size: u64,
    /// Network devices.
    pub nets: Vec<NetConfig>,
    /// Block devices.
    pub disks: Vec<DiskConfig>,
    /// Number of virtio consoles, beside the UART.
    pub consoles: u8,
    /// Number of virtio entropy devices.
    pub rngs: u8,
    /// Wall-clock time at `mtime` 0, in nanoseconds since the Unix epoch; drawn by the host at creation.
    pub rtc_base_ns: u64,
    /// Seed given to the guest kernel in the device tree; drawn by the host at creation.
    pub rng_seed: Vec<u8>,
}

/// What the machine boots, kept for its whole life since a reset loads it again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootImages {
    /// Firmware that runs in M-mode from the start of RAM; without it the machine provides the SBI itself.
    pub bios: Option<Arc<[u8]>>,
    /// Kernel: a RISC-V Linux `Image` or an ELF executable.
    pub kernel: Option<Arc<[u8]>>,
    /// Initial RAM disk.
    pub initrd: Option<Arc<[u8]>>,
    /// Kernel command line.
    pub append: String,
}

/// Least RAM in bytes.
pub const RAM_MIN: u64 = 32 << 20;
/// Most RAM in bytes.
pub const RAM_MAX: u64 = 64 << 30;
/// RAM comes in multiples of this.
pub const RAM_STEP: u64 = 2 << 20;
/// Most bytes of a disk's serial number.
pub const SERIAL_MAX: usize = 20;
/// Most bytes of the seed in the device tree.
pub const RNG_SEED_MAX: usize = 4096;

/// Why there can be no machine of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Number of harts.
    #[error("a machine has 1 to {HARTS_MAX} harts, not {0}")]
    Harts(u8),
    /// Size of RAM.
    #[error("RAM must be a multiple of 2 MiB from 32 MiB to 64 GiB, not {0} bytes")]
    Ram(u64),
    /// Number of devices.
    #[error("a machine has {VIRTIO_SLOTS} virtio slots, but {0} devices are configured")]
    Slots(usize),
    /// Size of a disk.
    #[error("the size of disk {disk} must be a multiple of 512 bytes and not 0, not {size}")]
    DiskSize {
        /// Index of the disk.
        disk: usize,
        /// Size in bytes.
        size: u64,
    },
    /// Serial number of a disk.
    #[error("the serial number of disk {disk} has {len} bytes; {SERIAL_MAX} are allowed")]
    Serial {
        /// Index of the disk.
        disk: usize,
        /// Length in bytes.
        len: usize,
    },
    /// Seed of the guest kernel.
    #[error("the random seed has {0} bytes; {RNG_SEED_MAX} are allowed")]
    RngSeed(usize),
}

impl MachineConfig {
    /// Checks that there can be such a machine.
    ///
    /// # Errors
    /// [`ConfigError`] with the first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=HARTS_MAX).contains(&self.harts) {
            return Err(ConfigError::Harts(self.harts));
        }
        if !(RAM_MIN..=RAM_MAX).contains(&self.ram_size) || !self.ram_size.is_multiple_of(RAM_STEP)
        {
            return Err(ConfigError::Ram(self.ram_size));
        }
        let slots = self.nets.len()
            + self.disks.len()
            + usize::from(self.consoles)
            + usize::from(self.rngs);
        if slots > VIRTIO_SLOTS {
            return Err(ConfigError::Slots(slots));
        }
        for (disk, config) in self.disks.iter().enumerate() {
            if config.size == 0 || !config.size.is_multiple_of(512) {
                return Err(ConfigError::DiskSize { disk, size: config.size });
            }
            if config.serial.len() > SERIAL_MAX {
                return Err(ConfigError::Serial { disk, len: config.serial.len() });
            }
        }
        if self.rng_seed.len() > RNG_SEED_MAX {
            return Err(ConfigError::RngSeed(self.rng_seed.len()));
        }
        Ok(())
    }
}

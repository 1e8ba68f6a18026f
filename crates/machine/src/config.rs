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
    /// Size in bytes, a multiple of 512.
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

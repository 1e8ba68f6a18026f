//! What people change about the disks of a machine that runs here.
//!
//! # Place
//! Called on the daemon's connections' threads. The disk's thread changes the image, the vCPU thread tells the guest. Limits
//! go to the secondary as a note (see [`super::copies`]).
//!
//! # Invariants
//! - INV-LIMITED-1: limits that were set hold where the VM is live, until it is started anew.
//! - INV-RESIZE-1: a replica's image has grown before its machine is told, and each does so at the same step.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::Vm;
use super::shared::{Inner, Shared};
use super::vcpu::Mail;
use crate::config::render_size;
use crate::disk::{DiskHandle, Limits};

/// How long the vCPU thread may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// Why a disk was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeDiskError {
    /// The machine has no such disk, or is not here.
    #[error("VM {vm} has no disk {disk} on this host")]
    NoDisk {
        /// The VM.
        vm: String,
        /// Index of the disk.
        disk: u8,
    },
    /// It cannot have that size.
    #[error(
        "disk {disk} has {present}: it can grow, by multiples of 512 bytes, but cannot get {size}"
    )]
    Size {
        /// Index of the disk.
        disk: u8,
        /// Its size.
        present: String,
        /// The size that it was to get.
        size: String,
    },
    /// The image did not grow.
    #[error("disk {disk} does not grow: {reason}")]
    Image {
        /// Index of the disk.
        disk: u8,
        /// One line.
        reason: String,
    },
    /// The image has grown, the machine is gone.
    #[error(
        "the image of disk {disk} has grown, but the VM does not run here any more: its guest was not told"
    )]
    NotTold {
        /// Index of the disk.
        disk: u8,
    },
}

impl Vm {
    fn disk_handle(&self, disk: u8) -> Result<Arc<DiskHandle>, ChangeDiskError> {
        self.disk_handle_locked(&self.shared.lock(), disk)
    }

    fn disk_handle_locked(
        &self,
        inner: &Inner,
        disk: u8,
    ) -> Result<Arc<DiskHandle>, ChangeDiskError> {
        let ports = inner.ports.as_ref();
        let port = ports.and_then(|ports| ports.disks.get(usize::from(disk)));
        let none = || ChangeDiskError::NoDisk { vm: self.name().to_owned(), disk };
        port.map(|port| Arc::clone(&port.handle)).ok_or_else(none)
    }

    /// Limits a disk, until it is limited otherwise or the VM is started anew. The secondary hears of it, and every one after it.
    ///
    /// # Errors
    /// [`ChangeDiskError::NoDisk`].
    pub fn limit_disk(&self, disk: u8, limits: Limits) -> Result<(), ChangeDiskError> {
        // Under one lock, so that a machine that goes live meanwhile or changes its image has these.
        let mut inner = self.shared.lock();
        self.disk_handle_locked(&inner, disk)?.set_limits(limits);
        inner.limits.insert(disk, limits);
        Shared::tell_limits(&mut inner);
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn limits_in_force(&self) -> Vec<Limits> {
        let inner = self.shared.lock();
        let disks = inner.ports.iter().flat_map(|ports| &ports.disks);
        disks.map(|disk| disk.handle.status().limits).collect()
    }

    /// Makes a disk bigger, here and on the secondary, and tells the guest.
    ///
    /// # Errors
    /// See [`ChangeDiskError`].
    pub fn resize_disk(&self, disk: u8, size: u64) -> Result<(), ChangeDiskError> {
        let handle = self.disk_handle(disk)?;
        let present = handle.size();
        let wrong = || ChangeDiskError::Size {
            disk,
            present: render_size(present),
            size: render_size(size),
        };
        // An image that is bigger already may be one whose guest does not know that yet.
        if size < present || !size.is_multiple_of(512) {
            return Err(wrong());
        }
        handle.grow(size).map_err(|reason| ChangeDiskError::Image { disk, reason })?;
        let (told, answer) = mpsc::channel();
        self.shared.mailbox.post(Mail::DiskGrown { dev: disk, size, told });
        match answer.recv_timeout(ANSWER_TIME_MAX) {
            Ok(true) => Ok(()),
            // The guest knows of that size.
            Ok(false) => Err(wrong()),
            Err(_) => Err(ChangeDiskError::NotTold { disk }),
        }
    }
}

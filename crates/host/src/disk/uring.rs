//! Reads, writes and flushes of one file on an io_uring: many at once, without a thread for each.
//!
//! # Place
//! Owned by the disk's thread, which submits, waits and takes the results. A bell, an event counter, wakes it for other things.
//!
//! # Invariants
//! - INV-RING-1: memory given to the kernel belongs to the ring, unmoved, from the submission until the kernel has said that
//!   it is done with it; where that cannot be waited for, it is never freed.
//! - INV-RING-2: the file and the bell are open as long as the ring is.
//!
//! # Failure
//! A kernel without io_uring, or one that forbids it, refuses [`Ring::new`]; the disk then has threads.

#![expect(unsafe_code, reason = "the kernel reads and writes buffers while nobody waits")]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::io::Errno;

use super::Image;
use super::order::Ticket;

/// Entries: more than a disk has requests at once, and one for the bell.
const ENTRIES: u32 = 256;
/// Names the read of the bell.
const BELL: u64 = u64::MAX;

/// What the kernel is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RingOp {
    /// Fill the buffer from this offset on.
    Read { offset: u64 },
    /// Write the buffer from this offset on.
    Write { offset: u64 },
    /// Make everything durable.
    Flush,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct RingDone {
    pub(super) ticket: Ticket,
    pub(super) op: RingOp,
    pub(super) buffer: Vec<u8>,
    /// Bytes read or written.
    pub(super) result: Result<usize, Errno>,
}

/// See the module documentation.
pub(super) struct Ring {
    ring: IoUring,
    image: Arc<Image>,
    bell: Arc<OwnedFd>,
    bell_word: Box<[u8; 8]>,
    is_bell_read: bool,
    pending: BTreeMap<Ticket, (RingOp, Vec<u8>)>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("pending", &self.pending.len()).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for a raw image.
    ///
    /// # Errors
    /// The kernel has no io_uring, an old one, or does not allow it.
    pub(super) fn new(image: Arc<Image>, bell: Arc<OwnedFd>) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let pending = BTreeMap::new();
        Ok(Self { ring, image, bell, bell_word: Box::new([0; 8]), is_bell_read: false, pending })
    }

    /// Requests that the kernel has.
    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    /// Makes a request ready; [`Self::submit`] and [`Self::wait`] give it to the kernel.
    ///
    /// # Errors
    /// There is no room: the buffer comes back.
    pub(super) fn push(
        &mut self,
        ticket: Ticket,
        op: RingOp,
        buffer: Vec<u8>,
    ) -> Result<(), Vec<u8>> {
        let Some(file) = self.image.raw_file() else { return Err(buffer) };
        let fd = Fd(file.as_raw_fd());
        if self.pending.contains_key(&ticket) {
            return Err(buffer);
        }
        let (_, held) = self.pending.entry(ticket).or_insert((op, buffer));
        let len = u32::try_from(held.len()).unwrap_or(u32::MAX);
        let entry = match op {
            RingOp::Read { offset } => {
                opcode::Read::new(fd, held.as_mut_ptr(), len).offset(offset).build()
            }
            RingOp::Write { offset } => {
                opcode::Write::new(fd, held.as_ptr(), len).offset(offset).build()
            }
            RingOp::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        if self.push_entry(&entry.user_data(ticket)) {
            return Ok(());
        }
        // The kernel has not seen it.
        Err(self.pending.remove(&ticket).map(|(_, buffer)| buffer).unwrap_or_default())
    }

    fn push_entry(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the buffer that the entry names is in `pending`, or is `bell_word`: heap memory of this ring that is
        // neither moved nor freed before the entry's completion was taken, or ever where that cannot be waited for (see
        // `drop`); its length is the buffer's. The descriptors are of `image` and `bell`, which live as long.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.is_ok()
    }

    /// Gives the kernel what is ready. What it does not take now is given to it the next time.
    pub(super) fn submit(&mut self) {
        drop(self.ring.submit());
    }

    /// Gives the kernel what is ready, and waits for a result, for the bell, or until the time is over.
    pub(super) fn wait(&mut self, time: Option<Duration>) {
        if !self.is_bell_read {
            let fd = Fd(self.bell.as_raw_fd());
            let entry = opcode::Read::new(fd, self.bell_word.as_mut_ptr(), 8).build();
            self.is_bell_read = self.push_entry(&entry.user_data(BELL));
        }
        let time = time.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(time) = &time {
            args = args.timespec(time);
        }
        // An interrupted wait and one whose time is over are looked at by the caller, who comes back.
        drop(self.ring.submitter().submit_with_args(1, &args));
    }

    /// The results that are there.
    pub(super) fn take(&mut self) -> Vec<RingDone> {
        let mut all = Vec::new();
        for entry in self.ring.completion() {
            let ticket = entry.user_data();
            if ticket == BELL {
                self.is_bell_read = false;
            } else if let Some((op, buffer)) = self.pending.remove(&ticket) {
                let result = match entry.result() {
                    n @ 0.. => Ok(n.unsigned_abs() as usize),
                    e => Err(Errno::from_raw_os_error(-e)),
                };
                all.push(RingDone { ticket, op, buffer, result });
            }
        }
        all
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.is_bell_read {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
        while !self.pending.is_empty() || self.is_bell_read {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The kernel may still use the memory.
                    std::mem::forget(std::mem::take(&mut self.pending));
                    std::mem::forget(std::mem::replace(&mut self.bell_word, Box::new([0; 8])));
                    return;
                }
            }
            drop(self.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::OpenMode;
    use super::*;

    #[test]
    fn requests_come_back_with_their_buffers_and_the_bell_wakes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, [1; 8192]).unwrap();
        let image = Arc::new(Image::open(&path, OpenMode::Exclusive).unwrap());
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let bell = Arc::new(bell);
        let Ok(mut ring) = Ring::new(image, Arc::clone(&bell)) else {
            return eprintln!("this kernel allows no io_uring: nothing was tested");
        };
        assert_eq!(ring.push(1, RingOp::Read { offset: 4096 }, vec![0; 4096]), Ok(()));
        assert_eq!(ring.push(2, RingOp::Write { offset: 0 }, vec![2; 512]), Ok(()));
        assert_eq!(ring.push(3, RingOp::Flush, Vec::new()), Ok(()));
        assert_eq!(ring.push(4, RingOp::Read { offset: 1 << 40 }, vec![0; 512]), Ok(()));
        let mut all = Vec::new();
        while all.len() < 4 {
            ring.wait(None);
            all.extend(ring.take());
        }
        all.sort_by_key(|done| done.ticket);
        let lens: Vec<_> = all.iter().map(|done| done.result).collect();
        assert_eq!(lens, [Ok(4096), Ok(512), Ok(0), Ok(0)]);
        assert_eq!(all[0].buffer, [1; 4096]);
        assert_eq!(std::fs::read(&path).unwrap()[..513], [[2; 512].as_slice(), &[1]].concat());
        ring.wait(Some(Duration::from_millis(1)));
        assert!(ring.take().is_empty() && ring.is_bell_read);
        rustix::io::write(&bell, &1u64.to_ne_bytes()).unwrap();
        while ring.is_bell_read {
            ring.wait(None);
            assert!(ring.take().is_empty());
            if *ring.bell_word == 1u64.to_ne_bytes() {
                break;
            }
        }
        assert_eq!(ring.push(5, RingOp::Write { offset: 512 }, vec![3; 512]), Ok(()));
        drop(ring);
        assert_eq!(std::fs::read(&path).unwrap()[512..1024], [3; 512]);
    }
}

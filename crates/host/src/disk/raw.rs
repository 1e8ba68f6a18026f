//! Files and block devices whose bytes are the disk's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

const ZERO_BLOCK_BYTES: usize = 256 << 10;

/// An open raw image.
#[derive(Debug)]
pub(super) struct RawImage {
    pub(super) file: File,
    /// Whether holes can be punched, as far as is known.
    can_punch: AtomicBool,
}

impl RawImage {
    pub(super) fn new(file: File) -> Self {
        Self { file, can_punch: AtomicBool::new(true) }
    }

    /// Makes the range read as zeroes, by a hole where the file system has holes.
    pub(super) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.can_punch.load(Ordering::Relaxed) {
            match punch_hole(&self.file, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.can_punch.store(false, Ordering::Relaxed);
                }
                // Other refusals (alignment, quota) concern this range only.
                Err(_) => {}
            }
        }
        write_zeroes(&self.file, offset, len)
    }

    /// Where the next data is, at `offset` or behind; none when there are only holes up to the end.
    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => Some(data),
            Err(Errno::NXIO) => None,
            // File systems without holes have data everywhere.
            Err(_) => Some(offset),
        }
    }
}

/// Size of a file or block device in bytes.
pub(super) fn size_of(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

fn punch_hole(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
}

pub(crate) fn write_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let zeroes = vec![0; ZERO_BLOCK_BYTES];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(ZERO_BLOCK_BYTES as u64);
        file.write_all_at(&zeroes[..usize::try_from(n).unwrap_or(0)], offset + done)?;
        done += n;
    }
    Ok(())
}

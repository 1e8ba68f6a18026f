//! A raw image file or block device, opened and checked; synchronous access with messages that name the file.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::Errno;

/// How long a machine that has stopped may keep an image.
const LET_GO_TIME_MAX: Duration = Duration::from_secs(2);
const LET_GO_LOOK: Duration = Duration::from_millis(10);
const ZERO_BLOCK_BYTES: usize = 256 << 10;

/// How an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Only reads.
    ReadOnly,
    /// Reads and writes; nobody else on this host may have it open so.
    Exclusive,
    /// Reads and writes; the image is shared with other hosts, and arbitration says who writes.
    Shared,
}

/// Why an image was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenImageError {
    /// The system refused.
    #[error("cannot {action} disk image {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is no regular file and no block device.
    #[error("disk image {path} is neither a regular file nor a block device")]
    NotADisk {
        /// The file.
        path: String,
    },
    /// Its size makes no disk.
    #[error("disk image {path} has {size} bytes: a disk has a multiple of 512, and at least 512")]
    BadSize {
        /// The file.
        path: String,
        /// Its size in bytes.
        size: u64,
    },
    /// Another process has it open for writing.
    #[error("disk image {path} is in use by another process on this host")]
    InUse {
        /// The file.
        path: String,
    },
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    size: u64,
    readonly: bool,
    /// Whether holes can be punched, as far as is known.
    can_punch: bool,
}

impl Image {
    /// Opens and checks `path`.
    ///
    /// # Errors
    /// See [`OpenImageError`].
    pub fn open(path: &Path, mode: OpenMode) -> Result<Self, OpenImageError> {
        let name = || path.display().to_string();
        let io = |action| move |source| OpenImageError::Io { action, path: name(), source };
        let readonly = mode == OpenMode::ReadOnly;
        // A path that is no file (a FIFO, say) is found out before open could wait for its other end.
        let kind = std::fs::metadata(path).map_err(io("open"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenImageError::NotADisk { path: name() });
        }
        let file = OpenOptions::new().read(true).write(!readonly).open(path).map_err(io("open"))?;
        let size = rustix::fs::seek(&file, SeekFrom::End(0))
            .map_err(|e| io("find the size of")(e.into()))?;
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenImageError::BadSize { path: name(), size });
        }
        if mode == OpenMode::Exclusive {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(OpenImageError::InUse { path: name() }),
                Err(e) => return Err(io("lock")(e.into())),
            }
        }
        Ok(Self { file, path: path.to_owned(), size, readonly, can_punch: true })
    }

    /// As [`Self::open`], for who may have used the image a moment ago: threads of a machine that has stopped let it go as
    /// soon as they see that.
    ///
    /// # Errors
    /// See [`OpenImageError`].
    pub fn open_again(path: &Path, mode: OpenMode) -> Result<Self, OpenImageError> {
        let start = Instant::now();
        loop {
            match Self::open(path, mode) {
                Err(OpenImageError::InUse { .. }) if start.elapsed() < LET_GO_TIME_MAX => {
                    std::thread::sleep(LET_GO_LOOK);
                }
                opened => return opened,
            }
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the system knows of its file.
    pub(crate) fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// Whether it is a block device, which keeps its contents where others may use them.
    pub(crate) fn is_device(&self) -> bool {
        self.metadata().is_ok_and(|meta| meta.file_type().is_block_device())
    }

    pub(super) fn fail(&self, action: &str, offset: u64, reason: &dyn Display) -> String {
        format!("cannot {action} disk image {} at {offset:#x}: {reason}", self.path.display())
    }

    fn check(&self, action: &str, offset: u64, len: u64) -> Result<(), String> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(self.fail(action, offset, &"the range is beyond the end")),
        }
    }

    pub(super) fn check_write(&self, offset: u64, len: u64) -> Result<(), String> {
        if self.readonly {
            return Err(self.fail("write", offset, &"it is read-only"));
        }
        self.check("write", offset, len)
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, String> {
        self.check("read", offset, len as u64)?;
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, offset).map_err(|e| self.fail("read", offset, &e))?;
        Ok(data)
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        self.check_write(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(|e| self.fail("write", offset, &e))
    }

    pub(crate) fn flush(&self) -> Result<(), String> {
        if self.readonly {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| self.fail("flush", 0, &e))
    }

    /// Makes the range read as zeroes, by a hole where the file system has holes.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) -> Result<(), String> {
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        if self.can_punch {
            match punch_hole(&self.file, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.can_punch = false,
                // Other refusals (alignment, quota) concern this range only.
                Err(_) => {}
            }
        }
        write_zeroes(&self.file, offset, len).map_err(|e| self.fail("zero", offset, &e))
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

pub(super) fn punch_hole(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
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

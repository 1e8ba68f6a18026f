//! A disk's image, opened and checked; synchronous access with messages that name the file.
//!
//! # Place
//! Requests are carried out by the disk's threads, several at once where they may be; a copy, a snapshot and a mirror that is
//! written in place use the same image.
//!
//! # Invariants
//! - Several threads may call one image at once. What two requests at once do to the same range is anybody's guess: who calls
//!   keeps them apart.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    /// In bytes; changes when the disk is resized.
    size: AtomicU64,
    readonly: bool,
    /// Whether holes can be punched, as far as is known.
    can_punch: AtomicBool,
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
        let size = size_of(&file).map_err(io("find the size of"))?;
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
        let (size, can_punch) = (AtomicU64::new(size), AtomicBool::new(true));
        Ok(Self { file, path: path.to_owned(), size, readonly, can_punch })
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
        self.size.load(Ordering::Acquire)
    }

    /// The file whose bytes are the disk's, at the same offsets: of a raw file and of a block device, and of nothing else.
    /// Who uses it checks ranges with [`Self::size`], and writes with [`Self::check_write`].
    #[must_use]
    pub fn raw_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    /// Makes the disk bigger or smaller. What is new reads as zeroes.
    ///
    /// # Errors
    /// One line: the size makes no disk, the image is read-only or a device, or the system refused.
    pub fn resize(&self, size: u64) -> Result<(), String> {
        let fail = |reason: &dyn Display| {
            Err(format!("cannot resize disk image {}: {reason}", self.path.display()))
        };
        if self.readonly {
            return fail(&"it is read-only");
        }
        if size == 0 || !size.is_multiple_of(512) {
            return fail(&format!("{size} bytes make no disk: it has a multiple of 512"));
        }
        if self.is_device() {
            return fail(&"it is a device, which is resized where it is made");
        }
        if let Err(e) = self.file.set_len(size).and_then(|()| self.file.sync_all()) {
            return fail(&e);
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Looks at the size again, which somebody else may have changed; returns it.
    ///
    /// # Errors
    /// One line: it has no size now that makes a disk, or the system refused. The disk then keeps the size that it had.
    pub fn refresh_size(&self) -> Result<u64, String> {
        let path = self.path.display();
        let size = size_of(&self.file)
            .map_err(|e| format!("cannot find the size of disk image {path}: {e}"))?;
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenImageError::BadSize { path: path.to_string(), size }.to_string());
        }
        self.size.store(size, Ordering::Release);
        Ok(size)
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
            Some(end) if end <= self.size() => Ok(()),
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
    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<(), String> {
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
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

fn size_of(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
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

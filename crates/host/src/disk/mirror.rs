//! Writes the copy of a disk beside its final name and gives it that name only when it is complete and durable.
//!
//! # Place
//! On the host that gets the mirror; fed with the [`CopyItem`]s of [`super::copy`], from a peer.
//!
//! # Failure
//! Dropped before [`MirrorWriter::finish`], the partial file is removed. After a crash it stays as `NAME.partial`,
//! which the next writer for the same name replaces; the file under the final name is untouched until the end.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::copy::{CHUNK_BYTES, CopyItem};
use super::{DiskFormat, Image};
use crate::one_line::one_line;

/// Why a mirror is not written.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another copy to the same name is under way.
    #[error("{path} is being written already")]
    Busy {
        /// The partial file.
        path: String,
    },
    /// The size makes no disk.
    #[error("a disk of {size} bytes cannot be mirrored: not a multiple of 512, or empty")]
    BadSize {
        /// The size in bytes.
        size: u64,
    },
    /// The sender's chunk does not fit the disk.
    #[error("chunk {index} with {len} bytes does not fit a disk of {size} bytes")]
    BadChunk {
        /// Index of the chunk.
        index: u64,
        /// Its length.
        len: usize,
        /// The disk's size.
        size: u64,
    },
    /// The image cannot be made or written.
    #[error("{0}")]
    Image(String),
    /// The sender gave up.
    #[error("the sender gave up the copy: {reason}")]
    Failed {
        /// The sender's reason.
        reason: String,
    },
}

/// A mirror that is being written.
#[derive(Debug)]
pub struct MirrorWriter {
    file: File,
    /// What the file holds.
    image: Image,
    partial: PathBuf,
    target: PathBuf,
    size: u64,
    is_finished: bool,
}

impl MirrorWriter {
    /// Creates `TARGET.partial` as an empty sparse raw image of `size` bytes.
    ///
    /// # Errors
    /// See [`MirrorError`].
    pub fn create(target: &Path, size: u64) -> Result<Self, MirrorError> {
        Self::create_as(target, DiskFormat::Raw, size)
    }

    /// Creates `TARGET.partial` as an empty image of `size` bytes.
    ///
    /// # Errors
    /// See [`MirrorError`].
    pub fn create_as(target: &Path, format: DiskFormat, size: u64) -> Result<Self, MirrorError> {
        if size == 0 || !size.is_multiple_of(512) {
            return Err(MirrorError::BadSize { size });
        }
        let mut name = OsString::from(target.as_os_str());
        name.push(".partial");
        let partial = PathBuf::from(name);
        let fail = |action, source| io_error(action, &partial, source);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&partial).map_err(|e| fail("create", e))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(MirrorError::Busy { path: partial.display().to_string() });
            }
            Err(e) => return Err(fail("lock", e.into())),
        }
        // Between open and lock, an earlier writer may have finished and given the file its final name.
        let here = fs::metadata(&partial).map(|m| m.ino()).ok();
        let ours = file.metadata().map_err(|e| fail("look at", e))?.ino();
        if here != Some(ours) {
            return Err(MirrorError::Busy { path: partial.display().to_string() });
        }
        let twin = file.try_clone().map_err(|e| fail("open", e))?;
        let image = Image::format(twin, &partial, format, size)
            .map_err(|e| MirrorError::Image(one_line(&e)))?;
        Ok(Self { file, image, partial, target: target.to_owned(), size, is_finished: false })
    }

    /// Applies an item. True when it was the end: then [`Self::finish`] is due.
    ///
    /// # Errors
    /// See [`MirrorError`]; the writer is then good for nothing but being dropped.
    pub fn apply(&mut self, item: &CopyItem) -> Result<bool, MirrorError> {
        match item {
            CopyItem::Chunk { index, data } => self.write_chunk(*index, data).map(|()| false),
            CopyItem::Zero { index } => self.zero_chunk(*index).map(|()| false),
            CopyItem::Start { .. } | CopyItem::Stated { .. } => Ok(false),
            CopyItem::End { .. } => Ok(true),
            CopyItem::Failed { reason } => Err(MirrorError::Failed { reason: reason.clone() }),
        }
    }

    /// Writes a chunk.
    ///
    /// # Errors
    /// The chunk does not fit, or the system refused.
    pub fn write_chunk(&mut self, index: u64, data: &[u8]) -> Result<(), MirrorError> {
        let (offset, len) = self.range(index).unwrap_or((0, 0));
        if len == 0 || data.len() as u64 != len {
            return Err(MirrorError::BadChunk { index, len: data.len(), size: self.size });
        }
        self.image.write(offset, data).map_err(MirrorError::Image)
    }

    /// Makes a chunk all zero.
    ///
    /// # Errors
    /// The chunk does not fit, or the system refused.
    pub fn zero_chunk(&mut self, index: u64) -> Result<(), MirrorError> {
        let bad = MirrorError::BadChunk { index, len: 0, size: self.size };
        let (offset, len) = self.range(index).ok_or(bad)?;
        self.image.zero(offset, len).map_err(MirrorError::Image)
    }

    /// Gives the copy owner and permissions of the file that it replaces.
    ///
    /// # Errors
    /// The system refused.
    pub fn belong_as(&self, replaced: &fs::Metadata) -> Result<(), MirrorError> {
        let (uid, gid) = (replaced.uid(), replaced.gid());
        let now = self.file.metadata().map_err(|e| self.error("look at", e))?;
        if (uid, gid) != (now.uid(), now.gid()) {
            let given = std::os::unix::fs::fchown(&self.file, Some(uid), Some(gid));
            given.map_err(|e| self.error("give away", e))?;
        }
        let set = self.file.set_permissions(replaced.permissions());
        set.map_err(|e| self.error("set the permissions of", e))
    }

    /// Makes what was written so far durable.
    ///
    /// # Errors
    /// The system refused.
    pub fn sync(&self) -> Result<(), MirrorError> {
        self.image.flush().map_err(MirrorError::Image)?;
        self.file.sync_all().map_err(|e| self.error("sync", e))
    }

    /// Makes the copy durable and gives it its final name, replacing what was there.
    ///
    /// # Errors
    /// The system refused; nothing has the final name then but what had it before.
    pub fn finish(mut self) -> Result<PathBuf, MirrorError> {
        self.sync()?;
        fs::rename(&self.partial, &self.target).map_err(|e| self.error("rename", e))?;
        self.is_finished = true;
        let parent = self.target.parent().filter(|p| !p.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        File::open(parent)
            .and_then(|d| d.sync_all())
            .map_err(|e| io_error("sync directory", parent, e))?;
        Ok(std::mem::take(&mut self.target))
    }

    fn range(&self, index: u64) -> Option<(u64, u64)> {
        let offset = index.checked_mul(CHUNK_BYTES)?;
        let rest = self.size.checked_sub(offset).filter(|r| *r > 0)?;
        Some((offset, rest.min(CHUNK_BYTES)))
    }

    fn error(&self, action: &'static str, source: io::Error) -> MirrorError {
        io_error(action, &self.partial, source)
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> MirrorError {
    MirrorError::Io { action, path: path.display().to_string(), source }
}

impl Drop for MirrorWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            // A file that stays is replaced by the next writer.
            drop(fs::remove_file(&self.partial));
        }
    }
}

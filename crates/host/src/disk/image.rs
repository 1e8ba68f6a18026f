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
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FlockOperation, OFlags};
use rustix::io::Errno;

use super::format::{DiskFormat, LOOK_BYTES, advice, looks_like};
use super::lock::ImageLock;
use super::nbd::{NbdError, NbdImage, NbdUrl};
use super::qcow2::{OpenQcow2Error, Qcow2Image};
use super::raw::{RawImage, size_of};
use super::source::{DiskSource, Place};

/// How long a machine that has stopped may keep an image.
const LET_GO_TIME_MAX: Duration = Duration::from_secs(2);
const LET_GO_LOOK: Duration = Duration::from_millis(10);

/// How an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Only reads.
    ReadOnly,
    /// Only reads, of what another host writes meanwhile: from the storage, not from this host's memory.
    Followed,
    /// Reads and writes; nobody else on this host may have it open so.
    Exclusive,
    /// Reads and writes; the image is shared with other hosts, and its lock says who writes (see [`Image::with_lock`]). A
    /// write that has ended is where the others see it, not in this host's memory.
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
    /// Nobody said what it is, and it does not look raw.
    #[error("disk image {path} looks like {kind}, and nobody said that it is: {}", advice(kind))]
    Ambiguous {
        /// The file.
        path: String,
        /// What it looks like.
        kind: &'static str,
    },
    /// It cannot be used as a qcow2 image.
    #[error("cannot open disk image {path} as qcow2")]
    Qcow2 {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: OpenQcow2Error,
    },
    /// The NBD server or its export.
    #[error("cannot open disk {url}")]
    Nbd {
        /// The export.
        url: String,
        /// Why.
        #[source]
        source: NbdError,
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
    backend: Backend,
    path: PathBuf,
    /// In bytes; changes when the disk is resized.
    size: AtomicU64,
    readonly: bool,
    /// Others write to it: what this host has of it in memory is old.
    is_followed: bool,
    /// Says whether a shared image may be written to. The last field: it is let go when the file is closed.
    lock: Option<Arc<ImageLock>>,
}

#[derive(Debug)]
enum Backend {
    Raw(RawImage),
    Qcow2(Box<Qcow2Image>),
    Nbd(Box<NbdImage>),
}

/// Opens a file or a block device, and nothing else: a path that is no file (a FIFO, say) is found out before open could
/// wait for its other end.
pub(super) fn open_file(path: &Path, is_writable: bool) -> Result<File, OpenImageError> {
    open_with(path, is_writable, OFlags::empty())
}

fn open_with(path: &Path, is_writable: bool, flags: OFlags) -> Result<File, OpenImageError> {
    let io =
        |source| OpenImageError::Io { action: "open", path: path.display().to_string(), source };
    let kind = std::fs::metadata(path).map_err(io)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenImageError::NotADisk { path: path.display().to_string() });
    }
    let mut options = OpenOptions::new();
    options.read(true).write(is_writable).custom_flags(flags.bits().cast_signed());
    options.open(path).map_err(io)
}

fn text<T>(result: io::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

/// Takes the file for this process alone.
fn lock(file: &File, path: &Path) -> Result<(), OpenImageError> {
    let path = || path.display().to_string();
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(OpenImageError::InUse { path: path() }),
        Err(e) => Err(OpenImageError::Io { action: "lock", path: path(), source: e.into() }),
    }
}

impl Image {
    /// Opens and checks `source`.
    ///
    /// # Errors
    /// See [`OpenImageError`].
    pub fn open(source: impl Into<DiskSource>, mode: OpenMode) -> Result<Self, OpenImageError> {
        Self::open_source(&source.into(), mode)
    }

    fn open_source(source: &DiskSource, mode: OpenMode) -> Result<Self, OpenImageError> {
        let path = match &source.place {
            Place::File(path) => path,
            Place::Nbd { url, patience } => {
                return Self::open_nbd(url, *patience, source.format, mode);
            }
        };
        let through = if mode == OpenMode::Shared { OFlags::DSYNC } else { OFlags::empty() };
        let is_writable = matches!(mode, OpenMode::Exclusive | OpenMode::Shared);
        let file = open_with(path, is_writable, through)?;
        if mode == OpenMode::Exclusive {
            lock(&file, path)?;
        }
        let name = || path.display().to_string();
        let format = match source.format {
            Some(format) => format,
            None => {
                let mut start = [0; LOOK_BYTES];
                let len = file.read_at(&mut start, 0);
                let len = len.map_err(|source| OpenImageError::Io {
                    action: "read",
                    path: name(),
                    source,
                })?;
                if let Some(kind) = looks_like(&start[..len]) {
                    return Err(OpenImageError::Ambiguous { path: name(), kind });
                }
                DiskFormat::Raw
            }
        };
        let image = Self::from_file(file, path, format, source.has_backing, !is_writable)?;
        Ok(Self { is_followed: mode == OpenMode::Followed, ..image })
    }

    fn open_nbd(
        url: &NbdUrl,
        patience: Duration,
        format: Option<DiskFormat>,
        mode: OpenMode,
    ) -> Result<Self, OpenImageError> {
        let fail = |source| OpenImageError::Nbd { url: url.to_string(), source };
        let readonly = !matches!(mode, OpenMode::Exclusive | OpenMode::Shared);
        let nbd = NbdImage::open(url, patience, !readonly).map_err(fail)?;
        let size = nbd.size();
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenImageError::BadSize { path: url.to_string(), size });
        }
        if format == Some(DiskFormat::Qcow2) {
            let text = "an export is raw: let the server open the qcow2 image".to_owned();
            return Err(fail(NbdError::Unfit(text)));
        }
        if format.is_none() {
            let mut start = [0; LOOK_BYTES];
            let read = nbd.read(&mut start, 0);
            read.map_err(|why| fail(NbdError::Unfit(why)))?;
            if let Some(kind) = looks_like(&start) {
                return Err(OpenImageError::Ambiguous { path: url.to_string(), kind });
            }
        }
        let (backend, path) = (Backend::Nbd(Box::new(nbd)), PathBuf::from(url.to_string()));
        let (size, is_followed) = (AtomicU64::new(size), mode == OpenMode::Followed);
        Ok(Self { backend, path, size, readonly, is_followed, lock: None })
    }

    /// The image that the open file has.
    fn from_file(
        file: File,
        path: &Path,
        format: DiskFormat,
        has_backing: bool,
        readonly: bool,
    ) -> Result<Self, OpenImageError> {
        let name = || path.display().to_string();
        let (backend, size) = match format {
            DiskFormat::Raw => {
                let io = |source| OpenImageError::Io {
                    action: "find the size of",
                    path: name(),
                    source,
                };
                let size = size_of(&file).map_err(io)?;
                (Backend::Raw(RawImage::new(file)), size)
            }
            DiskFormat::Qcow2 => {
                let image = Qcow2Image::open(file, path, !readonly, has_backing);
                let image =
                    image.map_err(|source| OpenImageError::Qcow2 { path: name(), source })?;
                let size = image.size();
                (Backend::Qcow2(Box::new(image)), size)
            }
        };
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenImageError::BadSize { path: name(), size });
        }
        Ok(Self {
            backend,
            path: path.to_owned(),
            size: AtomicU64::new(size),
            readonly,
            is_followed: false,
            lock: None,
        })
    }

    /// Makes `file`, which is open for reads and writes at `path`, an image of `size` bytes that reads as zeroes. What it
    /// held is lost.
    ///
    /// # Errors
    /// See [`OpenImageError`].
    pub fn format(
        file: File,
        path: &Path,
        format: DiskFormat,
        size: u64,
    ) -> Result<Self, OpenImageError> {
        let name = || path.display().to_string();
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenImageError::BadSize { path: name(), size });
        }
        let io = |action| move |source| OpenImageError::Io { action, path: name(), source };
        file.set_len(0).map_err(io("truncate"))?;
        match format {
            DiskFormat::Raw => file.set_len(size).map_err(io("extend"))?,
            DiskFormat::Qcow2 => {
                let twin = file.try_clone().map_err(io("open"))?;
                Qcow2Image::format(twin, path, size).map_err(io("format"))?;
            }
        }
        Self::from_file(file, path, format, false, false)
    }

    /// With the lock without which nothing is written to it from now on. The image itself is locked as well: a file system
    /// that finds out that this host has lost its locks (NFS) then refuses what it writes.
    ///
    /// # Errors
    /// Somebody else uses it.
    pub fn with_lock(mut self, image_lock: Arc<ImageLock>) -> Result<Self, OpenImageError> {
        if let Some(file) = self.raw_file() {
            match lock(file, &self.path) {
                // Its holder was fenced.
                Err(OpenImageError::InUse { .. }) if image_lock.was_broken() => {}
                locked => locked?,
            }
            // What this host has in memory may be from the time when it last had the VM.
            let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
        }
        if let Backend::Nbd(nbd) = &mut self.backend {
            nbd.set_lock(Arc::clone(&image_lock));
        }
        self.lock = Some(image_lock);
        Ok(self)
    }

    /// As [`Self::open`], for who may have used the image a moment ago: threads of a machine that has stopped let it go as
    /// soon as they see that.
    ///
    /// # Errors
    /// See [`OpenImageError`].
    pub fn open_again(
        source: impl Into<DiskSource>,
        mode: OpenMode,
    ) -> Result<Self, OpenImageError> {
        let (source, start) = (source.into(), Instant::now());
        loop {
            match Self::open_source(&source, mode) {
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
        match &self.backend {
            // Who uses the file reads what is in memory.
            Backend::Raw(_) if self.is_followed => None,
            Backend::Raw(raw) => Some(&raw.file),
            Backend::Qcow2(_) | Backend::Nbd(_) => None,
        }
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
        if let Some(Err(reason)) = self.lock.as_ref().map(|lock| lock.check()) {
            return fail(&reason);
        }
        if size == 0 || !size.is_multiple_of(512) {
            return fail(&format!("{size} bytes make no disk: it has a multiple of 512"));
        }
        let resized = match &self.backend {
            Backend::Nbd(_) => {
                let size = self.size();
                return fail(&format!(
                    "it is an NBD export, which its server resizes; it has {size} bytes"
                ));
            }
            Backend::Raw(_) if self.is_device() => {
                let size = self.size();
                return fail(&format!(
                    "it is a block device, which is resized where it was made; it has {size} bytes"
                ));
            }
            Backend::Raw(raw) => raw.file.set_len(size).and_then(|()| raw.file.sync_all()),
            Backend::Qcow2(qcow2) => qcow2.resize(size),
        };
        if let Err(e) = resized {
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
        let size = match &self.backend {
            Backend::Raw(raw) => size_of(&raw.file)
                .map_err(|e| format!("cannot find the size of disk image {path}: {e}"))?,
            // Nobody else can change it.
            Backend::Qcow2(_) => self.size(),
            Backend::Nbd(nbd) => nbd
                .refresh_size()
                .map_err(|e| format!("cannot find the size of disk {path}: {e}"))?,
        };
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
        match &self.backend {
            Backend::Raw(raw) => raw.file.metadata(),
            Backend::Qcow2(_) => std::fs::metadata(&self.path),
            Backend::Nbd(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Whether it keeps its contents where others may use them, and so is written over rather than replaced: a block
    /// device or an export.
    pub(crate) fn is_device(&self) -> bool {
        matches!(self.backend, Backend::Nbd(_))
            || self.metadata().is_ok_and(|meta| meta.file_type().is_block_device())
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

    pub(super) fn is_readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn check_read(&self, offset: u64, len: u32) -> Result<(), String> {
        if len > super::READ_BYTES_MAX {
            return Err(self.fail("read", offset, &"the request is too long"));
        }
        self.check("read", offset, u64::from(len))
    }

    pub(super) fn check_write(&self, offset: u64, len: u64) -> Result<(), String> {
        if self.readonly {
            return Err(self.fail("write", offset, &"it is read-only"));
        }
        if let Some(lock) = &self.lock {
            lock.check().map_err(|reason| self.fail("write", offset, &reason))?;
        }
        self.check("write", offset, len)
    }

    /// Reads a range.
    ///
    /// # Errors
    /// One line that names the image.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, String> {
        self.check("read", offset, len as u64)?;
        let mut data = vec![0; len];
        let read = match &self.backend {
            Backend::Raw(raw) => {
                if self.is_followed {
                    let _ = rustix::fs::fadvise(
                        &raw.file,
                        offset,
                        NonZeroU64::new(len as u64),
                        Advice::DontNeed,
                    );
                }
                text(raw.file.read_exact_at(&mut data, offset))
            }
            Backend::Qcow2(qcow2) => text(qcow2.read(&mut data, offset)),
            Backend::Nbd(nbd) => nbd.read(&mut data, offset),
        };
        read.map_err(|e| self.fail("read", offset, &e))?;
        Ok(data)
    }

    /// Writes a range.
    ///
    /// # Errors
    /// One line that names the image.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        self.check_write(offset, data.len() as u64)?;
        let written = match &self.backend {
            Backend::Raw(raw) => text(raw.file.write_all_at(data, offset)),
            Backend::Qcow2(qcow2) => text(qcow2.write(data, offset)),
            Backend::Nbd(nbd) => nbd.write(data, offset),
        };
        written.map_err(|e| self.fail("write", offset, &e))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// One line that names the image.
    pub fn flush(&self) -> Result<(), String> {
        if self.readonly {
            return Ok(());
        }
        let flushed = match &self.backend {
            Backend::Raw(raw) => text(raw.file.sync_data()),
            Backend::Qcow2(qcow2) => text(qcow2.flush()),
            Backend::Nbd(nbd) => nbd.flush(),
        };
        flushed.map_err(|e| self.fail("flush", 0, &e))
    }

    /// Makes the range read as zeroes, and takes no room for it where that can be.
    ///
    /// # Errors
    /// One line that names the image.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), String> {
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let zeroed = match &self.backend {
            Backend::Raw(raw) => text(raw.zero(offset, len)),
            Backend::Qcow2(qcow2) => text(qcow2.zero(offset, len)),
            Backend::Nbd(nbd) => nbd.zero(offset, len),
        };
        zeroed.map_err(|e| self.fail("zero", offset, &e))
    }

    /// Properties of the export, for people; nothing for what is in a file.
    #[must_use]
    pub fn export_line(&self) -> Option<String> {
        match &self.backend {
            Backend::Nbd(nbd) => Some(nbd.describe()),
            Backend::Raw(_) | Backend::Qcow2(_) => None,
        }
    }

    /// Where the next data is, at `offset` or behind; none when everything up to the end reads as zeroes.
    #[must_use]
    pub fn next_data(&self, offset: u64) -> Option<u64> {
        match &self.backend {
            Backend::Raw(raw) => raw.next_data(offset),
            Backend::Qcow2(qcow2) => qcow2.next_data(offset),
            Backend::Nbd(nbd) => nbd.next_data(offset),
        }
    }
}

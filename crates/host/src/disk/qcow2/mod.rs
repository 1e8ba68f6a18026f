//! qcow2 images, by the imago crate: opened with our own look at the header first, and used by several threads.
//!
//! # Place
//! Behind [`super::Image`]. imago calls the system itself, on the thread that carries out the request.
//!
//! # Invariants
//! - No other file is opened than the image, unless its owner asked for backing files; those are only read, never written,
//!   and each in the format that the image above it says.
//! - A flush writes out imago's tables and then waits for the device: data and tables are durable.
//! - A range that was discarded reads as zeroes, with a backing file as well.
//!
//! # Failure
//! When the process dies, the image may have clusters that nothing refers to; they cost room, not contents.

pub mod check;
pub mod header;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File as Storage;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
    StorageOpenOptions,
};

use self::header::{Header, HeaderError};
use super::image::open_file;

/// Largest cluster of the format.
const CLUSTER_BYTES_MAX: usize = 2 << 20;
/// Most images in a chain of backing files.
const LAYERS_MAX: usize = 16;

/// Why a qcow2 image was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenQcow2Error {
    /// Its header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It has a backing file and was not to have one.
    #[error("it is an overlay of {0}: say `backing=on` if that is to be read, too")]
    HasBacking(String),
    /// A backing file cannot be used.
    #[error("its backing file {path} cannot be used: {reason}")]
    Backing {
        /// The backing file.
        path: String,
        /// Why.
        reason: String,
    },
    /// The system, or the image's tables.
    #[error("its tables cannot be read")]
    Io(#[from] io::Error),
}

/// An open image. Requests share the lock, which guards imago's mappings of clusters; what takes clusters away has it alone.
#[derive(Debug)]
pub(super) struct Qcow2Image {
    access: RwLock<FormatAccess<Storage>>,
    size: u64,
    /// Whether the format has a mark for clusters that read as zeroes; version 2 has none.
    has_zero_marks: bool,
}

impl Qcow2Image {
    /// Opens the image in `file`, which is open at `path`.
    pub(super) fn open(
        file: File,
        path: &Path,
        is_writable: bool,
        has_backing: bool,
    ) -> Result<Self, OpenQcow2Error> {
        let has_zero_marks = Header::read(&file)?.version >= 3;
        let access = open_layer(file, path, is_writable, has_backing, LAYERS_MAX)?;
        let size = access.size();
        Ok(Self { access: RwLock::new(access), size, has_zero_marks })
    }

    /// Makes the empty file an image of `size` bytes that reads as zeroes.
    pub(super) fn format(file: File, path: &Path, size: u64) -> io::Result<()> {
        let storage = storage(file, path, true)?;
        Qcow2::<Storage>::create_builder(storage).size(size).create()
    }

    /// The size that it was opened with.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<Storage>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<Storage>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(data, offset)
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.shared().write(data, offset)
    }

    pub(super) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut access = self.alone();
        if self.has_zero_marks {
            return access.discard_to_zero(offset, len);
        }
        write_zeroes(&access, offset, len)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        let access = self.shared();
        access.flush()?;
        access.sync()
    }

    pub(super) fn resize(&self, size: u64) -> io::Result<()> {
        self.alone().resize(size, PreallocateMode::None)?;
        self.flush()
    }

    /// Where the next data is, at `offset` or behind.
    pub(super) fn next_data(&self, mut offset: u64) -> Option<u64> {
        let access = self.shared();
        loop {
            let rest = access.size().checked_sub(offset).filter(|rest| *rest > 0)?;
            match access.get_mapping(offset, rest) {
                Ok((Mapping::Zero { .. }, len)) if len > 0 => offset = offset.checked_add(len)?,
                Ok((Mapping::Eof { .. }, _)) => return None,
                // Who reads it finds out why.
                Ok(_) | Err(_) => return Some(offset),
            }
        }
    }
}

/// Writes zeroes over what does not read as zeroes anyway.
fn write_zeroes(access: &FormatAccess<Storage>, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeroes = vec![0; CLUSTER_BYTES_MAX];
    while len > 0 {
        let (mapping, mapped) = access.get_mapping(offset, len)?;
        let step = if let Mapping::Zero { .. } = mapping {
            mapped.min(len)
        } else {
            let step = mapped.min(len).min(CLUSTER_BYTES_MAX as u64);
            access.write(&zeroes[..usize::try_from(step).unwrap_or(0)], offset)?;
            step
        };
        if step == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (offset, len) = (offset + step, len - step);
    }
    Ok(())
}

fn storage(file: File, path: &Path, is_writable: bool) -> io::Result<Storage> {
    Storage::from_open_file(file, StorageOpenOptions::new().write(is_writable).filename(path))
}

fn open_layer(
    file: File,
    path: &Path,
    is_writable: bool,
    has_backing: bool,
    layers_left: usize,
) -> Result<FormatAccess<Storage>, OpenQcow2Error> {
    let header = Header::read(&file)?;
    header.check_usable()?;
    let backing = match &header.backing {
        Some(name) if !has_backing => return Err(OpenQcow2Error::HasBacking(name.clone())),
        Some(name) => {
            let format = header.backing_format.as_deref();
            let opened = open_backing(name, format, path, layers_left);
            let fail = |reason| OpenQcow2Error::Backing { path: name.clone(), reason };
            Some(opened.map_err(fail)?)
        }
        None => None,
    };
    let builder = Qcow2::<Storage>::builder(storage(file, path, is_writable)?);
    let builder = builder.write(is_writable).backing(backing).data_file(None);
    Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
}

/// Opens the file that `name` means in the image at `above`, to be read.
fn open_backing(
    name: &str,
    format: Option<&str>,
    above: &Path,
    layers_left: usize,
) -> Result<FormatAccess<Storage>, String> {
    let layers_left = layers_left.checked_sub(1).ok_or("the chain of backing files is too long")?;
    let path = above.parent().unwrap_or(Path::new("")).join(PathBuf::from(name));
    let file = open_file(&path, false).map_err(|e| crate::one_line::one_line(&e))?;
    match format {
        Some("qcow2") => {
            let opened = open_layer(file, &path, false, true, layers_left);
            opened.map_err(|e| crate::one_line::one_line(&e))
        }
        Some("raw") => {
            let raw = storage(file, &path, false)
                .and_then(|storage| Raw::builder(storage).open(DenyImplicitOpenGate::default()));
            raw.map(FormatAccess::new).map_err(|e| e.to_string())
        }
        Some(other) => Err(format!("its format is {other:?}")),
        // A guess could be led astray by who wrote it.
        None => Err("the image does not say its format: say it by `qemu-img rebase -u -F`".into()),
    }
}

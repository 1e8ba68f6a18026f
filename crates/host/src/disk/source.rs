//! Where a disk's contents are and in which form, as its owner says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::format::DiskFormat;
use super::nbd::NbdUrl;

/// See the module documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSource {
    /// Where the image is.
    pub place: Place,
    /// What it is; nothing when nobody said so: raw then, unless it looks like something else.
    pub format: Option<DiskFormat>,
    /// Whether backing files of a qcow2 image may be read.
    pub has_backing: bool,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file or a block device.
    File(PathBuf),
    /// An export of an NBD server.
    Nbd {
        /// Which one.
        url: NbdUrl,
        /// How long a request is asked again when the server is gone.
        patience: Duration,
    },
}

impl DiskSource {
    /// A file or block device of a format that may not have been said.
    #[must_use]
    pub fn file(path: &Path, format: Option<DiskFormat>) -> Self {
        Self { place: Place::File(path.to_owned()), format, has_backing: false }
    }

    /// An export of an NBD server.
    #[must_use]
    pub fn nbd(url: NbdUrl, patience: Duration, format: Option<DiskFormat>) -> Self {
        Self { place: Place::Nbd { url, patience }, format, has_backing: false }
    }

    /// The same, for who uses a disk that a VM has been using: its format is settled, whatever the guest has written to it.
    #[must_use]
    pub fn settled(mut self) -> Self {
        self.format.get_or_insert(DiskFormat::Raw);
        self
    }
}

impl From<&Path> for DiskSource {
    fn from(path: &Path) -> Self {
        Self::file(path, None)
    }
}

impl From<&PathBuf> for DiskSource {
    fn from(path: &PathBuf) -> Self {
        Self::file(path, None)
    }
}

impl From<&DiskSource> for DiskSource {
    fn from(source: &DiskSource) -> Self {
        source.clone()
    }
}

//! The file `machine` of a recording: what the machine is, and who recorded it.
//!
//! # Format
//! Magic `UNDERREC`, version `u32` little endian, [`Start`] in postcard, from version 2 on [`About`] in postcard, SHA-256 of
//! all before it, which is the recording's identity.

use machine::config::{BootImages, MachineConfig};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::snapshot::HASH_BYTES;

/// The file's name.
pub(crate) const MACHINE_FILE: &str = "machine";
/// Files with what it boots, in the order of [`Start::images`].
pub(crate) const IMAGE_FILES: [&str; 3] = ["bios", "kernel", "initrd"];

const MAGIC: [u8; 8] = *b"UNDERREC";
/// This build, for people who compare recordings.
pub const BUILD: &str = concat!("understudy ", env!("CARGO_PKG_VERSION"));
/// Version of recordings that are made.
pub const VERSION: u32 = 2;
const PREFIX_BYTES: usize = 12;

/// Why `machine` of a recording cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// It does not start like one.
    #[error("it is not the start of a recording")]
    NotARecording,
    /// It is of another version.
    #[error("it has version {found}, this build reads 1 to {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Its hash does not fit.
    #[error("it is damaged")]
    Damaged,
}

/// What the machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// [`machine::machine::MODEL_VERSION`].
    pub model: u32,
    /// Its configuration.
    pub config: MachineConfig,
    /// Kernel command line.
    pub append: String,
    /// SHA-256 of each image that it has.
    pub images: [Option<[u8; HASH_BYTES]>; 3],
}

/// Who recorded it, for people; nothing here reaches the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Name of the VM.
    pub vm: String,
    /// The host.
    pub host: String,
    /// The build that recorded it.
    pub build: String,
    /// The engine that ran the machine at the beginning.
    pub engine: String,
    /// When the recording began, in milliseconds since the Unix epoch.
    pub started_unix_ms: u64,
    /// Random, so that no two recordings have one identity.
    pub nonce: [u8; 16],
}

impl Start {
    /// What `machine` is.
    #[must_use]
    pub fn of(config: &MachineConfig, images: &BootImages) -> Self {
        Self {
            model: machine::machine::MODEL_VERSION,
            config: config.clone(),
            append: images.append.clone(),
            images: image_hashes(images),
        }
    }

    /// The file's bytes.
    #[must_use]
    pub fn to_bytes(&self, about: &About) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&postcard::to_stdvec(self).expect("a configuration is plain data"));
        out.extend_from_slice(&postcard::to_stdvec(about).expect("words are plain data"));
        let hash = Sha256::digest(&out);
        out.extend_from_slice(&hash);
        out
    }

    /// Reads the file's bytes; with the identity that the log has to name.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<(Self, Option<About>, [u8; HASH_BYTES]), StartError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(StartError::NotARecording);
        }
        let version = bytes.get(MAGIC.len()..PREFIX_BYTES).and_then(|raw| raw.try_into().ok());
        let found = u32::from_le_bytes(version.ok_or(StartError::Damaged)?);
        if !(1..=VERSION).contains(&found) {
            return Err(StartError::Version { found });
        }
        let (body, hash) = bytes.split_last_chunk::<HASH_BYTES>().ok_or(StartError::Damaged)?;
        if Sha256::digest(body)[..] != hash[..] {
            return Err(StartError::Damaged);
        }
        let body = body.get(PREFIX_BYTES..).unwrap_or_default();
        let (start, rest) = postcard::take_from_bytes(body).map_err(|_| StartError::Damaged)?;
        let about = match found {
            1 => None,
            _ => Some(postcard::from_bytes(rest).map_err(|_| StartError::Damaged)?),
        };
        Ok((start, about, *hash))
    }
}

/// The images in the order of [`IMAGE_FILES`].
pub(crate) fn image_bytes(images: &BootImages) -> [Option<&[u8]>; 3] {
    [images.bios.as_deref(), images.kernel.as_deref(), images.initrd.as_deref()]
}

/// SHA-256 of each image, in the same order.
pub(crate) fn image_hashes(images: &BootImages) -> [Option<[u8; HASH_BYTES]>; 3] {
    image_bytes(images).map(|image| image.map(|bytes| Sha256::digest(bytes).into()))
}

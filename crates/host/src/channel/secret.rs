//! The secret that the hosts of a group share.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Fewest bytes in a secret.
pub const SECRET_BYTES_MIN: usize = 16;
const SECRET_BYTES_MAX: u64 = 4096;

/// Why a secret is not used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot read secret file {path}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Everybody on the host could read the file.
    #[error(
        "secret file {path} has mode {mode:04o}: other users can read or change it; use `chmod 600`"
    )]
    TooOpen {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// It is too short to be one.
    #[error("the secret has {len} bytes, at least 16 are needed")]
    TooShort {
        /// Its length.
        len: usize,
    },
    /// It is too long.
    #[error("secret file {path} has more than 4096 bytes")]
    TooLong {
        /// The file.
        path: String,
    },
}

/// The shared secret. It is never shown.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Takes the bytes as they are.
    ///
    /// # Errors
    /// [`SecretError::TooShort`].
    pub fn new(bytes: &[u8]) -> Result<Self, SecretError> {
        if bytes.len() < SECRET_BYTES_MIN {
            return Err(SecretError::TooShort { len: bytes.len() });
        }
        Ok(Self(bytes.to_vec()))
    }

    /// Reads a file that others on the host can neither read nor change; white space at the end does not count.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn load(path: &Path) -> Result<Self, SecretError> {
        let name = || path.display().to_string();
        let io = |source| SecretError::Io { path: name(), source };
        let file = File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.mode() & 0o7777;
        if mode & 0o027 != 0 {
            return Err(SecretError::TooOpen { path: name(), mode });
        }
        let mut bytes = Vec::new();
        file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > SECRET_BYTES_MAX {
            return Err(SecretError::TooLong { path: name() });
        }
        Self::new(bytes.trim_ascii_end())
    }

    /// HMAC-SHA256 of the label and the transcript.
    pub(super) fn derive(&self, label: &str, transcript: &[u8]) -> [u8; 32] {
        keyed(&self.0).chain_update(label).chain_update(transcript).finalize().into_bytes().into()
    }

    /// Whether `proof` is what [`Self::derive`] gives; takes the same time for every wrong one.
    pub(super) fn is_derived(&self, label: &str, transcript: &[u8], proof: &[u8]) -> bool {
        let mac = keyed(&self.0).chain_update(label).chain_update(transcript);
        mac.verify_slice(proof).is_ok()
    }
}

pub(super) fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

//! The header of a qcow2 image, read and checked before anything else of the image is.
//!
//! # Invariants
//! - INV-QCOW2-1: an image that could not be read and written faithfully is not opened: one that is encrypted, damaged, not
//!   closed cleanly, or has features that are not known.
//! - What the header says sizes no allocation beyond [`L1_BYTES_MAX`] and [`REFTABLE_BYTES_MAX`].
//!
//! # References
//! docs/interop/qcow2.txt of QEMU.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Largest level 1 table; as in QEMU.
const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table; as in QEMU.
const REFTABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u32 = 65536;
const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// The longest fixed part that is known.
const FIXED_BYTES: usize = 105;
const V2_BYTES: usize = 72;
const MAGIC: u32 = 0x5146_49fb;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const DATA_FILE: u64 = 4;
const COMPRESSION: u64 = 8;
const EXTENDED_L2: u64 = 16;

/// What a header says that matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The disk's size in bytes.
    pub size: u64,
    /// Base 2 logarithm of the bytes in a cluster.
    pub cluster_bits: u32,
    /// Base 2 logarithm of the bits in a reference count.
    pub refcount_order: u32,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    pub(super) snapshots_offset: u64,
    /// Name of the backing file, as it is written there.
    pub backing: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Bitmaps that say what was written: how many, and their directory's bytes and offset.
    pub(super) bitmaps: Option<(u32, u64, u64)>,
    is_encrypted: bool,
    features: u64,
    compression: u8,
}

/// Why a header was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It is no qcow2 image.
    #[error("it is not a qcow2 image{}", .0.map(|kind| format!(", but looks like {kind}")).unwrap_or_default())]
    NotQcow2(Option<&'static str>),
    /// It is malformed.
    #[error("its qcow2 header is malformed: {0}")]
    Malformed(String),
    /// It cannot be used, for a reason that its owner can do something about.
    #[error("{0}")]
    Refused(&'static str),
    /// The system refused.
    #[error("cannot read its header")]
    Io(#[source] io::Error),
}

fn malformed<T>(text: impl Into<String>) -> Result<T, HeaderError> {
    Err(HeaderError::Malformed(text.into()))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes)
}

impl Header {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn read(file: &File) -> Result<Self, HeaderError> {
        let mut start = vec![0; super::CLUSTER_BYTES_MAX];
        let mut len = 0;
        while len < start.len() {
            match file.read_at(&mut start[len..], len as u64) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(HeaderError::Io(e)),
            }
        }
        Self::parse(&start[..len])
    }

    /// Parses a header from the first bytes of an image: its first cluster at least, where the image has that many.
    ///
    /// # Errors
    /// It is no qcow2 image, or malformed.
    pub fn parse(start: &[u8]) -> Result<Self, HeaderError> {
        if u32_at(start, 0) != Some(MAGIC) || start.len() < V2_BYTES {
            return Err(HeaderError::NotQcow2(crate::disk::format::looks_like(start)));
        }
        // What a shorter header does not have is zero.
        let mut fixed = [0; FIXED_BYTES + 7];
        let given = start.len().min(FIXED_BYTES);
        fixed[..given].copy_from_slice(&start[..given]);
        let long = |at| u64_at(&fixed, at).unwrap_or(0);
        let word = |at| u32_at(&fixed, at).unwrap_or(0);
        let version = word(4);
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::NotQcow2(Some("QCOW of another version")));
        }
        let is_new = version == 3;
        let length = if is_new { word(100) as usize } else { V2_BYTES };
        let mut header = Self {
            version,
            size: long(24),
            cluster_bits: word(20),
            refcount_order: if is_new { word(96) } else { 4 },
            l1_entries: word(36),
            l1_offset: long(40),
            reftable_offset: long(48),
            reftable_clusters: word(56),
            snapshots: word(60),
            snapshots_offset: long(64),
            backing: None,
            backing_format: None,
            bitmaps: None,
            is_encrypted: word(32) != 0,
            features: if is_new { long(72) } else { 0 },
            compression: if length >= FIXED_BYTES { fixed[104] } else { 0 },
        };
        header.check_layout()?;
        let first = &start[..start.len().min(header.cluster_bytes())];
        if is_new && !(104..=first.len()).contains(&length) {
            return malformed(format!("it says that it has {length} bytes"));
        }
        header.read_extensions(first, length)?;
        header.read_backing(first, long(8), word(16))?;
        Ok(header)
    }

    fn check_layout(&self) -> Result<(), HeaderError> {
        if !(9..=21).contains(&self.cluster_bits) {
            return malformed(format!("clusters of 2^{} bytes", self.cluster_bits));
        }
        if self.refcount_order > 6 {
            return malformed(format!("reference counts of 2^{} bits", self.refcount_order));
        }
        if self.size > 1 << 56 {
            return malformed(format!("a disk of {} bytes", self.size));
        }
        let cluster = 1u64 << self.cluster_bits;
        let l1_bytes = u64::from(self.l1_entries) * 8;
        // An entry leads to a cluster of eight-byte entries for a cluster each.
        let needed = self.size.div_ceil(cluster * (cluster / 8));
        if l1_bytes > L1_BYTES_MAX || u64::from(self.l1_entries) < needed {
            return malformed(format!("a level 1 table of {} entries", self.l1_entries));
        }
        let reftable = u64::from(self.reftable_clusters).saturating_mul(cluster);
        if reftable == 0 || reftable > REFTABLE_BYTES_MAX.max(cluster) {
            return malformed(format!("a refcount table of {} clusters", self.reftable_clusters));
        }
        let is_place = |at: u64| at.is_multiple_of(cluster) && at < 1 << 56;
        if !is_place(self.l1_offset) || !is_place(self.reftable_offset) || self.reftable_offset == 0
        {
            return malformed("a table at an impossible place");
        }
        if self.snapshots > SNAPSHOTS_MAX || !is_place(self.snapshots_offset) {
            return malformed(format!("{} internal snapshots", self.snapshots));
        }
        Ok(())
    }

    fn read_extensions(&mut self, first: &[u8], length: usize) -> Result<(), HeaderError> {
        let mut at = length;
        // Each turn goes on by eight bytes at least, within a cluster.
        while let (Some(kind), Some(len)) = (u32_at(first, at), u32_at(first, at + 4)) {
            let Some(data) = first.get(at + 8..).and_then(|rest| rest.get(..len as usize)) else {
                return malformed("an extension that is longer than the first cluster");
            };
            match kind {
                0 => break,
                0xe279_2aca => {
                    self.backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                0x2385_2875 => {
                    let field = |at| u64_at(data, at).unwrap_or(0);
                    let count = u32_at(data, 0).unwrap_or(0);
                    self.bitmaps = Some((count, field(8), field(16)));
                }
                0x0537_be77 => self.is_encrypted = true,
                0x4441_5441 => self.features |= DATA_FILE,
                _ => {}
            }
            at += 8 + data.len().next_multiple_of(8);
        }
        Ok(())
    }

    fn read_backing(&mut self, first: &[u8], at: u64, len: u32) -> Result<(), HeaderError> {
        if at == 0 {
            return Ok(());
        }
        let name = usize::try_from(at).ok().and_then(|at| first.get(at..));
        let name = name.and_then(|rest| rest.get(..len as usize));
        match name.map(std::str::from_utf8) {
            Some(Ok(name)) if (1..=BACKING_NAME_BYTES_MAX).contains(&len) => {
                self.backing = Some(name.to_owned());
                Ok(())
            }
            _ => malformed("the name of its backing file"),
        }
    }

    /// Refuses what cannot be read and written faithfully.
    ///
    /// # Errors
    /// [`HeaderError::Refused`].
    pub fn check_usable(&self) -> Result<(), HeaderError> {
        let has = |bit| self.features & bit != 0;
        let reason = if self.is_encrypted {
            "it is encrypted, which is not supported: convert it to an image without encryption"
        } else if has(CORRUPT) {
            "it is marked as corrupt: repair it by `qemu-img check -r all`"
        } else if has(DIRTY) {
            "it was not closed cleanly: repair it by `qemu-img check -r all`"
        } else if has(DATA_FILE) {
            "it keeps its data in another file, which is not supported: convert it to one file"
        } else if has(EXTENDED_L2) {
            "it has extended L2 entries, which are not supported: convert it without extended_l2"
        } else if has(COMPRESSION) || self.compression != 0 {
            "it is compressed by zstd, which is not supported: convert it without compression_type=zstd"
        } else if self.features != 0 {
            "it has features that are not known: convert it with `qemu-img convert -O qcow2`"
        } else {
            return Ok(());
        };
        Err(HeaderError::Refused(reason))
    }

    /// Bytes in a cluster.
    #[must_use]
    pub fn cluster_bytes(&self) -> usize {
        1 << self.cluster_bits
    }

    /// What it is marked with: `dirty`, `corrupt`, `encrypted` and the like, for people.
    #[must_use]
    pub fn marks(&self) -> Vec<&'static str> {
        let bits = [
            (DIRTY, "dirty"),
            (CORRUPT, "corrupt"),
            (DATA_FILE, "data-file"),
            (COMPRESSION, "zstd"),
            (EXTENDED_L2, "extended-l2"),
        ];
        let bits = bits.into_iter().filter(|(bit, _)| self.features & bit != 0).map(|(_, n)| n);
        bits.chain(self.is_encrypted.then_some("encrypted")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn valid() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        bytes[39] = 2;
        bytes[40..48].copy_from_slice(&(3u64 << 16).to_be_bytes());
        bytes[48..56].copy_from_slice(&(1u64 << 16).to_be_bytes());
        bytes[59] = 1;
        bytes[99] = 4;
        bytes[103] = 104;
        bytes
    }

    #[test]
    fn faithful_images_are_told_from_others() {
        let header = Header::parse(&valid()).unwrap();
        assert_eq!((header.size, header.cluster_bytes()), (1 << 30, 65536));
        header.check_usable().unwrap();
        let refused = |at: usize, byte: u8, why: &str| {
            let mut bytes = valid();
            bytes[at] = byte;
            let reason = Header::parse(&bytes).unwrap().check_usable().unwrap_err().to_string();
            assert!(reason.contains(why), "{reason}");
        };
        refused(35, 2, "encrypted");
        refused(79, 1, "closed cleanly");
        refused(79, 2, "corrupt");
        refused(79, 4, "another file");
        refused(79, 8, "zstd");
        refused(79, 16, "extended");
        refused(79, 32, "not known");
        for (at, byte, why) in
            [(23, 40, "clusters"), (36, 1, "level 1"), (39, 1, "level 1"), (47, 1, "place")]
        {
            let mut bytes = valid();
            bytes[at] = byte;
            let reason = Header::parse(&bytes).unwrap_err().to_string();
            assert!(reason.contains(why), "{reason}");
        }
        assert!(matches!(Header::parse(b"KDMV"), Err(HeaderError::NotQcow2(Some("VMDK")))));
    }

    #[test]
    fn backing_file_and_extensions_are_read() {
        let mut bytes = valid();
        bytes[104..112].copy_from_slice(b"\xe2\x79\x2a\xca\0\0\0\x03");
        bytes[112..115].copy_from_slice(b"raw");
        bytes[120..124].copy_from_slice(b"\x23\x85\x28\x75");
        bytes[8..16].copy_from_slice(&200u64.to_be_bytes());
        bytes[19] = 4;
        bytes[200..204].copy_from_slice(b"base");
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.backing.as_deref(), Some("base"));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert!(header.bitmaps.is_some());
        bytes[17] = 1;
        assert!(Header::parse(&bytes).unwrap_err().to_string().contains("backing"));
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_much(changes in prop::collection::vec((0usize..300, any::<u8>()), 0..12), len in 0usize..700) {
            let mut bytes = valid();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            for part in [&bytes[..], &bytes[..len]] {
                if let Ok(header) = Header::parse(part) {
                    prop_assert!(u64::from(header.l1_entries) * 8 <= L1_BYTES_MAX);
                    drop(header.check_usable());
                }
            }
        }

        #[test]
        fn any_bytes_are_a_header_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            drop(Header::parse(&bytes));
            let mut marked = b"QFI\xfb\0\0\0\x03".to_vec();
            marked.extend(bytes);
            drop(Header::parse(&marked));
        }
    }
}

//! What a disk image is said to be, and what its first bytes look like.
//!
//! # Place
//! Asked once when a disk is opened for a VM that starts, and by `understudy image`.
//!
//! # Invariants
//! - INV-FORMAT-1: what an image is read as is what its owner said it is, never what its bytes say. A guest can write
//!   what it likes into the first sectors of a raw disk; were it read as qcow2 then, that header could name any file of
//!   the host as its backing file.
//!
//! # Failure
//! An image that nobody said the format of, and that looks like something else than raw, is refused.

use serde::Deserialize;

/// Bytes at the beginning of an image that are looked at.
pub(super) const LOOK_BYTES: usize = 512;

/// How a disk's contents are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The bytes as they are.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
}

impl std::str::FromStr for DiskFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("format {text:?} is not known: raw and qcow2 are")),
        }
    }
}

impl std::fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Formats by where their marks are: name, offset, mark.
const MARKS: [(&str, usize, &[u8]); 16] = [
    ("qcow2", 0, b"QFI\xfb\0\0\0\x02"),
    ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    ("QCOW", 0, b"QFI\xfb"),
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
    ("xz-compressed", 0, b"\xfd7zXZ\0"),
    ("zstd-compressed", 0, b"\x28\xb5\x2f\xfd"),
    ("gzip-compressed", 0, b"\x1f\x8b\x08"),
];

/// What the first bytes of an image look like, unless they look like nothing known.
#[must_use]
pub fn looks_like(start: &[u8]) -> Option<&'static str> {
    let has = |at: usize, mark: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(mark));
    MARKS.iter().find(|(_, at, mark)| has(*at, mark)).map(|(name, ..)| *name)
}

/// What to do about an image whose format was not said and that looks like `kind`.
pub(super) fn advice(kind: &str) -> String {
    let raw = "`format=raw` if the guest is to see these very bytes";
    match kind {
        "qcow2" => format!("say `format=qcow2` if it is one, or {raw}"),
        _ if kind.ends_with("-compressed") => format!("unpack it first, or say {raw}"),
        _ => format!("make it qcow2 by `qemu-img convert -O qcow2`, or say {raw}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_formats_are_told_from_raw() {
        let mut start = [0; LOOK_BYTES];
        assert_eq!(looks_like(&start), None);
        assert_eq!(looks_like(&[]), None);
        start[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        assert_eq!(looks_like(&start), Some("qcow2"));
        start[7] = 1;
        assert_eq!(looks_like(&start), Some("QCOW"));
        start[..4].copy_from_slice(b"\x28\xb5\x2f\xfd");
        assert!(advice(looks_like(&start).unwrap()).starts_with("unpack"));
        start[0] = 0;
        start[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(looks_like(&start), Some("VDI"));
        // A boot sector is raw.
        assert_eq!(looks_like(b"\xeb\x63\x90\x10\x8e\xd0"), None);
    }
}

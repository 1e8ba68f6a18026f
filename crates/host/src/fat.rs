//! Writes a small FAT16 file system with a few files in its root directory: the same files, the same bytes.
//!
//! # Place
//! Used for the seeds of cloud-init, see [`crate::config::CloudInitSection`]. Nothing here reads one.
//!
//! # Invariants
//! - INV-FAT-1: the image's size depends on nothing, so that a disk made of it never changes its size.
//!
//! # Format
//! One FAT16 volume without a partition table: boot sector, two FATs, root directory of 512 entries, clusters of one
//! sector. Each file has a long name (VFAT) before its short one. All dates are 1980-01-01.
//!
//! # References
//! Microsoft, "FAT: General Overview of On-Disk Format", 1.03.

const SECTOR: usize = 512;
/// Sectors of the image; with clusters of one sector this many make a FAT16.
const SECTORS: u16 = 8192;
/// Size of each image in bytes.
pub const IMAGE_BYTES: usize = SECTORS as usize * SECTOR;
const FAT_SECTORS: u16 = 32;
const ROOT_ENTRIES: u16 = 512;
const ROOT_START: usize = (1 + 2 * FAT_SECTORS as usize) * SECTOR;
const DATA_START: usize = ROOT_START + ROOT_ENTRIES as usize * ENTRY;
const CLUSTERS: usize = (IMAGE_BYTES - DATA_START) / SECTOR;
const ENTRY: usize = 32;
const END_OF_CHAIN: u16 = 0xffff;
const MEDIA: u8 = 0xf8;
const DATE_1980: u16 = 0x21;
const ATTR_LABEL: u8 = 0x08;
const ATTR_FILE: u8 = 0x20;
const ATTR_LONG_NAME: u8 = 0x0f;
const LONG_NAME_CHARS: usize = 13;
const NAME_CHARS_MAX: usize = 5 * LONG_NAME_CHARS;
/// Most files, so that short names and the root directory suffice.
const FILES_MAX: usize = 9;

/// Why there is no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteFatError {
    /// The files are too big.
    #[error("the files have more than the {room} bytes that fit")]
    TooBig {
        /// Bytes that fit.
        room: usize,
    },
    /// A name that is empty, long, or not plain ASCII; or a label that does not fit.
    #[error("{name:?} cannot be a name there")]
    BadName {
        /// The name.
        name: String,
    },
    /// More files than fit.
    #[error("there are more than {FILES_MAX} files")]
    TooMany,
}

/// The image of a volume `label` with `files`, by name.
///
/// # Errors
/// [`WriteFatError`].
pub fn image(label: &str, files: &[(&str, &[u8])]) -> Result<Vec<u8>, WriteFatError> {
    if files.len() > FILES_MAX {
        return Err(WriteFatError::TooMany);
    }
    let label = padded(label)?;
    let mut image = vec![0; IMAGE_BYTES];
    let mut fat = vec![0xff00 | u16::from(MEDIA), END_OF_CHAIN];
    let mut root = entry(label, ATTR_LABEL, 0, 0).to_vec();
    for (index, (name, data)) in files.iter().enumerate() {
        let clusters = data.len().div_ceil(SECTOR);
        let size = u32::try_from(data.len()).ok().filter(|_| fat.len() - 2 + clusters <= CLUSTERS);
        let size = size.ok_or(WriteFatError::TooBig { room: CLUSTERS * SECTOR })?;
        let first = if clusters == 0 { 0 } else { number(fat.len()) };
        let at = DATA_START + (fat.len() - 2) * SECTOR;
        image[at..at + data.len()].copy_from_slice(data);
        for left in (0..clusters).rev() {
            fat.push(if left == 0 { END_OF_CHAIN } else { number(fat.len() + 1) });
        }
        let short = short_name(name, index);
        root.extend(long_name(name, &short)?);
        root.extend(entry(short, ATTR_FILE, first, size));
    }
    let bytes: Vec<u8> = fat.iter().flat_map(|next| next.to_le_bytes()).collect();
    for copy in 0..2 {
        let at = (1 + copy * usize::from(FAT_SECTORS)) * SECTOR;
        image[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    image[ROOT_START..ROOT_START + root.len()].copy_from_slice(&root);
    let boot = boot_sector(label, &image);
    image[..SECTOR].copy_from_slice(&boot);
    Ok(image)
}

/// A cluster's number; there are fewer than 2^16 of them.
fn number(cluster: usize) -> u16 {
    u16::try_from(cluster).unwrap_or(END_OF_CHAIN)
}

fn padded(label: &str) -> Result<[u8; 11], WriteFatError> {
    let is_good = !label.is_empty()
        && label.len() <= 11
        && label.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
    if !is_good {
        return Err(WriteFatError::BadName { name: label.to_owned() });
    }
    let mut out = [b' '; 11];
    out[..label.len()].copy_from_slice(label.as_bytes());
    Ok(out)
}

fn boot_sector(label: [u8; 11], image: &[u8]) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"UNDRSTDY");
    put(11, &(SECTOR as u16).to_le_bytes());
    // Sectors of a cluster, reserved sectors, FATs.
    put(13, &[1, 1, 0, 2]);
    put(17, &ROOT_ENTRIES.to_le_bytes());
    put(19, &SECTORS.to_le_bytes());
    put(21, &[MEDIA]);
    put(22, &FAT_SECTORS.to_le_bytes());
    // Geometry, for those who ask: 32 sectors, 2 heads.
    put(24, &[32, 0, 2, 0]);
    put(36, &[0x80, 0, 0x29]);
    put(39, &serial(image).to_le_bytes());
    put(43, &label);
    put(54, b"FAT16   ");
    put(510, &[0x55, 0xaa]);
    sector
}

/// The volume's serial number: a hash of the contents (FNV-1a).
fn serial(image: &[u8]) -> u32 {
    image.iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The short name of the file `index`: what it begins with, a tilde, a digit of its own.
fn short_name(name: &str, index: usize) -> [u8; 11] {
    let mut short = [b' '; 11];
    let start = name.bytes().filter(|b| b.is_ascii_alphanumeric() || *b == b'-').take(6);
    let mut len = 0;
    for byte in start {
        short[len] = byte.to_ascii_uppercase();
        len += 1;
    }
    short[len] = b'~';
    short[len + 1] = b'1' + u8::try_from(index).unwrap_or(8);
    short
}

/// The entries before that of the short name, the end of the name first.
fn long_name(name: &str, short: &[u8; 11]) -> Result<Vec<u8>, WriteFatError> {
    let is_good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.bytes().all(is_good) {
        return Err(WriteFatError::BadName { name: name.to_owned() });
    }
    let sum = short.iter().fold(0u8, |sum, &byte| sum.rotate_right(1).wrapping_add(byte));
    let parts: Vec<&[u8]> = name.as_bytes().chunks(LONG_NAME_CHARS).collect();
    let mut out = Vec::new();
    for (index, part) in parts.iter().enumerate().rev() {
        let last = if index + 1 == parts.len() { 0x40 } else { 0 };
        let mut chars: Vec<u16> = part.iter().map(|&byte| u16::from(byte)).collect();
        if chars.len() < LONG_NAME_CHARS {
            chars.push(0);
        }
        chars.resize(LONG_NAME_CHARS, 0xffff);
        let bytes: Vec<u8> = chars.iter().flat_map(|c| c.to_le_bytes()).collect();
        out.push(last | u8::try_from(index + 1).unwrap_or(1));
        out.extend(&bytes[..10]);
        out.extend([ATTR_LONG_NAME, 0, sum]);
        out.extend(&bytes[10..22]);
        out.extend([0, 0]);
        out.extend(&bytes[22..]);
    }
    Ok(out)
}

fn entry(name: [u8; 11], attributes: u8, cluster: u16, size: u32) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &name);
    put(11, &[attributes]);
    for at in [16, 18, 24] {
        put(at, &DATE_1980.to_le_bytes());
    }
    put(26, &cluster.to_le_bytes());
    put(28, &size.to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const BIG: &[u8] = &[b'x'; 100_001];

    fn sample() -> Vec<u8> {
        image("CIDATA", &[("user-data", BIG), ("meta-data", b"a: b\n"), ("empty", b"")]).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let all = vec![0; CLUSTERS * SECTOR];
        assert!(image("A", &[("a", &all)]).is_ok());
        assert!(matches!(
            image("A", &[("a", &all), ("b", b"1")]),
            Err(WriteFatError::TooBig { .. })
        ));
        for name in ["", "a/b", "ä", &"x".repeat(66)] {
            assert!(
                matches!(image("A", &[(name, b"")]), Err(WriteFatError::BadName { .. })),
                "{name}"
            );
        }
        assert!(image("too long a label", &[]).is_err());
        assert_eq!(image("A", &[("a", b"".as_slice()); 10]), Err(WriteFatError::TooMany));
        assert_eq!(sample(), sample());
    }

    #[test]
    fn mtools_read_it_and_fsck_finds_nothing_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        std::fs::write(&path, sample()).unwrap();
        let run = |program: &str, args: &[&str]| {
            let mut command = Command::new(program);
            command.env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin");
            let output = command.args(args).output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{program}: {text}{output:?}");
            Some(text)
        };
        let at = path.to_str().unwrap();
        let Some(listing) = run("mdir", &["-b", "-i", at, "::"]) else { return };
        assert_eq!(listing, "::/user-data\n::/meta-data\n::/empty\n");
        assert_eq!(run("mtype", &["-i", at, "::meta-data"]).unwrap(), "a: b\n");
        assert_eq!(run("mtype", &["-i", at, "::user-data"]).unwrap().as_bytes(), BIG);
        assert!(run("mlabel", &["-s", "-i", at, "::"]).unwrap().contains("CIDATA"));
        if let Some(words) = run("fsck.fat", &["-n", "-v", at]) {
            // It takes the label for one.
            assert!(words.contains("4 files"), "{words}");
        }
    }
}

//! What a host knows about its copy of a mirrored disk, in a small file beside it that survives a power cut.
//!
//! # Place
//! [`super::journal`] keeps it true while the copy is written, the daemon reads it before a VM is started, and a host
//! that returns tells from it how its copy differs from what it was at a checkpoint.
//!
//! A *checkpoint* is a position in the order of a disk's requests, named by a random number. The contents there are the
//! same whichever host they are on, so what two copies say about one checkpoint tells where the two can differ.
//!
//! # Invariants
//! - INV-RECORD-FILE-1: what was stored last is read, or what was stored before it, after a crash at any point.
//! - INV-RECORD-FILE-2: a record is believed only of the very file that it was made for, as long as nothing else wrote
//!   to that after a VM was stopped.
//!
//! # Failure
//! A record that cannot be read, or is of another VM, disk, size or file, says nothing: the copy is one that nothing is
//! known about. It is then not started from unless the arbiter's record names this host, and copied whole.
//!
//! # Format
//! `IMAGE.understudy`, 64 KiB: two slots of 32 KiB, of which the older is written over. A slot is the magic
//! `USDISK\r\n`, version (u32), length (u32) and CRC-32C (u32) of the body, little-endian, then the body: [`Record`] in
//! postcard. The CRC covers the length and the body.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::bitmap::Bitmap;

/// Version of the format.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"USDISK\r\n";
const SLOT_BYTES: u64 = 32 << 10;
const HEAD_BYTES: usize = 20;
/// Smallest extent.
const EXTENT_BYTES_MIN: u64 = 1 << 20;
/// Most extents that a disk is divided into, so that a slot has room for all marks.
const EXTENTS_MAX: u64 = 32 << 10;
/// Most checkpoints that a record speaks of.
pub const CHECKPOINTS_MAX: usize = 6;
/// What follows the name of an image in the name of its record.
const SUFFIX: &str = ".understudy";

/// Names a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CheckpointId(pub [u8; 16]);

impl CheckpointId {
    /// A new one.
    ///
    /// # Errors
    /// One line: the kernel gives no random numbers.
    pub fn draw() -> Result<Self, String> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| format!("no random numbers from the kernel: {e}"))?;
        Ok(Self(id))
    }
}

/// What a copy may differ in from the disk's contents at a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// The checkpoint.
    pub id: CheckpointId,
    /// The host that may have said the same.
    pub peer: String,
    /// Extents, as [`Bitmap::to_bytes`].
    pub marks: Vec<u8>,
}

/// Whether a copy is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyState {
    /// The disk as it was at some moment.
    Whole,
    /// Partly the disk as it was earlier, partly as it was later: never to be started from.
    BeingCopied,
}

/// The file that a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    inode: u64,
    /// When the file was made, where the file system says so.
    born: Option<(i64, u32)>,
}

/// When an image was last written.
pub type Modified = (i64, i64);

/// See the module documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Counts up with each store.
    pub seq: u64,
    /// The VM.
    pub vm: String,
    /// Index of the disk.
    pub disk: u8,
    /// Its size in bytes.
    pub size: u64,
    /// The image, unless it is no file.
    pub file: Option<FileId>,
    /// The copy has everything that the VM did in this generation of the arbiter's record and before it.
    pub generation: u64,
    /// Whether it can be used.
    pub state: CopyState,
    /// When the image was last written, if it was closed in order.
    pub closed: Option<Modified>,
    /// The newest first.
    pub statements: Vec<Statement>,
}

impl Record {
    /// Of a copy that nothing is known about.
    #[must_use]
    pub fn new(vm: &str, disk: u8, size: u64) -> Self {
        Self {
            seq: 0,
            vm: vm.to_owned(),
            disk,
            size,
            file: None,
            generation: 0,
            state: CopyState::Whole,
            closed: None,
            statements: Vec::new(),
        }
    }

    /// What it says about a checkpoint.
    #[must_use]
    pub fn find(&self, id: CheckpointId) -> Option<&Statement> {
        self.statements.iter().find(|s| s.id == id)
    }
}

/// Bytes in an extent of a disk.
#[must_use]
pub fn extent_bytes(size: u64) -> u64 {
    let mut bytes = EXTENT_BYTES_MIN;
    while size.div_ceil(bytes) > EXTENTS_MAX {
        bytes *= 2;
    }
    bytes
}

/// Extents of a disk.
#[must_use]
pub fn extents(size: u64) -> u64 {
    size.div_ceil(extent_bytes(size))
}

/// Where the record of an image is: beside a file, below `state_dir` for anything else.
#[must_use]
pub fn record_path(image: &Path, state_dir: &Path) -> PathBuf {
    // A link leads to the image that is meant, wherever the link is.
    let image = fs::canonicalize(image).unwrap_or_else(|_| image.to_owned());
    let is_other = fs::metadata(&image).is_ok_and(|meta| !meta.is_file());
    if is_other || image.parent().is_none_or(|dir| !dir.is_dir()) {
        let hash = sha2::Sha256::digest(image.as_os_str().as_encoded_bytes());
        let name: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
        return state_dir.join("disks").join(name + SUFFIX);
    }
    let mut name = image.into_os_string();
    name.push(SUFFIX);
    PathBuf::from(name)
}

/// What identifies the image at `path`, if it is a file.
#[must_use]
pub fn file_id(path: &Path) -> Option<FileId> {
    let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let born = meta.created().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    let born = born.map(|at| (i64::try_from(at.as_secs()).unwrap_or(i64::MAX), at.subsec_nanos()));
    Some(FileId { inode: meta.ino(), born })
}

/// When the image at `path` was last written, if it is a file.
#[must_use]
pub fn modified(path: &Path) -> Option<Modified> {
    let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some((meta.mtime(), meta.mtime_nsec()))
}

/// An open record.
#[derive(Debug)]
pub struct RecordFile {
    file: File,
    path: PathBuf,
}

impl RecordFile {
    /// Makes a record without contents, durable under its name.
    ///
    /// # Errors
    /// The system refused.
    pub fn create(path: &Path) -> io::Result<Self> {
        let dir = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = file.open(path)?;
        // Written, not left as a hole: later stores then need no more room, and no change of the file's extents.
        file.write_all_at(&vec![0; usize::try_from(2 * SLOT_BYTES).unwrap_or(0)], 0)?;
        file.sync_all()?;
        File::open(dir)?.sync_all()?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Opens a record and reads it; nothing when there is none.
    ///
    /// # Errors
    /// One line: it cannot be read, or neither slot holds a record.
    pub fn open(path: &Path) -> Result<Option<(Self, Record)>, String> {
        let name = path.display();
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(format!("cannot open {name}: {e}")),
        };
        let record = read(&file).map_err(|e| format!("cannot use {name}: {e}"))?;
        Ok(Some((Self { file, path: path.to_owned() }, record)))
    }

    /// Makes `record` durable, with the next number.
    ///
    /// # Errors
    /// The system refused; the record before is still there.
    pub fn store(&mut self, record: &mut Record) -> io::Result<()> {
        record.seq += 1;
        let slot = encode(record)?;
        self.file.write_all_at(&slot, record.seq % 2 * SLOT_BYTES)?;
        self.file.sync_data()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes a record, durably: nothing is known about the copy any more.
///
/// # Errors
/// The system refused.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed?,
    }
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

fn encode(record: &Record) -> io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(record).map_err(io::Error::other)?;
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if body.len() + HEAD_BYTES > usize::try_from(SLOT_BYTES).unwrap_or(0) {
        return Err(io::Error::other(format!("a record of {len} bytes has no room")));
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&len.to_le_bytes()), &body);
    let mut slot = Vec::with_capacity(HEAD_BYTES + body.len());
    slot.extend(MAGIC);
    slot.extend(VERSION.to_le_bytes());
    slot.extend(len.to_le_bytes());
    slot.extend(crc.to_le_bytes());
    slot.extend(body);
    Ok(slot)
}

fn decode(slot: &[u8]) -> Result<Record, String> {
    let word = |at: usize| {
        slot.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    if slot.get(..8) != Some(MAGIC) {
        return Err("it holds no record".to_owned());
    }
    if word(8) != VERSION {
        return Err(format!("its version is {}, this build knows {VERSION}", word(8)));
    }
    let body = slot.get(HEAD_BYTES..).and_then(|rest| rest.get(..word(12) as usize));
    let body = body.ok_or("it is cut short")?;
    if crc32c::crc32c_append(crc32c::crc32c(&slot[12..16]), body) != word(16) {
        return Err("it is damaged".to_owned());
    }
    let record: Record = postcard::from_bytes(body).map_err(|e| format!("it is malformed: {e}"))?;
    let is_fit = |s: &Statement| Bitmap::from_bytes(extents(record.size), &s.marks).is_some();
    if record.size == 0 || record.size >> 60 != 0 || record.statements.len() > CHECKPOINTS_MAX {
        return Err("it makes no sense".to_owned());
    }
    if record.statements.iter().all(is_fit) {
        Ok(record)
    } else {
        Err("its marks are not those of its disk".to_owned())
    }
}

fn read(file: &File) -> Result<Record, String> {
    let mut slots = Vec::new();
    for index in 0..2 {
        let mut slot = Vec::new();
        let mut buffer = vec![0; usize::try_from(SLOT_BYTES).unwrap_or(0)];
        let mut at = 0;
        while at < buffer.len() {
            match file.read_at(&mut buffer[at..], index * SLOT_BYTES + at as u64) {
                Ok(0) => break,
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.to_string()),
            }
        }
        slot.extend_from_slice(&buffer[..at]);
        slots.push(decode(&slot));
    }
    let second = slots.pop().unwrap_or_else(|| Err(String::new()));
    let first = slots.pop().unwrap_or_else(|| Err(String::new()));
    match (first, second) {
        (Ok(a), Ok(b)) => Ok(if a.seq > b.seq { a } else { b }),
        (Ok(record), Err(_)) | (Err(_), Ok(record)) => Ok(record),
        (Err(e), Err(_)) => Err(e),
    }
}

/// What is known about the copy at `image`.
#[derive(Debug)]
pub enum Found {
    /// A record that is about it.
    Record(RecordFile, Record),
    /// None, for this reason.
    Unknown(String),
}

/// Looks for the record of the copy of a disk of `size` bytes at `image`, and whether it is about that.
#[must_use]
pub fn find(image: &Path, state_dir: &Path, vm: &str, disk: u8, size: u64) -> Found {
    let path = record_path(image, state_dir);
    let (file, record) = match RecordFile::open(&path) {
        Ok(Some(found)) => found,
        Ok(None) => return Found::Unknown("it has no record".to_owned()),
        Err(e) => return Found::Unknown(format!("its record cannot be used: {e}")),
    };
    let now = file_id(image);
    let why = if (record.vm.as_str(), record.disk) != (vm, disk) {
        format!("its record is of disk {} of VM {}", record.disk, record.vm)
    } else if record.size != size {
        format!("its record is of a disk of {} bytes, it has {size}", record.size)
    } else if record.file != now {
        "its record is of another file that had its name".to_owned()
    } else if record.closed.is_some() && record.closed != modified(image) {
        "it was written by something else than this VM".to_owned()
    } else {
        return Found::Record(file, record);
    };
    Found::Unknown(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let mut marks = Bitmap::empty(extents(5 << 20));
        marks.set(3);
        let id = CheckpointId([7; 16]);
        let statement = Statement { id, peer: "b".to_owned(), marks: marks.to_bytes() };
        Record { generation: 9, statements: vec![statement], ..Record::new("vm", 2, 5 << 20) }
    }

    #[test]
    fn golden_bytes_have_not_changed() {
        let mut want = b"USDISK\r\n\x01\0\0\0".to_vec();
        let body: &[u8] = &[
            0, 2, b'v', b'm', 2, 0x80, 0x80, 0xc0, 2, 0, 9, 0, 0, 1, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
            7, 7, 7, 7, 7, 7, 1, b'b', 8, 8, 0, 0, 0, 0, 0, 0, 0,
        ];
        want.extend((body.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c(&[&want[12..16], body].concat());
        want.extend(crc.to_le_bytes());
        want.extend(body);
        assert_eq!(encode(&record()).unwrap(), want);
        assert_eq!(decode(&want), Ok(record()));
    }

    #[test]
    fn the_last_record_is_read_and_the_one_before_when_it_is_torn() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("r");
        assert!(RecordFile::open(&path).unwrap().is_none());
        let mut file = RecordFile::create(&path).unwrap();
        assert!(RecordFile::open(&path).unwrap_err().contains("holds no record"));
        let mut record = record();
        for generation in 1..=5 {
            record.generation = generation;
            file.store(&mut record).unwrap();
            assert_eq!(RecordFile::open(&path).unwrap().unwrap().1, record);
        }
        let bytes = fs::read(&path).unwrap();
        let slot = record.seq % 2 * SLOT_BYTES;
        for at in 0..encode(&record).unwrap().len() as u64 {
            let mut torn = bytes.clone();
            torn[(slot + at) as usize] ^= 0x55;
            fs::write(&path, torn).unwrap();
            assert_eq!(RecordFile::open(&path).unwrap().unwrap().1.generation, 4, "at {at}");
        }
        for cut in [0, 5, HEAD_BYTES as u64 + 3] {
            fs::write(&path, &bytes[..cut as usize]).unwrap();
            assert!(RecordFile::open(&path).is_err());
        }
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(RecordFile::open(&path).unwrap().is_none());
    }

    #[test]
    fn a_record_of_any_disk_has_room() {
        for size in [512, 1 << 20, (1 << 40) + 512, 1 << 59] {
            assert!(extents(size) <= EXTENTS_MAX);
            let marks = Bitmap::full(extents(size)).to_bytes();
            let peer = "h".repeat(64);
            let statement = Statement { id: CheckpointId([0xff; 16]), peer, marks };
            let statements = vec![statement; CHECKPOINTS_MAX];
            let record = Record { statements, ..Record::new(&"v".repeat(64), 255, size) };
            assert_eq!(decode(&encode(&record).unwrap()), Ok(record));
        }
    }

    #[test]
    fn a_record_is_of_one_file_only() {
        let tmp = tempfile::tempdir().unwrap();
        let image = tmp.path().join("d.img");
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        let path = record_path(&image, tmp.path());
        assert_eq!(path, tmp.path().join("d.img.understudy"));
        let find = |vm, disk, size| match find(&image, tmp.path(), vm, disk, size) {
            Found::Record(_, record) => Ok(record.generation),
            Found::Unknown(why) => Err(why),
        };
        assert!(find("vm", 2, 1 << 20).unwrap_err().contains("no record"));
        let mut record = Record::new("vm", 2, 1 << 20);
        record.file = file_id(&image);
        record.generation = 5;
        RecordFile::create(&path).unwrap().store(&mut record).unwrap();
        assert_eq!(find("vm", 2, 1 << 20), Ok(5));
        assert!(find("vm", 1, 1 << 20).unwrap_err().contains("disk 2 of VM vm"));
        assert!(find("other", 2, 1 << 20).unwrap_err().contains("disk 2 of VM vm"));
        assert!(find("vm", 2, 2 << 20).unwrap_err().contains("bytes"));
        record.closed = modified(&image);
        RecordFile::create(&path).unwrap().store(&mut record).unwrap();
        assert_eq!(find("vm", 2, 1 << 20), Ok(5));
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&image, vec![1; 1 << 20]).unwrap();
        assert!(find("vm", 2, 1 << 20).unwrap_err().contains("something else"));
        record.closed = None;
        RecordFile::create(&path).unwrap().store(&mut record).unwrap();
        let other = tmp.path().join("other.img");
        fs::write(&other, vec![0; 1 << 20]).unwrap();
        fs::rename(&other, &image).unwrap();
        assert!(find("vm", 2, 1 << 20).unwrap_err().contains("another file"));
    }
}

//! The snapshot file: writer and reader side by side.
//!
//! # Failure
//! A reader gives [`SnapshotError`] at the first byte that no writer writes, and holds no more than one frame.
//!
//! # Format
//! Little endian. Magic `UNDERSNP`, version `u32`. Then frames: kind `u8`, length of the contents `u32`, length as stored
//! `u32`, CRC-32C `u32` of these nine bytes and what is stored, what is stored: the contents compressed by Zstandard. Kinds:
//!
//! | kind | contents |
//! |---|---|
//! | 1 | machine model `u32`, [`SnapshotHead`] in postcard; the first frame, and no other |
//! | 2 | pages: number `u32` and 4096 bytes, any number of times |
//! | 3 | pages that are all zero now: numbers `u32` |
//! | 4 | a chunk of a disk: device `u8`, index `u64`, bytes |
//! | 5 | chunks of a disk that are all zero now: device `u8`, indices `u64` |
//! | 6 | the end: number of pages and of chunks in the file, `u64` each; nothing follows |

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use machine::machine::MODEL_VERSION;
use machine::ram::PAGE_SIZE;

use super::SnapshotHead;
use crate::disk::copy::CHUNK_BYTES;

/// Version of the format.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"UNDERSNP";
const HEAD: u8 = 1;
const PAGES: u8 = 2;
const ZERO_PAGES: u8 = 3;
const CHUNK: u8 = 4;
const ZERO_CHUNKS: u8 = 5;
const END: u8 = 6;
const FRAME_BYTES: usize = 13;
/// Most bytes of a frame's contents.
const CONTENTS_MAX: usize = 4 << 20;
/// Most bytes of a head: the writes that a disk has not done yet are in it.
const HEAD_MAX: usize = 512 << 20;
/// Most pages in a frame.
const PAGES_PER_FRAME: usize = 128;
/// Zstandard's fastest level but the negative ones.
const LEVEL: i32 = 1;

/// Why a snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The operating system said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// It does not start like a snapshot.
    #[error("{} is no snapshot", .0.display())]
    NotASnapshot(PathBuf),
    /// It is of another version.
    #[error("{} has snapshot format {found}, this build reads {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It is of another machine.
    #[error("{} is of machine model {found}, this build has model {MODEL_VERSION}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// Its model.
        found: u32,
    },
    /// Something in it is no good.
    #[error("{} is damaged at byte {offset}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Everything before this byte is good.
        offset: u64,
    },
    /// Snapshots that were to be put together do not belong together, or make no machine.
    #[error("{}: {reason}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// One line.
        reason: String,
    },
}

/// A piece of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotItem {
    /// Pages of RAM; none: all zero.
    Pages(Vec<(u32, Option<Box<[u8]>>)>),
    /// A chunk of a disk; none: all zero.
    Chunk {
        /// Index of the disk.
        dev: u8,
        /// Index of the chunk, of [`CHUNK_BYTES`].
        index: u64,
        /// Its contents.
        data: Option<Vec<u8>>,
    },
}

/// The name under which a file is written.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Writes a snapshot. Dropped before [`Self::finish`], it leaves nothing.
#[derive(Debug)]
pub struct SnapshotWriter {
    file: BufWriter<File>,
    path: PathBuf,
    compressor: Compressor,
    bytes: u64,
    pages: u64,
    chunks: u64,
    is_finished: bool,
}

struct Compressor(zstd::bulk::Compressor<'static>);

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl SnapshotWriter {
    /// Begins the file that will be `path`.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn create(path: &Path, head: &SnapshotHead) -> Result<Self, SnapshotError> {
        let fail = |action| move |source| SnapshotError::Io { action, path: path.into(), source };
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(partial(path)).map_err(fail("create"))?;
        let compressor = zstd::bulk::Compressor::new(LEVEL).map_err(fail("compress"))?;
        let mut writer = Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_owned(),
            compressor: Compressor(compressor),
            bytes: 0,
            pages: 0,
            chunks: 0,
            is_finished: false,
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        let mut contents = head.saved.model.to_le_bytes().to_vec();
        contents.extend(postcard::to_stdvec(head).expect("a head is plain data"));
        writer.frame(HEAD, &contents)?;
        Ok(writer)
    }

    /// Bytes written so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages written so far.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    fn fail(&self, action: &'static str, source: std::io::Error) -> SnapshotError {
        SnapshotError::Io { action, path: self.path.clone(), source }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.file.write_all(bytes).map_err(|e| self.fail("write", e))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn frame(&mut self, kind: u8, contents: &[u8]) -> Result<(), SnapshotError> {
        let stored = self.compressor.0.compress(contents).map_err(|e| self.fail("compress", e))?;
        let mut head = [0; FRAME_BYTES];
        head[0] = kind;
        head[1..5].copy_from_slice(&(contents.len() as u32).to_le_bytes());
        head[5..9].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..9]), &stored);
        head[9..].copy_from_slice(&crc.to_le_bytes());
        self.put(&head)?;
        self.put(&stored)
    }

    /// Writes pages; none: all zero.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn pages_of(&mut self, pages: &[(u32, Option<Box<[u8]>>)]) -> Result<(), SnapshotError> {
        for part in pages.chunks(PAGES_PER_FRAME) {
            let (mut full, mut zero) = (Vec::new(), Vec::new());
            for (number, data) in part {
                match data {
                    Some(data) => {
                        full.extend_from_slice(&number.to_le_bytes());
                        full.extend_from_slice(data);
                    }
                    None => zero.extend_from_slice(&number.to_le_bytes()),
                }
            }
            for (kind, contents) in [(PAGES, full), (ZERO_PAGES, zero)] {
                if !contents.is_empty() {
                    self.frame(kind, &contents)?;
                }
            }
            self.pages += part.len() as u64;
        }
        Ok(())
    }

    /// Writes a chunk of a disk; none: all zero.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn chunk(&mut self, dev: u8, index: u64, data: Option<&[u8]>) -> Result<(), SnapshotError> {
        let mut contents = vec![dev];
        contents.extend_from_slice(&index.to_le_bytes());
        contents.extend_from_slice(data.unwrap_or_default());
        self.chunks += 1;
        self.frame(if data.is_some() { CHUNK } else { ZERO_CHUNKS }, &contents)
    }

    /// Writes what a reader gave.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn item(&mut self, item: &SnapshotItem) -> Result<(), SnapshotError> {
        match item {
            SnapshotItem::Pages(pages) => self.pages_of(pages),
            SnapshotItem::Chunk { dev, index, data } => self.chunk(*dev, *index, data.as_deref()),
        }
    }

    /// Completes the file and gives it its name; says how long it is.
    ///
    /// # Errors
    /// [`SnapshotError::Io`]; nothing has the name then but what had it before.
    pub fn finish(mut self) -> Result<u64, SnapshotError> {
        let mut end = self.pages.to_le_bytes().to_vec();
        end.extend_from_slice(&self.chunks.to_le_bytes());
        self.frame(END, &end)?;
        self.file.flush().map_err(|e| self.fail("write", e))?;
        self.file.get_ref().sync_all().map_err(|e| self.fail("sync", e))?;
        std::fs::rename(partial(&self.path), &self.path).map_err(|e| self.fail("name", e))?;
        self.is_finished = true;
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        let dir = File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all());
        dir.map_err(|e| self.fail("sync the directory of", e))?;
        Ok(self.bytes)
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            // A file that stays is replaced by the next one of that name.
            drop(std::fs::remove_file(partial(&self.path)));
        }
    }
}

/// Reads a snapshot.
#[derive(Debug)]
pub struct SnapshotReader {
    file: BufReader<File>,
    path: PathBuf,
    head: SnapshotHead,
    offset: u64,
    pages: u64,
    chunks: u64,
    is_ended: bool,
    /// Chunks of a frame that were not given yet.
    waiting: Vec<SnapshotItem>,
}

impl SnapshotReader {
    /// Opens a file and reads its head.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let fail = |source| SnapshotError::Io { action: "read", path: path.into(), source };
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(fail)?);
        let mut start = [0; 12];
        match file.read_exact(&mut start) {
            Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => return Err(fail(e)),
            Ok(()) if start.starts_with(&MAGIC) => {}
            _ => return Err(SnapshotError::NotASnapshot(path.into())),
        }
        let found = u32_at(&start, 8);
        if found != VERSION {
            return Err(SnapshotError::Version { path: path.into(), found });
        }
        let offset = start.len() as u64;
        let (kind, contents, len) = read_frame(&mut file, path, offset)?;
        let damaged = SnapshotError::Damaged { path: path.into(), offset };
        if kind != HEAD || contents.len() < 4 {
            return Err(damaged);
        }
        // The rest of another model's head may be something else altogether.
        let found = u32_at(&contents, 0);
        if found != MODEL_VERSION {
            return Err(SnapshotError::Model { path: path.into(), found });
        }
        let head: SnapshotHead = postcard::from_bytes(&contents[4..]).map_err(|_| damaged)?;
        Ok(Self {
            file,
            path: path.into(),
            head,
            offset: offset + len,
            pages: 0,
            chunks: 0,
            is_ended: false,
            waiting: Vec::new(),
        })
    }

    /// Bytes of the file that were read.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What it is of.
    #[must_use]
    pub fn head(&self) -> &SnapshotHead {
        &self.head
    }

    /// What it is of, without the rest.
    #[must_use]
    pub fn into_head(self) -> SnapshotHead {
        self.head
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn damaged(&self) -> SnapshotError {
        SnapshotError::Damaged { path: self.path.clone(), offset: self.offset }
    }

    /// The next piece; none at the end.
    ///
    /// # Errors
    /// [`SnapshotError`]; there is nothing more to be had then.
    pub fn next_item(&mut self) -> Result<Option<SnapshotItem>, SnapshotError> {
        if let Some(item) = self.waiting.pop() {
            return Ok(Some(item));
        }
        if self.is_ended {
            return Ok(None);
        }
        let (kind, contents, len) = read_frame(&mut self.file, &self.path, self.offset)?;
        let item = match kind {
            PAGES => self.full_pages(&contents)?,
            ZERO_PAGES => self.zero_pages(&contents)?,
            CHUNK => self.full_chunk(&contents)?,
            ZERO_CHUNKS => self.zero_chunks(&contents)?,
            END => return self.end(&contents, len),
            _ => return Err(self.damaged()),
        };
        self.offset += len;
        Ok(Some(item))
    }

    fn full_pages(&mut self, contents: &[u8]) -> Result<SnapshotItem, SnapshotError> {
        let parts = contents.chunks_exact(4 + PAGE_SIZE);
        if contents.is_empty() || !parts.remainder().is_empty() {
            return Err(self.damaged());
        }
        let pages = parts.map(|part| (u32_at(part, 0), Some(Box::from(&part[4..])))).collect();
        self.checked_pages(pages)
    }

    /// Pages have to be those of the machine's RAM.
    fn checked_pages(
        &mut self,
        pages: Vec<(u32, Option<Box<[u8]>>)>,
    ) -> Result<SnapshotItem, SnapshotError> {
        let count = self.head.saved.config.ram_size / PAGE_SIZE as u64;
        if pages.iter().any(|(page, _)| u64::from(*page) >= count) {
            return Err(self.damaged());
        }
        self.pages += pages.len() as u64;
        Ok(SnapshotItem::Pages(pages))
    }

    fn zero_pages(&mut self, contents: &[u8]) -> Result<SnapshotItem, SnapshotError> {
        let parts = contents.chunks_exact(4);
        if contents.is_empty() || !parts.remainder().is_empty() {
            return Err(self.damaged());
        }
        let pages = parts.map(|part| (u32_at(part, 0), None)).collect();
        self.checked_pages(pages)
    }

    /// The range of a chunk has to be one of a disk that the snapshot has.
    fn check_chunk(&self, dev: u8, index: u64, len: Option<usize>) -> Result<(), SnapshotError> {
        let size = self.head.disks.get(usize::from(dev)).copied().unwrap_or(0);
        let rest = index.checked_mul(CHUNK_BYTES).and_then(|at| size.checked_sub(at)).unwrap_or(0);
        let wanted = rest.min(CHUNK_BYTES);
        if wanted == 0 || len.is_some_and(|len| len as u64 != wanted) {
            return Err(self.damaged());
        }
        Ok(())
    }

    fn full_chunk(&mut self, contents: &[u8]) -> Result<SnapshotItem, SnapshotError> {
        if contents.len() < 9 {
            return Err(self.damaged());
        }
        let (dev, index, data) = (contents[0], u64_at(contents, 1), contents[9..].to_vec());
        self.check_chunk(dev, index, Some(data.len()))?;
        self.chunks += 1;
        Ok(SnapshotItem::Chunk { dev, index, data: Some(data) })
    }

    fn zero_chunks(&mut self, contents: &[u8]) -> Result<SnapshotItem, SnapshotError> {
        let parts = contents.get(1..).unwrap_or_default().chunks_exact(8);
        if parts.len() == 0 || !parts.remainder().is_empty() {
            return Err(self.damaged());
        }
        let dev = contents[0];
        for part in parts.rev() {
            let index = u64_at(part, 0);
            self.check_chunk(dev, index, None)?;
            self.waiting.push(SnapshotItem::Chunk { dev, index, data: None });
        }
        self.chunks += self.waiting.len() as u64;
        self.waiting.pop().ok_or_else(|| self.damaged())
    }

    fn end(&mut self, contents: &[u8], len: u64) -> Result<Option<SnapshotItem>, SnapshotError> {
        let is_whole = contents.len() == 16
            && u64_at(contents, 0) == self.pages
            && u64_at(contents, 8) == self.chunks;
        if !is_whole {
            return Err(self.damaged());
        }
        self.offset += len;
        if !matches!(self.file.read(&mut [0]), Ok(0)) {
            return Err(self.damaged());
        }
        self.is_ended = true;
        Ok(None)
    }
}

/// A frame at `offset`: kind, contents, and how long it is in the file.
fn read_frame(
    file: &mut BufReader<File>,
    path: &Path,
    offset: u64,
) -> Result<(u8, Vec<u8>, u64), SnapshotError> {
    let damaged = || SnapshotError::Damaged { path: path.into(), offset };
    let read = |file: &mut BufReader<File>, bytes: &mut [u8]| match file.read_exact(bytes) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(damaged()),
        Err(source) => Err(SnapshotError::Io { action: "read", path: path.into(), source }),
    };
    let mut head = [0; FRAME_BYTES];
    read(file, &mut head)?;
    let (len, stored_len) = (u32_at(&head, 1) as usize, u32_at(&head, 5) as usize);
    let len_max = if head[0] == HEAD { HEAD_MAX } else { CONTENTS_MAX };
    if len > len_max || stored_len > zstd::zstd_safe::compress_bound(len) {
        return Err(damaged());
    }
    let mut stored = vec![0; stored_len];
    read(file, &mut stored)?;
    if crc32c::crc32c_append(crc32c::crc32c(&head[..9]), &stored) != u32_at(&head, 9) {
        return Err(damaged());
    }
    let contents = zstd::bulk::decompress(&stored, len).map_err(|_| damaged())?;
    if contents.len() != len {
        return Err(damaged());
    }
    Ok((head[0], contents, (FRAME_BYTES + stored_len) as u64))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

#[cfg(test)]
mod tests;

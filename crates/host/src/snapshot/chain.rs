//! Machines from snapshots: a snapshot with its parents loaded, or put together into one file.
//!
//! # Invariants
//! - INV-CHAIN-1: a snapshot that was merged with its parent loads as the two of them did.
//! - INV-CHAIN-2: of what several snapshots of a chain have, the newest counts, and nothing else is looked at.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use machine::Machine;
use machine::config::BootImages;

use super::file::{SnapshotError, SnapshotItem, SnapshotReader, SnapshotWriter};
use super::{SnapshotHead, SnapshotId};
use crate::one_line::one_line;

/// Most snapshots that build on one another.
pub const CHAIN_MAX: usize = 1024;

/// The files that make up the snapshot in `path`, itself first, found by `file_of` one by one.
///
/// # Errors
/// [`SnapshotError`]: one is missing, damaged, or its own ancestor.
pub fn chain_of(
    path: &Path,
    file_of: impl Fn(SnapshotId) -> Option<PathBuf>,
) -> Result<Vec<PathBuf>, SnapshotError> {
    let mut files = vec![path.to_owned()];
    let mut parent = SnapshotReader::open(path)?.head().parent;
    while let Some(id) = parent {
        let unfit = |reason: String| SnapshotError::Unfit { path: path.into(), reason };
        let file = file_of(id).ok_or_else(|| unfit(format!("its parent {id} is missing")))?;
        if files.len() >= CHAIN_MAX {
            return Err(unfit(format!("it builds on more than {CHAIN_MAX} others")));
        }
        parent = SnapshotReader::open(&file)?.head().parent;
        files.push(file);
    }
    Ok(files)
}

/// The machine of a snapshot whose files are `chain`, itself first.
///
/// # Errors
/// [`SnapshotError`].
pub fn load(
    chain: &[PathBuf],
    images: BootImages,
) -> Result<(Machine, SnapshotHead), SnapshotError> {
    let head = head(chain)?;
    let machine = load_as(chain, &head, images, &mut |_| Ok(()))?;
    Ok((machine, head))
}

/// The head of the snapshot whose files are `chain`.
///
/// # Errors
/// [`SnapshotError`].
pub fn head(chain: &[PathBuf]) -> Result<SnapshotHead, SnapshotError> {
    let newest = chain.first().ok_or_else(|| SnapshotError::NotASnapshot(PathBuf::new()))?;
    Ok(SnapshotReader::open(newest)?.into_head())
}

/// A piece of a snapshot's disks on the way to who restores them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index of the disk, index of the chunk, its contents unless it is all zero; none after pieces of memory.
    pub chunk: Option<(u8, u64, Option<Vec<u8>>)>,
    /// Bytes of the chain's files that were read so far.
    pub bytes_read: u64,
}

/// As [`load`], from the head of `chain`, which may have been changed. `each` gets the disks, a chunk once at most; those
/// that it does not get are all zero.
///
/// # Errors
/// [`SnapshotError`], or what `each` says.
pub fn load_as(
    chain: &[PathBuf],
    head: &SnapshotHead,
    images: BootImages,
    each: &mut dyn FnMut(Piece) -> Result<(), SnapshotError>,
) -> Result<Machine, SnapshotError> {
    let path = chain.first().cloned().unwrap_or_default();
    let unfit = |reason: String| SnapshotError::Unfit { path: path.clone(), reason };
    let mut machine = Machine::restore(&head.saved, images).map_err(|e| unfit(one_line(&e)))?;
    crate::huge::advise(machine.ram().bytes());
    read(chain, &mut |item, bytes_read| {
        let chunk = match item {
            SnapshotItem::Chunk { dev, index, data } => Some((dev, index, data)),
            SnapshotItem::Pages(pages) => {
                for (page, data) in pages {
                    // Memory is all zero, and no page comes twice.
                    let Some(data) = data else { continue };
                    machine.load_page(page, &data).map_err(|_| {
                        unfit(format!("it has a page {page}, which its machine has not"))
                    })?;
                }
                None
            }
        };
        each(Piece { chunk, bytes_read })
    })?;
    Ok(machine)
}

/// Takes a chunk of a disk, by its index.
pub(crate) type VisitChunk<'a> = dyn FnMut(u64, &[u8]) -> Result<(), String> + 'a;

/// Gives `visit` the chunks of a disk that are not all zero, each once.
///
/// # Errors
/// One line: a file is no good, or what `visit` says.
pub(crate) fn disk(chain: &[PathBuf], dev: u8, visit: &mut VisitChunk<'_>) -> Result<(), String> {
    let mut refused = None;
    let read = read(chain, &mut |item, _| {
        let SnapshotItem::Chunk { dev: of, index, data } = item else { return Ok(()) };
        if let Some(data) = data.filter(|_| of == dev) {
            refused = visit(index, &data).err();
        }
        // Which error it is does not matter: the one that is told is the other.
        if refused.is_some() { Err(SnapshotError::NotASnapshot(PathBuf::new())) } else { Ok(()) }
    });
    match refused {
        Some(reason) => Err(reason),
        None => read.map_err(|e| one_line(&e)),
    }
}

/// Gives `visit` all that is in `chain`, newest first, each page and each chunk once, with the bytes read so far.
fn read(
    chain: &[PathBuf],
    visit: &mut dyn FnMut(SnapshotItem, u64) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    let mut seen = Seen::default();
    let mut before = 0;
    for file in chain {
        let mut reader = SnapshotReader::open(file)?;
        while let Some(mut item) = reader.next_item()? {
            if seen.is_news(&mut item) {
                visit(item, before + reader.offset())?;
            }
        }
        before += reader.offset();
    }
    Ok(())
}

/// What of a snapshot is known already: pages, and chunks by disk, as sets of 64 numbers each.
#[derive(Debug, Default)]
struct Seen {
    pages: BTreeMap<u32, u64>,
    chunks: BTreeMap<(u8, u64), u64>,
}

impl Seen {
    /// Takes from a piece what is known already, and remembers the rest; false when nothing is left of it.
    fn is_news(&mut self, item: &mut SnapshotItem) -> bool {
        fn put(set: &mut u64, number: u64) -> bool {
            let bit = 1 << (number % 64);
            let is_new = *set & bit == 0;
            *set |= bit;
            is_new
        }
        match item {
            SnapshotItem::Pages(pages) => {
                pages.retain(|(page, _)| {
                    put(self.pages.entry(page / 64).or_default(), u64::from(*page))
                });
                !pages.is_empty()
            }
            SnapshotItem::Chunk { dev, index, .. } => {
                put(self.chunks.entry((*dev, *index / 64)).or_default(), *index)
            }
        }
    }
}

/// Writes to `out` what the snapshot in `child` and its parent in `parent` are together. `out` may be `child`.
///
/// # Errors
/// [`SnapshotError`]; `out` is as it was then.
pub fn merge(parent: &Path, child: &Path, out: &Path) -> Result<u64, SnapshotError> {
    let mut upper = SnapshotReader::open(child)?;
    let mut lower = SnapshotReader::open(parent)?;
    if upper.head().parent != Some(lower.head().id) {
        let reason = format!("it is not the parent of {}", child.display());
        return Err(SnapshotError::Unfit { path: parent.into(), reason });
    }
    let is_whole = lower.head().parent.is_none();
    let head = SnapshotHead { parent: lower.head().parent, ..upper.head().clone() };
    let mut writer = SnapshotWriter::create(out, &head)?;
    let mut seen = Seen::default();
    for reader in [&mut upper, &mut lower] {
        while let Some(mut item) = reader.next_item()? {
            // A disk that the newer one has not is none of its machine's.
            let is_there = match &item {
                SnapshotItem::Pages(_) => true,
                SnapshotItem::Chunk { dev, .. } => usize::from(*dev) < head.disks.len(),
            };
            if is_there && seen.is_news(&mut item) {
                put(&mut writer, item, is_whole)?;
            }
        }
    }
    writer.finish()
}

/// Writes a piece; a snapshot without a parent has nothing that is all zero.
fn put(
    writer: &mut SnapshotWriter,
    item: SnapshotItem,
    is_whole: bool,
) -> Result<(), SnapshotError> {
    match item {
        SnapshotItem::Pages(mut pages) => {
            pages.retain(|(_, data)| data.is_some() || !is_whole);
            if pages.is_empty() { Ok(()) } else { writer.pages_of(&pages) }
        }
        SnapshotItem::Chunk { data: None, .. } if is_whole => Ok(()),
        item @ SnapshotItem::Chunk { .. } => writer.item(&item),
    }
}

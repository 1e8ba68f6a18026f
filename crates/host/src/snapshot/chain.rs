//! Machines from snapshots: a snapshot with its parents loaded, or put together into one file.
//!
//! # Invariants
//! - INV-CHAIN-1: a snapshot that was merged with its parent loads as the two of them did.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use machine::Machine;
use machine::config::BootImages;
use machine::machine::MODEL_VERSION;
use machine::ram::PAGE_SIZE;

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
    let Some(newest) = chain.first() else {
        return Err(SnapshotError::NotASnapshot(PathBuf::new()));
    };
    let head = SnapshotReader::open(newest)?.head().clone();
    let unfit = |reason: String| SnapshotError::Unfit { path: newest.clone(), reason };
    if head.saved.model != MODEL_VERSION {
        let found = head.saved.model;
        return Err(unfit(format!(
            "it is of machine model {found}, this build has {MODEL_VERSION}"
        )));
    }
    let mut machine = Machine::restore(&head.saved, images).map_err(|e| unfit(one_line(&e)))?;
    crate::huge::advise(machine.ram().bytes());
    for file in chain.iter().rev() {
        let mut reader = SnapshotReader::open(file)?;
        while let Some(item) = reader.next_item()? {
            let SnapshotItem::Pages(pages) = item else { continue };
            for (page, data) in pages {
                let zero = [0; PAGE_SIZE];
                let loaded = machine.load_page(page, data.as_deref().unwrap_or(&zero));
                loaded.map_err(|_| {
                    unfit(format!("it has a page {page}, which its machine has not"))
                })?;
            }
        }
    }
    Ok((machine, head))
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
    let (mut pages, mut chunks) = (BTreeSet::new(), BTreeSet::new());
    while let Some(item) = upper.next_item()? {
        match &item {
            SnapshotItem::Pages(got) => pages.extend(got.iter().map(|(page, _)| *page)),
            SnapshotItem::Chunk { dev, index, .. } => {
                chunks.insert((*dev, *index));
            }
        }
        put(&mut writer, item, is_whole)?;
    }
    while let Some(item) = lower.next_item()? {
        match item {
            SnapshotItem::Pages(mut got) => {
                got.retain(|(page, _)| !pages.contains(page));
                put(&mut writer, SnapshotItem::Pages(got), is_whole)?;
            }
            SnapshotItem::Chunk { dev, index, .. }
                if chunks.contains(&(dev, index)) || usize::from(dev) >= head.disks.len() => {}
            item @ SnapshotItem::Chunk { .. } => put(&mut writer, item, is_whole)?,
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

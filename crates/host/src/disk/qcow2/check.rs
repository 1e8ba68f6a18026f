//! Looks a qcow2 image's tables through: whether what they refer to is there, and each cluster counted as often as it is
//! used.
//!
//! # Place
//! `understudy image check`, on an image that nobody uses. It reads only.
//!
//! # Failure
//! Whatever the tables say costs a problem in the report, not more than [`CLUSTERS_MAX`] counters, and no more than
//! [`TABLES_MAX`] tables that are read.
//!
//! # References
//! docs/interop/qcow2.txt of QEMU.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::Header;

/// Most clusters that an image's file may have (4 bytes each here).
const CLUSTERS_MAX: u64 = 1 << 27;
/// Most tables that are read.
const TABLES_MAX: u64 = 1 << 24;
/// Most problems that are kept as text.
const PROBLEMS_MAX: usize = 20;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const IS_COPIED: u64 = 1 << 63;
const IS_COMPRESSED: u64 = 1 << 62;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Wrong references and counts: contents are lost or will be.
    pub errors: u64,
    /// Clusters that nothing refers to: they cost room alone.
    pub leaks: u64,
    /// Clusters with data of the disk's present state.
    pub data_clusters: u64,
    /// Of these the compressed ones.
    pub compressed_clusters: u64,
    /// The first errors, for people.
    pub problems: Vec<String>,
}

struct Checker<'a> {
    file: &'a File,
    header: &'a Header,
    /// How often each cluster of the file is referred to.
    used: Vec<u32>,
    tables: u64,
    /// Entries that say that their cluster is used once, and that it is not: where, which cluster, what they say.
    copied: Vec<(u64, u64, bool)>,
    report: CheckReport,
}

/// Checks the image in `file`, whose header is given.
///
/// # Errors
/// It cannot be read, or is too big to be checked.
pub fn check(file: &File, header: &Header) -> io::Result<CheckReport> {
    let cluster = header.cluster_bytes() as u64;
    let clusters = super::super::raw::size_of(file)?.div_ceil(cluster);
    if clusters > CLUSTERS_MAX {
        return Err(io::Error::other("the image is too big to be checked"));
    }
    let used = vec![0; usize::try_from(clusters).unwrap_or(0)];
    let (tables, copied, report) = (0, Vec::new(), CheckReport::default());
    let mut checker = Checker { file, header, used, tables, copied, report };
    checker.mark("the header", 0, cluster);
    checker.l1(header.l1_offset, header.l1_entries, true)?;
    checker.snapshots()?;
    checker.bitmaps()?;
    checker.refcounts()?;
    Ok(checker.report)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

impl Checker<'_> {
    fn problem(&mut self, text: String) {
        self.report.errors += 1;
        if self.report.problems.len() < PROBLEMS_MAX {
            self.report.problems.push(text);
        }
    }

    /// Reads a range; what is beyond the end of the file is zero.
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut come = 0;
        while come < len {
            match self.file.read_at(&mut bytes[come..], offset.saturating_add(come as u64)) {
                Ok(0) => break,
                Ok(n) => come += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }

    /// Something refers to this range.
    fn mark(&mut self, what: &str, offset: u64, len: u64) {
        let cluster = self.header.cluster_bytes() as u64;
        let Some(end) = offset.checked_add(len).filter(|_| len > 0) else { return };
        for index in offset / cluster..end.div_ceil(cluster) {
            let Some(used) = usize::try_from(index).ok().and_then(|i| self.used.get_mut(i)) else {
                return self
                    .problem(format!("{what} at {offset:#x} is beyond the end of the file"));
            };
            *used = used.saturating_add(1);
        }
    }

    /// Counts a table to be read; false: too many.
    fn is_table_too_many(&mut self) -> io::Result<()> {
        self.tables += 1;
        if self.tables > TABLES_MAX {
            return Err(io::Error::other("the image has too many tables to be checked"));
        }
        Ok(())
    }

    /// A level 1 table and what it leads to.
    fn l1(&mut self, offset: u64, entries: u32, is_present: bool) -> io::Result<()> {
        let cluster = self.header.cluster_bytes() as u64;
        let len = u64::from(entries) * 8;
        self.is_table_too_many()?;
        self.mark("a level 1 table", offset, len);
        // The header bounds the one of the disk, and snapshots() those of snapshots.
        let table = self.read(offset, len as usize)?;
        for (index, entry) in (0u64..).zip(table.chunks_exact(8).map(|entry| be64(entry, 0))) {
            let at = entry & OFFSET_MASK;
            if at == 0 {
                continue;
            }
            if !at.is_multiple_of(cluster) {
                self.problem(format!(
                    "level 1 entry {index} leads to {at:#x}, which is no cluster"
                ));
                continue;
            }
            self.mark("a level 2 table", at, cluster);
            if is_present {
                self.copied.push((offset + index * 8, at / cluster, entry & IS_COPIED != 0));
            }
            self.l2(at, is_present)?;
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64, is_present: bool) -> io::Result<()> {
        let cluster = self.header.cluster_bytes() as u64;
        self.is_table_too_many()?;
        let table = self.read(offset, self.header.cluster_bytes())?;
        // Bits of the place of a compressed cluster.
        let place_bits = 62 - (self.header.cluster_bits - 8);
        for (index, entry) in (0u64..).zip(table.chunks_exact(8).map(|entry| be64(entry, 0))) {
            if entry & IS_COMPRESSED != 0 {
                let at = entry & ((1 << place_bits) - 1);
                let sectors = ((entry & !(IS_COPIED | IS_COMPRESSED)) >> place_bits) + 1;
                self.mark("a compressed cluster", at & !511, sectors * 512);
                self.report.data_clusters += u64::from(is_present);
                self.report.compressed_clusters += u64::from(is_present);
                continue;
            }
            let at = entry & OFFSET_MASK;
            if at == 0 {
                continue;
            }
            if !at.is_multiple_of(cluster) {
                self.problem(format!(
                    "entry {index} of the level 2 table at {offset:#x} leads to {at:#x}, which is no cluster"
                ));
                continue;
            }
            self.mark("a cluster", at, cluster);
            if is_present {
                self.report.data_clusters += 1;
                self.copied.push((offset + index * 8, at / cluster, entry & IS_COPIED != 0));
            }
        }
        Ok(())
    }

    fn snapshots(&mut self) -> io::Result<()> {
        let start = self.header.snapshots_offset;
        let mut at = start;
        for index in 0..self.header.snapshots {
            let head = self.read(at, 40)?;
            let (l1_offset, l1_entries) = (be64(&head, 0), be32(&head, 8));
            let tail = u64::from(be16(&head, 12)) + u64::from(be16(&head, 14));
            at = at.saturating_add((40 + u64::from(be32(&head, 36)) + tail).next_multiple_of(8));
            if u64::from(l1_entries) * 8 > 32 << 20 {
                self.problem(format!(
                    "snapshot {index} has a level 1 table of {l1_entries} entries"
                ));
                continue;
            }
            self.l1(l1_offset, l1_entries, false)?;
        }
        self.mark("the table of snapshots", start, at - start);
        Ok(())
    }

    fn bitmaps(&mut self) -> io::Result<()> {
        let Some((count, bytes, offset)) = self.header.bitmaps else { return Ok(()) };
        let cluster = self.header.cluster_bytes() as u64;
        if bytes > 1 << 20 {
            self.problem(format!("a directory of bitmaps with {bytes} bytes"));
            return Ok(());
        }
        self.mark("the directory of bitmaps", offset, bytes);
        let directory = self.read(offset, bytes as usize)?;
        let mut at = 0;
        for _ in 0..count {
            let Some(entry) = directory.get(at..).filter(|rest| rest.len() >= 24) else { break };
            let (table, entries) = (be64(entry, 0), be32(entry, 8));
            let tail = usize::from(be16(entry, 18)).saturating_add(be32(entry, 20) as usize);
            at = at.saturating_add(tail.saturating_add(24).next_multiple_of(8));
            if u64::from(entries) * 8 > 32 << 20 {
                self.problem(format!("a bitmap with {entries} entries"));
                continue;
            }
            self.is_table_too_many()?;
            self.mark("the table of a bitmap", table, u64::from(entries) * 8);
            for entry in self.read(table, entries as usize * 8)?.chunks_exact(8) {
                let at = be64(entry, 0) & OFFSET_MASK;
                if at != 0 {
                    self.mark("a bitmap", at, cluster);
                }
            }
        }
        Ok(())
    }

    /// Compares the image's own counts with what was found.
    fn refcounts(&mut self) -> io::Result<()> {
        let cluster = self.header.cluster_bytes();
        let len = self.header.reftable_clusters as usize * cluster;
        let offset = self.header.reftable_offset;
        self.mark("the refcount table", offset, len as u64);
        let table = self.read(offset, len)?;
        let per_block = (cluster * 8) >> self.header.refcount_order;
        let mut blocks = Vec::new();
        for (index, entry) in table.chunks_exact(8).map(|entry| be64(entry, 0)).enumerate() {
            let at = entry & !511;
            if at == 0 {
                continue;
            }
            if !at.is_multiple_of(cluster as u64) {
                self.problem(format!(
                    "refcount table entry {index} leads to {at:#x}, which is no cluster"
                ));
                continue;
            }
            self.mark("a refcount block", at, cluster as u64);
            blocks.push((index, at));
        }
        let mut counts = vec![0u64; self.used.len()];
        for (index, at) in blocks {
            let first = index.saturating_mul(per_block);
            if first >= counts.len() {
                continue;
            }
            let block = self.read(at, cluster)?;
            let last = counts.len().min(first + per_block);
            for (i, count) in counts[first..last].iter_mut().enumerate() {
                *count = refcount(&block, i, self.header.refcount_order);
            }
        }
        let used = std::mem::take(&mut self.used);
        for (index, (count, used)) in counts.iter().zip(&used).enumerate() {
            match count.cmp(&u64::from(*used)) {
                std::cmp::Ordering::Equal => {}
                std::cmp::Ordering::Greater => self.report.leaks += 1,
                std::cmp::Ordering::Less => {
                    self.problem(format!(
                        "cluster {index} is used {used} times and counted {count}"
                    ));
                }
            }
        }
        for (place, index, is_copied) in std::mem::take(&mut self.copied) {
            let count = usize::try_from(index).ok().and_then(|i| counts.get(i));
            if count.is_some_and(|count| (*count == 1) != is_copied) {
                self.problem(format!(
                    "the entry at {place:#x} is wrong about who else uses its cluster"
                ));
            }
        }
        Ok(())
    }
}

/// Entry `index` of a block of reference counts with 2^`order` bits each.
fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bits = 1usize << order;
            let byte = block.get(index * bits / 8).copied().unwrap_or(0);
            u64::from(byte >> (index * bits % 8)) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1usize << (order - 3);
            let entry = block.get(index * bytes..(index + 1) * bytes).unwrap_or(&[]);
            entry.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

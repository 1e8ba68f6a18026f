//! Guest RAM: one contiguous region that the machine alone owns, with write tracking that the guest cannot see.
//!
//! # Place
//! Owned by [`crate::Machine`]; read and written by the engine (fast path by offset, slow path by address) and by
//! devices at a defined icount. No other thread ever touches it.
//!
//! # Invariants
//! - INV-RAM-1: a page whose hash in `hash` is valid has [`CLEAN`] set, and every write clears it first.
//! - INV-RAM-2: a page with the flag of a snapshot, or of the undo log, set still has the contents of the moment at which it
//!   was set.
//! - INV-RAM-3: a write to a granule that holds decoded code is reported in `code_written` before the next fetch.
//! - INV-RAM-4: a write that changes a valid PTE which a live translation was derived from raises `translation_gen`, or is
//!   reported in `pte_changes` when no other translation depends on it.
//! - INV-RAM-5: tracking state never influences contents, counts or the digest.
//!
//! and those of `snapshot` (INV-HISTORY) and `watch` (INV-WATCH).
//!
//! # Determinism
//! The digest is the wrapping sum over all pages of a hash of (page number, contents), an all-zero page counting 0:
//! a function of contents alone, whatever the order or the moment of the writes.

mod snapshot;
mod watch;

use self::snapshot::History;
pub use self::snapshot::{Epoch, SnapshotPage, SnapshotStep};
use self::watch::{WATCH, Watch};

/// Size of a guest page in bytes.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Guest physical address of the first byte of RAM, as on QEMU's `virt` board.
pub const RAM_BASE: u64 = 0x8000_0000;

/// Page flag: instructions decoded from this page are cached.
const CODE: u8 = 1;
/// Page flag: not written since its hash was last taken.
const CLEAN: u8 = 2;
// The flags from 4 on are those of `snapshot` and `watch`.

/// Changes of PTEs that are reported one by one; more raise `translation_gen`.
const PTE_CHANGES_MAX: usize = 16;
/// Changes within one table, without a walk through it, that are reported one by one.
const PTE_RUN_MAX: u32 = 4;

/// What a page-table page was walked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableUse {
    /// Virtual address that its first PTE maps.
    pub va: u64,
    /// Address space.
    pub satp: u64,
}

impl TableUse {
    /// Not a single table of leaf PTEs for pages of 4 KiB in a single address space.
    pub const OTHER: Self = Self { va: 0, satp: u64::MAX };
}

/// A PTE for a page of 4 KiB that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PteChange {
    /// Virtual address of the page.
    pub va: u64,
    /// Address space.
    pub satp: u64,
}

/// An access outside RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest physical address {gpa:#x} (+{len}) is outside RAM")]
pub struct OutsideRam {
    /// First guest physical address of the access.
    pub gpa: u64,
    /// Length of the access in bytes.
    pub len: u64,
}

/// Guest RAM. See the module documentation.
pub struct GuestRam {
    bytes: Vec<u8>,
    flags: Vec<u8>,
    pt_gen: Vec<u32>,
    /// `protect_gen` when permission to write to the page was last given.
    granted: Vec<u32>,
    /// What a page of leaf PTEs maps, as of `pt_gen`.
    pt_use: Vec<TableUse>,
    /// Tables that became tracked while the engine held permissions to write to them.
    tracked: Vec<u32>,
    /// One hart alone translates: changes of single PTEs are reported instead of raising `translation_gen`.
    reports_ptes: bool,
    pte_changes: Vec<PteChange>,
    /// The table that the last of these was in, and how many in a row without a walk through it.
    pte_run: (u32, u32),
    code_map: Vec<u64>,
    hash: Vec<u64>,
    sum: u64,
    dirty: Vec<u32>,
    translation_gen: u32,
    protect_gen: u32,
    code_written: Vec<u32>,
    history: History,
    watch: Watch,
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").field("size", &self.bytes.len()).finish_non_exhaustive()
    }
}

fn page_hash(page: u32, data: &[u8]) -> u64 {
    if is_zero(data) { 0 } else { xxhash_rust::xxh3::xxh3_64_with_seed(data, u64::from(page) + 1) }
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let (head, body) = data.split_at(data.len() % 16);
    head.iter().all(|&b| b == 0)
        && body
            .chunks_exact(16)
            .all(|c| u128::from_le_bytes(c.try_into().expect("chunk of 16")) == 0)
}

impl GuestRam {
    /// Zeroed RAM of `size` bytes; `size` must be a multiple of [`PAGE_SIZE`] (checked by the machine's configuration).
    #[must_use]
    pub fn new(size: u64) -> Self {
        let size = usize::try_from(size).expect("RAM size fits the host's address space");
        assert!(size.is_multiple_of(PAGE_SIZE), "RAM size is a multiple of the page size");
        let pages = size / PAGE_SIZE;
        Self {
            bytes: vec![0; size],
            flags: vec![CLEAN; pages],
            pt_gen: vec![0; pages],
            granted: vec![0; pages],
            pt_use: vec![TableUse::default(); pages],
            tracked: Vec::new(),
            reports_ptes: false,
            pte_changes: Vec::new(),
            pte_run: (0, 0),
            code_map: vec![0; pages],
            hash: vec![0; pages],
            sum: 0,
            dirty: Vec::new(),
            translation_gen: 1,
            protect_gen: 1,
            code_written: Vec::new(),
            history: History::new(pages),
            watch: Watch::default(),
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.flags.len() as u32
    }

    /// Offset into RAM of `[gpa, gpa+len)`, if all of it is RAM.
    #[inline]
    #[must_use]
    pub fn offset(&self, gpa: u64, len: u64) -> Option<usize> {
        let off = gpa.wrapping_sub(RAM_BASE);
        let size = self.bytes.len() as u64;
        (off < size && len <= size - off).then_some(off as usize)
    }

    /// Copies RAM at `gpa` into `buf`.
    ///
    /// # Errors
    /// [`OutsideRam`] when any byte is outside RAM; `buf` is then unchanged.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutsideRam> {
        let len = buf.len() as u64;
        let off = self.offset(gpa, len).ok_or(OutsideRam { gpa, len })?;
        buf.copy_from_slice(&self.bytes[off..off + buf.len()]);
        Ok(())
    }

    /// Reads a little-endian 16-bit value.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn read_u16(&self, gpa: u64) -> Result<u16, OutsideRam> {
        let mut b = [0; 2];
        self.read(gpa, &mut b)?;
        Ok(u16::from_le_bytes(b))
    }

    /// Reads a little-endian 32-bit value.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn read_u32(&self, gpa: u64) -> Result<u32, OutsideRam> {
        let mut b = [0; 4];
        self.read(gpa, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads a little-endian 64-bit value.
    ///
    /// # Errors
    /// [`OutsideRam`].
    pub fn read_u64(&self, gpa: u64) -> Result<u64, OutsideRam> {
        let mut b = [0; 8];
        self.read(gpa, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Writes `data` at `gpa` with all tracking: the path for devices, the loader and the engine's slow stores.
    ///
    /// # Errors
    /// [`OutsideRam`] when any byte is outside RAM; nothing is written then.
    pub fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), OutsideRam> {
        let len = data.len() as u64;
        let off = self.offset(gpa, len).ok_or(OutsideRam { gpa, len })?;
        let mut done = 0;
        while done < data.len() {
            let at = off + done;
            let n = (PAGE_SIZE - at % PAGE_SIZE).min(data.len() - done);
            self.write_in_page(at, &data[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn write_in_page(&mut self, off: usize, data: &[u8]) {
        let page = off / PAGE_SIZE;
        if self.flags[page] != 0 {
            self.before_write(page, off % PAGE_SIZE, data.len());
            self.note_write(off, data.len());
        }
        if self.pt_gen[page] == self.translation_gen
            && self.changes_valid_pte(off, data)
            && !self.report_pte(off, data.len())
        {
            self.pte_changes.clear();
            self.translation_gen =
                self.translation_gen.checked_add(1).unwrap_or_else(|| self.restart_generations());
        }
        self.bytes[off..off + data.len()].copy_from_slice(data);
    }

    /// Reports the change of a PTE, if that is enough. A kernel that goes through a whole table is not followed step by
    /// step.
    fn report_pte(&mut self, off: usize, len: usize) -> bool {
        let page = off / PAGE_SIZE;
        let table = self.pt_use[page];
        let is_one = len == 8 && off.is_multiple_of(8);
        if !self.reports_ptes
            || !is_one
            || table == TableUse::OTHER
            || self.pte_changes.len() >= PTE_CHANGES_MAX
        {
            return false;
        }
        let before = if self.pte_run.0 == page as u32 { self.pte_run.1 } else { 0 };
        self.pte_run = (page as u32, before + 1);
        if before >= PTE_RUN_MAX {
            return false;
        }
        let index = (off % PAGE_SIZE / 8) as u64;
        let va = table.va.wrapping_add(index << PAGE_SHIFT);
        self.pte_changes.push(PteChange { va, satp: table.satp });
        true
    }

    /// Says whether one hart alone translates addresses.
    pub fn set_single_hart(&mut self, single: bool) {
        self.reports_ptes = single;
    }

    /// Whether PTEs changed since [`Self::take_pte_changes`].
    #[inline]
    #[must_use]
    pub fn has_pte_changes(&self) -> bool {
        !self.pte_changes.is_empty()
    }

    /// PTEs whose translations the engine must drop before the next access.
    pub fn take_pte_changes(&mut self) -> Vec<PteChange> {
        std::mem::take(&mut self.pte_changes)
    }

    /// Whether there are pages that [`Self::take_tracked`] names.
    #[inline]
    #[must_use]
    pub fn has_tracked(&self) -> bool {
        !self.tracked.is_empty()
    }

    /// Pages that permissions to write to must be dropped for.
    pub fn take_tracked(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.tracked)
    }

    /// Generations wrapped: forget every mark, so that no old one can look current.
    #[cold]
    fn restart_generations(&mut self) -> u32 {
        self.pt_gen.fill(0);
        1
    }

    fn changes_valid_pte(&self, off: usize, data: &[u8]) -> bool {
        let first = off & !7;
        let last = (off + data.len() + 7) & !7;
        (first..last).step_by(8).any(|word| {
            let valid = self.bytes[word] & 1 != 0;
            let lo = word.max(off);
            let hi = (word + 8).min(off + data.len());
            valid && self.bytes[lo..hi] != data[lo - off..hi - off]
        })
    }

    #[cold]
    fn before_write(&mut self, page: usize, start: usize, len: usize) {
        let flags = self.flags[page];
        self.before_change(page as u32);
        if flags & CLEAN != 0 {
            self.dirty.push(page as u32);
        }
        self.flags[page] = flags & (CODE | WATCH);
        if flags & CODE != 0 {
            let mask = granules(start, len);
            if self.code_map[page] & mask != 0 {
                self.code_map[page] = 0;
                self.flags[page] &= !CODE;
                self.code_written.push(page as u32);
            }
        }
    }

    // --- The engine's side -------------------------------------------------------------------------------------

    /// All of RAM, for loads whose translation the engine holds.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All of RAM, for stores to a page that [`Self::is_fast_writable`] said yes to in the present generations.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Whether stores to this page need no tracking until `protect_gen` or `translation_gen` changes.
    #[inline]
    #[must_use]
    pub fn is_fast_writable(&self, page: u32) -> bool {
        self.flags[page as usize] == 0 && self.pt_gen[page as usize] != self.translation_gen
    }

    /// Notes that the engine holds a permission to write to this page, until `protect_gen` changes.
    #[inline]
    pub fn grant_write(&mut self, page: u32) {
        self.granted[page as usize] = self.protect_gen;
    }

    /// The engine gave up what permissions to write to this page it had.
    #[inline]
    pub fn revoke_write(&mut self, page: u32) {
        self.granted[page as usize] = self.protect_gen.wrapping_sub(1);
    }

    fn is_granted(&self, page: usize) -> bool {
        self.granted[page] == self.protect_gen
    }

    /// Raised when a change of memory made translations stale: the engine drops every cached translation.
    #[inline]
    #[must_use]
    pub fn translation_gen(&self) -> u32 {
        self.translation_gen
    }

    /// Raised when tracking was armed: the engine drops every cached permission to write.
    #[inline]
    #[must_use]
    pub fn protect_gen(&self) -> u32 {
        self.protect_gen
    }

    /// Notes that a page-table walk read a valid PTE in `page`. When the engine must drop cached permissions to write to the
    /// page, [`Self::take_tracked`] then names it.
    pub fn mark_page_table(&mut self, page: u32, table: TableUse) {
        let p = page as usize;
        if self.pte_run.0 == page {
            self.pte_run.1 = 0;
        }
        if self.pt_gen[p] == self.translation_gen {
            if self.pt_use[p] != table {
                self.pt_use[p] = TableUse::OTHER;
            }
            return;
        }
        let was_fast = self.is_fast_writable(page);
        self.pt_gen[p] = self.translation_gen;
        self.pt_use[p] = table;
        if was_fast && self.is_granted(p) {
            self.tracked.push(page);
        }
    }

    /// Sets accessed and dirty bits in a valid PTE, as the walker does: adding them makes no translation stale.
    pub fn update_pte_flags(&mut self, gpa: u64, pte: u64) {
        let Some(off) = self.offset(gpa, 8) else { return };
        if self.flags[off / PAGE_SIZE] != 0 {
            self.before_write(off / PAGE_SIZE, off % PAGE_SIZE, 8);
        }
        self.bytes[off..off + 8].copy_from_slice(&pte.to_le_bytes());
    }

    /// Makes the engine drop every cached permission to write, of all harts.
    pub fn drop_write_permissions(&mut self) {
        self.protect_gen = self.protect_gen.wrapping_add(1);
    }

    /// Notes that instructions were decoded from `[start, start+len)` of `page`. Returns true when the engine must drop
    /// cached permissions to write to it.
    pub fn mark_code(&mut self, page: u32, start: usize, len: usize) -> bool {
        let p = page as usize;
        let was_fast = self.is_fast_writable(page);
        self.flags[p] |= CODE;
        self.code_map[p] |= granules(start, len);
        was_fast && self.is_granted(p)
    }

    /// Whether code pages were written since [`Self::take_code_written`].
    #[inline]
    #[must_use]
    pub fn code_was_written(&self) -> bool {
        !self.code_written.is_empty()
    }

    /// Pages whose decoded instructions the engine must drop before the next fetch.
    pub fn take_code_written(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.code_written)
    }

    // --- Digest ------------------------------------------------------------------------------------------------

    /// Hash of all contents; costs time for the pages written since the last call only.
    pub fn digest(&mut self) -> u64 {
        let dirty = std::mem::take(&mut self.dirty);
        for &page in &dirty {
            let p = page as usize;
            let new = page_hash(page, &self.bytes[p * PAGE_SIZE..(p + 1) * PAGE_SIZE]);
            self.sum = self.sum.wrapping_sub(self.hash[p]).wrapping_add(new);
            self.hash[p] = new;
            self.flags[p] |= CLEAN;
        }
        if !dirty.is_empty() {
            self.protect_gen = self.protect_gen.wrapping_add(1);
        }
        self.sum
    }

    /// Number of pages written since the last digest.
    #[must_use]
    pub fn pages_dirty(&self) -> usize {
        self.dirty.len()
    }

    /// Sets all contents back to zero, as a reset of the machine does.
    pub fn clear(&mut self) {
        let zero = [0u8; PAGE_SIZE];
        for page in 0..self.flags.len() {
            if !is_zero(&self.bytes[page * PAGE_SIZE..(page + 1) * PAGE_SIZE]) {
                self.write_in_page(page * PAGE_SIZE, &zero);
            }
        }
    }
}

fn granules(start: usize, len: usize) -> u64 {
    let first = start / 64;
    let last = (start + len.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    let upto = |n: usize| if n >= 63 { u64::MAX } else { (1u64 << (n + 1)) - 1 };
    upto(last) & !(if first == 0 { 0 } else { upto(first - 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_a_function_of_contents_alone() {
        let mut a = GuestRam::new(8 * 4096);
        let mut b = GuestRam::new(8 * 4096);
        a.write(RAM_BASE + 4090, &[1; 100]).unwrap();
        b.write(RAM_BASE + 4090, &[7; 100]).unwrap();
        assert_ne!(a.digest(), b.digest());
        b.write(RAM_BASE + 4150, &[1; 40]).unwrap();
        b.digest();
        b.write(RAM_BASE + 4090, &[1; 60]).unwrap();
        assert_eq!(a.digest(), b.digest());
        b.clear();
        assert_eq!(b.digest(), 0);
    }

    #[test]
    fn changing_a_valid_pte_raises_the_generation_and_an_invalid_one_does_not() {
        let mut ram = GuestRam::new(2 * 4096);
        ram.write(RAM_BASE, &[0xcf]).unwrap();
        ram.digest();
        ram.mark_page_table(0, TableUse::OTHER);
        let g = ram.translation_gen();
        ram.write(RAM_BASE + 8, &[0xcf]).unwrap();
        ram.write(RAM_BASE, &[0xcf]).unwrap();
        assert_eq!(ram.translation_gen(), g);
        ram.write(RAM_BASE + 1, &[1]).unwrap();
        assert_ne!(ram.translation_gen(), g);
    }

    #[test]
    fn code_writes_are_reported_by_granule() {
        let mut ram = GuestRam::new(4096);
        ram.mark_code(0, 128, 4);
        ram.write(RAM_BASE + 64, &[1]).unwrap();
        assert!(!ram.code_was_written());
        ram.write(RAM_BASE + 190, &[1]).unwrap();
        assert_eq!(ram.take_code_written(), [0]);
        assert_eq!(granules(0, 4096), u64::MAX);
        assert_eq!(granules(4032, 64), 1 << 63);
    }

    #[test]
    fn accesses_outside_are_refused() {
        let mut ram = GuestRam::new(4096);
        assert!(ram.write(RAM_BASE + 4095, &[1, 2]).is_err());
        assert!(ram.write(u64::MAX - 1, &[1, 2]).is_err());
        assert!(ram.read(RAM_BASE - 1, &mut [0]).is_err());
        assert_eq!(ram.digest(), 0);
    }
}

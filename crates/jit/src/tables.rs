//! What generated code reads and writes beside registers: the software TLBs, where it stands, why it left.
//!
//! # Invariants
//! - INV-TABLES-1: an entry whose tag matches an address under the present id maps it within the RAM that the tables are
//!   bound to; generated code is entered with that RAM alone.
//! - INV-TABLES-2: tags hold a page number and, in the low 12 bits, the id of the context that the entry is for.
//! - INV-TABLES-3: an address for which [`Tables::may_stop`] says no has no breakpoint.
//! - INV-TABLES-4: an entry for an address is at the one place that the address and its address space have, which all contexts
//!   of that space share.

use std::fmt;

/// log2 of the page size.
const PAGE_SHIFT: u32 = 12;
/// Entries of the TLB for data: what several processes use between two turns of each. Dropping permissions to write looks at
/// all of them, and a hart has them within itself, on the stack while it is made.
pub const DATA_ENTRIES: usize = 4096;
/// Entries of the TLB for fetches.
pub const FETCH_ENTRIES: usize = 4096;
/// A tag that no address has.
pub const NO_TAG: u64 = u64::MAX;
/// Address of no reservation.
pub const NO_RESERVATION: u64 = u64::MAX;
/// Marks of pages with breakpoints.
pub(crate) const STOP_PAGES: usize = 256;
/// Ids are below this.
pub const IDS: u64 = 4095;

/// A cached translation for data: host address = virtual address + `add`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct DataEntry {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) add: u64,
    unused: u64,
}

/// A cached translation for fetches: the page's table of entry points.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct FetchEntry {
    pub(crate) tag: u64,
    pub(crate) table: u64,
}

/// log2 of the size of a [`DataEntry`].
pub(crate) const DATA_SHIFT: u8 = size_of::<DataEntry>().trailing_zeros() as u8;
/// log2 of the size of a [`FetchEntry`].
pub(crate) const FETCH_SHIFT: u8 = size_of::<FetchEntry>().trailing_zeros() as u8;

const NO_DATA: DataEntry = DataEntry { read: NO_TAG, write: NO_TAG, add: 0, unused: 0 };
const NO_FETCH: FetchEntry = FetchEntry { tag: NO_TAG, table: 0 };

/// One hart's tables. They are a cache: nothing of them is saved, and a clone is empty.
#[repr(C)]
pub struct Tables {
    /// Virtual address of the page that generated code is on.
    pub(crate) page_va: u64,
    data_id: u64,
    /// What the place of an entry for data depends on beside the address, as an offset in bytes.
    pub(crate) data_salt: u32,
    /// The same for fetches.
    pub(crate) fetch_salt: u32,
    pub(crate) fetch_id: u64,
    pub(crate) budget: i64,
    pub(crate) exit_pc: u64,
    /// A register of generated code while the runtime runs.
    pub(crate) kept: u64,
    pub(crate) exit_reason: u32,
    pub(crate) link_site: u32,
    /// Runtime and its step function while generated code runs.
    pub(crate) runtime: usize,
    pub(crate) step: usize,
    pub(crate) mxcsr: u32,
    pub(crate) host_mxcsr: u32,
    /// 1 when floating-point code may run inline: state is dirty and the dynamic rounding mode is one of the host's.
    pub(crate) fp_inline: u32,
    /// 1 when floating-point registers are in the host's.
    pub(crate) fp_live: u32,
    /// `fflags` by the flags of MXCSR.
    pub(crate) flags: [u8; 64],
    /// 1 when the dynamic rounding mode is one of the host's.
    pub(crate) frm_inline: u32,
    /// 1 when supervisor registers may be used inline: in S-mode, without MPRV or TVM.
    pub(crate) csr_inline: u32,
    /// 1 when the present mode may zero blocks.
    pub(crate) zero_inline: u32,
    /// Id of data accesses in S-mode without SUM; with SUM it is the next one.
    pub(crate) supervisor_id: u64,
    pub(crate) data: [DataEntry; DATA_ENTRIES],
    pub(crate) fetch: [FetchEntry; FETCH_ENTRIES],
    fetch_pages: [u32; FETCH_ENTRIES],
    ram_base: u64,
    ram_len: u64,
    /// Host address of guest physical address 0, if RAM went on down to there.
    pub(crate) ram_bias: u64,
    /// Generation of the code cache that `fetch` is of.
    pub(crate) code_generation: u64,
    /// Not 0 for the page numbers, as far as they are looked at, of pages with breakpoints.
    pub(crate) stop_pages: [u32; STOP_PAGES],
    /// Number of the set of breakpoints that these are of.
    stop_serial: u64,
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

impl Clone for Tables {
    fn clone(&self) -> Self {
        Self::new()
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self::new()
    }
}

/// `fflags` that say what these flags of MXCSR say.
fn fflags(mxcsr: u32) -> u64 {
    // IE ZE OE UE PE are bits 0, 2, 3, 4, 5; NV DZ OF UF NX bits 4 to 0. DE has no counterpart.
    let bit = |from: u32, to: u32| u64::from(mxcsr >> from & 1) << to;
    bit(0, 4) | bit(2, 3) | bit(3, 2) | bit(4, 1) | bit(5, 0)
}

/// MXCSR with every exception masked and no flag raised.
pub(crate) const MXCSR: u32 = 0x1f80;

impl Tables {
    /// Offset of the id of data accesses.
    pub(crate) const DATA_ID: usize = std::mem::offset_of!(Tables, data_id);

    /// Empty tables.
    #[must_use]
    pub fn new() -> Self {
        Self {
            page_va: 0,
            data_id: 0,
            data_salt: 0,
            fetch_salt: 0,
            fetch_id: 0,
            budget: 0,
            exit_pc: 0,
            kept: 0,
            exit_reason: 0,
            link_site: 0,
            runtime: 0,
            step: 0,
            mxcsr: MXCSR,
            host_mxcsr: MXCSR,
            fp_inline: 0,
            fp_live: 0,
            flags: std::array::from_fn(|mxcsr| fflags(mxcsr as u32) as u8),
            frm_inline: 0,
            csr_inline: 0,
            zero_inline: 0,
            supervisor_id: 0,
            data: [NO_DATA; DATA_ENTRIES],
            fetch: [NO_FETCH; FETCH_ENTRIES],
            fetch_pages: [0; FETCH_ENTRIES],
            ram_base: 0,
            ram_len: 0,
            ram_bias: 0,
            code_generation: 0,
            stop_pages: [0; STOP_PAGES],
            stop_serial: 0,
        }
    }

    /// Binds the tables to RAM at a guest physical address, which must not move; entries of another are dropped.
    #[inline]
    pub fn bind(&mut self, ram: &mut [u8], gpa: u64) {
        let (base, len) = (ram.as_mut_ptr() as u64, ram.len() as u64);
        if (self.ram_base, self.ram_len) != (base, len) {
            self.flush();
            (self.ram_base, self.ram_len) = (base, len);
        }
        self.ram_bias = base.wrapping_sub(gpa);
    }

    /// Whether these tables are bound to this RAM.
    pub(crate) fn is_bound_to(&self, ram: &[u8]) -> bool {
        (self.ram_base, self.ram_len) == (ram.as_ptr() as u64, ram.len() as u64)
    }

    /// Chooses the contexts, each below [`IDS`], of data accesses and fetches, and the number of their address space.
    #[inline]
    pub fn set_ids(&mut self, data: u64, fetch: u64, space: u64) {
        let salt = Self::salt(space);
        self.data_salt = salt << DATA_SHIFT & ((DATA_ENTRIES - 1) << DATA_SHIFT) as u32;
        self.fetch_salt = salt << FETCH_SHIFT & ((FETCH_ENTRIES - 1) << FETCH_SHIFT) as u32;
        self.data_id = data;
        self.fetch_id = fetch;
    }

    fn stop_index(va: u64) -> usize {
        (va >> PAGE_SHIFT) as usize & (STOP_PAGES - 1)
    }

    /// Names the pages with breakpoints, unless they are those of this number already. There are none at number 0.
    #[inline]
    pub fn sync_stops(&mut self, serial: u64, pages: impl Iterator<Item = u64>) {
        if self.stop_serial != serial {
            self.stop_serial = serial;
            self.stop_pages.fill(0);
            pages.for_each(|va| self.stop_pages[Self::stop_index(va)] = 1);
        }
    }

    /// Whether there may be a breakpoint on the page of `va`.
    #[inline]
    #[must_use]
    pub fn may_stop(&self, va: u64) -> bool {
        self.stop_pages[Self::stop_index(va)] != 0
    }

    /// Says whether `cbo.zero` is allowed in the present mode.
    #[inline]
    pub fn set_zero_blocks(&mut self, allowed: bool) {
        self.zero_inline = u32::from(allowed);
    }

    /// Says whether the hart is in S-mode with nothing that makes its registers or accesses special, and the id of its data
    /// accesses without SUM; the next id is that with SUM.
    #[inline]
    pub fn set_supervisor(&mut self, plain: bool, id: u64) {
        self.csr_inline = u32::from(plain);
        self.supervisor_id = id;
    }

    /// The context of fetches.
    #[inline]
    #[must_use]
    pub fn fetch_id(&self) -> u64 {
        self.fetch_id
    }

    /// The context of data accesses.
    #[inline]
    #[must_use]
    pub fn data_id(&self) -> u64 {
        self.data_id
    }

    /// Scatters address spaces over the tables: processes use the same addresses, and the kernel's are in each of them. In one
    /// place for all, PostgreSQL's processes put out each other's entries at each switch.
    #[inline(always)]
    fn salt(space: u64) -> u32 {
        (space as u32).wrapping_mul(0x9e37_79b1) >> 16
    }

    #[inline(always)]
    fn data_place(va: u64, salt: u32) -> usize {
        ((va >> PAGE_SHIFT) as u32 ^ salt) as usize & (DATA_ENTRIES - 1)
    }

    #[inline(always)]
    fn fetch_place(va: u64, salt: u32) -> usize {
        ((va >> PAGE_SHIFT) as u32 ^ salt) as usize & (FETCH_ENTRIES - 1)
    }

    #[inline(always)]
    fn data_index(&self, va: u64) -> usize {
        Self::data_place(va, self.data_salt >> DATA_SHIFT)
    }

    #[inline(always)]
    fn fetch_index(&self, va: u64) -> usize {
        Self::fetch_place(va, self.fetch_salt >> FETCH_SHIFT)
    }

    /// Offset into RAM for a load of `len` bytes, when its translation is here and it stays in one page.
    #[inline(always)]
    #[must_use]
    pub fn read_offset(&self, va: u64, len: u64) -> Option<usize> {
        let e = &self.data[self.data_index(va)];
        (e.read == va.wrapping_add(len - 1) & !0xfff | self.data_id)
            .then(|| va.wrapping_add(e.add).wrapping_sub(self.ram_base) as usize)
    }

    /// The same for a store.
    #[inline(always)]
    #[must_use]
    pub fn write_offset(&self, va: u64, len: u64) -> Option<usize> {
        let e = &self.data[self.data_index(va)];
        (e.write == va.wrapping_add(len - 1) & !0xfff | self.data_id)
            .then(|| va.wrapping_add(e.add).wrapping_sub(self.ram_base) as usize)
    }

    /// Maps the page of `va` to the page of RAM that starts at `offset`, for loads, stores or both.
    ///
    /// # Panics
    /// When that page is not within the bound RAM.
    pub fn insert(&mut self, va: u64, offset: u64, read: bool, write: bool) {
        assert!(offset & 0xfff == 0 && offset + 4096 <= self.ram_len, "the page is RAM");
        let page = va & !0xfff;
        let tag = page | self.data_id;
        let index = self.data_index(va);
        let e = &mut self.data[index];
        let add = self.ram_base.wrapping_add(offset).wrapping_sub(page);
        let same = e.add == add;
        e.add = add;
        e.read = if read || (same && e.read == tag) { tag } else { NO_TAG };
        e.write = if write || (same && e.write == tag) { tag } else { NO_TAG };
    }

    /// Notes the table of entry points of the page of `va`.
    pub(crate) fn insert_fetch(&mut self, va: u64, table: u64, page: u32) {
        let tag = va & !0xfff | self.fetch_id;
        let index = self.fetch_index(va);
        self.fetch[index] = FetchEntry { tag, table };
        self.fetch_pages[index] = page;
    }

    /// The page of RAM that `va` is on, when it has a table of entry points.
    pub(crate) fn find_fetch(&self, va: u64) -> Option<u32> {
        let index = self.fetch_index(va);
        let tag = self.fetch[index].tag;
        (tag == va & !0xfff | self.fetch_id).then_some(self.fetch_pages[index])
    }

    /// Drops everything.
    pub fn flush(&mut self) {
        self.data.fill(NO_DATA);
        self.fetch.fill(NO_FETCH);
    }

    /// Drops the tables of entry points.
    pub(crate) fn flush_fetch(&mut self) {
        self.fetch.fill(NO_FETCH);
    }

    /// Drops what is known of the page of `va` in the contexts of an address space.
    pub fn drop_page(&mut self, va: u64, space: u64) {
        let salt = Self::salt(space);
        let e = &mut self.data[Self::data_place(va, salt)];
        // The id in a tag is less than a page; no page has the number of `NO_TAG`'s.
        if e.read & !0xfff == va & !0xfff || e.write & !0xfff == va & !0xfff {
            *e = NO_DATA;
        }
        let e = &mut self.fetch[Self::fetch_place(va, salt)];
        if e.tag & !0xfff == va & !0xfff {
            *e = NO_FETCH;
        }
    }

    /// Drops every permission to write.
    pub fn drop_writes(&mut self) {
        for e in &mut self.data {
            e.write = NO_TAG;
        }
    }

    /// Drops the permissions to write to the page of RAM at `offset`.
    pub fn drop_writes_to(&mut self, offset: u64) {
        let host = self.ram_base.wrapping_add(offset);
        for e in &mut self.data {
            // The id in a tag is less than a page.
            if e.write != NO_TAG && (e.write & !0xfff).wrapping_add(e.add) == host {
                e.write = NO_TAG;
            }
        }
    }

    /// Flags raised by inline floating-point code since the last call, as `fflags` has them.
    #[inline]
    pub fn take_fp_flags(&mut self) -> u64 {
        let raised = self.mxcsr & 0x3d;
        if raised == 0 {
            return 0;
        }
        self.mxcsr &= !0x3f;
        fflags(raised)
    }

    /// Sets the dynamic rounding mode, `frm`, and whether floating-point state is dirty, so that inline code need not
    /// make it so.
    #[inline]
    pub fn set_fp(&mut self, frm: u64, dirty: bool) {
        // RNE RTZ RDN RUP are 0 to 3 for RISC-V, and 0, 3, 1, 2 for MXCSR.
        let rc = match frm {
            0 => Some(0),
            1 => Some(3),
            2 => Some(1),
            3 => Some(2),
            _ => None,
        };
        self.mxcsr = self.mxcsr & !0x6000 | rc.unwrap_or(0) << 13;
        self.frm_inline = u32::from(rc.is_some());
        self.fp_inline = u32::from(rc.is_some() && dirty);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_serve_their_context_and_their_page_alone() {
        let mut ram = vec![0u8; 4 * 4096];
        let mut t = Tables::new();
        t.bind(&mut ram, 0x8000_0000);
        t.set_ids(7, 7, 1);
        t.insert(0x5000, 0x1000, true, false);
        assert_eq!(t.read_offset(0x5ff8, 8), Some(0x1ff8));
        assert_eq!(t.read_offset(0x5ff9, 8), None);
        assert_eq!(t.write_offset(0x5ff8, 8), None);
        t.insert(0x5000, 0x1000, false, true);
        assert_eq!(t.read_offset(0x5000, 1), Some(0x1000), "a page that is read stays readable");
        assert_eq!(t.write_offset(0x5000, 1), Some(0x1000));
        t.set_ids(8, 8, 1);
        assert_eq!(t.read_offset(0x5000, 1), None);
        t.set_ids(7, 7, 1);
        t.drop_page(0x5000, 2);
        assert_eq!(t.write_offset(0x5000, 1), Some(0x1000), "it is another address space's page");
        t.drop_writes_to(0x1000);
        assert_eq!(t.write_offset(0x5000, 1), None);
        assert_eq!(t.read_offset(0x5000, 1), Some(0x1000));
        t.drop_page(0x5fff, 1);
        assert_eq!(t.read_offset(0x5000, 1), None);
    }

    #[test]
    fn address_spaces_keep_the_same_addresses_side_by_side() {
        let mut ram = vec![0u8; 16 * 4096];
        let mut t = Tables::new();
        t.bind(&mut ram, 0x8000_0000);
        let spaces = 0..16;
        for space in spaces.clone() {
            t.set_ids(1 + 3 * space, 1 + 3 * space, space);
            t.insert(0x7000, space << PAGE_SHIFT, true, false);
            t.insert_fetch(0x7000, 0, space as u32);
        }
        let kept = spaces.filter(|&space| {
            t.set_ids(1 + 3 * space, 1 + 3 * space, space);
            let (read, fetch) = (t.read_offset(0x7000, 8), t.find_fetch(0x7000));
            assert!(read.is_none_or(|at| at == (space as usize) << PAGE_SHIFT));
            assert!(fetch.is_none_or(|page| u64::from(page) == space));
            read.is_some() && fetch.is_some()
        });
        assert_eq!(kept.count(), 16);
    }

    #[test]
    fn flags_are_translated() {
        let mut t = Tables::new();
        t.mxcsr |= 0x21;
        assert_eq!(t.take_fp_flags(), 0x11);
        assert_eq!(t.take_fp_flags(), 0);
        t.mxcsr |= 0x1e; // denormal operand has no RISC-V flag
        assert_eq!(t.take_fp_flags(), 0xe);
    }
}

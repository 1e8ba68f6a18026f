//! Loads and stores: the software TLBs and the slow paths behind them.
//!
//! # Invariants
//! - INV-TLB-1: entries of a context are those of one address space since its page tables last changed.
//! - INV-TLB-2: permission to write is given to pages without tracking alone, and taken back when tracking begins.

use jit::Tables;

use crate::hart::csr::envcfg;
use crate::hart::pmp::Access;
use crate::hart::{Hart, Mode, Trap, mstatus};
use crate::mmu::{self, Context};
use crate::ram::{GuestRam, PAGE_SHIFT, PteChange, RAM_BASE};

use super::cache_ops;
use super::run::Core;

/// Entries of the second-level TLB.
const SECOND: usize = 1 << 14;
/// Entries of the TLB for fetches: the interpreter's, and the second level behind that of generated code.
const CODE: usize = 1 << 14;
/// Contexts of one address space: U, S without SUM, S with SUM. M-mode has context 0, the others follow.
const KINDS: u64 = 3;
/// Address spaces told apart at once.
const SPACES_MAX: u64 = (jit::tables::IDS - 1) / KINDS;
/// Address spaces whose entries are found again.
const SPACES_KNOWN: usize = 64;
/// A tag that no address has.
const NO_TAG: u64 = u64::MAX;

/// A translation in the second level, where permissions are those of the PTE and of PMP.
#[derive(Debug, Clone, Copy)]
struct Second {
    tag: u64,
    page: u32,
    readable: bool,
    writable: bool,
}

/// A cached translation for fetches.
#[derive(Debug, Clone, Copy)]
struct CodeEntry {
    tag: u64,
    page: u32,
}

const NO_SECOND: Second = Second { tag: NO_TAG, page: 0, readable: false, writable: false };
const NO_CODE: CodeEntry = CodeEntry { tag: NO_TAG, page: 0 };

/// One hart's cached translations behind those in [`jit::Tables`].
///
/// Tags hold the number of a context, which stands for an address space (a value of `satp`, as of a generation of the page
/// tables) and a privilege: a change of context drops nothing.
#[derive(Debug)]
pub(super) struct Tlb {
    second: Box<[Second]>,
    code: Box<[CodeEntry]>,
    /// Values of `satp` and the serial numbers of their contexts.
    spaces: Vec<(u64, u64)>,
    /// Serial numbers given so far.
    serials: u64,
    translation_gen: u32,
    protect_gen: u32,
    must_flush: bool,
}

impl Tlb {
    pub(super) fn new() -> Self {
        Self {
            second: vec![NO_SECOND; SECOND].into(),
            code: vec![NO_CODE; CODE].into(),
            spaces: Vec::new(),
            serials: 0,
            translation_gen: 0,
            protect_gen: 0,
            must_flush: true,
        }
    }

    /// Drops everything.
    pub(super) fn flush(&mut self, tables: &mut Tables) {
        tables.flush();
        self.second.fill(NO_SECOND);
        self.code.fill(NO_CODE);
        self.spaces.clear();
        self.serials = 0;
    }

    /// Drops everything, the hart's tables at the next [`Self::sync`].
    pub(super) fn drop_all(&mut self) {
        self.must_flush = true;
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        (size_of_val(&*self.second) + size_of_val(&*self.code)) as u64
    }

    /// Drops what became stale since the last call.
    #[inline]
    pub(super) fn sync(&mut self, hart: &mut Hart, ram: &mut GuestRam) {
        if self.must_flush {
            self.must_flush = false;
            self.flush(&mut hart.tables);
            self.set_context(hart);
        }
        if self.translation_gen != ram.translation_gen() {
            self.translation_gen = ram.translation_gen();
            self.spaces.clear();
            self.set_context(hart);
        }
        if ram.has_pte_changes() {
            for change in ram.take_pte_changes() {
                self.drop_page(hart, change);
            }
        }
        if self.protect_gen != ram.protect_gen() {
            self.protect_gen = ram.protect_gen();
            hart.tables.drop_writes();
        }
    }

    pub(super) fn is_stale(&self, ram: &GuestRam) -> bool {
        self.translation_gen != ram.translation_gen()
            || ram.code_was_written()
            || ram.has_pte_changes()
    }

    /// Drops the translation of one page in one address space.
    fn drop_page(&mut self, hart: &mut Hart, change: PteChange) {
        let Some(&(_, serial)) = self.spaces.iter().find(|s| s.0 == change.satp) else { return };
        hart.tables.drop_page(change.va, serial);
        for id in 1 + serial * KINDS..1 + (serial + 1) * KINDS {
            let second = &mut self.second[second_index(change.va, id)];
            if second.tag == change.va | id {
                *second = NO_SECOND;
            }
            let code = &mut self.code[code_index(change.va, id)];
            if code.tag == change.va | id {
                *code = NO_CODE;
            }
        }
    }

    /// Chooses the context for the hart's present privilege and address space.
    #[inline]
    pub(super) fn set_context(&mut self, hart: &mut Hart) {
        let space = match self.spaces.first() {
            Some(&(satp, serial)) if satp == hart.csr.satp => serial,
            _ => self.space(hart),
        };
        let first = 1 + space * KINDS;
        let data = match hart.data_mode() {
            Mode::User => first,
            Mode::Supervisor => first + 1 + u64::from(hart.csr.mstatus & mstatus::SUM != 0),
            Mode::Machine => 0,
        };
        let fetch = match hart.mode {
            Mode::User => first,
            Mode::Supervisor => first + 1,
            Mode::Machine => 0,
        };
        hart.tables.set_ids(data, fetch, space);
        let plain =
            hart.mode == Mode::Supervisor && hart.csr.mstatus & (mstatus::MPRV | mstatus::TVM) == 0;
        hart.tables.set_supervisor(plain, first + 1);
        let zeroes = cache_ops::is_enabled(hart, envcfg::CBZE);
        hart.tables.set_zero_blocks(zeroes);
    }

    /// Serial number of the present address space, which becomes the first known one.
    fn space(&mut self, hart: &mut Hart) -> u64 {
        let satp = hart.csr.satp;
        let known = self.spaces.iter().position(|s| s.0 == satp);
        let space = match known {
            Some(at) => self.spaces.remove(at),
            None => {
                self.spaces.truncate(SPACES_KNOWN - 1);
                if self.serials >= SPACES_MAX {
                    self.flush(&mut hart.tables);
                }
                self.serials += 1;
                (satp, self.serials - 1)
            }
        };
        self.spaces.insert(0, space);
        space.1
    }
}

/// Contexts that use the same address, a process and the kernel that copies from it, have places of their own.
fn second_index(va: u64, id: u64) -> usize {
    ((va >> PAGE_SHIFT) ^ id.wrapping_mul(0x9e5)) as usize & (SECOND - 1)
}

fn code_index(va: u64, id: u64) -> usize {
    ((va >> PAGE_SHIFT) ^ id.wrapping_mul(0x9e5)) as usize & (CODE - 1)
}

/// What a slow store leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// Go on.
    Plain,
    /// Fetch anew: code or page tables changed.
    Refetch,
    /// End the run: a device was written, or there is something to tell of what was watched.
    Attention,
}

fn page_of(offset: usize) -> u32 {
    (offset >> PAGE_SHIFT) as u32
}

fn fits_in_page(va: u64, len: u64) -> bool {
    (va & 0xfff) + len <= 0x1000
}

impl Core<'_, '_> {
    fn data_context(&self) -> Context {
        let m = self.hart.csr.mstatus;
        Context {
            mode: self.hart.data_mode(),
            sum: m & mstatus::SUM != 0,
            mxr: m & mstatus::MXR != 0,
            satp: self.hart.csr.satp,
            menvcfg: self.hart.csr.menvcfg,
        }
    }

    /// Some page is tracked from now on: drops permissions to write to it, of every hart.
    fn writes_tracked(&mut self) {
        self.bus.ram.drop_write_permissions();
        self.tlb.sync(self.hart, self.bus.ram);
    }

    /// Pages became tracked as page tables.
    #[inline]
    fn tables_tracked(&mut self) {
        if !self.bus.ram.has_tracked() {
            return;
        }
        for page in self.bus.ram.take_tracked() {
            self.writes_tracked_to(page);
        }
    }

    /// As [`Self::writes_tracked`], for one known page.
    pub(super) fn writes_tracked_to(&mut self, page: u32) {
        if self.bus.smp {
            self.writes_tracked();
        } else {
            self.hart.tables.drop_writes_to(u64::from(page) << PAGE_SHIFT);
            self.bus.ram.revoke_write(page);
        }
    }

    /// Translates a data address and fills the TLBs where that is allowed.
    pub(super) fn translate_data(&mut self, va: u64, access: Access) -> Result<u64, Trap> {
        let write = access == Access::Write;
        let id = self.hart.tables.data_id();
        let known = &self.tlb.second[second_index(va, id)];
        if known.tag == va & !0xfff | id && (if write { known.writable } else { known.readable }) {
            let known = *known;
            self.fill(va, known, write);
            return Ok(RAM_BASE + (u64::from(known.page) << PAGE_SHIFT) + (va & 0xfff));
        }
        let ctx = self.data_context();
        let translated = mmu::translate(self.bus.ram, &self.hart.pmp, ctx, va, access);
        // A walk that faults has read the tables above, too.
        self.tables_tracked();
        let t = translated?;
        if let Some(off) = self.bus.ram.offset(t.gpa, 1) {
            // The walk may have changed the context's number.
            let id = self.hart.tables.data_id();
            let found = Second {
                tag: va & !0xfff | id,
                page: page_of(off),
                // A writable page is readable, as far as its PTE goes.
                readable: !write || self.hart.pmp.allows(t.gpa, ctx.mode, Access::Read),
                writable: t.writable && write,
            };
            self.fill(va, found, write);
            let place = &mut self.tlb.second[second_index(va, id)];
            let writable = place.tag == found.tag && place.page == found.page && place.writable;
            *place = Second { writable: found.writable || writable, ..found };
        }
        Ok(t.gpa)
    }

    fn fill(&mut self, va: u64, found: Second, write: bool) {
        if self.bus.ram.is_watched(found.page) {
            return;
        }
        let write = write && found.writable && self.bus.ram.is_fast_writable(found.page);
        if write {
            self.bus.ram.grant_write(found.page);
        }
        let offset = u64::from(found.page) << PAGE_SHIFT;
        self.hart.tables.insert(va, offset, found.readable, write);
    }

    /// A load that missed the TLB, crosses a page or reads a device. The flag says that the run has to end.
    #[cold]
    pub(super) fn load_slow(&mut self, va: u64, len: u64) -> Result<(u64, bool), Trap> {
        if !fits_in_page(va, len) {
            return self.load_across(va, len).map(|v| (v, self.bus.ram.has_watch_hit()));
        }
        let gpa = self.translate_data(va, Access::Read)?;
        let mut bytes = [0; 8];
        if self.bus.ram.read(gpa, &mut bytes[..len as usize]).is_ok() {
            self.bus.ram.note_access(gpa, len, false);
            return Ok((u64::from_le_bytes(bytes), self.bus.ram.has_watch_hit()));
        }
        // Only RAM does misaligned accesses; elsewhere there is nothing to emulate them with.
        if gpa & (len - 1) != 0 {
            return Err(mmu::access_fault(Access::Read, va));
        }
        let steps = self.steps - 1;
        let (board, mut ctx) = self.bus.device_ctx(steps);
        let value = board.read(gpa, len as u8, &mut ctx);
        let value = value.map_err(|_| mmu::access_fault(Access::Read, va))?;
        self.bus.ram.note_access(gpa, len, false);
        Ok((value, true))
    }

    fn load_across(&mut self, va: u64, len: u64) -> Result<u64, Trap> {
        let mut bytes = [0; 8];
        let first = (0x1000 - (va & 0xfff)) as usize;
        let lo = self.translate_data(va, Access::Read)?;
        let next = va.wrapping_add(first as u64);
        let hi = self.translate_data(next, Access::Read)?;
        let (a, b) = bytes[..len as usize].split_at_mut(first);
        self.bus.ram.read(lo, a).map_err(|_| mmu::access_fault(Access::Read, va))?;
        self.bus.ram.read(hi, b).map_err(|_| mmu::access_fault(Access::Read, next))?;
        self.bus.ram.note_access(lo, first as u64, false);
        self.bus.ram.note_access(hi, len - first as u64, false);
        Ok(u64::from_le_bytes(bytes))
    }

    /// A store that missed the TLB, crosses a page, is tracked or writes a device.
    #[cold]
    pub(super) fn store_slow(&mut self, va: u64, len: u64, value: u64) -> Result<Stored, Trap> {
        let bytes = value.to_le_bytes();
        let data = &bytes[..len as usize];
        if !fits_in_page(va, len) {
            return self.store_across(va, data);
        }
        let gpa = self.translate_data(va, Access::Write)?;
        if self.bus.ram.write(gpa, data).is_ok() {
            return Ok(self.after_store());
        }
        if gpa & (len - 1) != 0 {
            return Err(mmu::access_fault(Access::Write, va));
        }
        let steps = self.steps - 1;
        let (board, mut ctx) = self.bus.device_ctx(steps);
        let masked = if len == 8 { value } else { value & ((1 << (8 * len)) - 1) };
        board
            .write(gpa, len as u8, masked, &mut ctx)
            .map_err(|_| mmu::access_fault(Access::Write, va))?;
        self.bus.ram.note_access(gpa, len, true);
        Ok(Stored::Attention)
    }

    fn store_across(&mut self, va: u64, data: &[u8]) -> Result<Stored, Trap> {
        let first = (0x1000 - (va & 0xfff)) as usize;
        let next = va.wrapping_add(first as u64);
        let lo = self.translate_data(va, Access::Write)?;
        let hi = self.translate_data(next, Access::Write)?;
        let in_ram = |gpa| self.bus.ram.offset(gpa, 1).is_some();
        if !in_ram(lo) {
            return Err(mmu::access_fault(Access::Write, va));
        }
        if !in_ram(hi) {
            return Err(mmu::access_fault(Access::Write, next));
        }
        self.bus.ram.write(lo, &data[..first]).expect("checked to be RAM");
        self.bus.ram.write(hi, &data[first..]).expect("checked to be RAM");
        Ok(self.after_store())
    }

    /// Looks whether a tracked store changed what is cached, or what is watched.
    pub(super) fn after_store(&mut self) -> Stored {
        if self.bus.ram.has_watch_hit() {
            return Stored::Attention;
        }
        if self.tlb.is_stale(self.bus.ram) { Stored::Refetch } else { Stored::Plain }
    }

    /// Finds the page of RAM that `pc` is on.
    #[inline]
    pub(super) fn fetch_page(&mut self, pc: u64) -> Result<u32, Trap> {
        let id = self.hart.tables.fetch_id();
        let tag = pc & !0xfff | id;
        let entry = self.tlb.code[code_index(pc, id)];
        if entry.tag == tag {
            return Ok(entry.page);
        }
        let gpa = self.translate_fetch(pc)?;
        let page = ((gpa - RAM_BASE) >> PAGE_SHIFT) as u32;
        // The walk may have changed the context's number, if it ran out of them.
        let id = self.hart.tables.fetch_id();
        self.tlb.code[code_index(pc, id)] = CodeEntry { tag: pc & !0xfff | id, page };
        Ok(page)
    }

    /// Translates a fetch; only RAM is executable.
    pub(super) fn translate_fetch(&mut self, va: u64) -> Result<u64, Trap> {
        let ctx = Context { mode: self.hart.mode, ..self.data_context() };
        let translated = mmu::translate(self.bus.ram, &self.hart.pmp, ctx, va, Access::Execute);
        // A walk that faults has read the tables above, too.
        self.tables_tracked();
        let t = translated?;
        if self.bus.ram.offset(t.gpa & !0xfff, 0x1000).is_none() {
            return Err(mmu::access_fault(Access::Execute, va));
        }
        Ok(t.gpa)
    }
}

//! Loads and stores: the software TLB and the slow paths behind it.

use crate::hart::pmp::Access;
use crate::hart::{Hart, Mode, Trap, mstatus};
use crate::mmu::{self, Context};
use crate::ram::{GuestRam, PAGE_SHIFT, RAM_BASE};

use super::run::Core;

/// Entries of one set of a TLB.
const SET: usize = 256;
/// Contexts of data accesses: U, S without SUM, S with SUM, M.
const DATA_SETS: usize = 4;
/// Contexts of fetches: U, S, M.
const CODE_SETS: usize = 3;
/// A tag that no address has.
const NO_TAG: u64 = u64::MAX;

/// A cached translation for data: RAM offset = virtual address + `add`.
#[derive(Debug, Clone, Copy)]
pub(super) struct DataEntry {
    pub(super) tag: u64,
    pub(super) add: u64,
}

/// A cached translation for fetches: the page's index in the code cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct CodeEntry {
    pub(super) tag: u64,
    pub(super) index: u32,
}

/// One hart's cached translations.
#[derive(Debug)]
pub(super) struct Tlb {
    pub(super) read: Box<[DataEntry; SET * DATA_SETS]>,
    pub(super) write: Box<[DataEntry; SET * DATA_SETS]>,
    pub(super) code: Box<[CodeEntry; SET * CODE_SETS]>,
    data_base: usize,
    code_base: usize,
    translation_gen: u32,
    protect_gen: u32,
    code_gen: u64,
}

const NO_DATA: DataEntry = DataEntry { tag: NO_TAG, add: 0 };
const NO_CODE: CodeEntry = CodeEntry { tag: NO_TAG, index: 0 };

impl Tlb {
    pub(super) fn new() -> Self {
        Self {
            read: Box::new([NO_DATA; SET * DATA_SETS]),
            write: Box::new([NO_DATA; SET * DATA_SETS]),
            code: Box::new([NO_CODE; SET * CODE_SETS]),
            data_base: 0,
            code_base: 0,
            translation_gen: 0,
            protect_gen: 0,
            code_gen: 0,
        }
    }

    pub(super) fn flush(&mut self) {
        self.read.fill(NO_DATA);
        self.write.fill(NO_DATA);
        self.code.fill(NO_CODE);
    }

    /// Drops what became stale since the last call.
    pub(super) fn sync(&mut self, ram: &GuestRam) {
        if self.translation_gen != ram.translation_gen() {
            self.translation_gen = ram.translation_gen();
            self.flush();
        }
        if self.protect_gen != ram.protect_gen() {
            self.protect_gen = ram.protect_gen();
            self.write.fill(NO_DATA);
        }
    }

    pub(super) fn is_stale(&self, ram: &GuestRam) -> bool {
        self.translation_gen != ram.translation_gen() || ram.code_was_written()
    }

    /// Drops slots when the code cache was cleared.
    pub(super) fn sync_code(&mut self, generation: u64) {
        if self.code_gen != generation {
            self.code_gen = generation;
            self.code.fill(NO_CODE);
        }
    }

    /// Chooses the sets for the hart's present privilege.
    pub(super) fn set_context(&mut self, hart: &Hart) {
        let data = match hart.data_mode() {
            Mode::User => 0,
            Mode::Supervisor => 1 + usize::from(hart.csr.mstatus & mstatus::SUM != 0),
            Mode::Machine => 3,
        };
        self.data_base = data * SET;
        self.code_base = match hart.mode {
            Mode::User => 0,
            Mode::Supervisor => SET,
            Mode::Machine => 2 * SET,
        };
    }

    #[inline(always)]
    pub(super) fn data_index(&self, va: u64) -> usize {
        (self.data_base + ((va >> PAGE_SHIFT) as usize & (SET - 1))) & (SET * DATA_SETS - 1)
    }

    #[inline(always)]
    pub(super) fn code_index(&self, va: u64) -> usize {
        self.code_base + ((va >> PAGE_SHIFT) as usize & (SET - 1))
    }

    /// Drops write permissions for a RAM page that is tracked from now on.
    fn drop_writes_to(&mut self, page: u32) {
        for e in self.write.iter_mut() {
            if e.tag != NO_TAG && e.tag.wrapping_add(e.add) >> PAGE_SHIFT == u64::from(page) {
                *e = NO_DATA;
            }
        }
    }
}

/// What a slow store leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// Go on.
    Plain,
    /// Fetch anew: code or page tables changed.
    Refetch,
    /// A device was written.
    Device,
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
        self.tlb.sync(self.bus.ram);
    }

    /// As [`Self::writes_tracked`], for one known page.
    pub(super) fn writes_tracked_to(&mut self, page: u32) {
        if self.bus.smp {
            self.writes_tracked();
        } else {
            self.tlb.drop_writes_to(page);
        }
    }

    /// Translates a data address and fills the TLB where that is allowed.
    pub(super) fn translate_data(&mut self, va: u64, access: Access) -> Result<u64, Trap> {
        let ctx = self.data_context();
        let t = mmu::translate(self.bus.ram, &self.hart.pmp, ctx, va, access)?;
        if t.tracked_new {
            self.writes_tracked();
        }
        if let Some(off) = self.bus.ram.offset(t.gpa, 1) {
            let index = self.tlb.data_index(va);
            let entry = DataEntry { tag: va & !0xfff, add: (off as u64).wrapping_sub(va) };
            // A writable page is readable, as far as its PTE goes.
            if access == Access::Read || self.hart.pmp.allows(t.gpa, ctx.mode, Access::Read) {
                self.tlb.read[index] = entry;
            }
            if t.writable && access == Access::Write && self.bus.ram.is_fast_writable(page_of(off))
            {
                self.tlb.write[index] = entry;
            }
        }
        Ok(t.gpa)
    }

    /// A load that missed the TLB, crosses a page or reads a device. The flag says that a device was read.
    #[cold]
    pub(super) fn load_slow(&mut self, va: u64, len: u64) -> Result<(u64, bool), Trap> {
        if !fits_in_page(va, len) {
            return self.load_across(va, len).map(|v| (v, false));
        }
        let gpa = self.translate_data(va, Access::Read)?;
        let mut bytes = [0; 8];
        if self.bus.ram.read(gpa, &mut bytes[..len as usize]).is_ok() {
            return Ok((u64::from_le_bytes(bytes), false));
        }
        // Only RAM does misaligned accesses; elsewhere there is nothing to emulate them with.
        if gpa & (len - 1) != 0 {
            return Err(mmu::access_fault(Access::Read, va));
        }
        let steps = self.steps - 1;
        let (board, mut ctx) = self.bus.device_ctx(steps);
        let value = board.read(gpa, len as u8, &mut ctx);
        value.map(|v| (v, true)).map_err(|_| mmu::access_fault(Access::Read, va))
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
        Ok(Stored::Device)
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

    /// Looks whether a tracked store changed what is cached.
    pub(super) fn after_store(&mut self) -> Stored {
        if self.tlb.is_stale(self.bus.ram) { Stored::Refetch } else { Stored::Plain }
    }

    /// Finds the decoded page that `pc` is on.
    pub(super) fn fetch_code(&mut self, pc: u64) -> Result<u32, Trap> {
        let index = self.tlb.code_index(pc);
        let entry = self.tlb.code[index];
        if entry.tag == pc & !0xfff {
            return Ok(entry.index);
        }
        let gpa = self.translate_fetch(pc)?;
        let page = ((gpa - RAM_BASE) >> PAGE_SHIFT) as u32;
        let code = self.code.index(page, self.bus.ram);
        self.tlb.sync_code(self.code.generation);
        self.tlb.code[index] = CodeEntry { tag: pc & !0xfff, index: code };
        Ok(code)
    }

    /// Translates a fetch; only RAM is executable.
    pub(super) fn translate_fetch(&mut self, va: u64) -> Result<u64, Trap> {
        let ctx = Context { mode: self.hart.mode, ..self.data_context() };
        let t = mmu::translate(self.bus.ram, &self.hart.pmp, ctx, va, Access::Execute)?;
        if t.tracked_new {
            self.writes_tracked();
        }
        if self.bus.ram.offset(t.gpa & !0xfff, 0x1000).is_none() {
            return Err(mmu::access_fault(Access::Execute, va));
        }
        Ok(t.gpa)
    }
}

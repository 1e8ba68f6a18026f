//! Decoded instructions, a page at a time.

use isa::{Insn, Op};

use crate::ram::{GuestRam, PAGE_SHIFT, PAGE_SIZE, RAM_BASE};

/// Halfwords in a page.
pub(super) const SLOTS: usize = PAGE_SIZE / 2;
/// Decoded pages kept at most; about 64 MiB.
const PAGES_MAX: usize = 4096;

/// `Slot::imm` of an [`Op::Illegal`] that stands for something else than an illegal instruction.
pub(super) mod marker {
    /// Not decoded yet.
    pub(in super::super) const UNDECODED: i32 = 1;
    /// Past the last halfword of the page.
    pub(in super::super) const PAGE_END: i32 = 2;
    /// A four-byte instruction whose second half is on the next page.
    pub(in super::super) const STRADDLE: i32 = 3;
}

/// A decoded instruction in the form that the loop wants, in eight bytes: `rd` 32 for x0, branch offsets in halfwords.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) op: Op,
    pub(super) rd: u8,
    pub(super) rs1: u8,
    /// rs2 and, from bit 6 on, the length in halfwords.
    rs2_len: u8,
    /// The immediate; for floating-point arithmetic rm and, from bit 8 on, rs3.
    pub(super) imm: i32,
}

impl Slot {
    const fn mark(imm: i32) -> Self {
        Self { op: Op::Illegal, rd: 0, rs1: 0, rs2_len: 1 << 6, imm }
    }

    #[inline(always)]
    pub(super) fn rs2(&self) -> u8 {
        self.rs2_len & 63
    }

    /// Length in halfwords.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        usize::from(self.rs2_len >> 6)
    }

    fn pack(insn: &Insn) -> Self {
        let imm = match insn.op {
            Op::Jal | Op::Beq | Op::Bne | Op::Blt | Op::Bge | Op::Bltu | Op::Bgeu => insn.imm >> 1,
            op if op >= Op::FmaddS && insn.imm == 0 && !is_float_memory(op) => {
                i32::from(insn.rm) | i32::from(insn.rs3) << 8
            }
            _ => insn.imm,
        };
        Self {
            op: insn.op,
            rd: if insn.rd == 0 { 32 } else { insn.rd },
            rs1: insn.rs1,
            rs2_len: insn.rs2 | insn.len >> 1 << 6,
            imm,
        }
    }

    /// The instruction as the rarer paths want it; `rd` stays 32 for x0, `len` is in bytes.
    pub(super) fn unpack(&self) -> Insn {
        let float = self.op >= Op::FmaddS && !is_float_memory(self.op);
        Insn {
            imm: if float { 0 } else { self.imm },
            op: self.op,
            rd: self.rd,
            rs1: self.rs1,
            rs2: self.rs2(),
            rs3: if float { (self.imm >> 8) as u8 } else { 0 },
            rm: if float { self.imm as u8 } else { 0 },
            len: (self.rs2_len >> 6) << 1,
        }
    }
}

fn is_float_memory(op: Op) -> bool {
    matches!(op, Op::Flw | Op::Fsw | Op::Fld | Op::Fsd)
}

/// Index of the slot that holds a straddling instruction while it is executed.
pub(super) const STRADDLE_SLOT: usize = SLOTS + 2;

/// The page's instructions by halfword; two more slots catch running off the end, one holds a straddling instruction.
pub(super) type CodePage = [Slot; SLOTS + 3];

fn empty_page() -> Box<CodePage> {
    let mut page = vec![Slot::mark(marker::UNDECODED); SLOTS + 3];
    page[SLOTS..].fill(Slot::mark(marker::PAGE_END));
    page.into_boxed_slice().try_into().expect("length is that of CodePage")
}

/// Decodes an instruction of either length.
pub(super) fn predecode(raw: u32) -> Slot {
    Slot::pack(&isa::decode(raw))
}

/// All decoded pages.
#[derive(Debug)]
pub(super) struct CodeCache {
    /// Slot number + 1 by RAM page.
    by_page: Vec<u32>,
    pages: Vec<Option<Box<CodePage>>>,
    /// RAM page by slot.
    owner: Vec<u32>,
    /// Raised when slots changed owner, so that TLBs that name slots are dropped.
    pub(super) generation: u64,
}

impl CodeCache {
    pub(super) fn new(ram_pages: u32) -> Self {
        Self { by_page: vec![0; ram_pages as usize], pages: Vec::new(), owner: Vec::new(), generation: 0 }
    }

    /// Slot of a RAM page, made when there is none.
    pub(super) fn slot(&mut self, page: u32, ram: &mut GuestRam) -> u32 {
        let known = self.by_page[page as usize];
        if known != 0 {
            return known - 1;
        }
        if self.pages.len() >= PAGES_MAX {
            self.clear(ram);
        }
        self.pages.push(Some(empty_page()));
        self.owner.push(page);
        let slot = self.pages.len() as u32;
        self.by_page[page as usize] = slot;
        slot - 1
    }

    /// Takes a page out while it is executed; [`Self::put`] brings it back.
    pub(super) fn take(&mut self, slot: u32) -> Box<CodePage> {
        self.pages[slot as usize].take().expect("one page is out at a time, and is put back")
    }

    pub(super) fn put(&mut self, slot: u32, page: Box<CodePage>) {
        self.pages[slot as usize] = Some(page);
    }

    /// RAM page of a slot.
    pub(super) fn owner(&self, slot: u32) -> u32 {
        self.owner[slot as usize]
    }

    /// Forgets what was decoded from pages that were written.
    pub(super) fn drop_written(&mut self, ram: &mut GuestRam) {
        for page in ram.take_code_written() {
            let slot = self.by_page[page as usize];
            if let Some(Some(insns)) = slot.checked_sub(1).and_then(|s| self.pages.get_mut(s as usize)) {
                insns[..SLOTS].fill(Slot::mark(marker::UNDECODED));
            }
        }
    }

    pub(super) fn clear(&mut self, ram: &mut GuestRam) {
        for &page in &self.owner {
            self.by_page[page as usize] = 0;
            ram.unmark_code(page);
        }
        self.pages.clear();
        self.owner.clear();
        self.generation += 1;
    }
}

/// Decodes the instruction at halfword `index` of RAM page `page`. The flag says that stores to the page were fast until
/// now.
pub(super) fn decode_at(ram: &mut GuestRam, page: u32, index: usize) -> (Slot, bool) {
    let gpa = RAM_BASE + (u64::from(page) << PAGE_SHIFT) + index as u64 * 2;
    let low = ram.read_u16(gpa).expect("decoded pages are RAM");
    let long = low & 3 == 3;
    if long && index == SLOTS - 1 {
        let tracked = ram.mark_code(page, index * 2, 2);
        return (Slot::mark(marker::STRADDLE), tracked);
    }
    let high = if long { ram.read_u16(gpa + 2).expect("decoded pages are RAM") } else { 0 };
    let tracked = ram.mark_code(page, index * 2, if long { 4 } else { 2 });
    (predecode(u32::from(low) | u32::from(high) << 16), tracked)
}

//! Decoded instructions, a page at a time.
//!
//! A page's instructions are decoded into runs: what follows an instruction in memory follows it in the run, so that the
//! loop goes from one to the next without knowing lengths. A run ends behind an unconditional jump, at the end of the
//! page, or with a [`marker`] that leads on.
//!
//! # Invariants
//! - INV-CODE-1: `map[h]` is the slot of the instruction at halfword `h`, or 0; slot 0 is no instruction of the page.
//! - INV-CODE-2: a taken branch within the page is patched to its target's slot; dropping the page drops every patch.
//! - INV-CODE-3: every halfword that a slot was decoded from is marked in [`GuestRam`].
//! - INV-CODE-4: a page has at most one slot a halfword and one marker a run, so at most 2 x 2048 + 1.

use isa::{Insn, Op};
use jit::Stops;

use crate::ram::{GuestRam, PAGE_SHIFT, PAGE_SIZE, RAM_BASE};

/// Halfwords in a page.
pub(super) const HALFWORDS: usize = PAGE_SIZE / 2;
/// Decoded pages kept at most by the interpreter alone; a fully used one takes some 40 KiB.
pub(super) const PAGES_MAX: usize = 4096;
/// The same beside the JIT, which leaves little to the interpreter.
pub(super) const PAGES_MAX_JIT: usize = 512;
/// Instructions decoded ahead at most.
const RUN_MAX: usize = 48;
/// `Slot::imm` of an [`Op::Illegal`] that stands for something else than an illegal instruction.
pub(super) mod marker {
    /// Past the end of the page.
    pub(in super::super) const PAGE_END: i32 = 1;
    /// A four-byte instruction whose second half is on the next page.
    pub(in super::super) const STRADDLE: i32 = 2;
    /// The instruction at this place is in another run, or not decoded yet.
    pub(in super::super) const CONTINUE: i32 = 3;
    /// The same, with the slot in the other fields.
    pub(in super::super) const GOTO: i32 = 4;
    /// An instruction that there may be a breakpoint at: it is decoded each time.
    pub(in super::super) const STOP: i32 = 5;
}

/// A decoded instruction in the form that the loop wants, in eight bytes: `rd` 32 for x0, branch offsets in halfwords,
/// upper immediates not shifted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) op: Op,
    pub(super) rd: u8,
    pub(super) rs1: u8,
    pub(super) rs2: u8,
    /// The length in halfwords and, from bit 8 on, the immediate; for floating-point arithmetic rm and rs3 (from bit 16
    /// on), for a patched jump the slot of its target. Nothing here needs more than 24 bits.
    imm_len: i32,
}

impl Slot {
    const fn new(op: Op, imm: i32, len: i32) -> Self {
        Self { op, rd: 0, rs1: 0, rs2: 0, imm_len: imm << 8 | len }
    }

    const fn mark(imm: i32) -> Self {
        Self::new(Op::Illegal, imm, 1)
    }

    /// The immediate in this form.
    #[inline(always)]
    pub(super) fn imm(&self) -> i32 {
        self.imm_len >> 8
    }

    /// Length in halfwords.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        (self.imm_len & 0xff) as usize
    }

    /// Slot that a patched branch goes to. Branches have no `rd`: it says that they are patched.
    #[inline(always)]
    pub(super) fn branch_target(&self) -> Option<usize> {
        (self.rd != 0).then_some((self.imm_len >> 8) as usize)
    }

    /// Slot that a patched JAL goes to; `rs1` says that it is patched.
    #[inline(always)]
    pub(super) fn jal_target(&self) -> Option<usize> {
        (self.rs1 != 0).then_some((self.imm_len >> 8) as usize)
    }

    fn patch(&mut self, target: usize) {
        if self.op == Op::Jal {
            self.rs1 = 1;
        } else {
            self.rd = 1;
        }
        self.imm_len = (target as i32) << 8 | self.imm_len & 0xff;
    }

    fn pack(insn: &Insn) -> Self {
        let is_branch = is_branch(insn.op);
        let imm = match insn.op {
            Op::Jal | Op::Beq | Op::Bne | Op::Blt | Op::Bge | Op::Bltu | Op::Bgeu => insn.imm >> 1,
            Op::Lui | Op::Auipc => insn.imm >> 12,
            // Its operands change nothing, and the field is that of the markers.
            Op::Illegal => 0,
            op if is_float_arithmetic(op) => i32::from(insn.rm) | i32::from(insn.rs3) << 8,
            _ => insn.imm,
        };
        let rd = match insn.rd {
            _ if is_branch => 0,
            0 => 32,
            rd => rd,
        };
        Self {
            rd,
            rs1: insn.rs1,
            rs2: insn.rs2,
            ..Self::new(insn.op, imm, i32::from(insn.len >> 1))
        }
    }

    /// The instruction as the rarer paths want it; `rd` stays 32 for x0, `len` is in bytes.
    pub(super) fn unpack(&self) -> Insn {
        let float = is_float_arithmetic(self.op);
        let imm = self.imm();
        Insn {
            imm: if float { 0 } else { imm },
            op: self.op,
            rd: self.rd,
            rs1: self.rs1,
            rs2: self.rs2,
            rs3: if float { (imm >> 8) as u8 } else { 0 },
            rm: if float { imm as u8 } else { 0 },
            len: (self.len() * 2) as u8,
        }
    }
}

fn is_branch(op: Op) -> bool {
    matches!(op, Op::Beq | Op::Bne | Op::Blt | Op::Bge | Op::Bltu | Op::Bgeu)
}

fn is_float_arithmetic(op: Op) -> bool {
    op >= Op::FmaddS && !matches!(op, Op::Flw | Op::Fsw | Op::Fld | Op::Fsd)
}

/// Nothing behind it is executed next.
fn ends_run(op: Op) -> bool {
    matches!(op, Op::Jal | Op::Jalr | Op::Mret | Op::Sret | Op::Ecall | Op::Ebreak | Op::Illegal)
}

/// Decodes an instruction of either length.
pub(super) fn predecode(raw: u32) -> Slot {
    Slot::pack(&isa::decode(raw))
}

/// The decoded instructions of a RAM page.
#[derive(Debug)]
pub(super) struct CodePage {
    /// Slot by halfword.
    map: Box<[u16; HALFWORDS]>,
    /// Slot 0 holds a straddling instruction while it is executed.
    pub(super) slots: Vec<Slot>,
    /// Halfword by slot.
    halfwords: Vec<u16>,
    page: u32,
    /// Offsets at which there may be a breakpoint.
    stops: Stops,
}

impl CodePage {
    fn new(page: u32) -> Self {
        let mut code = Self {
            map: Box::new([0; HALFWORDS]),
            slots: Vec::new(),
            halfwords: Vec::new(),
            page,
            stops: Stops::default(),
        };
        code.clear();
        code
    }

    fn clear(&mut self) {
        self.map.fill(0);
        self.slots.clear();
        self.halfwords.clear();
        self.push(Slot::mark(marker::PAGE_END), 0);
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.map)
            + self.slots.capacity() * size_of::<Slot>()
            + self.halfwords.capacity() * 2
    }

    fn push(&mut self, slot: Slot, halfword: usize) {
        self.slots.push(slot);
        self.halfwords.push(halfword as u16);
    }

    /// Halfword of the instruction in a slot; for the end of the page, the one behind the last.
    #[inline(always)]
    pub(super) fn halfword(&self, slot: usize) -> usize {
        usize::from(self.halfwords[slot])
    }

    /// The RAM page.
    pub(super) fn ram_page(&self) -> u32 {
        self.page
    }

    /// Slot of the instruction at a halfword, if it is decoded.
    #[inline(always)]
    pub(super) fn find(&self, halfword: usize) -> Option<usize> {
        match self.map[halfword] {
            0 => None,
            slot => Some(usize::from(slot)),
        }
    }

    /// Slot of the instruction at a halfword, decoded now if need be; the flag says that stores to the page were fast
    /// until now.
    #[cold]
    #[inline(never)]
    pub(super) fn find_or_decode(&mut self, ram: &mut GuestRam, halfword: usize) -> (usize, bool) {
        if let Some(slot) = self.find(halfword) {
            return (slot, false);
        }
        let first = self.slots.len();
        let (mut h, mut tracked) = (halfword, false);
        loop {
            if h >= HALFWORDS {
                self.push(Slot::mark(marker::PAGE_END), h);
                break;
            }
            if self.map[h] != 0 || self.slots.len() - first >= RUN_MAX {
                self.push(Slot::mark(marker::CONTINUE), h);
                break;
            }
            let (slot, newly) = decode_at(ram, self.page, h);
            tracked |= newly;
            self.map[h] = self.slots.len() as u16;
            let stops = self.stops.contains(h as u16 * 2);
            self.push(if stops { Slot::mark(marker::STOP) } else { slot }, h);
            let straddles = slot.is_straddling();
            h += if straddles { 2 } else { slot.len() };
            if ends_run(slot.op) && !straddles {
                break;
            }
        }
        (first, tracked)
    }

    /// Has the loop stop at these offsets, and maybe others. What was decoded is forgotten when it does not yet.
    pub(super) fn require_stops(&mut self, stops: &Stops) {
        if !self.stops.includes(stops) {
            self.stops.add(stops);
            self.clear();
        }
    }

    /// The instruction in the place of a [`marker::STOP`].
    pub(super) fn behind_stop(&self, ram: &mut GuestRam, halfword: usize) -> Slot {
        decode_at(ram, self.page, halfword).0
    }

    /// Makes the jump in `slot` go to the instruction at `halfword` from now on.
    pub(super) fn patch(&mut self, slot: usize, target: usize) {
        self.slots[slot].patch(target);
    }

    /// Makes the end of a run lead on to `target`.
    pub(super) fn patch_continue(&mut self, slot: usize, target: usize) {
        let [rs1, rs2, ..] = (target as u32).to_le_bytes();
        self.slots[slot] = Slot { rs1, rs2, ..Slot::mark(marker::GOTO) };
    }
}

impl Slot {
    /// Whether it stands for an instruction that ends on the next page.
    pub(super) fn is_straddling(&self) -> bool {
        self.op == Op::Illegal && self.imm() == marker::STRADDLE
    }

    /// Slot that [`marker::GOTO`] leads to.
    #[inline(always)]
    pub(super) fn goto_target(&self) -> usize {
        usize::from(self.rs1) | usize::from(self.rs2) << 8
    }
}

/// All decoded pages.
#[derive(Debug)]
pub(super) struct CodeCache {
    /// Index in `pages` + 1 by RAM page.
    by_page: Vec<u32>,
    pages: Vec<Option<Box<CodePage>>>,
    pages_max: usize,
}

impl CodeCache {
    pub(super) fn new(ram_pages: u32, pages_max: usize) -> Self {
        Self { by_page: vec![0; ram_pages as usize], pages: Vec::new(), pages_max }
    }

    /// Index of a RAM page's code, made when there is none.
    pub(super) fn index(&mut self, page: u32) -> u32 {
        let known = self.by_page[page as usize];
        if known != 0 {
            return known - 1;
        }
        if self.pages.len() >= self.pages_max {
            self.clear();
        }
        self.pages.push(Some(Box::new(CodePage::new(page))));
        let index = self.pages.len() as u32;
        self.by_page[page as usize] = index;
        index - 1
    }

    /// Takes a page out while it is executed; [`Self::put`] brings it back.
    pub(super) fn take(&mut self, index: u32) -> Box<CodePage> {
        self.pages[index as usize].take().expect("one page is out at a time, and is put back")
    }

    pub(super) fn put(&mut self, index: u32, page: Box<CodePage>) {
        self.pages[index as usize] = Some(page);
    }

    /// Forgets what was decoded from a page.
    pub(super) fn drop_page(&mut self, page: u32) {
        let index = self.by_page[page as usize];
        if let Some(Some(code)) = index.checked_sub(1).and_then(|i| self.pages.get_mut(i as usize))
        {
            code.clear();
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        let pages: usize = self.pages.iter().flatten().map(|page| page.bytes()).sum();
        (pages + self.by_page.len() * 4) as u64
    }

    /// Forgets everything. Pages stay marked in RAM: the JIT may have code of them.
    pub(super) fn clear(&mut self) {
        for code in self.pages.iter().flatten() {
            self.by_page[code.page as usize] = 0;
        }
        self.pages.clear();
    }
}

/// Decodes the instruction at a halfword of a RAM page. The flag says that stores to the page were fast until now.
fn decode_at(ram: &mut GuestRam, page: u32, halfword: usize) -> (Slot, bool) {
    let gpa = RAM_BASE + (u64::from(page) << PAGE_SHIFT) + halfword as u64 * 2;
    let low = ram.read_u16(gpa).expect("decoded pages are RAM");
    let long = low & 3 == 3;
    if long && halfword == HALFWORDS - 1 {
        let tracked = ram.mark_code(page, halfword * 2, 2);
        return (Slot::mark(marker::STRADDLE), tracked);
    }
    let high = if long { ram.read_u16(gpa + 2).expect("decoded pages are RAM") } else { 0 };
    let tracked = ram.mark_code(page, halfword * 2, if long { 4 } else { 2 });
    (predecode(u32::from(low) | u32::from(high) << 16), tracked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goto_keeps_its_target() {
        let mut page = CodePage::new(0);
        for target in [0, 1, 255, 256, 4095, 2 * HALFWORDS] {
            page.patch_continue(0, target);
            assert_eq!(page.slots[0].goto_target(), target);
            assert_eq!(page.slots[0].imm(), marker::GOTO);
        }
    }

    #[test]
    fn a_run_is_in_the_order_of_memory_and_joins_what_is_known() {
        let mut ram = GuestRam::new(2 * 4096);
        for i in 0..1024 {
            ram.write(RAM_BASE + i * 4, &0x0010_0093u32.to_le_bytes()).unwrap(); // addi x1, x0, 1
        }
        let mut page = CodePage::new(0);
        let (late, _) = page.find_or_decode(&mut ram, 8);
        let (early, _) = page.find_or_decode(&mut ram, 0);
        assert_eq!((0..4).map(|i| page.halfword(early + i)).collect::<Vec<_>>(), [0, 2, 4, 6]);
        assert_eq!(page.slots[early + 4].imm(), marker::CONTINUE);
        assert_eq!(page.find(8), Some(late));
        let (end, _) = page.find_or_decode(&mut ram, 2046);
        assert_eq!(page.slots[end + 1].imm(), marker::PAGE_END);
        assert_eq!(page.halfword(end + 1), 2048);
    }
}

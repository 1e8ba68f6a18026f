//! Translation of a run of instructions on one page into host code.
//!
//! # Invariants
//! - INV-EMIT-1: a block charges all its steps when it is entered; whoever leaves it before its end gives back what was
//!   not made.
//! - INV-EMIT-2: an instruction changes nothing before everything that it can fault on has been checked.
//! - INV-EMIT-3: code depends on the page's contents and on offsets within the page, never on its virtual or physical
//!   address: every mapping of the page shares it.

mod integer;

use std::mem::offset_of;

use isa::{Insn, Op};

use crate::asm::{Alu, Asm, Cond, Fixup, Mem, Reg, Rm, Shift, Size};
use crate::layout::{ADD, BUDGET, Layout, READ, WRITE, mapped};
use crate::pack::pack;
use crate::stubs::{self, Stubs};
use crate::tables::{DATA_ENTRIES, Tables};

use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

/// Bytes of a page.
const PAGE: i32 = 4096;
/// Instructions of one block at most.
const BLOCK_MAX: usize = 64;
/// Blocks translated in one go at most: what a branch falls through to follows it.
const BLOCKS_MAX: usize = 6;

/// Code that is rarely run, put behind the block.
#[derive(Debug)]
enum Cold {
    /// The instruction is left to the runtime; then on at `resume`.
    Step { from: Vec<Fixup>, insn: u64, place: u32, resume: u64 },
    /// The budget is too small for the block.
    Budget { from: Fixup, steps: u8, offset: u16 },
    /// A jump within the page to a block that there was no code for.
    Link { from: Fixup, offset: u16 },
    /// A jump to another page.
    Away { from: Fixup, offset: i32 },
}

/// An entry point that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Offset of its first instruction in the page.
    pub(crate) offset: u16,
    /// Address of its code.
    pub(crate) address: u32,
}

/// A page's bytes and the entry points that there are.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) entry: &'a dyn Fn(u16) -> Option<u32>,
}

/// The translator.
pub(crate) struct Emit<'a> {
    pub(super) a: Asm,
    pub(super) layout: &'a Layout,
    stubs: &'a Stubs,
    page: Page<'a>,
    cold: Vec<Cold>,
    /// Entry points made in this go.
    pub(crate) entries: Vec<Entry>,
    /// One past the last byte that was translated.
    pub(crate) end: usize,
    /// Offset of the present instruction.
    pub(super) offset: u16,
    /// Steps of the block behind the present instruction.
    steps_after: u8,
    /// The block has seen to it that floating-point code may run inline.
    pub(super) fp_checked: bool,
    insn: u64,
}

impl<'a> Emit<'a> {
    pub(crate) fn new(base: u64, layout: &'a Layout, stubs: &'a Stubs, page: Page<'a>) -> Self {
        Self {
            a: Asm::new(base),
            layout,
            stubs,
            page,
            cold: Vec::new(),
            entries: Vec::new(),
            end: 0,
            offset: 0,
            steps_after: 0,
            fp_checked: false,
            insn: 0,
        }
    }

    /// The instruction at an offset; `None` when it ends on the next page.
    fn decode(&self, offset: usize) -> Option<Insn> {
        let half = |at: usize| {
            self.page.bytes.get(at..at + 2).map(|b| u32::from(b[0]) | u32::from(b[1]) << 8)
        };
        let low = half(offset)?;
        let high = if low & 3 == 3 { half(offset + 2)? } else { 0 };
        Some(isa::decode(low | high << 16))
    }

    /// Translates from an offset on; the code is in `a`, the entry points in `entries`.
    pub(crate) fn translate(&mut self, offset: u16) {
        let mut next = Some(offset);
        for _ in 0..BLOCKS_MAX {
            let Some(offset) = next else { break };
            if !self.entries.is_empty() && (self.page.entry)(offset).is_some() {
                self.jump_within(offset);
                next = None;
                break;
            }
            next = self.block(offset);
        }
        if let Some(offset) = next {
            self.jump_within(offset);
        }
        self.cold_code();
    }

    /// Translates a block; returns where its last branch falls through to.
    fn block(&mut self, offset: u16) -> Option<u16> {
        let mut insns: Vec<(u16, Insn)> = Vec::with_capacity(BLOCK_MAX);
        let mut at = usize::from(offset);
        let mut straddles = false;
        while insns.len() < BLOCK_MAX && at < PAGE as usize {
            let Some(insn) = self.decode(at) else {
                straddles = true;
                break;
            };
            insns.push((at as u16, insn));
            at += usize::from(insn.len);
            if ends_block(insn.op) || at >= PAGE as usize {
                break;
            }
            if (self.page.entry)(at as u16).is_some() {
                break;
            }
        }
        // The instruction that straddles is a step of its own; the runtime fetches it.
        let steps = insns.len() + usize::from(straddles);
        self.entries.push(Entry { offset, address: self.a.here() as u32 });
        self.a.alu_imm(Alu::Sub, Q, BUDGET, steps as i32);
        let from = self.a.jcc(Cond::S);
        self.cold.push(Cold::Budget { from, steps: steps as u8, offset });
        self.fp_checked = false;
        for (i, (offset, insn)) in insns.iter().enumerate() {
            self.offset = *offset;
            self.steps_after = (steps - 1 - i) as u8;
            self.insn = pack(insn);
            self.instruction(insn);
        }
        self.end = self.end.max(at);
        if straddles {
            self.offset = at as u16;
            self.steps_after = 0;
            self.end = PAGE as usize;
            // The packed form of an illegal instruction of length 4: see `Jit`'s runtime.
            self.insn = STRADDLE;
            self.step();
            return None;
        }
        let (_, last) = insns.last()?;
        if is_branch(last.op) || !ends_block(last.op) {
            if at >= PAGE as usize {
                self.jump_away(PAGE);
                return None;
            }
            return Some(at as u16);
        }
        None
    }

    fn instruction(&mut self, insn: &Insn) {
        match insn.op {
            op if is_branch(op) => self.branch(insn),
            Op::Jal => self.jal(insn),
            Op::Jalr => self.jalr(insn),
            // Everything is in order, and code is coherent with memory.
            Op::Fence | Op::FenceI => {}
            _ if self.memory(insn) || self.integer(insn) => {}
            _ => self.step(),
        }
    }

    // --- Registers -----------------------------------------------------------------------------------------------

    /// A register as an operand; x0 is 0 in memory.
    pub(super) fn rm(r: u8) -> Rm {
        mapped(r).map_or_else(|| Layout::x(r).into(), Rm::Reg)
    }

    /// A register that holds `r`: its own, or `scratch` after loading it.
    pub(super) fn get(&mut self, r: u8, scratch: Reg) -> Reg {
        match mapped(r) {
            Some(reg) => reg,
            None if r == 0 => {
                self.a.mov_imm(scratch, 0);
                scratch
            }
            None => {
                self.a.mov(Q, scratch, Layout::x(r));
                scratch
            }
        }
    }

    /// Copies `r` into `to`.
    pub(super) fn load(&mut self, to: Reg, r: u8) {
        if r == 0 {
            self.a.mov_imm(to, 0);
        } else {
            self.a.mov(Q, to, Self::rm(r));
        }
    }

    /// The register to compute `rd` in: its own or RAX.
    pub(super) fn target(rd: u8) -> Reg {
        mapped(rd).unwrap_or(Rax)
    }

    /// Puts what is in `from` into `rd`.
    pub(super) fn put(&mut self, rd: u8, from: Reg) {
        match mapped(rd) {
            Some(reg) => self.a.mov(Q, reg, from),
            None if rd == 0 => {}
            None => self.a.store(Q, Layout::x(rd), from),
        }
    }

    /// Puts a constant into `rd`.
    pub(super) fn put_imm(&mut self, rd: u8, imm: i64) {
        match mapped(rd) {
            Some(reg) => self.a.mov_imm(reg, imm as u64),
            None if rd == 0 => {}
            None => match i32::try_from(imm) {
                Ok(imm) => self.a.store_imm(Q, Layout::x(rd), imm),
                Err(_) => {
                    self.a.mov_imm(Rax, imm as u64);
                    self.a.store(Q, Layout::x(rd), Rax);
                }
            },
        }
    }

    pub(super) fn table(&self, offset: usize) -> Mem {
        self.layout.table(offset)
    }

    // --- The runtime -----------------------------------------------------------------------------------------------

    fn place(&self) -> u32 {
        u32::from(self.offset) | u32::from(self.steps_after) << 16
    }

    /// Leaves the present instruction to the runtime.
    pub(super) fn step(&mut self) {
        let place = self.place();
        self.call_step(self.insn, place);
    }

    fn call_step(&mut self, insn: u64, place: u32) {
        self.a.mov_imm(Rdx, insn);
        self.a.mov_imm(Rcx, u64::from(place));
        self.a.call_to(self.stubs.step);
    }

    /// Has the jumps in `from` leave the present instruction to the runtime, and go on here.
    pub(super) fn step_from(&mut self, from: Vec<Fixup>) {
        let (insn, place, resume) = (self.insn, self.place(), self.a.here());
        self.cold.push(Cold::Step { from, insn, place, resume });
    }

    fn cold_code(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Step { from, insn, place, resume } => {
                    for f in from {
                        self.a.fix(f);
                    }
                    self.call_step(insn, place);
                    self.a.jmp_to(resume);
                }
                Cold::Budget { from, steps, offset } => {
                    self.a.fix(from);
                    self.a.alu_imm(Alu::Add, Q, BUDGET, i32::from(steps));
                    self.a.mov_imm(Rax, u64::from(offset));
                    self.a.jmp_to(self.stubs.budget);
                }
                Cold::Link { from, offset } => {
                    let known = self.entries.iter().find(|e| e.offset == offset);
                    match known.map(|e| e.address).or_else(|| (self.page.entry)(offset)) {
                        Some(address) => self.a.fix_to(from, address.into()),
                        None => {
                            self.a.fix(from);
                            self.a.mov_imm(Rax, u64::from(offset));
                            self.a.mov_imm(Rcx, self.a.address(from.offset()));
                            self.a.jmp_to(self.stubs.link);
                        }
                    }
                }
                Cold::Away { from, offset } => {
                    self.a.fix(from);
                    self.jump_away(offset);
                }
            }
        }
    }

    // --- Jumps -----------------------------------------------------------------------------------------------------

    /// Jumps to an offset of this page.
    fn jump_within(&mut self, offset: u16) {
        let from = self.a.jmp();
        self.cold.push(Cold::Link { from, offset });
    }

    /// Jumps to an address given relative to the start of this page.
    fn jump_away(&mut self, offset: i32) {
        self.a.mov(Q, Rax, self.table(offset_of!(Tables, page_va)));
        self.a.alu_imm(Alu::Add, Q, Rax, offset);
        stubs::jump_to_rax(&mut self.a, self.layout, self.stubs.untranslated);
    }

    fn branch(&mut self, insn: &Insn) {
        let (a, b) = (insn.rs1, insn.rs2);
        match (mapped(a), b) {
            (Some(reg), 0) => self.a.test(Q, reg, reg),
            (None, 0) => self.a.alu_imm(Alu::Cmp, Q, Layout::x(a), 0),
            (Some(reg), _) => self.a.alu_load(Alu::Cmp, Q, reg, Self::rm(b)),
            (None, _) => {
                if let Some(b) = mapped(b) {
                    self.a.alu(Alu::Cmp, Q, Layout::x(a), b);
                } else {
                    self.load(Rax, a);
                    self.a.alu_load(Alu::Cmp, Q, Rax, Layout::x(b));
                }
            }
        }
        let cond = match insn.op {
            Op::Beq => Cond::E,
            Op::Bne => Cond::Ne,
            Op::Blt => Cond::L,
            Op::Bge => Cond::Ge,
            Op::Bltu => Cond::B,
            _ => Cond::Ae,
        };
        let from = self.a.jcc(cond);
        let offset = i32::from(self.offset) + insn.imm;
        self.cold.push(match within(offset) {
            Some(offset) => Cold::Link { from, offset },
            None => Cold::Away { from, offset },
        });
    }

    /// Puts the address `offset` bytes from the start of the page into `rd`.
    pub(super) fn put_address(&mut self, rd: u8, offset: i32) {
        if rd == 0 {
            return;
        }
        let to = Self::target(rd);
        self.a.mov(Q, to, self.table(offset_of!(Tables, page_va)));
        if offset != 0 {
            self.a.alu_imm(Alu::Add, Q, to, offset);
        }
        self.put(rd, to);
    }

    fn jal(&mut self, insn: &Insn) {
        self.put_address(insn.rd, i32::from(self.offset) + i32::from(insn.len));
        let offset = i32::from(self.offset) + insn.imm;
        match within(offset) {
            Some(offset) => self.jump_within(offset),
            None => self.jump_away(offset),
        }
    }

    fn jalr(&mut self, insn: &Insn) {
        self.address(insn.rs1, insn.imm);
        self.a.alu_imm(Alu::And, Q, Rax, -2);
        if insn.rd != 0 {
            self.a.mov(Q, Rcx, self.table(offset_of!(Tables, page_va)));
            self.a.alu_imm(Alu::Add, Q, Rcx, i32::from(self.offset) + i32::from(insn.len));
            self.put(insn.rd, Rcx);
        }
        stubs::jump_to_rax(&mut self.a, self.layout, self.stubs.untranslated);
    }

    // --- Memory ----------------------------------------------------------------------------------------------------

    /// RAX = `rs1` + `imm`
    pub(super) fn address(&mut self, rs1: u8, imm: i32) {
        match mapped(rs1) {
            Some(reg) if imm != 0 => self.a.lea(Rax, Mem::new(reg, imm)),
            Some(reg) => self.a.mov(Q, Rax, reg),
            None if rs1 == 0 => self.a.mov_imm(Rax, i64::from(imm) as u64),
            None => {
                self.a.mov(Q, Rax, Layout::x(rs1));
                if imm != 0 {
                    self.a.alu_imm(Alu::Add, Q, Rax, imm);
                }
            }
        }
    }

    /// Looks the address in RAX up for an access of `len` bytes; the jump is taken when the TLB does not allow it.
    /// Afterwards the place is `[RAX + RCX]`. Uses RDX.
    pub(super) fn translate_rax(&mut self, len: i32, write: bool) -> Fixup {
        self.a.mov(D, Rcx, Rax);
        if len > 1 {
            self.a.lea(Rdx, Mem::new(Rax, len - 1));
        } else {
            self.a.mov(Q, Rdx, Rax);
        }
        self.a.shift(Shift::Shr, D, Rcx, 7);
        self.a.alu_imm(Alu::And, Q, Rdx, -4096);
        self.a.alu_imm(Alu::And, D, Rcx, ((DATA_ENTRIES - 1) << 5) as i32);
        self.a.alu_load(Alu::Or, Q, Rdx, self.table(Tables::DATA_ID));
        let field = if write { WRITE } else { READ };
        self.a.alu_load(Alu::Cmp, Q, Rdx, self.layout.data(Rcx, field));
        let miss = self.a.jcc(Cond::Ne);
        self.a.mov(Q, Rcx, self.layout.data(Rcx, ADD));
        miss
    }

    fn memory(&mut self, insn: &Insn) -> bool {
        let (bits, signed) = match insn.op {
            Op::Lb => (8, true),
            Op::Lh => (16, true),
            Op::Lw => (32, true),
            Op::Ld => (64, false),
            Op::Lbu => (8, false),
            Op::Lhu => (16, false),
            Op::Lwu => (32, false),
            Op::Sb => return self.store(insn, 8),
            Op::Sh => return self.store(insn, 16),
            Op::Sw => return self.store(insn, 32),
            Op::Sd => return self.store(insn, 64),
            _ => return false,
        };
        self.address(insn.rs1, insn.imm);
        let miss = self.translate_rax(i32::from(bits / 8), false);
        let (to, from) = (Self::target(insn.rd), Mem::indexed(Rax, Rcx, 0));
        match (bits, signed) {
            (64, _) => self.a.mov(Q, to, from),
            (_, true) => self.a.movsx(bits, to, from),
            (_, false) => self.a.movzx(bits, to, from),
        }
        self.put(insn.rd, to);
        self.step_from(vec![miss]);
        true
    }

    fn store(&mut self, insn: &Insn, bits: u8) -> bool {
        self.address(insn.rs1, insn.imm);
        let miss = self.translate_rax(i32::from(bits / 8), true);
        let to = Mem::indexed(Rax, Rcx, 0);
        let value = self.get(insn.rs2, Rdx);
        match bits {
            8 => self.a.store8(to, value),
            16 => self.a.store16(to, value),
            32 => self.a.store(D, to, value),
            _ => self.a.store(Q, to, value),
        }
        self.step_from(vec![miss]);
        true
    }
}

/// Stands for an instruction that ends on the next page.
pub(crate) const STRADDLE: u64 = u64::MAX;

fn within(offset: i32) -> Option<u16> {
    (0..PAGE).contains(&offset).then_some(offset as u16)
}

fn is_branch(op: Op) -> bool {
    matches!(op, Op::Beq | Op::Bne | Op::Blt | Op::Bge | Op::Bltu | Op::Bgeu)
}

/// Nothing behind it is always executed next.
fn ends_block(op: Op) -> bool {
    is_branch(op)
        || matches!(
            op,
            Op::Jal | Op::Jalr | Op::Mret | Op::Sret | Op::Ecall | Op::Ebreak | Op::Illegal
        )
}

//! Translation of a run of instructions on one page into host code.
//!
//! # Invariants
//! - INV-EMIT-1: a block charges all its steps when it is entered; whoever leaves it before its end gives back what was
//!   not made.
//! - INV-EMIT-2: an instruction changes nothing before everything that it can fault on has been checked.
//! - INV-EMIT-3: code depends on the page's contents and on offsets within the page, never on its virtual or physical
//!   address: every mapping of the page shares it.
//! - INV-EMIT-4: at each of the page's stops a block begins, with the question whether to stop before its budget is taken.

mod atomic;
mod bits;
mod block;
mod crypto;
mod csr;
mod float;
mod integer;

use std::collections::VecDeque;
use std::mem::offset_of;

use isa::{Insn, Op};

use crate::asm::{Alu, Asm, Cond, Fixup, Mem, Reg, Rm, Shift, Size};
use crate::features::{BLOCK_MAX, Features};
use crate::layout::{ADD, BUDGET, Layout, READ, WRITE, mapped};
use crate::pack::pack;
use crate::stops::Stops;
use crate::stubs::{self, Stubs};
use crate::tables::{DATA_ENTRIES, DATA_SHIFT, STOP_PAGES, Tables};

use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

/// Bytes of a page.
const PAGE: i32 = 4096;
/// Bytes of code after which no further block is added: long templates must not exceed the place of a translation.
const CODE_ENOUGH: usize = 8 << 10;
/// Instructions after which the same is so: cold code is long where many of them are accesses that share one look into the
/// TLB, which hardly shows in the other.
const INSNS_ENOUGH: usize = BLOCK_MAX;
/// Blocks translated in one go at most: what a branch falls through to follows it.
const BLOCKS_MAX: usize = 4;

/// Code that is rarely run, put apart from what is: half of all code, which would take half of each line and page that the
/// processor's caches and TLBs have for the rest.
#[derive(Debug)]
enum Cold {
    /// The instruction is left to the runtime; then on at `resume`, with RCX as it was if the code there wants it.
    Step { from: Vec<Fixup>, insn: u64, place: u32, resume: u64, keeps_rcx: bool },
    /// The same; then on at `resume`, if there is one and floating-point code may run inline, else at offset `next`.
    Guard { from: Vec<Fixup>, insn: u64, place: u32, next: u16, resume: Option<u64> },
    /// The budget is too small for the block.
    Budget { from: Vec<Fixup>, steps: u8, offset: u16 },
    /// There may be a breakpoint at a block.
    Stop { from: Fixup, offset: u16 },
    /// A jump within the page to a block that there was no code for.
    Link { from: Fixup, offset: u16 },
    /// A jump to another page.
    Away { from: Fixup, offset: i32 },
    /// Accesses that one look into the TLB cannot serve: each looks for itself; then on at `resume`.
    Ungroup { from: Fixup, insns: Vec<Placed>, resume: u64, float: float::Known },
}

/// An instruction and where it is.
#[derive(Debug, Clone, Copy)]
struct Placed {
    offset: u16,
    /// Steps of the block behind it.
    steps_after: u8,
    insn: Insn,
    /// The address that it makes together with the AUIPC before it, from the start of the page.
    address: Option<i32>,
    /// An AUIPC whose result nothing but the instruction behind it sees, which has `address`.
    is_folded: bool,
}

/// Accesses relative to one register that share one look into the TLB. While they are translated RCX holds what makes a
/// host address of a guest's.
#[derive(Debug, Clone, Copy)]
struct Group {
    /// The last one, as an index into the block.
    last: usize,
    base: u8,
    /// Bytes that they touch, relative to the register.
    low: i32,
    high: i32,
    write: bool,
}

/// An entry point that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Offset of its first instruction in the page.
    pub(crate) offset: u16,
    /// Address of its code.
    pub(crate) address: u32,
}

/// A page's bytes, the entry points that there are, and where code asks whether to stop.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) entry: &'a dyn Fn(u16) -> Option<u32>,
    pub(crate) stops: &'a Stops,
}

/// The translator.
pub(crate) struct Emit<'a> {
    pub(super) a: Asm,
    /// Where the cold code goes.
    cold_base: u64,
    pub(super) layout: &'a Layout,
    stubs: &'a Stubs,
    features: Features,
    page: Page<'a>,
    cold: Vec<Cold>,
    /// Entry points made in this go.
    pub(crate) entries: Vec<Entry>,
    /// Instructions in the blocks so far.
    insns: usize,
    /// One past the last byte that was translated.
    pub(crate) end: usize,
    /// Offset of the present instruction.
    pub(super) offset: u16,
    /// Steps of the block behind the present instruction.
    steps_after: u8,
    /// The address that the present instruction makes together with the one before it, from the start of the page.
    pub(super) known_address: Option<i32>,
    /// Whether the present instruction is left to the one behind it.
    is_folded: bool,
    /// What the block knows of floating point.
    float: float::Known,
    insn: u64,
    /// The accesses that the present instruction is one of.
    group: Option<Group>,
}

impl<'a> Emit<'a> {
    pub(crate) fn new(
        (base, cold_base): (u64, u64),
        layout: &'a Layout,
        stubs: &'a Stubs,
        features: Features,
        page: Page<'a>,
    ) -> Self {
        Self {
            a: Asm::new(base),
            cold_base,
            layout,
            stubs,
            features,
            page,
            cold: Vec::new(),
            entries: Vec::new(),
            insns: 0,
            end: 0,
            offset: 0,
            steps_after: 0,
            known_address: None,
            is_folded: false,
            float: float::Known::default(),
            insn: 0,
            group: None,
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
            let is_enough = self.a.code.len() > CODE_ENOUGH || self.insns > INSNS_ENOUGH;
            let Some(offset) = next.filter(|_| !is_enough) else { break };
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
        let (insns, at, straddles) = self.decode_block(offset);
        self.insns += insns.len();
        self.entries.push(Entry { offset, address: self.a.here() as u32 });
        if self.page.stops.contains(offset) {
            self.ask_for_stop(offset);
        }
        // The instruction that straddles is a step of its own; the runtime fetches it.
        let steps = insns.len() + usize::from(straddles);
        self.a.alu_imm(Alu::Sub, Q, BUDGET, steps as i32);
        let mut from = vec![self.a.jcc(Cond::S)];
        if self.features.counts_twice {
            self.a.alu_imm(Alu::Sub, Q, BUDGET, 0);
            from.push(self.a.jcc(Cond::S));
        }
        self.cold.push(Cold::Budget { from, steps: steps as u8, offset });
        self.float = float::Known::default();
        let mut i = 0;
        while let Some(placed) = insns.get(i) {
            self.place_at(placed);
            match find_group(&insns, i, self.float.inline) {
                Some(group) => {
                    self.grouped(&insns[i..=group.last], group);
                    i = group.last + 1;
                }
                None => {
                    self.instruction(&placed.insn);
                    i += 1;
                }
            }
        }
        self.end = self.end.max(at);
        if straddles {
            self.offset = at as u16;
            self.steps_after = 0;
            self.end = PAGE as usize;
            self.insn = STRADDLE;
            self.step();
            return None;
        }
        let last = insns.last()?.insn;
        if is_branch(last.op) || !ends_block(last.op) {
            if at >= PAGE as usize {
                self.jump_away(PAGE);
                return None;
            }
            return Some(at as u16);
        }
        None
    }

    /// The block at an offset, where it ends, and whether an instruction follows that ends on the next page.
    fn decode_block(&self, offset: u16) -> (Vec<Placed>, usize, bool) {
        let mut insns: Vec<Placed> = Vec::with_capacity(BLOCK_MAX);
        let mut at = usize::from(offset);
        let mut straddles = false;
        while insns.len() < self.features.block_max && at < PAGE as usize {
            let Some(insn) = self.decode(at) else {
                straddles = true;
                break;
            };
            let (address, is_folded) = (None, false);
            insns.push(Placed { offset: at as u16, steps_after: 0, insn, address, is_folded });
            at += usize::from(insn.len);
            if ends_block(insn.op) || at < PAGE as usize && self.begins_block(at as u16) {
                break;
            }
        }
        fold_addresses(&mut insns);
        let behind = usize::from(straddles);
        for (i, placed) in insns.iter_mut().rev().enumerate() {
            placed.steps_after = (i + behind) as u8;
        }
        (insns, at, straddles)
    }

    /// Whether a block begins here, whatever comes before it.
    fn begins_block(&self, offset: u16) -> bool {
        (self.page.entry)(offset).is_some() || self.page.stops.contains(offset)
    }

    /// Leaves, before anything of the block at `offset` is done, when the present page may have a breakpoint.
    fn ask_for_stop(&mut self, offset: u16) {
        // The page number's low bits, times the size of a mark.
        self.a.mov(Q, Rcx, self.table(offset_of!(Tables, page_va)));
        self.a.shift(Shift::Shr, D, Rcx, 10);
        self.a.alu_imm(Alu::And, D, Rcx, ((STOP_PAGES - 1) << 2) as i32);
        self.a.alu_imm(Alu::Cmp, D, self.layout.stop_page(Rcx), 0);
        let from = self.a.jcc(Cond::Ne);
        self.cold.push(Cold::Stop { from, offset });
    }

    /// Makes an instruction the present one.
    fn place_at(&mut self, placed: &Placed) {
        self.offset = placed.offset;
        self.steps_after = placed.steps_after;
        self.known_address = placed.address;
        self.is_folded = placed.is_folded;
        self.insn = pack(&placed.insn);
    }

    /// Translates a group, and for when it does not lie in one page that it may access, each instruction by itself.
    fn grouped(&mut self, insns: &[Placed], group: Group) {
        let float = self.float;
        let at = self.address_in(group.base, group.low);
        let miss = self.translate_at(at, group.high - group.low, group.write);
        self.group = Some(group);
        for placed in insns {
            self.place_at(placed);
            self.instruction(&placed.insn);
        }
        self.group = None;
        let (insns, resume) = (insns.to_vec(), self.a.here());
        self.cold.push(Cold::Ungroup { from: miss, insns, resume, float });
    }

    fn instruction(&mut self, insn: &Insn) {
        match insn.op {
            _ if self.is_folded => {}
            op if is_branch(op) => self.branch(insn),
            Op::Jal => self.jal(insn),
            Op::Jalr => self.jalr(insn),
            // Everything is in order, and code is coherent with memory.
            Op::Fence | Op::FenceI => {}
            _ if self.memory(insn) || self.integer(insn) || self.floating_point(insn) => {}
            _ if self.atomic(insn) || self.bits(insn) || self.cryptography(insn) => {}
            _ if self.control(insn) || self.zero_block(insn) => {}
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
        // It may be a CSR instruction.
        self.float.inline = false;
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
        let keeps_rcx = self.group.is_some();
        self.cold.push(Cold::Step { from, insn, place, resume, keeps_rcx });
    }

    fn cold_code(&mut self) {
        self.a.go_apart(self.cold_base);
        let mut queue = VecDeque::from(std::mem::take(&mut self.cold));
        while let Some(cold) = queue.pop_front() {
            match cold {
                Cold::Ungroup { from, insns, resume, float } => {
                    self.a.fix(from);
                    self.float = float;
                    for placed in insns {
                        self.place_at(&placed);
                        self.instruction(&placed.insn);
                    }
                    self.a.jmp_to(resume);
                    queue.extend(self.cold.drain(..));
                }
                Cold::Step { from, insn, place, resume, keeps_rcx } => {
                    for f in from {
                        self.a.fix(f);
                    }
                    let kept = self.table(offset_of!(Tables, kept));
                    if keeps_rcx {
                        self.a.store(Q, kept, Rcx);
                    }
                    self.call_step(insn, place);
                    if keeps_rcx {
                        self.a.mov(Q, Rcx, kept);
                    }
                    self.a.jmp_to(resume);
                }
                Cold::Guard { from, insn, place, next, resume } => {
                    for f in from {
                        self.a.fix(f);
                    }
                    self.call_step(insn, place);
                    self.after_guard(place, next, resume);
                }
                Cold::Budget { from, steps, offset } => {
                    for from in from {
                        self.a.fix(from);
                    }
                    self.a.alu_imm(Alu::Add, Q, BUDGET, i32::from(steps));
                    self.a.mov_imm(Rax, u64::from(offset));
                    self.a.jmp_to(self.stubs.budget);
                }
                Cold::Stop { from, offset } => {
                    self.a.fix(from);
                    self.a.mov_imm(Rax, u64::from(offset));
                    self.a.jmp_to(self.stubs.missing);
                }
                Cold::Link { from, offset } => {
                    let known = self.entries.iter().find(|e| e.offset == offset);
                    match known.map(|e| e.address).or_else(|| (self.page.entry)(offset)) {
                        Some(address) => self.a.fix_to(from, address.into()),
                        None => {
                            self.a.fix(from);
                            self.a.mov_imm(Rax, u64::from(offset));
                            self.a.mov_imm(Rcx, self.a.address(from));
                            self.a.jmp_to(self.stubs.link);
                        }
                    }
                }
                Cold::Away { from, offset } => {
                    self.a.fix(from);
                    self.a.mov(Q, Rax, self.table(offset_of!(Tables, page_va)));
                    self.a.alu_imm(Alu::Add, Q, Rax, offset);
                    self.a.jmp_to(self.stubs.jump);
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
        stubs::jump_away(&mut self.a, self.layout, offset, self.stubs.missing);
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
        self.call(insn, i32::from(self.offset) + insn.imm);
    }

    /// Jumps to an address given relative to the start of this page, `rd` getting where to return to.
    fn call(&mut self, insn: &Insn, offset: i32) {
        self.put_address(insn.rd, i32::from(self.offset) + i32::from(insn.len));
        match within(offset) {
            Some(offset) => self.jump_within(offset),
            None => self.jump_away(offset),
        }
    }

    fn jalr(&mut self, insn: &Insn) {
        if let Some(address) = self.known_address {
            return self.call(insn, address & !1);
        }
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
        self.translate_at(Rax, len, write)
    }

    /// The same for the address in some register but RCX and RDX.
    fn translate_at(&mut self, at: Reg, len: i32, write: bool) -> Fixup {
        // The page number's low bits, scattered, times the size of an entry.
        self.a.rorx(D, Rcx, at, 12 - DATA_SHIFT);
        if len > 1 {
            self.a.lea(Rdx, Mem::new(at, len - 1));
        } else {
            self.a.mov(Q, Rdx, at);
        }
        self.a.alu_load(Alu::Xor, D, Rcx, self.table(offset_of!(Tables, data_salt)));
        self.a.alu_imm(Alu::And, D, Rcx, ((DATA_ENTRIES - 1) << DATA_SHIFT) as i32);
        self.a.alu_imm(Alu::And, Q, Rdx, -PAGE);
        self.a.alu_load(Alu::Or, Q, Rdx, self.table(Tables::DATA_ID));
        let field = if write { WRITE } else { READ };
        self.a.alu_load(Alu::Cmp, Q, Rdx, self.layout.data(Rcx, field));
        let miss = self.a.jcc(Cond::Ne);
        self.a.mov(Q, Rcx, self.layout.data(Rcx, ADD));
        miss
    }

    /// The register that holds `rs1` + `imm`: its own, or RAX.
    fn address_in(&mut self, rs1: u8, imm: i32) -> Reg {
        match mapped(rs1) {
            Some(reg) if imm == 0 => reg,
            _ => {
                self.address(rs1, imm);
                Rax
            }
        }
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
        let (from, miss) = self.access(insn, i32::from(bits / 8), false);
        let to = Self::target(insn.rd);
        match (bits, signed) {
            (64, _) => self.a.mov(Q, to, from),
            (_, true) => self.a.movsx(bits, to, from),
            (_, false) => self.a.movzx(bits, to, from),
        }
        self.put(insn.rd, to);
        self.missed(miss);
        true
    }

    /// Finds the place of an access of `len` bytes at `rs1` + `imm`. With a jump that is taken when it cannot be had,
    /// for [`Self::missed`] after the access. RDX is free afterwards.
    pub(super) fn access(&mut self, insn: &Insn, len: i32, write: bool) -> (Mem, Option<Fixup>) {
        if self.group.is_some() {
            let base = self.get(insn.rs1, Rax);
            return (Mem::indexed(base, Rcx, insn.imm), None);
        }
        let at = self.address_in(insn.rs1, insn.imm);
        let miss = self.translate_at(at, len, write);
        (Mem::indexed(at, Rcx, 0), Some(miss))
    }

    /// Leaves the present instruction to the runtime when its access missed.
    pub(super) fn missed(&mut self, miss: Option<Fixup>) {
        if let Some(miss) = miss {
            self.step_from(vec![miss]);
        }
    }

    fn store(&mut self, insn: &Insn, bits: u8) -> bool {
        let (to, miss) = self.access(insn, i32::from(bits / 8), true);
        let value = self.get(insn.rs2, Rdx);
        match bits {
            8 => self.a.store8(to, value),
            16 => self.a.store16(to, value),
            32 => self.a.store(D, to, value),
            _ => self.a.store(Q, to, value),
        }
        self.missed(miss);
        true
    }
}

/// Length of an access and whether it is a store; `None` for other instructions. `float`: of floating-point registers, too.
fn access_of(op: Op, float: bool) -> Option<(i32, bool)> {
    Some(match op {
        Op::Lb | Op::Lbu => (1, false),
        Op::Lh | Op::Lhu => (2, false),
        Op::Lw | Op::Lwu => (4, false),
        Op::Ld => (8, false),
        Op::Sb => (1, true),
        Op::Sh => (2, true),
        Op::Sw => (4, true),
        Op::Sd => (8, true),
        Op::Flw if float => (4, false),
        Op::Fld if float => (8, false),
        Op::Fsw if float => (4, true),
        Op::Fsd if float => (8, true),
        _ => return None,
    })
}

/// Finds the pairs of an AUIPC and an instruction that adds to what it makes: how code that does not know where it is calls
/// what is far away, and gets an address.
fn fold_addresses(insns: &mut [Placed]) {
    for i in 1..insns.len() {
        let (before, insn) = (insns[i - 1], insns[i].insn);
        let is_pair = before.insn.op == Op::Auipc
            && before.insn.rd != 0
            && insn.rs1 == before.insn.rd
            && matches!(insn.op, Op::Addi | Op::Jalr);
        let base = i32::from(before.offset).checked_add(before.insn.imm);
        if let Some(address) = base.and_then(|base| base.checked_add(insn.imm)).filter(|_| is_pair)
        {
            insns[i].address = Some(address);
            insns[i - 1].is_folded = insn.rd == insn.rs1;
        }
    }
}

/// The group that begins with the instruction `first`, if it has more than one access. `float`: floating-point code may
/// run inline.
fn find_group(insns: &[Placed], first: usize, float: bool) -> Option<Group> {
    let head = insns[first].insn;
    let (len, write) = access_of(head.op, float)?;
    let mut group =
        Group { last: first, base: head.rs1, low: head.imm, high: head.imm + len, write };
    let mut writes_base = !write && head.rd == head.rs1 && head.op < Op::Flw;
    for (i, placed) in insns.iter().enumerate().skip(first + 1).take(GROUP_SPAN) {
        let insn = &placed.insn;
        if writes_base {
            break;
        }
        match access_of(insn.op, float) {
            Some((len, write)) if insn.rs1 == group.base => {
                let (low, high) = (group.low.min(insn.imm), group.high.max(insn.imm + len));
                if high - low > GROUP_BYTES {
                    break;
                }
                group = Group { last: i, low, high, write: group.write || write, ..group };
                writes_base = !write && insn.rd == group.base && insn.op < Op::Flw;
            }
            None if float && float::keeps_rcx(insn) => {}
            None if keeps_rcx(insn) => writes_base = insn.rd == group.base,
            _ => break,
        }
    }
    (group.last > first && group.base != 0).then_some(group)
}

/// Bytes that a group touches at most: what is wider rarely lies in one page.
const GROUP_BYTES: i32 = 512;
/// Instructions behind the first that a group may have.
const GROUP_SPAN: usize = 24;

/// Whether the template uses neither RCX nor the runtime.
fn keeps_rcx(insn: &Insn) -> bool {
    match insn.op {
        Op::Sll | Op::Srl | Op::Sra | Op::Sllw | Op::Srlw | Op::Sraw => mapped(insn.rs2).is_some(),
        Op::Lui | Op::Mul | Op::Mulw | Op::Mulh | Op::Mulhu => true,
        op => op >= Op::Addi && op <= Op::Sraw,
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

//! Floating point: F, D and what is simple of Zfa, on SSE and FMA, with the guest's flags and rounding mode in MXCSR.
//!
//! SSE differs from RISC-V in NaNs, conversions out of range and the sign of a zero that is a minimum: such cases are
//! found beforehand or by their result, and left to the runtime, which computes them anew.
//!
//! # Invariants
//! - INV-SSE-1: inline code runs only while `Tables::fp_inline` and `Tables::fp_live` are 1. The first instruction of a
//!   block checks it. If they are not, the runtime makes the step, and the block goes on only if they then are: thus they
//!   are from there on ([`Known::inline`]), for only CSR instructions can change it back, and everything that may be one
//!   forgets it.
//! - INV-SSE-2: inline code never raises a flag that the exact instruction does not raise, even if the runtime makes the
//!   step in the end.
//! - INV-SSE-3: when the runtime makes the step, no operand has been written; `rd` may have been.
//! - INV-SSE-4: a register in [`Known::boxed`] holds a NaN-boxed single on every way to the present instruction: a block
//!   whose operand is not one is left behind that instruction. Code that computes a single makes the box with it.
//! - INV-SSE-5: XMM0 to XMM3 are scratch, others hold guest registers ([`MAPPED_F`](crate::layout::MAPPED_F)).

use std::mem::offset_of;

use isa::{Insn, Op};

use crate::asm::{Alu, Cond, Fixup, Reg, Rm, Size, Sse, Xm};
use crate::layout::{BUDGET, Layout, mapped, mapped_f};
use crate::tables::Tables;

use super::{Cold, Emit};
use Reg::{Rax, Rdx};
use Size::{D, Q};

/// What a block has seen to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known {
    /// Floating-point code may run inline.
    pub(super) inline: bool,
    /// Registers that hold NaN-boxed singles, a bit each.
    boxed: u32,
}

/// The rounding mode that is `frm`'s.
const DYNAMIC: u8 = 7;

/// Second byte of SSE's opcodes.
mod op {
    pub(super) const LOAD: u8 = 0x10;
    pub(super) const STORE: u8 = 0x11;
    pub(super) const FROM_INTEGER: u8 = 0x2a;
    pub(super) const TRUNCATE: u8 = 0x2c;
    pub(super) const TO_INTEGER: u8 = 0x2d;
    pub(super) const COMPARE: u8 = 0x2e;
    pub(super) const COMPARE_SIGNALING: u8 = 0x2f;
    pub(super) const SQRT: u8 = 0x51;
    pub(super) const COPY: u8 = 0x28;
    pub(super) const AND: u8 = 0x54;
    pub(super) const AND_NOT: u8 = 0x55;
    pub(super) const OR: u8 = 0x56;
    pub(super) const XOR: u8 = 0x57;
    pub(super) const ADD: u8 = 0x58;
    pub(super) const MUL: u8 = 0x59;
    pub(super) const CONVERT: u8 = 0x5a;
    pub(super) const SUB: u8 = 0x5c;
    pub(super) const MIN: u8 = 0x5d;
    pub(super) const DIV: u8 = 0x5e;
    pub(super) const MAX: u8 = 0x5f;
    pub(super) const TO_XMM: u8 = 0x6e;
    pub(super) const SHIFT: u8 = 0x73;
    pub(super) const EQUAL: u8 = 0x76;
    pub(super) const FROM_XMM: u8 = 0x7e;
    /// Of the map 0F 3A: on the 32 bits that a constant says.
    pub(super) const EXTRACT: u8 = 0x16;
    pub(super) const INSERT: u8 = 0x22;
}

/// The format of operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Single,
    Double,
}

use Format::{Double, Single};

impl Format {
    /// Prefix of scalar arithmetic.
    fn scalar(self) -> Sse {
        match self {
            Single => Sse::F3,
            Double => Sse::F2,
        }
    }

    /// Prefix of comparisons.
    fn compare(self) -> Sse {
        match self {
            Single => Sse::None,
            Double => Sse::P66,
        }
    }

    /// Its size as an integer.
    fn size(self) -> Size {
        match self {
            Single => D,
            Double => Q,
        }
    }
}

/// Jumps of one instruction to code that is rarely run.
#[derive(Debug, Default)]
struct Exits {
    /// Floating-point code may not run inline.
    inline: Option<Fixup>,
    /// An operand is not boxed.
    boxes: Vec<Fixup>,
    /// The result is the runtime's to compute.
    step: Vec<Fixup>,
}

/// A signed or unsigned integer format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Integer {
    size: Size,
    signed: bool,
}

const W: Integer = Integer { size: D, signed: true };
const WU: Integer = Integer { size: D, signed: false };
const L: Integer = Integer { size: Q, signed: true };
const LU: Integer = Integer { size: Q, signed: false };

impl Emit<'_> {
    /// Translates a floating-point instruction; false when it is none.
    pub(super) fn floating_point(&mut self, insn: &Insn) -> bool {
        if insn.op < Op::Flw {
            return false;
        }
        let format = if insn.op >= Op::Fld { Double } else { Single };
        let is_inline = self.float_memory(insn, format)
            || insn.rm == DYNAMIC && self.float_arithmetic(insn, format)
            || self.float_bits(insn, format)
            || self.float_to_integer(insn, format)
            || self.float_from_integer(insn, format)
            || self.float_format(insn)
            || self.float_compare(insn, format)
            || self.float_round(insn, format);
        if !is_inline {
            // None of these changes whether code may run inline from yes to no.
            let inline = self.float.inline;
            self.step();
            self.float.inline = inline;
            if format == Double {
                self.float.boxed &= !(1 << insn.rd);
            }
        }
        true
    }

    // --- Checks ----------------------------------------------------------------------------------------------------

    /// Makes sure that the present instruction may run inline.
    fn begin(&mut self) -> Exits {
        let mut exits = Exits::default();
        if !self.float.inline {
            self.a.mov(D, Rax, self.table(offset_of!(Tables, fp_inline)));
            self.a.test(D, self.table(offset_of!(Tables, fp_live)), Rax);
            exits.inline = Some(self.a.jcc(Cond::E));
            self.float.inline = true;
        }
        exits
    }

    /// The same, with operands of this format.
    fn begin_with(&mut self, format: Format, operands: &[u8]) -> Exits {
        let mut exits = self.begin();
        if format == Double {
            return exits;
        }
        let mut checked = 0;
        for &r in operands {
            if (self.float.boxed | checked) >> r & 1 == 0 {
                match mapped_f(r) {
                    Some(xmm) => {
                        self.a.sse3a(op::EXTRACT, D, xmm, Xm::Gpr(Rax), 1);
                        self.a.alu_imm(Alu::Cmp, D, Rax, -1);
                    }
                    None => self.a.alu_imm(Alu::Cmp, D, self.layout.f(r).plus(4), -1),
                }
                exits.boxes.push(self.a.jcc(Cond::Ne));
                checked |= 1 << r;
            }
        }
        // Who comes back from the check of `inline` has not passed these.
        if exits.inline.is_none() {
            self.float.boxed |= checked;
        }
        exits
    }

    /// The end of an instruction's code: those who left it come back here.
    fn end(&mut self, insn: &Insn, exits: Exits) {
        let next = self.offset + u16::from(insn.len);
        let resume = self.a.here();
        if let Some(from) = exits.inline {
            self.guard(vec![from], next, Some(resume));
        }
        if !exits.boxes.is_empty() {
            self.guard(exits.boxes, next, None);
        }
        if !exits.step.is_empty() {
            self.step_from(exits.step);
        }
    }

    fn guard(&mut self, from: Vec<Fixup>, next: u16, resume: Option<u64>) {
        let (insn, place) = (self.insn, self.place());
        self.cold.push(Cold::Guard { from, insn, place, next, resume });
    }

    /// The code of [`Cold::Guard`], behind the step: on at `resume` if code may run inline now, else at `next`.
    pub(super) fn after_guard(&mut self, place: u32, next: u16, resume: Option<u64>) {
        if let Some(resume) = resume {
            self.a.alu_imm(Alu::Cmp, D, self.table(offset_of!(Tables, fp_live)), 1);
            self.a.jcc_to(Cond::E, resume);
        }
        self.a.alu_imm(Alu::Add, Q, BUDGET, (place >> 16) as i32);
        self.a.mov_imm(Rax, u64::from(next));
        self.a.jmp_to(self.stubs.missing);
    }

    // --- Registers -------------------------------------------------------------------------------------------------

    /// A register as an operand.
    fn f(&self, r: u8) -> Xm {
        mapped_f(r).map_or_else(|| Xm::Mem(self.layout.f(r)), Xm::Xmm)
    }

    /// An integer register as an operand.
    fn x(r: u8) -> Xm {
        mapped(r).map_or_else(|| Xm::Mem(Layout::x(r)), Xm::Gpr)
    }

    /// The register that holds `r`: its own, or `scratch` after loading it.
    fn get_f(&mut self, r: u8, scratch: u8) -> u8 {
        mapped_f(r).unwrap_or_else(|| {
            self.a.sse(Sse::F2, op::LOAD, D, scratch, Xm::Mem(self.layout.f(r)));
            scratch
        })
    }

    /// The register to compute `rd` in before it is known whether the runtime has to: its own or XMM0.
    fn target_f(rd: u8, operands: &[u8]) -> u8 {
        mapped_f(rd).filter(|_| !operands.contains(&rd)).unwrap_or(0)
    }

    fn copy_f(&mut self, to: u8, from: u8) {
        if to != from {
            self.a.sse(Sse::None, op::COPY, D, to, Xm::Xmm(from));
        }
    }

    /// Sets every bit: what a single that is put into it is boxed by.
    fn ones(&mut self, xmm: u8) {
        self.a.sse(Sse::P66, op::EQUAL, D, xmm, Xm::Xmm(xmm));
    }

    /// Puts what is in `xmm`, boxed if it is a single, into `rd`.
    fn put_f(&mut self, format: Format, rd: u8, xmm: u8) {
        match mapped_f(rd) {
            Some(to) => self.copy_f(to, xmm),
            None => self.a.sse(Sse::F2, op::STORE, D, xmm, Xm::Mem(self.layout.f(rd))),
        }
        self.note_format(format, rd);
    }

    /// Puts 64 bits into `rd`.
    fn put_bits(&mut self, format: Format, rd: u8, from: Reg) {
        match mapped_f(rd) {
            Some(to) => self.a.sse(Sse::P66, op::TO_XMM, Q, to, Xm::Gpr(from)),
            None => self.a.store(Q, self.layout.f(rd), from),
        }
        self.note_format(format, rd);
    }

    /// `rd` was written in this format.
    fn note_format(&mut self, format: Format, rd: u8) {
        match format {
            Double => self.float.boxed &= !(1 << rd),
            Single => self.float.boxed |= 1 << rd,
        }
    }

    /// Leaves to the runtime what `xmm` is a NaN for; else that is the result.
    fn finish(&mut self, insn: &Insn, format: Format, mut exits: Exits, xmm: u8) {
        self.a.sse(format.compare(), op::COMPARE, D, xmm, Xm::Xmm(xmm));
        exits.step.push(self.a.jcc(Cond::P));
        self.put_f(format, insn.rd, xmm);
        self.end(insn, exits);
    }

    // --- Loads and stores ------------------------------------------------------------------------------------------

    fn float_memory(&mut self, insn: &Insn, format: Format) -> bool {
        let is_store = match insn.op {
            Op::Flw | Op::Fld => false,
            Op::Fsw | Op::Fsd => true,
            _ => return false,
        };
        let mut exits = self.begin();
        let len = if format == Double { 8 } else { 4 };
        let (place, miss) = self.access(insn, len, is_store);
        exits.step.extend(miss);
        let r = if is_store { insn.rs2 } else { insn.rd };
        match (is_store, mapped_f(r)) {
            (true, Some(xmm)) => self.a.sse(format.scalar(), op::STORE, D, xmm, Xm::Mem(place)),
            (true, None) => {
                self.a.mov(format.size(), Rdx, self.layout.f(r));
                self.a.store(format.size(), place, Rdx);
            }
            (false, xmm) if format == Single => self.put_single(r, xmm, Xm::Mem(place)),
            (false, Some(xmm)) => {
                self.a.sse(Sse::F2, op::LOAD, D, xmm, Xm::Mem(place));
                self.note_format(format, r);
            }
            (false, None) => {
                self.a.mov(Q, Rdx, place);
                self.put_bits(format, r, Rdx);
            }
        }
        self.end(insn, exits);
        true
    }

    /// Puts 32 bits into `rd`, boxed.
    fn put_single(&mut self, rd: u8, xmm: Option<u8>, from: Xm) {
        let xmm = xmm.unwrap_or(0);
        self.ones(xmm);
        self.a.sse3a(op::INSERT, D, xmm, from, 0);
        self.put_f(Single, rd, xmm);
    }

    // --- Arithmetic ------------------------------------------------------------------------------------------------

    fn float_arithmetic(&mut self, insn: &Insn, format: Format) -> bool {
        let opcode = match insn.op {
            Op::FaddS | Op::FaddD => op::ADD,
            Op::FsubS | Op::FsubD => op::SUB,
            Op::FmulS | Op::FmulD => op::MUL,
            Op::FdivS | Op::FdivD => op::DIV,
            Op::FsqrtS | Op::FsqrtD => {
                let exits = self.begin_with(format, &[insn.rs1]);
                let (to, a) = (Self::target_f(insn.rd, &[insn.rs1]), self.get_f(insn.rs1, 0));
                self.a.avx(format.scalar(), op::SQRT, to, a, Xm::Xmm(a));
                self.finish(insn, format, exits, to);
                return true;
            }
            _ => return self.multiply_add(insn, format),
        };
        let operands = [insn.rs1, insn.rs2];
        let exits = self.begin_with(format, &operands);
        let (to, a) = (Self::target_f(insn.rd, &operands), self.get_f(insn.rs1, 0));
        self.a.avx(format.scalar(), opcode, to, a, self.f(insn.rs2));
        self.finish(insn, format, exits, to);
        true
    }

    fn multiply_add(&mut self, insn: &Insn, format: Format) -> bool {
        // The forms that add to, or subtract from, the first operand.
        let opcode = match insn.op {
            Op::FmaddS | Op::FmaddD => 0xb9,
            Op::FmsubS | Op::FmsubD => 0xbb,
            Op::FnmsubS | Op::FnmsubD => 0xbd,
            Op::FnmaddS | Op::FnmaddD => 0xbf,
            _ => return false,
        };
        let operands = [insn.rs1, insn.rs2, insn.rs3];
        let exits = self.begin_with(format, &operands);
        let to = Self::target_f(insn.rd, &operands);
        let addend = self.get_f(insn.rs3, to);
        self.copy_f(to, addend);
        let a = self.get_f(insn.rs1, 1);
        self.a.fma(opcode, format.size(), to, a, self.f(insn.rs2));
        self.finish(insn, format, exits, to);
        true
    }

    // --- Moves and signs -------------------------------------------------------------------------------------------

    fn float_bits(&mut self, insn: &Insn, format: Format) -> bool {
        match insn.op {
            Op::FsgnjS | Op::FsgnjD | Op::FsgnjnS | Op::FsgnjnD | Op::FsgnjxS | Op::FsgnjxD => {
                self.inject_sign(insn, format);
            }
            Op::FmvXW | Op::FmvXD => {
                let exits = self.begin();
                let to = Self::target(insn.rd);
                match (format, mapped_f(insn.rs1)) {
                    (Single, Some(xmm)) => {
                        self.a.sse(Sse::P66, op::FROM_XMM, D, xmm, Xm::Gpr(Rax));
                        self.a.movsx(32, to, Rax);
                    }
                    (Single, None) => self.a.movsx(32, to, self.layout.f(insn.rs1)),
                    (Double, Some(xmm)) => self.a.sse(Sse::P66, op::FROM_XMM, Q, xmm, Xm::Gpr(to)),
                    (Double, None) => self.a.mov(Q, to, self.layout.f(insn.rs1)),
                }
                self.put(insn.rd, to);
                self.end(insn, exits);
            }
            Op::FmvWX => {
                let exits = self.begin();
                self.put_single(insn.rd, mapped_f(insn.rd), Self::x(insn.rs1));
                self.end(insn, exits);
            }
            Op::FmvDX => {
                let exits = self.begin();
                let from = self.get(insn.rs1, Rax);
                self.put_bits(format, insn.rd, from);
                self.end(insn, exits);
            }
            Op::FliS | Op::FliD => {
                let exits = self.begin();
                let bits = match format {
                    Single => !0 << 32 | u64::from(isa::float::f32_constant(insn.rs1)),
                    Double => isa::float::f64_constant(insn.rs1),
                };
                self.a.mov_imm(Rax, bits);
                self.put_bits(format, insn.rd, Rax);
                self.end(insn, exits);
            }
            _ => return false,
        }
        true
    }

    fn inject_sign(&mut self, insn: &Insn, format: Format) {
        let exits = self.begin_with(format, &[insn.rs1, insn.rs2]);
        let negated = matches!(insn.op, Op::FsgnjnS | Op::FsgnjnD);
        let xor = matches!(insn.op, Op::FsgnjxS | Op::FsgnjxD);
        let to = mapped_f(insn.rd).unwrap_or(0);
        let a = self.get_f(insn.rs1, 0);
        if insn.rs1 == insn.rs2 && !negated && !xor {
            self.put_f(format, insn.rd, a);
            return self.end(insn, exits);
        }
        // XMM2: the sign bit.
        self.ones(2);
        self.a.sse(Sse::P66, op::SHIFT, D, 6, Xm::Xmm(2));
        self.a.byte(63);
        if format == Single {
            self.a.sse(Sse::P66, op::SHIFT, D, 2, Xm::Xmm(2));
            self.a.byte(32);
        }
        if insn.rs1 == insn.rs2 {
            let (opcode, x, y) = if negated { (op::XOR, a, 2) } else { (op::AND_NOT, 2, a) };
            self.a.avx(Sse::None, opcode, to, x, Xm::Xmm(y));
        } else {
            let b = self.get_f(insn.rs2, 1);
            let opcode = if negated { op::AND_NOT } else { op::AND };
            self.a.avx(Sse::None, opcode, 1, b, Xm::Xmm(2));
            if xor {
                self.a.avx(Sse::None, op::XOR, to, a, Xm::Xmm(1));
            } else {
                self.a.avx(Sse::None, op::AND_NOT, 0, 2, Xm::Xmm(a));
                self.a.avx(Sse::None, op::OR, to, 0, Xm::Xmm(1));
            }
        }
        self.put_f(format, insn.rd, to);
        self.end(insn, exits);
    }

    // --- Conversions -----------------------------------------------------------------------------------------------

    fn float_to_integer(&mut self, insn: &Insn, format: Format) -> bool {
        let integer = match insn.op {
            Op::FcvtWS | Op::FcvtWD => W,
            Op::FcvtWuS | Op::FcvtWuD => WU,
            Op::FcvtLS | Op::FcvtLD => L,
            Op::FcvtLuS | Op::FcvtLuD => LU,
            _ => return false,
        };
        let rounds = match insn.rm {
            1 | DYNAMIC => None,
            rm => match rounding(rm) {
                Some(mode) => Some(mode),
                None => return false,
            },
        };
        let mut exits = self.begin_with(format, &[insn.rs1]);
        // Out of range, SSE may say that the result is inexact, too, if it rounds first or to more bits.
        if rounds.is_some() || !integer.signed {
            let place = self.layout.f(insn.rs1);
            match (mapped_f(insn.rs1), format) {
                (Some(xmm), Double) => self.a.sse3a(op::EXTRACT, D, xmm, Xm::Gpr(Rax), 1),
                (Some(xmm), Single) => {
                    self.a.sse(Sse::P66, op::FROM_XMM, D, xmm, Xm::Gpr(Rax));
                }
                (None, Double) => self.a.mov(D, Rax, place.plus(4)),
                (None, Single) => self.a.mov(D, Rax, place),
            }
            // Negative numbers are beyond the limit of the unsigned formats as well.
            if integer.signed {
                self.a.alu_imm(Alu::And, D, Rax, i32::MAX);
            }
            self.a.alu_imm(Alu::Cmp, D, Rax, limit(format, integer));
            exits.step.push(self.a.jcc(Cond::Ae));
        }
        let mut from = self.get_f(insn.rs1, 0);
        if let Some(mode) = rounds {
            self.a.round(format == Double, 0, from, mode);
            from = 0;
        }
        let opcode = if insn.rm == DYNAMIC { op::TO_INTEGER } else { op::TRUNCATE };
        let size = if integer.signed { integer.size } else { Q };
        self.a.sse(format.scalar(), opcode, size, Rax as u8, Xm::Xmm(from));
        if integer.signed && rounds.is_none() {
            // What is out of range is the smallest number.
            self.a.alu_imm(Alu::Cmp, size, Rax, 1);
            exits.step.push(self.a.jcc(Cond::O));
        }
        match integer.size {
            D => {
                let to = Self::target(insn.rd);
                self.a.movsx(32, to, Rax);
                self.put(insn.rd, to);
            }
            Q => self.put(insn.rd, Rax),
        }
        self.end(insn, exits);
        true
    }

    fn float_from_integer(&mut self, insn: &Insn, format: Format) -> bool {
        let (integer, is_exact) = match insn.op {
            Op::FcvtSW => (W, false),
            Op::FcvtSWu => (WU, false),
            Op::FcvtSL | Op::FcvtDL => (L, false),
            Op::FcvtSLu | Op::FcvtDLu => (LU, false),
            Op::FcvtDW => (W, true),
            Op::FcvtDWu => (WU, true),
            _ => return false,
        };
        if insn.rm != DYNAMIC && !(is_exact && insn.rm <= 4) {
            return false;
        }
        let mut exits = self.begin();
        let to = Self::target_f(insn.rd, &[]);
        // The conversion keeps the rest of its target.
        self.ones(to);
        let from = if integer.signed {
            Self::x(insn.rs1)
        } else {
            self.a.mov(integer.size, Rax, Self::rm(insn.rs1));
            if integer.size == Q {
                self.a.test(Q, Rax, Rax);
                exits.step.push(self.a.jcc(Cond::S));
            }
            Xm::Gpr(Rax)
        };
        let size = if integer.signed { integer.size } else { Q };
        self.a.sse(format.scalar(), op::FROM_INTEGER, size, to, from);
        self.put_f(format, insn.rd, to);
        self.end(insn, exits);
        true
    }

    /// Conversions between the formats.
    fn float_format(&mut self, insn: &Insn) -> bool {
        let (from, to) = match insn.op {
            Op::FcvtSD if insn.rm == DYNAMIC => (Double, Single),
            Op::FcvtDS if insn.rm == DYNAMIC || insn.rm <= 4 => (Single, Double),
            _ => return false,
        };
        let exits = self.begin_with(from, &[insn.rs1]);
        let (xmm, a) = (Self::target_f(insn.rd, &[insn.rs1]), self.get_f(insn.rs1, 1));
        self.ones(xmm);
        self.a.sse(from.scalar(), op::CONVERT, D, xmm, Xm::Xmm(a));
        self.finish(insn, to, exits, xmm);
        true
    }

    /// Rounding to an integer in floating point.
    fn float_round(&mut self, insn: &Insn, format: Format) -> bool {
        /// Take the mode from MXCSR; raise no flag for what is not exact.
        const MXCSR: u8 = 4;
        const QUIET: u8 = 8;
        let quiet = match insn.op {
            Op::FroundS | Op::FroundD => QUIET,
            Op::FroundnxS | Op::FroundnxD => 0,
            _ => return false,
        };
        let mode = match (insn.rm, rounding(insn.rm)) {
            (DYNAMIC, _) => MXCSR,
            (_, Some(mode)) => mode,
            _ => return false,
        };
        let exits = self.begin_with(format, &[insn.rs1]);
        let a = self.get_f(insn.rs1, 0);
        self.copy_f(0, a);
        self.a.round(format == Double, 0, 0, mode | quiet);
        self.finish(insn, format, exits, 0);
        true
    }

    // --- Comparisons -----------------------------------------------------------------------------------------------

    fn float_compare(&mut self, insn: &Insn, format: Format) -> bool {
        let (opcode, cond) = match insn.op {
            Op::FminS | Op::FminD => {
                self.choose(insn, format, op::MIN, op::OR);
                return true;
            }
            Op::FmaxS | Op::FmaxD => {
                self.choose(insn, format, op::MAX, op::AND);
                return true;
            }
            Op::FeqS | Op::FeqD => (op::COMPARE, Cond::E),
            Op::FltS | Op::FltD => (op::COMPARE_SIGNALING, Cond::A),
            Op::FleS | Op::FleD => (op::COMPARE_SIGNALING, Cond::Ae),
            Op::FltqS | Op::FltqD => (op::COMPARE, Cond::A),
            Op::FleqS | Op::FleqD => (op::COMPARE, Cond::Ae),
            _ => return false,
        };
        let exits = self.begin_with(format, &[insn.rs1, insn.rs2]);
        // The other way round: "above" is false when the operands are unordered, "below" is true.
        let b = self.get_f(insn.rs2, 0);
        self.a.sse(format.compare(), opcode, D, b, self.f(insn.rs1));
        if cond == Cond::E {
            self.a.setcc(Cond::Np, Rax);
            self.a.setcc(Cond::E, Rdx);
            self.a.alu(Alu::And, D, Rm::Reg(Rax), Rdx);
            let to = Self::target(insn.rd);
            self.a.movzx(8, to, Rax);
            self.put(insn.rd, to);
        } else {
            self.put_cond(insn.rd, cond);
        }
        self.end(insn, exits);
        true
    }

    /// Minimum or maximum. `equal` combines operands that are equal: they are the same but for the signs of zeros.
    fn choose(&mut self, insn: &Insn, format: Format, opcode: u8, equal: u8) {
        let mut exits = self.begin_with(format, &[insn.rs1, insn.rs2]);
        let (a, b) = (self.get_f(insn.rs1, 0), self.get_f(insn.rs2, 1));
        self.a.sse(format.compare(), op::COMPARE, D, a, Xm::Xmm(b));
        exits.step.push(self.a.jcc(Cond::P));
        let differ = self.a.jcc(Cond::Ne);
        self.a.avx(Sse::None, equal, 2, a, Xm::Xmm(b));
        let done = self.a.jmp();
        self.a.fix(differ);
        self.a.avx(format.scalar(), opcode, 2, a, Xm::Xmm(b));
        self.a.fix(done);
        self.put_f(format, insn.rd, 2);
        self.end(insn, exits);
    }
}

/// Whether the template uses RCX only where it calls the runtime, and writes no integer register.
pub(super) fn keeps_rcx(insn: &Insn) -> bool {
    match insn.op {
        Op::FmaddS
        | Op::FmsubS
        | Op::FnmsubS
        | Op::FnmaddS
        | Op::FaddS
        | Op::FsubS
        | Op::FmulS
        | Op::FdivS
        | Op::FsqrtS
        | Op::FmaddD
        | Op::FmsubD
        | Op::FnmsubD
        | Op::FnmaddD
        | Op::FaddD
        | Op::FsubD
        | Op::FmulD
        | Op::FdivD
        | Op::FsqrtD => insn.rm == DYNAMIC,
        Op::FsgnjS | Op::FsgnjnS | Op::FsgnjxS | Op::FsgnjD | Op::FsgnjnD | Op::FsgnjxD => true,
        Op::FminS | Op::FmaxS | Op::FminD | Op::FmaxD | Op::FmvWX | Op::FmvDX => true,
        _ => false,
    }
}

/// What SSE's rounding instructions call a static rounding mode, if they have it.
fn rounding(rm: u8) -> Option<u8> {
    match rm {
        0 => Some(0),
        1 => Some(3),
        2 => Some(1),
        3 => Some(2),
        _ => None,
    }
}

/// The top 32 bits of a number such that all that are less, rounded in whatever way, are within an integer format's range.
fn limit(format: Format, integer: Integer) -> i32 {
    match (format, integer.size, integer.signed) {
        (Double, D, true) => 0x41d0_0000,  // 2^30
        (Double, D, false) => 0x41ef_ffff, // 2^32 - 2^11
        (Double, Q, true) => 0x43d0_0000,  // 2^62
        (Double, Q, false) => 0x43e0_0000, // 2^63
        (Single, D, true) => 0x4e80_0000,
        (Single, D, false) => 0x4f7f_ffff,
        (Single, Q, true) => 0x5e80_0000,
        (Single, Q, false) => 0x5f00_0000,
    }
}

//! `cbo.zero`, with which kernels clear their pages.
//!
//! # Invariants
//! - INV-BLOCK-1: inline code runs only while `Tables::zero_inline` is 1 and the block may be written without tracking.

use std::mem::offset_of;

use isa::{Insn, Op};

use crate::asm::{Alu, Cond, Mem, Reg, Size, Sse, Xm};
use crate::tables::Tables;

use super::Emit;
use Reg::{Rax, Rcx};
use Size::{D, Q};

/// Bytes of a block.
const BLOCK: i32 = 64;
/// `xorps` and `movups` to memory.
const XOR: u8 = 0x57;
const STORE: u8 = 0x11;

impl Emit<'_> {
    /// Translates `cbo.zero`; false for other instructions.
    pub(super) fn zero_block(&mut self, insn: &Insn) -> bool {
        if insn.op != Op::CboZero {
            return false;
        }
        let allowed = self.table(offset_of!(Tables, zero_inline));
        self.a.alu_imm(Alu::Cmp, D, allowed, 1);
        let forbidden = self.a.jcc(Cond::Ne);
        self.address(insn.rs1, 0);
        self.a.alu_imm(Alu::And, Q, Rax, -BLOCK);
        let miss = self.translate_rax(BLOCK, true);
        self.a.sse(Sse::None, XOR, D, 0, Xm::Xmm(0));
        for at in (0..BLOCK).step_by(16) {
            let to = Mem::indexed(Rax, Rcx, at);
            self.a.sse(Sse::None, STORE, D, 0, Xm::Mem(to));
        }
        self.step_from(vec![forbidden, miss]);
        true
    }
}

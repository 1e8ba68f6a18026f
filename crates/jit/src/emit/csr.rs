//! The control and status registers that a kernel uses on every entry, `sstatus`, which it also uses as the switch of
//! interrupts, and those of floating point.
//!
//! # Invariants
//! - INV-CSR-1: inline code runs only while `Tables::csr_inline` is 1: in S-mode, without MPRV or TVM.
//! - INV-CSR-2: a write of `sstatus` that changes MXR, or that sets SIE while an interrupt is pending and enabled in `mie`,
//!   is the runtime's.
//! - INV-CSR-3: those of floating point are inline while `Tables::fp_inline` is 1, and the rounding mode is only read.
//!
//! # References
//! Privileged Architecture 1.13, section 12.1.

use std::mem::offset_of;

use isa::{Insn, Op};

use crate::asm::{Alu, Cond, Fixup, Mem, Reg, Shift, Size};
use crate::runtime::Csr;
use crate::tables::Tables;

use super::{Emit, float};
use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

/// Flags in `fcsr`.
const FFLAGS: i32 = 0x1f;
/// Flags in MXCSR, that of denormal operands included.
const MXCSR_FLAGS: i32 = 0x3f;
const SIE: i32 = 1 << 1;
const SUM_BIT: u8 = 18;
const MXR: i32 = 1 << 19;
const FS: i32 = 3 << 13;
/// Fields of `sstatus` that software can write: SIE, SPIE, SPP, FS, SUM, MXR.
const WRITABLE: i32 = SIE | 1 << 5 | 1 << 8 | FS | 1 << SUM_BIT | MXR;
/// Those that it can read, without SD: UXL beside them.
const READABLE: u64 = WRITABLE as u64 | 2 << 32;

impl Emit<'_> {
    /// Translates an instruction of Zicsr; false when it is the runtime's.
    pub(super) fn control(&mut self, insn: &Insn) -> bool {
        if !(insn.op >= Op::CsrRw && insn.op <= Op::CsrRci) {
            return false;
        }
        let is_write = insn.op == Op::CsrRw || insn.op == Op::CsrRwi || insn.rs1 != 0;
        let csr = match insn.imm {
            0x001..=0x003 => return self.float_status(insn, is_write),
            0x100 => {
                self.status(insn, is_write);
                return true;
            }
            0x140 => Csr::Sscratch,
            0x141 => Csr::Sepc,
            0x142 => Csr::Scause,
            0x143 => Csr::Stval,
            _ => return false,
        };
        if is_write && insn.op != Op::CsrRw {
            return false;
        }
        let cold = self.check();
        let place = self.layout.csr(csr);
        if is_write {
            self.load(Rcx, insn.rs1);
            if csr == Csr::Sepc {
                self.a.alu_imm(Alu::And, Q, Rcx, -2);
            }
        }
        if insn.rd != 0 {
            self.a.mov(Q, Rax, place);
        }
        if is_write {
            self.a.store(Q, place, Rcx);
        }
        self.put(insn.rd, Rax);
        self.step_from(vec![cold]);
        true
    }

    /// Reads `fflags`, `frm` or `fcsr`, or swaps `fflags`; false when it is the runtime's. Flags that inline code raised are
    /// in MXCSR.
    fn float_status(&mut self, insn: &Insn, is_write: bool) -> bool {
        let is_swap = insn.imm == 1 && matches!(insn.op, Op::CsrRw | Op::CsrRwi);
        if is_write && !is_swap {
            return false;
        }
        let inline = self.table(offset_of!(Tables, fp_inline));
        self.a.alu_imm(Alu::Cmp, D, inline, 1);
        let cold = self.a.jcc(Cond::Ne);
        let (fcsr, mxcsr) = (self.layout.csr(Csr::Fcsr), self.table(offset_of!(Tables, mxcsr)));
        self.a.stmxcsr(mxcsr);
        if insn.rd != 0 {
            self.a.mov(D, Rax, mxcsr);
            self.a.alu_imm(Alu::And, D, Rax, MXCSR_FLAGS);
            let flags = self.table(offset_of!(Tables, flags));
            self.a.movzx(8, Rdx, Mem { index: Some((Rax, 0)), ..flags });
            self.a.alu_load(Alu::Or, D, Rdx, fcsr);
            match insn.imm {
                1 => self.a.alu_imm(Alu::And, D, Rdx, FFLAGS),
                2 => self.a.shift(Shift::Shr, D, Rdx, 5),
                _ => {}
            }
        }
        if is_swap {
            if insn.op == Op::CsrRw {
                self.load(Rcx, insn.rs1);
                self.a.alu_imm(Alu::And, D, Rcx, FFLAGS);
            } else {
                self.a.mov_imm(Rcx, u64::from(insn.rs1));
            }
            self.a.mov(D, Rax, fcsr);
            self.a.alu_imm(Alu::And, D, Rax, !FFLAGS);
            self.a.alu_load(Alu::Or, D, Rax, Rcx);
            self.a.store(Q, fcsr, Rax);
            self.a.alu_imm(Alu::And, D, mxcsr, !MXCSR_FLAGS);
            self.a.ldmxcsr(mxcsr);
        }
        self.put(insn.rd, Rdx);
        self.step_from(vec![cold]);
        true
    }

    /// Jumps when the registers are not to be used inline.
    fn check(&mut self) -> Fixup {
        let inline = self.table(offset_of!(Tables, csr_inline));
        self.a.alu_imm(Alu::Cmp, D, inline, 1);
        self.a.jcc(Cond::Ne)
    }

    fn status(&mut self, insn: &Insn, is_write: bool) {
        let mut cold = vec![self.check()];
        let place = self.layout.csr(Csr::Mstatus);
        self.a.mov(Q, Rdx, place);
        if is_write {
            self.new_status(insn, &mut cold);
            self.a.store(Q, place, Rax);
            if matches!(insn.op, Op::CsrRw | Op::CsrRs | Op::CsrRc | Op::CsrRwi) {
                self.follow_status();
            }
        }
        if insn.rd != 0 {
            // SD says that FS is Dirty: FS + 1 carries into bit 15 then.
            self.a.mov(D, Rcx, Rdx);
            self.a.alu_imm(Alu::And, D, Rcx, FS);
            self.a.alu_imm(Alu::Add, D, Rcx, 1 << 13);
            self.a.alu_imm(Alu::And, D, Rcx, 1 << 15);
            self.a.shift(Shift::Shl, Q, Rcx, 48);
            self.a.mov_imm(Rax, READABLE);
            self.a.alu_load(Alu::And, Q, Rax, Rdx);
            self.a.alu_load(Alu::Or, Q, Rax, Rcx);
            self.put(insn.rd, Rax);
        }
        self.step_from(cold);
        // FS may have changed.
        self.float = float::Known::default();
    }

    /// RAX = the new `mstatus`, from the old one in RDX.
    fn new_status(&mut self, insn: &Insn, cold: &mut Vec<Fixup>) {
        let constant = i32::from(insn.rs1) & WRITABLE;
        self.a.mov(Q, Rax, Rdx);
        match insn.op {
            Op::CsrRsi => self.a.alu_imm(Alu::Or, Q, Rax, constant),
            Op::CsrRci => return self.a.alu_imm(Alu::And, Q, Rax, !constant),
            Op::CsrRwi => {
                self.a.alu_imm(Alu::And, Q, Rax, !WRITABLE);
                self.a.alu_imm(Alu::Or, Q, Rax, constant);
            }
            op => {
                self.load(Rcx, insn.rs1);
                self.a.alu_imm(Alu::And, Q, Rcx, WRITABLE);
                match op {
                    Op::CsrRs => {}
                    Op::CsrRc => self.a.alu_imm(Alu::Xor, Q, Rcx, -1),
                    _ => self.a.alu_imm(Alu::And, Q, Rax, !WRITABLE),
                }
                let how = if op == Op::CsrRc { Alu::And } else { Alu::Or };
                self.a.alu_load(how, Q, Rax, Rcx);
            }
        }
        if insn.op != Op::CsrRsi {
            self.a.mov(D, Rcx, Rax);
            self.a.alu_load(Alu::Xor, D, Rcx, Rdx);
            self.a.test_imm(D, Rcx, MXR);
            cold.push(self.a.jcc(Cond::Ne));
        }
        self.a.test_imm(D, Rax, SIE);
        let off = self.a.jcc(Cond::E);
        self.a.mov(Q, Rcx, self.layout.csr(Csr::Lines));
        self.a.alu_load(Alu::Or, Q, Rcx, self.layout.csr(Csr::MipSoft));
        self.a.alu_load(Alu::And, Q, Rcx, self.layout.csr(Csr::Mie));
        cold.push(self.a.jcc(Cond::Ne));
        self.a.fix(off);
    }

    /// Does what follows from a new `mstatus`, in RAX: the context of data accesses depends on SUM, what floating-point
    /// code may do on FS. Uses RCX.
    fn follow_status(&mut self) {
        self.a.mov(D, Rcx, Rax);
        self.a.shift(Shift::Shr, D, Rcx, SUM_BIT);
        self.a.alu_imm(Alu::And, D, Rcx, 1);
        self.a.alu_load(Alu::Add, Q, Rcx, self.table(offset_of!(Tables, supervisor_id)));
        self.a.store(Q, self.table(Tables::DATA_ID), Rcx);
        // Dirty is the highest value of FS.
        self.a.alu_imm(Alu::And, D, Rax, FS);
        self.a.zero(Rcx);
        self.a.alu_imm(Alu::Cmp, D, Rax, FS);
        self.a.setcc(Cond::E, Rcx);
        self.a.alu_load(Alu::And, D, Rcx, self.table(offset_of!(Tables, frm_inline)));
        self.a.store(D, self.table(offset_of!(Tables, fp_inline)), Rcx);
    }
}

//! The A extension.
//!
//! # Invariants
//! - INV-ATOMIC-1: an SC succeeds when its address is the reservation's and memory still holds what LR read, as in the
//!   interpreter.
//!
//! # Determinism
//! One thread runs all harts of a machine in turns, so that plain loads and stores are atomic.

use std::mem::offset_of;

use isa::{Insn, Op};

use crate::asm::{Alu, Cond, Fixup, Mem, Reg, Size};
use crate::runtime::Csr;
use crate::tables::{NO_RESERVATION, Tables};

use super::Emit;
use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

/// How memory changes.
enum Change {
    Swap,
    Combine(Alu),
    /// Memory stays when it compares like this with the operand.
    Select(Cond),
}

impl Emit<'_> {
    /// Translates an instruction of the A extension; false when it is none.
    pub(super) fn atomic(&mut self, insn: &Insn) -> bool {
        let size = if insn.op >= Op::LrD { Q } else { D };
        let change = match insn.op {
            Op::LrW | Op::LrD => {
                self.load_reserved(insn, size);
                return true;
            }
            Op::ScW | Op::ScD => {
                self.store_conditional(insn, size);
                return true;
            }
            Op::AmoSwapW | Op::AmoSwapD => Change::Swap,
            Op::AmoAddW | Op::AmoAddD => Change::Combine(Alu::Add),
            Op::AmoXorW | Op::AmoXorD => Change::Combine(Alu::Xor),
            Op::AmoAndW | Op::AmoAndD => Change::Combine(Alu::And),
            Op::AmoOrW | Op::AmoOrD => Change::Combine(Alu::Or),
            Op::AmoMinW | Op::AmoMinD => Change::Select(Cond::L),
            Op::AmoMaxW | Op::AmoMaxD => Change::Select(Cond::G),
            Op::AmoMinuW | Op::AmoMinuD => Change::Select(Cond::B),
            Op::AmoMaxuW | Op::AmoMaxuD => Change::Select(Cond::A),
            _ => return false,
        };
        let cold = self.place_in_rcx(insn, size, true);
        let place = Mem::new(Rcx, 0);
        self.load_sized(size, Rax, place);
        match change {
            Change::Swap => {
                let value = self.get(insn.rs2, Rdx);
                self.a.store(size, place, value);
            }
            Change::Combine(op) => {
                let value = self.get(insn.rs2, Rdx);
                self.a.alu(op, size, place, value);
            }
            Change::Select(cond) => {
                self.load(Rdx, insn.rs2);
                self.a.alu(Alu::Cmp, size, Rax, Rdx);
                self.a.cmov(cond, size, Rdx, Rax);
                self.a.store(size, place, Rdx);
            }
        }
        self.put(insn.rd, Rax);
        self.step_from(cold);
        true
    }

    /// RCX = host address of what `rs1` points to; returns the jumps for when it is misaligned or the TLB does not allow
    /// the access.
    fn place_in_rcx(&mut self, insn: &Insn, size: Size, write: bool) -> Vec<Fixup> {
        self.address(insn.rs1, 0);
        self.a.test_imm(D, Rax, if size == Q { 7 } else { 3 });
        let misaligned = self.a.jcc(Cond::Ne);
        // What is aligned stays in its page.
        let miss = self.translate_rax(1, write);
        self.a.alu(Alu::Add, Q, Rcx, Rax);
        vec![misaligned, miss]
    }

    /// Loads, with sign extension.
    fn load_sized(&mut self, size: Size, to: Reg, from: Mem) {
        match size {
            Q => self.a.mov(Q, to, from),
            D => self.a.movsx(32, to, from),
        }
    }

    fn load_reserved(&mut self, insn: &Insn, size: Size) {
        let cold = self.place_in_rcx(insn, size, false);
        self.load_sized(size, Rax, Mem::new(Rcx, 0));
        self.a.alu_load(Alu::Sub, Q, Rcx, self.table(offset_of!(Tables, ram_bias)));
        self.a.store(Q, self.layout.csr(Csr::ReservationGpa), Rcx);
        self.a.store(Q, self.layout.csr(Csr::ReservationValue), Rax);
        self.put(insn.rd, Rax);
        self.step_from(cold);
    }

    fn store_conditional(&mut self, insn: &Insn, size: Size) {
        let cold = self.place_in_rcx(insn, size, true);
        let (gpa, place) = (self.layout.csr(Csr::ReservationGpa), Mem::new(Rcx, 0));
        self.a.mov(Q, Rdx, Rcx);
        self.a.alu_load(Alu::Sub, Q, Rdx, self.table(offset_of!(Tables, ram_bias)));
        self.a.mov_imm(Rax, 1);
        self.a.alu_load(Alu::Cmp, Q, Rdx, gpa);
        let elsewhere = self.a.jcc(Cond::Ne);
        self.load_sized(size, Rdx, place);
        self.a.alu_load(Alu::Cmp, Q, Rdx, self.layout.csr(Csr::ReservationValue));
        let changed = self.a.jcc(Cond::Ne);
        let value = self.get(insn.rs2, Rdx);
        self.a.store(size, place, value);
        self.a.mov_imm(Rax, 0);
        self.a.fix(elsewhere);
        self.a.fix(changed);
        self.a.store_imm(Q, gpa, NO_RESERVATION as i32);
        self.put(insn.rd, Rax);
        self.step_from(cold);
    }
}

//! Integer arithmetic: RV64I and M.
//!
//! # Invariants
//! - INV-INTEGER-1: an operand is read before `rd`, should it be the same register, is written; RAX, RCX and RDX hold what
//!   is between, and no other host register changes.
//! - INV-INTEGER-2: nothing here can fault: the host's division is not asked what it has no answer for.

use isa::{Insn, Op};

use crate::asm::{Alu, Cond, Reg, Rm, Shift, Size, Unary};
use crate::layout::mapped;

use super::Emit;
use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

impl Emit<'_> {
    /// Translates an instruction of RV64I or M; false when it is none.
    pub(super) fn integer(&mut self, insn: &Insn) -> bool {
        let imm = insn.imm;
        match insn.op {
            Op::Lui => self.put_imm(insn.rd, imm.into()),
            Op::Auipc => {
                // The offset may not fit: up to 2^31 and the page's 4095.
                match i32::from(self.offset).checked_add(imm) {
                    Some(offset) => self.put_address(insn.rd, offset),
                    None => self.step(),
                }
            }
            op if insn.rd == 0 && is_plain(op) => {}
            Op::Addi => match self.known_address {
                Some(address) => self.put_address(insn.rd, address),
                None => self.addi(insn),
            },
            Op::Slti => self.set_imm(insn, Cond::L),
            Op::Sltiu => self.set_imm(insn, Cond::B),
            Op::Xori if imm == -1 => self.unary_to(insn, Unary::Not, Q),
            Op::Xori => self.alu_imm(insn, Alu::Xor),
            Op::Ori => self.alu_imm(insn, Alu::Or),
            Op::Andi if imm == 0xff => self.extend(insn, 8),
            Op::Andi => self.alu_imm(insn, Alu::And),
            Op::Slli => self.shift_imm(insn, Shift::Shl, Q),
            Op::Srli => self.shift_imm(insn, Shift::Shr, Q),
            Op::Srai => self.shift_imm(insn, Shift::Sar, Q),
            Op::Add => self.alu(insn, Alu::Add, Q),
            Op::Sub => self.sub(insn, Q),
            Op::Sll => self.shift(insn, Shift::Shl, Q),
            Op::Slt => self.set(insn, Cond::L),
            Op::Sltu => self.set(insn, Cond::B),
            Op::Xor => self.alu(insn, Alu::Xor, Q),
            Op::Srl => self.shift(insn, Shift::Shr, Q),
            Op::Sra => self.shift(insn, Shift::Sar, Q),
            Op::Or => self.alu(insn, Alu::Or, Q),
            Op::And => self.alu(insn, Alu::And, Q),
            Op::Addiw => self.addiw(insn),
            Op::Slliw => self.shift_imm(insn, Shift::Shl, D),
            Op::Srliw => self.shift_imm(insn, Shift::Shr, D),
            Op::Sraiw => self.shift_imm(insn, Shift::Sar, D),
            Op::Addw => self.alu(insn, Alu::Add, D),
            Op::Subw => self.sub(insn, D),
            Op::Sllw => self.shift(insn, Shift::Shl, D),
            Op::Srlw => self.shift(insn, Shift::Shr, D),
            Op::Sraw => self.shift(insn, Shift::Sar, D),
            _ => return self.multiply(insn),
        }
        true
    }

    fn multiply(&mut self, insn: &Insn) -> bool {
        match insn.op {
            Op::Mul => self.mul(insn, Q),
            Op::Mulw => self.mul(insn, D),
            Op::Mulh => self.mul_high(insn, Unary::Imul),
            Op::Mulhu => self.mul_high(insn, Unary::Mul),
            Op::Mulhsu => self.mulhsu(insn),
            Op::Div => self.divide(insn, Q, true, false),
            Op::Divu => self.divide(insn, Q, false, false),
            Op::Rem => self.divide(insn, Q, true, true),
            Op::Remu => self.divide(insn, Q, false, true),
            Op::Divw => self.divide(insn, D, true, false),
            Op::Divuw => self.divide(insn, D, false, false),
            Op::Remw => self.divide(insn, D, true, true),
            Op::Remuw => self.divide(insn, D, false, true),
            _ => return false,
        }
        true
    }

    fn addi(&mut self, insn: &Insn) {
        let (rd, rs1, imm) = (insn.rd, insn.rs1, insn.imm);
        match (mapped(rd), mapped(rs1)) {
            _ if rs1 == 0 => self.put_imm(rd, imm.into()),
            (None, None) if rd == rs1 => self.a.alu_imm(Alu::Add, Q, Self::rm(rd), imm),
            (Some(d), Some(s)) if d == s => self.a.alu_imm(Alu::Add, Q, d, imm),
            (d, Some(s)) if imm != 0 => {
                let to = d.unwrap_or(Rax);
                self.a.lea(to, crate::asm::Mem::new(s, imm));
                self.put(rd, to);
            }
            (None, Some(s)) => self.put(rd, s),
            (d, _) => {
                let to = d.unwrap_or(Rax);
                self.load(to, rs1);
                if imm != 0 {
                    self.a.alu_imm(Alu::Add, Q, to, imm);
                }
                self.put(rd, to);
            }
        }
    }

    fn addiw(&mut self, insn: &Insn) {
        let (rd, imm) = (insn.rd, insn.imm);
        if insn.rs1 == 0 {
            return self.put_imm(rd, imm.into());
        }
        let to = Self::target(rd);
        if imm == 0 {
            self.a.movsx(32, to, Self::rm(insn.rs1));
        } else if let Some(s) = mapped(insn.rs1) {
            self.a.lea32(Rax, crate::asm::Mem::new(s, imm));
            self.a.movsx(32, to, Rax);
        } else {
            self.a.mov(D, Rax, Self::rm(insn.rs1));
            self.a.alu_imm(Alu::Add, D, Rax, imm);
            self.a.movsx(32, to, Rax);
        }
        self.put(rd, to);
    }

    fn alu_imm(&mut self, insn: &Insn, op: Alu) {
        let rd = insn.rd;
        if rd == insn.rs1 {
            return self.a.alu_imm(op, Q, Self::rm(rd), insn.imm);
        }
        let to = Self::target(rd);
        self.load(to, insn.rs1);
        self.a.alu_imm(op, Q, to, insn.imm);
        self.put(rd, to);
    }

    /// Zero-extends the low bits.
    pub(super) fn extend(&mut self, insn: &Insn, bits: u8) {
        let to = Self::target(insn.rd);
        self.a.movzx(bits, to, Self::rm(insn.rs1));
        self.put(insn.rd, to);
    }

    /// Sign-extends the low bits.
    pub(super) fn extend_signed(&mut self, insn: &Insn, bits: u8) {
        let to = Self::target(insn.rd);
        self.a.movsx(bits, to, Self::rm(insn.rs1));
        self.put(insn.rd, to);
    }

    pub(super) fn unary_to(&mut self, insn: &Insn, op: Unary, size: Size) {
        let to = Self::target(insn.rd);
        self.load(to, insn.rs1);
        self.a.unary(op, size, to);
        self.put(insn.rd, to);
    }

    fn shift_imm(&mut self, insn: &Insn, op: Shift, size: Size) {
        let (rd, by) = (insn.rd, insn.imm as u8);
        if size == Q && rd == insn.rs1 {
            return self.a.shift(op, Q, Self::rm(rd), by);
        }
        let to = Self::target(rd);
        match (size, op) {
            (Q, _) => {
                self.load(to, insn.rs1);
                self.a.shift(op, Q, to, by);
            }
            // The sign's copies are shifted in by a shift of all 64 bits.
            (D, Shift::Sar) => {
                self.a.movsx(32, to, Self::rm(insn.rs1));
                self.a.shift(op, Q, to, by);
            }
            (D, _) => {
                self.a.mov(D, to, Self::rm(insn.rs1));
                self.a.shift(op, D, to, by);
                // A shift to the right leaves no sign.
                if op == Shift::Shl || by == 0 {
                    self.a.movsx(32, to, to);
                }
            }
        }
        self.put(rd, to);
    }

    pub(super) fn shift(&mut self, insn: &Insn, op: Shift, size: Size) {
        let to = Self::target(insn.rd);
        let by = self.get(insn.rs2, Rcx);
        if size == D {
            self.a.shift_by(op, D, Rax, Self::rm(insn.rs1), by);
            self.a.movsx(32, to, Rax);
        } else {
            self.a.shift_by(op, Q, to, Self::rm(insn.rs1), by);
        }
        self.put(insn.rd, to);
    }

    /// A commutative operation.
    pub(super) fn alu(&mut self, insn: &Insn, op: Alu, size: Size) {
        let (rd, mut a, mut b) = (insn.rd, insn.rs1, insn.rs2);
        if rd == b {
            (a, b) = (b, a);
        }
        if size == D {
            self.a.mov(D, Rax, Self::rm(a));
            self.a.alu_load(op, D, Rax, Self::rm(b));
            let to = Self::target(rd);
            self.a.movsx(32, to, Rax);
            return self.put(rd, to);
        }
        if b == 0 || a == 0 {
            return match op {
                Alu::And => self.put_imm(rd, 0),
                _ => {
                    let from = self.get(a.max(b), Rax);
                    self.put(rd, from);
                }
            };
        }
        match (mapped(rd), mapped(a), mapped(b)) {
            (Some(d), _, _) if rd == a => self.a.alu_load(op, Q, d, Self::rm(b)),
            (None, _, Some(b)) if rd == a => self.a.alu(op, Q, Self::rm(rd), b),
            (d, Some(x), Some(y)) if op == Alu::Add => {
                let to = d.unwrap_or(Rax);
                self.a.lea(to, crate::asm::Mem::indexed(x, y, 0));
                self.put(rd, to);
            }
            (d, _, _) => {
                let to = d.unwrap_or(Rax);
                self.load(to, a);
                self.a.alu_load(op, Q, to, Self::rm(b));
                self.put(rd, to);
            }
        }
    }

    fn sub(&mut self, insn: &Insn, size: Size) {
        let (rd, a, b) = (insn.rd, insn.rs1, insn.rs2);
        if size == D {
            self.a.mov(D, Rax, Self::rm(a));
            self.a.alu_load(Alu::Sub, D, Rax, Self::rm(b));
            let to = Self::target(rd);
            self.a.movsx(32, to, Rax);
            return self.put(rd, to);
        }
        match (mapped(rd), mapped(b)) {
            (Some(d), _) if rd == a => self.a.alu_load(Alu::Sub, Q, d, Self::rm(b)),
            (None, Some(b)) if rd == a => self.a.alu(Alu::Sub, Q, Self::rm(rd), b),
            (Some(d), Some(_)) if rd == b && a == 0 => self.a.unary(Unary::Neg, Q, d),
            (d, _) => {
                // `rd` must not be written before `b` is read.
                let to = if rd == b { Rax } else { d.unwrap_or(Rax) };
                self.load(to, a);
                self.a.alu_load(Alu::Sub, Q, to, Self::rm(b));
                self.put(rd, to);
            }
        }
    }

    /// `rd` = whether the flags say `cond`. Flags are set already.
    pub(super) fn put_cond(&mut self, rd: u8, cond: Cond) {
        self.a.setcc(cond, Rax);
        let to = Self::target(rd);
        self.a.movzx(8, to, Rax);
        self.put(rd, to);
    }

    fn set_imm(&mut self, insn: &Insn, cond: Cond) {
        self.a.alu_imm(Alu::Cmp, Q, Self::rm(insn.rs1), insn.imm);
        self.put_cond(insn.rd, cond);
    }

    fn set(&mut self, insn: &Insn, cond: Cond) {
        let a = self.get(insn.rs1, Rax);
        self.a.alu_load(Alu::Cmp, Q, a, Self::rm(insn.rs2));
        self.put_cond(insn.rd, cond);
    }

    fn mul(&mut self, insn: &Insn, size: Size) {
        let (rd, mut a, mut b) = (insn.rd, insn.rs1, insn.rs2);
        if rd == b {
            (a, b) = (b, a);
        }
        let to = if size == D { Rax } else { Self::target(rd) };
        self.load(to, a);
        self.a.imul(size, to, Self::rm(b));
        if size == D {
            let d = Self::target(rd);
            self.a.movsx(32, d, Rax);
            return self.put(rd, d);
        }
        self.put(rd, to);
    }

    fn mul_high(&mut self, insn: &Insn, op: Unary) {
        self.load(Rax, insn.rs1);
        self.a.unary(op, Q, Self::rm(insn.rs2));
        self.put(insn.rd, Rdx);
    }

    /// mulhsu(a, b) = mulhu(a, b) - (a < 0 ? b : 0)
    fn mulhsu(&mut self, insn: &Insn) {
        self.load(Rcx, insn.rs1);
        self.a.mov(Q, Rax, Rcx);
        self.a.unary(Unary::Mul, Q, Self::rm(insn.rs2));
        self.a.shift(Shift::Sar, Q, Rcx, 63);
        self.a.alu_load(Alu::And, Q, Rcx, Self::rm(insn.rs2));
        self.a.alu(Alu::Sub, Q, Rm::Reg(Rdx), Rcx);
        self.put(insn.rd, Rdx);
    }

    /// Division with RISC-V's results for zero and overflow.
    fn divide(&mut self, insn: &Insn, size: Size, signed: bool, remainder: bool) {
        self.a.mov(size, Rcx, Self::rm(insn.rs2));
        self.a.mov(size, Rax, Self::rm(insn.rs1));
        self.a.test(size, Rcx, Rcx);
        let zero = self.a.jcc(Cond::E);
        let minus_one = signed.then(|| {
            self.a.alu_imm(Alu::Cmp, size, Rcx, -1);
            self.a.jcc(Cond::E)
        });
        if signed {
            self.a.sign_extend_rax(size);
            self.a.unary(Unary::Idiv, size, Rcx);
        } else {
            self.a.zero(Rdx);
            self.a.unary(Unary::Div, size, Rcx);
        }
        let mut done = vec![self.a.jmp()];
        self.a.fix(zero);
        // x / 0 = -1, x % 0 = x
        self.a.mov(size, Rdx, Rax);
        self.a.mov_imm(Rax, u64::MAX);
        if let Some(minus_one) = minus_one {
            done.push(self.a.jmp());
            self.a.fix(minus_one);
            // x / -1 = -x, x % -1 = 0, the smallest number included.
            self.a.unary(Unary::Neg, size, Rax);
            self.a.mov_imm(Rdx, 0);
        }
        for f in done {
            self.a.fix(f);
        }
        let from = if remainder { Rdx } else { Rax };
        if size == D {
            let to = Self::target(insn.rd);
            self.a.movsx(32, to, from);
            self.put(insn.rd, to);
        } else {
            self.put(insn.rd, from);
        }
    }
}

/// Without effect when the destination is x0.
fn is_plain(op: Op) -> bool {
    (op >= Op::Addi && op <= Op::Sraw) || (op >= Op::Mul && op <= Op::Remuw)
}

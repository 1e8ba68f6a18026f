//! Bit manipulation: Zba, Zbb, Zbs, Zicond, Zbc, Zbkb and Zbkx.
//!
//! # Invariants
//! - INV-BITS-1: an operand is read before `rd`, should it be the same register, is written; RAX, RCX, RDX and SSE registers
//!   hold what is between, and none of these instructions of SSE touches MXCSR.
//! - INV-BITS-2: what this host has no instruction for is left to the runtime, which computes the same.

use isa::{Insn, Op};

use crate::asm::{Alu, Cond, Mem, Reg, Rm, Shift, Size, Sse, Unary, Xm};
use crate::layout::{Layout, mapped};

use super::Emit;
use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

/// BTS, BTR and BTC, by their opcodes' last byte on registers and their extension with a constant.
#[derive(Clone, Copy)]
enum Bit {
    Set,
    Reset,
    Complement,
}

impl Bit {
    fn opcode(self) -> u8 {
        match self {
            Self::Set => 0xab,
            Self::Reset => 0xb3,
            Self::Complement => 0xbb,
        }
    }

    fn extension(self) -> u8 {
        match self {
            Self::Set => 5,
            Self::Reset => 6,
            Self::Complement => 7,
        }
    }
}

/// LZCNT, TZCNT and POPCNT by their opcodes' last byte.
const LZCNT: u8 = 0xbd;
const TZCNT: u8 = 0xbc;
const POPCNT: u8 = 0xb8;

/// Second or third byte of SSE's opcodes.
mod op {
    pub(super) const SHUFFLE_BYTES: u8 = 0x00;
    pub(super) const EXTRACT_Q: u8 = 0x16;
    pub(super) const CARRYLESS_PRODUCT: u8 = 0x44;
    pub(super) const UNPACK_LOW_BYTES: u8 = 0x60;
    pub(super) const PACK_BYTES: u8 = 0x67;
    pub(super) const SHIFT_WORDS: u8 = 0x71;
    pub(super) const EQUAL_BYTES: u8 = 0x74;
    pub(super) const AND: u8 = 0xdb;
    pub(super) const ADD_BYTES_SATURATED: u8 = 0xdc;
    pub(super) const OR: u8 = 0xeb;
    pub(super) const XOR: u8 = 0xef;
}

/// Without effect when the destination is x0.
fn is_plain(op: Op) -> bool {
    (op >= Op::AddUw && op <= Op::CzeroNez) || (op >= Op::Clmul && op <= Op::Xperm8)
}

impl Emit<'_> {
    /// Translates an instruction of these extensions; false when it is none, or this host cannot.
    pub(super) fn bits(&mut self, insn: &Insn) -> bool {
        match insn.op {
            op if insn.rd == 0 && is_plain(op) => {}
            Op::AddUw => self.shifted_add(insn, 0, D),
            Op::Sh1add => self.shifted_add(insn, 1, Q),
            Op::Sh2add => self.shifted_add(insn, 2, Q),
            Op::Sh3add => self.shifted_add(insn, 3, Q),
            Op::Sh1addUw => self.shifted_add(insn, 1, D),
            Op::Sh2addUw => self.shifted_add(insn, 2, D),
            Op::Sh3addUw => self.shifted_add(insn, 3, D),
            Op::SlliUw => self.shift_word(insn),
            Op::Andn => self.and_not(insn),
            Op::Orn => self.or_not(insn),
            Op::Xnor => self.xor_not(insn),
            Op::Clz => self.count(insn, LZCNT, Q),
            Op::Ctz => self.count(insn, TZCNT, Q),
            Op::Cpop => self.count(insn, POPCNT, Q),
            Op::Clzw => self.count(insn, LZCNT, D),
            Op::Ctzw => self.count(insn, TZCNT, D),
            Op::Cpopw => self.count(insn, POPCNT, D),
            Op::Max => self.select(insn, Cond::L),
            Op::Maxu => self.select(insn, Cond::B),
            Op::Min => self.select(insn, Cond::G),
            Op::Minu => self.select(insn, Cond::A),
            Op::SextB => self.extend_signed(insn, 8),
            Op::SextH => self.extend_signed(insn, 16),
            Op::ZextH => self.extend(insn, 16),
            Op::Rol => self.rotate(insn, Shift::Rol, Q),
            Op::Ror => self.rotate(insn, Shift::Ror, Q),
            Op::Rolw => self.rotate(insn, Shift::Rol, D),
            Op::Rorw => self.rotate(insn, Shift::Ror, D),
            Op::Rori => self.rotate_imm(insn, Q),
            Op::Roriw => self.rotate_imm(insn, D),
            Op::OrcB => self.or_combine(insn),
            Op::Rev8 => self.reverse_bytes(insn),
            Op::Bclr => self.bit(insn, Bit::Reset),
            Op::Bset => self.bit(insn, Bit::Set),
            Op::Binv => self.bit(insn, Bit::Complement),
            Op::Bclri => self.bit_imm(insn, Bit::Reset),
            Op::Bseti => self.bit_imm(insn, Bit::Set),
            Op::Binvi => self.bit_imm(insn, Bit::Complement),
            Op::Bext | Op::Bexti => self.extract_bit(insn),
            Op::CzeroEqz => self.zero_if(insn, Cond::E),
            Op::CzeroNez => self.zero_if(insn, Cond::Ne),
            _ => return self.bits_for_cryptography(insn),
        }
        true
    }

    /// Zbc, Zbkb and Zbkx.
    fn bits_for_cryptography(&mut self, insn: &Insn) -> bool {
        match insn.op {
            Op::Clmul | Op::Clmulh | Op::Clmulr if self.features.clmul => {
                self.carryless_product(insn);
            }
            Op::Pack => self.pack(insn, 32),
            Op::Packh => self.pack(insn, 8),
            Op::Packw => self.pack(insn, 16),
            Op::Brev8 => self.reverse_bits_in_bytes(insn),
            Op::Xperm4 => self.permute_nibbles(insn),
            Op::Xperm8 => self.permute_bytes(insn),
            _ => return false,
        }
        true
    }

    /// `rd` = `rs2` + (`rs1`, or its low word, << `by`)
    fn shifted_add(&mut self, insn: &Insn, by: u8, size: Size) {
        let to = Self::target(insn.rd);
        let index = match size {
            Q => self.get(insn.rs1, Rax),
            D => {
                self.a.mov(D, Rax, Self::rm(insn.rs1));
                Rax
            }
        };
        if insn.rs2 == 0 {
            if by == 0 {
                return self.put(insn.rd, index);
            }
            self.a.mov(Q, to, index);
            self.a.shift(Shift::Shl, Q, to, by);
        } else {
            let base = self.get(insn.rs2, Rcx);
            self.a.lea(to, Mem { base, index: Some((index, by)), disp: 0 });
        }
        self.put(insn.rd, to);
    }

    fn shift_word(&mut self, insn: &Insn) {
        let to = Self::target(insn.rd);
        self.a.mov(D, to, Self::rm(insn.rs1));
        if insn.imm != 0 {
            self.a.shift(Shift::Shl, Q, to, insn.imm as u8);
        }
        self.put(insn.rd, to);
    }

    fn and_not(&mut self, insn: &Insn) {
        let to = Self::target(insn.rd);
        let not = self.get(insn.rs2, Rcx);
        self.a.andn(Q, to, not, Self::rm(insn.rs1));
        self.put(insn.rd, to);
    }

    fn or_not(&mut self, insn: &Insn) {
        self.load(Rax, insn.rs2);
        self.a.unary(Unary::Not, Q, Rax);
        self.a.alu_load(Alu::Or, Q, Rax, Self::rm(insn.rs1));
        self.put(insn.rd, Rax);
    }

    fn xor_not(&mut self, insn: &Insn) {
        self.load(Rax, insn.rs1);
        self.a.alu_load(Alu::Xor, Q, Rax, Self::rm(insn.rs2));
        self.a.unary(Unary::Not, Q, Rax);
        self.put(insn.rd, Rax);
    }

    fn count(&mut self, insn: &Insn, op: u8, size: Size) {
        let to = Self::target(insn.rd);
        self.a.prefixed_0f(0xf3, op, size, to, Self::rm(insn.rs1));
        self.put(insn.rd, to);
    }

    /// `rd` = `rs2` if `rs1` compares to it like this, else `rs1`.
    fn select(&mut self, insn: &Insn, cond: Cond) {
        self.load(Rax, insn.rs1);
        let other = self.get(insn.rs2, Rcx);
        self.a.alu_load(Alu::Cmp, Q, Rax, other);
        self.a.cmov(cond, Q, Rax, other);
        self.put(insn.rd, Rax);
    }

    fn rotate(&mut self, insn: &Insn, op: Shift, size: Size) {
        self.a.mov(D, Rcx, Self::rm(insn.rs2));
        self.load(Rax, insn.rs1);
        self.a.shift_cl(op, size, Rax);
        self.put_sized(insn.rd, Rax, size);
    }

    fn rotate_imm(&mut self, insn: &Insn, size: Size) {
        let to = if size == Q { Self::target(insn.rd) } else { Rax };
        self.a.rorx(size, to, Self::rm(insn.rs1), insn.imm as u8);
        self.put_sized(insn.rd, to, size);
    }

    /// Puts a register, or its low word with sign extension, into `rd`.
    pub(super) fn put_sized(&mut self, rd: u8, from: Reg, size: Size) {
        if size == Q {
            return self.put(rd, from);
        }
        let to = Self::target(rd);
        self.a.movsx(32, to, from);
        self.put(rd, to);
    }

    fn reverse_bytes(&mut self, insn: &Insn) {
        let to = Self::target(insn.rd);
        self.load(to, insn.rs1);
        self.a.bswap(to);
        self.put(insn.rd, to);
    }

    /// Each byte becomes 0xff unless it is 0.
    fn or_combine(&mut self, insn: &Insn) {
        self.load_xmm(0, insn.rs1);
        self.a.sse(Sse::P66, op::XOR, D, 1, Xm::Xmm(1));
        self.a.sse(Sse::P66, op::EQUAL_BYTES, D, 0, Xm::Xmm(1));
        let to = Self::target(insn.rd);
        self.store_xmm(to, 0);
        self.a.unary(Unary::Not, Q, to);
        self.put(insn.rd, to);
    }

    fn bit(&mut self, insn: &Insn, bit: Bit) {
        let number = self.get(insn.rs2, Rcx);
        self.load(Rax, insn.rs1);
        self.a.bit_reg(bit.opcode(), Q, Rax, number);
        self.put(insn.rd, Rax);
    }

    fn bit_imm(&mut self, insn: &Insn, bit: Bit) {
        let to = Self::target(insn.rd);
        self.load(to, insn.rs1);
        self.a.bit_imm(bit.extension(), Q, to, insn.imm as u8);
        self.put(insn.rd, to);
    }

    fn extract_bit(&mut self, insn: &Insn) {
        if insn.op == Op::Bext {
            let number = self.get(insn.rs2, Rcx);
            self.a.shift_by(Shift::Shr, Q, Rax, Self::rm(insn.rs1), number);
        } else {
            self.load(Rax, insn.rs1);
            self.a.shift(Shift::Shr, Q, Rax, insn.imm as u8);
        }
        self.a.alu_imm(Alu::And, D, Rax, 1);
        self.put(insn.rd, Rax);
    }

    /// `rd` = 0 if `rs2` compares to 0 like this, else `rs1`.
    fn zero_if(&mut self, insn: &Insn, cond: Cond) {
        self.a.zero(Rax);
        match Self::rm(insn.rs2) {
            Rm::Reg(reg) => self.a.test(Q, reg, reg),
            Rm::Mem(m) => self.a.alu_imm(Alu::Cmp, Q, m, 0),
        }
        let unless = if cond == Cond::E { Cond::Ne } else { Cond::E };
        self.a.cmov(unless, Q, Rax, Self::rm(insn.rs1));
        self.put(insn.rd, Rax);
    }

    // --- Cryptography ------------------------------------------------------------------------------------------------

    /// Loads a register's value into the low half of an SSE register; the high half becomes 0.
    pub(super) fn load_xmm(&mut self, xmm: u8, r: u8) {
        let from = mapped(r).map_or_else(|| Xm::Mem(Layout::x(r)), Xm::Gpr);
        self.a.sse(Sse::P66, 0x6e, Q, xmm, from);
    }

    /// `to` = the low half of an SSE register
    pub(super) fn store_xmm(&mut self, to: Reg, xmm: u8) {
        self.a.sse(Sse::P66, 0x7e, Q, xmm, Xm::Gpr(to));
    }

    fn carryless_product(&mut self, insn: &Insn) {
        self.load_xmm(0, insn.rs1);
        self.load_xmm(1, insn.rs2);
        self.a.sse3a(op::CARRYLESS_PRODUCT, D, 0, Xm::Xmm(1), 0);
        let to = Self::target(insn.rd);
        match insn.op {
            Op::Clmul => self.store_xmm(to, 0),
            Op::Clmulh => self.a.sse3a(op::EXTRACT_Q, Q, 0, Xm::Gpr(to), 1),
            _ => {
                self.store_xmm(Rcx, 0);
                self.a.sse3a(op::EXTRACT_Q, Q, 0, Xm::Gpr(Rax), 1);
                self.a.shift(Shift::Shr, Q, Rcx, 63);
                self.a.lea(to, Mem { base: Rcx, index: Some((Rax, 1)), disp: 0 });
            }
        }
        self.put(insn.rd, to);
    }

    /// `rd` = the low `bits` bits of `rs1` and, above them, as many of `rs2`.
    fn pack(&mut self, insn: &Insn, bits: u8) {
        self.a.movzx(bits, Rax, Self::rm(insn.rs1));
        self.a.movzx(bits, Rcx, Self::rm(insn.rs2));
        self.a.shift(Shift::Shl, Q, Rcx, bits);
        self.a.alu(Alu::Or, Q, Rax, Rcx);
        self.put_sized(insn.rd, Rax, if bits == 16 { D } else { Q });
    }

    /// Swaps neighbouring bits, then pairs, then halves of each byte.
    fn reverse_bits_in_bytes(&mut self, insn: &Insn) {
        self.load(Rax, insn.rs1);
        for (by, mask) in
            [(1, 0x5555_5555_5555_5555), (2, 0x3333_3333_3333_3333), (4, 0x0f0f_0f0f_0f0f_0f0f)]
        {
            self.a.mov_imm(Rcx, mask);
            self.a.mov(Q, Rdx, Rax);
            self.a.shift(Shift::Shr, Q, Rax, by);
            self.a.alu(Alu::And, Q, Rax, Rcx);
            self.a.alu(Alu::And, Q, Rdx, Rcx);
            self.a.shift(Shift::Shl, Q, Rdx, by);
            self.a.alu(Alu::Or, Q, Rax, Rdx);
        }
        self.put(insn.rd, Rax);
    }

    /// The bytes of `rs1` that the bytes of `rs2` name; 0 for numbers above 7.
    fn permute_bytes(&mut self, insn: &Insn) {
        self.load_xmm(0, insn.rs1);
        self.load_xmm(1, insn.rs2);
        // 8 to 15 name zeros, and the others become numbers with the highest bit set, which mean 0.
        self.a.mov_imm(Rax, 0x7070_7070_7070_7070);
        self.a.sse(Sse::P66, 0x6e, Q, 2, Xm::Gpr(Rax));
        self.a.sse(Sse::P66, op::ADD_BYTES_SATURATED, D, 1, Xm::Xmm(2));
        self.a.sse38(Sse::P66, op::SHUFFLE_BYTES, 0, Xm::Xmm(1));
        let to = Self::target(insn.rd);
        self.store_xmm(to, 0);
        self.put(insn.rd, to);
    }

    /// The nibbles of `rs1` that the nibbles of `rs2` name.
    fn permute_nibbles(&mut self, insn: &Insn) {
        self.a.mov_imm(Rax, 0x0f0f_0f0f_0f0f_0f0f);
        self.a.sse(Sse::P66, 0x6e, Q, 2, Xm::Gpr(Rax));
        for (xmm, r) in [(0, insn.rs1), (1, insn.rs2)] {
            // A byte each, in order: the low nibbles and those above them, in turns.
            self.load_xmm(xmm, r);
            self.load_xmm(3, r);
            self.shift_words_right(3, 4);
            self.a.sse(Sse::P66, op::AND, D, xmm, Xm::Xmm(2));
            self.a.sse(Sse::P66, op::AND, D, 3, Xm::Xmm(2));
            self.a.sse(Sse::P66, op::UNPACK_LOW_BYTES, D, xmm, Xm::Xmm(3));
        }
        self.a.sse38(Sse::P66, op::SHUFFLE_BYTES, 0, Xm::Xmm(1));
        // Words of two nibbles to bytes.
        self.a.sse(Sse::P66, 0x6f, D, 1, Xm::Xmm(0));
        self.shift_words_right(1, 4);
        self.a.sse(Sse::P66, op::OR, D, 0, Xm::Xmm(1));
        self.a.mov_imm(Rax, 0x00ff_00ff_00ff_00ff);
        self.a.sse(Sse::P66, 0x6e, Q, 2, Xm::Gpr(Rax));
        self.a.sse(Sse::P66, 0x6c, D, 2, Xm::Xmm(2));
        self.a.sse(Sse::P66, op::AND, D, 0, Xm::Xmm(2));
        self.a.sse(Sse::P66, op::PACK_BYTES, D, 0, Xm::Xmm(0));
        let to = Self::target(insn.rd);
        self.store_xmm(to, 0);
        self.put(insn.rd, to);
    }

    fn shift_words_right(&mut self, xmm: u8, by: u8) {
        // The register field is the operation: PSRLW.
        self.a.sse(Sse::P66, op::SHIFT_WORDS, D, 2, Xm::Xmm(xmm));
        self.a.byte(by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emit::Page;
    use crate::features::{BLOCK_MAX, Features};
    use crate::runtime::{CSRS, State};
    use crate::stops::Stops;
    use crate::stubs::Stubs;
    use crate::tables::Tables;

    #[test]
    fn every_instruction_has_a_template() {
        let (mut x, mut f, mut csrs) = ([0; 256], [0; 32], [0; CSRS]);
        let mut tables = Tables::new();
        let csrs = csrs.each_mut();
        let state = State { x: &mut x, f: &mut f, tables: &mut tables, csrs };
        let layout = Layout::of(&state).expect("all of it is on one stack");
        let entry = |_| None;
        for has in [true, false] {
            let features =
                Features { aes: has, clmul: has, counts_twice: false, block_max: BLOCK_MAX };
            let stops = Stops::default();
            let page = Page { bytes: &[], entry: &entry, stops: &stops };
            let stubs = Stubs::default();
            let mut emit = Emit::new((0, 1 << 16), &layout, &stubs, features, page);
            for number in Op::LrW as u8..=Op::Sha512sig1 as u8 {
                let op = Op::from_number(number);
                let insn = Insn { op, rd: 10, rs1: 5, rs2: 11, rs3: 0, imm: 1, rm: 0, len: 4 };
                let needs = (Op::Clmul..=Op::Clmulr).contains(&op)
                    || (Op::Aes64ds..=Op::Aes64ks1i).contains(&op);
                let done = emit.atomic(&insn) || emit.bits(&insn) || emit.cryptography(&insn);
                assert_eq!(done, has || !needs, "{op:?}");
            }
        }
    }
}

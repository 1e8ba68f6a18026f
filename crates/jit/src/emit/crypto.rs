//! Cryptography: Zkne and Zknd with the host's AES, Zknh.
//!
//! # Invariants
//! - INV-AES-1: without the host's AES that of the guest is left to the runtime, which computes the same.
//! - INV-AES-2: no code here branches on an operand, or looks something up by it.

use isa::{Insn, Op};

use crate::asm::{Alu, Reg, Rm, Shift, Size, Sse, Xm};

use super::Emit;
use Reg::{Rax, Rcx, Rdx};
use Size::{D, Q};

/// Last byte of the opcodes.
mod op {
    pub(super) const INVERSE_MIX_COLUMNS: u8 = 0xdb;
    pub(super) const ENCRYPT: u8 = 0xdc;
    pub(super) const ENCRYPT_LAST: u8 = 0xdd;
    pub(super) const DECRYPT: u8 = 0xde;
    pub(super) const DECRYPT_LAST: u8 = 0xdf;
    pub(super) const KEY_ASSIST: u8 = 0xdf;
    pub(super) const INSERT_Q: u8 = 0x22;
    pub(super) const SHUFFLE_D: u8 = 0x70;
    pub(super) const XOR: u8 = 0xef;
}

/// The constants of the key schedule's rounds; round 10 stands for the steps between those of AES-256.
const ROUND_CONSTANTS: [u8; 10] = [1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0x1b, 0x36];

impl Emit<'_> {
    /// Translates an instruction of these extensions; false when it is none, or this host cannot.
    pub(super) fn cryptography(&mut self, insn: &Insn) -> bool {
        let is_aes = insn.op >= Op::Aes64ds && insn.op <= Op::Aes64ks2;
        let is_hash = insn.op >= Op::Sha256sum0 && insn.op <= Op::Sha512sig1;
        if !is_hash && !is_aes {
            return false;
        }
        if insn.rd == 0 {
            return true;
        }
        if is_hash {
            self.hash(insn);
            return true;
        }
        if insn.op == Op::Aes64ks2 {
            self.key_words(insn);
            return true;
        }
        if self.features.aes {
            self.aes(insn);
        }
        self.features.aes
    }

    fn aes(&mut self, insn: &Insn) {
        self.load_xmm(0, insn.rs1);
        match insn.op {
            Op::Aes64es => self.aes_round(insn, op::ENCRYPT_LAST),
            Op::Aes64esm => self.aes_round(insn, op::ENCRYPT),
            Op::Aes64ds => self.aes_round(insn, op::DECRYPT_LAST),
            Op::Aes64dsm => self.aes_round(insn, op::DECRYPT),
            Op::Aes64im => self.a.sse38(Sse::P66, op::INVERSE_MIX_COLUMNS, 0, Xm::Xmm(0)),
            _ => self.key_word(insn),
        }
        let to = Self::target(insn.rd);
        self.store_xmm(to, 0);
        self.put(insn.rd, to);
    }

    /// A round on the state whose low half is in XMM0 and whose high half is `rs2`, with a key of zeros.
    fn aes_round(&mut self, insn: &Insn, op: u8) {
        let high = match Self::rm(insn.rs2) {
            Rm::Reg(reg) => Xm::Gpr(reg),
            Rm::Mem(m) => Xm::Mem(m),
        };
        self.a.sse3a(op::INSERT_Q, Q, 0, high, 1);
        self.a.sse(Sse::P66, op::XOR, D, 1, Xm::Xmm(1));
        self.a.sse38(Sse::P66, op, 0, Xm::Xmm(1));
    }

    /// Makes both words of XMM0's low half the next word of the key schedule.
    fn key_word(&mut self, insn: &Insn) {
        let constant = usize::try_from(insn.imm).ok().and_then(|i| ROUND_CONSTANTS.get(i));
        // From the state's second word: substituted, then rotated and with the constant.
        self.a.sse3a(op::KEY_ASSIST, D, 0, Xm::Xmm(0), constant.copied().unwrap_or(0));
        self.a.sse(Sse::P66, op::SHUFFLE_D, D, 0, Xm::Xmm(0));
        self.a.byte(if constant.is_some() { 0x55 } else { 0 });
    }

    /// The low word is `rs1`'s high one xor `rs2`'s low one; the high word is that xor `rs2`'s high one.
    fn key_words(&mut self, insn: &Insn) {
        self.load(Rax, insn.rs1);
        self.a.shift(Shift::Shr, Q, Rax, 32);
        self.a.alu_load(Alu::Xor, Q, Rax, Self::rm(insn.rs2));
        self.a.mov(Q, Rcx, Rax);
        self.a.shift(Shift::Shl, Q, Rcx, 32);
        self.a.alu(Alu::Xor, Q, Rax, Rcx);
        self.put(insn.rd, Rax);
    }

    /// Rotations, the last one being a shift in the functions for the message schedule.
    fn hash(&mut self, insn: &Insn) {
        let (size, first, second, third, shifts) = match insn.op {
            Op::Sha256sum0 => (D, 2, 13, 22, false),
            Op::Sha256sum1 => (D, 6, 11, 25, false),
            Op::Sha256sig0 => (D, 7, 18, 3, true),
            Op::Sha256sig1 => (D, 17, 19, 10, true),
            Op::Sha512sum0 => (Q, 28, 34, 39, false),
            Op::Sha512sum1 => (Q, 14, 18, 41, false),
            Op::Sha512sig0 => (Q, 1, 8, 7, true),
            _ => (Q, 19, 61, 6, true),
        };
        let from = self.get(insn.rs1, Rdx);
        self.a.rorx(size, Rax, from, first);
        self.a.rorx(size, Rcx, from, second);
        self.a.alu(Alu::Xor, size, Rax, Rcx);
        if shifts {
            self.a.mov(size, Rcx, from);
            self.a.shift(Shift::Shr, size, Rcx, third);
        } else {
            self.a.rorx(size, Rcx, from, third);
        }
        self.a.alu(Alu::Xor, size, Rax, Rcx);
        self.put_sized(insn.rd, Rax, size);
    }
}

//! Instruction words, made by hand: independent of the decoder under test.

use std::collections::BTreeMap;

pub(crate) fn r(opcode: u32, f3: u32, f7: u32, rd: u32, rs1: u32, rs2: u32) -> u32 {
    f7 << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

pub(crate) fn i(opcode: u32, f3: u32, rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32 & 0xfff) << 20 | rs1 << 15 | f3 << 12 | rd << 7 | opcode
}

pub(crate) fn s(opcode: u32, f3: u32, rs1: u32, rs2: u32, imm: i32) -> u32 {
    let imm = imm as u32;
    (imm >> 5 & 0x7f) << 25 | rs2 << 20 | rs1 << 15 | f3 << 12 | (imm & 31) << 7 | opcode
}

pub(crate) fn b(f3: u32, rs1: u32, rs2: u32, offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 12 & 1) << 31
        | (o >> 5 & 0x3f) << 25
        | rs2 << 20
        | rs1 << 15
        | f3 << 12
        | (o >> 1 & 15) << 8
        | (o >> 11 & 1) << 7
        | 0x63
}

pub(crate) fn jal(rd: u32, offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 20 & 1) << 31
        | (o >> 1 & 0x3ff) << 21
        | (o >> 11 & 1) << 20
        | (o >> 12 & 0xff) << 12
        | rd << 7
        | 0x6f
}

pub(crate) fn lui(rd: u32, imm20: u32) -> u32 {
    imm20 << 12 | rd << 7 | 0x37
}

pub(crate) fn auipc(rd: u32, imm20: u32) -> u32 {
    imm20 << 12 | rd << 7 | 0x17
}

pub(crate) fn addi(rd: u32, rs1: u32, imm: i32) -> u32 {
    i(0x13, 0, rd, rs1, imm)
}

pub(crate) fn andi(rd: u32, rs1: u32, imm: i32) -> u32 {
    i(0x13, 7, rd, rs1, imm)
}

pub(crate) fn slli(rd: u32, rs1: u32, n: i32) -> u32 {
    i(0x13, 1, rd, rs1, n)
}

pub(crate) fn srli(rd: u32, rs1: u32, n: i32) -> u32 {
    i(0x13, 5, rd, rs1, n)
}

pub(crate) fn ld(rd: u32, rs1: u32, imm: i32) -> u32 {
    i(0x03, 3, rd, rs1, imm)
}

pub(crate) fn sd(rs2: u32, rs1: u32, imm: i32) -> u32 {
    s(0x23, 3, rs1, rs2, imm)
}

pub(crate) fn fld(rd: u32, rs1: u32, imm: i32) -> u32 {
    i(0x07, 3, rd, rs1, imm)
}

pub(crate) fn fsd(rs2: u32, rs1: u32, imm: i32) -> u32 {
    s(0x27, 3, rs1, rs2, imm)
}

pub(crate) fn jalr(rd: u32, rs1: u32, imm: i32) -> u32 {
    i(0x67, 0, rd, rs1, imm)
}

/// `f3`: 1 csrrw, 2 csrrs, 3 csrrc, and 5 to 7 with a constant.
pub(crate) fn csr(f3: u32, rd: u32, number: u32, rs1: u32) -> u32 {
    number << 20 | rs1 << 15 | f3 << 12 | rd << 7 | 0x73
}

pub(crate) fn csrr(rd: u32, number: u32) -> u32 {
    csr(2, rd, number, 0)
}

pub(crate) fn csrw(number: u32, rs1: u32) -> u32 {
    csr(1, 0, number, rs1)
}

pub(crate) const NOP: u32 = 0x13;
pub(crate) const ECALL: u32 = 0x73;
pub(crate) const EBREAK: u32 = 0x10_0073;
pub(crate) const MRET: u32 = 0x3020_0073;
pub(crate) const SRET: u32 = 0x1020_0073;
pub(crate) const WFI: u32 = 0x1050_0073;
pub(crate) const SFENCE: u32 = 0x1200_0073;
pub(crate) const FENCE_I: u32 = 0x100f;

/// What a jump to a label is made of.
#[derive(Debug, Clone, Copy)]
enum Jump {
    Branch { f3: u32, rs1: u32, rs2: u32 },
    Jal,
}

/// A program with labels.
#[derive(Debug, Default)]
pub(crate) struct Asm {
    words: Vec<u32>,
    labels: BTreeMap<&'static str, usize>,
    jumps: Vec<(usize, Jump, &'static str)>,
}

impl Asm {
    pub(crate) fn op(&mut self, word: u32) {
        self.words.push(word);
    }

    pub(crate) fn ops(&mut self, words: &[u32]) {
        self.words.extend_from_slice(words);
    }

    pub(crate) fn label(&mut self, name: &'static str) {
        self.labels.insert(name, self.words.len());
    }

    /// A branch: `f3` 0 beq, 1 bne, 4 blt, 5 bge, 6 bltu, 7 bgeu.
    pub(crate) fn branch(&mut self, f3: u32, rs1: u32, rs2: u32, to: &'static str) {
        self.jumps.push((self.words.len(), Jump::Branch { f3, rs1, rs2 }, to));
        self.words.push(0);
    }

    pub(crate) fn jump(&mut self, to: &'static str) {
        self.jumps.push((self.words.len(), Jump::Jal, to));
        self.words.push(0);
    }

    /// Offset of a label in bytes.
    pub(crate) fn offset(&self, name: &str) -> u64 {
        self.labels[name] as u64 * 4
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (at, jump, to) in self.jumps {
            let offset = (self.labels[to] as i32 - at as i32) * 4;
            self.words[at] = match jump {
                Jump::Branch { f3, rs1, rs2 } => b(f3, rs1, rs2, offset),
                Jump::Jal => jal(0, offset),
            };
        }
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

//! The C and Zcb extensions: each 16-bit instruction becomes the longer instruction that it stands for.
//!
//! # Invariants
//! - INV-C-1: reserved encodings are illegal; hints become the instruction without effect that they stand for.
//!
//! # References
//! The RISC-V Instruction Set Manual, volume I, chapter "C", tables of quadrants 0 to 2, RV64 columns; chapter "Zc*", Zcb.

use crate::insn::Insn;
use crate::table::Op;

/// Expands the 16-bit instruction `w`.
pub(crate) fn decode(w: u16) -> Insn {
    let w = u32::from(w);
    let expanded = match w & 3 {
        0 => quadrant_0(w),
        1 => quadrant_1(w),
        _ => quadrant_2(w),
    };
    expanded.unwrap_or(Insn::new(Op::Illegal, 2))
}

const SP: u8 = 2;

fn quadrant_0(w: u32) -> Option<Insn> {
    let (rd, rs1) = (short_reg(w, 2), short_reg(w, 7));
    let word = field(w, 10, 3, 3) | field(w, 6, 1, 2) | field(w, 5, 1, 6);
    let double = field(w, 10, 3, 3) | field(w, 5, 2, 6);
    Some(match w >> 13 {
        0 => {
            let imm =
                field(w, 11, 2, 4) | field(w, 7, 4, 6) | field(w, 6, 1, 2) | field(w, 5, 1, 3);
            i(Op::Addi, rd, SP, non_zero(imm)?)
        }
        1 => i(Op::Fld, rd, rs1, double),
        2 => i(Op::Lw, rd, rs1, word),
        3 => i(Op::Ld, rd, rs1, double),
        4 => short_access(w)?,
        5 => s(Op::Fsd, rs1, rd, double),
        6 => s(Op::Sw, rs1, rd, word),
        7 => s(Op::Sd, rs1, rd, double),
        _ => return None,
    })
}

/// Quadrant 0, funct3 4: loads and stores of bytes and halfwords (Zcb).
fn short_access(w: u32) -> Option<Insn> {
    let (rd, rs1) = (short_reg(w, 2), short_reg(w, 7));
    let byte = field(w, 6, 1, 0) | field(w, 5, 1, 1);
    let half = field(w, 5, 1, 1);
    Some(match (w >> 10 & 7, w >> 6 & 1) {
        (0, _) => i(Op::Lbu, rd, rs1, byte),
        (1, 0) => i(Op::Lhu, rd, rs1, half),
        (1, _) => i(Op::Lh, rd, rs1, half),
        (2, _) => s(Op::Sb, rs1, rd, byte),
        (3, 0) => s(Op::Sh, rs1, rd, half),
        _ => return None,
    })
}

fn quadrant_1(w: u32) -> Option<Insn> {
    let rd = reg(w, 7);
    let rs1 = short_reg(w, 7);
    let imm = sign(w, 5) | field(w, 2, 5, 0);
    Some(match w >> 13 {
        0 => i(Op::Addi, rd, rd, imm),
        1 => i(Op::Addiw, non_zero_reg(rd)?, rd, imm),
        2 => i(Op::Addi, rd, 0, imm),
        3 if rd == SP => {
            let imm = sign(w, 9)
                | field(w, 6, 1, 4)
                | field(w, 5, 1, 6)
                | field(w, 3, 2, 7)
                | field(w, 2, 1, 5);
            i(Op::Addi, SP, SP, non_zero(imm)?)
        }
        3 => i(Op::Lui, rd, 0, non_zero(imm << 12)?),
        4 => arithmetic(w)?,
        5 => i(Op::Jal, 0, 0, jump_offset(w)),
        6 => s(Op::Beq, rs1, 0, branch_offset(w)),
        _ => s(Op::Bne, rs1, 0, branch_offset(w)),
    })
}

/// Quadrant 1, funct3 4: shifts, `c.andi` and the register forms.
fn arithmetic(w: u32) -> Option<Insn> {
    let (rd, rs2) = (short_reg(w, 7), short_reg(w, 2));
    let shamt = field(w, 12, 1, 5) | field(w, 2, 5, 0);
    Some(match (w >> 10 & 3, w >> 12 & 1, w >> 5 & 3) {
        (0, ..) => i(Op::Srli, rd, rd, shamt),
        (1, ..) => i(Op::Srai, rd, rd, shamt),
        (2, ..) => i(Op::Andi, rd, rd, sign(w, 5) | field(w, 2, 5, 0)),
        (_, 0, 0) => r(Op::Sub, rd, rd, rs2),
        (_, 0, 1) => r(Op::Xor, rd, rd, rs2),
        (_, 0, 2) => r(Op::Or, rd, rd, rs2),
        (_, 0, _) => r(Op::And, rd, rd, rs2),
        (_, _, 0) => r(Op::Subw, rd, rd, rs2),
        (_, _, 1) => r(Op::Addw, rd, rd, rs2),
        (_, _, 2) => r(Op::Mul, rd, rd, rs2),
        _ => unary(w, rd)?,
    })
}

/// Extensions and complement of one register (Zcb).
fn unary(w: u32, rd: u8) -> Option<Insn> {
    Some(match w >> 2 & 7 {
        0 => i(Op::Andi, rd, rd, 0xff),
        1 => r(Op::SextB, rd, rd, 0),
        2 => r(Op::ZextH, rd, rd, 0),
        3 => r(Op::SextH, rd, rd, 0),
        4 => r(Op::AddUw, rd, rd, 0),
        5 => i(Op::Xori, rd, rd, -1),
        _ => return None,
    })
}

fn quadrant_2(w: u32) -> Option<Insn> {
    let (rd, rs2) = (reg(w, 7), reg(w, 2));
    let load_double = field(w, 12, 1, 5) | field(w, 5, 2, 3) | field(w, 2, 3, 6);
    let store_double = field(w, 10, 3, 3) | field(w, 7, 3, 6);
    Some(match w >> 13 {
        0 => i(Op::Slli, rd, rd, field(w, 12, 1, 5) | field(w, 2, 5, 0)),
        1 => i(Op::Fld, rd, SP, load_double),
        2 => {
            let imm = field(w, 12, 1, 5) | field(w, 4, 3, 2) | field(w, 2, 2, 6);
            i(Op::Lw, non_zero_reg(rd)?, SP, imm)
        }
        3 => i(Op::Ld, non_zero_reg(rd)?, SP, load_double),
        4 => match (w >> 12 & 1, rd, rs2) {
            (0, rs1, 0) => i(Op::Jalr, 0, non_zero_reg(rs1)?, 0),
            (0, rd, rs2) => r(Op::Add, rd, 0, rs2),
            (_, 0, 0) => Insn::new(Op::Ebreak, 2),
            (_, rs1, 0) => i(Op::Jalr, 1, rs1, 0),
            (_, rd, rs2) => r(Op::Add, rd, rd, rs2),
        },
        5 => s(Op::Fsd, SP, rs2, store_double),
        6 => s(Op::Sw, SP, rs2, field(w, 9, 4, 2) | field(w, 7, 2, 6)),
        _ => s(Op::Sd, SP, rs2, store_double),
    })
}

fn i(op: Op, rd: u8, rs1: u8, imm: i32) -> Insn {
    Insn { rd, rs1, imm, ..Insn::new(op, 2) }
}

fn s(op: Op, rs1: u8, rs2: u8, imm: i32) -> Insn {
    Insn { rs1, rs2, imm, ..Insn::new(op, 2) }
}

fn r(op: Op, rd: u8, rs1: u8, rs2: u8) -> Insn {
    Insn { rd, rs1, rs2, ..Insn::new(op, 2) }
}

/// The register numbered by the 5 bits from bit `at`.
fn reg(w: u32, at: u32) -> u8 {
    (w >> at & 31) as u8
}

/// The register among x8 to x15 numbered by the 3 bits from bit `at`.
fn short_reg(w: u32, at: u32) -> u8 {
    (8 | w >> at & 7) as u8
}

/// The `len` bits of `w` from bit `from`, moved to bit `to`.
fn field(w: u32, from: u32, len: u32, to: u32) -> i32 {
    ((w >> from & ((1 << len) - 1)) << to) as i32
}

/// Bit 12 of `w` as bit `to` and all above it.
fn sign(w: u32, to: u32) -> i32 {
    -field(w, 12, 1, to)
}

fn jump_offset(w: u32) -> i32 {
    sign(w, 11)
        | field(w, 11, 1, 4)
        | field(w, 9, 2, 8)
        | field(w, 8, 1, 10)
        | field(w, 7, 1, 6)
        | field(w, 6, 1, 7)
        | field(w, 3, 3, 1)
        | field(w, 2, 1, 5)
}

fn branch_offset(w: u32) -> i32 {
    sign(w, 8) | field(w, 10, 2, 3) | field(w, 5, 2, 6) | field(w, 3, 2, 1) | field(w, 2, 1, 5)
}

fn non_zero(imm: i32) -> Option<i32> {
    (imm != 0).then_some(imm)
}

fn non_zero_reg(r: u8) -> Option<u8> {
    (r != 0).then_some(r)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode;

    #[test]
    fn reserved_encodings_are_illegal() {
        // c.addi4spn 0, c.addiw x0, c.addi16sp 0, c.lui 0, c.lwsp x0, c.ldsp x0, c.jr x0
        for w in [0x0004, 0x2005, 0x6101, 0x6281, 0x4002, 0x6002, 0x8002] {
            assert_eq!(decode(w), Insn::new(Op::Illegal, 2), "{w:#06x}");
        }
        // What Zcb leaves: c.sh with bit 6 set, quadrant 0 from funct6 0x24 on, c.not and above.
        for w in [0x8c40, 0x9000, 0x9c00, 0x9c79, 0x9c7d] {
            assert_eq!(decode(w), Insn::new(Op::Illegal, 2), "{w:#06x}");
        }
    }

    #[test]
    fn expansions_equal_the_base_instruction_but_for_the_length() {
        // c.addi x2,-32; c.sdsp x1,24(x2); c.jr x1; c.li x10,-1; c.ebreak; c.j .-2; c.lui x15,0xfffe1; c.zext.w x8
        let pairs = [
            (0x1101, 0xfe01_0113),
            (0xec06, 0x0011_3c23),
            (0x8082, 0x0000_8067),
            (0x557d, 0xfff0_0513),
            (0x9002, 0x0010_0073),
            (0xbffd, 0xffff_f06f),
            (0x7785, 0xfffe_17b7),
            (0x9c71, 0x0804_043b),
        ];
        for (short, long) in pairs {
            assert_eq!(Insn { len: 4, ..decode(short) }, decode(long), "{short:#06x}");
        }
    }
}

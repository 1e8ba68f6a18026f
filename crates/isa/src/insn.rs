//! Decoded instructions, and the decoder of 32-bit words.
//!
//! # Invariants
//! - INV-DECODE-1: [`decode`] is total, and a field that an instruction does not have is 0.
//! - INV-DECODE-2: a compressed instruction gives the same [`Insn`] as its expansion, apart from `len`.

use crate::compressed;
use crate::table::{Format, Op, lookup};

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    /// Immediate: sign-extended constant, `imm20 << 12` (`lui`, `auipc`), offset in bytes (branches, jumps, memory),
    /// shift amount, CSR number (0 to 4095), or the fence's 12 bits fm, predecessors, successors.
    pub imm: i32,
    /// What it does.
    pub op: Op,
    /// Destination register.
    pub rd: u8,
    /// First source register; the constant of `csrr*i`; the number of the constant of `fli.*`.
    pub rs1: u8,
    /// Second source register.
    pub rs2: u8,
    /// Third source register.
    pub rs3: u8,
    /// Rounding mode as encoded, reserved values included, where the instruction rounds; `aq << 1 | rl` for the A
    /// extension.
    pub rm: u8,
    /// Length in bytes: 2 or 4.
    pub len: u8,
}

impl Insn {
    /// An instruction with all operands 0.
    pub(crate) const fn new(op: Op, len: u8) -> Self {
        Self { imm: 0, op, rd: 0, rs1: 0, rs2: 0, rs3: 0, rm: 0, len }
    }
}

/// Decodes the instruction in `raw`; of a compressed one the low 16 bits count. What is no instruction of the machine
/// is [`Op::Illegal`].
#[must_use]
pub fn decode(raw: u32) -> Insn {
    if raw & 3 != 3 {
        return compressed::decode(raw as u16);
    }
    let Some(row) = lookup(raw) else { return Insn::new(Op::Illegal, 4) };
    let mut insn = Insn::new(row.op, 4);
    fill(&mut insn, row.format, raw);
    if row.format == Format::Round && insn.imm > AES_ROUND_MAX {
        return Insn::new(Op::Illegal, 4);
    }
    insn
}

/// The largest round number of `aes64ks1i`; those above are reserved.
const AES_ROUND_MAX: i32 = 10;

fn fill(insn: &mut Insn, format: Format, w: u32) {
    let (rd, rs1, rs2) = (reg(w, 7), reg(w, 15), reg(w, 20));
    let funct3 = (w >> 12 & 7) as u8;
    match format {
        Format::None => {}
        Format::U => (insn.rd, insn.imm) = (rd, (w & 0xffff_f000) as i32),
        Format::J => (insn.rd, insn.imm) = (rd, imm_j(w)),
        Format::B => (insn.rs1, insn.rs2, insn.imm) = (rs1, rs2, imm_b(w)),
        Format::I | Format::Load | Format::FLoad => {
            (insn.rd, insn.rs1, insn.imm) = (rd, rs1, w as i32 >> 20);
        }
        Format::Store | Format::FStore => {
            (insn.rs1, insn.rs2, insn.imm) = (rs1, rs2, (w as i32 >> 20 & !31) | i32::from(rd));
        }
        Format::Shift6 => (insn.rd, insn.rs1, insn.imm) = (rd, rs1, (w >> 20 & 63) as i32),
        Format::Shift5 => (insn.rd, insn.rs1, insn.imm) = (rd, rs1, (w >> 20 & 31) as i32),
        Format::Round => (insn.rd, insn.rs1, insn.imm) = (rd, rs1, (w >> 20 & 15) as i32),
        Format::Block => insn.rs1 = rs1,
        Format::Fence => insn.imm = (w >> 20) as i32,
        Format::Sfence => (insn.rs1, insn.rs2) = (rs1, rs2),
        Format::Csr | Format::CsrImm => (insn.rd, insn.rs1, insn.imm) = (rd, rs1, (w >> 20) as i32),
        Format::R | Format::FR | Format::FCmp => (insn.rd, insn.rs1, insn.rs2) = (rd, rs1, rs2),
        Format::Lr | Format::Amo => {
            (insn.rd, insn.rs1, insn.rs2, insn.rm) = (rd, rs1, rs2, (w >> 25 & 3) as u8);
        }
        Format::Fma => {
            (insn.rd, insn.rs1, insn.rs2, insn.rs3, insn.rm) = (rd, rs1, rs2, reg(w, 27), funct3);
        }
        Format::FRm => (insn.rd, insn.rs1, insn.rs2, insn.rm) = (rd, rs1, rs2, funct3),
        Format::FRm1 | Format::FToXRm | Format::XToFRm => {
            (insn.rd, insn.rs1, insn.rm) = (rd, rs1, funct3)
        }
        Format::R1 | Format::FConst | Format::FToX | Format::XToF => {
            (insn.rd, insn.rs1) = (rd, rs1);
        }
    }
}

fn reg(w: u32, at: u32) -> u8 {
    (w >> at & 31) as u8
}

/// The `len` bits of `w` from bit `from`, moved to bit `to`.
fn bits(w: u32, from: u32, len: u32, to: u32) -> i32 {
    ((w >> from & ((1 << len) - 1)) << to) as i32
}

fn imm_b(w: u32) -> i32 {
    (w as i32 >> 31 << 12) | bits(w, 7, 1, 11) | bits(w, 25, 6, 5) | bits(w, 8, 4, 1)
}

fn imm_j(w: u32) -> i32 {
    (w as i32 >> 31 << 20) | bits(w, 12, 8, 12) | bits(w, 20, 1, 11) | bits(w, 21, 10, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_stays_small() {
        assert!(size_of::<Insn>() <= 12);
    }

    #[test]
    fn length_follows_the_low_bits() {
        for raw in [0, 0xffff_0000, 0x9000] {
            assert_eq!(decode(raw), Insn::new(Op::Illegal, 2));
        }
        for raw in [0x7003, 0xffff_ffff, 0x0000_201f] {
            assert_eq!(decode(raw), Insn::new(Op::Illegal, 4));
        }
    }

    #[test]
    fn immediates_are_sign_extended_and_scaled() {
        assert_eq!(decode(0x8000_02b7).imm, i32::MIN); // lui x5, 0x80000
        assert_eq!(decode(0xfe00_0ee3).imm, -4); // beq x0, x0, .-4
        assert_eq!(decode(0xffdf_f06f).imm, -4); // jal x0, .-4
        assert_eq!(decode(0xfe11_3c23).imm, -8); // sd x1, -8(x2)
        assert_eq!(decode(0xfff0_0293).imm, -1); // addi x5, x0, -1
        assert_eq!(decode(0xc010_2573).imm, 0xc01); // csrrs x10, time, x0
        assert_eq!(decode(0x03f0_d093).imm, 63); // srli x1, x1, 63
    }

    #[test]
    fn pause_is_one_fence_only() {
        assert_eq!(decode(0x0100_000f).op, Op::Pause);
        assert_eq!(decode(0x0100_008f).op, Op::Fence);
        assert_eq!(decode(0x0ff0_000f), Insn { imm: 0xff, ..Insn::new(Op::Fence, 4) });
        assert_eq!(decode(0xffff_8f8f).op, Op::Fence);
    }

    #[test]
    fn reserved_round_numbers_are_illegal() {
        assert_eq!(decode(0x31a1_1093).op, Op::Aes64ks1i);
        assert_eq!(decode(0x31b1_1093), Insn::new(Op::Illegal, 4));
    }

    proptest::proptest! {
        #[test]
        fn decoding_is_total(raw: u32) {
            let insn = decode(raw);
            assert_eq!(insn.len, if raw & 3 == 3 { 4 } else { 2 });
            assert!(insn.rd < 32 && insn.rs1 < 32 && insn.rs2 < 32 && insn.rs3 < 32 && insn.rm < 8);
        }
    }
}

//! Instructions in eight bytes, as generated code hands them to the runtime.
//!
//! # Invariants
//! - INV-PACKED-1: whatever the decoder makes of a word comes back as it was.

use isa::{Insn, Op};

/// Packs an instruction. What a word of 32 bits can say fits.
pub(crate) fn pack(insn: &Insn) -> u64 {
    u64::from(insn.imm as u32) << 32
        | u64::from(insn.op as u8)
        | u64::from(insn.rd & 31) << 8
        | u64::from(insn.rs1 & 31) << 13
        | u64::from(insn.rs2 & 31) << 18
        | u64::from(insn.rs3 & 31) << 23
        | u64::from(insn.rm & 7) << 28
        | u64::from(insn.len == 4) << 31
}

/// The instruction that was packed.
pub(crate) fn unpack(v: u64) -> Insn {
    let field = |at: u32| (v >> at & 31) as u8;
    Insn {
        imm: (v >> 32) as i32,
        op: Op::from_number(v as u8),
        rd: field(8),
        rs1: field(13),
        rs2: field(18),
        rs3: field(23),
        rm: (v >> 28 & 7) as u8,
        len: if v >> 31 & 1 != 0 { 4 } else { 2 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_comes_back() {
        let mut word = 1u32;
        for _ in 0..2_000_000 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let insn = isa::decode(word.rotate_left(7) | 3);
            let compressed = isa::decode((word >> 9 & !3) | ((word >> 30) % 3));
            for insn in [insn, compressed].iter().filter(|i| i.op != Op::Illegal) {
                assert_eq!(unpack(pack(insn)), *insn);
            }
        }
    }
}

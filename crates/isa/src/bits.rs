//! Results of the bit manipulation instructions: Zba, Zbb, Zbs and Zicond.
//!
//! # Place
//! The engines pass the values of rs1 and rs2 and the decoded immediate, and write what they get to rd.
//!
//! # References
//! The RISC-V Instruction Set Manual, volume I, chapters "B" and "Zicond".

use crate::table::Op;

fn sext32(v: u64) -> u64 {
    v as i32 as u64
}

fn zext32(v: u64) -> u64 {
    u64::from(v as u32)
}

/// Each byte becomes 0xff unless it is 0.
fn or_combine(v: u64) -> u64 {
    u64::from_le_bytes(v.to_le_bytes().map(|byte| if byte == 0 { 0 } else { 0xff }))
}

/// What `op` gives for the values `a` and `b` of rs1 and rs2; instructions with an immediate take `imm` for `b`. `None`
/// when `op` is not of these extensions.
#[must_use]
pub fn compute(op: Op, a: u64, b: u64, imm: i32) -> Option<u64> {
    // Shift amounts and bit numbers.
    let n = match op {
        Op::SlliUw | Op::Rori | Op::Roriw | Op::Bclri | Op::Bexti | Op::Binvi | Op::Bseti => {
            imm as u32 & 63
        }
        _ => b as u32 & 63,
    };
    let bit = 1u64 << n;
    Some(match op {
        Op::AddUw => b.wrapping_add(zext32(a)),
        Op::Sh1add => b.wrapping_add(a << 1),
        Op::Sh2add => b.wrapping_add(a << 2),
        Op::Sh3add => b.wrapping_add(a << 3),
        Op::Sh1addUw => b.wrapping_add(zext32(a) << 1),
        Op::Sh2addUw => b.wrapping_add(zext32(a) << 2),
        Op::Sh3addUw => b.wrapping_add(zext32(a) << 3),
        Op::SlliUw => zext32(a) << n,
        Op::Andn => a & !b,
        Op::Orn => a | !b,
        Op::Xnor => !(a ^ b),
        Op::Clz => u64::from(a.leading_zeros()),
        Op::Ctz => u64::from(a.trailing_zeros()),
        Op::Cpop => u64::from(a.count_ones()),
        Op::Clzw => u64::from((a as u32).leading_zeros()),
        Op::Ctzw => u64::from((a as u32).trailing_zeros()),
        Op::Cpopw => u64::from((a as u32).count_ones()),
        Op::Max => (a as i64).max(b as i64) as u64,
        Op::Maxu => a.max(b),
        Op::Min => (a as i64).min(b as i64) as u64,
        Op::Minu => a.min(b),
        Op::SextB => a as i8 as u64,
        Op::SextH => a as i16 as u64,
        Op::ZextH => u64::from(a as u16),
        Op::Rol => a.rotate_left(n),
        Op::Ror | Op::Rori => a.rotate_right(n),
        Op::Rolw => sext32(u64::from((a as u32).rotate_left(n & 31))),
        Op::Rorw | Op::Roriw => sext32(u64::from((a as u32).rotate_right(n & 31))),
        Op::OrcB => or_combine(a),
        Op::Rev8 => a.swap_bytes(),
        Op::Bclr | Op::Bclri => a & !bit,
        Op::Bext | Op::Bexti => a >> n & 1,
        Op::Binv | Op::Binvi => a ^ bit,
        Op::Bset | Op::Bseti => a | bit,
        Op::CzeroEqz => {
            if b == 0 {
                0
            } else {
                a
            }
        }
        Op::CzeroNez => {
            if b != 0 {
                0
            } else {
                a
            }
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::ROWS;

    #[test]
    fn the_range_of_the_table_is_what_is_computed_here() {
        for row in ROWS {
            let inside = (Op::AddUw..=Op::CzeroNez).contains(&row.op);
            assert_eq!(compute(row.op, 1, 2, 3).is_some(), inside, "{row:?}");
        }
    }

    #[test]
    fn corners_have_the_values_of_the_manual() {
        let cases = [
            (Op::Clz, 0, 0, 64),
            (Op::Ctz, 0, 0, 64),
            (Op::Clzw, 0xf_0000_0000, 0, 32),
            (Op::Ctzw, 1 << 32, 0, 32),
            (Op::Rolw, 0x8000_0000, 1, 1),
            (Op::Rorw, 1, 33, 0xffff_ffff_8000_0000),
            (Op::Ror, 1, 65, 1 << 63),
            (Op::OrcB, 0x0100_8000_0000_0010, 0, 0xff00_ff00_0000_00ff),
            (Op::Bext, 1 << 63, 127, 1),
            (Op::Sh3addUw, u64::MAX, u64::MAX, 0x7_ffff_fff7),
            (Op::CzeroEqz, 7, 0, 0),
            (Op::CzeroNez, 7, 0, 7),
            (Op::Min, u64::MAX, 1, u64::MAX),
            (Op::Minu, u64::MAX, 1, 1),
        ];
        for (op, a, b, expected) in cases {
            assert_eq!(compute(op, a, b, 0), Some(expected), "{op:?} {a:#x} {b:#x}");
        }
        assert_eq!(compute(Op::SlliUw, u64::MAX, 0, 63), Some(1 << 63));
        assert_eq!(compute(Op::Roriw, 1, 0, 1), Some(0xffff_ffff_8000_0000));
    }
}

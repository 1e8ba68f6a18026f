//! Cases of the extensions that compute in integer registers: Zba, Zbb, Zbc, Zbs, Zicond and Zkn.

use crate::asm::*;
use crate::case::*;
use crate::rng::Rng;
use crate::user::{any_mode, dest};

const OP: u32 = 0x33;
const OP_32: u32 = 0x3b;
const OP_IMM: u32 = 0x13;
const OP_IMM_32: u32 = 0x1b;

/// Instructions of two registers: opcode, funct3, funct7.
const BINARY: [(u32, u32, u32); 37] = [
    (OP_32, 0, 0x04), // add.uw
    (OP, 2, 0x10),    // sh1add
    (OP, 4, 0x10),
    (OP, 6, 0x10),
    (OP_32, 2, 0x10), // sh1add.uw
    (OP_32, 4, 0x10),
    (OP_32, 6, 0x10),
    (OP, 7, 0x20),    // andn
    (OP, 6, 0x20),    // orn
    (OP, 4, 0x20),    // xnor
    (OP, 4, 0x05),    // min
    (OP, 5, 0x05),    // minu
    (OP, 6, 0x05),    // max
    (OP, 7, 0x05),    // maxu
    (OP, 1, 0x30),    // rol
    (OP, 5, 0x30),    // ror
    (OP_32, 1, 0x30), // rolw
    (OP_32, 5, 0x30), // rorw
    (OP, 1, 0x24),    // bclr
    (OP, 5, 0x24),    // bext
    (OP, 1, 0x34),    // binv
    (OP, 1, 0x14),    // bset
    (OP, 5, 0x07),    // czero.eqz
    (OP, 7, 0x07),    // czero.nez
    (OP, 1, 0x05),    // clmul
    (OP, 2, 0x05),    // clmulr
    (OP, 3, 0x05),    // clmulh
    (OP, 4, 0x04),    // pack
    (OP, 7, 0x04),    // packh
    (OP_32, 4, 0x04), // packw
    (OP, 2, 0x14),    // xperm4
    (OP, 4, 0x14),    // xperm8
    (OP, 0, 0x1d),    // aes64ds
    (OP, 0, 0x1f),    // aes64dsm
    (OP, 0, 0x19),    // aes64es
    (OP, 0, 0x1b),    // aes64esm
    (OP, 0, 0x3f),    // aes64ks2
];

/// Instructions of one register: opcode, funct3, the upper twelve bits.
const UNARY: [(u32, u32, u32); 21] = [
    (OP_IMM, 1, 0x600),    // clz
    (OP_IMM, 1, 0x601),    // ctz
    (OP_IMM, 1, 0x602),    // cpop
    (OP_IMM_32, 1, 0x600), // clzw
    (OP_IMM_32, 1, 0x601), // ctzw
    (OP_IMM_32, 1, 0x602), // cpopw
    (OP_IMM, 1, 0x604),    // sext.b
    (OP_IMM, 1, 0x605),    // sext.h
    (OP_32, 4, 0x080),     // zext.h
    (OP_IMM, 5, 0x287),    // orc.b
    (OP_IMM, 5, 0x6b8),    // rev8
    (OP_IMM, 5, 0x687),    // brev8
    (OP_IMM, 1, 0x300),    // aes64im
    (OP_IMM, 1, 0x100),    // sha256sum0
    (OP_IMM, 1, 0x101),
    (OP_IMM, 1, 0x102), // sha256sig0
    (OP_IMM, 1, 0x103),
    (OP_IMM, 1, 0x104), // sha512sum0
    (OP_IMM, 1, 0x105),
    (OP_IMM, 1, 0x106), // sha512sig0
    (OP_IMM, 1, 0x107),
];

/// Instructions of a register and a constant below a limit: opcode, funct3, the upper bits, the limit.
const CONSTANT: [(u32, u32, u32, u64); 8] = [
    (OP_IMM_32, 1, 0x080, 64), // slli.uw
    (OP_IMM, 5, 0x600, 64),    // rori
    (OP_IMM_32, 5, 0x600, 32), // roriw
    (OP_IMM, 1, 0x480, 64),    // bclri
    (OP_IMM, 5, 0x480, 64),    // bexti
    (OP_IMM, 1, 0x680, 64),    // binvi
    (OP_IMM, 1, 0x280, 64),    // bseti
    (OP_IMM, 1, 0x310, 16),    // aes64ks1i, round numbers from 11 on being reserved
];

pub(crate) fn word(rng: &mut Rng) -> u32 {
    let (rd, rs1, rs2) = (dest(rng), rng.bits(5), rng.bits(5));
    match rng.below(4) {
        0 | 1 => {
            let (opcode, f3, f7) = rng.pick(&BINARY);
            r(opcode, f3, f7, rd, rs1, rs2)
        }
        2 => {
            let (opcode, f3, upper) = rng.pick(&UNARY);
            i(opcode, f3, rd, rs1, upper as i32)
        }
        _ => {
            let (opcode, f3, upper, limit) = rng.pick(&CONSTANT);
            i(opcode, f3, rd, rs1, upper as i32 | rng.below(limit) as i32)
        }
    }
}

/// Operands that arithmetic leaves alone: a register from the pool of constants.
fn fresh(case: &mut Case, rng: &mut Rng) -> u32 {
    let at = case.constant(rng.integer());
    ld(dest(rng), POOL, at)
}

/// Instructions of these extensions on fresh operands and on each other's results.
pub(crate) fn registers(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 48;
    let mode = any_mode(rng);
    let mut case = Case::new("registers", mode, slots + 1, rng, image);
    for _ in 0..slots {
        let mut words = vec![fresh(&mut case, rng), fresh(&mut case, rng)];
        words.extend([word(rng), word(rng)]);
        case.slot(&words);
    }
    case
}

/// The same with one bit turned over: most are no instructions.
pub(crate) fn near_misses(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 48;
    let mode = any_mode(rng);
    let mut case = Case::new("near misses", mode, slots + 1, rng, image);
    for _ in 0..slots {
        // Neither the opcode, which could become a jump, nor rd, which could become what the code rests on.
        let bit = 12 + rng.below(20);
        case.slot(&[word(rng) ^ 1 << bit]);
    }
    case
}

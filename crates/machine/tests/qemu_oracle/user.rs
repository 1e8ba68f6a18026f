//! Cases of the unprivileged instruction set.

use isa::Op;

use crate::asm::*;
use crate::case::*;
use crate::rng::Rng;

const RESERVED: [u32; 4] = [SP, POOL, D0, D1];

/// A register that code may write.
pub(crate) fn dest(rng: &mut Rng) -> u32 {
    loop {
        let rd = rng.bits(5);
        if !RESERVED.contains(&rd) {
            return rd;
        }
    }
}

pub(crate) fn any_mode(rng: &mut Rng) -> u64 {
    rng.pick(&[M, M, S, U])
}

fn alu(rng: &mut Rng) -> u32 {
    let (rd, rs1, rs2) = (dest(rng), rng.bits(5), rng.bits(5));
    match rng.below(12) {
        0..=2 => {
            let f3 = rng.bits(3);
            let f7 = if matches!(f3, 0 | 5) { rng.pick(&[0, 0x20]) } else { 0 };
            r(0x33, f3, f7, rd, rs1, rs2)
        }
        3 => {
            let f3 = rng.pick(&[0, 1, 5]);
            let f7 = if f3 == 1 { 0 } else { rng.pick(&[0, 0x20]) };
            r(0x3b, f3, f7, rd, rs1, rs2)
        }
        4 | 5 => r(0x33, rng.bits(3), 1, rd, rs1, rs2),
        6 => r(0x3b, rng.pick(&[0, 4, 5, 6, 7]), 1, rd, rs1, rs2),
        7 | 8 => i(0x13, rng.pick(&[0, 2, 3, 4, 6, 7]), rd, rs1, rng.bits(12) as i32),
        9 => match rng.below(4) {
            0 => i(0x1b, 0, rd, rs1, rng.bits(12) as i32),
            1 => i(0x1b, rng.pick(&[1, 5]), rd, rs1, rng.bits(5) as i32),
            2 => i(0x1b, 5, rd, rs1, 0x400 | rng.bits(5) as i32),
            _ => i(0x13, rng.pick(&[1, 5]), rd, rs1, rng.bits(6) as i32),
        },
        10 => i(0x13, 5, rd, rs1, 0x400 | rng.bits(6) as i32),
        _ => rng.pick(&[lui(rd, 0), auipc(rd, 0)]) | rng.bits(20) << 12,
    }
}

fn base(rng: &mut Rng) -> u32 {
    if rng.one_in(24) { rng.bits(5) } else { rng.pick(&[SP, D0, D1]) }
}

fn memory(rng: &mut Rng) -> u32 {
    let imm = rng.below(0x400) as i32 - 0x200;
    let imm = if rng.one_in(2) { imm } else { imm & !7 };
    if rng.one_in(2) {
        i(0x03, rng.below(7) as u32, dest(rng), base(rng), imm)
    } else {
        // Not through any register: results of auipc point at the code, which may not change without fence.i.
        let base = rng.pick(&[SP, SP, SP, D0, D0, D1, D1, 0]);
        s(0x23, rng.below(4) as u32, base, rng.bits(5), imm)
    }
}

/// A jump or branch to a later slot, for the start of a slot.
fn control(rng: &mut Rng, left: u64) -> Vec<u32> {
    let slots = 1 + rng.below(left.min(4)) as i32;
    let to = slots * 16;
    match rng.below(4) {
        0 => vec![jal(dest(rng), to)],
        1 => {
            let rd = rng.pick(&[1, 3, 7, 15, 28]);
            vec![auipc(rd, 0), jalr(dest(rng), rd, to | rng.bits(1) as i32)]
        }
        _ => {
            vec![b(rng.pick(&[0, 1, 4, 5, 6, 7]), rng.bits(5), rng.bits(5), to), alu(rng), alu(rng)]
        }
    }
}

/// RV64IM with loads, stores and forward jumps.
pub(crate) fn integer(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 32;
    let mode = any_mode(rng);
    let mut case = Case::new("integer", mode, slots + 1, rng, image);
    for left in (1..=slots).rev() {
        let words: Vec<u32> = match rng.below(6) {
            0 => control(rng, left),
            1 | 2 => (0..4).map(|_| if rng.one_in(3) { alu(rng) } else { memory(rng) }).collect(),
            _ => (0..4).map(|_| alu(rng)).collect(),
        };
        case.slot(&words);
    }
    case
}

/// A random 16-bit instruction that does not leave the code or spoil what it rests on.
fn compressed_word(rng: &mut Rng) -> u16 {
    loop {
        let w = rng.bits(16) as u16;
        if w & 3 == 3 {
            continue;
        }
        let insn = isa::decode(u32::from(w));
        let jumps = matches!(insn.op, Op::Jal | Op::Jalr | Op::Beq | Op::Bne);
        let stores = matches!(
            insn.op,
            Op::Sb
                | Op::Sh
                | Op::Sw
                | Op::Sd
                | Op::Fsd
                | Op::Lbu
                | Op::Lh
                | Op::Lhu
                | Op::Lw
                | Op::Ld
                | Op::Fld
        );
        let wild = stores && !RESERVED.contains(&u32::from(insn.rs1)) && !rng.one_in(8);
        let spoils = RESERVED.contains(&u32::from(insn.rd)) && !matches!(insn.op, Op::Fld);
        if !jumps && !wild && !spoils {
            return w;
        }
    }
}

/// The C extension, 16-bit and 32-bit instructions mixed.
pub(crate) fn compressed(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 32;
    let mode = any_mode(rng);
    let mut case = Case::new("compressed", mode, slots + 1, rng, image);
    for _ in 0..slots {
        let mut bytes = vec![];
        // c.j, c.beqz or c.bnez to a later halfword of the slot, rarely.
        if rng.one_in(6) {
            let rs1 = (rng.bits(3) as u16) << 7;
            let skip = rng.pick(&[0xa011u16, 0xc011 | rs1, 0xe011 | rs1]);
            bytes.extend(skip.to_le_bytes()); // to +4
            bytes.extend(compressed_word(rng).to_le_bytes());
        }
        while bytes.len() < 16 {
            if bytes.len() <= 12 && rng.one_in(3) {
                bytes.extend(alu(rng).to_le_bytes());
            } else {
                bytes.extend(compressed_word(rng).to_le_bytes());
            }
        }
        case.slot_bytes(&bytes);
    }
    case
}

/// Atomics, and waits for reservations, on aligned and, but for SC, misaligned addresses.
pub(crate) fn atomic(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 24;
    let mode = any_mode(rng);
    let mut case = Case::new("atomic", mode, slots + 1, rng, image);
    let aligned = case.data_gpa() + 0x400;
    case.x[D0 as usize] = aligned + 8 * rng.below(4);
    case.x[D1 as usize] = if rng.one_in(2) { aligned + 8 } else { aligned + rng.below(16) };
    for _ in 0..slots {
        let amo = |rng: &mut Rng| {
            let f5 = rng.pick(&[1u32, 0, 4, 12, 8, 16, 20, 24, 28]);
            let at = rng.pick(&[D0, D0, D1]);
            r(0x2f, rng.pick(&[2, 3]), f5 << 2 | rng.bits(2), dest(rng), at, rng.bits(5))
        };
        let width = rng.pick(&[2, 3]);
        let lr = r(0x2f, width, 2 << 2 | rng.bits(2), dest(rng), D0, 0);
        let sc = r(0x2f, width, 3 << 2 | rng.bits(2), dest(rng), D0, rng.bits(5));
        let wait = rng.pick(&[0x00d0_0073, 0x01d0_0073]); // wrs.nto, wrs.sto
        let words = match rng.below(9) {
            8 => vec![lr, wait, sc, wait],
            0 => vec![lr, sc, sc],
            1 => vec![lr, alu(rng), sc],
            2 => vec![lr, sd(rng.bits(5), D0, 0), sc],
            3 => vec![lr, amo(rng), sc],
            4 => vec![sc, r(0x2f, width, 8, dest(rng), D1, 0), sc],
            5 => vec![lr, ECALL, sc, amo(rng)],
            _ => (0..4).map(|_| amo(rng)).collect(),
        };
        case.slot(&words);
        // The next slot starts without a reservation of the other width.
        if rng.one_in(8) {
            case.x[D0 as usize] = aligned;
        }
    }
    case
}

fn float_op(rng: &mut Rng) -> u32 {
    let (rd, rs1, rs2, rs3) = (rng.bits(5), rng.bits(5), rng.bits(5), rng.bits(5));
    let rm = if rng.one_in(3) { rng.bits(3) } else { rng.pick(&[0, 1, 2, 3, 4, 7, 7]) };
    let double = rng.bits(1);
    match rng.below(14) {
        12 | 13 => additional_float_op(rng, rm, double),
        0..=2 => {
            rs3 << 27 | double << 25 | r(rng.pick(&[0x43, 0x47, 0x4b, 0x4f]), rm, 0, rd, rs1, rs2)
        }
        3 | 4 => r(0x53, rm, rng.pick(&[0, 4, 8, 12]) | double, rd, rs1, rs2),
        5 => r(0x53, rm, 0x2c | double, rd, rs1, 0),
        6 => r(0x53, rng.below(3) as u32, 0x10 | double, rd, rs1, rs2),
        7 => r(0x53, rng.bits(1), 0x14 | double, rd, rs1, rs2),
        8 => r(0x53, rng.below(3) as u32, 0x50 | double, dest(rng), rs1, rs2),
        9 => r(0x53, rm, 0x60 | double, dest(rng), rs1, rng.bits(2)),
        10 => r(0x53, rm, 0x68 | double, rd, rs1, rng.bits(2)),
        _ => match rng.below(4) {
            0 => r(0x53, rm, 0x20 | double, rd, rs1, 1 - double),
            1 => r(0x53, rng.bits(1), 0x70 | double, dest(rng), rs1, 0),
            2 => r(0x53, 0, 0x78 | double, rd, rs1, 0),
            _ => {
                let imm = rng.below(0x400) as i32 - 0x200;
                let f3 = rng.pick(&[2, 3]);
                if rng.one_in(2) {
                    i(0x07, f3, rd, base(rng), imm)
                } else {
                    s(0x27, f3, base(rng), rs2, imm)
                }
            }
        },
    }
}

/// Instructions of Zfa.
fn additional_float_op(rng: &mut Rng, rm: u32, double: u32) -> u32 {
    let (rd, rs1, rs2) = (rng.bits(5), rng.bits(5), rng.bits(5));
    match rng.below(6) {
        0 => r(0x53, 0, 0x78 | double, rd, rs1, 1), // fli
        1 => r(0x53, rng.pick(&[2, 3]), 0x14 | double, rd, rs1, rs2), // fminm, fmaxm
        2 | 3 => r(0x53, rm, 0x20 | double, rd, rs1, rng.pick(&[4, 5])), // fround, froundnx
        4 => r(0x53, rng.pick(&[4, 5]), 0x50 | double, dest(rng), rs1, rs2), // fleq, fltq
        _ => r(0x53, 1, 0x61, dest(rng), rs1, 8),   // fcvtmod.w.d
    }
}

fn is_fround(word: u32) -> bool {
    word & 0xfde0_007f == 0x4040_0053
}

/// F, D and Zfa: all operations, rounding modes and special operands; the flags after each slot.
pub(crate) fn float(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 40;
    let mode = any_mode(rng);
    let mut case = Case::new("float", mode, slots + 1, rng, image);
    for k in 0..slots {
        let mut words: Vec<u32> = (0..3).map(|_| float_op(rng)).collect();
        words.push(match rng.below(8) {
            0 => csr(5, dest(rng), 2, rng.bits(3)), // frm, reserved modes too
            1 => csr(1, dest(rng), 3, rng.bits(5)), // fcsr
            2 => csr(5, dest(rng), 1, rng.bits(5)), // fflags
            3 => csr(1, dest(rng), 2, rng.bits(5)),
            _ => csr(5, dest(rng), 1, 0),
        });
        if k % 8 == 7 {
            // Fresh operands.
            words = (0..4)
                .map(|_| {
                    i(
                        0x07,
                        rng.pick(&[2, 3]),
                        rng.bits(5),
                        SP,
                        (rng.below(0x200) * 4) as i32 - 0x400,
                    )
                })
                .collect();
        }
        if rng.one_in(12) {
            words[0] = csr(5, 0, 2, rng.below(5) as u32);
        }
        // Exception "fround": QEMU forgets one whose result is overwritten before the slot ends.
        for at in 0..words.len() {
            let overwritten = words[at + 1..].iter().any(|w| (w ^ words[at]) >> 7 & 31 == 0);
            if overwritten && is_fround(words[at]) {
                words[at] = NOP;
            }
        }
        case.slot(&words);
    }
    case
}

/// Whether a word may be executed at random: it neither jumps nor changes the hart's state at large.
fn is_harmless(word: u32, case: &Case) -> bool {
    let insn = isa::decode(word);
    let op = insn.op;
    let jumps = matches!(
        op,
        Op::Jal | Op::Jalr | Op::Beq | Op::Bne | Op::Blt | Op::Bge | Op::Bltu | Op::Bgeu
    );
    let system = op >= Op::CsrRw && op <= Op::CsrRci || matches!(op, Op::Mret | Op::Sret | Op::Wfi);
    let sc = matches!(op, Op::ScW | Op::ScD);
    let svinval = case.mode == U && matches!(op, Op::SfenceWInval | Op::SfenceInvalIr);
    // Exception "FS": flags alone do not make QEMU's mstatus.FS dirty.
    let flags = case.mstatus & FS_DIRTY == FS_INITIAL
        && word & 0x7f == 0x53
        && matches!(word >> 25 & !1, 0x50 | 0x60);
    // Through the pool's register a store may reach the code, which needs a fence.i.
    let stores = matches!(op, Op::Sb | Op::Sh | Op::Sw | Op::Sd | Op::Fsw | Op::Fsd);
    let wild = stores && u32::from(insn.rs1) == POOL;
    let spoils = wild || RESERVED.contains(&u32::from(insn.rd));
    !flags && !svinval && !jumps && !system && !sc && !spoils
}

/// Random words, most of them no instructions.
pub(crate) fn words(rng: &mut Rng, image: &mut Image) -> Case {
    let slots = 40;
    let mode = any_mode(rng);
    let mut case = Case::new("words", mode, slots + 1, rng, image);
    case.mstatus = rng.pick(&[0, FS_INITIAL, FS_DIRTY, FS_DIRTY]) | rng.pick(&[0, 1 << 20]);
    for _ in 0..slots {
        let word = loop {
            let word = match rng.below(8) {
                0 => rng.bits(32) | 3,
                1 => rng.bits(16) & !3 | rng.bits(2).min(2),
                // Near misses of what exists: one bit of an instruction turned over.
                2 => alu(rng) ^ 1 << rng.bits(5),
                3 => float_op(rng) ^ 1 << rng.bits(5),
                4 => r(0x2f, rng.bits(3), rng.bits(7), dest(rng), D0, rng.bits(5)),
                5 => {
                    (u32::from(rng.one_in(3)) << rng.bits(5))
                        ^ rng.pick(&[
                            ECALL,
                            EBREAK,
                            SFENCE,
                            0x1600_0073,
                            0x1800_0073,
                            0x1810_0073,
                            0xf,
                            0x100f,
                            0x0100_000f,
                        ])
                }
                6 => r(0x53, rng.bits(3), rng.bits(7), dest(rng), rng.bits(5), rng.bits(5)),
                _ => {
                    rng.bits(32) & !0x7f
                        | rng.pick(&[
                            0x03, 0x07, 0x0b, 0x0f, 0x13, 0x1b, 0x23, 0x27, 0x2b, 0x2f, 0x33, 0x3b,
                            0x43, 0x53, 0x57, 0x5b, 0x6b, 0x73, 0x77, 0x7b, 0x1f, 0x3f, 0x5f, 0x7f,
                        ])
                }
            };
            if is_harmless(word, &case) && (word & 3 == 3 || is_harmless(word & 0xffff, &case)) {
                break word;
            }
        };
        if word & 3 == 3 {
            case.slot(&[word]);
        } else {
            case.slot_bytes(&(word as u16).to_le_bytes());
        }
    }
    case
}

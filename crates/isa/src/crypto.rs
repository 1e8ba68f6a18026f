//! Results of the instructions for cryptography: Zbc, Zbkb, Zbkx, Zknd, Zkne and Zknh.
//!
//! # Place
//! As [`crate::bits`].
//!
//! # Invariants
//! - INV-CRYPTO-1: a step here is a step whatever the operands, so a guest sees no timing that depends on data; the host's
//!   caches do (AES looks up bytes in a table), and therefore the machine does not announce Zkt.
//!
//! # References
//! The RISC-V Instruction Set Manual, volume I, chapters "B" (Zbc, Zbkb, Zbkx) and "Scalar Cryptography"; FIPS 197; FIPS
//! 180-4.

use crate::table::Op;

/// What `op` gives for the values `a` and `b` of rs1 and rs2 and the immediate. `None` when `op` is not of these
/// extensions.
#[must_use]
pub fn compute(op: Op, a: u64, b: u64, imm: i32) -> Option<u64> {
    let w = a as u32;
    Some(match op {
        Op::Clmul => carryless_product(a, b) as u64,
        Op::Clmulh => (carryless_product(a, b) >> 64) as u64,
        Op::Clmulr => (carryless_product(a, b) >> 63) as u64,
        Op::Pack => b << 32 | u64::from(w),
        Op::Packh => (b & 0xff) << 8 | a & 0xff,
        Op::Packw => ((b as u32) << 16 | w & 0xffff) as i32 as u64,
        Op::Brev8 => a.swap_bytes().reverse_bits(),
        Op::Xperm4 => permute(a, b, 4),
        Op::Xperm8 => permute(a, b, 8),
        Op::Aes64ds => substitute(&INVERSE_SBOX, rows_shifted_back(a, b)),
        Op::Aes64dsm => columns_mixed_back(substitute(&INVERSE_SBOX, rows_shifted_back(a, b))),
        Op::Aes64es => substitute(&SBOX, rows_shifted(a, b)),
        Op::Aes64esm => columns_mixed(substitute(&SBOX, rows_shifted(a, b))),
        Op::Aes64im => columns_mixed_back(a),
        Op::Aes64ks1i => key_word(a, imm),
        Op::Aes64ks2 => {
            let first = (a >> 32) as u32 ^ b as u32;
            u64::from(first ^ (b >> 32) as u32) << 32 | u64::from(first)
        }
        Op::Sha256sum0 => mix32(w.rotate_right(2), w.rotate_right(13), w.rotate_right(22)),
        Op::Sha256sum1 => mix32(w.rotate_right(6), w.rotate_right(11), w.rotate_right(25)),
        Op::Sha256sig0 => mix32(w.rotate_right(7), w.rotate_right(18), w >> 3),
        Op::Sha256sig1 => mix32(w.rotate_right(17), w.rotate_right(19), w >> 10),
        Op::Sha512sum0 => a.rotate_right(28) ^ a.rotate_right(34) ^ a.rotate_right(39),
        Op::Sha512sum1 => a.rotate_right(14) ^ a.rotate_right(18) ^ a.rotate_right(41),
        Op::Sha512sig0 => a.rotate_right(1) ^ a.rotate_right(8) ^ a >> 7,
        Op::Sha512sig1 => a.rotate_right(19) ^ a.rotate_right(61) ^ a >> 6,
        _ => return None,
    })
}

fn mix32(x: u32, y: u32, z: u32) -> u64 {
    (x ^ y ^ z) as i32 as u64
}

fn carryless_product(a: u64, b: u64) -> u128 {
    (0..64).fold(0, |sum, i| sum ^ ((u128::from(a) << i) * u128::from(b >> i & 1)))
}

/// Each field of `bits` bits of `indices` replaced by the field of `table` with that number, or by 0 beyond its end.
fn permute(table: u64, indices: u64, bits: u32) -> u64 {
    let mask = (1 << bits) - 1;
    (0..64).step_by(bits as usize).fold(0, |out, at| {
        let from = (indices >> at & mask) as u32 * bits;
        out | (table.checked_shr(from).unwrap_or(0) & mask) << at
    })
}

/// Twice `v` in the field of AES.
const fn doubled(v: u8) -> u8 {
    (v << 1) ^ ((v >> 7) * 0x1b)
}

/// The substitution of AES: walks the field's powers of 3 and, backwards, of its inverse.
const fn make_sbox() -> [u8; 256] {
    let mut sbox = [0; 256];
    // 0 has no inverse.
    sbox[0] = 0x63;
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        // p times 3, q divided by 3: p * q stays 1.
        p ^= doubled(p);
        q ^= q << 1;
        q ^= q << 2;
        q ^= q << 4;
        q ^= (q >> 7) * 0x09;
        let affine = q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4);
        sbox[p as usize] = q ^ affine ^ 0x63;
        if p == 1 {
            return sbox;
        }
    }
}

const fn inverted(sbox: &[u8; 256]) -> [u8; 256] {
    let (mut inverse, mut i) = ([0; 256], 0);
    while i < 256 {
        inverse[sbox[i] as usize] = i as u8;
        i += 1;
    }
    inverse
}

static SBOX: [u8; 256] = make_sbox();
static INVERSE_SBOX: [u8; 256] = inverted(&make_sbox());

fn substitute(sbox: &[u8; 256], v: u64) -> u64 {
    u64::from_le_bytes(v.to_le_bytes().map(|byte| sbox[usize::from(byte)]))
}

/// The first two columns of a state, `low` and `high` being its halves, after ShiftRows.
fn rows_shifted(low: u64, high: u64) -> u64 {
    pick_bytes(low, high, [0, 5, 10, 15, 4, 9, 14, 3])
}

/// The same after InvShiftRows.
fn rows_shifted_back(low: u64, high: u64) -> u64 {
    pick_bytes(low, high, [0, 13, 10, 7, 4, 1, 14, 11])
}

fn pick_bytes(low: u64, high: u64, from: [u32; 8]) -> u64 {
    let state = u128::from(high) << 64 | u128::from(low);
    u64::from_le_bytes(from.map(|byte| (state >> (8 * byte)) as u8))
}

/// [`doubled`] of each byte.
fn doubled_bytes(v: u64) -> u64 {
    let top = v >> 7 & 0x0101_0101_0101_0101;
    (v & 0x7f7f_7f7f_7f7f_7f7f) << 1 ^ top.wrapping_mul(0x1b)
}

/// Each column, four bytes, with its bytes moved down by `n`.
fn columns_rotated(v: u64, n: u32) -> u64 {
    let (high, low) = ((v >> 32) as u32, v as u32);
    u64::from(high.rotate_right(8 * n)) << 32 | u64::from(low.rotate_right(8 * n))
}

/// MixColumns on two columns.
fn columns_mixed(v: u64) -> u64 {
    let next = columns_rotated(v, 1);
    doubled_bytes(v ^ next) ^ next ^ columns_rotated(v, 2) ^ columns_rotated(v, 3)
}

/// InvMixColumns on two columns: MixColumns after a multiplication by 4 x^2 + 5.
fn columns_mixed_back(v: u64) -> u64 {
    let quadruple = doubled_bytes(doubled_bytes(v ^ columns_rotated(v, 2)));
    columns_mixed(v ^ quadruple)
}

/// The word of the key schedule that is derived through the S-box, in both halves.
fn key_word(a: u64, round: i32) -> u64 {
    const ROUND_CONSTANTS: [u8; 10] = [1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0x1b, 0x36];
    let last = (a >> 32) as u32;
    let word = match usize::try_from(round).ok().and_then(|i| ROUND_CONSTANTS.get(i)) {
        Some(&constant) => {
            substitute(&SBOX, u64::from(last.rotate_right(8))) as u32 ^ u32::from(constant)
        }
        // Round 10 stands for the steps between those of AES-256: neither rotation nor constant.
        None => substitute(&SBOX, u64::from(last)) as u32,
    };
    u64::from(word) << 32 | u64::from(word)
}

#[cfg(test)]
mod tests;

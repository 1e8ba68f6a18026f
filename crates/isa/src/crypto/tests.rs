//! Known answers: the examples of FIPS 197 and FIPS 180 computed through the instructions.

use super::compute;
use crate::bits;
use crate::table::{Op, ROWS};

fn one(op: Op, a: u64) -> u64 {
    compute(op, a, 0, 0).unwrap()
}

fn two(op: Op, a: u64, b: u64) -> u64 {
    compute(op, a, b, 0).unwrap()
}

#[test]
fn the_range_of_the_table_is_what_is_computed_here() {
    for row in ROWS {
        let inside = (Op::Clmul..=Op::Sha512sig1).contains(&row.op);
        assert_eq!(compute(row.op, 1, 2, 3).is_some(), inside, "{row:?}");
    }
}

#[test]
fn permutations_and_products_have_the_values_of_the_manual() {
    assert_eq!(two(Op::Clmul, 3, 3), 5);
    assert_eq!(two(Op::Clmulh, u64::MAX, u64::MAX), 0x5555_5555_5555_5555);
    assert_eq!(two(Op::Clmul, u64::MAX, u64::MAX), 0x5555_5555_5555_5555);
    assert_eq!(two(Op::Clmulr, 1 << 63, 1 << 63), 1 << 63);
    assert_eq!(
        two(Op::Xperm8, 0x8877_6655_4433_2211, 0x0008_07ff_0001_0203),
        0x1100_8800_1122_3344
    );
    assert_eq!(
        two(Op::Xperm4, 0xfedc_ba98_7654_3210, 0x0123_4567_89ab_cdef),
        0x0123_4567_89ab_cdef
    );
    assert_eq!(two(Op::Pack, 0x1111_1111_2222_2222, 0x3333_3333_4444_4444), 0x4444_4444_2222_2222);
    assert_eq!(two(Op::Packh, 0x1122, 0x3344), 0x4422);
    assert_eq!(two(Op::Packw, 0x1122, 0xf344), 0xffff_ffff_f344_1122);
    assert_eq!(one(Op::Brev8, 0x0102_0408_1020_4080), 0x8040_2010_0804_0201);
}

#[test]
fn round_numbers_beyond_the_last_do_not_panic() {
    for round in [-1, 10, 11, i32::MAX] {
        assert!(compute(Op::Aes64ks1i, 1, 0, round).is_some());
    }
}

type Block = [u64; 2];

fn block(bytes: [u8; 16]) -> Block {
    let half = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    [half(0), half(8)]
}

fn expand_128(key: Block) -> Vec<Block> {
    let mut keys = vec![key];
    for round in 0..10 {
        let [low, high] = keys[round];
        let word = compute(Op::Aes64ks1i, high, 0, round as i32).unwrap();
        let low = two(Op::Aes64ks2, word, low);
        keys.push([low, two(Op::Aes64ks2, low, high)]);
    }
    keys
}

fn expand_256(first: Block, second: Block) -> Vec<Block> {
    let mut keys = vec![first, second];
    for step in 0..13 {
        // Every other step is without rotation and constant.
        let round = if step % 2 == 0 { step / 2 } else { 10 };
        let (before, [low, high]) = (keys[keys.len() - 1], keys[keys.len() - 2]);
        let word = compute(Op::Aes64ks1i, before[1], 0, round).unwrap();
        let low = two(Op::Aes64ks2, word, low);
        keys.push([low, two(Op::Aes64ks2, low, high)]);
    }
    keys
}

fn add(a: Block, b: Block) -> Block {
    [a[0] ^ b[0], a[1] ^ b[1]]
}

fn round(op: Op, s: Block) -> Block {
    [two(op, s[0], s[1]), two(op, s[1], s[0])]
}

fn encrypt(keys: &[Block], text: Block) -> Block {
    let (last, middle) = keys[1..].split_last().unwrap();
    let state = middle.iter().fold(add(text, keys[0]), |s, &k| add(round(Op::Aes64esm, s), k));
    add(round(Op::Aes64es, state), *last)
}

fn decrypt(keys: &[Block], text: Block) -> Block {
    let (last, others) = keys.split_last().unwrap();
    let state = others[1..].iter().rev().fold(add(text, *last), |s, k| {
        add(round(Op::Aes64dsm, s), k.map(|half| one(Op::Aes64im, half)))
    });
    add(round(Op::Aes64ds, state), keys[0])
}

#[test]
fn aes_gives_the_examples_of_fips_197() {
    let text = block([
        0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee,
        0xff,
    ]);
    let counted = |first: u8| block(std::array::from_fn(|i| first + i as u8));
    let keys = expand_128(counted(0));
    let expected = block([
        0x69, 0xc4, 0xe0, 0xd8, 0x6a, 0x7b, 0x04, 0x30, 0xd8, 0xcd, 0xb7, 0x80, 0x70, 0xb4, 0xc5,
        0x5a,
    ]);
    assert_eq!(encrypt(&keys, text), expected);
    assert_eq!(decrypt(&keys, expected), text);
    let keys = expand_256(counted(0), counted(16));
    let expected = block([
        0x8e, 0xa2, 0xb7, 0xca, 0x51, 0x67, 0x45, 0xbf, 0xea, 0xfc, 0x49, 0x90, 0x4b, 0x49, 0x60,
        0x89,
    ]);
    assert_eq!(encrypt(&keys, text), expected);
    assert_eq!(decrypt(&keys, expected), text);
}

fn primes() -> impl Iterator<Item = u128> {
    (2u128..).filter(|n| (2..*n).take_while(|d| d * d <= *n).all(|d| n % d != 0))
}

/// The product of two numbers of 32-bit digits, least significant first.
fn product(a: &[u32], b: &[u32]) -> Vec<u32> {
    let mut out = vec![0u32; a.len() + b.len()];
    for (i, &x) in a.iter().enumerate() {
        let mut carry = 0;
        for (j, &y) in b.iter().enumerate() {
            let sum = u64::from(out[i + j]) + u64::from(x) * u64::from(y) + carry;
            out[i + j] = sum as u32;
            carry = sum >> 32;
        }
        out[i + b.len()] = carry as u32;
    }
    out
}

/// The first 64 bits of the fraction of the `n`th root of `p`: where the constants of SHA come from.
fn root_fraction(p: u128, n: usize) -> u64 {
    let digits = |v: u128| [v as u32, (v >> 32) as u32, (v >> 64) as u32];
    let mut root = 0u128;
    for bit in (0..70).rev() {
        let r = digits(root | 1 << bit);
        let power = (1..n).fold(r.to_vec(), |power, _| product(&power, &r));
        let mut limit = [vec![0; 2 * n], digits(p).to_vec()].concat();
        limit.resize(power.len().max(limit.len()), 0);
        let padding = vec![0; limit.len() - power.len()];
        if power.iter().chain(&padding).rev().le(limit.iter().rev()) {
            root |= 1 << bit;
        }
    }
    root as u64
}

/// Initial hash value and round constants of SHA-512; the upper halves are those of SHA-256.
fn constants() -> ([u64; 8], Vec<u64>) {
    let initial: Vec<u64> = primes().take(8).map(|p| root_fraction(p, 2)).collect();
    (initial.try_into().unwrap(), primes().take(80).map(|p| root_fraction(p, 3)).collect())
}

/// The instructions of one of the two functions.
struct Sha {
    sum: [Op; 2],
    sig: [Op; 2],
    /// Cuts a sum to the width of the function's words.
    word: fn(u64) -> u64,
}

impl Sha {
    /// One block: the compression function.
    fn compress(&self, initial: [u64; 8], constants: &[u64], message: [u64; 16]) -> [u64; 8] {
        let add = |terms: &[u64]| (self.word)(terms.iter().fold(0, |a, &b| a.wrapping_add(b)));
        let mut w = message.to_vec();
        for t in 16..constants.len() {
            let (late, early) = (one(self.sig[1], w[t - 2]), one(self.sig[0], w[t - 15]));
            w.push(add(&[late, w[t - 7], early, w[t - 16]]));
        }
        let mut s = initial;
        for (&k, &w) in constants.iter().zip(&w) {
            let [a, b, c, d, e, f, g, h] = s;
            let choice = e & f ^ bits::compute(Op::Andn, g, e, 0).unwrap();
            let majority = a & b ^ a & c ^ b & c;
            let first = add(&[h, one(self.sum[1], e), choice, k, w]);
            let second = add(&[one(self.sum[0], a), majority]);
            s = [add(&[first, second]), a, b, c, add(&[d, first]), e, f, g];
        }
        std::array::from_fn(|i| add(&[s[i], initial[i]]))
    }
}

#[test]
fn sha_512_gives_the_example_of_fips_180() {
    let (initial, constants) = constants();
    let sha = Sha {
        sum: [Op::Sha512sum0, Op::Sha512sum1],
        sig: [Op::Sha512sig0, Op::Sha512sig1],
        word: |v| v,
    };
    let mut message = [0; 16];
    (message[0], message[15]) = (0x6162_6380 << 32, 24); // "abc"
    let expected = [
        0xddaf_35a1_9361_7aba,
        0xcc41_7349_ae20_4131,
        0x12e6_fa4e_89a9_7ea2,
        0x0a9e_eee6_4b55_d39a,
        0x2192_992a_274f_c1a8,
        0x36ba_3c23_a3fe_ebbd,
        0x454d_4423_643c_e80e,
        0x2a9a_c94f_a54c_a49f,
    ];
    assert_eq!(sha.compress(initial, &constants, message), expected);
}

#[test]
fn sha_256_gives_the_example_of_fips_180() {
    let (initial, constants) = constants();
    let sha = Sha {
        sum: [Op::Sha256sum0, Op::Sha256sum1],
        sig: [Op::Sha256sig0, Op::Sha256sig1],
        word: |v| v as i32 as u64,
    };
    let extend = |v: &u64| (v >> 32) as i32 as u64;
    let constants: Vec<u64> = constants[..64].iter().map(extend).collect();
    let mut message = [0; 16];
    (message[0], message[15]) = (0x6162_6380, 24); // "abc"
    let hash = sha.compress(initial.each_ref().map(extend), &constants, message);
    let expected = [
        0xba78_16bf,
        0x8f01_cfea,
        0x4141_40de,
        0x5dae_2223,
        0xb003_61a3,
        0x9617_7a9c,
        0xb410_ff61,
        0xf200_15ad,
    ];
    assert_eq!(hash.map(|v| v as u32), expected);
}

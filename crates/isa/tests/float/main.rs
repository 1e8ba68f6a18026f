//! Floating point against Berkeley SoftFloat, which has RISC-V's choices built in, and against the host.
//!
//! SoftFloat is C and wants cmake, so only `--features berkeley` compares with it. Every run checks digests of the
//! results for the same operands, which were taken when each of them had been compared: a change of any result shows
//! without SoftFloat too. Rounding to nearest is compared with the host in every run.

mod additional;
#[cfg(feature = "berkeley")]
mod berkeley;

use isa::float::{self, Rounding};

const MODES: [Rounding; 5] =
    [Rounding::Rne, Rounding::Rtz, Rounding::Rdn, Rounding::Rup, Rounding::Rmm];

/// What is compared, for a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Add,
    Sub,
    Mul,
    Div,
    Sqrt,
    Fma,
    Eq,
    Lt,
    Le,
    ToI32,
    ToU32,
    ToI64,
    ToU64,
    FromI32,
    FromU32,
    FromI64,
    FromU64,
    /// To the other format.
    Convert,
}

use Operation::*;

/// Operations on two operands or one.
const BINARY: [Operation; 13] =
    [Add, Sub, Mul, Div, Sqrt, Eq, Lt, Le, ToI32, ToU32, ToI64, ToU64, Convert];
const FROM_INTEGER: [Operation; 4] = [FromI32, FromU32, FromI64, FromU64];

fn ours_f32(op: Operation, rm: Rounding, [a, b, c]: [u64; 3], f: &mut u8) -> u64 {
    let (x, y, z) = (a as u32, b as u32, c as u32);
    match op {
        Add => float::f32_add(x, y, rm, f).into(),
        Sub => float::f32_sub(x, y, rm, f).into(),
        Mul => float::f32_mul(x, y, rm, f).into(),
        Div => float::f32_div(x, y, rm, f).into(),
        Sqrt => float::f32_sqrt(x, rm, f).into(),
        Fma => float::f32_fma(x, y, z, rm, f).into(),
        Eq => float::f32_eq(x, y, f).into(),
        Lt => float::f32_lt(x, y, f).into(),
        Le => float::f32_le(x, y, f).into(),
        ToI32 => float::f32_to_i32(x, rm, f),
        ToU32 => float::f32_to_u32(x, rm, f),
        ToI64 => float::f32_to_i64(x, rm, f),
        ToU64 => float::f32_to_u64(x, rm, f),
        FromI32 => float::f32_from_i32(a as i32, rm, f).into(),
        FromU32 => float::f32_from_u32(a as u32, rm, f).into(),
        FromI64 => float::f32_from_i64(a as i64, rm, f).into(),
        FromU64 => float::f32_from_u64(a, rm, f).into(),
        Convert => float::f32_to_f64(x, f),
    }
}

fn ours_f64(op: Operation, rm: Rounding, [a, b, c]: [u64; 3], f: &mut u8) -> u64 {
    match op {
        Add => float::f64_add(a, b, rm, f),
        Sub => float::f64_sub(a, b, rm, f),
        Mul => float::f64_mul(a, b, rm, f),
        Div => float::f64_div(a, b, rm, f),
        Sqrt => float::f64_sqrt(a, rm, f),
        Fma => float::f64_fma(a, b, c, rm, f),
        Eq => float::f64_eq(a, b, f).into(),
        Lt => float::f64_lt(a, b, f).into(),
        Le => float::f64_le(a, b, f).into(),
        ToI32 => float::f64_to_i32(a, rm, f),
        ToU32 => float::f64_to_u32(a, rm, f),
        ToI64 => float::f64_to_i64(a, rm, f),
        ToU64 => float::f64_to_u64(a, rm, f),
        FromI32 => float::f64_from_i32(a as i32, rm, f),
        FromU32 => float::f64_from_u32(a as u32, rm, f),
        FromI64 => float::f64_from_i64(a as i64, rm, f),
        FromU64 => float::f64_from_u64(a, rm, f),
        Convert => float::f64_to_f32(a, rm, f).into(),
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A significand likely to sit on a rounding border: a few runs of equal bits.
    fn runs(&mut self) -> u64 {
        let mut x = 0u64;
        for _ in 0..=self.below(3) {
            x ^= u64::MAX << self.below(64);
        }
        x ^ if self.below(2) == 0 { 1 << self.below(64) } else { 0 }
    }
}

/// A format's layout, for making operands.
#[derive(Clone, Copy)]
struct Layout {
    exp_bits: u32,
    frac_bits: u32,
}

const SINGLE: Layout = Layout { exp_bits: 8, frac_bits: 23 };
const DOUBLE: Layout = Layout { exp_bits: 11, frac_bits: 52 };

impl Layout {
    fn make(self, sign: u64, exp: u64, frac: u64) -> u64 {
        let exp = exp & ((1 << self.exp_bits) - 1);
        (sign & 1) << (self.exp_bits + self.frac_bits)
            | exp << self.frac_bits
            | frac & ((1 << self.frac_bits) - 1)
    }

    fn mask(self) -> u64 {
        u64::MAX >> (63 - self.exp_bits - self.frac_bits)
    }

    fn bias(self) -> u64 {
        (1 << (self.exp_bits - 1)) - 1
    }

    fn specials(self) -> Vec<u64> {
        let (top, bias) = ((1 << self.exp_bits) - 1, self.bias());
        let quiet = 1 << (self.frac_bits - 1);
        let frac = u64::from(self.frac_bits);
        let positive = [
            (0, 0),
            (0, 1),
            (0, 2),
            (0, quiet),
            (0, u64::MAX),
            (1, 0),
            (1, 1),
            (1, u64::MAX),
            (2, 0),
            (frac, 0),
            (bias - frac - 2, 0),
            (bias - 1, 0),
            (bias - 1, u64::MAX),
            (bias, 0),
            (bias, 1),
            (bias, quiet),
            (bias + 1, 0),
            (bias + frac, u64::MAX),
            (bias + 30, u64::MAX),
            (bias + 31, 0),
            (bias + 32, 0),
            (bias + 63, 0),
            (bias + 64, 0),
            (top - 1, 0),
            (top - 1, u64::MAX),
            (top, 0),
            (top, 1),
            (top, quiet),
            (top, quiet | 5),
        ];
        let both = |(exp, frac)| [self.make(0, exp, frac), self.make(1, exp, frac)];
        positive.into_iter().flat_map(both).collect()
    }

    fn random(self, r: &mut Random, specials: &[u64]) -> u64 {
        let frac = if r.below(2) == 0 { r.next() } else { r.runs() };
        let near = |r: &mut Random, middle: u64, width: u64| {
            (middle + r.below(2 * width)).wrapping_sub(width)
        };
        let exp = match r.below(8) {
            0 => return specials[r.below(specials.len() as u64) as usize],
            1 | 2 => r.next(),
            3 => r.below(4),
            4 => near(r, self.bias() + 32, 40),
            5 => near(r, self.bias() / 2, 8),
            6 => near(r, self.bias() * 3 / 2, 8),
            _ => near(r, self.bias(), 4),
        };
        self.make(r.next(), exp, frac)
    }
}

/// Results so far, for one format.
struct Checker {
    layout: Layout,
    digest: u64,
}

impl Checker {
    fn new(layout: Layout) -> Self {
        Self { layout, digest: 0 }
    }

    /// Does `op` in all rounding modes; `berkeley` panics where the results differ.
    fn check(&mut self, op: Operation, operands: [u64; 3]) {
        for rm in MODES {
            let mut flags = 0;
            let is_single = self.layout.exp_bits == SINGLE.exp_bits;
            let ours = if is_single { ours_f32 } else { ours_f64 };
            let result = ours(op, rm, operands, &mut flags);
            #[cfg(feature = "berkeley")]
            berkeley::compare(is_single, op, rm, operands, (result, flags));
            self.digest = Random(self.digest ^ result).next() ^ u64::from(flags);
        }
    }
}

const RANDOM_CASES: u32 = 60_000;

fn check_binary(layout: Layout, seed: u64) -> u64 {
    let (mut checker, mut r, specials) = (Checker::new(layout), Random(seed), layout.specials());
    for op in BINARY {
        for &a in &specials {
            specials.iter().for_each(|&b| checker.check(op, [a, b, 0]));
        }
        for _ in 0..RANDOM_CASES {
            let [a, b] = [(); 2].map(|()| layout.random(&mut r, &specials));
            checker.check(op, [a, b, 0]);
            if op == Convert {
                // Around the limits of the narrower format.
                checker.check(
                    op,
                    [
                        DOUBLE.make(r.next(), 1023 - 160 + r.below(300), r.runs()) & layout.mask(),
                        0,
                        0,
                    ],
                );
            }
        }
    }
    checker.digest
}

fn check_fma(layout: Layout, seed: u64) -> u64 {
    let (mut checker, mut r, specials) = (Checker::new(layout), Random(seed), layout.specials());
    for (i, &a) in specials.iter().enumerate() {
        for &b in &specials[i..] {
            specials.iter().for_each(|&c| checker.check(Fma, [a, b, c]));
        }
    }
    for _ in 0..RANDOM_CASES {
        let [a, b, c] = [(); 3].map(|()| layout.random(&mut r, &specials));
        checker.check(Fma, [a, b, c]);
        // A third operand that the product cancels up to the last bits.
        let ours = if layout.exp_bits == SINGLE.exp_bits { ours_f32 } else { ours_f64 };
        let product = ours(Mul, Rounding::Rne, [a, b, 0], &mut 0);
        let near = (product ^ layout.make(1, 0, 0)).wrapping_add(r.below(5)).wrapping_sub(2);
        checker.check(Fma, [a, b, near & layout.mask()]);
    }
    checker.digest
}

fn check_from_integer(layout: Layout, seed: u64) -> u64 {
    let (mut checker, mut r) = (Checker::new(layout), Random(seed));
    for i in 0..RANDOM_CASES {
        let a = match i % 4 {
            0 => r.next(),
            1 => r.runs(),
            2 => r.next() >> r.below(64),
            _ => r.below(9).wrapping_sub(4),
        };
        FROM_INTEGER.into_iter().for_each(|op| checker.check(op, [a, 0, 0]));
    }
    checker.digest
}

#[test]
fn binary32_is_as_softfloat_confirmed() {
    assert_eq!(check_binary(SINGLE, 1), 0xf554_1ed0_f432_7994, "digest");
}

#[test]
fn binary64_is_as_softfloat_confirmed() {
    assert_eq!(check_binary(DOUBLE, 2), 0x48d8_f9ed_34a5_6ae1, "digest");
}

#[test]
fn fused_multiply_add_is_as_softfloat_confirmed() {
    assert_eq!(
        (check_fma(SINGLE, 3), check_fma(DOUBLE, 4)),
        (0x0e07_0e78_8ebf_1de0, 0xfd59_6b42_38c1_7f33),
        "digests"
    );
}

#[test]
fn conversion_from_integers_is_as_softfloat_confirmed() {
    assert_eq!(
        (check_from_integer(SINGLE, 5), check_from_integer(DOUBLE, 6)),
        (0x2c2d_aa9a_0eab_9737, 0x973e_494e_d432_dd6f),
        "digests"
    );
}

/// A NaN's bits are the host's choice, so they do not count.
fn same(ours: u64, host: f64) -> bool {
    if host.is_nan() { ours == 0x7ff8_0000_0000_0000 } else { ours == host.to_bits() }
}

#[test]
fn nearest_even_agrees_with_the_host() {
    let (mut r, specials) = (Random(7), DOUBLE.specials());
    for _ in 0..300_000 {
        let [a, b, c] = [(); 3].map(|()| DOUBLE.random(&mut r, &specials));
        let [x, y, z] = [a, b, c].map(f64::from_bits);
        let (rm, f) = (Rounding::Rne, &mut 0);
        assert!(same(float::f64_add(a, b, rm, f), x + y), "{a:#x} + {b:#x}");
        assert!(same(float::f64_mul(a, b, rm, f), x * y), "{a:#x} * {b:#x}");
        assert!(same(float::f64_div(a, b, rm, f), x / y), "{a:#x} / {b:#x}");
        assert!(same(float::f64_sqrt(a, rm, f), x.sqrt()), "sqrt {a:#x}");
        assert!(same(float::f64_fma(a, b, c, rm, f), x.mul_add(y, z)), "{a:#x} * {b:#x} + {c:#x}");
    }
}

#[test]
fn minimum_and_maximum_follow_the_order_of_the_numbers() {
    let specials = DOUBLE.specials();
    for &a in &specials {
        for &b in &specials {
            let (x, y) = (f64::from_bits(a), f64::from_bits(b));
            let expected = match (x.is_nan(), y.is_nan()) {
                (true, true) => [0x7ff8_0000_0000_0000; 2],
                (true, false) => [b, b],
                (false, true) => [a, a],
                (false, false) if x.total_cmp(&y).is_le() => [a, b],
                (false, false) => [b, a],
            };
            let is_signaling = |n: u64| f64::from_bits(n).is_nan() && n & 1 << 51 == 0;
            let signaling = is_signaling(a) || is_signaling(b);
            let mut flags = [0; 2];
            let got = [float::f64_min(a, b, &mut flags[0]), float::f64_max(a, b, &mut flags[1])];
            assert_eq!(got, expected, "{a:#x} {b:#x}");
            assert_eq!(flags, [if signaling { float::NV } else { 0 }; 2], "{a:#x} {b:#x}");
        }
    }
    let (mut flags, one, nan) = (0, 0x3f80_0000, 0x7fc0_0001);
    assert_eq!(float::f32_min(0x8000_0000, 0, &mut flags), 0x8000_0000);
    assert_eq!(float::f32_max(0x8000_0000, 0, &mut flags), 0);
    assert_eq!(float::f32_max(one, nan, &mut flags), one);
    assert_eq!(float::f32_min(nan, nan, &mut flags), 0x7fc0_0000);
    assert_eq!(flags, 0);
    assert_eq!(float::f32_min(0x7f80_0001, one, &mut flags), one);
    assert_eq!(flags, float::NV);
}

#[test]
fn classes_are_those_of_the_manual() {
    let doubles: [u64; 10] = [
        0xfff0_0000_0000_0000,
        0xbff0_0000_0000_0000,
        0x8000_0000_0000_0001,
        0x8000_0000_0000_0000,
        0,
        0x000f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0x7ff0_0000_0000_0001,
        0xfff8_0000_0000_0000,
    ];
    let singles: [u32; 10] = [
        0xff80_0000,
        0x8080_0000,
        0x807f_ffff,
        0x8000_0000,
        0,
        1,
        0x7f7f_ffff,
        0x7f80_0000,
        0xff80_0001,
        0x7fc0_0000,
    ];
    for i in 0..10 {
        assert_eq!(float::f64_class(doubles[i]), 1 << i);
        assert_eq!(float::f32_class(singles[i]), 1 << i);
    }
}

#[test]
fn flags_are_accumulated() {
    let mut flags = float::DZ;
    let one_third =
        float::f64_div(0x3ff0_0000_0000_0000, 0x4008_0000_0000_0000, Rounding::Rne, &mut flags);
    assert_eq!((one_third, flags), (0x3fd5_5555_5555_5555, float::DZ | float::NX));
}

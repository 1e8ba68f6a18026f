//! Zfa against the host's functions of the same meaning.

use isa::float::{self, NV, NX, Rounding};

use super::{DOUBLE, MODES, Random, SINGLE};

const CASES: u32 = 100_000;

fn is_signaling(bits: u64) -> bool {
    f64::from_bits(bits).is_nan() && bits & 1 << 51 == 0
}

fn rounded(x: f64, rm: Rounding) -> f64 {
    match rm {
        Rounding::Rne => x.round_ties_even(),
        Rounding::Rtz => x.trunc(),
        Rounding::Rdn => x.floor(),
        Rounding::Rup => x.ceil(),
        Rounding::Rmm => x.round(),
    }
}

#[test]
fn rounding_to_integers_agrees_with_the_host() {
    let (mut r, doubles, singles) = (Random(11), DOUBLE.specials(), SINGLE.specials());
    for _ in 0..CASES {
        let (a, b) = (DOUBLE.random(&mut r, &doubles), SINGLE.random(&mut r, &singles) as u32);
        let (x, y) = (f64::from_bits(a), f64::from(f32::from_bits(b)));
        for rm in MODES {
            let (mut flags, mut exact_flags) = (0, 0);
            let got = float::f64_round(a, rm, &mut flags);
            assert_eq!(float::f64_roundnx(a, rm, &mut exact_flags), got);
            let invalid = if is_signaling(a) { NV } else { 0 };
            if x.is_nan() {
                assert_eq!((got, flags, exact_flags), (0x7ff8 << 48, invalid, invalid), "{a:#x}");
            } else {
                let expected = rounded(x, rm);
                let inexact = if expected == x { 0 } else { NX };
                let expected = (expected.to_bits(), 0, inexact);
                assert_eq!((got, flags, exact_flags), expected, "{a:#x} {rm:?}");
            }
            let single = float::f32_roundnx(b, rm, &mut 0);
            assert_eq!(float::f32_round(b, rm, &mut 0), single);
            let expected =
                if y.is_nan() { f32::from_bits(0x7fc0_0000) } else { rounded(y, rm) as f32 };
            assert_eq!(single, expected.to_bits(), "{b:#x} {rm:?}");
        }
    }
}

#[test]
fn modular_conversion_keeps_the_low_bits_and_the_flags_of_the_saturating_one() {
    let (mut r, specials) = (Random(12), DOUBLE.specials());
    for i in 0..CASES {
        let a = match i % 2 {
            0 => DOUBLE.random(&mut r, &specials),
            _ => DOUBLE.make(r.next(), 1023 + r.below(100), r.runs()),
        };
        let x = f64::from_bits(a);
        let (mut flags, mut expected_flags) = (0, 0);
        let saturated = float::f64_to_i32(a, Rounding::Rtz, &mut expected_flags);
        // From 2^85 on the low 32 bits are zero.
        let expected = if x.abs() < 1e30 { x as i128 as i32 } else { 0 };
        let got = float::f64_to_i32_modular(a, &mut flags);
        assert_eq!((got, flags), (i64::from(expected) as u64, expected_flags), "{a:#x}");
        assert!(flags & NV != 0 || got == saturated, "{a:#x}");
    }
}

#[test]
fn minimum_and_maximum_are_nan_where_an_operand_is() {
    let specials = DOUBLE.specials();
    for &a in &specials {
        for &b in &specials {
            let is_nan = [a, b].iter().any(|&n| f64::from_bits(n).is_nan());
            let expected = if is_nan {
                [0x7ff8 << 48; 2]
            } else {
                [float::f64_min(a, b, &mut 0), float::f64_max(a, b, &mut 0)]
            };
            let mut flags = [0; 2];
            let got = [float::f64_minm(a, b, &mut flags[0]), float::f64_maxm(a, b, &mut flags[1])];
            let invalid = if is_signaling(a) || is_signaling(b) { NV } else { 0 };
            assert_eq!((got, flags), (expected, [invalid; 2]), "{a:#x} {b:#x}");
        }
    }
}

#[test]
fn quiet_comparisons_differ_in_flags_only() {
    let specials = DOUBLE.specials();
    for &a in &specials {
        for &b in &specials {
            let mut flags = [0; 2];
            let got = [float::f64_ltq(a, b, &mut flags[0]), float::f64_leq(a, b, &mut flags[1])];
            let expected = [float::f64_lt(a, b, &mut 0), float::f64_le(a, b, &mut 0)];
            let invalid = if is_signaling(a) || is_signaling(b) { NV } else { 0 };
            assert_eq!((got, flags), (expected, [invalid; 2]), "{a:#x} {b:#x}");
        }
    }
}

#[test]
fn constants_are_those_of_the_manual() {
    let values = [
        65536f64.recip(),
        32768f64.recip(),
        256f64.recip(),
        128f64.recip(),
        0.0625,
        0.125,
        0.25,
        0.3125,
        0.375,
        0.4375,
        0.5,
        0.625,
        0.75,
        0.875,
        1.0,
        1.25,
        1.5,
        1.75,
        2.0,
        2.5,
        3.0,
        4.0,
        8.0,
        16.0,
        128.0,
        256.0,
        32768.0,
        65536.0,
        f64::INFINITY,
    ];
    for (number, value) in (2..).zip(values) {
        assert_eq!(float::f64_constant(number), value.to_bits(), "{number}");
        assert_eq!(float::f32_constant(number), (value as f32).to_bits(), "{number}");
    }
    assert_eq!((float::f64_constant(0), float::f32_constant(0)), (0xbff0 << 48, 0xbf80_0000));
    assert_eq!(float::f64_constant(1), f64::MIN_POSITIVE.to_bits());
    assert_eq!(float::f32_constant(1), f32::MIN_POSITIVE.to_bits());
    assert_eq!((float::f64_constant(31), float::f32_constant(31)), (0x7ff8 << 48, 0x7fc0_0000));
}

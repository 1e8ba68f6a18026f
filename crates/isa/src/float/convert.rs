//! Conversions to and from integers, between the formats, and to integers in the same format.

use super::pack::{
    Format, Kind, Unpacked, infinity, propagate_nan, round_pack, rounds_up, shift_right_sticky,
    unpack, zero,
};
use super::{NV, NX, Rounding};

pub(super) fn between<From: Format, To: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let x = unpack::<From>(a);
    match x.kind {
        Kind::Zero => zero::<To>(x.sign),
        Kind::Inf => infinity::<To>(x.sign),
        Kind::Nan => {
            propagate_nan::<From>(&[a], flags);
            To::NAN
        }
        Kind::Finite => round_pack::<To>(x.sign, x.exp, x.sig, rm, flags),
    }
}

pub(super) fn from_u64<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    from_magnitude::<F>(false, a, rm, flags)
}

pub(super) fn from_i64<F: Format>(a: i64, rm: Rounding, flags: &mut u8) -> u64 {
    from_magnitude::<F>(a < 0, a.unsigned_abs(), rm, flags)
}

fn from_magnitude<F: Format>(sign: bool, magnitude: u64, rm: Rounding, flags: &mut u8) -> u64 {
    if magnitude == 0 {
        return 0;
    }
    let zeros = magnitude.leading_zeros();
    round_pack::<F>(sign, 63 - zeros as i32, magnitude << zeros, rm, flags)
}

/// The magnitude of `x`, a finite value, rounded to an integer, and whether that changed the value. None when it is
/// 2^64 or more.
fn to_magnitude(x: Unpacked, rm: Rounding) -> Option<(u64, bool)> {
    if x.exp > 63 {
        return None;
    }
    // The integer in the upper half, the fraction in the lower.
    let fixed = shift_right_sticky(u128::from(x.sig) << 64, x.exp.abs_diff(63));
    let (integer, fraction) = ((fixed >> 64) as u64, fixed as u64);
    let up = rounds_up(x.sign, integer & 1 != 0, fraction, 1 << 63, rm);
    // No carry out: where there is a fraction, the integer is below 2^63.
    Some((integer + u64::from(up), fraction != 0))
}

/// To an integer in `-negative_max ..= positive_max`, saturating. A NaN becomes the largest.
fn to_integer<F: Format>(
    a: u64,
    negative_max: u64,
    positive_max: u64,
    rm: Rounding,
    flags: &mut u8,
) -> u64 {
    let x = unpack::<F>(a);
    let limit = if x.sign && x.kind != Kind::Nan { negative_max } else { positive_max };
    let magnitude = match x.kind {
        Kind::Zero => return 0,
        Kind::Nan | Kind::Inf => None,
        Kind::Finite => to_magnitude(x, rm).filter(|&(m, _)| m <= limit),
    };
    let (value, flag) = match magnitude {
        None => (limit, NV),
        Some((m, inexact)) => (m, if inexact { NX } else { 0 }),
    };
    *flags |= flag;
    if x.sign && x.kind != Kind::Nan { value.wrapping_neg() } else { value }
}

pub(super) fn to_i32<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    to_integer::<F>(a, 1 << 31, (1 << 31) - 1, rm, flags)
}

pub(super) fn to_u32<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    i64::from(to_integer::<F>(a, 0, u64::from(u32::MAX), rm, flags) as i32) as u64
}

pub(super) fn to_i64<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    to_integer::<F>(a, 1 << 63, (1 << 63) - 1, rm, flags)
}

pub(super) fn to_u64<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    to_integer::<F>(a, 0, u64::MAX, rm, flags)
}

/// Low 32 bits of the magnitude of `x`, a finite value, without its fraction.
fn truncated_low_bits(x: Unpacked) -> u32 {
    let distance = x.exp.abs_diff(63);
    if x.exp <= 63 {
        x.sig.checked_shr(distance).unwrap_or(0) as u32
    } else {
        x.sig.checked_shl(distance).unwrap_or(0) as u32
    }
}

pub(super) fn to_i32_modular<F: Format>(a: u64, flags: &mut u8) -> u64 {
    // For the flags.
    to_i32::<F>(a, Rounding::Rtz, flags);
    let x = unpack::<F>(a);
    match x.kind {
        Kind::Zero | Kind::Nan | Kind::Inf => 0,
        Kind::Finite => {
            let low = truncated_low_bits(x) as i32;
            i64::from(if x.sign { low.wrapping_neg() } else { low }) as u64
        }
    }
}

pub(super) fn to_integral<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let mut raised = 0;
    let integer = to_integral_exact::<F>(a, rm, &mut raised);
    *flags |= raised & !NX;
    integer
}

pub(super) fn to_integral_exact<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let x = unpack::<F>(a);
    let rounded = match x.kind {
        Kind::Nan => return propagate_nan::<F>(&[a], flags),
        Kind::Zero | Kind::Inf => None,
        Kind::Finite => to_magnitude(x, rm),
    };
    match rounded {
        // Zero, infinity, or so large that it is an integer.
        None => a,
        Some((0, _)) => {
            *flags |= NX;
            zero::<F>(x.sign)
        }
        Some((magnitude, inexact)) => {
            *flags |= if inexact { NX } else { 0 };
            // Exact: a value with a fraction is below 2^52, the others are what they were.
            from_magnitude::<F>(x.sign, magnitude, rm, flags)
        }
    }
}

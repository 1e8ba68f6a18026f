//! Bit patterns to exact values and back: the one place that rounds.
//!
//! # Invariants
//! - INV-PACK-1: a finite non-zero value is `sig × 2^(exp - 63)` with bit 63 of `sig` set.
//! - INV-PACK-2: bit 0 of a significand to be rounded stands for everything below it too (a sticky bit), which is
//!   right as long as rounding cuts off two bits or more: both formats have 11 bits or more to spare.

use super::{NV, NX, OF, Rounding, UF};

/// An interchange format; bit patterns are in the low bits of a `u64`.
pub(super) trait Format {
    const EXP_BITS: u32;
    const FRAC_BITS: u32;

    const BIAS: i32 = (1 << (Self::EXP_BITS - 1)) - 1;
    const SIGN: u64 = 1 << (Self::EXP_BITS + Self::FRAC_BITS);
    const FRAC_MASK: u64 = (1 << Self::FRAC_BITS) - 1;
    const EXP_MASK: u64 = (1 << Self::EXP_BITS) - 1;
    const INF: u64 = Self::EXP_MASK << Self::FRAC_BITS;
    const QUIET: u64 = 1 << (Self::FRAC_BITS - 1);
    const NAN: u64 = Self::INF | Self::QUIET;
}

/// binary32
pub(super) struct F32;
/// binary64
pub(super) struct F64;

impl Format for F32 {
    const EXP_BITS: u32 = 8;
    const FRAC_BITS: u32 = 23;
}

impl Format for F64 {
    const EXP_BITS: u32 = 11;
    const FRAC_BITS: u32 = 52;
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    Finite,
    Inf,
    Nan,
}

/// A value taken apart; `exp` and `sig` count for [`Kind::Finite`] and are 0 otherwise.
#[derive(Clone, Copy)]
pub(super) struct Unpacked {
    pub(super) sign: bool,
    pub(super) kind: Kind,
    pub(super) exp: i32,
    pub(super) sig: u64,
}

#[inline]
pub(super) fn unpack<F: Format>(bits: u64) -> Unpacked {
    let sign = bits & F::SIGN != 0;
    let frac = bits & F::FRAC_MASK;
    let field = bits >> F::FRAC_BITS & F::EXP_MASK;
    let special = |kind| Unpacked { sign, kind, exp: 0, sig: 0 };
    if field == F::EXP_MASK {
        return special(if frac == 0 { Kind::Inf } else { Kind::Nan });
    }
    let shift = 63 - F::FRAC_BITS;
    if field != 0 {
        let sig = 1 << 63 | frac << shift;
        return Unpacked { sign, kind: Kind::Finite, exp: field as i32 - F::BIAS, sig };
    }
    if frac == 0 {
        return special(Kind::Zero);
    }
    let zeros = frac.leading_zeros();
    let exp = 1 - F::BIAS + shift as i32 - zeros as i32;
    Unpacked { sign, kind: Kind::Finite, exp, sig: frac << zeros }
}

pub(super) fn is_nan<F: Format>(bits: u64) -> bool {
    bits & !F::SIGN > F::INF
}

pub(super) fn is_signaling<F: Format>(bits: u64) -> bool {
    is_nan::<F>(bits) && bits & F::QUIET == 0
}

/// The NaN that an operation on `operands` gives, one of them being a NaN.
#[cold]
pub(super) fn propagate_nan<F: Format>(operands: &[u64], flags: &mut u8) -> u64 {
    if operands.iter().any(|&bits| is_signaling::<F>(bits)) {
        *flags |= NV;
    }
    F::NAN
}

/// The NaN that an invalid operation gives.
#[cold]
pub(super) fn invalid<F: Format>(flags: &mut u8) -> u64 {
    *flags |= NV;
    F::NAN
}

pub(super) fn zero<F: Format>(sign: bool) -> u64 {
    if sign { F::SIGN } else { 0 }
}

pub(super) fn infinity<F: Format>(sign: bool) -> u64 {
    zero::<F>(sign) | F::INF
}

/// `x >> n`, bit 0 of the result standing for the bits shifted out.
#[inline]
pub(super) fn shift_right_sticky(x: u128, n: u32) -> u128 {
    if n >= 128 {
        return u128::from(x != 0);
    }
    let out = x >> n;
    out | u128::from(out << n != x)
}

/// Whether a magnitude is rounded away from zero, which ends in `odd` and has `rest` below that, `half` being a half.
#[inline]
pub(super) fn rounds_up(sign: bool, odd: bool, rest: u64, half: u64, rm: Rounding) -> bool {
    match rm {
        Rounding::Rne => rest > half || rest == half && odd,
        Rounding::Rtz => false,
        Rounding::Rdn => sign && rest != 0,
        Rounding::Rup => !sign && rest != 0,
        Rounding::Rmm => rest >= half,
    }
}

/// `sig` without its low `cut` bits, rounded, and whether that changed the value.
#[inline]
fn round_off(sign: bool, sig: u64, cut: u32, rm: Rounding) -> (u64, bool) {
    let rest = sig & ((1 << cut) - 1);
    let kept = sig >> cut;
    let up = rounds_up(sign, kept & 1 != 0, rest, 1 << (cut - 1), rm);
    (kept + u64::from(up), rest != 0)
}

/// Rounds `±sig × 2^(exp - 63)`, bit 63 of `sig` being set, to the format.
#[inline]
pub(super) fn round_pack<F: Format>(
    sign: bool,
    exp: i32,
    sig: u64,
    rm: Rounding,
    flags: &mut u8,
) -> u64 {
    let cut = 63 - F::FRAC_BITS;
    let field = exp + F::BIAS;
    if field < 1 {
        return round_subnormal::<F>(sign, field, sig, rm, flags);
    }
    // A carry out of the significand goes into the exponent field, and leaves the right fraction, 0.
    let (rounded, inexact) = round_off(sign, sig, cut, rm);
    let carried = rounded >> (F::FRAC_BITS + 1) != 0;
    if field + i32::from(carried) >= F::EXP_MASK as i32 {
        return overflow::<F>(sign, rm, flags);
    }
    *flags |= if inexact { NX } else { 0 };
    zero::<F>(sign) | (((field as u64 - 1) << F::FRAC_BITS) + rounded)
}

/// [`round_pack`] of a value below the smallest normal number before rounding.
#[cold]
fn round_subnormal<F: Format>(
    sign: bool,
    field: i32,
    sig: u64,
    rm: Rounding,
    flags: &mut u8,
) -> u64 {
    let cut = 63 - F::FRAC_BITS;
    // Tiny after rounding: unless rounding with an unbounded exponent reaches the smallest normal number.
    let (unbounded, _) = round_off(sign, sig, cut, rm);
    let tiny = field < 0 || unbounded >> (F::FRAC_BITS + 1) == 0;
    let down = field.abs_diff(1);
    let shifted = shift_right_sticky(u128::from(sig), down) as u64;
    let (rounded, inexact) = round_off(sign, shifted, cut, rm);
    if inexact {
        *flags |= if tiny { UF | NX } else { NX };
    }
    zero::<F>(sign) | rounded
}

#[cold]
fn overflow<F: Format>(sign: bool, rm: Rounding, flags: &mut u8) -> u64 {
    *flags |= OF | NX;
    let to_infinity = match rm {
        Rounding::Rne | Rounding::Rmm => true,
        Rounding::Rtz => false,
        Rounding::Rdn => sign,
        Rounding::Rup => !sign,
    };
    infinity::<F>(sign) - u64::from(!to_infinity)
}

/// Rounds `±sig × 2^(exp - 127)`, `sig` being any but 0, to the format.
#[inline]
pub(super) fn round_pack_wide<F: Format>(
    sign: bool,
    exp: i32,
    sig: u128,
    rm: Rounding,
    flags: &mut u8,
) -> u64 {
    let zeros = sig.leading_zeros();
    let sig = sig << zeros;
    let high = (sig >> 64) as u64 | u64::from(sig as u64 != 0);
    round_pack::<F>(sign, exp - zeros as i32, high, rm, flags)
}

//! Comparisons, minimum, maximum and classification.

use super::NV;
use super::pack::{Format, Kind, is_nan, is_signaling, unpack};

/// A key in the order of the numbers, -0 being just below +0.
fn key<F: Format>(bits: u64) -> i64 {
    let magnitude = (bits & !F::SIGN) as i64;
    if bits & F::SIGN != 0 { !magnitude } else { magnitude }
}

fn both_zero<F: Format>(a: u64, b: u64) -> bool {
    (a | b) & !F::SIGN == 0
}

fn unordered<F: Format>(a: u64, b: u64) -> bool {
    is_nan::<F>(a) || is_nan::<F>(b)
}

fn raise_if_signaling<F: Format>(a: u64, b: u64, flags: &mut u8) {
    if is_signaling::<F>(a) || is_signaling::<F>(b) {
        *flags |= NV;
    }
}

pub(super) fn eq<F: Format>(a: u64, b: u64, flags: &mut u8) -> bool {
    raise_if_signaling::<F>(a, b, flags);
    !unordered::<F>(a, b) && (a == b || both_zero::<F>(a, b))
}

pub(super) fn lt<F: Format>(a: u64, b: u64, flags: &mut u8) -> bool {
    if unordered::<F>(a, b) {
        *flags |= NV;
        return false;
    }
    key::<F>(a) < key::<F>(b) && !both_zero::<F>(a, b)
}

pub(super) fn le<F: Format>(a: u64, b: u64, flags: &mut u8) -> bool {
    if unordered::<F>(a, b) {
        *flags |= NV;
        return false;
    }
    key::<F>(a) <= key::<F>(b) || both_zero::<F>(a, b)
}

/// As [`lt`], but a quiet NaN is not invalid.
pub(super) fn ltq<F: Format>(a: u64, b: u64, flags: &mut u8) -> bool {
    raise_if_signaling::<F>(a, b, flags);
    !unordered::<F>(a, b) && lt::<F>(a, b, flags)
}

/// As [`le`], but a quiet NaN is not invalid.
pub(super) fn leq<F: Format>(a: u64, b: u64, flags: &mut u8) -> bool {
    raise_if_signaling::<F>(a, b, flags);
    !unordered::<F>(a, b) && le::<F>(a, b, flags)
}

pub(super) fn min<F: Format>(a: u64, b: u64, flags: &mut u8) -> u64 {
    select::<F>(a, b, key::<F>(a) <= key::<F>(b), flags)
}

pub(super) fn max<F: Format>(a: u64, b: u64, flags: &mut u8) -> u64 {
    select::<F>(a, b, key::<F>(a) >= key::<F>(b), flags)
}

/// As [`min`], but NaN if an operand is one.
pub(super) fn minm<F: Format>(a: u64, b: u64, flags: &mut u8) -> u64 {
    let least = min::<F>(a, b, flags);
    if unordered::<F>(a, b) { F::NAN } else { least }
}

/// As [`max`], but NaN if an operand is one.
pub(super) fn maxm<F: Format>(a: u64, b: u64, flags: &mut u8) -> u64 {
    let greatest = max::<F>(a, b, flags);
    if unordered::<F>(a, b) { F::NAN } else { greatest }
}

fn select<F: Format>(a: u64, b: u64, first: bool, flags: &mut u8) -> u64 {
    raise_if_signaling::<F>(a, b, flags);
    match (is_nan::<F>(a), is_nan::<F>(b)) {
        (true, true) => F::NAN,
        (true, false) => b,
        (false, true) => a,
        (false, false) => {
            if first {
                a
            } else {
                b
            }
        }
    }
}

pub(super) fn class<F: Format>(a: u64) -> u64 {
    let x = unpack::<F>(a);
    let subnormal = x.exp < 1 - F::BIAS;
    1 << match (x.kind, x.sign) {
        (Kind::Inf, true) => 0,
        (Kind::Finite, true) if !subnormal => 1,
        (Kind::Finite, true) => 2,
        (Kind::Zero, true) => 3,
        (Kind::Zero, false) => 4,
        (Kind::Finite, false) if subnormal => 5,
        (Kind::Finite, false) => 6,
        (Kind::Inf, false) => 7,
        (Kind::Nan, _) if is_signaling::<F>(a) => 8,
        (Kind::Nan, _) => 9,
    }
}

//! Addition, multiplication, division, square root and fused multiply-add.

use super::pack::{
    Format, Kind, Unpacked, infinity, invalid, propagate_nan, round_pack, round_pack_wide,
    shift_right_sticky, unpack, zero,
};
use super::{DZ, Rounding};

/// An exact finite value, `±sig × 2^(exp - 127)`, `sig` below 2^126; `sig` 0 is a zero.
#[derive(Clone, Copy)]
struct Wide {
    sign: bool,
    exp: i32,
    sig: u128,
}

impl Wide {
    fn new(x: Unpacked) -> Self {
        Self { sign: x.sign, exp: x.exp + 2, sig: u128::from(x.sig) << 62 }
    }

    /// `a × b`. Nothing is shifted out: the operands' significands have 11 low zero bits or more each.
    fn product(a: Unpacked, b: Unpacked) -> Self {
        let sig = (u128::from(a.sig) * u128::from(b.sig)) >> 2;
        Self { sign: a.sign != b.sign, exp: a.exp + b.exp + 3, sig }
    }
}

/// The rounded sum. Where alignment loses bits the exponents differ by so much that at most two leading bits can
/// cancel, so a sticky bit at the far end is enough.
#[inline]
fn add_wide<F: Format>(a: Wide, b: Wide, rm: Rounding, flags: &mut u8) -> u64 {
    if a.sig == 0 || b.sig == 0 {
        let x = if a.sig == 0 { b } else { a };
        if x.sig != 0 {
            return round_pack_wide::<F>(x.sign, x.exp, x.sig, rm, flags);
        }
        return zero::<F>(if a.sign == b.sign { a.sign } else { rm == Rounding::Rdn });
    }
    let (hi, lo) = if a.exp >= b.exp { (a, b) } else { (b, a) };
    let lo_sig = shift_right_sticky(lo.sig, hi.exp.abs_diff(lo.exp));
    if hi.sign == lo.sign {
        return round_pack_wide::<F>(hi.sign, hi.exp, hi.sig + lo_sig, rm, flags);
    }
    let sign = if hi.sig >= lo_sig { hi.sign } else { lo.sign };
    match hi.sig.abs_diff(lo_sig) {
        0 => zero::<F>(rm == Rounding::Rdn),
        sig => round_pack_wide::<F>(sign, hi.exp, sig, rm, flags),
    }
}

#[inline]
pub(super) fn add<F: Format>(a: u64, b: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let (x, y) = (unpack::<F>(a), unpack::<F>(b));
    match (x.kind, y.kind) {
        (Kind::Nan, _) | (_, Kind::Nan) => propagate_nan::<F>(&[a, b], flags),
        (Kind::Inf, Kind::Inf) if x.sign != y.sign => invalid::<F>(flags),
        (Kind::Inf, _) => a,
        (_, Kind::Inf) => b,
        _ => add_wide::<F>(Wide::new(x), Wide::new(y), rm, flags),
    }
}

pub(super) fn sub<F: Format>(a: u64, b: u64, rm: Rounding, flags: &mut u8) -> u64 {
    // The sign of a NaN does not matter: a NaN result is canonical.
    add::<F>(a, b ^ F::SIGN, rm, flags)
}

pub(super) fn mul<F: Format>(a: u64, b: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let (x, y) = (unpack::<F>(a), unpack::<F>(b));
    let sign = x.sign != y.sign;
    match (x.kind, y.kind) {
        (Kind::Finite, Kind::Finite) => {
            let sig = u128::from(x.sig) * u128::from(y.sig);
            round_pack_wide::<F>(sign, x.exp + y.exp + 1, sig, rm, flags)
        }
        (Kind::Nan, _) | (_, Kind::Nan) => propagate_nan::<F>(&[a, b], flags),
        (Kind::Inf, Kind::Zero) | (Kind::Zero, Kind::Inf) => invalid::<F>(flags),
        (Kind::Inf, _) | (_, Kind::Inf) => infinity::<F>(sign),
        (Kind::Zero, _) | (_, Kind::Zero) => zero::<F>(sign),
    }
}

pub(super) fn div<F: Format>(a: u64, b: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let (x, y) = (unpack::<F>(a), unpack::<F>(b));
    let sign = x.sign != y.sign;
    match (x.kind, y.kind) {
        (Kind::Finite, Kind::Finite) => {
            let (n, d) = (u128::from(x.sig) << 63, u128::from(y.sig));
            let quotient = n / d;
            let sig = quotient | u128::from(quotient * d != n);
            round_pack_wide::<F>(sign, x.exp - y.exp + 64, sig, rm, flags)
        }
        (Kind::Nan, _) | (_, Kind::Nan) => propagate_nan::<F>(&[a, b], flags),
        (Kind::Inf, Kind::Inf) | (Kind::Zero, Kind::Zero) => invalid::<F>(flags),
        (Kind::Inf, _) => infinity::<F>(sign),
        (Kind::Zero, _) | (_, Kind::Inf) => zero::<F>(sign),
        (_, Kind::Zero) => {
            *flags |= DZ;
            infinity::<F>(sign)
        }
    }
}

pub(super) fn sqrt<F: Format>(a: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let x = unpack::<F>(a);
    match x.kind {
        Kind::Nan => propagate_nan::<F>(&[a], flags),
        Kind::Zero => a,
        _ if x.sign => invalid::<F>(flags),
        Kind::Inf => a,
        Kind::Finite => {
            // n × 2^(even exponent), n at least 2^126, so that the root has 64 bits.
            let (n, even) = match x.exp & 1 {
                0 => (u128::from(x.sig) << 63, x.exp - 126),
                _ => (u128::from(x.sig) << 64, x.exp - 127),
            };
            let root = n.isqrt();
            let sig = root as u64 | u64::from(root * root != n);
            round_pack::<F>(false, even / 2 + 63, sig, rm, flags)
        }
    }
}

pub(super) fn fma<F: Format>(a: u64, b: u64, c: u64, rm: Rounding, flags: &mut u8) -> u64 {
    let (x, y, z) = (unpack::<F>(a), unpack::<F>(b), unpack::<F>(c));
    match (x.kind, y.kind) {
        // Invalid even if c is a quiet NaN.
        (Kind::Inf, Kind::Zero) | (Kind::Zero, Kind::Inf) => return invalid::<F>(flags),
        (Kind::Nan, _) | (_, Kind::Nan) => return propagate_nan::<F>(&[a, b, c], flags),
        _ if z.kind == Kind::Nan => return propagate_nan::<F>(&[a, b, c], flags),
        (Kind::Inf, _) | (_, Kind::Inf) => {
            let sign = x.sign != y.sign;
            let opposite = z.kind == Kind::Inf && z.sign != sign;
            return if opposite { invalid::<F>(flags) } else { infinity::<F>(sign) };
        }
        _ if z.kind == Kind::Inf => return c,
        _ => {}
    }
    add_wide::<F>(Wide::product(x, y), Wide::new(z), rm, flags)
}

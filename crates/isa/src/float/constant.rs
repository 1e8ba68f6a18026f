//! The constants that `fli` loads, by their number.

use super::pack::{Format, infinity, zero};

/// Numbers of the constants that are not `1.ff × 2^exp`.
const MINUS_ONE: u8 = 0;
const SMALLEST_NORMAL: u8 = 1;
const INFINITY: u8 = 30;
const NAN: u8 = 31;

/// Exponent and first two bits of the fraction of constants 2 to 29.
const VALUES: [(i32, u8); 28] = [
    (-16, 0),
    (-15, 0),
    (-8, 0),
    (-7, 0),
    (-4, 0),
    (-3, 0),
    (-2, 0),
    (-2, 1),
    (-2, 2),
    (-2, 3),
    (-1, 0),
    (-1, 1),
    (-1, 2),
    (-1, 3),
    (0, 0),
    (0, 1),
    (0, 2),
    (0, 3),
    (1, 0),
    (1, 1),
    (1, 2),
    (2, 0),
    (3, 0),
    (4, 0),
    (7, 0),
    (8, 0),
    (15, 0),
    (16, 0),
];

fn finite(number: u8) -> (i32, u8) {
    VALUES[usize::from(number.clamp(2, 29) - 2)]
}

/// The constant's bits; of `number` five bits count.
pub(super) fn bits<F: Format>(number: u8) -> u64 {
    let number = number & 31;
    let (exp, quarters) = match number {
        MINUS_ONE => (0, 0),
        SMALLEST_NORMAL => (1 - F::BIAS, 0),
        INFINITY => return infinity::<F>(false),
        NAN => return F::NAN,
        _ => finite(number),
    };
    let fields =
        ((exp + F::BIAS) as u64) << F::FRAC_BITS | u64::from(quarters) << (F::FRAC_BITS - 2);
    zero::<F>(number == MINUS_ONE) | fields
}

/// The constant as disassemblers write it: in hexadecimal, or by name.
pub(crate) fn text(number: u8) -> String {
    match number & 31 {
        MINUS_ONE => "-0x1p+0".to_owned(),
        SMALLEST_NORMAL => "min".to_owned(),
        INFINITY => "inf".to_owned(),
        NAN => "nan".to_owned(),
        number => {
            let (exp, quarters) = finite(number);
            format!("0x1{}p{exp:+}", ["", ".4", ".8", ".c"][usize::from(quarters)])
        }
    }
}

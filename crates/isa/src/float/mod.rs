//! Exact IEEE 754 binary32 and binary64 arithmetic with RISC-V's choices, on bit patterns, in integers.
//!
//! # Place
//! The engines call these functions with NaN-unboxed operands; rounding modes reach them already resolved. Flags are
//! accumulated: a call sets bits of `flags` (the layout of `fflags`) and clears none.
//!
//! # Invariants
//! - INV-FLOAT-1: results and flags are what the standard demands, in all five rounding modes; the test against
//!   Berkeley SoftFloat guards it.
//! - INV-FLOAT-2: a NaN result is the canonical NaN, whatever the operands.
//! - INV-FLOAT-3: tininess is detected after rounding; underflow is raised only with inexact.
//! - INV-FLOAT-4: no host floating point.
//!
//! # References
//! IEEE 754-2019; the RISC-V Instruction Set Manual, volume I, chapters "F" and "D", version 2.2.

mod arith;
mod compare;
pub(crate) mod constant;
mod convert;
mod pack;

/// Flag: invalid operation.
pub const NV: u8 = 16;
/// Flag: division by zero.
pub const DZ: u8 = 8;
/// Flag: overflow.
pub const OF: u8 = 4;
/// Flag: underflow.
pub const UF: u8 = 2;
/// Flag: inexact.
pub const NX: u8 = 1;

/// Rounding mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even.
    Rne,
    /// Towards zero.
    Rtz,
    /// Down, towards minus infinity.
    Rdn,
    /// Up, towards plus infinity.
    Rup,
    /// To nearest, ties to the larger magnitude.
    Rmm,
}

impl Rounding {
    /// The mode with this number in `frm` or an instruction's rm field; none for 5, 6 (reserved) and 7 (dynamic).
    #[must_use]
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Rne,
            1 => Self::Rtz,
            2 => Self::Rdn,
            3 => Self::Rup,
            4 => Self::Rmm,
            _ => return None,
        })
    }
}

use pack::{F32, F64};

macro_rules! functions {
    ($doc:literal $body:path, ($($arg:ident: $ty:ty),*) -> $ret:ty: $name:ident) => {
        #[doc = $doc]
        #[must_use]
        pub fn $name($($arg: $ty,)* flags: &mut u8) -> $ret {
            $body($($arg.into(),)* flags) as $ret
        }
    };
}

/// The functions of one format; the generic ones work on `u64` whatever the format.
macro_rules! format_functions {
    ($f:ident $bits:ty; $add:ident $sub:ident $mul:ident $div:ident $sqrt:ident $fma:ident
     $min:ident $max:ident $minm:ident $maxm:ident
     $eq:ident $lt:ident $le:ident $ltq:ident $leq:ident $class:ident
     $round:ident $roundnx:ident $constant:ident
     $to_i32:ident $to_u32:ident $to_i64:ident $to_u64:ident
     $from_i32:ident $from_u32:ident $from_i64:ident $from_u64:ident) => {
        functions!("a + b" arith::add::<$f>, (a: $bits, b: $bits, rm: Rounding) -> $bits: $add);
        functions!("a - b" arith::sub::<$f>, (a: $bits, b: $bits, rm: Rounding) -> $bits: $sub);
        functions!("a × b" arith::mul::<$f>, (a: $bits, b: $bits, rm: Rounding) -> $bits: $mul);
        functions!("a ÷ b" arith::div::<$f>, (a: $bits, b: $bits, rm: Rounding) -> $bits: $div);
        functions!("√a" arith::sqrt::<$f>, (a: $bits, rm: Rounding) -> $bits: $sqrt);
        functions!("a × b + c, rounded once"
            arith::fma::<$f>, (a: $bits, b: $bits, c: $bits, rm: Rounding) -> $bits: $fma);
        functions!("minimumNumber: the operand that is no NaN, if one is; -0 is less than +0"
            compare::min::<$f>, (a: $bits, b: $bits) -> $bits: $min);
        functions!("maximumNumber: the operand that is no NaN, if one is; -0 is less than +0"
            compare::max::<$f>, (a: $bits, b: $bits) -> $bits: $max);
        functions!("minimum: NaN if an operand is one; -0 is less than +0"
            compare::minm::<$f>, (a: $bits, b: $bits) -> $bits: $minm);
        functions!("maximum: NaN if an operand is one; -0 is less than +0"
            compare::maxm::<$f>, (a: $bits, b: $bits) -> $bits: $maxm);
        functions!("a = b; quiet: only a signaling NaN is invalid"
            compare::eq::<$f>, (a: $bits, b: $bits) -> bool: $eq);
        functions!("a < b; signaling: any NaN is invalid"
            compare::lt::<$f>, (a: $bits, b: $bits) -> bool: $lt);
        functions!("a ≤ b; signaling: any NaN is invalid"
            compare::le::<$f>, (a: $bits, b: $bits) -> bool: $le);
        functions!("a < b; quiet: only a signaling NaN is invalid"
            compare::ltq::<$f>, (a: $bits, b: $bits) -> bool: $ltq);
        functions!("a ≤ b; quiet: only a signaling NaN is invalid"
            compare::leq::<$f>, (a: $bits, b: $bits) -> bool: $leq);
        functions!("To an integer in the same format; never inexact"
            convert::to_integral::<$f>, (a: $bits, rm: Rounding) -> $bits: $round);
        functions!("To an integer in the same format; inexact if that changes the value"
            convert::to_integral_exact::<$f>, (a: $bits, rm: Rounding) -> $bits: $roundnx);

        /// The constant with this number, five bits of which count, that `fli` loads.
        #[must_use]
        pub fn $constant(number: u8) -> $bits {
            constant::bits::<$f>(number) as $bits
        }

        /// The bit mask that `fclass` gives.
        #[must_use]
        pub fn $class(a: $bits) -> u64 {
            compare::class::<$f>(a.into())
        }

        functions!("To a signed 32-bit integer, saturating; sign-extended to 64 bits"
            convert::to_i32::<$f>, (a: $bits, rm: Rounding) -> u64: $to_i32);
        functions!("To an unsigned 32-bit integer, saturating; bit 31 extended to 64 bits"
            convert::to_u32::<$f>, (a: $bits, rm: Rounding) -> u64: $to_u32);
        functions!("To a signed 64-bit integer, saturating"
            convert::to_i64::<$f>, (a: $bits, rm: Rounding) -> u64: $to_i64);
        functions!("To an unsigned 64-bit integer, saturating"
            convert::to_u64::<$f>, (a: $bits, rm: Rounding) -> u64: $to_u64);
        functions!("From a signed 32-bit integer"
            convert::from_i64::<$f>, (a: i32, rm: Rounding) -> $bits: $from_i32);
        functions!("From an unsigned 32-bit integer"
            convert::from_u64::<$f>, (a: u32, rm: Rounding) -> $bits: $from_u32);
        functions!("From a signed 64-bit integer"
            convert::from_i64::<$f>, (a: i64, rm: Rounding) -> $bits: $from_i64);
        functions!("From an unsigned 64-bit integer"
            convert::from_u64::<$f>, (a: u64, rm: Rounding) -> $bits: $from_u64);
    };
}

format_functions!(F32 u32; f32_add f32_sub f32_mul f32_div f32_sqrt f32_fma
    f32_min f32_max f32_minm f32_maxm f32_eq f32_lt f32_le f32_ltq f32_leq f32_class
    f32_round f32_roundnx f32_constant
    f32_to_i32 f32_to_u32 f32_to_i64 f32_to_u64 f32_from_i32 f32_from_u32 f32_from_i64 f32_from_u64);
format_functions!(F64 u64; f64_add f64_sub f64_mul f64_div f64_sqrt f64_fma
    f64_min f64_max f64_minm f64_maxm f64_eq f64_lt f64_le f64_ltq f64_leq f64_class
    f64_round f64_roundnx f64_constant
    f64_to_i32 f64_to_u32 f64_to_i64 f64_to_u64 f64_from_i32 f64_from_u32 f64_from_i64 f64_from_u64);

/// To the wider format: exact, so that there is no rounding mode.
#[must_use]
pub fn f32_to_f64(a: u32, flags: &mut u8) -> u64 {
    convert::between::<F32, F64>(a.into(), Rounding::Rne, flags)
}

/// To the narrower format.
#[must_use]
pub fn f64_to_f32(a: u64, rm: Rounding, flags: &mut u8) -> u32 {
    convert::between::<F64, F32>(a, rm, flags) as u32
}

/// To a signed 32-bit integer towards zero, modulo 2^32 instead of saturating, sign-extended; 0 for infinities and NaN. The
/// flags are those of [`f64_to_i32`].
#[must_use]
pub fn f64_to_i32_modular(a: u64, flags: &mut u8) -> u64 {
    convert::to_i32_modular::<F64>(a, flags)
}

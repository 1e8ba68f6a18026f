//! The same operations done by Berkeley SoftFloat.

use isa::float::Rounding;
use softfloat_wrapper::{ExceptionFlags, F32, F64, Float, RoundingMode};

use super::Operation::{self, *};

/// Panics unless SoftFloat's result and flags are `ours`.
pub(super) fn compare(
    is_single: bool,
    op: Operation,
    rm: Rounding,
    operands: [u64; 3],
    ours: (u64, u8),
) {
    let mode = match rm {
        Rounding::Rne => RoundingMode::TiesToEven,
        Rounding::Rtz => RoundingMode::TowardZero,
        Rounding::Rdn => RoundingMode::TowardNegative,
        Rounding::Rup => RoundingMode::TowardPositive,
        Rounding::Rmm => RoundingMode::TiesToAway,
    };
    let mut flags = ExceptionFlags::default();
    flags.set();
    let result =
        if is_single { theirs_f32(op, mode, operands) } else { theirs_f64(op, mode, operands) };
    flags.get();
    let theirs = (result, flags.to_bits());
    let format = if is_single { "binary32" } else { "binary64" };
    assert!(
        ours == theirs,
        "{format} {op:?} {rm:?} {operands:#x?}: {ours:#x?}, expected {theirs:#x?}"
    );
}

fn sign_extend(x: i32) -> u64 {
    i64::from(x) as u64
}

fn theirs_f32(op: Operation, mode: RoundingMode, [a, b, c]: [u64; 3]) -> u64 {
    let [x, y, z] = [a, b, c].map(|bits| F32::from_bits(bits as u32));
    match op {
        Add => x.add(y, mode).to_bits().into(),
        Sub => x.sub(y, mode).to_bits().into(),
        Mul => x.mul(y, mode).to_bits().into(),
        Div => x.div(y, mode).to_bits().into(),
        Sqrt => x.sqrt(mode).to_bits().into(),
        Fma => x.fused_mul_add(y, z, mode).to_bits().into(),
        Eq => x.eq(y).into(),
        Lt => x.lt(y).into(),
        Le => x.le(y).into(),
        ToI32 => sign_extend(x.to_i32(mode, true)),
        ToU32 => sign_extend(x.to_u32(mode, true) as i32),
        ToI64 => x.to_i64(mode, true) as u64,
        ToU64 => x.to_u64(mode, true),
        FromI32 => F32::from_i32(a as i32, mode).to_bits().into(),
        FromU32 => F32::from_u32(a as u32, mode).to_bits().into(),
        FromI64 => F32::from_i64(a as i64, mode).to_bits().into(),
        FromU64 => F32::from_u64(a, mode).to_bits().into(),
        Convert => x.to_f64(mode).to_bits(),
    }
}

fn theirs_f64(op: Operation, mode: RoundingMode, [a, b, c]: [u64; 3]) -> u64 {
    let [x, y, z] = [a, b, c].map(F64::from_bits);
    match op {
        Add => x.add(y, mode).to_bits(),
        Sub => x.sub(y, mode).to_bits(),
        Mul => x.mul(y, mode).to_bits(),
        Div => x.div(y, mode).to_bits(),
        Sqrt => x.sqrt(mode).to_bits(),
        Fma => x.fused_mul_add(y, z, mode).to_bits(),
        Eq => x.eq(y).into(),
        Lt => x.lt(y).into(),
        Le => x.le(y).into(),
        ToI32 => sign_extend(x.to_i32(mode, true)),
        ToU32 => sign_extend(x.to_u32(mode, true) as i32),
        ToI64 => x.to_i64(mode, true) as u64,
        ToU64 => x.to_u64(mode, true),
        FromI32 => F64::from_i32(a as i32, mode).to_bits(),
        FromU32 => F64::from_u32(a as u32, mode).to_bits(),
        FromI64 => F64::from_i64(a as i64, mode).to_bits(),
        FromU64 => F64::from_u64(a, mode).to_bits(),
        Convert => x.to_f32(mode).to_bits().into(),
    }
}

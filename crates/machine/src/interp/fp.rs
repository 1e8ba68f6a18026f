//! The F, D and Zfa extensions, on the exact soft float of [`isa::float`].

use isa::float::{self, Rounding};
use isa::{Insn, Op};

use crate::hart::Trap;

use super::mem::Stored;
use super::run::{Core, Next};

const BOX: u64 = 0xffff_ffff_0000_0000;
const NAN32: u32 = 0x7fc0_0000;

/// Sign bits.
const S32: u32 = 1 << 31;
const S64: u64 = 1 << 63;

fn unbox(v: u64) -> u32 {
    if v & BOX == BOX { v as u32 } else { NAN32 }
}

/// Where a result goes.
enum Dest {
    Double(u64),
    Single(u32),
    Integer(u64),
}

impl Core<'_, '_> {
    pub(super) fn floating_point(&mut self, insn: Insn) -> Result<Next, Trap> {
        if !self.hart.fp_enabled() {
            return Err(self.illegal());
        }
        match insn.op {
            Op::Flw | Op::Fld => return self.float_load(insn),
            Op::Fsw | Op::Fsd => return self.float_store(insn),
            _ => {}
        }
        let rounding = if has_rounding(insn.op) {
            let rm = if insn.rm == 7 { (self.hart.csr.fcsr >> 5 & 7) as u8 } else { insn.rm };
            match Rounding::from_bits(rm) {
                Some(r) => r,
                None => return Err(self.illegal()),
            }
        } else {
            Rounding::Rne
        };
        let mut flags = 0;
        let dest = if insn.op >= Op::Fld {
            self.double(insn, rounding, &mut flags)
        } else {
            self.single(insn, rounding, &mut flags)
        };
        match dest {
            Dest::Double(v) => self.set_f(insn.rd, v),
            Dest::Single(v) => self.set_f(insn.rd, BOX | u64::from(v)),
            Dest::Integer(v) => self.hart.x[usize::from(insn.rd & 63)] = v,
        }
        if flags != 0 {
            self.hart.csr.fcsr |= u64::from(flags);
            self.hart.set_fp_dirty();
        }
        Ok(Next::Plain)
    }

    fn set_f(&mut self, r: u8, v: u64) {
        self.hart.f[usize::from(r & 31)] = v;
        self.hart.set_fp_dirty();
    }

    fn float_load(&mut self, insn: Insn) -> Result<Next, Trap> {
        let va = self.hart.x[usize::from(insn.rs1 & 31)].wrapping_add(insn.imm as u64);
        let (v, device) =
            if insn.op == Op::Fld { self.load_slow(va, 8)? } else { self.load_slow(va, 4)? };
        self.set_f(insn.rd, if insn.op == Op::Fld { v } else { BOX | v });
        Ok(if device { Next::Attention } else { Next::Plain })
    }

    fn float_store(&mut self, insn: Insn) -> Result<Next, Trap> {
        let va = self.hart.x[usize::from(insn.rs1 & 31)].wrapping_add(insn.imm as u64);
        let v = self.hart.f[usize::from(insn.rs2 & 31)];
        Ok(match self.store_slow(va, if insn.op == Op::Fsd { 8 } else { 4 }, v)? {
            Stored::Plain => Next::Plain,
            Stored::Refetch => Next::Refetch,
            Stored::Attention => Next::Attention,
        })
    }

    fn single(&self, insn: Insn, rm: Rounding, fl: &mut u8) -> Dest {
        let f = |r: u8| unbox(self.hart.f[usize::from(r & 31)]);
        let (a, b, c) = (f(insn.rs1), f(insn.rs2), f(insn.rs3));
        let x = self.hart.x[usize::from(insn.rs1 & 31)];
        Dest::Single(match insn.op {
            Op::FmaddS => float::f32_fma(a, b, c, rm, fl),
            Op::FmsubS => float::f32_fma(a, b, c ^ S32, rm, fl),
            Op::FnmsubS => float::f32_fma(a ^ S32, b, c, rm, fl),
            Op::FnmaddS => float::f32_fma(a ^ S32, b, c ^ S32, rm, fl),
            Op::FaddS => float::f32_add(a, b, rm, fl),
            Op::FsubS => float::f32_sub(a, b, rm, fl),
            Op::FmulS => float::f32_mul(a, b, rm, fl),
            Op::FdivS => float::f32_div(a, b, rm, fl),
            Op::FsqrtS => float::f32_sqrt(a, rm, fl),
            Op::FsgnjS => a & !S32 | b & S32,
            Op::FsgnjnS => a & !S32 | !b & S32,
            Op::FsgnjxS => a ^ b & S32,
            Op::FminS => float::f32_min(a, b, fl),
            Op::FmaxS => float::f32_max(a, b, fl),
            Op::FminmS => float::f32_minm(a, b, fl),
            Op::FmaxmS => float::f32_maxm(a, b, fl),
            Op::FroundS => float::f32_round(a, rm, fl),
            Op::FroundnxS => float::f32_roundnx(a, rm, fl),
            Op::FliS => float::f32_constant(insn.rs1),
            Op::FcvtSW => float::f32_from_i32(x as i32, rm, fl),
            Op::FcvtSWu => float::f32_from_u32(x as u32, rm, fl),
            Op::FcvtSL => float::f32_from_i64(x as i64, rm, fl),
            Op::FcvtSLu => float::f32_from_u64(x, rm, fl),
            Op::FmvWX => x as u32,
            Op::FcvtSD => float::f64_to_f32(self.hart.f[usize::from(insn.rs1 & 31)], rm, fl),
            _ => return Dest::Integer(self.single_to_integer(insn, a, b, rm, fl)),
        })
    }

    fn single_to_integer(&self, insn: Insn, a: u32, b: u32, rm: Rounding, fl: &mut u8) -> u64 {
        match insn.op {
            Op::FeqS => u64::from(float::f32_eq(a, b, fl)),
            Op::FltS => u64::from(float::f32_lt(a, b, fl)),
            Op::FleS => u64::from(float::f32_le(a, b, fl)),
            Op::FltqS => u64::from(float::f32_ltq(a, b, fl)),
            Op::FleqS => u64::from(float::f32_leq(a, b, fl)),
            Op::FclassS => float::f32_class(a),
            Op::FcvtWS => float::f32_to_i32(a, rm, fl),
            Op::FcvtWuS => float::f32_to_u32(a, rm, fl),
            Op::FcvtLS => float::f32_to_i64(a, rm, fl),
            Op::FcvtLuS => float::f32_to_u64(a, rm, fl),
            // FmvXW: the bits as they are, boxed or not.
            _ => self.hart.f[usize::from(insn.rs1 & 31)] as i32 as u64,
        }
    }

    fn double(&self, insn: Insn, rm: Rounding, fl: &mut u8) -> Dest {
        let f = |r: u8| self.hart.f[usize::from(r & 31)];
        let (a, b, c) = (f(insn.rs1), f(insn.rs2), f(insn.rs3));
        let x = self.hart.x[usize::from(insn.rs1 & 31)];
        Dest::Double(match insn.op {
            Op::FmaddD => float::f64_fma(a, b, c, rm, fl),
            Op::FmsubD => float::f64_fma(a, b, c ^ S64, rm, fl),
            Op::FnmsubD => float::f64_fma(a ^ S64, b, c, rm, fl),
            Op::FnmaddD => float::f64_fma(a ^ S64, b, c ^ S64, rm, fl),
            Op::FaddD => float::f64_add(a, b, rm, fl),
            Op::FsubD => float::f64_sub(a, b, rm, fl),
            Op::FmulD => float::f64_mul(a, b, rm, fl),
            Op::FdivD => float::f64_div(a, b, rm, fl),
            Op::FsqrtD => float::f64_sqrt(a, rm, fl),
            Op::FsgnjD => a & !S64 | b & S64,
            Op::FsgnjnD => a & !S64 | !b & S64,
            Op::FsgnjxD => a ^ b & S64,
            Op::FminD => float::f64_min(a, b, fl),
            Op::FmaxD => float::f64_max(a, b, fl),
            Op::FminmD => float::f64_minm(a, b, fl),
            Op::FmaxmD => float::f64_maxm(a, b, fl),
            Op::FroundD => float::f64_round(a, rm, fl),
            Op::FroundnxD => float::f64_roundnx(a, rm, fl),
            Op::FliD => float::f64_constant(insn.rs1),
            Op::FcvtDW => float::f64_from_i32(x as i32, rm, fl),
            Op::FcvtDWu => float::f64_from_u32(x as u32, rm, fl),
            Op::FcvtDL => float::f64_from_i64(x as i64, rm, fl),
            Op::FcvtDLu => float::f64_from_u64(x, rm, fl),
            Op::FmvDX => x,
            Op::FcvtDS => float::f32_to_f64(unbox(a), fl),
            _ => return Dest::Integer(double_to_integer(insn.op, a, b, rm, fl)),
        })
    }
}

fn double_to_integer(op: Op, a: u64, b: u64, rm: Rounding, fl: &mut u8) -> u64 {
    match op {
        Op::FeqD => u64::from(float::f64_eq(a, b, fl)),
        Op::FltD => u64::from(float::f64_lt(a, b, fl)),
        Op::FleD => u64::from(float::f64_le(a, b, fl)),
        Op::FltqD => u64::from(float::f64_ltq(a, b, fl)),
        Op::FleqD => u64::from(float::f64_leq(a, b, fl)),
        Op::FclassD => float::f64_class(a),
        Op::FcvtWD => float::f64_to_i32(a, rm, fl),
        Op::FcvtWuD => float::f64_to_u32(a, rm, fl),
        Op::FcvtLD => float::f64_to_i64(a, rm, fl),
        Op::FcvtLuD => float::f64_to_u64(a, rm, fl),
        Op::FcvtmodWD => float::f64_to_i32_modular(a, fl),
        _ => a, // FmvXD
    }
}

/// Whether the instruction's `rm` field is a rounding mode.
fn has_rounding(op: Op) -> bool {
    !matches!(
        op,
        Op::FsgnjS
            | Op::FsgnjnS
            | Op::FsgnjxS
            | Op::FminS
            | Op::FmaxS
            | Op::FminmS
            | Op::FmaxmS
            | Op::FliS
            | Op::FltqS
            | Op::FleqS
            | Op::FeqS
            | Op::FltS
            | Op::FleS
            | Op::FclassS
            | Op::FmvXW
            | Op::FmvWX
            | Op::FsgnjD
            | Op::FsgnjnD
            | Op::FsgnjxD
            | Op::FminD
            | Op::FmaxD
            | Op::FminmD
            | Op::FmaxmD
            | Op::FliD
            | Op::FltqD
            | Op::FleqD
            | Op::FeqD
            | Op::FltD
            | Op::FleD
            | Op::FclassD
            | Op::FmvXD
            | Op::FmvDX
    )
}

//! The A extension.
//!
//! An SC succeeds when its address is the reservation's and memory still holds what LR read: a rule that depends on
//! state alone and is the same in every engine, part of the machine model.

use isa::{Insn, Op};

use crate::hart::pmp::Access;
use crate::hart::{Reservation, Trap, cause};
use crate::mmu;

use super::mem::Stored;
use super::run::{Core, Next};

impl Core<'_, '_> {
    pub(super) fn atomic(&mut self, insn: Insn) -> Result<Next, Trap> {
        let double = insn.op >= Op::LrD;
        let len = if double { 8 } else { 4 };
        let va = self.hart.x[usize::from(insn.rs1 & 31)];
        let load_only = matches!(insn.op, Op::LrW | Op::LrD);
        if va & (len - 1) != 0 {
            let cause = if load_only { cause::LOAD_MISALIGNED } else { cause::STORE_MISALIGNED };
            return Err(Trap { cause, tval: va });
        }
        let access = if load_only { Access::Read } else { Access::Write };
        let gpa = self.translate_data(va, access)?;
        let fault = |_| mmu::access_fault(access, va);
        let old = if double {
            self.bus.ram.read_u64(gpa).map_err(fault)?
        } else {
            self.bus.ram.read_u32(gpa).map_err(fault)? as i32 as u64
        };
        let operand = self.hart.x[usize::from(insn.rs2 & 31)];
        let (result, store) = match insn.op {
            Op::LrW | Op::LrD => {
                self.hart.reserve(Reservation { gpa, value: old });
                (old, None)
            }
            Op::ScW | Op::ScD => {
                let held = self.hart.take_reservation() == Some(Reservation { gpa, value: old });
                (u64::from(!held), held.then_some(operand))
            }
            op => (old, Some(combine(op, old, operand))),
        };
        self.hart.x[usize::from(insn.rd & 63)] = result;
        if let Some(value) = store {
            let bytes = value.to_le_bytes();
            self.bus.ram.write(gpa, &bytes[..len as usize]).map_err(fault)?;
        }
        // Of an AMO that is watched for both, the write is told of.
        if !matches!(insn.op, Op::ScW | Op::ScD) {
            self.bus.ram.note_access(gpa, len, false);
        }
        Ok(match self.after_store() {
            Stored::Refetch => Next::Refetch,
            Stored::Plain => Next::Plain,
            Stored::Attention => Next::Attention,
        })
    }
}

/// The new value of memory; for word operations `old` is sign-extended and the low half of the result counts.
fn combine(op: Op, old: u64, operand: u64) -> u64 {
    let (old_w, operand_w) = (old as u32, operand as u32);
    match op {
        Op::AmoSwapW | Op::AmoSwapD => operand,
        Op::AmoAddW | Op::AmoAddD => old.wrapping_add(operand),
        Op::AmoXorW | Op::AmoXorD => old ^ operand,
        Op::AmoAndW | Op::AmoAndD => old & operand,
        Op::AmoOrW | Op::AmoOrD => old | operand,
        Op::AmoMinW => u64::from((old_w as i32).min(operand_w as i32) as u32),
        Op::AmoMaxW => u64::from((old_w as i32).max(operand_w as i32) as u32),
        Op::AmoMinuW => u64::from(old_w.min(operand_w)),
        Op::AmoMaxuW => u64::from(old_w.max(operand_w)),
        Op::AmoMinD => (old as i64).min(operand as i64) as u64,
        Op::AmoMaxD => (old as i64).max(operand as i64) as u64,
        Op::AmoMinuD => old.min(operand),
        _ => old.max(operand),
    }
}

//! Instructions that only compute: registers in, [`isa::bits`] or [`isa::crypto`], register out.

use isa::{Insn, bits, crypto};

use crate::hart::Trap;

use super::run::{Core, Next};

impl Core<'_, '_> {
    /// Executes what those modules compute; any other instruction is illegal.
    pub(super) fn computation(&mut self, insn: Insn) -> Result<Next, Trap> {
        let a = self.hart.x[usize::from(insn.rs1 & 31)];
        let b = self.hart.x[usize::from(insn.rs2 & 31)];
        let value = bits::compute(insn.op, a, b, insn.imm)
            .or_else(|| crypto::compute(insn.op, a, b, insn.imm));
        let Some(value) = value else { return Err(self.illegal()) };
        self.hart.x[usize::from(insn.rd & 63)] = value;
        Ok(Next::Plain)
    }
}

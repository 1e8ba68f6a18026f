//! Bit manipulation: registers in, [`isa::bits`], register out.

use isa::{Insn, bits};

use crate::hart::Trap;

use super::run::{Core, Next};

impl Core<'_, '_> {
    /// Executes an instruction of Zba, Zbb, Zbs or Zicond; any other is illegal.
    pub(super) fn bit_manipulation(&mut self, insn: Insn) -> Result<Next, Trap> {
        let a = self.hart.x[usize::from(insn.rs1 & 31)];
        let b = self.hart.x[usize::from(insn.rs2 & 31)];
        match bits::compute(insn.op, a, b, insn.imm) {
            Some(value) => self.hart.x[usize::from(insn.rd & 63)] = value,
            None => return Err(self.illegal()),
        }
        Ok(Next::Plain)
    }
}

//! Zicbom and Zicboz: there is no cache, so that of the block operations the checks remain, and the zeroing.
//!
//! # Invariants
//! - INV-CBO-1: an address in an exception is that of the block, as QEMU has it; the manual leaves the choice.
//!
//! # References
//! The RISC-V Instruction Set Manual, volume I, chapter "CMO".

use isa::{Insn, Op};

use crate::hart::csr::envcfg;
use crate::hart::pmp::Access;
use crate::hart::{Hart, Mode, Trap};
use crate::mmu;

use super::mem::Stored;
use super::run::{Core, Next};

/// Bytes of a block.
const BLOCK: u64 = crate::board::fdt::CACHE_BLOCK_BYTES as u64;

impl Core<'_, '_> {
    pub(super) fn cache_block(&mut self, insn: Insn) -> Result<Next, Trap> {
        let enable = match insn.op {
            Op::CboZero => envcfg::CBZE,
            Op::CboInval => envcfg::CBIE,
            _ => envcfg::CBCFE,
        };
        if !is_enabled(self.hart, enable) {
            return Err(self.illegal());
        }
        let va = self.hart.x[usize::from(insn.rs1 & 31)] & !(BLOCK - 1);
        if insn.op == Op::CboZero { self.zero_block(va) } else { self.manage_block(va) }
    }

    fn zero_block(&mut self, va: u64) -> Result<Next, Trap> {
        // Kernels clear their pages with this.
        if self.store_fast(va, [0; BLOCK as usize]) {
            return Ok(Next::Plain);
        }
        let gpa = self.translate_data(va, Access::Write)?;
        // Devices have no blocks that could be zeroed.
        let written = self.bus.ram.write(gpa, &[0; BLOCK as usize]);
        written.map_err(|_| mmu::access_fault(Access::Write, va))?;
        Ok(match self.after_store() {
            Stored::Refetch => Next::Refetch,
            Stored::Plain => Next::Plain,
            Stored::Attention => Next::Attention,
        })
    }

    /// Cleans, flushes or invalidates: allowed where a load or a store is; a refusal is that of a store.
    fn manage_block(&mut self, va: u64) -> Result<Next, Trap> {
        if self.translate_data(va, Access::Read).is_err() {
            self.translate_data(va, Access::Write)?;
        }
        Ok(Next::Plain)
    }
}

/// Whether the modes above let the present one execute what `field` of `menvcfg` and `senvcfg` is about.
pub(super) fn is_enabled(hart: &Hart, field: u64) -> bool {
    let (m, s) = (hart.csr.menvcfg & field != 0, hart.csr.senvcfg & field != 0);
    match hart.mode {
        Mode::Machine => true,
        Mode::Supervisor => m,
        Mode::User => m && s,
    }
}

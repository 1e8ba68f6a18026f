//! Control and status registers: who may touch them, what they read, what a write changes.
//!
//! # References
//! Privileged Architecture 1.13 chapters 2, 3, 10, 12; Sstc 1.0; unprivileged specification (F, Zicntr).

use super::{Hart, Mode, irq, mstatus};

/// Fields of `menvcfg` and `senvcfg`.
pub mod envcfg {
    /// Kept, without effect, since fences order everything here.
    pub const FIOM: u64 = 1;
    /// `cbo.inval` is allowed below: as a flush (1) or as it is (3), which is the same here; 2 is reserved.
    pub const CBIE: u64 = 3 << 4;
    /// `cbo.clean` and `cbo.flush` are allowed below.
    pub const CBCFE: u64 = 1 << 6;
    /// `cbo.zero` is allowed below.
    pub const CBZE: u64 = 1 << 7;
    /// `menvcfg`: accessed and dirty bits are set by the walk that needs them (Svadu); otherwise it faults (Svade).
    pub const ADUE: u64 = 1 << 61;
    /// `menvcfg`: PTEs may have a memory type (Svpbmt).
    pub const PBMTE: u64 = 1 << 62;
    /// `menvcfg`: S-mode has `stimecmp`.
    pub const STCE: u64 = 1 << 63;
    /// What can be written in `senvcfg`.
    pub const S_WRITABLE: u64 = FIOM | CBIE | CBCFE | CBZE;
    /// What can be written in `menvcfg`.
    pub const WRITABLE: u64 = S_WRITABLE | ADUE | PBMTE | STCE;
    /// Reserved value of CBIE.
    pub(super) const CBIE_RESERVED: u64 = 2 << 4;
}
/// RV64 with I, M, A, F, D, C, S and U.
const MISA: u64 = 2 << 62 | 1 << 8 | 1 << 12 | 1 | 1 << 5 | 1 << 3 | 1 << 2 | 1 << 18 | 1 << 20;
/// `sstatus` bits that are readable.
const SSTATUS_MASK: u64 = mstatus::SIE
    | mstatus::SPIE
    | mstatus::SPP
    | mstatus::FS
    | mstatus::SUM
    | mstatus::MXR
    | mstatus::UXL
    | mstatus::SD;
/// Exceptions that can be delegated.
const MEDELEG_MASK: u64 = 0xb3ff;
const MIE_MASK: u64 = irq::S_ALL | irq::MSIP | irq::MTIP | irq::MEIP;
const COUNTEREN_MASK: u64 = 7;

/// What the hart needs from outside to answer a CSR read exactly.
#[derive(Debug, Clone, Copy)]
pub struct CsrEnv {
    /// Guest time before this instruction.
    pub mtime: u64,
    /// Steps that this hart made before this instruction.
    pub steps: u64,
}

/// What the engine must do after a CSR write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CsrEffect {
    /// Nothing.
    None,
    /// An interrupt may have become takeable, or the data mode changed (SUM, MPRV).
    Status,
    /// A timer deadline moved.
    Timer,
    /// Cached translations are stale (satp, PMP, MXR).
    Translation,
    /// Both of the former (menvcfg).
    Environment,
}

/// The access is not allowed or the register does not exist: illegal instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalCsr;

fn status_with_sd(value: u64) -> u64 {
    if value & mstatus::FS == mstatus::FS { value | mstatus::SD } else { value & !mstatus::SD }
}

impl Hart {
    fn counter_allowed(&self, csr: u16) -> bool {
        let bit = 1u64 << (csr & 31);
        (self.mode == Mode::Machine || self.csr.mcounteren & bit != 0)
            && (self.mode != Mode::User || self.csr.scounteren & bit != 0)
    }

    fn check_access(&self, csr: u16, write: bool) -> Result<(), IllegalCsr> {
        let level = u64::from(csr >> 8 & 3);
        if (self.mode as u64) < level || (write && csr >> 10 == 3) {
            return Err(IllegalCsr);
        }
        Ok(())
    }

    /// Reads a CSR. `write` says whether the instruction will also write it, which matters for the check.
    ///
    /// # Errors
    /// [`IllegalCsr`]: the instruction is illegal.
    pub fn read_csr(&self, csr: u16, write: bool, env: CsrEnv) -> Result<u64, IllegalCsr> {
        self.check_access(csr, write)?;
        let c = &self.csr;
        Ok(match csr {
            0x001..=0x003 => {
                if !self.fp_enabled() {
                    return Err(IllegalCsr);
                }
                match csr {
                    1 => c.fcsr & 0x1f,
                    2 => c.fcsr >> 5 & 7,
                    _ => c.fcsr,
                }
            }
            0xc00..=0xc02 => {
                if !self.counter_allowed(csr) {
                    return Err(IllegalCsr);
                }
                match csr {
                    0xc00 => env.steps.wrapping_add(c.mcycle_offset),
                    0xc01 => env.mtime,
                    _ => env.steps.wrapping_add(c.minstret_offset),
                }
            }
            0x100 => status_with_sd(c.mstatus) & SSTATUS_MASK,
            0x104 => c.mie & c.mideleg,
            0x105 => c.stvec,
            0x106 => c.scounteren,
            0x10a => c.senvcfg,
            0x140 => c.sscratch,
            0x141 => c.sepc,
            0x142 => c.scause,
            0x143 => c.stval,
            0x144 => self.mip() & c.mideleg,
            0x14d => {
                self.check_stimecmp()?;
                c.stimecmp
            }
            0x180 => {
                if self.mode == Mode::Supervisor && c.mstatus & mstatus::TVM != 0 {
                    return Err(IllegalCsr);
                }
                c.satp
            }
            _ => return self.read_machine_csr(csr, env),
        })
    }

    fn check_stimecmp(&self) -> Result<(), IllegalCsr> {
        let allowed =
            self.mode == Mode::Machine || (self.has_stimecmp() && self.csr.mcounteren & 2 != 0);
        if allowed { Ok(()) } else { Err(IllegalCsr) }
    }

    fn read_machine_csr(&self, csr: u16, env: CsrEnv) -> Result<u64, IllegalCsr> {
        let c = &self.csr;
        Ok(match csr {
            0xf11..=0xf13 | 0xf15 => 0,
            0xf14 => u64::from(self.id),
            0x300 => status_with_sd(c.mstatus),
            0x301 => MISA,
            0x302 => c.medeleg,
            0x303 => c.mideleg,
            0x304 => c.mie,
            0x305 => c.mtvec,
            0x306 => c.mcounteren,
            0x30a => c.menvcfg,
            0x320 => c.mcountinhibit,
            0x323..=0x33f => 0, // mhpmevent: no events
            0x340 => c.mscratch,
            0x341 => c.mepc,
            0x342 => c.mcause,
            0x343 => c.mtval,
            0x344 => self.mip(),
            0x3a0 | 0x3a2 => self.pmp.read_cfg(usize::from(csr - 0x3a0)),
            0x3b0..=0x3bf => self.pmp.read_addr(usize::from(csr - 0x3b0)),
            0xb00 => env.steps.wrapping_add(c.mcycle_offset),
            0xb02 => env.steps.wrapping_add(c.minstret_offset),
            0xb03..=0xb1f => 0, // mhpmcounter
            0x7a0..=0x7a3 => 0, // no triggers
            _ => return Err(IllegalCsr),
        })
    }

    /// Writes a CSR that [`Self::read_csr`] with `write` set has allowed.
    ///
    /// # Errors
    /// [`IllegalCsr`]: the instruction is illegal; nothing has changed.
    pub fn write_csr(
        &mut self,
        csr: u16,
        value: u64,
        env: CsrEnv,
    ) -> Result<CsrEffect, IllegalCsr> {
        self.check_access(csr, true)?;
        let c = &mut self.csr;
        match csr {
            0x001 => c.fcsr = c.fcsr & !0x1f | value & 0x1f,
            0x002 => c.fcsr = c.fcsr & 0x1f | (value & 7) << 5,
            0x003 => c.fcsr = value & 0xff,
            0x100 => return Ok(self.write_status(value, mstatus::S_WRITABLE)),
            0x104 => {
                c.mie = c.mie & !c.mideleg | value & c.mideleg & MIE_MASK;
                return Ok(CsrEffect::Status);
            }
            0x105 => c.stvec = tvec(c.stvec, value),
            0x106 => c.scounteren = value & COUNTEREN_MASK,
            0x10a => c.senvcfg = with_legal_cbie(c.senvcfg, value) & envcfg::S_WRITABLE,
            0x140 => c.sscratch = value,
            0x141 => c.sepc = value & !1,
            0x142 => c.scause = value,
            0x143 => c.stval = value,
            0x144 => {
                let mask = c.mideleg & irq::SSIP;
                c.mip_soft = c.mip_soft & !mask | value & mask;
                return Ok(CsrEffect::Status);
            }
            0x14d => {
                self.check_stimecmp()?;
                self.csr.stimecmp = value;
                return Ok(CsrEffect::Timer);
            }
            0x180 => return Ok(self.write_satp(value)),
            _ => return self.write_machine_csr(csr, value, env),
        }
        if csr <= 3 {
            self.set_fp_dirty();
        }
        Ok(CsrEffect::None)
    }

    fn write_machine_csr(
        &mut self,
        csr: u16,
        value: u64,
        env: CsrEnv,
    ) -> Result<CsrEffect, IllegalCsr> {
        let c = &mut self.csr;
        match csr {
            0x300 => return Ok(self.write_status(value, mstatus::WRITABLE)),
            0x302 => c.medeleg = value & MEDELEG_MASK,
            0x303 => {
                c.mideleg = value & irq::S_ALL;
                return Ok(CsrEffect::Status);
            }
            0x304 => {
                c.mie = value & MIE_MASK;
                return Ok(CsrEffect::Status);
            }
            0x305 => c.mtvec = tvec(c.mtvec, value),
            0x306 => c.mcounteren = value & COUNTEREN_MASK,
            0x30a => {
                c.menvcfg = with_legal_cbie(c.menvcfg, value) & envcfg::WRITABLE;
                return Ok(CsrEffect::Environment);
            }
            0x320 => c.mcountinhibit = 0, // WARL: counters cannot be stopped
            0x340 => c.mscratch = value,
            0x341 => c.mepc = value & !1,
            0x342 => c.mcause = value,
            0x343 => c.mtval = value,
            0x344 => {
                let mask =
                    if c.menvcfg & envcfg::STCE != 0 { irq::SSIP | irq::SEIP } else { irq::S_ALL };
                c.mip_soft = c.mip_soft & !mask | value & mask;
                return Ok(CsrEffect::Status);
            }
            0x3a0 | 0x3a2 => {
                self.pmp.write_cfg(usize::from(csr - 0x3a0), value);
                return Ok(CsrEffect::Translation);
            }
            0x3b0..=0x3bf => {
                self.pmp.write_addr(usize::from(csr - 0x3b0), value);
                return Ok(CsrEffect::Translation);
            }
            // The write takes effect after this instruction has been counted.
            0xb00 => c.mcycle_offset = value.wrapping_sub(env.steps.wrapping_add(1)),
            0xb02 => c.minstret_offset = value.wrapping_sub(env.steps.wrapping_add(1)),
            0x301 | 0x323..=0x33f | 0xb03..=0xb1f | 0x7a0..=0x7a3 => {}
            _ => return Err(IllegalCsr),
        }
        Ok(CsrEffect::None)
    }

    fn write_status(&mut self, value: u64, mask: u64) -> CsrEffect {
        let old = self.csr.mstatus;
        let mut new = old & !mask | value & mask;
        if new & mstatus::MPP == 2 << mstatus::MPP_SHIFT {
            new = new & !mstatus::MPP | old & mstatus::MPP;
        }
        self.csr.mstatus = new;
        if (old ^ new) & mstatus::MXR != 0 { CsrEffect::Translation } else { CsrEffect::Status }
    }

    fn write_satp(&mut self, value: u64) -> CsrEffect {
        if matches!(value >> 60, 0 | 8 | 9) {
            self.csr.satp = value;
        }
        CsrEffect::Translation
    }
}

/// `value` with the old CBIE if its own is reserved.
fn with_legal_cbie(old: u64, value: u64) -> u64 {
    let reserved = value & envcfg::CBIE == envcfg::CBIE_RESERVED;
    if reserved { value & !envcfg::CBIE | old & envcfg::CBIE } else { value }
}

fn tvec(old: u64, value: u64) -> u64 {
    if value & 3 <= 1 { value } else { old }
}

//! A hart: registers, privilege, traps. What the engines change and what a snapshot saves.
//!
//! # Invariants
//! - INV-HART-1: everything here but `tables` is architectural or part of the versioned machine model.
//! - INV-HART-2: `x[0]` is 0; `x[32]` takes writes to x0 and means nothing. The rest is there so that no register number
//!   needs a bounds check.
//!
//! # References
//! RISC-V Privileged Architecture 1.13, chapters 3 (machine), 12 (supervisor), Sstc 1.0.

pub mod csr;
pub mod pmp;

use jit::Tables;
use jit::tables::NO_RESERVATION;
use serde::{Deserialize, Serialize};

use self::pmp::Pmp;

/// Privilege mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub enum Mode {
    /// User.
    User = 0,
    /// Supervisor.
    Supervisor = 1,
    /// Machine.
    Machine = 3,
}

impl Mode {
    fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::User,
            1 => Self::Supervisor,
            _ => Self::Machine,
        }
    }
}

/// Exception causes (privileged specification, table "mcause values").
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod cause {
    pub const FETCH_MISALIGNED: u64 = 0;
    pub const FETCH_ACCESS: u64 = 1;
    pub const ILLEGAL: u64 = 2;
    pub const BREAKPOINT: u64 = 3;
    pub const LOAD_MISALIGNED: u64 = 4;
    pub const LOAD_ACCESS: u64 = 5;
    pub const STORE_MISALIGNED: u64 = 6;
    pub const STORE_ACCESS: u64 = 7;
    pub const ECALL_U: u64 = 8;
    pub const ECALL_S: u64 = 9;
    pub const ECALL_M: u64 = 11;
    pub const FETCH_PAGE: u64 = 12;
    pub const LOAD_PAGE: u64 = 13;
    pub const STORE_PAGE: u64 = 15;
    /// Set in `mcause` for interrupts.
    pub const INTERRUPT: u64 = 1 << 63;
}

/// Interrupt bits of `mip` and `mie`.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod irq {
    pub const SSIP: u64 = 1 << 1;
    pub const MSIP: u64 = 1 << 3;
    pub const STIP: u64 = 1 << 5;
    pub const MTIP: u64 = 1 << 7;
    pub const SEIP: u64 = 1 << 9;
    pub const MEIP: u64 = 1 << 11;
    /// Those that can be delegated to S-mode.
    pub const S_ALL: u64 = SSIP | STIP | SEIP;
}

/// A synchronous exception on its way to a trap handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trap {
    /// Exception cause.
    pub cause: u64,
    /// Value for `mtval` or `stval`.
    pub tval: u64,
}

/// Hart state of the SBI HSM extension, when the machine provides the SBI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HartState {
    /// Runs.
    Started,
    /// Waits for `sbi_hart_start`.
    Stopped,
}

/// `mstatus` bits.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod mstatus {
    pub const SIE: u64 = 1 << 1;
    pub const MIE: u64 = 1 << 3;
    pub const SPIE: u64 = 1 << 5;
    pub const MPIE: u64 = 1 << 7;
    pub const SPP: u64 = 1 << 8;
    pub const MPP: u64 = 3 << 11;
    pub const MPP_SHIFT: u32 = 11;
    pub const FS: u64 = 3 << 13;
    pub const MPRV: u64 = 1 << 17;
    pub const SUM: u64 = 1 << 18;
    pub const MXR: u64 = 1 << 19;
    pub const TVM: u64 = 1 << 20;
    pub const TW: u64 = 1 << 21;
    pub const TSR: u64 = 1 << 22;
    pub const UXL: u64 = 2 << 32;
    pub const SXL: u64 = 2 << 34;
    pub const SD: u64 = 1 << 63;
    /// Fields that software can write.
    pub const WRITABLE: u64 =
        SIE | MIE | SPIE | MPIE | SPP | MPP | FS | MPRV | SUM | MXR | TVM | TW | TSR;
    /// Fields of `sstatus` that software can write.
    pub const S_WRITABLE: u64 = SIE | SPIE | SPP | FS | SUM | MXR;
}

/// Control and status registers that hold state. Names are the specification's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub struct Csrs {
    pub mstatus: u64,
    pub medeleg: u64,
    pub mideleg: u64,
    pub mie: u64,
    pub mtvec: u64,
    pub mcounteren: u64,
    pub mcountinhibit: u64,
    pub menvcfg: u64,
    pub mscratch: u64,
    pub mepc: u64,
    pub mcause: u64,
    pub mtval: u64,
    pub stvec: u64,
    pub scounteren: u64,
    pub senvcfg: u64,
    pub sscratch: u64,
    pub sepc: u64,
    pub scause: u64,
    pub stval: u64,
    pub satp: u64,
    pub stimecmp: u64,
    pub fcsr: u64,
    /// Bits of `mip` that software writes: SSIP, STIP (without Sstc), SEIP.
    pub mip_soft: u64,
    /// `mcycle` and `minstret` less the hart's steps.
    pub mcycle_offset: u64,
    pub minstret_offset: u64,
}

/// An LR's reservation. SC succeeds when the address is the same and memory still holds the value that LR read. Traps
/// and returns from them end it, so that none outlives the context that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Guest physical address.
    pub gpa: u64,
    /// Value that LR read, sign-extended.
    pub value: u64,
}

/// One hart.
#[derive(Debug, Clone)]
pub struct Hart {
    /// Hart id.
    pub id: u8,
    /// Integer registers; see INV-HART-2.
    pub x: [u64; 256],
    /// Floating-point registers, NaN-boxed.
    pub f: [u64; 32],
    /// Program counter.
    pub pc: u64,
    /// Privilege mode.
    pub mode: Mode,
    /// Control and status registers.
    pub csr: Csrs,
    /// Physical memory protection.
    pub pmp: Pmp,
    /// Address of the reservation of an LR, [`NO_RESERVATION`] when there is none.
    pub(crate) reservation_gpa: u64,
    /// Value that the LR read; without a reservation it means nothing.
    pub(crate) reservation_value: u64,
    /// Stalled in WFI.
    pub waiting: bool,
    /// HSM state.
    pub state: HartState,
    /// Steps this hart has made.
    pub steps: u64,
    /// Interrupt lines from the board and the timers; derived, kept up to date by the machine.
    pub lines: u64,
    /// The engine's caches: not state.
    pub tables: Tables,
}

impl Hart {
    /// A hart after reset, in M-mode.
    #[must_use]
    pub fn new(id: u8) -> Self {
        let csr = Csrs {
            mstatus: mstatus::UXL | mstatus::SXL,
            // As QEMU resets it, for firmware that does not know Svadu.
            menvcfg: csr::envcfg::ADUE,
            stimecmp: u64::MAX,
            ..Csrs::default()
        };
        Self {
            id,
            x: [0; 256],
            f: [0; 32],
            pc: 0,
            mode: Mode::Machine,
            csr,
            pmp: Pmp::default(),
            reservation_gpa: NO_RESERVATION,
            reservation_value: 0,
            waiting: false,
            state: HartState::Started,
            steps: 0,
            lines: 0,
            tables: Tables::new(),
        }
    }

    /// The reservation of an LR.
    #[must_use]
    pub fn reservation(&self) -> Option<Reservation> {
        let (gpa, value) = (self.reservation_gpa, self.reservation_value);
        (gpa != NO_RESERVATION).then_some(Reservation { gpa, value })
    }

    /// An LR reads.
    pub fn reserve(&mut self, reservation: Reservation) {
        (self.reservation_gpa, self.reservation_value) = (reservation.gpa, reservation.value);
    }

    /// Ends the reservation; says what it was.
    pub fn take_reservation(&mut self) -> Option<Reservation> {
        let reservation = self.reservation();
        self.reservation_gpa = NO_RESERVATION;
        reservation
    }

    /// Whether `stimecmp` drives STIP (Sstc, enabled by `menvcfg.STCE`).
    #[must_use]
    pub fn has_stimecmp(&self) -> bool {
        self.csr.menvcfg & csr::envcfg::STCE != 0
    }

    /// The present value of `mip`.
    #[must_use]
    pub fn mip(&self) -> u64 {
        let soft =
            if self.has_stimecmp() { self.csr.mip_soft & !irq::STIP } else { self.csr.mip_soft };
        self.lines | soft
    }

    /// Whether a WFI ends: an interrupt is pending and enabled, whatever `mstatus` says.
    #[must_use]
    pub fn wakes(&self) -> bool {
        self.mip() & self.csr.mie != 0
    }

    /// The interrupt to take before the next instruction, if any.
    #[must_use]
    pub fn pending_interrupt(&self) -> Option<u64> {
        let pending = self.mip() & self.csr.mie;
        if pending == 0 {
            return None;
        }
        let m_enabled = self.mode < Mode::Machine || self.csr.mstatus & mstatus::MIE != 0;
        let s_enabled = self.mode < Mode::Supervisor
            || (self.mode == Mode::Supervisor && self.csr.mstatus & mstatus::SIE != 0);
        let m = if m_enabled { pending & !self.csr.mideleg } else { 0 };
        let s = if s_enabled { pending & self.csr.mideleg } else { 0 };
        let set = if m != 0 { m } else { s };
        // Priority order of the privileged specification, section 3.1.9.
        [11u64, 3, 7, 9, 1, 5].into_iter().find(|&bit| set & (1 << bit) != 0)
    }

    /// Enters the trap handler for an exception raised at `self.pc`.
    pub fn take_trap(&mut self, trap: Trap) {
        let delegated = self.mode <= Mode::Supervisor && self.csr.medeleg >> trap.cause & 1 != 0;
        self.enter_handler(delegated, trap.cause, trap.tval);
    }

    /// Enters the trap handler for interrupt number `number`.
    pub fn take_interrupt(&mut self, number: u64) {
        let delegated = self.csr.mideleg >> number & 1 != 0;
        self.waiting = false;
        self.enter_handler(delegated, cause::INTERRUPT | number, 0);
    }

    fn enter_handler(&mut self, to_supervisor: bool, cause: u64, tval: u64) {
        self.reservation_gpa = NO_RESERVATION;
        let c = &mut self.csr;
        let vector = |tvec: u64| {
            let offset =
                if tvec & 1 != 0 && cause & cause::INTERRUPT != 0 { (cause & 0x3f) * 4 } else { 0 };
            (tvec & !3).wrapping_add(offset)
        };
        let previous = self.mode as u64;
        if to_supervisor {
            let sie = c.mstatus & mstatus::SIE != 0;
            c.mstatus &= !(mstatus::SIE | mstatus::SPIE | mstatus::SPP);
            c.mstatus |=
                if sie { mstatus::SPIE } else { 0 } | if previous == 0 { 0 } else { mstatus::SPP };
            c.sepc = self.pc;
            c.scause = cause;
            c.stval = tval;
            self.pc = vector(c.stvec);
            self.mode = Mode::Supervisor;
        } else {
            let mie = c.mstatus & mstatus::MIE != 0;
            c.mstatus &= !(mstatus::MIE | mstatus::MPIE | mstatus::MPP);
            c.mstatus |= if mie { mstatus::MPIE } else { 0 } | previous << mstatus::MPP_SHIFT;
            c.mepc = self.pc;
            c.mcause = cause;
            c.mtval = tval;
            self.pc = vector(c.mtvec);
            self.mode = Mode::Machine;
        }
    }

    /// MRET. The caller has checked the mode.
    pub fn mret(&mut self) {
        self.reservation_gpa = NO_RESERVATION;
        let c = &mut self.csr;
        let to = Mode::from_bits(c.mstatus >> mstatus::MPP_SHIFT);
        let mie = if c.mstatus & mstatus::MPIE != 0 { mstatus::MIE } else { 0 };
        c.mstatus = c.mstatus & !(mstatus::MIE | mstatus::MPP) | mie | mstatus::MPIE;
        if to != Mode::Machine {
            c.mstatus &= !mstatus::MPRV;
        }
        self.mode = to;
        self.pc = c.mepc;
    }

    /// SRET. The caller has checked the mode.
    pub fn sret(&mut self) {
        self.reservation_gpa = NO_RESERVATION;
        let c = &mut self.csr;
        let to = if c.mstatus & mstatus::SPP != 0 { Mode::Supervisor } else { Mode::User };
        let sie = if c.mstatus & mstatus::SPIE != 0 { mstatus::SIE } else { 0 };
        c.mstatus =
            c.mstatus & !(mstatus::SIE | mstatus::SPP | mstatus::MPRV) | sie | mstatus::SPIE;
        self.mode = to;
        self.pc = c.sepc;
    }

    /// Whether floating-point instructions are allowed (`mstatus.FS` is not Off).
    #[inline]
    #[must_use]
    pub fn fp_enabled(&self) -> bool {
        self.csr.mstatus & mstatus::FS != 0
    }

    /// Notes that floating-point state changed.
    #[inline]
    pub fn set_fp_dirty(&mut self) {
        self.csr.mstatus |= mstatus::FS;
    }

    /// Privilege and flags that loads and stores are checked with.
    #[must_use]
    pub fn data_mode(&self) -> Mode {
        if self.csr.mstatus & mstatus::MPRV != 0 {
            Mode::from_bits(self.csr.mstatus >> mstatus::MPP_SHIFT)
        } else {
            self.mode
        }
    }

    /// The architectural state as plain numbers, for snapshots and digests.
    #[must_use]
    pub fn save(&self) -> HartSaved {
        HartSaved {
            x: self.x[..32].to_vec(),
            f: self.f.to_vec(),
            pc: self.pc,
            mode: self.mode,
            csr: self.csr.clone(),
            pmp: self.pmp.clone(),
            reservation: self.reservation(),
            waiting: self.waiting,
            state: self.state,
            steps: self.steps,
        }
    }

    /// A hart from its saved state; `None` when it has the wrong number of registers.
    #[must_use]
    pub fn load(id: u8, saved: &HartSaved) -> Option<Self> {
        let mut hart = Self::new(id);
        if saved.x.len() != 32 || !saved.pmp.is_well_formed() {
            return None;
        }
        hart.x[..32].copy_from_slice(&saved.x);
        hart.x[0] = 0;
        hart.f = saved.f.clone().try_into().ok()?;
        hart.pc = saved.pc & !1;
        hart.mode = saved.mode;
        hart.csr = saved.csr.clone();
        hart.pmp = saved.pmp.clone();
        if let Some(reservation) = saved.reservation {
            hart.reserve(reservation);
        }
        hart.waiting = saved.waiting;
        hart.state = saved.state;
        hart.steps = saved.steps;
        Some(hart)
    }
}

/// Saved form of a [`Hart`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "as in Hart")]
pub struct HartSaved {
    pub x: Vec<u64>,
    pub f: Vec<u64>,
    pub pc: u64,
    pub mode: Mode,
    pub csr: Csrs,
    pub pmp: Pmp,
    pub reservation: Option<Reservation>,
    pub waiting: bool,
    pub state: HartState,
    pub steps: u64,
}

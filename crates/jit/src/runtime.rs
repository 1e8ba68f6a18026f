//! What passes between the dispatcher and the translator, whichever kind of host this is.
//!
//! # Place
//! The dispatcher implements [`Runtime`] and reads the answers here; the translator is in `cache` and `enter`, and where a host
//! cannot have one, `absent` stands for it.
//!
//! # Invariants
//! - INV-RUNTIME-1: a step that the runtime makes is the instruction that was translated, or the one that is fetched at `pc`,
//!   with everything that belongs to it: exceptions, memory, devices.

use isa::Insn;

use crate::tables::Tables;

/// A hart's state as generated code uses it.
#[derive(Debug)]
pub struct State<'a> {
    /// Integer registers, x0 first. Nothing writes x0.
    pub x: &'a mut [u64; 256],
    /// Floating-point registers, NaN-boxed.
    pub f: &'a mut [u64; 32],
    /// Caches and the present position.
    pub tables: &'a mut Tables,
    /// Control and status registers, and the reservation, that code reads and writes without further ado, in the order of [`Csr`].
    pub csrs: [&'a mut u64; CSRS],
}

/// Number of [`Csr`]s.
pub const CSRS: usize = 11;

/// A register of [`State::csrs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Csr {
    /// `mstatus`.
    Mstatus,
    /// `sscratch`.
    Sscratch,
    /// `sepc`.
    Sepc,
    /// `scause`.
    Scause,
    /// `stval`.
    Stval,
    /// `mie`.
    Mie,
    /// Bits of `mip` that software sets.
    MipSoft,
    /// Bits of `mip` that devices and timers set.
    Lines,
    /// `fcsr`, without the flags that are in MXCSR.
    Fcsr,
    /// Guest physical address of the reservation, [`crate::tables::NO_RESERVATION`] when there is none.
    ReservationGpa,
    /// Value that the reservation's LR read, sign-extended.
    ReservationValue,
}

/// Makes the steps that generated code does not make itself.
pub trait Runtime {
    /// The hart's state.
    fn state(&mut self) -> State<'_>;

    /// RAM, at the same place throughout.
    fn ram(&mut self) -> &mut [u8];

    /// Makes the step at `pc`; `insn` is `None` when the instruction has to be fetched, because it ends on the next page.
    /// `left` is what is left of the budget after it.
    fn step(&mut self, insn: Option<Insn>, pc: u64, left: u64) -> Answer;
}

/// How to go on after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Behind the instruction.
    Continue,
    /// At another place.
    Jump(u64),
    /// Not: leave generated code.
    Leave,
}

/// Why generated code came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// At `pc` there is a block longer than what is left of the budget.
    Budget {
        /// Address of the block.
        pc: u64,
    },
    /// At `pc` there is no code.
    Missing {
        /// Address.
        pc: u64,
        /// The jump that wanted to go there, for [`Jit::link`].
        link: Option<Link>,
    },
    /// A step said [`Answer::Leave`].
    Left,
}

/// A jump that can be patched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    pub(crate) site: u32,
    pub(crate) generation: u64,
}

/// A place to enter generated code at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub(crate) address: u32,
    pub(crate) generation: u64,
}

/// What is known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// There is code for it.
    Code(Entry),
    /// This page of RAM has code, but none for it.
    Missing(u32),
    /// Its page is not in the TLB: [`Jit::map`] it.
    Unmapped,
}

/// What is in memory and was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes of generated code.
    pub code_bytes: u64,
    /// Bytes of tables.
    pub table_bytes: u64,
    /// Entry points made so far.
    pub blocks: u64,
    /// Chunks that made room.
    pub evictions: u64,
}

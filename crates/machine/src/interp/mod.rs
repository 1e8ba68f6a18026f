//! The interpreter: the reference engine.
//!
//! Instructions are decoded once into a page's worth of [`Insn`] and executed from there; a software TLB maps virtual
//! pages to RAM offsets and to decoded pages.
//!
//! # Place
//! [`crate::Machine`] calls [`Interp::run`] for one hart at a time and looks at interrupts, timers, SBI calls and
//! outputs between the calls.
//!
//! # Invariants
//! - INV-ENGINE-1: `run(budget)` makes at most `budget` steps, one for each instruction retired and each trap taken,
//!   and `run(a)` then `run(b)` leave the same state as `run(a + b)`.
//! - INV-ENGINE-2: no cache here is visible: dropping all of them at any point changes nothing but speed.
//! - INV-ENGINE-3: a store that hits decoded code, or a valid PTE, takes effect before the next fetch.
//!
//! # References
//! Unprivileged ISA (RV64GC), Privileged Architecture 1.13.

mod amo;
mod bits;
mod cache_ops;
mod code;
mod dispatch;
mod fp;
mod mem;
mod run;
mod wait;

use std::sync::atomic::AtomicBool;

use jit::Jit;

use crate::board::{Board, BusCtx};
use crate::clock::Clock;
use crate::debug::Breakpoints;
use crate::engine::{EngineConfig, EngineKind, EngineStats};
use crate::hart::Hart;
use crate::io::Output;
use crate::ram::{GuestRam, RAM_BASE};

use self::code::CodeCache;
use self::mem::Tlb;

/// What a hart sees beside its own registers.
#[derive(Debug)]
pub struct Bus<'a> {
    /// RAM.
    pub ram: &'a mut GuestRam,
    /// Devices.
    pub board: &'a mut Board,
    /// Where outputs go.
    pub outputs: &'a mut Vec<Output>,
    /// Guest time.
    pub clock: Clock,
    /// Icount at the start of this run.
    pub icount: u64,
    /// The machine provides the SBI: an environment call from S-mode ends the run with [`RunEnd::SbiCall`].
    pub sbi: bool,
    /// `pause` ends the hart's turn.
    pub smp: bool,
    /// Another thread wants the run to end soon.
    pub stop: &'a AtomicBool,
    /// Where to stop; not before the first step of a run.
    pub breaks: &'a Breakpoints,
}

impl Bus<'_> {
    /// Context for a device access by the instruction after `steps_before` steps of this run.
    fn device_ctx(&mut self, steps_before: u64) -> (&mut Board, BusCtx<'_>) {
        let icount = self.icount + steps_before;
        let ctx = BusCtx {
            ram: &mut *self.ram,
            icount: icount + 1,
            mtime: self.clock.mtime(icount),
            outputs: &mut *self.outputs,
        };
        (&mut *self.board, ctx)
    }
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// The budget is used up.
    Budget,
    /// A device was accessed, or interrupts, timers or the hart's state changed: look at everything again.
    Attention,
    /// An environment call for the SBI; `pc` is already behind it.
    SbiCall,
    /// The hart gives up its turn (`pause`, with other harts present).
    Yield,
    /// The next step is one at a breakpoint, unless there is something else to do first.
    Breakpoint,
}

/// The engine's caches, for all harts.
#[derive(Debug)]
pub struct Interp {
    tlbs: Vec<Tlb>,
    code: CodeCache,
    config: EngineConfig,
    /// Made at the first run.
    jit: Option<Box<Jit>>,
    /// Where the JIT cannot be had it is not tried again.
    wants_jit: bool,
}

impl Interp {
    /// Empty caches.
    #[must_use]
    pub fn new(harts: usize, ram: &GuestRam, config: EngineConfig) -> Self {
        let wants_jit = config.kind == EngineKind::Jit && jit::is_supported();
        let pages_max = if wants_jit { code::PAGES_MAX_JIT } else { code::PAGES_MAX };
        Self {
            tlbs: (0..harts).map(|_| Tlb::new()).collect(),
            code: CodeCache::new(ram.pages(), pages_max),
            config,
            jit: None,
            wants_jit,
        }
    }

    /// Runs `hart` for at most `budget` steps; returns how many it made and why it stopped.
    pub fn run(&mut self, hart: &mut Hart, bus: &mut Bus<'_>, budget: u64) -> (u64, RunEnd) {
        hart.tables.bind(bus.ram.bytes_mut(), RAM_BASE);
        hart.tables.sync_stops(bus.breaks.serial(), bus.breaks.pages());
        if self.wants_jit && self.jit.is_none() {
            self.jit = dispatch::new_jit(hart, bus.ram, self.config).map(Box::new);
            self.wants_jit = self.jit.is_some();
        }
        let tlb = &mut self.tlbs[usize::from(hart.id)];
        tlb.sync(hart, bus.ram);
        tlb.set_context(hart);
        let mut core = run::Core {
            hart,
            tlb,
            code: &mut self.code,
            bus,
            steps: 0,
            entered_budget: 0,
            ended: None,
        };
        let end = match &mut self.jit {
            Some(jit) => core.run_jit(jit, budget, self.config.hot_after),
            None => core.run(budget),
        };
        let steps = core.steps;
        hart.steps = hart.steps.wrapping_add(steps);
        (steps, end)
    }

    /// The engine that serves.
    #[must_use]
    pub fn kind(&self) -> EngineKind {
        if self.wants_jit { EngineKind::Jit } else { EngineKind::Interpreter }
    }

    /// What is in memory.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let tables = self.code.bytes() + self.tlbs.iter().map(Tlb::bytes).sum::<u64>();
        let jit = self.jit.as_ref().map(|jit| jit.stats()).unwrap_or_default();
        EngineStats {
            code_bytes: jit.code_bytes,
            table_bytes: tables + jit.table_bytes,
            blocks: jit.blocks,
            evictions: jit.evictions,
        }
    }

    /// Drops every cache; tests use it to show that nothing depends on them.
    pub fn drop_caches(&mut self) {
        self.code.clear();
        if let Some(jit) = &mut self.jit {
            jit.clear();
        }
        self.drop_translations();
    }

    /// Drops what is known of addresses; decoded and translated code stays.
    pub fn drop_translations(&mut self) {
        for tlb in &mut self.tlbs {
            tlb.drop_all();
        }
    }
}

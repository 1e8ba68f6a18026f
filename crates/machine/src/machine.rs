//! The machine: harts in turns, devices, guest time, inputs and outputs, snapshots and digests.
//!
//! # Place
//! The shell's vCPU thread owns a [`Machine`]: it applies inputs, calls [`Machine::run`] and takes outputs.
//!
//! # Invariants
//! - INV-MACHINE-1: `run(n)` leaves the same state as `run(k)` then `run(n)` for every k between; hart turns, timers and
//!   interrupts happen at an icount that the state alone decides.
//! - INV-MACHINE-2: a call of `run` that makes no step changes nothing that [`Machine::digest`] sees.
//! - INV-MACHINE-3: no guest action panics; what cannot go on becomes a [`HaltReason`].
//! - INV-MACHINE-4: icount grows by one for each instruction retired and each trap taken, by any hart.
//!
//! # Determinism
//! Inputs enter by [`Machine::apply`] alone. Of several harts, one runs for at most `TURN` steps, then the next runnable
//! one does; WFI and `pause` end the turn.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::board::boot::{self, LoadError};
use crate::board::state::DeviceSaved;
use crate::board::{
    self, ApplyError, Board, BoardRequest, BoardSaved, BusCtx, LoadBoardError, NetRoom,
};
use crate::clock::Clock;
use crate::config::{BootImages, MachineConfig};
use crate::debug::{Breakpoints, WatchHit, Watchpoint};
use crate::engine::{EngineConfig, EngineKind, EngineStats};
use crate::hart::csr::CsrEnv;
use crate::hart::{Hart, HartSaved, HartState, Mode, irq, mstatus};
use crate::interp::{Bus, Interp, RunEnd};
use crate::io::{HaltReason, Input, Output, OutputKind};
use crate::mmu;
use crate::offload::Offloads;
use crate::ram::{GuestRam, OutsideRam, PAGE_SHIFT, PAGE_SIZE, RAM_BASE, SnapshotPage};
use crate::sbi::{self, SbiRequest};

/// Steps of a hart's turn.
const TURN: u64 = 8192;
/// Version of [`MachineSaved`] and of the machine model: replicas must agree on it.
pub const MODEL_VERSION: u32 = 3;

/// Why [`Machine::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// Stands at exactly the icount asked for.
    Reached,
    /// Every hart waits for an interrupt: only an input can go on.
    Idle,
    /// There are outputs that somebody waits for.
    Output,
    /// Another thread asked.
    Stopped,
    /// The machine is off.
    Halted,
    /// A hart stands before an instruction at a breakpoint. Not reported for the first step of a run, nor where a run ends for
    /// another reason: see [`Machine::breakpoint_ahead`].
    Breakpoint {
        /// The hart.
        hart: u8,
    },
    /// Stands behind an instruction that accessed a watched place, or that made a device write to one.
    Watchpoint {
        /// The hart.
        hart: u8,
        /// Guest physical address of the first watched byte that was accessed.
        gpa: u64,
        /// Whether it was written.
        is_write: bool,
    },
}

/// The machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewMachineError {
    /// The configuration is not possible.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// A boot image is no good.
    #[error(transparent)]
    Boot(#[from] LoadError),
}

/// A saved machine cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Of another machine model.
    #[error("the snapshot is of machine model {found}, this build has model {MODEL_VERSION}")]
    Version {
        /// The snapshot's.
        found: u32,
    },
    /// The configuration is not possible.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// A device's state is no good.
    #[error(transparent)]
    Board(#[from] LoadBoardError),
    /// Of a machine with another configuration.
    #[error("the saved state is of a machine with another configuration")]
    OtherMachine,
    /// A page that is not one of RAM.
    #[error("page {page} of the saved state is not a whole page of RAM")]
    Page {
        /// Its number.
        page: u32,
    },
    /// The number of harts or of their registers is wrong.
    #[error("the snapshot's harts do not fit its configuration")]
    Harts,
}

/// Everything of a machine but the contents of RAM and the boot images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "as in Machine")]
pub struct MachineSaved {
    pub model: u32,
    pub config: MachineConfig,
    pub icount: u64,
    pub clock: Clock,
    pub current: u8,
    pub turn_left: u64,
    pub harts: Vec<HartSaved>,
    pub board: BoardSaved,
    pub halted: Option<HaltReason>,
}

impl MachineSaved {
    /// Sizes of the disks in bytes at that moment, in order.
    #[must_use]
    pub fn disk_sizes(&self) -> Vec<u64> {
        let grown = self.board.slots.iter().filter_map(|slot| match &slot.device {
            DeviceSaved::Blk(_) => Some(None),
            DeviceSaved::ResizedBlk(disk) => Some(Some(disk.size)),
            DeviceSaved::Empty
            | DeviceSaved::Net(_)
            | DeviceSaved::Console(_)
            | DeviceSaved::Rng(_) => None,
        });
        let sizes = self.config.disks.iter().map(|disk| disk.size);
        sizes
            .zip(grown.chain(std::iter::repeat(None)))
            .map(|(size, now)| now.unwrap_or(size))
            .collect()
    }
}

/// A machine. See the module documentation.
#[derive(Debug)]
pub struct Machine {
    config: MachineConfig,
    images: BootImages,
    harts: Vec<Hart>,
    current: usize,
    turn_left: u64,
    icount: u64,
    clock: Clock,
    ram: GuestRam,
    board: Board,
    interp: Interp,
    outputs: Vec<Output>,
    halted: Option<HaltReason>,
    breaks: Breakpoints,
}

impl Machine {
    /// A machine at power-on, with its images loaded.
    ///
    /// # Errors
    /// [`NewMachineError`] with one line for people.
    pub fn new(config: MachineConfig, images: BootImages) -> Result<Self, NewMachineError> {
        config.check()?;
        let mut ram = GuestRam::new(config.ram_size);
        ram.set_single_hart(config.harts == 1);
        let mut m = Self {
            harts: Vec::new(),
            current: 0,
            turn_left: TURN,
            icount: 0,
            clock: Clock::default(),
            interp: Interp::new(usize::from(config.harts), &ram, EngineConfig::default()),
            board: Board::new(&config),
            ram,
            outputs: Vec::new(),
            halted: None,
            breaks: Breakpoints::default(),
            config,
            images,
        };
        m.boot()?;
        Ok(m)
    }

    /// Loads the images and puts the harts at their first instruction.
    fn boot(&mut self) -> Result<(), LoadError> {
        let entry = boot::load(&self.config, &self.images, &mut self.ram)?;
        self.harts = (0..self.config.harts).map(Hart::new).collect();
        for hart in &mut self.harts {
            if entry.machine_mode {
                hart.pc = entry.pc;
                hart.x[10] = u64::from(hart.id);
                hart.x[11] = entry.a1;
                hart.x[12] = entry.a2;
            } else {
                sbi::prepare_hart(hart);
            }
        }
        if !entry.machine_mode {
            sbi::start_hart(&mut self.harts[0], entry.pc, entry.a1);
        }
        self.current = 0;
        self.turn_left = TURN;
        Ok(())
    }

    /// Back to power-on; icount and guest time go on.
    fn reset(&mut self) {
        let hit = self.ram.take_watch_hit();
        self.ram.clear();
        self.board.reset();
        // Translations and permissions of the harts before them are not those of the new ones.
        self.interp.drop_caches();
        if let Err(e) = self.boot() {
            self.halted = Some(HaltReason::GuestFault { reason: format!("reset failed: {e}") });
        }
        self.ram.put_watch_hit(hit);
    }

    /// The configuration it was made with.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The images it boots.
    #[must_use]
    pub fn images(&self) -> &BootImages {
        &self.images
    }

    /// Steps made so far.
    #[must_use]
    pub fn icount(&self) -> u64 {
        self.icount
    }

    /// Guest time now, in ticks of 100 ns.
    #[must_use]
    pub fn mtime(&self) -> u64 {
        self.clock.mtime(self.icount)
    }

    /// The clock, as the log's encoder and decoder start from it.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Why it is off, if it is.
    #[must_use]
    pub fn halted(&self) -> Option<&HaltReason> {
        self.halted.as_ref()
    }

    /// The harts, for debuggers and tests.
    #[must_use]
    pub fn harts(&self) -> &[Hart] {
        &self.harts
    }

    /// The harts, for tests that set up a state.
    pub fn harts_mut(&mut self) -> &mut [Hart] {
        &mut self.harts
    }

    /// RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// RAM, for snapshots and tests.
    pub fn ram_mut(&mut self) -> &mut GuestRam {
        &mut self.ram
    }

    /// Outputs made since the last call, in order.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// Requests without an answer: what a machine going live must issue again.
    #[must_use]
    pub fn outstanding(&self) -> Vec<OutputKind> {
        self.board.outstanding()
    }

    /// See [`Board::disk_sizes`].
    #[must_use]
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.board.disk_sizes()
    }

    /// See [`Board::net_room`].
    #[must_use]
    pub fn net_room(&self, dev: u8, bytes: usize) -> NetRoom {
        self.board.net_room(dev, bytes, &self.ram)
    }

    /// See [`Board::net_offloads`].
    #[must_use]
    pub fn net_offloads(&self, dev: u8) -> Offloads {
        self.board.net_offloads(dev)
    }

    /// Earliest guest time at which a timer will fire, in ticks; `None` when no timer is set.
    #[must_use]
    pub fn next_timer(&self) -> Option<u64> {
        let now = self.mtime();
        let mut next = self.board.next_deadline();
        for hart in &self.harts {
            let timers = [
                (hart.csr.mie & irq::MTIP != 0).then(|| self.board.mtimecmp(hart.id)),
                (hart.has_stimecmp() && hart.csr.mie & irq::STIP != 0).then_some(hart.csr.stimecmp),
            ];
            for t in timers.into_iter().flatten().filter(|&t| t > now && t != u64::MAX) {
                next = Some(next.map_or(t, |n| n.min(t)));
            }
        }
        next
    }

    /// Derives each hart's interrupt lines from devices and timers.
    fn refresh_lines(&mut self) {
        let mtime = self.mtime();
        for hart in &mut self.harts {
            hart.lines = lines_of(&self.board, hart, mtime);
        }
    }

    /// Lets devices whose time has come act. Idempotent at one icount.
    fn settle(&mut self) {
        let mtime = self.mtime();
        if self.board.next_deadline().is_some_and(|at| at <= mtime) {
            let Self { board, ram, outputs, icount, .. } = self;
            board.poll(&mut BusCtx { ram, icount: *icount, mtime, outputs });
        }
    }

    /// Chooses the hart to run, and says whether a turn begins; `None` when all wait.
    fn choose_hart(&self) -> Option<(usize, bool)> {
        let runnable = |h: &Hart| h.state == HartState::Started && (!h.waiting || h.wakes());
        if self.turn_left == 0 || !runnable(&self.harts[self.current]) {
            let n = self.harts.len();
            let next =
                (1..=n).map(|i| (self.current + i) % n).find(|&i| runnable(&self.harts[i]))?;
            return Some((next, true));
        }
        Some((self.current, false))
    }

    /// Whether the hart's next step is that of an instruction at a breakpoint.
    fn is_at_breakpoint(&self, hart: usize) -> bool {
        !self.breaks.is_empty()
            && self.breaks.is_at(self.harts[hart].pc)
            && self.harts[hart].pending_interrupt().is_none()
    }

    /// The hart that makes the next step, if that is one at a breakpoint: what [`Exit::Breakpoint`] would say here, if this
    /// were not the first step of a run.
    pub fn breakpoint_ahead(&mut self) -> Option<u8> {
        if self.halted.is_some() {
            return None;
        }
        self.settle();
        self.refresh_lines();
        let (h, _) = self.choose_hart()?;
        self.is_at_breakpoint(h).then_some(self.harts[h].id)
    }

    /// The guest physical address that a hart has at a virtual one, as fetches see it: no permission but the valid bit is
    /// looked at, and nothing changes, no accessed bit either. Who stops in firmware, where addresses are physical, wants to
    /// find the supervisor's all the same: in M-mode what is not RAM is looked up as in S-mode first.
    #[must_use]
    pub fn debug_translate(&self, hart: usize, va: u64) -> Option<u64> {
        let hart = self.harts.get(hart)?;
        if hart.mode != Mode::Machine {
            return mmu::peek(&self.ram, hart.csr.satp, va);
        }
        let is_ram = self.ram.offset(va, 1).is_some();
        let found = if is_ram { None } else { mmu::peek(&self.ram, hart.csr.satp, va) };
        Some(found.unwrap_or(va))
    }

    /// Has runs stop behind accesses to these places, and to no others.
    pub fn set_watchpoints(&mut self, points: &[Watchpoint]) {
        self.ram.set_watchpoints(points);
        self.interp.drop_translations();
    }

    /// The first write to a watched place that a device made since the last call or the last run: what [`Self::apply`] came
    /// to, which no run tells of.
    pub fn take_watch_hit(&mut self) -> Option<WatchHit> {
        self.ram.take_watch_hit()
    }

    /// Has runs stop before instructions at these virtual addresses, and at no others.
    pub fn set_breakpoints(&mut self, virtual_addresses: &BTreeSet<u64>) {
        if self.breaks.set(virtual_addresses) {
            self.interp.drop_translations();
        }
    }

    /// Steps from here to the next timer of hart `h`, at least 1.
    fn steps_to_timer(&self, h: usize) -> u64 {
        let hart = &self.harts[h];
        let mut steps = u64::MAX;
        let stimecmp = hart.has_stimecmp().then_some(hart.csr.stimecmp);
        let timers = [Some(self.board.mtimecmp(hart.id)), stimecmp, self.board.next_deadline()];
        let now = self.mtime();
        for t in timers.into_iter().flatten().filter(|&t| t > now) {
            if let Some(at) = self.clock.icount_at(t) {
                steps = steps.min(at.saturating_sub(self.icount).max(1));
            }
        }
        steps
    }

    /// Runs until icount is exactly `until`, or for another reason of [`Exit`] before that. `stop` is looked at every few
    /// thousand steps.
    pub fn run(&mut self, until: u64, stop: &AtomicBool) -> Exit {
        let start = self.icount;
        self.ram.put_watch_hit(None);
        loop {
            if self.halted.is_some() {
                return Exit::Halted;
            }
            if self.icount >= until {
                return Exit::Reached;
            }
            if self.icount != start && stop.load(Ordering::Relaxed) {
                return Exit::Stopped;
            }
            self.settle();
            self.refresh_lines();
            let Some((h, is_new_turn)) = self.choose_hart() else { return Exit::Idle };
            if self.icount != start && self.is_at_breakpoint(h) {
                return Exit::Breakpoint { hart: self.harts[h].id };
            }
            if is_new_turn {
                self.current = h;
                self.turn_left = TURN;
            }
            self.harts[h].waiting = false;
            if let Some(number) = self.harts[h].pending_interrupt() {
                self.harts[h].take_interrupt(number);
                self.harts[h].steps = self.harts[h].steps.wrapping_add(1);
                self.icount += 1;
                if self.harts.len() > 1 {
                    self.turn_left -= 1;
                }
                continue;
            }
            let turn = if self.harts.len() > 1 { self.turn_left } else { u64::MAX };
            let budget = (until - self.icount).min(turn).min(self.steps_to_timer(h));
            let end = self.run_hart(h, budget, stop);
            let hart = self.harts[h].id;
            if let Some(WatchHit { gpa, is_write }) = self.ram.take_watch_hit() {
                return Exit::Watchpoint { hart, gpa, is_write };
            }
            if end == RunEnd::Breakpoint {
                return Exit::Breakpoint { hart };
            }
            if self.outputs.iter().any(|o| o.kind.is_urgent()) {
                return Exit::Output;
            }
        }
    }

    fn run_hart(&mut self, h: usize, budget: u64, stop: &AtomicBool) -> RunEnd {
        let smp = self.harts.len() > 1;
        let mut bus = Bus {
            ram: &mut self.ram,
            board: &mut self.board,
            outputs: &mut self.outputs,
            clock: self.clock,
            icount: self.icount,
            sbi: self.images.bios.is_none(),
            smp,
            stop,
            breaks: &self.breaks,
        };
        let (steps, end) = self.interp.run(&mut self.harts[h], &mut bus, budget);
        self.icount += steps;
        if smp {
            self.turn_left -= steps;
        }
        let request = match end {
            RunEnd::SbiCall => {
                let started = self.harts_started();
                let request = sbi::call(&mut self.harts, h, &self.ram);
                if self.harts_started() != started {
                    // A hart that starts anew has no translation; those of its last life are in its TLB.
                    self.interp.drop_caches();
                }
                request
            }
            RunEnd::Yield => {
                self.turn_left = 0;
                SbiRequest::None
            }
            RunEnd::Budget | RunEnd::Breakpoint => return end,
            RunEnd::Attention => SbiRequest::None,
        };
        match (request, self.board.take_request()) {
            (SbiRequest::Output(kind), _) => {
                self.outputs.push(Output { icount: self.icount, kind })
            }
            (SbiRequest::PowerOff(code), _) | (_, Some(BoardRequest::PowerOff { code })) => {
                self.halted = Some(HaltReason::PowerOff { code });
            }
            (SbiRequest::Reset, _) | (_, Some(BoardRequest::Reset)) => self.reset(),
            (SbiRequest::None, None) => {}
        }
        end
    }

    fn harts_started(&self) -> usize {
        self.harts.iter().filter(|h| h.state == HartState::Started).count()
    }

    /// Applies an input here.
    ///
    /// # Errors
    /// [`ApplyError`] when it names a device or request that does not exist; nothing has changed then.
    pub fn apply(&mut self, input: &Input) -> Result<(), ApplyError> {
        self.settle();
        match input {
            Input::Clock { mtime, rate } => {
                self.clock.set(self.icount, *mtime, *rate);
                self.settle();
            }
            Input::PowerOff => self.halted = Some(HaltReason::Operator),
            _ => {
                let mtime = self.mtime();
                let Self { board, ram, outputs, icount, .. } = self;
                board.apply(input, &mut BusCtx { ram, icount: *icount, mtime, outputs })?;
            }
        }
        Ok(())
    }

    /// Hash of everything that the guest can see and everything that decides its future.
    pub fn digest(&mut self) -> u64 {
        let memory = self.ram.digest();
        let bytes = postcard::to_stdvec(&self.save()).expect("saved state is plain data");
        xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, memory)
    }

    /// Saves everything but RAM and the images.
    pub fn save(&mut self) -> MachineSaved {
        self.settle();
        MachineSaved {
            model: MODEL_VERSION,
            config: self.config.clone(),
            icount: self.icount,
            clock: self.clock,
            current: self.current as u8,
            turn_left: self.turn_left,
            harts: self.harts.iter().map(Hart::save).collect(),
            board: self.board.save(),
            halted: self.halted.clone(),
        }
    }

    /// A machine from its saved state, with RAM still all zero: [`Self::load_page`] fills it.
    ///
    /// # Errors
    /// [`RestoreError`] with one line for people.
    pub fn restore(saved: &MachineSaved, images: BootImages) -> Result<Self, RestoreError> {
        if saved.model != MODEL_VERSION {
            return Err(RestoreError::Version { found: saved.model });
        }
        saved.config.check()?;
        let harts = load_harts(saved)?;
        let mut ram = GuestRam::new(saved.config.ram_size);
        ram.set_single_hart(harts.len() == 1);
        Ok(Self {
            interp: Interp::new(harts.len(), &ram, EngineConfig::default()),
            board: board::Board::load(&saved.config, &saved.board)?,
            harts,
            current: usize::from(saved.current),
            turn_left: saved.turn_left.min(TURN),
            icount: saved.icount,
            clock: saved.clock,
            ram,
            outputs: Vec::new(),
            halted: saved.halted.clone(),
            breaks: Breakpoints::default(),
            config: saved.config.clone(),
            images,
        })
    }

    /// Takes the machine itself back, or forth, to a saved state: `pages` are those whose contents are others there. An undo
    /// log of RAM begins anew from there. Outputs are dropped; what the engine knows of code that is the same stays.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is not one of this machine; nothing has changed then.
    pub fn rewind(
        &mut self,
        saved: &MachineSaved,
        pages: &[SnapshotPage],
    ) -> Result<(), RestoreError> {
        if saved.model != MODEL_VERSION {
            return Err(RestoreError::Version { found: saved.model });
        }
        if saved.config != self.config {
            return Err(RestoreError::OtherMachine);
        }
        let is_whole = |p: &SnapshotPage| {
            p.page < self.ram.pages() && p.data.as_ref().is_none_or(|d| d.len() == PAGE_SIZE)
        };
        if let Some(wrong) = pages.iter().find(|&page| !is_whole(page)) {
            return Err(RestoreError::Page { page: wrong.page });
        }
        let harts = load_harts(saved)?;
        self.board = Board::load(&saved.config, &saved.board)?;
        self.harts = harts;
        self.ram.put_pages(pages);
        self.current = usize::from(saved.current);
        self.turn_left = saved.turn_left.min(TURN);
        self.icount = saved.icount;
        self.clock = saved.clock;
        self.halted.clone_from(&saved.halted);
        self.outputs.clear();
        self.ram.put_watch_hit(None);
        self.interp.drop_translations();
        Ok(())
    }

    /// Sets a page of a restored machine.
    ///
    /// # Errors
    /// [`OutsideRam`] when there is no such page.
    pub fn load_page(&mut self, page: u32, data: &[u8]) -> Result<(), OutsideRam> {
        self.ram.write(RAM_BASE + (u64::from(page) << PAGE_SHIFT), data)
    }

    /// Drops every cache of the engine; tests use it to show that nothing depends on them.
    pub fn drop_caches(&mut self) {
        self.interp.drop_caches();
    }

    /// Goes on with another engine, or with other settings of it, from here.
    pub fn set_engine(&mut self, config: EngineConfig) {
        self.interp.drop_caches();
        self.interp = Interp::new(self.harts.len(), &self.ram, config);
    }

    /// The engine in use.
    #[must_use]
    pub fn engine(&self) -> EngineKind {
        self.interp.kind()
    }

    /// What the engine has in memory and has done.
    #[must_use]
    pub fn engine_stats(&self) -> EngineStats {
        self.interp.stats()
    }

    /// What a CSR reads, for debuggers: as in M-mode, whatever mode the hart is in. `None` when there is no such register.
    #[must_use]
    pub fn peek_csr(&self, hart: usize, csr: u16) -> Option<u64> {
        let mut seen = self.harts.get(hart)?.clone();
        let env = CsrEnv { mtime: self.mtime(), steps: seen.steps };
        // Derived when the hart next runs, so that what is in it may be of any moment before.
        seen.lines = lines_of(&self.board, &seen, env.mtime);
        seen.mode = Mode::Machine;
        if matches!(csr, 1..=3) {
            seen.csr.mstatus |= mstatus::FS;
        }
        seen.read_csr(csr, false, env).ok()
    }

    /// Privilege mode of a hart, for status displays.
    #[must_use]
    pub fn mode(&self, hart: usize) -> Option<Mode> {
        self.harts.get(hart).map(|h| h.mode)
    }
}

/// A hart's interrupt lines at guest time `mtime`.
#[inline]
fn lines_of(board: &Board, hart: &Hart, mtime: u64) -> u64 {
    let lines = board.irq_lines(hart.id);
    (if lines.meip { irq::MEIP } else { 0 })
        | if lines.seip { irq::SEIP } else { 0 }
        | if lines.msip { irq::MSIP } else { 0 }
        | if mtime >= board.mtimecmp(hart.id) { irq::MTIP } else { 0 }
        | if hart.has_stimecmp() && mtime >= hart.csr.stimecmp { irq::STIP } else { 0 }
}

fn load_harts(saved: &MachineSaved) -> Result<Vec<Hart>, RestoreError> {
    let harts: Option<Vec<Hart>> =
        (0..).zip(&saved.harts).map(|(id, h)| Hart::load(id, h)).collect();
    harts
        .filter(|h| h.len() == usize::from(saved.config.harts))
        .filter(|h| usize::from(saved.current) < h.len())
        .ok_or(RestoreError::Harts)
}

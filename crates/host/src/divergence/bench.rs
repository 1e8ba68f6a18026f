//! A recorded machine on the bench: run from one state in several manners, and taken back each time.
//!
//! # Invariants
//! - INV-ENGINEPAIR-1: what an engine does from the base on is a function of base, manner and goal: engines begin with nothing
//!   translated, whatever was tried before.
//! - INV-TRIAL-2: between two trials the machine stands at the base.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use machine::engine::{EngineConfig, EngineKind};
use machine::hart::{Hart, Mode, cause};
use machine::io::{Input, Output};
use machine::ram::{PAGE_SIZE, SnapshotPage};
use machine::{Machine, MachineSaved};
use serde::Serialize;

use super::compare::{hex, hex_option};
use crate::recording::{
    Mark, Observer, OpenRecordingError, Player, Ran, RecordingDir, ReplayEnd, merged,
};

/// How a machine is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Manner {
    /// On the interpreter.
    Interpreter,
    /// On the JIT, as VMs are.
    Jit,
    /// On the JIT, with everything translated before it runs for the first time.
    JitAtOnce,
    /// The same, with each instruction translated by itself: wherever a run ends, no step of it was interpreted.
    JitSingly,
}

impl Manner {
    /// The usual one of an engine.
    #[must_use]
    pub fn of(engine: EngineKind) -> Self {
        match engine {
            EngineKind::Interpreter => Self::Interpreter,
            EngineKind::Jit => Self::Jit,
        }
    }

    /// The engine.
    #[must_use]
    pub fn engine(self) -> EngineKind {
        match self {
            Self::Interpreter => EngineKind::Interpreter,
            Self::Jit | Self::JitAtOnce | Self::JitSingly => EngineKind::Jit,
        }
    }

    fn config(self) -> EngineConfig {
        let usual = EngineConfig::new(self.engine());
        match self {
            Self::Interpreter | Self::Jit => usual,
            Self::JitAtOnce => EngineConfig { hot_after: 0, ..usual },
            Self::JitSingly => EngineConfig { hot_after: 0, block_max: 1, ..usual },
        }
    }
}

impl std::fmt::Display for Manner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Interpreter => "interpreter",
            Self::Jit => "jit",
            Self::JitAtOnce => "jit, all translated at once",
            Self::JitSingly => "jit, each instruction translated by itself",
        })
    }
}

/// Where a trial ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// Before what the log has for a step.
    Step(u64),
    /// Behind the next digest of the log.
    Digest,
    /// At the end of the log.
    End,
}

/// Where a trial came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arrival {
    pub(super) icount: u64,
    pub(super) digest: u64,
    /// How the replay ended, unless it came to its goal.
    pub(super) end: Option<ReplayEnd>,
}

impl Arrival {
    /// Whether the machine is in the same state.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.icount, self.digest) == (other.icount, other.digest)
    }

    /// Whether nothing in the log says that the machine is another one.
    pub(super) fn agrees(&self) -> bool {
        !matches!(self.end, Some(ReplayEnd::Diverged { .. }))
    }
}

/// What a replay from the beginning came to.
#[derive(Debug)]
pub(super) struct Followed {
    pub(super) arrival: Arrival,
    /// Digests that were right.
    pub(super) rights: u64,
    /// What lies between the base and where it came to.
    pub(super) goal: Goal,
    /// The machine there.
    pub(super) view: View,
}

/// A step of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Steps that the machine has made before.
    pub icount: u64,
    /// The hart that makes it.
    pub hart: usize,
    /// Address of the instruction.
    #[serde(serialize_with = "hex")]
    pub pc: u64,
    /// The instruction, unless it cannot be fetched.
    #[serde(serialize_with = "hex_option")]
    pub raw: Option<u64>,
    /// Its text.
    pub text: String,
    /// The cause, if a trap is taken instead.
    #[serde(serialize_with = "hex_option", skip_serializing_if = "Option::is_none")]
    pub trap: Option<u64>,
}

/// The state of a machine, as far as it may differ from the base.
#[derive(Debug)]
pub(super) struct View {
    pub(super) saved: MachineSaved,
    /// Pages that were written, as they are and as they were at the base; none: all zero.
    pages: BTreeMap<u32, [Contents; 2]>,
}

/// A page; none: all zero.
type Contents = Option<Box<[u8]>>;

impl View {
    /// Pages that either has written, with what they hold in the one and in the other.
    pub(super) fn pages<'a>(
        &'a self,
        other: &'a Self,
    ) -> impl Iterator<Item = (u32, &'a [u8], &'a [u8])> {
        let numbers: std::collections::BTreeSet<u32> =
            self.pages.keys().chain(other.pages.keys()).copied().collect();
        numbers.into_iter().map(move |page| {
            let here = self.pages.get(&page).map(|[now, _]| now);
            let there = other.pages.get(&page).map(|[now, _]| now);
            let before = |view: &'a Self| view.pages.get(&page).map(|[_, before]| before);
            let here = here.or_else(|| before(other));
            let there = there.or_else(|| before(self));
            (page, bytes(here), bytes(there))
        })
    }
}

fn bytes(contents: Option<&Contents>) -> &[u8] {
    const ZERO: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    contents.and_then(|page| page.as_deref()).unwrap_or(&ZERO)
}

/// Looks at nothing that crosses the machine's border.
struct Nobody;

impl Observer for Nobody {
    fn output(&mut self, _: u64, _: &Output) {}
    fn input(&mut self, _: u64, _: u64, _: &Input) {}
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Bench {
    player: Player,
    base: Mark,
    never: AtomicBool,
}

impl Bench {
    /// The machine at the latest beginning of a segment that is not after `start`; that is the base.
    ///
    /// # Errors
    /// [`OpenRecordingError`].
    pub(super) fn open(
        recording: &Arc<RecordingDir>,
        start: u64,
    ) -> Result<Self, OpenRecordingError> {
        let mut player = Player::open(recording, start, None)?;
        player.machine_mut().ram_mut().begin_undo();
        let base = player.mark();
        Ok(Self { player, base, never: AtomicBool::new(false) })
    }

    /// Step of the base.
    pub(super) fn icount(&self) -> u64 {
        self.base.saved.icount
    }

    /// State of the base, but for memory.
    pub(super) fn saved(&self) -> &MachineSaved {
        &self.base.saved
    }

    /// The machine, which stands at the base.
    pub(super) fn machine(&self) -> &Machine {
        self.player.machine()
    }

    fn run(&mut self, goal: Goal) -> Ran {
        match goal {
            Goal::Step(step) => self.player.run(step, &self.never, &mut Nobody),
            Goal::Digest => self.player.run_to_digest(&self.never, &mut Nobody),
            Goal::End => self.player.run(u64::MAX, &self.never, &mut Nobody),
        }
    }

    fn arrival(&mut self, ran: Ran) -> Arrival {
        let end = match ran {
            Ran::End(end) => Some(end),
            Ran::Reached | Ran::Interrupted | Ran::Breakpoint { .. } | Ran::Watchpoint { .. } => {
                None
            }
        };
        let machine = self.player.machine_mut();
        Arrival { icount: machine.icount(), digest: machine.digest(), end }
    }

    fn back(&mut self) {
        let undo = self.take_undo();
        self.player.back_to(&self.base, &undo);
    }

    /// Runs from the base on, and comes back.
    pub(super) fn try_out(&mut self, manner: Manner, goal: Goal) -> Arrival {
        self.player.machine_mut().set_engine(manner.config());
        let ran = self.run(goal);
        let arrival = self.arrival(ran);
        self.back();
        arrival
    }

    /// As [`Self::try_out`], with a look at the machine there.
    pub(super) fn view(&mut self, manner: Manner, goal: Goal) -> (Arrival, View) {
        self.player.machine_mut().set_engine(manner.config());
        let ran = self.run(goal);
        let arrival = self.arrival(ran);
        let undo = self.take_undo();
        let view = self.view_of(&undo);
        self.player.back_to(&self.base, &undo);
        (arrival, view)
    }

    /// Runs from the base on to where the replay ends, and leaves the machine there.
    pub(super) fn go_to_end(&mut self, manner: Manner) -> Arrival {
        self.player.machine_mut().set_engine(manner.config());
        let ran = self.run(Goal::End);
        self.arrival(ran)
    }

    /// Runs from digest to digest for as long as they are right. The base is then behind the last right one before where that
    /// came to, as far as there is one. `told` hears of each digest.
    pub(super) fn follow(&mut self, manner: Manner, told: &mut dyn FnMut(u64)) -> Followed {
        self.player.machine_mut().set_engine(manner.config());
        let mut rights = 0;
        // The digest before the base, and what pages held there that were written until the base.
        let mut before: Option<(Mark, Vec<SnapshotPage>)> = None;
        let ran = loop {
            match self.run(Goal::Digest) {
                Ran::Reached => {
                    rights += 1;
                    told(self.player.icount());
                    let undo = self.take_undo();
                    let mark = self.player.mark();
                    before = Some((std::mem::replace(&mut self.base, mark), undo));
                }
                other => break other,
            }
        };
        let arrival = self.arrival(ran);
        let mut undo = self.take_undo();
        let mut goal = Goal::Digest;
        if arrival.agrees() {
            goal = Goal::End;
            if let Some((mark, earlier)) = before {
                self.base = mark;
                undo = merged(earlier, undo);
            }
        }
        let view = self.view_of(&undo);
        self.player.back_to(&self.base, &undo);
        Followed { arrival, rights, goal, view }
    }

    /// What pages held that were written since the undo log began, by page.
    fn take_undo(&mut self) -> Vec<SnapshotPage> {
        let mut undo = self.player.machine_mut().ram_mut().take_undo();
        undo.sort_by_key(|page| page.page);
        undo
    }

    /// The machine as it is; `undo` is of what differs from the base.
    fn view_of(&mut self, undo: &[SnapshotPage]) -> View {
        let saved = self.player.machine_mut().save();
        let all = self.player.machine().ram().bytes();
        let now = |page: u32| {
            let first = page as usize * PAGE_SIZE;
            let data = &all[first..first + PAGE_SIZE];
            (!machine::ram::is_zero(data)).then(|| data.into())
        };
        let pages = undo.iter().map(|p| (p.page, [now(p.page), p.data.clone()])).collect();
        View { saved, pages }
    }

    /// Makes the state at a later step the base, as `manner` comes there. With what it takes to go back.
    pub(super) fn advance(&mut self, manner: Manner, step: u64) -> Before {
        self.player.machine_mut().set_engine(manner.config());
        // Where it cannot come to is found out by who compares.
        drop(self.run(Goal::Step(step)));
        let undo = self.take_undo();
        let mark = self.player.mark();
        Before { mark: std::mem::replace(&mut self.base, mark), undo }
    }

    /// Undoes an [`Self::advance`].
    pub(super) fn retreat(&mut self, before: Before) {
        self.base = before.mark;
        let undo = merged(before.undo, self.take_undo());
        self.player.back_to(&self.base, &undo);
    }

    /// Whether this host can run it so.
    pub(super) fn can_have(&mut self, manner: Manner) -> bool {
        let machine = self.player.machine_mut();
        machine.set_engine(manner.config());
        machine.engine() == manner.engine()
    }

    /// The machine where it stands, but for memory.
    pub(super) fn save(&mut self) -> MachineSaved {
        self.player.machine_mut().save()
    }

    /// The last of the steps from the base to `to` that changes what `probe` sees, as a manner makes them.
    pub(super) fn last_change(
        &mut self,
        manner: Manner,
        to: u64,
        probe: &dyn Fn(&Machine) -> Option<u64>,
    ) -> Option<u64> {
        self.player.machine_mut().set_engine(manner.config());
        let (mut last, mut seen) = (None, probe(self.player.machine()));
        for icount in self.icount()..to {
            if self.run(Goal::Step(icount + 1)) != Ran::Reached {
                break;
            }
            let now = probe(self.player.machine());
            if std::mem::replace(&mut seen, now) != now {
                last = Some(icount);
            }
        }
        self.back();
        last
    }

    /// The steps from `from` to `to`, as a manner makes them; `from` is not before the base.
    pub(super) fn trace(&mut self, manner: Manner, from: u64, to: u64) -> Vec<Step> {
        self.player.machine_mut().set_engine(manner.config());
        drop(self.run(Goal::Step(from)));
        let mut steps = Vec::new();
        for icount in from..to {
            let before = self.player.machine().harts().to_vec();
            let code: Vec<_> =
                before.iter().enumerate().map(|(at, h)| self.code_at(at, h.pc)).collect();
            if self.run(Goal::Step(icount + 1)) != Ran::Reached {
                break;
            }
            let after = self.player.machine().harts();
            let ran = before.iter().zip(after).position(|(a, b)| a.steps != b.steps);
            let Some(hart) = ran else { continue };
            let pc = before[hart].pc;
            let raw = code[hart];
            let text = match raw {
                Some(raw) => machine::debug::disassemble(pc, raw).1,
                None => "cannot be fetched".to_owned(),
            };
            let trap = trap_of(&before[hart], &after[hart]);
            steps.push(Step { icount, hart, pc, raw: raw.map(u64::from), text, trap });
        }
        self.back();
        steps
    }

    /// The instruction at an address; of a compressed one the low half.
    fn code_at(&self, hart: usize, pc: u64) -> Option<u32> {
        let machine = self.player.machine();
        let half = |va| {
            let gpa = machine.debug_translate(hart, va)?;
            machine.ram().read_u16(gpa).ok().map(u32::from)
        };
        let low = half(pc)?;
        if low & 3 != 3 {
            return Some(low);
        }
        Some(low | half(pc.wrapping_add(2))? << 16)
    }
}

/// An earlier base.
#[derive(Debug)]
pub(super) struct Before {
    mark: Mark,
    undo: Vec<SnapshotPage>,
}

/// The cause, if what a hart did was to take a trap.
fn trap_of(before: &Hart, after: &Hart) -> Option<u64> {
    let to = |tvec: u64, cause: u64| {
        let is_vectored = tvec & 3 == 1 && cause & cause::INTERRUPT != 0;
        (tvec & !3).wrapping_add(if is_vectored { (cause & !cause::INTERRUPT) * 4 } else { 0 })
    };
    let (csr, mode) = (&after.csr, after.mode);
    if before.csr == *csr {
        return None;
    }
    let levels = [
        (Mode::Machine, csr.mepc, csr.mtvec, csr.mcause),
        (Mode::Supervisor, csr.sepc, csr.stvec, csr.scause),
    ];
    let taken = levels.into_iter().find(|(level, epc, tvec, cause)| {
        mode == *level && *epc == before.pc && after.pc == to(*tvec, *cause)
    });
    taken.map(|(.., cause)| cause)
}

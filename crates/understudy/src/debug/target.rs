//! A recording as GDB's target: what the protocol's crate asks of it.
//!
//! # Place
//! Called by the session, on its thread, packet by packet.
//!
//! # Invariants
//! - INV-GDB-3: nothing that a client sends changes the machine. It moves along the recording, and nothing else.
//!
//! # Failure
//! What a client asks for and cannot be had is answered with an error number.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadResumeOps, MultiThreadSchedulerLocking, MultiThreadSchedulerLockingOps,
    MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{
    ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::riscv::reg::RiscvCoreRegs;
use host::recording::{Timeline, Watch};

use super::memory::{self, Space};
use super::moves::Pace;
use super::registers::{self, Register, Rv64};
use super::{harts, monitor};

/// Errors that the protocol names by number.
pub(crate) const EPERM: u8 = 1;
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// What to do when the target is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Move {
    /// On to the next stop.
    Continue,
    /// One step of a hart.
    Step(usize),
    /// Steps of a hart while it stays in a range of addresses.
    Range(usize, u64, u64),
    /// Back to the stop before.
    ReverseContinue,
    /// Back by one step of the hart that the client named for it, or else of the one that it looks at.
    ReverseStep,
}

/// The recording under study, and what the client has set.
#[derive(Debug)]
pub(crate) struct Debuggee {
    pub(crate) timeline: Timeline,
    /// Set while the client wants a running target to stop.
    pub(crate) interrupt: Arc<AtomicBool>,
    /// Addresses are physical.
    pub(crate) is_physical: bool,
    pub(crate) next: Move,
    /// The hart that the client looks at: that of the last stop, or the one that it has chosen since.
    pub(crate) hart: usize,
    /// The hart that the client named for its moves.
    pub(crate) moving: Option<usize>,
    pub(crate) software: BTreeSet<u64>,
    pub(crate) hardware: BTreeSet<u64>,
    pub(crate) watched: Vec<Watch>,
    pub(crate) pace: Pace,
    description: String,
}

/// The thread that GDB knows a hart as.
pub(crate) fn thread_of(hart: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(hart)
}

impl Debuggee {
    /// At the present position of `timeline`.
    pub(crate) fn new(timeline: Timeline) -> Self {
        Self {
            timeline,
            interrupt: Arc::default(),
            is_physical: false,
            next: Move::Continue,
            hart: 0,
            moving: None,
            software: BTreeSet::new(),
            hardware: BTreeSet::new(),
            watched: Vec::new(),
            pace: Pace::default(),
            description: registers::description(),
        }
    }

    /// For the next client: where the last one left, with nothing set.
    pub(crate) fn forget_client(&mut self) {
        self.interrupt = Arc::default();
        self.is_physical = false;
        self.moving = None;
        self.software.clear();
        self.hardware.clear();
        self.watched.clear();
    }

    /// The hart that a thread stands for; one that the client made up is the one it last looked at.
    pub(crate) fn hart_of(&self, thread: Tid) -> usize {
        let hart = thread.get() - 1;
        if hart < self.timeline.machine().harts().len() { hart } else { self.hart }
    }

    fn space(&self, hart: usize) -> Space {
        if self.is_physical { Space::Physical } else { Space::Virtual(hart) }
    }

    fn set_watch(&mut self, va: u64, len: u64, kind: WatchKind) -> bool {
        let watch = Watch { hart: self.space(self.hart).hart(), va, len, kind: kind_of(kind) };
        let is_possible = len > 0 && va.checked_add(len).is_some();
        if is_possible && !self.watched.contains(&watch) {
            self.watched.push(watch);
        }
        is_possible
    }
}

/// A kind of watchpoint in the machine's terms.
fn kind_of(kind: WatchKind) -> machine::debug::WatchKind {
    match kind {
        WatchKind::Write => machine::debug::WatchKind::Write,
        WatchKind::Read => machine::debug::WatchKind::Read,
        WatchKind::ReadWrite => machine::debug::WatchKind::Access,
    }
}

impl Target for Debuggee {
    type Arch = Rv64;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Rv64, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }

    fn use_x_upcase_packet(&self) -> bool {
        false
    }

    fn use_lldb_register_info(&self) -> bool {
        false
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(
        &mut self,
        registers: &mut RiscvCoreRegs<u64>,
        thread: Tid,
    ) -> TargetResult<(), Self> {
        let core = registers::core(self.timeline.machine(), self.hart_of(thread));
        *registers = core.ok_or(TargetError::Errno(EINVAL))?;
        Ok(())
    }

    fn write_registers(&mut self, _: &RiscvCoreRegs<u64>, _: Tid) -> TargetResult<(), Self> {
        Err(TargetError::Errno(EPERM))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, at: u64, data: &mut [u8], thread: Tid) -> TargetResult<usize, Self> {
        let space = self.space(self.hart_of(thread));
        match memory::read(self.timeline.machine(), space, at, data) {
            0 if !data.is_empty() => Err(TargetError::Errno(EFAULT)),
            len => Ok(len),
        }
    }

    fn write_addrs(&mut self, _: u64, _: &[u8], _: Tid) -> TargetResult<(), Self> {
        Err(TargetError::Errno(EPERM))
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        (0..self.timeline.machine().harts().len()).map(thread_of).for_each(each);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(
        &mut self,
        thread: Tid,
        register: Register,
        data: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let value = registers::read(self.timeline.machine(), self.hart_of(thread), register);
        let bytes = value.ok_or(TargetError::Errno(EINVAL))?.to_le_bytes();
        data.get_mut(..bytes.len()).ok_or(TargetError::Errno(EINVAL))?.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, _: Tid, _: Register, _: &[u8]) -> TargetResult<(), Self> {
        Err(TargetError::Errno(EPERM))
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.next = Move::Continue;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, _: Tid, _: Option<Signal>) -> Result<(), Infallible> {
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, Tid, Self>> {
        Some(self)
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, Tid, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, thread: Tid, _: Option<Signal>) -> Result<(), Infallible> {
        self.next = Move::Step(self.hart_of(thread));
        Ok(())
    }
}

impl MultiThreadRangeStepping for Debuggee {
    fn set_resume_action_range_step(
        &mut self,
        thread: Tid,
        start: u64,
        end: u64,
    ) -> Result<(), Infallible> {
        self.next = Move::Range(self.hart_of(thread), start, end);
        Ok(())
    }
}

/// The past cannot be told which harts to run: all of them do as they did.
impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl ReverseStep<Tid> for Debuggee {
    fn reverse_step(&mut self, _: Tid) -> Result<(), Infallible> {
        // The crate would take the first thread for any thread.
        self.next = Move::ReverseStep;
        Ok(())
    }
}

impl ReverseCont<Tid> for Debuggee {
    fn reverse_cont(&mut self) -> Result<(), Infallible> {
        self.next = Move::ReverseContinue;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        self.software.insert(at);
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.software.remove(&at))
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        self.hardware.insert(at);
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.hardware.remove(&at))
    }
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(
        &mut self,
        at: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(self.set_watch(at, len, kind))
    }

    fn remove_hw_watchpoint(
        &mut self,
        at: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let before = self.watched.len();
        self.watched.retain(|w| (w.va, w.len, w.kind) != (at, len, kind_of(kind)));
        Ok(self.watched.len() < before)
    }
}

impl MonitorCmd for Debuggee {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Infallible> {
        let text = monitor::run(self, &String::from_utf8_lossy(command));
        for line in text.split_inclusive('\n') {
            out.write_raw(line.as_bytes());
            out.flush();
        }
        Ok(())
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, thread: Tid, data: &mut [u8]) -> Result<usize, Infallible> {
        let text = harts::describe(self.timeline.machine(), self.hart_of(thread));
        let len = text.len().min(data.len());
        data[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl TargetDescriptionXmlOverride for Debuggee {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        data: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::Errno(EINVAL));
        }
        let rest =
            usize::try_from(offset).ok().and_then(|at| self.description.as_bytes().get(at..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(length).min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

//! Moves along the recording that GDB asks for, and the stops that they lead to in its terms.
//!
//! # Place
//! Called by the session while GDB waits for the target to stop.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use gdbstub::common::Signal;
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::reverse_exec::ReplayLogPosition;
use gdbstub::target::ext::breakpoints;
use host::recording::{ReplayEnd, Stop, When};
use machine::debug::WatchKind;

use super::memory::{self, Space};
use super::target::{Debuggee, Move, thread_of};

/// How fast the machine last ran on.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace {
    steps: u64,
    time: Duration,
}

impl Pace {
    /// Steps in a second, when there is something to say.
    pub(crate) fn steps_per_second(self) -> Option<f64> {
        (!self.time.is_zero()).then(|| self.steps as f64 / self.time.as_secs_f64())
    }
}

/// A stop for GDB, and what to show on its console before.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) reason: MultiThreadStopReason<u64>,
    pub(crate) words: String,
}

impl Debuggee {
    /// Makes the move that GDB asked for.
    pub(crate) fn go(&mut self) -> Stopped {
        let mut words = self.arm();
        let stop = match self.next {
            Move::Continue => self.run(),
            Move::Step(hart) => self.timeline.step(hart, &self.interrupt),
            Move::Range(hart, start, end) => self.step_in_range(hart, start..end),
            Move::ReverseContinue => self.timeline.reverse_resume(&self.interrupt),
            Move::ReverseStep => self.step_back(),
        };
        let stop = self.place_watch(stop);
        if let Stop::End { how } = &stop
            && *how != ReplayEnd::Whole
        {
            words.push_str(&format!("{how}\n"));
        }
        Stopped { reason: self.reason(&stop), words }
    }

    /// Steps back, and looks whether that went over an access to what is watched.
    fn step_back(&mut self) -> Stop {
        let from = self.timeline.icount();
        let hart = self.moving.unwrap_or(self.hart);
        let stop = self.timeline.reverse_step(hart, &self.interrupt);
        if self.watched.is_empty() || !matches!(stop, Stop::Done { .. }) {
            return stop;
        }
        let back = self.timeline.icount();
        self.timeline.set_breakpoints(BTreeSet::new());
        let mut last = stop;
        loop {
            match self.timeline.resume(Some(from), &self.interrupt) {
                hit @ Stop::Watchpoint { .. } => last = hit,
                Stop::Reached => break,
                other => return other,
            }
        }
        if let Stop::Done { .. } = last
            && let stop @ (Stop::Interrupted | Stop::End { .. }) =
                self.timeline.goto(back, &self.interrupt)
        {
            return stop;
        }
        last
    }

    /// GDB takes it that watchpoints of this architecture stop before the access, in whichever direction it goes, makes one
    /// more step by itself, and then compares values. So that is where the machine is taken to.
    fn place_watch(&mut self, stop: Stop) -> Stop {
        let Stop::Watchpoint { va, kind, before, .. } = stop else { return stop };
        let is_back = matches!(self.next, Move::ReverseContinue | Move::ReverseStep);
        let steps = |debuggee: &Self| -> Vec<u64> {
            debuggee.timeline.machine().harts().iter().map(|hart| hart.steps).collect()
        };
        let mut seen = Vec::new();
        let ways = if is_back { [before, before + 1] } else { [before + 1, before] };
        for icount in ways {
            match self.timeline.goto(icount, &self.interrupt) {
                Stop::Reached => seen.push(steps(self)),
                other => return other,
            }
        }
        // The hart that makes the step; of an access by a device, the one whose step comes with it.
        let hart = (0..seen[0].len()).find(|&hart| seen[0][hart] != seen[1][hart]);
        Stop::Watchpoint { hart: hart.unwrap_or(self.hart), va, kind, before }
    }

    /// Goes to a moment, or to the end of the recording that is nearer to it, without a stop at what the client has set.
    pub(crate) fn go_to(&mut self, when: When) -> Stop {
        let from = self.timeline.icount();
        let begun = Instant::now();
        let icount = self.timeline.info().position_at(when);
        let stop = self.timeline.goto(icount, &self.interrupt);
        self.note_pace(from, begun);
        stop
    }

    fn run(&mut self) -> Stop {
        let from = self.timeline.icount();
        let begun = Instant::now();
        let stop = self.timeline.resume(None, &self.interrupt);
        self.note_pace(from, begun);
        stop
    }

    fn note_pace(&mut self, from: u64, begun: Instant) {
        if let Some(steps @ 1..) = self.timeline.icount().checked_sub(from) {
            self.pace = Pace { steps, time: begun.elapsed() };
        }
    }

    /// Hands over what the client has set; says what of it cannot be had here.
    fn arm(&mut self) -> String {
        let mut words = String::new();
        self.timeline.set_breakpoints(self.software.union(&self.hardware).copied().collect());
        let machine = self.timeline.machine();
        for watch in &self.watched {
            let space = watch.hart.map_or(Space::Physical, Space::Virtual);
            if memory::translate(machine, space, watch.va).is_none() {
                words.push_str(&format!(
                    "{:#x} is not mapped here: nothing is watched there until the next stop\n",
                    watch.va
                ));
            }
        }
        self.timeline.set_watchpoints(self.watched.clone());
        words
    }

    fn step_in_range(&mut self, hart: usize, range: Range<u64>) -> Stop {
        loop {
            let stop = self.timeline.step(hart, &self.interrupt);
            let Stop::Done { .. } = stop else { return stop };
            let pc = self.timeline.machine().harts()[hart].pc;
            if self.software.contains(&pc) || self.hardware.contains(&pc) {
                return Stop::Breakpoint { hart };
            }
            if !range.contains(&pc) {
                return stop;
            }
        }
    }

    fn reason(&mut self, stop: &Stop) -> MultiThreadStopReason<u64> {
        if let Stop::Breakpoint { hart } | Stop::Watchpoint { hart, .. } | Stop::Done { hart } =
            stop
        {
            self.hart = *hart;
        }
        let thread = thread_of(self.hart);
        let signal = |signal| MultiThreadStopReason::SignalWithThread { tid: thread, signal };
        let at_end = |pos| MultiThreadStopReason::ReplayLog { tid: Some(thread), pos };
        match stop {
            Stop::Breakpoint { .. } => {
                let pc = self.timeline.machine().harts().get(self.hart).map_or(0, |hart| hart.pc);
                if self.software.contains(&pc) {
                    MultiThreadStopReason::SwBreak(thread)
                } else {
                    MultiThreadStopReason::HwBreak(thread)
                }
            }
            Stop::Watchpoint { va, kind, .. } => {
                let kind = match kind {
                    WatchKind::Write => breakpoints::WatchKind::Write,
                    WatchKind::Read => breakpoints::WatchKind::Read,
                    WatchKind::Access => breakpoints::WatchKind::ReadWrite,
                };
                MultiThreadStopReason::Watch { tid: thread, kind, addr: *va }
            }
            Stop::Done { .. } | Stop::Reached => signal(Signal::SIGTRAP),
            Stop::Interrupted => signal(Signal::SIGINT),
            Stop::Begin => at_end(ReplayLogPosition::Begin),
            Stop::End { .. } => at_end(ReplayLogPosition::End),
        }
    }
}

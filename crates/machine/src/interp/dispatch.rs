//! The JIT's dispatcher: finds generated code, has it made when a block is hot, and interprets the rest.
//!
//! # Place
//! [`super::Interp::run`] calls it instead of the interpreter's loop. Generated code calls it back, through
//! [`jit::Runtime`], for each instruction that it does not do itself.
//!
//! # Invariants
//! - INV-DISPATCH-1: whatever runs where, each instruction and each trap is one step, and nothing else is.
//! - INV-DISPATCH-2: between two entries into generated code, everything that was written or changed is looked at, as the
//!   interpreter does between two pages.
//! - INV-DISPATCH-3: generated code leaves before each step that may be one at a breakpoint; here it is found out.

use std::sync::atomic::Ordering;

use isa::{Insn, Op};
use jit::{Answer, Exit, Found, Jit, Runtime, State};

use crate::engine::EngineConfig;
use crate::hart::mstatus;
use crate::hart::{Hart, Trap};
use crate::ram::{GuestRam, PAGE_SIZE};

use super::RunEnd;
use super::mem::Stored;
use super::run::{Core, Leave, Next};

/// Steps between two looks at whether somebody wants the run to end.
const SLICE: u64 = 1 << 14;

/// A translator for harts like this one, if this host can have one.
pub(super) fn new_jit(hart: &mut Hart, ram: &GuestRam, config: EngineConfig) -> Option<Jit> {
    let mut jit = Jit::new(&hart_state(hart), ram.pages(), config.code_bytes)?;
    jit.set_counts_twice(config.counts_twice);
    jit.set_block_max(config.block_max);
    Some(jit)
}

fn hart_state(hart: &mut Hart) -> State<'_> {
    State {
        x: &mut hart.x,
        f: &mut hart.f,
        tables: &mut hart.tables,
        csrs: [
            &mut hart.csr.mstatus,
            &mut hart.csr.sscratch,
            &mut hart.csr.sepc,
            &mut hart.csr.scause,
            &mut hart.csr.stval,
            &mut hart.csr.mie,
            &mut hart.csr.mip_soft,
            &mut hart.lines,
            &mut hart.csr.fcsr,
            &mut hart.reservation_gpa,
            &mut hart.reservation_value,
        ],
    }
}

impl Core<'_, '_> {
    /// As [`Core::run`], on generated code where there is some.
    pub(super) fn run_jit(&mut self, jit: &mut Jit, budget: u64, hot_after: u8) -> RunEnd {
        // Where a run begins need not be the start of a block: what begins there is not worth code, unless all is.
        let mut is_head = hot_after == 0;
        let mut link = None;
        while self.steps < budget {
            if self.bus.stop.load(Ordering::Relaxed) && self.steps != 0 {
                return RunEnd::Attention;
            }
            self.refresh(jit);
            let pc = self.hart.pc;
            if self.is_at_breakpoint() {
                return RunEnd::Breakpoint;
            }
            let entry = match self.find_code(jit, is_head.then_some(hot_after)) {
                Ok(entry) => entry,
                Err(trap) => {
                    self.steps += 1;
                    self.trap(trap);
                    (is_head, link) = (true, None);
                    continue;
                }
            };
            is_head = true;
            let Some(entry) = entry else {
                link = None;
                if let Leave::End(end) = self.run_some::<true>(budget) {
                    return end;
                }
                continue;
            };
            if let Some(page) = jit.stops_at(&self.hart.tables, pc) {
                link = None;
                if let Some(end) = self.step_over_stop(jit, page) {
                    return end;
                }
                continue;
            }
            if let Some(link) = link.take() {
                jit.link(link, entry);
            }
            let slice = (budget - self.steps).min(SLICE);
            self.entered_budget = self.steps + slice;
            self.sync_fp();
            let (left, exit) = jit.enter(self, entry, pc, slice);
            self.steps = self.entered_budget - left;
            match exit {
                Exit::Budget { pc } => {
                    self.hart.pc = pc;
                    if self.entered_budget == budget {
                        self.sync_fp_flags();
                        return self.finish(jit, budget);
                    }
                }
                Exit::Missing { pc, link: found } => {
                    self.hart.pc = pc;
                    link = found;
                }
                Exit::Left => {
                    if let Some(end) = self.ended.take() {
                        return end;
                    }
                }
            }
            self.sync_fp_flags();
        }
        RunEnd::Budget
    }

    /// Makes the one step at which code stops, but nothing else has to.
    fn step_over_stop(&mut self, jit: &mut Jit, page: u32) -> Option<RunEnd> {
        if self.steps != 0 {
            jit.stopped_in_vain(page, self.bus.breaks.on_page(self.hart.pc));
        }
        match self.run_some::<true>(self.steps + 1) {
            Leave::Refetch | Leave::End(RunEnd::Budget) => None,
            Leave::End(end) => Some(end),
        }
    }

    /// Interprets the rest of the budget, which is less than a block.
    fn finish(&mut self, jit: &mut Jit, budget: u64) -> RunEnd {
        while self.steps < budget {
            self.refresh(jit);
            if let Leave::End(end) = self.run_some::<false>(budget) {
                return end;
            }
        }
        RunEnd::Budget
    }

    fn refresh(&mut self, jit: &mut Jit) {
        if self.bus.ram.code_was_written() {
            for page in self.bus.ram.take_code_written() {
                self.code.drop_page(page);
                jit.invalidate(page);
            }
        }
        self.tlb.sync(self.hart, self.bus.ram);
        jit.sync(&mut self.hart.tables);
    }

    /// Code for `hart.pc`, made now if it is hot.
    #[inline]
    fn find_code(
        &mut self,
        jit: &mut Jit,
        hot_after: Option<u8>,
    ) -> Result<Option<jit::Entry>, Trap> {
        let pc = self.hart.pc;
        let page = match jit.find(&self.hart.tables, pc) {
            Found::Code(entry) => return Ok(Some(entry)),
            Found::Missing(page) => page,
            Found::Unmapped => {
                let page = self.fetch_page(pc)?;
                if let Some(stops) = self.bus.breaks.on_page(pc) {
                    jit.require_stops(page, stops);
                }
                jit.map(&mut self.hart.tables, pc, page);
                if let Some(entry) = jit.entry(page, pc as u16 & 0xffe) {
                    return Ok(Some(entry));
                }
                page
            }
        };
        Ok(self.make_code(jit, page, hot_after))
    }

    /// Makes code for `hart.pc`, on this page of RAM, if it has been interpreted often enough.
    fn make_code(&mut self, jit: &mut Jit, page: u32, hot_after: Option<u8>) -> Option<jit::Entry> {
        let offset = self.hart.pc as u16 & 0xffe;
        if jit.heat(page, offset) <= hot_after? {
            return None;
        }
        let first = page as usize * PAGE_SIZE;
        let bytes = &self.bus.ram.bytes()[first..first + PAGE_SIZE];
        let (entry, end) =
            jit.translate(page, bytes, offset, self.bus.breaks.on_page(self.hart.pc));
        let start = usize::from(offset);
        if self.bus.ram.mark_code(page, start, usize::from(end).max(start + 2) - start) {
            self.writes_tracked_to(page);
        }
        jit.sync(&mut self.hart.tables);
        jit.map(&mut self.hart.tables, self.hart.pc, page);
        Some(entry)
    }

    /// Brings flags that generated code raised into `fcsr`.
    #[inline]
    fn sync_fp_flags(&mut self) {
        self.hart.csr.fcsr |= self.hart.tables.take_fp_flags();
    }

    /// Tells generated code whether it may compute floating point, and how to round.
    #[inline]
    fn sync_fp(&mut self) {
        let dirty = self.hart.csr.mstatus & mstatus::FS == mstatus::FS;
        self.hart.tables.set_fp(self.hart.csr.fcsr >> 5 & 7, dirty);
    }

    /// Executes any instruction that is not a plain computation or jump.
    fn execute_one(&mut self, insn: Insn) -> Result<Next, Trap> {
        let (len, signed) = match insn.op {
            Op::Lb => (1, true),
            Op::Lh => (2, true),
            Op::Lw => (4, true),
            Op::Ld => (8, false),
            Op::Lbu => (1, false),
            Op::Lhu => (2, false),
            Op::Lwu => (4, false),
            Op::Sb => return self.store_one(insn, 1),
            Op::Sh => return self.store_one(insn, 2),
            Op::Sw => return self.store_one(insn, 4),
            Op::Sd => return self.store_one(insn, 8),
            _ => return self.execute_rare(insn),
        };
        let va = self.hart.x[usize::from(insn.rs1 & 31)].wrapping_add(i64::from(insn.imm) as u64);
        let (mut value, device) = self.load_slow(va, len)?;
        if signed {
            let unused = 64 - 8 * len as u32;
            value = ((value << unused) as i64 >> unused) as u64;
        }
        self.hart.x[usize::from(insn.rd)] = value;
        Ok(if device { Next::Attention } else { Next::Plain })
    }

    fn store_one(&mut self, insn: Insn, len: u64) -> Result<Next, Trap> {
        let va = self.hart.x[usize::from(insn.rs1 & 31)].wrapping_add(i64::from(insn.imm) as u64);
        let value = self.hart.x[usize::from(insn.rs2 & 31)];
        Ok(match self.store_slow(va, len, value)? {
            Stored::Plain => Next::Plain,
            Stored::Refetch => Next::Refetch,
            Stored::Attention => Next::Attention,
        })
    }

    /// What follows after an instruction that ended like this; `after` is the address behind it.
    fn answer(&mut self, result: Result<Next, Trap>, after: u64) -> Answer {
        let (jumped, end) = match result {
            Ok(Next::Plain) => return Answer::Continue,
            Err(trap) => {
                self.trap(trap);
                return Answer::Jump(self.hart.pc);
            }
            Ok(Next::Jumped) => return Answer::Jump(self.hart.pc),
            Ok(Next::Refetch) => (false, None),
            Ok(Next::Attention) => (false, Some(RunEnd::Attention)),
            Ok(Next::JumpedAttention) => (true, Some(RunEnd::Attention)),
            Ok(Next::SbiCall) => (false, Some(RunEnd::SbiCall)),
            Ok(Next::Yield) => (false, Some(RunEnd::Yield)),
        };
        if !jumped {
            self.hart.pc = after;
        }
        self.ended = end;
        Answer::Leave
    }
}

impl Runtime for Core<'_, '_> {
    fn state(&mut self) -> State<'_> {
        hart_state(self.hart)
    }

    fn ram(&mut self) -> &mut [u8] {
        self.bus.ram.bytes_mut()
    }

    fn step(&mut self, insn: Option<Insn>, pc: u64, left: u64) -> Answer {
        self.steps = self.entered_budget - left;
        self.hart.pc = pc;
        self.sync_fp_flags();
        let answer = match insn {
            Some(insn) => {
                // Writes to x0 go to the sink.
                let insn = Insn { rd: if insn.rd == 0 { 32 } else { insn.rd }, ..insn };
                let result = self.execute_one(insn);
                self.answer(result, pc.wrapping_add(u64::from(insn.len)))
            }
            // It ends on the next page: the interpreter makes this one step.
            None => {
                self.steps -= 1;
                match self.run_some::<true>(self.steps + 1) {
                    Leave::Refetch | Leave::End(RunEnd::Budget)
                        if self.tlb.is_stale(self.bus.ram) =>
                    {
                        Answer::Leave
                    }
                    Leave::Refetch | Leave::End(RunEnd::Budget) => Answer::Jump(self.hart.pc),
                    Leave::End(end) => {
                        self.ended = Some(end);
                        Answer::Leave
                    }
                }
            }
        };
        self.sync_fp();
        answer
    }
}

//! The loop: fetch from a decoded page, execute, until the budget ends or something outside needs a look.

use std::sync::atomic::Ordering;

use isa::{Insn, Op};

use crate::hart::csr::{CsrEffect, CsrEnv};
use crate::hart::{Hart, Mode, Trap, cause, mstatus};

use super::code::{self, CodeCache, CodePage, Slot, marker};
use super::mem::{Stored, Tlb};
use super::{Bus, RunEnd};

/// Everything an instruction can touch.
pub(super) struct Core<'a, 'b> {
    pub(super) hart: &'a mut Hart,
    pub(super) tlb: &'a mut Tlb,
    pub(super) code: &'a mut CodeCache,
    pub(super) bus: &'a mut Bus<'b>,
    /// Steps made in this run, the present one included.
    pub(super) steps: u64,
    /// `steps` when generated code has used up the budget that it was entered with.
    pub(super) entered_budget: u64,
    /// Why generated code was left by a step.
    pub(super) ended: Option<RunEnd>,
}

/// What the loop does after leaving a page.
pub(super) enum Leave {
    /// Fetch at `hart.pc`.
    Refetch,
    /// End the run.
    End(RunEnd),
}

/// What an instruction outside the fast loop asks for.
pub(super) enum Next {
    /// The next instruction.
    Plain,
    /// Fetch at the next instruction anew.
    Refetch,
    /// End the run, `hart.pc` being the next instruction unless the instruction has set it.
    Attention,
    /// `hart.pc` is set: fetch there.
    Jumped,
    /// `hart.pc` is set: end the run.
    JumpedAttention,
    /// End the run for an SBI call.
    SbiCall,
    /// End the run, giving up the turn.
    Yield,
}

/// Steps between two looks at whether somebody wants the run to end.
const SLICE: u64 = 1 << 13;
/// Number of the CSR `satp`.
const SATP: u16 = 0x180;

#[inline(always)]
fn sext32(v: u64) -> u64 {
    v as i32 as u64
}

impl Core<'_, '_> {
    pub(super) fn run(&mut self, budget: u64) -> RunEnd {
        while self.steps < budget {
            if self.bus.stop.load(Ordering::Relaxed) && self.steps != 0 {
                return RunEnd::Attention;
            }
            if self.bus.ram.code_was_written() {
                for page in self.bus.ram.take_code_written() {
                    self.code.drop_page(page);
                }
            }
            self.tlb.sync(self.hart, self.bus.ram);
            let slice = budget.min(self.steps + SLICE);
            match self.run_some::<false>(slice) {
                Leave::Refetch | Leave::End(RunEnd::Budget) => {}
                Leave::End(end) => return end,
            }
        }
        RunEnd::Budget
    }

    /// Interprets from `hart.pc` to the end of the page or, with `BLOCK`, to the next jump.
    pub(super) fn run_some<const BLOCK: bool>(&mut self, budget: u64) -> Leave {
        let page = match self.fetch_page(self.hart.pc) {
            Ok(page) => page,
            Err(_) if self.is_at_breakpoint() => return Leave::End(RunEnd::Breakpoint),
            Err(trap) => {
                self.steps += 1;
                self.trap(trap);
                return Leave::Refetch;
            }
        };
        let index = self.code.index(page);
        let mut page = self.code.take(index);
        if let Some(stops) = self.bus.breaks.on_page(self.hart.pc) {
            page.require_stops(stops);
        }
        let leave = self.run_page::<BLOCK>(&mut page, budget);
        self.code.put(index, page);
        leave
    }

    /// Whether the step at `hart.pc` is one to stop before.
    pub(super) fn is_at_breakpoint(&self) -> bool {
        self.steps != 0 && self.bus.breaks.is_at(self.hart.pc)
    }

    pub(super) fn trap(&mut self, trap: Trap) {
        self.hart.take_trap(trap);
        self.tlb.set_context(self.hart);
    }

    #[inline(always)]
    fn x(&self, r: u8) -> u64 {
        self.hart.x[usize::from(r)]
    }

    #[inline(always)]
    fn set_x(&mut self, r: u8, v: u64) {
        self.hart.x[usize::from(r)] = v;
    }

    #[inline(always)]
    fn load_fast<const N: usize>(&self, va: u64) -> Option<[u8; N]> {
        let off = self.hart.tables.read_offset(va, N as u64)?;
        self.bus.ram.bytes().get(off..)?.first_chunk::<N>().copied()
    }

    #[inline(always)]
    pub(super) fn store_fast<const N: usize>(&mut self, va: u64, value: [u8; N]) -> bool {
        if let Some(off) = self.hart.tables.write_offset(va, N as u64)
            && let Some(place) =
                self.bus.ram.bytes_mut().get_mut(off..).and_then(|b| b.first_chunk_mut::<N>())
        {
            *place = value;
            return true;
        }
        false
    }

    #[expect(
        clippy::too_many_lines,
        reason = "one arm an instruction; the hot loop of the interpreter"
    )]
    fn run_page<const BLOCK: bool>(&mut self, page: &mut CodePage, budget: u64) -> Leave {
        let page_va = self.hart.pc & !0xfff;
        let mut idx = self.slot_of(page, ((self.hart.pc & 0xfff) >> 1) as usize);
        let mut steps = self.steps;

        macro_rules! here {
            () => {
                page_va.wrapping_add((page.halfword(idx) as u64) << 1)
            };
        }
        macro_rules! leave {
            ($pc:expr, $leave:expr) => {{
                self.hart.pc = $pc;
                self.steps = steps;
                return $leave;
            }};
        }
        macro_rules! trap {
            ($trap:expr) => {
                return self.trap_at(page_va, page.halfword(idx), steps, $trap)
            };
        }
        // Out of line, so that the address is not computed for every instruction.
        macro_rules! leave_here {
            ($leave:expr) => {
                return self.leave_at(page_va, page.halfword(idx), steps, $leave)
            };
        }
        loop {
            if steps >= budget {
                leave_here!(Leave::End(RunEnd::Budget));
            }
            steps += 1;
            let mut at = idx;
            'dispatch: loop {
                let insn = &page.slots[at];
                macro_rules! next {
                    () => {{
                        idx += 1;
                        break 'dispatch;
                    }};
                }
                macro_rules! alu {
                    ($a:ident, $b:ident, $e:expr) => {{
                        let ($a, $b) = (self.x(insn.rs1), self.x(insn.rs2));
                        self.set_x(insn.rd, $e);
                        next!()
                    }};
                }
                macro_rules! alui {
                    ($a:ident, $i:ident, $e:expr) => {{
                        let ($a, $i) = (self.x(insn.rs1), i64::from(insn.imm()) as u64);
                        self.set_x(insn.rd, $e);
                        next!()
                    }};
                }
                macro_rules! jump {
                    ($patched:expr) => {{
                        match $patched {
                            Some(target) if BLOCK => {
                                let to = page_va.wrapping_add((page.halfword(target) as u64) << 1);
                                leave!(to, Leave::Refetch)
                            }
                            Some(target) => {
                                idx = target;
                                break 'dispatch;
                            }
                            None => match self.jump_slow(page, idx, at, page_va, steps) {
                                Some(target) if BLOCK => {
                                    idx = target;
                                    leave!(here!(), Leave::Refetch)
                                }
                                Some(target) => {
                                    idx = target;
                                    break 'dispatch;
                                }
                                None => return Leave::Refetch,
                            },
                        }
                    }};
                }
                macro_rules! branch {
                    ($a:ident, $b:ident, $e:expr) => {{
                        let ($a, $b) = (self.x(insn.rs1), self.x(insn.rs2));
                        if $e { jump!(insn.branch_target()) } else { next!() }
                    }};
                }
                macro_rules! load {
                    ($n:literal, $v:ident, $e:expr) => {{
                        let va = self.x(insn.rs1).wrapping_add(i64::from(insn.imm()) as u64);
                        let ($v, device) = match self.load_fast::<$n>(va) {
                            Some(bytes) => {
                                let mut wide = [0u8; 8];
                                wide[..$n].copy_from_slice(&bytes);
                                (u64::from_le_bytes(wide), false)
                            }
                            None => {
                                self.steps = steps;
                                match self.load_slow(va, $n) {
                                    Ok(got) => got,
                                    Err(t) => trap!(t),
                                }
                            }
                        };
                        self.set_x(insn.rd, $e);
                        if device {
                            idx += 1;
                            leave_here!(Leave::End(RunEnd::Attention));
                        }
                        next!()
                    }};
                }
                macro_rules! store {
                    ($n:literal) => {{
                        let va = self.x(insn.rs1).wrapping_add(i64::from(insn.imm()) as u64);
                        let value = self.x(insn.rs2);
                        if !self.store_fast(
                            va,
                            *value.to_le_bytes().first_chunk::<$n>().expect("N <= 8"),
                        ) {
                            self.steps = steps;
                            match self.store_slow(va, $n, value) {
                                Ok(Stored::Plain) => {}
                                Ok(Stored::Refetch) => {
                                    idx += 1;
                                    leave_here!(Leave::Refetch)
                                }
                                Ok(Stored::Attention) => {
                                    idx += 1;
                                    leave_here!(Leave::End(RunEnd::Attention))
                                }
                                Err(t) => trap!(t),
                            }
                        }
                        next!()
                    }};
                }
                match insn.op {
                    Op::Lui => {
                        self.set_x(insn.rd, (i64::from(insn.imm()) << 12) as u64);
                        next!()
                    }
                    Op::Auipc => {
                        self.set_x(
                            insn.rd,
                            here!().wrapping_add((i64::from(insn.imm()) << 12) as u64),
                        );
                        next!()
                    }
                    Op::Jal => {
                        self.set_x(insn.rd, here!().wrapping_add((insn.len() as u64) << 1));
                        jump!(insn.jal_target())
                    }
                    Op::Jalr => {
                        let to = self.x(insn.rs1).wrapping_add(i64::from(insn.imm()) as u64) & !1;
                        self.set_x(insn.rd, here!().wrapping_add((insn.len() as u64) << 1));
                        let offset = to.wrapping_sub(page_va);
                        if !BLOCK
                            && offset < 0x1000
                            && let Some(target) = page.find((offset >> 1) as usize)
                        {
                            idx = target;
                            break 'dispatch;
                        }
                        leave!(to, Leave::Refetch)
                    }
                    Op::Beq => branch!(a, b, a == b),
                    Op::Bne => branch!(a, b, a != b),
                    Op::Blt => branch!(a, b, (a as i64) < b as i64),
                    Op::Bge => branch!(a, b, a as i64 >= b as i64),
                    Op::Bltu => branch!(a, b, a < b),
                    Op::Bgeu => branch!(a, b, a >= b),
                    Op::Lb => load!(1, v, v as i8 as u64),
                    Op::Lh => load!(2, v, v as i16 as u64),
                    Op::Lw => load!(4, v, sext32(v)),
                    Op::Ld => load!(8, v, v),
                    Op::Lbu => load!(1, v, v),
                    Op::Lhu => load!(2, v, v),
                    Op::Lwu => load!(4, v, v),
                    Op::Sb => store!(1),
                    Op::Sh => store!(2),
                    Op::Sw => store!(4),
                    Op::Sd => store!(8),
                    Op::Addi => alui!(a, i, a.wrapping_add(i)),
                    Op::Slti => alui!(a, i, u64::from((a as i64) < i as i64)),
                    Op::Sltiu => alui!(a, i, u64::from(a < i)),
                    Op::Xori => alui!(a, i, a ^ i),
                    Op::Ori => alui!(a, i, a | i),
                    Op::Andi => alui!(a, i, a & i),
                    Op::Slli => alui!(a, i, a << (i & 63)),
                    Op::Srli => alui!(a, i, a >> (i & 63)),
                    Op::Srai => alui!(a, i, (a as i64 >> (i & 63)) as u64),
                    Op::Add => alu!(a, b, a.wrapping_add(b)),
                    Op::Sub => alu!(a, b, a.wrapping_sub(b)),
                    Op::Sll => alu!(a, b, a << (b & 63)),
                    Op::Slt => alu!(a, b, u64::from((a as i64) < b as i64)),
                    Op::Sltu => alu!(a, b, u64::from(a < b)),
                    Op::Xor => alu!(a, b, a ^ b),
                    Op::Srl => alu!(a, b, a >> (b & 63)),
                    Op::Sra => alu!(a, b, (a as i64 >> (b & 63)) as u64),
                    Op::Or => alu!(a, b, a | b),
                    Op::And => alu!(a, b, a & b),
                    Op::Addiw => alui!(a, i, sext32(a.wrapping_add(i))),
                    Op::Slliw => alui!(a, i, sext32(a << (i & 31))),
                    Op::Srliw => alui!(a, i, sext32(u64::from(a as u32 >> (i & 31)))),
                    Op::Sraiw => alui!(a, i, (a as i32 >> (i & 31)) as u64),
                    Op::Addw => alu!(a, b, sext32(a.wrapping_add(b))),
                    Op::Subw => alu!(a, b, sext32(a.wrapping_sub(b))),
                    Op::Sllw => alu!(a, b, sext32(a << (b & 31))),
                    Op::Srlw => alu!(a, b, sext32(u64::from(a as u32 >> (b & 31)))),
                    Op::Sraw => alu!(a, b, (a as i32 >> (b & 31)) as u64),
                    Op::Mul => alu!(a, b, a.wrapping_mul(b)),
                    Op::Mulh => {
                        alu!(a, b, ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64)
                    }
                    Op::Mulhsu => {
                        alu!(a, b, (i128::from(a as i64).wrapping_mul(i128::from(b)) >> 64) as u64)
                    }
                    Op::Mulhu => alu!(a, b, ((u128::from(a) * u128::from(b)) >> 64) as u64),
                    Op::Div => alu!(a, b, div_signed(a, b)),
                    Op::Divu => alu!(a, b, a.checked_div(b).unwrap_or(u64::MAX)),
                    Op::Rem => alu!(a, b, rem_signed(a, b)),
                    Op::Remu => alu!(a, b, a.checked_rem(b).unwrap_or(a)),
                    Op::Mulw => alu!(a, b, sext32(a.wrapping_mul(b))),
                    Op::Divw => alu!(a, b, sext32(div_signed(sext32(a), sext32(b)))),
                    Op::Divuw => {
                        alu!(
                            a,
                            b,
                            sext32(u64::from((a as u32).checked_div(b as u32).unwrap_or(u32::MAX)))
                        )
                    }
                    Op::Remw => alu!(a, b, sext32(rem_signed(sext32(a), sext32(b)))),
                    Op::Remuw => {
                        alu!(
                            a,
                            b,
                            sext32(u64::from((a as u32).checked_rem(b as u32).unwrap_or(a as u32)))
                        )
                    }
                    Op::Fence => next!(),
                    Op::Fld if self.hart.fp_enabled() => {
                        let va = self.x(insn.rs1).wrapping_add(i64::from(insn.imm()) as u64);
                        if let Some(bytes) = self.load_fast::<8>(va) {
                            self.hart.f[usize::from(insn.rd & 31)] = u64::from_le_bytes(bytes);
                            self.hart.set_fp_dirty();
                            next!()
                        }
                    }
                    Op::Fsd if self.hart.fp_enabled() => {
                        let va = self.x(insn.rs1).wrapping_add(i64::from(insn.imm()) as u64);
                        let value = self.hart.f[usize::from(insn.rs2 & 31)];
                        if self.store_fast(va, value.to_le_bytes()) {
                            next!()
                        }
                    }
                    Op::Illegal if insn.imm() != 0 => match insn.imm() {
                        marker::GOTO => {
                            idx = insn.goto_target();
                            at = idx;
                            continue 'dispatch;
                        }
                        marker::CONTINUE => {
                            let target = self.slot_of(page, page.halfword(idx));
                            page.patch_continue(idx, target);
                            idx = target;
                            at = idx;
                            continue 'dispatch;
                        }
                        marker::STRADDLE => {
                            match self.fetch_straddling(page_va, page.halfword(idx)) {
                                Ok(decoded) => page.slots[0] = decoded,
                                Err(t) => trap!(t),
                            }
                            at = 0;
                            continue 'dispatch;
                        }
                        marker::STOP => {
                            if steps > 1 && self.bus.breaks.is_at(here!()) {
                                steps -= 1;
                                leave_here!(Leave::End(RunEnd::Breakpoint))
                            }
                            match self.fetch_at_stop(page, page_va, page.halfword(idx)) {
                                Ok(decoded) => page.slots[0] = decoded,
                                Err(t) => trap!(t),
                            }
                            at = 0;
                            continue 'dispatch;
                        }
                        _ => {
                            steps -= 1;
                            leave_here!(Leave::Refetch)
                        }
                    },
                    _ => {}
                }
                // Everything rarer.
                let behind = page.halfword(idx) + insn.len();
                match self.execute_at(page_va, page.halfword(idx), steps, insn.unpack()) {
                    Ok(Next::Plain) => {
                        idx += 1;
                        break 'dispatch;
                    }
                    Ok(next) => return self.leave_after(page_va, behind, next),
                    Err(t) => trap!(t),
                }
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn trap_at(&mut self, page_va: u64, halfword: usize, steps: u64, trap: Trap) -> Leave {
        self.hart.pc = page_va.wrapping_add((halfword as u64) << 1);
        self.steps = steps;
        self.trap(trap);
        Leave::Refetch
    }

    #[cold]
    #[inline(never)]
    fn leave_at(&mut self, page_va: u64, halfword: usize, steps: u64, leave: Leave) -> Leave {
        self.hart.pc = page_va.wrapping_add((halfword as u64) << 1);
        self.steps = steps;
        leave
    }

    #[inline(never)]
    fn execute_at(
        &mut self,
        page_va: u64,
        halfword: usize,
        steps: u64,
        insn: Insn,
    ) -> Result<Next, Trap> {
        self.hart.pc = page_va.wrapping_add((halfword as u64) << 1);
        self.steps = steps;
        self.execute_rare(insn)
    }

    /// Leaves after an instruction that said so; `halfword` is that of the instruction behind it.
    #[inline(never)]
    fn leave_after(&mut self, page_va: u64, halfword: usize, next: Next) -> Leave {
        let after = page_va.wrapping_add((halfword as u64) << 1);
        let (jumped, leave) = match next {
            Next::Plain | Next::Refetch => (false, Leave::Refetch),
            Next::Attention => (false, Leave::End(RunEnd::Attention)),
            Next::SbiCall => (false, Leave::End(RunEnd::SbiCall)),
            Next::Yield => (false, Leave::End(RunEnd::Yield)),
            Next::Jumped => (true, Leave::Refetch),
            Next::JumpedAttention => (true, Leave::End(RunEnd::Attention)),
        };
        if !jumped {
            self.hart.pc = after;
        }
        leave
    }

    /// Slot of the instruction at a halfword of the page.
    fn slot_of(&mut self, page: &mut CodePage, halfword: usize) -> usize {
        if let Some(slot) = page.find(halfword) {
            return slot;
        }
        let (slot, tracked) = page.find_or_decode(self.bus.ram, halfword);
        if tracked {
            self.writes_tracked_to(page.ram_page());
        }
        slot
    }

    /// Takes a jump for the first time: patches it when its target is on the page; otherwise leaves for the target.
    #[cold]
    #[inline(never)]
    fn jump_slow(
        &mut self,
        page: &mut CodePage,
        idx: usize,
        at: usize,
        page_va: u64,
        steps: u64,
    ) -> Option<usize> {
        let to = page.halfword(idx) as i64 + i64::from(page.slots[at].imm());
        if (0..code::HALFWORDS as i64).contains(&to) {
            let target = self.slot_of(page, to as usize);
            // A straddling instruction is decoded anew each time.
            if at != 0 {
                page.patch(idx, target);
            }
            return Some(target);
        }
        self.hart.pc = page_va.wrapping_add((to << 1) as u64);
        self.steps = steps;
        None
    }

    /// The instruction at a halfword of the page, which ends on the next page.
    #[cold]
    #[inline(never)]
    pub(super) fn fetch_straddling(&mut self, page_va: u64, halfword: usize) -> Result<Slot, Trap> {
        let pc = page_va.wrapping_add((halfword as u64) << 1);
        let second = pc.wrapping_add(2);
        let lo = self.translate_fetch(pc)?;
        let hi = self.translate_fetch(second).map_err(|t| Trap { tval: second, ..t })?;
        let fault = |_| Trap { cause: cause::FETCH_ACCESS, tval: pc };
        let lo = self.bus.ram.read_u16(lo).map_err(fault)?;
        let hi = self.bus.ram.read_u16(hi).map_err(fault)?;
        Ok(code::predecode(u32::from(lo) | u32::from(hi) << 16))
    }

    /// The instruction at a halfword of the page that there may be a breakpoint at.
    #[cold]
    #[inline(never)]
    fn fetch_at_stop(
        &mut self,
        page: &CodePage,
        page_va: u64,
        halfword: usize,
    ) -> Result<Slot, Trap> {
        let slot = page.behind_stop(self.bus.ram, halfword);
        if slot.is_straddling() { self.fetch_straddling(page_va, halfword) } else { Ok(slot) }
    }

    /// The illegal-instruction exception for the instruction at `hart.pc`, with its bits.
    pub(super) fn illegal(&mut self) -> Trap {
        let pc = self.hart.pc;
        let mut half = |va| {
            let gpa = self.translate_fetch(va).ok()?;
            self.bus.ram.read_u16(gpa).ok()
        };
        let lo = half(pc).unwrap_or(0);
        let hi = if lo & 3 == 3 { half(pc.wrapping_add(2)).unwrap_or(0) } else { 0 };
        Trap { cause: cause::ILLEGAL, tval: u64::from(lo) | u64::from(hi) << 16 }
    }

    fn csr_env(&self) -> CsrEnv {
        let before = self.steps - 1;
        CsrEnv {
            mtime: self.bus.clock.mtime(self.bus.icount + before),
            steps: self.hart.steps.wrapping_add(before),
        }
    }

    fn csr(&mut self, insn: Insn) -> Result<Next, Trap> {
        let number = insn.imm as u16;
        let immediate = matches!(insn.op, Op::CsrRwi | Op::CsrRsi | Op::CsrRci);
        let operand = if immediate { u64::from(insn.rs1) } else { self.x(insn.rs1) };
        let swap = matches!(insn.op, Op::CsrRw | Op::CsrRwi);
        let write = swap || insn.rs1 != 0;
        let env = self.csr_env();
        // CSRRW with rd = x0 does not read, but reads here have no side effects.
        let Ok(old) = self.hart.read_csr(number, write, env) else { return Err(self.illegal()) };
        let mut effect = CsrEffect::None;
        if write {
            let base =
                if number == 0x344 || number == 0x144 { self.hart.csr.mip_soft } else { old };
            let new = match insn.op {
                Op::CsrRw | Op::CsrRwi => operand,
                Op::CsrRs | Op::CsrRsi => base | operand,
                _ => base & !operand,
            };
            match self.hart.write_csr(number, new, env) {
                Ok(e) => effect = e,
                Err(_) => return Err(self.illegal()),
            }
        }
        self.set_x(insn.rd, old);
        Ok(match effect {
            CsrEffect::None => Next::Plain,
            CsrEffect::Status => {
                self.tlb.set_context(self.hart);
                if self.hart.pending_interrupt().is_some() { Next::Attention } else { Next::Plain }
            }
            CsrEffect::Timer => Next::Attention,
            CsrEffect::Environment => {
                self.tlb.flush(&mut self.hart.tables);
                self.tlb.set_context(self.hart);
                Next::Attention
            }
            CsrEffect::Translation => {
                // Contexts are told apart by `satp`; what else there is changes all of them.
                if number != SATP {
                    self.tlb.flush(&mut self.hart.tables);
                }
                self.tlb.set_context(self.hart);
                // A status write that changes MXR may also enable an interrupt.
                if self.hart.pending_interrupt().is_some() {
                    Next::Attention
                } else {
                    Next::Refetch
                }
            }
        })
    }

    fn return_from_trap(&mut self, machine: bool) -> Result<Next, Trap> {
        let allowed = if machine {
            self.hart.mode == Mode::Machine
        } else {
            self.hart.mode == Mode::Machine
                || (self.hart.mode == Mode::Supervisor && self.hart.csr.mstatus & mstatus::TSR == 0)
        };
        if !allowed {
            return Err(self.illegal());
        }
        if machine {
            self.hart.mret();
        } else {
            self.hart.sret();
        }
        self.tlb.set_context(self.hart);
        Ok(if self.hart.pending_interrupt().is_some() {
            Next::JumpedAttention
        } else {
            Next::Jumped
        })
    }

    fn wait_for_interrupt(&mut self) -> Result<Next, Trap> {
        let allowed = match self.hart.mode {
            Mode::Machine => true,
            Mode::Supervisor => self.hart.csr.mstatus & mstatus::TW == 0,
            Mode::User => false,
        };
        if !allowed {
            return Err(self.illegal());
        }
        self.hart.waiting = true;
        Ok(Next::Attention)
    }

    fn environment_call(&mut self) -> Result<Next, Trap> {
        let cause = match self.hart.mode {
            Mode::User => cause::ECALL_U,
            Mode::Supervisor if self.bus.sbi => return Ok(Next::SbiCall),
            Mode::Supervisor => cause::ECALL_S,
            Mode::Machine => cause::ECALL_M,
        };
        Err(Trap { cause, tval: 0 })
    }

    /// Executes an instruction outside the fast loop. `hart.pc` is the instruction's address.
    pub(super) fn execute_rare(&mut self, insn: Insn) -> Result<Next, Trap> {
        match insn.op {
            Op::CsrRw | Op::CsrRs | Op::CsrRc | Op::CsrRwi | Op::CsrRsi | Op::CsrRci => {
                self.csr(insn)
            }
            Op::Ecall => self.environment_call(),
            Op::Ebreak => Err(Trap { cause: cause::BREAKPOINT, tval: self.hart.pc }),
            Op::Mret => self.return_from_trap(true),
            Op::Sret => self.return_from_trap(false),
            Op::Wfi => self.wait_for_interrupt(),
            // Decoded code is coherent with memory (INV-ENGINE-3).
            Op::FenceI => Ok(Next::Plain),
            Op::Pause => Ok(if self.bus.smp { Next::Yield } else { Next::Plain }),
            // Translations are coherent with page tables (INV-MMU-1), so that only the checks remain.
            Op::SfenceVma | Op::SinvalVma => match self.hart.mode {
                Mode::User => Err(self.illegal()),
                Mode::Supervisor if self.hart.csr.mstatus & mstatus::TVM != 0 => {
                    Err(self.illegal())
                }
                _ => Ok(Next::Plain),
            },
            Op::SfenceWInval | Op::SfenceInvalIr => match self.hart.mode {
                Mode::User => Err(self.illegal()),
                _ => Ok(Next::Plain),
            },
            Op::WrsNto | Op::WrsSto => Ok(self.wait_on_reservation()),
            Op::CboInval | Op::CboClean | Op::CboFlush | Op::CboZero => self.cache_block(insn),
            op if op >= Op::LrW && op <= Op::AmoMaxuD => self.atomic(insn),
            op if op >= Op::Flw => self.floating_point(insn),
            _ => self.computation(insn),
        }
    }
}

fn div_signed(a: u64, b: u64) -> u64 {
    match b as i64 {
        0 => u64::MAX,
        b => (a as i64).wrapping_div(b) as u64,
    }
}

fn rem_signed(a: u64, b: u64) -> u64 {
    match b as i64 {
        0 => a,
        b => (a as i64).wrapping_rem(b) as u64,
    }
}

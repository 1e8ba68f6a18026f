//! The fixed pieces of generated code: entry, exits, calls of the runtime, the way to the next page.
//!
//! # Invariants
//! - INV-STUBS-1: between blocks every mapped register is in its host register, everything else in memory, and the
//!   budget in its register; the stack pointer is a multiple of 16.
//! - INV-STUBS-2: floating-point registers that have a host register are in it while `Tables::fp_live` is 1, else in
//!   memory. Before the runtime runs they are put into memory; afterwards they are fetched if code may compute with them.
//! - INV-STUBS-3: the runtime runs with the guest's MXCSR. It does no floating-point arithmetic of the host's.

use std::mem::offset_of;

use crate::asm::{Alu, Asm, Cond, Mem, Reg, Size, Sse, Xm};
use crate::layout::{BASE, BUDGET, FETCH_TABLE, FETCH_TAG, Layout, MAPPED, MAPPED_F};
use crate::tables::{FETCH_ENTRIES, FETCH_SHIFT, Tables};

use Reg::{R12, R13, R14, R15, Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rsi, Rsp};
use Size::{D, Q};

/// Why generated code came back, in `Tables::exit_reason`.
pub(crate) mod reason {
    /// The next block is longer than the budget.
    pub(crate) const BUDGET: u32 = 0;
    /// The target has no entry point.
    pub(crate) const LOOKUP: u32 = 1;
    /// The target has no entry point, and the jump at `link_site` may be patched to it.
    pub(crate) const LINK: u32 = 2;
    /// The runtime said so.
    pub(crate) const STEP: u32 = 3;
}

/// What the runtime's step function answers.
pub(crate) mod answer {
    /// Go on behind the instruction.
    pub(crate) const CONTINUE: u64 = 0;
    /// Go on at `exit_pc`.
    pub(crate) const JUMP: u64 = 1;
    /// Leave.
    pub(crate) const EXIT: u64 = 2;
}

/// Addresses of the stubs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stubs {
    /// `extern "sysv64" fn(base: *mut u64, entry: u64)`
    pub(crate) enter: u64,
    /// Called with the packed instruction in RDX and its place in ECX.
    pub(crate) step: u64,
    /// Jumped to with the page offset in EAX: no budget.
    pub(crate) budget: u64,
    /// Jumped to with the page offset in EAX and the site in ECX.
    pub(crate) link: u64,
    /// Jumped to with the page offset in EAX: what an empty entry point is.
    pub(crate) missing: u64,
    /// Jumped to with the address in RAX: it is not in the fetch TLB.
    pub(crate) untranslated: u64,
    /// Jumped to with the address in RAX: goes there.
    pub(crate) jump: u64,
}

/// Puts the guest's registers into memory.
fn spill(a: &mut Asm, layout: &Layout) {
    for (r, host) in MAPPED {
        a.store(Q, Layout::x(r), host);
    }
    a.alu_imm(Alu::Cmp, D, layout.table(offset_of!(Tables, fp_live)), 1);
    let is_there = a.jcc(Cond::Ne);
    for (r, xmm) in MAPPED_F {
        a.sse(Sse::F2, STORE_F64, D, xmm, Xm::Mem(layout.f(r)));
    }
    a.fix(is_there);
}

/// Puts the guest's registers where generated code has them. Uses RCX.
fn reload(a: &mut Asm, layout: &Layout) {
    a.mov(D, Rcx, layout.table(offset_of!(Tables, fp_inline)));
    a.store(D, layout.table(offset_of!(Tables, fp_live)), Rcx);
    a.test(D, Rcx, Rcx);
    let is_unused = a.jcc(Cond::E);
    for (r, xmm) in MAPPED_F {
        a.sse(Sse::F2, LOAD_F64, D, xmm, Xm::Mem(layout.f(r)));
    }
    a.fix(is_unused);
    for (r, host) in MAPPED {
        a.mov(Q, host, Layout::x(r));
    }
}

/// Opcodes of MOVSD.
const LOAD_F64: u8 = 0x10;
const STORE_F64: u8 = 0x11;

/// Jumps to the guest address in RAX, on whatever page. Uses RCX and RDX.
pub(crate) fn jump_to_rax(a: &mut Asm, layout: &Layout, untranslated: u64) {
    a.mov(Q, Rdx, Rax);
    a.alu_imm(Alu::And, Q, Rdx, -4096);
    look_up_page(a, layout);
    a.jcc_to(Cond::Ne, untranslated);
    a.mov(Q, Rcx, layout.fetch(Rcx, FETCH_TABLE));
    a.alu_imm(Alu::And, D, Rax, 0xffe);
    a.mov(D, Rcx, Mem { base: Rcx, index: Some((Rax, 1)), disp: 0 });
    a.jmp_rm(Rcx);
}

/// Goes to the page whose address is in RDX and looks it up: flags say whether it was found, in the entry that RCX selects.
fn look_up_page(a: &mut Asm, layout: &Layout) {
    a.rorx(D, Rcx, Rdx, 12 - FETCH_SHIFT);
    a.alu_load(Alu::Xor, D, Rcx, layout.table(offset_of!(Tables, fetch_salt)));
    a.alu_imm(Alu::And, D, Rcx, ((FETCH_ENTRIES - 1) << FETCH_SHIFT) as i32);
    a.store(Q, layout.table(offset_of!(Tables, page_va)), Rdx);
    a.alu_load(Alu::Or, Q, Rdx, layout.table(offset_of!(Tables, fetch_id)));
    a.alu_load(Alu::Cmp, Q, Rdx, layout.fetch(Rcx, FETCH_TAG));
}

/// Jumps to an offset relative to the start of the present page, on another one. Uses RAX, RCX and RDX.
pub(crate) fn jump_away(a: &mut Asm, layout: &Layout, offset: i32, missing: u64) {
    let (page, within) = (offset & !0xfff, offset & 0xfff);
    a.mov(Q, Rdx, layout.table(offset_of!(Tables, page_va)));
    a.alu_imm(Alu::Add, Q, Rdx, page);
    look_up_page(a, layout);
    // Whether the page or the entry point is missing, it is this offset of what is the present page by now.
    a.mov_imm(Rax, within as u64);
    a.jcc_to(Cond::Ne, missing);
    a.mov(Q, Rcx, layout.fetch(Rcx, FETCH_TABLE));
    a.mov(D, Rcx, Mem::new(Rcx, within * 2));
    a.jmp_rm(Rcx);
}

impl Stubs {
    /// Generates the stubs at `base`.
    pub(crate) fn generate(base: u64, layout: &Layout) -> (Self, Vec<u8>) {
        let mut a = Asm::new(base);
        let mut s = Self::default();
        let t = |offset| layout.table(offset);
        // Leaving: registers are spilled already.
        let leave = a.here();
        a.store(Q, t(offset_of!(Tables, budget)), BUDGET);
        a.stmxcsr(t(offset_of!(Tables, mxcsr)));
        a.ldmxcsr(t(offset_of!(Tables, host_mxcsr)));
        a.alu_imm(Alu::Add, Q, Rsp, 8);
        for r in [R15, R14, R13, R12, Rbp, Rbx] {
            a.pop(r);
        }
        a.ret();

        let leave_at = a.here(); // RAX: page offset, ECX: reason
        a.alu_load(Alu::Add, Q, Rax, t(offset_of!(Tables, page_va)));
        let leave_to = a.here(); // RAX: address, ECX: reason
        a.store(Q, t(offset_of!(Tables, exit_pc)), Rax);
        a.store(D, t(offset_of!(Tables, exit_reason)), Rcx);
        spill(&mut a, layout);
        a.jmp_to(leave);

        s.budget = a.here();
        a.mov_imm(Rcx, u64::from(reason::BUDGET));
        a.jmp_to(leave_at);
        s.missing = a.here();
        a.mov_imm(Rcx, u64::from(reason::LOOKUP));
        a.jmp_to(leave_at);
        s.untranslated = a.here();
        a.mov_imm(Rcx, u64::from(reason::LOOKUP));
        a.jmp_to(leave_to);
        s.link = a.here();
        a.store(D, t(offset_of!(Tables, link_site)), Rcx);
        a.mov_imm(Rcx, u64::from(reason::LINK));
        a.jmp_to(leave_at);

        s.step = a.here();
        a.alu_imm(Alu::Sub, Q, Rsp, 8);
        spill(&mut a, layout);
        a.stmxcsr(t(offset_of!(Tables, mxcsr)));
        a.mov(Q, Rdi, t(offset_of!(Tables, runtime)));
        a.mov(Q, Rsi, Rdx);
        a.mov(D, Rdx, Rcx);
        a.mov(Q, Rcx, BUDGET);
        a.call_rm(t(offset_of!(Tables, step)));
        a.test(D, Rax, Rax);
        let special = a.jcc(Cond::Ne);
        reload(&mut a, layout);
        a.ldmxcsr(t(offset_of!(Tables, mxcsr)));
        a.alu_imm(Alu::Add, Q, Rsp, 8);
        a.ret();
        a.fix(special);
        a.alu_imm(Alu::Add, Q, Rsp, 16);
        a.mov(Q, BUDGET, t(offset_of!(Tables, budget)));
        a.alu_imm(Alu::Cmp, D, Rax, answer::JUMP as i32);
        a.ldmxcsr(t(offset_of!(Tables, mxcsr)));
        a.jcc_to(Cond::Ne, leave);
        reload(&mut a, layout);
        a.mov(Q, Rax, t(offset_of!(Tables, exit_pc)));
        s.jump = a.here();
        jump_to_rax(&mut a, layout, s.untranslated);

        s.enter = a.here();
        for r in [Rbx, Rbp, R12, R13, R14, R15] {
            a.push(r);
        }
        a.alu_imm(Alu::Sub, Q, Rsp, 8);
        a.mov(Q, BASE, Rdi);
        a.mov(Q, Rax, Rsi);
        a.mov(Q, BUDGET, t(offset_of!(Tables, budget)));
        a.stmxcsr(t(offset_of!(Tables, host_mxcsr)));
        a.ldmxcsr(t(offset_of!(Tables, mxcsr)));
        reload(&mut a, layout);
        a.jmp_rm(Rax);
        (s, a.code)
    }
}

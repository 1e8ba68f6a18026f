//! Into generated code and out of it again.
//!
//! # Invariants
//! - INV-ENTER-1: generated code runs only with a hart's state laid out as it was translated for, with tables bound to the
//!   RAM that the runtime has, and with a code cache of the entry's generation.
//! - INV-ENTER-2: while it runs, no reference to the runtime is in use but the one that a step gets.

#![expect(unsafe_code, reason = "calls generated code, which calls back")]

use crate::cache::Jit;
use crate::emit::STRADDLE;
use crate::pack::unpack;
use crate::runtime::{Answer, Entry, Exit, Link, Runtime};
use crate::stubs::{answer, reason};

extern "sysv64" fn step<R: Runtime>(runtime: *mut R, insn: u64, place: u32, budget: i64) -> u64 {
    // SAFETY: `enter` stored this pointer, made from its exclusive reference, and uses that no more until generated code
    // is back (INV-ENTER-2).
    let runtime = unsafe { &mut *runtime };
    let tables = runtime.state().tables;
    let pc = tables.page_va.wrapping_add(u64::from(place & 0xffff));
    let left = budget.wrapping_add(i64::from(place >> 16));
    let insn = (insn != STRADDLE).then(|| unpack(insn));
    match runtime.step(insn, pc, left as u64) {
        Answer::Continue => answer::CONTINUE,
        Answer::Jump(to) => {
            let tables = runtime.state().tables;
            tables.exit_pc = to;
            tables.budget = left;
            answer::JUMP
        }
        Answer::Leave => {
            let tables = runtime.state().tables;
            tables.exit_reason = reason::STEP;
            tables.budget = left;
            answer::EXIT
        }
    }
}

impl Jit {
    /// Runs the code at `entry`, whose first instruction is at `pc`, for at most `budget` steps. Returns how many of them
    /// are left, and why.
    ///
    /// # Panics
    /// When the hart is not laid out as this translator was made for, its tables are not bound to the runtime's RAM, or
    /// the entry point is of an earlier generation.
    pub fn enter<R: Runtime>(
        &self,
        runtime: &mut R,
        entry: Entry,
        pc: u64,
        budget: u64,
    ) -> (u64, Exit) {
        assert_eq!(entry.generation, self.generation, "the code is still there");
        let ram = std::ptr::from_ref(runtime.ram());
        let address = std::ptr::from_mut(runtime) as usize;
        let state = runtime.state();
        assert!(self.layout.fits(&state), "one layout for all harts");
        // SAFETY: the slice is the runtime's RAM, which is there as long as the runtime is borrowed; only its place is
        // looked at.
        let ram = unsafe { &*ram };
        assert!(state.tables.is_bound_to(ram), "the tables are bound to RAM");
        assert_eq!(state.tables.code_generation, self.generation, "the tables are in sync");
        let tables = &mut *state.tables;
        tables.page_va = pc & !0xfff;
        tables.budget = budget as i64;
        tables.runtime = address;
        tables.step = step::<R> as *const () as usize;
        let base = state.x.as_mut_ptr().wrapping_add(16);
        let enter = self.stubs.enter as usize as *const ();
        // SAFETY: the stub at this address was generated with this signature and is executable as long as `self` is.
        let enter: extern "sysv64" fn(*mut u64, u64) = unsafe { std::mem::transmute(enter) };
        // Writes the hart's state and the RAM that its tables map; INV-ENTER-1 is checked above.
        enter(base, u64::from(entry.address));
        let tables = runtime.state().tables;
        let pc = tables.exit_pc;
        let exit = match tables.exit_reason {
            reason::BUDGET => Exit::Budget { pc },
            reason::LOOKUP => Exit::Missing { pc, link: None },
            reason::LINK => {
                let link = Link { site: tables.link_site, generation: self.generation };
                Exit::Missing { pc, link: Some(link) }
            }
            _ => Exit::Left,
        };
        (tables.budget as u64, exit)
    }

    /// Makes a jump that found no code go to `target`, which has to be the code for where it wanted to go.
    pub fn link(&mut self, link: Link, target: Entry) {
        if link.generation == self.generation && target.generation == self.generation {
            self.patch(link.site, target);
        }
    }
}

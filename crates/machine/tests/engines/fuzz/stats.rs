//! What programs really do: instructions and events of single steps on the reference.

use std::collections::BTreeMap;
use std::fmt::Write;

use isa::Op;
use machine::hart::{Mode, cause};

use crate::fuzz::check::{Guest, reference, run_to};
use crate::fuzz::program::op_count;
use crate::fuzz::report::next_instruction;
use crate::rng::Rng;

/// Counts over any number of programs.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    ops: BTreeMap<Op, u64>,
    causes: BTreeMap<(Mode, u64), u64>,
    modes: BTreeMap<(Mode, u64), u64>,
    steps: u64,
    pages: BTreeMap<u64, u64>,
}

impl Stats {
    /// Runs a program by single steps.
    pub(crate) fn count(&mut self, guest: &dyn Guest, steps: u64) {
        let mut m = guest.machine(reference());
        let mut rng = Rng::new(guest.seed());
        while m.icount() < steps {
            if m.icount().is_multiple_of(5000) {
                guest.restart(&mut m, &mut rng);
            }
            let before: Vec<_> =
                m.harts().iter().map(|h| (h.steps, next_instruction(&m, h), h.pc)).collect();
            let at = m.icount();
            if !run_to(&mut m, at + 1) {
                if m.halted().is_some() {
                    return;
                }
                guest.restart(&mut m, &mut rng);
            }
            for (hart, (steps, insn, pc)) in
                m.harts().iter().zip(before).filter(|(h, b)| h.steps != b.0)
            {
                let _ = steps;
                self.steps += 1;
                let trap = hart.pc == hart.csr.mtvec && hart.mode == Mode::Machine
                    || hart.pc == hart.csr.stvec && hart.mode == Mode::Supervisor;
                *self.modes.entry((hart.mode, hart.csr.satp >> 60)).or_default() += 1;
                *self.pages.entry(pc >> 12).or_default() += 1;
                if trap {
                    let cause =
                        if hart.mode == Mode::Machine { hart.csr.mcause } else { hart.csr.scause };
                    *self.causes.entry((hart.mode, cause)).or_default() += 1;
                } else if let Some(insn) = insn {
                    *self.ops.entry(insn.op).or_default() += 1;
                }
            }
        }
    }

    /// What the programs together should have done, but did not.
    pub(crate) fn missing(&self) -> Vec<String> {
        let mut out = vec![];
        let known = op_count();
        if self.ops.len() * 10 < known * 9 {
            out.push(format!("{} of {known} instructions", known - self.ops.len()));
        }
        let exceptions = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15];
        let interrupts = [1, 3, 5, 7, 9, 11].map(|n| cause::INTERRUPT | n);
        for cause in exceptions.into_iter().chain(interrupts) {
            if !self.causes.keys().any(|k| k.1 == cause) {
                out.push(format!("a trap of cause {cause:#x}"));
            }
        }
        out
    }

    /// The counts as text.
    pub(crate) fn text(&self) -> String {
        let mut out = format!(
            "{} steps on {} pages of addresses, {} kinds of instruction\n",
            self.steps,
            self.pages.len(),
            self.ops.len()
        );
        let mut ops: Vec<_> = self.ops.iter().collect();
        ops.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        let texts: Vec<String> =
            ops.iter().map(|(op, n)| format!("{} {n}", op.mnemonic())).collect();
        let _ = writeln!(out, "{}", texts.join(", "));
        for ((mode, cause), n) in &self.causes {
            let _ = writeln!(out, "trap to {mode:?} mode, cause {cause:#x}: {n}");
        }
        for ((mode, satp), n) in &self.modes {
            let _ = writeln!(out, "steps in {mode:?} mode, satp mode {satp}: {n}");
        }
        out
    }
}

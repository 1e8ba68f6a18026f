//! Harts in words.

use machine::Machine;
use machine::hart::{Hart, HartState, Mode};

fn mode(hart: &Hart) -> &'static str {
    match hart.mode {
        Mode::User => "user",
        Mode::Supervisor => "supervisor",
        Mode::Machine => "machine",
    }
}

fn state(hart: &Hart) -> &'static str {
    match hart.state {
        HartState::Stopped => "stopped",
        HartState::Started if hart.waiting => "waiting",
        HartState::Started => "running",
    }
}

/// What GDB shows beside a thread.
pub(crate) fn describe(machine: &Machine, hart: usize) -> String {
    match machine.harts().get(hart) {
        Some(h) => format!("hart {hart}, {} mode, {}", mode(h), state(h)),
        None => format!("hart {hart}, which is not there"),
    }
}

/// A table of all harts.
pub(crate) fn table(machine: &Machine) -> String {
    let mut text = format!(
        "{:4}  {:10}  {:7}  {:18}  {:18}  {}\n",
        "hart", "mode", "state", "pc", "satp", "steps"
    );
    for (index, hart) in machine.harts().iter().enumerate() {
        text.push_str(&format!(
            "{index:<4}  {:10}  {:7}  {:#018x}  {:#018x}  {}\n",
            mode(hart),
            state(hart),
            hart.pc,
            hart.csr.satp,
            hart.steps
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::samples::machine;
    use super::*;

    #[test]
    fn words_and_table_tell_mode_and_state() {
        let mut machine = machine();
        let hart = &mut machine.harts_mut()[1];
        hart.mode = Mode::Supervisor;
        hart.waiting = true;
        hart.csr.satp = 0x8000_0000_0008_1234;
        assert_eq!(describe(&machine, 0), "hart 0, machine mode, running");
        assert_eq!(describe(&machine, 1), "hart 1, supervisor mode, waiting");
        assert_eq!(describe(&machine, 2), "hart 2, which is not there");
        let table = table(&machine);
        assert_eq!(table.lines().count(), 3);
        assert!(table.contains("0x8000000000081234"), "{table}");
        machine.harts_mut()[0].state = HartState::Stopped;
        assert!(describe(&machine, 0).ends_with("stopped"));
    }
}

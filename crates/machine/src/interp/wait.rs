//! Zawrs: waiting for a reservation to end.
//!
//! A wait here takes no time: the instruction completes at once, which it may do for any reason, and therefore is never
//! the one that `mstatus.TW` makes illegal. It ends the reservation, as in QEMU, and so that a loop around it reads
//! memory again.
//!
//! # References
//! The RISC-V Instruction Set Manual, volume I, chapter "Zawrs".

use super::run::{Core, Next};

impl Core<'_, '_> {
    /// `wrs.nto` and `wrs.sto`: with something to wait for, it is another hart's turn to change it.
    pub(super) fn wait_on_reservation(&mut self) -> Next {
        let reserved = self.hart.take_reservation().is_some();
        if reserved && self.bus.smp { Next::Yield } else { Next::Plain }
    }
}

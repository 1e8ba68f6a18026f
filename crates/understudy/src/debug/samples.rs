//! Machines and recordings for the tests of this module.

use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::ram::RAM_BASE;

/// Where the sample machines have some data.
pub(crate) const DATA: u64 = RAM_BASE + 0x1000;

/// A machine with two harts, both in a loop.
pub(crate) fn machine() -> Machine {
    let config = MachineConfig {
        harts: 2,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    // addi t0, t0, 1; j .-4
    let code = [0x0012_8293u32, 0xffdf_f06f].map(u32::to_le_bytes).concat();
    let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
    let mut machine = Machine::new(config, images).unwrap();
    machine.ram_mut().write(DATA, b"ABCD\xff\xff\xff\xff").unwrap();
    machine
}

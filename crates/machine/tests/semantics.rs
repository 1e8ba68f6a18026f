//! Single instructions whose effect was once wrong: each found by the comparison with QEMU.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicBool;

use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::hart::{Hart, Mode, cause, irq, mstatus};
use machine::ram::RAM_BASE;

const NOP: u32 = 0x13;
const HANDLER: u64 = RAM_BASE + 0x1000;

/// A machine that runs `words` in M-mode; traps go to [`HANDLER`], which is a row of NOPs.
fn machine(words: &[u32]) -> Machine {
    let config = MachineConfig {
        harts: 1,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    let code = words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let bios = Some(code.into());
    let mut m = Machine::new(config, BootImages { bios, ..BootImages::default() }).unwrap();
    (0..64).for_each(|i| m.ram_mut().write(HANDLER + 4 * i, &NOP.to_le_bytes()).unwrap());
    m.harts_mut()[0].csr.mtvec = HANDLER;
    m
}

fn run(m: &mut Machine, steps: u64) -> &Hart {
    m.run(m.icount() + steps, &AtomicBool::new(false));
    &m.harts()[0]
}

#[test]
fn a_status_write_that_changes_mxr_takes_the_interrupt_it_enables() {
    let mut m = machine(&[0x3002_9073, NOP, NOP]); // csrw mstatus, x5
    let hart = &mut m.harts_mut()[0];
    hart.x[5] = mstatus::MXR | mstatus::MIE;
    hart.csr.mip_soft = irq::SEIP;
    hart.csr.mie = irq::SEIP;
    let hart = run(&mut m, 2);
    assert_eq!(hart.csr.mcause, cause::INTERRUPT | 9);
    assert_eq!(hart.csr.mepc, RAM_BASE + 4);
}

#[test]
fn a_trap_ends_a_reservation() {
    // lr.d x6, (x5); ecall; and in the handler sc.d x7, x6, (x5)
    let mut m = machine(&[0x1002_b32f, 0x73]);
    m.ram_mut().write(HANDLER, &0x1862_b3afu32.to_le_bytes()).unwrap();
    m.harts_mut()[0].x[5] = RAM_BASE + 0x2000;
    assert_eq!(run(&mut m, 3).x[7], 1);
}

#[test]
fn a_misaligned_access_outside_ram_is_an_access_fault() {
    for (word, expected) in [(0x0002_b303, cause::LOAD_ACCESS), (0x0062_b023, cause::STORE_ACCESS)]
    {
        let mut m = machine(&[word]); // ld x6, (x5); sd x6, (x5)
        m.harts_mut()[0].x[5] = 0x1000_0001;
        let hart = run(&mut m, 1);
        assert_eq!((hart.csr.mcause, hart.csr.mtval), (expected, 0x1000_0001));
    }
}

#[test]
fn registers_of_pmp_entries_beyond_the_last_do_not_exist() {
    for word in [0x3a40_2373, 0x3c00_2373] {
        let mut m = machine(&[word]); // csrr x6, pmpcfg4; csrr x6, pmpaddr16
        let hart = run(&mut m, 1);
        assert_eq!(
            (hart.csr.mcause, hart.csr.mtval, hart.mode),
            (cause::ILLEGAL, u64::from(word), Mode::Machine)
        );
    }
}

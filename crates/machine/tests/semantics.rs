//! Single instructions whose effect was once wrong, found by the comparison with QEMU, and those where QEMU is wrong.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicBool;

use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::hart::csr::envcfg;
use machine::hart::pmp::Pmp;
use machine::hart::{Hart, Mode, cause, irq, mstatus};
use machine::io::Input;
use machine::ram::RAM_BASE;
use machine::{Exit, Machine};

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

/// cbo.inval, cbo.clean, cbo.flush, cbo.zero (x5), and what must be set for modes below to use them.
const CACHE_OPERATIONS: [(u32, u64); 4] = [
    (0x0002_a00f, envcfg::CBIE),
    (0x0012_a00f, envcfg::CBCFE),
    (0x0022_a00f, envcfg::CBCFE),
    (0x0042_a00f, envcfg::CBZE),
];

#[test]
fn cache_operations_need_the_permission_of_the_modes_above() {
    for (word, field) in CACHE_OPERATIONS {
        for (mode, menvcfg, senvcfg, legal) in [
            (Mode::Machine, 0, 0, true),
            (Mode::Supervisor, 0, field, false),
            (Mode::Supervisor, field, 0, true),
            (Mode::User, field, 0, false),
            (Mode::User, 0, field, false),
            (Mode::User, field, field, true),
        ] {
            let mut m = machine(&[word, NOP]);
            let hart = &mut m.harts_mut()[0];
            (hart.mode, hart.pmp) = (mode, Pmp::allow_all());
            (hart.csr.menvcfg, hart.csr.senvcfg) = (menvcfg, senvcfg);
            hart.x[5] = RAM_BASE + 0x2000;
            let hart = run(&mut m, 1);
            if legal {
                assert_eq!((hart.pc, hart.mode), (RAM_BASE + 4, mode), "{word:#x}");
            } else {
                let trap = (hart.csr.mcause, hart.csr.mtval);
                assert_eq!(trap, (cause::ILLEGAL, u64::from(word)), "{word:#x}");
            }
        }
    }
}

#[test]
fn a_zeroed_block_is_64_bytes_and_code_in_it_is_gone() {
    let mut m = machine(&[0x0042_a00f, NOP, NOP]);
    let block = RAM_BASE + 0x2000;
    m.ram_mut().write(block - 8, &[0xff; 80]).unwrap();
    m.harts_mut()[0].x[5] = block + 63;
    run(&mut m, 1);
    let mut around = [0; 80];
    m.ram().read(block - 8, &mut around).unwrap();
    assert!(around[8..72].iter().all(|&b| b == 0));
    assert!(around[..8].iter().chain(&around[72..]).all(|&b| b == 0xff));

    // Its own block: the next instruction is illegal.
    let mut m = machine(&[NOP, 0x0042_a00f, NOP]);
    m.harts_mut()[0].x[5] = RAM_BASE;
    let hart = run(&mut m, 3);
    assert_eq!((hart.csr.mcause, hart.csr.mepc), (cause::ILLEGAL, RAM_BASE + 8));
}

#[test]
fn a_block_of_a_device_is_not_zeroed() {
    let mut m = machine(&[0x0042_a00f]);
    m.harts_mut()[0].x[5] = 0x1000_0000;
    let hart = run(&mut m, 1);
    assert_eq!((hart.csr.mcause, hart.csr.mtval), (cause::STORE_ACCESS, 0x1000_0000));
}

const TABLE: u64 = RAM_BASE + 0x4000;

fn pte(gpa: u64, flags: u64) -> u64 {
    gpa >> 12 << 10 | flags
}

/// Loads from `va` with the privilege of S-mode and the tables that start at [`TABLE`]: cause of the trap, if one is taken.
fn load_translated(entries: &[(u64, u64)], va: u64, menvcfg: u64) -> (Option<u64>, Machine) {
    let mut m = machine(&[0x0002_b303]); // ld x6, (x5)
    for &(at, entry) in entries {
        m.ram_mut().write(at, &entry.to_le_bytes()).unwrap();
    }
    let hart = &mut m.harts_mut()[0];
    (hart.x[5], hart.pmp) = (va, Pmp::allow_all());
    hart.csr.menvcfg = menvcfg;
    hart.csr.satp = 8 << 60 | TABLE >> 12;
    hart.csr.mstatus |= mstatus::MPRV | 1 << mstatus::MPP_SHIFT;
    let cause = (run(&mut m, 1).pc == HANDLER).then_some(m.harts()[0].csr.mcause);
    (cause, m)
}

const VALID: u64 = 1;
const READABLE: u64 = 3;
const ACCESSED: u64 = 1 << 6;

#[test]
fn the_memory_type_3_faults_and_the_others_need_to_be_enabled() {
    for kind in 0..4 {
        for menvcfg in [0, envcfg::PBMTE] {
            let leaf = pte(RAM_BASE, READABLE | ACCESSED | kind << 61);
            let (cause, _) = load_translated(&[(TABLE, leaf)], 0, menvcfg);
            let legal = kind == 0 || kind != 3 && menvcfg != 0;
            assert_eq!(cause, (!legal).then_some(cause::LOAD_PAGE), "{kind} {menvcfg:#x}");
        }
    }
}

#[test]
fn a_walk_sets_accessed_bits_only_where_that_is_enabled() {
    let leaf = pte(RAM_BASE, READABLE);
    let (cause, m) = load_translated(&[(TABLE, leaf)], 0, 0);
    assert_eq!((cause, m.ram().read_u64(TABLE).unwrap()), (Some(cause::LOAD_PAGE), leaf));
    let (cause, m) = load_translated(&[(TABLE, leaf)], 0, envcfg::ADUE);
    assert_eq!((cause, m.ram().read_u64(TABLE).unwrap()), (None, leaf | ACCESSED));
}

#[test]
fn a_range_of_64_kib_maps_each_page_by_its_number_and_other_sizes_fault_without_a_change() {
    let (middle, last) = (TABLE + 0x1000, TABLE + 0x2000);
    for (size, expected) in [(8, None), (4, Some(cause::LOAD_PAGE)), (0, Some(cause::LOAD_PAGE))] {
        // The ranges at 0x1_0000 of RAM and at page 0x20 of the address space, page 5 of it.
        let leaf = pte(RAM_BASE + 0x1_0000 + (size << 12), READABLE | 1 << 63);
        let entry = last + 8 * 0x25;
        let tables = [
            (TABLE, pte(middle, VALID)),
            (middle, pte(last, VALID)),
            (entry, leaf),
            (RAM_BASE + 0x1_5008, 0x1234),
        ];
        let (cause, m) = load_translated(&tables, 0x2_5008, envcfg::ADUE);
        let (after, value) = if cause.is_none() { (ACCESSED, 0x1234) } else { (0, 0) };
        assert_eq!(cause, expected);
        assert_eq!((m.ram().read_u64(entry).unwrap(), m.harts()[0].x[6]), (leaf | after, value));
    }
}

#[test]
fn disabling_memory_types_takes_effect_on_known_translations() {
    // ld x6, (x5); csrw menvcfg, x0; ld x6, (x5)
    let mut m = machine(&[0x0002_b303, 0x30a0_1073, 0x0002_b303]);
    let leaf = pte(RAM_BASE, READABLE | ACCESSED | 1 << 61);
    m.ram_mut().write(TABLE, &leaf.to_le_bytes()).unwrap();
    let hart = &mut m.harts_mut()[0];
    hart.pmp = Pmp::allow_all();
    (hart.csr.menvcfg, hart.csr.satp) = (envcfg::PBMTE, 8 << 60 | TABLE >> 12);
    hart.csr.mstatus |= mstatus::MPRV | 1 << mstatus::MPP_SHIFT;
    let hart = run(&mut m, 3);
    assert_eq!((hart.csr.mcause, hart.csr.mepc), (cause::LOAD_PAGE, RAM_BASE + 8));
}

#[test]
fn a_wait_ends_the_reservation() {
    // lr.d x6, (x5); wrs.nto or wrs.sto; sc.d x7, x6, (x5)
    for wait in [0x00d0_0073, 0x01d0_0073] {
        let mut m = machine(&[0x1002_b32f, wait, 0x1862_b3af]);
        m.harts_mut()[0].x[5] = RAM_BASE + 0x2000;
        assert_eq!(run(&mut m, 3).x[7], 1);
    }
}

/// Pairs that an engine may take for one instruction: on one page and to another, with an odd target, at the ends of what can
/// be said, with the first half's result kept and not, and with none for the second.
#[test]
fn what_is_made_relative_to_the_pc_is_the_same_in_every_engine() {
    let auipc = |rd: u32, page: i32| (page as u32) << 12 | rd << 7 | 0x17;
    let second =
        |op: u32, rd: u32, rs1: u32, imm: i32| (imm as u32) << 20 | rs1 << 15 | rd << 7 | op;
    const ADDI: u32 = 0x13;
    const JALR: u32 = 0x67;
    let back = |rd, rs1, imm| [NOP, auipc(5, 0), second(JALR, rd, rs1, imm), NOP];
    let there = |page, rd, imm| [auipc(5, page), second(JALR, rd, 5, imm), NOP, NOP];
    let address = |page, rd, imm| [auipc(5, page), second(ADDI, rd, 5, imm), 0xff9f_f06f, NOP]; // j .-8
    let programs = [
        back(5, 5, -4),
        back(6, 5, -3),
        back(0, 5, -3),
        there(2, 5, 0),
        there(2, 6, 1),
        there(2, 1, 3),
        there(-0x8_0000, 5, -2048),
        there(0x7_ffff, 1, 2047),
        address(0x7_ffff, 5, 2047),
        address(-0x8_0000, 6, -2048),
        address(1, 5, -1),
        address(0, 0, 7),
    ];
    for words in programs {
        let seen = [EngineKind::Interpreter, EngineKind::Jit].map(|kind| {
            let mut m = machine(&words);
            m.set_engine(EngineConfig { hot_after: 0, ..EngineConfig::new(kind) });
            // ret through x7, and a step of its own at an odd half.
            let ret = 0x0003_8067_0003_8067u64.to_le_bytes();
            m.ram_mut().write(RAM_BASE + 0x2000, &ret).unwrap();
            m.harts_mut()[0].x[7] = RAM_BASE;
            let mut seen = Vec::new();
            for steps in [1, 2, 3, 50, 1, 1, 1, 1, 1000] {
                let hart = run(&mut m, steps);
                seen.push((hart.pc, hart.x[..32].to_vec(), hart.csr.mcause, hart.csr.mepc));
            }
            seen
        });
        assert_eq!(seen[0], seen[1], "{words:x?}");
    }
}

/// What an engine forgets to make room must not take with it that others know of the page.
#[test]
fn code_is_followed_when_more_pages_have_run_than_the_interpreter_keeps() {
    // call: jalr x1, 0(x5); addi x7, x7, -1; bne x7, x0, call; here: j here; sw x8, 0(x5); j here
    let words = [0x0002_80e7, 0xfff3_8393, 0xfe03_9ce3, 0x0000_006f, 0x0082_a023, 0xffdf_f06f];
    let mut m = machine(&words);
    let (function, pages) = (RAM_BASE + 0x10_0000, RAM_BASE + 0x20_0000);
    let set = |m: &mut Machine, pc: u64, x5: u64, x7: u64| {
        let hart = &mut m.harts_mut()[0];
        (hart.pc, hart.x[5], hart.x[7], hart.x[8]) = (pc, x5, x7, 0x0020_0313);
        run(m, 10 * x7 + 5).x[6]
    };
    // addi x6, x0, 1; ret
    m.ram_mut().write(function, &0x0000_8067_0010_0313u64.to_le_bytes()).unwrap();
    assert_eq!(set(&mut m, RAM_BASE, function, 200), 1);
    for page in 0..5000 {
        let at = pages + page * 4096;
        m.ram_mut().write(at, &0x0000_8067u32.to_le_bytes()).unwrap();
        set(&mut m, RAM_BASE, at, 1);
    }
    set(&mut m, RAM_BASE + 16, function, 1); // addi x6, x0, 2
    assert_eq!(set(&mut m, RAM_BASE, function, 200), 2);
}

/// Whatever the engine, and however far the next timer is.
#[test]
fn a_machine_that_runs_on_stops_when_it_is_asked_to() {
    for kind in [EngineKind::Interpreter, EngineKind::Jit] {
        let mut m = machine(&[0x0013_0313, 0xffdf_f06f]); // addi x6, x6, 1; j .-4
        m.set_engine(EngineConfig::new(kind));
        let stop = AtomicBool::new(true);
        for _ in 0..3 {
            let before = m.icount();
            assert_eq!(m.run(u64::MAX, &stop), Exit::Stopped);
            let steps = m.icount() - before;
            assert!((1..=20_000).contains(&steps), "{kind}: {steps} steps");
        }
    }
}

/// A walk that faults has read the tables above the one that it faults at.
#[test]
fn a_table_that_only_a_faulting_walk_has_read_is_followed_like_any_other() {
    let mut m = machine(&[0x0062_b023, 0x0004_3383]); // sd x6, (x5); ld x7, (x8)
    let [middle, leaves, others, first, second] =
        [0x5000, 0x6000, 0x7000, 0x8000, 0x9000].map(|at| RAM_BASE + at);
    let leaf = 0xcf; // V R W X A D
    for (at, value) in
        [(TABLE, pte(middle, 1)), (others, pte(second, leaf)), (first, 1), (second, 2)]
    {
        m.ram_mut().write(at, &value.to_le_bytes()).unwrap();
    }
    let hart = &mut m.harts_mut()[0];
    hart.pmp = Pmp::allow_all();
    hart.csr.satp = 8 << 60 | TABLE >> 12;
    let store = |m: &mut Machine, at, value| {
        let hart = &mut m.harts_mut()[0];
        (hart.pc, hart.x[5], hart.x[6]) = (RAM_BASE, at, value);
        hart.csr.mstatus &= !mstatus::MPRV;
        run(m, 1);
    };
    let load = |m: &mut Machine| {
        let hart = &mut m.harts_mut()[0];
        (hart.pc, hart.x[8]) = (RAM_BASE + 4, 0);
        hart.csr.mstatus |= mstatus::MPRV;
        hart.csr.mstatus = hart.csr.mstatus & !mstatus::MPP | 1 << mstatus::MPP_SHIFT;
        let hart = run(m, 1);
        (hart.pc == RAM_BASE + 8).then_some(hart.x[7])
    };
    for _ in 0..3 {
        store(&mut m, middle, pte(leaves, 1));
    }
    assert_eq!(load(&mut m), None);
    store(&mut m, leaves, pte(first, leaf));
    assert_eq!(load(&mut m), Some(1));
    store(&mut m, middle, pte(others, 1));
    assert_eq!(load(&mut m), Some(2));
}

#[test]
fn a_debugger_reads_registers_whatever_the_mode_and_as_of_now() {
    // It runs in user mode, and has not looked at its interrupts since guest time passed its comparator.
    let mut m = machine(&[0x0000_006f]); // j .
    let hart = &mut m.harts_mut()[0];
    hart.mode = Mode::User;
    hart.pmp = Pmp::allow_all();
    hart.csr.mscratch = 7;
    hart.csr.fcsr = 0xe3;
    let before = m.digest();
    let read = |m: &Machine, csr| m.peek_csr(0, csr);
    assert_eq!([0x340, 3, 2, 1].map(|csr| read(&m, csr)), [7, 0xe3, 7, 3].map(Some));
    assert_eq!(read(&m, 0x300).unwrap() & mstatus::FS, 0);
    assert_eq!((read(&m, 0x7c0), m.peek_csr(1, 0x340)), (None, None));
    assert_eq!(m.digest(), before, "reading leaves no trace");
    run(&mut m, 100);
    assert_eq!((read(&m, 0xb00), read(&m, 0xc01)), (Some(100), Some(m.mtime())));
    m.apply(&Input::Clock { mtime: 1 << 40, rate: 1 }).unwrap();
    m.harts_mut()[0].csr.menvcfg |= envcfg::STCE;
    m.harts_mut()[0].csr.stimecmp = 1 << 39;
    assert_eq!(read(&m, 0x344).unwrap() & irq::STIP, irq::STIP);
}

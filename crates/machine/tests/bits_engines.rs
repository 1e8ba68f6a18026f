//! Bit manipulation, cryptography and atomics as generated code against the interpreter: every instruction with all ways to
//! name its registers, and atomics on all kinds of places.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use isa::Op;
use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::hart::pmp::Pmp;
use machine::hart::{Hart, mstatus};
use machine::ram::RAM_BASE;

#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "qemu_oracle/rng.rs"]
mod rng;
use rng::Rng;

const NOP: u32 = 0x13;
/// `j .+4`: the end of a block.
const JUMP: u32 = 0x0040_006f;
const HANDLER: u64 = RAM_BASE + 0x1000;
const TABLE: u64 = RAM_BASE + 0x2000;
/// Data that atomics work on.
const DATA: u64 = RAM_BASE + 0x3000;
const CODE: u64 = RAM_BASE + 0x1_0000;
/// x0, two registers that generated code keeps in memory, and all that it keeps in host registers.
const REGISTERS: [u32; 13] = [0, 5, 28, 2, 8, 9, 10, 11, 12, 13, 14, 15, 18];

/// Two machines with the same code, in blocks that are run one at a time.
struct Pair {
    reference: Machine,
    tested: Machine,
    /// Addresses and numbers of instructions, that of the jump included.
    blocks: Vec<(u64, u64)>,
}

fn machine(engine: EngineConfig, code: &[u32]) -> Machine {
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
    let bios = Some(NOP.to_le_bytes().to_vec().into());
    let mut m = Machine::new(config, BootImages { bios, ..BootImages::default() }).unwrap();
    m.set_engine(engine);
    (0..64).for_each(|i| m.ram_mut().write(HANDLER + 4 * i, &NOP.to_le_bytes()).unwrap());
    let bytes: Vec<u8> = code.iter().flat_map(|w| w.to_le_bytes()).collect();
    m.ram_mut().write(CODE, &bytes).unwrap();
    m.harts_mut()[0].csr.mtvec = HANDLER;
    m
}

fn run(m: &mut Machine, pc: u64, steps: u64) {
    m.harts_mut()[0].pc = pc;
    m.run(m.icount() + steps, &AtomicBool::new(false));
}

impl Pair {
    fn new(blocks: &[Vec<u32>]) -> Self {
        let (mut code, mut places) = (vec![JUMP], vec![]);
        for block in blocks {
            places.push((CODE + 4 * code.len() as u64, block.len() as u64 + 1));
            code.extend(block);
            code.push(JUMP);
        }
        let jit = EngineConfig { hot_after: 0, ..EngineConfig::new(EngineKind::Jit) };
        Self {
            reference: machine(EngineConfig::new(EngineKind::Interpreter), &code),
            tested: machine(jit, &code),
            blocks: places,
        }
    }

    /// Runs a block on both from a state that `prepare` makes.
    fn run(&mut self, block: usize, prepare: impl Fn(&mut Hart)) {
        let (pc, steps) = self.blocks[block];
        for m in [&mut self.reference, &mut self.tested] {
            prepare(&mut m.harts_mut()[0]);
            // From the jump before it: only what is jumped to gets translated.
            run(m, pc - 4, steps + 1);
        }
        self.compare(block);
    }

    /// Every block was generated code at last.
    fn check_blocks(&self) {
        let blocks = self.tested.engine_stats().blocks;
        if jit::is_supported() {
            assert!(blocks >= self.blocks.len() as u64, "{blocks} blocks were translated");
        }
    }

    fn compare(&mut self, block: usize) {
        let (a, b) = (&self.reference.harts()[0], &self.tested.harts()[0]);
        let same = a.x[..32] == b.x[..32]
            && (a.pc, a.mode) == (b.pc, b.mode)
            && a.csr == b.csr
            && a.reservation() == b.reservation()
            && self.reference.icount() == self.tested.icount();
        if same {
            return;
        }
        let (pc, steps) = self.blocks[block];
        for at in (pc..).step_by(4).take(steps as usize) {
            let word = self.reference.ram().read_u32(at).unwrap();
            eprintln!("{at:#x} {}", isa::disassemble(at, &isa::decode(word)));
        }
        for (i, (a, b)) in a.x[..32].iter().zip(&b.x[..32]).enumerate().filter(|(_, (a, b))| a != b)
        {
            eprintln!("x{i}: {a:#x}, as generated code {b:#x}");
        }
        eprintln!("reservations {:x?} {:x?}", a.reservation(), b.reservation());
        panic!("pc {:#x} and {:#x}, cause {} and {}", a.pc, b.pc, a.csr.mcause, b.csr.mcause);
    }
}

/// The instructions in a range of the table: a word of each, and its bits that may be anything.
fn forms(first: Op, last: Op) -> BTreeMap<Op, (u32, u32)> {
    let mut found = BTreeMap::new();
    for major in [0x04, 0x06, 0x0b, 0x0c, 0x0e] {
        for rest in 0..1u32 << 15 {
            let (f3, f7, rs2) = (rest & 7, rest >> 3 & 0x7f, rest >> 10);
            let word = f7 << 25 | rs2 << 20 | f3 << 12 | major << 2 | 3;
            let op = isa::decode(word).op;
            if op >= first && op <= last && !found.contains_key(&op) {
                let is_free = |bit: &u32| isa::decode(word ^ bit).op == op;
                let free: u32 = (0..32).map(|bit| 1 << bit).filter(is_free).sum();
                found.insert(op, (word & !free, free));
            }
        }
    }
    found
}

fn with_registers(form: (u32, u32), rng: &mut Rng, rd: u32, rs1: u32, rs2: u32) -> u32 {
    const FIELDS: u32 = 0x01ff_8f80;
    let (bits, free) = form;
    let wanted = rd << 7 | rs1 << 15 | rs2 << 20;
    bits | rng.next() as u32 & free & !FIELDS | wanted & free & FIELDS
}

/// Runs an instruction with every combination of its registers, or all constants for the second one.
fn all_registers(op: Op, form: (u32, u32), rng: &mut Rng) {
    let mut words = vec![];
    for rd in REGISTERS {
        for rs1 in REGISTERS {
            for rs2 in 0..32 {
                let word = with_registers(form, rng, rd, rs1, rs2);
                if isa::decode(word).op == op && words.last() != Some(&vec![word]) {
                    words.push(vec![word]);
                }
            }
        }
    }
    let mut pair = Pair::new(&words);
    let rounds = if words.len() > 1000 { 2 } else { 20 };
    for _ in 0..rounds {
        for block in 0..words.len() {
            let values: Vec<u64> = (0..32).map(|_| rng.integer()).collect();
            pair.run(block, |hart| hart.x[1..32].copy_from_slice(&values[1..]));
        }
    }
    pair.check_blocks();
}

#[test]
fn bit_manipulation_and_cryptography_with_all_registers() {
    let mut rng = Rng::new(7);
    let forms = forms(Op::AddUw, Op::Sha512sig1);
    assert_eq!(forms.len(), 66);
    for (op, form) in forms {
        all_registers(op, form, &mut rng);
    }
}

/// Maps RAM, its read-only double, the devices, nothing, and pages whose flags have to be set, 1 GiB each.
fn map(m: &mut Machine) {
    let leaf = |gpa: u64, flags: u64| gpa >> 12 << 10 | flags;
    let entries = [
        leaf(RAM_BASE, 0xc7),
        leaf(RAM_BASE, 0x43),
        leaf(0, 0xc7),
        0,
        leaf(RAM_BASE, 0x07),
        leaf(RAM_BASE, 0x47),
    ];
    for (i, entry) in entries.iter().enumerate() {
        m.ram_mut().write(TABLE + 8 * i as u64, &entry.to_le_bytes()).unwrap();
    }
    let hart = &mut m.harts_mut()[0];
    hart.pmp = Pmp::allow_all();
    hart.csr.satp = 8 << 60 | TABLE >> 12;
    hart.csr.mstatus |= mstatus::MPRV | 1 << mstatus::MPP_SHIFT;
}

/// An address for an atomic, often of something that it can work on.
fn address(rng: &mut Rng, code: u64) -> u64 {
    let double = match rng.below(12) {
        0 => 1,
        1 => 4,
        2 => 5,
        3 => return (2 << 30) + rng.pick(&[0x1000_0000, 0x1000_0004, 0x0200_4000, 0x0c00_0000, 0]),
        4 => return 3 << 30 | rng.bits(12) as u64,
        _ => 0,
    };
    let offset = match rng.below(12) {
        0 => rng.below(64),
        1 => 0xff8 + rng.below(12),
        // Behind the blocks, on their last page.
        2 => code,
        _ => 8 * rng.below(4) + 4 * rng.below(2),
    };
    (double << 30) + (DATA - RAM_BASE) + offset
}

/// Runs groups of atomics, on addresses of chance, with everything compared behind each group.
fn atomics(seed: u64, blocks: usize) {
    let mut rng = Rng::new(seed);
    let forms: Vec<_> = forms(Op::LrW, Op::AmoMaxuD).into_iter().collect();
    assert_eq!(forms.len(), 22);
    let reserving = [Op::LrW, Op::LrD, Op::ScW, Op::ScD];
    let mut groups = vec![];
    for i in 0..blocks {
        let mut group = vec![];
        for _ in 0..1 + rng.below(4) {
            let form = loop {
                let (op, form) = rng.pick(&forms);
                if i % 2 == 0 || reserving.contains(&op) {
                    break form;
                }
            };
            let (rd, rs1, rs2) =
                (rng.pick(&REGISTERS), rng.pick(&REGISTERS[1..]), rng.pick(&REGISTERS));
            group.push(with_registers(form, &mut rng, rd, rs1, rs2));
        }
        groups.push(group);
    }
    let mut pair = Pair::new(&groups);
    let last = pair.blocks[blocks - 1];
    let behind = (last.0 + 4 * last.1 + 8) & !7;
    for _ in 0..30 {
        map(&mut pair.reference);
        map(&mut pair.tested);
        let csr = pair.reference.harts()[0].csr.clone();
        for block in 0..groups.len() {
            let few: Vec<u64> = (0..3).map(|_| address(&mut rng, behind - DATA)).collect();
            let mut values: Vec<u64> = (0..32).map(|_| rng.integer()).collect();
            for register in REGISTERS {
                if !rng.one_in(4) {
                    values[register as usize] = rng.pick(&few);
                }
            }
            pair.run(block, |hart| {
                hart.x[1..32].copy_from_slice(&values[1..]);
                hart.csr = csr.clone();
            });
        }
        assert_eq!(pair.reference.digest(), pair.tested.digest());
    }
    pair.check_blocks();
}

#[test]
fn atomics_on_all_kinds_of_addresses() {
    for seed in 1..=6 {
        atomics(seed, 400);
    }
}

#[test]
fn an_atomic_changes_the_code_behind_it() {
    // The second instruction of each is `addi a0, a0, N`, and the address of that is in a2, the new one in a1.
    let addi = |n: u32| n << 20 | 0x0005_0513;
    let swap = 0x08b6_262f; // amoswap.w a2, a1, (a2)
    let (reserve, store) = (0x1006_22af, 0x18b6_26af); // lr.w t0, (a2); sc.w a3, a1, (a2)
    for before in [vec![swap], vec![reserve, store]] {
        let block: Vec<u32> = before.iter().copied().chain([addi(0)]).collect();
        let mut pair = Pair::new(&[vec![NOP], block]);
        let at = pair.blocks[1].0 + 4 * before.len() as u64;
        for n in 1..20 {
            pair.run(1, |hart| {
                hart.x[10..13].copy_from_slice(&[0, addi(n).into(), at]);
            });
            assert_eq!(pair.tested.harts()[0].x[10], n.into());
        }
        pair.check_blocks();
    }
}

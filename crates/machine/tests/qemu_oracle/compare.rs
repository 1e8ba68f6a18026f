//! Runs an image on QEMU and on our machine and compares all of RAM, the log first.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::io::HaltReason;
use machine::{Exit, Machine};

use crate::case::Case;
use crate::cpu::CPU;
use crate::exceptions;
use crate::payload::*;

/// The device tree and what belongs to it is at the end of RAM and not compared.
const COMPARED: usize = (RAM - (4 << 20)) as usize;
/// Steps after which our machine is taken to loop.
const STEPS_MAX: u64 = 20_000_000;
const STEP_CHUNK: u64 = 4_000_000;

/// RAM after the image ran on QEMU.
pub(crate) fn on_qemu(name: &str, extensions: &str, image: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("oracle-{name}.ram"));
    let mut ram = image.to_vec();
    ram.resize(RAM as usize, 0);
    std::fs::write(&path, &ram).unwrap();
    let memory =
        format!("memory-backend-file,id=ram,size={RAM},share=on,mem-path={}", path.display());
    let output = Command::new("timeout")
        .args(["--kill-after=1", "20", "qemu-system-riscv64", "-nodefaults", "-display", "none"])
        .args([
            "-M",
            "virt,memory-backend=ram",
            "-m",
            "128M",
            "-object",
            &memory,
            "-cpu",
            &format!("{CPU}{extensions}"),
        ])
        .args(["-bios", "none", "-accel", "tcg,thread=multi", "-smp", "1,maxcpus=2"])
        .output()
        .unwrap();
    assert_ne!(
        output.status.code(),
        Some(127),
        "cannot run qemu-system-riscv64; install the Debian package qemu-system-misc"
    );
    let ran = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let index = u64_at(&ran, (GLOBALS - BASE + 16) as usize);
    assert!(
        output.status.success(),
        "{name}: QEMU failed in case {index}: {} {errors}",
        output.status
    );
    ran
}

/// RAM after the image ran on our machine. The JIT translates what it can, however seldom it is executed.
pub(crate) fn on_machine(name: &str, engine: EngineKind, image: &[u8]) -> Vec<u8> {
    let config = MachineConfig {
        harts: 1,
        ram_size: RAM,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    let bios = Some(vec![0x13u8, 0, 0, 0].into());
    let mut m = Machine::new(config, BootImages { bios, ..BootImages::default() }).unwrap();
    m.set_engine(EngineConfig { hot_after: 0, ..EngineConfig::new(engine) });
    m.ram_mut().write(BASE, image).unwrap();
    let stop = AtomicBool::new(false);
    loop {
        let exit = m.run(m.icount() + STEP_CHUNK, &stop);
        if exit == Exit::Halted {
            assert_eq!(m.halted(), Some(&HaltReason::PowerOff { code: 0 }));
            return m.ram().bytes().to_vec();
        }
        let index = u64_at(m.ram().bytes(), (GLOBALS - BASE + 16) as usize);
        assert!(
            exit == Exit::Reached && m.icount() < STEPS_MAX,
            "{name}: our machine on the {engine} ends with {exit:?} in case {index} at pc {:#x}",
            m.harts()[0].pc
        );
    }
}

fn u64_at(ram: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(ram[at..at + 8].try_into().unwrap())
}

/// The records of each case: their double words.
fn records(ram: &[u8], cases: usize) -> Vec<Vec<Vec<u64>>> {
    let mut all = vec![vec![]; cases];
    let (from, to) = ((LOG - BASE) as usize, u64_at(ram, (GLOBALS - BASE) as usize) - BASE);
    let to = to as usize;
    for record in ram[from..to].chunks_exact(RECORD) {
        let words: Vec<u64> = (0..RECORD / 8).map(|i| u64_at(record, i * 8)).collect();
        let index = (words[0] & 0x7ff) as usize;
        if let Some(list) = all.get_mut(index) {
            list.push(words);
        }
    }
    all
}

/// How often each pair of mcause and, where the S-mode handler was entered, scause occurs.
fn causes(all: &[Vec<Vec<u64>>]) -> BTreeMap<(u64, u64), u32> {
    let mut counts = BTreeMap::new();
    for r in all.iter().flatten().filter(|r| r[0] >> 63 == 0) {
        let delegated = r[32] == 9 && r[33] >> 12 == S_HANDLER >> 12;
        *counts.entry((r[32], if delegated { r[36] } else { 0 })).or_default() += 1;
    }
    counts
}

fn field(record: &[u64], i: usize) -> String {
    let end = record[0] >> 63 != 0;
    match i {
        0 => "marker".into(),
        1..=32 if end => format!("f{}", i - 1),
        1..=31 => format!("x{i}"),
        i if end => END_CSRS.get(i - 40).map_or("-", |c| c.0).into(),
        i => RECORD_CSRS.get(i - 32).map_or("-", |c| c.0).into(),
    }
}

fn describe(case: &Case, index: usize, qemu: &[Vec<u64>], ours: &[Vec<u64>]) -> Option<String> {
    let empty = vec![0; RECORD / 8];
    let at = (0..qemu.len().max(ours.len())).find(|&i| qemu.get(i) != ours.get(i))?;
    let (q, o) = (qemu.get(at).unwrap_or(&empty), ours.get(at).unwrap_or(&empty));
    let mut text = format!(
        "case {index} ({}, mode {}), record {at} of {}/{}:\n",
        case.kind,
        case.mode,
        qemu.len(),
        ours.len()
    );
    for i in (0..RECORD / 8).filter(|&i| q[i] != o[i]) {
        text += &format!("  {:8} qemu {:#018x} ours {:#018x}\n", field(q, i), q[i], o[i]);
    }
    text += &format!(
        "  qemu: cause {:#x} epc {:#x} tval {:#x} mstatus {:#x}; scause {:#x} sepc {:#x} stval {:#x}\n",
        q[32], q[33], q[34], q[35], q[36], q[37], q[38]
    );
    let base = case.code_gpa.wrapping_add(case.code_va_offset);
    let slot_of = |pc: u64| {
        Some((pc.wrapping_sub(base) / SLOT) as usize).filter(|s| s * 16 < case.code.len())
    };
    let pc = |r: &[u64]| slot_of(r[33]).or(slot_of(r[37]));
    let last = pc(q).or(pc(o)).unwrap_or(case.code.len() / 16 - 1);
    let first = at.checked_sub(1).and_then(|p| pc(&qemu[p])).unwrap_or(0);
    for slot in first.min(last).max(last.saturating_sub(2))..=last {
        text += &format!("  slot {slot} at {:#x}:\n", base + slot as u64 * SLOT);
        let mut bytes = &case.code[slot * 16..slot * 16 + 16];
        while bytes.len() >= 2 {
            let long = bytes[0] & 3 == 3 && bytes.len() >= 4;
            let (head, tail) = bytes.split_at(if long { 4 } else { 2 });
            let raw = head.iter().rev().fold(0u32, |v, &b| v << 8 | u32::from(b));
            text += &format!("    {raw:08x} {:?}\n", isa::decode(raw));
            bytes = tail;
        }
    }
    Some(text)
}

/// Compares the two; panics with the first differences.
pub(crate) fn compare(name: &str, seed: u64, cases: &[Case], qemu: &[u8], ours: &[u8]) {
    let (q, o) = (records(qemu, cases.len()), records(ours, cases.len()));
    let found: Vec<String> =
        (0..cases.len()).filter_map(|i| describe(&cases[i], i, &q[i], &o[i])).collect();
    assert!(
        found.is_empty(),
        "{name}, seed {seed}: {} of {} cases differ; the first:\n{}known differences:\n{}",
        found.len(),
        cases.len(),
        found.iter().take(4).cloned().collect::<String>(),
        exceptions::text()
    );
    assert!(q.iter().all(|records| records.len() >= 2), "{name}: every case is in the log");
    if std::env::args().any(|a| a == "--show-output") {
        println!("{name}: {} cases, records by mcause and scause {:x?}", cases.len(), causes(&q));
    }
    let differs = |at: &usize| qemu[*at..at + 8] != ours[*at..at + 8];
    let found: Vec<String> = (0..COMPARED)
        .step_by(8)
        .filter(differs)
        .take(20)
        .map(|at| {
            let gpa = BASE + at as u64;
            let owner = cases.iter().position(|c| (c.owns.0..c.owns.1).contains(&gpa));
            format!(
                "  {gpa:#x} (case {owner:?}): qemu {:#x} ours {:#x}\n",
                u64_at(qemu, at),
                u64_at(ours, at)
            )
        })
        .collect();
    assert!(found.is_empty(), "{name}, seed {seed}: memory differs:\n{}", found.concat());
}

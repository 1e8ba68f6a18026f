//! What people read of a difference: the instructions that led to it, and what differs.

use std::fmt::Write;

use machine::Machine;
use machine::hart::{Hart, Mode};
use machine::ram::{GuestRam, PAGE_SIZE, RAM_BASE};

use crate::fuzz::check::{Guest, Pair, run_to};

/// Steps shown before the one behind which the machines differ.
pub(crate) const HISTORY: u64 = 24;

/// How to see it again.
pub(crate) fn command(guest: &dyn Guest) -> String {
    format!(
        "cargo run --release -p machine --example fuzz_engines -- --theme {} --seed {} --programs 1",
        guest.name(),
        guest.seed()
    )
}

/// Physical address of a fetch, without setting any bit.
fn fetch_address(ram: &GuestRam, hart: &Hart, va: u64) -> Option<u64> {
    let satp = hart.csr.satp;
    if hart.mode == Mode::Machine || satp >> 60 == 0 {
        return Some(va);
    }
    let mut table = (satp & ((1 << 44) - 1)) << 12;
    for level in (0..if satp >> 60 == 9 { 4 } else { 3 }).rev() {
        let pte = ram.read_u64(table + (va >> (12 + 9 * level) & 0x1ff) * 8).ok()?;
        let to = (pte >> 10 & ((1 << 44) - 1)) << 12;
        if pte & 1 == 0 {
            return None;
        }
        if pte & 0xa != 0 {
            let mask = (1u64 << (12 + 9 * level)) - 1;
            return Some(to & !mask | va & mask);
        }
        table = to;
    }
    None
}

/// The instruction that a hart is about to execute.
pub(crate) fn next_instruction(m: &Machine, hart: &Hart) -> Option<isa::Insn> {
    let half = |va| m.ram().read_u16(fetch_address(m.ram(), hart, va)?).ok();
    let low = half(hart.pc)?;
    let high = if low & 3 == 3 { half(hart.pc.wrapping_add(2))? } else { 0 };
    Some(isa::decode(u32::from(low) | u32::from(high) << 16))
}

/// One line about the step that each hart that moved made.
fn step(m: &mut Machine) -> String {
    let before: Vec<Hart> = m.harts().to_vec();
    let lines: Vec<String> = before
        .iter()
        .map(|h| {
            let insn = next_instruction(m, h);
            let text = insn.map_or("(no fetch)".to_owned(), |i| isa::disassemble(h.pc, &i));
            format!("hart {} {:?} {:#x}: {text}", h.id, h.mode, h.pc)
        })
        .collect();
    let at = m.icount();
    run_to(m, at + 1);
    let moved = before.iter().zip(m.harts()).position(|(a, b)| a.steps != b.steps);
    let Some(h) = moved else { return format!("  {at} nothing") };
    let hart = &m.harts()[h];
    let trap = hart.pc == hart.csr.mtvec
        || hart.pc & !3 == hart.csr.stvec & !3 && hart.mode == Mode::Supervisor;
    let note = if trap {
        format!("  -> trap, mcause {:#x} scause {:#x}", hart.csr.mcause, hart.csr.scause)
    } else {
        String::new()
    };
    format!("  {at} {}{note}", lines[h])
}

fn register_differences(out: &mut String, a: &Hart, b: &Hart) {
    let mut line = |name: &str, x: u64, y: u64| {
        if x != y {
            let _ = writeln!(out, "  hart {} {name}: {x:#x} {y:#x}", a.id);
        }
    };
    line("pc", a.pc, b.pc);
    line("steps", a.steps, b.steps);
    line("mode", a.mode as u64, b.mode as u64);
    for k in 0..32 {
        line(&format!("x{k}"), a.x[k], b.x[k]);
    }
    for k in 0..32 {
        line(&format!("f{k}"), a.f[k], b.f[k]);
    }
    if a.csr != b.csr {
        let (x, y) = (format!("{:#?}", a.csr), format!("{:#?}", b.csr));
        for (x, y) in x.lines().zip(y.lines()).filter(|(x, y)| x != y) {
            let hex = |s: &str| {
                let number = s
                    .trim()
                    .trim_end_matches(',')
                    .rsplit(' ')
                    .next()
                    .and_then(|n| n.parse::<u64>().ok());
                number.map_or(s.trim().to_owned(), |n| format!("{n:#x}"))
            };
            let name = x.trim().split(':').next().unwrap_or("");
            let _ = writeln!(out, "  hart {} {name}: {} {}", a.id, hex(x), hex(y));
        }
    }
    if a.reservation() != b.reservation() || a.waiting != b.waiting || a.pmp != b.pmp {
        let (x, y) = (a.reservation(), b.reservation());
        let _ = writeln!(out, "  hart {}: reservation {x:x?} {y:x?}", a.id);
        let _ = writeln!(
            out,
            "  hart {}: waiting {} {}, same PMP {}",
            a.id,
            a.waiting,
            b.waiting,
            a.pmp == b.pmp
        );
    }
}

fn memory_differences(out: &mut String, a: &Machine, b: &Machine) {
    let mut shown = 0;
    for (page, (x, y)) in
        a.ram().bytes().chunks(PAGE_SIZE).zip(b.ram().bytes().chunks(PAGE_SIZE)).enumerate()
    {
        if x == y {
            continue;
        }
        for (k, (x, y)) in x.chunks(8).zip(y.chunks(8)).enumerate().filter(|(_, (x, y))| x != y) {
            shown += 1;
            if shown <= 16 {
                let gpa = RAM_BASE + (page * PAGE_SIZE + k * 8) as u64;
                let _ = writeln!(out, "  memory {gpa:#x}: {x:02x?} {y:02x?}");
            }
        }
    }
    if shown > 16 {
        let _ = writeln!(out, "  and {} double words more", shown - 16);
    }
}

/// The report: `before` is the reference some steps earlier, `pair` stands where it differs first.
pub(crate) fn report(guest: &dyn Guest, before: &mut Machine, pair: &mut Pair, at: u64) -> String {
    let mut out = format!(
        "{}\nthe machines differ first at {at}; instructions of the reference:\n",
        command(guest)
    );
    while before.icount() < at {
        let from = before.icount();
        let _ = writeln!(out, "{}", step(before));
        if before.icount() == from {
            break;
        }
    }
    let (a, b) = (&mut pair.reference.m, &mut pair.tested.m);
    let _ = writeln!(out, "state (reference, tested with {}):", b.engine());
    if a.icount() != b.icount() {
        let _ = writeln!(out, "  icount: {} {}", a.icount(), b.icount());
    }
    for (x, y) in a.harts().iter().zip(b.harts()) {
        register_differences(&mut out, x, y);
    }
    let (x, y) = (a.save(), b.save());
    if x.board != y.board {
        let _ = writeln!(out, "  devices: {:x?}\n           {:x?}", x.board, y.board);
    }
    if (x.current, x.turn_left, x.halted) != (y.current, y.turn_left, y.halted) {
        let _ =
            writeln!(out, "  turn: {} {}; {} {}", x.current, x.turn_left, y.current, y.turn_left);
    }
    memory_differences(&mut out, a, b);
    out
}

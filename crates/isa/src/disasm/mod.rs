//! Instructions as text, in the manner of `objdump -M no-aliases,numeric`.
//!
//! # Place
//! For people: traces, divergence reports, the inspector. Compressed instructions are shown as what they expand to.

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use crate::float::constant;
use crate::insn::Insn;
use crate::table::{Format, Op};

/// The text of `insn`, which stands at address `pc`: branch and jump targets are absolute.
#[must_use]
pub fn disassemble(pc: u64, insn: &Insn) -> String {
    if let Some(text) = prefetch(insn) {
        return text;
    }
    let row = insn.op.row();
    let Insn { imm, rd, rs1, rs2, rs3, .. } = *insn;
    let target = pc.wrapping_add(i64::from(imm) as u64);
    let rm = rounding(insn);
    let operands = match row.format {
        Format::None => String::new(),
        Format::R => format!("x{rd},x{rs1},x{rs2}"),
        Format::R1 => format!("x{rd},x{rs1}"),
        Format::I => format!("x{rd},x{rs1},{imm}"),
        Format::Load => format!("x{rd},{imm}(x{rs1})"),
        Format::Store => format!("x{rs2},{imm}(x{rs1})"),
        Format::B => format!("x{rs1},x{rs2},{target:#x}"),
        Format::U => format!("x{rd},{:#x}", imm as u32 >> 12),
        Format::J => format!("x{rd},{target:#x}"),
        Format::Shift6 | Format::Shift5 | Format::Round => format!("x{rd},x{rs1},{imm:#x}"),
        Format::Block => format!("(x{rs1})"),
        Format::Fence if imm == FENCE_TSO => return "fence.tso".to_owned(),
        Format::Fence => format!("{},{}", accesses(imm >> 4), accesses(imm)),
        Format::Sfence => format!("x{rs1},x{rs2}"),
        Format::Csr => format!("x{rd},{},x{rs1}", csr_name(imm)),
        Format::CsrImm => format!("x{rd},{},{rs1}", csr_name(imm)),
        Format::Lr => format!("x{rd},(x{rs1})"),
        Format::Amo => format!("x{rd},x{rs2},(x{rs1})"),
        Format::FLoad => format!("f{rd},{imm}(x{rs1})"),
        Format::FStore => format!("f{rs2},{imm}(x{rs1})"),
        Format::Fma => format!("f{rd},f{rs1},f{rs2},f{rs3}{rm}"),
        Format::FRm => format!("f{rd},f{rs1},f{rs2}{rm}"),
        Format::FRm1 => format!("f{rd},f{rs1}{rm}"),
        Format::FConst => format!("f{rd},{}", constant::text(rs1)),
        Format::FR => format!("f{rd},f{rs1},f{rs2}"),
        Format::FCmp => format!("x{rd},f{rs1},f{rs2}"),
        Format::FToX => format!("x{rd},f{rs1}"),
        Format::FToXRm => format!("x{rd},f{rs1}{rm}"),
        Format::XToF => format!("f{rd},x{rs1}"),
        Format::XToFRm => format!("f{rd},x{rs1}{rm}"),
    };
    let suffix =
        if matches!(row.format, Format::Lr | Format::Amo) { ordering(insn.rm) } else { "" };
    let space = if operands.is_empty() { "" } else { " " };
    format!("{}{suffix}{space}{operands}", row.mnemonic)
}

/// The text of a prefetch: `ori` with rd = x0, whose offset has no bits below 32.
fn prefetch(insn: &Insn) -> Option<String> {
    let kind = match insn.imm & 31 {
        0 => "i",
        1 => "r",
        3 => "w",
        _ => return None,
    };
    let hint = insn.op == Op::Ori && insn.rd == 0;
    hint.then(|| format!("prefetch.{kind} {}(x{})", insn.imm & !31, insn.rs1))
}

/// Fence mode TSO with the only accesses it is defined for.
const FENCE_TSO: i32 = 0x833;

fn ordering(aq_rl: u8) -> &'static str {
    ["", ".rl", ".aq", ".aqrl"][usize::from(aq_rl & 3)]
}

/// The rounding mode as a last operand; left out where it is the one that assemblers take by default.
fn rounding(insn: &Insn) -> &'static str {
    let is_exact = matches!(insn.op, Op::FcvtDW | Op::FcvtDWu | Op::FcvtDS);
    match insn.rm {
        0 if is_exact => "",
        0 => ",rne",
        1 => ",rtz",
        2 => ",rdn",
        3 => ",rup",
        4 => ",rmm",
        7 => "",
        _ => ",unknown",
    }
}

/// The accesses that the low four bits stand for.
fn accesses(bits: i32) -> String {
    if bits & 15 == 0 {
        return "unknown".to_owned();
    }
    [(8, 'i'), (4, 'o'), (2, 'r'), (1, 'w')]
        .into_iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, c)| c)
        .collect()
}

fn csr_name(number: i32) -> Cow<'static, str> {
    let (family, first) = match number {
        0x323..=0x33f => ("mhpmevent", 0x320),
        0x3a0..=0x3af => ("pmpcfg", 0x3a0),
        0x3b0..=0x3ef => ("pmpaddr", 0x3b0),
        0xb03..=0xb1f => ("mhpmcounter", 0xb00),
        0xc03..=0xc1f => ("hpmcounter", 0xc00),
        _ => {
            let name = CSR_NAMES.iter().find(|(n, _)| i32::from(*n) == number);
            return name.map_or_else(|| format!("{number:#x}").into(), |&(_, name)| name.into());
        }
    };
    format!("{family}{}", number - first).into()
}

/// Names of the registers that a machine with M, S and U modes can have, but for numbered families.
const CSR_NAMES: &[(u16, &str)] = &[
    (0x001, "fflags"),
    (0x002, "frm"),
    (0x003, "fcsr"),
    (0x015, "seed"),
    (0x100, "sstatus"),
    (0x104, "sie"),
    (0x105, "stvec"),
    (0x106, "scounteren"),
    (0x10a, "senvcfg"),
    (0x10c, "sstateen0"),
    (0x140, "sscratch"),
    (0x141, "sepc"),
    (0x142, "scause"),
    (0x143, "stval"),
    (0x144, "sip"),
    (0x14d, "stimecmp"),
    (0x180, "satp"),
    (0x300, "mstatus"),
    (0x301, "misa"),
    (0x302, "medeleg"),
    (0x303, "mideleg"),
    (0x304, "mie"),
    (0x305, "mtvec"),
    (0x306, "mcounteren"),
    (0x30a, "menvcfg"),
    (0x30c, "mstateen0"),
    (0x320, "mcountinhibit"),
    (0x340, "mscratch"),
    (0x341, "mepc"),
    (0x342, "mcause"),
    (0x343, "mtval"),
    (0x344, "mip"),
    (0x5a8, "scontext"),
    (0x747, "mseccfg"),
    (0x7a0, "tselect"),
    (0x7a1, "tdata1"),
    (0x7a2, "tdata2"),
    (0x7a3, "tdata3"),
    (0x7a4, "tinfo"),
    (0x7a5, "tcontrol"),
    (0x7a8, "mcontext"),
    (0xb00, "mcycle"),
    (0xb02, "minstret"),
    (0xc00, "cycle"),
    (0xc01, "time"),
    (0xc02, "instret"),
    (0xda0, "scountovf"),
    (0xf11, "mvendorid"),
    (0xf12, "marchid"),
    (0xf13, "mimpid"),
    (0xf14, "mhartid"),
    (0xf15, "mconfigptr"),
];

//! The registers that GDB sees: their names and numbers, the target description, and their values.
//!
//! # Invariants
//! - INV-GDB-1: a value is a function of the machine's state alone, so that the same position shows the same registers
//!   whichever way it was reached.
//!
//! # Format
//! Numbers are those of GDB's own target (`gdb/riscv-tdep.h`): x0-x31, pc, f0-f31, then each CSR by its number, then the
//! privilege mode; one of our own follows them.
//!
//! # References
//! GDB manual, appendix "Standard Target Features", section "RISC-V Features".

use std::num::NonZeroUsize;

use gdbstub::arch::{Arch, RegId};
use gdbstub_arch::riscv::reg::RiscvCoreRegs;
use machine::Machine;

const PC: usize = 32;
const F0: usize = 33;
const CSR0: usize = 65;
const PRIV: usize = CSR0 + 4096;
const ICOUNT: usize = PRIV + 1;

/// A 64-bit RISC-V hart with all that is in [`description`].
#[derive(Debug)]
pub(crate) enum Rv64 {}

impl Arch for Rv64 {
    type Usize = u64;
    type Registers = RiscvCoreRegs<u64>;
    type BreakpointKind = usize;
    type RegId = Register;
}

/// A register by its number in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    /// Integer register.
    X(u8),
    /// Program counter.
    Pc,
    /// Floating-point register.
    F(u8),
    /// Control and status register.
    Csr(u16),
    /// Privilege mode.
    Priv,
    /// Steps that the machine has made.
    Icount,
}

impl RegId for Register {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let register = match id {
            0..PC => Self::X(u8::try_from(id).ok()?),
            PC => Self::Pc,
            F0..CSR0 => Self::F(u8::try_from(id - F0).ok()?),
            CSR0..PRIV => Self::Csr(u16::try_from(id - CSR0).ok()?),
            PRIV => Self::Priv,
            ICOUNT => Self::Icount,
            _ => return None,
        };
        Some((register, NonZeroUsize::new(size_of::<u64>())))
    }
}

/// The value of a register; `None` when there is no such hart or register.
pub(crate) fn read(machine: &Machine, hart: usize, register: Register) -> Option<u64> {
    let state = machine.harts().get(hart)?;
    match register {
        Register::X(n) => state.x.get(usize::from(n)).copied(),
        Register::Pc => Some(state.pc),
        Register::F(n) => state.f.get(usize::from(n)).copied(),
        Register::Csr(n) => machine.peek_csr(hart, n),
        Register::Priv => Some(state.mode as u64),
        Register::Icount => Some(machine.icount()),
    }
}

/// Integer registers and program counter of a hart.
pub(crate) fn core(machine: &Machine, hart: usize) -> Option<RiscvCoreRegs<u64>> {
    let state = machine.harts().get(hart)?;
    let mut registers = RiscvCoreRegs { pc: state.pc, ..RiscvCoreRegs::default() };
    registers.x.copy_from_slice(state.x.get(..32)?);
    Some(registers)
}

const X_NAMES: [&str; 32] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "fp", "s1", "a0", "a1", "a2", "a3", "a4",
    "a5", "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4",
    "t5", "t6",
];

const F_NAMES: [&str; 32] = [
    "ft0", "ft1", "ft2", "ft3", "ft4", "ft5", "ft6", "ft7", "fs0", "fs1", "fa0", "fa1", "fa2",
    "fa3", "fa4", "fa5", "fa6", "fa7", "fs2", "fs3", "fs4", "fs5", "fs6", "fs7", "fs8", "fs9",
    "fs10", "fs11", "ft8", "ft9", "ft10", "ft11",
];

/// CSRs of the floating-point unit.
const F_CSRS: &[(&str, usize)] = &[("fflags", 1), ("frm", 2), ("fcsr", 3)];

/// The other CSRs that hold something; event counters, of which there are none, are left out.
const CSRS: &[(&str, usize)] = &[
    ("cycle", 0xc00),
    ("time", 0xc01),
    ("instret", 0xc02),
    ("sstatus", 0x100),
    ("sie", 0x104),
    ("stvec", 0x105),
    ("scounteren", 0x106),
    ("senvcfg", 0x10a),
    ("sscratch", 0x140),
    ("sepc", 0x141),
    ("scause", 0x142),
    ("stval", 0x143),
    ("sip", 0x144),
    ("stimecmp", 0x14d),
    ("satp", 0x180),
    ("mvendorid", 0xf11),
    ("marchid", 0xf12),
    ("mimpid", 0xf13),
    ("mhartid", 0xf14),
    ("mconfigptr", 0xf15),
    ("mstatus", 0x300),
    ("misa", 0x301),
    ("medeleg", 0x302),
    ("mideleg", 0x303),
    ("mie", 0x304),
    ("mtvec", 0x305),
    ("mcounteren", 0x306),
    ("menvcfg", 0x30a),
    ("mcountinhibit", 0x320),
    ("mscratch", 0x340),
    ("mepc", 0x341),
    ("mcause", 0x342),
    ("mtval", 0x343),
    ("mip", 0x344),
    ("pmpcfg0", 0x3a0),
    ("pmpcfg2", 0x3a2),
    ("pmpaddr0", 0x3b0),
    ("pmpaddr1", 0x3b1),
    ("pmpaddr2", 0x3b2),
    ("pmpaddr3", 0x3b3),
    ("pmpaddr4", 0x3b4),
    ("pmpaddr5", 0x3b5),
    ("pmpaddr6", 0x3b6),
    ("pmpaddr7", 0x3b7),
    ("pmpaddr8", 0x3b8),
    ("pmpaddr9", 0x3b9),
    ("pmpaddr10", 0x3ba),
    ("pmpaddr11", 0x3bb),
    ("pmpaddr12", 0x3bc),
    ("pmpaddr13", 0x3bd),
    ("pmpaddr14", 0x3be),
    ("pmpaddr15", 0x3bf),
    ("mcycle", 0xb00),
    ("minstret", 0xb02),
];

const FLOAT_UNION: &str = "<union id=\"riscv_double\"><field name=\"float\" type=\"ieee_single\"/>\
                           <field name=\"double\" type=\"ieee_double\"/></union>\n";

/// The target description that GDB reads.
///
/// It names no operating system, or GDB would put breakpoints where it believes the next instruction to be instead of
/// asking for a step, and lose itself at each trap.
pub(crate) fn description() -> String {
    let csr = |&(name, n): &(&'static str, usize)| (name, CSR0 + n);
    let cpu: Vec<_> = X_NAMES.into_iter().chain(["pc"]).zip(0..).collect();
    let fpu: Vec<_> = F_NAMES.into_iter().zip(F0..).collect();
    let csrs: Vec<_> = F_CSRS.iter().chain(CSRS).map(csr).collect();
    [
        "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n<target version=\"1.0\">\n\
         <architecture>riscv:rv64</architecture>\n<osabi>none</osabi>\n",
        &feature("org.gnu.gdb.riscv.cpu", "", &cpu, "int"),
        &feature("org.gnu.gdb.riscv.fpu", FLOAT_UNION, &fpu, "riscv_double"),
        &feature("org.gnu.gdb.riscv.csr", "", &csrs, "uint64"),
        &feature("org.gnu.gdb.riscv.virtual", "", &[("priv", PRIV)], "int"),
        &feature("org.understudy.machine", "", &[("icount", ICOUNT)], "uint64"),
        "</target>\n",
    ]
    .concat()
}

fn feature(name: &str, types: &str, registers: &[(&str, usize)], kind: &str) -> String {
    let mut xml = format!("<feature name=\"{name}\">\n{types}");
    for &(name, number) in registers {
        let kind = match name {
            "sp" | "gp" | "tp" | "fp" => "data_ptr",
            "pc" | "ra" => "code_ptr",
            _ => kind,
        };
        xml.push_str(&format!(
            "<reg name=\"{name}\" bitsize=\"64\" type=\"{kind}\" regnum=\"{number}\"/>\n"
        ));
    }
    xml + "</feature>\n"
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::samples::machine;
    use super::*;

    #[test]
    fn every_register_that_is_described_can_be_read_under_its_number() {
        let machine = machine();
        let mut numbers = BTreeSet::new();
        for part in description().split("regnum=\"").skip(1) {
            let number = part.split('"').next().unwrap().parse().unwrap();
            assert!(numbers.insert(number), "{number} is there twice");
            let (register, size) = Register::from_raw_id(number).unwrap();
            assert_eq!(size.unwrap().get(), 8);
            assert!(read(&machine, 1, register).is_some(), "{register:?}");
            assert_eq!(read(&machine, 2, register), None, "there are two harts");
        }
        assert_eq!(numbers.len(), 33 + 32 + 3 + CSRS.len() + 2);
        assert!(Register::from_raw_id(ICOUNT + 1).is_none());
        assert_eq!(read(&machine, 0, Register::Csr(0x7c0)), None);
    }

    #[test]
    fn values_are_those_of_the_hart() {
        let mut machine = machine();
        let hart = &mut machine.harts_mut()[1];
        hart.x[5] = 55;
        hart.f[31] = 0x3ff0_0000_0000_0000;
        hart.csr.fcsr = 0x61;
        let value = |number| read(&machine, 1, Register::from_raw_id(number).unwrap().0);
        let expected = [(5, 55), (64, 0x3ff0_0000_0000_0000), (66, 1), (67, 3), (68, 0x61)];
        for (number, expected) in expected {
            assert_eq!(value(number), Some(expected), "{number}");
        }
        assert_eq!((value(CSR0 + 0xf14), value(PRIV), value(ICOUNT)), (Some(1), Some(3), Some(0)));
        let core = core(&machine, 1).unwrap();
        assert_eq!((core.x[5], core.pc), (55, machine.harts()[1].pc));
    }
}

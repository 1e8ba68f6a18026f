//! The encoder against GNU objdump: every operation with many operands.

use std::process::Command;

use super::*;

const REGS: [Reg; 16] = XMM_AS_REG;
const SIZES: [Size; 2] = [D, Q];

const NAMES_64: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const NAMES_32: [&str; 16] = [
    "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "r8d", "r9d", "r10d", "r11d", "r12d",
    "r13d", "r14d", "r15d",
];
const NAMES_16: [&str; 16] = [
    "ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "r8w", "r9w", "r10w", "r11w", "r12w", "r13w",
    "r14w", "r15w",
];
const NAMES_8: [&str; 16] = [
    "al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", "r8b", "r9b", "r10b", "r11b", "r12b",
    "r13b", "r14b", "r15b",
];

/// Code and the text that objdump has to give for it.
struct Cases {
    a: Asm,
    expected: Vec<String>,
}

fn reg(bits: u32, r: Reg) -> &'static str {
    let names = match bits {
        8 => NAMES_8,
        16 => NAMES_16,
        32 => NAMES_32,
        _ => NAMES_64,
    };
    names[r as usize]
}

fn width(size: Size) -> u32 {
    if size == Q { 64 } else { 32 }
}

fn place(m: Mem) -> String {
    let base = reg(64, m.base);
    let index = m.index.map(|(i, scale)| format!("+{}*{}", reg(64, i), 1 << scale));
    let disp = match m.disp {
        0 if m.base as u8 & 7 == 5 => "+0x0".to_owned(),
        0 => String::new(),
        d if d < 0 => format!("-{:#x}", d.unsigned_abs()),
        d => format!("+{d:#x}"),
    };
    format!("[{base}{}{disp}]", index.unwrap_or_default())
}

fn operand(bits: u32, rm: Rm) -> String {
    let size = match bits {
        8 => "BYTE",
        16 => "WORD",
        32 => "DWORD",
        64 => "QWORD",
        _ => "XMMWORD",
    };
    match rm {
        Rm::Reg(r) => reg(bits, r).to_owned(),
        Rm::Mem(m) => format!("{size} PTR {}", place(m)),
    }
}

fn xm(bits: u32, gpr: u32, operand_: Xm) -> String {
    match operand_ {
        Xm::Xmm(x) => format!("xmm{x}"),
        Xm::Mem(m) => operand(bits, Rm::Mem(m)),
        Xm::Gpr(r) => reg(gpr, r).to_owned(),
    }
}

/// A constant as an operand of this many bits.
fn constant(bits: u32, imm: i64) -> String {
    let imm = if bits == 64 { imm as u64 } else { imm as u64 & ((1 << bits) - 1) };
    format!("{imm:#x}")
}

/// Every base with displacements of each size, and indices of each scale.
fn places() -> Vec<Mem> {
    let mut all = vec![];
    for base in REGS {
        for disp in [0, 8, -128, 127, 128, -0x1234_5678] {
            all.push(Mem::new(base, disp));
        }
        for (i, index) in REGS.into_iter().filter(|&r| r != Reg::Rsp).enumerate() {
            let disp = [0, -8, 0x2000][i % 3];
            all.push(Mem { base, index: Some((index, i as u8 % 4)), disp });
        }
    }
    all
}

fn operands() -> Vec<Rm> {
    let places = places().into_iter().map(Rm::Mem);
    REGS.into_iter().map(Rm::Reg).chain(places).collect()
}

impl Cases {
    fn new() -> Self {
        Self { a: Asm::new(0), expected: vec![] }
    }

    fn case(&mut self, text: impl Into<String>) {
        self.expected.push(text.into());
    }

    /// What objdump says of the code, one line an instruction.
    fn disassembled(&self) -> Vec<String> {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("code");
        std::fs::write(&file, &self.a.code).expect("a file");
        let output = Command::new("objdump")
            .args(["-D", "-z", "-b", "binary", "-m", "i386:x86-64", "-M", "intel"])
            .arg("--no-show-raw-insn")
            .arg(&file)
            .output()
            .unwrap_or_else(|e| panic!("objdump: {e}; install binutils"));
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).expect("text");
        let lines = text.lines().filter_map(|line| line.split_once(":\t"));
        lines
            .map(|(_, text)| {
                let text = text.split(" #").next().unwrap_or(text);
                text.split_whitespace().collect::<Vec<_>>().join(" ")
            })
            .collect()
    }

    fn check(self) {
        let found = self.disassembled();
        for (i, (found, expected)) in found.iter().zip(&self.expected).enumerate() {
            assert_eq!(found, expected, "instruction {i}");
        }
        assert_eq!(found.len(), self.expected.len());
    }
}

#[test]
fn arithmetic_on_two_operands() {
    let mut c = Cases::new();
    for rm in operands() {
        for (i, r) in REGS.into_iter().enumerate() {
            let size = SIZES[i % 2];
            let (x, y) = (operand(width(size), rm), reg(width(size), r));
            for (op, name) in [
                (Alu::Add, "add"),
                (Alu::Or, "or"),
                (Alu::And, "and"),
                (Alu::Sub, "sub"),
                (Alu::Xor, "xor"),
                (Alu::Cmp, "cmp"),
            ] {
                c.a.alu(op, size, rm, r);
                c.case(format!("{name} {x},{y}"));
                c.a.alu_load(op, size, r, rm);
                c.case(format!("{name} {y},{x}"));
            }
            c.a.test(size, rm, r);
            c.case(format!("test {x},{y}"));
            c.a.imul(size, r, rm);
            c.case(format!("imul {y},{x}"));
            if size != Q || rm != Rm::Reg(r) {
                c.a.mov(size, r, rm);
                c.case(format!("mov {y},{x}"));
            }
            if let Rm::Mem(m) = rm {
                c.a.store(size, m, r);
                c.case(format!("mov {x},{y}"));
                c.a.store16(m, r);
                c.case(format!("mov {},{}", operand(16, rm), reg(16, r)));
                c.a.store8(m, r);
                c.case(format!("mov {},{}", operand(8, rm), reg(8, r)));
                c.a.lea(r, m);
                c.case(format!("lea {},{}", reg(64, r), place(m)));
                c.a.lea32(r, m);
                c.case(format!("lea {},{}", reg(32, r), place(m)));
            }
        }
    }
    c.check();
}

#[test]
fn constants() {
    let mut c = Cases::new();
    for rm in operands() {
        for size in SIZES {
            let x = operand(width(size), rm);
            for imm in [-1, 127, -129, 0x1234_5678] {
                for (op, name) in [(Alu::Add, "add"), (Alu::And, "and"), (Alu::Cmp, "cmp")] {
                    c.a.alu_imm(op, size, rm, imm);
                    c.case(format!("{name} {x},{}", constant(width(size), imm.into())));
                }
                c.a.test_imm(size, rm, imm);
                c.case(format!("test {x},{}", constant(width(size), imm.into())));
                if let Rm::Mem(m) = rm {
                    c.a.store_imm(size, m, imm);
                    c.case(format!("mov {x},{}", constant(width(size), imm.into())));
                }
            }
            for (op, name) in [
                (Shift::Rol, "rol"),
                (Shift::Ror, "ror"),
                (Shift::Shl, "shl"),
                (Shift::Shr, "shr"),
                (Shift::Sar, "sar"),
            ] {
                c.a.shift(op, size, rm, 29);
                c.case(format!("{name} {x},0x1d"));
                c.a.shift_cl(op, size, rm);
                c.case(format!("{name} {x},cl"));
            }
            for (ext, name) in [(4, "bt"), (5, "bts"), (6, "btr"), (7, "btc")] {
                c.a.bit_imm(ext, size, rm, 27);
                c.case(format!("{name} {x},0x1b"));
            }
        }
    }
    for r in REGS {
        for imm in [0, 1, 0x7fff_ffff, 0xffff_ffff] {
            c.a.mov_imm(r, imm);
            c.case(format!("mov {},{imm:#x}", reg(32, r)));
        }
        for imm in [u64::MAX, 0xffff_ffff_8000_0000] {
            c.a.mov_imm(r, imm);
            c.case(format!("mov {},{imm:#x}", reg(64, r)));
        }
        for imm in [0x1_0000_0000, 0xffff_ffff_7fff_ffff, 0x1234_5678_9abc_def0] {
            c.a.mov_imm(r, imm);
            c.case(format!("movabs {},{imm:#x}", reg(64, r)));
        }
    }
    c.check();
}

#[test]
fn widths_and_single_operands() {
    let mut c = Cases::new();
    for rm in operands() {
        for r in REGS {
            for from in [8u8, 16] {
                let x = operand(from.into(), rm);
                c.a.movzx(from, r, rm);
                c.case(format!("movzx {},{x}", reg(32, r)));
                c.a.movsx(from, r, rm);
                c.case(format!("movsx {},{x}", reg(64, r)));
            }
            c.a.movzx(32, r, rm);
            c.case(format!("mov {},{}", reg(32, r), operand(32, rm)));
            c.a.movsx(32, r, rm);
            c.case(format!("movsxd {},{}", reg(64, r), operand(32, rm)));
        }
        for size in SIZES {
            for (op, name) in [
                (Unary::Not, "not"),
                (Unary::Neg, "neg"),
                (Unary::Mul, "mul"),
                (Unary::Imul, "imul"),
                (Unary::Div, "div"),
                (Unary::Idiv, "idiv"),
            ] {
                c.a.unary(op, size, rm);
                c.case(format!("{name} {}", operand(width(size), rm)));
            }
        }
        c.a.jmp_rm(rm);
        c.case(format!("jmp {}", operand(64, rm)));
        c.a.call_rm(rm);
        c.case(format!("call {}", operand(64, rm)));
    }
    for m in places() {
        c.a.stmxcsr(m);
        c.case(format!("stmxcsr {}", operand(32, m.into())));
        c.a.ldmxcsr(m);
        c.case(format!("ldmxcsr {}", operand(32, m.into())));
    }
    for r in REGS {
        c.a.push(r);
        c.case(format!("push {}", reg(64, r)));
        c.a.pop(r);
        c.case(format!("pop {}", reg(64, r)));
        c.a.bswap(r);
        c.case(format!("bswap {}", reg(64, r)));
        c.a.zero(r);
        c.case(format!("xor {0},{0}", reg(32, r)));
    }
    c.a.sign_extend_rax(D);
    c.case("cdq");
    c.a.sign_extend_rax(Q);
    c.case("cqo");
    c.a.ret();
    c.case("ret");
    c.check();
}

const CONDITIONS: [(Cond, &str); 12] = [
    (Cond::O, "o"),
    (Cond::B, "b"),
    (Cond::Ae, "ae"),
    (Cond::E, "e"),
    (Cond::Ne, "ne"),
    (Cond::A, "a"),
    (Cond::S, "s"),
    (Cond::P, "p"),
    (Cond::Np, "np"),
    (Cond::L, "l"),
    (Cond::Ge, "ge"),
    (Cond::G, "g"),
];

#[test]
fn conditions_and_jumps() {
    let mut c = Cases::new();
    for (cond, name) in CONDITIONS {
        for r in REGS {
            c.a.setcc(cond, r);
            c.case(format!("set{name} {}", reg(8, r)));
        }
        for rm in operands() {
            let r = REGS[c.expected.len() % 16];
            for size in SIZES {
                c.a.cmov(cond, size, r, rm);
                let x = operand(width(size), rm);
                c.case(format!("cmov{name} {},{x}", reg(width(size), r)));
            }
        }
        c.a.jcc_to(cond, 0x10);
        c.case(format!("j{name} 0x10"));
        let ahead = c.a.jcc(cond);
        c.a.fix(ahead);
        c.case(format!("j{name} {:#x}", c.a.here()));
    }
    c.a.jmp_to(0x20);
    c.case("jmp 0x20");
    c.a.call_to(0x30);
    c.case("call 0x30");
    let ahead = c.a.jmp();
    c.a.ret();
    c.a.fix(ahead);
    c.case(format!("jmp {:#x}", c.a.here()));
    c.case("ret");
    c.check();
}

#[test]
fn bits() {
    let mut c = Cases::new();
    for rm in operands() {
        for (i, r) in REGS.into_iter().enumerate() {
            let (size, by) = (SIZES[i % 2], REGS[(i * 7 + 3) % 16]);
            let n = width(size);
            let (x, y, z) = (operand(n, rm), reg(n, r), reg(n, by));
            for (op, name) in [(Shift::Shl, "shlx"), (Shift::Shr, "shrx"), (Shift::Sar, "sarx")] {
                c.a.shift_by(op, size, r, rm, by);
                c.case(format!("{name} {y},{x},{z}"));
            }
            c.a.andn(size, r, by, rm);
            c.case(format!("andn {y},{z},{x}"));
            c.a.rorx(size, r, rm, 17);
            c.case(format!("rorx {y},{x},0x11"));
            for (op, name) in [(0xbd, "lzcnt"), (0xbc, "tzcnt"), (0xb8, "popcnt")] {
                c.a.prefixed_0f(0xf3, op, size, r, rm);
                c.case(format!("{name} {y},{x}"));
            }
        }
    }
    for r in REGS {
        for by in REGS {
            for size in SIZES {
                for (op, name) in [(0xa3, "bt"), (0xab, "bts"), (0xb3, "btr"), (0xbb, "btc")] {
                    let n = width(size);
                    c.a.bit_reg(op, size, r, by);
                    c.case(format!("{name} {},{}", reg(n, r), reg(n, by)));
                }
            }
        }
    }
    c.check();
}

/// Operands in SSE registers, in memory, and, where `gpr` says so, in others.
fn sse_operands(gpr: bool) -> Vec<Xm> {
    let mut all: Vec<Xm> =
        if gpr { REGS.into_iter().map(Xm::Gpr).collect() } else { (0..16).map(Xm::Xmm).collect() };
    all.extend(places().into_iter().map(Xm::Mem));
    all
}

/// SSE instructions that generated code has: prefix, opcode, bits of an operand in memory, name.
const SSE: [(Sse, u8, u32, &str); 38] = [
    (Sse::F3, 0x10, 32, "movss"),
    (Sse::F2, 0x10, 64, "movsd"),
    (Sse::F3, 0x51, 32, "sqrtss"),
    (Sse::F2, 0x51, 64, "sqrtsd"),
    (Sse::F3, 0x58, 32, "addss"),
    (Sse::F2, 0x58, 64, "addsd"),
    (Sse::F3, 0x59, 32, "mulss"),
    (Sse::F2, 0x59, 64, "mulsd"),
    (Sse::F3, 0x5a, 32, "cvtss2sd"),
    (Sse::F2, 0x5a, 64, "cvtsd2ss"),
    (Sse::F3, 0x5c, 32, "subss"),
    (Sse::F2, 0x5c, 64, "subsd"),
    (Sse::F3, 0x5d, 32, "minss"),
    (Sse::F2, 0x5d, 64, "minsd"),
    (Sse::F3, 0x5e, 32, "divss"),
    (Sse::F2, 0x5e, 64, "divsd"),
    (Sse::F3, 0x5f, 32, "maxss"),
    (Sse::F2, 0x5f, 64, "maxsd"),
    (Sse::None, 0x2e, 32, "ucomiss"),
    (Sse::P66, 0x2e, 64, "ucomisd"),
    (Sse::None, 0x2f, 32, "comiss"),
    (Sse::P66, 0x2f, 64, "comisd"),
    (Sse::None, 0x54, 128, "andps"),
    (Sse::P66, 0x54, 128, "andpd"),
    (Sse::None, 0x56, 128, "orps"),
    (Sse::P66, 0x56, 128, "orpd"),
    (Sse::None, 0x57, 128, "xorps"),
    (Sse::P66, 0x57, 128, "xorpd"),
    (Sse::P66, 0x60, 128, "punpcklbw"),
    (Sse::P66, 0x67, 128, "packuswb"),
    (Sse::P66, 0x6c, 128, "punpcklqdq"),
    (Sse::P66, 0x6f, 128, "movdqa"),
    (Sse::P66, 0x74, 128, "pcmpeqb"),
    (Sse::P66, 0xdb, 128, "pand"),
    (Sse::P66, 0xdc, 128, "paddusb"),
    (Sse::P66, 0xeb, 128, "por"),
    (Sse::P66, 0xef, 128, "pxor"),
    (Sse::P66, 0x70, 128, "pshufd"),
];

#[test]
fn sse() {
    let mut c = Cases::new();
    for from in sse_operands(false) {
        for (prefix, op, n, name) in SSE {
            let to = c.expected.len() as u8 % 16;
            c.a.sse(prefix, op, D, to, from);
            let shuffles = name == "pshufd";
            if shuffles {
                c.a.byte(0x55);
            }
            let last = if shuffles { ",0x55" } else { "" };
            c.case(format!("{name} xmm{to},{}{last}", xm(n, 0, from)));
        }
        for (op, name) in [
            (0x00, "pshufb"),
            (0xdb, "aesimc"),
            (0xdc, "aesenc"),
            (0xdd, "aesenclast"),
            (0xde, "aesdec"),
            (0xdf, "aesdeclast"),
        ] {
            let to = c.expected.len() as u8 % 16;
            c.a.sse38(Sse::P66, op, to, from);
            c.case(format!("{name} xmm{to},{}", xm(128, 0, from)));
        }
        for (op, n, name) in
            [(0x0a, 32, "roundss"), (0x0b, 64, "roundsd"), (0xdf, 128, "aeskeygenassist")]
        {
            let to = c.expected.len() as u8 % 16;
            c.a.sse3a(op, D, to, from, 0x36);
            c.case(format!("{name} xmm{to},{},0x36", xm(n, 0, from)));
        }
        if let Xm::Xmm(x) = from {
            c.a.round(true, 3, x, 9);
            c.case(format!("roundsd xmm3,xmm{x},0x9"));
            c.a.round(false, 12, x, 9);
            c.case(format!("roundss xmm12,xmm{x},0x9"));
            c.a.sse(Sse::P66, 0x71, D, 2, from);
            c.a.byte(4);
            c.case(format!("psrlw xmm{x},0x4"));
        }
        c.a.sse3a(0x44, D, 9, from, 0);
        c.case(format!("pclmullqlqdq xmm9,{}", xm(128, 0, from)));
    }
    for m in places() {
        c.a.sse(Sse::F3, 0x11, D, 10, Xm::Mem(m));
        c.case(format!("movss {},xmm10", operand(32, m.into())));
        c.a.sse(Sse::F2, 0x11, D, 1, Xm::Mem(m));
        c.case(format!("movsd {},xmm1", operand(64, m.into())));
    }
    c.check();
}

#[test]
fn moves_and_conversions_between_the_register_files() {
    let mut c = Cases::new();
    for from in sse_operands(true) {
        let x = c.expected.len() as u8 % 16;
        c.a.sse(Sse::P66, 0x6e, Q, x, from);
        c.case(format!("movq xmm{x},{}", xm(64, 64, from)));
        c.a.sse(Sse::P66, 0x7e, Q, x, from);
        c.case(format!("movq {},xmm{x}", xm(64, 64, from)));
        c.a.sse3a(0x22, Q, x, from, 1);
        c.case(format!("pinsrq xmm{x},{},0x1", xm(64, 64, from)));
        c.a.sse3a(0x16, Q, x, from, 1);
        c.case(format!("pextrq {},xmm{x},0x1", xm(64, 64, from)));
        for size in SIZES {
            let n = width(size);
            c.a.sse(Sse::F3, 0x2a, size, x, from);
            c.case(format!("cvtsi2ss xmm{x},{}", xm(n, n, from)));
            c.a.sse(Sse::F2, 0x2a, size, x, from);
            c.case(format!("cvtsi2sd xmm{x},{}", xm(n, n, from)));
        }
    }
    for from in sse_operands(false) {
        let r = REGS[c.expected.len() % 16];
        for size in SIZES {
            let to = reg(width(size), r);
            for (op, name) in [(0x2c, "cvtt"), (0x2d, "cvt")] {
                c.a.sse(Sse::F3, op, size, r as u8, from);
                c.case(format!("{name}ss2si {to},{}", xm(32, 0, from)));
                c.a.sse(Sse::F2, op, size, r as u8, from);
                c.case(format!("{name}sd2si {to},{}", xm(64, 0, from)));
            }
        }
    }
    c.check();
}

#[test]
fn three_operands() {
    let mut c = Cases::new();
    for from in sse_operands(false) {
        for (prefix, op, n, name) in [
            (Sse::F2, 0x58, 64, "vaddsd"),
            (Sse::F3, 0x58, 32, "vaddss"),
            (Sse::F2, 0x51, 64, "vsqrtsd"),
            (Sse::None, 0x55, 128, "vandnps"),
            (Sse::P66, 0x57, 128, "vxorpd"),
        ] {
            let (to, a) = (c.expected.len() as u8 % 16, c.expected.len() as u8 / 2 % 16);
            c.a.avx(prefix, op, to, a, from);
            c.case(format!("{name} xmm{to},xmm{a},{}", xm(n, 0, from)));
        }
        for size in SIZES {
            let (to, a) = (c.expected.len() as u8 % 16, c.expected.len() as u8 / 2 % 16);
            c.a.fma(0xb9, size, to, a, from);
            let suffix = if size == Q { "sd" } else { "ss" };
            c.case(format!("vfmadd231{suffix} xmm{to},xmm{a},{}", xm(width(size), 0, from)));
        }
        if let Xm::Xmm(x) = from {
            for (ext, name) in [(2, "psrlq"), (6, "psllq")] {
                c.a.sse(Sse::P66, 0x73, D, ext, from);
                c.a.byte(63);
                c.case(format!("{name} xmm{x},0x3f"));
            }
            c.a.sse(Sse::P66, 0x76, D, x, from);
            c.case(format!("pcmpeqd xmm{x},xmm{x}"));
        }
    }
    c.check();
}

#[test]
fn fused_multiplication() {
    let mut c = Cases::new();
    for rm in operands() {
        for (op, name) in
            [(0xb9, "vfmadd231"), (0xbb, "vfmsub231"), (0xbd, "vfnmadd231"), (0xbf, "vfnmsub231")]
        {
            for size in SIZES {
                let (to, by) = (c.expected.len() as u8 % 16, c.expected.len() as u8 / 2 % 16);
                c.a.vex(2, 1, size, op, to, by, rm);
                let suffix = if size == Q { "sd" } else { "ss" };
                let x = match rm {
                    Rm::Reg(r) => format!("xmm{}", r as u8),
                    Rm::Mem(_) => operand(width(size), rm),
                };
                c.case(format!("{name}{suffix} xmm{to},xmm{by},{x}"));
            }
        }
    }
    c.check();
}

#[test]
fn jumps_go_to_the_other_part_and_back() {
    let (base, apart) = (0x4000_0000, 0x4010_0000);
    let mut a = Asm::new(base);
    let out = a.jcc(Cond::E);
    let resume = a.here();
    a.ret();
    a.go_apart(apart);
    a.fix(out);
    let within = a.jmp();
    a.fix(within);
    assert_eq!((a.address(out), a.address(within)), (base + 2, apart + 1));
    a.jmp_to(resume);
    let (first, second) = a.into_parts();
    let target = |code: &[u8], at: u64, base: u64| {
        let four = code[at as usize..].first_chunk().unwrap();
        (base + at + 4).wrapping_add(i64::from(i32::from_le_bytes(*four)) as u64)
    };
    assert_eq!(target(&first, 2, base), apart);
    assert_eq!(target(&second, 1, apart), apart + 5);
    assert_eq!(target(&second, 6, apart), resume);
}

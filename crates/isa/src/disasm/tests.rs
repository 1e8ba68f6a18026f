//! Decoder and disassembler against GNU binutils: what is legal, and what it says.
//!
//! Known differences, each checked below as a difference:
//! - binutils knows no fence with reserved fields (fm, rd, rs1) and no `fence.i` with operands; the manual says that
//!   implementations ignore those fields;
//! - binutils 2.40 knows the exact conversions `fcvt.d.{w,wu,s}` with rounding mode 0 only;
//! - binutils shows the reserved encoding of `c.addi16sp` with immediate 0;
//! - binutils always knows `dret` and the withdrawn `uret`, `hret` and `sfence.vm`, and with Svinval
//!   the hypervisor's `hinval.*`;
//! - binutils shows `aes64ks1i` with reserved round numbers;
//! - binutils 2.40 does not know Zicond, Zfa and Zcb: [`listings`] has its instructions;
//! - CSRs of extensions that the machine does not have are shown by number.

use std::path::Path;
use std::process::Command;

use crate::insn::{Insn, decode};
use crate::table::{Op, ROWS};

use super::disassemble;

/// What objdump is to know: the machine's extensions that decide about instructions.
const ARCHITECTURE: &str = "rv64gc_zihintpause_zba_zbb_zbc_zbs_zbkb_zbkx_zknd_zkne_zknh_zicbom_zicboz_zicbop_zawrs_svinval";

fn run(dir: &Path, tool: &str, args: &[&str]) -> String {
    let tool = format!("riscv64-linux-gnu-{tool}");
    let output = Command::new(&tool).args(args).current_dir(dir).output();
    let output =
        output.unwrap_or_else(|e| panic!("{tool}: {e}; install binutils-riscv64-linux-gnu"));
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What objdump says of `code`, loaded at address 0: one text an instruction.
fn objdump(code: &[u8]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("empty.s"), "").unwrap();
    std::fs::write(dir.join("code"), code).unwrap();
    // An object without symbols, which would mark data, but with the extensions that objdump is to know.
    run(dir, "as", &[&format!("-march={ARCHITECTURE}"), "empty.s", "-o", "empty.o"]);
    run(dir, "objcopy", &["--update-section", ".text=code", "empty.o", "code.o"]);
    let text = run(dir, "objdump", &["-d", "-z", "-M", "no-aliases,numeric", "code.o"]);
    let lines = text.lines().filter(|line| line.starts_with(' ') && line.contains(":\t"));
    let words = |line: &str| line.split('\t').skip(2).collect::<Vec<_>>().join(" ");
    lines.map(|line| words(line).split(" #").next().unwrap().trim().to_owned()).collect()
}

fn is_legal(theirs: &str) -> bool {
    !theirs.starts_with('.') && theirs != "c.unimp"
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 32) as u32
    }
}

/// Legal for us, not for binutils; see the module documentation.
fn is_known_difference(word: u32, insn: &Insn) -> bool {
    match insn.op {
        Op::Fence => word & 0xf00f_ff80 != 0 && word != 0x8330_000f,
        Op::FenceI => word != 0x100f,
        Op::FcvtDW | Op::FcvtDWu | Op::FcvtDS => insn.rm != 0,
        _ => false,
    }
}

/// Whether binutils 2.40 does not know the instruction.
fn is_listed(op: Op) -> bool {
    matches!(
        op,
        Op::CzeroEqz
            | Op::CzeroNez
            | Op::FliS
            | Op::FminmS
            | Op::FmaxmS
            | Op::FroundS
            | Op::FroundnxS
            | Op::FltqS
            | Op::FleqS
            | Op::FliD
            | Op::FminmD
            | Op::FmaxmD
            | Op::FroundD
            | Op::FroundnxD
            | Op::FltqD
            | Op::FleqD
            | Op::FcvtmodWD
    )
}

/// Words and texts as the manual and newer binutils have them.
const LISTINGS: &[(u32, &str)] = &[
    (0x0e31_50b3, "czero.eqz x1,x2,x3"),
    (0x0e31_70b3, "czero.nez x1,x2,x3"),
    (0xf010_00d3, "fli.s f1,-0x1p+0"),
    (0xf010_80d3, "fli.s f1,min"),
    (0xf014_80d3, "fli.s f1,0x1.4p-2"),
    (0xf018_00d3, "fli.s f1,0x1p+0"),
    (0xf019_80d3, "fli.s f1,0x1.cp+0"),
    (0xf01e_80d3, "fli.s f1,0x1p+16"),
    (0xf01f_00d3, "fli.s f1,inf"),
    (0xf01f_80d3, "fli.s f1,nan"),
    (0x2831_20d3, "fminm.s f1,f2,f3"),
    (0x2831_30d3, "fmaxm.s f1,f2,f3"),
    (0x4041_70d3, "fround.s f1,f2"),
    (0x4041_10d3, "fround.s f1,f2,rtz"),
    (0x4051_00d3, "froundnx.s f1,f2,rne"),
    (0xa031_50d3, "fltq.s x1,f2,f3"),
    (0xa031_40d3, "fleq.s x1,f2,f3"),
    (0xf210_00d3, "fli.d f1,-0x1p+0"),
    (0xf210_80d3, "fli.d f1,min"),
    (0xf214_80d3, "fli.d f1,0x1.4p-2"),
    (0xf218_00d3, "fli.d f1,0x1p+0"),
    (0xf219_80d3, "fli.d f1,0x1.cp+0"),
    (0xf21e_80d3, "fli.d f1,0x1p+16"),
    (0xf21f_00d3, "fli.d f1,inf"),
    (0xf21f_80d3, "fli.d f1,nan"),
    (0x2a31_20d3, "fminm.d f1,f2,f3"),
    (0x2a31_30d3, "fmaxm.d f1,f2,f3"),
    (0x4241_70d3, "fround.d f1,f2"),
    (0x4241_10d3, "fround.d f1,f2,rtz"),
    (0x4251_00d3, "froundnx.d f1,f2,rne"),
    (0xa231_50d3, "fltq.d x1,f2,f3"),
    (0xa231_40d3, "fleq.d x1,f2,f3"),
    (0xc281_10d3, "fcvtmod.w.d x1,f2,rtz"),
];

/// The same of the compressed instructions of Zcb, as what they expand to.
const SHORT_LISTINGS: &[(u16, &str)] = &[
    (0x8060, "lbu x8,3(x8)"),
    (0x8420, "lhu x8,2(x8)"),
    (0x8440, "lh x8,0(x8)"),
    (0x8840, "sb x8,1(x8)"),
    (0x8c20, "sh x8,2(x8)"),
    (0x9c61, "andi x8,x8,255"),
    (0x9c65, "sext.b x8,x8"),
    (0x9c69, "zext.h x8,x8"),
    (0x9c6d, "sext.h x8,x8"),
    (0x9c71, "add.uw x8,x8,x0"),
    (0x9c75, "xori x8,x8,-1"),
    (0x9c45, "mul x8,x8,x9"),
];

/// Whether the compressed instruction is in the places that Zcb takes.
fn is_zcb(word: u16) -> bool {
    word & 0xe003 == 0x8000 || word & 0xfc43 == 0x9c41
}

#[test]
fn listings() {
    for &(word, text) in LISTINGS {
        assert_eq!(disassemble(0, &decode(word)), text, "{word:#010x}");
    }
    for &(word, text) in SHORT_LISTINGS {
        assert!(is_zcb(word));
        assert_eq!(disassemble(0, &decode(word.into())), text, "{word:#06x}");
    }
    for row in ROWS.iter().filter(|row| is_listed(row.op)) {
        assert!(LISTINGS.iter().any(|(word, _)| decode(*word).op == row.op), "{row:?}");
    }
}

/// Illegal for us, but legal for binutils in the architecture asked for.
fn is_foreign(theirs: &str) -> bool {
    ["uret", "hret", "dret", "sfence.vm", "hinval.vvma", "hinval.gvma", "aes64ks1i"]
        .contains(&theirs.split(' ').next().unwrap())
}

#[test]
fn words_are_what_objdump_says() {
    let mut r = Random(8);
    let mut words: Vec<u32> = Vec::new();
    for row in &ROWS[1..] {
        for i in 0..1500 {
            let word = row.bits | r.next() & !row.mask;
            // Every fourth one bit off, most of them illegal.
            words.push(if i % 4 == 0 { word ^ 4 << (r.next() % 30) } else { word });
        }
    }
    words.extend(
        (0..4096).flat_map(|i| {
            [0x0000_000f, 0x0000_100f, 0x0000_2073, 0x0000_0073].map(|w| w | i << 20)
        }),
    );
    words.extend((0..100_000).map(|_| r.next() | 3));
    // Longer than 32 bits: objdump would go on at another place.
    words.retain(|word| word & 0x1f != 0x1f);

    let code: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let theirs = objdump(&code);
    assert_eq!(theirs.len(), words.len());
    for (i, (&word, theirs)) in words.iter().zip(&theirs).enumerate() {
        let insn = decode(word);
        let ours = disassemble(4 * i as u64, &insn);
        if is_listed(insn.op) {
            assert!(!is_legal(theirs), "{word:#010x}: {ours}, objdump {theirs}");
        } else if !is_legal(theirs) || insn.op == Op::Illegal {
            let agrees = insn.op == Op::Illegal && (!is_legal(theirs) || is_foreign(theirs));
            assert!(
                agrees != is_known_difference(word, &insn),
                "{word:#010x}: {ours}, objdump {theirs}"
            );
        } else {
            let theirs = &with_csr_number(theirs, &ours, insn.imm);
            assert_eq!(&ours, theirs, "{word:#010x}");
            assert!(!is_known_difference(word, &insn), "{word:#010x}: {ours}");
        }
    }
}

/// `theirs` with the CSR's number for its name, if `ours` has the number.
fn with_csr_number(theirs: &str, ours: &str, number: i32) -> String {
    let operand = |text: &str| text.split(',').nth(1).map(str::to_owned);
    match (operand(theirs), operand(ours)) {
        (Some(name), Some(by_number))
            if theirs.starts_with("csrr") && by_number == format!("{number:#x}") =>
        {
            theirs.replacen(&format!(",{name},"), &format!(",{by_number},"), 1)
        }
        _ => theirs.to_owned(),
    }
}

#[test]
fn words_longer_than_32_bits_are_illegal() {
    let mut r = Random(9);
    for _ in 0..10_000 {
        assert_eq!(decode(r.next() | 0x1f).op, Op::Illegal);
    }
}

/// The base instruction that a compressed one stands for, from objdump's text of it.
fn expand(text: &str) -> String {
    let (name, operands) = text.split_once(' ').unwrap_or((text, ""));
    let (a, b) = operands.split_once(',').unwrap_or((operands, ""));
    match name.strip_prefix("c.").unwrap() {
        "addi4spn" => format!("addi {operands}"),
        "li" => format!("addi {a},x0,{b}"),
        "lui" => format!("lui {operands}"),
        "mv" => format!("add {a},x0,{b}"),
        "j" => format!("jal x0,{a}"),
        "jr" => format!("jalr x0,0({a})"),
        "jalr" => format!("jalr x1,0({a})"),
        "beqz" => format!("beq {a},x0,{b}"),
        "bnez" => format!("bne {a},x0,{b}"),
        "ebreak" => "ebreak".to_owned(),
        "addi16sp" => format!("addi x2,{operands}"),
        shift @ ("slli64" | "srli64" | "srai64") => format!("{} {a},{a},0x0", &shift[..4]),
        memory if b.ends_with(')') => format!("{} {operands}", memory.trim_end_matches("sp")),
        two_address => format!("{two_address} {a},{operands}"),
    }
}

#[test]
fn all_compressed_instructions_are_what_objdump_says() {
    let words: Vec<u16> = (0..=u16::MAX).filter(|w| w & 3 != 3).collect();
    let code: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let theirs = objdump(&code);
    assert_eq!(theirs.len(), words.len());
    for (i, (&word, theirs)) in words.iter().zip(&theirs).enumerate() {
        // The upper half does not count.
        let insn = decode(u32::from(word) | 0xdead_0000);
        assert_eq!(insn, decode(u32::from(word)));
        assert_eq!(insn.len, 2);
        let ours = disassemble(2 * i as u64, &insn);
        if insn.op == Op::Illegal || is_zcb(word) {
            assert!(!is_legal(theirs) || word == 0x6101, "{word:#06x}: objdump {theirs}");
        } else {
            assert!(is_legal(theirs), "{word:#06x}: {ours}");
            assert_eq!(ours, expand(theirs), "{word:#06x}: objdump {theirs}");
        }
    }
}

#[test]
fn targets_are_absolute_and_wrap() {
    assert_eq!(disassemble(0x8000_0000, &decode(0xfe00_0ee3)), "beq x0,x0,0x7ffffffc");
    assert_eq!(disassemble(0, &decode(0xffdf_f06f)), "jal x0,0xfffffffffffffffc");
    assert_eq!(disassemble(0, &decode(0)), "illegal");
}

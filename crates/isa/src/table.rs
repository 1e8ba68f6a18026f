//! The instruction table: one row an instruction, from which everything that names instructions is generated.
//!
//! # Place
//! [`crate::decode`] takes match, mask and format from here, [`crate::disassemble`] mnemonic and format.
//!
//! # Invariants
//! - INV-TABLE-1: a row's match has no bit outside its mask.
//! - INV-TABLE-2: where two rows match the same word, the first wins (only `pause`, a case of `fence`, and `zext.h`, a case
//!   of `packw`, rely on it).
//! - INV-TABLE-3: `ROWS[op as usize].op == op`.
//! - INV-TABLE-4: engines may test for ranges of [`Op`]: `AddUw..=CzeroNez` is what [`crate::bits`] computes,
//!   `Clmul..=Sha512sig1` what [`crate::crypto`] does, `Flw` and all behind it are floating point, `Fld` and all behind
//!   it of double precision.
//!
//! # References
//! The RISC-V Instruction Set Manual, volume I (RV64G listings and the extensions named in the table), volume II
//! (privileged, Svinval).

/// Where an instruction has its operands, and how they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// No operands.
    None,
    /// rd, rs1, rs2
    R,
    /// rd, rs1
    R1,
    /// rd, rs1, imm
    I,
    /// rd, imm(rs1)
    Load,
    /// rs2, imm(rs1)
    Store,
    /// rs1, rs2, target
    B,
    /// rd, upper immediate
    U,
    /// rd, target
    J,
    /// rd, rs1, shamt of 6 bits
    Shift6,
    /// rd, rs1, shamt of 5 bits
    Shift5,
    /// rd, rs1, number of an AES round: 0 to 10, others being reserved
    Round,
    /// (rs1)
    Block,
    /// predecessors, successors
    Fence,
    /// rs1, rs2
    Sfence,
    /// rd, csr, rs1
    Csr,
    /// rd, csr, uimm
    CsrImm,
    /// rd, (rs1); aq and rl
    Lr,
    /// rd, rs2, (rs1); aq and rl
    Amo,
    /// frd, imm(rs1)
    FLoad,
    /// frs2, imm(rs1)
    FStore,
    /// frd, frs1, frs2, frs3, rm
    Fma,
    /// frd, frs1, frs2, rm
    FRm,
    /// frd, frs1, rm
    FRm1,
    /// frd, number of a constant
    FConst,
    /// frd, frs1, frs2
    FR,
    /// rd, frs1, frs2
    FCmp,
    /// rd, frs1
    FToX,
    /// rd, frs1, rm
    FToXRm,
    /// frd, rs1
    XToF,
    /// frd, rs1, rm
    XToFRm,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) op: Op,
    pub(crate) mnemonic: &'static str,
    pub(crate) format: Format,
    pub(crate) bits: u32,
    pub(crate) mask: u32,
}

macro_rules! instructions {
    ($( $op:ident $mnemonic:literal $format:ident $bits:literal $mask:literal; )*) => {
        /// What an instruction does.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Op {
            /// No instruction: illegal, reserved, or of an extension that the machine does not have.
            Illegal,
            $(#[doc = concat!("`", $mnemonic, "`")] $op,)*
        }

        /// The table, in the order of [`Op`]. No word matches the first row.
        pub(crate) static ROWS: &[Row] = &TABLE;

        const TABLE: [Row; ROW_COUNT] = [
            Row { op: Op::Illegal, mnemonic: "illegal", format: Format::None, bits: u32::MAX, mask: 0 },
            $(Row { op: Op::$op, mnemonic: $mnemonic, format: Format::$format, bits: $bits, mask: $mask },)*
        ];

        const ROW_COUNT: usize = 1 + [$(Op::$op,)*].len();
    };
}

impl Op {
    /// The table's row.
    pub(crate) fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// The instruction with this number in [`Op`]'s order; [`Op::Illegal`] when there is none.
    #[inline]
    #[must_use]
    pub fn from_number(number: u8) -> Self {
        ROWS.get(usize::from(number)).map_or(Self::Illegal, |row| row.op)
    }

    /// The mnemonic, as assemblers write it.
    #[must_use]
    pub fn mnemonic(self) -> &'static str {
        self.row().mnemonic
    }
}

/// Number of buckets: bits 6:2 (opcode) and 14:12 (funct3) of the word.
const BUCKETS: usize = 256;

/// The bucket of a 32-bit instruction word.
const fn bucket(word: u32) -> usize {
    ((word >> 2 & 0x1f) | (word >> 12 & 7) << 5) as usize
}

/// Whether some word in bucket `b` can match `row`.
const fn reaches(row: &Row, b: usize) -> bool {
    let word = (b as u32 & 0x1f) << 2 | (b as u32 >> 5) << 12 | 3;
    (word ^ row.bits) & row.mask & 0x707f == 0
}

const fn count_entries() -> usize {
    let (mut n, mut b) = (0, 0);
    while b < BUCKETS {
        let mut i = 1;
        while i < ROW_COUNT {
            n += reaches(&TABLE[i], b) as usize;
            i += 1;
        }
        b += 1;
    }
    n
}

const ENTRY_COUNT: usize = count_entries();

/// Row numbers by bucket: bucket `b` has `entries[start[b]..start[b + 1]]`.
struct Index {
    start: [u16; BUCKETS + 1],
    entries: [u8; ENTRY_COUNT],
}

const fn build_index() -> Index {
    let mut index = Index { start: [0; BUCKETS + 1], entries: [0; ENTRY_COUNT] };
    let (mut n, mut b) = (0, 0);
    while b < BUCKETS {
        let mut i = 1;
        while i < ROW_COUNT {
            if reaches(&TABLE[i], b) {
                index.entries[n] = i as u8;
                n += 1;
            }
            i += 1;
        }
        b += 1;
        index.start[b] = n as u16;
    }
    index
}

static INDEX: Index = build_index();

/// The row that a 32-bit instruction word matches.
pub(crate) fn lookup(word: u32) -> Option<&'static Row> {
    let b = bucket(word);
    let range = usize::from(INDEX.start[b])..usize::from(INDEX.start[b + 1]);
    INDEX.entries[range]
        .iter()
        .map(|&i| &ROWS[usize::from(i)])
        .find(|row| word & row.mask == row.bits)
}

#[rustfmt::skip] // columns
instructions! {
    // RV32I and RV64I
    Lui           "lui"             U       0x0000_0037 0x0000_007f;
    Auipc         "auipc"           U       0x0000_0017 0x0000_007f;
    Jal           "jal"             J       0x0000_006f 0x0000_007f;
    Jalr          "jalr"            Load    0x0000_0067 0x0000_707f;
    Beq           "beq"             B       0x0000_0063 0x0000_707f;
    Bne           "bne"             B       0x0000_1063 0x0000_707f;
    Blt           "blt"             B       0x0000_4063 0x0000_707f;
    Bge           "bge"             B       0x0000_5063 0x0000_707f;
    Bltu          "bltu"            B       0x0000_6063 0x0000_707f;
    Bgeu          "bgeu"            B       0x0000_7063 0x0000_707f;
    Lb            "lb"              Load    0x0000_0003 0x0000_707f;
    Lh            "lh"              Load    0x0000_1003 0x0000_707f;
    Lw            "lw"              Load    0x0000_2003 0x0000_707f;
    Ld            "ld"              Load    0x0000_3003 0x0000_707f;
    Lbu           "lbu"             Load    0x0000_4003 0x0000_707f;
    Lhu           "lhu"             Load    0x0000_5003 0x0000_707f;
    Lwu           "lwu"             Load    0x0000_6003 0x0000_707f;
    Sb            "sb"              Store   0x0000_0023 0x0000_707f;
    Sh            "sh"              Store   0x0000_1023 0x0000_707f;
    Sw            "sw"              Store   0x0000_2023 0x0000_707f;
    Sd            "sd"              Store   0x0000_3023 0x0000_707f;
    Addi          "addi"            I       0x0000_0013 0x0000_707f;
    Slti          "slti"            I       0x0000_2013 0x0000_707f;
    Sltiu         "sltiu"           I       0x0000_3013 0x0000_707f;
    Xori          "xori"            I       0x0000_4013 0x0000_707f;
    Ori           "ori"             I       0x0000_6013 0x0000_707f;
    Andi          "andi"            I       0x0000_7013 0x0000_707f;
    Slli          "slli"            Shift6  0x0000_1013 0xfc00_707f;
    Srli          "srli"            Shift6  0x0000_5013 0xfc00_707f;
    Srai          "srai"            Shift6  0x4000_5013 0xfc00_707f;
    Add           "add"             R       0x0000_0033 0xfe00_707f;
    Sub           "sub"             R       0x4000_0033 0xfe00_707f;
    Sll           "sll"             R       0x0000_1033 0xfe00_707f;
    Slt           "slt"             R       0x0000_2033 0xfe00_707f;
    Sltu          "sltu"            R       0x0000_3033 0xfe00_707f;
    Xor           "xor"             R       0x0000_4033 0xfe00_707f;
    Srl           "srl"             R       0x0000_5033 0xfe00_707f;
    Sra           "sra"             R       0x4000_5033 0xfe00_707f;
    Or            "or"              R       0x0000_6033 0xfe00_707f;
    And           "and"             R       0x0000_7033 0xfe00_707f;
    Addiw         "addiw"           I       0x0000_001b 0x0000_707f;
    Slliw         "slliw"           Shift5  0x0000_101b 0xfe00_707f;
    Srliw         "srliw"           Shift5  0x0000_501b 0xfe00_707f;
    Sraiw         "sraiw"           Shift5  0x4000_501b 0xfe00_707f;
    Addw          "addw"            R       0x0000_003b 0xfe00_707f;
    Subw          "subw"            R       0x4000_003b 0xfe00_707f;
    Sllw          "sllw"            R       0x0000_103b 0xfe00_707f;
    Srlw          "srlw"            R       0x0000_503b 0xfe00_707f;
    Sraw          "sraw"            R       0x4000_503b 0xfe00_707f;
    // Zihintpause, before the fence it is a case of
    Pause         "pause"           None    0x0100_000f 0xffff_ffff;
    // Fences: fm, rd and rs1 are reserved fields that an implementation ignores
    Fence         "fence"           Fence   0x0000_000f 0x0000_707f;
    FenceI        "fence.i"         None    0x0000_100f 0x0000_707f;
    // Privileged and Svinval
    Ecall         "ecall"           None    0x0000_0073 0xffff_ffff;
    Ebreak        "ebreak"          None    0x0010_0073 0xffff_ffff;
    Sret          "sret"            None    0x1020_0073 0xffff_ffff;
    Mret          "mret"            None    0x3020_0073 0xffff_ffff;
    Wfi           "wfi"             None    0x1050_0073 0xffff_ffff;
    SfenceWInval  "sfence.w.inval"  None    0x1800_0073 0xffff_ffff;
    SfenceInvalIr "sfence.inval.ir" None    0x1810_0073 0xffff_ffff;
    SfenceVma     "sfence.vma"      Sfence  0x1200_0073 0xfe00_7fff;
    SinvalVma     "sinval.vma"      Sfence  0x1600_0073 0xfe00_7fff;
    // Zicsr
    CsrRw         "csrrw"           Csr     0x0000_1073 0x0000_707f;
    CsrRs         "csrrs"           Csr     0x0000_2073 0x0000_707f;
    CsrRc         "csrrc"           Csr     0x0000_3073 0x0000_707f;
    CsrRwi        "csrrwi"          CsrImm  0x0000_5073 0x0000_707f;
    CsrRsi        "csrrsi"          CsrImm  0x0000_6073 0x0000_707f;
    CsrRci        "csrrci"          CsrImm  0x0000_7073 0x0000_707f;
    // M
    Mul           "mul"             R       0x0200_0033 0xfe00_707f;
    Mulh          "mulh"            R       0x0200_1033 0xfe00_707f;
    Mulhsu        "mulhsu"          R       0x0200_2033 0xfe00_707f;
    Mulhu         "mulhu"           R       0x0200_3033 0xfe00_707f;
    Div           "div"             R       0x0200_4033 0xfe00_707f;
    Divu          "divu"            R       0x0200_5033 0xfe00_707f;
    Rem           "rem"             R       0x0200_6033 0xfe00_707f;
    Remu          "remu"            R       0x0200_7033 0xfe00_707f;
    Mulw          "mulw"            R       0x0200_003b 0xfe00_707f;
    Divw          "divw"            R       0x0200_403b 0xfe00_707f;
    Divuw         "divuw"           R       0x0200_503b 0xfe00_707f;
    Remw          "remw"            R       0x0200_603b 0xfe00_707f;
    Remuw         "remuw"           R       0x0200_703b 0xfe00_707f;
    // A
    LrW           "lr.w"            Lr      0x1000_202f 0xf9f0_707f;
    ScW           "sc.w"            Amo     0x1800_202f 0xf800_707f;
    AmoSwapW      "amoswap.w"       Amo     0x0800_202f 0xf800_707f;
    AmoAddW       "amoadd.w"        Amo     0x0000_202f 0xf800_707f;
    AmoXorW       "amoxor.w"        Amo     0x2000_202f 0xf800_707f;
    AmoAndW       "amoand.w"        Amo     0x6000_202f 0xf800_707f;
    AmoOrW        "amoor.w"         Amo     0x4000_202f 0xf800_707f;
    AmoMinW       "amomin.w"        Amo     0x8000_202f 0xf800_707f;
    AmoMaxW       "amomax.w"        Amo     0xa000_202f 0xf800_707f;
    AmoMinuW      "amominu.w"       Amo     0xc000_202f 0xf800_707f;
    AmoMaxuW      "amomaxu.w"       Amo     0xe000_202f 0xf800_707f;
    LrD           "lr.d"            Lr      0x1000_302f 0xf9f0_707f;
    ScD           "sc.d"            Amo     0x1800_302f 0xf800_707f;
    AmoSwapD      "amoswap.d"       Amo     0x0800_302f 0xf800_707f;
    AmoAddD       "amoadd.d"        Amo     0x0000_302f 0xf800_707f;
    AmoXorD       "amoxor.d"        Amo     0x2000_302f 0xf800_707f;
    AmoAndD       "amoand.d"        Amo     0x6000_302f 0xf800_707f;
    AmoOrD        "amoor.d"         Amo     0x4000_302f 0xf800_707f;
    AmoMinD       "amomin.d"        Amo     0x8000_302f 0xf800_707f;
    AmoMaxD       "amomax.d"        Amo     0xa000_302f 0xf800_707f;
    AmoMinuD      "amominu.d"       Amo     0xc000_302f 0xf800_707f;
    AmoMaxuD      "amomaxu.d"       Amo     0xe000_302f 0xf800_707f;
    // Zba
    AddUw         "add.uw"          R       0x0800_003b 0xfe00_707f;
    Sh1add        "sh1add"          R       0x2000_2033 0xfe00_707f;
    Sh2add        "sh2add"          R       0x2000_4033 0xfe00_707f;
    Sh3add        "sh3add"          R       0x2000_6033 0xfe00_707f;
    Sh1addUw      "sh1add.uw"       R       0x2000_203b 0xfe00_707f;
    Sh2addUw      "sh2add.uw"       R       0x2000_403b 0xfe00_707f;
    Sh3addUw      "sh3add.uw"       R       0x2000_603b 0xfe00_707f;
    SlliUw        "slli.uw"         Shift6  0x0800_101b 0xfc00_707f;
    // Zbb, some of it in Zbkb too
    Andn          "andn"            R       0x4000_7033 0xfe00_707f;
    Orn           "orn"             R       0x4000_6033 0xfe00_707f;
    Xnor          "xnor"            R       0x4000_4033 0xfe00_707f;
    Clz           "clz"             R1      0x6000_1013 0xfff0_707f;
    Ctz           "ctz"             R1      0x6010_1013 0xfff0_707f;
    Cpop          "cpop"            R1      0x6020_1013 0xfff0_707f;
    Clzw          "clzw"            R1      0x6000_101b 0xfff0_707f;
    Ctzw          "ctzw"            R1      0x6010_101b 0xfff0_707f;
    Cpopw         "cpopw"           R1      0x6020_101b 0xfff0_707f;
    Max           "max"             R       0x0a00_6033 0xfe00_707f;
    Maxu          "maxu"            R       0x0a00_7033 0xfe00_707f;
    Min           "min"             R       0x0a00_4033 0xfe00_707f;
    Minu          "minu"            R       0x0a00_5033 0xfe00_707f;
    SextB         "sext.b"          R1      0x6040_1013 0xfff0_707f;
    SextH         "sext.h"          R1      0x6050_1013 0xfff0_707f;
    ZextH         "zext.h"          R1      0x0800_403b 0xfff0_707f;
    Rol           "rol"             R       0x6000_1033 0xfe00_707f;
    Ror           "ror"             R       0x6000_5033 0xfe00_707f;
    Rori          "rori"            Shift6  0x6000_5013 0xfc00_707f;
    Rolw          "rolw"            R       0x6000_103b 0xfe00_707f;
    Rorw          "rorw"            R       0x6000_503b 0xfe00_707f;
    Roriw         "roriw"           Shift5  0x6000_501b 0xfe00_707f;
    OrcB          "orc.b"           R1      0x2870_5013 0xfff0_707f;
    Rev8          "rev8"            R1      0x6b80_5013 0xfff0_707f;
    // Zbs
    Bclr          "bclr"            R       0x4800_1033 0xfe00_707f;
    Bext          "bext"            R       0x4800_5033 0xfe00_707f;
    Binv          "binv"            R       0x6800_1033 0xfe00_707f;
    Bset          "bset"            R       0x2800_1033 0xfe00_707f;
    Bclri         "bclri"           Shift6  0x4800_1013 0xfc00_707f;
    Bexti         "bexti"           Shift6  0x4800_5013 0xfc00_707f;
    Binvi         "binvi"           Shift6  0x6800_1013 0xfc00_707f;
    Bseti         "bseti"           Shift6  0x2800_1013 0xfc00_707f;
    // Zicond
    CzeroEqz      "czero.eqz"       R       0x0e00_5033 0xfe00_707f;
    CzeroNez      "czero.nez"       R       0x0e00_7033 0xfe00_707f;
    // Zbc (Zbkc, which lacks clmulr)
    Clmul         "clmul"           R       0x0a00_1033 0xfe00_707f;
    Clmulh        "clmulh"          R       0x0a00_3033 0xfe00_707f;
    Clmulr        "clmulr"          R       0x0a00_2033 0xfe00_707f;
    // Zbkb and Zbkx
    Pack          "pack"            R       0x0800_4033 0xfe00_707f;
    Packh         "packh"           R       0x0800_7033 0xfe00_707f;
    Packw         "packw"           R       0x0800_403b 0xfe00_707f;
    Brev8         "brev8"           R1      0x6870_5013 0xfff0_707f;
    Xperm4        "xperm4"          R       0x2800_2033 0xfe00_707f;
    Xperm8        "xperm8"          R       0x2800_4033 0xfe00_707f;
    // Zknd and Zkne
    Aes64ds       "aes64ds"         R       0x3a00_0033 0xfe00_707f;
    Aes64dsm      "aes64dsm"        R       0x3e00_0033 0xfe00_707f;
    Aes64es       "aes64es"         R       0x3200_0033 0xfe00_707f;
    Aes64esm      "aes64esm"        R       0x3600_0033 0xfe00_707f;
    Aes64im       "aes64im"         R1      0x3000_1013 0xfff0_707f;
    Aes64ks1i     "aes64ks1i"       Round   0x3100_1013 0xff00_707f;
    Aes64ks2      "aes64ks2"        R       0x7e00_0033 0xfe00_707f;
    // Zknh
    Sha256sum0    "sha256sum0"      R1      0x1000_1013 0xfff0_707f;
    Sha256sum1    "sha256sum1"      R1      0x1010_1013 0xfff0_707f;
    Sha256sig0    "sha256sig0"      R1      0x1020_1013 0xfff0_707f;
    Sha256sig1    "sha256sig1"      R1      0x1030_1013 0xfff0_707f;
    Sha512sum0    "sha512sum0"      R1      0x1040_1013 0xfff0_707f;
    Sha512sum1    "sha512sum1"      R1      0x1050_1013 0xfff0_707f;
    Sha512sig0    "sha512sig0"      R1      0x1060_1013 0xfff0_707f;
    Sha512sig1    "sha512sig1"      R1      0x1070_1013 0xfff0_707f;
    // Zicbom and Zicboz; the prefetches of Zicbop are `ori` with rd = x0
    CboInval      "cbo.inval"       Block   0x0000_200f 0xfff0_7fff;
    CboClean      "cbo.clean"       Block   0x0010_200f 0xfff0_7fff;
    CboFlush      "cbo.flush"       Block   0x0020_200f 0xfff0_7fff;
    CboZero       "cbo.zero"        Block   0x0040_200f 0xfff0_7fff;
    // Zawrs
    WrsNto        "wrs.nto"         None    0x00d0_0073 0xffff_ffff;
    WrsSto        "wrs.sto"         None    0x01d0_0073 0xffff_ffff;
    // F
    Flw           "flw"             FLoad   0x0000_2007 0x0000_707f;
    Fsw           "fsw"             FStore  0x0000_2027 0x0000_707f;
    FmaddS        "fmadd.s"         Fma     0x0000_0043 0x0600_007f;
    FmsubS        "fmsub.s"         Fma     0x0000_0047 0x0600_007f;
    FnmsubS       "fnmsub.s"        Fma     0x0000_004b 0x0600_007f;
    FnmaddS       "fnmadd.s"        Fma     0x0000_004f 0x0600_007f;
    FaddS         "fadd.s"          FRm     0x0000_0053 0xfe00_007f;
    FsubS         "fsub.s"          FRm     0x0800_0053 0xfe00_007f;
    FmulS         "fmul.s"          FRm     0x1000_0053 0xfe00_007f;
    FdivS         "fdiv.s"          FRm     0x1800_0053 0xfe00_007f;
    FsqrtS        "fsqrt.s"         FRm1    0x5800_0053 0xfff0_007f;
    FsgnjS        "fsgnj.s"         FR      0x2000_0053 0xfe00_707f;
    FsgnjnS       "fsgnjn.s"        FR      0x2000_1053 0xfe00_707f;
    FsgnjxS       "fsgnjx.s"        FR      0x2000_2053 0xfe00_707f;
    FminS         "fmin.s"          FR      0x2800_0053 0xfe00_707f;
    FmaxS         "fmax.s"          FR      0x2800_1053 0xfe00_707f;
    FeqS          "feq.s"           FCmp    0xa000_2053 0xfe00_707f;
    FltS          "flt.s"           FCmp    0xa000_1053 0xfe00_707f;
    FleS          "fle.s"           FCmp    0xa000_0053 0xfe00_707f;
    FclassS       "fclass.s"        FToX    0xe000_1053 0xfff0_707f;
    FcvtWS        "fcvt.w.s"        FToXRm  0xc000_0053 0xfff0_007f;
    FcvtWuS       "fcvt.wu.s"       FToXRm  0xc010_0053 0xfff0_007f;
    FcvtLS        "fcvt.l.s"        FToXRm  0xc020_0053 0xfff0_007f;
    FcvtLuS       "fcvt.lu.s"       FToXRm  0xc030_0053 0xfff0_007f;
    FcvtSW        "fcvt.s.w"        XToFRm  0xd000_0053 0xfff0_007f;
    FcvtSWu       "fcvt.s.wu"       XToFRm  0xd010_0053 0xfff0_007f;
    FcvtSL        "fcvt.s.l"        XToFRm  0xd020_0053 0xfff0_007f;
    FcvtSLu       "fcvt.s.lu"       XToFRm  0xd030_0053 0xfff0_007f;
    FmvXW         "fmv.x.w"         FToX    0xe000_0053 0xfff0_707f;
    FmvWX         "fmv.w.x"         XToF    0xf000_0053 0xfff0_707f;
    FcvtSD        "fcvt.s.d"        FRm1    0x4010_0053 0xfff0_007f;
    // Zfa, single
    FliS          "fli.s"           FConst  0xf010_0053 0xfff0_707f;
    FminmS        "fminm.s"         FR      0x2800_2053 0xfe00_707f;
    FmaxmS        "fmaxm.s"         FR      0x2800_3053 0xfe00_707f;
    FroundS       "fround.s"        FRm1    0x4040_0053 0xfff0_007f;
    FroundnxS     "froundnx.s"      FRm1    0x4050_0053 0xfff0_007f;
    FltqS         "fltq.s"          FCmp    0xa000_5053 0xfe00_707f;
    FleqS         "fleq.s"          FCmp    0xa000_4053 0xfe00_707f;
    // D
    Fld           "fld"             FLoad   0x0000_3007 0x0000_707f;
    Fsd           "fsd"             FStore  0x0000_3027 0x0000_707f;
    FmaddD        "fmadd.d"         Fma     0x0200_0043 0x0600_007f;
    FmsubD        "fmsub.d"         Fma     0x0200_0047 0x0600_007f;
    FnmsubD       "fnmsub.d"        Fma     0x0200_004b 0x0600_007f;
    FnmaddD       "fnmadd.d"        Fma     0x0200_004f 0x0600_007f;
    FaddD         "fadd.d"          FRm     0x0200_0053 0xfe00_007f;
    FsubD         "fsub.d"          FRm     0x0a00_0053 0xfe00_007f;
    FmulD         "fmul.d"          FRm     0x1200_0053 0xfe00_007f;
    FdivD         "fdiv.d"          FRm     0x1a00_0053 0xfe00_007f;
    FsqrtD        "fsqrt.d"         FRm1    0x5a00_0053 0xfff0_007f;
    FsgnjD        "fsgnj.d"         FR      0x2200_0053 0xfe00_707f;
    FsgnjnD       "fsgnjn.d"        FR      0x2200_1053 0xfe00_707f;
    FsgnjxD       "fsgnjx.d"        FR      0x2200_2053 0xfe00_707f;
    FminD         "fmin.d"          FR      0x2a00_0053 0xfe00_707f;
    FmaxD         "fmax.d"          FR      0x2a00_1053 0xfe00_707f;
    FeqD          "feq.d"           FCmp    0xa200_2053 0xfe00_707f;
    FltD          "flt.d"           FCmp    0xa200_1053 0xfe00_707f;
    FleD          "fle.d"           FCmp    0xa200_0053 0xfe00_707f;
    FclassD       "fclass.d"        FToX    0xe200_1053 0xfff0_707f;
    FcvtWD        "fcvt.w.d"        FToXRm  0xc200_0053 0xfff0_007f;
    FcvtWuD       "fcvt.wu.d"       FToXRm  0xc210_0053 0xfff0_007f;
    FcvtLD        "fcvt.l.d"        FToXRm  0xc220_0053 0xfff0_007f;
    FcvtLuD       "fcvt.lu.d"       FToXRm  0xc230_0053 0xfff0_007f;
    FcvtDW        "fcvt.d.w"        XToFRm  0xd200_0053 0xfff0_007f;
    FcvtDWu       "fcvt.d.wu"       XToFRm  0xd210_0053 0xfff0_007f;
    FcvtDL        "fcvt.d.l"        XToFRm  0xd220_0053 0xfff0_007f;
    FcvtDLu       "fcvt.d.lu"       XToFRm  0xd230_0053 0xfff0_007f;
    FmvXD         "fmv.x.d"         FToX    0xe200_0053 0xfff0_707f;
    FmvDX         "fmv.d.x"         XToF    0xf200_0053 0xfff0_707f;
    FcvtDS        "fcvt.d.s"        FRm1    0x4200_0053 0xfff0_007f;
    // Zfa, double
    FliD          "fli.d"           FConst  0xf210_0053 0xfff0_707f;
    FminmD        "fminm.d"         FR      0x2a00_2053 0xfe00_707f;
    FmaxmD        "fmaxm.d"         FR      0x2a00_3053 0xfe00_707f;
    FroundD       "fround.d"        FRm1    0x4240_0053 0xfff0_007f;
    FroundnxD     "froundnx.d"      FRm1    0x4250_0053 0xfff0_007f;
    FltqD         "fltq.d"          FCmp    0xa200_5053 0xfe00_707f;
    FleqD         "fleq.d"          FCmp    0xa200_4053 0xfe00_707f;
    FcvtmodWD     "fcvtmod.w.d"     FToXRm  0xc280_1053 0xfff0_707f;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_the_order_of_op_and_have_no_bits_outside_their_mask() {
        for (i, row) in ROWS.iter().enumerate().skip(1) {
            assert_eq!(row.op as usize, i);
            assert_eq!(row.bits & !row.mask, 0, "{row:?}");
            assert_eq!(row.bits & 3, 3, "{row:?}");
        }
    }

    #[test]
    fn only_two_rows_are_cases_of_others() {
        for (i, a) in ROWS.iter().enumerate().skip(1) {
            for b in &ROWS[i + 1..] {
                let overlap = (a.bits ^ b.bits) & a.mask & b.mask == 0;
                let case = matches!((a.op, b.op), (Op::Pause, Op::Fence) | (Op::ZextH, Op::Packw));
                assert_eq!(overlap, case, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn every_row_is_found_by_its_own_bits() {
        for row in &ROWS[1..] {
            let op = if row.op == Op::Packw { Op::ZextH } else { row.op };
            assert_eq!(lookup(row.bits).map(|r| r.op), Some(op));
            if row.op != Op::Fence {
                assert_eq!(lookup(row.bits | !row.mask).map(|r| r.op), Some(row.op));
            }
        }
    }
}

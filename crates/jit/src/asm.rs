//! An assembler for the x86-64 instructions that the translator uses.
//!
//! # Invariants
//! - INV-ASM-1: every instruction is encoded as the manual says; tests compare with objdump.
//! - INV-ASM-2: nothing here jumps, branches or calls without a target that the caller gives.
//!
//! # References
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.

/// A general-purpose register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the manual's")]
pub(crate) enum Reg {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

/// A memory operand: base, an index times a scale (as its log2), displacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mem {
    pub(crate) base: Reg,
    pub(crate) index: Option<(Reg, u8)>,
    pub(crate) disp: i32,
}

impl Mem {
    /// `[base + disp]`
    pub(crate) const fn new(base: Reg, disp: i32) -> Self {
        Self { base, index: None, disp }
    }

    /// `[base + index + disp]`
    pub(crate) const fn indexed(base: Reg, index: Reg, disp: i32) -> Self {
        Self { base, index: Some((index, 0)), disp }
    }

    /// The same place, `by` bytes on.
    pub(crate) const fn plus(self, by: i32) -> Self {
        Self { disp: self.disp + by, ..self }
    }
}

/// A register or memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rm {
    Reg(Reg),
    Mem(Mem),
}

impl Rm {
    /// Whether it is a register whose low byte is named with a REX prefix alone.
    fn is_odd_byte(self) -> bool {
        matches!(self, Self::Reg(r) if (4..8).contains(&(r as u8)))
    }
}

impl From<Reg> for Rm {
    fn from(r: Reg) -> Self {
        Self::Reg(r)
    }
}

impl From<Mem> for Rm {
    fn from(m: Mem) -> Self {
        Self::Mem(m)
    }
}

/// Operations of the classic two-operand form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Shifts and rotates, by their opcode extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Shift {
    Rol = 0,
    Ror = 1,
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// Operations of opcode F7 on one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Unary {
    Not = 2,
    Neg = 3,
    Mul = 4,
    Imul = 5,
    Div = 6,
    Idiv = 7,
}

/// Conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the manual's")]
pub(crate) enum Cond {
    O = 0,
    B = 2,
    Ae = 3,
    E = 4,
    Ne = 5,
    A = 7,
    S = 8,
    P = 10,
    Np = 11,
    L = 12,
    Ge = 13,
    G = 15,
}

/// Operand size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    D,
    Q,
}

use Size::{D, Q};

/// Prefix of an SSE instruction, numbered as VEX has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Sse {
    /// No prefix.
    None,
    /// 66
    P66,
    /// F3: scalar single
    F3,
    /// F2: scalar double
    F2,
}

/// An SSE register or memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Xm {
    Xmm(u8),
    Mem(Mem),
    /// A general-purpose register, for the moves and conversions between the files.
    Gpr(Reg),
}

impl From<Xm> for Rm {
    fn from(operand: Xm) -> Self {
        match operand {
            Xm::Xmm(x) => Self::Reg(XMM_AS_REG[usize::from(x & 15)]),
            Xm::Mem(m) => Self::Mem(m),
            Xm::Gpr(r) => Self::Reg(r),
        }
    }
}

/// Where a relative displacement is to be filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) struct Fixup {
    /// Offset of the four bytes from the start of their part.
    at: usize,
    is_apart: bool,
}

/// Code under construction, to be placed at `base`; what is made after [`Asm::go_apart`] has a place of its own.
#[derive(Debug)]
pub(crate) struct Asm {
    pub(crate) code: Vec<u8>,
    base: u64,
    /// The first part, once the other one has begun.
    first: Option<(Vec<u8>, u64)>,
}

impl Asm {
    pub(crate) fn new(base: u64) -> Self {
        Self { code: Vec::with_capacity(2048), base, first: None }
    }

    /// What follows is to be placed at `base`, apart from what was made.
    pub(crate) fn go_apart(&mut self, base: u64) {
        assert!(self.first.is_none(), "code has two parts at most");
        let first = std::mem::replace(&mut self.code, Vec::with_capacity(2048));
        self.first = Some((first, std::mem::replace(&mut self.base, base)));
    }

    /// Both parts of the code, the one that comes first and what is apart from it.
    pub(crate) fn into_parts(self) -> (Vec<u8>, Vec<u8>) {
        match self.first {
            Some((first, _)) => (first, self.code),
            None => (self.code, Vec::new()),
        }
    }

    /// Address of the next byte.
    pub(crate) fn here(&self) -> u64 {
        self.base + self.code.len() as u64
    }

    /// Address of what is to be filled in.
    pub(crate) fn address(&self, fixup: Fixup) -> u64 {
        let base = match &self.first {
            Some((_, base)) if !fixup.is_apart => *base,
            Some(_) | None => self.base,
        };
        base + fixup.at as u64
    }

    pub(crate) fn byte(&mut self, b: u8) {
        self.code.push(b);
    }

    fn dword(&mut self, v: u32) {
        self.code.extend_from_slice(&v.to_le_bytes());
    }

    /// REX (if needed), opcode and ModRM of an instruction with operands `reg` and `rm`. `byte_reg`: `reg` or a
    /// register `rm` is used as a byte register, where 4 to 7 need a REX prefix to mean SPL to DIL.
    fn modrm(&mut self, size: Size, opcode: &[u8], reg: u8, rm: Rm, byte_reg: bool) {
        let (mut rex, base) = match rm {
            Rm::Reg(r) => (0, r as u8),
            Rm::Mem(m) => (m.index.map_or(0, |(i, _)| (i as u8 >> 3) << 1), m.base as u8),
        };
        rex |= u8::from(size == Q) << 3 | (reg >> 3) << 2 | base >> 3;
        let odd_byte = byte_reg && ((4..8).contains(&reg) || rm.is_odd_byte());
        if rex != 0 || odd_byte {
            self.byte(0x40 | rex);
        }
        self.code.extend_from_slice(opcode);
        self.operands(reg, rm);
    }

    /// ModRM, SIB and displacement.
    fn operands(&mut self, reg: u8, rm: Rm) {
        let reg = (reg & 7) << 3;
        let m = match rm {
            Rm::Reg(r) => return self.byte(0xc0 | reg | r as u8 & 7),
            Rm::Mem(m) => m,
        };
        let base = m.base as u8 & 7;
        let mode = match m.disp {
            0 if base != 5 => 0,
            d if i8::try_from(d).is_ok() => 0x40,
            _ => 0x80,
        };
        match m.index {
            Some((index, scale)) => {
                self.byte(mode | reg | 4);
                self.byte(scale << 6 | (index as u8 & 7) << 3 | base);
            }
            None if base == 4 => {
                self.byte(mode | reg | 4);
                self.byte(0x24);
            }
            None => self.byte(mode | reg | base),
        }
        match mode {
            0 => {}
            0x40 => self.byte(m.disp as u8),
            _ => self.dword(m.disp as u32),
        }
    }

    /// `op rm, reg`
    pub(crate) fn alu(&mut self, op: Alu, size: Size, rm: impl Into<Rm>, reg: Reg) {
        self.modrm(size, &[(op as u8) << 3 | 1], reg as u8, rm.into(), false);
    }

    /// `op reg, rm`
    pub(crate) fn alu_load(&mut self, op: Alu, size: Size, reg: Reg, rm: impl Into<Rm>) {
        self.modrm(size, &[(op as u8) << 3 | 3], reg as u8, rm.into(), false);
    }

    /// `op rm, imm`, sign-extended.
    pub(crate) fn alu_imm(&mut self, op: Alu, size: Size, rm: impl Into<Rm>, imm: i32) {
        match i8::try_from(imm) {
            Ok(imm) => {
                self.modrm(size, &[0x83], op as u8, rm.into(), false);
                self.byte(imm as u8);
            }
            Err(_) => {
                self.modrm(size, &[0x81], op as u8, rm.into(), false);
                self.dword(imm as u32);
            }
        }
    }

    /// `test rm, reg`
    pub(crate) fn test(&mut self, size: Size, rm: impl Into<Rm>, reg: Reg) {
        self.modrm(size, &[0x85], reg as u8, rm.into(), false);
    }

    /// `test rm, imm`
    pub(crate) fn test_imm(&mut self, size: Size, rm: impl Into<Rm>, imm: i32) {
        self.modrm(size, &[0xf7], 0, rm.into(), false);
        self.dword(imm as u32);
    }

    /// `mov reg, rm`
    pub(crate) fn mov(&mut self, size: Size, reg: Reg, rm: impl Into<Rm>) {
        let rm = rm.into();
        if size == Q && rm == Rm::Reg(reg) {
            return;
        }
        self.modrm(size, &[0x8b], reg as u8, rm, false);
    }

    /// `mov [m], reg`
    pub(crate) fn store(&mut self, size: Size, m: Mem, reg: Reg) {
        self.modrm(size, &[0x89], reg as u8, m.into(), false);
    }

    /// `mov word [m], reg`
    pub(crate) fn store16(&mut self, m: Mem, reg: Reg) {
        self.byte(0x66);
        self.modrm(D, &[0x89], reg as u8, m.into(), false);
    }

    /// `mov byte [m], reg`
    pub(crate) fn store8(&mut self, m: Mem, reg: Reg) {
        self.modrm(D, &[0x88], reg as u8, m.into(), true);
    }

    /// `mov [m], imm`, sign-extended.
    pub(crate) fn store_imm(&mut self, size: Size, m: Mem, imm: i32) {
        self.modrm(size, &[0xc7], 0, m.into(), false);
        self.dword(imm as u32);
    }

    /// Loads a constant in the shortest way. Flags stay.
    pub(crate) fn mov_imm(&mut self, reg: Reg, imm: u64) {
        if let Ok(imm) = u32::try_from(imm) {
            if reg as u8 >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | reg as u8 & 7);
            self.dword(imm);
        } else if let Ok(imm) = i32::try_from(imm as i64) {
            self.modrm(Q, &[0xc7], 0, reg.into(), false);
            self.dword(imm as u32);
        } else {
            self.byte(0x48 | reg as u8 >> 3);
            self.byte(0xb8 | reg as u8 & 7);
            self.code.extend_from_slice(&imm.to_le_bytes());
        }
    }

    /// `xor reg, reg`, which changes flags.
    pub(crate) fn zero(&mut self, reg: Reg) {
        self.alu(Alu::Xor, D, reg, reg);
    }

    /// Loads or moves `bits` bits with zero extension.
    pub(crate) fn movzx(&mut self, bits: u8, reg: Reg, rm: impl Into<Rm>) {
        let rm = rm.into();
        match bits {
            8 => self.modrm(D, &[0x0f, 0xb6], reg as u8, rm, rm.is_odd_byte()),
            16 => self.modrm(D, &[0x0f, 0xb7], reg as u8, rm, false),
            _ => self.modrm(D, &[0x8b], reg as u8, rm, false),
        }
    }

    /// Loads or moves `bits` bits with sign extension to 64.
    pub(crate) fn movsx(&mut self, bits: u8, reg: Reg, rm: impl Into<Rm>) {
        let rm = rm.into();
        match bits {
            8 => self.modrm(Q, &[0x0f, 0xbe], reg as u8, rm, rm.is_odd_byte()),
            16 => self.modrm(Q, &[0x0f, 0xbf], reg as u8, rm, false),
            _ => self.modrm(Q, &[0x63], reg as u8, rm, false),
        }
    }

    /// `lea reg, [m]`
    pub(crate) fn lea(&mut self, reg: Reg, m: Mem) {
        self.modrm(Q, &[0x8d], reg as u8, m.into(), false);
    }

    /// `lea reg32, [m]`
    pub(crate) fn lea32(&mut self, reg: Reg, m: Mem) {
        self.modrm(D, &[0x8d], reg as u8, m.into(), false);
    }

    /// Shift by a constant.
    pub(crate) fn shift(&mut self, op: Shift, size: Size, rm: impl Into<Rm>, by: u8) {
        self.modrm(size, &[0xc1], op as u8, rm.into(), false);
        self.byte(by);
    }

    /// `rol/ror/... rm, cl`
    pub(crate) fn shift_cl(&mut self, op: Shift, size: Size, rm: impl Into<Rm>) {
        self.modrm(size, &[0xd3], op as u8, rm.into(), false);
    }

    /// SHLX, SHRX or SARX: `reg = rm shifted by count`.
    pub(crate) fn shift_by(&mut self, op: Shift, size: Size, reg: Reg, rm: impl Into<Rm>, by: Reg) {
        let pp = match op {
            Shift::Shl => 1,
            Shift::Sar => 2,
            _ => 3,
        };
        self.vex(2, pp, size, 0xf7, reg as u8, by as u8, rm.into());
    }

    /// RORX: `reg = rm rotated right by a constant`. Flags stay.
    pub(crate) fn rorx(&mut self, size: Size, reg: Reg, rm: impl Into<Rm>, by: u8) {
        self.vex(3, 3, size, 0xf0, reg as u8, 0, rm.into());
        self.byte(by);
    }

    /// `andn reg, not, rm`: `reg = !not & rm`.
    pub(crate) fn andn(&mut self, size: Size, reg: Reg, not: Reg, rm: impl Into<Rm>) {
        self.vex(2, 0, size, 0xf2, reg as u8, not as u8, rm.into());
    }

    /// A VEX instruction: opcode map 1 to 3, prefix code, W, opcode, operands.
    #[expect(clippy::too_many_arguments, reason = "the fields of the prefix")]
    pub(crate) fn vex(&mut self, map: u8, pp: u8, w: Size, op: u8, reg: u8, v: u8, rm: Rm) {
        let (x, b) = match rm {
            Rm::Reg(r) => (0, r as u8 >> 3),
            Rm::Mem(m) => (m.index.map_or(0, |(i, _)| i as u8 >> 3), m.base as u8 >> 3),
        };
        if (map, w, x, b) == (1, D, 0, 0) {
            self.byte(0xc5);
            self.byte((reg >> 3 ^ 1) << 7 | (!v & 15) << 3 | pp);
            self.byte(op);
            return self.operands(reg, rm);
        }
        self.byte(0xc4);
        self.byte((reg >> 3 ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | map);
        self.byte(u8::from(w == Q) << 7 | (!v & 15) << 3 | pp);
        self.byte(op);
        self.operands(reg, rm);
    }

    /// `imul reg, rm`
    pub(crate) fn imul(&mut self, size: Size, reg: Reg, rm: impl Into<Rm>) {
        self.modrm(size, &[0x0f, 0xaf], reg as u8, rm.into(), false);
    }

    /// An instruction on RDX:RAX and one operand, or NOT/NEG.
    pub(crate) fn unary(&mut self, op: Unary, size: Size, rm: impl Into<Rm>) {
        self.modrm(size, &[0xf7], op as u8, rm.into(), false);
    }

    /// CDQ or CQO.
    pub(crate) fn sign_extend_rax(&mut self, size: Size) {
        if size == Q {
            self.byte(0x48);
        }
        self.byte(0x99);
    }

    /// `setcc reg8`
    pub(crate) fn setcc(&mut self, cond: Cond, reg: Reg) {
        self.modrm(D, &[0x0f, 0x90 | cond as u8], 0, reg.into(), true);
    }

    /// `cmovcc reg, rm`
    pub(crate) fn cmov(&mut self, cond: Cond, size: Size, reg: Reg, rm: impl Into<Rm>) {
        self.modrm(size, &[0x0f, 0x40 | cond as u8], reg as u8, rm.into(), false);
    }

    /// An instruction `0F op reg, rm` with an optional prefix: BSWAP's neighbours, POPCNT, LZCNT, TZCNT.
    pub(crate) fn prefixed_0f(
        &mut self,
        prefix: u8,
        op: u8,
        size: Size,
        reg: Reg,
        rm: impl Into<Rm>,
    ) {
        self.byte(prefix);
        self.modrm(size, &[0x0f, op], reg as u8, rm.into(), false);
    }

    /// `bswap reg`
    pub(crate) fn bswap(&mut self, reg: Reg) {
        self.byte(0x48 | reg as u8 >> 3);
        self.byte(0x0f);
        self.byte(0xc8 | reg as u8 & 7);
    }

    /// BT, BTS, BTR or BTC (extension 4 to 7) with a constant bit.
    pub(crate) fn bit_imm(&mut self, ext: u8, size: Size, rm: impl Into<Rm>, bit: u8) {
        self.modrm(size, &[0x0f, 0xba], ext, rm.into(), false);
        self.byte(bit);
    }

    /// BT (A3), BTS (AB), BTR (B3) or BTC (BB) on a register.
    pub(crate) fn bit_reg(&mut self, op: u8, size: Size, reg: Reg, bit: Reg) {
        self.modrm(size, &[0x0f, op], bit as u8, reg.into(), false);
    }

    /// `push reg`
    pub(crate) fn push(&mut self, reg: Reg) {
        if reg as u8 >= 8 {
            self.byte(0x41);
        }
        self.byte(0x50 | reg as u8 & 7);
    }

    /// `pop reg`
    pub(crate) fn pop(&mut self, reg: Reg) {
        if reg as u8 >= 8 {
            self.byte(0x41);
        }
        self.byte(0x58 | reg as u8 & 7);
    }

    /// `ret`
    pub(crate) fn ret(&mut self) {
        self.byte(0xc3);
    }

    /// `jmp rm`
    pub(crate) fn jmp_rm(&mut self, rm: impl Into<Rm>) {
        self.modrm(D, &[0xff], 4, rm.into(), false);
    }

    /// `call rm`
    pub(crate) fn call_rm(&mut self, rm: impl Into<Rm>) {
        self.modrm(D, &[0xff], 2, rm.into(), false);
    }

    /// A jump whose target comes later.
    pub(crate) fn jcc(&mut self, cond: Cond) -> Fixup {
        self.byte(0x0f);
        self.byte(0x80 | cond as u8);
        self.fixup()
    }

    /// A jump whose target comes later.
    pub(crate) fn jmp(&mut self) -> Fixup {
        self.byte(0xe9);
        self.fixup()
    }

    fn fixup(&mut self) -> Fixup {
        let at = self.code.len();
        self.dword(0);
        Fixup { at, is_apart: self.first.is_some() }
    }

    /// Makes a jump go to an address.
    pub(crate) fn fix_to(&mut self, fixup: Fixup, target: u64) {
        let rel = target.wrapping_sub(self.address(fixup) + 4) as i64;
        let rel = i32::try_from(rel).expect("code lies within 2 GiB");
        let code = match &mut self.first {
            Some((first, _)) if !fixup.is_apart => first,
            Some(_) | None => &mut self.code,
        };
        code[fixup.at..fixup.at + 4].copy_from_slice(&rel.to_le_bytes());
    }

    /// Makes a jump go here.
    pub(crate) fn fix(&mut self, fixup: Fixup) {
        let here = self.here();
        self.fix_to(fixup, here);
    }

    pub(crate) fn jmp_to(&mut self, target: u64) {
        let f = self.jmp();
        self.fix_to(f, target);
    }

    pub(crate) fn jcc_to(&mut self, cond: Cond, target: u64) {
        let f = self.jcc(cond);
        self.fix_to(f, target);
    }

    pub(crate) fn call_to(&mut self, target: u64) {
        self.byte(0xe8);
        let f = self.fixup();
        self.fix_to(f, target);
    }

    /// `stmxcsr [m]`
    pub(crate) fn stmxcsr(&mut self, m: Mem) {
        self.modrm(D, &[0x0f, 0xae], 3, m.into(), false);
    }

    /// `ldmxcsr [m]`
    pub(crate) fn ldmxcsr(&mut self, m: Mem) {
        self.modrm(D, &[0x0f, 0xae], 2, m.into(), false);
    }

    /// An SSE instruction `prefix 0F op xmm, operand`; with a general-purpose operand `size` is that operand's.
    pub(crate) fn sse(&mut self, prefix: Sse, op: u8, size: Size, xmm: u8, operand: Xm) {
        self.sse_map(prefix, &[0x0f, op], size, xmm, operand);
    }

    /// An SSE instruction `prefix 0F 38 op xmm, operand`.
    pub(crate) fn sse38(&mut self, prefix: Sse, op: u8, xmm: u8, operand: Xm) {
        self.sse_map(prefix, &[0x0f, 0x38, op], D, xmm, operand);
    }

    /// An SSE instruction `66 0F 3A op xmm, operand, imm`; with a general-purpose operand `size` is that operand's.
    pub(crate) fn sse3a(&mut self, op: u8, size: Size, xmm: u8, operand: Xm, imm: u8) {
        self.sse_map(Sse::P66, &[0x0f, 0x3a, op], size, xmm, operand);
        self.byte(imm);
    }

    /// ROUNDSS or ROUNDSD: rounds to an integer in the way that `mode` says.
    pub(crate) fn round(&mut self, double: bool, xmm: u8, from: u8, mode: u8) {
        let op = if double { 0x0b } else { 0x0a };
        self.sse3a(op, D, xmm, Xm::Xmm(from), mode);
    }

    /// An AVX instruction of the map 0F on SSE registers: `to = a op operand`.
    pub(crate) fn avx(&mut self, prefix: Sse, op: u8, to: u8, a: u8, operand: Xm) {
        self.vex(1, prefix as u8, D, op, to, a, operand.into());
    }

    /// A fused multiplication on scalars of the size.
    pub(crate) fn fma(&mut self, op: u8, size: Size, to: u8, a: u8, operand: Xm) {
        self.vex(2, Sse::P66 as u8, size, op, to, a, operand.into());
    }

    fn sse_map(&mut self, prefix: Sse, op: &[u8], size: Size, xmm: u8, operand: Xm) {
        match prefix {
            Sse::None => {}
            Sse::P66 => self.byte(0x66),
            Sse::F3 => self.byte(0xf3),
            Sse::F2 => self.byte(0xf2),
        }
        self.modrm(size, op, xmm, operand.into(), false);
    }
}

/// Registers have the same numbers in both files.
const XMM_AS_REG: [Reg; 16] = {
    use Reg::*;
    [Rax, Rcx, Rdx, Rbx, Rsp, Rbp, Rsi, Rdi, R8, R9, R10, R11, R12, R13, R14, R15]
};

#[cfg(test)]
mod tests;

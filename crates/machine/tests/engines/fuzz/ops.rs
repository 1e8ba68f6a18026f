//! What can be generated: every instruction that the decoder knows, found by asking it, so that new ones come in alone.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use isa::Op;

use crate::rng::Rng;

/// An instruction of 32 bits: a word of it, and the bits that may be anything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    bits: u32,
    free: u32,
}

impl Form {
    /// The instruction with random operands.
    pub(crate) fn word(self, rng: &mut Rng) -> u32 {
        self.bits | rng.next() as u32 & self.free
    }

    /// Whether it has a rounding mode.
    pub(crate) fn has_rounding(self) -> bool {
        self.free & 0x7000 == 0x7000
    }

    /// The instruction with chosen registers, as far as it has them, and the rest at random.
    pub(crate) fn with(self, rng: &mut Rng, rd: u32, rs1: u32, rs2: u32) -> u32 {
        let wanted = rd << 7 | rs1 << 15 | rs2 << 20;
        let fields = 0x01ff_8f80 & self.free;
        self.word(rng) & !fields | wanted & fields
    }
}

/// The instructions by what they touch.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    /// Integer registers alone.
    pub(crate) integer: Vec<Form>,
    /// Multiplication and division.
    pub(crate) muldiv: Vec<Form>,
    /// Floating-point arithmetic, moves and conversions.
    pub(crate) float: Vec<Form>,
    pub(crate) loads: Vec<Form>,
    pub(crate) stores: Vec<Form>,
    pub(crate) float_loads: Vec<Form>,
    pub(crate) float_stores: Vec<Form>,
    pub(crate) atomics: Vec<Form>,
    /// Fences and operations on cache blocks, whose rs1 may be an address.
    pub(crate) fences: Vec<Form>,
    /// SYSTEM without the accesses to CSRs.
    pub(crate) system: Vec<Form>,
    /// 16 bits, integer registers alone.
    pub(crate) short: Vec<u16>,
    /// 16 bits, loads and stores.
    pub(crate) short_memory: Vec<u16>,
}

/// Whether an instruction goes elsewhere.
pub(crate) fn is_jump(op: Op) -> bool {
    (Op::Jal..=Op::Bgeu).contains(&op)
}

/// The instructions, found once.
pub(crate) fn all() -> &'static Ops {
    static OPS: OnceLock<Ops> = OnceLock::new();
    OPS.get_or_init(find)
}

fn find() -> Ops {
    let mut ops = Ops::default();
    for (op, form) in forms() {
        let list = match form.bits >> 2 & 31 {
            0x00 => &mut ops.loads,
            0x01 => &mut ops.float_loads,
            0x03 => &mut ops.fences,
            0x08 => &mut ops.stores,
            0x09 => &mut ops.float_stores,
            0x0b => &mut ops.atomics,
            0x10..=0x14 => &mut ops.float,
            0x1c if (Op::CsrRw..=Op::CsrRci).contains(&op) => continue,
            0x1c => &mut ops.system,
            _ if is_jump(op) => continue,
            0x0c | 0x0e if form.bits >> 25 == 1 => &mut ops.muldiv,
            _ => &mut ops.integer,
        };
        list.push(form);
    }
    for half in (0..=u16::MAX).filter(|h| h & 3 != 3) {
        let insn = isa::decode(u32::from(half));
        match isa_class(insn.op) {
            Class::Other => {}
            Class::Memory => ops.short_memory.push(half),
            Class::Integer => ops.short.push(half),
        }
    }
    ops
}

enum Class {
    Integer,
    Memory,
    Other,
}

/// What a short instruction is: found by its long form, since both decode to the same.
fn isa_class(op: Op) -> Class {
    static MAJOR: OnceLock<BTreeMap<Op, u32>> = OnceLock::new();
    let major =
        MAJOR.get_or_init(|| forms().into_iter().map(|(op, f)| (op, f.bits >> 2 & 31)).collect());
    match major.get(&op) {
        Some(0x00 | 0x01 | 0x08 | 0x09) => Class::Memory,
        Some(0x04..=0x06 | 0x0c..=0x0e) => Class::Integer,
        _ => Class::Other,
    }
}

/// A form of every instruction of 32 bits.
fn forms() -> BTreeMap<Op, Form> {
    let mut found = BTreeMap::new();
    for major in 0..32u32 {
        for rest in 0..1u32 << 15 {
            let (f3, f7, rs2) = (rest & 7, rest >> 3 & 0x7f, rest >> 10);
            let word = f7 << 25 | rs2 << 20 | f3 << 12 | major << 2 | 3;
            let op = isa::decode(word).op;
            if op != Op::Illegal && !found.contains_key(&op) {
                let free: u32 =
                    (0..32).map(|b| 1 << b).filter(|bit| isa::decode(word ^ bit).op == op).sum();
                found.insert(op, Form { bits: word & !free, free });
            }
        }
    }
    found
}

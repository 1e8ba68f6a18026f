//! The generator of code: loops, calls and jumps around fragments of what the engines must get right.

use crate::asm::*;
use crate::fuzz::code::{Code, Label};
use crate::fuzz::layout::{CODE, CODE_BYTES, DATA, DATA_BYTES, POOL, POOL_BYTES};
use crate::fuzz::ops::{self, Form, Ops};
use crate::fuzz::theme::{Kind, Theme};
use crate::rng::Rng;

/// Registers that hold something beyond a fragment.
pub(crate) type Locked = u32;

const SP: u32 = 2;

/// A word that may be overwritten by any instruction on integer registers that spares `locked`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site {
    pub(crate) gpa: u64,
    pub(crate) locked: Locked,
}

/// A program's code under construction.
pub(crate) struct Gen<'a> {
    pub(crate) rng: &'a mut Rng,
    pub(crate) ops: &'static Ops,
    pub(crate) theme: &'a Theme,
    pub(crate) code: Code,
    /// Registers that code may not write now; x0 is not one of them.
    pub(crate) locked: Locked,
    pub(crate) sites: Vec<Site>,
    /// Constants, from [`POOL`] on.
    pub(crate) pool: Vec<u64>,
    /// Places in the code that jumps may go to, whatever they break.
    pub(crate) marks: Vec<Label>,
    functions: Vec<(Label, u32)>,
    /// Harts of the machine.
    pub(crate) harts: u64,
    depth: u32,
    callable: usize,
}

impl<'a> Gen<'a> {
    pub(crate) fn new(rng: &'a mut Rng, theme: &'a Theme, harts: u64) -> Self {
        Self {
            rng,
            ops: ops::all(),
            theme,
            code: Code::new(CODE),
            locked: 0,
            sites: vec![],
            pool: vec![],
            marks: vec![],
            functions: vec![],
            harts,
            depth: 0,
            callable: 0,
        }
    }

    /// Whether there is room for more code.
    fn has_room(&self) -> bool {
        self.code.here() < CODE + CODE_BYTES - 0x2000
    }

    /// A register that may be written; sometimes x0.
    pub(crate) fn dest(&mut self) -> u32 {
        loop {
            let x = self.rng.bits(5);
            // x31 is the handler's: what it holds is chance, but the same on every engine.
            if self.locked >> x & 1 == 0 && x != SP {
                return x;
            }
        }
    }

    /// A register to keep something in during a fragment; locked until its end.
    pub(crate) fn temp(&mut self) -> u32 {
        loop {
            let x = if self.rng.one_in(2) { 8 + self.rng.bits(3) } else { self.rng.bits(5) };
            if x != 0 && x != 31 && x != SP && self.locked >> x & 1 == 0 {
                self.locked |= 1 << x;
                return x;
            }
        }
    }

    /// Whether fragments can still find registers.
    fn has_registers(&self) -> bool {
        self.locked.count_ones() < 14
    }

    /// Any register.
    pub(crate) fn source(&mut self) -> u32 {
        self.rng.bits(5)
    }

    /// Place of a constant.
    pub(crate) fn constant(&mut self, value: u64) -> u64 {
        let at = if (self.pool.len() as u64) < POOL_BYTES / 8 {
            self.pool.push(value);
            self.pool.len() as u64 - 1
        } else {
            self.rng.below(POOL_BYTES / 8)
        };
        POOL + 8 * at
    }

    pub(crate) fn load_constant(&mut self, rd: u32, value: u64) {
        if (-0x800..0x800).contains(&(value as i64)) {
            return self.code.word(addi(rd, 0, value as i32));
        }
        if value as i32 as u64 == value && value & 0xfff == 0 {
            return self.code.word(lui(rd, (value >> 12) as u32 & 0xf_ffff));
        }
        let at = self.constant(value);
        self.code.load(rd, at);
    }

    pub(crate) fn pick_form(&mut self, forms: &'static [Form]) -> Form {
        forms[self.rng.below(forms.len() as u64) as usize]
    }

    /// An instruction on integer registers.
    pub(crate) fn integer_word(&mut self) -> u32 {
        let form = if self.rng.one_in(5) {
            self.pick_form(&self.ops.muldiv)
        } else {
            self.pick_form(&self.ops.integer)
        };
        let (rd, rs1, rs2) = (self.dest(), self.source(), self.source());
        form.with(self.rng, rd, rs1, rs2)
    }

    fn short(&mut self, from: &'static [u16]) {
        for _ in 0..64 {
            let half = self.rng.pick(from);
            let insn = isa::decode(u32::from(half));
            if self.locked >> insn.rd & 1 == 0 && insn.rd != SP as u8 {
                return self.code.half(half);
            }
        }
    }

    /// One instruction on integer registers, of 2 or 4 bytes.
    pub(crate) fn plain(&mut self) {
        if self.rng.one_in(3) {
            self.short(&self.ops.short);
        } else {
            if self.rng.one_in(2) {
                self.sites.push(Site { gpa: self.code.here(), locked: self.locked });
            }
            let word = self.integer_word();
            self.code.word(word);
        }
    }

    pub(crate) fn short_memory(&mut self) {
        self.short(&self.ops.short_memory);
    }

    /// A place in the data; often near the end of a page, often not aligned.
    pub(crate) fn data_place(&mut self) -> u64 {
        let offset = match self.rng.below(6) {
            0 => (self.rng.below(DATA_BYTES / 0x1000 - 1) + 1) * 0x1000 - self.rng.below(16),
            1 => self.rng.below(DATA_BYTES - 64),
            2 => self.rng.below(256) & !7,
            _ => self.rng.below(DATA_BYTES - 64) & !7,
        };
        DATA + offset.min(DATA_BYTES - 64)
    }

    /// A random fragment of the theme.
    pub(crate) fn fragment(&mut self) {
        if !self.has_room() || !self.has_registers() {
            return self.plain();
        }
        if self.rng.one_in(4) {
            let mark = self.code.mark();
            self.marks.push(mark);
        }
        let kind = self.theme.pick(self.rng);
        let locked = self.locked;
        self.depth += 1;
        match kind {
            Kind::Loop if self.depth < 4 => self.counted_loop(),
            Kind::Skip => self.skip(),
            Kind::Call => self.call(),
            Kind::Wild => self.wild_jump(),
            Kind::Table => self.jump_table(),
            Kind::Plain | Kind::Loop => (0..=self.rng.below(8)).for_each(|_| self.plain()),
            other => self.special(other),
        }
        self.depth -= 1;
        self.locked = locked;
    }

    fn body(&mut self, most: u64) {
        for _ in 0..=self.rng.below(most) {
            self.fragment();
        }
    }

    /// A loop of a known number of rounds, in one of the forms that compilers write.
    fn counted_loop(&mut self) {
        let counter = self.temp();
        let rounds = match self.depth {
            0 | 1 => self.rng.pick(&[40, 100, 300, 700]),
            _ => 1 + self.rng.below(12),
        };
        let limit = if self.rng.one_in(2) { Some(self.temp()) } else { None };
        match limit {
            Some(limit) => {
                self.code.word(addi(counter, 0, 0));
                self.load_constant(limit, rounds);
            }
            None => self.load_constant(counter, rounds),
        }
        let top = self.code.mark();
        self.body(4);
        let (step, f3, other) = match limit {
            Some(limit) => (1, self.rng.pick(&[4, 6, 1]), limit),
            None => (-1, self.rng.pick(&[1, 1, 1]), 0),
        };
        if self.rng.one_in(3) {
            let imm = step as u16;
            self.code.half((imm >> 5 & 1) << 12 | (counter as u16) << 7 | (imm & 31) << 2 | 1); // c.addi
        } else {
            self.code.word(addi(counter, counter, step));
        }
        if self.code.since(top) < 4000 {
            self.code.branch(f3, counter, other, top);
        } else {
            let out = self.code.label();
            self.code.branch(f3 ^ 1, counter, other, out);
            self.code.jal(0, top);
            self.code.bind(out);
        }
    }

    /// A branch over some fragments, sometimes with an alternative.
    fn skip(&mut self) {
        let (over, end) = (self.code.label(), self.code.label());
        let (a, b) = (self.source(), self.source());
        let f3 = self.rng.pick(&[0, 1, 4, 5, 6, 7]);
        self.code.branch(f3, a, b, over);
        self.body(2);
        if self.rng.one_in(3) {
            self.code.jal(0, end);
            self.code.bind(over);
            self.body(2);
            self.code.bind(end);
        } else {
            self.code.bind(over);
        }
    }

    /// Calls a function further on, directly, by register or through a table of distances.
    fn call(&mut self) {
        if self.callable >= self.functions.len() {
            return self.plain();
        }
        let left = (self.functions.len() - self.callable) as u64;
        let (to, link) = self.functions[self.callable + self.rng.below(left) as usize];
        if self.locked >> link & 1 != 0 {
            return self.plain();
        }
        self.locked |= 1 << link;
        match self.rng.below(4) {
            0 => {
                let t = self.temp();
                // By the place, so that what chance makes of the rest stays as it was.
                if self.code.here() & 4 == 0 {
                    self.code.address(t, to);
                    self.code.word(jalr(link, t, 0));
                } else {
                    // What AUIPC makes can be seen by the function.
                    self.code.with_address(t, jalr(link, t, 0), to);
                }
            }
            1 => self.code.with_address(link, jalr(link, link, 0), to),
            _ => self.code.jal(link, to),
        }
        self.locked &= !(1 << link);
    }

    /// A jump to any marked place, into the middle of other code, at a chance that is taken rarely.
    fn wild_jump(&mut self) {
        let Some(&to) = self.marks.get(self.rng.below(self.marks.len() as u64 + 1) as usize) else {
            return self.plain();
        };
        let t = self.temp();
        let over = self.code.label();
        let s = self.source();
        self.code.word(andi(t, s, self.rng.clone().pick(&[7, 15, 31])));
        self.code.branch(1, t, 0, over);
        self.code.address(t, to);
        let off = if self.rng.one_in(4) { self.rng.pick(&[2, 4, 6, 8, 1]) } else { 0 };
        self.code.word(jalr(0, t, off));
        self.code.bind(over);
    }

    /// A jump by a number to one of several places, as compilers do for `switch`.
    fn jump_table(&mut self) {
        let (index, t, s) = (self.temp(), self.temp(), self.source());
        let (table, end) = (self.code.label(), self.code.label());
        let count = self.rng.pick(&[2u64, 4, 8]);
        self.code.word(andi(index, s, count as i32 - 1));
        let straight = self.rng.one_in(2);
        self.code.word(slli(index, index, if straight { 2 } else { 3 }));
        self.code.address(t, table);
        self.code.words(&[r(0x33, 0, 0, t, t, index), jalr(0, t, 0)]);
        self.code.bind(table);
        if straight {
            let targets: Vec<Label> = (0..count).map(|_| self.code.label()).collect();
            targets.iter().for_each(|&to| self.code.jal(0, to));
            for to in targets {
                self.code.bind(to);
                self.plain();
                if self.rng.one_in(3) {
                    self.code.jal(0, end);
                }
            }
        } else {
            for _ in 0..count {
                let word = self.integer_word();
                self.code.words(&[word, if self.rng.one_in(2) { jal(0, 4) } else { NOP }]);
            }
        }
        self.code.bind(end);
    }

    /// A function: pushes its link if it calls, returns through it.
    fn function(&mut self, label: Label, link: u32) {
        if self.rng.one_in(3) {
            self.pad_to_page_end();
        }
        self.code.bind(label);
        self.locked = 1 << link;
        let pushes = self.rng.one_in(2);
        if pushes {
            self.code.words(&[addi(SP, SP, -16), sd(link, SP, 8)]);
            self.locked = 0;
        }
        self.body(self.theme.fragments);
        self.locked = 1 << link;
        if pushes {
            self.code.words(&[ld(link, SP, 8), addi(SP, SP, 16)]);
        }
        match self.rng.below(8) {
            0 => {
                // Back, but behind the instruction that follows the call.
                self.code.words(&[jalr(0, link, 4)]);
            }
            1..=3 => self.code.half((0x8000 | link << 7 | 2) as u16), // c.jr
            _ => self.code.word(jalr(0, link, 0)),
        }
    }

    /// A function that calls itself some times.
    fn recursion(&mut self, label: Label) {
        self.code.bind(label);
        let out = self.code.label();
        self.locked = 1 << 1 | 1 << 10;
        self.code.words(&[andi(10, 10, 31)]);
        self.code.branch(0, 10, 0, out);
        self.code.words(&[addi(SP, SP, -16), sd(1, SP, 8), addi(10, 10, -1)]);
        self.plain();
        self.code.jal(1, label);
        self.plain();
        self.code.words(&[ld(1, SP, 8), addi(SP, SP, 16)]);
        self.code.bind(out);
        self.code.word(jalr(0, 1, 0));
    }

    /// Fills up so that the next instructions lie across the end of a page.
    fn pad_to_page_end(&mut self) {
        if !self.has_room() {
            return;
        }
        let target = 0x1000 - 2 * self.rng.below(24);
        while self.code.here() & 0xfff != target & 0xfff {
            self.code.half(0);
        }
    }

    /// A main function, which never ends: its fragments in a circle.
    fn endless(&mut self, label: Label) {
        self.code.bind(label);
        self.locked = 0;
        let top = self.code.mark();
        self.code.place(SP, DATA + 0x4000 + (self.rng.below(0x4000) & !15));
        for x in [8, 9] {
            let at = self.data_place();
            self.code.place(x, at);
        }
        if self.rng.one_in(3) && self.theme.has(Kind::Device) {
            self.uart_interrupts();
        }
        self.body(self.theme.fragments);
        self.body(self.theme.fragments);
        self.code.jal(0, top);
    }

    /// The code of a program; the addresses of its main functions.
    pub(crate) fn program(&mut self, mains: u64, functions: u64) -> Vec<u64> {
        for k in 0..functions {
            let label = self.code.label();
            let link = if k + 1 == functions { 1 } else { self.rng.pick(&[1, 1, 1, 5, 30, 15]) };
            self.functions.push((label, link));
        }
        let mut starts = vec![];
        for _ in 0..mains {
            if self.rng.one_in(4) {
                self.pad_to_page_end();
            }
            starts.push(self.code.here());
            let label = self.code.label();
            self.endless(label);
        }
        for k in 0..functions as usize {
            self.callable = k + 1;
            let (label, link) = self.functions[k];
            if k + 1 == functions as usize {
                self.recursion(label);
            } else {
                self.function(label, link);
            }
        }
        starts
    }
}

//! Fragments: a few instructions each, about one thing that an engine may get wrong.

use crate::asm::*;
use crate::fuzz::generate::{Gen, Site};
use crate::fuzz::layout::{self, CHAOS, CLINT, DATA, DATA_BYTES, PLIC, UART, USER};
use crate::fuzz::theme::Kind;

/// CSRs that may be read, some of which do not exist or belong to higher modes.
const READABLE: &[u32] = &[
    0xc00, 0xc01, 0xc02, 0xb00, 0xb02, 0x001, 0x002, 0x003, 0x100, 0x104, 0x105, 0x106, 0x140,
    0x141, 0x142, 0x143, 0x144, 0x14d, 0x180, 0x300, 0x301, 0x304, 0x344, 0x341, 0x342, 0x343,
    0xf14, 0x30a, 0x302, 0x303, 0x7c0, 0xc03,
];
/// CSRs that may be written without an end to the program, and the bits of them.
const WRITABLE: &[(u32, u64)] = &[
    (0x001, 0x1f),
    (0x003, 0xff),
    (0x140, u64::MAX),
    (0x141, u64::MAX),
    (0x142, u64::MAX),
    (0x106, 7),
    (0x306, 7),
    (0x100, 0xc_0122),
    (0x300, 0xe_01aa),
    (0x104, 0x222),
    (0x304, 0x222),
    (0x144, 2),
    (0x344, 0x222),
    (0x302, 0xb15c),
    (0x303, 0x222),
    (0x341, u64::MAX),
    (0xb00, u64::MAX),
    (0xb02, u64::MAX),
    (0x14d, 0xffff),
    (0x30a, 0x6000_0000_0000_00f1),
    (0x10a, 0xf1),
];

const RWX_ALL: u64 = 0x1f;

impl Gen<'_> {
    pub(crate) fn special(&mut self, kind: Kind) {
        match kind {
            Kind::Arithmetic => self.arithmetic(),
            Kind::Memory => self.memory(),
            Kind::Walk => self.walk(),
            Kind::Frame => self.frame(),
            Kind::Device => self.device(),
            Kind::Operands => self.operands(),
            Kind::Patch => self.patch(),
            Kind::WrittenCode => self.written_code(),
            Kind::Float => self.float(),
            Kind::FloatStatus => self.float_status(),
            Kind::Atomic => self.atomic(),
            Kind::Retry => self.retry(),
            Kind::Counter => self.counter(),
            Kind::Csr => self.csr(),
            Kind::System => self.system(),
            Kind::Return => self.trap_return(),
            Kind::Words => self.any_words(),
            Kind::PageEntry => self.page_entry(),
            Kind::Space => self.space(),
            Kind::Chaos => self.chaos(),
            Kind::Sum => self.sum(),
            Kind::Protection => self.protection(),
            Kind::Signal => self.signal(),
            Kind::Plain | Kind::Loop | Kind::Skip | Kind::Call | Kind::Wild | Kind::Table => {
                self.plain()
            }
        }
    }

    /// Corners of arithmetic through random instructions.
    fn arithmetic(&mut self) {
        let (a, b) = (self.temp(), self.temp());
        for x in [a, b] {
            let v = self.rng.integer();
            self.load_constant(x, v);
        }
        for _ in 0..=self.rng.below(3) {
            let form = if self.rng.one_in(2) {
                self.pick_form(&self.ops.muldiv)
            } else {
                self.pick_form(&self.ops.integer)
            };
            let (rd, rs1, rs2) =
                (self.dest(), self.rng.pick(&[a, a, b]), self.rng.pick(&[b, b, a]));
            let word = form.with(self.rng, rd, rs1, rs2);
            self.code.word(word);
        }
    }

    /// An access through `base` at about the distance `offset`.
    fn access(&mut self, base: u32, offset: i32) {
        let imm = (offset & 0xfff) as u32;
        let rd = self.dest();
        let other = self.source();
        match self.rng.below(12) {
            0..=4 => {
                let form = self.pick_form(&self.ops.loads);
                let word = form.with(self.rng, rd, base, 0) & 0xf_ffff | imm << 20;
                self.code.word(word);
            }
            5..=8 => {
                let form = self.pick_form(&self.ops.stores);
                let word = form.with(self.rng, imm & 31, base, other);
                self.code.word(word & 0x01ff_ffff | (imm >> 5) << 25);
            }
            9 => {
                let form = self.pick_form(&self.ops.float_loads);
                let word = form.with(self.rng, other, base, 0) & 0xf_ffff | imm << 20;
                self.code.word(word);
            }
            10 => {
                let form = self.pick_form(&self.ops.float_stores);
                let word = form.with(self.rng, imm & 31, base, other);
                self.code.word(word & 0x01ff_ffff | (imm >> 5) << 25);
            }
            _ => {
                let form = self.pick_form(&self.ops.fences);
                let word = form.with(self.rng, 0, base, 0);
                self.code.word(word);
            }
        }
    }

    /// Loads and stores near a place, aligned or not, over the ends of pages.
    fn memory(&mut self) {
        if self.rng.one_in(6) {
            return self.short_memory();
        }
        let base = self.temp();
        let at = self.data_place();
        self.code.place(base, at);
        for _ in 0..=self.rng.below(4) {
            let offset = match self.rng.below(4) {
                0 => 0,
                1 => self.rng.below(64) as i32,
                2 => self.rng.below(4096) as i32 - 2048,
                _ => self.rng.below(16) as i32 * 8,
            };
            self.access(base, offset);
        }
    }

    /// A pointer that runs over the data, page after page.
    fn walk(&mut self) {
        let (base, counter) = (self.temp(), self.temp());
        let step = self.rng.pick(&[1, 4, 8, 24, 64, 256, 1000, 2047]);
        let rounds = (DATA_BYTES / 2 / step as u64).min(self.rng.pick(&[8, 30, 60])) as i32;
        let at = DATA + self.rng.below(DATA_BYTES / 2);
        self.code.place(base, at);
        self.code.word(addi(counter, 0, rounds));
        let top = self.code.mark();
        for _ in 0..=self.rng.below(2) {
            self.access(base, 0);
            if self.rng.one_in(2) {
                self.plain();
            }
        }
        self.code.words(&[addi(base, base, step), addi(counter, counter, -1)]);
        self.code.branch(1, counter, 0, top);
    }

    /// Several accesses in a row through the stack pointer, as at the start and end of functions.
    fn frame(&mut self) {
        let at = self.rng.below(6);
        for k in 0..2 + self.rng.below(6) {
            let offset = 8 * (k + at) as i32;
            let (x, f) = (self.source(), self.rng.bits(5));
            let rd = self.dest();
            let word = match self.rng.below(6) {
                0..=2 => sd(x, 2, offset),
                3 => ld(rd, 2, offset),
                4 => fsd(f, 2, offset),
                _ => fld(f, 2, offset),
            };
            self.code.word(word);
        }
    }

    /// A register of a device, at its size or another.
    fn device(&mut self) {
        let t = self.temp();
        let hart = self.rng.below(self.harts);
        let at = match self.rng.below(10) {
            0..=3 => UART + self.rng.below(8),
            4 => CLINT + self.rng.pick(&[0xbff8, 0xbffc, 0x4000, 0x4004]),
            5 => CLINT + 4 * hart,
            6 => PLIC + self.rng.pick(&[40, 44, 0x1000, 0x2000, 0x2080, 0x2100]),
            7 => PLIC + 0x20_0000 + 0x1000 * self.rng.below(2 * self.harts) + 4 * self.rng.below(2),
            8 => UART + 0x1000 + 4 * self.rng.below(64),
            _ => self.rng.pick(&[0x10_1000, 0x10_1004, 0x10_1008, 0x1000, UART + 0x100]),
        };
        self.code.words(&[lui(t, (at >> 12) as u32), addi(t, t, (at & 0x7ff) as i32)]);
        if at & 0x800 != 0 {
            self.code.word(i(0x13, 0, t, t, 0x7ff));
            self.code.word(addi(t, t, 1));
        }
        let own = if (UART..UART + 8).contains(&at) { 0 } else { 2 };
        let width = if self.rng.one_in(4) { self.rng.bits(2) } else { own };
        if self.rng.one_in(2) || (CLINT + 0x4000..CLINT + 0xb000).contains(&at) {
            let rd = self.dest();
            return self.code.word(i(0x03, width, rd, t, 0));
        }
        if self.rng.one_in(2) {
            let x = self.source();
            return self.code.word(s(0x23, width, t, x, 0));
        }
        let (x, v) = (self.temp(), self.rng.below(16) as i32);
        self.code.words(&[addi(x, 0, v), s(0x23, width, t, x, 0)]);
    }

    /// The UART's interrupts on, for all harts and both modes.
    pub(crate) fn uart_interrupts(&mut self) {
        let (t, v) = (self.temp(), self.temp());
        let ier = self.rng.pick(&[1, 1, 3]);
        self.code.words(&[lui(t, (UART >> 12) as u32), addi(v, 0, ier), s(0x23, 0, t, v, 1)]);
        self.code.words(&[lui(t, (PLIC >> 12) as u32), addi(v, 0, 1), s(0x23, 2, t, v, 40)]);
        self.code.words(&[lui(t, (PLIC >> 12) as u32 + 2), addi(v, 0, 0x400)]);
        for context in 0..2 * self.harts as i32 {
            self.code.word(s(0x23, 2, t, v, 0x80 * context));
        }
        self.code.word(lui(t, (PLIC >> 12) as u32 + 0x200));
        for _ in 0..2 * self.harts {
            self.code.words(&[s(0x23, 2, t, 0, 0), lui(v, 1), r(0x33, 0, 0, t, t, v)]);
        }
        self.locked &= !(1 << t | 1 << v);
    }

    /// A word to overwrite `site` with.
    fn new_word(&mut self, site: Site) -> u32 {
        let locked = std::mem::replace(&mut self.locked, site.locked);
        let word = self.integer_word();
        self.locked = locked;
        word
    }

    /// Overwrites an instruction: the next, one soon, or one elsewhere; with and without `fence.i`.
    fn patch(&mut self) {
        let (at, value) = (self.temp(), self.temp());
        let known = self.rng.below(self.sites.len() as u64 + 1) as usize;
        let far = self.sites.get(known).copied().filter(|_| self.rng.one_in(2));
        let ahead = Site { gpa: 0, locked: self.locked };
        let words = [self.new_word(far.unwrap_or(ahead)), self.new_word(far.unwrap_or(ahead))];
        let target = self.code.label();
        match far {
            Some(site) => self.code.place(at, site.gpa),
            None => self.code.address(at, target),
        }
        let straddles = self.rng.one_in(8);
        match self.rng.below(6) {
            // Turns between two words, so that each round of a loop runs another.
            0..=2 => {
                let mask = self.temp();
                self.load_constant(mask, u64::from(words[0] ^ words[1]));
                let xor = r(0x33, 4, 0, value, value, mask);
                self.code.words(&[i(0x03, 2, value, at, 0), xor]);
                self.straddle(straddles);
                self.code.word(s(0x23, 2, at, value, 0));
            }
            3 => {
                self.load_constant(value, u64::from(words[1]));
                self.code.words(&[
                    s(0x23, 1, at, value, 0),
                    srli(value, value, 16),
                    s(0x23, 1, at, value, 2),
                ]);
            }
            4 => {
                self.load_constant(value, u64::from(words[1]));
                let rd = self.dest();
                self.code.word(r(0x2f, 2, self.rng.pick(&[4, 4, 8]), rd, at, value)); // amoswap.w, amoxor.w
            }
            _ => {
                self.load_constant(value, u64::from(words[1]) | u64::from(NOP) << 32);
                let f = self.rng.bits(5);
                let store = self.rng.pick(&[s(0x23, 2, at, value, 0), s(0x27, 2, at, f, 0)]);
                let moved = r(0x53, 0, 0x79, f, value, 0); // fmv.d.x
                self.code.word(moved);
                self.straddle(straddles);
                self.code.word(store);
            }
        }
        match self.rng.below(3) {
            0 => self.code.word(FENCE_I),
            1 => self.plain(),
            _ => {}
        }
        self.code.bind(target);
        self.sites.push(Site { gpa: self.code.here(), locked: self.locked });
        self.code.word(words[0]);
    }

    /// Writes a small function among the data, often over the end of a page, and calls it.
    fn written_code(&mut self) {
        let (at, value, link) = (self.temp(), self.temp(), self.temp());
        let page = DATA + (self.rng.below(DATA_BYTES / 0x1000 - 1) + 1) * 0x1000;
        let place = page - self.rng.pick(&[2u64, 4, 6, 10, 200, 1024]);
        let word = self.new_word(Site { gpa: 0, locked: self.locked });
        self.code.place(at, place);
        self.load_constant(value, u64::from(word) | u64::from(jalr(0, link, 0)) << 32);
        self.code.word(sd(value, at, 0));
        if self.rng.one_in(2) {
            self.code.word(FENCE_I);
        }
        self.code.word(jalr(link, at, 0));
        if self.rng.one_in(3) {
            // Data beside the code that was just run.
            self.code.words(&[sd(at, at, 16), jalr(link, at, 0)]);
        }
    }

    /// Lets the next instruction lie across the end of the page, if that is wanted.
    fn straddle(&mut self, wanted: bool) {
        let gap = (0xffe - self.code.here() as i64).rem_euclid(0x1000) as u64;
        if !wanted || gap < 4 || self.code.here() + gap > layout::CODE + layout::CODE_BYTES - 0x3000
        {
            return;
        }
        let to = self.code.label();
        self.code.jal(0, to);
        (4..gap).step_by(2).for_each(|_| self.code.half(0));
        self.code.bind(to);
    }

    /// Computes with one pair or triple of operands from the data after the other.
    fn operands(&mut self) {
        let (base, counter) = (self.temp(), self.temp());
        let is_float = self.theme.has(Kind::Float)
            && (!self.theme.has(Kind::Arithmetic) || self.rng.one_in(2));
        let place = DATA + 8 * self.rng.below(DATA_BYTES / 16);
        let rounds = self.rng.pick(&[20, 100, 500]);
        self.code.place(base, place);
        self.code.word(addi(counter, 0, rounds));
        let top = self.code.mark();
        if is_float {
            let f: [u32; 4] = std::array::from_fn(|_| self.rng.bits(5));
            let width = self.rng.pick(&[2, 3]);
            for (k, &f) in (0..3).zip(&f) {
                self.code.word(i(0x07, width, f, base, 8 * k));
            }
            for _ in 0..=self.rng.below(3) {
                let word = self.float_word();
                if self.locked >> (word >> 7 & 31) & 1 == 0 && word >> 7 & 31 != 2 {
                    let fields = f[1] << 15 | f[2] << 20;
                    let is_binary =
                        isa::decode(word & !0x01ff_8000 | fields).op == isa::decode(word).op;
                    self.code.word(if is_binary { word & !0x01ff_8000 | fields } else { word });
                }
            }
            let flags = self.dest();
            self.code.word(csr(5, flags, 1, 0));
        } else {
            let (a, b) = (self.temp(), self.temp());
            self.code.words(&[ld(a, base, 0), ld(b, base, 8)]);
            for _ in 0..=self.rng.below(3) {
                let form = if self.rng.one_in(2) {
                    self.pick_form(&self.ops.muldiv)
                } else {
                    self.pick_form(&self.ops.integer)
                };
                let rd = self.dest();
                let word = form.with(self.rng, rd, a, b);
                self.code.word(word);
            }
        }
        self.code.words(&[addi(base, base, 8), addi(counter, counter, -1)]);
        self.code.branch(1, counter, 0, top);
    }

    /// A floating-point instruction in a rounding mode that mostly exists.
    fn float_word(&mut self) -> u32 {
        let form = self.pick_form(&self.ops.float);
        let word = form.word(self.rng);
        if !form.has_rounding() {
            return word;
        }
        let mode = self.rng.pick(&[0, 1, 2, 3, 4, 7, 7, 7, 7, 7, 7, self.rng.clone().bits(3)]);
        word & !0x7000 | mode << 12
    }

    /// Floating point with fresh operands and whatever is there.
    fn float(&mut self) {
        let base = self.temp();
        let values: Vec<u64> = (0..4).map(|_| self.rng.float()).collect();
        let at = values.iter().map(|&v| self.constant(v)).min().expect("there are four");
        self.code.place(base, at);
        for k in 0..self.rng.below(4) as i32 {
            let f3 = self.rng.pick(&[3, 3, 3, 2]);
            let f = self.rng.bits(5);
            self.code.word(i(0x07, f3, f, base, 8 * k));
        }
        for _ in 0..2 + self.rng.below(6) {
            let word = self.float_word();
            if self.locked >> (word >> 7 & 31) & 1 != 0 || word >> 7 & 31 == 2 {
                continue; // it may be an integer register
            }
            self.code.word(word);
        }
        let rd = self.dest();
        match self.rng.below(4) {
            0 => self.code.word(csrr(rd, 1)),
            1 => self.code.word(csr(5, rd, 1, 0)),
            _ => {}
        }
    }

    /// Flags, rounding mode, and whether there is floating point at all.
    fn float_status(&mut self) {
        let rd = self.dest();
        let v = self.rng.bits(5);
        let word = match self.rng.below(10) {
            0..=2 => csr(5, rd, 2, self.rng.below(5) as u32),
            3 => csr(5, rd, 2, self.rng.bits(3)),
            4 => csr(self.rng.pick(&[5, 6, 7]), rd, 1, v),
            5 => csr(2, rd, 3, 0),
            6 => csr(1, rd, 3, self.rng.bits(5)),
            7 | 8 => {
                let (t, status) = (self.temp(), self.rng.pick(&[0x100, 0x300]));
                self.code.word(lui(t, self.rng.pick(&[2, 4, 6])));
                csr(self.rng.pick(&[2, 2, 3]), rd, status, t)
            }
            _ => csrr(rd, self.rng.pick(&[0x100, 0x300, 3])),
        };
        self.code.word(word);
    }

    /// Atomic operations, mostly on the few words that all harts use.
    fn atomic(&mut self) {
        let base = self.temp();
        let at = if self.rng.one_in(4) { self.data_place() } else { DATA + 8 * self.rng.below(4) };
        self.code.place(base, at);
        for _ in 0..=self.rng.below(3) {
            let form = self.pick_form(&self.ops.atomics);
            let (rd, rs2) = (self.dest(), self.source());
            let word = form.with(self.rng, rd, base, rs2);
            self.code.word(word);
        }
    }

    /// LR and SC in a loop that ends when it succeeds or gives up.
    fn retry(&mut self) {
        let (base, counter, got) = (self.temp(), self.temp(), self.temp());
        let width = self.rng.pick(&[2, 3]);
        self.code.place(base, DATA + 8 * self.rng.below(4));
        self.code.word(addi(counter, 0, 8));
        let (top, out) = (self.code.mark(), self.code.label());
        self.code.word(r(0x2f, width, 2 << 2, got, base, 0));
        match self.rng.below(5) {
            0 => self.plain(),
            1 => self.code.word(sd(counter, base, 0)),
            2 => self.code.word(0x0100_000f), // pause
            3 => self.code.branch(0, got, 0, out),
            _ => self.code.word(addi(got, got, 1)),
        }
        self.code.words(&[r(0x2f, width, 3 << 2, got, base, got), addi(counter, counter, -1)]);
        self.code.branch(0, counter, 0, out);
        self.code.branch(1, got, 0, top);
        self.code.bind(out);
    }

    fn counter(&mut self) {
        let (rd, number) = (self.dest(), self.rng.pick(&[0xc00, 0xc01, 0xc02]));
        self.code.word(csrr(rd, number));
    }

    fn csr(&mut self) {
        let rd = self.dest();
        if self.rng.one_in(3) {
            let number = self.rng.pick(READABLE);
            return self.code.word(csrr(rd, number));
        }
        let (number, mask) = self.rng.pick(WRITABLE);
        let t = self.temp();
        let v = self.rng.integer() & mask;
        let f3 = if mask == u64::MAX {
            self.rng.pick(&[1, 2, 3])
        } else {
            self.rng.pick(&[2, 3, 3, 6, 7])
        };
        if f3 >= 5 {
            return self.code.word(csr(f3, rd, number, v as u32 & 31));
        }
        self.load_constant(t, v);
        self.code.word(csr(f3, rd, number, t));
        if self.rng.one_in(2) && matches!(number, 0x100 | 0x300) {
            self.code.word(csr(6, 0, number, 10)); // interrupts on again
        }
    }

    /// Calls of the environment, waiting, fences, hints.
    fn system(&mut self) {
        let word = match self.rng.below(8) {
            0 => ECALL,
            1 => return self.code.half(0x9002), // c.ebreak
            2 => EBREAK,
            3 => WFI,
            4 => 0x0100_000f, // pause
            5 => FENCE_I,
            6 => {
                let form = self.pick_form(&self.ops.fences);
                let (a, b) = (self.source(), self.source());
                form.with(self.rng, 0, a, b)
            }
            _ => {
                let form = self.pick_form(&self.ops.system);
                let (a, b) = (self.rng.pick(&[0, 0, 11]), self.rng.pick(&[0, 0, 12]));
                let word = form.with(self.rng, 0, a, b);
                if word == MRET || word == SRET { SFENCE } else { word }
            }
        };
        self.code.word(word);
    }

    /// A return to just behind, in the same mode or another.
    fn trap_return(&mut self) {
        let (t, machine) = (self.temp(), self.rng.one_in(2));
        let behind = self.code.label();
        self.code.address(t, behind);
        let (epc, status) = if machine { (0x341, 0x300) } else { (0x141, 0x100) };
        self.code.word(csrw(epc, t));
        let previous = if machine {
            self.rng.pick(&[0u64, 0x800, 0x1800, 0x1800])
        } else {
            self.rng.pick(&[0, 0x100])
        };
        let mask = if machine { 0x1800 } else { 0x100 };
        self.load_constant(t, mask);
        self.code.word(csr(3, 0, status, t));
        self.load_constant(t, previous | if machine { 0x80 } else { 0x20 });
        self.code.words(&[csr(2, 0, status, t), if machine { MRET } else { SRET }]);
        self.code.bind(behind);
    }

    /// Words at random that neither jump nor return; most are no instructions.
    fn any_words(&mut self) {
        for _ in 0..=self.rng.below(3) {
            let word = self.rng.bits(32);
            let insn = isa::decode(word);
            let locked = insn.op != isa::Op::Illegal && self.locked >> insn.rd & 1 != 0;
            let system = word & 0x7f == 0x73;
            if crate::fuzz::ops::is_jump(insn.op) || system || locked || insn.rd == 2 {
                continue;
            }
            if word & 3 == 3 { self.code.word(word) } else { self.code.half(word as u16) }
        }
    }

    /// Changes a page-table entry, with and without a fence, and uses what it maps.
    fn page_entry(&mut self) {
        let (at, value, mask) = (self.temp(), self.temp(), self.temp());
        let page = match self.rng.below(8) {
            0 => (self.code.here() >> 12) & 0x1ff,
            1 => (layout::CODE >> 12 & 0x1ff) + self.rng.below(4),
            _ => (DATA >> 12 & 0x1ff) + self.rng.below(DATA_BYTES >> 12),
        };
        let table = self.rng.below(layout::LEAF_TABLES);
        let mut place = layout::leaves() + table * 0x1000 + 8 * page;
        let mut v = self.rng.pick(&[
            1,
            2,
            4,
            6,
            8,
            0x10,
            0x40,
            0x80,
            0xc0,
            0xc4,
            0x20,
            0x400,
            0xc00,
            0x1000,
            1 << 61,
            1 << 62,
        ]);
        if self.rng.one_in(10) {
            // From a table of pages to a superpage and back.
            place = self.rng.pick(&layout::SUPERPAGES);
            let user = if place == layout::SUPERPAGES[2] { 0x10 } else { 0 };
            let number = (place - layout::SUPERPAGES[0]) >> 12;
            let table = layout::leaves() + 0x1000 * self.rng.pick(&[number.min(1), 0, 2]);
            v = layout::pte(layout::BASE, 0xcf | user) ^ layout::pte(table, 1);
        }
        self.code.place(at, place);
        self.load_constant(mask, v);
        let rd = self.dest();
        match self.rng.below(4) {
            0 => self.code.word(r(0x2f, 3, self.rng.pick(&[0x10, 0x10, 0x20, 0x30]), rd, at, mask)),
            1 => self.code.words(&[
                i(0x03, 0, value, at, 0),
                r(0x33, 4, 0, value, value, mask),
                s(0x23, 0, at, value, 0),
            ]),
            _ => {
                self.code.words(&[ld(value, at, 0), r(0x33, 4, 0, value, value, mask)]);
                let straddles = self.rng.one_in(8);
                self.straddle(straddles);
                self.code.word(sd(value, at, 0));
            }
        }
        self.maybe_fence();
        if table == 3 {
            self.chaos();
        } else {
            self.code.place(at, layout::BASE + (page << 12) + self.rng.below(0xff0));
            self.access(at, 0);
        }
    }

    fn maybe_fence(&mut self) {
        let (a, b) = (self.source(), self.source());
        match self.rng.below(6) {
            0 => self.code.word(SFENCE),
            1 => self.code.word(SFENCE | a << 15 | b << 20),
            2 => self.code.words(&[0x1800_0073, 0x1600_0073 | a << 15, 0x1810_0073]),
            _ => {}
        }
    }

    /// Goes on in another address space.
    fn space(&mut self) {
        let t = self.temp();
        let mut satp = self.rng.pick(&layout::satps());
        if satp != 0 && self.rng.one_in(3) {
            satp ^= self.rng.below(64) << 44; // more spaces than engines know at a time
        }
        self.load_constant(t, satp);
        let rd = self.dest();
        self.code.word(csr(1, rd, 0x180, t));
        self.maybe_fence();
        if self.rng.one_in(2) {
            self.memory();
        }
    }

    /// An access through the window of random translations, rarely a jump there.
    fn chaos(&mut self) {
        let t = self.temp();
        let at = CHAOS + self.rng.below(0x20_0000);
        let at = if self.rng.one_in(4) { at | 0xffa } else { at & !7 };
        self.code.words(&[lui(t, (at >> 12) as u32), addi(t, t, (at & 0x7ff) as i32)]);
        for _ in 0..=self.rng.below(2) {
            let offset = self.rng.pick(&[0, 0, 8, 0x7f8, -8, 0x7ff]);
            self.access(t, offset);
        }
        if self.rng.one_in(4) {
            let form = self.pick_form(&self.ops.atomics);
            let (rd, rs2) = (self.dest(), self.source());
            let word = form.with(self.rng, rd, t, rs2);
            self.code.word(word);
        }
        if self.rng.one_in(16) {
            let link = self.temp();
            self.code.word(jalr(link, t, 0));
        }
    }

    /// Turns SUM, MXR or MPRV over, and back after an access.
    fn sum(&mut self) {
        let (t, at) = (self.temp(), self.temp());
        let status = self.rng.pick(&[0x100, 0x100, 0x300]);
        let bits = self.rng.pick(&[0x40, 0x80, 0xc0, if status == 0x300 { 0x20 } else { 0x40 }]);
        self.code.word(lui(t, bits));
        let f3 = self.rng.pick(&[2, 3]);
        self.code.word(csr(f3, 0, status, t));
        let place = self.data_place();
        self.code.place(at, place);
        if self.rng.one_in(2) {
            // From S-mode's window to U-mode's.
            let distance = self.temp();
            self.code.words(&[lui(distance, (USER >> 12) as u32), r(0x33, 0, 0, at, at, distance)]);
        }
        self.access(at, 0);
        if self.rng.one_in(2) {
            self.chaos();
        }
        if self.rng.one_in(2) {
            self.code.word(csr(5 - f3, 0, status, t));
            self.access(at, 0);
        }
    }

    /// Physical memory protection of a page of data, from M-mode.
    fn protection(&mut self) {
        let t = self.temp();
        let page = DATA + (self.rng.below(DATA_BYTES) & !0xfff);
        self.load_constant(t, page >> 2 | 0x1ff);
        self.code.word(csrw(0x3b0, t));
        let own = 0x18 | self.rng.below(8);
        self.load_constant(t, own | RWX_ALL << 8);
        self.code.word(csrw(0x3a0, t));
        self.code.place(t, page);
        self.access(t, 16);
    }

    /// Interrupts of all sorts: to other harts, to oneself, timers of both modes.
    fn signal(&mut self) {
        let (t, v) = (self.temp(), self.temp());
        let hart = self.rng.below(self.harts);
        match self.rng.below(6) {
            0 | 1 => {
                self.code.words(&[lui(t, (CLINT >> 12) as u32), addi(v, 0, 1)]);
                self.code.word(s(0x23, 2, t, v, 4 * hart as i32));
            }
            2 => self.code.word(csr(6, 0, self.rng.pick(&[0x144, 0x344]), 2)),
            3 => {
                let delay = self.rng.below(200) as i32;
                self.code.words(&[csrr(t, 0xc01), addi(t, t, delay), csrw(0x14d, t)]);
            }
            4 => {
                let delay = self.rng.below(100) as i32;
                self.code.words(&[
                    csrr(v, 0xc01),
                    addi(v, v, delay),
                    lui(t, (CLINT >> 12) as u32 + 4),
                ]);
                self.code.word(sd(v, t, 8 * hart as i32));
            }
            _ => {
                self.code.word(csr(
                    self.rng.pick(&[6, 7]),
                    0,
                    self.rng.pick(&[0x100, 0x300]),
                    self.rng.pick(&[2, 8]),
                ));
                self.plain();
                self.code.word(csr(6, 0, self.rng.pick(&[0x100, 0x300]), 10));
            }
        }
    }
}

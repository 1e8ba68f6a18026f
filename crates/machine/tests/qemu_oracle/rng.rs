//! The generator's source of chance: splitmix64, so that a seed says everything.

/// A stream of numbers.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub(crate) fn bits(&mut self, n: u32) -> u32 {
        (self.next() >> 32) as u32 & ((1u64 << n) - 1) as u32
    }

    /// An integer with the corners that arithmetic goes wrong at.
    pub(crate) fn integer(&mut self) -> u64 {
        let v = self.corner();
        // No pointers to the devices: see the table of exceptions.
        if matches!(v >> 12, 0xff..=0x101 | 0x1fff..=0x2005) { v << 40 } else { v }
    }

    fn corner(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[0, 1, u64::MAX, i64::MIN as u64, i64::MAX as u64, 2]),
            1 => {
                self.pick(&[0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0xffff_ffff_8000_0000, 1 << 32])
            }
            2 => 1 << self.below(64),
            3 => (self.next() as i64 >> self.below(64)) as u64,
            4 => self.next() >> self.below(64),
            5 => self.bits(32) as i32 as u64,
            _ => self.next(),
        }
    }

    /// Bits of a double with the corners of floating point.
    pub(crate) fn double(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        sign | match self.below(10) {
            0 => self.pick(&[
                0,
                1,
                0x000f_ffff_ffff_ffff,
                0x0010_0000_0000_0000,
                0x7fef_ffff_ffff_ffff,
            ]),
            1 => self.pick(&[
                0x7ff0_0000_0000_0000,
                0x7ff8_0000_0000_0000,
                0x7ff0_0000_0000_0001,
                0x7fff_ffff_ffff_ffff,
            ]),
            2 => 0x3ff0_0000_0000_0000 + (self.below(5) << 52) + self.below(3) - 1,
            // Near the limits of integers and of singles.
            3 => {
                (self.pick(&[31u64, 32, 52, 53, 63, 64, 127, 128]) + 1022 + self.below(2)) << 52
                    | self.pick(&[0, 1, 0xf_ffff_ffff_ffff, 0x8_0000_0000_0000])
            }
            4 => (self.below(60) + 860) << 52 | self.below(1 << 52),
            5 => (self.below(20) + 1013) << 52 | self.below(1 << 20) << 32,
            6 => self.below(1 << 52),
            7 => (self.below(8) + 1020) << 52 | self.below(1 << 52),
            _ => self.next() >> 1,
        }
    }

    /// Bits of a single.
    pub(crate) fn single(&mut self) -> u32 {
        let sign = (self.next() as u32) & 1 << 31;
        sign | match self.below(8) {
            0 => self.pick(&[0, 1, 0x007f_ffff, 0x0080_0000, 0x7f7f_ffff, 0x3f80_0000]),
            1 => self.pick(&[0x7f80_0000, 0x7fc0_0000, 0x7f80_0001, 0x7fff_ffff]),
            2 => 0x3f80_0000 + (self.bits(2) << 23) + self.bits(1),
            3 => {
                (self.pick(&[31u32, 32, 23, 24, 63, 64]) + 126 + self.bits(1)) << 23
                    | self.pick(&[0, 1, 0x7f_ffff])
            }
            4 => self.bits(23),
            5 => (self.bits(3) + 124) << 23 | self.bits(23),
            _ => self.bits(31),
        }
    }

    /// Contents of a floating-point register: a double, a boxed single, a badly boxed one.
    pub(crate) fn float(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1..=3 => 0xffff_ffff_0000_0000 | u64::from(self.single()),
            4 if self.one_in(3) => 0xffff_fffe_0000_0000 | u64::from(self.single()),
            _ => self.double(),
        }
    }
}

//! Cases, and the image of RAM that holds a run of them.

use crate::asm;
use crate::payload::*;
use crate::rng::Rng;

/// Privilege modes by number.
pub(crate) const U: u64 = 0;
pub(crate) const S: u64 = 1;
pub(crate) const M: u64 = 3;

/// Bits of mstatus.
pub(crate) const FS_DIRTY: u64 = 3 << 13;
pub(crate) const FS_INITIAL: u64 = 1 << 13;

/// Bits of menvcfg, and those that senvcfg has too: FIOM, the lower bit of CBIE, CBCFE, CBZE.
pub(crate) const ADUE: u64 = 1 << 61;
pub(crate) const PBMTE: u64 = 1 << 62;
pub(crate) const STCE: u64 = 1 << 63;
pub(crate) const ENVCFG: u64 = 0xd1;

/// Registers that generated code leaves alone: stack pointer and x8, x9 point to data, x5 to constants.
pub(crate) const SP: u32 = 2;
pub(crate) const POOL: u32 = 5;
pub(crate) const D0: u32 = 8;
pub(crate) const D1: u32 = 9;

/// Contents of RAM under construction.
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
}

impl Image {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; (CASES - BASE) as usize] }
    }

    /// Zeroed memory; its address.
    pub(crate) fn alloc(&mut self, len: u64, align: u64) -> u64 {
        let at = (self.bytes.len() as u64).next_multiple_of(align);
        assert!(BASE + at + len < LOG, "too many cases for the image");
        self.bytes.resize((at + len) as usize, 0);
        BASE + at
    }

    pub(crate) fn put(&mut self, gpa: u64, data: &[u8]) {
        let at = (gpa - BASE) as usize;
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    pub(crate) fn put64(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }
}

/// A case: how the hart starts, what it runs, what it touches.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) kind: &'static str,
    pub(crate) mode: u64,
    pub(crate) mstatus: u64,
    pub(crate) mie: u64,
    /// In the order of [`START_CSRS`].
    csrs: [u64; START_CSRS.len()],
    pub(crate) x: [u64; 32],
    pub(crate) f: [u64; 32],
    pub(crate) code: Vec<u8>,
    pub(crate) code_gpa: u64,
    /// Added to addresses of code in RAM when the case runs under translation.
    pub(crate) code_va_offset: u64,
    /// Start and end of what it owns in RAM.
    pub(crate) owns: (u64, u64),
    pub(crate) traps_max: u64,
    pub(crate) pool: Vec<u64>,
    pool_gpa: u64,
}

impl Case {
    /// A case without code in `mode`; 2 pages of random data, `slots` slots of code.
    pub(crate) fn new(
        kind: &'static str,
        mode: u64,
        slots: u64,
        rng: &mut Rng,
        image: &mut Image,
    ) -> Self {
        let data = image.alloc(0x2000, 0x1000);
        for at in (0..0x2000).step_by(8) {
            let v = if rng.one_in(2) { rng.integer() } else { rng.float() };
            image.put64(data + at, v);
        }
        let pool_gpa = image.alloc(2048, 16);
        let code_gpa = image.alloc(slots * SLOT, 16);
        let mut case = Self {
            kind,
            mode,
            mstatus: FS_DIRTY,
            mie: 0,
            csrs: [0; START_CSRS.len()],
            x: std::array::from_fn(|_| rng.integer()),
            f: std::array::from_fn(|_| rng.float()),
            code: vec![],
            code_gpa,
            code_va_offset: 0,
            owns: (data, code_gpa + slots * SLOT),
            traps_max: slots + 8,
            pool: vec![],
            pool_gpa,
        };
        case.set_csr("menvcfg", ENVCFG | rng.below(4) << 61 | STCE);
        case.set_csr("senvcfg", ENVCFG);
        case.set_csr("stimecmp", u64::MAX);
        case.set_csr("stvec", S_HANDLER);
        case.set_csr("mcounteren", 7);
        case.set_csr("scounteren", 7);
        case.set_csr("fcsr", rng.below(5) << 5);
        case.x[SP as usize] = data + 0x800;
        case.x[D0 as usize] = data + 0x808 + (rng.below(0x200) & !7);
        case.x[D1 as usize] = data + 0x1000 - rng.below(64);
        case.x[POOL as usize] = pool_gpa + 1024;
        case
    }

    pub(crate) fn set_csr(&mut self, name: &str, value: u64) {
        let i = START_CSRS.iter().position(|c| c.0 == name).unwrap();
        self.csrs[i] = value & crate::exceptions::write_mask(START_CSRS[i].1);
    }

    /// Whether `stimecmp` is switched on.
    pub(crate) fn stce(&self) -> bool {
        self.csrs[0] & STCE != 0
    }

    pub(crate) fn data_gpa(&self) -> u64 {
        self.owns.0
    }

    /// Appends a slot of words; shorter ones are filled up.
    pub(crate) fn slot(&mut self, words: &[u32]) {
        assert!(words.len() <= 4);
        let mut full = [asm::NOP; 4];
        full[..words.len()].copy_from_slice(words);
        full.iter().for_each(|w| self.code.extend(w.to_le_bytes()));
    }

    /// Appends a slot of bytes, filled up with `c.nop`.
    pub(crate) fn slot_bytes(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= 16 && bytes.len().is_multiple_of(2));
        self.code.extend(bytes);
        while !self.code.len().is_multiple_of(16) {
            self.code.extend(1u16.to_le_bytes());
        }
    }

    /// Offset from the pool's register of a constant.
    pub(crate) fn constant(&mut self, value: u64) -> i32 {
        let at = self.pool.len();
        self.pool.push(value);
        assert!(at < 256);
        at as i32 * 8 - 1024
    }

    /// Address of the next slot, as the code sees it.
    pub(crate) fn here(&self) -> u64 {
        self.code_gpa.wrapping_add(self.code_va_offset).wrapping_add(self.code.len() as u64)
    }

    /// Ends the code and writes everything but the descriptor.
    fn finish(&mut self, image: &mut Image) {
        self.slot(&[asm::ECALL]);
        image.put(self.code_gpa, &self.code);
        for (i, &v) in self.pool.iter().enumerate() {
            image.put64(self.pool_gpa + 8 * i as u64, v);
        }
    }

    fn descriptor(&self) -> [u64; D_LEN] {
        let mut d = [0; D_LEN];
        d[..START_CSRS.len()].copy_from_slice(&self.csrs);
        let base = self.code_gpa.wrapping_add(self.code_va_offset);
        d[START_CSRS.len() - 1] = base; // mepc
        d[D_MIE] = self.mie;
        d[D_MSTATUS] = self.mstatus & !(3 << 11 | 8) | self.mode << 11;
        d[D_CODE_BASE] = base;
        d[D_CODE_SIZE] = self.code.len() as u64;
        d[D_END] = base + self.code.len() as u64 - SLOT;
        d[D_S_PAGE] = self.csrs[6] & !0xfff; // stvec
        d[D_TRAPS_MAX] = self.traps_max;
        d[D_X..D_X + 32].copy_from_slice(&self.x);
        d[D_F..D_F + 32].copy_from_slice(&self.f);
        d
    }
}

/// Puts payload, globals and descriptors around the cases.
pub(crate) fn assemble(image: &mut Image, cases: &mut [Case]) {
    let (payload, trap) = build();
    assert!(payload.len() as u64 <= GLOBALS - PAYLOAD);
    image.put(BASE, &asm::jal(0, (PAYLOAD - BASE) as i32).to_le_bytes());
    image.put(PAYLOAD, &payload);
    for at in (0..0x1000).step_by(4) {
        image.put(S_HANDLER + at, &asm::ECALL.to_le_bytes());
    }
    for case in cases.iter_mut() {
        case.finish(image);
    }
    let first = image.alloc((cases.len() * D_LEN * 8) as u64, 16);
    for (i, case) in cases.iter().enumerate() {
        for (j, v) in case.descriptor().into_iter().enumerate() {
            image.put64(first + ((i * D_LEN + j) * 8) as u64, v);
        }
    }
    for (at, v) in globals(cases.len() as u64, first, PAYLOAD + trap) {
        image.put64(GLOBALS + at, v);
    }
}

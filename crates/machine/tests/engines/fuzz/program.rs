//! A program: what is in RAM, how harts start, and the machine that runs it.

use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::engine::EngineConfig;
use machine::hart::{Mode, cause};
use machine::io::Input;

use crate::fuzz::generate::Gen;
use crate::fuzz::layout::{
    self, BASE, CODE, CODE_BYTES, DATA, DATA_BYTES, Image, OTHER, POOL, UPPER, USER,
};
use crate::fuzz::ops;
use crate::fuzz::theme::Theme;
use crate::rng::Rng;

const FS_DIRTY: u64 = 3 << 13;
const MPIE: u64 = 1 << 7;
const STCE: u64 = 1 << 63;
/// `menvcfg`: A and D bits by hardware, memory types, cache-block operations; and what of it S-mode may pass on.
const ENVIRONMENT: u64 = 3 << 61 | 0xf0;
const ENVIRONMENT_S: u64 = 0xf0;
/// Exceptions that S-mode's handler may get.
const DELEGATED: u64 = 0xb15c;

/// Fetch page faults, which S-mode's handler cannot mend.
const FETCH_PAGE: u64 = 1 << 12;

/// Where a hart may start, in the order of [`layout::ENTRY_CSRS`].
type Entry = [u64; layout::ENTRY_CSRS.len()];

/// A program.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) seed: u64,
    pub(crate) theme: &'static Theme,
    pub(crate) harts: u8,
    image: Image,
    /// Bits of `menvcfg`.
    environment: u64,
    /// Ticks for each 2^16 steps.
    rate: u32,
}

/// Images without a kernel: harts start in M-mode, and the machine has no SBI.
pub(crate) fn images() -> BootImages {
    BootImages { bios: Some(vec![0x13u8, 0, 0, 0].into()), ..BootImages::default() }
}

impl Program {
    /// The program of a seed.
    pub(crate) fn new(theme: &'static Theme, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5eed_0000);
        let harts = rng.pick(theme.harts);
        let mut image = Image::new();
        image.put_tables(&mut rng);
        let (mains, functions) = (3 + rng.below(6), 3 + rng.below(8));
        let mut code = Gen::new(&mut rng, theme, u64::from(harts));
        let starts = code.program(mains, functions);
        let (sites, pool) = (std::mem::take(&mut code.sites), std::mem::take(&mut code.pool));
        let bytes = code.code.finish();
        assert!(bytes.len() as u64 <= CODE_BYTES, "seed {seed}: too much code");
        image.put(CODE, &bytes);
        image.put(CODE + OTHER, &bytes);
        for (k, v) in (0..).zip(pool) {
            image.put64(POOL + 8 * k, v);
        }
        // The other code differs in some instructions.
        let mut other = Gen::new(&mut rng, theme, u64::from(harts));
        for site in sites {
            if other.rng.one_in(3) {
                other.locked = site.locked;
                let word = other.integer_word();
                image.put(site.gpa + OTHER, &word.to_le_bytes());
            }
        }
        for at in (DATA..DATA + DATA_BYTES).step_by(8) {
            let v = if rng.one_in(2) { rng.integer() } else { rng.float() };
            image.put64(at, v);
        }
        let mut program = Self { seed, theme, harts, image, environment: 0, rate: 0 };
        program.put_harts(&mut rng, &starts);
        program
    }

    fn put_harts(&mut self, rng: &mut Rng, starts: &[u64]) {
        self.rate = rng.pick(&[1 << 12, 1 << 13, 1 << 14, 1 << 16]);
        self.environment =
            rng.pick(&[ENVIRONMENT, ENVIRONMENT, 0, rng.clone().next() & ENVIRONMENT]);
        let most = (u64::from(self.rate) * rng.pick(&[100, 1000, 4000])) >> 16;
        for hart in 0..u64::from(self.harts) {
            layout::put_save_area(&mut self.image, hart, rng.pick(&[0, 3, 7, 15]), most + 1);
            for k in 0..layout::ENTRY_COUNT {
                for (i, v) in (0..).zip(self.entry(rng, starts)) {
                    self.image.put64(layout::entry(hart, k) + 8 * i, v);
                }
            }
            for set in 0..layout::SET_COUNT {
                for x in 1..32 {
                    let v = register(rng, x);
                    self.image.put64(layout::registers(hart, set) + 8 * x, v);
                }
            }
        }
    }

    /// A start in one of the theme's modes, through a window that the address space has.
    fn entry(&self, rng: &mut Rng, starts: &[u64]) -> Entry {
        let mut at = rng.below(self.theme.modes.iter().map(|w| u64::from(*w)).sum());
        let mut mode = 0;
        for (k, &w) in self.theme.modes.iter().enumerate() {
            match at.checked_sub(u64::from(w)) {
                Some(rest) => at = rest,
                None => {
                    mode = k;
                    break;
                }
            }
        }
        let satps = layout::satps();
        let [a, b, four, bare] = satps;
        let (mpp, satp, window) = match mode {
            0 => (3, rng.pick(&satps), 0),
            1 => (1, bare, 0),
            2 => (0, bare, 0),
            3 => (1, rng.pick(&[a, a, b, b, four]), rng.pick(&[0, 0, UPPER])),
            _ => (0, rng.pick(&[a, a, b, four]), USER),
        };
        let window =
            if mode == 3 && satp == b && rng.one_in(3) { 0u64.wrapping_sub(USER) } else { window };
        let fs = rng.pick(&[FS_DIRTY, FS_DIRTY, FS_DIRTY, FS_DIRTY, FS_DIRTY, 1 << 13, 2 << 13, 0]);
        let status = fs | mpp << 11 | MPIE | rng.below(4) << 18 | rng.below(2) << 1;
        let pc = rng.pick(starts).wrapping_add(window);
        let fetch = if rng.one_in(8) { 0 } else { FETCH_PAGE };
        let delegated = rng.pick(&[0, DELEGATED, rng.clone().next() & DELEGATED]) & !fetch;
        let interrupts = rng.pick(&[0, 0x222]);
        [pc, status, satp, delegated, interrupts, 0xaaa, layout::S_HANDLER]
    }

    /// A machine at the start of the program.
    pub(crate) fn machine(&self, engine: EngineConfig) -> Machine {
        let config = MachineConfig {
            harts: self.harts,
            ram_size: layout::RAM,
            nets: vec![],
            disks: vec![],
            consoles: 0,
            rngs: 0,
            rtc_base_ns: 0,
            rng_seed: vec![],
        };
        let mut m = Machine::new(config, images()).expect("the configuration is possible");
        m.set_engine(engine);
        m.ram_mut().write(BASE, &self.image.0).expect("the image fits into RAM");
        for hart in m.harts_mut() {
            hart.csr.mtvec = BASE;
            hart.csr.mscratch = layout::save_area(u64::from(hart.id));
            hart.csr.menvcfg = STCE | self.environment;
            hart.csr.senvcfg = self.environment & ENVIRONMENT_S;
            hart.csr.mcounteren = 7;
            hart.csr.scounteren = 7;
            hart.pmp.write_addr(1, u64::MAX);
            hart.pmp.write_cfg(0, 0x1f << 8);
        }
        self.restart(&mut m, &mut Rng::new(self.seed));
        m.apply(&Input::Clock { mtime: 0, rate: self.rate }).expect("there is a clock");
        m
    }

    /// Sends every hart into the handler as if a timer had fired, from nowhere: it sets the next one, and goes on at
    /// an entry. What translations depend on is left to the guest, since engines need to see it change.
    pub(crate) fn restart(&self, m: &mut Machine, rng: &mut Rng) {
        for hart in m.harts_mut() {
            hart.pc = BASE;
            hart.waiting = false;
            hart.mode = Mode::Machine;
            hart.csr.mcause = cause::INTERRUPT | 7;
            hart.csr.mepc = 0;
            hart.csr.mstatus |= 3 << 11;
            hart.csr.mscratch = layout::save_area(u64::from(hart.id));
            hart.csr.fcsr = rng.below(5) << 5;
            hart.f = std::array::from_fn(|_| rng.float());
        }
    }
}

/// A register's value at a start.
fn register(rng: &mut Rng, x: u64) -> u64 {
    match x {
        2 => DATA + 0x4000 + (rng.below(0x4000) & !15),
        8 | 9 if rng.one_in(2) => DATA + rng.below(DATA_BYTES),
        _ => rng.integer(),
    }
}

/// The number of instructions that programs are made of.
pub(crate) fn op_count() -> usize {
    let all = ops::all();
    let lists = [&all.integer, &all.muldiv, &all.float, &all.loads, &all.stores, &all.float_loads];
    let more = [&all.float_stores, &all.atomics, &all.fences, &all.system];
    lists.iter().chain(&more).map(|l| l.len()).sum()
}

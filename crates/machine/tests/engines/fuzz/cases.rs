//! The cases of the comparison with QEMU as a program: every instruction with operands made for it, most of them once.

use machine::Machine;
use machine::config::MachineConfig;
use machine::engine::EngineConfig;
use machine::ram::RAM_BASE;

use crate::case::{self, Case, Image};
use crate::fuzz::check::Guest;
use crate::fuzz::program::images;
use crate::rng::Rng;
use crate::{paging, payload, privileged, user};

/// Name of the theme.
pub(crate) const NAME: &str = "cases";

/// A run of cases.
pub(crate) struct Cases {
    seed: u64,
    image: Vec<u8>,
}

/// A function of chance alone that puts a case into an image.
type Generator = fn(&mut Rng, &mut Image) -> Case;

const GENERATORS: [Generator; 13] = [
    user::integer,
    user::compressed,
    user::atomic,
    user::float,
    user::words,
    privileged::csr_values,
    privileged::csr_interrupts,
    privileged::traps,
    privileged::interrupts,
    privileged::wait_for_interrupt,
    paging::translated,
    paging::modified_privilege,
    paging::code,
];

impl Cases {
    /// Some cases of each kind.
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut image = Image::new();
        let one = |i: usize| GENERATORS[i % GENERATORS.len()];
        let mut all: Vec<Case> =
            (0..8 * GENERATORS.len()).map(|i| one(i)(&mut rng, &mut image)).collect();
        case::assemble(&mut image, &mut all);
        Self { seed, image: image.bytes }
    }
}

impl Guest for Cases {
    fn name(&self) -> &str {
        NAME
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn machine(&self, engine: EngineConfig) -> Machine {
        let config = MachineConfig {
            harts: 1,
            ram_size: payload::RAM,
            nets: vec![],
            disks: vec![],
            consoles: 0,
            rngs: 0,
            rtc_base_ns: 0,
            rng_seed: vec![],
        };
        let mut m = Machine::new(config, images()).expect("the configuration is possible");
        m.set_engine(engine);
        m.ram_mut().write(RAM_BASE, &self.image).expect("the image fits into RAM");
        m
    }
}

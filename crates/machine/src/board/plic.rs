//! Platform-level interrupt controller, laid out as SiFive's on QEMU's `virt` board.
//!
//! # Invariants
//! - INV-PLIC-1: a source is pending exactly when its line is high and no context has claimed it. All sources are
//!   level-triggered, so pending needs no state of its own.
//! - INV-PLIC-2: `eip` is a function of the other fields; it is recomputed after each change.
//!
//! # References
//! RISC-V Platform-Level Interrupt Controller Specification 1.0. Context `2h` is hart `h` in M-mode, `2h+1` in S-mode.

use super::BusFault;
use super::state::{LoadBoardError, PlicState};

/// Interrupt sources, source 0 (which does not exist) included.
pub(super) const SOURCES: u32 = 96;
/// Words of a bit map over the sources.
pub(super) const WORDS: usize = (SOURCES as usize).div_ceil(32);
/// Bytes of the register region, as on QEMU, which leaves room for 1024 contexts.
pub(super) const PLIC_SIZE: u64 = 0x60_0000;

const PENDING_BASE: u64 = 0x1000;
const ENABLE_BASE: u64 = 0x2000;
const ENABLE_STRIDE: u64 = 0x80;
const CONTEXT_BASE: u64 = 0x20_0000;
const CONTEXT_STRIDE: u64 = 0x1000;
const PRIORITY_MASK: u32 = 7;

#[derive(Debug)]
pub(super) struct Plic {
    state: PlicState,
    levels: [u32; WORDS],
    eip: Vec<bool>,
}

/// A register of the PLIC.
enum Register {
    Priority(usize),
    Pending(usize),
    Enable(usize, usize),
    Threshold(usize),
    Claim(usize),
    None,
}

impl Plic {
    pub(super) fn new(harts: u8) -> Self {
        let contexts = usize::from(harts) * 2;
        Self {
            state: PlicState {
                priority: vec![0; SOURCES as usize],
                enable: vec![[0; WORDS]; contexts],
                threshold: vec![0; contexts],
                claimed: [0; WORDS],
            },
            levels: [0; WORDS],
            eip: vec![false; contexts],
        }
    }

    pub(super) fn save(&self) -> PlicState {
        self.state.clone()
    }

    pub(super) fn load(harts: u8, state: &PlicState) -> Result<Self, LoadBoardError> {
        let mut new = Self::new(harts);
        let same_shape = state.priority.len() == new.state.priority.len()
            && state.enable.len() == new.state.enable.len()
            && state.threshold.len() == new.state.threshold.len();
        let in_range = |p: &u32| *p <= PRIORITY_MASK;
        let no_source_0 = |w: &[u32; WORDS]| w[0] & 1 == 0;
        if !same_shape
            || !state.priority.iter().all(in_range)
            || !state.threshold.iter().all(in_range)
            || !state.enable.iter().all(no_source_0)
            || !no_source_0(&state.claimed)
        {
            return Err(LoadBoardError::Device("plic"));
        }
        new.state = state.clone();
        new.update();
        Ok(new)
    }

    /// Takes the lines of all sources, bit `n % 32` of word `n / 32` for source `n`.
    pub(super) fn set_levels(&mut self, levels: [u32; WORDS]) {
        if self.levels != levels {
            self.levels = levels;
            self.update();
        }
    }

    /// Whether an interrupt is asserted for the context.
    pub(super) fn eip(&self, context: usize) -> bool {
        self.eip.get(context).copied().unwrap_or(false)
    }

    fn update(&mut self) {
        for context in 0..self.eip.len() {
            self.eip[context] = self.best(context, self.state.threshold[context]).is_some();
        }
    }

    /// Pending and enabled source of the highest priority above `floor`; the lowest number wins a tie.
    fn best(&self, context: usize, floor: u32) -> Option<u32> {
        let mut best: Option<(u32, u32)> = None;
        for word in 0..WORDS {
            let mut bits =
                self.levels[word] & !self.state.claimed[word] & self.state.enable[context][word];
            while bits != 0 {
                let source = word as u32 * 32 + bits.trailing_zeros();
                bits &= bits - 1;
                let priority = self.state.priority[source as usize];
                if priority > floor && best.is_none_or(|(p, _)| priority > p) {
                    best = Some((priority, source));
                }
            }
        }
        best.map(|(_, source)| source)
    }

    fn register(&self, offset: u64) -> Register {
        let contexts = self.eip.len() as u64;
        if offset < PENDING_BASE {
            let source = (offset / 4) as usize;
            return if source < SOURCES as usize {
                Register::Priority(source)
            } else {
                Register::None
            };
        }
        if offset < ENABLE_BASE {
            let word = ((offset - PENDING_BASE) / 4) as usize;
            return if word < WORDS { Register::Pending(word) } else { Register::None };
        }
        if offset < CONTEXT_BASE {
            let context = (offset - ENABLE_BASE) / ENABLE_STRIDE;
            let word = ((offset - ENABLE_BASE) % ENABLE_STRIDE / 4) as usize;
            return if context < contexts && word < WORDS {
                Register::Enable(context as usize, word)
            } else {
                Register::None
            };
        }
        let context = (offset - CONTEXT_BASE) / CONTEXT_STRIDE;
        match (offset - CONTEXT_BASE) % CONTEXT_STRIDE {
            _ if context >= contexts => Register::None,
            0 => Register::Threshold(context as usize),
            4 => Register::Claim(context as usize),
            _ => Register::None,
        }
    }

    pub(super) fn read(&mut self, offset: u64, size: u8) -> Result<u64, BusFault> {
        check_word(offset, size)?;
        Ok(u64::from(match self.register(offset) {
            Register::Priority(source) => self.state.priority[source],
            Register::Pending(word) => self.levels[word] & !self.state.claimed[word],
            Register::Enable(context, word) => self.state.enable[context][word],
            Register::Threshold(context) => self.state.threshold[context],
            Register::Claim(context) => self.claim(context),
            Register::None => 0,
        }))
    }

    fn claim(&mut self, context: usize) -> u32 {
        // A claim looks at every source of a priority above 0, whatever the threshold is.
        let Some(source) = self.best(context, 0) else { return 0 };
        self.state.claimed[source as usize / 32] |= 1 << (source % 32);
        self.update();
        source
    }

    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64) -> Result<(), BusFault> {
        check_word(offset, size)?;
        let value = value as u32;
        match self.register(offset) {
            Register::Priority(0) | Register::Pending(_) | Register::None => return Ok(()),
            Register::Priority(source) => self.state.priority[source] = value & PRIORITY_MASK,
            Register::Enable(context, word) => {
                self.state.enable[context][word] = if word == 0 { value & !1 } else { value };
            }
            Register::Threshold(context) => self.state.threshold[context] = value & PRIORITY_MASK,
            Register::Claim(context) => {
                let (word, bit) = ((value / 32) as usize, 1u32 << (value % 32));
                // A completion of a source that is not enabled for the context is ignored, as the specification says.
                if word < WORDS && self.state.enable[context][word] & bit != 0 {
                    self.state.claimed[word] &= !bit;
                }
            }
        }
        self.update();
        Ok(())
    }
}

/// Registers of 32 bits take aligned accesses of 32 bits only.
pub(super) fn check_word(offset: u64, size: u8) -> Result<(), BusFault> {
    if size == 4 && offset.is_multiple_of(4) { Ok(()) } else { Err(BusFault) }
}

//! What this host's processor can do.
//!
//! # Invariants
//! - INV-FEATURES-1: what differs between hosts is how fast an instruction is, never what it does or how it is announced to
//!   the guest.

/// Extensions of x86-64 that generated code uses where they are; the others that it uses it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Features {
    /// AES-NI.
    pub(crate) aes: bool,
    /// PCLMULQDQ.
    pub(crate) clmul: bool,
    /// Each block counts its steps twice: not of the processor, but wanted by a measurement.
    pub(crate) counts_twice: bool,
    /// Most instructions of a block: not of the processor either, but wanted by who looks for a wrong translation.
    pub(crate) block_max: usize,
}

/// Most instructions of a block unless somebody wants fewer.
pub(crate) const BLOCK_MAX: usize = 64;

impl Features {
    /// Asks the processor; `None` when it lacks what generated code needs: FMA, which brings SSE up to 4.2, and the
    /// instructions on bits.
    pub(crate) fn detect() -> Option<Self> {
        use std::arch::is_x86_feature_detected as has;
        let suffices = has!("fma")
            && has!("sse4.2")
            && has!("bmi1")
            && has!("bmi2")
            && has!("lzcnt")
            && has!("popcnt");
        let (aes, clmul) = (has!("aes"), has!("pclmulqdq"));
        suffices.then_some(Self { aes, clmul, counts_twice: false, block_max: BLOCK_MAX })
    }
}

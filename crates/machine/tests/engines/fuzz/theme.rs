//! What programs are about: how often each kind of fragment comes, in which modes, on how many harts.

use crate::rng::Rng;

/// A kind of fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Loop,
    Skip,
    Call,
    Wild,
    Table,
    Arithmetic,
    Operands,
    Memory,
    Walk,
    Frame,
    Device,
    Patch,
    WrittenCode,
    Float,
    FloatStatus,
    Atomic,
    Retry,
    Counter,
    Csr,
    System,
    Return,
    Words,
    PageEntry,
    Space,
    Chaos,
    Sum,
    Protection,
    Signal,
}

/// A theme.
#[derive(Debug, Clone)]
pub(crate) struct Theme {
    pub(crate) name: &'static str,
    /// Kinds and their weights.
    weights: &'static [(Kind, u32)],
    pub(crate) harts: &'static [u8],
    /// Weights of modes to start in: machine, supervisor and user without translation, supervisor and user with.
    pub(crate) modes: [u32; 5],
    /// Most fragments of a function.
    pub(crate) fragments: u64,
}

/// Control flow, which is part of every theme.
const FLOW: &[(Kind, u32)] = &[
    (Kind::Plain, 30),
    (Kind::Loop, 22),
    (Kind::Skip, 16),
    (Kind::Call, 12),
    (Kind::Wild, 2),
    (Kind::Table, 4),
    (Kind::Counter, 2),
];

impl Theme {
    /// Whether fragments of a kind occur.
    pub(crate) fn has(&self, kind: Kind) -> bool {
        self.weights.iter().any(|w| w.0 == kind)
    }

    /// A kind: every other time one of control flow.
    pub(crate) fn pick(&self, rng: &mut Rng) -> Kind {
        let from = if self.weights.is_empty() || rng.one_in(2) { FLOW } else { self.weights };
        let mut at = rng.below(from.iter().map(|w| u64::from(w.1)).sum());
        for &(kind, weight) in from {
            match at.checked_sub(u64::from(weight)) {
                Some(rest) => at = rest,
                None => return kind,
            }
        }
        Kind::Plain
    }
}

use Kind::*;

/// All themes.
pub(crate) const THEMES: &[Theme] = &[
    Theme {
        name: "integer",
        weights: &[(Plain, 4), (Arithmetic, 2), (Operands, 3)],
        harts: &[1],
        modes: [1, 0, 0, 0, 0],
        fragments: 8,
    },
    Theme {
        name: "memory",
        weights: &[(Memory, 8), (Walk, 4), (Frame, 4), (Device, 1), (Chaos, 1)],
        harts: &[1],
        modes: [2, 1, 1, 2, 2],
        fragments: 7,
    },
    Theme {
        name: "float",
        weights: &[(Float, 10), (Operands, 10), (FloatStatus, 4), (Frame, 1)],
        harts: &[1],
        modes: [2, 0, 1, 1, 1],
        fragments: 7,
    },
    Theme {
        name: "smc",
        weights: &[(Patch, 6), (WrittenCode, 3), (Memory, 1), (Plain, 2), (System, 1)],
        harts: &[1, 1, 2],
        modes: [2, 0, 1, 2, 2],
        fragments: 6,
    },
    Theme {
        name: "paging",
        weights: &[
            (PageEntry, 6),
            (Space, 3),
            (Chaos, 6),
            (Sum, 3),
            (Memory, 6),
            (Walk, 3),
            (Frame, 2),
            (Atomic, 1),
            (Patch, 1),
            (Protection, 1),
            (System, 1),
            (Float, 1),
        ],
        harts: &[1, 1, 2],
        modes: [1, 0, 0, 5, 3],
        fragments: 6,
    },
    Theme {
        name: "traps",
        weights: &[
            (System, 6),
            (Csr, 6),
            (Return, 4),
            (Words, 3),
            (Signal, 3),
            (Device, 3),
            (Memory, 2),
            (Chaos, 2),
            (FloatStatus, 1),
            (Protection, 1),
        ],
        harts: &[1, 1, 2],
        modes: [3, 1, 1, 2, 2],
        fragments: 6,
    },
    Theme {
        name: "harts",
        weights: &[
            (Atomic, 6),
            (Retry, 6),
            (Signal, 4),
            (Memory, 3),
            (Walk, 1),
            (Patch, 1),
            (System, 1),
            (PageEntry, 1),
            (Float, 1),
            (Device, 1),
        ],
        harts: &[2, 3, 4],
        modes: [2, 0, 1, 1, 1],
        fragments: 6,
    },
    Theme {
        name: "all",
        weights: &[
            (Arithmetic, 1),
            (Operands, 1),
            (Memory, 2),
            (Walk, 1),
            (Frame, 1),
            (Device, 1),
            (Patch, 1),
            (WrittenCode, 1),
            (Float, 2),
            (FloatStatus, 1),
            (Atomic, 1),
            (Retry, 1),
            (Csr, 1),
            (System, 1),
            (Return, 1),
            (Words, 1),
            (PageEntry, 1),
            (Space, 1),
            (Chaos, 1),
            (Sum, 1),
            (Protection, 1),
            (Signal, 1),
        ],
        harts: &[1, 2, 3],
        modes: [2, 1, 1, 3, 2],
        fragments: 7,
    },
];

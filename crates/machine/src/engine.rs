//! Which engine executes a machine's instructions: the one seam between the interpreter and the JIT.
//!
//! # Invariants
//! - INV-SEAM-1: no engine and no setting of one is visible to the guest, in a digest or in a saved machine: replicas
//!   may differ in all of this.

use std::fmt;
use std::str::FromStr;

/// An engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// Portable, the reference.
    Interpreter,
    /// Translates to the host's instructions; on x86-64 alone.
    Jit,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interpreter => "interpreter",
            Self::Jit => "jit",
        })
    }
}

/// There is no such engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no engine '{0}': interpreter or jit")]
pub struct UnknownEngine(String);

impl FromStr for EngineKind {
    type Err = UnknownEngine;

    fn from_str(s: &str) -> Result<Self, UnknownEngine> {
        match s {
            "interpreter" => Ok(Self::Interpreter),
            "jit" => Ok(Self::Jit),
            _ => Err(UnknownEngine(s.to_owned())),
        }
    }
}

/// An engine and its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// The engine. Where this host cannot have the JIT, the interpreter serves.
    pub kind: EngineKind,
    /// JIT: a block is translated when it has been interpreted this often; 0: at once, wherever a run begins as well.
    pub hot_after: u8,
    /// JIT: instructions of a block at most, 1 to 64. With 1, and `hot_after` 0, every step of every run is translated.
    pub block_max: u8,
    /// JIT: bytes of generated code at most; old code makes room for new.
    pub code_bytes: usize,
    /// JIT: counts the steps of each block a second time, to measure what counting costs.
    pub counts_twice: bool,
}

impl EngineConfig {
    /// The named engine with the usual settings.
    #[must_use]
    pub fn new(kind: EngineKind) -> Self {
        Self { kind, hot_after: 16, block_max: 64, code_bytes: 96 << 20, counts_twice: false }
    }
}

impl Default for EngineConfig {
    /// The fastest that this host can have.
    fn default() -> Self {
        Self::new(EngineKind::Jit)
    }
}

/// What an engine has in memory and has done; for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Bytes of generated code in use.
    pub code_bytes: u64,
    /// Bytes of tables, those of the interpreter included.
    pub table_bytes: u64,
    /// Blocks translated so far.
    pub blocks: u64,
    /// Times that old code made room for new.
    pub evictions: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in [EngineKind::Interpreter, EngineKind::Jit] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("tcg".parse::<EngineKind>().is_err());
    }
}

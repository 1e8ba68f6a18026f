//! A toy machine: a pure function of its inputs and their positions, which makes outputs.

use std::collections::{BTreeMap, BTreeSet};

use replica::LogPos;

use crate::rng::mix;

/// An output: where it was made, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Output {
    /// Position, unique.
    pub(crate) icount: u64,
    /// Stands for its contents.
    pub(crate) hash: u64,
    /// The client's write that it acknowledges.
    pub(crate) acks: Option<u64>,
}

/// An entry of the toy's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) icount: u64,
    /// A client's write, or a mark.
    pub(crate) write: Option<u64>,
}

pub(crate) fn encode(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::with_capacity(records.len() * 16);
    for record in records {
        out.extend_from_slice(&record.icount.to_le_bytes());
        out.extend_from_slice(&record.write.unwrap_or(0).to_le_bytes());
    }
    out
}

pub(crate) fn decode(bytes: &[u8]) -> Vec<Record> {
    let (words, _) = bytes.as_chunks::<8>();
    words
        .chunks_exact(2)
        .map(|pair| {
            let write = u64::from_le_bytes(pair[1]);
            Record { icount: u64::from_le_bytes(pair[0]), write: (write != 0).then_some(write) }
        })
        .collect()
}

/// The machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Toy {
    /// How much log it has made or replayed.
    pub(crate) pos: LogPos,
    /// Steps made.
    pub(crate) icount: u64,
    /// Hash of everything that happened.
    pub(crate) state: u64,
    /// All outputs ever made.
    pub(crate) outputs: BTreeMap<u64, Output>,
    /// All writes that it knows.
    pub(crate) writes: BTreeSet<u64>,
}

impl Toy {
    pub(crate) fn run_to(&mut self, icount: u64) {
        while self.icount < icount {
            self.icount += 1;
            if self.icount.is_multiple_of(32) {
                self.state = mix(self.state ^ self.icount);
                if self.state.is_multiple_of(3) {
                    self.output(None);
                }
            }
        }
    }

    fn output(&mut self, acks: Option<u64>) {
        let output = Output { icount: self.icount, hash: self.state, acks };
        self.outputs.insert(self.icount, output);
    }

    /// Applies an entry at its position, to which the machine must have run.
    pub(crate) fn apply(&mut self, record: Record) {
        if let Some(write) = record.write {
            self.writes.insert(write);
            self.icount += 1;
            self.state = mix(self.state ^ mix(write));
            self.output(Some(write));
        }
        self.pos = LogPos { lsn: self.pos.lsn + 1, icount: record.icount };
    }

    /// Replays a piece of log.
    pub(crate) fn replay(&mut self, bytes: &[u8]) {
        for record in decode(bytes) {
            self.run_to(record.icount);
            self.apply(record);
        }
    }
}

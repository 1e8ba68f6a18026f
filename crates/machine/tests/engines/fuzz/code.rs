//! Code under construction: words, halfwords, labels, addresses relative to the program counter.

use crate::asm::{addi, auipc, b, i, jal};

/// A place in the code that may not be known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label(usize);

#[derive(Debug, Clone, Copy)]
enum Use {
    /// A branch; too far, it becomes nothing.
    Branch {
        f3: u32,
        rs1: u32,
        rs2: u32,
    },
    Jal {
        rd: u32,
    },
    /// auipc and a word with its low half as immediate.
    Address {
        rd: u32,
        second: u32,
    },
}

/// Code from an address on.
#[derive(Debug)]
pub(crate) struct Code {
    pub(crate) base: u64,
    pub(crate) bytes: Vec<u8>,
    labels: Vec<Option<usize>>,
    uses: Vec<(usize, Use, Label)>,
}

/// The halves of a distance for auipc and an instruction with a 12-bit immediate.
fn halves(distance: i64) -> (u32, i32) {
    let high = (distance + 0x800) >> 12;
    (high as u32 & 0xf_ffff, (distance - (high << 12)) as i32)
}

impl Code {
    pub(crate) fn new(base: u64) -> Self {
        Self { base, bytes: vec![], labels: vec![], uses: vec![] }
    }

    /// Address of what comes next.
    pub(crate) fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    pub(crate) fn word(&mut self, word: u32) {
        self.bytes.extend(word.to_le_bytes());
    }

    pub(crate) fn words(&mut self, words: &[u32]) {
        words.iter().for_each(|w| self.word(*w));
    }

    pub(crate) fn half(&mut self, half: u16) {
        self.bytes.extend(half.to_le_bytes());
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0] = Some(self.bytes.len());
    }

    pub(crate) fn mark(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// Bytes from a known place to here.
    pub(crate) fn since(&self, label: Label) -> usize {
        self.bytes.len() - self.labels[label.0].expect("only asked of marks")
    }

    pub(crate) fn branch(&mut self, f3: u32, rs1: u32, rs2: u32, to: Label) {
        self.uses.push((self.bytes.len(), Use::Branch { f3, rs1, rs2 }, to));
        self.word(0);
    }

    pub(crate) fn jal(&mut self, rd: u32, to: Label) {
        self.uses.push((self.bytes.len(), Use::Jal { rd }, to));
        self.word(0);
    }

    /// auipc to `rd`, then `second` with the rest of the distance in its I immediate.
    pub(crate) fn with_address(&mut self, rd: u32, second: u32, to: Label) {
        self.uses.push((self.bytes.len(), Use::Address { rd, second }, to));
        self.words(&[0, 0]);
    }

    /// The address of a label.
    pub(crate) fn address(&mut self, rd: u32, to: Label) {
        self.with_address(rd, addi(rd, rd, 0), to);
    }

    /// A place in RAM, as seen through the same window as this code.
    pub(crate) fn place(&mut self, rd: u32, gpa: u64) {
        let (high, low) = halves(gpa.wrapping_sub(self.here()) as i64);
        self.words(&[auipc(rd, high), addi(rd, rd, low)]);
    }

    /// The double word at a place in RAM.
    pub(crate) fn load(&mut self, rd: u32, gpa: u64) {
        let (high, low) = halves(gpa.wrapping_sub(self.here()) as i64);
        self.words(&[auipc(rd, high), i(0x03, 3, rd, rd, low)]);
    }

    /// The bytes, with every label in place. Labels without a place are at the end.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let end = self.bytes.len();
        for (at, what, label) in std::mem::take(&mut self.uses) {
            let offset = self.labels[label.0].unwrap_or(end) as i32 - at as i32;
            match what {
                Use::Branch { f3, rs1, rs2 } if (-0x1000..0x1000).contains(&offset) => {
                    self.put(at, b(f3, rs1, rs2, offset));
                }
                Use::Branch { .. } => self.put(at, crate::asm::NOP),
                Use::Jal { rd } => self.put(at, jal(rd, offset)),
                Use::Address { rd, second } => {
                    let (high, low) = halves(i64::from(offset));
                    self.put(at, auipc(rd, high));
                    self.put(at + 4, second | (low as u32) << 20);
                }
            }
        }
        self.bytes
    }

    fn put(&mut self, at: usize, word: u32) {
        self.bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
}

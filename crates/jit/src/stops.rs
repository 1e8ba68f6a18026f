//! Offsets in a page at which code asks whether it is to stop.
//!
//! # Place
//! The machine's breakpoints, by page, in the form that decoders of either engine want.

/// Halfwords in a page.
const HALFWORDS: usize = 2048;

/// A set of offsets in a page, of which instructions have every other one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stops([u64; HALFWORDS / 64]);

impl Default for Stops {
    fn default() -> Self {
        Self([0; HALFWORDS / 64])
    }
}

impl Stops {
    fn place(offset: u16) -> (usize, u64) {
        let halfword = usize::from(offset >> 1) % HALFWORDS;
        (halfword / 64, 1 << (halfword % 64))
    }

    /// Adds the offset of an instruction, below 4096.
    pub fn insert(&mut self, offset: u16) {
        let (word, bit) = Self::place(offset);
        self.0[word] |= bit;
    }

    /// Whether an offset below 4096 is one of these.
    #[must_use]
    pub fn contains(&self, offset: u16) -> bool {
        let (word, bit) = Self::place(offset);
        self.0[word] & bit != 0
    }

    /// Whether all of `other` are among these.
    #[must_use]
    pub fn includes(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(own, other)| other & !own == 0)
    }

    /// Adds all of `other`.
    pub fn add(&mut self, other: &Self) {
        for (own, other) in self.0.iter_mut().zip(&other.0) {
            *own |= other;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_put_into_it() {
        let mut a = Stops::default();
        for offset in [0, 2, 126, 128, 4094] {
            a.insert(offset);
        }
        let all: Vec<u16> = (0..4096).step_by(2).filter(|&offset| a.contains(offset)).collect();
        assert_eq!(all, [0, 2, 126, 128, 4094]);
        let mut b = Stops::default();
        b.insert(64);
        assert!(!a.includes(&b) && !b.includes(&a) && a.includes(&Stops::default()));
        b.add(&a);
        assert!(b.includes(&a) && b.contains(64));
    }
}

//! Sets of indices, a bit each: chunks or extents of a disk.

/// A set of indices below a bound, with its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
    ones: u64,
}

impl Bitmap {
    /// No index below `len`.
    #[must_use]
    pub fn empty(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], len, ones: 0 }
    }

    /// Every index below `len`.
    #[must_use]
    pub fn full(len: u64) -> Self {
        let mut map = Self::empty(len);
        map.words.fill(u64::MAX);
        if let Some(last) = map.words.last_mut()
            && !len.is_multiple_of(64)
        {
            *last = (1 << (len % 64)) - 1;
        }
        map.ones = len;
        map
    }

    /// From the bytes of [`Self::to_bytes`]; nothing when they are not those of a set below `len`.
    #[must_use]
    pub fn from_bytes(len: u64, bytes: &[u8]) -> Option<Self> {
        let mut map = Self::empty(len);
        if bytes.len() != map.words.len() * 8 {
            return None;
        }
        for (word, bytes) in map.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
            map.ones += u64::from(word.count_ones());
        }
        let over = len % 64;
        let last = map.words.last().copied().unwrap_or(0);
        (over == 0 || last >> over == 0).then_some(map)
    }

    /// Its words, in little-endian bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The bound.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// How many are in it.
    #[must_use]
    pub fn ones(&self) -> u64 {
        self.ones
    }

    /// Whether none is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ones == 0
    }

    fn word(index: u64) -> (usize, u64) {
        (usize::try_from(index / 64).unwrap_or(usize::MAX), 1 << (index % 64))
    }

    /// Whether `index`, which is below the bound, is in it.
    #[must_use]
    pub fn get(&self, index: u64) -> bool {
        let (word, bit) = Self::word(index);
        self.words[word] & bit != 0
    }

    /// Takes in `index`, which is below the bound.
    pub fn set(&mut self, index: u64) {
        let (word, bit) = Self::word(index);
        self.ones += u64::from(self.words[word] & bit == 0);
        self.words[word] |= bit;
    }

    /// Takes in the indices from `start` on that are before `end` and below the bound.
    pub fn set_range(&mut self, start: u64, end: u64) {
        for index in start..end.min(self.len) {
            self.set(index);
        }
    }

    /// Takes out `index`, which is below the bound.
    pub fn clear(&mut self, index: u64) {
        let (word, bit) = Self::word(index);
        self.ones -= u64::from(self.words[word] & bit != 0);
        self.words[word] &= !bit;
    }

    /// Takes out the indices from `start` on that are before `end`.
    pub fn clear_range(&mut self, start: u64, end: u64) {
        for index in start..end {
            self.clear(index);
        }
    }

    /// Takes in all that `other`, which has the same bound, has.
    pub fn unite(&mut self, other: &Self) {
        self.ones = 0;
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word |= theirs;
            self.ones += u64::from(word.count_ones());
        }
    }

    /// The first member at `from` or behind.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<u64> {
        let (first, bit) = Self::word(from);
        let head = self.words.get(first)? & !(bit - 1);
        if head != 0 {
            return Some(from / 64 * 64 + u64::from(head.trailing_zeros()));
        }
        let rest = self.words.get(first + 1..)?;
        let (skipped, word) = rest.iter().enumerate().find(|(_, w)| **w != 0)?;
        Some((from / 64 + 1 + skipped as u64) * 64 + u64::from(word.trailing_zeros()))
    }

    /// Its members, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        std::iter::successors(self.next(0), |i| self.next(i + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_across_words() {
        let mut map = Bitmap::empty(200);
        for i in [0, 63, 64, 199] {
            map.set(i);
            map.set(i);
        }
        assert_eq!(map.ones, 4);
        assert_eq!(map.iter().collect::<Vec<_>>(), [0, 63, 64, 199]);
        map.clear_range(10, 70);
        assert_eq!((map.ones, map.next(1), map.next(200)), (2, Some(199), None));
        let full = Bitmap::full(70);
        assert_eq!((full.ones, full.next(69), full.next(70)), (70, Some(69), None));
    }

    #[test]
    fn bytes_give_the_set_back_and_others_are_refused() {
        let mut map = Bitmap::empty(70);
        map.set_range(60, 1000);
        let bytes = map.to_bytes();
        assert_eq!(Bitmap::from_bytes(70, &bytes), Some(map.clone()));
        assert_eq!(Bitmap::from_bytes(70, &bytes[1..]), None);
        assert_eq!(Bitmap::from_bytes(65, &bytes), None);
        let mut other = Bitmap::empty(70);
        other.set(3);
        other.set(69);
        map.unite(&other);
        assert_eq!((map.ones(), map.next(0)), (11, Some(3)));
    }
}

//! Payloads made shorter, where that is possible.
//!
//! # Invariants
//! - INV-COMPRESS-1: what is unpacked is no longer than a frame may be, and than its length allows at all: a peer cannot
//!   make this side take more memory than it sends bytes for, but for a factor of 255.
//!
//! # References
//! LZ4's block format.

use super::frame::FRAME_BYTES_MAX;

/// Shorter payloads are sent as they are: an acknowledgement gains nothing.
const BYTES_MIN: usize = 200;
/// Most payloads that are not tried after one that did not get shorter.
const SKIPPED_MAX: u32 = 32;
/// LZ4 makes at most so many bytes of one.
const RATIO_MAX: usize = 255;

/// A payload as it is sent.
#[derive(Debug, Clone, Default)]
pub(super) struct Packed {
    pub(super) bytes: Vec<u8>,
    /// How long it was before, if it was compressed.
    pub(super) length: Option<u32>,
}

/// Compresses payloads, if asked to.
#[derive(Debug, Default)]
pub(super) struct Packer {
    is_on: bool,
    /// Payloads that are not tried, and how many it will be the next time.
    skip: u32,
    skip_next: u32,
}

impl Packer {
    pub(super) fn new(is_on: bool) -> Self {
        Self { is_on, ..Self::default() }
    }

    pub(super) fn pack(&mut self, payload: &[u8], into: &mut Packed) {
        into.bytes.clear();
        into.length = None;
        if self.is_on && payload.len() >= BYTES_MIN && !self.skips() {
            let most = lz4_flex::block::get_maximum_output_size(payload.len());
            into.bytes.resize(most, 0);
            let length = lz4_flex::block::compress_into(payload, &mut into.bytes).unwrap_or(most);
            // Less than a sixteenth is not worth the other side's time.
            if length < payload.len() - payload.len() / 16 {
                into.bytes.truncate(length);
                into.length = u32::try_from(payload.len()).ok();
                self.skip_next = 0;
                return;
            }
            into.bytes.clear();
            self.skip_next = (self.skip_next * 2 + 1).min(SKIPPED_MAX);
            self.skip = self.skip_next;
        }
        into.bytes.extend_from_slice(payload);
    }

    /// After data that do not get shorter the next ones will not either, most likely.
    fn skips(&mut self) -> bool {
        let skips = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        skips
    }
}

/// The payload of a compressed frame, unless it is none.
pub(super) fn unpack(body: &[u8]) -> Option<Vec<u8>> {
    let (length, block) = body.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    if length > FRAME_BYTES_MAX.min(block.len().saturating_mul(RATIO_MAX)) {
        return None;
    }
    let mut payload = vec![0; length];
    let found = lz4_flex::block::decompress_into(block, &mut payload).ok()?;
    (found == length).then_some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(packed: &Packed) -> Vec<u8> {
        [&packed.length.unwrap().to_le_bytes()[..], &packed.bytes].concat()
    }

    #[test]
    fn what_can_be_shorter_is_and_comes_back() {
        let (mut packer, mut packed) = (Packer::new(true), Packed::default());
        let text = b"a line of a log; ".repeat(1000);
        packer.pack(&text, &mut packed);
        assert!(packed.bytes.len() < text.len() / 10);
        assert_eq!(unpack(&body(&packed)), Some(text.clone()));
        for short in [&text[..BYTES_MIN - 1], &[]] {
            packer.pack(short, &mut packed);
            assert_eq!((packed.length, &packed.bytes[..]), (None, short));
        }
        let mut off = Packer::new(false);
        off.pack(&text, &mut packed);
        assert_eq!((packed.length, &packed.bytes), (None, &text));
    }

    #[test]
    fn noise_is_sent_as_it_is_and_not_tried_each_time() {
        let (mut packer, mut packed) = (Packer::new(true), Packed::default());
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(4000)
        .collect();
        for _ in 0..100 {
            packer.pack(&noise, &mut packed);
            assert_eq!((packed.length, &packed.bytes), (None, &noise));
        }
        assert_eq!(packer.skip_next, SKIPPED_MAX);
        // Once there is something to gain again, that is found within a bound.
        let text = [7; 4000];
        let tries = (0..).find(|_| {
            packer.pack(&text, &mut packed);
            packed.length.is_some()
        });
        assert!(tries.is_some_and(|tries| tries <= SKIPPED_MAX));
    }

    #[test]
    fn damage_and_bombs_are_refused() {
        let (mut packer, mut packed) = (Packer::new(true), Packed::default());
        packer.pack(&[0; 100_000], &mut packed);
        let whole = body(&packed);
        for wrong in [99_999u32, 100_001, 64 << 20, u32::MAX] {
            let body = [&wrong.to_le_bytes()[..], &packed.bytes].concat();
            assert_eq!(unpack(&body), None, "{wrong}");
        }
        for end in 0..whole.len() {
            assert_eq!(unpack(&whole[..end]), None);
        }
        for at in 4..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x55;
            // Whatever it is, it has the length that was allowed.
            assert!(unpack(&flipped).is_none_or(|payload| payload.len() == 100_000));
        }
    }
}

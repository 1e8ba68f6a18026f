//! Packets of GDB's remote protocol in a stream of bytes.
//!
//! # Invariants
//! - INV-GDB-2: whatever bytes come, at most [`PACKET_MAX`] of them are kept.
//!
//! # References
//! GDB manual, appendix "Remote Protocol", section "Overview".

/// Longest body of a packet, either way.
pub(crate) const PACKET_MAX: usize = 64 << 10;
/// What GDB sends for Ctrl-C, outside of packets.
const INTERRUPT: u8 = 3;

/// What a client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Received {
    /// The body of a packet, as it stood in the stream.
    Packet(Vec<u8>),
    /// A packet whose checksum is wrong, or which is too long.
    Damaged,
    /// Ctrl-C.
    Interrupt,
    /// What no GDB sends between packets.
    Foreign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Outside,
    Body,
    FirstDigit,
    SecondDigit(u8),
}

/// Takes packets out of a stream. Acknowledgements are dropped: the connection is reliable.
#[derive(Debug)]
pub(crate) struct Unframer {
    state: State,
    body: Vec<u8>,
    /// The body is longer than what was kept of it.
    is_cut: bool,
}

impl Unframer {
    /// At the start of a stream.
    pub(crate) fn new() -> Self {
        Self { state: State::Outside, body: Vec::new(), is_cut: false }
    }

    /// Takes the next byte; says what it completes.
    pub(crate) fn take(&mut self, byte: u8) -> Option<Received> {
        let (state, received) = match (self.state, byte) {
            (State::Outside, INTERRUPT) => (State::Outside, Some(Received::Interrupt)),
            (State::Outside, b'$') => {
                self.body.clear();
                self.is_cut = false;
                (State::Body, None)
            }
            (State::Outside, b'+' | b'-') => (State::Outside, None),
            (State::Outside, _) => (State::Outside, Some(Received::Foreign)),
            (State::Body, b'#') => (State::FirstDigit, None),
            (State::Body, _) => {
                self.is_cut |= self.body.len() >= PACKET_MAX;
                if !self.is_cut {
                    self.body.push(byte);
                }
                (State::Body, None)
            }
            (State::FirstDigit, _) => (State::SecondDigit(byte), None),
            (State::SecondDigit(first), _) => (State::Outside, Some(self.finish([first, byte]))),
        };
        self.state = state;
        received
    }

    fn finish(&mut self, digits: [u8; 2]) -> Received {
        let said = str::from_utf8(&digits).ok().and_then(|d| u8::from_str_radix(d, 16).ok());
        if said == Some(checksum(&self.body)) && !self.is_cut {
            Received::Packet(std::mem::take(&mut self.body))
        } else {
            Received::Damaged
        }
    }
}

fn checksum(body: &[u8]) -> u8 {
    body.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

/// A packet with this body, which must have no byte that needs an escape.
pub(crate) fn frame(body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(body.len() + 4);
    packet.push(b'$');
    packet.extend_from_slice(body);
    packet.extend_from_slice(format!("#{:02x}", checksum(body)).as_bytes());
    packet
}

/// A packet that shows `text` on GDB's console.
pub(crate) fn console(text: &str) -> Vec<u8> {
    let digits: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    frame(format!("O{digits}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Vec<Received> {
        let mut unframer = Unframer::new();
        bytes.iter().filter_map(|&byte| unframer.take(byte)).collect()
    }

    #[test]
    fn packets_are_found_between_acknowledgements_and_interrupts() {
        let packet = |body: &[u8]| Received::Packet(body.to_vec());
        let stream = [b"+".as_slice(), &frame(b"g"), b"-\x03+", &frame(b"X1,2:\x03"), b"\x03"];
        let expected =
            [packet(b"g"), Received::Interrupt, packet(b"X1,2:\x03"), Received::Interrupt];
        assert_eq!(all(&stream.concat()), expected);
        assert_eq!(frame(b"OK"), b"$OK#9a");
        assert_eq!(console("a\n"), b"$O610a#47");
    }

    #[test]
    fn another_protocol_is_noticed_at_its_first_byte() {
        assert_eq!(all(b"+GET / HTTP")[0], Received::Foreign);
    }

    #[test]
    fn damaged_packets_are_reported_and_long_ones_are_not_kept() {
        assert_eq!(
            all(b"$g#00$g#zz$g#\xff\xff"),
            [Received::Damaged, Received::Damaged, Received::Damaged]
        );
        let mut long = frame(&[b'a'; PACKET_MAX + 1]);
        long.extend(frame(b"g"));
        assert_eq!(all(&long), [Received::Damaged, Received::Packet(b"g".to_vec())]);
        let mut unframer = Unframer::new();
        unframer.take(b'$');
        for _ in 0..4 * PACKET_MAX {
            assert_eq!(unframer.take(b'a'), None);
        }
        assert_eq!(unframer.body.len(), PACKET_MAX);
        assert_eq!(all(&frame(&[b'a'; PACKET_MAX])).len(), 1);
    }
}

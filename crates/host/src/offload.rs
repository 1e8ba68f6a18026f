//! Does in software what a packet leaves undone: completes checksums, and cuts TCP into segments.
//!
//! # Place
//! Used where the other side of a packet's way cannot do it: a tap without headers, or a guest that did not accept to.
//! A pure function; the work was found by [`Work::of`], so that every offset lies within the frame.
//!
//! # References
//! RFC 1071 (checksum), RFC 791, RFC 8200 section 8.1 (pseudo-header), RFC 9293; RFC 3168 section 6.1.2 (CWR is for the
//! first segment only).

use machine::offload::{Family, TCP_CHECKSUM, Work, frame, plain};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
const PROTOCOL_TCP: u32 = 6;

/// The packets, with nothing left to do, that say the same on a wire as `packet`, which has this work left.
#[must_use]
pub fn finish(packet: &[u8], work: &Work) -> Vec<Vec<u8>> {
    let whole = frame(packet);
    match *work {
        Work::None | Work::Good => vec![plain(whole)],
        Work::Checksum { start, offset } => {
            let mut done = plain(whole);
            let frame = done.len() - whole.len();
            let start = frame + usize::from(start);
            // What is there now belongs to the sum: that of the pseudo-header.
            let sum = checksum(sum(0, &done[start..]));
            put(&mut done, start + usize::from(offset), sum);
            vec![done]
        }
        Work::Segments { family, network, transport, payload, size } => {
            let (network, transport, payload) = (network.into(), transport.into(), payload.into());
            let headers = Headers { family, network, transport, bytes: &whole[..payload] };
            let pieces = whole[payload..].chunks(usize::from(size).max(1));
            let count = pieces.len();
            pieces
                .enumerate()
                .map(|(index, piece)| {
                    headers.segment(piece, index, usize::from(size), index + 1 == count)
                })
                .collect()
        }
    }
}

struct Headers<'a> {
    family: Family,
    network: usize,
    transport: usize,
    bytes: &'a [u8],
}

impl Headers<'_> {
    fn segment(&self, piece: &[u8], index: usize, size: usize, is_last: bool) -> Vec<u8> {
        let mut packet = plain(self.bytes);
        packet.extend_from_slice(piece);
        let frame = packet.len() - self.bytes.len() - piece.len();
        let (network, transport) = (frame + self.network, frame + self.transport);
        let ip_bytes = packet.len() - network;
        match self.family {
            Family::V4 => {
                put(&mut packet, network + 2, low_half(ip_bytes));
                let id = get(&packet, network + 4).wrapping_add(low_half(index));
                put(&mut packet, network + 4, id);
                put(&mut packet, network + 10, 0);
                let header = checksum(sum(0, &packet[network..transport]));
                put(&mut packet, network + 10, header);
            }
            Family::V6 => put(&mut packet, network + 4, low_half(ip_bytes - 40)),
        }
        let at = transport + 4;
        let first = u32::from(get(&packet, at)) << 16 | u32::from(get(&packet, at + 2));
        // At most the length of a packet, which has 17 bits.
        let before = u32::try_from(index * size).unwrap_or(0);
        packet[at..at + 4].copy_from_slice(&first.wrapping_add(before).to_be_bytes());
        if !is_last {
            packet[transport + 13] &= !(FIN | PSH);
        }
        if index > 0 {
            packet[transport + 13] &= !CWR;
        }
        put(&mut packet, transport + TCP_CHECKSUM, 0);
        let addresses = match self.family {
            Family::V4 => network + 12..network + 20,
            Family::V6 => network + 8..network + 40,
        };
        let length = u32::from(low_half(packet.len() - transport));
        let pseudo = sum(PROTOCOL_TCP + length, &packet[addresses]);
        let total = checksum(sum(pseudo, &packet[transport..]));
        put(&mut packet, transport + TCP_CHECKSUM, total);
        packet
    }
}

/// Lengths and counts here fit: a packet has at most 65,535 bytes behind its Ethernet header.
fn low_half(value: usize) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(0)
}

fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Adds 16-bit words to a sum, an odd byte at the end as the high half of one, and folds it.
fn sum(start: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<2>();
    let words: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    let rest = rest.first().map_or(0, |&byte| u64::from(byte) << 8);
    let mut sum = u64::from(start) + words + rest;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u32::try_from(sum).unwrap_or(0)
}

/// The checksum of a sum. Never 0, which in UDP means that there is none; all ones say the same.
fn checksum(sum: u32) -> u16 {
    match !u16::try_from(sum).unwrap_or(0) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use machine::offload::HEADER_BYTES;

    use super::*;

    /// Flags of the packets made here: all that there are but URG and ECE.
    const FLAGS: u8 = FIN | PSH | CWR | 0x10;

    /// A packet of TCP with `data`, to be cut into segments of `size`.
    pub(crate) fn tcp(family: Family, tag: bool, data: &[u8], size: u16) -> Vec<u8> {
        let mut bytes = vec![2; 12];
        if tag {
            bytes.extend([0x81, 0, 0, 7]);
        }
        let length = (32 + data.len()) as u16;
        match family {
            Family::V4 => {
                // With four bytes of options.
                bytes.extend([8, 0, 0x46, 0]);
                bytes.extend((24 + length).to_be_bytes());
                bytes.extend([0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
                bytes.extend([1, 1, 1, 0]);
                let network = bytes.len() - 24;
                let header = checksum(sum(0, &bytes[network..]));
                put(&mut bytes, network + 10, header);
            }
            Family::V6 => {
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                bytes.extend(length.to_be_bytes());
                bytes.extend([6, 64]);
                bytes.extend([0xfd; 16]);
                bytes.extend(1..17);
            }
        }
        let start = bytes.len() as u16;
        bytes.extend([0x1f, 0x90, 0xc3, 0x50, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9]);
        bytes.extend([0x80, FLAGS, 1, 0]);
        let addresses = if family == Family::V4 { 12..20 } else { 8..40 };
        let network = if tag { 18 } else { 14 };
        let pseudo = sum(PROTOCOL_TCP + u32::from(length), &bytes[network..][addresses]);
        bytes.extend((pseudo as u16).to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        bytes.extend(data);
        let mut packet = plain(&bytes);
        packet[0] = 1;
        packet[1] = if family == Family::V4 { 1 } else { 4 };
        packet[4..6].copy_from_slice(&size.to_le_bytes());
        packet[6..8].copy_from_slice(&start.to_le_bytes());
        packet[8] = 16;
        packet
    }

    /// The straightforward way, another one than above: word by word, with the carry at once.
    fn all_ones(parts: &[&[u8]]) -> bool {
        let mut sum = 0u32;
        for pair in parts.concat().chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum == 0xffff
    }

    /// Checks a frame as a receiver does; its sequence number, flags and data.
    fn receive(packet: &[u8], family: Family, tag: bool) -> (u32, u8, Vec<u8>, u16) {
        assert_eq!(Work::of(packet), Ok(Work::None));
        let ip = &frame(packet)[if tag { 18 } else { 14 }..];
        let (addresses, tcp, id) = match family {
            Family::V4 => {
                assert_eq!(usize::from(get(ip, 2)), ip.len());
                assert!(all_ones(&[&ip[..24]]));
                (&ip[12..20], &ip[24..], get(ip, 4))
            }
            Family::V6 => {
                assert_eq!(usize::from(get(ip, 4)), ip.len() - 40);
                (&ip[8..40], &ip[40..], 0)
            }
        };
        let tail = [&[0, 6][..], &(tcp.len() as u16).to_be_bytes()].concat();
        assert!(all_ones(&[addresses, &tail, tcp]));
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        (sequence, tcp[13], tcp[32..].to_vec(), id)
    }

    #[test]
    fn segments_are_what_a_receiver_expects() {
        let data: Vec<u8> = (0..60_001u32).map(|i| (i * 7 % 253) as u8).collect();
        for (family, tag) in [(Family::V4, false), (Family::V4, true), (Family::V6, false)] {
            for size in [8u16, 1447, 1448, 60_000] {
                let packet = tcp(family, tag, &data, size);
                let work = Work::of(&packet).unwrap();
                let packets = finish(&packet, &work);
                assert_eq!(packets.len(), data.len().div_ceil(size.into()));
                let (mut sequence, mut got) = (0xffff_fff0u32, Vec::new());
                for (index, packet) in packets.iter().enumerate() {
                    let (seq, flags, data, id) = receive(packet, family, tag);
                    let mut expected = FLAGS;
                    if index > 0 {
                        expected &= !CWR;
                    }
                    if index + 1 < packets.len() {
                        expected &= !(FIN | PSH);
                    }
                    assert_eq!((seq, flags), (sequence, expected));
                    if family == Family::V4 {
                        assert_eq!(id, (0xffff + index) as u16);
                    }
                    sequence = sequence.wrapping_add(data.len() as u32);
                    got.extend(data);
                }
                assert_eq!(got, data);
            }
        }
    }

    #[test]
    fn a_checksum_is_completed_where_it_belongs() {
        // UDP as RFC 768 has it, whose sum of all is zero: it is sent as all ones.
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0, 29, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0, 53, 0, 53, 0, 9, 0, 0, 0xaa]);
        let pseudo = sum(17 + 9, &frame[26..34]);
        let mut packet = plain(&frame);
        put(&mut packet, HEADER_BYTES + 40, pseudo as u16);
        packet[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
        let work = Work::of(&packet).unwrap();
        let done = finish(&packet, &work);
        assert_eq!(done.len(), 1);
        let sent = machine::offload::frame(&done[0]);
        assert!(all_ones(&[&sent[26..34], &[0, 17, 0, 9], &sent[34..]]));
        assert_eq!(done[0][..HEADER_BYTES], [0; HEADER_BYTES]);
        assert_eq!(sent[..40], frame[..40]);
        // What makes the sum all ones has the checksum zero.
        let rest = 0xffff - sum(0, &machine::offload::frame(&packet)[34..42]) as u16;
        let mut zero = packet.clone();
        zero.truncate(HEADER_BYTES + 42);
        zero.extend(rest.to_be_bytes());
        let done = finish(&zero, &Work::of(&zero).unwrap());
        assert_eq!(get(&done[0], HEADER_BYTES + 40), 0xffff);
    }

    #[test]
    fn what_is_done_stays_as_it_is() {
        let mut packet = plain(&[7; 60]);
        assert_eq!(finish(&packet, &Work::None), std::slice::from_ref(&packet));
        packet[0] = 2;
        assert_eq!(finish(&packet, &Work::of(&packet).unwrap()), [plain(&[7; 60])]);
    }
}

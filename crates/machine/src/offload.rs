//! Packets: Ethernet frames with a header that says what is left to do to them. Whatever a header says, it is checked here.
//!
//! # Place
//! Frames cross the machine's border as packets, in both directions. The network device checks what the guest sends and
//! drops what the guest did not say it could take; the shell does in software what a port cannot.
//!
//! # Invariants
//! - INV-OFFLOAD-1: a packet that leaves the device has the header that [`Work::header`] writes: nothing in it is as the
//!   guest wrote it but for numbers that were checked against the frame.
//! - INV-OFFLOAD-2: every offset in a [`Work`] lies within its frame.
//!
//! # Format
//! [`HEADER_BYTES`] bytes, little endian: flags `u8` (1: complete the checksum, 2: the checksum is good), kind of
//! segments `u8` (0 none, 1 TCP over IPv4, 4 TCP over IPv6), length of all headers `u16`, payload of a segment `u16`,
//! where the checksum starts `u16`, where it goes from there `u16`, and a count of buffers `u16` that is 0 but in guest
//! memory. Offsets count from the frame's start. Then the Ethernet frame without FCS.
//!
//! # References
//! virtio 1.2 section 5.1.6; RFC 791, RFC 8200, RFC 9293.

/// Length of the header.
pub const HEADER_BYTES: usize = 12;
/// Shortest frame: an Ethernet header.
pub const FRAME_BYTES_MIN: usize = 14;
/// Longest frame: the largest IP packet with an Ethernet header and a VLAN tag.
pub const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// Shortest payload of a segment that may be asked for: what is left of the smallest packet that IPv4 allows when all
/// headers are as long as they may be. With less, a packet would make more frames than any network wants.
pub const SEGMENT_BYTES_MIN: u16 = 8;

const FLAG_COMPLETE: u8 = 1;
const FLAG_GOOD: u8 = 2;
const KIND_NONE: u8 = 0;
const KIND_TCP4: u8 = 1;
const KIND_TCP6: u8 = 4;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
const VLAN_TAGS_MAX: usize = 2;
const PROTOCOL_TCP: u8 = 6;
/// IPv6 headers that may lie before TCP: hop-by-hop and destination options.
const OPTIONS: [u8; 2] = [0, 60];
const OPTIONS_MAX: usize = 4;
/// Where the checksum is in a TCP header.
pub const TCP_CHECKSUM: usize = 16;

/// Version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What is left to do to a frame before it can go over a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing.
    None,
    /// Nothing, and somebody has found its checksum good.
    Good,
    /// The checksum from `start` to the frame's end goes to `start + offset`, where that of the pseudo-header is now.
    Checksum {
        /// First byte that is summed.
        start: u16,
        /// Distance of the checksum from there.
        offset: u16,
    },
    /// TCP: the payload is to be cut into segments, each with its own headers.
    Segments {
        /// Version of IP.
        family: Family,
        /// Start of the IP header.
        network: u16,
        /// Start of the TCP header.
        transport: u16,
        /// Start of the payload, of which there is some.
        payload: u16,
        /// Payload of each segment but the last.
        size: u16,
    },
}

/// Why a packet is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// It is no frame with a header.
    #[error("{0} bytes are no packet")]
    Length(usize),
    /// The header does not fit the frame.
    #[error("the header does not fit the frame")]
    Header,
}

/// Which work one side of a device may leave to the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segments of TCP over IPv4; only with `checksum`.
    pub tcp4: bool,
    /// Segments of TCP over IPv6; only with `checksum`.
    pub tcp6: bool,
}

impl Offloads {
    /// Whether this work may be left.
    #[must_use]
    pub fn cover(self, work: &Work) -> bool {
        match work {
            Work::None => true,
            Work::Good | Work::Checksum { .. } => self.checksum,
            Work::Segments { family: Family::V4, .. } => self.checksum && self.tcp4,
            Work::Segments { family: Family::V6, .. } => self.checksum && self.tcp6,
        }
    }
}

/// The frame in a packet; empty when there is none.
#[must_use]
pub fn frame(packet: &[u8]) -> &[u8] {
    packet.get(HEADER_BYTES..).unwrap_or_default()
}

/// A packet with nothing left to do.
#[must_use]
pub fn plain(frame: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER_BYTES + frame.len());
    packet.extend_from_slice(&[0; HEADER_BYTES]);
    packet.extend_from_slice(frame);
    packet
}

impl Work {
    /// Reads a packet's header and checks it against the frame. The count of buffers and the length of all headers,
    /// which is a hint that drivers get wrong, are passed over.
    ///
    /// # Errors
    /// [`BadPacket`].
    pub fn of(packet: &[u8]) -> Result<Self, BadPacket> {
        let length = BadPacket::Length(packet.len());
        let (header, frame) = packet.split_first_chunk::<HEADER_BYTES>().ok_or(length)?;
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame.len()) {
            return Err(length);
        }
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (size, start, offset) = (word(4), word(6), word(8));
        let family = match (header[0] & FLAG_COMPLETE != 0, header[1]) {
            (true, KIND_NONE) => return Self::checksum(frame, start, offset),
            (false, KIND_NONE) => {
                return Ok(if header[0] & FLAG_GOOD != 0 { Self::Good } else { Self::None });
            }
            (true, KIND_TCP4) => Family::V4,
            (true, KIND_TCP6) => Family::V6,
            _ => return Err(BadPacket::Header),
        };
        if usize::from(offset) != TCP_CHECKSUM || size < SEGMENT_BYTES_MIN {
            return Err(BadPacket::Header);
        }
        Self::segments(frame, family, start, size).ok_or(BadPacket::Header)
    }

    fn checksum(frame: &[u8], start: u16, offset: u16) -> Result<Self, BadPacket> {
        let first = usize::from(start);
        let end = first + usize::from(offset) + 2;
        if first < FRAME_BYTES_MIN || end > frame.len() {
            return Err(BadPacket::Header);
        }
        Ok(Self::Checksum { start, offset })
    }

    fn segments(frame: &[u8], family: Family, start: u16, size: u16) -> Option<Self> {
        let (network, transport) = tcp_headers(frame, family)?;
        if transport != usize::from(start) {
            return None;
        }
        let header = usize::from(*frame.get(transport + 12)? >> 4) * 4;
        let payload = transport + header;
        if header < 20 || payload >= frame.len() {
            return None;
        }
        if frame.len() - payload <= usize::from(size) {
            return Some(Self::Checksum { start, offset: TCP_CHECKSUM as u16 });
        }
        Some(Self::Segments {
            family,
            network: u16::try_from(network).ok()?,
            transport: start,
            payload: u16::try_from(payload).ok()?,
            size,
        })
    }

    /// The header that says so.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        match *self {
            Self::None => {}
            Self::Good => header[0] = FLAG_GOOD,
            Self::Checksum { start, offset } => {
                header[0] = FLAG_COMPLETE;
                header[6..8].copy_from_slice(&start.to_le_bytes());
                header[8..10].copy_from_slice(&offset.to_le_bytes());
            }
            Self::Segments { family, transport, payload, size, .. } => {
                header[0] = FLAG_COMPLETE;
                header[1] = if family == Family::V4 { KIND_TCP4 } else { KIND_TCP6 };
                header[2..4].copy_from_slice(&payload.to_le_bytes());
                header[4..6].copy_from_slice(&size.to_le_bytes());
                header[6..8].copy_from_slice(&transport.to_le_bytes());
                header[8..10].copy_from_slice(&(TCP_CHECKSUM as u16).to_le_bytes());
            }
        }
        header
    }
}

fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]))
}

/// Where the IP and the TCP header start in a whole packet of that family.
fn tcp_headers(frame: &[u8], family: Family) -> Option<(usize, usize)> {
    let mut at = 12;
    let mut ethertype = be16(frame, at)?;
    for _ in 0..VLAN_TAGS_MAX {
        if ETHERTYPES_VLAN.contains(&ethertype) {
            at += 4;
            ethertype = be16(frame, at)?;
        }
    }
    let network = at + 2;
    let header = frame.get(network..)?;
    let version = header.first()? >> 4;
    let length = match family {
        Family::V4 => {
            let length = usize::from(header.first()? & 15) * 4;
            let is_fragment = be16(header, 6)? & 0x3fff != 0;
            let is_tcp = *header.get(9)? == PROTOCOL_TCP && !is_fragment;
            let is_good = ethertype == ETHERTYPE_IPV4 && version == 4 && length >= 20;
            (is_tcp && is_good).then_some(length)?
        }
        Family::V6 => {
            let length = ipv6_length(header)?;
            (ethertype == ETHERTYPE_IPV6 && version == 6).then_some(length)?
        }
    };
    Some((network, network + length))
}

/// Length of an IPv6 header with its options, when TCP follows.
fn ipv6_length(header: &[u8]) -> Option<usize> {
    let (mut next, mut length) = (*header.get(6)?, 40);
    for _ in 0..OPTIONS_MAX {
        if !OPTIONS.contains(&next) {
            break;
        }
        next = *header.get(length)?;
        length += (usize::from(*header.get(length + 1)?) + 1) * 8;
    }
    (next == PROTOCOL_TCP).then_some(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A packet of TCP with `data` bytes, behind this many VLAN tags and bytes of IPv6 options.
    fn tcp(family: Family, tags: usize, options: usize, data: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for _ in 0..tags {
            frame.extend([0x81, 0, 0, 7]);
        }
        let length = 20 + data;
        match family {
            Family::V4 => {
                frame.extend([8, 0, 0x45, 0]);
                frame.extend(((20 + length) as u16).to_be_bytes());
                frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            }
            Family::V6 => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(((options + length) as u16).to_be_bytes());
                frame.extend([if options > 0 { 60 } else { 6 }, 64]);
                frame.extend([0xfd; 32]);
                if options > 0 {
                    frame.extend([6, (options / 8 - 1) as u8]);
                    frame.resize(frame.len() + options - 2, 0);
                }
            }
        }
        let start = frame.len() as u16;
        frame.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        frame.resize(frame.len() + data, 9);
        let mut packet = plain(&frame);
        packet[0] = 1;
        packet[1] = if family == Family::V4 { 1 } else { 4 };
        packet[4..6].copy_from_slice(&1000u16.to_le_bytes());
        packet[6..8].copy_from_slice(&start.to_le_bytes());
        packet[8] = 16;
        packet
    }

    #[test]
    fn segments_are_found_behind_tags_and_options() {
        for (family, tags, options, network, transport) in [
            (Family::V4, 0, 0, 14, 34),
            (Family::V4, 2, 0, 22, 42),
            (Family::V6, 0, 0, 14, 54),
            (Family::V6, 1, 16, 18, 74),
        ] {
            let mut packet = tcp(family, tags, options, 3000);
            let work = Work::of(&packet).unwrap();
            let payload = transport + 20;
            assert_eq!(work, Work::Segments { family, network, transport, payload, size: 1000 });
            // What the guest wrote where nobody looks is gone, and the length of all headers is right.
            packet[2..4].copy_from_slice(&[0xff; 2]);
            packet[10..12].copy_from_slice(&[0xff; 2]);
            assert_eq!(Work::of(&packet), Ok(work));
            let header = work.header();
            assert_eq!(header[2..4], payload.to_le_bytes());
            assert_eq!(header[4..10], packet[4..10]);
            assert_eq!(header[10..], [0, 0]);
        }
    }

    #[test]
    fn one_segment_is_a_checksum() {
        for data in [1, 1000] {
            let work = Work::of(&tcp(Family::V4, 0, 0, data));
            assert_eq!(work, Ok(Work::Checksum { start: 34, offset: 16 }));
        }
        assert!(matches!(Work::of(&tcp(Family::V4, 0, 0, 1001)), Ok(Work::Segments { .. })));
    }

    #[test]
    fn headers_that_do_not_fit_are_refused() {
        let good = tcp(Family::V4, 0, 0, 3000);
        let frame_len = (good.len() - HEADER_BYTES) as u16;
        let with = |changes: &[(usize, u8)]| {
            let mut packet = good.clone();
            for &(at, value) in changes {
                packet[at] = value;
            }
            Work::of(&packet)
        };
        let bad: [&[(usize, u8)]; 15] = [
            &[(4, 0), (5, 0)],       // Segments of nothing.
            &[(4, 7), (5, 0)],       // Segments of next to nothing.
            &[(0, 0)],               // Segments without checksums.
            &[(1, 3)],               // UDP.
            &[(1, 0x81)],            // With a congestion mark, which nobody offered.
            &[(1, 4)],               // The other family.
            &[(6, 35)],              // Not where TCP starts.
            &[(6, 0xff), (7, 0xff)], // Outside the frame.
            &[(8, 6)],               // Not where TCP's checksum is.
            &[(12 + 14, 0x55)],      // Not IPv4.
            &[(12 + 14, 0x44)],      // A short IP header.
            &[(12 + 14 + 6, 0x20)],  // A fragment.
            &[(12 + 14 + 9, 17)],    // Not TCP.
            &[(12 + 34 + 12, 0x40)], // A short TCP header.
            &[(12 + 12, 0x86)],      // Not IP.
        ];
        for changes in bad {
            assert_eq!(with(changes), Err(BadPacket::Header), "{changes:?}");
        }
        // Only a checksum: from an Ethernet header on, to the last two bytes.
        let [low, high] = (frame_len - 34 - 2).to_le_bytes();
        assert!(with(&[(1, 0), (8, low), (9, high)]).is_ok());
        assert!(with(&[(1, 0), (8, low + 1), (9, high)]).is_err());
        assert!(with(&[(1, 0), (6, 13)]).is_err());
        assert!(with(&[(1, 0), (6, 0xff), (7, 0xff), (8, 0xff), (9, 0xff)]).is_err());
        for len in [0, 11, 12, 25, HEADER_BYTES + FRAME_BYTES_MAX + 1] {
            assert_eq!(Work::of(&vec![0; len]), Err(BadPacket::Length(len)));
        }
        // Headers without payload, or cut off.
        for len in 26..12 + 54 {
            assert_eq!(Work::of(&good[..len]), Err(BadPacket::Header), "{len}");
        }
    }

    #[test]
    fn segments_need_checksums() {
        let work = Work::of(&tcp(Family::V6, 0, 0, 3000)).unwrap();
        assert!(!Offloads { checksum: false, tcp4: true, tcp6: true }.cover(&work));
        assert!(!Offloads { checksum: true, tcp4: true, tcp6: false }.cover(&work));
        assert!(Offloads { checksum: true, tcp4: false, tcp6: true }.cover(&work));
        assert!(Offloads::default().cover(&Work::None));
        assert!(!Offloads::default().cover(&Work::Good));
    }

    proptest! {
        /// Whatever a packet has in it: no panic, every offset within the frame, and the header that is written says
        /// the same again.
        #[test]
        fn hostile_packets_do_no_harm(
            family in prop_oneof![Just(Family::V4), Just(Family::V6)],
            tags in 0..4usize,
            options in 0..3usize,
            data in 0..200usize,
            changes in proptest::collection::vec((0..110usize, any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(),
            cuts in any::<bool>(),
        ) {
            let mut packet = tcp(family, tags, options * 8, data);
            packet[4..6].copy_from_slice(&40u16.to_le_bytes());
            for (at, value) in changes {
                if let Some(byte) = packet.get_mut(at) {
                    *byte = value;
                }
            }
            if cuts {
                packet.truncate(cut.index(packet.len()));
            }
            let Ok(work) = Work::of(&packet) else { return Ok(()) };
            let len = frame(&packet).len();
            match work {
                Work::None | Work::Good => {}
                Work::Checksum { start, offset } => {
                    prop_assert!(usize::from(start) + usize::from(offset) + 2 <= len);
                }
                Work::Segments { network, transport, payload, size, .. } => {
                    prop_assert!(network + 20 <= transport && transport + 20 <= payload);
                    prop_assert!(usize::from(payload) + usize::from(size) < len);
                }
            }
            packet[..HEADER_BYTES].copy_from_slice(&work.header());
            prop_assert_eq!(Work::of(&packet), Ok(work));
        }
    }
}

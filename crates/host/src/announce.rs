//! Frames that tell the network where a MAC address is now, and the addresses that a guest was seen to use.
//!
//! # Place
//! The primary's run loop shows each frame that the guest sends to its [`AddressBook`]; at go-live the frames of
//! [`announcements`] are sent first, so that switches and neighbours learn the way before any client asks.
//!
//! # Determinism
//! The book is no part of the machine: each replica fills its own from the same outputs.
//!
//! # References
//! RFC 826, RFC 5227 section 1.1 (gratuitous ARP in both forms), RFC 4861 section 4.4 and 7.2.6 (unsolicited neighbour
//! advertisement), RFC 903 (RARP, which needs no IP address).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A MAC address.
pub type Mac = [u8; 6];

/// Most addresses remembered for one network device; the oldest ones go first.
pub const ADDRESSES_MAX: usize = 16;

const BROADCAST: Mac = [0xff; 6];
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
/// Shortest Ethernet frame without FCS.
const FRAME_BYTES_MIN: usize = 60;

/// All frames to send for a guest: one RARP, then two gratuitous ARPs for each IPv4 and one advertisement for each
/// IPv6 address.
#[must_use]
pub fn announcements<'a>(mac: Mac, addresses: impl Iterator<Item = &'a IpAddr>) -> Vec<Vec<u8>> {
    let mut frames = vec![rarp(mac)];
    for address in addresses {
        match address {
            IpAddr::V4(ip) => {
                frames.push(gratuitous_arp(mac, *ip, ArpForm::Request));
                frames.push(gratuitous_arp(mac, *ip, ArpForm::Reply));
            }
            IpAddr::V6(ip) => frames.push(unsolicited_na(mac, *ip)),
        }
    }
    frames
}

/// The two forms of gratuitous ARP: some hosts heed only one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArpForm {
    /// A request for one's own address.
    Request,
    /// A reply nobody asked for.
    Reply,
}

/// A gratuitous ARP for `ip`.
#[must_use]
pub fn gratuitous_arp(mac: Mac, ip: Ipv4Addr, form: ArpForm) -> Vec<u8> {
    let (operation, target) = match form {
        ArpForm::Request => (1, [0; 6]),
        ArpForm::Reply => (2, BROADCAST),
    };
    arp(mac, ETHERTYPE_ARP, operation, ip, target, ip)
}

/// A request for an address that nobody has, from one that nobody has: link-local ones (RFC 3927).
pub(crate) fn arp_request(mac: Mac) -> Vec<u8> {
    let [sender, target] = [2, 1].map(|last| Ipv4Addr::new(169, 254, 0, last));
    arp(mac, ETHERTYPE_ARP, 1, sender, [0; 6], target)
}

/// A RARP request ("who am I"), which makes switches learn the port of `mac`.
#[must_use]
pub fn rarp(mac: Mac) -> Vec<u8> {
    arp(mac, ETHERTYPE_RARP, 3, Ipv4Addr::UNSPECIFIED, mac, Ipv4Addr::UNSPECIFIED)
}

fn arp(
    mac: Mac,
    ethertype: u16,
    operation: u16,
    sender: Ipv4Addr,
    target_mac: Mac,
    target: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ethertype);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&sender.octets());
    frame.extend_from_slice(&target_mac);
    frame.extend_from_slice(&target.octets());
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

/// An unsolicited neighbour advertisement for `ip` to all nodes, with the override flag and the link-layer address.
#[must_use]
pub fn unsolicited_na(mac: Mac, ip: Ipv6Addr) -> Vec<u8> {
    // Type 136, code 0, checksum, flags (override), target, option: target link-layer address of one unit.
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend_from_slice(&ip.octets());
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(&mac);
    let checksum = icmpv6_checksum(ip, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6);
    frame.extend_from_slice(&[0x60, 0, 0, 0, 0]);
    frame.push(32); // Length of what follows the IPv6 header.
    frame.extend_from_slice(&[58, 255]);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&ALL_NODES.octets());
    frame.extend_from_slice(&icmp);
    frame
}

fn ethernet(destination: Mac, source: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame
}

/// RFC 4443 section 2.3: the ones' complement sum over the pseudo-header and the message, whose checksum field is 0.
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut data = Vec::with_capacity(40 + message.len());
    data.extend_from_slice(&source.octets());
    data.extend_from_slice(&destination.octets());
    data.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    data.extend_from_slice(&[0, 0, 0, 58]);
    data.extend_from_slice(message);
    let mut sum: u32 = 0;
    for pair in data.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// The IP addresses that a guest uses, learnt from the frames it sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressBook {
    mac: Mac,
    /// The one seen last is at the end.
    addresses: Vec<IpAddr>,
}

impl AddressBook {
    /// An empty book for the guest's device with this MAC address.
    #[must_use]
    pub fn new(mac: Mac) -> Self {
        Self { mac, addresses: Vec::new() }
    }

    /// The addresses, the one seen last at the end.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The frames to send at go-live.
    #[must_use]
    pub fn announcements(&self) -> Vec<Vec<u8>> {
        announcements(self.mac, self.addresses.iter())
    }

    /// Learns from a frame that the guest sends. Frames with another source MAC, and addresses that cannot be a
    /// guest's own, are passed over.
    pub fn learn(&mut self, frame: &[u8]) {
        if let Some(address) = source_address(frame, &self.mac)
            && is_plausible(address)
        {
            match self.addresses.iter().position(|a| *a == address) {
                // The usual case is cheap: the same address again.
                Some(at) if at + 1 == self.addresses.len() => return,
                Some(at) => drop(self.addresses.remove(at)),
                None if self.addresses.len() == ADDRESSES_MAX => drop(self.addresses.remove(0)),
                None => {}
            }
            self.addresses.push(address);
        }
    }
}

/// The sender's IP address in a frame from `mac`. Tagged frames are passed over: an announcement would need the tag.
fn source_address(frame: &[u8], mac: &Mac) -> Option<IpAddr> {
    if frame.get(6..12)? != mac {
        return None;
    }
    let ethertype = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let body = frame.get(14..)?;
    match ethertype {
        ETHERTYPE_ARP => {
            let header_ok = body.get(..6)? == [0, 1, 8, 0, 6, 4] && body.get(8..14)? == mac;
            if header_ok { ipv4(body.get(14..18)?) } else { None }
        }
        ETHERTYPE_IPV4 if body.len() >= 20 && body[0] >> 4 == 4 => ipv4(body.get(12..16)?),
        ETHERTYPE_IPV6 if body.len() >= 40 && body[0] >> 4 == 6 => {
            let source: [u8; 16] = body.get(8..24)?.try_into().ok()?;
            // While an address is being checked for duplicates the source is "::" and the target is not yet the
            // guest's, so NDP has nothing to say beyond its source.
            Some(IpAddr::V6(source.into()))
        }
        ETHERTYPE_VLAN => None,
        _ => None,
    }
}

fn ipv4(bytes: &[u8]) -> Option<IpAddr> {
    let octets: [u8; 4] = bytes.try_into().ok()?;
    Some(IpAddr::V4(octets.into()))
}

fn is_plausible(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => {
            let first = ip.octets()[0];
            first != 0 && first != 127 && first < 224
        }
        IpAddr::V6(ip) => {
            !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast())
                && ip.to_ipv4_mapped().is_none()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn gratuitous_arp_in_both_forms_byte_for_byte() {
        let request = gratuitous_arp(MAC, IP, ArpForm::Request);
        assert_eq!(request.len(), 60);
        assert_eq!(
            hex(&request[..42]),
            "ffffffffffff5254001234560806\
             00010800060400015254001234560a00020f0000000000000a00020f"
        );
        let reply = gratuitous_arp(MAC, IP, ArpForm::Reply);
        assert_eq!(hex(&reply[14..42]), "00010800060400025254001234560a00020fffffffffffff0a00020f");
    }

    #[test]
    fn rarp_byte_for_byte() {
        assert_eq!(
            hex(&rarp(MAC)[..42]),
            "ffffffffffff5254001234568035\
             000108000604000352540012345600000000\
             52540012345600000000"
        );
    }

    #[test]
    fn neighbour_advertisement_byte_for_byte_with_checksum() {
        let ip: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        let frame = unsolicited_na(MAC, ip);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!(hex(&frame[..22]), "33330000000152540012345686dd6000000000203aff");
        assert_eq!(frame[54], 136);
        assert_eq!(frame[58], 0x20);
        assert_eq!(hex(&frame[78..]), "0201525400123456");
        // Worked out by hand: the sum of all 16-bit words of pseudo-header and message but for the checksum.
        let words = [
            0xfe80, 0, 0, 0, 0x5054, 0x00ff, 0xfe12, 0x3456, // source
            0xff02, 0, 0, 0, 0, 0, 0, 1, // destination
            32, 58, // length, next header
            0x8800, 0x2000, 0, // type and code, flags
            0xfe80, 0, 0, 0, 0x5054, 0x00ff, 0xfe12, 0x3456, // target
            0x0201, 0x5254, 0x0012, 0x3456u32, // option
        ];
        let mut sum: u32 = words.iter().sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        assert_eq!(u32::from(u16::from_be_bytes([frame[56], frame[57]])), 0xffff - sum);
        // A receiver sums everything and finds all ones.
        assert_eq!(icmpv6_checksum(ip, ALL_NODES, &frame[54..]), 0);
    }

    fn ip_frame(mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
        let mut f = ethernet(BROADCAST, mac, ETHERTYPE_IPV4);
        f.extend_from_slice(&[0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0]);
        f.extend_from_slice(&ip.octets());
        f.extend_from_slice(&[255; 4]);
        f
    }

    #[test]
    fn the_guests_own_addresses_are_learnt() {
        let mut book = AddressBook::new(MAC);
        book.learn(&gratuitous_arp(MAC, IP, ArpForm::Request));
        let six: Ipv6Addr = "2001:db8::7".parse().unwrap();
        book.learn(&unsolicited_na(MAC, six));
        assert_eq!(book.addresses(), [IpAddr::V4(IP), IpAddr::V6(six)]);
        book.learn(&ip_frame(MAC, IP));
        assert_eq!(book.addresses(), [IpAddr::V6(six), IpAddr::V4(IP)]);
        let frames = book.announcements();
        assert_eq!(frames.len(), 4);
        assert_eq!(frames[0], rarp(MAC));
        assert_eq!(frames[1], unsolicited_na(MAC, six));
    }

    #[test]
    fn frames_of_others_and_impossible_addresses_are_passed_over() {
        let mut book = AddressBook::new(MAC);
        book.learn(&ip_frame([2; 6], IP));
        let mut proxied = gratuitous_arp(MAC, IP, ArpForm::Reply);
        proxied[22] = 2; // The ARP sender is not who sends the frame.
        book.learn(&proxied);
        for ip in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255; 4], [240, 1, 1, 1]] {
            book.learn(&ip_frame(MAC, ip.into()));
        }
        for ip in ["::", "::1", "ff02::1", "::ffff:10.0.0.1"] {
            book.learn(&unsolicited_na(MAC, ip.parse().unwrap()));
        }
        book.learn(&rarp(MAC));
        assert!(book.addresses().is_empty());
    }

    #[test]
    fn any_prefix_of_a_frame_is_harmless_and_the_book_is_bounded() {
        let mut book = AddressBook::new(MAC);
        for frame in [ip_frame(MAC, IP), unsolicited_na(MAC, ALL_NODES), rarp(MAC)] {
            for len in 0..frame.len() {
                book.learn(&frame[..len]);
            }
        }
        for i in 0..100 {
            book.learn(&ip_frame(MAC, Ipv4Addr::new(10, 0, 0, i)));
        }
        assert_eq!(book.addresses().len(), ADDRESSES_MAX);
        assert_eq!(book.addresses()[15], IpAddr::V4(Ipv4Addr::new(10, 0, 0, 99)));
    }
}

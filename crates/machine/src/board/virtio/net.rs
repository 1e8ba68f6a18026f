//! virtio network device: packets out at the notify, packets in when the input is applied.
//!
//! # Invariants
//! - INV-NET-1: the driver gets no packet with work left that it did not accept to do, and none leaves the machine with
//!   work that the driver was not offered to leave (see [`crate::offload`]).
//! - INV-NET-2: what [`room`] and [`receive_offloads`] say changes nothing: the shell may ask whenever it likes.
//!
//! # Determinism
//! Every host offers the same features, whatever its own network can do: the shell does the rest in software.
//!
//! # References
//! virtio 1.2 section 5.1.

use crate::board::state::NetState;
use crate::board::{BusCtx, NetRoom};
use crate::config::NetConfig;
use crate::io::OutputKind;
use crate::offload::{FRAME_BYTES_MAX, HEADER_BYTES, Offloads, Work};
use crate::ram::GuestRam;

use super::queue::{gather, scatter, total};
use super::transport::Transport;

pub(super) const QUEUE_MAX: u16 = 256;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_SEND: u64 = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6;
const F_RECEIVE: u64 = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_MRG_RXBUF;
pub(super) const FEATURES: u64 = F_MAC | F_STATUS | F_SEND | F_RECEIVE;

const LINK_UP: u16 = 1;
const PACKET_MAX: u64 = (HEADER_BYTES + FRAME_BYTES_MAX) as u64;

#[derive(Debug)]
pub(super) struct Net {
    index: u8,
    mac: [u8; 6],
    state: NetState,
}

/// What packets for the driver may leave undone.
pub(super) fn receive_offloads(transport: &Transport) -> Offloads {
    if !transport.is_live() {
        return Offloads::default();
    }
    Offloads {
        checksum: transport.has_feature(F_GUEST_CSUM),
        tcp4: transport.has_feature(F_GUEST_TSO4),
        tcp6: transport.has_feature(F_GUEST_TSO6),
    }
}

/// What the driver may leave undone.
fn send_offloads(transport: &Transport) -> Offloads {
    Offloads {
        checksum: transport.has_feature(F_CSUM),
        tcp4: transport.has_feature(F_HOST_TSO4),
        tcp6: transport.has_feature(F_HOST_TSO6),
    }
}

/// Most chains that one packet may be spread over.
fn chains_max(transport: &Transport) -> usize {
    if transport.has_feature(F_MRG_RXBUF) { transport.chains_max(RX) } else { 1 }
}

/// Whether there are buffers for a packet of that many bytes.
pub(super) fn room(bytes: usize, transport: &Transport, ram: &GuestRam) -> NetRoom {
    let Some(chains) = transport.peek(RX, ram) else { return NetRoom::Down };
    let (mut room, mut count) = (0, 0);
    for chain in chains.take(chains_max(transport)) {
        let Ok(chain) = chain else { return NetRoom::Ready };
        room += total(&chain.writable);
        count += 1;
        if room >= bytes as u64 {
            return NetRoom::Ready;
        }
    }
    // With as many buffers as there can be it will never fit: the device drops it.
    if count == chains_max(transport) { NetRoom::Ready } else { NetRoom::Full }
}

impl Net {
    pub(super) fn new(index: u8, config: &NetConfig) -> Self {
        Self { index, mac: config.mac, state: NetState::default() }
    }

    pub(super) fn index(&self) -> u8 {
        self.index
    }

    pub(super) fn save(&self) -> NetState {
        self.state.clone()
    }

    pub(super) fn load(&mut self, state: &NetState) {
        self.state = state.clone();
    }

    pub(super) fn power_on(&mut self) {
        self.state = NetState::default();
    }

    pub(super) fn config_space(&self) -> Vec<u8> {
        [&self.mac[..], &LINK_UP.to_le_bytes()].concat()
    }

    pub(super) fn transmit(&mut self, transport: &mut Transport, ctx: &mut BusCtx<'_>) {
        let offloads = send_offloads(transport);
        for _ in 0..transport.chains_max(TX) {
            let Some(chain) = transport.pop(TX, ctx.ram) else { break };
            let packet = if total(&chain.readable) <= PACKET_MAX {
                gather(&chain.readable, ctx.ram)
            } else {
                Vec::new()
            };
            if let Some(packet) = checked(packet, offloads) {
                ctx.emit(OutputKind::NetTx { dev: self.index, packet });
            } else {
                self.state.tx_dropped = self.state.tx_dropped.wrapping_add(1);
            }
            transport.push(TX, chain.head, 0, ctx.ram);
        }
        transport.want_notify(TX, ctx.ram);
    }

    pub(super) fn receive(
        &mut self,
        packet: &[u8],
        transport: &mut Transport,
        ctx: &mut BusCtx<'_>,
    ) {
        let work = Work::of(packet).ok().filter(|work| receive_offloads(transport).cover(work));
        let start = transport.position(RX);
        let chains_max = if work.is_some() { chains_max(transport) } else { 0 };
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < packet.len() as u64 && chains.len() < chains_max {
            let Some(chain) = transport.pop(RX, ctx.ram) else { break };
            room += total(&chain.writable);
            chains.push(chain);
        }
        let Some(work) = work.filter(|_| room >= packet.len() as u64) else {
            // The guest keeps its buffers, and the network loses a packet, as networks do.
            transport.rewind(RX, start);
            self.state.rx_dropped = self.state.rx_dropped.wrapping_add(1);
            return;
        };
        let mut header = work.header();
        header[10..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let (mut header, mut rest) = (&header[..], packet);
        for chain in chains {
            let written = scatter(&chain.writable, rest, ctx.ram);
            rest = &rest[written as usize..];
            // Over the header of the packet, which may be longer than a buffer.
            header = &header[scatter(&chain.writable, header, ctx.ram) as usize..];
            transport.push(RX, chain.head, written, ctx.ram);
        }
    }
}

/// The packet with a header of our own, when it may leave.
fn checked(mut packet: Vec<u8>, offloads: Offloads) -> Option<Vec<u8>> {
    let work = Work::of(&packet).ok().filter(|work| offloads.cover(work))?;
    packet[..HEADER_BYTES].copy_from_slice(&work.header());
    Some(packet)
}

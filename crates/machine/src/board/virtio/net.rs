//! virtio network device: frames out at the notify, frames in when the input is applied.
//!
//! No offloads: checksums and segments are the guest's. virtio 1.2 section 5.1.

use crate::board::BusCtx;
use crate::board::state::NetState;
use crate::config::NetConfig;
use crate::io::OutputKind;

use super::queue::{gather, part, scatter, total};
use super::transport::Transport;

pub(super) const QUEUE_MAX: u16 = 256;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;

const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
pub(super) const FEATURES: u64 = F_MAC | F_MRG_RXBUF | F_STATUS;

const HEADER_BYTES: u64 = 12;
const LINK_UP: u16 = 1;
/// An Ethernet header.
const FRAME_MIN: u64 = 14;
/// The largest IP packet with an Ethernet header and a VLAN tag.
const FRAME_MAX: u64 = 65_535 + 18;

#[derive(Debug)]
pub(super) struct Net {
    index: u8,
    mac: [u8; 6],
    state: NetState,
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
        for _ in 0..transport.chains_max(TX) {
            let Some(chain) = transport.pop(TX, ctx.ram) else { break };
            let len = total(&chain.readable).saturating_sub(HEADER_BYTES);
            if (FRAME_MIN..=FRAME_MAX).contains(&len) {
                let frame = gather(&part(&chain.readable, HEADER_BYTES, len), ctx.ram);
                ctx.emit(OutputKind::NetTx { dev: self.index, frame });
            } else {
                self.state.tx_dropped = self.state.tx_dropped.wrapping_add(1);
            }
            transport.push(TX, chain.head, 0, ctx.ram);
        }
        transport.want_notify(TX, ctx.ram);
    }

    pub(super) fn receive(
        &mut self,
        frame: &[u8],
        transport: &mut Transport,
        ctx: &mut BusCtx<'_>,
    ) {
        let needed = HEADER_BYTES + frame.len() as u64;
        let start = transport.position(RX);
        let chains_max = if !(FRAME_MIN..=FRAME_MAX).contains(&(frame.len() as u64)) {
            0
        } else if transport.has_feature(F_MRG_RXBUF) {
            transport.chains_max(RX)
        } else {
            1
        };
        let mut chains = Vec::new();
        let mut room = 0;
        while room < needed && chains.len() < chains_max {
            let Some(chain) = transport.pop(RX, ctx.ram) else { break };
            room += total(&chain.writable);
            chains.push(chain);
        }
        if room < needed {
            // The guest keeps its buffers, and the network loses a frame, as networks do.
            transport.rewind(RX, start);
            self.state.rx_dropped = self.state.rx_dropped.wrapping_add(1);
            return;
        }
        let mut packet = vec![0; HEADER_BYTES as usize];
        packet[10..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        packet.extend(frame);
        let mut rest = &packet[..];
        for chain in chains {
            let written = scatter(&chain.writable, rest, ctx.ram);
            rest = &rest[written as usize..];
            transport.push(RX, chain.head, written, ctx.ram);
        }
    }
}

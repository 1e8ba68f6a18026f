//! virtio console with one port. virtio 1.2 section 5.3.

use crate::board::BusCtx;
use crate::board::state::{ConsoleState, LoadBoardError};
use crate::io::OutputKind;

use super::queue::{gather, part, scatter, total};
use super::transport::Transport;

pub(super) const QUEUE_MAX: u16 = 128;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;

/// Most bytes that wait for buffers of the guest.
const INPUT_MAX: usize = 64 << 10;
/// Most bytes that one request may send; what exceeds that is dropped.
const OUTPUT_MAX: u64 = 256 << 10;

#[derive(Debug)]
pub(super) struct Console {
    index: u8,
    state: ConsoleState,
}

impl Console {
    pub(super) fn new(index: u8) -> Self {
        Self { index, state: ConsoleState::default() }
    }

    pub(super) fn index(&self) -> u8 {
        self.index
    }

    pub(super) fn save(&self) -> ConsoleState {
        self.state.clone()
    }

    pub(super) fn load(&mut self, state: &ConsoleState) -> Result<(), LoadBoardError> {
        if state.input.len() > INPUT_MAX {
            return Err(LoadBoardError::Device("virtio console"));
        }
        self.state = state.clone();
        Ok(())
    }

    pub(super) fn reset(&mut self) {
        self.state = ConsoleState::default();
    }

    pub(super) fn transmit(&mut self, transport: &mut Transport, ctx: &mut BusCtx<'_>) {
        for _ in 0..transport.chains_max(TX) {
            let Some(chain) = transport.pop(TX, ctx.ram) else { break };
            let bytes = gather(&part(&chain.readable, 0, OUTPUT_MAX), ctx.ram);
            if !bytes.is_empty() {
                ctx.emit(OutputKind::Console { dev: self.index + 1, bytes });
            }
            transport.push(TX, chain.head, 0, ctx.ram);
        }
        transport.want_notify(TX, ctx.ram);
    }

    /// Takes bytes typed at the console; what does not fit is dropped.
    pub(super) fn receive(
        &mut self,
        bytes: &[u8],
        transport: &mut Transport,
        ctx: &mut BusCtx<'_>,
    ) {
        let room = INPUT_MAX - self.state.input.len();
        self.state.input.extend(&bytes[..bytes.len().min(room)]);
        self.fill(transport, ctx);
    }

    /// Moves waiting bytes into the buffers of the guest.
    pub(super) fn fill(&mut self, transport: &mut Transport, ctx: &mut BusCtx<'_>) {
        for _ in 0..transport.chains_max(RX) {
            if self.state.input.is_empty() {
                break;
            }
            let Some(chain) = transport.pop(RX, ctx.ram) else { break };
            let count = total(&chain.writable).min(self.state.input.len() as u64) as usize;
            let bytes: Vec<u8> = self.state.input.drain(..count).collect();
            let written = scatter(&chain.writable, &bytes, ctx.ram);
            transport.push(RX, chain.head, written, ctx.ram);
        }
        transport.want_notify(RX, ctx.ram);
    }
}

//! virtio entropy device. virtio 1.2 section 5.4.
//!
//! # Determinism
//! The bytes are an input: the device asks for them and fills the guest's buffer when they come. It asks for one
//! buffer at a time. Bytes that come when no buffer waits, because the guest reset the device, are dropped.

use crate::board::BusCtx;
use crate::board::state::{LoadBoardError, RngRequest, RngState};
use crate::io::OutputKind;

use super::queue::{part, scatter, total};
use super::transport::Transport;

pub(super) const QUEUE_MAX: u16 = 64;
pub(super) const REQUESTS: usize = 0;

/// Most bytes that one request gets.
const REQUEST_MAX: u32 = 4096;

#[derive(Debug)]
pub(super) struct Rng {
    index: u8,
    state: RngState,
}

impl Rng {
    pub(super) fn new(index: u8) -> Self {
        Self { index, state: RngState::default() }
    }

    pub(super) fn index(&self) -> u8 {
        self.index
    }

    pub(super) fn save(&self) -> RngState {
        self.state.clone()
    }

    pub(super) fn load(&mut self, state: &RngState) -> Result<(), LoadBoardError> {
        let good = |r: &RngRequest| {
            r.len != 0 && r.len <= REQUEST_MAX && total(&r.data) == u64::from(r.len)
        };
        if !state.wanted.iter().all(good) {
            return Err(LoadBoardError::Device("virtio entropy device"));
        }
        self.state = state.clone();
        Ok(())
    }

    pub(super) fn reset(&mut self) {
        self.state = RngState::default();
    }

    pub(super) fn outstanding(&self) -> Option<OutputKind> {
        let wanted = self.state.wanted.as_ref()?;
        Some(OutputKind::EntropyWanted { dev: self.index, len: wanted.len })
    }

    /// Takes the next buffer, unless one waits already.
    pub(super) fn run(&mut self, transport: &mut Transport, ctx: &mut BusCtx<'_>) {
        for _ in 0..transport.chains_max(REQUESTS) {
            if self.state.wanted.is_some() {
                break;
            }
            let Some(chain) = transport.pop(REQUESTS, ctx.ram) else { break };
            let len = total(&chain.writable).min(u64::from(REQUEST_MAX)) as u32;
            if len == 0 {
                transport.push(REQUESTS, chain.head, 0, ctx.ram);
                continue;
            }
            let data = part(&chain.writable, 0, u64::from(len));
            self.state.wanted = Some(RngRequest { head: chain.head, len, data });
            ctx.emit(OutputKind::EntropyWanted { dev: self.index, len });
        }
        transport.want_notify(REQUESTS, ctx.ram);
    }

    /// Fills the waiting buffer, possibly in part, and takes the next one.
    pub(super) fn fill(&mut self, bytes: &[u8], transport: &mut Transport, ctx: &mut BusCtx<'_>) {
        let Some(wanted) = self.state.wanted.take() else { return };
        let bytes = &bytes[..bytes.len().min(wanted.len as usize)];
        let written = scatter(&wanted.data, bytes, ctx.ram);
        transport.push(REQUESTS, wanted.head, written, ctx.ram);
        self.run(transport, ctx);
    }
}

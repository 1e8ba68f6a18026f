//! Outputs that wait: on a primary for the leave to go, on a secondary for the news that they left.
//!
//! # Invariants
//! - INV-OUTPUTS-1: packets beyond [`PACKET_BYTES_MAX`] are lost, as networks lose them; nothing else is.

use std::collections::VecDeque;

use machine::io::{Output, OutputKind};

/// Bytes of packets that wait at most: a quarter of a second of the fastest stream that a guest was seen to send.
const PACKET_BYTES_MAX: usize = 64 << 20;

/// Outputs in the order in which the machine made them.
#[derive(Debug, Default)]
pub(crate) struct OutputQueue {
    outputs: VecDeque<Output>,
    packet_bytes: usize,
}

/// Bytes of the packet, if it is one.
pub(crate) fn packet_bytes(output: &Output) -> usize {
    match &output.kind {
        OutputKind::NetTx { packet, .. } => packet.len(),
        OutputKind::Blk { .. } | OutputKind::Console { .. } | OutputKind::EntropyWanted { .. } => 0,
    }
}

impl OutputQueue {
    /// Puts an output at the end, or drops a packet that there is no room for.
    pub(crate) fn push(&mut self, output: Output) {
        let bytes = packet_bytes(&output);
        if bytes == 0 || self.packet_bytes + bytes <= PACKET_BYTES_MAX {
            self.packet_bytes += bytes;
            self.outputs.push_back(output);
        }
    }

    /// Puts an output at the end, and makes room for it: the oldest outputs go, and those beyond `limit`.
    pub(crate) fn push_over(&mut self, output: Output, limit: usize) {
        self.packet_bytes += packet_bytes(&output);
        self.outputs.push_back(output);
        while self.outputs.len() > limit || self.packet_bytes > PACKET_BYTES_MAX {
            if self.pop().is_none() {
                return;
            }
        }
    }

    /// Takes the first output.
    pub(crate) fn pop(&mut self) -> Option<Output> {
        let output = self.outputs.pop_front()?;
        self.packet_bytes -= packet_bytes(&output);
        Some(output)
    }

    /// Takes the first output when it was made by `icount`.
    pub(crate) fn pop_until(&mut self, icount: u64) -> Option<Output> {
        self.outputs.front().filter(|o| o.icount <= icount)?;
        self.pop()
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(icount: u64, len: usize) -> Output {
        Output { icount, kind: OutputKind::NetTx { dev: 0, packet: vec![0; len] } }
    }

    fn console(icount: u64) -> Output {
        Output { icount, kind: OutputKind::Console { dev: 0, bytes: vec![1; 9] } }
    }

    fn icounts(queue: &mut OutputQueue) -> Vec<u64> {
        std::iter::from_fn(|| queue.pop()).map(|o| o.icount).collect()
    }

    #[test]
    fn what_waits_is_bounded_in_bytes() {
        let half = PACKET_BYTES_MAX / 2;
        let all = |queue: &mut OutputQueue, push: fn(&mut OutputQueue, Output)| {
            for output in [packet(1, half), packet(2, half), packet(3, half), console(4)] {
                push(queue, output);
            }
        };
        let mut queue = OutputQueue::default();
        all(&mut queue, |queue, output| queue.push(output));
        assert_eq!(icounts(&mut queue), [1, 2, 4]);
        all(&mut queue, |queue, output| queue.push_over(output, 10));
        assert_eq!(icounts(&mut queue), [2, 3, 4]);
        all(&mut queue, |queue, output| queue.push_over(output, 1));
        assert_eq!(icounts(&mut queue), [4]);
        assert_eq!(queue.packet_bytes, 0);
    }

    #[test]
    fn outputs_leave_up_to_a_position() {
        let mut queue = OutputQueue::default();
        for icount in [3, 3, 5] {
            queue.push(console(icount));
        }
        assert!(queue.pop_until(2).is_none());
        let taken = std::iter::from_fn(|| queue.pop_until(4)).count();
        assert_eq!(taken, 2);
        assert_eq!(icounts(&mut queue), [5]);
    }
}

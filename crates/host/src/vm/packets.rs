//! Packets from a tap that wait for the guest to have buffers.
//!
//! # Place
//! A tap's reader puts them in; the vCPU thread takes one out when the guest can take it.
//!
//! # Invariants
//! - INV-PACKETS-1: at most [`BYTES_MAX`] bytes wait, and one packet more, or what it was cut into. A reader with more
//!   to put in waits, so that the kernel keeps the rest within its own bound, and drops what exceeds that.
//! - INV-PACKETS-2: after [`PacketQueue::close`] nothing of the reader that was closed comes in.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machine::offload::{Offloads, Work};

use crate::offload::finish;

/// Bytes that wait at most.
const BYTES_MAX: usize = 4 << 20;
/// How long a reader waits before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct PacketQueue {
    waiting: Mutex<Waiting>,
    room: Condvar,
    /// Packets from the kernel that made no sense.
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Waiting {
    fn take_front(&mut self) -> Option<Vec<u8>> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    fn put_front(&mut self, packet: Vec<u8>) {
        self.bytes += packet.len();
        self.packets.push_front(packet);
    }
}

impl PacketQueue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a packet at the end, once there is room, unless the guest is not live here. Whether it is the first one, so
    /// that somebody has to be told.
    pub(crate) fn put(&self, packet: Vec<u8>, is_live: &AtomicBool) -> bool {
        let mut waiting = self.lock();
        while is_live.load(Ordering::SeqCst) {
            if waiting.bytes < BYTES_MAX {
                waiting.bytes += packet.len();
                waiting.packets.push_back(packet);
                return waiting.packets.len() == 1;
            }
            waiting =
                self.room.wait_timeout(waiting, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// The first packet, as the guest can take it, if it `has_room` for that many bytes. A packet that makes no sense
    /// is dropped.
    pub(crate) fn take(
        &self,
        offloads: Offloads,
        has_room: impl Fn(usize) -> bool,
    ) -> Option<Vec<u8>> {
        let mut waiting = self.lock();
        loop {
            let packet = waiting.packets.front()?;
            match Work::of(packet) {
                Ok(work) if offloads.cover(&work) => {
                    if !has_room(packet.len()) {
                        return None;
                    }
                    let packet = waiting.take_front();
                    self.room.notify_one();
                    return packet;
                }
                Ok(work) => {
                    let packets = finish(packet, &work);
                    waiting.take_front();
                    packets.into_iter().rev().for_each(|packet| waiting.put_front(packet));
                }
                Err(_) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    waiting.take_front();
                }
            }
        }
    }

    /// Throws away what waits and what the reader that looks at `is_live` still has.
    pub(crate) fn close(&self, is_live: &AtomicBool) {
        is_live.store(false, Ordering::SeqCst);
        *self.lock() = Waiting::default();
        self.room.notify_one();
        let refused = self.refused.swap(0, Ordering::Relaxed);
        if refused > 0 {
            crate::log::line(&format!("a tap gave {refused} packets that made no sense"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use machine::offload::plain;

    use super::*;

    const ALL: Offloads = Offloads { checksum: true, tcp4: true, tcp6: true };

    #[test]
    fn packets_wait_for_room_in_order() {
        let (queue, live) = (PacketQueue::default(), AtomicBool::new(true));
        assert!(queue.put(plain(&[1; 60]), &live));
        assert!(!queue.put(plain(&[2; 60]), &live));
        assert_eq!(queue.take(ALL, |_| false), None);
        assert_eq!(queue.take(ALL, |bytes| bytes == 72), Some(plain(&[1; 60])));
        queue.close(&live);
        assert!(!queue.put(plain(&[3; 60]), &live));
        assert_eq!(queue.take(ALL, |_| true), None);
        assert_eq!(queue.lock().bytes, 0);
    }

    #[test]
    fn the_guest_gets_what_it_can_take() {
        let (queue, live) = (PacketQueue::default(), AtomicBool::new(true));
        let mut partial = plain(&[0; 60]);
        partial[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
        let mut hostile = partial.clone();
        hostile[6] = 200;
        for packet in [&hostile, &partial, &partial] {
            queue.put(packet.clone(), &live);
        }
        assert_eq!(queue.take(ALL, |_| true), Some(partial));
        assert_eq!(queue.refused.load(Ordering::Relaxed), 1);
        let mut done = plain(&[0; 60]);
        done[12 + 40..12 + 42].fill(0xff);
        assert_eq!(queue.take(Offloads::default(), |_| true), Some(done));
    }

    #[test]
    fn a_full_queue_holds_its_reader_until_there_is_room_or_the_end() {
        let (queue, live) = (Arc::new(PacketQueue::default()), Arc::new(AtomicBool::new(true)));
        let packet = plain(&vec![0; 60_000]);
        let count = BYTES_MAX.div_ceil(packet.len());
        for _ in 0..count {
            queue.put(packet.clone(), &live);
        }
        let reader = {
            let (queue, live) = (Arc::clone(&queue), Arc::clone(&live));
            std::thread::spawn(move || {
                while live.load(Ordering::SeqCst) {
                    queue.put(plain(&[1; 60_000]), &live);
                }
            })
        };
        for _ in 0..count {
            assert_eq!(queue.take(ALL, |_| true).as_ref(), Some(&packet));
        }
        while queue.take(ALL, |_| true).is_none() {
            std::thread::yield_now();
        }
        assert!(queue.lock().bytes < BYTES_MAX + packet.len());
        queue.close(&live);
        reader.join().unwrap();
        assert_eq!(queue.take(ALL, |_| true), None);
    }
}

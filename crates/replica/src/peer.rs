//! What a primary knows about its secondary.
//!
//! # Invariants
//! INV-REPLICA-5: `fresh_until` is the detection time after the sending of the last heartbeat that was echoed.

use std::collections::VecDeque;

use eventlog::LogPos;

use crate::config::{HostId, LinkId, MonoTime};
use crate::event::Command;
use crate::message::Message;
use crate::node::Cx;

const HEARTBEATS_MAX: usize = 64;

/// A secondary, as its primary sees it.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) host: HostId,
    pub(crate) link: LinkId,
    pub(crate) attempt: u64,
    pub(crate) received: LogPos,
    pub(crate) replayed: LogPos,
    pub(crate) is_loaded: bool,
    /// Log sent before the snapshot was loaded.
    pub(crate) bytes_before_loaded: u64,
    last_heard: MonoTime,
    next_heartbeat: MonoTime,
    seq: u64,
    /// Heartbeats sent and not echoed: number and time.
    unechoed: VecDeque<(u64, MonoTime)>,
    fresh_until: MonoTime,
}

impl Peer {
    pub(crate) fn new(now: MonoTime, host: HostId, link: LinkId, attempt: u64, at: LogPos) -> Self {
        Self {
            host,
            link,
            attempt,
            received: at,
            replayed: at,
            is_loaded: false,
            bytes_before_loaded: 0,
            last_heard: now,
            next_heartbeat: now,
            seq: 0,
            unechoed: VecDeque::new(),
            fresh_until: MonoTime(0),
        }
    }

    /// This process did not run for a while: nothing can be said about the peer's silence, and nothing that was sent
    /// before proves anything.
    pub(crate) fn on_wake(&mut self, now: MonoTime) {
        self.last_heard = now;
        self.next_heartbeat = now;
        self.unechoed.clear();
        self.fresh_until = MonoTime(0);
    }

    /// Takes an acknowledgement; says what is wrong with it, if anything is.
    pub(crate) fn on_ack(
        &mut self,
        cx: &Cx<'_>,
        log_end: LogPos,
        (received, replayed, echo): (LogPos, LogPos, u64),
    ) -> Result<(), &'static str> {
        if received.lsn > log_end.lsn || received.icount > log_end.icount {
            return Err("acknowledged what was not sent");
        }
        if received < self.received || replayed < self.replayed || replayed > received {
            return Err("acknowledged positions out of order");
        }
        if echo > self.seq {
            return Err("echoed a heartbeat that was not sent");
        }
        self.received = received;
        self.replayed = replayed;
        self.last_heard = cx.now;
        while let Some(&(seq, sent)) = self.unechoed.front() {
            if seq > echo {
                break;
            }
            if seq == echo {
                self.fresh_until = self.fresh_until.max(sent.after(cx.core.cfg.detection_us));
            }
            self.unechoed.pop_front();
        }
        Ok(())
    }

    pub(crate) fn is_fresh(&self, now: MonoTime) -> bool {
        now <= self.fresh_until
    }

    /// Whether nothing came for longer than `patience_us`.
    pub(crate) fn is_silent(&self, now: MonoTime, patience_us: u64) -> bool {
        now.micros_since(self.last_heard) > patience_us
    }

    pub(crate) fn tick(&mut self, cx: &mut Cx<'_>, released: u64) {
        if cx.now >= self.next_heartbeat {
            self.beat(cx, released);
        }
    }

    /// Sends a heartbeat.
    pub(crate) fn beat(&mut self, cx: &mut Cx<'_>, released: u64) {
        self.next_heartbeat = cx.now.after(cx.core.cfg.heartbeat_us);
        self.seq += 1;
        if self.unechoed.len() == HEARTBEATS_MAX {
            self.unechoed.pop_front();
        }
        self.unechoed.push_back((self.seq, cx.now));
        let message = Message::Heartbeat { seq: self.seq, released };
        cx.out.push(Command::Send { link: self.link, message });
    }
}

//! The primary: the gate for its outputs, its secondary, and the arbitration when that is lost.
//!
//! # Invariants
//! - INV-REPLICA-1: in [`Protection::Admitting`], [`Protection::Protected`], [`Protection::Switching`] and
//!   [`Protection::Stopping`] only acknowledgements release, in [`Protection::Dropping`] nothing does.
//! - INV-REPLICA-2: [`Protection::Alone`] is entered only while the record names no secondary.
//! - INV-REPLICA-3: [`Admission::Claiming`] comes after [`Admission::AwaitingAck`].
//! - INV-REPLICA-5: see [`crate::peer`].

use std::collections::VecDeque;

use eventlog::LogPos;

use crate::arbitration::{ArbiterReply, Inquiry, Outcome, Record};
use crate::config::{LinkId, MonoTime, Mutation};
use crate::event::{Command, DropReason, Event, HaltReason};
use crate::lag::LagMeter;
use crate::message::{Message, PROTOCOL_VERSION};
use crate::node::{Cx, State};
use crate::peer::Peer;
use crate::protection::{Admission, Protection, Switch};
use crate::status::{self, LossReason, NotProtected, Role, Status};

/// How much more of its time the primary may lose with each heartbeat, so that the guest is slowed gently.
const THROTTLE_STEP_PERMILLE: u32 = 20;
const THROTTLE_MAX_PERMILLE: u32 = 900;

/// A batch of outputs that waits.
#[derive(Debug, Clone, Copy)]
struct Held {
    up_to_icount: u64,
    /// The log up to here must be acknowledged.
    lsn: u64,
}

/// A primary.
#[derive(Debug)]
pub(crate) struct Live {
    record: Record,
    log_end: LogPos,
    held: VecDeque<Held>,
    released: u64,
    lag: LagMeter,
    is_paused: bool,
    throttle_permille: u32,
    next_throttle: MonoTime,
    /// Lowest lag of late, and when it was last lowered.
    lowest_lag: (u64, MonoTime),
    protection: Protection,
}

impl Live {
    pub(crate) fn new(cx: &Cx<'_>, record: Record, log_end: LogPos, released: u64) -> Self {
        Self {
            record,
            log_end,
            held: VecDeque::new(),
            released,
            lag: LagMeter::default(),
            is_paused: false,
            throttle_permille: 0,
            next_throttle: cx.now,
            lowest_lag: (0, cx.now),
            protection: Protection::Alone { reason: None, retry_at: cx.now },
        }
    }

    pub(crate) fn describe(&self, now: MonoTime, wanted: bool, status: &mut Status) {
        status.role = Role::Primary;
        status.generation = self.record.generation;
        status.peer = self.protection.peer().map(|peer| peer.host.clone());
        status.lag_us = if status.peer.is_some() { self.lag.lag_us(now) } else { 0 };
        status.held = self.held.len();
        status.throttle_permille = self.throttle_permille;
        let not = match &self.protection {
            Protection::Protected { .. } | Protection::Switching { .. } => {
                status.protection = status::Protection::Protected;
                return;
            }
            Protection::Alone { .. } if !wanted => NotProtected::Disabled,
            Protection::Alone { reason, .. } => {
                NotProtected::NeedSecondary { reason: reason.clone() }
            }
            Protection::Starting { host, .. } => NotProtected::Starting { host: host.clone() },
            Protection::Admitting { peer, .. } => {
                NotProtected::Starting { host: peer.host.clone() }
            }
            Protection::Dropping { inquiry, .. } if inquiry.is_failing() => {
                NotProtected::AwaitingArbiter
            }
            Protection::Dropping { reason, .. } => {
                NotProtected::NeedSecondary { reason: Some(reason.clone()) }
            }
            Protection::Stopping { .. } => NotProtected::VmNotRunning,
        };
        status.protection = status::Protection::NotProtected(not);
    }

    pub(crate) fn is_alone(&self) -> bool {
        self.protection.is_alone()
    }

    pub(crate) fn on_wake(&mut self, cx: &Cx<'_>) {
        if let Some(peer) = self.protection.peer_mut()
            && !cx.core.cfg.breaks(Mutation::StaleAcks)
        {
            peer.on_wake(cx.now);
        }
    }

    // --- Events ------------------------------------------------------------------------------------------------

    pub(crate) fn on_event(mut self: Box<Self>, cx: &mut Cx<'_>, event: Event) -> State {
        match event {
            Event::LogProduced { bytes, end, outputs_up_to } => {
                self.on_log(cx, bytes, end, outputs_up_to);
            }
            Event::Message { link, message } => return self.on_link(cx, link, message),
            Event::ArbiterReply { op, reply } => return self.on_reply(cx, op, reply),
            Event::LinkClosed { link } => {
                if self.protection.peer().is_some_and(|peer| peer.link == link) {
                    self.lose_peer(cx, LossReason::LinkClosed);
                }
            }
            Event::ProtectStarted { attempt, link, at } => {
                self.begin_session(cx, attempt, link, at)
            }
            Event::ProtectFailed { attempt, reason } => {
                if self.attempt() == Some(attempt) {
                    self.lose_peer(cx, LossReason::NotStarted { reason });
                }
            }
            Event::Stop => self.stop(cx),
            Event::SetProtection { .. } => {
                if !cx.core.wanted {
                    self.disable(cx);
                }
            }
            Event::SwitchOver => self.switch_over(cx),
            Event::MachineStopped => self.drained(cx),
            Event::Tick
            | Event::Start
            | Event::Reset
            | Event::SnapshotSent { .. }
            | Event::SnapshotLoaded { .. }
            | Event::Replayed { .. }
            | Event::Diverged { .. }
            | Event::ReplicaFailed { .. } => {}
        }
        State::Live(self)
    }

    fn on_log(&mut self, cx: &mut Cx<'_>, bytes: Vec<u8>, end: LogPos, outputs: Option<u64>) {
        assert!(end >= self.log_end, "the machine's log went back from {} to {end}", self.log_end);
        self.log_end = end;
        self.lag.on_produced(cx.now, end.icount);
        let released = self.released;
        if let Some(peer) = self.protection.peer_mut() {
            if !peer.is_loaded {
                peer.bytes_before_loaded += bytes.len() as u64;
            }
            cx.send(peer.link, Message::Log { bytes, end, released });
        }
        let Some(up_to_icount) = outputs else { return };
        let unheld = cx.core.cfg.breaks(Mutation::ReleaseBeforeAck)
            || (cx.core.cfg.breaks(Mutation::AdmitUnheld)
                && matches!(self.protection, Protection::Admitting { .. }));
        if self.protection.is_alone() || unheld {
            self.release(cx, up_to_icount);
            return;
        }
        let held = Held { up_to_icount, lsn: end.lsn };
        // The machine was told to wait long before; what comes all the same waits together.
        if self.held.len() >= 2 * cx.core.cfg.held_max {
            self.held.pop_back();
        }
        self.held.push_back(held);
    }

    fn on_link(mut self: Box<Self>, cx: &mut Cx<'_>, link: LinkId, message: Message) -> State {
        if let Protection::Dropping { link: Some(old), .. } = &self.protection
            && *old == link
        {
            return State::Live(self);
        }
        if self.protection.peer().is_none_or(|peer| peer.link != link) {
            cx.refuse(link, &message);
            return State::Live(self);
        }
        match message {
            Message::Ack { received, replayed, echo } => {
                self.on_ack(cx, (received, replayed, echo));
            }
            Message::Loaded => {
                if let Some(peer) = self.protection.peer_mut() {
                    peer.is_loaded = true;
                }
            }
            Message::Refused { reason } => {
                self.lose_peer(cx, LossReason::NotStarted { reason: reason.to_string() });
            }
            Message::Diverged { at, .. } => {
                self.lose_peer(cx, LossReason::Diverged { icount: at.icount });
            }
            Message::SecondaryFailed { reason } => {
                self.lose_peer(cx, LossReason::Failed { reason });
            }
            Message::Switched { .. } => {
                if let Protection::Switching { step: Switch::Handed { .. }, .. } = self.protection {
                    cx.drop_link(link, DropReason::Over);
                    cx.out.push(Command::Discard { keep_state: false });
                    return State::Idle;
                }
                self.nonsense(cx, link, "switched unasked");
            }
            Message::Hello { .. }
            | Message::Protected { .. }
            | Message::Log { .. }
            | Message::Heartbeat { .. }
            | Message::SwitchOver { .. }
            | Message::Stop { .. } => self.nonsense(cx, link, "a primary's message"),
            Message::Disks { .. } => {}
        }
        State::Live(self)
    }

    fn nonsense(&mut self, cx: &mut Cx<'_>, link: LinkId, what: &'static str) {
        cx.drop_link(link, DropReason::Nonsense(what));
        self.lose_peer(cx, LossReason::Nonsense { what });
    }

    fn on_ack(&mut self, cx: &mut Cx<'_>, ack: (LogPos, LogPos, u64)) {
        let log_end = self.log_end;
        let Some(peer) = self.protection.peer_mut() else { return };
        let link = peer.link;
        match peer.on_ack(cx, log_end, ack) {
            Ok(()) => {
                let replayed = peer.replayed.icount;
                self.lag.on_replayed(replayed);
                self.release_acked(cx);
                self.hand_over(cx);
                self.advance_admission(cx);
            }
            Err(what) => self.nonsense(cx, link, what),
        }
    }

    // --- The gate ----------------------------------------------------------------------------------------------

    fn release(&mut self, cx: &mut Cx<'_>, up_to_icount: u64) {
        self.released = self.released.max(up_to_icount);
        cx.out.push(Command::Release { up_to_icount });
    }

    fn release_acked(&mut self, cx: &mut Cx<'_>) {
        let Some(peer) = self.protection.peer() else { return };
        let acked = peer.received.lsn;
        if !peer.is_fresh(cx.now) && !cx.core.cfg.breaks(Mutation::StaleAcks) {
            return;
        }
        let count = self.held.iter().take_while(|held| held.lsn <= acked).count();
        let last = self.held.drain(..count).next_back();
        if let Some(last) = last {
            self.release(cx, last.up_to_icount);
        }
    }

    fn release_all(&mut self, cx: &mut Cx<'_>) {
        if let Some(last) = std::mem::take(&mut self.held).pop_back() {
            self.release(cx, last.up_to_icount);
        }
    }

    // --- Making a secondary ------------------------------------------------------------------------------------

    fn attempt(&self) -> Option<u64> {
        match &self.protection {
            Protection::Starting { attempt, .. } => Some(*attempt),
            Protection::Admitting { peer, .. } => Some(peer.attempt),
            Protection::Alone { .. }
            | Protection::Protected { .. }
            | Protection::Dropping { .. }
            | Protection::Switching { .. }
            | Protection::Stopping { .. } => None,
        }
    }

    fn begin_session(&mut self, cx: &mut Cx<'_>, started: u64, link: LinkId, start: LogPos) {
        match &mut self.protection {
            Protection::Starting { attempt, host, peer: peer @ None, .. }
                if *attempt == started =>
            {
                self.lag = LagMeter::default();
                self.lowest_lag = (u64::MAX, cx.now);
                *peer = Some(Peer::new(cx.now, host.clone(), link, started, start));
                let hello = Message::Hello {
                    version: PROTOCOL_VERSION,
                    vm: cx.core.cfg.vm,
                    host: cx.core.cfg.host.clone(),
                    generation: self.record.generation,
                    start,
                };
                cx.send(link, hello);
            }
            Protection::Starting { .. }
            | Protection::Alone { .. }
            | Protection::Admitting { .. }
            | Protection::Protected { .. }
            | Protection::Dropping { .. }
            | Protection::Switching { .. }
            | Protection::Stopping { .. } => cx.drop_link(link, DropReason::Over),
        }
    }

    /// From in sync, through holding outputs for it, to the claim that names it.
    fn advance_admission(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now;
        let unheld = cx.core.cfg.breaks(Mutation::AdmitUnheld);
        let is_in_sync = self.lag.lag_us(now) <= cx.core.cfg.lag_admit_us;
        let placeholder = Protection::Alone { reason: None, retry_at: now };
        self.protection = match std::mem::replace(&mut self.protection, placeholder) {
            Protection::Starting { peer: Some(peer), .. } if peer.is_loaded && is_in_sync => {
                let step = Admission::AwaitingAck { armed: self.log_end };
                Protection::Admitting { peer, step }
            }
            other => other,
        };
        if let Protection::Admitting { peer, step } = &mut self.protection
            && let Admission::AwaitingAck { armed } = step
            && (peer.received.lsn >= armed.lsn || unheld)
        {
            let me = cx.me();
            let secondary = Some(peer.host.clone());
            *step = Admission::Claiming(Inquiry::claim(cx, self.record.generation, me, secondary));
        }
    }

    // --- Losing it ---------------------------------------------------------------------------------------------

    fn lose_peer(&mut self, cx: &mut Cx<'_>, reason: LossReason) {
        if let Some(peer) = self.protection.peer() {
            cx.drop_link(peer.link, DropReason::Over);
        }
        if let Some(attempt) = self.attempt() {
            cx.out.push(Command::AbandonProtect { attempt });
        }
        let retry_at = cx.now.after(cx.core.cfg.protect_retry_us);
        let alone = Protection::Alone { reason: Some(reason.clone()), retry_at };
        self.protection = match std::mem::replace(&mut self.protection, alone) {
            alone @ (Protection::Alone { .. } | Protection::Starting { .. }) => {
                drop(alone);
                return;
            }
            Protection::Admitting { step: Admission::AwaitingAck { .. }, .. } => {
                self.release_all(cx);
                return;
            }
            Protection::Admitting { step: Admission::Claiming(_), .. }
            | Protection::Protected { .. }
            | Protection::Switching {
                peer: _,
                step: Switch::Draining | Switch::Releasing { .. },
            } => self.dropping(cx, reason, None),
            dropping @ Protection::Dropping { .. } => dropping,
            Protection::Switching { peer: _, step: step @ Switch::Handed { .. } } => {
                Protection::Switching { peer: None, step }
            }
            Protection::Stopping { inquiry, peer: _ } => {
                Protection::Stopping { inquiry, peer: None }
            }
        };
        if cx.core.cfg.breaks(Mutation::AloneUnasked)
            && matches!(self.protection, Protection::Dropping { .. })
        {
            self.protection = Protection::Alone { reason: None, retry_at };
            self.release_all(cx);
        }
    }

    fn dropping(&self, cx: &mut Cx<'_>, reason: LossReason, link: Option<LinkId>) -> Protection {
        let me = cx.me();
        let inquiry = Inquiry::claim(cx, self.record.generation, me, None);
        Protection::Dropping { inquiry, reason, link }
    }

    fn disable(&mut self, cx: &mut Cx<'_>) {
        match &self.protection {
            Protection::Starting { .. }
            | Protection::Admitting { step: Admission::AwaitingAck { .. }, .. } => {
                self.lose_peer(cx, LossReason::Disabled);
            }
            Protection::Admitting { step: Admission::Claiming(_), peer }
            | Protection::Protected { peer } => {
                let link = Some(peer.link);
                self.protection = self.dropping(cx, LossReason::Disabled, link);
            }
            Protection::Alone { .. }
            | Protection::Dropping { .. }
            | Protection::Switching { .. }
            | Protection::Stopping { .. } => {}
        }
    }

    // --- Planned ends ------------------------------------------------------------------------------------------

    fn switch_over(&mut self, cx: &mut Cx<'_>) {
        if let Protection::Protected { peer } = &self.protection {
            cx.out.push(Command::StopMachine);
            self.is_paused = true;
            let peer = Some(peer.clone());
            self.protection = Protection::Switching { peer, step: Switch::Draining };
        }
    }

    /// The machine stands still: what is held leaves here, so that the secondary need not send it again.
    fn drained(&mut self, cx: &mut Cx<'_>) {
        if let Protection::Switching { step: step @ Switch::Draining, .. } = &mut self.protection {
            *step = Switch::Releasing { until: cx.now.after(cx.core.cfg.switchover_timeout_us) };
            self.hand_over(cx);
        }
    }

    /// Once nothing is held, tells the secondary so, and to go live.
    fn hand_over(&mut self, cx: &mut Cx<'_>) {
        if let Protection::Switching { peer: Some(peer), step } = &mut self.protection
            && matches!(step, Switch::Releasing { .. })
            && self.held.is_empty()
        {
            *step = Switch::Handed { until: cx.now.after(cx.core.cfg.switchover_timeout_us) };
            peer.beat(cx, self.released);
            cx.send(peer.link, Message::SwitchOver { at: self.log_end });
        }
    }

    fn stop(&mut self, cx: &mut Cx<'_>) {
        if matches!(self.protection, Protection::Stopping { .. }) {
            return;
        }
        if let Some(attempt) = self.attempt() {
            cx.out.push(Command::AbandonProtect { attempt });
        }
        let peer = self.protection.peer().cloned();
        let inquiry = Inquiry::claim(cx, self.record.generation, None, None);
        self.protection = Protection::Stopping { inquiry, peer };
    }

    // --- Arbitration -------------------------------------------------------------------------------------------

    fn on_reply(mut self: Box<Self>, cx: &mut Cx<'_>, op: u64, reply: ArbiterReply) -> State {
        let Some(inquiry) = self.protection.inquiry_mut() else { return State::Live(self) };
        match inquiry.on_reply(cx, op, reply) {
            None | Some(Outcome::Read(_)) => State::Live(self),
            Some(Outcome::Won(record)) => self.on_won(cx, record),
            Some(Outcome::Lost(current)) => self.on_lost(cx, current),
        }
    }

    fn on_won(mut self: Box<Self>, cx: &mut Cx<'_>, record: Record) -> State {
        let generation = record.generation;
        self.record = record;
        let retry_at = cx.now.after(cx.core.cfg.protect_retry_us);
        let alone = Protection::Alone { reason: None, retry_at };
        match std::mem::replace(&mut self.protection, alone) {
            Protection::Admitting { peer, .. } => {
                cx.send(peer.link, Message::Protected { generation });
                self.protection = Protection::Protected { peer };
            }
            Protection::Dropping { reason, link, .. } => {
                if let Some(link) = link {
                    cx.send(link, Message::Stop { off: None });
                    cx.drop_link(link, DropReason::Over);
                }
                self.protection = Protection::Alone { reason: Some(reason), retry_at };
                self.release_all(cx);
            }
            Protection::Stopping { peer, .. } => {
                self.release_all(cx);
                if let Some(peer) = peer {
                    cx.send(peer.link, Message::Stop { off: Some(generation) });
                    cx.drop_link(peer.link, DropReason::Over);
                }
                cx.out.push(Command::Stopped);
                return State::Idle;
            }
            other @ (Protection::Alone { .. }
            | Protection::Starting { .. }
            | Protection::Protected { .. }
            | Protection::Switching { .. }) => self.protection = other,
        }
        State::Live(self)
    }

    fn on_lost(mut self: Box<Self>, cx: &mut Cx<'_>, current: Option<Record>) -> State {
        let me = cx.me();
        let Some(record) = current.as_ref().filter(|record| record.live == me) else {
            return self.halt(cx, current);
        };
        // An earlier claim of this host was stored after all: ask again on top of it.
        let generation = record.generation;
        self.record = record.clone();
        match &mut self.protection {
            Protection::Admitting { step, peer } => {
                let secondary = Some(peer.host.clone());
                *step = Admission::Claiming(Inquiry::claim(cx, generation, me, secondary));
            }
            Protection::Dropping { inquiry, .. } => {
                *inquiry = Inquiry::claim(cx, generation, me, None);
            }
            Protection::Stopping { inquiry, .. } => {
                *inquiry = Inquiry::claim(cx, generation, None, None);
            }
            Protection::Alone { .. }
            | Protection::Starting { .. }
            | Protection::Protected { .. }
            | Protection::Switching { .. } => {}
        }
        State::Live(self)
    }

    fn halt(self: Box<Self>, cx: &mut Cx<'_>, current: Option<Record>) -> State {
        let generation = current.as_ref().map_or(0, |record| record.generation);
        if let Some(attempt) = self.attempt() {
            cx.out.push(Command::AbandonProtect { attempt });
        }
        let link = match &self.protection {
            Protection::Dropping { link, .. } => *link,
            other => other.peer().map(|peer| peer.link),
        };
        cx.out.push(Command::Halt { reason: HaltReason::LostArbitration { current } });
        if let Some(link) = link {
            cx.drop_link(link, DropReason::Over);
        }
        State::Halted { generation }
    }

    // --- Time --------------------------------------------------------------------------------------------------

    pub(crate) fn on_time(mut self: Box<Self>, cx: &mut Cx<'_>) -> State {
        // One that is only being made costs much work to lose and nothing to wait for.
        let cfg = &cx.core.cfg;
        let patience_us = match &self.protection {
            Protection::Starting { .. } => cfg.detection_us.max(cfg.starting_detection_us),
            _ => cfg.detection_us,
        };
        if self.protection.peer().is_some_and(|peer| peer.is_silent(cx.now, patience_us)) {
            self.lose_peer(cx, LossReason::Silent);
        }
        let released = self.released;
        if let Some(peer) = self.protection.peer_mut() {
            peer.tick(cx, released);
        }
        if let Some(inquiry) = self.protection.inquiry_mut() {
            inquiry.tick(cx);
        }
        self.advance_admission(cx);
        self.check_deadlines(cx);
        self.slow_down(cx);
        State::Live(self)
    }

    fn check_deadlines(&mut self, cx: &mut Cx<'_>) {
        let cfg = &cx.core.cfg;
        match &self.protection {
            Protection::Alone { reason, retry_at } => {
                let never = reason.is_some() && cfg.breaks(Mutation::NeverReplace);
                if cx.core.wanted
                    && cx.now >= *retry_at
                    && !never
                    && let Some(host) = cx.core.pick_candidate()
                {
                    let attempt = cx.core.next_attempt();
                    cx.out.push(Command::StartProtect { attempt, host: host.clone() });
                    self.protection =
                        Protection::Starting { attempt, host, peer: None, since: cx.now };
                }
            }
            Protection::Starting { since, peer, .. } => {
                let is_late = cx.now.micros_since(*since) > cfg.protect_timeout_us;
                let is_flooded = peer
                    .as_ref()
                    .is_some_and(|peer| peer.bytes_before_loaded > cfg.catch_up_bytes_max);
                if is_late || is_flooded {
                    self.lose_peer(cx, LossReason::TooSlow);
                }
            }
            Protection::Switching {
                peer,
                step: Switch::Releasing { until } | Switch::Handed { until },
            } if cx.now >= *until => {
                if let Some(peer) = peer {
                    cx.drop_link(peer.link, DropReason::Over);
                }
                self.protection = self.dropping(cx, LossReason::SwitchOverTimedOut, None);
            }
            Protection::Switching { .. }
            | Protection::Admitting { .. }
            | Protection::Protected { .. }
            | Protection::Dropping { .. }
            | Protection::Stopping { .. } => {}
        }
    }

    /// Keeps the lag and the held outputs bounded: slower the larger the lag is, waiting at the hard limits.
    fn slow_down(&mut self, cx: &mut Cx<'_>) {
        if matches!(self.protection, Protection::Switching { .. } | Protection::Stopping { .. }) {
            return;
        }
        let is_starting = matches!(self.protection, Protection::Starting { .. });
        let cfg = &cx.core.cfg;
        let lag_us = match self.protection.peer() {
            Some(peer) if peer.is_loaded => self.lag.lag_us(cx.now),
            Some(_) | None => 0,
        };
        let held = self.held.len();
        // The lag of one that is being made starts high and is no reason to make the guest wait.
        let hard_lag_us = if is_starting { 0 } else { lag_us };
        let must_wait = held >= cfg.held_max || hard_lag_us > cfg.lag_hard_us;
        let may_go = held <= cfg.held_max / 2 && hard_lag_us <= cfg.lag_hard_us / 2;
        if must_wait && !self.is_paused {
            self.is_paused = true;
            cx.out.push(Command::PauseVcpu);
        } else if may_go && self.is_paused {
            self.is_paused = false;
            cx.out.push(Command::ResumeVcpu);
        }
        if lag_us < self.lowest_lag.0 || lag_us <= cfg.lag_soft_us {
            self.lowest_lag = (lag_us, cx.now);
        }
        let gains = is_starting && cx.now.micros_since(self.lowest_lag.1) < cfg.catch_up_stall_us;
        if cx.now < self.next_throttle {
            return;
        }
        self.next_throttle = cx.now.after(cfg.heartbeat_us);
        let before = self.throttle_permille;
        let lag_us = if gains { 0 } else { lag_us };
        self.throttle_permille = throttle_permille(before, lag_us, cfg.lag_soft_us);
        if self.throttle_permille != before {
            cx.out.push(Command::Throttle { permille: self.throttle_permille });
        }
    }
}

/// How much of its time a primary loses whose secondary is so far behind, a heartbeat after it lost `before`: none up to half
/// of the soft limit, a third of the most at the limit. In proportion to the lag, which grows with the difference of their
/// speeds: both settle where the secondary just keeps up, and neither waits for the other.
fn throttle_permille(before: u32, lag_us: u64, soft_us: u64) -> u32 {
    let from = soft_us / 2;
    let most = u64::from(THROTTLE_MAX_PERMILLE);
    let permille = lag_us.saturating_sub(from).saturating_mul(most)
        / soft_us.saturating_mul(3).div_ceil(2).max(1);
    (permille.min(most) as u32).min(before + THROTTLE_STEP_PERMILLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn primary_and_slower_secondary_settle_without_either_waiting() {
        const SOFT_US: u64 = 300_000;
        const TURN_US: u64 = 20_000;
        for speed_permille in [950, 800, 500, 200] {
            let (mut lag_us, mut throttle) = (0, 0);
            let mut lags = Vec::new();
            for _ in 0..1_000 {
                let produced = TURN_US * u64::from(1_000 - throttle) / 1_000;
                lag_us = (lag_us + produced).saturating_sub(TURN_US * speed_permille / 1_000);
                throttle = throttle_permille(throttle, lag_us, SOFT_US);
                lags.push(lag_us);
            }
            let late = &lags[500..];
            let (least, largest) = (late.iter().min().unwrap(), late.iter().max().unwrap());
            assert!(*least > SOFT_US / 2, "{speed_permille}: the secondary would wait, {least}");
            assert!(*largest < 2 * SOFT_US, "{speed_permille}: {largest}");
            assert!(largest - least < 10_000, "{speed_permille}: {least} to {largest}");
            assert!(lags.iter().all(|lag| *lag < 3 * SOFT_US), "{speed_permille}");
        }
    }
}

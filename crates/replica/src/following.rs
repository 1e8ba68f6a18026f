//! The secondary: following a primary, and going live when it is lost.
//!
//! # Invariants
//! - INV-REPLICA-3: a claim to go live rests on a record newer than this session that names this host.
//! - INV-REPLICA-4: what is acknowledged is replayed before going live; from the decision on nothing is acknowledged.

use eventlog::LogPos;

use crate::arbitration::{ArbiterReply, Inquiry, Outcome, Record};
use crate::config::{HostId, LinkId, MonoTime, Mutation};
use crate::event::{Command, DropReason, Event};
use crate::live::Live;
use crate::message::Message;
use crate::node::{Cx, State};
use crate::status::{FailoverTiming, NotProtected, Protection, Role, Status};

/// A secondary.
#[derive(Debug)]
pub(crate) struct Following {
    link: LinkId,
    primary: HostId,
    /// Generation that the primary was live by when the session began.
    session: u64,
    /// Generation of the record that names this host in this session, if the primary said so.
    named: Option<u64>,
    is_loaded: bool,
    received: LogPos,
    replayed: LogPos,
    /// Icount up to which outputs are known to have left.
    released: u64,
    echo: u64,
    last_heard: MonoTime,
    next_ack: MonoTime,
}

impl Following {
    pub(crate) fn new(
        now: MonoTime,
        link: LinkId,
        primary: HostId,
        session: u64,
        start: LogPos,
    ) -> Self {
        Self {
            link,
            primary,
            session,
            named: None,
            is_loaded: false,
            received: start,
            replayed: start,
            released: 0,
            echo: 0,
            last_heard: now,
            next_ack: now,
        }
    }

    pub(crate) fn describe(&self, status: &mut Status) {
        status.role = Role::Secondary;
        status.generation = self.named.unwrap_or(self.session);
        status.peer = Some(self.primary.clone());
        status.protection = match self.named {
            Some(_) => Protection::Protected,
            None => Protection::NotProtected(NotProtected::Starting { host: self.primary.clone() }),
        };
    }

    /// This process did not run for a while: the primary's silence says nothing yet.
    pub(crate) fn on_wake(&mut self, cx: &Cx<'_>) {
        self.last_heard = cx.now;
    }

    pub(crate) fn on_time(mut self: Box<Self>, cx: &mut Cx<'_>) -> State {
        let cfg = &cx.core.cfg;
        let patience_us = match self.named {
            Some(_) => cfg.detection_us,
            // Nothing depends on it yet, and much work would be lost.
            None => cfg.detection_us.max(cfg.starting_detection_us),
        };
        if cx.now.micros_since(self.last_heard) > patience_us {
            return self.lose_primary(cx);
        }
        if cx.now >= self.next_ack {
            self.ack(cx);
        }
        State::Following(self)
    }

    fn ack(&mut self, cx: &mut Cx<'_>) {
        self.next_ack = cx.now.after(cx.core.cfg.heartbeat_us);
        let (received, replayed, echo) = (self.received, self.replayed, self.echo);
        cx.send(self.link, Message::Ack { received, replayed, echo });
    }

    pub(crate) fn on_event(mut self: Box<Self>, cx: &mut Cx<'_>, event: Event) -> State {
        match event {
            Event::Message { link, message } if link == self.link => self.on_message(cx, message),
            Event::Message { link, message } => {
                cx.refuse(link, &message);
                State::Following(self)
            }
            Event::LinkClosed { link } if link == self.link => self.lose_primary(cx),
            Event::SnapshotLoaded { link } if link == self.link => {
                self.is_loaded = true;
                cx.send(link, Message::Loaded);
                State::Following(self)
            }
            Event::Replayed { to } => {
                self.replayed = self.replayed.max(to.min(self.received));
                State::Following(self)
            }
            Event::Diverged { at, ours, theirs } => {
                cx.send(self.link, Message::Diverged { at, secondary: ours, primary: theirs });
                self.give_up(cx, true)
            }
            Event::ReplicaFailed { reason } => {
                cx.send(self.link, Message::SecondaryFailed { reason });
                self.give_up(cx, false)
            }
            Event::LinkClosed { .. }
            | Event::SnapshotLoaded { .. }
            | Event::Tick
            | Event::Start
            | Event::Stop
            | Event::SetProtection { .. }
            | Event::SwitchOver
            | Event::Reset
            | Event::ArbiterReply { .. }
            | Event::LogProduced { .. }
            | Event::ProtectStarted { .. }
            | Event::ProtectFailed { .. }
            | Event::SnapshotSent { .. }
            | Event::MachineStopped => State::Following(self),
        }
    }

    fn on_message(mut self: Box<Self>, cx: &mut Cx<'_>, message: Message) -> State {
        self.last_heard = cx.now;
        match message {
            Message::Log { bytes, end, released } => {
                if end.lsn < self.received.lsn || end.icount < self.received.icount {
                    return self.nonsense(cx, "log that goes back");
                }
                self.received = end;
                self.released = self.released.max(released.min(self.received.icount));
                self.ack(cx);
                cx.out.push(Command::Replay { bytes, end });
                State::Following(self)
            }
            Message::Heartbeat { seq, released } => {
                self.echo = self.echo.max(seq);
                self.released = self.released.max(released.min(self.received.icount));
                self.ack(cx);
                State::Following(self)
            }
            Message::Protected { generation } if generation > self.session => {
                self.named = Some(generation);
                State::Following(self)
            }
            Message::SwitchOver { at } if at == self.received && self.is_loaded => {
                let link = Some(self.link);
                self.go_live(cx, link)
            }
            Message::Stop { .. } => self.give_up(cx, false),
            Message::Disks { .. } => State::Following(self),
            Message::Protected { .. } => self.nonsense(cx, "protected by an old record"),
            Message::SwitchOver { .. } => self.nonsense(cx, "switch-over at another position"),
            Message::Hello { .. } => self.nonsense(cx, "second hello"),
            Message::Refused { .. }
            | Message::Loaded
            | Message::Ack { .. }
            | Message::Diverged { .. }
            | Message::SecondaryFailed { .. }
            | Message::Switched { .. } => self.nonsense(cx, "a secondary's message"),
        }
    }

    fn nonsense(self, cx: &mut Cx<'_>, what: &'static str) -> State {
        cx.drop_link(self.link, DropReason::Nonsense(what));
        self.primary_is_lost(cx)
    }

    fn lose_primary(self, cx: &mut Cx<'_>) -> State {
        cx.drop_link(self.link, DropReason::Over);
        self.primary_is_lost(cx)
    }

    fn primary_is_lost(self, cx: &mut Cx<'_>) -> State {
        if self.is_loaded {
            self.go_live(cx, None)
        } else {
            cx.out.push(Command::Discard { keep_state: false });
            State::Idle
        }
    }

    fn give_up(self, cx: &mut Cx<'_>, keep_state: bool) -> State {
        cx.drop_link(self.link, DropReason::Over);
        cx.out.push(Command::Discard { keep_state });
        State::Idle
    }

    fn go_live(self, cx: &mut Cx<'_>, link: Option<LinkId>) -> State {
        let inquiry = match self.named {
            Some(generation) => claim(cx, generation),
            None => Inquiry::read(cx),
        };
        let timing = FailoverTiming {
            last_heard: self.last_heard,
            detected: cx.now,
            arbitrated: cx.now,
            caught_up: cx.now,
            live: cx.now,
        };
        let unasked = cx.core.cfg.breaks(Mutation::GoLiveUnasked) && self.named.is_some();
        let going = GoingLive { following: self, link, inquiry, won: None, timing };
        if unasked {
            let generation = going.following.session + 2;
            let record = Record { generation, live: cx.me(), secondary: None, nonce: 0 };
            return Box::new(GoingLive { won: Some(record), ..going }).finish_if_done(cx);
        }
        State::GoingLive(Box::new(going))
    }
}

fn claim(cx: &mut Cx<'_>, expected: u64) -> Inquiry {
    let me = cx.me();
    Inquiry::claim(cx, expected, me, None)
}

/// A secondary that lost its primary.
#[derive(Debug)]
pub(crate) struct GoingLive {
    following: Following,
    /// The link to the old primary, if the switch is a planned one.
    link: Option<LinkId>,
    inquiry: Inquiry,
    won: Option<Record>,
    timing: FailoverTiming,
}

impl GoingLive {
    pub(crate) fn describe(&self, status: &mut Status) {
        status.role = Role::GoingLive;
        status.generation = match &self.won {
            Some(record) => record.generation,
            None => self.following.named.unwrap_or(self.following.session),
        };
        if self.won.is_none() && self.inquiry.is_failing() {
            status.protection = Protection::NotProtected(NotProtected::AwaitingArbiter);
        }
    }

    pub(crate) fn on_time(mut self: Box<Self>, cx: &mut Cx<'_>) -> State {
        if self.won.is_none() {
            self.inquiry.tick(cx);
        }
        State::GoingLive(self)
    }

    pub(crate) fn on_event(mut self: Box<Self>, cx: &mut Cx<'_>, event: Event) -> State {
        match event {
            Event::ArbiterReply { op, reply } => self.on_reply(cx, op, reply),
            Event::Replayed { to } => {
                let following = &mut self.following;
                let was_behind = following.replayed < following.received;
                following.replayed = following.replayed.max(to.min(following.received));
                if was_behind {
                    self.timing.caught_up = cx.now;
                }
                self.finish_if_done(cx)
            }
            Event::Diverged { .. } => self.discard(cx, true),
            Event::ReplicaFailed { .. } => self.discard(cx, false),
            Event::LinkClosed { link } if Some(link) == self.link => {
                self.link = None;
                State::GoingLive(self)
            }
            Event::Message { link, message } => {
                cx.refuse(link, &message);
                State::GoingLive(self)
            }
            Event::LinkClosed { .. }
            | Event::Tick
            | Event::Start
            | Event::Stop
            | Event::SetProtection { .. }
            | Event::SwitchOver
            | Event::Reset
            | Event::SnapshotLoaded { .. }
            | Event::LogProduced { .. }
            | Event::ProtectStarted { .. }
            | Event::ProtectFailed { .. }
            | Event::SnapshotSent { .. }
            | Event::MachineStopped => State::GoingLive(self),
        }
    }

    fn on_reply(mut self: Box<Self>, cx: &mut Cx<'_>, op: u64, reply: ArbiterReply) -> State {
        if self.won.is_some() {
            return State::GoingLive(self);
        }
        match self.inquiry.on_reply(cx, op, reply) {
            None => State::GoingLive(self),
            Some(Outcome::Won(record)) => {
                self.timing.arbitrated = cx.now;
                self.won = Some(record);
                self.finish_if_done(cx)
            }
            Some(Outcome::Read(current) | Outcome::Lost(current)) => {
                match current.filter(|record| self.is_named_by(cx, record)) {
                    Some(record) => {
                        self.inquiry = claim(cx, record.generation);
                        State::GoingLive(self)
                    }
                    None => self.discard(cx, false),
                }
            }
        }
    }

    fn is_named_by(&self, cx: &Cx<'_>, record: &Record) -> bool {
        let primary_is_live = record.live.as_ref() == Some(&self.following.primary);
        if cx.core.cfg.breaks(Mutation::ClaimUnnamed) {
            return primary_is_live;
        }
        primary_is_live && record.secondary == cx.me() && record.generation > self.following.session
    }

    fn discard(self: Box<Self>, cx: &mut Cx<'_>, keep_state: bool) -> State {
        if let Some(link) = self.link {
            cx.drop_link(link, DropReason::Over);
        }
        cx.out.push(Command::Discard { keep_state });
        State::Idle
    }

    fn finish_if_done(mut self: Box<Self>, cx: &mut Cx<'_>) -> State {
        let following = &self.following;
        let behind = following.replayed.lsn < following.received.lsn;
        let Some(record) = &self.won else { return State::GoingLive(self) };
        if behind && !cx.core.cfg.breaks(Mutation::GoLiveEarly) {
            return State::GoingLive(self);
        }
        let (at, resend_after) = (following.received, following.released);
        self.timing.live = cx.now;
        cx.core.last_failover = Some(self.timing);
        cx.out.push(Command::GoLive { generation: record.generation, at, resend_after });
        if let Some(link) = self.link {
            cx.send(link, Message::Switched { generation: record.generation });
            cx.drop_link(link, DropReason::Over);
        }
        State::Live(Box::new(Live::new(cx, record.clone(), at, at.icount)))
    }
}

//! The state machine as a whole: roles and how they follow each other.
//!
//! # Invariants
//! Every change of role between hosts goes through [`crate::arbitration`] (INV-REPLICA-2).

use eventlog::LogPos;

use crate::arbitration::{Inquiry, Outcome, Record};
use crate::config::{Config, HostId, LAG_HARD_US, LinkId, MonoTime};
use crate::event::{Command, DropReason, Event};
use crate::following::{Following, GoingLive};
use crate::live::Live;
use crate::message::{Message, PROTOCOL_VERSION, RefuseReason};
use crate::status::{FailoverTiming, NotProtected, Protection, Role, Status};

/// The protocol core for one VM on one host.
#[derive(Debug)]
pub struct Node {
    core: Core,
    state: State,
    last_now: MonoTime,
}

/// What every state needs.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) cfg: Config,
    pub(crate) wanted: bool,
    pub(crate) candidates: Vec<HostId>,
    pub(crate) next_candidate: usize,
    pub(crate) last_failover: Option<FailoverTiming>,
    last_op: u64,
    last_attempt: u64,
}

impl Core {
    pub(crate) fn next_op(&mut self) -> u64 {
        self.last_op += 1;
        self.last_op
    }

    pub(crate) fn next_nonce(&mut self) -> u64 {
        self.cfg.nonce_seed.wrapping_add(self.last_op)
    }

    pub(crate) fn next_attempt(&mut self) -> u64 {
        self.last_attempt += 1;
        self.last_attempt
    }

    /// The next host to try, in turn.
    pub(crate) fn pick_candidate(&mut self) -> Option<HostId> {
        for _ in 0..self.candidates.len() {
            let host = &self.candidates[self.next_candidate % self.candidates.len()];
            self.next_candidate = self.next_candidate.wrapping_add(1);
            if *host != self.cfg.host {
                return Some(host.clone());
            }
        }
        None
    }
}

/// One call of [`Node::handle`].
#[derive(Debug)]
pub(crate) struct Cx<'a> {
    pub(crate) now: MonoTime,
    pub(crate) core: &'a mut Core,
    pub(crate) out: &'a mut Vec<Command>,
}

impl Cx<'_> {
    pub(crate) fn send(&mut self, link: LinkId, message: Message) {
        self.out.push(Command::Send { link, message });
    }

    pub(crate) fn drop_link(&mut self, link: LinkId, reason: DropReason) {
        self.out.push(Command::DropLink { link, reason });
    }

    /// Answers the first message on a link that this state has no use for; other late messages are nothing to answer.
    pub(crate) fn refuse(&mut self, link: LinkId, message: &Message) {
        if matches!(message, Message::Hello { .. }) {
            self.refuse_because(link, RefuseReason::Busy);
        }
    }

    fn refuse_because(&mut self, link: LinkId, reason: RefuseReason) {
        self.send(link, Message::Refused { reason });
        self.drop_link(link, DropReason::Refused(reason));
    }

    pub(crate) fn me(&self) -> Option<HostId> {
        Some(self.core.cfg.host.clone())
    }
}

#[derive(Debug)]
pub(crate) enum State {
    /// No copy of the VM here.
    Idle,
    /// Asking for the right to start the VM.
    Starting(Inquiry),
    /// Running it.
    Live(Box<Live>),
    /// Following a primary.
    Following(Box<Following>),
    /// The primary is lost: asking for the right to run, and replaying the rest.
    GoingLive(Box<GoingLive>),
    /// Another host has the VM.
    Halted {
        /// Generation of the record by which this host lost.
        generation: u64,
    },
}

impl Node {
    /// A node that has no copy of the VM.
    #[must_use]
    pub fn new(cfg: Config) -> Self {
        let core = Core {
            cfg,
            wanted: false,
            candidates: Vec::new(),
            next_candidate: 0,
            last_failover: None,
            last_op: 0,
            last_attempt: 0,
        };
        Self { core, state: State::Idle, last_now: MonoTime::default() }
    }

    /// Takes an event and appends what is to be done to `out`, in order.
    pub fn handle(&mut self, now: MonoTime, event: Event, out: &mut Vec<Command>) {
        let gap = now.micros_since(self.last_now);
        self.last_now = self.last_now.max(now);
        let mut event = event;
        if let Event::SetProtection { wanted, candidates } = &mut event {
            self.core.wanted = *wanted;
            self.core.candidates = std::mem::take(candidates);
        }
        let has_slept = gap > self.core.cfg.detection_us;
        let mut cx = Cx { now: self.last_now, core: &mut self.core, out };
        let mut state = std::mem::replace(&mut self.state, State::Idle);
        if has_slept {
            state.on_wake(&cx);
        }
        self.state = state.on_event(&mut cx, event).on_time(&mut cx);
    }

    /// Sets the lag at which a live host loses a third of the time that it loses at most, in microseconds
    /// ([`Config::lag_soft_us`]). It waits where all of that is lost, at
    /// twice that lag, and no sooner than otherwise.
    pub fn bound_lag(&mut self, soft_us: u64) {
        let cfg = &mut self.core.cfg;
        cfg.lag_soft_us = soft_us;
        cfg.lag_hard_us = LAG_HARD_US.max(soft_us.saturating_mul(2));
    }

    /// What [`Self::bound_lag`] was told last, or the configuration says.
    #[must_use]
    pub fn lag_bound_us(&self) -> u64 {
        self.core.cfg.lag_soft_us
    }

    /// When [`Event::Tick`] is due, if nothing else happens before.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<MonoTime> {
        match &self.state {
            State::Idle | State::Halted { .. } => None,
            State::Starting(_) | State::Live(_) | State::Following(_) | State::GoingLive(_) => {
                Some(self.last_now.after(self.core.cfg.heartbeat_us))
            }
        }
    }

    /// Whether this is a live host whose outputs need nobody's leave.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        matches!(&self.state, State::Live(live) if live.is_alone())
    }

    /// The present state, for people.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = Status {
            role: Role::Spare,
            protection: Protection::NotProtected(NotProtected::VmNotRunning),
            generation: 0,
            peer: None,
            lag_us: 0,
            held: 0,
            throttle_permille: 0,
            last_failover: self.core.last_failover,
        };
        match &self.state {
            State::Idle => {}
            State::Starting(inquiry) => {
                status.role = Role::Primary;
                if inquiry.is_failing() {
                    status.protection = Protection::NotProtected(NotProtected::AwaitingArbiter);
                }
            }
            State::Live(live) => live.describe(self.last_now, self.core.wanted, &mut status),
            State::Following(following) => following.describe(&mut status),
            State::GoingLive(going) => going.describe(&mut status),
            State::Halted { generation } => {
                status.role = Role::Halted;
                status.generation = *generation;
            }
        }
        status
    }
}

impl State {
    fn on_wake(&mut self, cx: &Cx<'_>) {
        match self {
            Self::Live(live) => live.on_wake(cx),
            Self::Following(following) => following.on_wake(cx),
            Self::Idle | Self::Starting(_) | Self::GoingLive(_) | Self::Halted { .. } => {}
        }
    }

    fn on_event(self, cx: &mut Cx<'_>, event: Event) -> Self {
        match self {
            Self::Idle => idle(cx, event),
            Self::Starting(inquiry) => starting(cx, inquiry, event),
            Self::Live(live) => live.on_event(cx, event),
            Self::Following(following) => following.on_event(cx, event),
            Self::GoingLive(going) => going.on_event(cx, event),
            Self::Halted { generation } => halted(cx, generation, &event),
        }
    }

    fn on_time(self, cx: &mut Cx<'_>) -> Self {
        match self {
            Self::Idle => Self::Idle,
            Self::Starting(mut inquiry) => {
                inquiry.tick(cx);
                Self::Starting(inquiry)
            }
            Self::Live(live) => live.on_time(cx),
            Self::Following(following) => following.on_time(cx),
            Self::GoingLive(going) => going.on_time(cx),
            Self::Halted { generation } => Self::Halted { generation },
        }
    }
}

fn idle(cx: &mut Cx<'_>, event: Event) -> State {
    match event {
        Event::Start => State::Starting(Inquiry::read(cx)),
        Event::Message {
            link,
            message: Message::Hello { version, vm, host, generation, start },
        } => {
            if version != PROTOCOL_VERSION {
                cx.refuse_because(link, RefuseReason::Version);
                State::Idle
            } else if vm != cx.core.cfg.vm || host == cx.core.cfg.host {
                cx.refuse_because(link, RefuseReason::WrongVm);
                State::Idle
            } else {
                cx.out.push(Command::LoadSnapshot { link, at: start });
                let following = Following::new(cx.now, link, host, generation, start);
                State::Following(Box::new(following))
            }
        }
        Event::Message { .. }
        | Event::Tick
        | Event::Stop
        | Event::SetProtection { .. }
        | Event::SwitchOver
        | Event::Reset
        | Event::ArbiterReply { .. }
        | Event::LinkClosed { .. }
        | Event::LogProduced { .. }
        | Event::ProtectStarted { .. }
        | Event::ProtectFailed { .. }
        | Event::SnapshotSent { .. }
        | Event::MachineStopped
        | Event::SnapshotLoaded { .. }
        | Event::Replayed { .. }
        | Event::Diverged { .. }
        | Event::ReplicaFailed { .. } => State::Idle,
    }
}

fn starting(cx: &mut Cx<'_>, mut inquiry: Inquiry, event: Event) -> State {
    match event {
        Event::ArbiterReply { op, reply } => match inquiry.on_reply(cx, op, reply) {
            None => State::Starting(inquiry),
            Some(Outcome::Read(record)) => start_from(cx, record),
            Some(Outcome::Lost(current)) => {
                cx.out.push(Command::StartRefused { current });
                State::Idle
            }
            Some(Outcome::Won(record)) => {
                cx.out.push(Command::RunFresh { generation: record.generation });
                State::Live(Box::new(Live::new(cx, record, LogPos::default(), 0)))
            }
        },
        Event::Stop => {
            cx.out.push(Command::Stopped);
            State::Idle
        }
        Event::Message { link, message } => {
            cx.refuse(link, &message);
            State::Starting(inquiry)
        }
        Event::Tick
        | Event::Start
        | Event::SetProtection { .. }
        | Event::SwitchOver
        | Event::Reset
        | Event::LinkClosed { .. }
        | Event::LogProduced { .. }
        | Event::ProtectStarted { .. }
        | Event::ProtectFailed { .. }
        | Event::SnapshotSent { .. }
        | Event::MachineStopped
        | Event::SnapshotLoaded { .. }
        | Event::Replayed { .. }
        | Event::Diverged { .. }
        | Event::ReplicaFailed { .. } => State::Starting(inquiry),
    }
}

/// A VM may be started by whom it last ran on, or by anybody after it was stopped; never while another host runs it
/// or may still take it over.
fn start_from(cx: &mut Cx<'_>, record: Option<Record>) -> State {
    let me = cx.me();
    let (expected, may) = match &record {
        None => (0, true),
        Some(r) => {
            let is_mine = r.live == me && (r.secondary.is_none() || r.secondary == me);
            (r.generation, r.live.is_none() || is_mine)
        }
    };
    if may {
        State::Starting(Inquiry::claim(cx, expected, me, None))
    } else {
        cx.out.push(Command::StartRefused { current: record });
        State::Idle
    }
}

fn halted(cx: &mut Cx<'_>, generation: u64, event: &Event) -> State {
    match event {
        Event::Reset => State::Idle,
        Event::Message { link, message } => {
            cx.refuse(*link, message);
            State::Halted { generation }
        }
        Event::Tick
        | Event::Start
        | Event::Stop
        | Event::SetProtection { .. }
        | Event::SwitchOver
        | Event::ArbiterReply { .. }
        | Event::LinkClosed { .. }
        | Event::LogProduced { .. }
        | Event::ProtectStarted { .. }
        | Event::ProtectFailed { .. }
        | Event::SnapshotSent { .. }
        | Event::MachineStopped
        | Event::SnapshotLoaded { .. }
        | Event::Replayed { .. }
        | Event::Diverged { .. }
        | Event::ReplicaFailed { .. } => State::Halted { generation },
    }
}

#[cfg(test)]
mod tests;

//! One event, one answer: the rules of the protocol one by one, and a peer that says anything at all.

use proptest::prelude::*;

use super::*;
use crate::arbitration::ArbiterReply;
use crate::config::VmId;
use crate::event::HaltReason;
use crate::status::LossReason;

const LINK: LinkId = LinkId(7);

fn host(name: &str) -> HostId {
    HostId(name.into())
}

fn pos(lsn: u64, icount: u64) -> LogPos {
    LogPos { lsn, icount }
}

struct Bench {
    node: Node,
    now: u64,
}

impl Bench {
    fn new(name: &str) -> Self {
        let mut cfg = Config::new(VmId([1; 16]), host(name), 1000);
        cfg.held_max = 4;
        Self { node: Node::new(cfg), now: 1_000_000 }
    }

    /// Feeds an event and gives what is to be done, heartbeats left out.
    fn feed(&mut self, event: Event) -> Vec<Command> {
        let mut out = vec![];
        self.node.handle(MonoTime(self.now), event, &mut out);
        out.retain(|command| {
            !matches!(command, Command::Send { message: Message::Heartbeat { .. }, .. })
        });
        out
    }

    fn after(&mut self, micros: u64) -> &mut Self {
        self.now += micros;
        self
    }

    fn message(&mut self, message: Message) -> Vec<Command> {
        self.feed(Event::Message { link: LINK, message })
    }

    fn reply(&mut self, op: u64, reply: ArbiterReply) -> Vec<Command> {
        self.feed(Event::ArbiterReply { op, reply })
    }

    fn log(&mut self, lsn: u64, icount: u64, outputs: bool) -> Vec<Command> {
        let outputs_up_to = outputs.then_some(icount);
        self.feed(Event::LogProduced { bytes: vec![1], end: pos(lsn, icount), outputs_up_to })
    }

    fn ack(&mut self, received: LogPos, echo: u64) -> Vec<Command> {
        self.message(Message::Ack { received, replayed: received, echo })
    }

    /// A primary that runs alone by generation 1.
    fn alone() -> Self {
        let mut bench = Self::new("a");
        bench.feed(Event::SetProtection { wanted: true, candidates: vec![host("a"), host("b")] });
        assert_eq!(bench.feed(Event::Start), [Command::ArbiterRead { op: 1 }]);
        bench.reply(1, ArbiterReply::Read(None));
        let out = bench.reply(2, ArbiterReply::Won);
        assert_eq!(
            out,
            [
                Command::RunFresh { generation: 1 },
                Command::StartProtect { attempt: 1, host: host("b") }
            ]
        );
        bench
    }

    /// The same with secondary b in sync, about to be named.
    fn admitting() -> Self {
        let mut bench = Self::alone();
        bench.log(1, 10, false);
        bench.feed(Event::ProtectStarted { attempt: 1, link: LINK, at: pos(1, 10) });
        assert_eq!(bench.log(2, 20, true).last(), Some(&Command::Release { up_to_icount: 20 }));
        assert_eq!(bench.message(Message::Loaded), []);
        let out = bench.ack(pos(2, 20), 1);
        assert!(matches!(out[..], [Command::ArbiterCas { op: 3, expected: 1, .. }]), "{out:?}");
        bench
    }

    fn protected() -> Self {
        let mut bench = Self::admitting();
        let out = bench.reply(3, ArbiterReply::Won);
        let message = Message::Protected { generation: 2 };
        assert_eq!(out, [Command::Send { link: LINK, message }]);
        bench
    }

    /// A secondary that has loaded its snapshot.
    fn following() -> Self {
        let mut bench = Self::new("b");
        let out = bench.message(Message::Hello {
            version: PROTOCOL_VERSION,
            vm: VmId([1; 16]),
            host: host("a"),
            generation: 5,
            start: pos(1, 10),
        });
        assert_eq!(out[0], Command::LoadSnapshot { link: LINK, at: pos(1, 10) });
        bench.feed(Event::SnapshotLoaded { link: LINK });
        bench
    }

    fn receive(&mut self, lsn: u64, icount: u64, released: u64) -> Vec<Command> {
        self.message(Message::Log { bytes: vec![9], end: pos(lsn, icount), released })
    }
}

fn record(generation: u64, live: &str, secondary: Option<&str>) -> Record {
    Record { generation, live: Some(host(live)), secondary: secondary.map(host), nonce: 99 }
}

#[test]
fn output_of_a_protected_primary_waits_for_its_ack() {
    let mut a = Bench::protected();
    let log = a.log(3, 30, true);
    assert!(matches!(log[..], [Command::Send { message: Message::Log { released: 20, .. }, .. }]));
    a.log(4, 40, true);
    assert_eq!(a.ack(pos(3, 30), 1), [Command::Release { up_to_icount: 30 }]);
    assert_eq!(a.ack(pos(4, 40), 1), [Command::Release { up_to_icount: 40 }]);
}

#[test]
fn output_is_held_before_the_secondary_is_named() {
    let mut a = Bench::admitting();
    assert_eq!(a.log(3, 30, true).len(), 1);
    assert_eq!(a.ack(pos(3, 30), 1), [Command::Release { up_to_icount: 30 }]);
}

#[test]
fn ack_from_before_a_pause_releases_nothing() {
    let mut a = Bench::protected();
    a.log(3, 30, true);
    a.after(500_000);
    assert_eq!(a.ack(pos(3, 30), 1), []);
    assert_eq!(a.node.status().held, 1);
    assert_eq!(a.ack(pos(3, 30), 2), [Command::Release { up_to_icount: 30 }]);
}

#[test]
fn primary_goes_on_alone_only_by_the_arbiter() {
    let mut a = Bench::protected();
    a.log(3, 30, true);
    let out = a.feed(Event::LinkClosed { link: LINK });
    assert!(matches!(out[..], [_, Command::ArbiterCas { op: 4, expected: 2, .. }]), "{out:?}");
    assert_eq!(a.log(4, 40, true), []);
    assert_eq!(a.reply(4, ArbiterReply::Won), [Command::Release { up_to_icount: 40 }]);
    let reason = Some(LossReason::LinkClosed);
    let want = Protection::NotProtected(NotProtected::NeedSecondary { reason });
    assert_eq!(a.node.status().protection, want);
    assert_eq!(
        a.after(500_000).feed(Event::Tick),
        [Command::StartProtect { attempt: 2, host: host("b") }]
    );
}

#[test]
fn primary_that_loses_the_arbitration_halts() {
    let mut a = Bench::protected();
    a.log(3, 30, true);
    a.feed(Event::LinkClosed { link: LINK });
    let current = Some(record(3, "b", None));
    let reason = HaltReason::LostArbitration { current: current.clone() };
    assert_eq!(a.reply(4, ArbiterReply::Lost(current)), [Command::Halt { reason }]);
    assert_eq!(a.node.status().role, Role::Halted);
}

#[test]
fn claim_without_an_answer_is_repeated_and_recognised() {
    let mut a = Bench::protected();
    a.log(3, 30, true);
    let first = a.feed(Event::LinkClosed { link: LINK }).pop();
    assert_eq!(a.reply(4, ArbiterReply::Unreachable), []);
    assert_eq!(a.feed(Event::Tick), []);
    let again = a.after(20_000).feed(Event::Tick).pop();
    assert_eq!(again, first);
    let Some(Command::ArbiterCas { new, .. }) = again else { panic!("{again:?}") };
    let out = a.reply(4, ArbiterReply::Lost(Some(new)));
    assert_eq!(out, [Command::Release { up_to_icount: 30 }]);
}

#[test]
fn naming_that_was_stored_after_all_is_undone() {
    let mut a = Bench::admitting();
    a.log(3, 30, true);
    a.feed(Event::LinkClosed { link: LINK });
    let out = a.reply(4, ArbiterReply::Lost(Some(record(2, "a", Some("b")))));
    assert!(matches!(out[..], [Command::ArbiterCas { op: 5, expected: 2, .. }]), "{out:?}");
    assert_eq!(a.reply(5, ArbiterReply::Won), [Command::Release { up_to_icount: 30 }]);
}

#[test]
fn silent_secondary_is_lost_after_the_detection_time() {
    let mut a = Bench::protected();
    for _ in 0..5 {
        assert_eq!(a.after(20_000).feed(Event::Tick), []);
    }
    let out = a.after(20_000).feed(Event::Tick);
    assert!(matches!(out[..], [Command::DropLink { .. }, Command::ArbiterCas { .. }]), "{out:?}");
}

#[test]
fn too_much_held_output_stops_the_vcpus() {
    let mut a = Bench::protected();
    let mut out = vec![];
    for lsn in 3..7 {
        out = a.log(lsn, lsn * 10, true);
    }
    assert_eq!(out.last(), Some(&Command::PauseVcpu));
    for lsn in 7..50 {
        a.log(lsn, lsn * 10, true);
    }
    assert_eq!(a.node.status().held, 8);
    let out = a.ack(pos(49, 490), 1);
    assert_eq!(out, [Command::Release { up_to_icount: 490 }, Command::ResumeVcpu]);
}

#[test]
fn secondary_that_is_being_made_is_given_time_and_never_stops_the_vcpus() {
    let mut a = Bench::alone();
    a.log(1, 10, false);
    a.feed(Event::ProtectStarted { attempt: 1, link: LINK, at: pos(1, 10) });
    let mut pauses = 0;
    for lsn in 2..150 {
        let out = a.after(20_000).log(lsn, lsn * 10, true);
        pauses += out.iter().filter(|c| matches!(c, Command::PauseVcpu)).count();
        assert!(!out.iter().any(|c| matches!(c, Command::DropLink { .. })), "{lsn}: {out:?}");
    }
    a.message(Message::Loaded);
    let mut throttled = 0;
    for lsn in 150..250 {
        let out = a.after(20_000).log(lsn, lsn * 10, true);
        pauses += out.iter().filter(|c| matches!(c, Command::PauseVcpu)).count();
        throttled += out.iter().filter(|c| matches!(c, Command::Throttle { .. })).count();
        a.message(Message::Ack { received: pos(lsn, lsn * 10), replayed: pos(1, 10), echo: 0 });
    }
    assert_eq!(pauses, 0);
    assert!(throttled > 10, "a secondary that does not gain needs a slower primary");
}

#[test]
fn secondary_acknowledges_on_receipt() {
    let mut b = Bench::following();
    let out = b.receive(2, 20, 10);
    let ack = Message::Ack { received: pos(2, 20), replayed: pos(1, 10), echo: 0 };
    assert_eq!(
        out,
        [
            Command::Send { link: LINK, message: ack },
            Command::Replay { bytes: vec![9], end: pos(2, 20) }
        ]
    );
}

#[test]
fn named_secondary_goes_live_after_winning_and_replaying() {
    let mut b = Bench::following();
    b.message(Message::Protected { generation: 6 });
    b.receive(2, 20, 10);
    b.receive(3, 20, 15);
    let out = b.feed(Event::LinkClosed { link: LINK });
    assert!(matches!(out[..], [_, Command::ArbiterCas { op: 1, expected: 6, .. }]), "{out:?}");
    assert_eq!(b.feed(Event::Replayed { to: pos(2, 20) }), []);
    assert_eq!(b.reply(1, ArbiterReply::Won), []);
    let out = b.after(10).feed(Event::Replayed { to: pos(3, 20) });
    assert_eq!(out, [Command::GoLive { generation: 7, at: pos(3, 20), resend_after: 15 }]);
    let timing = b.node.status().last_failover.unwrap();
    assert_eq!(timing.live.micros_since(timing.detected), 10);
}

#[test]
fn secondary_that_is_not_named_in_this_session_is_discarded() {
    for found in [record(5, "a", Some("b")), record(6, "a", Some("c")), record(6, "c", Some("b"))] {
        let mut b = Bench::following();
        let out = b.feed(Event::LinkClosed { link: LINK });
        assert_eq!(out[1..], [Command::ArbiterRead { op: 1 }]);
        let out = b.reply(1, ArbiterReply::Read(Some(found)));
        assert_eq!(out, [Command::Discard { keep_state: false }]);
    }
    let mut b = Bench::following();
    b.feed(Event::LinkClosed { link: LINK });
    let out = b.reply(1, ArbiterReply::Read(Some(record(6, "a", Some("b")))));
    assert!(matches!(out[..], [Command::ArbiterCas { expected: 6, .. }]));
}

#[test]
fn divergence_keeps_the_state_and_is_reported() {
    let mut b = Bench::following();
    let out = b.feed(Event::Diverged { at: pos(2, 20), ours: 1, theirs: 2 });
    let message = Message::Diverged { at: pos(2, 20), secondary: 1, primary: 2 };
    assert_eq!(out[0], Command::Send { link: LINK, message: message.clone() });
    assert_eq!(out[2], Command::Discard { keep_state: true });
    let mut a = Bench::protected();
    a.message(message);
    let want = NotProtected::NeedSecondary { reason: Some(LossReason::Diverged { icount: 20 }) };
    assert_eq!(a.node.status().protection, Protection::NotProtected(want));
}

#[test]
fn planned_switch_changes_roles() {
    let mut a = Bench::protected();
    assert_eq!(a.feed(Event::SwitchOver), [Command::StopMachine]);
    a.log(3, 30, true);
    assert_eq!(a.feed(Event::MachineStopped), []);
    // The secondary hears that nothing is left to send before it hears that it is its turn.
    let mut out = vec![];
    let ack = Message::Ack { received: pos(3, 30), replayed: pos(3, 30), echo: 1 };
    a.node.handle(MonoTime(a.now), Event::Message { link: LINK, message: ack }, &mut out);
    assert_eq!(out[0], Command::Release { up_to_icount: 30 });
    let message = |i: usize| match &out[i] {
        Command::Send { link: LINK, message } => message.clone(),
        other => panic!("{other:?}"),
    };
    assert!(matches!(message(1), Message::Heartbeat { released: 30, .. }), "{out:?}");
    assert_eq!(message(2), Message::SwitchOver { at: pos(3, 30) });
    let out = a.message(Message::Switched { generation: 3 });
    assert_eq!(out[1], Command::Discard { keep_state: false });
    assert_eq!(a.node.status().role, Role::Spare);
}

#[test]
fn planned_switch_whose_outputs_nobody_acknowledges_ends() {
    let mut a = Bench::protected();
    a.feed(Event::SwitchOver);
    a.log(3, 30, true);
    a.feed(Event::MachineStopped);
    assert!(
        a.feed(Event::LinkClosed { link: LINK })
            .iter()
            .all(|c| !matches!(c, Command::Release { .. }))
    );
    let want = NotProtected::NeedSecondary { reason: Some(LossReason::LinkClosed) };
    assert_eq!(a.node.status().protection, Protection::NotProtected(want));
}

#[test]
fn stop_frees_the_record_and_the_secondary() {
    let mut a = Bench::protected();
    let out = a.feed(Event::Stop);
    let Some(Command::ArbiterCas { new, .. }) = out.last() else { panic!("{out:?}") };
    assert_eq!((&new.live, &new.secondary), (&None, &None));
    let off = Some(new.generation);
    let out = a.reply(4, ArbiterReply::Won);
    assert_eq!(out[0], Command::Send { link: LINK, message: Message::Stop { off } });
    assert_eq!(out.last(), Some(&Command::Stopped));
}

#[test]
fn vm_is_not_started_where_another_host_has_it() {
    for found in [record(3, "b", None), record(3, "a", Some("b"))] {
        let mut a = Bench::new("a");
        a.feed(Event::Start);
        let out = a.reply(1, ArbiterReply::Read(Some(found.clone())));
        assert_eq!(out, [Command::StartRefused { current: Some(found) }]);
    }
}

#[test]
fn nonsense_costs_the_link() {
    let mut a = Bench::protected();
    let out = a.ack(pos(9, 90), 1);
    assert!(matches!(out[0], Command::DropLink { reason: DropReason::Nonsense(_), .. }));
    let mut b = Bench::following();
    let out = b.message(Message::Loaded);
    assert!(matches!(out[0], Command::DropLink { reason: DropReason::Nonsense(_), .. }));
}

fn any_message() -> impl Strategy<Value = Message> {
    let number = || prop_oneof![0u64..8, any::<u64>()];
    let place = || (number(), number()).prop_map(|(lsn, icount)| LogPos { lsn, icount });
    prop_oneof![
        (any::<u8>(), number(), place()).prop_map(|(version, generation, start)| Message::Hello {
            version: version % 2,
            vm: VmId([1; 16]),
            host: HostId("x".into()),
            generation,
            start,
        }),
        Just(Message::Refused { reason: RefuseReason::Busy }),
        Just(Message::Loaded),
        number().prop_map(|generation| Message::Protected { generation }),
        (place(), number()).prop_map(|(end, released)| Message::Log {
            bytes: vec![],
            end,
            released
        }),
        (place(), place(), number()).prop_map(|(received, replayed, echo)| Message::Ack {
            received,
            replayed,
            echo
        }),
        (number(), number()).prop_map(|(seq, released)| Message::Heartbeat { seq, released }),
        place().prop_map(|at| Message::Diverged { at, secondary: 0, primary: 1 }),
        Just(Message::SecondaryFailed { reason: String::new() }),
        place().prop_map(|at| Message::SwitchOver { at }),
        number().prop_map(|generation| Message::Switched { generation }),
        Just(Message::Stop { off: None }),
        Just(Message::Disks { note: vec![1] }),
    ]
}

proptest! {
    #[test]
    fn no_message_panics(
        role in 0..5,
        steps in prop::collection::vec((any_message(), 0u64..200_000, any::<bool>()), 0..30),
    ) {
        let mut bench = match role {
            0 => Bench::new("b"),
            1 => Bench::alone(),
            2 => Bench::admitting(),
            3 => Bench::protected(),
            _ => Bench::following(),
        };
        for (message, micros, wins) in steps {
            let mut todo = bench.after(micros).message(message);
            for _ in 0..5 {
                let Some(command) = todo.pop() else { break };
                if let Command::ArbiterCas { op, .. } = command {
                    let lost = ArbiterReply::Lost(Some(record(u64::MAX, "b", Some("b"))));
                    todo.extend(bench.reply(op, if wins { ArbiterReply::Won } else { lost }));
                }
            }
            prop_assert!(bench.node.status().held <= 8);
        }
    }
}

#[test]
fn a_bound_of_the_lag_is_one_that_can_be_taken_back() {
    let mut node = Node::new(Config::new(VmId([0; 16]), HostId("a".into()), 1));
    let default = (node.lag_bound_us(), node.core.cfg.lag_hard_us);
    node.bound_lag(5_000_000);
    assert_eq!((node.lag_bound_us(), node.core.cfg.lag_hard_us), (5_000_000, 10_000_000));
    node.bound_lag(default.0);
    assert_eq!((node.lag_bound_us(), node.core.cfg.lag_hard_us), default);
}

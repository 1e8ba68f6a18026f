//! The simulated world: time, the order of things, and one run from start through faults to healing.

use std::collections::{BTreeMap, BTreeSet};

use replica::{ArbiterReply, Event, Message, MonoTime, Mutation, Protection, Role};

use crate::arbiter::{Arbiter, Ask};
use crate::checks::{Checks, Violation};
use crate::net::{self, Arrival, Net, Packet};
use crate::rng::Rng;
use crate::shell::{Host, ToHost};

/// Number of hosts.
pub(crate) const HOSTS: usize = 3;
/// The arbiter, as a node of the network.
pub(crate) const ARBITER: usize = HOSTS;
/// Detection time of the hosts.
pub(crate) const DETECTION_US: u64 = 20_000;

const START_US: u64 = 30_000;
const HEAL_US: u64 = 1_500_000;
const CLIENT_US: u64 = 2_000;
const OUTSTANDING_MAX: usize = 4;

/// What to simulate.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long faults happen, in simulated microseconds.
    pub faults_us: u64,
    /// A rule that all hosts break.
    pub mutation: Option<Mutation>,
}

impl Default for Options {
    fn default() -> Self {
        Self { faults_us: 500_000, mutation: None }
    }
}

/// What happened in a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Generation of the arbiter's record at the end.
    pub generation: u64,
    /// How often a secondary went live.
    pub failovers: u64,
    /// Outputs released.
    pub releases: u64,
    /// Writes acknowledged to the client.
    pub writes_acked: u64,
    /// Events handled.
    pub events: u64,
    /// Faults injected.
    pub faults: u64,
    /// The VM was lost, as it must be when all of its copies are.
    pub is_lost: bool,
    /// Time from the last fault until it was protected again.
    pub healed_in_us: u64,
}

/// Runs the history of `seed`.
///
/// # Errors
/// The first broken invariant.
pub fn run(seed: u64) -> Result<Report, Violation> {
    run_with(seed, Options::default())
}

/// Runs the history of `seed` with other options.
///
/// # Errors
/// The first broken invariant.
pub fn run_with(seed: u64, options: Options) -> Result<Report, Violation> {
    let mut world = World::new(seed, options);
    world.play()?;
    Ok(world.report)
}

/// Runs the history of `seed` and tells it, event by event, to `teller`.
///
/// # Errors
/// The first broken invariant.
pub fn run_told(seed: u64, options: Options, teller: fn(&str)) -> Result<Report, Violation> {
    let mut world = World::new(seed, options);
    world.teller = Some(teller);
    world.play()?;
    Ok(world.report)
}

/// Hosts of a record, each with how often it had lost its copy when the record was asked for or stored.
#[derive(Debug, Clone, Copy)]
struct Stamp {
    writer: (usize, u64),
    secondary: Option<(usize, u64)>,
}

#[derive(Debug)]
pub(crate) enum Ev {
    Host { host: usize, incarnation: u64, what: ToHost },
    Arrival { link: usize, direction: usize },
    Ask { host: usize, incarnation: u64, op: u64, ask: Ask, is_answered: bool, losses: u64 },
    Client,
    Fault,
    Mend(usize, usize),
    Resume(usize),
    Restart(usize),
    ArbiterUp,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    pub(crate) options: Options,
    pub(crate) hosts: Vec<Host>,
    pub(crate) net: Net,
    pub(crate) arbiter: Arbiter,
    pub(crate) checks: Checks,
    pub(crate) report: Report,
    pub(crate) has_faults: bool,
    /// For each link, the state of the primary's machine at each log position it sent.
    pub(crate) traces: BTreeMap<u64, BTreeMap<u64, u64>>,
    /// For each record, whose it was.
    stamps: Vec<Stamp>,
    /// Which host was told of being secondary by which generation.
    told: BTreeSet<(usize, u64)>,
    queue: BTreeMap<(u64, u64), Ev>,
    scheduled: u64,
    next_write: u64,
    outstanding: BTreeMap<u64, u64>,
    teller: Option<fn(&str)>,
}

impl World {
    fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let hosts = (0..HOSTS).map(|index| Host::new(index, rng.range(0, 1 << 40))).collect();
        let checks = Checks { detection_us: DETECTION_US, ..Checks::default() };
        Self {
            now: 0,
            rng,
            options,
            hosts,
            net: Net::default(),
            arbiter: Arbiter::default(),
            checks,
            report: Report::default(),
            has_faults: false,
            traces: BTreeMap::new(),
            stamps: vec![],
            told: BTreeSet::new(),
            queue: BTreeMap::new(),
            scheduled: 0,
            next_write: 1,
            outstanding: BTreeMap::new(),
            teller: None,
        }
    }

    pub(crate) fn schedule(&mut self, at: u64, event: Ev) {
        self.scheduled += 1;
        self.queue.insert((at.max(self.now), self.scheduled), event);
    }

    pub(crate) fn schedule_host(&mut self, after: u64, host: usize, what: ToHost) {
        let incarnation = self.hosts[host].incarnation;
        self.schedule(self.now + after, Ev::Host { host, incarnation, what });
    }

    pub(crate) fn schedule_arrivals(&mut self, arrivals: impl IntoIterator<Item = Arrival>) {
        for Arrival { at, link, direction } in arrivals {
            self.schedule(at, Ev::Arrival { link, direction });
        }
    }

    pub(crate) fn tell(&self, line: impl FnOnce() -> String) {
        if let Some(teller) = self.teller {
            teller(&format!("{:>8} {}", self.now, line()));
        }
    }

    fn play(&mut self) -> Result<(), Violation> {
        for host in 0..HOSTS {
            self.boot(host);
        }
        self.schedule_host(1, 0, ToHost::Core(Event::Start));
        self.schedule(CLIENT_US, Ev::Client);
        self.run_until(START_US)?;
        self.has_faults = true;
        self.schedule(self.now, Ev::Fault);
        self.run_until(START_US + self.options.faults_us)?;
        self.has_faults = false;
        self.heal()
    }

    fn run_until(&mut self, end: u64) -> Result<(), Violation> {
        while let Some(entry) = self.queue.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.checks.now = at;
            self.report.events += 1;
            self.step(event)?;
        }
        self.now = end;
        Ok(())
    }

    fn step(&mut self, event: Ev) -> Result<(), Violation> {
        match event {
            Ev::Host { host, incarnation, what } => self.deliver(host, incarnation, what)?,
            Ev::Arrival { link, direction } => self.arrive(link, direction)?,
            Ev::Ask { host, incarnation, op, ask, is_answered, losses } => {
                self.ask((host, incarnation, losses), op, ask, is_answered)?;
            }
            Ev::Client => self.client(),
            Ev::Fault => self.fault()?,
            Ev::Mend(a, b) => self.mend(a, b),
            Ev::Resume(host) => self.resume(host)?,
            Ev::Restart(host) => self.restart(host),
            Ev::ArbiterUp => self.arbiter.is_down = false,
        }
        Ok(())
    }

    pub(crate) fn mend(&mut self, a: usize, b: usize) {
        let arrivals = self.net.mend(self.now, a, b);
        self.schedule_arrivals(arrivals);
    }

    fn arrive(&mut self, link: usize, direction: usize) -> Result<(), Violation> {
        let Some((host, packet)) = self.net.arrive(link, direction) else { return Ok(()) };
        let link = replica::LinkId(link as u64);
        let event = match packet {
            Packet::Close => Event::LinkClosed { link },
            Packet::Message(bytes) => {
                let message = replica::decode(&bytes).expect("what was encoded decodes");
                Event::Message { link, message }
            }
        };
        let incarnation = self.hosts[host].incarnation;
        self.deliver(host, incarnation, ToHost::Core(event))
    }

    /// The core of `host` sees a message: what the checkers need to know of it.
    pub(crate) fn note_message(&mut self, host: usize, message: &Message) {
        if let Message::Protected { generation } = message {
            self.told.insert((host, *generation));
        }
    }

    fn ask(
        &mut self,
        (host, incarnation, losses): (usize, u64, u64),
        op: u64,
        ask: Ask,
        is_answered: bool,
    ) -> Result<(), Violation> {
        if self.arbiter.is_down || self.net.is_cut(host, ARBITER) {
            return Ok(());
        }
        let (reply, has_changed) = self.arbiter.answer(ask);
        self.tell(|| format!("arbiter to {host}: {reply:?}, now {:?}", self.arbiter.current()));
        if has_changed {
            self.on_new_record(host, losses)?;
        }
        if is_answered && incarnation == self.hosts[host].incarnation {
            self.reply(host, op, reply);
        }
        Ok(())
    }

    pub(crate) fn reply(&mut self, host: usize, op: u64, reply: ArbiterReply) {
        let mut after = net::delay(&mut self.rng);
        if self.has_faults && self.rng.one_in(30) {
            after += self.rng.range(5_000, 40_000);
        }
        self.schedule_host(after, host, ToHost::Core(Event::ArbiterReply { op, reply }));
    }

    fn on_new_record(&mut self, writer: usize, losses: u64) -> Result<(), Violation> {
        self.checks.replica_2_generations(&self.arbiter.history)?;
        self.checks.replica_3_claimant(&self.arbiter.history)?;
        let named = self.arbiter.current().and_then(|record| record.secondary.clone());
        let named = named.and_then(|name| self.hosts.iter().position(|host| host.name == name));
        let secondary = named.map(|secondary| (secondary, self.hosts[secondary].losses));
        self.stamps.push(Stamp { writer: (writer, losses), secondary });
        if let Some(secondary) = named {
            let host = &self.hosts[secondary];
            let is_following = host.role() == Some(Role::Secondary);
            if let (true, Some(received)) = (is_following && !host.is_loading(), host.received) {
                self.checks.replica_3_named(received)?;
            }
        }
        Ok(())
    }

    fn client(&mut self) {
        self.schedule(self.now + CLIENT_US, Ev::Client);
        for write in &self.checks.acked {
            self.outstanding.remove(write);
        }
        if self.outstanding.len() < OUTSTANDING_MAX {
            self.outstanding.insert(self.next_write, 0);
            self.next_write += 1;
        }
        let mut due = vec![];
        for (&write, sent) in &mut self.outstanding {
            if *sent == 0 || self.now > *sent + 20_000 {
                *sent = self.now;
                due.push(write);
            }
        }
        for write in due {
            for host in 0..HOSTS {
                let after = net::delay(&mut self.rng);
                self.schedule_host(after, host, ToHost::Write(write));
            }
        }
    }

    fn heal(&mut self) -> Result<(), Violation> {
        let began = self.now;
        for a in 0..=HOSTS {
            for b in 0..=HOSTS {
                while self.net.is_cut(a, b) {
                    self.mend(a, b);
                    self.mend(b, a);
                }
            }
        }
        self.arbiter.is_down = false;
        for host in 0..HOSTS {
            self.resume(host)?;
            self.restart(host);
            self.set_protection(host, true);
        }
        let fresh_write = self.next_write + OUTSTANDING_MAX as u64;
        while self.now < began + HEAL_US {
            self.run_until(self.now + 2_000)?;
            if self.is_protected() && self.checks.acked.iter().any(|&write| write > fresh_write) {
                break;
            }
        }
        self.report.generation = self.arbiter.generation();
        self.report.releases = self.checks.releases;
        self.report.writes_acked = self.checks.acked.len() as u64;
        self.report.healed_in_us = self.now - began;
        if self.is_protected() {
            return self.check_survivor();
        }
        self.report.is_lost = !self.is_live() && self.may_be_lost();
        let states = format!(
            "{:?}, record {:?}, stamps {:?}",
            self.hosts.iter().map(Host::describe).collect::<Vec<_>>(),
            self.arbiter.current(),
            self.stamps.last()
        );
        self.checks.replica_6_healed(self.report.is_lost, &states)
    }

    fn check_survivor(&self) -> Result<(), Violation> {
        let runner = self.checks.runner.map(|runner| &self.hosts[runner.host]);
        match runner.and_then(|host| host.machine.as_ref()) {
            Some(toy) => self.checks.replica_1_go_live(toy),
            None => self.checks.replica_6_healed(false, "the live host has no machine"),
        }
    }

    fn is_live(&self) -> bool {
        self.hosts.iter().any(|host| host.role() == Some(Role::Primary))
    }

    fn is_protected(&self) -> bool {
        let has = |role| {
            self.hosts.iter().any(|host| {
                host.status().is_some_and(|status| {
                    status.role == role && status.protection == Protection::Protected
                })
            })
        };
        has(Role::Primary) && has(Role::Secondary)
    }

    /// Whether every copy that the record knows of is gone.
    fn may_be_lost(&self) -> bool {
        let Some(stamp) = self.stamps.last() else { return true };
        let (writer, losses) = stamp.writer;
        let is_live_gone = self.hosts[writer].losses > losses;
        let is_secondary_gone = stamp.secondary.is_none_or(|(secondary, losses)| {
            let was_told = self.told.contains(&(secondary, self.arbiter.generation()));
            self.hosts[secondary].losses > losses || !was_told
        });
        is_live_gone && is_secondary_gone
    }

    pub(crate) fn mono(&self, host: usize) -> MonoTime {
        MonoTime(self.now + self.hosts[host].skew)
    }
}

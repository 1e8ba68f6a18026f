//! A simulated host: executes the core's commands on toy machines, as the real shell does on real ones.

use std::collections::{BTreeSet, VecDeque};

use replica::{Command, Config, Event, HostId, LinkId, LogPos, Message, Node, Role, Status, VmId};

use crate::arbiter::Ask;
use crate::checks::{Runner, Violation};
use crate::net::{self, Packet};
use crate::rng::mix;
use crate::toy::{self, Output, Record, Toy};
use crate::world::{DETECTION_US, Ev, HOSTS, World};

const SLICE_US: u64 = 1_000;
const TICK_US: u64 = 2_000;

/// Something for a host; it waits while the host is paused and is lost when the host crashes.
#[derive(Debug)]
pub(crate) enum ToHost {
    Core(Event),
    Tick,
    Slice,
    Replay,
    Connect { attempt: u64, target: usize },
    Snapshot { link: LinkId, toy: Box<Toy> },
    Stopped,
    Write(u64),
}

/// A host.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: HostId,
    pub(crate) incarnation: u64,
    /// How often this host lost its copy of the VM.
    pub(crate) losses: u64,
    pub(crate) skew: u64,
    pub(crate) node: Option<Node>,
    pub(crate) is_paused: bool,
    pub(crate) waiting: VecDeque<(u64, ToHost)>,
    pub(crate) machine: Option<Toy>,
    /// End of the log that the core took in, when following.
    pub(crate) received: Option<LogPos>,
    is_running: bool,
    is_vcpu_paused: bool,
    has_slices: bool,
    gate: VecDeque<Output>,
    inputs: BTreeSet<u64>,
    session: Option<LinkId>,
    loading: Option<LinkId>,
    replay: VecDeque<(Vec<u8>, LogPos)>,
    has_replay: bool,
    decided_at: u64,
}

impl Host {
    pub(crate) fn new(index: usize, skew: u64) -> Self {
        Self {
            name: HostId(["a", "b", "c"][index % HOSTS].into()),
            incarnation: 0,
            losses: 0,
            skew,
            node: None,
            is_paused: false,
            waiting: VecDeque::new(),
            machine: None,
            received: None,
            is_running: false,
            is_vcpu_paused: false,
            has_slices: false,
            gate: VecDeque::new(),
            inputs: BTreeSet::new(),
            session: None,
            loading: None,
            replay: VecDeque::new(),
            has_replay: false,
            decided_at: 0,
        }
    }

    pub(crate) fn status(&self) -> Option<Status> {
        self.node.as_ref().map(Node::status)
    }

    pub(crate) fn role(&self) -> Option<Role> {
        self.status().map(|status| status.role)
    }

    pub(crate) fn is_loading(&self) -> bool {
        self.loading.is_some()
    }

    pub(crate) fn describe(&self) -> String {
        format!("{}: {:?}", self.name, self.status())
    }

    fn drop_machine(&mut self) {
        self.machine = None;
        self.received = None;
        self.is_running = false;
        self.is_vcpu_paused = false;
        self.gate.clear();
        self.inputs.clear();
        self.session = None;
        self.loading = None;
        self.replay.clear();
    }
}

impl World {
    /// Starts the process.
    pub(crate) fn boot(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let nonce_seed = mix(host.incarnation * 1000 + index as u64);
        let cfg = Config {
            detection_us: DETECTION_US,
            heartbeat_us: DETECTION_US / 5,
            arbiter_timeout_us: 15_000,
            arbiter_backoff_us: 3_000,
            arbiter_backoff_max_us: 20_000,
            protect_retry_us: 10_000,
            protect_timeout_us: 400_000,
            catch_up_bytes_max: 1 << 20,
            lag_admit_us: 5_000,
            lag_soft_us: 10_000,
            lag_hard_us: 50_000,
            held_max: 64,
            switchover_timeout_us: 60_000,
            mutation: self.options.mutation,
            ..Config::new(VmId([1; 16]), host.name.clone(), nonce_seed)
        };
        host.node = Some(Node::new(cfg));
        self.set_protection(index, true);
        self.schedule_host(TICK_US, index, ToHost::Tick);
    }

    pub(crate) fn set_protection(&mut self, host: usize, wanted: bool) {
        let candidates = self.hosts.iter().map(|host| host.name.clone()).collect();
        let event = Event::SetProtection { wanted, candidates };
        self.schedule_host(0, host, ToHost::Core(event));
    }

    pub(crate) fn crash(&mut self, index: usize, silent: bool) {
        let host = &mut self.hosts[index];
        if host.node.take().is_none() {
            return;
        }
        host.incarnation += 1;
        host.losses += 1;
        let arrivals = self.net.crash(self.now, &mut self.rng, index, silent);
        self.schedule_arrivals(arrivals);
        self.tell(|| format!("{index} crashes, silent {silent}"));
        let host = &mut self.hosts[index];
        host.is_paused = false;
        host.waiting.clear();
        host.has_slices = false;
        host.has_replay = false;
        host.drop_machine();
    }

    pub(crate) fn restart(&mut self, index: usize) {
        if self.hosts[index].node.is_none() {
            self.boot(index);
        }
    }

    pub(crate) fn resume(&mut self, index: usize) -> Result<(), Violation> {
        self.hosts[index].is_paused = false;
        while let Some((incarnation, what)) = self.hosts[index].waiting.pop_front() {
            self.deliver(index, incarnation, what)?;
        }
        Ok(())
    }

    pub(crate) fn deliver(
        &mut self,
        index: usize,
        incarnation: u64,
        what: ToHost,
    ) -> Result<(), Violation> {
        let host = &mut self.hosts[index];
        if host.incarnation != incarnation || host.node.is_none() {
            return Ok(());
        }
        if host.is_paused {
            host.waiting.push_back((incarnation, what));
            return Ok(());
        }
        match what {
            ToHost::Core(event) => return self.feed(index, event),
            ToHost::Tick => {
                self.schedule_host(TICK_US, index, ToHost::Tick);
                return self.feed(index, Event::Tick);
            }
            ToHost::Slice => return self.slice(index),
            ToHost::Replay => return self.replay(index),
            ToHost::Connect { attempt, target } => return self.connect(index, attempt, target),
            ToHost::Snapshot { link, toy } => return self.load(index, link, toy),
            ToHost::Stopped => {
                if host.is_running {
                    return self.feed(index, Event::MachineStopped);
                }
            }
            ToHost::Write(write) => {
                if host.is_running {
                    host.inputs.insert(write);
                }
            }
        }
        Ok(())
    }

    /// Gives an event to the core and does what it says.
    fn feed(&mut self, index: usize, event: Event) -> Result<(), Violation> {
        if let Event::Message { message, .. } = &event {
            self.note_message(index, message);
        }
        if matches!(event, Event::ReplicaFailed { .. }) {
            self.hosts[index].losses += 1;
        }
        let now = self.mono(index);
        if !matches!(event, Event::Tick | Event::LogProduced { .. } | Event::Replayed { .. }) {
            self.tell(|| format!("{index} at {now:?}: {event:?}"));
        }
        let Some(node) = &mut self.hosts[index].node else { return Ok(()) };
        let mut out = vec![];
        node.handle(now, event, &mut out);
        let is_going = node.status().role == Role::GoingLive;
        let has_decided = is_going && self.hosts[index].decided_at == 0;
        if has_decided {
            self.hosts[index].decided_at = self.now;
        }
        for command in out {
            if self.has_faults && self.rng.one_in(12_000) {
                self.report.faults += 1;
                let silent = self.rng.one_in(2);
                self.crash(index, silent);
                let at = self.now + self.rng.range(5_000, 150_000);
                self.schedule(at, Ev::Restart(index));
                return Ok(());
            }
            self.execute(index, command)?;
        }
        let host = &mut self.hosts[index];
        if host.role() != Some(Role::GoingLive) {
            host.decided_at = 0;
        }
        Ok(())
    }

    fn execute(&mut self, index: usize, command: Command) -> Result<(), Violation> {
        self.tell(|| format!("{index} does {command:?}"));
        match command {
            Command::Send { link, message } => {
                let packet = Packet::Message(replica::encode(&message));
                let arrival = self.net.send(self.now, &mut self.rng, link, index, packet);
                self.schedule_arrivals(arrival);
                if let Message::Log { end, .. } = message {
                    let state = self.hosts[index].machine.as_ref().map_or(0, |toy| toy.state);
                    self.traces.entry(link.0).or_default().insert(end.lsn, state);
                }
            }
            Command::DropLink { link, .. } => {
                let close = Packet::Close;
                let arrival = self.net.send(self.now, &mut self.rng, link, index, close);
                self.schedule_arrivals(arrival);
            }
            Command::ArbiterRead { op } => self.ask_arbiter(index, op, Ask::Read),
            Command::ArbiterCas { op, expected, new } => {
                self.ask_arbiter(index, op, Ask::Cas { expected, new });
            }
            Command::RunFresh { generation } => {
                self.hosts[index].machine = Some(Toy::default());
                self.begin(index, generation, self.now)?;
            }
            Command::GoLive { generation, at, resend_after } => {
                self.go_live(index, generation, at, resend_after)?;
            }
            Command::Release { up_to_icount } => self.release(index, up_to_icount)?,
            Command::PauseVcpu => self.hosts[index].is_vcpu_paused = true,
            Command::ResumeVcpu => self.hosts[index].is_vcpu_paused = false,
            Command::StopMachine => {
                self.hosts[index].is_vcpu_paused = true;
                self.schedule_host(300, index, ToHost::Stopped);
            }
            Command::StartProtect { attempt, host } => {
                let target = self.hosts.iter().position(|other| other.name == host);
                let target = target.expect("candidates are hosts");
                let after = self.rng.range(200, 1_500);
                self.schedule_host(after, index, ToHost::Connect { attempt, target });
            }
            Command::LoadSnapshot { link, at } => {
                let host = &mut self.hosts[index];
                host.drop_machine();
                host.loading = Some(link);
                host.received = Some(at);
            }
            Command::Replay { bytes, end } => {
                let host = &mut self.hosts[index];
                host.replay.push_back((bytes, end));
                host.received = Some(end);
                self.schedule_replay(index);
            }
            Command::Discard { .. } | Command::Stopped => self.hosts[index].drop_machine(),
            Command::Halt { .. } => {
                self.hosts[index].drop_machine();
                self.schedule_host(20_000, index, ToHost::Core(Event::Reset));
            }
            Command::AbandonProtect { .. }
            | Command::Throttle { .. }
            | Command::StartRefused { .. } => {}
        }
        Ok(())
    }

    fn ask_arbiter(&mut self, host: usize, op: u64, ask: Ask) {
        let Host { incarnation, losses, .. } = self.hosts[host];
        let chance = if self.has_faults { self.rng.range(0, 19) } else { 19 };
        // Lost, lost answer, answer "unreachable" although it gets through, repeated, late.
        if chance == 0 {
            return;
        }
        if chance == 1 {
            self.reply(host, op, replica::ArbiterReply::Unreachable);
        }
        let is_answered = chance != 1 && chance != 2;
        for repeat in 0..if chance == 3 { 2 } else { 1 } {
            let mut after = net::delay(&mut self.rng) + repeat * self.rng.range(0, 30_000);
            if chance == 4 || chance == 1 {
                after += self.rng.range(1_000, 60_000);
            }
            let event = Ev::Ask { host, incarnation, op, ask: ask.clone(), is_answered, losses };
            self.schedule(self.now + after, event);
        }
    }

    // --- The primary -------------------------------------------------------------------------------------------

    fn begin(&mut self, index: usize, generation: u64, decided_at: u64) -> Result<(), Violation> {
        self.checks.replica_2_winner(&self.arbiter.history, &self.hosts[index].name, generation)?;
        let runner = Runner { host: index, generation, decided_at };
        self.checks.replica_5_go_live(runner)?;
        self.checks.runner = Some(runner);
        let host = &mut self.hosts[index];
        host.is_running = true;
        host.is_vcpu_paused = false;
        if !std::mem::replace(&mut host.has_slices, true) {
            self.schedule_host(SLICE_US, index, ToHost::Slice);
        }
        Ok(())
    }

    fn go_live(
        &mut self,
        index: usize,
        generation: u64,
        at: LogPos,
        resend_after: u64,
    ) -> Result<(), Violation> {
        self.report.failovers += 1;
        let decided_at = self.hosts[index].decided_at.max(1);
        let toy = self.hosts[index].machine.clone().unwrap_or_default();
        self.checks.replica_4_replayed(&toy, at)?;
        self.checks.replica_1_go_live(&toy)?;
        self.begin(index, generation, decided_at)?;
        for (_, &output) in toy.outputs.range(resend_after + 1..) {
            self.release_output(index, output)?;
        }
        Ok(())
    }

    fn slice(&mut self, index: usize) -> Result<(), Violation> {
        let host = &mut self.hosts[index];
        host.has_slices = host.is_running;
        if !host.is_running {
            return Ok(());
        }
        let is_paused = host.is_vcpu_paused;
        self.schedule_host(SLICE_US, index, ToHost::Slice);
        if is_paused {
            return Ok(());
        }
        let steps = self.rng.range(20, 150);
        let host = &mut self.hosts[index];
        let Some(toy) = &mut host.machine else { return Ok(()) };
        let before = toy.icount;
        let mut records = vec![];
        for write in std::mem::take(&mut host.inputs) {
            let record = Record { icount: toy.icount, write: Some(write) };
            toy.apply(record);
            records.push(record);
        }
        toy.run_to(before + steps);
        let mark = Record { icount: toy.icount, write: None };
        toy.apply(mark);
        records.push(mark);
        let made: Vec<_> = toy.outputs.range(before + 1..).map(|(_, &output)| output).collect();
        let outputs_up_to = made.last().map(|output| output.icount);
        host.gate.extend(made);
        let end = toy.pos;
        self.feed(index, Event::LogProduced { bytes: toy::encode(&records), end, outputs_up_to })
    }

    fn release(&mut self, index: usize, up_to_icount: u64) -> Result<(), Violation> {
        while let Some(output) = self.hosts[index].gate.front().copied() {
            if output.icount > up_to_icount {
                break;
            }
            self.hosts[index].gate.pop_front();
            self.release_output(index, output)?;
        }
        Ok(())
    }

    fn release_output(&mut self, index: usize, output: Output) -> Result<(), Violation> {
        let runner = self.checks.runner.and_then(|runner| self.hosts[runner.host].machine.as_ref());
        self.checks.replica_1_release(index, output, runner)?;
        self.checks.replica_5_release(index)
    }

    fn connect(&mut self, index: usize, attempt: u64, target: usize) -> Result<(), Violation> {
        let Some(toy) = self.hosts[index].machine.clone() else { return Ok(()) };
        if self.hosts[target].node.is_none() || self.net.is_cut(index, target) {
            let reason = "cannot connect".into();
            return self.feed(index, Event::ProtectFailed { attempt, reason });
        }
        let link = self.net.connect(index, target);
        self.hosts[index].session = Some(link);
        let at = toy.pos;
        let after = self.rng.range(2_000, 15_000);
        self.schedule_host(after, target, ToHost::Snapshot { link, toy: Box::new(toy) });
        self.feed(index, Event::ProtectStarted { attempt, link, at })
    }

    // --- The secondary -----------------------------------------------------------------------------------------

    fn load(&mut self, index: usize, link: LinkId, toy: Box<Toy>) -> Result<(), Violation> {
        let from = self.net.links[link.0 as usize].ends[0];
        if self.net.is_cut(from, index) || self.hosts[index].loading.is_none() {
            if self.net.links[link.0 as usize].open[1] {
                self.schedule_host(2_000, index, ToHost::Snapshot { link, toy });
            }
            return Ok(());
        }
        let host = &mut self.hosts[index];
        if host.loading != Some(link) {
            return Ok(());
        }
        host.loading = None;
        host.session = Some(link);
        host.machine = Some(*toy);
        self.schedule_replay(index);
        self.feed(index, Event::SnapshotLoaded { link })
    }

    fn schedule_replay(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        if host.has_replay || host.machine.is_none() || host.replay.is_empty() {
            return;
        }
        host.has_replay = true;
        let after =
            if self.rng.one_in(400) { self.rng.range(0, 30_000) } else { self.rng.range(20, 900) };
        self.schedule_host(after, index, ToHost::Replay);
    }

    fn replay(&mut self, index: usize) -> Result<(), Violation> {
        let host = &mut self.hosts[index];
        host.has_replay = false;
        let Some(toy) = &mut host.machine else { return Ok(()) };
        let Some((bytes, end)) = host.replay.pop_front() else { return Ok(()) };
        toy.replay(&bytes);
        let theirs = host.session.and_then(|link| self.traces.get(&link.0)?.get(&end.lsn));
        if let Some(&theirs) = theirs {
            self.checks.lockstep(toy.state, theirs, end)?;
        }
        self.schedule_replay(index);
        self.feed(index, Event::Replayed { to: end })
    }
}

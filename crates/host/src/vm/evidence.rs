//! What is kept when two replicas differ: each host's machine, and the secondary's recording.
//!
//! # Place
//! The secondary's machine is of no use any more and goes to a thread of its own with its recording. The primary's runs on:
//! its memory is swept, like that of a snapshot, in its turn.
//!
//! # Invariants
//! - INV-EVIDENCE-1: neither a guest nor a new secondary waits for it longer than [`SWEEP_TIME_MAX`], whatever the disk does.
//! - INV-EVIDENCE-2: of a VM one machine at most waits on a host to be written.
//!
//! # Failure
//! What cannot be kept is told, in the daemon's log and as the VM's reason, and concerns the VM in nothing. A report without
//! the machine's state is still one; a directory without a report is not left behind.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use eventlog::{ClockBase, LogPos};
use machine::Machine;

use super::Env;
use super::shared::Shared;
use super::vcpu::tracing;
use crate::divergence::report::{Digests, Draft, RECORDING_DIR, STATE_FILE, reports};
use crate::divergence::{Part, Report, Side};
use crate::one_line::one_line;
use crate::recording::Recorder;
use crate::snapshot::{self, SnapshotHead, Sweep, Written};

/// A new secondary does not wait longer than this for the primary's state to be written.
const SWEEP_TIME_MAX: Duration = Duration::from_secs(30);

/// What was seen of a divergence.
#[derive(Debug, Clone)]
pub(crate) struct Difference {
    pub(crate) at: LogPos,
    /// What was seen, unless it was seen by the digests.
    pub(crate) reason: String,
    pub(crate) digests: Option<Digests>,
    /// Step of the last digest that was the same.
    pub(crate) last_right: Option<u64>,
    /// On a secondary: the step from which on it followed.
    pub(crate) followed_from: Option<u64>,
    pub(crate) peer: Option<String>,
}

impl Difference {
    /// Two digests.
    pub(crate) fn of(at: LogPos, digests: Digests) -> Self {
        let Digests { secondary, primary } = digests;
        let reason =
            format!("digest {secondary:#018x} of the secondary, {primary:#018x} in the log");
        Self { digests: Some(digests), ..Self::without_digests(at, &reason) }
    }

    /// Something else that shows it.
    pub(crate) fn without_digests(at: LogPos, reason: &str) -> Self {
        let reason = reason.to_owned();
        Self { at, reason, digests: None, last_right: None, followed_from: None, peer: None }
    }
}

/// The report of a difference, with nothing kept yet.
fn draft(env: &Env, vm: &str, side: Side, machine: &Machine, seen: &Difference) -> Draft {
    let seen = seen.clone();
    let report = Report {
        vm: vm.to_owned(),
        host: env.host.clone(),
        peer: seen.peer,
        engine: machine.engine().to_string(),
        digests: seen.digests,
        last_right: seen.last_right,
        followed_from: seen.followed_from,
        ..Report::new(side, seen.reason, seen.at.icount)
    };
    Draft::new(&env.state_dir, report)
}

/// Tells people what became of it.
fn tell(shared: &Shared, side: Side, icount: u64, kept: Result<PathBuf, String>) {
    let outcome = match (kept, side) {
        (Ok(dir), Side::Primary) => {
            format!(
                "this host's state is in {}; look into the secondary's on its host",
                dir.display()
            )
        }
        (Ok(dir), Side::Secondary) => {
            let dir = dir.display();
            format!("what was kept is in {dir}; see `understudy divergence {dir}`")
        }
        (Err(reason), _) => format!("this host's state is not kept: {reason}"),
    };
    let what = format!("the {} diverged at step {icount}; {outcome}", Side::Secondary);
    tracing(shared, &what);
    shared.lock().last_problem = Some(what);
}

/// Whether a secondary of a VM has differed on this host, and what was kept of it is still there.
pub(super) fn has_differed(env: &Env, vm: &str) -> bool {
    !reports(&env.state_dir, vm, Side::Secondary).is_empty()
}

/// What a secondary leaves behind that differed.
#[derive(Debug)]
pub(crate) struct Evidence {
    pub(super) machine: Machine,
    pub(super) recorder: Recorder,
    pub(super) seen: Difference,
}

impl Evidence {
    /// Writes the machine, and completes and keeps its recording, on a thread of its own.
    pub(super) fn keep(self, env: &Env, shared: &Arc<Shared>) -> Option<JoinHandle<()>> {
        let draft = draft(env, &shared.name, Side::Secondary, &self.machine, &self.seen);
        let theirs = Arc::clone(shared);
        let keep = move || {
            let icount = self.seen.at.icount;
            tell(&theirs, Side::Secondary, icount, self.write(draft));
        };
        match std::thread::Builder::new().name("evidence".to_owned()).spawn(keep) {
            Ok(thread) => Some(thread),
            Err(e) => {
                tracing(shared, &format!("cannot start a thread to keep the state: {e}"));
                None
            }
        }
    }

    fn write(mut self, mut draft: Draft) -> Result<PathBuf, String> {
        let recording = self.recorder.dir();
        // Whatever becomes of the report, the recording is to be whole.
        self.recorder.end(&mut self.machine);
        draft.prepare()?;
        let state = write_state(&draft, &mut self.machine, self.seen.at);
        let recording = keep_recording(&draft, recording.as_deref());
        let report = draft.report_mut();
        report.kept_at = Some(self.machine.icount());
        (report.state, report.recording) = (part(state), part(recording));
        draft.complete()
    }
}

fn part(kept: Result<(), String>) -> Part {
    kept.map_or_else(Part::Missing, |()| Part::Kept)
}

fn write_state(draft: &Draft, machine: &mut Machine, at: LogPos) -> Result<(), String> {
    let clock = machine.clock();
    let base = ClockBase { mtime: machine.mtime(), at: at.icount, rate: clock.rate() };
    let head = SnapshotHead::of(machine, at, base)?;
    let written = snapshot::write_machine(&draft.place().join(STATE_FILE), &head, machine);
    written.map(drop).map_err(|e| one_line(&e))
}

/// Links all files of the recording into the report, so that dropping old recordings does not drop them.
fn keep_recording(draft: &Draft, dir: Option<&Path>) -> Result<(), String> {
    let Some(dir) = dir else {
        return Err("it differed before its flight recorder had started".to_owned());
    };
    let target = draft.place().join(RECORDING_DIR);
    let fail = |e: std::io::Error| format!("cannot link {} there: {e}", dir.display());
    fs::DirBuilder::new().mode(0o700).create(&target).map_err(fail)?;
    let link = || {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            fs::hard_link(entry.path(), target.join(entry.file_name()))?;
        }
        Ok(())
    };
    link().map_err(|e| {
        // What cannot be removed is as little use as what is not there.
        drop(fs::remove_dir_all(&target));
        fail(e)
    })
}

/// The primary's part.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    next: Option<Box<Order>>,
    sweep: Option<(Sweep, Instant)>,
}

/// What the primary is asked for.
#[derive(Debug)]
pub(crate) struct Order {
    env: Arc<Env>,
    shared: Arc<Shared>,
    seen: Difference,
}

impl Order {
    pub(super) fn new(env: &Arc<Env>, shared: &Arc<Shared>, seen: Difference) -> Self {
        Self { env: Arc::clone(env), shared: Arc::clone(shared), seen }
    }
}

impl Keeper {
    /// Takes an order. A second one while a first one waits is of the same cause.
    pub(super) fn order(&mut self, order: Order) {
        self.next.get_or_insert(Box::new(order));
    }

    /// The order that waits.
    pub(super) fn take_order(&mut self) -> Option<Box<Order>> {
        self.next.take()
    }

    /// Whether memory is being swept.
    pub(super) fn is_busy(&self) -> bool {
        self.sweep.is_some()
    }

    /// Begins with the machine as it is.
    pub(super) fn begin(
        &mut self,
        order: Order,
        machine: &mut Machine,
        at: LogPos,
        clock: ClockBase,
    ) {
        let Order { env, shared, seen } = order;
        let icount = seen.at.icount;
        let mut draft = draft(&env, &shared.name, Side::Primary, machine, &seen);
        let report = draft.report_mut();
        report.kept_at = Some(machine.icount());
        report.recording = Part::Missing("the secondary has it".to_owned());
        let head = match SnapshotHead::of(machine, at, clock) {
            Ok(head) => head,
            Err(reason) => return tell(&shared, Side::Primary, icount, Err(reason)),
        };
        let path = draft.place().join(STATE_FILE);
        let (prepared, theirs) = (draft.clone(), Arc::clone(&shared));
        let prepare = move || prepared.prepare();
        let told = move |written: &Result<Written, String>| {
            let written = written.clone().map(drop);
            let kept = match written {
                // There is no place for it.
                Err(reason) if !draft.place().is_dir() => Err(reason),
                written => {
                    draft.report_mut().state = part(written);
                    draft.complete()
                }
            };
            tell(&theirs, Side::Primary, icount, kept);
        };
        match Sweep::begin_prepared(machine, head, None, path, prepare, told) {
            Ok(sweep) => self.sweep = Some((sweep, Instant::now())),
            Err(e) => {
                let reason = format!("no thread can be started: {e}");
                tell(&shared, Side::Primary, icount, Err(reason));
            }
        }
    }

    /// Hands over some pages; false when there is no more to do. Where somebody waits for the memory, it is given up in time.
    pub(super) fn pump(&mut self, machine: &mut Machine, is_awaited: bool) -> bool {
        let Some((sweep, since)) = &mut self.sweep else { return false };
        if sweep.pump(machine.ram_mut()) {
            if !is_awaited || since.elapsed() < SWEEP_TIME_MAX {
                return true;
            }
            if let Some((sweep, _)) = self.sweep.take() {
                sweep.leave(machine.ram_mut());
            }
        }
        self.sweep = None;
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use machine::config::{BootImages, MachineConfig};
    use machine::ram::{PAGE_SIZE, RAM_BASE};
    use replica::{Config, HostId};

    use super::super::shared::vm_id;
    use super::*;
    use crate::channel::Secret;
    use crate::config::ArbiterSection;

    /// A machine whose memory takes several looks.
    fn machine() -> Machine {
        let code = [0x0012_8293u32, 0xffdf_f06f].map(u32::to_le_bytes).concat();
        let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
        let config = MachineConfig {
            harts: 1,
            ram_size: 32 << 20,
            nets: vec![],
            disks: vec![],
            consoles: 0,
            rngs: 0,
            rtc_base_ns: 5,
            rng_seed: vec![],
        };
        let mut machine = Machine::new(config, images).unwrap();
        for page in 1..u64::from(machine.ram().pages()) {
            let bytes = page.to_le_bytes();
            machine.ram_mut().write(RAM_BASE + page * PAGE_SIZE as u64, &bytes).unwrap();
        }
        machine
    }

    fn order(state_dir: &Path) -> Order {
        let env = Env {
            host: "a".to_owned(),
            secret: Secret::new(b"a shared secret of hosts").unwrap(),
            peers: std::collections::BTreeMap::new(),
            log_source: None,
            compresses: false,
            arbiter: ArbiterSection::Dir(state_dir.to_owned()),
            state_dir: state_dir.to_owned(),
            detection_ms: 1000,
            engine: None,
            fence: crate::config::FenceSection::default(),
            resync_limit: None,
            is_terminal: true,
        };
        let config = Config::new(vm_id("vm"), HostId("a".to_owned()), 1);
        let shared = Shared::new("vm", config, channel().0, channel().0, true);
        let seen = Difference::of(LogPos::default(), Digests { secondary: 1, primary: 2 });
        Order::new(&Arc::new(env), &shared, seen)
    }

    /// Begins with `keeper`, and gives the report when that is done.
    fn keep(keeper: &mut Keeper, dir: &Path, pump: impl Fn(&mut Keeper, &mut Machine)) -> Report {
        let (order, mut machine) = (order(dir), machine());
        keeper.begin(order, &mut machine, LogPos::default(), ClockBase::default());
        while keeper.is_busy() {
            pump(keeper, &mut machine);
        }
        assert!(Sweep::is_free(&machine));
        loop {
            if let [dir] = reports(dir, "vm", Side::Primary).as_slice() {
                return Report::read(dir).unwrap();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_new_secondary_does_not_wait_for_a_disk_that_is_too_slow() {
        let work = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::default();
        let report = keep(&mut keeper, work.path(), |keeper, machine| {
            if let Some((_, since)) = &mut keeper.sweep {
                *since = since.checked_sub(SWEEP_TIME_MAX).unwrap();
            }
            keeper.pump(machine, true);
        });
        assert!(matches!(report.state, Part::Missing(why) if why.contains("given up")));
    }

    #[test]
    fn where_nobody_waits_there_is_time() {
        let work = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::default();
        let report = keep(&mut keeper, work.path(), |keeper, machine| {
            if let Some((_, since)) = &mut keeper.sweep {
                *since = since.checked_sub(SWEEP_TIME_MAX).unwrap();
            }
            keeper.pump(machine, false);
        });
        assert_eq!((report.state, report.kept_at), (Part::Kept, Some(0)));
    }
}

//! The locks of a machine's shared disks: had before it runs here, from a host that is fenced if need be.
//!
//! # Place
//! Polled by the vCPU thread: before a machine is made at a start, and when a secondary is to go live, which stands still
//! meanwhile. What takes its time (a fence command, a question to the arbiter) other threads do.
//!
//! # States
//! ```text
//!   taking --all locks--> confirming --record is this host's--> owned
//!     |                       '--record is another host's--> lost
//!     '--a lock is newer--> lost
//! ```
//!
//! # Invariants
//! - INV-OWNING-1: no request of this host reaches a shared disk before its lock is held, nor before the arbiter's record was
//!   found to be this host's after that. So a host that is frozen while it waits, and wakes up long after, does no harm.
//! - INV-OWNING-2: a host is fenced only as the holder of a lock of this VM that this host has won the arbitration for.
//! - INV-OWNING-3: a lock is taken from a host that has it only after that host was fenced.
//!
//! The old live host, when it wakes up: the writes that its disks' threads have on the way are made or refused, then these
//! threads end, then the lock is let go (INV-IMAGELOCK-2). It may still make what it had released, since a secondary
//! that is to go live knows of all that was released, and makes it again in the same order, after it has the lock.
//!
//! # Failure
//! Whatever cannot be done is tried again for as long as it takes, with the reason in the VM's status; fencing only so often
//! as the configuration says.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use replica::{ArbiterReply, HostId};

use super::Env;
use super::definition::Definition;
use super::shared::{Question, Shared, unix_ms};
use super::vcpu::tracing;
use crate::config::FenceMethod;
use crate::disk::lock::{Holder, ImageLock, TakeLockError};
use crate::fence::{FenceOrder, fence};
use crate::one_line::one_line;

/// How long a host that was fenced may have a lock before it is taken from it: that of a process that was killed goes at once.
const BREAK_AFTER: Duration = Duration::from_secs(2);
/// How long a host that hands the VM over may take to let go its locks.
const HANDED_OVER_GRACE: Duration = Duration::from_secs(5);
/// Pause between two attempts to fence a host.
const FENCE_PAUSE: Duration = Duration::from_secs(1);
/// Pauses between two looks: short at first, since a lock that is about to be let go makes clients wait.
const LOOKS: [Duration; 3] =
    [Duration::from_millis(1), Duration::from_millis(5), Duration::from_millis(50)];

/// Locks by the index of their disk.
pub(crate) type Locks = BTreeMap<usize, Arc<ImageLock>>;

/// What a machine waits for that may not run yet, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Waits {
    pub(crate) reason: String,
    pub(crate) remedy: String,
}

/// How far it is.
#[derive(Debug)]
pub(crate) enum Owned {
    /// The machine may run.
    Yes(Locks),
    /// Not yet.
    NotYet(Waits),
    /// Another host has the VM.
    Lost(String),
}

/// A fence command on its way.
#[derive(Debug)]
struct Fencing {
    host: String,
    generation: u64,
    attempts: u32,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Running(Arc<Mutex<Option<Result<String, String>>>>),
    Failed { at: Instant, reason: String },
    Done { at: Instant },
}

/// See the module documentation.
pub(crate) struct Owning {
    env: Arc<Env>,
    me: Holder,
    wanted: Vec<(usize, PathBuf)>,
    taken: Locks,
    since: Instant,
    looks: u32,
    grace: Duration,
    fencing: Option<Fencing>,
    asked: Option<Receiver<ArbiterReply>>,
    told: Option<Waits>,
}

impl Owning {
    /// For the machine of `definition`, run here by a record of that generation; nothing if it needs no lock. With
    /// `is_handed_over` the holder is about to let go.
    pub(crate) fn new(
        env: &Arc<Env>,
        definition: &Definition,
        generation: u64,
        is_handed_over: bool,
    ) -> Option<Self> {
        let sections = definition.config.disks.iter().enumerate().filter(|(_, d)| d.is_locked());
        let wanted: Vec<_> = sections.map(|(index, d)| (index, d.lock_path())).collect();
        let me = Holder::new(&definition.config.name, &env.host, generation, unix_ms());
        let grace = if is_handed_over { HANDED_OVER_GRACE } else { env.fence.grace() };
        (!wanted.is_empty()).then(|| Self {
            env: Arc::clone(env),
            me,
            wanted,
            taken: Locks::new(),
            since: Instant::now(),
            looks: 0,
            grace,
            fencing: None,
            asked: None,
            told: None,
        })
    }

    /// How long to wait before the next look.
    pub(crate) fn pause(&self) -> Duration {
        LOOKS[usize::try_from(self.looks / 20).unwrap_or(0).min(LOOKS.len() - 1)]
    }

    /// Since when it waits.
    pub(crate) fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether a fence command runs, which a start waits for.
    pub(crate) fn is_fencing(&self) -> bool {
        matches!(&self.fencing, Some(Fencing { step: Step::Running(_) | Step::Done { .. }, .. }))
    }

    /// Goes on as far as it can without waiting.
    pub(crate) fn poll(&mut self, shared: &Shared) -> Owned {
        self.looks = self.looks.saturating_add(1);
        let owned = self.go_on(shared);
        if let Owned::NotYet(waits) = &owned
            && self.told.as_ref() != Some(waits)
            && self.waited() > HANDED_OVER_GRACE.min(self.env.fence.grace())
        {
            tracing(shared, &format!("it {}", waits.reason));
            self.told = Some(waits.clone());
        }
        owned
    }

    fn go_on(&mut self, shared: &Shared) -> Owned {
        for (index, path) in self.wanted.clone() {
            if self.taken.contains_key(&index) {
                continue;
            }
            let lock = match ImageLock::take(&path, &self.me) {
                Err(TakeLockError::Held { by, .. }) => self.wrest(shared, index, &path, by),
                Ok(lock) => Ok(lock),
                Err(e @ TakeLockError::Overtaken { .. }) => return Owned::Lost(one_line(&e)),
                Err(e @ TakeLockError::Io { .. }) => Err(Waits {
                    reason: format!("waits for the lock of disk {index}: {}", one_line(&e)),
                    remedy: "make its directory reachable and writable on this host".to_owned(),
                }),
            };
            match lock {
                Ok(lock) => drop(self.taken.insert(index, lock)),
                Err(waits) => return Owned::NotYet(waits),
            }
        }
        self.confirm(shared)
    }

    /// Looks after a lock that somebody has: has that host fenced, or says why not.
    fn wrest(
        &mut self,
        shared: &Shared,
        disk: usize,
        path: &std::path::Path,
        by: Option<Holder>,
    ) -> Result<Arc<ImageLock>, Waits> {
        let waits = |what: &str, remedy: String| Waits {
            reason: format!("waits for the lock of disk {disk}, {what}"),
            remedy,
        };
        let file = path.display();
        let Some(by) = by else {
            return Err(waits("held by somebody", format!("see who has {file} open")));
        };
        let held = format!("held by {} in generation {}", by.host, by.generation);
        if by.vm != self.me.vm {
            let what = format!("held by {} for VM {}", by.host, by.vm);
            return Err(waits(&what, format!("stop VM {}, or use another image", by.vm)));
        }
        if by.host == self.me.host {
            let what = format!("{held}, by a process of this host");
            return Err(waits(&what, format!("see which process has {file} open")));
        }
        let by_hand = format!(
            "fence host {}: see to it that it is off or cannot reach the disk; if {file} stays locked then, remove it",
            by.host
        );
        self.fencing = self
            .fencing
            .take()
            .filter(|f| (f.host.as_str(), f.generation) == (&by.host, by.generation));
        let Some(method) = self.env.fence.method(&by.host) else {
            return Err(waits(
                &format!("{held}, and this host has no command to fence it"),
                by_hand,
            ));
        };
        if self.since.elapsed() < self.grace {
            return Err(waits(&held, "wait".to_owned()));
        }
        match self.fence(shared, disk, &by, method) {
            Ok(at) if at.elapsed() < BREAK_AFTER => {
                Err(waits(&format!("{held}; {} was fenced", by.host), "wait".to_owned()))
            }
            Ok(_) => {
                let taken = ImageLock::take_from(path, &self.me, &by);
                let taken = taken.map_err(|e| waits(&one_line(&e), by_hand))?;
                let what = format!(
                    "the lock of disk {disk} was still {held}, though that host is fenced: it was taken from it"
                );
                tracing(shared, &what);
                Ok(taken)
            }
            Err(what) => Err(waits(&format!("{held}; {what}"), by_hand)),
        }
    }

    /// Has the holder of a lock fenced; says since when it is, or how far that is.
    fn fence(
        &mut self,
        shared: &Shared,
        disk: usize,
        by: &Holder,
        method: FenceMethod,
    ) -> Result<Instant, String> {
        let (section, host) = (&self.env.fence, &by.host);
        let fencing = self.fencing.get_or_insert_with(|| {
            let order = FenceOrder {
                vm: by.vm.clone(),
                host: host.clone(),
                generation: by.generation,
                disk,
            };
            Fencing {
                host: host.clone(),
                generation: by.generation,
                attempts: 1,
                step: begin(&method, order, section.timeout()),
            }
        });
        if let Step::Running(result) = &fencing.step {
            let result = result.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(result) = result else { return Err(format!("{host} is being fenced")) };
            let (word, what) = match &result {
                Ok(words) => ("was", words),
                Err(reason) => ("could not be", reason),
            };
            let attempt = fencing.attempts;
            let line = format!("host {host} {word} fenced in attempt {attempt}: {what}");
            tracing(shared, &line);
            shared.lock().fenced = Some(line);
            let at = Instant::now();
            fencing.step = match result {
                Ok(_) => Step::Done { at },
                Err(reason) => Step::Failed { at, reason },
            };
        }
        match &fencing.step {
            Step::Done { at } => Ok(*at),
            Step::Failed { at, reason } => {
                let (attempts, most) = (fencing.attempts, section.attempts);
                let text =
                    format!("fencing {host} failed in {attempts} of {most} attempts: {reason}");
                if attempts < most && at.elapsed() >= FENCE_PAUSE {
                    fencing.attempts += 1;
                    let order = FenceOrder {
                        vm: by.vm.clone(),
                        host: host.clone(),
                        generation: by.generation,
                        disk,
                    };
                    fencing.step = begin(&method, order, section.timeout());
                }
                Err(text)
            }
            Step::Running(_) => Err(format!("{host} is being fenced")),
        }
    }

    /// With all locks in hand: asks whether the record is still this host's.
    fn confirm(&mut self, shared: &Shared) -> Owned {
        let waits = |what: &str| {
            Owned::NotYet(Waits {
                reason: format!("waits for the arbiter, to be sure before it writes: {what}"),
                remedy: "make the arbiter reachable from this host".to_owned(),
            })
        };
        let asked = self.asked.get_or_insert_with(|| {
            let (answer, asked) = mpsc::channel();
            shared.ask_arbiter(Question::Confirm { answer });
            asked
        });
        match asked.try_recv() {
            Err(TryRecvError::Empty) => waits("it has not answered yet"),
            Ok(ArbiterReply::Read(Some(record)))
                if record.live == Some(HostId(self.me.host.clone())) =>
            {
                Owned::Yes(std::mem::take(&mut self.taken))
            }
            Ok(ArbiterReply::Read(record)) => {
                let live = record.and_then(|r| r.live).map_or("no host".to_owned(), |h| h.0);
                Owned::Lost(format!("by the arbiter's record {live} has the VM now"))
            }
            Ok(_) | Err(TryRecvError::Disconnected) => {
                self.asked = None;
                waits("it does not answer")
            }
        }
    }
}

/// Starts the command on a thread of its own.
fn begin(method: &FenceMethod, order: FenceOrder, timeout: Duration) -> Step {
    let result = Arc::new(Mutex::new(None));
    let theirs = Arc::clone(&result);
    let method = method.clone();
    crate::log::line(&format!(
        "vm {}: fences host {}, which has the lock of disk {} in generation {}",
        order.vm, order.host, order.disk, order.generation
    ));
    let run = move || {
        let ended = fence(&method, &order, timeout);
        *theirs.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
    };
    match std::thread::Builder::new().name("fence".to_owned()).spawn(run) {
        Ok(_) => Step::Running(result),
        Err(e) => {
            Step::Failed { at: Instant::now(), reason: format!("cannot start a thread: {e}") }
        }
    }
}

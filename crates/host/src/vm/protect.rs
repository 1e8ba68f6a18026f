//! The protect thread: connects to a new secondary and sends it the snapshot.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use replica::Event;
use serde::{Deserialize, Serialize};

use super::Env;
use super::bulk::{self, Answer, DiskSink, Piece, QUEUE_PIECES, RamSender};
use super::definition::Definition;
use super::shared::{ProtectJob, Shared};
use super::vcpu::{Disks, Mail, tracing};
use crate::channel::{self, Dialer, Link, Received, Route};
use crate::disk::copy::{CHUNK_BYTES, CopyPhase, MirrorPlan};
use crate::disk::keeper::KeeperOrder;
use crate::disk::record::Statement;
use crate::one_line::one_line;

/// Purpose of the connection for messages and log.
pub(crate) const LOG: &str = "log";
/// Purpose of the connection for the snapshot.
pub(crate) const BULK: &str = "bulk";
/// Time to connect.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);

/// Time that the machine has to open its devices.
const DEVICES_TIME_MAX: Duration = Duration::from_secs(15);
/// Time that a secondary that gave up has to say why.
const REFUSAL_TIME_MAX: Duration = Duration::from_millis(200);
/// How much of that is shown.
const REFUSAL_CHARS_MAX: usize = 400;

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Preamble {
    pub(crate) vm: String,
    /// Ties the two connections of one protection together.
    pub(crate) session: u64,
    pub(crate) detection_ms: u32,
}

impl Preamble {
    /// How long a path may be silent before the other one is tried: well before the peer counts as lost.
    pub(crate) fn patience(&self) -> Duration {
        Duration::from_millis(u64::from(self.detection_ms) * 2 / 5)
    }
}

/// The thread's main function.
pub(crate) fn run(shared: &Arc<Shared>, env: &Env, jobs: &Receiver<ProtectJob>) {
    while let Ok(job) = jobs.recv() {
        if shared.lock().is_closed {
            return;
        }
        let attempt = job.attempt;
        let host = job.host.clone();
        match protect(shared, env, &job) {
            Ok(()) => {
                shared.mirrors_taken();
                shared.feed(Event::SnapshotSent { attempt });
            }
            Err(reason) => {
                shared.mailbox.post(Mail::AbandonSnapshot { attempt });
                if !job.is_abandoned.load(Ordering::SeqCst) {
                    let reason = format!("host {host}: {reason}");
                    shared.feed(Event::ProtectFailed { attempt, reason });
                }
            }
        }
        for disk in mirrored(shared) {
            disk.1.handle.abort_copy();
        }
    }
}

type MirroredDisk = (u8, super::vcpu::DiskPort);

fn mirrored(shared: &Shared) -> Vec<MirroredDisk> {
    let disks: Disks = shared.lock().ports.as_ref().map(|p| p.disks.clone()).unwrap_or_default();
    (0u8..).zip(disks).filter(|(_, d)| d.is_mirrored).collect()
}

fn connect(
    env: &Env,
    routes: &[Route],
    purpose: &str,
    preamble: &Preamble,
) -> Result<Link, String> {
    let dialer = Dialer {
        secret: env.secret.clone(),
        name: env.host.clone(),
        timeout: CONNECT_TIME_MAX,
        compresses: env.compresses,
    };
    // What takes long can be begun again; the log must not break.
    let link = match purpose {
        LOG => dialer.connect_bonded(routes, purpose),
        _ => dialer.connect(routes, purpose),
    };
    let mut link = link.map_err(|e| one_line(&e))?;
    link.sender.set_patience(preamble.patience());
    let bytes = postcard::to_stdvec(preamble).map_err(|e| e.to_string())?;
    link.sender.send(&bytes).map_err(|e| one_line(&e))?;
    Ok(link)
}

fn protect(shared: &Arc<Shared>, env: &Env, job: &ProtectJob) -> Result<(), String> {
    let peer = env.peers.get(&job.host.0).ok_or("it is not among this host's peers")?;
    let routes = peer.routes(env.log_source);
    wait_for_devices(shared, job)?;
    let definition = shared.lock().definition.clone().ok_or("the VM has no definition here")?;
    let mut session = [0; 8];
    rustix::rand::getrandom(&mut session, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| e.to_string())?;
    let session = u64::from_le_bytes(session);
    let detection_ms = definition.config.protection.detection_ms.unwrap_or(env.detection_ms);
    let preamble = Preamble { vm: shared.name.clone(), session, detection_ms };
    let generation = shared.lock().node.status().generation;
    let log = connect(env, &routes, LOG, &preamble)?;
    let mut bulk = connect(env, &routes, BULK, &preamble)?;
    let begin = Piece::Begin {
        version: replica::PROTOCOL_VERSION,
        text: definition.text.clone(),
        file: definition.file.clone(),
        disk_sizes: disk_sizes(shared)?,
        generation,
    };
    bulk::send_piece(&mut bulk.sender, &begin)?;
    let link = super::serve_link(shared, log, session)?;
    let go_on = || !job.is_abandoned.load(Ordering::SeqCst) && shared.has_session(session);
    let (queue, pieces) = sync_channel(QUEUE_PIECES);
    let disks = mirrored(shared);
    for (_, disk) in disks.iter().filter(|(_, disk)| disk.is_kept) {
        disk.handle.keep(KeeperOrder::Generation { generation, create: true });
    }
    let have = wait_for_have(&mut bulk.receiver, &go_on);
    let plans = have.map(|have| plans(&job.host.0, have, limit_of(env, &definition)));
    let result = plans.and_then(|plans| {
        // On a thread of its own: those of the log's link must not step back with it.
        let (to, disks, go_on) = (&mut bulk.sender, &disks, &go_on);
        let copy = move || {
            crate::background::enter();
            begin_mirrors(disks, &plans, &queue);
            copy_disks(disks, &pieces, to, go_on)?;
            let sender = Box::new(RamSender::new(queue));
            shared.mailbox.post(Mail::Snapshot { attempt: job.attempt, link, sender });
            bulk::send_all(to, &pieces, disks.len(), go_on)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("copy".to_owned());
            let copying = thread.spawn_scoped(scope, copy).map_err(|e| e.to_string())?;
            copying.join().unwrap_or_else(|_| Err("the copying thread has failed".to_owned()))
        })?;
        report_copies(shared, disks);
        wait_until_taken(&mut bulk.receiver, &go_on)
    });
    result.map_err(|reason| {
        let theirs = refusal(&mut bulk.receiver);
        shared.link_closed(link);
        theirs.unwrap_or(reason)
    })
}

/// Sizes of the disks as they are open: what a guest has written to an image that nobody said the format of does not matter.
fn disk_sizes(shared: &Shared) -> Result<Vec<u64>, String> {
    let inner = shared.lock();
    let ports = inner.ports.as_ref().ok_or("the machine is gone")?;
    Ok(ports.disks.iter().map(|disk| disk.handle.size()).collect())
}

/// Why the new secondary took no more, if it said so.
fn refusal(receiver: &mut channel::Receiver) -> Option<String> {
    match receiver.recv(Some(REFUSAL_TIME_MAX)) {
        Ok(Received::Frame(frame)) => match read_answer(&frame) {
            Ok(Answer::Refused(reason)) => Some(for_people(&reason)),
            Ok(Answer::Have(_) | Answer::Taken) | Err(_) => None,
        },
        Ok(Received::TimedOut | Received::Closed { .. }) | Err(_) => None,
    }
}

fn read_answer(frame: &[u8]) -> Result<Answer, String> {
    postcard::from_bytes(frame).map_err(|e| format!("it gave no answer: {e}"))
}

/// Waits until the new secondary has said what it has of the disks.
fn wait_for_have(
    receiver: &mut channel::Receiver,
    go_on: &impl Fn() -> bool,
) -> Result<Vec<Result<Vec<Statement>, String>>, String> {
    while go_on() {
        match receiver.recv(Some(Duration::from_millis(100))) {
            Ok(Received::Frame(frame)) => match read_answer(&frame)? {
                Answer::Have(have) => return Ok(have),
                Answer::Refused(reason) => return Err(for_people(&reason)),
                Answer::Taken => return Err("it took what was not sent".to_owned()),
            },
            Ok(Received::TimedOut) => {}
            Ok(Received::Closed { .. }) => return Err("it closed the connection".to_owned()),
            Err(e) => return Err(one_line(&e)),
        }
    }
    Err("it is not wanted any more".to_owned())
}

/// Most bytes of disks that are copied in a second.
fn limit_of(env: &Env, definition: &Definition) -> Option<u64> {
    definition.config.protection.resync_limit.or(env.resync_limit)
}

/// What the copy of each disk begins with.
fn plans(
    peer: &str,
    have: Vec<Result<Vec<Statement>, String>>,
    limit: Option<u64>,
) -> Vec<MirrorPlan> {
    let plan = |theirs: Result<_, String>| {
        let theirs = theirs.map_err(|why| for_people(&why));
        MirrorPlan { peer: peer.to_owned(), theirs, limit }
    };
    have.into_iter().map(plan).collect()
}

fn begin_mirrors(disks: &[MirroredDisk], plans: &[MirrorPlan], queue: &SyncSender<Piece>) {
    // The limit is for all of them together.
    let share = u64::try_from(disks.len()).unwrap_or(1).max(1);
    for (dev, disk) in disks {
        let sink = Box::new(DiskSink { dev: *dev, queue: queue.clone() });
        let plan = plans.get(usize::from(*dev)).cloned().unwrap_or_else(|| MirrorPlan {
            peer: String::new(),
            theirs: Err("it said nothing of this disk".to_owned()),
            limit: None,
        });
        let limit = plan.limit.map(|limit| (limit / share).max(1));
        disk.handle.begin_mirror(sink, MirrorPlan { limit, ..plan });
    }
}

/// Tells the log what was copied, and why.
fn report_copies(shared: &Shared, disks: &[MirroredDisk]) {
    for (dev, disk) in disks {
        let Some(copy) = disk.handle.status().copy else { continue };
        let mib = |chunks: u64| chunks as f64 * CHUNK_BYTES as f64 / f64::from(1 << 20);
        let (sent, total) = (mib(copy.chunks_sent), mib(copy.chunks_total));
        let peer = copy.peer.unwrap_or_default();
        let how = match copy.whole_because {
            Some(why) => format!("whole, since {why}"),
            None => "only what differs".to_owned(),
        };
        tracing(shared, &format!("disk {dev} to {peer}: {sent:.1} of {total:.1} MiB, {how}"));
    }
}

fn for_people(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(REFUSAL_CHARS_MAX).collect()
}

/// Waits until the new secondary says that it has everything, or why not.
fn wait_until_taken(
    receiver: &mut channel::Receiver,
    go_on: &impl Fn() -> bool,
) -> Result<(), String> {
    while go_on() {
        match receiver.recv(Some(Duration::from_millis(100))) {
            Ok(Received::Frame(frame)) => match read_answer(&frame)? {
                Answer::Taken => return Ok(()),
                Answer::Refused(reason) => return Err(for_people(&reason)),
                Answer::Have(_) => return Err("it says twice what it has".to_owned()),
            },
            Ok(Received::TimedOut) => {}
            Ok(Received::Closed { .. }) => {
                return Err("it closed the connection before it had everything".to_owned());
            }
            Err(e) => return Err(one_line(&e)),
        }
    }
    Err("it is not wanted any more".to_owned())
}

/// Waits until the machine's devices are open: protection begins as soon as the right to run is won, and without its
/// disks a snapshot is not complete.
fn wait_for_devices(shared: &Shared, job: &ProtectJob) -> Result<(), String> {
    let start = std::time::Instant::now();
    let is_ready = || {
        let inner = shared.lock();
        inner.ports.is_some() && inner.waits.is_none()
    };
    while !is_ready() {
        if job.is_abandoned.load(Ordering::SeqCst) || start.elapsed() > DEVICES_TIME_MAX {
            return Err("the machine is not ready".to_owned());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Copies the disks while the guest writes, until little is left that changes.
fn copy_disks(
    disks: &[MirroredDisk],
    pieces: &Receiver<Piece>,
    sender: &mut channel::Sender,
    go_on: &impl Fn() -> bool,
) -> Result<(), String> {
    loop {
        if !go_on() {
            return Err("it is not wanted any more".to_owned());
        }
        while let Ok(piece) = pieces.recv_timeout(Duration::from_millis(2)) {
            bulk::send_piece(sender, &piece)?;
        }
        let mut waiting = false;
        for (dev, disk) in disks {
            let progress = disk.handle.status().copy;
            match progress.as_ref().map(|p| p.phase) {
                Some(CopyPhase::Converged) => {}
                Some(CopyPhase::Failed) => {
                    let why = progress.and_then(|p| p.error).unwrap_or_default();
                    return Err(format!("disk {dev} cannot be copied: {why}"));
                }
                None | Some(CopyPhase::Passes | CopyPhase::Frozen | CopyPhase::Done) => {
                    waiting = true
                }
            }
        }
        if !waiting {
            return Ok(());
        }
    }
}

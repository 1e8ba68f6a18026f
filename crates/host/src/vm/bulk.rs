//! The snapshot on its way to a new secondary: definition, disks, machine, images, pages.
//!
//! # Place
//! On the primary the vCPU thread puts pages and the disks' threads put chunks into one bounded queue, which the protect
//! thread sends; on the new secondary a thread of its own builds machine and disks from it.
//!
//! # Invariants
//! - INV-BULK-1: the vCPU thread never waits here: a full queue only delays the sweep.
//! - INV-BULK-2: what arrives is used only when all of it has arrived; until then nothing under a final name changes, but a
//!   copy of a disk that is brought up to date in place, which says so (INV-RESYNC-1).
//!
//! # Format
//! Frames of the channel, each a [`Piece`] in postcard; the other way an [`Answer`] each. Version: [`replica::PROTOCOL_VERSION`] and the machine's model
//! version, both checked.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::time::Duration;

use eventlog::LogPos;
use machine::config::BootImages;
use machine::ram::{GuestRam, PAGE_SIZE, SnapshotStep};
use machine::{Machine, MachineSaved};
use serde::{Deserialize, Serialize};

use super::definition::Definition;
use super::shared::Shared;
use crate::channel::{self, Received, SendError};
use crate::config::DiskMode;
use crate::disk::copy::{ChunkSink, CopyItem, Refused};
use crate::disk::record::Statement;
use crate::disk::resync::DiskReceiver;
use crate::one_line::one_line;

/// Pieces that wait to be sent.
pub(crate) const QUEUE_PIECES: usize = 32;
/// Pages in a piece.
const PAGES_PER_PIECE: usize = 64;
/// Pages that the sweep looks at after a slice.
const SWEEP_PAGES: u32 = 2048;
/// Pieces handed over after a slice.
const PIECES_PER_SLICE: usize = 4;
/// Bytes of a boot image in a piece.
const IMAGE_CHUNK: usize = 256 << 10;
/// Silence after which a transfer counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Largest boot image that is taken.
const IMAGE_BYTES_MAX: u64 = 2 << 30;

/// Machine state and where in the log it belongs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SnapshotHead {
    pub(crate) saved: MachineSaved,
    pub(crate) pos: LogPos,
    /// The log's clock base: guest time, icount, rate.
    pub(crate) clock: (u64, u64, u32),
}

/// Which boot image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ImageKind {
    Bios,
    Kernel,
    Initrd,
}

/// A piece of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Piece {
    Begin {
        version: u8,
        text: String,
        file: PathBuf,
        disk_sizes: Vec<u64>,
        /// Of the record that the sender is live by.
        generation: u64,
    },
    Disk {
        dev: u8,
        item: CopyItem,
    },
    Head(Box<SnapshotHead>),
    Append(String),
    Image {
        kind: ImageKind,
        total: u64,
        bytes: Vec<u8>,
    },
    Pages(Vec<(u32, Vec<u8>)>),
    /// Everything of the machine was sent.
    MachineEnd,
}

/// What the new secondary says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// After the beginning: for each disk what is known of the copy that is here, or why nothing helps.
    Have(Vec<Result<Vec<Statement>, String>>),
    /// Everything is here.
    Taken,
    /// It does not become one, for this reason.
    Refused(String),
}

/// Says it.
pub(crate) fn answer(sender: &mut channel::Sender, answer: &Answer) -> Result<(), String> {
    let bytes = postcard::to_stdvec(answer).map_err(|e| e.to_string())?;
    sender.send(&bytes).map_err(|e| one_line(&e))
}

/// Puts chunks of a disk into the queue.
#[derive(Debug)]
pub(crate) struct DiskSink {
    pub(crate) dev: u8,
    pub(crate) queue: SyncSender<Piece>,
}

impl ChunkSink for DiskSink {
    fn offer(&mut self, item: CopyItem) -> Result<(), Refused> {
        let back = |piece| match piece {
            Piece::Disk { item, .. } => item,
            _ => unreachable!("what comes back is what was sent"),
        };
        self.queue.try_send(Piece::Disk { dev: self.dev, item }).map_err(|e| match e {
            TrySendError::Full(piece) => Refused::Full(back(piece)),
            TrySendError::Disconnected(_) => Refused::Gone,
        })
    }
}

/// The vCPU thread's end: sends head, images and pages without ever waiting.
#[derive(Debug)]
pub(crate) struct RamSender {
    queue: SyncSender<Piece>,
    waiting: VecDeque<Piece>,
    /// Images still to be sent, with how much of each was.
    images: VecDeque<(ImageKind, Arc<[u8]>, usize)>,
    ram_is_done: bool,
}

impl RamSender {
    pub(crate) fn new(queue: SyncSender<Piece>) -> Self {
        Self { queue, waiting: VecDeque::new(), images: VecDeque::new(), ram_is_done: false }
    }

    /// Starts with the state and the images. The images are cut to pieces later: this is inside the guest's pause.
    pub(crate) fn begin(&mut self, head: SnapshotHead, images: BootImages) {
        self.waiting.push_back(Piece::Head(Box::new(head)));
        self.waiting.push_back(Piece::Append(images.append));
        let all = [
            (ImageKind::Bios, images.bios),
            (ImageKind::Kernel, images.kernel),
            (ImageKind::Initrd, images.initrd),
        ];
        self.images = all.into_iter().filter_map(|(kind, image)| Some((kind, image?, 0))).collect();
    }

    /// The next piece of the images, if there is one left.
    fn next_image(&mut self) -> Option<Piece> {
        let (kind, image, at) = self.images.front_mut()?;
        let end = (*at + IMAGE_CHUNK).min(image.len());
        let piece = Piece::Image {
            kind: *kind,
            total: image.len() as u64,
            bytes: image[*at..end].to_vec(),
        };
        *at = end;
        if end == image.len() {
            self.images.pop_front();
        }
        Some(piece)
    }

    /// Hands over some pages; false when all is handed over, or nobody takes any more.
    pub(crate) fn pump(&mut self, ram: &mut GuestRam) -> bool {
        let mut budget = SWEEP_PAGES;
        for _ in 0..PIECES_PER_SLICE {
            if self.waiting.is_empty() {
                if self.ram_is_done {
                    return false;
                }
                match self.next_image() {
                    Some(piece) => self.waiting.push_back(piece),
                    None => self.collect_pages(ram, &mut budget),
                }
            }
            let Some(piece) = self.waiting.pop_front() else { return true };
            match self.queue.try_send(piece) {
                Ok(()) => {}
                Err(TrySendError::Full(piece)) => {
                    self.waiting.push_front(piece);
                    return true;
                }
                Err(TrySendError::Disconnected(_)) => {
                    ram.disarm_snapshot();
                    return false;
                }
            }
        }
        true
    }

    fn collect_pages(&mut self, ram: &mut GuestRam, budget: &mut u32) {
        let mut pages = Vec::new();
        while pages.len() < PAGES_PER_PIECE {
            match ram.next_snapshot_page(budget) {
                SnapshotStep::Page(p) => {
                    if let Some(data) = p.data {
                        pages.push((p.page, data.into_vec()));
                    }
                }
                SnapshotStep::OutOfBudget => break,
                SnapshotStep::Done => {
                    self.ram_is_done = true;
                    break;
                }
            }
        }
        if !pages.is_empty() {
            self.waiting.push_back(Piece::Pages(pages));
        }
        if self.ram_is_done {
            self.waiting.push_back(Piece::MachineEnd);
        }
    }
}

/// Sends a piece, waiting as long as the peer takes something now and then.
pub(crate) fn send_piece(sender: &mut channel::Sender, piece: &Piece) -> Result<(), String> {
    let bytes = postcard::to_stdvec(piece).map_err(|e| e.to_string())?;
    let mut before = sender.waiting_bytes();
    let mut silent_since = std::time::Instant::now();
    loop {
        match sender.send(&bytes) {
            Ok(()) => return Ok(()),
            Err(SendError::Full { waiting }) => {
                if waiting != before {
                    before = waiting;
                    silent_since = std::time::Instant::now();
                }
                if silent_since.elapsed() > SILENCE_MAX {
                    return Err("the new secondary takes no more data".to_owned());
                }
            }
            Err(e) => return Err(one_line(&e)),
        }
    }
}

/// Sends the queue's pieces until the machine and all `disks` are complete. `go_on` says when to give up.
pub(crate) fn send_all(
    sender: &mut channel::Sender,
    queue: &Receiver<Piece>,
    disks: usize,
    go_on: impl Fn() -> bool,
) -> Result<(), String> {
    let (mut machine_is_done, mut disks_done) = (false, 0);
    while !(machine_is_done && disks_done == disks) {
        if !go_on() {
            return Err("it is not wanted any more".to_owned());
        }
        let piece = match queue.recv_timeout(Duration::from_millis(100)) {
            Ok(piece) => piece,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return Err("the machine is gone".to_owned()),
        };
        match &piece {
            Piece::MachineEnd => machine_is_done = true,
            Piece::Disk { item: CopyItem::End { .. }, .. } => disks_done += 1,
            Piece::Disk { item: CopyItem::Failed { reason }, dev } => {
                return Err(format!("disk {dev} cannot be copied: {reason}"));
            }
            Piece::Disk { .. }
            | Piece::Begin { .. }
            | Piece::Head(_)
            | Piece::Append(_)
            | Piece::Image { .. }
            | Piece::Pages(_) => {}
        }
        send_piece(sender, &piece)?;
    }
    Ok(())
}

/// A complete snapshot.
pub(crate) struct Loaded {
    pub(crate) definition: Definition,
    pub(crate) machine: Machine,
    pub(crate) pos: LogPos,
    pub(crate) clock: (u64, u64, u32),
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("pos", &self.pos).finish_non_exhaustive()
    }
}

/// Builds a snapshot from its pieces.
struct Builder {
    definition: Definition,
    mirrors: Vec<Option<DiskReceiver>>,
    /// Complete ones; they get their final names when everything else is complete, too.
    mirrors_done: Vec<DiskReceiver>,
    disks_pending: usize,
    generation: u64,
    head: Option<Box<SnapshotHead>>,
    append: String,
    images: [Vec<u8>; 3],
    image_sizes: [u64; 3],
    machine: Option<Machine>,
    machine_is_complete: bool,
}

impl Builder {
    fn begin(
        definition: Definition,
        disk_sizes: &[u64],
        generation: u64,
        state_dir: &Path,
    ) -> Result<Self, String> {
        if disk_sizes.len() != definition.config.disks.len() {
            return Err("the snapshot's disks do not fit the VM's definition".to_owned());
        }
        let mut mirrors = Vec::new();
        let mut disks_pending = 0;
        let sections = definition.config.disks.iter().zip(disk_sizes);
        for (dev, (section, &size)) in (0u8..).zip(sections) {
            if section.mode == DiskMode::Mirrored {
                let of = (definition.config.name.as_str(), dev);
                let is_kept = !section.readonly;
                let receiver = DiskReceiver::open(section, state_dir, of, size, is_kept);
                mirrors.push(Some(receiver));
                disks_pending += 1;
            } else {
                mirrors.push(None);
            }
        }
        Ok(Self {
            definition,
            mirrors,
            mirrors_done: Vec::new(),
            disks_pending,
            generation,
            head: None,
            append: String::new(),
            images: Default::default(),
            image_sizes: [0; 3],
            machine: None,
            machine_is_complete: false,
        })
    }

    /// What the sender is to know of the disks that are here.
    fn have(&self) -> Answer {
        let none = || Err("it is not mirrored".to_owned());
        let disks = self.mirrors.iter();
        Answer::Have(disks.map(|m| m.as_ref().map_or_else(none, DiskReceiver::have)).collect())
    }

    fn take(&mut self, piece: Piece) -> Result<(), String> {
        match piece {
            Piece::Begin { .. } => return Err("the snapshot begins twice".to_owned()),
            Piece::Disk { .. } => return Err("the snapshot's disks are taken elsewhere".to_owned()),
            Piece::Head(head) => self.head = Some(head),
            Piece::Append(append) => self.append = append,
            Piece::Image { .. } if self.machine.is_some() => {
                return Err("a boot image of the snapshot comes too late".to_owned());
            }
            Piece::Image { kind, total, bytes } => {
                let at = kind as usize;
                if total > IMAGE_BYTES_MAX
                    || self.images[at].len() as u64 + bytes.len() as u64 > total
                {
                    return Err("a boot image of the snapshot is malformed".to_owned());
                }
                self.image_sizes[at] = total;
                self.images[at].extend_from_slice(&bytes);
            }
            Piece::Pages(pages) => self.take_pages(&pages)?,
            Piece::MachineEnd => {
                self.machine()?;
                self.machine_is_complete = true;
            }
        }
        Ok(())
    }

    fn take_disk(&mut self, dev: u8, item: &CopyItem) -> Result<(), String> {
        let slot = self.mirrors.get_mut(usize::from(dev)).filter(|m| m.is_some());
        let Some(mirror) = slot else { return Err(format!("the snapshot has no disk {dev}")) };
        let Some(writer) = mirror else { return Ok(()) };
        if writer.apply(item).map_err(|e| format!("disk {dev}: {e}"))?
            && let Some(writer) = mirror.take()
        {
            self.mirrors_done.push(writer);
            self.disks_pending -= 1;
        }
        Ok(())
    }

    fn machine(&mut self) -> Result<&mut Machine, String> {
        if self.machine.is_none() {
            let head = self.head.as_ref().ok_or("the snapshot has no machine state")?;
            let whole = |at: usize| {
                let (have, want) = (self.images[at].len() as u64, self.image_sizes[at]);
                if have == want {
                    Ok(())
                } else {
                    Err("a boot image of the snapshot is incomplete")
                }
            };
            (0..3).try_for_each(whole)?;
            let image = |bytes: &Vec<u8>| (!bytes.is_empty()).then(|| Arc::from(bytes.as_slice()));
            let images = BootImages {
                bios: image(&self.images[0]),
                kernel: image(&self.images[1]),
                initrd: image(&self.images[2]),
                append: self.append.clone(),
            };
            self.images = Default::default();
            self.image_sizes = [0; 3];
            let machine = Machine::restore(&head.saved, images).map_err(|e| one_line(&e))?;
            crate::huge::advise(machine.ram().bytes());
            self.machine = Some(machine);
        }
        self.machine.as_mut().ok_or_else(|| "the snapshot has no machine state".to_owned())
    }

    fn take_pages(&mut self, pages: &[(u32, Vec<u8>)]) -> Result<(), String> {
        let machine = self.machine()?;
        for (page, data) in pages {
            if data.len() != PAGE_SIZE {
                return Err(format!("page {page} of the snapshot has {} bytes", data.len()));
            }
            machine.load_page(*page, data).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.machine_is_complete && self.disks_pending == 0
    }

    fn finish(self) -> Result<Loaded, String> {
        let head = self.head.ok_or("the snapshot has no machine state")?;
        let machine = self.machine.ok_or("the snapshot has no machine state")?;
        if head.pos.icount != machine.icount() {
            return Err("the snapshot's position is not its machine's".to_owned());
        }
        for writer in self.mirrors_done {
            // What its primary has done since, it does not have yet.
            writer.finish(self.generation.saturating_sub(1))?;
        }
        Ok(Loaded { definition: self.definition, machine, pos: head.pos, clock: head.clock })
    }
}

/// Receives a snapshot of the VM. `go_on` says when to give up.
pub(crate) fn receive(
    link: &mut channel::Link,
    shared: &Shared,
    state_dir: &Path,
    go_on: impl Fn() -> bool,
) -> Result<Loaded, String> {
    let mut builder: Option<Builder> = None;
    let mut silent = Duration::ZERO;
    let step = Duration::from_millis(200);
    loop {
        if !go_on() {
            return Err("it is not wanted any more".to_owned());
        }
        let frame = match link.receiver.recv(Some(step)).map_err(|e| one_line(&e))? {
            Received::Frame(frame) => frame,
            Received::TimedOut => {
                silent += step;
                // A disk that converges slowly may make a pause; only a dead connection stays silent for long.
                if silent > 6 * SILENCE_MAX {
                    return Err("the primary sends nothing any more".to_owned());
                }
                continue;
            }
            Received::Closed { .. } => {
                return Err("the connection was closed before the end".to_owned());
            }
        };
        silent = Duration::ZERO;
        let piece: Piece =
            postcard::from_bytes(&frame).map_err(|e| format!("malformed snapshot: {e}"))?;
        match (&mut builder, piece) {
            (None, Piece::Begin { version, text, file, disk_sizes, generation }) => {
                if version != replica::PROTOCOL_VERSION {
                    let ours = replica::PROTOCOL_VERSION;
                    return Err(format!(
                        "the peer speaks protocol version {version}, this host {ours}"
                    ));
                }
                let definition = Definition::parse(text, file)?.placed(state_dir)?;
                if definition.config.name != shared.name {
                    return Err("the snapshot is of another VM".to_owned());
                }
                shared.check_failed_disks(&definition)?;
                let begun = Builder::begin(definition, &disk_sizes, generation, state_dir)?;
                answer(&mut link.sender, &begun.have())?;
                builder = Some(begun);
            }
            (None, _) => return Err("the snapshot does not start at its beginning".to_owned()),
            (Some(b), Piece::Disk { dev, item }) => b.take_disk(dev, &item).inspect_err(|e| {
                shared.note_failure(dev, e, None);
            })?,
            (Some(b), piece) => b.take(piece)?,
        }
        if builder.as_ref().is_some_and(Builder::is_complete)
            && let Some(builder) = builder.take()
        {
            return builder.finish();
        }
    }
}

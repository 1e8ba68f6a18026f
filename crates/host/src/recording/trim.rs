//! Keeps a recording within its limit: drops its oldest segment when the next one can stand without it.
//!
//! # Invariants
//! INV-RECORD-3: the snapshot of the segment that becomes the oldest is complete, and merged with the one that it builds
//! on, before anything is removed.
//!
//! # Failure
//! What cannot be merged or removed ends the recording: it would grow without end otherwise.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::limit::RecordLimit;
use super::recorder::stopped;
use crate::one_line::one_line;
use crate::snapshot::{SnapshotReader, chain};

/// A segment as the trimmer knows it.
#[derive(Debug)]
pub(super) struct Segment {
    log: PathBuf,
    began: Instant,
    /// The snapshot that it begins with, once that is complete.
    snapshot: Option<PathBuf>,
}

impl Segment {
    /// A segment that begins now.
    pub(super) fn new(log: PathBuf) -> Self {
        Self { log, began: Instant::now(), snapshot: None }
    }
}

enum Event {
    Segment(Segment),
    Snapshot(PathBuf),
}

/// The recorder's end of the thread.
#[derive(Debug)]
pub(super) struct Trimmer {
    queue: Option<Sender<Event>>,
    is_failed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Trimmer {
    /// Starts the thread, if there is a limit to keep.
    pub(super) fn start(dir: PathBuf, limit: RecordLimit, first: Segment) -> std::io::Result<Self> {
        let is_failed = Arc::<AtomicBool>::default();
        if limit.is_none() {
            return Ok(Self { queue: None, is_failed, thread: None });
        }
        let (queue, events) = channel();
        let mut work = Work { dir, limit, segments: VecDeque::from([first]) };
        let theirs = Arc::clone(&is_failed);
        let run = move || {
            if let Err(reason) = work.run(&events) {
                stopped(&work.dir, &reason);
                theirs.store(true, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new().name("trim".to_owned()).spawn(run)?;
        Ok(Self { queue: Some(queue), is_failed, thread: Some(thread) })
    }

    fn send(&self, event: Event) {
        if let Some(queue) = &self.queue {
            // A thread that has ended has failed, which is asked for elsewhere.
            drop(queue.send(event));
        }
    }

    pub(super) fn segment_began(&self, segment: Segment) {
        self.send(Event::Segment(segment));
    }

    /// The snapshot of the newest segment is complete.
    pub(super) fn snapshot_taken(&self, path: PathBuf) {
        self.send(Event::Snapshot(path));
    }

    pub(super) fn has_failed(&self) -> bool {
        self.is_failed.load(Ordering::Relaxed)
    }
}

impl Drop for Trimmer {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // The thread has said what it had to say.
            drop(thread.join());
        }
    }
}

struct Work {
    dir: PathBuf,
    limit: RecordLimit,
    segments: VecDeque<Segment>,
}

impl Work {
    fn run(&mut self, events: &Receiver<Event>) -> Result<(), String> {
        while let Ok(event) = events.recv() {
            match event {
                Event::Segment(segment) => self.segments.push_back(segment),
                Event::Snapshot(path) => {
                    if let Some(newest) = self.segments.back_mut() {
                        newest.snapshot = Some(path);
                    }
                    while self.is_over()? {
                        self.drop_oldest()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the oldest segment is too much, and can go.
    fn is_over(&self) -> Result<bool, String> {
        let Some(next) = self.segments.get(1).filter(|next| next.snapshot.is_some()) else {
            return Ok(false);
        };
        if self.limit.time.is_some_and(|keep| next.began.elapsed() >= keep) {
            return Ok(true);
        }
        match self.limit.bytes {
            Some(most) => Ok(self.bytes().map_err(|e| e.to_string())? > most),
            None => Ok(false),
        }
    }

    fn bytes(&self) -> std::io::Result<u64> {
        let files = self.segments.iter().flat_map(|s| s.snapshot.iter().chain([&s.log]));
        files.map(|path| std::fs::metadata(path).map(|meta| meta.len())).sum()
    }

    fn drop_oldest(&mut self) -> Result<(), String> {
        let Some(oldest) = self.segments.pop_front() else { return Ok(()) };
        let next = self.segments.front().and_then(|next| next.snapshot.clone());
        if let (Some(parent), Some(child)) = (&oldest.snapshot, next) {
            let reader = SnapshotReader::open(&child).map_err(|e| one_line(&e))?;
            if reader.head().parent.is_some() {
                chain::merge(parent, &child, &child).map_err(|e| one_line(&e))?;
            }
        }
        let remove = |path: &Path| {
            std::fs::remove_file(path).map_err(|e| format!("cannot remove {}: {e}", path.display()))
        };
        remove(&oldest.log)?;
        oldest.snapshot.as_deref().map_or(Ok(()), remove)
    }
}

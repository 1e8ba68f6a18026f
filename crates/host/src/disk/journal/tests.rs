//! Two copies of a disk through crashes at any point: what the records say makes them equal again.

use std::path::{Path, PathBuf};

use super::super::record::modified;
use super::*;

const EXTENT: u64 = 1 << 20;
const EXTENTS: u64 = 9;
const SIZE: u64 = EXTENTS * EXTENT - CHUNK_BYTES;
const CHUNKS: u64 = SIZE / CHUNK_BYTES;
const PEERS: [&str; 2] = ["a", "b"];

fn none() -> Vec<(u64, u64)> {
    Vec::new()
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("d.img");
    std::fs::write(&path, b"").unwrap();
    path
}

fn open(image: &Path) -> Journal {
    Journal::open(image, image.parent().unwrap(), "vm", 0, SIZE)
}

fn id(n: u64) -> CheckpointId {
    CheckpointId(u128::from(n).to_le_bytes())
}

fn statement(n: u64) -> Statement {
    let marks = Bitmap::empty(EXTENTS).to_bytes();
    Statement { id: id(n), peer: "b".to_owned(), marks }
}

#[test]
fn marks_are_stored_once_and_a_stream_marks_ahead() {
    let tmp = tempfile::tempdir().unwrap();
    let image = image(tmp.path());
    let mut journal = open(&image);
    assert!(journal.unknown().unwrap().contains("no record"));
    journal.before_write(0, 512, none).unwrap();
    assert_eq!((journal.is_kept(), journal.stores()), (false, 0));
    journal.complete(&[statement(1)], 3).unwrap();
    let stores = journal.stores();
    for offset in (0..SIZE).step_by(CHUNK_BYTES as usize) {
        journal.before_write(offset, CHUNK_BYTES, none).unwrap();
    }
    assert_eq!(journal.stores() - stores, 3, "0 1 2, 3 4 5 6 7, 8");
    journal.before_write(0, SIZE, || panic!("everything is marked")).unwrap();
    drop(journal);
    let mut journal = open(&image);
    assert_eq!((journal.unknown(), journal.generation()), (None, 3));
    let (base, differing) = journal.differing(&[statement(2), statement(1)]).unwrap();
    assert_eq!((base, differing.ones()), (id(1), CHUNKS));
    assert!(journal.differing(&[statement(2)]).is_none());
}

#[test]
fn requests_that_wait_are_marked_with_the_first_and_hot_extents_beforehand() {
    let tmp = tempfile::tempdir().unwrap();
    let mut journal = open(&image(tmp.path()));
    journal.complete(&[statement(1)], 3).unwrap();
    let stores = journal.stores();
    let waiting = || vec![(7 * EXTENT, 512), (4 * EXTENT, 0), (u64::MAX, 5), (2 * EXTENT, EXTENT)];
    journal.before_write(5 * EXTENT, 512, waiting).unwrap();
    journal.before_write(7 * EXTENT, 512, none).unwrap();
    journal.before_write(2 * EXTENT, EXTENT, none).unwrap();
    assert_eq!(journal.stores() - stores, 1);
    journal.checkpoint(id(2), "b");
    assert_eq!(journal.pending(), Some(id(2)));
    journal.before_write(3 * EXTENT, 512, none).unwrap();
    assert_eq!(journal.flushed(None).unwrap(), None);
    assert_eq!(journal.flushed(Some(id(2))).unwrap(), Some(id(2)));
    journal.settle(id(2)).unwrap();
    let stores = journal.stores();
    for extent in [2, 3, 5, 7] {
        journal.before_write(extent * EXTENT, 512, none).unwrap();
    }
    assert_eq!(journal.stores(), stores, "written of late");
    journal.before_write(8 * EXTENT, 512, none).unwrap();
    assert_eq!(journal.stores(), stores + 1);
    let told = journal.export("a", "b");
    assert_eq!((told.len(), told[0].id, told[0].peer.as_str()), (1, id(2), "a"));
    assert_eq!(journal.differing(&told).unwrap().0, id(2));
}

#[test]
fn a_record_that_cannot_be_stored_is_removed_unless_the_copy_is_none() {
    let tmp = tempfile::tempdir().unwrap();
    let image = image(tmp.path());
    let mut journal = open(&image);
    journal.complete(&[statement(1)], 1).unwrap();
    let file = journal.path.clone();
    // A directory of its name: what is opened as a file is there no more.
    let broken = |journal: &mut Journal| {
        journal.file = None;
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
    };
    journal.begin_resync(&Bitmap::empty(EXTENTS)).unwrap();
    broken(&mut journal);
    let refused = journal.before_write(0, 512, none).unwrap_err();
    assert!(refused.contains("d.img.understudy"), "{refused}");
    std::fs::remove_dir(&file).unwrap();
    journal.complete(&[statement(2)], 1).unwrap();
    journal.close();
    assert!(open(&image).is_closed());
    assert_eq!(open(&image).record.closed, modified(&image));
    let mut journal = open(&image);
    journal.before_write(0, 512, none).unwrap();
    assert!(!open(&image).is_closed());
}

/// A copy on a host: what is in its file, and what of that a power cut may take back.
struct Copy {
    host: usize,
    image: PathBuf,
    journal: Option<Journal>,
    cached: Vec<u32>,
    /// Writes that were not flushed: chunk, and what was there before.
    unsynced: Vec<(u64, u32)>,
    /// Position in the order of requests.
    at: usize,
    stated: Option<CheckpointId>,
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

impl Copy {
    fn new(dir: &Path, host: usize) -> Self {
        let dir = dir.join(PEERS[host]);
        std::fs::create_dir(&dir).unwrap();
        let image = image(&dir);
        Self {
            host,
            journal: Some(open(&image)),
            image,
            cached: vec![0; CHUNKS as usize],
            unsynced: Vec::new(),
            at: 0,
            stated: None,
        }
    }

    fn journal(&mut self) -> &mut Journal {
        self.journal.as_mut().unwrap()
    }

    fn write(&mut self, chunk: u64, value: u32) {
        self.journal().before_write(chunk * CHUNK_BYTES, CHUNK_BYTES, none).unwrap();
        let before = std::mem::replace(&mut self.cached[chunk as usize], value);
        self.unsynced.push((chunk, before));
    }

    fn flush(&mut self) {
        let pending = self.journal().pending();
        self.unsynced.clear();
        if let Some(id) = self.journal().flushed(pending).unwrap() {
            self.stated = Some(id);
        }
    }

    /// The power fails, in the middle of a store of the record or not.
    fn cut(&mut self, random: &mut Random) {
        let record = self.journal().path.clone();
        let before = std::fs::read(&record).ok();
        match random.below(3) {
            0 => {
                let chunk = random.below(CHUNKS);
                self.journal().before_write(chunk * CHUNK_BYTES, CHUNK_BYTES, none).unwrap();
            }
            // A flush may have been done whose end nobody heard of.
            1 => self.flush(),
            _ => {}
        }
        self.journal = None;
        // The last store may not have come through, where it was not waited for.
        if let (0, Some(before)) = (random.below(2), before) {
            std::fs::write(&record, before).unwrap();
        }
        // Of the writes that are not flushed any may be lost. Undone from the last on, a chunk keeps one of its values.
        while let Some((chunk, before)) = self.unsynced.pop() {
            if random.below(2) == 0 {
                self.cached[chunk as usize] = before;
            } else {
                self.unsynced.retain(|(other, _)| *other != chunk);
            }
        }
        self.stated = None;
    }

    fn resync_from(
        &mut self,
        source: &mut Self,
        next_id: u64,
        random: &mut Random,
        whole: bool,
    ) -> bool {
        let peer = PEERS[self.host];
        let theirs = self.journal().export(peer, PEERS[source.host]);
        let found = source.journal().differing(&theirs);
        let ids = |told: &[Statement]| told.iter().map(|s| s.id.0[0]).collect::<Vec<_>>();
        let (here, there) = (source.journal().export("", ""), ids(&theirs));
        assert!(whole || found.is_some(), "no checkpoint in common: {:?}, {there:?}", ids(&here));
        let differing = found.map_or_else(|| Bitmap::full(CHUNKS), |(_, differing)| differing);
        let count = differing.ones();
        self.journal().begin_resync(&extents_of(&differing, SIZE)).unwrap();
        for (index, chunk) in (0..).zip(differing.iter()) {
            if !whole && count > 1 && index == random.below(count * 3) {
                // The receiver fails, or only the connection.
                if random.below(2) == 0 {
                    self.cut(random);
                    self.journal = Some(open(&self.image));
                }
                assert_eq!(self.journal().state(), CopyState::BeingCopied);
                return false;
            }
            self.write(chunk, source.cached[chunk as usize]);
        }
        let me = PEERS[source.host];
        source.journal().checkpoint(id(next_id), peer);
        let statements = source.journal().export(me, peer);
        self.unsynced.clear();
        self.journal().complete(&statements, 1).unwrap();
        self.stated = Some(id(next_id));
        true
    }
}

/// A request that both hosts make, or a checkpoint, with the one that is settled by then.
#[derive(Clone, Copy)]
enum Logged {
    Write(u64, u32),
    Checkpoint(CheckpointId, Option<CheckpointId>),
}

/// Names of checkpoints and values of chunks, each once.
struct Counters {
    ids: u64,
    value: u32,
}

/// Requests that both make, the other one later.
fn run_protected(live: &mut Copy, other: &mut Copy, random: &mut Random, next: &mut Counters) {
    let mut log: Vec<Logged> = Vec::new();
    let mut settled = None;
    other.at = 0;
    for _ in 0..random.below(120) {
        match random.below(20) {
            0..=9 => {
                next.value += 1;
                let hot = random.below(3) > 0;
                let chunk = random.below(if hot { CHUNKS / 4 } else { CHUNKS });
                live.write(chunk, next.value);
                log.push(Logged::Write(chunk, next.value));
            }
            10..=15 if other.at < log.len() => {
                match log[other.at] {
                    Logged::Write(chunk, value) => other.write(chunk, value),
                    Logged::Checkpoint(id, settled) => {
                        settled.into_iter().for_each(|s| other.journal().settle(s).unwrap());
                        other.journal().checkpoint(id, PEERS[live.host]);
                    }
                }
                other.at += 1;
            }
            16 => live.flush(),
            17 => other.flush(),
            18 if live.journal().pending().is_none() => {
                live.journal().checkpoint(id(next.ids), PEERS[other.host]);
                log.push(Logged::Checkpoint(id(next.ids), settled));
                next.ids += 1;
            }
            // One that a later one took the place of is settled no more.
            19 if live.stated == Some(id(next.ids - 1)) && live.stated == other.stated => {
                // The other one hears it with the next checkpoint.
                settled = live.stated;
                settled.into_iter().for_each(|s| live.journal().settle(s).unwrap());
            }
            _ => {}
        }
    }
}

/// One is lost, or both, or none; says whether the other one goes on.
fn lose(live: &mut Copy, other: &mut Copy, random: &mut Random) -> bool {
    match random.below(5) {
        0 => other.cut(random),
        1 => live.cut(random),
        2 => {
            other.cut(random);
            live.cut(random);
        }
        // A process that ends, or a planned end.
        3 => other.journal().close(),
        _ => {
            live.journal().close();
            other.journal().close();
            (live.journal, other.journal) = (None, None);
        }
    }
    let swap = match (&live.journal, &other.journal) {
        (None, Some(_)) => true,
        (Some(_), None) => false,
        _ => random.below(2) == 0,
    };
    for copy in [live, other] {
        let image = copy.image.clone();
        copy.journal.get_or_insert_with(|| open(&image));
        copy.stated = None;
    }
    swap
}

/// A random history of two hosts.
fn history(seed: u64) {
    let tmp = tempfile::tempdir().unwrap();
    let mut random = Random(seed);
    let mut live = Copy::new(tmp.path(), 0);
    let mut other = Copy::new(tmp.path(), 1);
    let mut next = Counters { ids: 1, value: 0 };
    for round in 0..12 {
        while !other.resync_from(&mut live, next.ids, &mut random, round == 0) {
            next.value += 1;
            live.write(random.below(CHUNKS), next.value);
        }
        assert!(live.cached == other.cached, "seed {seed}: copies differ after a resync");
        if round == 0 {
            // Until this is durable, there is nothing to go back to.
            live.flush();
        }
        next.ids += 1;
        run_protected(&mut live, &mut other, &mut random, &mut next);
        if lose(&mut live, &mut other, &mut random) {
            std::mem::swap(&mut live, &mut other);
        }
        for _ in 0..random.below(30) {
            next.value += 1;
            live.write(random.below(CHUNKS), next.value);
        }
        // A host that returns has nothing of its process before.
        let image = other.image.clone();
        other.journal = None;
        other.journal = Some(open(&image));
    }
}

#[test]
fn copies_are_equal_after_a_resync_whatever_crashed_before() {
    for seed in 0..150 {
        history(seed);
    }
}

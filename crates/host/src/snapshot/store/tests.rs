//! Histories of a machine with a disk: snapshots of random moments, each against some earlier one, deleted in any order.

use machine::Machine;
use machine::config::{DiskConfig, MachineConfig};
use machine::ram::{Epoch, PAGE_SIZE, RAM_BASE};

use super::*;
use crate::disk::copy::{CHUNK_BYTES, ChunkSink as _, CopyItem, Refused};
use crate::recording::image_hashes;
use crate::snapshot::{SnapshotWriter, Sweep};

const CHUNKS: u64 = 6;
const DISK_BYTES: u64 = CHUNKS * CHUNK_BYTES;

/// Numbers that look like chance, the same each time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % n
    }
}

/// A machine with a disk, which remembers what was written since when.
struct Vm {
    machine: Machine,
    disk: Vec<u8>,
    /// For each chunk the number of the snapshot after which it was last written.
    written: Vec<usize>,
    /// Snapshots taken: name, identity, epoch, digest of the machine, contents of the disk.
    taken: Vec<(String, SnapshotId, Epoch, u64, Vec<u8>)>,
}

impl Vm {
    fn new() -> Self {
        let disk = DiskConfig { size: DISK_BYTES, readonly: false, serial: String::new() };
        let config = MachineConfig {
            harts: 1,
            ram_size: 32 << 20,
            nets: vec![],
            disks: vec![disk],
            consoles: 0,
            rngs: 0,
            rtc_base_ns: 5,
            rng_seed: vec![1, 2, 3],
        };
        let code: &[u8] = &[0x6f, 0, 0, 0];
        let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
        let machine = Machine::new(config, images).unwrap();
        let disk = vec![0; DISK_BYTES as usize];
        Self { machine, disk, written: vec![0; CHUNKS as usize], taken: vec![] }
    }

    fn write(&mut self, chance: &mut Chance) {
        for _ in 0..chance.below(30) {
            let byte = chance.below(3) as u8;
            let page = RAM_BASE + chance.below(40) * 97 * PAGE_SIZE as u64;
            self.machine.ram_mut().write(page, &[byte; PAGE_SIZE]).unwrap();
        }
        for _ in 0..chance.below(3) {
            let (index, byte) = (chance.below(CHUNKS), chance.below(3) as u8);
            let at = (index * CHUNK_BYTES) as usize;
            self.disk[at..at + CHUNK_BYTES as usize].fill(byte);
            self.written[index as usize] = self.taken.len();
        }
    }

    /// Takes a snapshot against an earlier one, writing on meanwhile.
    fn snapshot(&mut self, store: &Store, base: Option<usize>, chance: &mut Chance) {
        let number = self.taken.len();
        let name = format!("s{number}");
        let id = SnapshotId([number as u8 + 1; 16]);
        let hashes = image_hashes(self.machine.images());
        store.prepare().unwrap();
        store.put_images(self.machine.images(), &hashes).unwrap();
        let head = SnapshotHead {
            id,
            parent: base.map(|b| self.taken[b].1),
            name: name.clone(),
            taken_unix_ms: number as u64,
            pos: LogPos { lsn: 0, icount: self.machine.icount() },
            clock: (0, 0, 0),
            append: String::new(),
            images: hashes,
            disks: vec![DISK_BYTES],
            definition: None,
            saved: self.machine.save(),
        };
        let digest = self.machine.digest();
        let epoch = base.map(|b| self.taken[b].2);
        let path = store.path_of(&name).unwrap();
        let mut sweep = Sweep::begin(&mut self.machine, head, epoch, path).unwrap();
        let mut sink = sweep.disk(0).unwrap();
        let mut chunks: Vec<CopyItem> = (0..CHUNKS)
            .filter(|c| base.is_none_or(|b| self.written[*c as usize] > b))
            .map(|index| {
                let at = (index * CHUNK_BYTES) as usize;
                let data = self.disk[at..at + CHUNK_BYTES as usize].to_vec();
                let is_zero = data.iter().all(|b| *b == 0);
                if is_zero { CopyItem::Zero { index } } else { CopyItem::Chunk { index, data } }
            })
            .collect();
        chunks.push(CopyItem::End { point: 0 });
        self.taken.push((name, id, sweep.epoch(), digest, self.disk.clone()));
        for mut item in chunks {
            while let Err(Refused::Full(back)) = sink.offer(item) {
                item = back;
            }
        }
        self.write(chance);
        while sweep.pump(self.machine.ram_mut()) {
            self.write(chance);
        }
        sweep.join().unwrap();
    }

    /// Loads a snapshot and compares it with what was there when it was taken.
    fn check(&self, store: &Store, name: &str) {
        let (_, _, _, digest, contents) = self.taken.iter().find(|t| t.0 == name).unwrap();
        let chain = store.chain(name).unwrap();
        let head = chain::head(&chain).unwrap();
        let images = store.images(&head).unwrap();
        let mut disk = vec![0; DISK_BYTES as usize];
        let mut machine = chain::load_as(&chain, &head, images, &mut |piece| {
            if let Some((_, index, Some(data))) = piece.chunk {
                let at = (index * CHUNK_BYTES) as usize;
                disk[at..at + data.len()].copy_from_slice(&data);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(machine.digest(), *digest, "{name}");
        assert!(disk == *contents, "the disk of {name}");
    }
}

fn names(store: &Store) -> Vec<String> {
    store.entries().unwrap().into_iter().map(|e| e.name).collect()
}

fn delete(store: &Store, name: &str) {
    store.delete(name, &mut |_, _| ()).unwrap();
}

#[test]
fn snapshots_deleted_in_any_order_leave_the_others_as_they_were() {
    for seed in 0..6 {
        let work = tempfile::tempdir().unwrap();
        let store = Store::new(work.path(), "web").unwrap();
        let (mut vm, mut chance) = (Vm::new(), Chance(seed));
        for _ in 0..12 {
            vm.write(&mut chance);
            let left = names(&store);
            // Against any that is left, mostly; some have several that build on them.
            let pick = chance.below(left.len() as u64 + 1) as usize;
            let base = left.get(pick).map(|name| name[1..].parse().unwrap());
            vm.snapshot(&store, base, &mut chance);
            if chance.below(3) == 0 {
                let left = names(&store);
                delete(&store, &left[chance.below(left.len() as u64) as usize]);
            }
        }
        loop {
            let left = names(&store);
            left.iter().for_each(|name| vm.check(&store, name));
            if left.is_empty() {
                break;
            }
            delete(&store, &left[chance.below(left.len() as u64) as usize]);
        }
        assert!(!store.dir().exists(), "nothing is left");
    }
}

/// A snapshot with two that build on it, and one that builds on one of these.
fn family(store: &Store) -> Vm {
    let (mut vm, mut chance) = (Vm::new(), Chance(9));
    for base in [None, Some(0), Some(0), Some(2)] {
        vm.write(&mut chance);
        vm.snapshot(store, base, &mut chance);
    }
    vm
}

#[test]
fn a_crash_within_a_deletion_loses_nothing() {
    // After the first merge, after the second, with a merge half done, before the removal is complete.
    for step in 0..4 {
        let work = tempfile::tempdir().unwrap();
        let store = Store::new(work.path(), "web").unwrap();
        let vm = family(&store);
        let path = |name: &str| store.path_of(name).unwrap();
        let merge = |child: &str| chain::merge(&path("s0"), &path(child), &path(child)).unwrap();
        if step >= 1 {
            merge("s1");
        }
        if step >= 2 {
            merge("s2");
        }
        if step >= 3 {
            fs::remove_file(path("s0")).unwrap();
        }
        fs::write(store.dir().join("s2.snapshot.partial"), "half a file").unwrap();
        names(&store).iter().for_each(|name| vm.check(&store, name));
        if step < 3 {
            delete(&store, "s0");
        }
        assert_eq!(names(&store), ["s1", "s2", "s3"]);
        names(&store).iter().for_each(|name| vm.check(&store, name));
        store.prepare().unwrap();
        assert!(!store.dir().join("s2.snapshot.partial").exists());
        for name in ["s2", "s1", "s3"] {
            delete(&store, name);
        }
        assert!(!store.dir().exists());
    }
}

#[test]
fn a_deletion_that_fails_changes_nothing() {
    let work = tempfile::tempdir().unwrap();
    let store = Store::new(work.path(), "web").unwrap();
    let vm = family(&store);
    // Where the merged file would be written there is something else.
    let obstacle = store.path_of("s2").unwrap().with_extension("snapshot.partial");
    fs::create_dir(&obstacle).unwrap();
    store.delete("s0", &mut |_, _| ()).unwrap_err();
    fs::remove_dir(&obstacle).unwrap();
    assert_eq!(names(&store), ["s0", "s1", "s2", "s3"]);
    names(&store).iter().for_each(|name| vm.check(&store, name));
    assert!(matches!(store.delete("other", &mut |_, _| ()), Err(StoreError::NotFound { .. })));
    assert!(matches!(store.chain("../s0"), Err(StoreError::Name(_))));
}

#[test]
fn what_is_damaged_or_missing_is_refused_with_the_reason() {
    let work = tempfile::tempdir().unwrap();
    let store = Store::new(work.path(), "web").unwrap();
    family(&store);
    let words = |e: StoreError| crate::one_line::one_line(&e);
    let head = chain::head(&store.chain("s0").unwrap()).unwrap();
    let image = store.dir().join(IMAGES).join(hex(&head.images[0].unwrap()));
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, "something else").unwrap();
    assert!(words(store.images(&head).unwrap_err()).contains("not what the VM booted"));
    fs::remove_file(&image).unwrap();
    assert!(words(store.images(&head).unwrap_err()).contains("missing"));
    fs::write(&image, bytes).unwrap();

    fs::remove_file(store.path_of("s0").unwrap()).unwrap();
    let error = words(store.chain("s3").unwrap_err());
    assert!(error.contains("its parent 01010101") && error.contains("missing"), "{error}");
    let path = store.path_of("s2").unwrap();
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..100]).unwrap();
    let entries = store.entries().unwrap();
    let broken = entries.iter().find(|e| e.name == "s2").unwrap();
    assert!(matches!(broken.facts, Err(SnapshotError::Damaged { offset: 12, .. })));
    // What it needs is not known, so nothing of that goes.
    store.clean().unwrap();
    assert!(image.exists());
    // It can be deleted as the others can.
    for name in ["s2", "s1", "s3"] {
        delete(&store, name);
    }
    assert!(!store.dir().exists());
}

#[test]
fn another_machine_model_is_refused_by_its_number() {
    let work = tempfile::tempdir().unwrap();
    let store = Store::new(work.path(), "web").unwrap();
    family(&store);
    let head = chain::head(&store.chain("s0").unwrap()).unwrap();
    let mut other = SnapshotHead { id: SnapshotId([77; 16]), ..head };
    other.saved.model += 1;
    let path = store.path_of("other").unwrap();
    SnapshotWriter::create(&path, &other).unwrap().finish().unwrap();
    let error = store.chain("other").unwrap_err();
    let wanted = format!("is of machine model {}, this build has", other.saved.model);
    assert!(error.to_string().contains(&wanted), "{error}");
}

#[test]
fn only_the_owner_may_read() {
    use std::os::unix::fs::PermissionsExt as _;
    let work = tempfile::tempdir().unwrap();
    let store = Store::new(work.path(), "web").unwrap();
    family(&store);
    store.begin_restoring("s1").unwrap();
    assert_eq!(store.restoring().as_deref(), Some("s1"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for dir in [store.dir().to_owned(), store.dir().join(IMAGES)] {
        assert_eq!(mode(&dir), 0o700);
        for file in fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()).filter(|f| f.is_file()) {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
    }
    store.end_restoring().unwrap();
    assert_eq!(store.restoring(), None);
    assert_eq!(Store::all(work.path()).unwrap().len(), 1);
}

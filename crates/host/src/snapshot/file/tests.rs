//! Snapshot files: what is written is read, and what is damaged is found.

use eventlog::LogPos;
use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::ram::{PAGE_SIZE, RAM_BASE};

use super::super::{SnapshotHead, SnapshotId, chain};
use super::*;

fn machine() -> Machine {
    let config = MachineConfig {
        harts: 1,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 5,
        rng_seed: vec![1, 2, 3],
    };
    let code: &[u8] = &[0x6f, 0, 0, 0];
    let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
    Machine::new(config, images).unwrap()
}

fn head(machine: &mut Machine, id: u8, parent: Option<u8>) -> SnapshotHead {
    SnapshotHead {
        id: SnapshotId([id; 16]),
        parent: parent.map(|id| SnapshotId([id; 16])),
        name: "test".to_owned(),
        taken_unix_ms: 7,
        pos: LogPos { lsn: 1, icount: 0 },
        clock: (0, 0, 0),
        saved: machine.save(),
        append: String::new(),
        images: [None; 3],
        disks: vec![CHUNK_BYTES + 512],
        definition: None,
    }
}

fn page(byte: u8) -> Option<Box<[u8]>> {
    Some(vec![byte; PAGE_SIZE].into())
}

fn items(path: &Path) -> Vec<SnapshotItem> {
    let mut reader = SnapshotReader::open(path).unwrap();
    std::iter::from_fn(|| reader.next_item().unwrap()).collect()
}

/// A snapshot and one that builds on it.
fn two(dir: &Path) -> (PathBuf, PathBuf) {
    let mut machine = machine();
    let (first, second) = (dir.join("first"), dir.join("second"));
    let mut writer = SnapshotWriter::create(&first, &head(&mut machine, 1, None)).unwrap();
    let pages: Vec<_> = (0..300).map(|n| (n, page((n % 250) as u8 + 1))).collect();
    writer.pages_of(&pages).unwrap();
    writer.chunk(0, 0, Some(&vec![1; CHUNK_BYTES as usize])).unwrap();
    writer.chunk(0, 1, Some(&[2; 512])).unwrap();
    let len = writer.finish().unwrap();
    assert_eq!(std::fs::metadata(&first).unwrap().len(), len);
    let mut writer = SnapshotWriter::create(&second, &head(&mut machine, 2, Some(1))).unwrap();
    writer.pages_of(&[(7, None), (8, page(99)), (500, page(5)), (501, None)]).unwrap();
    writer.chunk(0, 1, None).unwrap();
    writer.finish().unwrap();
    (first, second)
}

#[test]
fn what_is_written_is_read() {
    let work = tempfile::tempdir().unwrap();
    let (first, second) = two(work.path());
    let all = items(&first);
    assert_eq!(all.len(), 3 + 2);
    assert_eq!(all[4], SnapshotItem::Chunk { dev: 0, index: 1, data: Some(vec![2; 512]) });
    let expected = [
        SnapshotItem::Pages(vec![(8, page(99)), (500, page(5))]),
        SnapshotItem::Pages(vec![(7, None), (501, None)]),
        SnapshotItem::Chunk { dev: 0, index: 1, data: None },
    ];
    assert_eq!(items(&second), expected);
    assert_eq!(SnapshotReader::open(&second).unwrap().head().parent, Some(SnapshotId([1; 16])));
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 2);
}

#[test]
fn merged_snapshot_loads_as_the_chain_did() {
    let work = tempfile::tempdir().unwrap();
    let (first, second) = two(work.path());
    let file_of = |id| (id == SnapshotId([1; 16])).then(|| first.clone());
    let files = chain::chain_of(&second, file_of).unwrap();
    assert_eq!(files, [second.clone(), first.clone()]);
    let images = machine().images().clone();
    let (mut before, _) = chain::load(&files, images.clone()).unwrap();
    chain::merge(&first, &second, &second).unwrap();
    let (mut after, head) = chain::load(std::slice::from_ref(&second), images).unwrap();
    assert_eq!((head.id, head.parent), (SnapshotId([2; 16]), None));
    assert_eq!(before.digest(), after.digest());
    let mut byte = [0];
    for (page, value) in [(7, 0), (8, 99), (9, 10), (500, 5), (501, 0)] {
        after.ram().read(RAM_BASE + page * PAGE_SIZE as u64, &mut byte).unwrap();
        assert_eq!(byte[0], value, "page {page}");
    }
    let chunks = items(&second);
    let chunks: Vec<_> =
        chunks.iter().filter(|i| matches!(i, SnapshotItem::Chunk { .. })).collect();
    assert!(matches!(chunks[..], [SnapshotItem::Chunk { index: 0, data: Some(_), .. }]));
    assert!(chain::merge(&second, &first, &first).is_err());
}

#[test]
fn damage_anywhere_is_found() {
    let work = tempfile::tempdir().unwrap();
    let (first, _) = two(work.path());
    let good = std::fs::read(&first).unwrap();
    let read = || -> Result<(), SnapshotError> {
        let mut reader = SnapshotReader::open(&first)?;
        while reader.next_item()?.is_some() {}
        Ok(())
    };
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&first, &bytes).unwrap();
        assert!(read().is_err(), "byte {at}");
        std::fs::write(&first, &good[..at]).unwrap();
        assert!(read().is_err(), "cut at {at}");
    }
    std::fs::write(&first, [&good[..], &[0]].concat()).unwrap();
    assert!(read().is_err());
    std::fs::write(&first, &good).unwrap();
    read().unwrap();
}

#[test]
fn page_beyond_ram_is_damage() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("one");
    for pages in [vec![(8192, None)], vec![(0, page(1)), (u32::MAX, page(1))]] {
        let mut writer = SnapshotWriter::create(&path, &head(&mut machine(), 1, None)).unwrap();
        writer.pages_of(&pages).unwrap();
        writer.finish().unwrap();
        let read = SnapshotReader::open(&path).unwrap().next_item();
        assert!(matches!(read, Err(SnapshotError::Damaged { .. })), "{read:?}");
    }
}

#[test]
fn writer_that_is_dropped_leaves_nothing() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("one");
    drop(SnapshotWriter::create(&path, &head(&mut machine(), 1, None)).unwrap());
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0);
}

//! Order, durability, copying and failing disks, on files in a temporary directory.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::Instant;

use super::copy::{CHUNK_BYTES, CopyItem, CopyPhase};
use super::mirror::{MirrorError, MirrorWriter};
use super::*;

const LIMIT: Duration = Duration::from_secs(60);

fn image_file(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn start(path: &Path, mode: OpenMode) -> (DiskHandle, Receiver<Completion>) {
    let (tx, rx) = channel();
    let image = Image::open(path, mode).unwrap();
    let options = DiskOptions::default();
    let disk = DiskHandle::start(3, image, options, move |c| drop(tx.send(c))).unwrap();
    (disk, rx)
}

type FaultFn = dyn Fn(&BlkOp) -> Option<String> + Send + Sync;

/// What a test does before a request, which then fails with the text that it gives, if any.
#[derive(Clone)]
pub(super) struct Fault(Arc<FaultFn>);

impl Fault {
    fn new(what: impl Fn(&BlkOp) -> Option<String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(what))
    }

    pub(super) fn of(&self, op: &BlkOp) -> Option<String> {
        (self.0)(op)
    }
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fault")
    }
}

fn write(offset: u64, byte: u8, len: usize) -> BlkOp {
    BlkOp::Write { offset, data: vec![byte; len] }
}

fn wait_for(disk: &DiskHandle, what: impl Fn(&DiskStatus) -> bool) -> DiskStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = disk.status();
        if what(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "never came about: {status:?}");
        std::thread::yield_now();
    }
}

#[test]
fn requests_that_overlap_are_carried_out_in_order() {
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), 1 << 20);
    let (disk, done) = start(&path, OpenMode::Exclusive);
    for i in 0..100u8 {
        disk.submit(u64::from(i), write(512, i, 1024));
    }
    disk.submit(100, BlkOp::Flush);
    disk.submit(101, BlkOp::Read { offset: 0, len: 2048 });
    disk.submit(102, BlkOp::Discard { offset: 512, len: 512 });
    disk.submit(103, BlkOp::WriteZeroes { offset: 1024, len: 512 });
    disk.submit(104, BlkOp::Read { offset: 0, len: 2048 });
    drop(disk);
    let mut all: Vec<_> = done.iter().collect();
    // What does not overlap may end in any order.
    all.sort_by_key(|c| c.id);
    let ids: Vec<_> = all.iter().map(|c| c.id).collect();
    assert_eq!(ids, (0..=104).collect::<Vec<_>>());
    assert!(all.iter().all(|c| c.dev == 3 && c.status == BlkStatus::Ok && c.error.is_none()));
    assert_eq!(all[101].data, [[0; 512], [99; 512], [99; 512], [0; 512]].concat());
    assert_eq!(all[104].data, [0; 2048]);
}

#[test]
fn requests_that_cannot_be_carried_out_fail_and_the_disk_goes_on() {
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), 1 << 20);
    let (disk, done) = start(&path, OpenMode::ReadOnly);
    disk.submit(0, write(0, 1, 512));
    disk.submit(1, BlkOp::Read { offset: (1 << 20) - 512, len: 1024 });
    disk.submit(2, BlkOp::Read { offset: u64::MAX, len: 512 });
    disk.submit(3, BlkOp::Read { offset: 0, len: u32::MAX });
    disk.submit(4, BlkOp::Discard { offset: 512, len: u64::MAX });
    disk.submit(5, BlkOp::Read { offset: 0, len: 512 });
    let mut all: Vec<_> = (0..6).map(|_| done.recv_timeout(LIMIT).unwrap()).collect();
    all.sort_by_key(|c| c.id);
    for c in &all[..5] {
        assert_eq!(c.status, BlkStatus::IoErr);
        assert!(c.error.as_ref().unwrap().contains("disk.img"), "{c:?}");
    }
    assert_eq!(all[5].status, BlkStatus::Ok);
    let status = disk.status();
    assert_eq!(status.errors, 5);
    assert!(status.last_error.unwrap().contains("read-only"));
}

#[test]
fn images_that_are_no_disks_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let open = |p: &Path| Image::open(p, OpenMode::Exclusive).unwrap_err();
    let missing = open(&tmp.path().join("none.img"));
    assert!(crate::one_line::one_line(&missing).contains("none.img: No such file"), "{missing}");
    for bad in [tmp.path(), Path::new("/dev/full")] {
        assert!(matches!(open(bad), OpenImageError::NotADisk { .. }));
    }
    for size in [0, 511, 513] {
        let path = image_file(tmp.path(), size);
        assert!(matches!(open(&path), OpenImageError::BadSize { .. }));
    }
    let path = image_file(tmp.path(), 512);
    let first = Image::open(&path, OpenMode::Exclusive).unwrap();
    assert!(matches!(open(&path), OpenImageError::InUse { .. }));
    assert!(Image::open(&path, OpenMode::Shared).is_ok());
    let letting_go = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(first);
    });
    assert!(Image::open_again(&path, OpenMode::Exclusive).is_ok());
    letting_go.join().unwrap();
    assert!(Image::open(&path, OpenMode::Exclusive).is_ok());
}

/// Receives a copy into `target`; returns the number of items.
fn receive(items: &Receiver<CopyItem>, target: &Path, size: u64) -> usize {
    let mut writer = MirrorWriter::create(target, size).unwrap();
    for count in 1.. {
        let item = items.recv_timeout(LIMIT).unwrap();
        if writer.apply(&item).unwrap() {
            assert_eq!(item, CopyItem::End { point: 77 });
            writer.finish().unwrap();
            return count;
        }
    }
    0
}

#[test]
fn a_copy_ends_with_the_contents_at_the_freeze() {
    const SIZE: u64 = 40 * CHUNK_BYTES + 512;
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), SIZE);
    let target = tmp.path().join("mirror.img");
    let (disk, done) = start(&path, OpenMode::Exclusive);
    let mut random = random_writes(SIZE);
    // Room for one item: the sink is full most of the time.
    let (tx, items) = sync_channel(1);
    let mirror = target.clone();
    let receiver = std::thread::spawn(move || receive(&items, &mirror, SIZE));
    for id in 0..50 {
        disk.submit(id, random(id));
    }
    disk.begin_copy(Box::new(tx));
    for id in 50..300 {
        disk.submit(id, random(id));
    }
    disk.submit(300, BlkOp::Read { offset: 0, len: u32::try_from(SIZE).unwrap() });
    disk.freeze_copy(77);
    for id in 301..600 {
        disk.submit(id, random(id));
    }
    receiver.join().unwrap();
    let at_freeze = done.iter().find(|c| c.id == 300).unwrap().data;
    let copied = std::fs::read(&target).unwrap();
    assert!(copied == at_freeze, "the mirror differs from the contents at the freeze");
    let status = wait_for(&disk, |s| s.copy.as_ref().unwrap().phase == CopyPhase::Done);
    assert_eq!(status.copy.unwrap().chunks_pending, 0);
    drop(disk);
    assert!(std::fs::read(&path).unwrap() != at_freeze);
}

/// Random requests that write, on a disk of `size` bytes.
fn random_writes(size: u64) -> impl FnMut(u64) -> BlkOp {
    let mut seed = 1u64;
    let mut next = move |n: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % n
    };
    move |id| {
        let len = 512 * (1 + next(300));
        let offset = 512 * next((size - len) / 512 + 1);
        match next(4) {
            0 => BlkOp::Discard { offset, len },
            1 => BlkOp::WriteZeroes { offset, len },
            _ => write(offset, u8::try_from(id % 255).unwrap() + 1, usize::try_from(len).unwrap()),
        }
    }
}

/// Writes what a snapshot has over `contents`; says how many chunks it named.
fn overlay(items: &Receiver<CopyItem>, contents: &mut [u8], number: u64) -> usize {
    for count in 0.. {
        let mut put = |index: u64, data: &[u8]| {
            let at = usize::try_from(index * CHUNK_BYTES).unwrap();
            contents[at..at + data.len()].copy_from_slice(data);
        };
        match items.recv_timeout(LIMIT).unwrap() {
            CopyItem::Chunk { index, data } => put(index, &data),
            CopyItem::Zero { index } => put(index, &[0; CHUNK_BYTES as usize]),
            CopyItem::End { point } => {
                assert_eq!(point, number);
                return count;
            }
            other => panic!("{other:?}"),
        }
    }
    0
}

#[test]
fn snapshots_have_the_contents_at_their_moments_and_only_what_changed() {
    const SIZE: u64 = 400 * CHUNK_BYTES;
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), SIZE);
    let (disk, done) = start(&path, OpenMode::Exclusive);
    let mut random = random_writes(SIZE);
    let mut id = 0;
    let mut submit = |count: u64| {
        for _ in 0..count {
            id += 1;
            disk.submit(id, random(id));
        }
        disk.submit(1_000_000 + id, BlkOp::Read { offset: 0, len: u32::try_from(SIZE).unwrap() });
        1_000_000 + id
    };
    // Each against an earlier one, not always the one before; a mirror is made all the while.
    let plan = [(2, None, 200), (3, Some(2), 10), (4, Some(2), 5), (5, Some(4), 0)];
    let (mirror, _mirror_items) = sync_channel(1);
    let mut states: Vec<(u32, Vec<u8>)> = vec![(0, vec![0; SIZE as usize])];
    for (number, base, writes) in plan {
        let read = submit(writes);
        let (tx, items) = sync_channel(1);
        if number == 3 {
            disk.begin_copy(Box::new(mirror.clone()));
        }
        disk.begin_snapshot(Box::new(tx), number, base);
        // The guest goes on while nobody takes anything yet.
        let later = submit(50);
        let at_snapshot = done.iter().find(|c| c.id == read).unwrap().data;
        let from = base.unwrap_or(0);
        let mut contents = states.iter().find(|(n, _)| *n == from).unwrap().1.clone();
        let named = overlay(&items, &mut contents, u64::from(number));
        assert!(contents == at_snapshot, "snapshot {number}");
        assert!(base.is_none() || named < 350, "{named} chunks in snapshot {number}");
        states.push((number, contents));
        done.iter().find(|c| c.id == later).unwrap();
    }
}

#[test]
fn a_slow_receiver_of_a_snapshot_holds_writes_up_and_a_stuck_one_only_for_a_while() {
    const CHUNKS: u64 = 1200;
    const SIZE: u64 = CHUNKS * CHUNK_BYTES;
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), SIZE);
    let (disk, done) = start(&path, OpenMode::Exclusive);
    let fill = |byte: u8| {
        for i in 0..CHUNKS {
            disk.submit(i, write(i * CHUNK_BYTES, byte, CHUNK_BYTES as usize));
        }
    };
    fill(1);
    let (tx, items) = sync_channel(1);
    disk.begin_snapshot(Box::new(tx), 2, None);
    let receiver = std::thread::spawn(move || {
        // Later than the writes have filled all the room there is.
        std::thread::sleep(Duration::from_millis(300));
        let mut contents = vec![0; SIZE as usize];
        overlay(&items, &mut contents, 2);
        contents
    });
    fill(2);
    assert!(receiver.join().unwrap().iter().all(|b| *b == 1));
    let (tx, _stuck) = sync_channel(1);
    disk.begin_snapshot(Box::new(tx), 3, None);
    fill(3);
    for _ in 0..3 * CHUNKS {
        assert_eq!(done.recv_timeout(LIMIT).unwrap().status, BlkStatus::Ok);
    }
    let is_over = |s: &DiskStatus| s.snapshot.as_ref().is_some_and(|c| c.error.is_some());
    assert!(wait_for(&disk, is_over).snapshot.unwrap().error.unwrap().contains("too slow"));
}

#[test]
fn a_sparse_disk_sends_only_what_it_holds() {
    const SIZE: u64 = 8 << 30;
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), SIZE);
    let target = tmp.path().join("mirror.img");
    let (disk, _done) = start(&path, OpenMode::Exclusive);
    disk.submit(0, write(5 << 30, 7, 4096));
    let (tx, items) = sync_channel(1);
    disk.begin_copy(Box::new(tx));
    wait_for(&disk, |s| s.copy.as_ref().is_some_and(|c| c.phase == CopyPhase::Converged));
    disk.freeze_copy(77);
    assert_eq!(receive(&items, &target, SIZE), 2);
    assert_eq!(std::fs::metadata(&target).unwrap().len(), SIZE);
}

#[test]
fn a_receiver_that_goes_away_ends_the_copy_and_not_the_disk() {
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), 1 << 20);
    let (disk, done) = start(&path, OpenMode::Exclusive);
    disk.submit(0, write(0, 1, 1 << 20));
    let (tx, items) = sync_channel(1);
    drop(items);
    disk.begin_copy(Box::new(tx));
    let status = wait_for(&disk, |s| s.copy.as_ref().is_some_and(|c| c.phase == CopyPhase::Failed));
    assert_eq!(status.copy.unwrap().error.unwrap(), "the receiver is gone");
    disk.submit(1, BlkOp::Flush);
    assert_eq!(done.iter().take(2).last().unwrap().status, BlkStatus::Ok);
}

#[test]
fn a_stuck_receiver_never_holds_up_the_guest() {
    const SIZE: u64 = 1200 * CHUNK_BYTES;
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), SIZE);
    let (disk, done) = start(&path, OpenMode::Exclusive);
    for i in 0..1200 {
        disk.submit(i, write(i * CHUNK_BYTES, 1, 512));
    }
    let (tx, _items) = sync_channel(1);
    disk.begin_copy(Box::new(tx));
    disk.freeze_copy(1);
    for i in 0..1200 {
        disk.submit(i, write(i * CHUNK_BYTES, 2, 512));
    }
    for _ in 0..2400 {
        assert_eq!(done.recv_timeout(LIMIT).unwrap().status, BlkStatus::Ok);
    }
    let status = wait_for(&disk, |s| s.copy.as_ref().is_some_and(|c| c.phase == CopyPhase::Failed));
    assert!(status.copy.unwrap().error.unwrap().contains("too slow"));
}

#[test]
fn an_abandoned_mirror_leaves_nothing_behind() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("m.img");
    std::fs::write(&target, "old").unwrap();
    let mut writer = MirrorWriter::create(&target, CHUNK_BYTES + 512).unwrap();
    assert!(matches!(MirrorWriter::create(&target, 512), Err(MirrorError::Busy { .. })));
    writer.write_chunk(1, &[1; 512]).unwrap();
    assert!(writer.write_chunk(0, &[1; 512]).is_err());
    assert!(writer.write_chunk(2, &[1; 512]).is_err());
    assert!(writer.write_chunk(u64::MAX, &[]).is_err());
    assert!(writer.zero_chunk(u64::MAX / CHUNK_BYTES).is_err());
    assert!(writer.apply(&CopyItem::Failed { reason: "x".into() }).is_err());
    drop(writer);
    assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    // What a crash left behind is replaced.
    std::fs::write(tmp.path().join("m.img.partial"), "rubbish").unwrap();
    let writer = MirrorWriter::create(&target, 1024).unwrap();
    writer.finish().unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), [0; 1024]);
}

/// Needs a small file system of its own: run by the test below.
#[test]
#[ignore = "is run by a_full_file_system_is_an_io_error_and_the_disk_goes_on"]
fn on_small_file_system() {
    let Some(dir) = std::env::var_os("UNDERSTUDY_SMALL_DIR") else { return };
    let path = image_file(Path::new(&dir), 8 << 20);
    let (disk, done) = start(&path, OpenMode::Exclusive);
    disk.submit(0, write(0, 1, 512));
    disk.submit(1, write(0, 1, 4 << 20));
    disk.submit(2, BlkOp::Discard { offset: 0, len: 8 << 20 });
    disk.submit(3, write(0, 1, 512));
    disk.submit(4, BlkOp::Flush);
    let all: Vec<_> = (0..5).map(|_| done.recv_timeout(LIMIT).unwrap()).collect();
    let failed: Vec<_> = all.iter().filter(|c| c.status == BlkStatus::IoErr).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].id, 1);
    assert!(failed[0].error.as_ref().unwrap().contains("disk.img at 0x0: No space left"));
    assert_eq!(disk.status().errors, 1);
    println!("on small file system: all done");
}

#[test]
fn a_full_file_system_is_an_io_error_and_the_disk_goes_on() {
    let tmp = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=1m tmpfs \"$UNDERSTUDY_SMALL_DIR\" && exec \"$@\"";
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--", "sh", "-c", script, "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "disk::tests::on_small_file_system", "--ignored", "--nocapture"])
        .env("UNDERSTUDY_SMALL_DIR", tmp.path())
        .output()
        .expect("this test needs `unshare`: install Debian's package util-linux");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "user namespaces are needed: {text}");
    assert!(text.contains("all done"), "{text}");
}

#[test]
fn image_is_resized_and_used_by_several_threads_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_file(dir.path(), 1 << 20);
    let image = Image::open(&path, OpenMode::Exclusive).unwrap();
    assert!(image.raw_file().is_some());
    assert!(image.resize(1000).unwrap_err().contains("no disk"));
    image.resize(2 << 20).unwrap();
    assert_eq!(image.size(), 2 << 20);
    std::thread::scope(|scope| {
        for i in 0..4u8 {
            let image = &image;
            scope.spawn(move || {
                for k in 0..16 {
                    let at = (u64::from(i) * 16 + k) * 4096;
                    image.write(at, &[i + 1; 4096]).unwrap();
                    assert_eq!(image.read(at, 4096).unwrap(), [i + 1; 4096]);
                    image.zero(at, 512).unwrap();
                }
            });
        }
    });
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(3 << 20).unwrap();
    assert_eq!(image.refresh_size(), Ok(3 << 20));
    let reader = Image::open(&path, OpenMode::ReadOnly).unwrap();
    assert!(reader.resize(4 << 20).unwrap_err().contains("read-only"));
}

/// A loop device of a file; it ends with the test.
struct LoopDevice(String);

impl LoopDevice {
    fn of(file: &Path) -> Option<Self> {
        let output = Self::losetup(&["--find", "--show", file.to_str()?])?;
        Some(Self(output.trim().to_owned()))
    }

    fn losetup(args: &[&str]) -> Option<String> {
        let output = std::process::Command::new("/usr/sbin/losetup").args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Self::losetup(&["--detach", &self.0]));
    }
}

#[test]
fn a_block_device_that_has_grown_is_used_up_to_its_new_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    let Some(device) = LoopDevice::of(&path) else {
        return eprintln!("no loop devices (package mount, root) here: nothing was tested");
    };
    let (disk, done) = start_with(Path::new(&device.0), DiskOptions::default());
    let said = disk.grow(2 << 20).unwrap_err();
    assert!(said.contains("resized where it was made; it has 1048576 bytes"), "{said}");
    file.set_len(2 << 20).unwrap();
    LoopDevice::losetup(&["--set-capacity", &device.0]).unwrap();
    assert_eq!(disk.grow(2 << 20), Ok(2 << 20));
    disk.submit(1, BlkOp::Write { offset: (2 << 20) - 512, data: vec![7; 512] });
    disk.submit(2, BlkOp::Flush);
    assert!((0..2).all(|_| done.recv().unwrap().status == BlkStatus::Ok));
    drop(disk);
    assert_eq!(std::fs::read(&path).unwrap()[(2 << 20) - 512..], [7; 512]);
}

/// The ways in which requests can be carried out.
fn ways() -> Vec<(&'static str, DiskOptions)> {
    let slow = Fault::new(|op| {
        // Some take much longer than others.
        let at = match op {
            BlkOp::Read { offset, .. } | BlkOp::Write { offset, .. } => *offset,
            BlkOp::Discard { offset, .. } | BlkOp::WriteZeroes { offset, .. } => offset ^ 512,
            BlkOp::Flush => 0,
        };
        std::thread::sleep(Duration::from_micros(at / 512 % 7 * 100));
        None
    });
    let aio = |aio| DiskOptions { aio, ..DiskOptions::default() };
    let nothing = Some(Fault::new(|_| None));
    vec![
        ("the ring alone", DiskOptions { fault: nothing, ..aio(Aio::IoUring) }),
        ("as usual", aio(Aio::Auto)),
        ("threads", aio(Aio::Threads)),
        ("slow threads", DiskOptions { fault: Some(slow), ..DiskOptions::default() }),
    ]
}

fn start_with(path: &Path, options: DiskOptions) -> (DiskHandle, Receiver<Completion>) {
    let (tx, rx) = channel();
    let open = || Image::open(path, OpenMode::Exclusive).unwrap();
    let done = move |c| drop(tx.send(c));
    let disk = DiskHandle::start(0, open(), options.clone(), done.clone());
    let disk = disk.or_else(|e| {
        eprintln!("this kernel allows no io_uring ({e}): threads are tested twice");
        let options = DiskOptions { aio: Aio::Threads, ..options };
        DiskHandle::start(0, open(), options, done)
    });
    (disk.unwrap(), rx)
}

/// Carries a request out on `model`; a read gives what it has to find.
fn on_model(model: &mut [u8], op: &BlkOp) -> Option<Vec<u8>> {
    let range = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
    match op {
        BlkOp::Read { offset, len } => {
            return Some(model[range(*offset, u64::from(*len))].to_vec());
        }
        BlkOp::Write { offset, data } => {
            model[range(*offset, data.len() as u64)].copy_from_slice(data);
        }
        BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
            model[range(*offset, *len)].fill(0);
        }
        BlkOp::Flush => {}
    }
    None
}

#[test]
fn random_histories_end_as_in_order_whatever_carries_them_out() {
    const SIZE: u64 = 5 * CHUNK_BYTES + 512;
    for (way, options) in ways() {
        let tmp = tempfile::tempdir().unwrap();
        let path = image_file(tmp.path(), SIZE);
        let target = tmp.path().join("mirror.img");
        let (disk, done) = start_with(&path, options);
        let mut random = random_writes(SIZE);
        let mut model = vec![0; SIZE as usize];
        let mut expected = std::collections::BTreeMap::new();
        let mut id = 0;
        let mut submit = |model: &mut Vec<u8>| {
            for _ in 0..60 {
                let op = match random(id) {
                    BlkOp::Write { offset, data } if id % 3 == 0 => {
                        BlkOp::Read { offset, len: data.len() as u32 }
                    }
                    BlkOp::WriteZeroes { .. } if id % 5 == 0 => BlkOp::Flush,
                    op => op,
                };
                expected.insert(id, on_model(model, &op).unwrap_or_default());
                disk.submit(id, op);
                id += 1;
            }
        };
        // A mirror, with a snapshot taken while it is made, both with writes under way before and after.
        let (tx, mirror_items) = sync_channel(2);
        submit(&mut model);
        disk.begin_copy(Box::new(tx));
        submit(&mut model);
        let (tx, items) = sync_channel(2);
        disk.begin_snapshot(Box::new(tx), 2, None);
        let at_snapshot = model.clone();
        submit(&mut model);
        disk.freeze_copy(77);
        let at_freeze = model.clone();
        submit(&mut model);
        let copy = target.clone();
        let receiver = std::thread::spawn(move || receive(&mirror_items, &copy, SIZE));
        let mut snapshot = vec![0; SIZE as usize];
        overlay(&items, &mut snapshot, 2);
        receiver.join().unwrap();
        submit(&mut model);
        assert!(snapshot == at_snapshot, "{way}: the snapshot differs");
        assert!(std::fs::read(&target).unwrap() == at_freeze, "{way}: the mirror differs");
        drop(disk);
        let mut count = 0;
        for c in done.iter() {
            assert_eq!(c.status, BlkStatus::Ok, "{way}: {c:?}");
            assert!(c.data == expected[&c.id], "{way}: read {} found something else", c.id);
            count += 1;
        }
        assert_eq!(count, id);
        assert!(std::fs::read(&path).unwrap() == model, "{way}: the disk differs");
    }
}

#[test]
fn requests_that_do_not_overlap_do_not_wait_for_each_other() {
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), 1 << 20);
    let (go, gate) = channel::<()>();
    let gate = Mutex::new(gate);
    let fault = Fault::new(move |op| {
        if matches!(op, BlkOp::Write { offset: 0, .. }) {
            gate.lock().unwrap().recv().unwrap();
        }
        None
    });
    let options = DiskOptions { fault: Some(fault), ..DiskOptions::default() };
    let (disk, done) = start_with(&path, options);
    disk.submit(0, write(0, 1, 1024));
    disk.submit(1, BlkOp::Read { offset: 512, len: 512 });
    disk.submit(2, BlkOp::Flush);
    disk.submit(3, write(1024, 2, 512));
    disk.submit(4, BlkOp::Read { offset: 1024, len: 512 });
    let next = || done.recv_timeout(LIMIT).unwrap();
    assert_eq!(next().id, 3);
    assert_eq!(next().id, 4);
    assert!(done.try_recv().is_err());
    go.send(()).unwrap();
    let mut rest = [next(), next(), next()];
    assert_eq!(rest[0].id, 0);
    rest.sort_by_key(|c| c.id);
    assert_eq!(rest[1].data, [1; 512]);
    assert_eq!(rest[2].id, 2);
}

#[test]
fn a_flush_that_fails_says_so_and_the_disk_goes_on() {
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), 1 << 20);
    let fault = Fault::new(|op| {
        matches!(op, BlkOp::Flush).then(|| "cannot flush: the cable is out".to_owned())
    });
    let options = DiskOptions { fault: Some(fault), ..DiskOptions::default() };
    let (disk, done) = start_with(&path, options);
    disk.submit(0, write(0, 1, 512));
    disk.submit(1, BlkOp::Flush);
    let first = done.recv_timeout(LIMIT).unwrap();
    assert_eq!((first.id, first.status), (0, BlkStatus::Ok));
    let second = done.recv_timeout(LIMIT).unwrap();
    assert_eq!((second.id, second.status), (1, BlkStatus::IoErr));
    assert!(disk.status().last_error.unwrap().contains("cable"));
    disk.submit(2, BlkOp::Read { offset: 0, len: 512 });
    assert_eq!(done.recv_timeout(LIMIT).unwrap().data, [1; 512]);
}

#[test]
fn limits_slow_down_and_can_be_lifted() {
    let tmp = tempfile::tempdir().unwrap();
    let path = image_file(tmp.path(), 1 << 20);
    let limits = Limits { iops: Some(1), iops_burst: Some(2), ..Limits::default() };
    let options = DiskOptions { limits, ..DiskOptions::default() };
    let (disk, done) = start_with(&path, options);
    for id in 0..100 {
        disk.submit(id, BlkOp::Read { offset: 512 * id, len: 512 });
    }
    done.recv_timeout(LIMIT).unwrap();
    // With the limit this would take more than a minute.
    disk.set_limits(Limits::default());
    for _ in 1..100 {
        done.recv_timeout(LIMIT).unwrap();
    }
    disk.set_limits(limits);
    for id in 0..100 {
        disk.submit(id, BlkOp::Read { offset: 512 * id, len: 512 });
    }
    // A disk that is let go does not wait either.
    drop(disk);
    assert_eq!(done.iter().count(), 100);
}

//! Snapshots of the small guest: taken while it counts, restored, cloned, refused.

use std::os::unix::fs::PermissionsExt;

use machine::io::BlkOp;

use super::*;
use crate::control::{CloneRequest, SnapshotInfo};
use crate::snapshot::chain;
use crate::snapshot::store::Store;

const DISK: &str = "[[disk]]\npath = \"disk\"\n";
const DISK_BYTES: u64 = 1 << 20;

/// An answer's code, and its words.
fn refusal(response: Response) -> (ErrorCode, String) {
    match response {
        Response::Error { code, message } => (code, message),
        other => panic!("not refused: {other:?}"),
    }
}

impl Lab {
    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn make_disk(&self) {
        std::fs::File::create(self.disk()).unwrap().set_len(DISK_BYTES).unwrap();
    }

    /// Writes to the disk as the guest does.
    fn write_disk(&self, host: usize, offset: u64, byte: u8) {
        let disk = self.hosts[host].vm().disk(0).unwrap();
        disk.submit(1 << 60, BlkOp::Write { offset, data: vec![byte; 512] });
        disk.submit(1 << 60, BlkOp::Flush);
        while disk.waiting_count() > 0 {
            std::thread::yield_now();
        }
    }

    fn create(&self, host: usize, name: &str) -> Response {
        self.hosts[host].daemon.create_snapshot(NAME, Some(name.to_owned()), &mut |_| ())
    }

    fn restore(&self, host: usize, name: &str, force: bool) -> Response {
        self.hosts[host].daemon.restore_snapshot(NAME, name, force, None, &mut |_| ())
    }

    fn clone(&self, host: usize, name: &str, clone: &str, dir: Option<PathBuf>) -> Response {
        let clone = CloneRequest { name: clone.to_owned(), dir, connect: false };
        self.hosts[host].daemon.restore_snapshot(NAME, name, false, Some(clone), &mut |_| ())
    }

    fn delete(&self, host: usize, name: &str) -> Response {
        self.hosts[host].daemon.delete_snapshot(NAME, name, &mut |_| ())
    }

    fn list(&self, host: usize) -> Vec<SnapshotInfo> {
        match self.hosts[host].daemon.list_snapshots(None) {
            Response::Snapshots { snapshots } => snapshots,
            other => panic!("{other:?}"),
        }
    }

    fn store(&self, host: &str) -> Store {
        Store::new(&self.dir.path().join(host), NAME).unwrap()
    }

    /// Takes a snapshot; gives the digest of the machine at that moment.
    fn digest_of(&self, host: usize, name: &str) -> u64 {
        let store = Store::new(&self.hosts[host].daemon.env.state_dir, NAME).unwrap();
        self.hosts[host].vm().take_snapshot(&store, name, &mut |_, _| ()).unwrap().digest
    }

    fn stop(&self, host: usize) {
        self.hosts[host].vm().power_off();
        self.wait("off", |l| l.status(host).is_some_and(|s| s.role == Role::Stopped));
    }

    fn wait_output(&self, host: usize, more: usize) {
        let before = self.printed(host).len();
        self.wait("output", |l| l.printed(host).len() > before + more);
    }
}

fn loaded_digest(store: &Store, name: &str) -> u64 {
    let files = store.chain(name).unwrap();
    let images = store.images(&chain::head(&files).unwrap()).unwrap();
    chain::load(&files, images).unwrap().0.digest()
}

#[test]
fn a_protected_vm_goes_on_from_its_snapshot_and_is_protected_again() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    assert_eq!(lab.start(0, &COUNTER, "[protection]\ndigest_interval_ms = 20\n"), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    lab.wait_output(0, 20);
    let before = places(&lab.printed(0)).1;
    let Response::SnapshotTaken { name, memory_bytes, file_bytes, is_increment, .. } =
        lab.create(0, "one")
    else {
        panic!("no snapshot");
    };
    assert_eq!((name.as_str(), is_increment), ("one", false));
    assert!(memory_bytes > 0 && file_bytes > 0);
    lab.wait_output(0, 400);
    assert!(lab.is_protected(0), "the snapshot costs no protection");
    let (code, words) = refusal(lab.restore(0, "one", false));
    assert!(code == ErrorCode::Failed && words.contains("stop it first"), "{words}");
    lab.stop(0);
    let old = lab.printed(0);
    let restored = lab.restore(0, "one", false);
    assert!(matches!(restored, Response::Restored { .. }), "{restored:?}");
    lab.wait("goes on", |l| l.printed(0).len() > old.len() + 40);
    let new = &lab.printed(0)[old.len()..];
    // It goes on where it was, not where it came to later, and not at its beginning.
    let start = places(new).0;
    assert!((LETTERS + start - before) % LETTERS < 200, "{before} {start}");
    lab.wait("protected again", |l| l.is_protected(0));
    let compared = |l: &Lab| l.status(1).and_then(|s| s.digests).unwrap_or(0);
    let digests = compared(&lab);
    lab.wait("digests", |l| compared(l) > digests + 5);
    assert!(lab.reports("a").is_empty() && lab.reports("b").is_empty(), "no divergence");
}

#[test]
fn snapshots_build_on_one_another_and_hold_the_machine_of_their_moment() {
    let lab = lab(&["a"], &["a shared secret of hosts"]);
    lab.make_disk();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    lab.wait_output(0, 20);
    let store = lab.store("a");
    let mut digests = Vec::new();
    for (round, name) in (1u8..).zip(["one", "two", "three", "four"]) {
        lab.write_disk(0, u64::from(round) * 128 * 1024, round);
        digests.push((name, lab.digest_of(0, name)));
        lab.write_disk(0, 0, round);
        lab.wait_output(0, 20);
    }
    let parents: Vec<_> = lab.list(0).into_iter().map(|s| (s.name, s.parent)).collect();
    let wanted =
        [("one", None), ("two", Some("one")), ("three", Some("two")), ("four", Some("three"))];
    let wanted = wanted.map(|(name, parent)| (name.to_owned(), parent.map(str::to_owned)));
    assert_eq!(parents, wanted);
    let sizes: Vec<u64> = lab.list(0).iter().map(|s| s.bytes).collect();
    assert!(sizes[1..].iter().all(|b| *b > 0) && sizes[3] <= sizes[0], "{sizes:?}");
    let check = |left: &[&str]| {
        for (name, digest) in digests.iter().filter(|(name, _)| left.contains(name)) {
            assert_eq!(loaded_digest(&store, name), *digest, "{name}");
        }
    };
    check(&["one", "two", "three", "four"]);
    assert_eq!(lab.delete(0, "three"), Response::Done);
    check(&["one", "two", "four"]);
    assert_eq!(lab.delete(0, "one"), Response::Done);
    check(&["two", "four"]);
    // The next one builds on the latest that is left.
    assert_eq!(lab.delete(0, "four"), Response::Done);
    let five = lab.digest_of(0, "five");
    assert_eq!(lab.list(0)[1].parent.as_deref(), Some("two"));
    assert_eq!(loaded_digest(&store, "five"), five);
    let disk_at = |name: &str| {
        let mut disk = vec![0; DISK_BYTES as usize];
        chain::disk(&store.chain(name).unwrap(), 0, &mut |index, data| {
            let at = index as usize * 65536;
            disk[at..at + 65536].copy_from_slice(data);
            Ok(())
        })
        .unwrap();
        disk
    };
    assert_eq!([0, 1, 2, 3, 4].map(|n| disk_at("five")[n * 128 * 1024]), [4, 1, 2, 3, 4]);
    assert_eq!([0, 1, 2, 3].map(|n| disk_at("two")[n * 128 * 1024]), [1, 1, 2, 0]);
    // After a restore, what comes next builds on what was restored.
    lab.stop(0);
    assert!(matches!(lab.restore(0, "two", true), Response::Restored { .. }));
    lab.wait_output(0, 20);
    lab.write_disk(0, 7 * 128 * 1024, 9);
    let six = lab.digest_of(0, "six");
    assert_eq!(lab.list(0)[2].parent.as_deref(), Some("two"));
    assert_eq!(loaded_digest(&store, "six"), six);
    assert_eq!([0, 1, 2, 3, 7].map(|n| disk_at("six")[n * 128 * 1024]), [1, 1, 2, 0, 9]);
}

#[test]
fn a_restore_replaces_the_disks_only_by_force_and_a_stop_between_is_noticed() {
    let lab = lab(&["a"], &["a shared secret of hosts"]);
    lab.make_disk();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    lab.wait_output(0, 20);
    lab.write_disk(0, 4096, 1);
    assert!(matches!(lab.create(0, "one"), Response::SnapshotTaken { .. }));
    lab.write_disk(0, 4096, 2);
    lab.stop(0);
    let (code, words) = refusal(lab.restore(0, "one", false));
    assert!(code == ErrorCode::BadRequest && words.contains("say --force"), "{words}");
    let byte = || std::fs::read(lab.disk()).unwrap()[4096];
    let mode = || std::fs::metadata(lab.disk()).unwrap().permissions().mode() & 0o777;
    std::fs::set_permissions(lab.disk(), PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(byte(), 2);
    // A crash after some of the disks.
    lab.store("a").begin_restoring("one").unwrap();
    let (_, words) = refusal(lab.start(0, &COUNTER, DISK));
    assert!(words.contains("restore --force toy one"), "{words}");
    assert!(matches!(lab.restore(0, "one", true), Response::Restored { .. }));
    assert_eq!((byte(), mode()), (1, 0o640));
    lab.wait_output(0, 20);
    lab.stop(0);
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    let files = std::fs::read_dir(lab.dir.path()).unwrap();
    let names: Vec<_> = files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains("partial")), "{names:?}");
}

#[test]
fn several_clones_of_one_snapshot_run_beside_the_original() {
    let lab = lab(&["a"], &["a shared secret of hosts"]);
    lab.make_disk();
    let more = format!("{DISK}[[net]]\nmac = \"52:54:00:12:34:56\"\n");
    assert_eq!(lab.start(0, &COUNTER, &more), Response::Done);
    lab.wait_output(0, 20);
    lab.write_disk(0, 4096, 1);
    assert!(matches!(lab.create(0, "one"), Response::SnapshotTaken { .. }));
    lab.write_disk(0, 4096, 2);
    let elsewhere = lab.dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let (first, second) = std::thread::scope(|s| {
        let second = s.spawn(|| lab.clone(0, "one", "c2", Some(elsewhere.clone())));
        (lab.clone(0, "one", "c1", None), second.join().unwrap())
    });
    let file = |response| match response {
        Response::Restored { vm, file } => (vm, file),
        other => panic!("{other:?}"),
    };
    assert_eq!(file(first), ("c1".to_owned(), lab.dir.path().join("c1.toml")));
    assert_eq!(file(second), ("c2".to_owned(), elsewhere.join("c2.toml")));
    for (name, disk) in
        [("c1", lab.dir.path().join("c1-disk0.img")), ("c2", elsewhere.join("c2-disk0.img"))]
    {
        let clone = lab.hosts[0].daemon.find(name).unwrap();
        let printed = || clone.console(0).unwrap().attach().unwrap().scrollback.clone();
        lab.wait("output", |_| printed().len() > 40);
        assert_eq!(std::fs::read(&disk).unwrap()[4096], 1, "{name}");
        // It is a VM like any other, also after its end.
        clone.power_off();
        lab.wait("off", |_| clone.is_spare());
    }
    assert_eq!(std::fs::read(lab.disk()).unwrap()[4096], 2);
    let text = std::fs::read_to_string(elsewhere.join("c2.toml")).unwrap();
    let again = Definition::parse(text, elsewhere.join("c2.toml")).unwrap();
    assert_eq!(again.config.macs().unwrap(), [crate::config::stable_mac("c2", 0)]);
    assert_eq!(again.config.bios, Some(lab.dir.path().join("bios")));
    lab.wait_output(0, 20);
    // Nothing of another VM is taken.
    for (clone, dir, words) in [
        ("c1", None, "exists"),
        ("toy", None, "running or followed here"),
        ("../x", None, "not usable"),
        ("c3", Some(lab.dir.path().join("none")), "c3.toml"),
    ] {
        let (_, said) = refusal(lab.clone(0, "one", clone, dir));
        assert!(said.contains(words), "{said}");
    }
    assert!(!lab.dir.path().join("c3.toml").exists());
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    let refused = |response: Response, code: ErrorCode, words: &str| {
        let (found, said) = refusal(response);
        assert!(found == code && said.contains(words), "{found:?} {said}");
    };
    refused(lab.create(0, "one"), ErrorCode::NotFound, "no VM toy");
    refused(lab.restore(0, "one", false), ErrorCode::NotFound, "no snapshot one");
    refused(lab.delete(0, "one"), ErrorCode::NotFound, "no snapshot one");
    assert_eq!(lab.start(0, &COUNTER, ""), Response::Done);
    refused(lab.create(0, "../one"), ErrorCode::BadRequest, "not usable");
    lab.wait("protected", |l| l.is_protected(0));
    refused(lab.create(1, "one"), ErrorCode::NotFound, "runs on host a");
    assert!(matches!(lab.create(0, "one"), Response::SnapshotTaken { .. }));
    refused(lab.create(0, "one"), ErrorCode::BadRequest, "already");
    refused(lab.restore(1, "one", false), ErrorCode::Failed, "followed here");
    // By the time, when nobody gives it a name.
    for _ in 0..2 {
        let taken = lab.hosts[0].daemon.create_snapshot(NAME, None, &mut |_| ());
        let Response::SnapshotTaken { name, .. } = taken else { panic!("{taken:?}") };
        assert!(name.starts_with("20") && name.contains('T'), "{name}");
    }
    // The VM lives on the other host now, and is not followed here.
    lab.hosts[0].daemon.failover(NAME).unwrap();
    lab.wait("switch", |l| l.is_live(1));
    lab.hosts[1].vm().set_protection(Some(false), None);
    lab.wait("alone", |l| l.status(0).is_some_and(|s| s.role == Role::Stopped));
    refused(lab.restore(0, "one", false), ErrorCode::Refused, "live on host b");
    assert_eq!(lab.list(0).len(), 3);
    assert!(lab.list(1).is_empty());
    assert!(matches!(lab.create(1, "one"), Response::SnapshotTaken { .. }), "a first one there");
}

#[test]
fn a_vm_that_stops_leaves_nothing_of_a_snapshot_that_is_being_taken() {
    let lab = lab(&["a"], &["a shared secret of hosts"]);
    // Enough to write for a while.
    let mut seed = 1u64;
    let mut noise = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    };
    let bytes: Vec<u8> = (0..64 << 20).map(|_| noise()).collect();
    std::fs::write(lab.disk(), bytes).unwrap();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    lab.wait_output(0, 20);
    let taken = std::thread::scope(|s| {
        let taken = s.spawn(|| lab.create(0, "one"));
        let partial = lab.store("a").dir().join("one.snapshot.partial");
        lab.wait("a snapshot begins", |_| partial.exists());
        lab.hosts[0].vm().power_off();
        taken.join().unwrap()
    });
    let (code, words) = refusal(taken);
    assert!(code == ErrorCode::Failed && words.contains("the VM stopped here"), "{words}");
    assert!(!lab.store("a").dir().exists());
}

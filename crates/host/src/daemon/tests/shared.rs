//! Disks that hosts share: who has their locks.

use super::*;
use crate::disk::lock::{Holder, ImageLock, TakeLockError, default_path};

const DISK: &str = "[[disk]]\npath = \"shared.img\"\nmode = \"shared\"\n";

fn image(lab: &Lab) -> PathBuf {
    let path = lab.dir.path().join("shared.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    path
}

/// Who has the lock, as somebody sees who wants it.
fn holder(image: &Path) -> Option<Holder> {
    let me = Holder::new("another VM", "another host", 1, 1);
    match ImageLock::take(&default_path(image), &me) {
        Err(TakeLockError::Held { by, .. }) => by,
        // Whoever waits for it tries again.
        _ => None,
    }
}

fn is_held_by(image: &Path, host: &str) -> bool {
    holder(image).is_some_and(|h| h.host == host && h.vm == NAME)
}

#[test]
fn lock_of_a_shared_disk_follows_the_vm_and_is_let_go_with_it() {
    let lab = lab(&["a", "b"], &["one secret for all"]);
    let image = image(&lab);
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    assert!(is_held_by(&image, "a"));
    lab.wait("protected", |l| l.is_protected(0));
    let before = holder(&image).unwrap();
    lab.hosts[0].daemon.failover(NAME).unwrap();
    lab.wait("protected again", |l| l.is_protected(1));
    let after = holder(&image).unwrap();
    assert_eq!(after.host, "b");
    assert!(after.generation > before.generation, "{before:?} {after:?}");
    // A host that is gone leaves none.
    lab.hosts[1].die();
    lab.wait("live", |l| l.status(0).is_some_and(|s| s.live_host.as_deref() == Some("a")));
    lab.wait("has the lock", |_| is_held_by(&image, "a"));
    lab.hosts[0].vm().power_off();
    lab.wait("off", |l| l.status(0).is_some_and(|s| s.role == Role::Stopped));
    lab.wait("lets go", |_| holder(&image).is_none());
}

#[test]
fn start_waits_a_while_for_a_lock_and_says_who_has_it() {
    let lab = lab(&["a"], &["one secret for all"]);
    let image = image(&lab);
    let path = default_path(&image);
    let taken = ImageLock::take(&path, &Holder::new(NAME, "b", 1, 1)).unwrap();
    match lab.start(0, &COUNTER, DISK) {
        Response::Error { code: ErrorCode::Failed, message } => {
            assert!(message.contains("lock of disk 0, held by b in generation 1"), "{message}");
            assert!(message.contains("no command to fence it"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    drop(taken);
    lab.wait("a spare again", |l| l.hosts[0].vm().is_spare());
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    assert!(is_held_by(&image, "a"));
    // By the word of a later one, it has lost it.
    drop(ImageLock::take(&path, &Holder::new(NAME, "b", 99, 1)));
}

#[test]
fn lock_of_a_host_that_was_fenced_is_taken_from_it() {
    let fence = FenceSection { command: Some("exit 0".to_owned()), ..FenceSection::default() };
    let lab = lab_with(&["a"], &["one secret for all"], &fence);
    let image = image(&lab);
    let frozen = ImageLock::take(&default_path(&image), &Holder::new(NAME, "b", 0, 1)).unwrap();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    assert!(is_held_by(&image, "a"));
    assert!(frozen.check().is_err_and(|e| e.contains("was taken by a")));
    let fenced = lab.status(0).unwrap().fenced.unwrap();
    assert!(fenced.contains("host b was fenced in attempt 1"), "{fenced}");
}

#[test]
fn host_that_cannot_be_fenced_keeps_its_lock() {
    let command = Some("echo no switch; exit 1".to_owned());
    let fence = FenceSection { command, attempts: 2, ..FenceSection::default() };
    let lab = lab_with(&["a"], &["one secret for all"], &fence);
    let image = image(&lab);
    let alive = ImageLock::take(&default_path(&image), &Holder::new(NAME, "b", 0, 1)).unwrap();
    match lab.start(0, &COUNTER, DISK) {
        Response::Error { code: ErrorCode::Failed, message } => {
            assert!(message.contains("fencing b failed in") && message.contains("no switch"));
        }
        other => panic!("{other:?}"),
    }
    alive.check().unwrap();
    assert!(is_held_by(&image, "b"));
}

#[test]
fn lock_of_another_vm_is_no_reason_to_fence() {
    let fence = FenceSection { command: Some("exit 0".to_owned()), ..FenceSection::default() };
    let lab = lab_with(&["a"], &["one secret for all"], &fence);
    let image = image(&lab);
    let theirs = ImageLock::take(&default_path(&image), &Holder::new("other", "b", 0, 1)).unwrap();
    match lab.start(0, &COUNTER, DISK) {
        Response::Error { code: ErrorCode::Failed, message } => {
            assert!(message.contains("held by b for VM other"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    theirs.check().unwrap();
    assert_eq!(lab.status(0).unwrap().fenced, None);
}

//! Disks that change while their VM runs.

use super::*;

const DISK: &str = "[[disk]]\npath = \"shared.img\"\nmode = \"shared\"\n";

fn change(lab: &Lab, host: usize, request: Request) -> Response {
    Control(Arc::clone(&lab.hosts[host].daemon)).handle(request, &mut |_| ())
}

fn resize(lab: &Lab, host: usize, disk: u8, size: u64) -> Response {
    change(lab, host, Request::ResizeDisk { vm: NAME.to_owned(), disk, size })
}

fn code(response: &Response) -> Option<ErrorCode> {
    if let Response::Error { code, .. } = response { Some(*code) } else { None }
}

#[test]
fn a_disk_grows_on_both_hosts_and_who_takes_over_knows() {
    let lab = lab(&["a", "b"], &["one secret for all"]);
    let image = lab.dir.path().join("shared.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    assert_eq!(code(&resize(&lab, 0, 0, (2 << 20) + 1)), Some(ErrorCode::BadRequest));
    assert_eq!(code(&resize(&lab, 0, 0, 512)), Some(ErrorCode::BadRequest));
    assert_eq!(code(&resize(&lab, 0, 1, 2 << 20)), Some(ErrorCode::NotFound));
    assert_eq!(code(&resize(&lab, 1, 0, 2 << 20)), Some(ErrorCode::NotFound));
    assert_eq!(resize(&lab, 0, 0, 2 << 20), Response::Done);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 2 << 20);
    let digests = |l: &Lab| l.status(1).and_then(|s| s.digests).unwrap_or(0);
    let before = digests(&lab);
    lab.wait("digests after that", |l| digests(l) > before + 1);
    lab.hosts[0].die();
    lab.wait("live", |l| l.is_live(1));
    // The machine there has that size, and its disk too.
    assert_eq!(code(&resize(&lab, 1, 0, 2 << 20)), Some(ErrorCode::BadRequest));
    assert_eq!(resize(&lab, 1, 0, 3 << 20), Response::Done);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 3 << 20);
    assert!(lab.reports("b").is_empty());
}

fn limit(lab: &Lab, host: usize, disk: u8, iops: Option<u64>) -> Response {
    let (vm, iops_burst, bytes_per_second, bytes_burst) = (NAME.to_owned(), None, None, None);
    let request = Request::LimitDisk { vm, disk, iops, iops_burst, bytes_per_second, bytes_burst };
    change(lab, host, request)
}

/// Requests in a second that each disk of a host may start.
fn limits_in_force(lab: &Lab, host: usize) -> Vec<Option<u64>> {
    lab.hosts[host].vm().limits_in_force().iter().map(|limits| limits.iops).collect()
}

#[test]
fn limits_that_were_set_hold_wherever_the_vm_runs_until_it_is_started_anew() {
    let lab = lab(&["a", "b", "c"], &["one secret for all"]);
    let defined = |path, iops| {
        std::fs::write(lab.dir.path().join(path), vec![0; 1 << 20]).unwrap();
        format!("[[disk]]\npath = \"{path}\"\nmode = \"shared\"\niops = {iops}\n")
    };
    let disks = [("0.img", 100), ("1.img", 101), ("2.img", 102)].map(|(p, n)| defined(p, n));
    assert_eq!(lab.start(0, &COUNTER, &disks.concat()), Response::Done);
    // One before there is a secondary, perhaps, and one when there is.
    assert_eq!(limit(&lab, 0, 0, Some(70)), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    assert_eq!(limit(&lab, 0, 1, Some(5)), Response::Done);
    assert_eq!(limit(&lab, 0, 1, None), Response::Done);
    assert_eq!(limits_in_force(&lab, 0), [Some(70), None, Some(102)]);
    let (mut live, mut others) = (0, vec![1, 2]);
    while !others.is_empty() {
        lab.wait("protected", |l| l.is_protected(live));
        let next =
            others.iter().position(|&i| lab.status(i).is_some_and(|s| s.role == Role::Secondary));
        let next = others.remove(next.unwrap());
        assert_eq!(limits_in_force(&lab, next), [None; 3], "the follower's own");
        lab.hosts[live].die();
        live = next;
        lab.wait("live", |l| l.is_live(live));
        lab.wait("limited", |l| limits_in_force(l, live) == [Some(70), None, Some(102)]);
    }
}

#[test]
fn limits_are_for_disks_that_are_there() {
    let lab = lab(&["a"], &["one secret for all"]);
    std::fs::write(lab.dir.path().join("shared.img"), vec![0; 1 << 20]).unwrap();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    assert_eq!(limit(&lab, 0, 0, Some(10)), Response::Done);
    assert_eq!(code(&limit(&lab, 0, 1, Some(10))), Some(ErrorCode::NotFound));
}

#[test]
fn what_a_guest_writes_to_its_disk_keeps_it_from_no_protection() {
    let lab = lab(&["a", "b"], &["one secret for all"]);
    let image = lab.dir.path().join("shared.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let more = format!("{DISK}[protection]\nenabled = false\n");
    assert_eq!(lab.start(0, &COUNTER, &more), Response::Done);
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"QFI\xfb\0\0\0\x03", 0).unwrap();
    let request = Request::Protect { vm: NAME.to_owned(), host: None };
    assert_eq!(change(&lab, 0, request), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
}

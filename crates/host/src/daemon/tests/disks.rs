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

#[test]
fn limits_are_for_disks_that_are_there() {
    let lab = lab(&["a"], &["one secret for all"]);
    std::fs::write(lab.dir.path().join("shared.img"), vec![0; 1 << 20]).unwrap();
    assert_eq!(lab.start(0, &COUNTER, DISK), Response::Done);
    let limit = |disk| {
        let (vm, iops) = (NAME.to_owned(), Some(10));
        let (iops_burst, bytes_per_second, bytes_burst) = (None, None, None);
        let request =
            Request::LimitDisk { vm, disk, iops, iops_burst, bytes_per_second, bytes_burst };
        change(&lab, 0, request)
    };
    assert_eq!(limit(0), Response::Done);
    assert_eq!(code(&limit(1)), Some(ErrorCode::NotFound));
}

//! Disks that are no raw files, under a guest: a qcow2 image, and NBD exports behind nbdkit's delay and error filters.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod vmrun;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest::GuestKind;
use vmrun::{Running, guest, run_command, understudy};

/// An NBD server; it ends with the test.
struct Server(Child);

impl Server {
    fn start(socket: &Path, args: &[&str]) -> Self {
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(socket).args(args).stderr(Stdio::null());
        let child = command.spawn().expect("nbdkit (package nbdkit) runs");
        let end = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            assert!(Instant::now() < end, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().expect("qemu-img runs");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {words}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Does a line in the guest's shell, which ends with status `code`.
fn shell(vm: &mut Running, number: u32, line: &str, code: u8) {
    // What is typed comes back on the console: the sum is not in it.
    vm.type_line(&format!("{line}; echo said $((1000 + {number})) status $?"));
    vm.wait_for(&format!("said {} status {code}", 1000 + number));
}

#[test]
fn guest_uses_a_qcow2_image_and_a_slow_export() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { work.path().join(name) };
    let (image, socket, base) = (at("a.qcow2"), at("nbd"), at("base.raw"));
    fs::write(&base, vec![0x5a; 8 << 20]).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&image), "64M"]);
    let file = at("export");
    fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let path = format!("file={}", text(&file));
    let _server = Server::start(
        &socket,
        &["--filter=delay", "file", &path, "delay-write=5ms", "delay-read=2ms"],
    );
    let files = guest(GuestKind::Minimal);
    let mut command = run_command(&files, 1, "quiet");
    command.arg("--initrd").arg(&files.initrd);
    command.arg("--disk").arg(format!("path={},format=qcow2,backing=on", text(&image)));
    command.arg("--disk").arg(format!("nbd=nbd+unix:///?socket={}", text(&socket)));
    let mut vm = Running::start(&mut command);
    vm.wait_for("understudy: shell ready");
    shell(
        &mut vm,
        1,
        "dd if=/dev/vda bs=1M count=8 2>/dev/null | tr -d Z | wc -c | grep -q '^0$'",
        0,
    );
    shell(
        &mut vm,
        2,
        "yes qcow2 | head -c 5000000 > /tmp/x; dd if=/tmp/x of=/dev/vda bs=64k seek=20 conv=fsync",
        0,
    );
    shell(&mut vm, 3, "dd if=/tmp/x of=/dev/vdb bs=1M seek=3 conv=fsync", 0);
    shell(&mut vm, 4, "dd if=/dev/vdb bs=1M skip=3 | head -c 5000000 | cmp - /tmp/x", 0);
    shell(&mut vm, 5, "dd if=/dev/vda bs=64k skip=20 | head -c 5000000 | cmp - /tmp/x", 0);
    vm.type_line("exit");
    let ended = vm.wait();
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.console, ended.words);
    let wanted: Vec<u8> = b"qcow2\n".iter().copied().cycle().take(5_000_000).collect();
    assert!(fs::read(&file).unwrap()[3 << 20..][..5_000_000] == wanted);
    assert!(fs::read(&base).unwrap() == vec![0x5a; 8 << 20]);
    qemu_img(&["check", "-q", text(&image)]);
    let raw = at("a.raw");
    qemu_img(&["convert", "-O", "raw", text(&image), text(&raw)]);
    let raw = fs::read(&raw).unwrap();
    assert!(raw[20 << 16..][..5_000_000] == wanted && raw[..20 << 16].iter().all(|b| *b == 0x5a));
    // Nothing was said about the format: it is not guessed.
    let disk = format!("path={}", text(&image));
    let mut run = understudy();
    run.args(["run", "--kernel"]).arg(&files.kernel).args(["--disk", &disk]);
    let said = String::from_utf8_lossy(&run.output().unwrap().stderr).into_owned();
    assert!(said.contains("looks like qcow2") && said.contains("format=qcow2"), "{said}");
}

#[test]
fn errors_of_an_export_are_io_errors_in_the_guest_and_nothing_else_breaks() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { work.path().join(name) };
    let (socket, broken, other) = (at("nbd"), at("broken"), at("other.img"));
    fs::File::create(&other).unwrap().set_len(8 << 20).unwrap();
    let trigger = format!("error-file={}", text(&broken));
    let server = || {
        Server::start(&socket, &["--filter=error", "memory", "32M", "error-rate=100%", &trigger])
    };
    let first = server();
    let files = guest(GuestKind::Minimal);
    let mut command = run_command(&files, 1, "quiet");
    command.arg("--initrd").arg(&files.initrd);
    command.arg("--disk").arg(format!("nbd=nbd+unix:///?socket={},nbd-timeout=2s", text(&socket)));
    command.arg("--disk").arg(format!("path={}", text(&other)));
    let mut vm = Running::start(&mut command);
    vm.wait_for("understudy: shell ready");
    let write = "dd if=/bin/busybox of=/dev/vda bs=64k count=8 conv=fsync";
    let elsewhere = "dd if=/bin/busybox of=/dev/vdb bs=64k count=8 conv=fsync";
    shell(&mut vm, 1, write, 0);
    fs::write(&broken, "").unwrap();
    shell(&mut vm, 2, write, 1);
    vm.wait_for("Input/output error");
    shell(&mut vm, 3, elsewhere, 0);
    fs::remove_file(&broken).unwrap();
    shell(&mut vm, 4, write, 0);
    // Gone for longer than the time-out, then there again.
    drop(first);
    fs::remove_file(&socket).unwrap();
    shell(&mut vm, 5, write, 1);
    shell(&mut vm, 6, elsewhere, 0);
    let _second = server();
    shell(&mut vm, 7, write, 0);
    shell(
        &mut vm,
        8,
        "head -c 524288 /dev/vda > /tmp/a; head -c 524288 /bin/busybox | cmp - /tmp/a",
        0,
    );
    vm.type_line("exit");
    let ended = vm.wait();
    assert_eq!(ended.code, Some(0), "{}\n{}", ended.console, ended.words);
}

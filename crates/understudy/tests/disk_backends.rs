//! A protected guest with a mirrored qcow2 disk and a shared NBD disk: the server goes and comes back, each host takes over, and
//! both copies of the mirrored disk are the same at the end, and whole to QEMU's tools.
//!
//! The test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod hosts;
mod inside;
mod vmrun;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest::GuestKind;
use hosts::{DIGESTS_MIN, Host, LIMIT, VM, hosts_off};
use inside::is_inside;
use vmrun::guest;

/// What the guest does: writes to both disks, and reads from them what it wrote.
const LOAD: &str = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); for d in vda vdb; do \
                    dd if=/dev/urandom of=/tmp/x bs=64k count=2 2>/dev/null; \
                    dd if=/tmp/x of=/dev/$d bs=64k seek=$((i % 200)) conv=notrunc,fsync 2>/dev/null || echo b''ad write $d; \
                    echo 3 > /proc/sys/vm/drop_caches; \
                    dd if=/dev/$d bs=64k skip=$((i % 200)) count=2 2>/dev/null | cmp - /tmp/x || echo b''ad data $d; \
                    done; echo round $i fin''ished; done\n";

fn console(host: &Host) -> (UnixStream, Arc<Mutex<String>>) {
    let client = host::control::Client::connect(&host.dir.join("socket"));
    let (stream, early) = client.and_then(|c| c.console(VM, 0)).unwrap().unwrap();
    let said = Arc::new(Mutex::new(String::from_utf8_lossy(&early).into_owned()));
    let (theirs, mut reading) = (Arc::clone(&said), stream.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = reading.read(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
            theirs.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
        }
    });
    (stream, said)
}

/// Waits until the console has said a text.
fn wait_once(said: &Mutex<String>, text: &str) {
    let deadline = Instant::now() + LIMIT;
    while !said.lock().unwrap_or_else(PoisonError::into_inner).contains(text) {
        assert!(Instant::now() < deadline, "{text:?} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the console has said a text so often more; what the guest read was never wrong.
fn wait(said: &Mutex<String>, text: &str, more: usize) {
    let look = || said.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let until = look().matches(text).count() + more;
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = look();
        assert!(!now.contains("bad ") && !now.contains("I/O error"), "{now}");
        if now.matches(text).count() >= until {
            return;
        }
        assert!(Instant::now() < deadline, "{text:?} did not come: {now}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Server(Child);

impl Server {
    fn start(work: &Path) -> Self {
        let socket = work.join("nbd");
        drop(fs::remove_file(&socket));
        let mut command = Command::new("nbdkit");
        command.arg("-f").arg("-U").arg(&socket).args(["--filter=delay", "file"]);
        command.arg(work.join("export")).args(["delay-write=1ms"]).stderr(Stdio::null());
        let child = command.spawn().expect("nbdkit (package nbdkit) runs");
        let end = Instant::now() + LIMIT;
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
    let words = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {words}");
}

/// The other host writes what is left of the log to its copy; one that dies before that is behind, and would be healed.
fn wait_equal(images: &[String; 2]) {
    let compare = ["compare", "-U", "-f", "qcow2", "-F", "qcow2", &images[0], &images[1]];
    let deadline = Instant::now() + LIMIT;
    while !Command::new("qemu-img").args(compare).output().unwrap().status.success() {
        assert!(Instant::now() < deadline, "the copies differ");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn run(work: &Path) {
    let files = guest(GuestKind::Minimal);
    let mut hosts = hosts_off(work, ["jit", "jit"]);
    let images = [0, 1].map(|i| hosts[i].dir.join("vm/disk.qcow2").display().to_string());
    qemu_img(&["create", "-q", "-f", "qcow2", &images[0], "16M"]);
    fs::File::create(work.join("export")).unwrap().set_len(16 << 20).unwrap();
    let server = Server::start(work);
    hosts.iter_mut().for_each(|host| host.start(&work.join("vm")));
    let definition = |more: &str| {
        let text = format!(
            "name = \"{VM}\"\nmemory = \"128M\"\nkernel = {:?}\ninitrd = {:?}\nappend = \"{}\"\n\
             [[disk]]\npath = {:?}\nformat = \"qcow2\"\n\
             [[disk]]\nnbd = \"nbd+unix:///?socket={}\"\nmode = \"shared\"\n{more}\
             [protection]\ndigest_interval_ms = 50\nflight_recorder = \"0s\"\nhosts = [\"a\", \"b\"]\n",
            files.kernel,
            files.initrd,
            files.append,
            work.join("vm/disk.qcow2"),
            work.join("nbd").display(),
        );
        let vm = work.join("vm.toml");
        fs::write(&vm, text).unwrap();
        vm.display().to_string()
    };
    let refused = hosts[0].ask(&["start", &definition("")]);
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && words.contains("lock = "), "{words}");
    let lock = format!("lock = {:?}\n", work.join("export.lock"));
    let started = hosts[0].ask(&["start", &definition(&lock)]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let (mut typed, said) = console(&hosts[0]);
    wait_once(&said, "shell ready");
    hosts[0].wait_protected();
    std::thread::sleep(Duration::from_millis(500));
    typed.write_all(LOAD.as_bytes()).unwrap();
    wait(&said, "finished", 4);
    drop(server);
    std::thread::sleep(Duration::from_secs(2));
    let _server = Server::start(work);
    wait(&said, "finished", 4);
    hosts[1].wait_digests(DIGESTS_MIN);
    for (from, to) in [(0, 1), (1, 0)] {
        if to == 0 {
            assert!(hosts[from].ask(&["failover", VM]).status.success());
        } else {
            hosts[from].die();
        }
        hosts[to].wait("live", |s| s["role"] == "primary");
        let (_typed, said) = console(&hosts[to]);
        wait(&said, "finished", 2);
        if to == 1 {
            hosts[from].start(&work.join("vm"));
        }
        hosts[to].wait_protected();
        wait(&said, "finished", 4);
        hosts[from].wait_digests(DIGESTS_MIN);
        hosts.iter().for_each(Host::assert_same);
    }
    assert!(hosts[0].ask(&["stop", VM]).status.success());
    for host in &hosts {
        host.wait("off", |s| s["role"] == "stopped");
    }
    wait_equal(&images);
    hosts.iter_mut().for_each(Host::die);
    for image in &images {
        qemu_img(&["check", "-f", "qcow2", image]);
    }
    qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", &images[0], &images[1]]);
}

#[test]
fn qcow2_and_nbd_disks_of_a_protected_guest_survive_their_hosts_and_server() {
    drop(guest(GuestKind::Minimal));
    let name = "qcow2_and_nbd_disks_of_a_protected_guest_survive_their_hosts_and_server";
    if is_inside(name) {
        let work = tempfile::tempdir().unwrap();
        run(work.path());
    }
}

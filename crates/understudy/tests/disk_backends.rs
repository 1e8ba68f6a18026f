//! A protected guest with a mirrored qcow2 disk and a shared NBD disk: the server goes and comes back, the disks grow, each host
//! takes over, and both copies of the mirrored disk are the same at the end, and whole to QEMU's tools.
//!
//! The tests run themselves again in network, mount and process namespaces of their own, so that nothing stays behind.

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

/// Once the VM is off on both hosts, kills them: their copies are the same, and whole. The other host writes what is left of the
/// log to its copy first; one that dies before that is behind, and would be healed.
fn end_equal(hosts: &mut [Host; 2], images: &[String; 2]) {
    for host in &*hosts {
        host.wait("off", |s| s["role"] == "stopped");
    }
    let compare = ["compare", "-U", "-f", "qcow2", "-F", "qcow2", &images[0], &images[1]];
    let deadline = Instant::now() + LIMIT;
    while !Command::new("qemu-img").args(compare).output().unwrap().status.success() {
        assert!(Instant::now() < deadline, "the copies differ");
        std::thread::sleep(Duration::from_millis(100));
    }
    hosts.iter_mut().for_each(Host::die);
    for image in images {
        qemu_img(&["check", "-f", "qcow2", image]);
    }
    qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", &images[0], &images[1]]);
}

/// Two hosts with daemons, a qcow2 image of 16 MiB for the first one, an export of as much, and its server. Where the images
/// are.
fn prepare(work: &Path) -> ([Host; 2], [String; 2], Server) {
    let mut hosts = hosts_off(work, ["jit", "jit"]);
    let images = [0, 1].map(|i| hosts[i].dir.join("vm/disk.qcow2").display().to_string());
    qemu_img(&["create", "-q", "-f", "qcow2", &images[0], "16M"]);
    fs::File::create(work.join("export")).unwrap().set_len(16 << 20).unwrap();
    let server = Server::start(work);
    hosts.iter_mut().for_each(|host| host.start(&work.join("vm")));
    (hosts, images, server)
}

/// Writes the VM's definition, with more about the export and about protection. Says where.
fn define(work: &Path, more: &str, protection: &str) -> String {
    let files = guest(GuestKind::Minimal);
    let text = format!(
        "name = \"{VM}\"\nmemory = \"128M\"\nkernel = {:?}\ninitrd = {:?}\nappend = \"{}\"\n\
         [[disk]]\npath = {:?}\nformat = \"qcow2\"\n\
         [[disk]]\nnbd = \"nbd+unix:///?socket={}\"\nmode = \"shared\"\n{more}\
         [protection]\n{protection}digest_interval_ms = 50\nflight_recorder = \"0s\"\nhosts = [\"a\", \"b\"]\n",
        files.kernel,
        files.initrd,
        files.append,
        work.join("vm/disk.qcow2"),
        work.join("nbd").display(),
    );
    let vm = work.join("vm.toml");
    fs::write(&vm, text).unwrap();
    vm.display().to_string()
}

fn lock(work: &Path) -> String {
    format!("lock = {:?}\n", work.join("export.lock"))
}

/// Asks for something that is to be done.
fn ask(host: &Host, args: &[&str]) {
    let output = host.ask(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Asks for something that is to be refused; says why it was.
fn refused(host: &Host, args: &[&str]) -> String {
    let output = host.ask(args);
    assert!(!output.status.success(), "{args:?} was not refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run(work: &Path) {
    let (mut hosts, images, server) = prepare(work);
    let words = refused(&hosts[0], &["start", &define(work, "", "")]);
    assert!(words.contains("lock = "), "{words}");
    ask(&hosts[0], &["start", &define(work, &lock(work), "")]);
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
    ask(&hosts[0], &["stop", VM]);
    end_equal(&mut hosts, &images);
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

/// The guest's shell on a host.
struct Shell {
    typed: UnixStream,
    said: Arc<Mutex<String>>,
    lines: u32,
}

impl Shell {
    fn on(host: &Host, lines: u32) -> Self {
        let (typed, said) = console(host);
        Self { typed, said, lines }
    }

    /// Does a line that has to succeed.
    fn does(&mut self, line: &str) {
        self.lines += 1;
        let number = self.lines;
        // What is typed comes back on the console.
        let line = format!("{line} && echo line {number} d''one || echo line {number} f''ailed\n");
        self.typed.write_all(line.as_bytes()).unwrap();
        let deadline = Instant::now() + LIMIT;
        loop {
            let said = self.said.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if said.contains(&format!("line {number} done")) {
                return;
            }
            assert!(!said.contains(&format!("line {number} failed")), "{said}");
            assert!(Instant::now() < deadline, "no answer to {line:?}: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The disk has so many MiB, and holds what is written up to its end.
    fn fills(&mut self, disk: &str, mib: u64) {
        self.does(&format!("test $(cat /sys/block/{disk}/size) = {}", mib * 2048));
        let at = mib * 16 - 2;
        self.does(&format!(
            "dd if=/dev/urandom of=/tmp/{disk}{mib} bs=64k count=2 && \
             dd if=/tmp/{disk}{mib} of=/dev/{disk} bs=64k seek={at} conv=notrunc,fsync"
        ));
        self.holds(disk, mib);
    }

    /// What [`Self::fills`] wrote to the end that the disk had then is there.
    fn holds(&mut self, disk: &str, mib: u64) {
        let at = mib * 16 - 2;
        self.does(&format!(
            "echo 3 > /proc/sys/vm/drop_caches && \
             dd if=/dev/{disk} bs=64k skip={at} count=2 | cmp - /tmp/{disk}{mib}"
        ));
    }
}

fn grow(work: &Path) {
    let (mut hosts, images, _server) = prepare(work);
    let export = fs::File::options().write(true).open(work.join("export")).unwrap();
    let resize = |disk, size| ["disk", "resize", VM, disk, size];
    ask(&hosts[0], &["start", &define(work, &lock(work), "enabled = false\n")]);
    let mut shell = Shell::on(&hosts[0], 0);
    wait_once(&shell.said, "shell ready");
    ["vda", "vdb"].iter().for_each(|disk| shell.fills(disk, 16));
    // Alone.
    ask(&hosts[0], &resize("0", "32M"));
    let words = refused(&hosts[0], &resize("1", "32M"));
    assert!(words.contains("which its server resizes; it has 16777216 bytes"), "{words}");
    export.set_len(32 << 20).unwrap();
    ask(&hosts[0], &resize("1", "32M"));
    ["vda", "vdb"].iter().for_each(|disk| shell.fills(disk, 32));
    // With a secondary that begins with disks of that size.
    ask(&hosts[0], &["protect", VM]);
    hosts[0].wait_protected();
    ask(&hosts[0], &resize("0", "48M"));
    export.set_len(48 << 20).unwrap();
    ask(&hosts[0], &resize("1", "48M"));
    ["vda", "vdb"].iter().for_each(|disk| shell.fills(disk, 48));
    hosts[1].wait_digests(DIGESTS_MIN);
    hosts.iter().for_each(Host::assert_same);
    hosts[0].die();
    hosts[1].wait("live", |s| s["role"] == "primary");
    let mut shell = Shell::on(&hosts[1], shell.lines);
    for disk in ["vda", "vdb"] {
        [16, 32, 48].iter().for_each(|mib| shell.holds(disk, *mib));
        shell.fills(disk, 48);
    }
    ask(&hosts[1], &resize("0", "64M"));
    shell.fills("vda", 64);
    // The copy that was left behind is smaller, and is made anew.
    hosts[0].start(&work.join("vm"));
    // What was asked of the other host was not written into the definition.
    ask(&hosts[1], &["protect", VM]);
    hosts[1].wait_protected();
    shell.fills("vda", 64);
    ask(&hosts[1], &["stop", VM]);
    end_equal(&mut hosts, &images);
}

#[test]
fn a_qcow2_image_and_an_export_grow_under_a_guest_alone_and_protected() {
    drop(guest(GuestKind::Minimal));
    if is_inside("a_qcow2_image_and_an_export_grow_under_a_guest_alone_and_protected") {
        let work = tempfile::tempdir().unwrap();
        grow(work.path());
    }
}

//! A live host that freezes with writes to a shared disk on their way, and wakes up when another one has the VM: nothing of
//! it reaches the disk after that. Each host has its own nbdkit in front of one image, which can be made to keep requests
//! waiting, and writes down what it carries out.
//!
//! The test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

mod hosts;
mod inside;
mod vmrun;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use guest::{GuestFiles, GuestKind};
use hosts::{Host, LIMIT, VM, hosts_off};
use inside::{BRIDGE, GUEST_NET, Redis, is_inside, tool};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use vmrun::guest;

/// How long something must not happen.
const QUIET: Duration = Duration::from_secs(4);

/// A host's way to the image.
struct Way {
    dir: PathBuf,
    image: PathBuf,
    server: Child,
}

impl Way {
    fn open(host: &Host, image: &Path) -> Self {
        let (dir, image) = (host.dir.clone(), image.to_owned());
        let server = Self::serve(&dir, &image);
        Self { dir, image, server }
    }

    fn serve(dir: &Path, image: &Path) -> Child {
        for old in ["vm/nbd", "pause"] {
            drop(fs::remove_file(dir.join(old)));
        }
        let setting = |key: &str, path: &Path| format!("{key}={}", path.display());
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--filter=pause", "--filter=log", "-U"]).arg(dir.join("vm/nbd"));
        command.arg("file").arg(image).arg(setting("logfile", &dir.join("nbd.log")));
        command.arg("logappend=true").arg(setting("pause-control", &dir.join("pause")));
        let server = command.stdin(Stdio::null()).spawn().expect("nbdkit (package nbdkit) runs");
        fs::write(dir.join("nbd.pid"), server.id().to_string()).expect("room for files");
        let deadline = Instant::now() + LIMIT;
        while !dir.join("vm/nbd").exists() || !dir.join("pause").exists() {
            assert!(Instant::now() < deadline, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// After its server was killed.
    fn reopen(&mut self) {
        drop(self.server.kill());
        drop(self.server.wait());
        self.server = Self::serve(&self.dir, &self.image);
    }

    /// Lets requests wait (`p`) or go on (`r`).
    fn tell(&self, what: u8) {
        let mut control = UnixStream::connect(self.dir.join("pause")).expect("nbdkit listens");
        control.write_all(&[what]).expect("nbdkit reads");
        let mut answer = [0];
        control.read_exact(&mut answer).expect("nbdkit answers");
        assert_eq!(answer[0], what.to_ascii_uppercase());
    }

    /// When writes were begun and ended here, as the log has it.
    fn writes(&self) -> Vec<String> {
        let log = fs::read_to_string(self.dir.join("nbd.log")).unwrap_or_default();
        let changes = |line: &&str| {
            ["Write", "Zero", "Trim"].iter().any(|word| {
                line.contains(&format!(" {word} ")) || line.contains(&format!("...{word} "))
            })
        };
        log.lines().filter(changes).map(|line| line.chars().take(26).collect()).collect()
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        drop(self.server.kill());
        drop(self.server.wait());
    }
}

fn holder(work: &Path) -> Value {
    let text = fs::read(work.join("disk.lock")).expect("the live host made it");
    serde_json::from_slice(&text).expect("it is JSON")
}

fn write_vm(work: &Path, files: &GuestFiles) -> PathBuf {
    let text = format!(
        "name = \"{VM}\"\nmemory = \"256M\"\nkernel = {:?}\ninitrd = {:?}\n\
         append = \"{} understudy.ip={GUEST_NET}\"\n\
         [[disk]]\nnbd = \"nbd+unix:///?socket={}\"\nmode = \"shared\"\nlock = {:?}\n\
         nbd_timeout = \"5m\"\n\
         [[net]]\nbridge = \"{BRIDGE}\"\n[protection]\nflight_recorder = \"0s\"\nhosts = [\"a\", \"b\"]\n",
        files.kernel,
        files.initrd,
        files.append,
        work.join("vm/nbd").display(),
        work.join("disk.lock"),
    );
    let path = work.join("vm.toml");
    fs::write(&path, text).expect("room for files");
    path
}

/// Writes to Redis all the while.
fn while_writing(redis: &mut Redis, during: impl FnOnce(&dyn Fn() -> usize)) {
    let (go_on, written) = (AtomicBool::new(true), AtomicUsize::new(redis.written()));
    std::thread::scope(|s| {
        s.spawn(|| {
            while go_on.load(Ordering::SeqCst) {
                redis.write(1);
                written.store(redis.written(), Ordering::SeqCst);
            }
        });
        // A client that waits in vain would keep a test that has failed from ending.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            during(&|| written.load(Ordering::SeqCst));
        }));
        go_on.store(false, Ordering::SeqCst);
        if let Err(panic) = result {
            eprintln!("{panic:?}");
            std::process::exit(1);
        }
    });
}

/// Lets the live host freeze while a write that was released waits for its storage.
fn freeze(host: &Host, way: &Way, written: &dyn Fn() -> usize) {
    way.tell(b'p');
    let deadline = Instant::now() + LIMIT;
    let mut before = written();
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let now = written();
        if now == before {
            break;
        }
        assert!(Instant::now() < deadline, "the client goes on without the disk");
        before = now;
    }
    kill_process(host.process(), Signal::STOP).expect("the daemon is a child of this process");
    println!("{} writes; frozen", written());
}

fn wake(host: &Host) {
    kill_process(host.process(), Signal::CONT).expect("the daemon is a child of this process");
}

fn reason(status: &Value) -> &str {
    status["reason"].as_str().unwrap_or_default()
}

/// Nobody fences: the new live host waits for the frozen one, even when that is awake, until its last write has ended.
fn without_fencing(work: &Path, [a, b]: [&Host; 2], ways: &[Way; 2], written: &dyn Fn() -> usize) {
    freeze(a, &ways[0], written);
    let held = "waits for the lock of disk 0, held by a in generation";
    let status = b.wait("waits for the lock", |s| reason(s).contains(held));
    println!("status: {} / {}", reason(&status), status["remedy"]);
    assert!(status["remedy"].as_str().is_some_and(|r| r.contains("fence host a")), "{status}");
    let count = written();
    std::thread::sleep(QUIET);
    assert_eq!(holder(work)["host"], "a");
    wake(a);
    // It knows that it lost, but a thread of it is between the decision to write and the end of the write.
    a.wait("gives up", |s| s["role"] != "primary");
    std::thread::sleep(QUIET);
    assert_eq!((holder(work)["host"].as_str(), written()), (Some("a"), count));
    assert!(ways[1].writes().is_empty(), "nothing was written before the lock");
    ways[0].tell(b'r');
    b.wait("live", |s| s["role"] == "primary" && !reason(s).contains("waits for"));
    assert_eq!(holder(work)["host"], "b");
    b.wait_protected();
    let deadline = Instant::now() + LIMIT;
    while written() < count + 20 {
        assert!(Instant::now() < deadline, "the client goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (theirs, ours) = (ways[0].writes(), ways[1].writes());
    let (last, first) = (theirs.last().expect("it wrote"), ours.first().expect("it wrote"));
    println!("the old host's last write ended {last}, the new one's first began {first}");
    assert!(last < first);
}

/// The storage of the frozen host is cut off: the lock that it has all the same is taken from it, and when it wakes up with its
/// storage back, it writes nothing.
fn with_storage_cut(
    work: &Path,
    [a, b]: [&Host; 2],
    ways: &mut [Way; 2],
    written: &dyn Fn() -> usize,
) {
    freeze(b, &ways[1], written);
    let before = ways[1].writes().len();
    let status = a.wait("live", |s| s["role"] == "primary" && !reason(s).contains("waits for"));
    assert!(
        status["fenced"].as_str().is_some_and(|f| f.contains("host b was fenced in attempt 1")),
        "{status}"
    );
    println!("status: {}", status["fenced"]);
    assert_eq!(holder(work)["host"], "a");
    let count = written();
    ways[1].reopen();
    wake(b);
    b.wait("gives up", |s| s["role"] != "primary");
    a.wait_protected();
    let deadline = Instant::now() + LIMIT;
    while written() < count + 20 {
        assert!(Instant::now() < deadline, "the client goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(ways[1].writes().len(), before, "what was cut off has written");
}

#[test]
fn frozen_host_that_wakes_up_writes_nothing_that_it_must_not() {
    let name = "frozen_host_that_wakes_up_writes_nothing_that_it_must_not";
    let files = guest(GuestKind::Redis);
    if !is_inside(name) {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let work = work.path();
    let image = work.join("shared.img");
    fs::copy(files.disk.as_ref().expect("the guest has a disk"), &image).expect("room for a disk");
    let [mut a, mut b] = hosts_off(work, ["jit", "jit"]);
    let fence = |who: &Host, what: &str| {
        let script = format!("{what}; echo $UNDERSTUDY_HOST of $UNDERSTUDY_VM is cut off");
        who.configure(&format!("[fence]\ncommand = \"{script}\"\n"));
    };
    let kill = |file: PathBuf| format!("kill -9 $(cat {})", file.display());
    fence(&a, &kill(b.dir.join("nbd.pid")));
    let mut ways = [Way::open(&a, &image), Way::open(&b, &image)];
    a.start(&work.join("vm"));
    b.start(&work.join("vm"));
    let started = a.ask(&["start", &write_vm(work, &files).display().to_string()]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    assert_eq!(holder(work)["host"], "a");
    let mut redis = Redis::wait(LIMIT);
    a.wait_protected();
    redis.write(50);
    while_writing(&mut redis, |written| without_fencing(work, [&a, &b], &ways, written));
    while_writing(&mut redis, |written| with_storage_cut(work, [&a, &b], &mut ways, written));

    // The host is killed: its lock goes with it.
    b.die();
    fence(&b, &format!("{}; {}", kill(a.dir.join("pid")), kill(a.dir.join("nbd.pid"))));
    b.start(&work.join("vm"));
    let pid = a.process().as_raw_nonzero().to_string();
    fs::write(a.dir.join("pid"), pid).expect("room for files");
    a.wait_protected();
    while_writing(&mut redis, |written| {
        freeze(&a, &ways[0], written);
        let status = b.wait("live", |s| s["role"] == "primary" && !reason(s).contains("waits for"));
        println!("status: {}", status["fenced"]);
        assert_eq!(holder(work)["host"], "b");
    });
    a.die();
    redis.write(20);
    let count = redis.written();
    drop(redis);
    // All is there, also for a guest that begins anew.
    let mut redis = Redis::connect();
    assert_eq!(redis.count(), count);
    drop(redis);
    assert!(b.ask(&["stop", VM]).status.success());
    b.wait("off", |s| s["role"] == "stopped");
    drop(ways);
    // Its journal is replayed, since the guest was not asked to unmount.
    let path = image.display().to_string();
    let repaired = Command::new("/sbin/e2fsck").args(["-p", &path]).output();
    let repaired = repaired.expect("e2fsck (package e2fsprogs) runs");
    assert!(repaired.status.code().is_some_and(|code| code <= 1), "{repaired:?}");
    tool("e2fsck", "e2fsprogs", &["-fn", &path]);
}

//! A guest that reads a shared disk and writes over what it has just read: with the data of its reads in the log, and with a
//! secondary that reads by itself. Their digests are the same throughout, and each host takes over.
//!
//! Each test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

mod hosts;
mod inside;
mod vmrun;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest::GuestKind;
use hosts::{DIGESTS_MIN, Host, LIMIT, VM, hosts_off};
use inside::is_inside;
use vmrun::guest;

/// What the guest does: reads all of the disk, and at once writes over what it read, from its end to its beginning.
const LOAD: &str = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo 3 > /proc/sys/vm/drop_caches; \
                    s=$(md5sum < /dev/vda); k=16; while [ $k -gt 0 ]; do k=$((k-1)); \
                    dd if=/dev/vda bs=64k skip=$k count=1 2>/dev/null | md5sum > /tmp/s; \
                    dd if=/dev/urandom of=/dev/vda bs=64k seek=$k count=1 conv=notrunc,fsync 2>/dev/null; done; \
                    echo \"round $i $s\"; done\n";

/// A guest's console.
struct Console {
    stream: UnixStream,
    said: Arc<Mutex<String>>,
}

impl Console {
    fn open(host: &Host) -> Self {
        let client = host::control::Client::connect(&host.dir.join("socket"));
        let opened = client.and_then(|c| c.console(VM, 0)).expect("the daemon answers");
        let (stream, early) = opened.expect("the VM has a console");
        let said = Arc::new(Mutex::new(String::from_utf8_lossy(&early).into_owned()));
        let (theirs, mut reading) =
            (Arc::clone(&said), stream.try_clone().expect("a socket has more than one handle"));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = reading.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
                theirs.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        Self { stream, said }
    }

    fn count(&self, text: &str) -> usize {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).matches(text).count()
    }

    fn wait(&self, text: &str, times: usize) {
        let deadline = Instant::now() + LIMIT;
        while self.count(text) < times {
            let said = self.said.lock().unwrap_or_else(PoisonError::into_inner).clone();
            assert!(Instant::now() < deadline, "{text:?} did not come: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Most log that a host said it sends while the guest did some rounds, in kilobytes a second.
fn log_rate(host: &Host, console: &Console, rounds: usize) -> u64 {
    let until = console.count("round ") + rounds;
    let deadline = Instant::now() + LIMIT;
    let mut most = 0;
    while console.count("round ") < until {
        assert!(Instant::now() < deadline, "the guest does its rounds");
        let status = host.status().unwrap_or_default();
        most = most.max(status["log_bytes_per_s"].as_u64().unwrap_or(0));
        std::thread::sleep(Duration::from_millis(200));
    }
    most / 1000
}

fn run_with(reads: &str, work: &Path) -> u64 {
    let files = guest(GuestKind::Minimal);
    let image = work.join("shared.img");
    let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(|n| n.to_le_bytes()).collect();
    fs::write(&image, bytes).expect("room for a disk");
    let mut hosts = hosts_off(work, ["jit", "jit"]);
    hosts.iter_mut().for_each(|host| host.start(&work.join("vm")));
    let text = format!(
        "name = \"{VM}\"\nmemory = \"128M\"\nkernel = {:?}\ninitrd = {:?}\nappend = \"{}\"\n\
         [[disk]]\npath = {image:?}\nmode = \"shared\"\nreads = \"{reads}\"\n\
         [protection]\ndigest_interval_ms = 50\nflight_recorder = \"0s\"\nhosts = [\"a\", \"b\"]\n",
        files.kernel, files.initrd, files.append,
    );
    let vm = work.join("vm.toml");
    fs::write(&vm, text).expect("room for files");
    let started = hosts[0].ask(&["start", &vm.display().to_string()]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let mut console = Console::open(&hosts[0]);
    console.wait("shell ready", 1);
    hosts[0].wait_protected();
    console.stream.write_all(LOAD.as_bytes()).expect("the daemon reads");
    let rate = log_rate(&hosts[0], &console, 6);
    hosts[1].wait_digests(DIGESTS_MIN);
    hosts.iter().for_each(Host::assert_same);
    for (from, to) in [(0, 1), (1, 0)] {
        if to == 0 {
            assert!(hosts[from].ask(&["failover", VM]).status.success());
        } else {
            hosts[from].die();
        }
        hosts[to].wait("live", |s| s["role"] == "primary");
        let console = Console::open(&hosts[to]);
        console.wait("round ", 2);
        if to == 1 {
            hosts[from].start(&work.join("vm"));
        }
        hosts[to].wait_protected();
        console.wait("round ", 4);
        hosts[from].wait_digests(DIGESTS_MIN);
        hosts.iter().for_each(Host::assert_same);
    }
    assert!(hosts[0].ask(&["stop", VM]).status.success());
    hosts[0].wait("off", |s| s["role"] == "stopped");
    rate
}

/// Each pair keeps two cores busy: one at a time.
static TURN: Mutex<()> = Mutex::new(());

fn in_turn(name: &str, reads: &str) -> Option<u64> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    drop(guest(GuestKind::Minimal));
    if !is_inside(name) {
        return None;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let rate = run_with(reads, work.path());
    println!("reads = {reads}: log up to {rate} kB/s");
    Some(rate)
}

#[test]
fn data_of_reads_go_with_the_log() {
    // A round reads two megabytes and writes one, which is not in the log.
    if let Some(rate) = in_turn("data_of_reads_go_with_the_log", "log") {
        assert!(rate > 200, "{rate} kB/s");
    }
}

#[test]
fn secondary_reads_by_itself_what_the_primary_read() {
    in_turn("secondary_reads_by_itself_what_the_primary_read", "local");
}

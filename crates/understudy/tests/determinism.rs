//! A machine is a function of its recording: Debian with a disk, a network and a client, recorded by one process and
//! replayed by others with other slices, cold caches and a busy core, has the same digest at every mark.
//!
//! Each test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

mod vmrun;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use guest::GuestKind;
use vmrun::{Ended, Running, guest, run_command, understudy};

/// Set inside the namespaces.
const INSIDE: &str = "UNDERSTUDY_TEST_INSIDE";
const BRIDGE: &str = "br0";
const HOST_NET: &str = "10.77.0.1/24";
const GUEST_NET: &str = "10.77.0.2/24";
const REDIS: &str = "10.77.0.2:6379";
/// Fewest digests that a recording of a boot has to have for the comparison to say something.
const DIGESTS_MIN: u64 = 20;

/// Whether this is the process inside the namespaces. Outside, the test `name` is run there, and has to pass.
fn is_inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let me = std::env::current_exe().expect("a test knows its file");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare"]);
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    command.arg(me).args(["--exact", name, "--nocapture"]).env(INSIDE, "1").stdin(Stdio::null());
    let output = command.output().expect("setpriv and unshare (package util-linux) run");
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    assert!(
        output.status.success(),
        "failed inside; if it is about namespaces: this test needs root, or user namespaces that anybody may make\n{}",
        text.concat()
    );
    false
}

fn tool(program: &str, package: &str, args: &[&str]) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {program} (package {package}): {e}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {} failed: {words}", args.join(" "));
}

fn ip(args: &[&str]) {
    tool("ip", "iproute2", args);
}

/// A process that is killed when this is dropped.
struct Busy(Child);

impl Busy {
    fn on_core(core: &str) -> Self {
        let mut command = Command::new("taskset");
        command.args(["-c", core, "sh", "-c", "while :; do :; done"]);
        Self(command.spawn().expect("taskset (package util-linux) runs"))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What a replay said.
struct Replayed {
    code: Option<i32>,
    console: String,
    words: String,
    steps: u64,
    digests: u64,
}

fn replayed(output: Output) -> Replayed {
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let number = |before: &str, after: &str| {
        let (_, rest) = words.split_once(before)?;
        rest.split_once(after)?.0.parse().ok()
    };
    let steps = number("replayed ", " steps").unwrap_or(0);
    let digests = number("records; ", " digests").unwrap_or(0);
    let console = String::from_utf8_lossy(&output.stdout).into_owned();
    Replayed { code: output.status.code(), console, words, steps, digests }
}

fn replay(dir: &Path, args: &[&str]) -> Replayed {
    replayed(understudy().arg("replay").arg(dir).args(args).output().expect("replay runs"))
}

/// Replays with other timing than the recording had: one core, shared with somebody busy, odd slices, cold caches.
fn replay_elsewhere(dir: &Path) -> Replayed {
    let _busy = Busy::on_core("0");
    let mut command = Command::new("taskset");
    command.args(["-c", "0", env!("CARGO_BIN_EXE_understudy"), "replay"]).arg(dir);
    command.args(["--slice", "9973", "--drop-caches-every", "3000001"]);
    replayed(command.output().expect("taskset (package util-linux) runs"))
}

fn assert_same(live: &Ended, replayed: &Replayed) {
    assert_eq!(replayed.code, Some(0), "{}", replayed.words);
    assert!(replayed.digests >= DIGESTS_MIN, "{}", replayed.words);
    assert!(replayed.console == live.console, "the consoles differ:\n{}", replayed.console);
}

/// A client that is told of `writes` writes, one by one.
fn write_to_redis(writes: usize) {
    let limit = Some(Duration::from_secs(60));
    let mut stream = TcpStream::connect(REDIS).expect("Redis takes connections");
    stream.set_read_timeout(limit).expect("a time limit can be set");
    let mut answers =
        BufReader::new(stream.try_clone().expect("a socket has more than one handle"));
    for n in 1..=writes {
        // Some fill several frames and blocks.
        let value = format!("{n:08}").repeat(if n % 10 == 0 { 600 } else { 10 });
        let length = value.len();
        let command = format!("*3\r\n$5\r\nRPUSH\r\n$3\r\nlog\r\n${length}\r\n{value}\r\n");
        stream.write_all(command.as_bytes()).expect("Redis reads");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("Redis answers");
        assert_eq!(answer, format!(":{n}\r\n"));
    }
    stream.write_all(b"*2\r\n$8\r\nSHUTDOWN\r\n$6\r\nNOSAVE\r\n").expect("Redis reads");
}

/// Records a Redis guest with `writes` writes from its boot to its end.
fn record_redis(work: &Path, harts: u8, writes: usize) -> (PathBuf, Ended) {
    ip(&["link", "set", "lo", "up"]);
    ip(&["link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"]);
    ip(&["addr", "add", HOST_NET, "dev", BRIDGE]);
    ip(&["link", "set", BRIDGE, "up"]);
    let files = guest(GuestKind::Redis);
    let (disk, dir) = (work.join("disk"), work.join("recording"));
    fs::copy(files.disk.as_ref().expect("a Redis guest has a disk"), &disk)
        .expect("room for a disk");
    let mut command = run_command(&files, harts, &format!("understudy.ip={GUEST_NET}"));
    command.arg("--initrd").arg(&files.initrd).args(["--net", &format!("bridge={BRIDGE}")]);
    command.arg("--disk").arg(format!("path={}", disk.display()));
    command.arg("--record").arg(&dir).args(["--digest-interval", "50"]);
    let mut live = Running::start(&mut command);
    live.wait_for("understudy: redis ready");
    write_to_redis(writes);
    live.wait_for("understudy: redis ended");
    live.type_line("exit");
    let ended = live.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
    assert!(ended.console.contains("understudy: /data is on /dev/vda"), "{}", ended.console);
    assert!(ended.console.contains(&format!(", {harts} harts")), "{}", ended.console);
    // A recording needs nothing but itself.
    fs::remove_file(&disk).expect("the disk is there");
    (dir, ended)
}

/// Start and length of a frame in a log, a quarter of the way.
fn some_frame(log: &[u8]) -> (usize, usize) {
    let mut at = eventlog::HEADER_BYTES;
    loop {
        let raw: [u8; 4] = log[at..at + 4].try_into().expect("four bytes");
        let end = at + 8 + u32::from_le_bytes(raw) as usize;
        if end > log.len() / 4 {
            return (at, end - at);
        }
        at = end;
    }
}

fn assert_damage_is_found(dir: &Path, whole: &Replayed) {
    let path = dir.join("log");
    let log = fs::read(&path).expect("the log can be read");
    let (at, len) = some_frame(&log);
    let mut flipped = log.clone();
    flipped[at + 8 + (len - 8) / 2] ^= 0x10;
    let cases = [
        (flipped, format!("corrupt at byte {at}")),
        (log[..at + len - 1].to_vec(), format!("truncated at byte {at}")),
    ];
    for (bytes, words) in cases {
        fs::write(&path, bytes).expect("the log can be written");
        let part = replay(dir, &["--verify"]);
        assert_eq!(part.code, Some(1), "{}", part.words);
        assert!(part.words.contains(&words), "{words}: {}", part.words);
        assert!(part.steps > 0 && part.steps < whole.steps, "{}", part.words);
        assert!(part.digests > 0 && part.digests < whole.digests, "{}", part.words);
    }
}

#[test]
fn redis_with_disk_and_network_replays_the_same_and_damage_is_found() {
    let files = guest(GuestKind::Redis);
    assert!(files.disk.is_some());
    if !is_inside("redis_with_disk_and_network_replays_the_same_and_damage_is_found") {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (dir, live) = record_redis(work.path(), 1, 300);
    let whole = replay_elsewhere(&dir);
    assert_same(&live, &whole);
    assert_damage_is_found(&dir, &whole);
}

#[test]
fn two_harts_replay_the_same() {
    drop(guest(GuestKind::Redis));
    if !is_inside("two_harts_replay_the_same") {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (dir, live) = record_redis(work.path(), 2, 60);
    assert_same(&live, &replay_elsewhere(&dir));
}

#[test]
fn full_disk_ends_the_recording_and_not_the_vm() {
    let files = guest(GuestKind::Minimal);
    if !is_inside("full_disk_ends_the_recording_and_not_the_vm") {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let images =
        [&files.kernel, &files.initrd].map(|path| fs::metadata(path).expect("it was built").len());
    // What the machine boots, and a few pages of log.
    let size = images.iter().map(|bytes| bytes.div_ceil(4096)).sum::<u64>() + 4;
    let dir = work.path().join("small");
    fs::create_dir(&dir).expect("a new directory");
    let target = dir.display().to_string();
    tool(
        "mount",
        "mount",
        &["-t", "tmpfs", "-o", &format!("size={}k", size * 4), "small", &target],
    );
    let mut command = run_command(&files, 1, "");
    command
        .arg("--initrd")
        .arg(&files.initrd)
        .arg("--record")
        .arg(&dir)
        .args(["--digest-interval", "10"]);
    let mut live = Running::start(&mut command);
    live.wait_for("understudy: shell ready");
    live.type_line("echo still $((40 + 2)) here");
    live.wait_for("still 42 here");
    live.type_line("exit");
    let ended = live.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
    let lines: Vec<&str> = ended.words.lines().filter(|line| line.contains("recording")).collect();
    assert!(matches!(lines[..], [line] if line.contains("No space left")), "{lines:?}");
    let part = replay(&dir, &["--verify"]);
    assert!(part.code == Some(1) && part.words.contains("truncated at byte"), "{}", part.words);
    assert!(part.steps > 0, "{}", part.words);
    // The directory holds a recording, and keeps it.
    let again = Running::start(command.args(["--name", "other"])).wait();
    assert!(again.code == Some(1) && again.words.contains("is not empty"), "{}", again.words);
    tool("umount", "mount", &[&target]);
}

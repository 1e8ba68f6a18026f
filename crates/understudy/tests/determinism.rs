//! A machine is a function of its recording: Debian with a disk, a network and a client, recorded by one process and
//! replayed by others with another engine, other slices, cold caches and a busy core, has the same digest at every mark.
//!
//! Each test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

mod inside;
mod vmrun;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

use guest::GuestKind;
use inside::{BRIDGE, GUEST_NET, Redis, is_inside, make_network, tool};
use vmrun::{Ended, Running, guest, run_command, understudy};

/// Fewest digests that a recording of a boot has to have for the comparison to say something.
const DIGESTS_MIN: u64 = 20;

/// The disk of a recorded guest when it is off.
const DISK_AFTER: &str = "disk-after";

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

/// Replays with another engine and other timing than the recording had: one core, shared with somebody busy, odd slices,
/// cold caches.
fn replay_elsewhere(dir: &Path, engine: &str) -> Replayed {
    let _busy = Busy::on_core("0");
    let mut command = Command::new("taskset");
    command.args(["-c", "0", env!("CARGO_BIN_EXE_understudy"), "replay"]).arg(dir);
    command.args(["--slice", "9973", "--drop-caches-every", "3000001"]);
    command.args(["--engine", engine]);
    replayed(command.output().expect("taskset (package util-linux) runs"))
}

fn assert_same(live: &Ended, replayed: &Replayed) {
    assert_eq!(replayed.code, Some(0), "{}", replayed.words);
    assert!(replayed.digests >= DIGESTS_MIN, "{}", replayed.words);
    assert!(replayed.console == live.console, "the consoles differ:\n{}", replayed.console);
}

/// Records a Redis guest on `engine` with `writes` writes from its boot to its end.
fn record_redis(work: &Path, engine: &str, harts: u8, writes: usize) -> (PathBuf, Ended) {
    make_network();
    let files = guest(GuestKind::Redis);
    let (disk, dir) = (work.join("disk"), work.join("recording"));
    fs::copy(files.disk.as_ref().expect("a Redis guest has a disk"), &disk)
        .expect("room for a disk");
    let mut command = run_command(&files, harts, &format!("understudy.ip={GUEST_NET}"));
    command.arg("--initrd").arg(&files.initrd).args(["--net", &format!("bridge={BRIDGE}")]);
    command.arg("--disk").arg(format!("path={}", disk.display()));
    command.arg("--record").arg(&dir).args(["--digest-interval", "50"]);
    command.args(["--engine", engine]);
    let mut live = Running::start(&mut command);
    live.wait_for("understudy: redis ready");
    let mut redis = Redis::connect();
    redis.write(writes);
    redis.shut_down();
    live.wait_for("understudy: redis ended");
    live.type_line("exit");
    let ended = live.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
    assert!(ended.console.contains("understudy: /data is on /dev/vda"), "{}", ended.console);
    assert!(ended.console.contains(&format!(", {harts} harts")), "{}", ended.console);
    // A recording needs nothing but itself.
    fs::rename(&disk, work.join(DISK_AFTER)).expect("the disk is there");
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
    let path = dir.join("log-00000000000000000000");
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

/// What a replay takes out is what the guest left on its disk and what its client said.
fn assert_extracts(work: &Path, dir: &Path, base: &Path) {
    let (disk, pcap) = (work.join("disk-out"), work.join("net.pcapng"));
    let argument = |path: &Path| path.display().to_string();
    let files = [argument(&disk), argument(base), argument(&pcap)];
    let args = ["--disk-out", &files[0], "--disk-base", &files[1], "--net-pcap", &files[2]];
    let whole = replay(dir, &args);
    assert_eq!(whole.code, Some(0), "{}", whole.words);
    let same = fs::read(&disk).expect("it was made")
        == fs::read(work.join(DISK_AFTER)).expect("it is there");
    assert!(same, "{}", whole.words);
    let frames = fs::read(&pcap).expect("it was made");
    let found = frames.windows(5).any(|bytes| bytes.eq_ignore_ascii_case(b"rpush"));
    assert!(found, "{}", whole.words);
    // A file that is there is not written over, and a disk of another size is refused.
    let again = replay(dir, &args[..4]);
    assert!(again.code == Some(1) && again.words.contains("disk-out"), "{}", again.words);
    fs::remove_file(&disk).expect("it is there");
    let other = replay(dir, &["--disk-out", &files[0], "--disk-base", &files[2]]);
    assert!(other.code == Some(1) && other.words.contains("the recorded disk"), "{}", other.words);
}

#[test]
fn redis_with_disk_and_network_replays_the_same_and_damage_is_found() {
    let files = guest(GuestKind::Redis);
    assert!(files.disk.is_some());
    if !is_inside("redis_with_disk_and_network_replays_the_same_and_damage_is_found") {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (dir, live) = record_redis(work.path(), "jit", 1, 300);
    let whole = replay_elsewhere(&dir, "interpreter");
    assert_same(&live, &whole);
    assert_same(&live, &replay(&dir, &["--engine", "jit"]));
    assert_extracts(work.path(), &dir, files.disk.as_ref().expect("it has one"));
    assert_damage_is_found(&dir, &whole);
}

#[test]
fn two_harts_replay_the_same() {
    drop(guest(GuestKind::Redis));
    if !is_inside("two_harts_replay_the_same") {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (dir, live) = record_redis(work.path(), "interpreter", 2, 60);
    assert_same(&live, &replay_elsewhere(&dir, "jit"));
}

#[test]
fn moment_of_the_past_goes_on_live_in_another_way() {
    let files = guest(GuestKind::Minimal);
    let work = tempfile::tempdir().expect("room for temporary files");
    let dir = work.path().join("recording");
    let mut command = run_command(&files, 1, "");
    command.arg("--initrd").arg(&files.initrd).arg("--record").arg(&dir);
    let mut live = Running::start(&mut command);
    live.wait_for("understudy: shell ready");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    live.type_line("echo then $((30 + 1))");
    live.wait_for("then 31");
    live.type_line("exit");
    assert_eq!(live.wait().code, Some(0));
    let info = understudy().args(["record", "info", "-o", "json"]).arg(&dir).output();
    let info: serde_json::Value =
        serde_json::from_slice(&info.expect("it runs").stdout).expect("it is JSON");
    let end = info["guest_seconds"].as_f64().expect("a number");
    // While the shell waited for what was typed a second and a half later.
    let until = format!("{}ms", ((end - 1.2) * 1000.0) as u64);
    let mut command = understudy();
    command.arg("replay").arg(&dir).args(["--until", &until, "--then-live"]);
    let mut other = Running::start(&mut command);
    other.wait_for("understudy: shell ready");
    other.type_line("echo otherwise $((40 + 2))");
    other.wait_for("otherwise 42");
    other.type_line("exit");
    let ended = other.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.words);
    assert!(!ended.console.contains("then 31"), "{}", ended.console);
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
    // What the machine boots, what it is, and a page of log: less than the digests of a boot, however fast.
    let size = images.iter().map(|bytes| bytes.div_ceil(4096)).sum::<u64>() + 2;
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
        .args(["--digest-interval", "1"]);
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

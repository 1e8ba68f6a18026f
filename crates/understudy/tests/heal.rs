//! Mirrored disks that heal: a host that returns gets what differs and nothing else, the newest copy starts and others do
//! not, and a copy that fails on one host alone stops nobody.
//!
//! Each test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

mod hosts;
mod inside;
mod vmrun;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Instant;

use guest::GuestKind;
use hosts::{Host, LIMIT, VM, two_hosts};
use inside::{Redis, is_inside, tool};
use serde_json::Value;
use vmrun::guest;

const DISK_BYTES: u64 = 1 << 30;
/// What is on the disk beside what the guest uses.
const DATA_BYTES: u64 = 200 << 20;

fn done(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What a command said that failed with that exit status.
fn refused(output: &Output, code: i32) -> String {
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words}");
    println!("{}", words.trim());
    words
}

fn disk(host: &Host) -> PathBuf {
    host.dir.join("vm/disk")
}

/// Makes the disk as big as a disk is, with data that the guest does not look at.
fn fill(path: &Path) {
    let file = fs::OpenOptions::new().write(true).open(path).expect("the disk is there");
    file.set_len(DISK_BYTES).expect("a disk may have holes");
    let mut random = 1_u64;
    let mut block = vec![0; 1 << 20];
    for offset in (DISK_BYTES - 2 * DATA_BYTES..DISK_BYTES - DATA_BYTES).step_by(block.len()) {
        for word in block.chunks_exact_mut(8) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&random.to_le_bytes());
        }
        file.write_all_at(&block, offset).expect("room for data");
    }
}

/// What the live host has sent of the disk to the secondary that it has: bytes, and why all.
fn sent(host: &Host, what: &str) -> (u64, Option<String>) {
    host.wait_protected();
    let status = host.wait("a copy", |s| s["disk_copies"][0]["is_done"] == true);
    let copy = &status["disk_copies"][0];
    println!("{what}: {copy}");
    let bytes = copy["bytes_done"].as_u64().expect("it is told");
    (bytes, copy["whole_because"].as_str().map(str::to_owned))
}

fn assert_only_changes(host: &Host, what: &str) {
    let (bytes, whole) = sent(host, what);
    assert_eq!(whole, None, "{what}");
    assert!(bytes < DATA_BYTES / 3, "{what}: {bytes} bytes were sent");
}

/// Powers the VM off and waits until both copies are the same.
fn stop(live: &Host, hosts: &[Host]) {
    done(&live.ask(&["stop", VM]));
    for host in hosts {
        host.wait("off", |s| s["role"] == "stopped");
    }
    let deadline = Instant::now() + LIMIT;
    let paths = [0, 1].map(|i| disk(&hosts[i]).display().to_string());
    loop {
        let compared = std::process::Command::new("cmp").args(&paths).output();
        let compared = compared.expect("cmp (package diffutils) runs");
        if compared.status.success() {
            return;
        }
        let words = String::from_utf8_lossy(&compared.stdout).into_owned();
        assert!(Instant::now() < deadline, "the copies differ: {words}");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// Moves each host's copy elsewhere and back, while the guest writes.
fn move_disks(hosts: &[Host], work: &Path, redis: &mut Redis) {
    for host in hosts {
        let mount = work.join("vm");
        let [here, elsewhere] = ["disk", "elsewhere"].map(|n| mount.join(n).display().to_string());
        std::thread::scope(|s| {
            let moved = s.spawn(|| done(&host.ask(&["disk", "move", VM, "0", &elsewhere])));
            while !moved.is_finished() {
                redis.write(10);
            }
            moved.join().expect("it is moved");
        });
        let moved = |name: &str| host.dir.join("vm").join(name).exists();
        assert!(moved("elsewhere") && moved("elsewhere.understudy") && moved("disk.moved"));
        assert!(!moved("disk") && !moved("disk.understudy"));
        redis.write(50);
        let words = refused(&host.ask(&["disk", "move", VM, "0", &elsewhere]), 1);
        assert!(words.contains("new file"), "{words}");
        done(&host.ask(&["disk", "move", "--delete", VM, "0", &here]));
        assert!(moved("disk") && !moved("elsewhere") && !moved("elsewhere.understudy"));
        redis.write(50);
        hosts[0].wait_protected();
    }
}

#[test]
fn a_host_that_returns_gets_what_differs_and_a_stale_one_is_not_started() {
    let name = "a_host_that_returns_gets_what_differs_and_a_stale_one_is_not_started";
    let files = guest(GuestKind::Redis);
    if !is_inside(name) {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (mut hosts, vm) = two_hosts(work.path(), &files, ["jit", "jit"]);
    let (vm, mount) = (vm.display().to_string(), work.path().join("vm"));
    fill(&disk(&hosts[0]));
    done(&hosts[0].ask(&["start", &vm]));
    let (bytes, whole) = sent(&hosts[0], "first copy");
    assert!(bytes >= DATA_BYTES && whole.is_some(), "{bytes} {whole:?}");
    let mut redis = Redis::wait(LIMIT);
    redis.write(200);

    hosts[1].die();
    redis.write(200);
    hosts[1].start(&mount);
    assert_only_changes(&hosts[0], "the secondary returns");
    redis.write(100);
    hosts[0].die();
    redis.write(200);
    hosts[1].wait("live", |s| s["role"] == "primary");
    hosts[0].start(&mount);
    assert_only_changes(&hosts[1], "the primary returns");
    redis.write(100);
    done(&hosts[1].ask(&["failover", VM]));
    hosts[0].wait("live", |s| s["role"] == "primary");
    assert_only_changes(&hosts[0], "after a planned failover");
    redis.write(100);
    done(&hosts[0].ask(&["unprotect", VM]));
    hosts[0].wait("alone", |s| s["detail"] == "Disabled");
    redis.write(100);
    done(&hosts[0].ask(&["protect", VM]));
    assert_only_changes(&hosts[0], "protected again");
    redis.write(50);
    move_disks(&hosts, work.path(), &mut redis);
    hosts.iter().for_each(Host::assert_same);
    drop(redis);
    stop(&hosts[0], &hosts);

    // Both have everything: the other one may start it as well.
    done(&hosts[1].ask(&["start", &vm]));
    assert_only_changes(&hosts[1], "started on the other host");
    let before = hosts[1].wait("live", |s| s["role"] == "primary")["generation"].as_u64();
    hosts[0].die();
    // The arbiter says so, too.
    hosts[1].wait("alone", |s| s["generation"].as_u64() > before);
    let mut redis = Redis::wait(LIMIT);
    redis.count();
    redis.write(50);
    drop(redis);
    hosts[1].die();
    hosts[0].start(&mount);
    let words = refused(&hosts[0].ask(&["start", &vm]), 5);
    assert!(words.contains("live on host b"), "{words}");
    let words = refused(&hosts[0].ask(&["start", "--force", &vm]), 5);
    assert!(words.contains("is of generation") && words.contains("on host b"), "{words}");
    hosts[1].start(&mount);
    done(&hosts[1].ask(&["start", &vm]));
    assert_only_changes(&hosts[1], "after both were down");

    // The older one, because it has to be.
    hosts[0].die();
    hosts[1].wait("alone", |s| s["state"] != "Protected");
    hosts[1].die();
    hosts[0].start(&mount);
    done(&hosts[0].ask(&["start", "--force", "--accept-stale", &vm]));
    hosts[1].start(&mount);
    let words = refused(&hosts[1].ask(&["start", "--force", &vm]), 5);
    assert!(words.contains("on host a"), "{words}");
    assert_only_changes(&hosts[0], "after the older copy was started");
    stop(&hosts[0], &hosts);
}

#[test]
fn a_disk_that_fails_on_the_live_host_is_served_by_the_other() {
    let name = "a_disk_that_fails_on_the_live_host_is_served_by_the_other";
    let files = guest(GuestKind::Redis);
    if !is_inside(name) {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (mut hosts, vm) = two_hosts(work.path(), &files, ["jit", "jit"]);
    // The live host's file system is one that can be made to have no room.
    hosts[0].die();
    let dir = hosts[0].dir.join("vm").display().to_string();
    let image = files.disk.as_ref().expect("the guest has a disk");
    let used = fs::metadata(image).expect("it was built").blocks() * 512;
    let size = |bytes: u64| format!("size={}k", bytes / 1024);
    let enough = size(used + (300 << 20));
    tool("mount", "mount", &["-t", "tmpfs", "-o", &enough, "little", &dir]);
    let copy = disk(&hosts[0]).display().to_string();
    tool("cp", "coreutils", &["--sparse=always", &image.display().to_string(), &copy]);
    hosts[0].start(&work.path().join("vm"));
    done(&hosts[0].ask(&["start", &vm.display().to_string()]));
    hosts[0].wait_protected();
    let mut redis = Redis::wait(LIMIT);
    redis.write(50);
    let names = ["disk", "disk.understudy"].map(|name| hosts[0].dir.join("vm").join(name));
    let blocks = |path: &PathBuf| fs::metadata(path).map_or(0, |meta| meta.blocks());
    let little = names.iter().map(blocks).sum::<u64>() * 512 + (256 << 10);
    tool("mount", "mount", &["-o", &format!("remount,{}", size(little)), &dir]);
    let deadline = Instant::now() + LIMIT;
    while hosts[1].wait("known", |s| s["role"].is_string())["role"] != "primary" {
        redis.write(50);
        assert!(Instant::now() < deadline, "the disk never was full");
    }
    for host in &hosts {
        let says = |s: &Value| {
            s["disk_problem"].as_str().is_some_and(|p| {
                p.contains("disk 0 of host a failed") && p.contains("the copy of host b serves")
            })
        };
        println!("{}", host.wait("the problem", says)["disk_problem"]);
    }
    redis.write(50);
    let status = hosts[1].wait("why there is no secondary", |s| {
        s["reason"].as_str().is_some_and(|r| r.contains("disk 0 failed"))
    });
    println!("{}", status["reason"]);
    tool("mount", "mount", &["-o", &format!("remount,{enough}"), &dir]);
    hosts[1].wait_protected();
    redis.write(50);
    hosts.iter().for_each(Host::assert_same);
    drop(redis);
    stop(&hosts[1], &hosts);
}

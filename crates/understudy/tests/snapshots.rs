//! Snapshots of Debian with Redis: taken of a protected VM while a client writes, restored with just what was written until
//! then, cloned twice at once; and of a small guest on a host whose disk is full.
//!
//! Each test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind.

mod hosts;
mod inside;
mod vmrun;

use std::fs;
use std::ops::RangeInclusive;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use guest::GuestKind;
use hosts::{DIGESTS_MIN, Host, LIMIT, VM, two_hosts};
use inside::{Redis, allow_hosts, forget_neighbours, is_inside, make_network, tool};
use vmrun::guest;

/// What a command said, of which it is known that it did what it was to.
fn done(output: &Output) -> String {
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words}");
    words
}

/// What a command said that failed with that exit status.
fn refused(output: &Output, code: i32) -> String {
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words}");
    words
}

/// Takes a snapshot while a client writes; says how many writes may be in it.
fn snapshot_while_writing(host: &Host, redis: &mut Redis, name: &str) -> RangeInclusive<usize> {
    let (go_on, written) = (AtomicBool::new(true), AtomicUsize::new(redis.written()));
    let range = std::thread::scope(|s| {
        s.spawn(|| {
            while go_on.load(Ordering::SeqCst) {
                redis.write(1);
                written.store(redis.written(), Ordering::SeqCst);
            }
        });
        let writes = |more: usize| {
            let start = written.load(Ordering::SeqCst);
            while written.load(Ordering::SeqCst) < start + more {
                std::thread::yield_now();
            }
        };
        writes(20);
        let before = written.load(Ordering::SeqCst);
        let words = done(&host.ask(&["snapshot", "create", VM, name]));
        assert!(
            words.contains(&format!("snapshot {name}: ")) && words.contains("paused"),
            "{words}"
        );
        println!("{}", words.trim());
        // One may have been on its way.
        let after = written.load(Ordering::SeqCst) + 1;
        writes(20);
        go_on.store(false, Ordering::SeqCst);
        before..=after
    });
    assert!(range.end() > range.start(), "the client wrote meanwhile");
    range
}

fn stop(host: &Host, vm: &str) {
    done(&host.ask(&["stop", vm]));
    let is_off = |v: &serde_json::Value| v["role"] == "stopped";
    host.wait_for_vm(vm, "off", is_off);
}

#[test]
fn a_protected_redis_is_restored_with_just_what_it_had() {
    let name = "a_protected_redis_is_restored_with_just_what_it_had";
    let files = guest(GuestKind::Redis);
    if !is_inside(name) {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let (hosts, vm) = two_hosts(work.path(), &files, ["jit", "jit"]);
    let [a, b] = &hosts;
    done(&a.ask(&["start", &vm.display().to_string()]));
    a.wait_protected();
    let mut redis = Redis::wait(LIMIT);
    redis.write(100);
    let one = snapshot_while_writing(a, &mut redis, "one");
    let two = snapshot_while_writing(a, &mut redis, "two");
    redis.write(50);
    // It was protected all the while.
    b.wait_digests(DIGESTS_MIN);
    hosts.iter().for_each(Host::assert_same);
    drop(redis);
    stop(a, VM);

    let words = refused(&a.ask(&["snapshot", "restore", VM, "one"]), 2);
    assert!(words.contains("say --force"), "{words}");
    done(&a.ask(&["snapshot", "restore", "--force", VM, "one"]));
    let mut redis = Redis::wait(LIMIT);
    let count = redis.count();
    assert!(one.contains(&count), "{count} writes, {one:?} when it was taken");
    a.wait_protected();
    redis.write(50);
    b.wait_digests(DIGESTS_MIN);
    hosts.iter().for_each(Host::assert_same);
    drop(redis);
    stop(a, VM);

    // The second one builds on the first, and loses nothing with it.
    done(&a.ask(&["snapshot", "delete", VM, "one"]));
    let clones = [("c1", ""), ("c2", "--connect")];
    std::thread::scope(|s| {
        for (clone, option) in clones {
            s.spawn(move || {
                let mut args = vec!["snapshot", "restore", VM, "two", "--name", clone];
                args.extend(Some(option).filter(|o| !o.is_empty()));
                done(&a.ask(&args));
            });
        }
    });
    let mut redis = Redis::wait(LIMIT);
    let count = redis.count();
    assert!(two.contains(&count), "{count} writes, {two:?} when it was taken");
    redis.write(20);
    for (clone, _) in clones {
        a.wait_for_vm(clone, "live", |v| v["role"] == "primary");
    }
    drop(redis);
    stop(a, "c1");
    stop(a, "c2");
    // The clone's own disk has what its memory had, as after the loss of power, and its configuration leads to it. It has its
    // own MAC address now.
    forget_neighbours();
    done(&a.ask(&["start", &work.path().join("c2.toml").display().to_string()]));
    assert_eq!(Redis::wait(LIMIT).count(), count + 20);
    stop(a, "c2");
    forget_neighbours();
    done(&a.ask(&["snapshot", "restore", "--force", VM, "two"]));
    assert_eq!(Redis::wait(LIMIT).count(), count);
    hosts.iter().for_each(Host::assert_same);
    stop(a, VM);
}

#[test]
fn a_full_disk_ends_the_snapshot_and_not_the_vm() {
    let name = "a_full_disk_ends_the_snapshot_and_not_the_vm";
    let files = guest(GuestKind::Minimal);
    if !is_inside(name) {
        return;
    }
    let work = tempfile::tempdir().expect("room for temporary files");
    let work = work.path();
    make_network();
    allow_hosts();
    for dir in ["vm", "arbiter", "a", "a/state"] {
        fs::create_dir(work.join(dir)).expect("room for files");
    }
    fs::write(work.join("secret"), "a secret of one host in a test\n").expect("room for files");
    tool("chmod", "coreutils", &["600", &work.join("secret").display().to_string()]);
    // Room for what the machine boots, and not for its memory.
    let images =
        [&files.kernel, &files.initrd].map(|path| fs::metadata(path).expect("it was built").len());
    let state = work.join("a/state").display().to_string();
    let size = format!("size={}k", images.iter().sum::<u64>() / 1024 + 3 * 1024);
    tool("mount", "mount", &["-t", "tmpfs", "-o", &size, "small", &state]);
    let mut host = Host::new(work, 0, "jit");
    host.start(&work.join("vm"));
    let text = format!(
        "name = \"{VM}\"\nmemory = \"256M\"\nkernel = {:?}\ninitrd = {:?}\nappend = \"{}\"\n\
         [protection]\nenabled = false\n",
        files.kernel, files.initrd, files.append,
    );
    let vm = work.join("vm.toml");
    fs::write(&vm, text).expect("room for files");
    done(&host.ask(&["start", &vm.display().to_string()]));
    // Its kernel has made much of the memory its own by then.
    host.wait("boots", |s| s["icount"].as_u64().is_some_and(|icount| icount > 1_000_000_000));
    let words = refused(&host.ask(&["snapshot", "create", VM, "one"]), 1);
    assert!(words.contains("No space left") && words.contains("the VM goes on"), "{words}");
    assert!(!work.join("a/state/snapshots/pair").exists(), "nothing is left");
    let icount = host.wait("goes on", |s| s["role"] == "primary")["icount"].as_u64();
    host.wait("runs", |s| s["icount"].as_u64() > icount);
    tool("mount", "mount", &["-o", "remount,size=300m", &state]);
    done(&host.ask(&["snapshot", "create", VM, "one"]));
    assert!(done(&host.ask(&["snapshot", "list"])).is_empty());
    stop(&host, VM);
    done(&host.ask(&["snapshot", "restore", VM, "one"]));
    host.wait("runs again", |s| s["role"] == "primary");
}

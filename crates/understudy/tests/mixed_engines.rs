//! A replica on the JIT and one on the interpreter are a pair: Debian boots in lockstep on both and serves a client; their
//! digests are the same throughout, and either takes over from the other without losing a write.
//!
//! Each test runs itself again in network, mount and process namespaces of its own, so that nothing stays behind. The
//! hosts are daemons of the program under test, each with a network namespace, and a mount namespace for its copy of the
//! disk.

mod hosts;
mod inside;
mod vmrun;

use std::sync::{Mutex, PoisonError};

use guest::GuestKind;
use hosts::{DIGESTS_MIN, Host, LIMIT, VM, two_hosts};
use inside::{Redis, is_inside};
use vmrun::guest;

/// Boots on the first engine followed by the second, lets the second take over, and the first follow it in turn.
fn serve_on(engines: [&'static str; 2]) {
    let work = tempfile::tempdir().expect("room for temporary files");
    let work = work.path();
    let files = guest(GuestKind::Redis);
    let (mut hosts, vm) = two_hosts(work, &files, engines);
    let started = hosts[0].ask(&["start", &vm.display().to_string()]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    // Long before the guest is up: most of its boot is in lockstep.
    hosts[0].wait_protected();
    let mut redis = Redis::wait(LIMIT);
    redis.write(200);
    hosts[1].wait_digests(DIGESTS_MIN);
    redis.write(20);
    hosts.iter().for_each(Host::assert_same);
    for (from, to) in [(0, 1), (1, 0)] {
        hosts[from].die();
        // The same connection, and each answer says how many writes the server has.
        redis.write(100);
        hosts[to].wait("live", |s| s["role"] == "primary");
        hosts[from].start(&work.join("vm"));
        hosts[to].wait_protected();
        redis.write(100);
        hosts[from].wait_digests(DIGESTS_MIN);
        hosts.iter().for_each(Host::assert_same);
    }
    assert!(hosts[0].ask(&["stop", VM]).status.success());
    for (host, other) in [(&hosts[0], engines[1]), (&hosts[1], engines[0])] {
        host.assert_flights(other);
    }
}

/// Each pair keeps two cores busy: one at a time.
static TURN: Mutex<()> = Mutex::new(());

fn in_turn(name: &str, engines: [&'static str; 2]) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    drop(guest(GuestKind::Redis));
    if is_inside(name) {
        serve_on(engines);
    }
}

#[test]
fn debian_boots_on_the_jit_followed_by_the_interpreter_and_each_takes_over() {
    let name = "debian_boots_on_the_jit_followed_by_the_interpreter_and_each_takes_over";
    in_turn(name, ["jit", "interpreter"]);
}

#[test]
fn debian_boots_on_the_interpreter_followed_by_the_jit_and_each_takes_over() {
    let name = "debian_boots_on_the_interpreter_followed_by_the_jit_and_each_takes_over";
    in_turn(name, ["interpreter", "jit"]);
}

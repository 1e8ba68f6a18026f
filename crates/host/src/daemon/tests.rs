//! Several hosts in one process, over loopback, with a small guest on the bare machine.

mod disks;
mod shared;
mod snapshots;

use super::*;
use crate::config::{ArbiterSection, FenceSection, PeerSection};
use crate::control::Detail;
use crate::divergence::report::reports;
use crate::divergence::{self, Cause, Part, Report, Side};
use crate::recording::RecordingDir;
use crate::snapshot::SnapshotReader;
use crate::vm::flight::flights;
use machine::engine::EngineKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const LIMIT: Duration = Duration::from_secs(60);
const NAME: &str = "toy";

/// Counts in a register and in memory; prints the count of each 2^18 rounds as four letters, the first one a capital.
const COUNTER: [u32; 24] = [
    0x1000_02b7, // lui   t0, 0x10000
    0x0010_0397, // auipc t2, 0x100
    0x0000_0313, // li    t1, 0
    0x0013_0313, // loop: addi t1, t1, 1
    0x0063_b023, // sd    t1, 0(t2)
    0x02e3_1e13, // slli  t3, t1, 46
    0xfe0e_1ae3, // bnez  t3, loop
    0x01e3_5e93, // srli  t4, t1, 30
    0x00fe_fe93, // andi  t4, t4, 15
    0x041e_8e93, // addi  t4, t4, 'A'
    0x01d2_8023, // sb    t4, 0(t0)
    0x01a3_5e93, // srli  t4, t1, 26
    0x00fe_fe93, // andi  t4, t4, 15
    0x061e_8e93, // addi  t4, t4, 'a'
    0x01d2_8023, // sb    t4, 0(t0)
    0x0163_5e93, // srli  t4, t1, 22
    0x00fe_fe93, // andi  t4, t4, 15
    0x061e_8e93, // addi  t4, t4, 'a'
    0x01d2_8023, // sb    t4, 0(t0)
    0x0123_5e93, // srli  t4, t1, 18
    0x00fe_fe93, // andi  t4, t4, 15
    0x061e_8e93, // addi  t4, t4, 'a'
    0x01d2_8023, // sb    t4, 0(t0)
    0xfb1f_f06f, // j     loop
];

/// Letters that [`COUNTER`] prints before they come again: far more than a test waits for.
const LETTERS: u32 = 4 << 16;

/// Powers off when something is typed.
const STOPPER: [u32; 9] = [
    0x1000_02b7, // lui   t0, 0x10000
    0x0052_c303, // loop: lbu t1, 5(t0)
    0x0013_7313, // andi  t1, t1, 1
    0xfe03_0ce3, // beqz  t1, loop
    0x0010_02b7, // lui   t0, 0x100
    0x0000_5337, // lui   t1, 5
    0x5553_0313, // addi  t1, t1, 0x555
    0x0062_a023, // sw    t1, 0(t0)
    0x0000_006f, // j     .
];

struct Host {
    daemon: Arc<Daemon>,
    is_off: Arc<AtomicBool>,
}

impl Host {
    fn vm(&self) -> Arc<Vm> {
        self.daemon.find(NAME).expect("the VM is known")
    }

    /// As the end of its process looks from outside.
    fn die(&self) {
        self.is_off.store(true, Ordering::SeqCst);
        if let Some(vm) = self.daemon.find(NAME) {
            vm.close();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.die();
    }
}

struct Lab {
    dir: tempfile::TempDir,
    hosts: Vec<Host>,
}

fn peer((name, address): (String, String)) -> (String, PeerSection) {
    (name, PeerSection { address, log_address: None, fallback: None })
}

fn lab(names: &[&str], secrets: &[&str]) -> Lab {
    lab_with(names, secrets, &FenceSection::default())
}

fn lab_with(names: &[&str], secrets: &[&str], fence: &FenceSection) -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let secret = |i: usize| Secret::new(secrets[i % secrets.len()].as_bytes()).unwrap();
    let listeners: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, name)| Listener::bind("127.0.0.1:0", secret(i), name, i == 1).unwrap())
        .collect();
    let addresses: Vec<_> = listeners.iter().map(|l| l.address().to_string()).collect();
    let arbiter = dir.path().join("arbiter");
    std::fs::create_dir(&arbiter).unwrap();
    let mut hosts = Vec::new();
    for (i, listener) in listeners.into_iter().enumerate() {
        let state_dir = dir.path().join(names[i]);
        std::fs::create_dir(&state_dir).unwrap();
        let peers = names.iter().map(ToString::to_string).zip(addresses.clone());
        let env = Env {
            host: names[i].to_owned(),
            secret: secret(i),
            peers: peers.filter(|(name, _)| name != names[i]).map(peer).collect(),
            log_source: None,
            compresses: i == 0,
            arbiter: ArbiterSection::Dir(arbiter.clone()),
            state_dir,
            detection_ms: 1000,
            engine: None,
            fence: fence.clone(),
            resync_limit: None,
            is_terminal: false,
        };
        let daemon = Arc::new(Daemon::new(Arc::new(env)));
        let is_off = Arc::new(AtomicBool::new(false));
        let (theirs, off) = (Arc::clone(&daemon), Arc::clone(&is_off));
        std::thread::spawn(move || {
            while !off.load(Ordering::SeqCst) {
                if let Some(Ok(link)) = listener.next(Duration::from_millis(20)) {
                    let daemon = Arc::clone(&theirs);
                    std::thread::spawn(move || daemon.accept(link));
                }
            }
        });
        hosts.push(Host { daemon, is_off });
    }
    Lab { dir, hosts }
}

impl Lab {
    fn start(&self, host: usize, program: &[u32], more: &str) -> Response {
        let bios = self.dir.path().join("bios");
        let bytes: Vec<u8> = program.iter().flat_map(|w| w.to_le_bytes()).collect();
        std::fs::write(&bios, bytes).unwrap();
        let text = format!("name = \"{NAME}\"\nmemory = \"32M\"\nbios = \"bios\"\n{more}");
        self.hosts[host].daemon.start(text, self.dir.path().join("vm.toml"), false, false)
    }

    fn start_by_force(&self, host: usize) -> Response {
        let text = format!("name = \"{NAME}\"\nmemory = \"32M\"\nbios = \"bios\"\n");
        self.hosts[host].daemon.start(text, self.dir.path().join("vm.toml"), true, false)
    }

    fn wait(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !is_so(self) {
            if Instant::now() > deadline {
                let all: Vec<_> = self.hosts.iter().map(|h| h.daemon.status(None)).collect();
                panic!("waited in vain: {what}: {all:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn status(&self, host: usize) -> Option<VmStatus> {
        Some(self.hosts[host].daemon.find(NAME)?.status())
    }

    fn is_protected(&self, host: usize) -> bool {
        self.status(host)
            .is_some_and(|s| s.role == Role::Primary && s.state == Protection::Protected)
    }

    fn printed(&self, host: usize) -> Vec<u8> {
        self.hosts[host].vm().console(0).unwrap().attach().unwrap().scrollback.clone()
    }

    /// What a host has kept of divergences, as primary and as secondary.
    fn reports(&self, host: &str) -> Vec<PathBuf> {
        let state_dir = self.dir.path().join(host);
        let of = |side| reports(&state_dir, NAME, side);
        [Side::Primary, Side::Secondary].into_iter().flat_map(of).collect()
    }
}

/// The letter of [`COUNTER`]'s output at a place.
fn letter(place: u32) -> u8 {
    let digit = ((place / 4) >> (12 - place % 4 * 4) & 15) as u8;
    digit + if place.is_multiple_of(4) { b'A' } else { b'a' }
}

/// The places in [`COUNTER`]'s output where these bytes begin and where they end, which have nothing left out or repeated.
fn places(bytes: &[u8]) -> (u32, u32) {
    let head = bytes.iter().position(u8::is_ascii_uppercase).expect("a number begins");
    let digits = bytes[head..head + 4].iter().map(|b| u32::from(b.to_ascii_lowercase() - b'a'));
    let first = digits.fold(0, |n, digit| n * 16 + digit) * 4 + LETTERS - head as u32;
    for (place, byte) in (first..).zip(bytes) {
        assert_eq!(letter(place), *byte, "{}", String::from_utf8_lossy(bytes));
    }
    (first % LETTERS, (first + bytes.len() as u32) % LETTERS)
}

/// Nothing is left out between these outputs of [`COUNTER`]. What the one host has printed and the other could not know to
/// be, the latter prints again: as much as the guest makes in the time of a message or two, which depends on the engine and on
/// what else runs here.
fn assert_goes_on(old: &[u8], new: &[u8]) {
    let ((_, end), (start, _)) = (places(old), places(new));
    let repeated = (LETTERS + end - start) % LETTERS;
    assert!(repeated < LETTERS / 2, "{} letters are left out", LETTERS - repeated);
}

#[test]
fn survivor_goes_on_without_a_gap_and_gets_a_new_secondary() {
    let lab = lab(&["a", "b", "c"], &["a shared secret of hosts"]);
    let protection = "[protection]\ndigest_interval_ms = 20\nlag_ms = 700\n";
    assert_eq!(lab.start(0, &COUNTER, protection), Response::Done);
    let mut live = 0;
    for round in 0..2 {
        lab.wait("protected", |l| l.is_protected(live));
        assert_eq!(lab.hosts[live].vm().lag_bound_us(), 700_000);
        let before = lab.printed(live).len();
        lab.wait("output under protection", |l| l.printed(live).len() > before + 20);
        lab.hosts[live].die();
        // Nothing can leave after that: the console is the last to know.
        std::thread::sleep(Duration::from_millis(50));
        let old = lab.printed(live);
        let next = |l: &Lab| {
            (0..3).filter(|h| *h > live || round > 0).find(|h| *h != live && l.is_live(*h))
        };
        lab.wait("go-live", |l| next(l).is_some());
        let new = next(&lab).unwrap();
        lab.wait("output after go-live", |l| l.printed(new).len() > 40);
        assert_goes_on(&old, &lab.printed(new));
        live = new;
    }
    assert!(["a", "b", "c"].iter().all(|host| lab.reports(host).is_empty()), "no divergence");
}

#[test]
fn what_was_protected_on_request_is_after_a_failover_too() {
    let lab = lab(&["a", "b", "c"], &["a shared secret of hosts"]);
    assert_eq!(lab.start(0, &COUNTER, "[protection]\nenabled = false\n"), Response::Done);
    let detail = |l: &Lab| l.status(0).and_then(|s| s.detail);
    lab.wait("no protection", |l| detail(l) == Some(Detail::Disabled));
    lab.hosts[0].vm().set_protection(Some(true), Some("b".to_owned()));
    lab.wait("protected", |l| l.is_protected(0));
    lab.hosts[0].die();
    lab.wait("protected by the third host", |l| l.is_live(1) && l.is_protected(1));
}

impl Lab {
    fn is_live(&self, host: usize) -> bool {
        !self.hosts[host].is_off.load(Ordering::SeqCst)
            && self.status(host).is_some_and(|s| s.role == Role::Primary)
    }
}

#[test]
fn divergence_is_detected_reported_kept_and_healed() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    assert_eq!(lab.start(0, &COUNTER, "[protection]\ndigest_interval_ms = 20\n"), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    lab.wait("recorder", |l| {
        let recordings = flights(&l.dir.path().join("b"), NAME);
        let opened = recordings.first().and_then(|dir| RecordingDir::open(dir).ok());
        opened.is_some_and(|recording| !recording.start_steps().is_empty())
    });
    lab.hosts[1].vm().flip_byte();
    lab.wait("divergence on status", |l| {
        l.status(0).and_then(|s| s.reason).is_some_and(|r| r.contains("diverged at step"))
    });
    lab.wait("both reports", |l| l.reports("a").len() == 1 && l.reports("b").len() == 1);
    lab.wait("protected again", |l| l.is_protected(0) && l.printed(0).len() > 20);
    places(&lab.printed(0));
    let (here, there) = (lab.reports("a").remove(0), lab.reports("b").remove(0));
    for (host, dir) in [(0, &here), (1, &there)] {
        let dir = dir.display().to_string();
        lab.wait("where they are", |l| {
            l.status(host).and_then(|s| s.reason).is_some_and(|r| r.contains(&dir))
        });
    }
    let [ours, theirs] = [&here, &there].map(|dir| Report::read(dir).unwrap());
    assert_eq!((ours.side, theirs.side), (Side::Primary, Side::Secondary));
    assert_eq!((ours.peer.as_deref(), theirs.peer.as_deref()), (Some("b"), Some("a")));
    assert_eq!((ours.icount, ours.digests), (theirs.icount, theirs.digests));
    assert_eq!((&ours.state, &theirs.state), (&Part::Kept, &Part::Kept));
    assert!(ours.kept_at >= Some(ours.icount) && theirs.kept_at == Some(theirs.icount));
    let state = SnapshotReader::open(&here.join("state")).unwrap();
    assert_eq!(Some(state.head().pos.icount), ours.kept_at);

    let engines = [EngineKind::Jit, EngineKind::Interpreter];
    let analysis = divergence::analyse(&there, &engines, &mut |_| ()).unwrap();
    let Cause::Secondary(found) = &analysis.cause else { panic!("{analysis:?}") };
    let last = machine::ram::RAM_BASE + (32 << 20) - 1;
    let memory: Vec<_> = found.differences.memory.iter().map(|m| (m.gpa, &m.right[..])).collect();
    assert_eq!(memory, [(last, &[0x5a][..])]);
    assert_eq!(found.differences.registers_different() + found.differences.devices.len(), 0);
    assert_eq!(found.last_write.as_ref().map(|write| write.icount), Some(None));
}

#[test]
fn a_divergence_that_cannot_be_kept_is_told_and_healed_all_the_same() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    for host in ["a", "b"] {
        std::fs::write(lab.dir.path().join(host).join("divergence"), "no directory").unwrap();
    }
    assert_eq!(lab.start(0, &COUNTER, "[protection]\ndigest_interval_ms = 20\n"), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    lab.hosts[1].vm().flip_byte();
    for host in [0, 1] {
        lab.wait("why not", |l| {
            let reason = l.status(host).and_then(|s| s.reason).unwrap_or_default();
            reason.contains("diverged at step") && reason.contains("state is not kept: cannot use")
        });
    }
    lab.wait("protected again", |l| l.is_protected(0) && l.printed(0).len() > 20);
    places(&lab.printed(0));
}

#[test]
fn planned_switch_loses_nothing_and_repeats_nothing() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    assert_eq!(lab.start(0, &COUNTER, ""), Response::Done);
    for (from, to) in [(0, 1), (1, 0)] {
        lab.wait("protected", |l| l.is_protected(from));
        lab.wait("output under protection", |l| l.printed(from).len() > 20);
        let here_before = lab.printed(to).len();
        lab.hosts[from].daemon.failover(NAME).unwrap();
        lab.wait("switch", |l| l.is_live(to));
        lab.wait("output", |l| l.printed(to).len() > here_before + 30);
        let (old, new) = (lab.printed(from), lab.printed(to)[here_before..].to_vec());
        assert_eq!(places(&old[old.len() - 20..]).1, places(&new).0, "from {from} to {to}");
    }
}

#[test]
fn guest_that_powers_off_protected_stops_everywhere_and_may_start_anywhere() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    assert_eq!(lab.start(0, &STOPPER, "[protection]\ndigest_interval_ms = 20\n"), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    lab.hosts[0].vm().type_at(0, b"x");
    let stopped = |l: &Lab, h| l.status(h).is_some_and(|s| s.role == Role::Stopped);
    lab.wait("off", |l| stopped(l, 0) && stopped(l, 1));
    let problem = lab.status(1).unwrap().reason;
    assert!(!problem.is_some_and(|p| p.contains("diverged")));
    assert_eq!(lab.start(1, &COUNTER, ""), Response::Done);
    lab.wait("runs", |l| l.printed(1).len() > 5);
    assert!(matches!(lab.start(0, &COUNTER, ""), Response::Error { .. }));
}

#[test]
fn wrong_secret_makes_no_secondary_and_costs_nothing() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts", "some other secret bytes"]);
    assert_eq!(lab.start(0, &COUNTER, ""), Response::Done);
    lab.wait("reason", |l| {
        let status = l.status(0).unwrap();
        status.detail == Some(Detail::NeedSecondary)
            && status.reason.is_some_and(|r| r.contains("host b"))
    });
    let before = lab.printed(0).len();
    lab.wait("goes on", |l| l.printed(0).len() > before + 20);
    assert!(lab.status(1).is_none());
}

#[test]
fn secondary_that_cannot_keep_the_disk_costs_nothing_and_says_why() {
    let lab = lab(&["a", "b"], &["a shared secret of hosts"]);
    let disk = lab.dir.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    // Where the copy would be written there is something else.
    std::fs::create_dir(lab.dir.path().join("disk.partial")).unwrap();
    assert_eq!(lab.start(0, &COUNTER, "[[disk]]\npath = \"disk\"\n"), Response::Done);
    lab.wait("reason", |l| l.status(0).unwrap().reason.is_some_and(|r| r.contains("disk.partial")));
    std::fs::remove_dir(lab.dir.path().join("disk.partial")).unwrap();
    lab.wait("protected after all", |l| l.is_protected(0) && l.printed(0).len() > 20);
    places(&lab.printed(0));
    assert!(!lab.dir.path().join("disk.partial").exists());
}

#[test]
fn two_starts_at_once_have_one_outcome_each() {
    let lab = lab(&["a"], &["a shared secret of hosts"]);
    let (one, two) = std::thread::scope(|s| {
        let two = s.spawn(|| lab.start(0, &COUNTER, ""));
        (lab.start(0, &COUNTER, ""), two.join().unwrap())
    });
    assert_eq!(
        [&one, &two].iter().filter(|r| ***r == Response::Done).count(),
        1,
        "{one:?} {two:?}"
    );
    lab.wait("runs", |l| l.printed(0).len() > 5);
}

#[test]
fn a_vm_whose_hosts_are_gone_starts_elsewhere_only_by_force() {
    let lab = lab(&["a", "b", "c"], &["a shared secret of hosts"]);
    assert_eq!(lab.start(0, &COUNTER, "[protection]\nhosts = [\"b\"]\n"), Response::Done);
    lab.wait("protected", |l| l.is_protected(0));
    lab.hosts[1].die();
    lab.hosts[0].die();
    assert!(matches!(lab.start(2, &COUNTER, ""), Response::Error { code: ErrorCode::Refused, .. }));
    // What a host asked the arbiter for as it died may still be done after that. It refuses the force as news of a host
    // that lives would, and the operator tries again.
    lab.wait("started by force", |l| l.start_by_force(2) == Response::Done);
    lab.wait("runs", |l| l.printed(2).len() > 5);
}

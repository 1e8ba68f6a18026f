//! Two hosts for tests: daemons of the program under test, each with a network namespace, and a mount namespace for its
//! copy of the disks.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest::GuestFiles;
use serde_json::Value;

use crate::inside::{self, BRIDGE, GUEST_NET, allow_hosts, join_network, make_network};
use crate::vmrun::understudy;

/// The VM.
pub(crate) const VM: &str = "pair";
/// Longest wait for one thing on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(200);
/// Fewest digests that have to be compared on the way for their sameness to say something.
pub(crate) const DIGESTS_MIN: u64 = 20;
/// Addresses of the hosts.
const ADDRESSES: [&str; 2] = ["10.77.0.11", "10.77.0.12"];
const NAMES: [&str; 2] = ["a", "b"];

/// A host: its directory, its engine, and its daemon while it lives.
pub(crate) struct Host {
    /// Its directory: the configuration, the daemon's state, `vm` with the disks.
    pub(crate) dir: PathBuf,
    index: usize,
    engine: &'static str,
    daemon: Option<Child>,
}

impl Host {
    /// Makes the host's files; its disk is at the same path as on the other host, in its own mount namespace.
    pub(crate) fn new(work: &Path, index: usize, engine: &'static str) -> Self {
        let dir = work.join(NAMES[index]);
        let other = 1 - index;
        fs::create_dir_all(dir.join("vm")).expect("room for files");
        let text = format!(
            "name = \"{}\"\nlisten = \"{}:7700\"\nengine = \"{engine}\"\nsocket = {:?}\nstate_dir = {:?}\n\
             secret_file = {:?}\ndetection_ms = 2000\n[arbiter]\ndir = {:?}\n[peers]\n{} = \"{}:7700\"\n",
            NAMES[index],
            ADDRESSES[index],
            dir.join("socket"),
            dir.join("state"),
            work.join("secret"),
            work.join("arbiter"),
            NAMES[other],
            ADDRESSES[other],
        );
        fs::write(dir.join("host.toml"), text).expect("room for files");
        join_network(NAMES[index], &format!("{}/24", ADDRESSES[index]));
        Self { dir, index, engine, daemon: None }
    }

    /// Starts the daemon, as on a host that was installed anew but for its disk.
    pub(crate) fn start(&mut self, mount: &Path) {
        drop(fs::remove_dir_all(self.dir.join("state")));
        let log = fs::File::create(self.dir.join("log")).expect("room for a log");
        let script = "mount --bind \"$1\" \"$2\" && exec \"$3\" host --config \"$4\"";
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", NAMES[self.index]));
        command.args(["unshare", "--mount", "sh", "-c", script, "host"]).arg(self.dir.join("vm"));
        command.arg(mount);
        command.arg(env!("CARGO_BIN_EXE_understudy")).arg(self.dir.join("host.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemon = Some(command.spawn().expect("nsenter and unshare (package util-linux) run"));
        self.wait("answers", |_| true);
    }

    /// Adds to its configuration, before it is started.
    pub(crate) fn configure(&self, more: &str) {
        let path = self.dir.join("host.toml");
        let text = fs::read_to_string(&path).expect("it was written") + more;
        fs::write(&path, text).expect("room for files");
    }

    /// The process of its daemon.
    pub(crate) fn process(&self) -> rustix::process::Pid {
        let daemon = self.daemon.as_ref().expect("the daemon runs");
        rustix::process::Pid::from_child(daemon)
    }

    /// Ends the daemon as a crash would.
    pub(crate) fn die(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("the daemon is a child of this process");
            drop(daemon.wait());
        }
    }

    pub(crate) fn ask(&self, args: &[&str]) -> std::process::Output {
        let mut command = understudy();
        command.args(args).arg("--socket").arg(self.dir.join("socket"));
        command.output().expect("the program under test runs")
    }

    /// The VM's state as this host knows it.
    pub(crate) fn status(&self) -> Option<Value> {
        let output = self.ask(&["status", "-o", "json"]);
        let all: Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(all["vms"].get(0).cloned().unwrap_or(Value::Null))
    }

    /// Waits until the first VM's state is as it should be.
    pub(crate) fn wait(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        self.wait_until(what, || self.status(), is_so)
    }

    /// Waits until a VM's state is as it should be.
    pub(crate) fn wait_for_vm(&self, vm: &str, what: &str, is_so: impl Fn(&Value) -> bool) {
        let status = || {
            let output = self.ask(&["status", "-o", "json", vm]);
            let all: Value = serde_json::from_slice(&output.stdout).ok()?;
            all["vms"].get(0).cloned()
        };
        self.wait_until(what, status, is_so);
    }

    fn wait_until(
        &self,
        what: &str,
        status: impl Fn() -> Option<Value>,
        is_so: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = status();
            if let Some(status) = status.as_ref().filter(|s| is_so(s)) {
                return status.clone();
            }
            let log = || fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(
                Instant::now() < deadline,
                "host {} waits in vain: {what}: {status:?}\n{}",
                NAMES[self.index],
                log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn wait_protected(&self) {
        let status =
            self.wait("protected", |s| s["role"] == "primary" && s["state"] == "Protected");
        assert_eq!(status["engine"], self.engine, "{status}");
    }

    /// Waits until so many digests more were compared here.
    pub(crate) fn wait_digests(&self, more: u64) {
        let compared = |s: &Value| s["digests"].as_u64().unwrap_or(0);
        let before = compared(&self.wait("secondary", |s| s["role"] == "secondary"));
        let status = self.wait("digests", |s| compared(s) >= before + more);
        assert_eq!(status["engine"], self.engine, "{status}");
    }

    /// Fails if a machine differed from its pair: both states would be kept.
    pub(crate) fn assert_same(&self) {
        let kept = fs::read_dir(self.dir.join("state")).expect("the daemon made it");
        let names: Vec<String> = kept
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|name| name == "divergence")
            .collect();
        let log = fs::read_to_string(self.dir.join("log")).expect("the daemon has a log");
        assert!(names.is_empty() && !log.contains("diverged"), "{names:?}\n{log}");
    }
}

impl Host {
    /// What this host's flight recorder kept replays on another engine than it was made on.
    pub(crate) fn assert_flights(&self, engine: &str) {
        let list = || {
            let dir = self.dir.join("state").display().to_string();
            understudy().args(["record", "list", VM, "-o", "json", "--state-dir", &dir]).output()
        };
        let deadline = Instant::now() + LIMIT;
        let dir = loop {
            let listed = list().expect("the program under test runs");
            assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
            let all: Value = serde_json::from_slice(&listed.stdout).expect("it is JSON");
            let whole = all["recordings"].as_array().into_iter().flatten();
            let mut whole = whole.filter(|r| r["is_whole"] == true);
            match whole.next().and_then(|r| r["dir"].as_str().map(PathBuf::from)) {
                Some(dir) => break dir,
                None => assert!(Instant::now() < deadline, "no whole recording: {all}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        let args = ["replay", "--verify", "--engine", engine];
        let replayed = understudy().args(args).arg(&dir).output().expect("it runs");
        let words = String::from_utf8_lossy(&replayed.stderr).into_owned();
        assert!(replayed.status.success() && words.contains("digests are as recorded"), "{words}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.die();
    }
}

/// Writes the VM's definition: `boot` is what it begins with, `protection` what its end says. Says where.
fn write_vm(work: &Path, boot: &str, protection: &str) -> PathBuf {
    let text = format!(
        "name = \"{VM}\"\n{boot}[[disk]]\npath = {:?}\nformat = \"raw\"\n[[net]]\nbridge = \"{BRIDGE}\"\n\
         [protection]\n{protection}hosts = [\"{}\", \"{}\"]\n",
        work.join("vm/disk"),
        NAMES[0],
        NAMES[1],
    );
    let path = work.join("vm.toml");
    fs::write(&path, text).expect("room for files");
    path
}

/// Two hosts whose daemons do not run yet.
pub(crate) fn hosts_off(work: &Path, engines: [&'static str; 2]) -> [Host; 2] {
    make_network();
    allow_hosts();
    for dir in ["vm", "arbiter"] {
        fs::create_dir(work.join(dir)).expect("room for files");
    }
    let secret = work.join("secret");
    fs::write(&secret, "a secret of two hosts in a test\n").expect("room for files");
    inside::tool("chmod", "coreutils", &["600", &secret.display().to_string()]);
    [0, 1].map(|i| Host::new(work, i, engines[i]))
}

/// Two hosts with daemons and a copy of the guest's disk each, and the VM's definition.
pub(crate) fn two_hosts(
    work: &Path,
    files: &GuestFiles,
    engines: [&'static str; 2],
) -> ([Host; 2], PathBuf) {
    let text = format!(
        "memory = \"256M\"\nkernel = {:?}\ninitrd = {:?}\nappend = \"{} understudy.ip={GUEST_NET}\"\n",
        files.kernel, files.initrd, files.append,
    );
    let disk = files.disk.as_ref().expect("the guest has a disk");
    let more = "digest_interval_ms = 50\nflight_recorder = \"8s\"\n";
    two_hosts_with(work, disk, engines, &text, more)
}

/// The same for any disk: `boot` is what the definition begins with, `protection` what its end says.
pub(crate) fn two_hosts_with(
    work: &Path,
    disk: &Path,
    engines: [&'static str; 2],
    boot: &str,
    protection: &str,
) -> ([Host; 2], PathBuf) {
    let mut hosts = hosts_off(work, engines);
    for host in &mut hosts {
        copy_disk(disk, &host.dir.join("vm/disk"));
        host.start(&work.join("vm"));
    }
    (hosts, write_vm(work, boot, protection))
}

/// Copies an image, of which most may be holes.
pub(crate) fn copy_disk(from: &Path, to: &Path) {
    let paths = [from, to].map(|path| path.display().to_string());
    inside::tool("cp", "coreutils", &["--sparse=always", &paths[0], &paths[1]]);
}

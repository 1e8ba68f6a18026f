//! The demo's hosts: three daemons of this program, an arbiter, and the machine that they protect.
//!
//! # Invariants
//! - Each host has a network namespace and a mount namespace of its own, so that one path (`/run/vm`) is another
//!   directory on each of them, as it is on separate computers.
//! - A signal goes to a host's whole process group, and to nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::Context;
use guest::GuestFiles;
use host::control::VmStatus;
use machine::engine::EngineKind;
use rustix::process::{Pid, Signal, kill_process_group};

use super::control::{Control, words};
use super::fault::Fault;
use super::net::{self, Station};
use super::progress::Progress;
use super::rounds::Cluster;

/// Names of the hosts; host `n` has address `10.77.0.n`.
pub(crate) const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
/// The machine's name.
pub(crate) const VM: &str = "redis";
/// The machine's address.
const VM_ADDRESS: &str = "10.77.0.10";
/// The name of a second machine, which has nothing to do with the first.
pub(crate) const NEIGHBOUR: &str = "neighbour";
/// Its address.
pub(crate) const NEIGHBOUR_ADDRESS: [u8; 4] = [10, 77, 0, 11];
/// The namespace that the client is in.
pub(crate) const CLIENT: &str = "client";
const WITNESS: &str = "witness";
const WITNESS_ADDRESS: &str = "10.77.0.100";
/// The machine's disk, the same path on every host.
const DISK: &str = "/run/vm/redis.img";
/// Longest wait for a daemon's or the arbiter's first answer.
const UP_MAX: Duration = Duration::from_secs(20);
/// Longest boot of the guest.
const BOOT_MAX: Duration = Duration::from_secs(300);

/// What machine the hosts run, and how.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Memory, as `512M`.
    pub(crate) memory: String,
    /// Harts.
    pub(crate) harts: u8,
    /// How long a silent peer counts as alive, in milliseconds.
    pub(crate) detection_ms: u32,
    /// How far the secondary may be behind, in milliseconds, if that is not the default.
    pub(crate) lag_ms: Option<u32>,
    /// Whether a secondary is wanted from the start.
    pub(crate) is_protected: bool,
    /// One disk for all hosts, instead of a copy on each.
    pub(crate) has_shared_disk: bool,
}

struct Host {
    name: &'static str,
    dir: PathBuf,
    daemon: Option<Child>,
    control: Control,
}

/// How the hosts' logs reach each other.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LogLink {
    /// Through this address: the port leads to the first host, the next ones to the others.
    pub(crate) via: Option<(Ipv4Addr, u16)>,
    /// The host that compresses what it sends.
    pub(crate) compressing: Option<&'static str>,
}

/// The running hosts; all children are killed when dropped.
pub(crate) struct Lab {
    exe: PathBuf,
    dir: PathBuf,
    guest: GuestFiles,
    arbiter: String,
    plan: Plan,
    /// The engines of hosts; the others have the fastest that they can have.
    engines: BTreeMap<&'static str, EngineKind>,
    log_link: LogLink,
    etcd: Option<Child>,
    hosts: Vec<Host>,
}

/// Where Redis listens.
pub(crate) fn redis_address() -> SocketAddr {
    SocketAddr::from(([10, 77, 0, 10], 6379))
}

impl Lab {
    /// Makes the network and the arbiter; [`Self::start`] does the rest.
    pub(crate) fn new(
        dir: &Path,
        guest: GuestFiles,
        etcd: Option<&Path>,
        plan: Plan,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        progress.say("making the network: a switch, three hosts, a client, a witness");
        net::add_switch()?;
        for (index, name) in HOSTS.into_iter().enumerate() {
            net::add_station(name, Station::Host, &format!("{}/24", address(index)))?;
        }
        net::add_station(CLIENT, Station::Plain, "10.77.0.50/24")?;
        net::add_station(WITNESS, Station::Plain, &format!("{WITNESS_ADDRESS}/24"))?;
        let exe = std::env::current_exe().context("find this program's file")?;
        let mut lab = Self {
            exe,
            dir: dir.to_owned(),
            guest,
            arbiter: String::new(),
            plan,
            engines: BTreeMap::new(),
            log_link: LogLink::default(),
            etcd: None,
            hosts: Vec::new(),
        };
        lab.start_arbiter(etcd, progress)?;
        write_secret(&dir.join("secret"))?;
        Ok(lab)
    }

    /// Lets hosts run machines with these engines, from their next start on.
    pub(crate) fn set_engines(&mut self, engines: BTreeMap<&'static str, EngineKind>) {
        self.engines = engines;
    }

    /// Lets the logs take another way, from the next start of the hosts on.
    pub(crate) fn set_log_link(&mut self, link: LogLink) {
        self.log_link = link;
    }

    /// Starts the three daemons, then the machine.
    pub(crate) fn start(&mut self, progress: &Progress) -> anyhow::Result<()> {
        for name in HOSTS {
            let dir = self.dir.join(name);
            let control = Control::new(&dir.join("control.sock"));
            self.hosts.push(Host { name, dir, daemon: None, control });
            self.start_daemon(name)?;
        }
        for name in HOSTS {
            self.wait_up(name, progress)?;
        }
        progress.say("h1, h2 and h3 are up");
        let file = self.dir.join("vm.toml");
        let shared = self.dir.join("shared.img");
        if let (true, Some(disk)) = (self.plan.has_shared_disk, &self.guest.disk) {
            net::run("cp", &["--sparse=always", path_text(disk)?, path_text(&shared)?])?;
        }
        let text = vm_text(VM, VM_ADDRESS, &self.guest, &self.plan, &shared);
        fs::write(&file, text).context("write vm.toml")?;
        let first = self.hosts.first().context("there is a first host")?;
        first.control.start(&file).context("start the machine on h1")?;
        progress.say("the machine boots Debian's kernel on h1");
        Ok(())
    }

    /// Starts a second machine like the first on `host`, which nobody protects. It has that host's copy of the first one's
    /// disk: the first machine must not come there.
    pub(crate) fn start_neighbour(&self, host: &str) -> anyhow::Result<()> {
        let file = self.dir.join("neighbour.toml");
        let plan = Plan { is_protected: false, has_shared_disk: false, ..self.plan.clone() };
        let address = std::net::Ipv4Addr::from(NEIGHBOUR_ADDRESS).to_string();
        let text = vm_text(NEIGHBOUR, &address, &self.guest, &plan, &self.dir);
        fs::write(&file, text).context("write neighbour.toml")?;
        self.control(host)?.start(&file).with_context(|| format!("start {NEIGHBOUR} on {host}"))
    }

    /// Waits until Redis answers.
    pub(crate) fn wait_redis(&self, progress: &Progress) -> anyhow::Result<()> {
        progress.wait_for(
            "Redis in the machine",
            BOOT_MAX,
            Duration::from_millis(200),
            |note| {
                note.push_str(&self.view(None).map(|view| words(&view)).unwrap_or_default());
                Ok(net::inside(CLIENT, || super::client::answers(redis_address()))?.then_some(()))
            },
        )?;
        progress.say(&format!("Redis answers at {VM_ADDRESS}"));
        Ok(())
    }

    /// The control socket of the daemon of `name`.
    pub(crate) fn control(&self, name: &str) -> anyhow::Result<&Control> {
        let host = self.hosts.iter().find(|host| host.name == name);
        Ok(&host.with_context(|| format!("there is no host {name}"))?.control)
    }

    /// The process of the daemon of `name`.
    pub(crate) fn daemon_id(&self, name: &str) -> anyhow::Result<u32> {
        let host = self.hosts.iter().find(|host| host.name == name);
        let daemon = host.and_then(|host| host.daemon.as_ref());
        Ok(daemon.with_context(|| format!("{name} runs no daemon"))?.id())
    }

    /// How far the machine's secondary may be behind, from its start on.
    pub(crate) fn set_lag_ms(&mut self, lag_ms: Option<u32>) {
        self.plan.lag_ms = lag_ms;
    }

    /// The process of the arbiter, where it is one.
    pub(crate) fn arbiter_id(&self) -> Option<u32> {
        self.etcd.as_ref().map(std::process::Child::id)
    }

    /// All that the daemon of `name` wrote.
    pub(crate) fn log(&self, name: &str) -> anyhow::Result<String> {
        let file = self.dir.join(name).join("log");
        fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
    }

    /// The last lines that each daemon wrote, for when something went wrong.
    pub(crate) fn log_tails(&self) -> String {
        let tail = |host: &Host| {
            let log = fs::read_to_string(host.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(8)..].iter();
            last.map(|line| format!("  {}: {line}\n", host.name)).collect::<String>()
        };
        self.hosts.iter().map(tail).collect()
    }

    fn start_arbiter(&mut self, etcd: Option<&Path>, progress: &Progress) -> anyhow::Result<()> {
        let Some(etcd) = etcd else {
            let dir = self.dir.join("arbiter");
            fs::create_dir(&dir).context("make the arbiter's directory")?;
            self.arbiter = format!("dir = {}", quoted(&dir));
            progress.say("there is no etcd: a shared directory is the arbiter");
            return Ok(());
        };
        let url = format!("http://{WITNESS_ADDRESS}:2379");
        let program = etcd.to_str().context("the path of etcd is not UTF-8")?;
        let mut command = net::command_in(WITNESS, program);
        command.arg("--data-dir").arg(self.dir.join("etcd"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        command.args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380"]);
        command.args(["--initial-cluster", "default=http://127.0.0.1:2380"]);
        self.etcd =
            Some(logged(&mut command, &self.dir.join("etcd.log"))?.spawn().context("start etcd")?);
        self.arbiter = format!("etcd = [\"{url}\"]");
        let listens = SocketAddr::from(([10, 77, 0, 100], 2379));
        let connects =
            || std::net::TcpStream::connect_timeout(&listens, Duration::from_millis(500)).is_ok();
        progress.wait_for("etcd", UP_MAX, Duration::from_millis(100), |_| {
            if let Some(status) =
                self.etcd.as_mut().and_then(|child| child.try_wait().ok().flatten())
            {
                anyhow::bail!("etcd ended ({status}); see {}", self.dir.join("etcd.log").display());
            }
            Ok(net::inside(WITNESS, connects)?.then_some(()))
        })?;
        progress.say("the witness runs etcd, the arbiter");
        Ok(())
    }

    /// Starts the daemon of `name` with fresh state, as a computer that was installed anew.
    fn start_daemon(&mut self, name: &str) -> anyhow::Result<()> {
        let engine = self.engines.get(name).copied();
        let config = host_text(
            name,
            &self.dir,
            self.plan.detection_ms,
            engine,
            &self.arbiter,
            self.log_link,
        );
        let host = find(&mut self.hosts, name)?;
        for old in ["state", "vm", "control.sock"] {
            remove(&host.dir.join(old))?;
        }
        let vm = host.dir.join("vm");
        for dir in [&host.dir.join("state"), &vm] {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        }
        if let Some(disk) = &self.guest.disk {
            let to = vm.join("redis.img");
            net::run("cp", &["--sparse=always", path_text(disk)?, path_text(&to)?])?;
        }
        let file = host.dir.join("host.toml");
        fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
        let mut command = net::command_in(host.name, "unshare");
        let script = "mount --bind \"$1\" /run/vm && exec \"$2\" host --config \"$3\"";
        command.args(["--mount", "sh", "-c", script, "host"]).arg(&vm).arg(&self.exe).arg(&file);
        let log = host.dir.join("log");
        host.daemon = Some(logged(&mut command, &log)?.spawn().context("start a host's daemon")?);
        Ok(())
    }

    fn wait_up(&mut self, name: &str, progress: &Progress) -> anyhow::Result<()> {
        let host = find(&mut self.hosts, name)?;
        let what = format!("the daemon of {name}");
        progress.wait_for(&what, UP_MAX, Duration::from_millis(50), |_| {
            if let Some(status) =
                host.daemon.as_mut().and_then(|child| child.try_wait().ok().flatten())
            {
                anyhow::bail!("the daemon of {name} ended ({status})");
            }
            Ok(host.control.answers().then_some(()))
        })
    }

    fn signal(&mut self, name: &str, signal: Signal) -> anyhow::Result<()> {
        let host = find(&mut self.hosts, name)?;
        let Some(child) = host.daemon.as_mut() else { return Ok(()) };
        let group = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process has an id")?;
        kill_process_group(group, signal)
            .with_context(|| format!("signal the processes of {name}"))?;
        if signal == Signal::KILL {
            child.wait()?;
            host.daemon = None;
        }
        Ok(())
    }
}

impl Cluster for Lab {
    fn view(&self, not: Option<&str>) -> Option<VmStatus> {
        let asked =
            self.hosts.iter().filter(|host| not != Some(host.name) && host.daemon.is_some());
        // An old live host that has not heard yet speaks of an older generation.
        let views = asked.filter_map(|host| Some((host.name, host.control.view(VM)?)));
        let best = views
            .max_by_key(|(name, view)| (view.generation, view.live_host.as_deref() == Some(*name)));
        best.map(|(_, view)| view)
    }

    fn inflict(&mut self, fault: Fault, host: &str) -> anyhow::Result<()> {
        if fault.cuts() {
            net::set_port(host, false)?;
        }
        match fault {
            Fault::Kill | Fault::Power => self.signal(host, Signal::KILL),
            Fault::Freeze => self.signal(host, Signal::STOP),
            Fault::Partition => Ok(()),
        }
    }

    fn mend(&mut self, fault: Fault, host: &str, progress: &Progress) -> anyhow::Result<()> {
        if fault.cuts() {
            net::set_port(host, true)?;
        }
        if fault == Fault::Freeze {
            self.signal(host, Signal::CONT)?;
        }
        let entry = find(&mut self.hosts, host)?;
        let ended = match entry.daemon.as_mut() {
            Some(child) => child.try_wait()?.is_some(),
            None => true,
        };
        if ended || fault.kills() {
            self.start_daemon(host)?;
        }
        self.wait_up(host, progress)?;
        progress.say(&format!("{host} is back"));
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in HOSTS {
            if let Err(error) = self.signal(name, Signal::KILL)
                && self.hosts.iter().any(|host| host.name == name)
            {
                eprintln!("{error:#}");
            }
        }
        if let Some(mut etcd) = self.etcd.take() {
            // An error means that it ended already.
            drop(etcd.kill());
            drop(etcd.wait());
        }
    }
}

/// Configuration of the daemon of `name`; all files are below `dir`.
fn host_text(
    name: &str,
    dir: &Path,
    detection_ms: u32,
    engine: Option<EngineKind>,
    arbiter: &str,
    link: LogLink,
) -> String {
    let own_dir = dir.join(name);
    let mut text = format!("name = \"{name}\"\n");
    if let Some(engine) = engine {
        text.push_str(&format!("engine = \"{engine}\"\n"));
    }
    let mut peers = String::new();
    for (index, host) in HOSTS.iter().enumerate() {
        if *host == name {
            text.push_str(&format!("listen = \"{}:7700\"\n", address(index)));
        } else {
            let direct = || format!("{}:7700", address(index));
            let through = |(via, port)| format!("{via}:{}", usize::from(port) + index);
            let peer = link.via.map_or_else(direct, through);
            peers.push_str(&format!("{host} = \"{peer}\"\n"));
        }
    }
    if link.compressing == Some(name) {
        text.push_str("log_compression = \"lz4\"\n");
    }
    text.push_str(&format!(
        "socket = {}\nstate_dir = {}\nsecret_file = {}\ndetection_ms = {detection_ms}\n\n\
         [arbiter]\n{arbiter}\n\n[peers]\n{peers}",
        quoted(&own_dir.join("control.sock")),
        quoted(&own_dir.join("state")),
        quoted(&dir.join("secret")),
    ));
    text
}

/// Configuration of the machine, which may run on each of the hosts.
fn vm_text(
    name: &str,
    address: &str,
    guest: &GuestFiles,
    plan: &Plan,
    shared_disk: &Path,
) -> String {
    let last = address.rsplit('.').next().unwrap_or_default();
    let Plan { memory, harts, is_protected, .. } = plan;
    let disk = match (&guest.disk, plan.has_shared_disk) {
        (Some(_), true) => {
            format!("[[disk]]\npath = {}\nmode = \"shared\"\n\n", quoted(shared_disk))
        }
        (Some(_), false) => format!("[[disk]]\npath = \"{DISK}\"\nmode = \"mirrored\"\n\n"),
        (None, _) => String::new(),
    };
    let lag = plan.lag_ms.map(|ms| format!("lag_ms = {ms}\n")).unwrap_or_default();
    format!(
        "name = \"{name}\"\nmemory = \"{memory}\"\nharts = {harts}\nkernel = {}\ninitrd = {}\n\
         append = \"{} understudy.ip={address}/24\"\n\n\
         {disk}[[net]]\nbridge = \"br0\"\nmac = \"52:54:00:77:00:{last}\"\n\n\
         [protection]\nenabled = {is_protected}\nhosts = [\"h1\", \"h2\", \"h3\"]\n{lag}",
        quoted(&guest.kernel),
        quoted(&guest.initrd),
        guest.append,
    )
}

fn find<'a>(hosts: &'a mut [Host], name: &str) -> anyhow::Result<&'a mut Host> {
    hosts
        .iter_mut()
        .find(|host| host.name == name)
        .with_context(|| format!("there is no host {name}"))
}

fn address(index: usize) -> String {
    format!("10.77.0.{}", index + 1)
}

fn path_text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("the path {} is not UTF-8", path.display()))
}

/// A path as a TOML string.
pub(crate) fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{text}\"")
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let gone = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match gone {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn logged<'a>(
    command: &'a mut std::process::Command,
    path: &Path,
) -> anyhow::Result<&'a mut std::process::Command> {
    let open = fs::OpenOptions::new().create(true).append(true).open(path);
    let log = open.with_context(|| format!("open {}", path.display()))?;
    let also = log.try_clone()?;
    Ok(command.stdout(Stdio::from(log)).stderr(Stdio::from(also)))
}

/// A new secret for hosts.
pub(crate) fn write_secret(path: &Path) -> anyhow::Result<()> {
    let mut bytes = [0u8; 32];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    use std::io::Write;
    file.and_then(|mut file| file.write_all(text.as_bytes())).context("write the secret")
}

#[cfg(test)]
mod tests {
    use host::config::{HostConfig, VmConfig};

    use super::*;

    #[test]
    fn daemons_accept_the_configurations() {
        let etcd = "etcd = [\"http://10.77.0.100:2379\"]";
        for name in HOSTS {
            for arbiter in [etcd, "dir = \"/tmp/a\""] {
                let engine = (name == HOSTS[1]).then_some(EngineKind::Interpreter);
                let link = LogLink { via: None, compressing: Some(HOSTS[1]) };
                let text = host_text(name, Path::new("/tmp/de\"mo"), 150, engine, arbiter, link);
                let config = HostConfig::parse(&text, "host.toml").unwrap();
                assert_eq!((config.name.as_str(), config.detection_ms), (name, 150));
                assert_eq!((config.peers.len(), config.engine), (2, engine));
                assert!(!config.peers.values().any(|peer| peer.address == config.listen));
            }
        }
        let guest = serde_json::from_str(
            r#"{"kernel":"/c/vmlinux","initrd":"/c/initrd","append":"console=ttyS0","disk":"/c/disk",
                "packages":[],"recipe":""}"#,
        );
        let mut plan = Plan {
            memory: "512M".into(),
            harts: 2,
            detection_ms: 100,
            lag_ms: Some(700),
            is_protected: true,
            has_shared_disk: true,
        };
        let guest = guest.unwrap();
        let text = vm_text(VM, VM_ADDRESS, &guest, &plan, Path::new("/shared.img"));
        let config = VmConfig::parse(&text, "vm.toml", Path::new("/")).unwrap();
        assert_eq!(config.disks[0].mode, host::config::DiskMode::Shared);
        assert_eq!(config.protection.lag_ms, 700);
        plan.has_shared_disk = false;
        let text = vm_text(VM, VM_ADDRESS, &guest, &plan, Path::new("/shared.img"));
        let config = VmConfig::parse(&text, "vm.toml", Path::new("/")).unwrap();
        assert_eq!((config.memory, config.harts), (512 << 20, 2));
        assert_eq!(config.append, "console=ttyS0 understudy.ip=10.77.0.10/24");
        assert_eq!(
            (config.disks.len(), config.nets.len(), config.protection.hosts.len()),
            (1, 1, 3)
        );
    }
}

//! The loads on this host itself, without a machine around them: Debian's programs, in the network of a host that is idle.
//!
//! # Failure
//! What is not installed is not measured.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use super::load::{Files, Place};
use super::postgres::{self, Session};
use super::tables::PRIMARY_CPU;
use crate::bench::engine::workload;
use crate::demo::lab::CLIENT;
use crate::demo::net;
use crate::demo::progress::Progress;

/// The host that has nothing to do.
const HOST: &str = "h3";
/// Its address.
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 3));
/// Longest wait for a server.
const READY_MAX: Duration = Duration::from_secs(30);

/// A server and all its processes; they are killed when dropped.
#[derive(Debug)]
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it ended already.
        if let Some(group) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            kill_process_group(group, Signal::KILL).unwrap_or_default();
        }
        drop(self.0.wait());
    }
}

/// This host, with its servers.
#[derive(Debug)]
pub(super) struct Native {
    dir: PathBuf,
    servers: Vec<Server>,
}

impl Native {
    /// Puts the programs' files into `dir`.
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir(dir).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("work.c"), guest::compiler_work())?;
        workload::compile_native(dir)?;
        Ok(Self { dir: dir.to_owned(), servers: Vec::new() })
    }

    /// Starts Redis, as the guest's.
    pub(super) fn start_redis(&mut self, progress: &Progress) -> anyhow::Result<()> {
        let mut command = here("redis-server");
        command.args(["--bind", &ADDRESS.to_string(), "--port", "6379", "--protected-mode", "no"]);
        command.args(["--save", "", "--appendonly", "no", "--dir"]).arg(&self.dir);
        self.start(command, "redis.log")?;
        let address = SocketAddr::new(ADDRESS, 6379);
        let step = Duration::from_millis(100);
        progress.wait_for("Redis on this host", READY_MAX, step, |_| {
            let answers = net::inside(CLIENT, || crate::demo::client::answers(address))?;
            Ok(answers.then_some(()))
        })
    }

    /// Makes a database and starts PostgreSQL, set up as the guest's.
    pub(super) fn start_postgres(&mut self, progress: &Progress) -> anyhow::Result<()> {
        let data = self.dir.join("postgresql");
        let initdb = postgres::program("initdb")?;
        let mut command = unprivileged(&initdb)?;
        command.arg("-D").arg(&data).args(["-U", postgres::USER, "-A", "trust", "--locale=C"]);
        postgres::finish(command)?;
        let hba = data.join("pg_hba.conf");
        let text = fs::read_to_string(&hba).context("read pg_hba.conf")?;
        fs::write(&hba, text + "host all all 0.0.0.0/0 trust\n").context("write pg_hba.conf")?;
        let mut command = unprivileged(&postgres::program("postgres")?)?;
        command.arg("-D").arg(&data);
        for setting in [
            &format!("listen_addresses={ADDRESS}"),
            "unix_socket_directories=",
            "shared_buffers=128MB",
        ] {
            command.args(["-c", setting]);
        }
        self.start(command, "postgresql.log")?;
        let address = SocketAddr::new(ADDRESS, postgres::PORT);
        let step = Duration::from_millis(200);
        progress.wait_for("PostgreSQL on this host", READY_MAX, step, |_| {
            let answer = net::inside(CLIENT, || {
                Session::open(address, Duration::from_secs(5))?.query("SELECT 1")
            })?;
            Ok(answer.is_ok().then_some(()))
        })
    }

    fn start(&mut self, mut command: Command, log: &str) -> anyhow::Result<()> {
        let file = fs::File::create(self.dir.join(log)).with_context(|| format!("make {log}"))?;
        command.stdout(Stdio::from(file.try_clone()?)).stderr(Stdio::from(file));
        let child = command.spawn().with_context(|| format!("run {command:?}"))?;
        self.servers.push(Server(child));
        Ok(())
    }
}

/// A program in the idle host's network, on the CPU that a primary has.
fn here(program: &str) -> Command {
    let mut command = net::command_in(HOST, "taskset");
    command.args(["-c", PRIMARY_CPU, program]);
    command
}

/// The same as a user that is not root, which PostgreSQL insists on: in a user namespace that knows nobody.
fn unprivileged(program: &Path) -> anyhow::Result<Command> {
    let mut command = here("unshare");
    command.args(["--user", "--"]).arg(program);
    Ok(command)
}

impl Place for Native {
    fn address(&self) -> IpAddr {
        ADDRESS
    }

    fn files(&self) -> Files {
        let path = |name: &str| self.dir.join(name).display().to_string();
        Files { kernels: path("kernels"), work: path("work.c"), object: path("work.o") }
    }

    fn time(&mut self, script: &str, _bound: Duration) -> anyhow::Result<Duration> {
        let mut command = here("sh");
        command.args(["-c", script]);
        let begun = Instant::now();
        let output = command.output().context("run a load on this host")?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "a load on this host failed: {}", words.trim());
        Ok(begun.elapsed())
    }
}

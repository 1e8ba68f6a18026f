//! Tests that need a network of their own: they run themselves again in namespaces, so that nothing stays behind.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set inside the namespaces.
const INSIDE: &str = "UNDERSTUDY_TEST_INSIDE";
/// Where guests are.
pub(crate) const BRIDGE: &str = "br0";
const HOST_NET: &str = "10.77.0.1/24";
/// A guest's address.
pub(crate) const GUEST_NET: &str = "10.77.0.2/24";
const REDIS: &str = "10.77.0.2:6379";

/// Whether this is the process inside the namespaces. Outside, the test `name` is run there, and has to pass.
pub(crate) fn is_inside(name: &str) -> bool {
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

/// Runs a program of this system.
pub(crate) fn tool(program: &str, package: &str, args: &[&str]) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {program} (package {package}): {e}"));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {} failed: {words}", args.join(" "));
}

fn ip(args: &[&str]) {
    tool("ip", "iproute2", args);
}

/// A bridge for guests, with an address of this side.
pub(crate) fn make_network() {
    ip(&["link", "set", "lo", "up"]);
    ip(&["link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"]);
    ip(&["addr", "add", HOST_NET, "dev", BRIDGE]);
    ip(&["link", "set", BRIDGE, "up"]);
}

/// Forgets which device has which address: the next guest has another one.
pub(crate) fn forget_neighbours() {
    ip(&["neigh", "flush", "all"]);
}

/// Makes room for the names of hosts' network namespaces.
pub(crate) fn allow_hosts() {
    tool("mount", "mount", &["-t", "tmpfs", "hosts", "/run"]);
}

/// A network namespace `host` with a bridge and an address of its own, on the network of [`make_network`].
pub(crate) fn join_network(host: &str, address: &str) {
    let cable = format!("to-{host}");
    ip(&["netns", "add", host]);
    ip(&["link", "add", &cable, "type", "veth", "peer", "name", "up0", "netns", host]);
    ip(&["link", "set", &cable, "master", BRIDGE, "up"]);
    ip(&["-n", host, "link", "set", "lo", "up"]);
    ip(&["-n", host, "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"]);
    ip(&["-n", host, "link", "set", "up0", "master", BRIDGE, "up"]);
    ip(&["-n", host, "addr", "add", address, "dev", BRIDGE]);
    ip(&["-n", host, "link", "set", BRIDGE, "up"]);
}

/// One connection to a guest's Redis, and how often it was written to.
pub(crate) struct Redis {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
    written: usize,
}

impl Redis {
    /// Connects to a server that is ready.
    pub(crate) fn connect() -> Self {
        Self::of(TcpStream::connect(REDIS).expect("Redis takes connections"))
    }

    /// Connects as soon as the server takes connections, within a bound.
    pub(crate) fn wait(limit: Duration) -> Self {
        let deadline = Instant::now() + limit;
        let address = REDIS.parse().expect("it is an address");
        loop {
            if let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                return Self::of(stream);
            }
            assert!(Instant::now() < deadline, "Redis takes no connections");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn of(stream: TcpStream) -> Self {
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).expect("a time limit can be set");
        let answers = stream.try_clone().expect("a socket has more than one handle");
        Self { stream, answers: BufReader::new(answers), written: 0 }
    }

    /// Writes so often; each write is told of, and none before is lost.
    pub(crate) fn write(&mut self, writes: usize) {
        for _ in 0..writes {
            self.written += 1;
            let n = self.written;
            // Some fill several frames and blocks.
            let value = format!("{n:08}").repeat(if n.is_multiple_of(10) { 600 } else { 10 });
            let length = value.len();
            let command = format!("*3\r\n$5\r\nRPUSH\r\n$3\r\nlog\r\n${length}\r\n{value}\r\n");
            self.stream.write_all(command.as_bytes()).expect("Redis reads");
            let mut answer = String::new();
            self.answers.read_line(&mut answer).expect("Redis answers");
            assert_eq!(answer, format!(":{n}\r\n"));
        }
    }

    /// How often it was written to.
    pub(crate) fn written(&self) -> usize {
        self.written
    }

    fn ask(&mut self, command: &str) -> String {
        self.stream.write_all(command.as_bytes()).expect("Redis reads");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("Redis answers");
        answer
    }

    /// Looks how many writes a server has, all of them being there; those that follow are counted from there.
    pub(crate) fn count(&mut self) -> usize {
        // A server that has begun answers so while it still reads its file.
        let deadline = Instant::now() + Duration::from_secs(60);
        let answer = loop {
            let answer = self.ask("LLEN log\r\n");
            if !answer.starts_with("-LOADING") {
                break answer;
            }
            assert!(Instant::now() < deadline, "Redis does not end reading its file");
            std::thread::sleep(Duration::from_millis(20));
        };
        let number = answer.trim_start_matches(':').trim();
        let count = number.parse().unwrap_or_else(|_| panic!("Redis counts: {answer}"));
        for at in 0..count {
            let length = self.ask(&format!("LINDEX log {at}\r\n"));
            let mut value = String::new();
            self.answers.read_line(&mut value).expect("Redis answers");
            let wanted = format!("{:08}", at + 1);
            assert!(value.starts_with(&wanted), "write {wanted} of {count}: {length}{value:.20}");
        }
        self.written = count;
        count
    }

    /// Ends the server.
    pub(crate) fn shut_down(mut self) {
        self.stream.write_all(b"*2\r\n$8\r\nSHUTDOWN\r\n$6\r\nNOSAVE\r\n").expect("Redis reads");
    }
}

//! The demo's network: a switch, and network namespaces for hosts, client and witness, joined to it by cables.
//!
//! # Place
//! Runs inside the demo's own mount, process and network namespaces (see [`super::sandbox`]), so everything made here
//! is gone when the demo is, however it ends.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Name of the bridge that stands for the switch.
const SWITCH: &str = "lan";

/// Something with a cable to the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Station {
    /// A host: its address is on a bridge `br0`, which machines can join.
    Host,
    /// A client or a witness: its address is on the cable's end.
    Plain,
}

/// Makes the switch.
pub(crate) fn add_switch() -> anyhow::Result<()> {
    // Named namespaces are mounts below /run: a private one leaves the machine's alone.
    run("mount", &["-t", "tmpfs", "-o", "mode=755", "run", "/run"])?;
    fs::create_dir_all("/run/vm").context("make /run/vm")?;
    quiet_ipv6(None)?;
    ip(&["link", "set", "lo", "up"])?;
    ip(&[
        "link",
        "add",
        SWITCH,
        "type",
        "bridge",
        "forward_delay",
        "0",
        "stp_state",
        "0",
        "mcast_snooping",
        "0",
    ])?;
    ip(&["link", "set", SWITCH, "up"])
}

/// Makes the namespace `name` with address `address` (with its prefix length) and joins it to the switch.
pub(crate) fn add_station(name: &str, kind: Station, address: &str) -> anyhow::Result<()> {
    let port = port(name);
    ip(&["netns", "add", name])?;
    quiet_ipv6(Some(name))?;
    ip(&["link", "add", &port, "type", "veth", "peer", "name", "uplink", "netns", name])?;
    ip(&["link", "set", &port, "master", SWITCH, "up"])?;
    ip(&["-n", name, "link", "set", "lo", "up"])?;
    let holder = match kind {
        Station::Plain => "uplink",
        Station::Host => {
            let bridge =
                ["link", "add", "br0", "type", "bridge", "forward_delay", "0", "stp_state", "0"];
            ip(&[&["-n", name], &bridge[..], &["mcast_snooping", "0"]].concat())?;
            ip(&["-n", name, "link", "set", "uplink", "master", "br0"])?;
            ip(&["-n", name, "link", "set", "br0", "up"])?;
            "br0"
        }
    };
    ip(&["-n", name, "link", "set", "uplink", "up"])?;
    ip(&["-n", name, "addr", "add", address, "dev", holder])
}

/// Takes the switch's port of `name` down or up: nothing passes in either direction while it is down.
pub(crate) fn set_port(name: &str, up: bool) -> anyhow::Result<()> {
    ip(&["link", "set", &port(name), if up { "up" } else { "down" }])
}

/// Bounds the rate at which a plain station sends and gets, as `1gbit`.
pub(crate) fn limit_rate(name: &str, rate: &str) -> anyhow::Result<()> {
    let tbf = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms"];
    run("tc", &[&["-n", name, "qdisc", "replace", "dev", "uplink"], &tbf[..]].concat())?;
    run("tc", &[&["qdisc", "replace", "dev", &port(name)], &tbf[..]].concat())
}

/// Moves the calling thread, and no other, into the namespace `name`. Commands that it runs go there too.
pub(crate) fn enter(name: &str) -> anyhow::Result<()> {
    let path = file(name);
    let space = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("enter the network namespace {name}"))
}

/// Does `work` in the namespace `name`, on a thread of its own, while this one waits where it is.
pub(crate) fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| enter(name).map(|()| work()));
        thread.join().map_err(|_| anyhow!("the thread in {name} stopped"))?
    })
}

/// A command that runs `program` in the namespace `name`, with no input, in a process group of its own.
pub(crate) fn command_in(name: &str, program: &str) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", file(name).display())).arg("--").arg(program);
    command.stdin(Stdio::null()).process_group(0);
    command
}

fn port(name: &str) -> String {
    format!("p-{name}")
}

fn file(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

fn quiet_ipv6(name: Option<&str>) -> anyhow::Result<()> {
    let script = "for f in all default; do f=/proc/sys/net/ipv6/conf/$f/disable_ipv6; \
                  [ ! -e $f ] || echo 1 > $f; done";
    match name {
        None => run("sh", &["-c", script]),
        Some(name) => {
            run("nsenter", &[&format!("--net={}", file(name).display()), "sh", "-c", script])
        }
    }
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    run("ip", args)
}

/// Runs a command to its end; an error has what it said.
pub(crate) fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    // Administration tools live where a user's PATH often does not reach.
    let places = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new(program);
    let output = command.args(args).env("PATH", places).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {program}, which the demo needs"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {} failed: {}", args.join(" "), words.trim());
    }
    Ok(())
}

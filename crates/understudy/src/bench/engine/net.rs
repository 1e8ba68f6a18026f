//! The network of the guests: a bridge with a tap for each of them, and iperf3 serving on the host's side. All of it is
//! in the bench's own namespaces, and gone with them.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use super::side::{HOST_ADDRESS, Side};
use crate::demo::net::run;

const BRIDGE: &str = "bench0";
/// How long a server that cannot serve takes at most to say so.
const SERVER_START: Duration = Duration::from_millis(300);

/// The server, stopped when dropped.
#[derive(Debug)]
pub(in crate::bench) struct Net(Child);

impl Net {
    /// Makes the network for `sides`.
    pub(in crate::bench) fn start(sides: &[Side]) -> anyhow::Result<Self> {
        run("ip", &["link", "set", "lo", "up"])?;
        run(
            "ip",
            &["link", "add", BRIDGE, "type", "bridge", "forward_delay", "0", "stp_state", "0"],
        )?;
        run("ip", &["addr", "add", HOST_ADDRESS, "dev", BRIDGE])?;
        run("ip", &["link", "set", BRIDGE, "up"])?;
        for side in sides {
            let tap = side.tap();
            run("ip", &["tuntap", "add", &tap, "mode", "tap"])?;
            run("ip", &["link", "set", &tap, "master", BRIDGE, "up"])?;
        }
        let mut server = Command::new("iperf3");
        server.arg("-s").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = server.spawn().context("cannot run iperf3 (Debian package iperf3)")?;
        let mut net = Self(server);
        std::thread::sleep(SERVER_START);
        ensure!(net.0.try_wait()?.is_none(), "iperf3 does not serve");
        Ok(net)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // An error means that it ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

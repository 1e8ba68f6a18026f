//! Guests as places for loads: the one that is measured, and a second one beside it.
//!
//! # Place
//! Two replicas of one machine run on two hosts, the bench's both on this computer: there a protected machine shares memory,
//! caches and power with its own secondary. What that costs, and protection does not, shows the neighbour: a second machine
//! like the first one, unprotected, that does the same on the secondary's CPU. When it is not asked to, it has what nobody
//! else wants of that CPU: its kernel's timers, 2 % of it, are no part of a secondary.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::load::{self, Files, Load, Place, Rate};
use super::postgres;
use super::tables::SECONDARY_CPU;
use crate::bench::console::Console;
use crate::bench::stage::Stage;
use crate::demo::lab::{NEIGHBOUR, NEIGHBOUR_ADDRESS};
use crate::demo::net;

/// The host of the neighbour: the one that is neither primary nor secondary.
const HOST: &str = "h3";
/// Longest boot to the neighbour's shell.
const READY_MAX: Duration = Duration::from_secs(120);
/// So long the neighbour is busy before it counts.
const HEAD_START: Duration = Duration::from_millis(500);
/// Its load comes in pieces of this part of the time that is measured: it goes on until its last one is done.
const PIECES: u32 = 3;

/// A guest.
pub(super) struct Guest {
    console: Console,
    address: IpAddr,
    commands: u32,
}

impl Guest {
    /// The machine that is measured.
    pub(super) fn measured(stage: &Stage) -> anyhow::Result<Self> {
        let console = stage.console("understudy: services ready")?;
        let address = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 10));
        Ok(Self { console, address, commands: 0 })
    }
}

impl Place for Guest {
    fn address(&self) -> IpAddr {
        self.address
    }

    fn files(&self) -> Files {
        let [kernels, work, object] = ["/bench/kernels", "/srv/work.c", "/tmp/work.o"];
        Files { kernels: kernels.into(), work: work.into(), object: object.into() }
    }

    fn time(&mut self, command: &str, bound: Duration) -> anyhow::Result<Duration> {
        self.commands += 1;
        let name = format!("c{}", self.commands);
        self.console.type_line(&format!("{name} {command}"))?;
        self.console.wait_for(&format!("understudy: run {name}"), bound)?;
        let begun = Instant::now();
        self.console.wait_for(&format!("understudy: exit 0 {name}"), bound)?;
        Ok(begun.elapsed())
    }
}

/// The second machine.
pub(super) struct Neighbour {
    guest: Guest,
    /// Of its host's daemon.
    process: String,
    /// How much of each load takes the time that is measured.
    amounts: Vec<(Load, u32)>,
}

impl Neighbour {
    /// Boots it.
    pub(super) fn start(stage: &Stage) -> anyhow::Result<Self> {
        stage.lab.start_neighbour(HOST)?;
        let process = stage.lab.daemon_id(HOST)?.to_string();
        net::run("taskset", &["-a", "-c", "-p", SECONDARY_CPU, &process])?;
        let address = IpAddr::V4(Ipv4Addr::from(NEIGHBOUR_ADDRESS));
        postgres::wait_ready_at(SocketAddr::new(address, postgres::PORT), &stage.progress)?;
        let mut console = Console::attach(stage.lab.control(HOST)?, NEIGHBOUR)?;
        console.wait_for("understudy: services ready", READY_MAX)?;
        let guest = Guest { console, address, commands: 0 };
        Ok(Self { guest, process, amounts: Vec::new() })
    }

    /// Prepares a load.
    pub(super) fn warm_up(&mut self, load: Load, seconds: u32) -> anyhow::Result<()> {
        let amount = load::warm_up(load, &mut self.guest, seconds)?;
        self.amounts.push((load, amount));
        Ok(())
    }

    /// Does `work` while the neighbour is busy with `load`.
    pub(super) fn beside(
        &mut self,
        load: Load,
        work: impl FnOnce() -> anyhow::Result<Rate>,
    ) -> anyhow::Result<Rate> {
        let amount = self.amounts.iter().find(|(of, _)| *of == load).map_or(1, |(_, n)| *n);
        let piece = (amount / PIECES).max(1);
        let is_over = AtomicBool::new(false);
        self.schedule("--other")?;
        let guest = &mut self.guest;
        let rate = std::thread::scope(|scope| {
            let busy = scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    load::run(load, guest, piece)?;
                }
                anyhow::Ok(())
            });
            std::thread::sleep(HEAD_START);
            let result = work();
            is_over.store(true, Ordering::Relaxed);
            busy.join().map_err(|_| anyhow!("the neighbour's load stopped"))??;
            result
        });
        self.stand_back()?;
        rate
    }

    /// From here on it takes of its CPU only what is left.
    pub(super) fn stand_back(&self) -> anyhow::Result<()> {
        self.schedule("--idle")
    }

    fn schedule(&self, policy: &str) -> anyhow::Result<()> {
        net::run("chrt", &["--all-tasks", policy, "--pid", "0", &self.process])
    }
}

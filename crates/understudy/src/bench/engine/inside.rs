//! What only the inside of the process can measure: what counting steps costs, and how soon a machine stops that another
//! thread wants to stop.
//!
//! # Invariants
//! - INV-INSIDE-1: the machines whose times are compared run the same guest to the same step, in turn, and end in the same
//!   state.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use guest::GuestFiles;
use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::io::Input;
use machine::{Exit, Machine};
use rustix::time::{ClockId, clock_gettime};

/// Steps that a machine runs: a boot and the beginning of user space.
const STEPS: u64 = 900_000_000;
/// Steps between two looks at the outputs.
const SLICE: u64 = 10_000_000;
/// Stops that are timed.
const STOPS: usize = 400;
/// Ticks for each 2^16 steps: the machine's clock before it is set.
const RATE: u32 = 1 << 11;

fn machine(guest: &GuestFiles, counts_twice: bool) -> anyhow::Result<Machine> {
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let config = MachineConfig {
        harts: 1,
        ram_size: 512 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![7; 64],
    };
    let images = BootImages {
        bios: None,
        kernel: Some(read(&guest.kernel)?.into()),
        initrd: Some(read(&guest.initrd)?.into()),
        append: guest.append.clone(),
    };
    let mut machine = Machine::new(config, images)?;
    machine.set_engine(EngineConfig { counts_twice, ..EngineConfig::new(EngineKind::Jit) });
    ensure!(machine.engine() == EngineKind::Jit, "this host cannot have the JIT");
    Ok(machine)
}

/// Runs on for some steps; time that the guest waits for goes by at once.
fn run_on(machine: &mut Machine, steps: u64) -> anyhow::Result<()> {
    let until = machine.icount() + steps;
    let stop = AtomicBool::new(false);
    while machine.icount() < until {
        match machine.run(until, &stop) {
            Exit::Idle => {
                let mtime = machine.next_timer().context("the guest waits for nothing")?;
                machine.apply(&Input::Clock { mtime, rate: RATE })?;
            }
            Exit::Halted => break,
            Exit::Reached | Exit::Output | Exit::Stopped => {}
            Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
        }
        drop(machine.take_outputs());
    }
    Ok(())
}

/// CPU time of this thread in seconds.
fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// Times with each block's steps counted twice and once, in each of `turns`: what another count adds is what one costs.
pub(super) fn counting(guest: &GuestFiles, turns: u32) -> anyhow::Result<Vec<f64>> {
    let mut ratios = Vec::new();
    for _ in 0..turns.max(3) {
        let (mut once, mut twice) = (machine(guest, false)?, machine(guest, true)?);
        let (mut seconds_once, mut seconds_twice) = (0.0, 0.0);
        while once.icount() < STEPS && once.halted().is_none() {
            let begun = cpu_seconds();
            run_on(&mut once, SLICE)?;
            let between = cpu_seconds();
            run_on(&mut twice, SLICE)?;
            seconds_once += between - begun;
            seconds_twice += cpu_seconds() - between;
        }
        ensure!(once.digest() == twice.digest(), "the machines ended in different states");
        ratios.push(seconds_twice / seconds_once);
    }
    Ok(ratios)
}

/// Microseconds from another thread's wish to the machine's return, while a guest boots.
pub(super) fn stops(guest: &GuestFiles) -> anyhow::Result<Vec<f64>> {
    let mut machine = machine(guest, false)?;
    run_on(&mut machine, STEPS / 3)?;
    let stop = AtomicBool::new(false);
    let wished = AtomicU64::new(0);
    let begun = Instant::now();
    let nanos = || u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut delays = Vec::with_capacity(STOPS);
    let has_ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !has_ended.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(700));
                if !stop.load(Ordering::Acquire) {
                    wished.store(nanos(), Ordering::Release);
                    stop.store(true, Ordering::Release);
                }
            }
        });
        while delays.len() < STOPS {
            let until = machine.icount() + (1 << 40);
            match machine.run(until, &stop) {
                Exit::Stopped => {
                    let delay = nanos().saturating_sub(wished.load(Ordering::Acquire));
                    delays.push(delay as f64 / 1e3);
                    stop.store(false, Ordering::Release);
                }
                Exit::Idle => {
                    let Some(mtime) = machine.next_timer() else { break };
                    if machine.apply(&Input::Clock { mtime, rate: RATE }).is_err() {
                        break;
                    }
                }
                Exit::Halted => break,
                Exit::Reached | Exit::Output => {}
                Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
            }
            drop(machine.take_outputs());
        }
        has_ended.store(true, Ordering::Release);
    });
    ensure!(!delays.is_empty(), "the guest ended before it could be stopped");
    delays.sort_by(f64::total_cmp);
    Ok(delays)
}

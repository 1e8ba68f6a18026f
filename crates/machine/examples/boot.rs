//! Boots a kernel on the bare machine, console to standard output, as fast as guest time allows: for the developer.
#![expect(clippy::disallowed_methods, reason = "settings for the developer")]
#![expect(clippy::disallowed_types, reason = "a person wants to know how long it took")]

use std::io::Write as _;
use std::sync::atomic::AtomicBool;

use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::io::{Input, OutputKind};
use machine::{Exit, Machine};

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn engine_config(kind: EngineKind) -> EngineConfig {
    let mut config = EngineConfig::new(kind);
    config.code_bytes = setting("CODE_BYTES").map_or(config.code_bytes, |n| n as usize);
    config.hot_after = setting("HOT_AFTER").map_or(config.hot_after, |n| n as u8);
    config
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let read = |p: &String| std::fs::read(p).expect("readable file").into();
    let harts = args.get(4).map_or(1, |n| n.parse().expect("number of harts"));
    let bios = args.get(5).filter(|s| !s.is_empty()).map(read);
    let engine = args.get(6).map(|name| name.parse().expect("interpreter or jit"));
    let config = MachineConfig {
        harts,
        ram_size: 1 << 30,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![7; 64],
    };
    let images = BootImages {
        bios,
        kernel: Some(read(&args[1])),
        initrd: args.get(2).filter(|s| !s.is_empty()).map(read),
        append: args.get(3).cloned().unwrap_or_else(|| "earlycon=sbi console=ttyS0".into()),
    };
    let mut m = Machine::new(config, images).expect("bootable");
    if let Some(kind) = engine {
        m.set_engine(engine_config(kind));
    }
    let stop = AtomicBool::new(false);
    let start = std::time::Instant::now();
    let limit = args.get(7).map_or(60_000_000_000, |n| n.parse().expect("number of steps"));
    let every = setting("DIGEST_EVERY").unwrap_or(u64::MAX);
    let mut digest_at = every;
    loop {
        if m.icount() >= digest_at {
            eprintln!("at {} digest {:#x}", m.icount(), m.digest());
            digest_at += every;
        }
        let exit = m.run((m.icount() + 1_000_000).min(limit), &stop);
        for o in m.take_outputs() {
            if let OutputKind::Console { bytes, .. } = o.kind {
                std::io::stdout().write_all(&bytes).expect("stdout");
            }
        }
        std::io::stdout().flush().expect("stdout");
        match exit {
            Exit::Halted => break,
            Exit::Idle => match m.next_timer() {
                Some(t) => m.apply(&Input::Clock { mtime: t, rate: 1 << 11 }).expect("clock"),
                None => break,
            },
            Exit::Reached if m.icount() >= limit => break,
            Exit::Reached | Exit::Output | Exit::Stopped => {}
            Exit::Breakpoint { .. } | Exit::Watchpoint { .. } => {}
        }
    }
    let s = start.elapsed().as_secs_f64();
    let digest = m.digest();
    eprintln!(
        "{:?}: {} steps in {s:.2} s, {:.0} MIPS, digest {:#x}",
        m.halted(),
        m.icount(),
        m.icount() as f64 / s / 1e6,
        digest
    );
    eprintln!("{} {:?}", m.engine(), m.engine_stats());
    for h in m.harts() {
        eprintln!(
            "hart {} pc {:#x} {:?} cause {:#x} tval {:#x} epc {:#x}",
            h.id, h.pc, h.mode, h.csr.scause, h.csr.stval, h.csr.sepc
        );
    }
}

//! Runs a guest on both engines side by side and says where their states first differ: for the developer.
//!
//! `twin KERNEL INITRD APPEND FROM EVERY LIMIT [HOT]`: digests are compared from step FROM on, every EVERY steps.

use std::sync::atomic::AtomicBool;

use machine::config::{BootImages, MachineConfig};
use machine::engine::{EngineConfig, EngineKind};
use machine::io::Input;
use machine::{Exit, Machine};

fn run_to(m: &mut Machine, until: u64) {
    let stop = AtomicBool::new(false);
    while m.icount() < until {
        let next = ((m.icount() / 1_000_000 + 1) * 1_000_000).min(until);
        if m.run(next, &stop) == Exit::Idle {
            let mtime = m.next_timer().expect("a guest that waits for nothing");
            m.apply(&Input::Clock { mtime, rate: 1 << 11 }).expect("clock");
        }
        drop(m.take_outputs());
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |i: usize| args[i].replace('_', "").parse::<u64>().expect("a number");
    let config = MachineConfig {
        harts: 1,
        ram_size: 1 << 30,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![7; 64],
    };
    let read = |p: &String| std::fs::read(p).expect("readable file").into();
    let images = BootImages {
        bios: None,
        kernel: Some(read(&args[1])),
        initrd: Some(read(&args[2])),
        append: args[3].clone(),
    };
    let machine = |kind| {
        let mut m = Machine::new(config.clone(), images.clone()).expect("bootable");
        let mut engine = EngineConfig::new(kind);
        if args.len() > 7 {
            engine.hot_after = number(7) as u8;
        }
        m.set_engine(engine);
        m
    };
    let (mut jit, mut reference) = (machine(EngineKind::Jit), machine(EngineKind::Interpreter));
    let (mut at, every, limit) = (number(4), number(5), number(6));
    let mut same_at = 0;
    while at <= limit {
        run_to(&mut jit, at);
        run_to(&mut reference, at);
        if jit.digest() != reference.digest() {
            println!("differ at {at}, same at {same_at}");
            let (a, b) = (&jit.harts()[0], &reference.harts()[0]);
            println!("pc {:#x} {:#x} mode {:?} {:?}", a.pc, b.pc, a.mode, b.mode);
            for i in (0..32).filter(|&i| a.x[i] != b.x[i]) {
                println!("x{i} {:#x} {:#x}", a.x[i], b.x[i]);
            }
            for i in (0..32).filter(|&i| a.f[i] != b.f[i]) {
                println!("f{i} {:#x} {:#x}", a.f[i], b.f[i]);
            }
            if a.csr != b.csr {
                println!("{:x?}\n{:x?}", a.csr, b.csr);
            }
            for (i, (a, b)) in
                jit.ram().bytes().chunks(8).zip(reference.ram().bytes().chunks(8)).enumerate()
            {
                if a != b {
                    println!("gpa {:#x} {a:02x?} {b:02x?}", 0x8000_0000 + i * 8);
                }
            }
            std::process::exit(1);
        }
        same_at = at;
        at += every;
    }
    println!("no difference");
}

//! What a debugger does to a machine: going back, breakpoints, watchpoints. The programs are those of the comparison of the
//! engines, and a machine that a debugger looks at has to be the one that nobody looks at, step for step.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../qemu_oracle/asm.rs"]
mod asm;
mod breakpoints;
#[path = "../qemu_oracle/case.rs"]
mod case;
#[expect(dead_code, reason = "shared with qemu_oracle, which uses all of it")]
#[path = "../qemu_oracle/exceptions.rs"]
mod exceptions;
#[expect(dead_code, reason = "shared with engines, which uses all of it")]
#[path = "../engines/fuzz/mod.rs"]
mod fuzz;
#[path = "../qemu_oracle/paging.rs"]
mod paging;
#[path = "../qemu_oracle/payload.rs"]
mod payload;
#[path = "../qemu_oracle/privileged.rs"]
mod privileged;
mod rewind;
#[path = "../qemu_oracle/rng.rs"]
mod rng;
mod translation;
#[path = "../qemu_oracle/user.rs"]
mod user;
mod watchpoints;

use fuzz::cases::Cases;
use fuzz::check::Guest;
use fuzz::program::Program;
use fuzz::theme::THEMES;
use machine::Machine;
use machine::engine::{EngineConfig, EngineKind};
use machine::io::Input;
use rng::Rng;

/// Either engine; should it be the JIT, one that translates early and may have room for little.
fn engine(rng: &mut Rng) -> EngineConfig {
    if rng.one_in(3) {
        return EngineConfig::new(EngineKind::Interpreter);
    }
    let code_bytes = rng.pick(&[32 << 20, 1 << 20, 64 << 10]);
    EngineConfig { hot_after: rng.below(4) as u8, code_bytes, ..EngineConfig::new(EngineKind::Jit) }
}

/// Programs of every theme, and the cases of the comparison with QEMU.
fn guests(each: u64) -> impl Iterator<Item = Box<dyn Guest>> {
    let programs = THEMES.iter().flat_map(move |theme| {
        (1..=each).map(move |seed| Box::new(Program::new(theme, seed)) as Box<dyn Guest>)
    });
    programs.chain((1..=each).map(|seed| Box::new(Cases::new(seed)) as Box<dyn Guest>))
}

/// Something from outside, the same for the same number.
fn input(guest: &dyn Guest, m: &mut Machine, number: u64) {
    let mut rng = Rng::new(guest.seed() ^ number << 20);
    rng.next();
    match rng.below(6) {
        0 => {
            let (mtime, rate) =
                (m.mtime() + rng.below(300), rng.pick(&[1 << 11, 1 << 14, 1 << 16]));
            m.apply(&Input::Clock { mtime, rate }).unwrap();
        }
        1 => {
            let bytes = vec![rng.bits(7) as u8; 1 + rng.below(3) as usize];
            m.apply(&Input::Console { dev: 0, bytes }).unwrap();
        }
        2 => guest.restart(m, &mut rng),
        _ => {}
    }
}

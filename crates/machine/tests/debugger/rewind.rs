//! Going back: whatever a machine did, its undo log takes it back to where it was, and from there it does the same again.

use machine::engine::{EngineConfig, EngineKind};
use machine::hart::{Mode, cause};
use machine::ram::{RAM_BASE, SnapshotPage};
use machine::{Machine, MachineSaved};

use crate::asm::{jal, ld};
use crate::fuzz::check::{Guest, run_to};
use crate::rng::Rng;
use crate::{engine, guests, input};

/// Stations of a run.
const STATIONS: usize = 12;

/// Where the machine was, and what was undone to come there from the next station.
struct Station {
    saved: MachineSaved,
    digest: u64,
    /// What the pages written behind it held.
    undo: Vec<SnapshotPage>,
}

struct Run<'a> {
    guest: &'a dyn Guest,
    m: Machine,
    rng: Rng,
    stations: Vec<Station>,
}

impl<'a> Run<'a> {
    fn new(guest: &'a dyn Guest) -> Self {
        let mut rng = Rng::new(guest.seed() ^ 0xdeb_0000);
        let mut m = guest.machine(engine(&mut rng));
        m.ram_mut().begin_undo();
        Self { guest, m, rng, stations: vec![] }
    }

    /// The state here; what was written since the last station is that one's.
    fn arrive(&mut self) {
        let station = self.here();
        self.stations.push(station);
    }

    fn here(&mut self) -> Station {
        let (saved, digest) = (self.m.save(), self.m.digest());
        let undo = self.m.ram_mut().take_undo();
        if let Some(last) = self.stations.last_mut() {
            last.undo = undo;
        }
        Station { saved, digest, undo: vec![] }
    }

    /// From a station on to an icount, in slices and with digests between them.
    fn forward(&mut self, station: usize, until: u64) {
        input(self.guest, &mut self.m, station as u64);
        while self.m.icount() < until {
            let to = (self.m.icount() + 1 + self.rng.below(3000)).min(until);
            if !run_to(&mut self.m, to) {
                break;
            }
            if self.rng.one_in(8) {
                self.m.digest();
            }
        }
    }

    /// To a station from somewhere behind it.
    fn back_to(&mut self, station: usize) {
        let mut pages = self.m.ram_mut().take_undo();
        for left in self.stations.drain(station + 1..).rev() {
            pages.extend(left.undo);
        }
        let s = self.stations.last_mut().unwrap();
        pages.extend(std::mem::take(&mut s.undo));
        self.m.rewind(&s.saved, &pages).unwrap();
        self.check(station);
    }

    fn check(&mut self, station: usize) {
        let s = &self.stations[station];
        assert_eq!(self.m.save(), s.saved, "{} {}", self.guest.name(), self.guest.seed());
        assert_eq!(self.m.digest(), s.digest, "{} {}", self.guest.name(), self.guest.seed());
        assert!(self.m.take_outputs().is_empty());
    }
}

/// Forward through all stations, and back in leaps, going forth again now and then.
fn there_and_back(guest: &dyn Guest) {
    let mut run = Run::new(guest);
    run.arrive();
    let mut ends = vec![];
    for station in 0..STATIONS {
        let length = if run.rng.one_in(3) { 1 + run.rng.below(8) } else { run.rng.below(9000) };
        let until = run.m.icount() + length;
        run.forward(station, until);
        run.arrive();
        ends.push((
            until,
            run.stations[station + 1].saved.clone(),
            run.stations[station + 1].digest,
        ));
    }
    let mut at = STATIONS;
    while at > 0 {
        // From within a stretch, too.
        if at < STATIONS && run.rng.one_in(3) {
            let until = run.m.icount() + run.rng.below(500);
            run.forward(at, until.min(ends[at].0));
        }
        at = at.saturating_sub(run.rng.below(3) as usize);
        run.back_to(at);
        while at < STATIONS && run.rng.one_in(3) {
            run.forward(at, ends[at].0);
            at += 1;
            run.m.take_outputs();
            run.arrive();
            let (_, saved, digest) = &ends[at - 1];
            assert_eq!(run.stations[at].saved, *saved, "{} {}", guest.name(), guest.seed());
            assert_eq!(run.stations[at].digest, *digest, "{} {}", guest.name(), guest.seed());
        }
    }
    run.back_to(0);
}

#[test]
fn machine_is_taken_back_to_every_station_and_goes_on_as_before() {
    for guest in guests(20) {
        there_and_back(&*guest);
    }
}

#[test]
fn state_of_another_machine_is_refused_and_changes_nothing() {
    let guest = guests(1).next().unwrap();
    let mut m = guest.machine(engine(&mut Rng::new(1)));
    run_to(&mut m, 1000);
    let (saved, digest) = (m.save(), m.digest());
    let mut of_model = saved.clone();
    of_model.model += 1;
    let mut of_config = saved.clone();
    of_config.config.ram_size *= 2;
    let mut of_harts = saved.clone();
    of_harts.harts.clear();
    for wrong in [of_model, of_config, of_harts] {
        assert!(m.rewind(&wrong, &[]).is_err());
    }
    let beyond = SnapshotPage { page: m.ram().pages(), data: None };
    let short = SnapshotPage { page: 0, data: Some(vec![1].into()) };
    for wrong in [beyond, short] {
        assert!(m.rewind(&saved, &[wrong]).is_err());
    }
    assert_eq!((m.save(), m.digest()), (saved, digest));
}

/// What a translation rests on beside page tables is not what is in memory.
#[test]
fn no_translation_outlives_the_permissions_that_it_was_made_with() {
    for kind in [EngineKind::Interpreter, EngineKind::Jit] {
        let mut m = guests(1).next().unwrap().machine(EngineConfig::new(kind));
        let load: Vec<u8> =
            [ld(5, 6, 0), jal(0, -4)].into_iter().flat_map(u32::to_le_bytes).collect();
        m.ram_mut().write(RAM_BASE, &load).unwrap();
        let hart = &mut m.harts_mut()[0];
        (hart.pc, hart.mode, hart.x[6]) = (RAM_BASE, Mode::User, RAM_BASE + 0x10_0000);
        hart.csr.mie = 0;
        hart.csr.mtvec = RAM_BASE + 0x2000;
        let open = hart.pmp.clone();
        // The first 16 KiB alone.
        hart.pmp.write_addr(1, RAM_BASE >> 2 | 0x7ff);
        let before = m.save();
        m.harts_mut()[0].pmp = open;
        run_to(&mut m, before.icount + 500);
        assert_eq!(m.mode(0), Some(Mode::User));
        m.rewind(&before, &[]).unwrap();
        run_to(&mut m, before.icount + 1);
        let hart = &m.harts()[0];
        assert_eq!((hart.mode, hart.csr.mcause), (Mode::Machine, cause::LOAD_ACCESS), "{kind}");
    }
}

#[test]
fn arming_costs_time_in_no_proportion_to_bytes() {
    // 4 GiB: a pass over its bytes, or an undo log of them, would take seconds a time.
    let mut ram = machine::ram::GuestRam::new(4 << 30);
    let mut base = None;
    for round in 0..200 {
        ram.write(RAM_BASE + (round << 20), &[1]).unwrap();
        base = Some(ram.arm_snapshot(base));
        ram.begin_undo();
        assert!(ram.take_undo().is_empty());
        ram.end_undo();
    }
}

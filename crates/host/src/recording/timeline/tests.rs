//! A machine that goes to and fro is everywhere the one that only ran forward.

use std::time::Duration;

use machine::config::{BootImages, MachineConfig};

use super::super::{About, RecordOptions, Recorder};
use super::*;

const CODE: u64 = 0x8000_0000;
const LAST: u64 = 60_000;

/// Two harts that count, each in its own register and its own part of memory:
/// `csrr t2,mhartid; slli t2,t2,16; lui t1,0x80100; (zext) add t1,t1,t2; 1: addi t0,t0,1; sd t0,0(t1); addi t1,t1,8; j 1b`.
fn machine() -> Machine {
    let words = [
        0xf140_23f3u32,
        0x0103_9393,
        0x4010_0313,
        0x0153_1313,
        0x0073_0333,
        0x0012_8293,
        0x0053_3023,
        0x0083_0313,
        0xff5f_f06f,
    ];
    let code = words.map(u32::to_le_bytes).concat();
    let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
    let config = MachineConfig {
        harts: 2,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 5,
        rng_seed: vec![1, 2, 3],
    };
    Machine::new(config, images).unwrap()
}

fn record(dir: &Path) {
    let mut machine = machine();
    let options = RecordOptions {
        dir: dir.to_owned(),
        limit: super::super::RecordLimit::default(),
        snapshot_interval: Duration::ZERO,
        about: About::default(),
    };
    let mut recorder = Recorder::start(options, &mut machine).unwrap();
    for at in (1000..=LAST).step_by(1000) {
        while machine.icount() < at {
            machine.run(at, &AtomicBool::new(false));
        }
        for input in [
            Input::Clock { mtime: at, rate: 6 },
            Input::Console { dev: 0, bytes: vec![at as u8; 3] },
        ] {
            machine.apply(&input).unwrap();
            recorder.input(at, &input);
        }
        if at % 5000 == 0 {
            recorder.digest(at, machine.digest());
        }
        recorder.mark(at);
    }
    recorder.finish(&mut machine);
}

/// Digests before the records of each of these steps, of a machine that only runs forward.
fn digests(dir: &Path, steps: &BTreeSet<u64>) -> BTreeMap<u64, u64> {
    let recording = Arc::new(RecordingDir::open(dir).unwrap());
    let mut player = Player::open(&recording, 0, Some(EngineKind::Interpreter)).unwrap();
    let mut all = BTreeMap::new();
    for &step in steps {
        let ran = player.run(step, &AtomicBool::new(false), &mut Console::default());
        assert_eq!(ran, Ran::Reached);
        all.insert(step, player.machine_mut().digest());
    }
    all
}

/// Numbers that look random, the same each time.
fn numbers(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    })
}

#[test]
fn every_way_to_a_step_leads_to_the_same_machine() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir);
    let steps: Vec<u64> = numbers(1).take(120).map(|n| n % LAST).collect();
    let expected = digests(&dir, &steps.iter().copied().collect());
    let never = AtomicBool::new(false);
    for engine in [None, Some(EngineKind::Interpreter)] {
        let mut timeline = Timeline::open(&dir, engine).unwrap();
        assert_eq!((timeline.first(), timeline.last()), (0, LAST));
        for &step in &steps {
            assert_eq!(timeline.goto(step, &never), Stop::Reached);
            assert_eq!((timeline.icount(), timeline.digest()), (step, expected[&step]));
        }
        assert!(timeline.checkpoints().len() < 60, "{}", timeline.checkpoints().len());
    }
}

#[test]
fn step_of_a_snapshot_is_before_its_records() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut machine = machine();
    let limit = super::super::RecordLimit { bytes: Some(64 << 10), time: None };
    let (snapshot_interval, about) = (Duration::ZERO, About::default());
    let options = RecordOptions { dir: dir.clone(), limit, snapshot_interval, about };
    let mut recorder = Recorder::start(options, &mut machine).unwrap();
    for at in [1000, 2000] {
        while machine.icount() < at {
            machine.run(at, &AtomicBool::new(false));
        }
        let inputs = (1..=20).map(|byte| Input::Console { dev: 0, bytes: vec![byte; 1000] });
        for input in inputs.chain([Input::Clock { mtime: 7 * at, rate: 6 }]) {
            machine.apply(&input).unwrap();
            recorder.input(at, &input);
        }
        recorder.mark(at);
        if at == 1000 {
            assert!(recorder.pump(&mut machine), "a segment begins behind these records");
        }
    }
    recorder.finish(&mut machine);
    let recording = Arc::new(RecordingDir::open(&dir).unwrap());
    assert_eq!(recording.start_steps(), [0, 1000]);
    let expected = digests(&dir, &BTreeSet::from([1000]))[&1000];
    let mut timeline = Timeline::open(&dir, None).unwrap();
    // As a jump over many steps does.
    timeline.player = Player::open(&recording, 1500, None).unwrap();
    timeline.begin();
    assert_eq!(timeline.icount(), 1000);
    assert_ne!(timeline.digest(), expected);
    let never = AtomicBool::new(false);
    assert_eq!(timeline.goto(1500, &never), Stop::Reached);
    assert_eq!(timeline.goto(1000, &never), Stop::Reached);
    assert_eq!((timeline.icount(), timeline.digest()), (1000, expected));
}

#[test]
fn breakpoint_that_was_left_is_come_back_to() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir);
    let never = AtomicBool::new(false);
    let mut timeline = Timeline::open(&dir, None).unwrap();
    // The log has records for this step, so that each run of the machine ends there.
    timeline.goto(5000, &never);
    let before = timeline.machine().harts().to_vec();
    timeline.goto(5001, &never);
    let runs = |(a, b): &(&machine::hart::Hart, &machine::hart::Hart)| a.steps != b.steps;
    let (hart, _) = before.iter().zip(timeline.machine().harts()).find(runs).unwrap();
    timeline.set_breakpoints(BTreeSet::from([hart.pc]));
    timeline.goto(5000, &never);
    assert!(matches!(timeline.resume(None, &never), Stop::Breakpoint { .. }));
    assert!(timeline.icount() > 5000);
    assert!(matches!(timeline.reverse_resume(&never), Stop::Breakpoint { .. }));
    assert_eq!(timeline.icount(), 5000);
}

#[test]
fn steps_back_undo_steps_on_for_each_hart() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir);
    let never = AtomicBool::new(false);
    let mut timeline = Timeline::open(&dir, None).unwrap();
    for (n, start) in numbers(7).take(40).enumerate() {
        let hart = n % 2;
        timeline.goto(start % (LAST - 20_000) + 100, &never);
        // Just before a step of that hart, where a step on and a step back meet.
        assert_eq!(timeline.step(hart, &never), Stop::Done { hart });
        assert_eq!(timeline.reverse_step(hart, &never), Stop::Done { hart });
        let (icount, digest) = (timeline.icount(), timeline.digest());
        let steps = timeline.steps_of(hart);
        assert_eq!(timeline.step(hart, &never), Stop::Done { hart });
        assert_eq!((timeline.icount(), timeline.steps_of(hart)), (icount + 1, steps + 1));
        assert_eq!(timeline.reverse_step(hart, &never), Stop::Done { hart });
        assert_eq!((timeline.icount(), timeline.digest()), (icount, digest));
    }
    timeline.goto(1, &never);
    assert_eq!(timeline.reverse_step(0, &never), Stop::Done { hart: 0 });
    assert_eq!((timeline.icount(), timeline.reverse_step(0, &never)), (0, Stop::Begin));
}

#[test]
fn breakpoints_are_met_on_the_way_back_where_they_were_on_the_way_on() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir);
    let never = AtomicBool::new(false);
    let mut timeline = Timeline::open(&dir, None).unwrap();
    timeline.goto(30_000, &never);
    timeline.set_breakpoints(BTreeSet::from([CODE + 0x18]));
    let mut stations = Vec::new();
    for _ in 0..50 {
        let stop = timeline.resume(None, &never);
        let Stop::Breakpoint { hart } = stop else { panic!("{stop:?}") };
        assert_eq!(timeline.machine().harts()[hart].pc, CODE + 0x18);
        stations.push((timeline.icount(), stop, timeline.digest()));
    }
    timeline.step(0, &never);
    for (icount, stop, digest) in stations.into_iter().rev() {
        assert_eq!(timeline.reverse_resume(&never), stop);
        assert_eq!((timeline.icount(), timeline.digest()), (icount, digest));
    }
    timeline.set_breakpoints(BTreeSet::new());
    assert_eq!((timeline.reverse_resume(&never), timeline.icount()), (Stop::Begin, 0));
    assert!(matches!(timeline.resume(None, &never), Stop::End { how: ReplayEnd::Whole }));
    assert_eq!(timeline.icount(), LAST);
}

#[test]
fn last_write_to_watched_memory_is_found() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir);
    let never = AtomicBool::new(false);
    let mut timeline = Timeline::open(&dir, None).unwrap();
    let va = 0x8020_0000 + 0x1000;
    timeline.set_watchpoints(vec![Watch { hart: Some(0), va, len: 8, kind: WatchKind::Write }]);
    timeline.goto(50_000, &never);
    let value = timeline.machine().ram().read_u64(va).unwrap();
    assert_ne!(value, 0);
    let stop = timeline.reverse_resume(&never);
    let before = timeline.icount();
    assert_eq!(stop, Stop::Watchpoint { hart: 0, va, kind: WatchKind::Write, before });
    assert_eq!(timeline.machine().ram().read_u64(va).unwrap(), 0);
    assert_eq!(timeline.machine().harts()[0].pc, CODE + 0x18);
    let icount = timeline.icount();
    assert_eq!(timeline.resume(None, &never), stop);
    assert_eq!(timeline.icount(), icount + 1);
    assert_eq!(timeline.machine().ram().read_u64(va).unwrap(), value);
    assert_eq!((timeline.reverse_resume(&never), timeline.icount()), (stop, icount));
    assert_eq!(timeline.reverse_resume(&never), Stop::Begin);
}

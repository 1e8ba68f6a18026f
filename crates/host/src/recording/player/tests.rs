//! Recordings of small machines, replayed whole, cut off, damaged and in parts.

use std::fs;
use std::time::Duration;

use machine::config::BootImages;
use machine::config::MachineConfig;
use machine::io::Input;

use super::super::start::{IMAGE_FILES, MACHINE_FILE};
use super::super::{About, RecordLimit, RecordOptions, Recorder};
use super::*;

const PLAIN: ReplayOptions =
    ReplayOptions { slice: u64::MAX, drop_caches_every: None, engine: None, until: None };

/// Counts, for ever.
fn counting_machine() -> Machine {
    let code = [0x0012_8293u32, 0xffdf_f06f].map(u32::to_le_bytes).concat();
    let config = MachineConfig {
        harts: 1,
        ram_size: 32 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 5,
        rng_seed: vec![1, 2, 3],
    };
    let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
    Machine::new(config, images).unwrap()
}

fn run_to(machine: &mut Machine, until: u64) {
    assert_eq!(machine.run(until, &AtomicBool::new(false)), Exit::Reached);
}

fn options(dir: &Path, limit: RecordLimit) -> RecordOptions {
    let about = About { vm: "counter".to_owned(), ..About::default() };
    RecordOptions { dir: dir.to_owned(), limit, snapshot_interval: Duration::ZERO, about }
}

/// Records inputs at 1000 and 2000 and digests after them; the one at 2000 is changed by `error`.
fn record(dir: &Path, error: u64) {
    let mut machine = counting_machine();
    let mut recording =
        Recorder::start(options(dir, RecordLimit::default()), &mut machine).unwrap();
    for at in [1000, 2000] {
        run_to(&mut machine, at);
        let input = Input::Console { dev: 0, bytes: b"typed".to_vec() };
        machine.apply(&input).unwrap();
        recording.input(at, &input);
        let wrong = if at == 2000 { error } else { 0 };
        recording.digest(at, machine.digest() ^ wrong);
        recording.mark(at);
    }
    run_to(&mut machine, 3000);
    recording.finish(&mut machine);
    assert!(!recording.is_on());
}

fn first_log(dir: &Path) -> std::path::PathBuf {
    dir.join("log-00000000000000000000")
}

fn again(dir: &Path, options: ReplayOptions) -> Replayed {
    replay(dir, options, |_| {}).unwrap()
}

#[test]
fn recording_replays_whole_whatever_the_slices() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir, 0);
    for slice in [1, 7, 1024, u64::MAX] {
        for drop_caches_every in [None, Some(1), Some(333)] {
            for engine in [None, Some(EngineKind::Interpreter)] {
                let all =
                    again(&dir, ReplayOptions { slice, drop_caches_every, engine, until: None });
                assert_eq!((all.icount, all.records, all.digests), (3000, 8, 3));
                assert_eq!(all.end, Some(ReplayEnd::Whole));
                assert!(engine.is_none_or(|engine| all.engine.kind == engine));
            }
        }
    }
}

#[test]
fn digest_that_differs_is_divergence_where_it_stands() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir, 1);
    let part = again(&dir, PLAIN);
    assert_eq!((part.icount, part.digests), (2000, 1));
    assert!(matches!(part.end, Some(ReplayEnd::Diverged { icount: 2000, .. })), "{:?}", part.end);
}

#[test]
fn log_cut_or_changed_anywhere_is_reported_and_never_taken_for_whole() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir, 0);
    let path = first_log(&dir);
    let log = fs::read(&path).unwrap();
    for at in 0..log.len() {
        fs::write(&path, &log[..at]).unwrap();
        let cut = again(&dir, PLAIN);
        assert!(
            matches!(cut.end, Some(ReplayEnd::Truncated { offset, .. }) if offset <= at as u64),
            "{:?}",
            cut.end
        );
        let mut bytes = log.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        let changed = again(&dir, PLAIN);
        let is_found =
            matches!(changed.end, Some(ReplayEnd::Corrupt { .. } | ReplayEnd::Truncated { .. }));
        assert!(is_found, "byte {at}: {:?}", changed.end);
        assert!(cut.icount <= 3000 && changed.icount <= 3000);
    }
}

#[test]
fn what_is_no_recording_is_refused_with_the_file_that_is_wrong() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let refusal = || crate::one_line::one_line(&replay(&dir, PLAIN, |_| {}).unwrap_err());
    assert!(refusal().contains("recording/machine"), "{}", refusal());
    record(&dir, 0);
    let (path, bios) = (dir.join(MACHINE_FILE), dir.join(IMAGE_FILES[0]));
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(refusal().contains("recording/machine: it "), "byte {at}: {}", refusal());
    }
    fs::write(&path, &good).unwrap();
    fs::write(&bios, b"another").unwrap();
    assert!(refusal().contains("recording/bios is not what"), "{}", refusal());
    fs::remove_file(&bios).unwrap();
    assert!(
        refusal().contains("cannot read") && refusal().contains("recording/bios"),
        "{}",
        refusal()
    );
}

#[test]
fn directory_in_use_is_left_alone_and_a_failed_start_leaves_nothing() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let start =
        |dir: &Path| Recorder::start(options(dir, RecordLimit::default()), &mut counting_machine());
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("mine"), b"mine").unwrap();
    assert!(start(&dir).unwrap_err().to_string().ends_with("it is not empty"));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    assert!(start(&dir.join("no/such")).is_err());
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 1);
}

fn seconds(seconds: u64) -> RecordLimit {
    RecordLimit { time: Some(Duration::from_secs(seconds)), bytes: None }
}

/// A recording of 20,000 steps in segments of some 1,000, of a machine that writes to memory; with the digest at its end.
fn record_segments(dir: &Path, limit: RecordLimit, from: u64) -> u64 {
    let mut machine = storing_machine();
    run_to(&mut machine, from);
    let mut recorder = Recorder::start(options(dir, limit), &mut machine).unwrap();
    for step in 1..=20 {
        let until = from + step * 1000;
        if step % 4 == 0 && limit == seconds(2) {
            // Longer than the shortest segment that a limit of this time makes.
            std::thread::sleep(Duration::from_millis(1050));
        }
        if limit.bytes.is_some_and(|bytes| bytes < 1 << 20) {
            // The writer of a snapshot gets time to end.
            std::thread::sleep(Duration::from_millis(20));
        }
        while recorder.pump(&mut machine) {}
        run_to(&mut machine, until);
        let input = Input::Console { dev: 0, bytes: vec![step as u8; 50] };
        machine.apply(&input).unwrap();
        recorder.input(until, &input);
        recorder.digest(until, machine.digest());
        recorder.mark(until);
    }
    recorder.finish(&mut machine);
    machine.digest()
}

/// Writes what it counts to memory, each time 8 bytes on: `1: addi t0,t0,1; sd t0,0(t1); addi t1,t1,64; j 1b`.
fn storing_machine() -> Machine {
    let code = [0x8000_1337u32, 0x0012_8293, 0x0053_3023, 0x0403_0313, 0xff5f_f06f];
    let code = code.map(u32::to_le_bytes).concat();
    let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
    let config = counting_machine().config().clone();
    let mut machine = Machine::new(config, images).unwrap();
    // What lui made of it is sign-extended.
    run_to(&mut machine, 1);
    machine.harts_mut()[0].x[6] = 0x8010_0000;
    machine
}

#[test]
fn segments_replay_whole_from_the_beginning_and_from_each_snapshot() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let digest = record_segments(&dir, RecordLimit { bytes: Some(1 << 30), time: None }, 5000);
    let recording = Arc::new(RecordingDir::open(&dir).unwrap());
    assert_eq!(recording.start_steps(), [5000]);
    let whole = again(&dir, PLAIN);
    assert_eq!((whole.from, whole.icount, whole.end), (5000, 25_000, Some(ReplayEnd::Whole)));

    let dir = work.path().join("small");
    let small = RecordLimit { bytes: Some(1500), time: Some(Duration::from_secs(3600)) };
    assert_eq!(record_segments(&dir, small, 5000), digest);
    let steps = RecordingDir::open(&dir).unwrap().start_steps();
    assert!(steps[0] > 5000, "{steps:?}");
    let rest = again(&dir, PLAIN);
    assert_eq!((rest.from, rest.icount, rest.end), (steps[0], 25_000, Some(ReplayEnd::Whole)));

    let dir = work.path().join("limited");
    let limited = record_segments(&dir, seconds(3600), 5000);
    assert_eq!(limited, digest);
    let dir = work.path().join("short");
    record_segments(&dir, seconds(2), 5000);
    let recording = Arc::new(RecordingDir::open(&dir).unwrap());
    let steps = recording.start_steps();
    assert!(steps.len() >= 2 && steps[0] > 5000, "{steps:?}");
    for at in steps {
        for engine in [None, Some(EngineKind::Interpreter)] {
            let player = Player::open(&recording, at + 1, engine).unwrap();
            assert_eq!(player.icount(), at);
            let (part, mut player) = play(player, PLAIN, &mut UartOnly(|_: &[u8]| {}));
            assert_eq!((part.icount, part.end), (25_000, Some(ReplayEnd::Whole)));
            assert_eq!(player.machine_mut().digest(), digest);
        }
    }
}

#[test]
fn replay_stops_at_a_step_before_its_records_and_goes_on() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir, 0);
    let recording = Arc::new(RecordingDir::open(&dir).unwrap());
    let player = Player::open(&recording, 0, None).unwrap();
    let until = |until| ReplayOptions { until: Some(until), ..PLAIN };
    let quiet = &mut UartOnly(|_: &[u8]| {});
    let (part, player) = play(player, until(1000), quiet);
    assert_eq!((part.icount, part.records, part.end), (1000, 0, None));
    let (part, player) = play(player, until(1001), quiet);
    assert_eq!((part.icount, part.records, part.digests), (1001, 3, 1));
    let (whole, _) = play(player, PLAIN, quiet);
    assert_eq!((whole.icount, whole.records, whole.end), (3000, 8, Some(ReplayEnd::Whole)));
}

#[test]
fn segment_that_is_missing_or_of_another_recording_is_named() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record_segments(&dir, seconds(2), 5000);
    let recording = RecordingDir::open(&dir).unwrap();
    let segments: Vec<_> = recording.segments().iter().map(|s| s.path.clone()).collect();
    let last = segments.last().unwrap();
    let bytes = fs::read(last).unwrap();
    fs::remove_file(last).unwrap();
    let cut = again(&dir, PLAIN);
    let end = ReplayEnd::Truncated { path: last.clone(), offset: 0 };
    assert!(cut.icount < 25_000 && cut.end == Some(end), "{:?}", cut.end);
    let mut other = bytes;
    other[20] ^= 1;
    fs::write(last, &other).unwrap();
    let damaged = again(&dir, PLAIN).end.unwrap();
    let name = last.file_name().unwrap().to_str().unwrap().to_owned();
    assert!(damaged.to_string().contains(&name), "{damaged}");
    let problems = RecordingDir::open(&dir).unwrap();
    assert!(
        matches!(problems.problems(), [one] if one.contains(&name)),
        "{:?}",
        problems.problems()
    );
    // The snapshot that the oldest segment begins with is what everything builds on.
    fs::remove_file(&recording.snapshots()[0].path).unwrap();
    let left = RecordingDir::open(&dir).unwrap();
    assert!(left.start_steps().len() < recording.start_steps().len());
}

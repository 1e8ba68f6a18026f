//! Recordings that end early, and those that never end.

use machine::config::{BootImages, MachineConfig};
use machine::machine::Exit;

use super::super::RecordingDir;
use super::*;

/// Writes what it counts to memory, each time 64 bytes on: `1: addi t0,t0,1; sd t0,0(t1); addi t1,t1,64; j 1b`.
fn machine() -> Machine {
    let code = [0x8000_1337u32, 0x0012_8293, 0x0053_3023, 0x0403_0313, 0xff5f_f06f];
    let code = code.map(u32::to_le_bytes).concat();
    let images = BootImages { bios: Some(code.into()), ..BootImages::default() };
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
    Machine::new(config, images).unwrap()
}

fn run_on(machine: &mut Machine) -> u64 {
    let until = machine.icount() + 1000;
    let never = std::sync::atomic::AtomicBool::new(false);
    assert_eq!(machine.run(until, &never), Exit::Reached);
    until
}

fn start(dir: &Path, machine: &mut Machine) -> Recorder {
    let limit = RecordLimit::default();
    let (dir, about) = (dir.to_owned(), About::default());
    let options = RecordOptions { dir, limit, snapshot_interval: Duration::ZERO, about };
    Recorder::start(options, machine).unwrap()
}

#[test]
fn recording_that_ends_amid_a_snapshot_leaves_memory_free_for_others() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut machine = machine();
    let mut recorder = start(&dir, &mut machine);
    let at = run_on(&mut machine);
    recorder.mark(at);
    // The next segment cannot be begun.
    fs::write(dir.join(segment_name(at)), b"").unwrap();
    let active = recorder.0.as_mut().unwrap();
    active.rotate(at).unwrap();
    active.begin_snapshot(&mut machine).unwrap();
    assert!(!Sweep::is_free(&machine));
    let began = Instant::now();
    while !recorder.0.as_ref().unwrap().is_over {
        assert!(began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
        recorder.mark(run_on(&mut machine));
    }
    assert!(!recorder.pump(&mut machine) && !recorder.is_on());
    assert!(Sweep::is_free(&machine));
}

#[test]
fn each_snapshot_of_a_long_recording_can_be_loaded() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut machine = machine();
    let mut recorder = start(&dir, &mut machine);
    for _ in 0..CHAIN_MAX + 2 {
        let at = run_on(&mut machine);
        recorder.mark(at);
        let active = recorder.0.as_mut().unwrap();
        active.rotate(at).unwrap();
        active.begin_snapshot(&mut machine).unwrap();
        active.complete_snapshot(&mut machine);
    }
    recorder.finish(&mut machine);
    let recording = RecordingDir::open(&dir).unwrap();
    let whole = recording.snapshots().iter().filter(|s| s.parent.is_none()).count();
    assert_eq!((recording.snapshots().len(), whole), (CHAIN_MAX + 2, 2));
    let mut tell = |e: &crate::snapshot::SnapshotError| panic!("{e}");
    let (mut last, _) = recording.machine_before(u64::MAX, &mut tell).unwrap();
    assert_eq!(last.digest(), machine.digest());
}

//! Recordings of a small machine whose divergences are known.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use eventlog::{ClockBase, LogPos};
use machine::Machine;
use machine::config::{BootImages, MachineConfig};
use machine::engine::EngineKind;
use machine::hart::HartSaved;
use machine::io::Input;
use machine::ram::RAM_BASE;

use super::analysis::AnalyseError;
use super::bench::{Before, Bench, Goal, Manner};
use super::compare::Differences;
use super::report::{Digests, Draft, RECORDING_DIR, STATE_FILE};
use super::search::{Run, Runs, Search};
use super::*;
use crate::recording::{About, RecordLimit, RecordOptions, Recorder, RecordingDir};
use crate::snapshot::{SnapshotHead, write_machine};

const BOTH: [EngineKind; 2] = [EngineKind::Jit, EngineKind::Interpreter];
/// Where the guest adds what it reads.
const SUM: u64 = RAM_BASE + 0x10_0000;
const LAST: u64 = 60_000;

/// Adds all that is typed to a sum in memory, and counts in a register meanwhile.
const ADDER: [u32; 12] = [
    0x1000_02b7, // lui   t0, 0x10000
    0x0010_0397, // auipc t2, 0x100
    0xffc3_8393, // addi  t2, t2, -4
    0x001e_0e13, // loop: addi t3, t3, 1
    0x0052_c303, // lbu   t1, 5(t0)
    0x0013_7313, // andi  t1, t1, 1
    0xfe03_0ae3, // beqz  t1, loop
    0x0002_ce83, // lbu   t4, 0(t0)
    0x01df_0f33, // add   t5, t5, t4
    0x01e3_b023, // sd    t5, 0(t2)
    0x01e3_b423, // sd    t5, 8(t2)
    0xfe1f_f06f, // j     loop
];
/// Offset of the instruction that reads what was typed.
const READ: u64 = 0x1c;

fn machine() -> Machine {
    let code = ADDER.map(u32::to_le_bytes).concat();
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

fn run_to(machine: &mut Machine, until: u64) {
    while machine.icount() < until {
        machine.run(until, &AtomicBool::new(false));
    }
}

/// What a test does to a recording or its machine at a step.
type Meddle<'a> = &'a dyn Fn(u64, &mut Machine, &mut [u8]);

/// Types something each 1000 steps and takes a digest each 5000. Gives the machine at the end, where the log has its digest but
/// for `error`.
fn record(dir: &Path, error: u64, meddle: Meddle<'_>) -> Machine {
    let mut machine = machine();
    let options = RecordOptions {
        dir: dir.to_owned(),
        limit: RecordLimit::default(),
        snapshot_interval: Duration::ZERO,
        about: About::default(),
    };
    let mut recorder = Recorder::start(options, &mut machine).unwrap();
    for at in (1000..=LAST).step_by(1000) {
        run_to(&mut machine, at);
        let mut bytes = vec![at as u8; 3];
        meddle(at, &mut machine, &mut bytes);
        let input = Input::Console { dev: 0, bytes };
        machine.apply(&input).unwrap();
        recorder.input(at, &input);
        if at % 5000 == 0 {
            let wrong = if at == LAST { error } else { 0 };
            recorder.digest(at, machine.digest() ^ wrong);
        }
        recorder.mark(at);
    }
    recorder.end(&mut machine);
    machine
}

/// A secondary's report, of a machine that came to `LAST` with this log.
fn report(work: &Path, recorded: &Path, kept: &mut Machine, primary: u64) -> std::path::PathBuf {
    let digests = Some(Digests { secondary: kept.digest(), primary });
    let report = Report {
        vm: "adder".to_owned(),
        host: "b".to_owned(),
        digests,
        last_right: Some(LAST - 5000),
        kept_at: Some(LAST),
        state: Part::Kept,
        recording: Part::Kept,
        ..Report::new(Side::Secondary, "a test".to_owned(), LAST)
    };
    let draft = Draft::new(work, report);
    draft.prepare().unwrap();
    let at = LogPos { lsn: 1, icount: LAST };
    let head = SnapshotHead::of(kept, at, ClockBase::default()).unwrap();
    write_machine(&draft.place().join(STATE_FILE), &head, kept).unwrap();
    fs::rename(recorded, draft.place().join(RECORDING_DIR)).unwrap();
    draft.complete().unwrap()
}

/// Two recordings of one machine, compared by what the hart has.
struct Two {
    benches: [Bench; 2],
}

impl Runs for Two {
    type State = Vec<HartSaved>;
    type Before = [Before; 2];

    fn base(&self) -> u64 {
        self.benches[0].icount()
    }

    fn state(&mut self, run: Run, step: u64) -> Vec<HartSaved> {
        let bench = &mut self.benches[run as usize];
        bench.view(Manner::Interpreter, Goal::Step(step)).1.saved.harts
    }

    fn advance(&mut self, step: u64) -> [Before; 2] {
        self.benches.each_mut().map(|bench| bench.advance(Manner::Interpreter, step))
    }

    fn retreat(&mut self, before: [Before; 2]) {
        for (bench, before) in self.benches.iter_mut().zip(before) {
            bench.retreat(before);
        }
    }
}

#[test]
fn the_first_instruction_that_sees_another_input_byte_is_found() {
    let work = tempfile::tempdir().unwrap();
    let dirs = ["one", "other"].map(|name| work.path().join(name));
    record(&dirs[0], 0, &|_, _, _| ());
    record(&dirs[1], 0, &|at, _, bytes| bytes[1] ^= u8::from(at == 31_000));
    let benches =
        dirs.map(|dir| Bench::open(&Arc::new(RecordingDir::open(&dir).unwrap()), 0).unwrap());
    let mut two = Two { benches };
    let to = Search::begin(&mut two, LAST).unwrap().run(&mut |_, _| ());
    let [one, other] = &mut two.benches;
    assert_eq!((one.icount() + 1, other.icount() + 1), (to, to));
    let steps = one.trace(Manner::Jit, to - 1, to);
    assert_eq!(steps.len(), 1);
    let step = &steps[0];
    assert_eq!((step.hart, step.pc, step.raw), (0, RAM_BASE + READ, Some(0x0002_ce83)));
    assert_eq!((step.text.as_str(), step.trap), ("lbu x29,0(x5)", None));
    // It is the second byte of three that differs: the first one was read before, by the same instruction.
    assert!((31_001..31_020).contains(&step.icount), "{}", step.icount);
    let sum = |machine: &Machine| machine.ram().read_u64(SUM).ok();
    assert_eq!(one.last_change(Manner::Interpreter, to + 2, &sum), Some(to + 1));
    assert_eq!(one.last_change(Manner::Interpreter, to + 1, &sum), None);
    let before = one.saved().harts[0].clone();
    let (_, left) = one.view(Manner::Interpreter, Goal::Step(to));
    let (_, right) = other.view(Manner::Interpreter, Goal::Step(to));
    let found = Differences::of(Some(one.saved()), &left.saved, &right.saved, Some(0));
    let differing: Vec<_> = found.harts[0].registers.iter().filter(|r| r.differs()).collect();
    assert_eq!(differing.len(), 1);
    let typed = u64::from(31_000u64 as u8);
    assert_eq!((differing[0].name.as_str(), differing[0].before), ("x29 t4", Some(before.x[29])));
    assert_eq!((differing[0].left, differing[0].right), (typed, typed ^ 1));
    assert!(found.harts[0].registers.len() > 80, "the whole register file is shown");
}

#[test]
fn a_byte_that_was_changed_behind_the_secondarys_back_is_named() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut kept = record(&dir, 0, &|_, _, _| ());
    let primary = kept.digest();
    kept.ram_mut().write(SUM + 13, &[0x10]).unwrap();
    let dir = report(work.path(), &dir, &mut kept, primary);
    let analysis = analyse(&dir, &BOTH, &mut |_| ()).unwrap();
    assert!(analysis.trials.iter().all(|trial| trial.agrees), "{:?}", analysis.trials);
    let Cause::Secondary(found) = &analysis.cause else { panic!("{:?}", analysis.cause) };
    assert_eq!((found.icount, found.wrong_since), (LAST, None));
    let memory = &found.differences.memory;
    assert_eq!((memory.len(), memory[0].gpa, memory[0].bytes), (1, SUM + 13, 1));
    assert_eq!((memory[0].left.clone(), memory[0].right.clone()), (vec![0], vec![0x10]));
    assert!(found.differences.harts.is_empty() && found.differences.devices.is_empty());
    // The guest writes there each time that something is typed.
    let write = found.last_write.as_ref().unwrap();
    assert!((LAST - 1000..LAST).contains(&write.icount.unwrap()), "{write:?}");
    assert!(analysis.cause.is_told());
    let json = serde_json::to_value(&analysis).unwrap();
    assert_eq!(json["cause"]["differences"]["memory"][0]["right"], "10");
}

#[test]
fn a_register_that_was_changed_is_named_without_a_byte() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut kept = record(&dir, 0, &|_, _, _| ());
    let primary = kept.digest();
    kept.harts_mut()[0].x[28] ^= 1 << 40;
    let dir = report(work.path(), &dir, &mut kept, primary);
    let analysis = analyse(&dir, &[EngineKind::Interpreter], &mut |_| ()).unwrap();
    let Cause::Secondary(found) = &analysis.cause else { panic!("{:?}", analysis.cause) };
    assert_eq!((found.differences.memory_bytes, found.last_write.clone()), (0, None));
    let registers = &found.differences.harts[0].registers;
    assert_eq!((registers.len(), registers[0].name.as_str()), (1, "x28 t3"));
    assert_eq!(registers[0].left ^ registers[0].right, 1 << 40);
}

#[test]
fn a_primary_that_was_wrong_is_told_from_a_secondary_that_was() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut kept = record(&dir, 0xbad, &|_, _, _| ());
    let primary = kept.digest() ^ 0xbad;
    let dir = report(work.path(), &dir, &mut kept, primary);
    let analysis = analyse(&dir, &BOTH, &mut |_| ()).unwrap();
    assert_eq!(analysis.cause, Cause::Primary);
    let analysis_of_one = analyse(&dir, &[EngineKind::Interpreter], &mut |_| ()).unwrap();
    let Cause::Unknown { reason } = &analysis_of_one.cause else { panic!("{analysis_of_one:?}") };
    assert!(reason.contains("the primary may have run on the jit"), "{reason}");
    assert!(analysis.trials.iter().all(|trial| !trial.agrees && trial.icount == LAST));
    // Not so when its own digest is none that its log makes.
    let text = fs::read_to_string(dir.join("report.json")).unwrap();
    let other = text.replace(&format!("{:#018x}", kept.digest()), "0x0000000000000001");
    assert_ne!(text, other);
    fs::write(dir.join("report.json"), other).unwrap();
    let analysis = analyse(&dir, &BOTH, &mut |_| ()).unwrap();
    assert!(
        matches!(&analysis.cause, Cause::Unknown { reason } if reason.contains("neither replica"))
    );
    assert!(!analysis.cause.is_told());
}

#[test]
fn equal_states_leave_nothing_but_the_digest() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    let mut kept = record(&dir, 0, &|_, _, _| ());
    let primary = kept.digest();
    let dir = report(work.path(), &dir, &mut kept, primary);
    let analysis = analyse(&dir, &BOTH, &mut |_| ()).unwrap();
    assert_eq!(analysis.cause, Cause::Digest);
    // The engine that it ran on is not excluded by another one.
    let text = fs::read_to_string(dir.join("report.json")).unwrap();
    let named = text.replace(r#""engine": """#, r#""engine": "jit""#);
    fs::write(dir.join("report.json"), named).unwrap();
    let analysis = analyse(&dir, &[EngineKind::Interpreter], &mut |_| ()).unwrap();
    let Cause::Unknown { reason } = &analysis.cause else { panic!("{analysis:?}") };
    assert!(reason.contains("the secondary may have run on the jit"), "{reason}");
}

#[test]
fn a_recording_that_was_meddled_with_is_of_no_engine() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("recording");
    record(&dir, 0, &|at, machine, _| {
        if at == 33_000 {
            machine.harts_mut()[0].x[28] += 1;
        }
    });
    let analysis = analyse_recording(&dir, &BOTH, &mut |_| ()).unwrap();
    let Cause::Unknown { reason } = &analysis.cause else { panic!("{:?}", analysis.cause) };
    assert!(reason.contains("at step 35000"), "{reason}");
    let good = work.path().join("good");
    record(&good, 0, &|_, _, _| ());
    let analysis = analyse_recording(&good, &BOTH, &mut |_| ()).unwrap();
    let Cause::Unknown { reason } = &analysis.cause else { panic!("{:?}", analysis.cause) };
    assert!(reason.contains("nothing differs"), "{reason}");
    assert!(analysis.report.is_none());
}

#[test]
fn what_cannot_be_looked_into_is_refused_with_the_reason() {
    let work = tempfile::tempdir().unwrap();
    let refused = |report: Report| {
        let draft = Draft::new(work.path(), Report { vm: "vm".to_owned(), ..report });
        draft.prepare().unwrap();
        let dir = draft.complete().unwrap();
        let error = analyse(&dir, &BOTH, &mut |_| ()).unwrap_err();
        fs::remove_dir_all(dir).unwrap();
        error
    };
    let new = |side| Report::new(side, "a test".to_owned(), 5);
    let primary = Report { peer: Some("b".to_owned()), ..new(Side::Primary) };
    let error = refused(primary).to_string();
    assert!(error.contains("on host b") && error.contains("vm-DATE-secondary"), "{error}");
    let error = refused(new(Side::Secondary));
    assert!(matches!(error, AnalyseError::NoRecording { .. }), "{error}");
    let error = refused(Report { recording: Part::Kept, ..new(Side::Secondary) });
    assert!(matches!(error, AnalyseError::Recording(_)), "{error}");
}

//! `understudy divergence` says what it found, and what it did not, in words, in JSON and by its exit status.

mod vmrun;

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use vmrun::understudy;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1-kernel-1-hart")
}

fn ask(args: &[&str], dir: &Path) -> Output {
    understudy()
        .arg("divergence")
        .args(args)
        .arg(dir)
        .output()
        .expect("the program under test runs")
}

fn words(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_recording_on_which_no_engine_differs_is_said_to_be_one() {
    let output = ask(&["-o", "json", "--recording"], &golden());
    assert_eq!(output.status.code(), Some(1), "{}", words(&output.stderr));
    assert!(words(&output.stderr).contains("the cause was not found: nothing differs"));
    let found: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!((&found["is_told"], &found["cause"]["kind"]), (&false.into(), &"unknown".into()));
    let trials = found["trials"].as_array().expect("there are some");
    assert!(trials.len() >= 2 && trials.iter().all(|trial| trial["agrees"] == true), "{found}");
    let one = ask(&["--engines", "interpreter", "--recording"], &golden());
    let table = words(&one.stdout);
    assert!(table.contains("as in the log (interpreter)") && !table.contains("jit"), "{table}");
}

#[test]
fn what_is_no_report_is_refused_with_the_reason() {
    let missing = ask(&[], Path::new("/nowhere"));
    assert_eq!(missing.status.code(), Some(3), "{}", words(&missing.stderr));
    let other = ask(&[], &golden());
    assert_eq!(other.status.code(), Some(1));
    assert!(words(&other.stderr).contains("report.json"), "{}", words(&other.stderr));
    let nothing = understudy().arg("divergence").output().expect("it runs");
    assert_eq!(nothing.status.code(), Some(2));
    let engine = ask(&["--engines", "tcg"], &golden());
    assert_eq!(engine.status.code(), Some(2));
}

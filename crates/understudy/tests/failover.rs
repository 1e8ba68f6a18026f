//! Failovers under a database's load, as `understudy bench io --part failover` makes them: nothing acknowledged is lost and no
//! connection breaks. Two of them here; the bench makes twenty.

mod vmrun;

use guest::GuestKind;
use serde_json::Value;
use vmrun::{guest, understudy};

/// The bench makes namespaces of its own, and its waits have bounds.
#[test]
fn a_database_loses_nothing_when_hosts_fail() {
    drop(guest(GuestKind::Services));
    let args = ["bench", "io", "--part", "failover", "--failovers", "2", "-o", "json"];
    let output = understudy().args(args).output().expect("the program under test runs");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{words}", String::from_utf8_lossy(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    let figures = report["sections"][0]["figures"].as_array().expect("there are figures");
    let aims: Vec<&Value> = figures.iter().filter(|figure| !figure["target"].is_null()).collect();
    assert!(aims.len() >= 7, "{report:#}");
    for figure in aims {
        assert_eq!(figure["met"], true, "{figure:#}\n{report:#}\n{words}");
    }
}

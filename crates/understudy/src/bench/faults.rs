//! The demo's rounds, many of them, and what they amount to for each fault.

use super::figure::{Figure, Section, Target, largest, median};
use super::stage::{Material, Stage};
use crate::demo::client::{self, Client};
use crate::demo::fault::Fault;
use crate::demo::lab::{CLIENT, redis_address};
use crate::demo::report::{Report, Round};
use crate::demo::{net, rounds};

/// Does `fault` to the live host `count` times.
pub(crate) fn run(
    dir: &std::path::Path,
    material: &Material,
    fault: Fault,
    count: u32,
) -> anyhow::Result<Section> {
    let mut section = Section::new(fault.name());
    let mut stage = Stage::start(dir, material, true)?;
    stage.lab.wait_redis(&stage.progress)?;
    stage.wait_protected()?;
    let address = redis_address();
    let client = Client::start(address, || net::enter(CLIENT))?;
    let count_lost = |acked| net::inside(CLIENT, || client::count_lost(address, acked))?;
    let choice = (fault.always(), count);
    let (report, failure) =
        rounds::run_rounds(&mut stage.lab, client, choice, count_lost, &stage.progress);
    section.figures = figures(fault, &report);
    section.notes.push(format!("{} of {count} rounds, detection 100 ms", report.rounds.len()));
    section.notes.extend(report.connection_broken.clone());
    if let Some(error) = failure {
        eprint!("{}", stage.lab.log_tails());
        section.failure = Some(format!("{error:#}"));
    }
    Ok(section)
}

fn figures(fault: Fault, report: &Report) -> Vec<Figure> {
    let of = |value: fn(&Round) -> f64| report.rounds.iter().map(value);
    let part = |what: &str, value: fn(&host::control::FailoverTimes) -> u64| {
        let times = report.rounds.iter().filter_map(|round| round.failover.as_ref());
        let ms = median(times.map(|times| value(times) as f64 / 1000.0));
        Figure::new(format!("{what} p50"), ms, "ms")
    };
    let lost = report.writes_lost.map(|lost| lost as f64);
    let broken = f64::from(u8::from(report.connection_broken.is_some()));
    let mut p50 = Figure::new("client-visible gap p50", median(of(|r| r.gap_ms)), "ms");
    let mut max = Figure::new("client-visible gap max", largest(of(|r| r.gap_ms)), "ms");
    match fault {
        Fault::Kill => {
            p50 = p50.aim(Target::AtMost(50.0));
            max = max.aim(Target::AtMost(250.0));
        }
        Fault::Power => max = max.aim(Target::AtMost(400.0)),
        Fault::Freeze | Fault::Partition => {}
    }
    let again = largest(of(|r| r.protected_again_s));
    let again = Figure::new("protected again max", again, "s");
    vec![
        Figure::new("writes acknowledged", report.writes_acked as f64, ""),
        Figure::new("acknowledged writes lost", lost, "").aim(Target::AtMost(0.0)),
        Figure::new("connections broken", broken, "").aim(Target::AtMost(0.0)),
        p50,
        max,
        part("detection", |t| t.detection_us),
        part("arbitration", |t| t.arbitration_us),
        part("catch-up", |t| t.catch_up_us),
        part("announcement", |t| t.announce_us),
        Figure::new("protected again p50", median(of(|r| r.protected_again_s)), "s"),
        if fault == Fault::Kill { again.aim(Target::AtMost(10.0)) } else { again },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_database_and_no_round_are_not_figures() {
        let report =
            Report { rounds: vec![], writes_acked: 0, writes_lost: None, connection_broken: None };
        let figures = figures(Fault::Kill, &report);
        let met = |what: &str| figures.iter().find(|f| f.what == what).and_then(|f| f.met);
        assert_eq!(met("acknowledged writes lost"), None);
        assert_eq!(met("client-visible gap p50"), None);
        assert_eq!(met("connections broken"), Some(true));
    }
}

//! What the demo found out: one line for each round, a summary, as a table or as JSON.

use host::control::FailoverTimes;
use serde::Serialize;

use super::fault::Fault;

/// One round: a fault and what the client saw of it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Round {
    /// Counted from 1.
    pub(crate) round: u32,
    /// What was done to the live host.
    pub(crate) fault: Fault,
    /// The live host before.
    pub(crate) from: String,
    /// The live host after.
    pub(crate) to: String,
    /// Longest time between two acknowledged writes.
    pub(crate) gap_ms: f64,
    /// The new live host's own account of the failover.
    pub(crate) failover: Option<FailoverTimes>,
    /// Whether the client's connection broke.
    pub(crate) connection_broken: bool,
    /// Writes acknowledged since the demo began.
    pub(crate) writes_acked: u64,
    /// From the fault until the machine was protected again.
    pub(crate) protected_again_s: f64,
}

/// The whole demo.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// The rounds that were completed.
    pub(crate) rounds: Vec<Round>,
    /// Writes acknowledged to the client.
    pub(crate) writes_acked: u64,
    /// Acknowledged writes that are not in the database; `None` when it could not be read.
    pub(crate) writes_lost: Option<u64>,
    /// Why the client's only connection broke, if it did.
    pub(crate) connection_broken: Option<String>,
}

impl Report {
    /// Whether nothing was lost and nothing broke.
    pub(crate) fn is_success(&self) -> bool {
        self.writes_lost == Some(0) && self.connection_broken.is_none() && !self.rounds.is_empty()
    }

    /// The table and the summary, for people.
    pub(crate) fn table(&self) -> String {
        let head = [
            "round",
            "fault",
            "host",
            "gap ms",
            "detect ms",
            "arbitrate ms",
            "catch up ms",
            "announce ms",
            "conn",
            "acked",
            "protected again s",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(self.rounds.iter().map(cells));
        format!("{}\n{}", align(&rows), self.summary())
    }

    fn summary(&self) -> String {
        let of = |value: fn(&Round) -> f64| {
            let mut values: Vec<f64> = self.rounds.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            (percentile(&values, 50), values.last().copied().unwrap_or_default())
        };
        let (gap, gap_max) = of(|round| round.gap_ms);
        let (again, again_max) = of(|round| round.protected_again_s);
        let lost = self.writes_lost.map_or("unknown how many".to_owned(), |lost| lost.to_string());
        let connection = self.connection_broken.as_deref().unwrap_or("never broken");
        format!(
            "gap p50 {gap:.1} ms, max {gap_max:.1} ms; protected again p50 {again:.1} s, max {again_max:.1} s\n\
             {} writes acknowledged, {lost} lost; connection {connection}\n",
            self.writes_acked
        )
    }
}

fn cells(round: &Round) -> Vec<String> {
    let part = |value: fn(&FailoverTimes) -> u64| {
        round.failover.as_ref().map_or("-".to_owned(), |f| {
            let us = value(f);
            format!("{}.{}", us / 1000, us % 1000 / 100)
        })
    };
    vec![
        round.round.to_string(),
        round.fault.name().to_owned(),
        format!("{}->{}", round.from, round.to),
        format!("{:.1}", round.gap_ms),
        part(|f| f.detection_us),
        part(|f| f.arbitration_us),
        part(|f| f.catch_up_us),
        part(|f| f.announce_us),
        if round.connection_broken { "BROKEN" } else { "kept" }.to_owned(),
        round.writes_acked.to_string(),
        format!("{:.1}", round.protected_again_s),
    ]
}

/// The value below which `percent` of the sorted values lie (nearest rank); 0 for none.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// Rows as columns, the widest cell of each deciding.
pub(crate) fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or_default()
        })
        .collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}")).collect();
        cells.join("  ") + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(gap_ms: f64) -> Round {
        Round {
            round: 1,
            fault: Fault::Kill,
            from: "h1".into(),
            to: "h2".into(),
            gap_ms,
            failover: Some(FailoverTimes {
                detection_us: 101_250,
                arbitration_us: 900,
                ..FailoverTimes::default()
            }),
            connection_broken: false,
            writes_acked: 12,
            protected_again_s: 2.0,
        }
    }

    #[test]
    fn percentile_is_the_nearest_rank() {
        assert_eq!(percentile(&[], 50).to_bits(), 0f64.to_bits());
        assert_eq!(percentile(&[1.0, 2.0, 9.0], 50).to_bits(), 2f64.to_bits());
        assert_eq!(percentile(&[1.0, 2.0], 50).to_bits(), 1f64.to_bits());
        assert_eq!(percentile(&[1.0, 2.0], 100).to_bits(), 2f64.to_bits());
    }

    #[test]
    fn table_has_a_line_for_each_round_and_a_summary() {
        let report = Report {
            rounds: vec![round(150.0), round(210.5)],
            writes_acked: 12,
            writes_lost: Some(0),
            connection_broken: None,
        };
        let table = report.table();
        assert_eq!(table.lines().count(), 6);
        assert!(table.contains("h1->h2   150.0      101.2           0.9"), "{table}");
        assert!(table.contains("gap p50 150.0 ms, max 210.5 ms"), "{table}");
        assert!(report.is_success());
    }

    #[test]
    fn lost_write_broken_connection_or_no_round_is_no_success() {
        let good = Report {
            rounds: vec![round(1.0)],
            writes_acked: 1,
            writes_lost: Some(0),
            connection_broken: None,
        };
        assert!(!Report { writes_lost: Some(1), ..good.clone() }.is_success());
        assert!(!Report { writes_lost: None, ..good.clone() }.is_success());
        assert!(!Report { connection_broken: Some("reset".into()), ..good.clone() }.is_success());
        assert!(!Report { rounds: vec![], ..good }.is_success());
    }
}

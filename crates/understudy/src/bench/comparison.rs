//! Workloads by machines: how long each took, turn by turn, and how the machines compare.

use serde::{Deserialize, Serialize};

use super::figure::{median, short};
use crate::demo::report::align;

/// Speeds of one machine in terms of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    /// The column's head.
    pub(crate) name: String,
    /// The machine that is looked at, by its place.
    pub(crate) of: usize,
    /// The machine that it is measured by.
    pub(crate) to: usize,
}

/// One workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Its name.
    pub(crate) name: String,
    /// What it does.
    pub(crate) what: String,
    /// Seconds that it took: for each machine, each turn. None where it could not be measured.
    pub(crate) seconds: Vec<Vec<f64>>,
}

impl Row {
    /// The median of the times on a machine.
    pub(crate) fn median(&self, machine: usize) -> Option<f64> {
        median(self.seconds.get(machine)?.iter().copied())
    }

    fn ratio(&self, ratio: &Ratio) -> Option<f64> {
        Some(self.median(ratio.to)? / self.median(ratio.of)?)
    }
}

/// All workloads on all machines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Comparison {
    /// The machines.
    pub(crate) machines: Vec<String>,
    /// What is compared.
    pub(crate) ratios: Vec<Ratio>,
    /// The workloads.
    pub(crate) rows: Vec<Row>,
}

impl Comparison {
    /// Each workload's ratio, where both machines were measured.
    pub(crate) fn values(&self, ratio: &Ratio) -> Vec<(&str, f64)> {
        let value = |row: &'_ Row| row.ratio(ratio);
        self.rows.iter().filter_map(|row| Some((row.name.as_str(), value(row)?))).collect()
    }

    fn head(&self) -> Vec<String> {
        let machines = self.machines.iter().map(|machine| format!("{machine}, s"));
        let ratios = self.ratios.iter().map(|ratio| ratio.name.clone());
        std::iter::once("workload".to_owned()).chain(machines).chain(ratios).collect()
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let cell = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
        let times = (0..self.machines.len()).map(|machine| cell(row.median(machine)));
        let ratios = self.ratios.iter().map(|ratio| cell(row.ratio(ratio)));
        std::iter::once(row.name.clone()).chain(times).chain(ratios).collect()
    }

    /// For a terminal.
    pub(crate) fn table(&self) -> String {
        let rows = self.rows.iter().map(|row| self.cells(row));
        align(&std::iter::once(self.head()).chain(rows).collect::<Vec<_>>())
    }

    /// For a document, with what each workload does.
    pub(crate) fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut head = self.head();
        head.insert(1, "what it is".to_owned());
        let rule = vec!["---", "---"]
            .into_iter()
            .chain(std::iter::repeat_n("--:", head.len().saturating_sub(2)));
        let rule = line(rule.map(str::to_owned).collect());
        let rows = self.rows.iter().map(|row| {
            let mut cells = self.cells(row);
            cells.insert(1, row.what.clone());
            line(cells)
        });
        line(head) + &rule + &rows.collect::<String>()
    }

    /// The least and the most of the times of each row, for those who want to know how far they are apart.
    pub(crate) fn spread(&self, machine: usize) -> Option<String> {
        let spreads = self.rows.iter().filter_map(|row| {
            let times = row.seconds.get(machine)?;
            let least = times.iter().copied().reduce(f64::min)?;
            let most = times.iter().copied().reduce(f64::max)?;
            Some(most / least)
        });
        let (middle, worst) = (median(spreads.clone())?, spreads.reduce(f64::max)?);
        Some(format!(
            "{}: longest turn over shortest, median {}, worst {}",
            self.machines.get(machine)?,
            short(middle),
            short(worst)
        ))
    }
}

/// The geometric mean; `None` of none.
pub(crate) fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.into_iter().map(f64::ln).collect();
    let sum: f64 = logarithms.iter().sum();
    (!logarithms.is_empty()).then(|| (sum / logarithms.len() as f64).exp())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two workloads, one of them without a time on the second machine.
    pub(crate) fn sample() -> Comparison {
        let row = |name: &str, seconds: [&[f64]; 2]| Row {
            name: name.into(),
            what: format!("does {name}"),
            seconds: seconds.map(<[f64]>::to_vec).to_vec(),
        };
        Comparison {
            machines: vec!["ours".into(), "theirs".into()],
            ratios: vec![Ratio { name: "speed".into(), of: 0, to: 1 }],
            rows: vec![row("add", [&[1.0, 1.5, 1.0], &[2.0, 2.0]]), row("net", [&[3.0], &[]])],
        }
    }

    #[test]
    fn ratio_is_of_medians_and_missing_without_both() {
        let sample = sample();
        assert_eq!(sample.values(&sample.ratios[0]), [("add", 2.0)]);
        let table = sample.table();
        let last = table.lines().last().unwrap();
        assert_eq!(last.split_whitespace().collect::<Vec<_>>(), ["net", "3.00", "-", "-"]);
    }

    #[test]
    fn markdown_has_as_many_cells_in_every_line() {
        let text = sample().markdown();
        let counts: Vec<usize> = text.lines().map(|line| line.matches('|').count()).collect();
        assert_eq!(counts, [6; 4]);
        assert!(text.contains("| add | does add | 1.00 | 2.00 | 2.00 |"), "{text}");
    }

    #[test]
    fn spread_is_of_the_turns() {
        let spread = sample().spread(0).unwrap();
        assert_eq!(spread, "ours: longest turn over shortest, median 1, worst 1.5");
    }

    #[test]
    fn geometric_mean_of_a_value_and_its_inverse_is_one() {
        assert!((geometric_mean([4.0, 0.25]).unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(geometric_mean([]), None);
    }
}

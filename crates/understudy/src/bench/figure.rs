//! What was measured, beside what was aimed at, and on which machine: nothing is judged here but printed.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::comparison::Comparison;
use crate::demo::report::{align, percentile};

/// Which side of the target a figure should be on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

/// One measured value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// What it is.
    pub(crate) what: String,
    /// The value; `None` when it could not be had.
    pub(crate) measured: Option<f64>,
    /// Its unit.
    pub(crate) unit: String,
    /// What is aimed at, if anything is.
    pub(crate) target: Option<Target>,
    /// Whether the value is on the right side of the target.
    pub(crate) met: Option<bool>,
}

impl Figure {
    /// A value without a target.
    pub(crate) fn new(
        what: impl Into<String>,
        measured: impl Into<Option<f64>>,
        unit: &str,
    ) -> Self {
        let (what, unit) = (what.into(), unit.to_owned());
        Self { what, measured: measured.into(), unit, target: None, met: None }
    }

    /// The same with a target.
    pub(crate) fn aim(mut self, target: Target) -> Self {
        self.met = self.measured.map(|value| match target {
            Target::AtMost(limit) => value <= limit,
            Target::AtLeast(limit) => value >= limit,
        });
        self.target = Some(target);
        self
    }

    fn cells(&self) -> [String; 4] {
        let target = match self.target {
            Some(Target::AtMost(limit)) => format!("<= {limit} {}", self.unit),
            Some(Target::AtLeast(limit)) => format!(">= {limit} {}", self.unit),
            None => "-".to_owned(),
        };
        let met = match (self.target, self.met) {
            (Some(_), Some(true)) => "met",
            (Some(_), Some(false)) => "missed",
            (Some(_), None) => "not measured",
            (None, _) => "",
        };
        let value = self.measured.map_or("-".to_owned(), |v| format!("{} {}", short(v), self.unit));
        [self.what.clone(), value, target, met.to_owned()]
    }
}

/// Three places at most, and none where there is nothing behind the point.
pub(crate) fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The figures of one bench.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Section {
    /// Its name.
    pub(crate) name: String,
    /// Load average of the machine when it began.
    pub(crate) load: String,
    /// What was measured.
    pub(crate) figures: Vec<Figure>,
    /// How it was measured, and single values.
    pub(crate) notes: Vec<String>,
    /// Why it has no figures, or not all.
    pub(crate) failure: Option<String>,
    /// Workloads by machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) comparison: Option<Comparison>,
}

impl Section {
    /// One that begins now.
    pub(crate) fn new(name: impl Into<String>) -> Self {
        let (figures, notes) = (Vec::new(), Vec::new());
        let (failure, comparison) = (None, None);
        Self { name: name.into(), load: load_average(), figures, notes, failure, comparison }
    }
}

/// The machine that the figures are of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Machine {
    cpus: usize,
    cpu_model: String,
    load_average: String,
    date: String,
    /// What was asked for.
    pub(crate) command: String,
}

impl Machine {
    /// This one, now.
    pub(crate) fn look() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.map(|rest| rest.trim_start_matches([' ', '\t', ':']));
        let date = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output();
        let date = date.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
        Self {
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            cpu_model: model.unwrap_or("unknown").to_owned(),
            load_average: load_average(),
            date: date.unwrap_or_default(),
            command: std::iter::once("understudy".to_owned())
                .chain(std::env::args().skip(1))
                .collect::<Vec<_>>()
                .join(" "),
        }
    }
}

/// Load average over 1, 5 and 15 minutes.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// Everything that is printed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    /// Where it was measured.
    pub(crate) machine: Machine,
    /// The benches, in the order in which they ran.
    pub(crate) sections: Vec<Section>,
}

impl Report {
    /// For people.
    pub(crate) fn table(&self) -> String {
        let head = ["figure", "measured", "target", ""].map(str::to_owned).to_vec();
        let mut rows = vec![head];
        let mut comparisons = String::new();
        for section in &self.sections {
            rows.extend(section.figures.iter().map(|figure| {
                let [what, rest @ ..] = figure.cells();
                [&[format!("{}: {what}", section.name)], &rest[..]].concat()
            }));
            if let Some(comparison) = &section.comparison {
                comparisons.push_str(&format!("{}\n", comparison.table()));
            }
        }
        let more: String = self.lines().map(|line| line + "\n").collect();
        let command = &self.machine.command;
        format!("{command}\n{}\n\n{comparisons}{}\n{more}", self.machine_line(), align(&rows))
    }

    /// The figures as a table of a document.
    pub(crate) fn markdown(&self) -> String {
        let figures = self.sections.iter().flat_map(|section| &section.figures);
        let rows = figures.map(|figure| {
            format!("| {} |\n", figure.cells().map(|cell| cell.trim().to_owned()).join(" | "))
        });
        let head = "| figure | measured | target | |\n| --- | --: | --: | --- |\n".to_owned();
        std::iter::once(head).chain(rows).collect()
    }

    /// Where and when it was measured.
    pub(crate) fn machine_line(&self) -> String {
        let Machine { cpus, cpu_model, load_average, date, command: _ } = &self.machine;
        format!("{date}, {cpus} CPUs, {cpu_model}, load average at start {load_average}")
    }

    /// What is to be known beside the figures, section by section.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.sections.iter().flat_map(|section| {
            let failure = section.failure.iter().map(|why| format!("failed: {why}"));
            let load = format!("load average at its start {}", section.load);
            let lines = std::iter::once(load).chain(section.notes.iter().cloned()).chain(failure);
            lines.map(|line| format!("{}: {line}", section.name))
        })
    }
}

/// Sorted, for [`percentile`].
pub(crate) fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The middle value; `None` of none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let values = sorted(values);
    (!values.is_empty()).then(|| percentile(&values, 50))
}

/// The largest value; `None` of none.
pub(crate) fn largest(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    sorted(values).pop()
}

/// Values as a line of text.
pub(crate) fn listed(values: &[f64]) -> String {
    values.iter().map(|value| short(*value)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_is_met_on_its_side_only() {
        let of = |value, target| Figure::new("x", value, "ms").aim(target).met;
        assert_eq!(of(Some(5.0), Target::AtMost(5.0)), Some(true));
        assert_eq!(of(Some(5.1), Target::AtMost(5.0)), Some(false));
        assert_eq!(of(Some(0.96), Target::AtLeast(0.95)), Some(true));
        assert_eq!(of(None, Target::AtLeast(0.95)), None);
    }

    #[test]
    fn table_says_what_was_missed_and_what_failed() {
        let mut section = Section::new("delay");
        section.figures.push(Figure::new("p50", 310.25, "us").aim(Target::AtMost(300.0)));
        section.figures.push(Figure::new("p99", None, "us"));
        section.failure = Some("no answer".into());
        let table = Report { machine: Machine::look(), sections: vec![section] }.table();
        assert!(table.contains("delay: p50  310.25 us  <= 300 us  missed"), "{table}");
        assert!(table.contains("delay: failed: no answer"), "{table}");
    }

    #[test]
    fn median_and_largest_of_none_are_none() {
        assert_eq!((median([]), largest([])), (None, None));
        assert_eq!((median([3.0, 1.0, 2.0]), largest([3.0, 1.0])), (Some(2.0), Some(3.0)));
        assert_eq!(listed(&[1.0, 2.5]), "1, 2.5");
    }
}

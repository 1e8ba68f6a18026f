//! A report of a divergence: a directory with what one side kept.
//!
//! # Invariants
//! - INV-REPORT-1: a directory under its final name is complete: it is made beside it, then renamed.
//! - INV-REPORT-2: of a VM no more than [`REPORTS_MAX`] reports of each side are kept. It is the first ones that stay: those
//!   that follow are mostly of the same cause.
//!
//! # Format
//! `STATE_DIR/divergence/VM-DATE-SIDE`, for nobody but the owner. `report.json`: [`Report`]. `state`: the whole machine, see
//! [`crate::snapshot`]. `recording`: the secondary's recording up to there, see [`crate::recording`].

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::recording::{When, rfc3339};

/// Version of reports that are written.
const VERSION: u32 = 1;
/// Most reports of a VM that are kept, of each side.
pub const REPORTS_MAX: usize = 4;
/// Largest `report.json` that is read.
const REPORT_BYTES_MAX: u64 = 1 << 20;
const REPORT_FILE: &str = "report.json";
/// The whole machine.
pub(crate) const STATE_FILE: &str = "state";
/// The secondary's recording.
pub(crate) const RECORDING_DIR: &str = "recording";
const PARTIAL: &str = ".partial";

/// Which replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The one whose digests are in the log.
    Primary,
    /// The one that compares them.
    Secondary,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        })
    }
}

/// Part of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// It is there.
    Kept,
    /// It is not: why.
    Missing(String),
}

/// The digests that differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// The secondary's.
    #[serde(with = "hex")]
    pub secondary: u64,
    /// The primary's, which is in the log.
    #[serde(with = "hex")]
    pub primary: u64,
}

/// Numbers that are no quantities, as people and other programs read them without loss.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:#018x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        u64::from_str_radix(digits, 16).map_err(serde::de::Error::custom)
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this file.
    pub version: u32,
    /// The VM.
    pub vm: String,
    /// The host that kept it.
    pub host: String,
    /// What that host was.
    pub side: Side,
    /// The other host, if it was known.
    pub peer: Option<String>,
    /// The build that ran here.
    pub build: String,
    /// The engine that ran the machine here.
    pub engine: String,
    /// Date.
    pub date: String,
    /// What was seen.
    pub reason: String,
    /// The step at which it was seen.
    pub icount: u64,
    /// The digests there, if it was seen by them.
    pub digests: Option<Digests>,
    /// The step of the last digest before that was the same.
    pub last_right: Option<u64>,
    /// On a secondary: the step from which on it followed.
    pub followed_from: Option<u64>,
    /// The step of the state that was kept: a primary runs on for a moment.
    pub kept_at: Option<u64>,
    /// The whole machine.
    pub state: Part,
    /// The secondary's recording.
    pub recording: Part,
}

/// Why a report cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadReportError {
    /// The operating system said no.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// It is none.
    #[error("{} is no report of a divergence", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It is of another version.
    #[error("{} has version {found}, this build reads {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

impl Report {
    /// A report of something that has just been seen, with nothing kept yet.
    pub(crate) fn new(side: Side, reason: String, icount: u64) -> Self {
        let none = || Part::Missing("it was not kept".to_owned());
        Self {
            version: VERSION,
            vm: String::new(),
            host: String::new(),
            side,
            peer: None,
            build: crate::recording::start::BUILD.to_owned(),
            engine: String::new(),
            date: rfc3339(crate::recording::unix_ms()),
            reason,
            icount,
            digests: None,
            last_right: None,
            followed_from: None,
            kept_at: None,
            state: none(),
            recording: none(),
        }
    }

    /// Reads the report in a directory.
    ///
    /// # Errors
    /// [`ReadReportError`].
    pub fn read(dir: &Path) -> Result<Self, ReadReportError> {
        use std::io::Read as _;
        let path = dir.join(REPORT_FILE);
        let mut bytes = Vec::new();
        let read =
            fs::File::open(&path).and_then(|f| f.take(REPORT_BYTES_MAX).read_to_end(&mut bytes));
        read.map_err(|source| ReadReportError::Io { path: path.clone(), source })?;
        let unreadable = |source| ReadReportError::Unreadable { path: path.clone(), source };
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(unreadable)?;
        // Another version may have other fields.
        if let Some(found) = value["version"].as_u64()
            && found != u64::from(VERSION)
        {
            let found = u32::try_from(found).unwrap_or(u32::MAX);
            return Err(ReadReportError::Version { path, found });
        }
        serde_json::from_value(value).map_err(unreadable)
    }

    fn write(&self, dir: &Path) -> std::io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut file =
            options.write(true).create_new(true).mode(0o600).open(dir.join(REPORT_FILE))?;
        file.write_all(&serde_json::to_vec_pretty(self).map_err(std::io::Error::other)?)?;
        file.write_all(b"\n")?;
        file.sync_all()
    }
}

/// Where a host keeps reports.
fn reports_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("divergence")
}

/// Whether a name is that of a report of a VM and a side.
fn is_report_of(name: &str, vm: &str, side: Side) -> bool {
    let rest = name.strip_prefix(vm).and_then(|rest| rest.strip_prefix('-'));
    let date = rest.and_then(|rest| rest.strip_suffix(&format!("-{side}")));
    date.is_some_and(|date| matches!(date.parse(), Ok(When::Wall(_))))
}

/// Names of a directory's entries; none where there is no directory.
fn names(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// Removes what a daemon that was killed left half-written.
pub(crate) fn clear_partial(state_dir: &Path) {
    let dir = reports_dir(state_dir);
    for name in names(&dir).filter(|name| name.ends_with(PARTIAL)) {
        // What cannot be removed now is when the next report is made.
        drop(fs::remove_dir_all(dir.join(name)));
    }
}

/// The reports that this host has of a VM, of one side, oldest first.
pub(crate) fn reports(state_dir: &Path, vm: &str, side: Side) -> Vec<PathBuf> {
    let dir = reports_dir(state_dir);
    let mut found: Vec<PathBuf> = names(&dir)
        .filter(|name| is_report_of(name, vm, side))
        .map(|name| dir.join(name))
        .collect();
    found.sort();
    found
}

/// A report that is being made.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    report: Report,
    /// What it will be called.
    dir: PathBuf,
    /// What it is called until then.
    partial: PathBuf,
}

impl Draft {
    /// Nothing is made yet.
    pub(crate) fn new(state_dir: &Path, report: Report) -> Self {
        let name = format!("{}-{}-{}", report.vm, report.date, report.side);
        let dir = reports_dir(state_dir).join(&name);
        let partial = reports_dir(state_dir).join(name + PARTIAL);
        Self { report, dir, partial }
    }

    /// What it says.
    pub(crate) fn report_mut(&mut self) -> &mut Report {
        &mut self.report
    }

    /// The directory to write into.
    pub(crate) fn place(&self) -> &Path {
        &self.partial
    }

    /// Makes the directory, if there is room for another report. What a daemon that was killed left half-written goes.
    pub(crate) fn prepare(&self) -> Result<(), String> {
        let Report { vm, side, .. } = &self.report;
        let place = self.dir.parent().unwrap_or(Path::new("."));
        let fail = |e: std::io::Error| format!("cannot use {}: {e}", place.display());
        fs::DirBuilder::new().mode(0o700).recursive(true).create(place).map_err(fail)?;
        let mut complete = 0;
        for name in names(place) {
            match name.strip_suffix(PARTIAL) {
                Some(cut) if is_report_of(cut, vm, *side) => {
                    fs::remove_dir_all(place.join(&name)).map_err(fail)?;
                }
                None if is_report_of(&name, vm, *side) => complete += 1,
                Some(_) | None => {}
            }
        }
        if complete >= REPORTS_MAX {
            return Err(format!(
                "{} has {REPORTS_MAX} reports of this VM already; remove those that are not needed",
                place.display()
            ));
        }
        fs::DirBuilder::new().mode(0o700).create(&self.partial).map_err(fail)
    }

    /// Completes it and gives it its name. What cannot be completed leaves nothing.
    pub(crate) fn complete(self) -> Result<PathBuf, String> {
        let named = self
            .report
            .write(&self.partial)
            .and_then(|()| fs::rename(&self.partial, &self.dir))
            .map_err(|e| format!("cannot write {}: {e}", self.dir.display()));
        match named {
            Ok(()) => Ok(self.dir),
            Err(reason) => {
                self.discard();
                Err(reason)
            }
        }
    }

    /// Leaves nothing of it.
    pub(crate) fn discard(&self) {
        // What stays all the same goes when the next one is prepared.
        drop(fs::remove_dir_all(&self.partial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(state_dir: &Path, vm: &str, second: u64, side: Side) -> Draft {
        let report = Report::new(side, "a test".to_owned(), 5);
        let date = rfc3339(1_795_409_100_000 + second * 1000);
        let digests = Some(Digests { secondary: u64::MAX, primary: 1 });
        Draft::new(state_dir, Report { vm: vm.to_owned(), date, digests, ..report })
    }

    #[test]
    fn a_report_reads_as_it_was_written_and_others_are_refused() {
        let work = tempfile::tempdir().unwrap();
        let made = draft(work.path(), "vm", 0, Side::Secondary);
        made.prepare().unwrap();
        let report = made.report.clone();
        let dir = made.complete().unwrap();
        assert_eq!(dir.file_name().unwrap(), "vm-2026-11-23T04:45:00.000Z-secondary");
        assert_eq!(Report::read(&dir).unwrap(), report);
        let text = fs::read_to_string(dir.join(REPORT_FILE)).unwrap();
        assert!(text.contains(r#""secondary": "0xffffffffffffffff""#), "{text}");
        fs::write(dir.join(REPORT_FILE), text.replace(r#""version": 1"#, r#""version": 2"#))
            .unwrap();
        assert!(matches!(Report::read(&dir), Err(ReadReportError::Version { found: 2, .. })));
        fs::write(dir.join(REPORT_FILE), &text[..text.len() / 2]).unwrap();
        assert!(matches!(Report::read(&dir), Err(ReadReportError::Unreadable { .. })));
        assert!(matches!(Report::read(work.path()), Err(ReadReportError::Io { .. })));
    }

    #[test]
    fn a_vm_has_so_many_reports_of_each_side_and_nothing_half_written() {
        let work = tempfile::tempdir().unwrap();
        let make = |vm, second, side| {
            let made = draft(work.path(), vm, second, side);
            made.prepare().and_then(|()| made.complete())
        };
        let killed = draft(work.path(), "db", 100, Side::Primary);
        for clear in [clear_partial, |_: &Path| ()] {
            killed.prepare().unwrap();
            fs::write(killed.place().join(STATE_FILE), "half").unwrap();
            clear(work.path());
        }
        assert!(killed.place().exists());
        for second in 0..REPORTS_MAX as u64 {
            make("db", second, Side::Primary).unwrap();
        }
        assert!(!killed.place().exists());
        assert!(make("db", 9, Side::Primary).unwrap_err().contains("4 reports of this VM"));
        make("db", 9, Side::Secondary).unwrap();
        // The names of others do not count, however they begin.
        make("db-2", 9, Side::Primary).unwrap();
        assert_eq!(reports(work.path(), "db", Side::Primary).len(), REPORTS_MAX);
        assert_eq!(reports(work.path(), "db", Side::Secondary).len(), 1);
        assert_eq!(reports(work.path(), "db-2", Side::Primary).len(), 1);
        assert_eq!(reports(work.path(), "db-3", Side::Primary), [""; 0].map(PathBuf::from));
        fs::remove_dir_all(&reports(work.path(), "db", Side::Primary)[0]).unwrap();
        make("db", 9, Side::Primary).unwrap();
    }
}

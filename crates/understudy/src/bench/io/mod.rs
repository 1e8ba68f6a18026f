//! Protected machines that do what people run on them: the paper's tables in our own form, and failovers under a database.
//!
//! # Place
//! Called by the bench. Each part runs in namespaces of its own, with a laboratory of its own, and is one section of the
//! report. A part is a variant of [`Part`], a module with `run`, and a line in [`run`].

mod disk;
mod failover;
mod guests;
mod ledger;
pub(crate) mod load;
mod native;
mod pgbench;
mod postgres;
mod relay;
mod resync;
mod sampler;
mod tables;
mod traffic;

use std::path::Path;

use clap::{Args, ValueEnum};
use guest::GuestKind;
use host::config::LAG_MS;
use serde::{Deserialize, Serialize};

use self::load::Load;
use super::figure::Section;
use super::stage::Material;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Part {
    /// Four loads in the guest, unprotected, protected and native: the paper's Table 1.
    Tables,
    /// TCP through a tap over log links of two shapes, unprotected and protected: the paper's Table 2.
    Net,
    /// Failovers under a database's load.
    Failover,
    /// Streams and single requests on a disk, beside QEMU.
    Disk,
    /// A guest's speed while a secondary is made, with all of its disk or with what changed.
    Resync,
}

impl Part {
    /// The section's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tables => "tables",
            Self::Net => "net",
            Self::Failover => "failover",
            Self::Disk => "disk",
            Self::Resync => "resync",
        }
    }

    /// The guests that it boots, the one in the laboratory first.
    pub(crate) fn guests(self) -> &'static [GuestKind] {
        match self {
            Self::Tables | Self::Net | Self::Failover | Self::Resync => &[GuestKind::Services],
            Self::Disk => &[GuestKind::Bench],
        }
    }
}

/// What is measured, and how often.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct IoArgs {
    /// These parts only.
    #[arg(long = "part", value_name = "PART", value_enum, value_delimiter = ',')]
    parts: Vec<Part>,
    /// How often what is compared is measured.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// How long each load of a turn is.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Failover: how often the live host fails.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    failovers: u32,
    /// Tables, failover: how far the secondary may be behind, lag_ms of the VM's [protection] [default: the VM's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(i64::from(*LAG_MS.start())..=i64::from(*LAG_MS.end())))]
    lag_ms: Option<u32>,
    /// Tables: these loads only.
    #[arg(long = "load", value_name = "LOAD", value_enum, value_delimiter = ',')]
    loads: Vec<Load>,
}

impl Default for IoArgs {
    fn default() -> Self {
        Self { parts: vec![], turns: 3, seconds: 10, failovers: 20, lag_ms: None, loads: vec![] }
    }
}

impl IoArgs {
    /// The parts that are asked for, each with what it has to know.
    pub(crate) fn jobs(&self) -> impl Iterator<Item = Options> {
        let Self { turns, seconds, failovers, lag_ms, .. } = *self;
        let is_asked = |load: &Load| self.loads.is_empty() || self.loads.contains(load);
        let loads: Vec<_> = Load::value_variants().iter().copied().filter(is_asked).collect();
        let is_wanted = |part: &Part| self.parts.is_empty() || self.parts.contains(part);
        let parts = Part::value_variants().iter().copied().filter(is_wanted);
        parts.map(move |part| {
            let loads = loads.clone();
            Options { part, turns, seconds, failovers, lag_ms, loads }
        })
    }
}

/// One part, and how it is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Options {
    /// What.
    pub(crate) part: Part,
    /// How often.
    pub(crate) turns: u32,
    /// How long each load of a turn is.
    pub(crate) seconds: u32,
    /// How often the live host fails.
    pub(crate) failovers: u32,
    /// How far the secondary of the tables and of the failovers may be behind, in milliseconds, if that is not the default.
    pub(crate) lag_ms: Option<u32>,
    /// The loads of the tables.
    pub(crate) loads: Vec<Load>,
}

/// Measures one part.
pub(crate) fn run(dir: &Path, material: &Material, options: &Options) -> anyhow::Result<Section> {
    match options.part {
        Part::Tables => tables::run(dir, material, options),
        Part::Net => traffic::run(dir, material, options),
        Part::Failover => failover::run(dir, material, options),
        Part::Disk => disk::run(dir, material, options),
        Part::Resync => resync::run(dir, material, options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_are_measured_in_order_unless_some_are_named() {
        let parts = |args: &IoArgs| args.jobs().map(|job| job.part).collect::<Vec<_>>();
        assert_eq!(parts(&IoArgs::default()), Part::value_variants());
        let some = IoArgs { parts: vec![Part::Failover], failovers: 2, ..IoArgs::default() };
        assert_eq!(parts(&some), [Part::Failover]);
        assert_eq!(some.jobs().next().map(|job| job.failovers), Some(2));
        let loads = |args: &IoArgs| args.jobs().next().map(|job| job.loads);
        assert_eq!(loads(&some).as_deref(), Some(Load::value_variants()));
        let some = IoArgs { loads: vec![Load::Redis], ..some };
        assert_eq!(loads(&some), Some(vec![Load::Redis]));
    }
}

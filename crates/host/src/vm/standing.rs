//! Whether this host's copies of a VM's disks are the newest that there are, as far as the arbiter's record tells.
//!
//! # Place
//! Asked by the daemon before a VM is started from its disks.
//!
//! # Invariants
//! - INV-STANDING-1: a copy is as new as any if the arbiter's record names this host, live, as its secondary, or among those
//!   that had everything when the VM was stopped; or if its own record says that it has everything of that generation. All
//!   else is refused: a host that returns after others went on, and one whose copy was not complete.
//!
//! A host's own record may lag the arbiter's when it fell between the two; that is why being named is enough.

use std::path::Path;

use super::Env;
use super::definition::Definition;
use crate::arbiter::Record;
use crate::config::{DiskMode, DiskSection};
use crate::disk::record::{self, CopyState, Found};
use crate::disk::{Image, OpenMode};

/// Why a VM is not started from what is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stale {
    /// One line, with what to do.
    pub(crate) reason: String,
    /// Whether it can be started all the same.
    pub(crate) is_startable: bool,
}

fn is_kept(section: &DiskSection) -> bool {
    section.mode == DiskMode::Mirrored && !section.readonly
}

/// Whether the VM has disks of which each host has its own copy.
pub(crate) fn has_copies(definition: &Definition) -> bool {
    definition.config.disks.iter().any(is_kept) && !definition.has_state()
}

/// The hosts whose copies are the newest by a record.
pub(crate) fn newest(record: &Record) -> Vec<String> {
    let named = record.live.iter().chain(&record.secondary).cloned().collect();
    if record.live.is_none() { record.copies.clone() } else { named }
}

/// Of a copy that is partly one thing and partly another.
pub(crate) fn half_copied(path: &Path) -> String {
    format!(
        "{} was being copied from another host when that was interrupted, and is no disk to start from; \
         start the VM on the host that has a whole copy, and this one is completed from there",
        path.display()
    )
}

/// Checks the copies here.
///
/// # Errors
/// [`Stale`].
pub(crate) fn check(
    definition: &Definition,
    env: &Env,
    current: Option<&Record>,
) -> Result<(), Stale> {
    let vm = &definition.config.name;
    let hosts = current.map(newest).unwrap_or_default();
    let is_named = hosts.contains(&env.host);
    for (dev, section) in (0u8..).zip(&definition.config.disks).filter(|(_, d)| is_kept(d)) {
        let path = &section.path;
        // What cannot be opened at all the start says better.
        let Ok(image) = Image::open(section.source().settled(), OpenMode::ReadOnly) else {
            continue;
        };
        let known = match record::find(path, &env.state_dir, vm, dev, image.size()) {
            Found::Record(_, record) => Ok(record),
            Found::Unknown(why) => Err(why),
        };
        if known.as_ref().is_ok_and(|record| record.state == CopyState::BeingCopied) {
            let reason = format!("VM {vm}: {}", half_copied(path));
            return Err(Stale { reason, is_startable: false });
        }
        let newest = current.map_or(0, |record| record.generation);
        let (is_new, what) = match &known {
            Ok(record) => (
                record.generation >= newest,
                format!("the copy at {} is of generation {}", path.display(), record.generation),
            ),
            Err(why) => {
                (hosts.is_empty(), format!("nothing is known of {}: {why}", path.display()))
            }
        };
        if is_named || is_new || current.is_none() {
            continue;
        }
        let place = match hosts.as_slice() {
            [] => "which host has it is not known".to_owned(),
            hosts => format!("on host {}", hosts.join(" and ")),
        };
        let reason = format!(
            "VM {vm}: {what}; the newest is of generation {newest}, {place}: start it there. \
             If that is gone for good: understudy start --accept-stale (and --force where the record names \
             a live host), which loses what this copy does not have"
        );
        return Err(Stale { reason, is_startable: true });
    }
    Ok(())
}

//! Copies of disks that failed on this host, and when they are good enough again for a secondary.
//!
//! # Place
//! Told by the vCPU thread and by who receives a mirror; asked before this host becomes a VM's secondary.
//!
//! # Invariants
//! - INV-FAILURES-1: a host whose copy failed does not become the VM's secondary before it has waited, longer each time, and
//!   before the copy reads, and takes again what it holds, where it failed.

use std::time::{Duration, Instant};

use machine::Machine;
use machine::io::{BlkOp, OutputKind};

use crate::config::DiskSection;
use crate::disk::{Image, OpenMode};
use crate::one_line::one_line;

/// First wait after a failure; doubled with each one that follows.
const WAIT_MIN: Duration = Duration::from_secs(2);
const WAIT_MAX: Duration = Duration::from_secs(300);
/// A copy that was good for so long begins anew.
const FORGIVEN_AFTER: Duration = Duration::from_secs(900);
/// Most bytes that a probe reads and writes.
const PROBE_BYTES_MAX: u64 = 1 << 20;

/// A copy that failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    reason: String,
    range: Option<(u64, u64)>,
    count: u32,
    at: Instant,
    is_over: bool,
}

impl Failure {
    /// Another one, after `before`.
    pub(crate) fn after(before: Option<&Self>, reason: String, range: Option<(u64, u64)>) -> Self {
        let count = match before {
            Some(before) if before.at.elapsed() < FORGIVEN_AFTER => before.count.saturating_add(1),
            Some(_) | None => 1,
        };
        Self { reason, range, count, at: Instant::now(), is_over: false }
    }

    /// Looks whether the copy of the disk is good again.
    ///
    /// # Errors
    /// One line that says why not.
    pub(crate) fn probe(&mut self, dev: u8, section: &DiskSection) -> Result<(), String> {
        if self.is_over {
            return Ok(());
        }
        let wait = (WAIT_MIN * (1 << (self.count - 1).min(10))).min(WAIT_MAX);
        let left = wait.saturating_sub(self.at.elapsed());
        let reason = &self.reason;
        if !left.is_zero() {
            return Err(format!("disk {dev} failed: {reason}; looked at again in {left:.0?}"));
        }
        match probe(section, self.range) {
            Ok(()) => {
                self.is_over = true;
                Ok(())
            }
            Err(e) => {
                let text = format!("disk {dev} failed: {reason}; it still does: {e}");
                *self = Self::after(Some(self), self.reason.clone(), self.range);
                Err(text)
            }
        }
    }
}

/// Reads what is in a range and writes it again.
fn probe(section: &DiskSection, range: Option<(u64, u64)>) -> Result<(), String> {
    let Some((offset, len)) = range.filter(|_| section.path.exists()) else {
        // What failed is done anew: only time can tell.
        return Ok(());
    };
    let image = Image::open_again(section.source().settled(), OpenMode::Exclusive)
        .map_err(|e| one_line(&e))?;
    let len = usize::try_from(len.min(PROBE_BYTES_MAX)).unwrap_or(0);
    let written = std::fs::metadata(&section.path).and_then(|meta| meta.modified()).ok();
    let rewrite = || {
        let data = image.read(offset, len)?;
        image.write(offset, &data)?;
        image.flush()
    };
    let result = rewrite();
    if let Some(at) = written {
        // It holds what it held, so its record is still about it.
        let file = std::fs::File::options().write(true).open(&section.path);
        file.and_then(|file| file.set_modified(at)).map_err(|e| e.to_string())?;
    }
    result
}

/// The range of a request that the machine waits for.
pub(crate) fn range_of(machine: &Machine, dev: u8, id: u64) -> Option<(u64, u64)> {
    machine.outstanding().into_iter().find_map(|kind| match kind {
        OutputKind::Blk { dev: d, id: i, op } if (d, i) == (dev, id) => match op {
            BlkOp::Read { offset, len } => Some((offset, u64::from(len))),
            BlkOp::Write { offset, data } => Some((offset, data.len() as u64)),
            BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
                Some((offset, len))
            }
            BlkOp::Flush => None,
        },
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_good_again_when_it_has_waited_and_takes_what_it_holds() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("disk");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        let section: DiskSection = toml::from_str(&format!("path = {path:?}")).unwrap();
        let mut failure = Failure::after(None, "no space".to_owned(), Some((1024, 512)));
        let early = failure.probe(3, &section).unwrap_err();
        assert!(early.contains("disk 3 failed: no space; looked at again in"), "{early}");
        failure.at -= WAIT_MIN;
        let held = Image::open(&path, OpenMode::Exclusive).unwrap();
        let still = failure.probe(3, &section).unwrap_err();
        assert!(still.contains("it still does") && failure.count == 2, "{still}");
        drop(held);
        failure.at -= WAIT_MIN;
        assert!(failure.probe(3, &section).is_err(), "the second wait is longer");
        failure.at -= WAIT_MIN;
        failure.probe(3, &section).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 4096]);
        failure.probe(3, &section).unwrap();
        assert_eq!(Failure::after(Some(&failure), String::new(), None).count, 3);
    }
}

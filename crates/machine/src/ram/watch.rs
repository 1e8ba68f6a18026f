//! Watched memory: pages with watchpoints are never granted for fast access, so that each access comes by here.
//!
//! # Place
//! Writes to RAM, whoever makes them, are noted by [`GuestRam::write`]; loads, and what instructions do to devices, by the
//! engine. What hardware does by itself, as walks that set accessed bits do, is not.
//!
//! # Invariants
//! - INV-WATCH-1: a page that a watchpoint touches has [`WATCH`] set, and no other has: `is_fast_writable` and
//!   [`GuestRam::is_watched`] keep both engines' tables from it.

use super::{GuestRam, PAGE_SHIFT, PAGE_SIZE, RAM_BASE};
use crate::debug::{WatchHit, WatchKind, Watchpoint};

/// Page flag: there are watchpoints on it.
pub(super) const WATCH: u8 = 32;

/// Watchpoints and what came of them.
#[derive(Debug, Default)]
pub(super) struct Watch {
    points: Vec<Watchpoint>,
    /// The first one since it was last asked for.
    hit: Option<WatchHit>,
}

impl GuestRam {
    /// Watches these places and no others; the engine drops what it knows of addresses.
    pub(crate) fn set_watchpoints(&mut self, points: &[Watchpoint]) {
        self.mark_watched(false);
        self.watch = Watch { points: points.to_vec(), hit: None };
        self.mark_watched(true);
        self.drop_write_permissions();
    }

    fn mark_watched(&mut self, watched: bool) {
        let end = RAM_BASE + self.size();
        for point in &self.watch.points {
            let (from, to) = (point.gpa.max(RAM_BASE), point.end().min(end));
            if from < to {
                let first = (from - RAM_BASE) as usize / PAGE_SIZE;
                let last = (to - 1 - RAM_BASE) as usize / PAGE_SIZE;
                for flags in &mut self.flags[first..=last] {
                    *flags = *flags & !WATCH | if watched { WATCH } else { 0 };
                }
            }
        }
    }

    /// Whether accesses to this page have to be noted.
    #[inline]
    #[must_use]
    pub fn is_watched(&self, page: u32) -> bool {
        self.flags[page as usize] & WATCH != 0
    }

    /// Notes an access, if it is one to be told of.
    #[inline]
    pub fn note_access(&mut self, gpa: u64, len: u64, is_write: bool) {
        if !self.watch.points.is_empty() {
            self.watch.note(gpa, len, is_write);
        }
    }

    /// Notes a write at an offset of RAM.
    #[inline]
    pub(super) fn note_write(&mut self, offset: usize, len: usize) {
        if self.flags[offset >> PAGE_SHIFT] & WATCH != 0 {
            self.watch.note(RAM_BASE + offset as u64, len as u64, true);
        }
    }

    /// Whether there was an access to be told of.
    #[inline]
    #[must_use]
    pub fn has_watch_hit(&self) -> bool {
        self.watch.hit.is_some()
    }

    /// The first access since the last call that has to be told of.
    pub(crate) fn take_watch_hit(&mut self) -> Option<WatchHit> {
        self.watch.hit.take()
    }

    /// Has it that nothing was accessed since `hit` was taken.
    pub(crate) fn put_watch_hit(&mut self, hit: Option<WatchHit>) {
        self.watch.hit = hit;
    }
}

impl Watch {
    #[cold]
    fn note(&mut self, gpa: u64, len: u64, is_write: bool) {
        let end = gpa.saturating_add(len);
        let touched = |point: &&Watchpoint| {
            gpa.max(point.gpa) < end.min(point.end())
                && match point.kind {
                    WatchKind::Write => is_write,
                    WatchKind::Read => !is_write,
                    WatchKind::Access => true,
                }
        };
        if self.hit.is_none()
            && let Some(point) = self.points.iter().find(touched)
        {
            self.hit = Some(WatchHit { gpa: gpa.max(point.gpa), is_write });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(gpa: u64, len: u64, kind: WatchKind) -> Watchpoint {
        Watchpoint { gpa, len, kind }
    }

    #[test]
    fn only_what_is_watched_is_noted() {
        let mut ram = GuestRam::new(4 * 4096);
        ram.set_watchpoints(&[
            watch(RAM_BASE + 4094, 4, WatchKind::Write),
            watch(RAM_BASE + 0x3000, u64::MAX, WatchKind::Read),
            watch(0x1000_0000, 1, WatchKind::Access),
            watch(RAM_BASE + 8, 0, WatchKind::Access),
        ]);
        assert_eq!([0, 1, 2, 3].map(|page| ram.is_watched(page)), [true, true, false, true]);
        for (gpa, len) in [(RAM_BASE, 4094), (RAM_BASE + 4098, 8), (RAM_BASE + 0x3000, 8)] {
            ram.write(gpa, &vec![1; len]).unwrap();
            assert_eq!(ram.take_watch_hit(), None);
        }
        ram.write(RAM_BASE + 4000, &[1; 200]).unwrap();
        let hit = WatchHit { gpa: RAM_BASE + 4094, is_write: true };
        assert_eq!(ram.take_watch_hit(), Some(hit));
        ram.update_pte_flags(RAM_BASE + 4096, 1);
        assert!(!ram.has_watch_hit());
        ram.note_access(RAM_BASE + 0x3ff8, 8, false);
        assert_eq!(ram.take_watch_hit().map(|hit| hit.gpa), Some(RAM_BASE + 0x3ff8));
        ram.note_access(0x0fff_ffff, 8, true);
        assert_eq!(ram.take_watch_hit().map(|hit| hit.gpa), Some(0x1000_0000));
    }

    #[test]
    fn a_watched_page_stays_so_until_the_watch_ends() {
        let mut ram = GuestRam::new(2 * 4096);
        ram.set_watchpoints(&[watch(RAM_BASE, 8, WatchKind::Read)]);
        ram.mark_code(0, 0, 4);
        ram.digest();
        ram.arm_snapshot(None);
        ram.begin_undo();
        for _ in 0..2 {
            ram.write(RAM_BASE, &[1]).unwrap();
            assert!(ram.is_watched(0) && !ram.is_fast_writable(0));
        }
        ram.set_watchpoints(&[]);
        assert!(!ram.is_watched(0) && ram.is_fast_writable(0));
    }
}

//! Contents of moments gone by: copy-on-write snapshots, whole or against an earlier one, and the undo log of a debugger.
//!
//! # Place
//! Armed and read by the machine's thread between two runs. [`GuestRam::before_write`] feeds both.
//!
//! # Invariants
//! - INV-HISTORY-1: `written[p]` is at least the epoch after whose arming page `p` was first written, for the latest
//!   arming before that write; a page without [`OLD`] was written since the latest arming.
//! - INV-HISTORY-2: while there is an undo log, a page without [`UNDO`] is in it, with the contents of its start.
//!
//! # Determinism
//! Nothing of this is in a digest or a saved machine. An [`Epoch`] means something for the RAM alone that it was made by.

use std::collections::VecDeque;

use super::{GuestRam, PAGE_SIZE, is_zero};

/// Page flag: not yet saved for the armed snapshot.
pub(super) const SNAP: u8 = 4;
/// Page flag: not written since the latest arming.
pub(super) const OLD: u8 = 8;
/// Page flag: not written since the undo log began.
pub(super) const UNDO: u8 = 16;

/// Bytes that are compared, and written when they differ, at once: a granule of code.
const PIECE: usize = 64;

/// The moment at which a snapshot was armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u32);

/// One page of a snapshot; `None` stands for a page of zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPage {
    /// Page number, counted from the start of RAM.
    pub page: u32,
    /// Contents at the moment the snapshot was armed.
    pub data: Option<Box<[u8]>>,
}

/// A step of [`GuestRam::next_snapshot_page`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotStep {
    /// A page to send.
    Page(SnapshotPage),
    /// Call again with a new budget.
    OutOfBudget,
    /// Every page was handed out.
    Done,
}

#[derive(Debug)]
struct Sweep {
    /// Pages that were about to be written and were saved first.
    saved: VecDeque<SnapshotPage>,
    /// Next page the sweep looks at.
    cursor: u32,
    /// Pages of zeroes may have been something else in the parent.
    names_zeroes: bool,
}

/// What is known of the past, by page and as a whole.
#[derive(Debug)]
pub(super) struct History {
    sweep: Option<Sweep>,
    /// Contents of pages before they were written, in the order of the writes.
    undo: Option<Vec<SnapshotPage>>,
    epoch: u32,
    /// Epoch in which the page was last written for the first time; 0 before any.
    written: Vec<u32>,
}

impl History {
    pub(super) fn new(pages: usize) -> Self {
        Self { sweep: None, undo: None, epoch: 0, written: vec![0; pages] }
    }
}

impl GuestRam {
    fn contents(&self, page: u32) -> Option<Box<[u8]>> {
        let first = page as usize * PAGE_SIZE;
        let data = &self.bytes[first..first + PAGE_SIZE];
        (!is_zero(data)).then(|| data.into())
    }

    /// Saves what the page's flags ask for, before it is written.
    pub(super) fn before_change(&mut self, page: u32) {
        let flags = self.flags[page as usize];
        if flags & OLD != 0 {
            self.history.written[page as usize] = self.history.epoch;
        }
        if flags & SNAP != 0 {
            let data = self.contents(page);
            if let Some(sweep) = &mut self.history.sweep {
                sweep.saved.push_back(SnapshotPage { page, data });
            }
        }
        if flags & UNDO != 0 {
            let data = self.contents(page);
            if let Some(undo) = &mut self.history.undo {
                undo.push(SnapshotPage { page, data });
            }
        }
    }

    fn set_flags(&mut self, flags: u8) {
        for f in &mut self.flags {
            *f |= flags;
        }
        self.drop_write_permissions();
    }

    fn clear_flags(&mut self, flags: u8) {
        for f in &mut self.flags {
            *f &= !flags;
        }
    }

    /// Arms a copy-on-write snapshot of the present contents; a sweep already under way is dropped. With a `base`, pages
    /// that were not written since that was armed are left out, and those that are all zero now are named.
    pub fn arm_snapshot(&mut self, base: Option<Epoch>) -> Epoch {
        self.history.epoch = self.history.epoch.saturating_add(1);
        let oldest = base.map_or(0, |base| base.0);
        for (flags, &written) in self.flags.iter_mut().zip(&self.history.written) {
            *flags = *flags & !SNAP | OLD | if written >= oldest { SNAP } else { 0 };
        }
        self.drop_write_permissions();
        let names_zeroes = base.is_some();
        self.history.sweep = Some(Sweep { saved: VecDeque::new(), cursor: 0, names_zeroes });
        Epoch(self.history.epoch)
    }

    /// Abandons the snapshot under way, if any.
    pub fn disarm_snapshot(&mut self) {
        if self.history.sweep.take().is_some() {
            self.clear_flags(SNAP);
        }
    }

    /// The next page of the armed snapshot: first pages saved before a write, then the sweep, which looks at no more than
    /// `budget` pages a call. Pages of zeroes are named against a base alone.
    pub fn next_snapshot_page(&mut self, budget: &mut u32) -> SnapshotStep {
        let Some(sweep) = &mut self.history.sweep else { return SnapshotStep::Done };
        let names_zeroes = sweep.names_zeroes;
        while let Some(page) = sweep.saved.pop_front() {
            if page.data.is_some() || names_zeroes {
                return SnapshotStep::Page(page);
            }
        }
        let first = sweep.cursor;
        for page in first..self.pages() {
            if *budget == 0 {
                self.move_cursor(page);
                return SnapshotStep::OutOfBudget;
            }
            *budget -= 1;
            let p = page as usize;
            if self.flags[p] & SNAP == 0 {
                continue;
            }
            self.flags[p] &= !SNAP;
            let data = self.contents(page);
            if data.is_some() || names_zeroes {
                self.move_cursor(page + 1);
                return SnapshotStep::Page(SnapshotPage { page, data });
            }
        }
        self.history.sweep = None;
        SnapshotStep::Done
    }

    fn move_cursor(&mut self, page: u32) {
        if let Some(sweep) = &mut self.history.sweep {
            sweep.cursor = page;
        }
    }

    /// Pages of the armed snapshot that were looked at so far, for progress shown to people.
    #[must_use]
    pub fn snapshot_cursor(&self) -> Option<u32> {
        self.history.sweep.as_ref().map(|s| s.cursor)
    }

    /// From here on each page's contents are saved before its first write, for [`Self::take_undo`]. A sweep under way is
    /// dropped, and so is what an earlier log has.
    pub fn begin_undo(&mut self) {
        self.disarm_snapshot();
        self.set_flags(UNDO);
        self.history.undo = Some(Vec::new());
    }

    /// What the pages that were written since [`Self::begin_undo`], or since the last call, had in them then; from here on
    /// they are saved anew. Empty without an undo log. Costs time for these pages only.
    pub fn take_undo(&mut self) -> Vec<SnapshotPage> {
        let Some(log) = &mut self.history.undo else { return Vec::new() };
        let pages = std::mem::take(log);
        if !pages.is_empty() {
            self.log_anew(pages.iter().map(|page| page.page));
        }
        pages
    }

    /// No contents are saved any more.
    pub fn end_undo(&mut self) {
        if self.history.undo.take().is_some() {
            self.clear_flags(UNDO);
        }
    }

    fn log_anew(&mut self, pages: impl Iterator<Item = u32>) {
        for page in pages {
            self.flags[page as usize] |= UNDO;
        }
        self.drop_write_permissions();
    }

    /// Gives these pages, of which each is RAM and whole, the contents named, with all tracking of what differs. An undo log
    /// begins anew.
    pub(crate) fn put_pages(&mut self, pages: &[SnapshotPage]) {
        let logged = self.history.undo.take();
        let zero = [0; PAGE_SIZE];
        for SnapshotPage { page, data } in pages {
            let first = *page as usize * PAGE_SIZE;
            let data = data.as_deref().unwrap_or(&zero);
            for (at, piece) in (first..).step_by(PIECE).zip(data.chunks(PIECE)) {
                if self.bytes[at..at + piece.len()] != *piece {
                    self.write_in_page(at, piece);
                }
            }
        }
        if let Some(logged) = logged {
            self.log_anew(logged.iter().chain(pages).map(|page| page.page));
            self.history.undo = Some(Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::RAM_BASE;

    fn page(number: u64) -> u64 {
        RAM_BASE + number * PAGE_SIZE as u64
    }

    fn sweep(ram: &mut GuestRam) -> Vec<(u32, Option<u8>)> {
        let mut got = vec![];
        loop {
            match ram.next_snapshot_page(&mut 1) {
                SnapshotStep::Page(p) => got.push((p.page, p.data.map(|data| data[0]))),
                SnapshotStep::OutOfBudget => {}
                SnapshotStep::Done => break,
            }
        }
        got.sort_unstable();
        got
    }

    #[test]
    fn snapshot_has_the_contents_of_the_moment_it_was_armed() {
        let mut ram = GuestRam::new(4 * 4096);
        ram.write(page(0), &[1]).unwrap();
        ram.write(page(2), &[2]).unwrap();
        ram.arm_snapshot(None);
        ram.write(page(0), &[9]).unwrap();
        ram.write(page(1), &[9]).unwrap();
        let mut got = vec![];
        loop {
            match ram.next_snapshot_page(&mut 1) {
                SnapshotStep::Page(p) => got.push((p.page, p.data.unwrap()[0])),
                SnapshotStep::OutOfBudget => ram.write(page(2), &[8]).unwrap(),
                SnapshotStep::Done => break,
            }
        }
        got.sort_unstable();
        assert_eq!(got, [(0, 1), (2, 2)]);
    }

    #[test]
    fn snapshot_against_a_base_has_what_was_written_since() {
        let mut ram = GuestRam::new(6 * 4096);
        for number in 0..4 {
            ram.write(page(number), &[1]).unwrap();
        }
        let first = ram.arm_snapshot(None);
        assert_eq!(sweep(&mut ram).len(), 4);
        ram.write(page(1), &[2]).unwrap();
        ram.write(page(2), &[0]).unwrap();
        let second = ram.arm_snapshot(Some(first));
        ram.write(page(3), &[3]).unwrap();
        ram.write(page(2), &[3]).unwrap();
        assert_eq!(sweep(&mut ram), [(1, Some(2)), (2, None)]);
        // One that was abandoned is no base, and changes nothing for others.
        ram.arm_snapshot(Some(second));
        ram.disarm_snapshot();
        ram.write(page(5), &[5]).unwrap();
        ram.arm_snapshot(Some(second));
        assert_eq!(sweep(&mut ram), [(2, Some(3)), (3, Some(3)), (5, Some(5))]);
        ram.arm_snapshot(Some(first));
        assert_eq!(sweep(&mut ram).len(), 4);
    }

    #[test]
    fn undo_has_what_was_there_before_the_first_write() {
        let mut ram = GuestRam::new(4 * 4096);
        ram.write(page(0), &[1]).unwrap();
        assert!(ram.take_undo().is_empty());
        ram.arm_snapshot(None);
        ram.begin_undo();
        assert_eq!(ram.snapshot_cursor(), None);
        for value in [2, 3] {
            ram.write(page(0), &[value]).unwrap();
            ram.write(page(3), &[value]).unwrap();
        }
        let first: Vec<_> =
            ram.take_undo().into_iter().map(|p| (p.page, p.data.map(|d| d[0]))).collect();
        assert_eq!(first, [(0, Some(1)), (3, None)]);
        ram.write(page(0), &[4]).unwrap();
        let second = ram.take_undo();
        assert_eq!((second.len(), second[0].data.as_ref().unwrap()[0]), (1, 3));
        ram.write(page(1), &[4]).unwrap();
        ram.put_pages(&second);
        assert_eq!(ram.bytes()[0], 3);
        assert!(ram.take_undo().is_empty(), "the log begins anew where it went back to");
        ram.write(page(0), &[5]).unwrap();
        ram.write(page(1), &[5]).unwrap();
        assert_eq!(ram.take_undo().len(), 2);
        ram.end_undo();
        ram.write(page(0), &[6]).unwrap();
        assert!(ram.take_undo().is_empty());
    }

    #[test]
    fn only_code_that_differs_is_reported_as_written() {
        let mut ram = GuestRam::new(4096);
        ram.mark_code(0, 128, 4);
        let mut data = vec![0; PAGE_SIZE];
        data[200] = 1;
        let pages = |data: &[u8]| [SnapshotPage { page: 0, data: Some(data.into()) }];
        ram.put_pages(&pages(&data));
        assert!(!ram.code_was_written());
        data[129] = 1;
        ram.put_pages(&pages(&data));
        assert!(ram.code_was_written());
    }
}

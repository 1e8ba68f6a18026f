//! What is in a recording: found by reading its log once, without the machine.

use std::sync::Arc;

use eventlog::{ClockBase, Encoder, Entry, LogPos, Record};
use machine::clock::TICKS_PER_SECOND;
use machine::io::Input;

use super::cursor::{Cursor, ReplayEnd};
use super::dir::{OpenRecordingError, RecordingDir};
use super::when::When;

/// Nanoseconds in a tick of guest time.
const NS_PER_TICK: u64 = 1_000_000_000 / TICKS_PER_SECOND;

/// Kinds of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryKind {
    /// Guest time.
    Clock,
    /// Received packets.
    NetRx,
    /// Completions of disk requests, with the data of reads.
    Disk,
    /// Typed at consoles.
    Console,
    /// Random numbers.
    Entropy,
    /// The operator's.
    PowerOff,
    /// The machine came here.
    Mark,
    /// Digests.
    Digest,
}

impl EntryKind {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 8] = [
        Self::Clock,
        Self::NetRx,
        Self::Disk,
        Self::Console,
        Self::Entropy,
        Self::PowerOff,
        Self::Mark,
        Self::Digest,
    ];

    fn of(entry: &Entry) -> Self {
        match entry {
            Entry::Input(Input::Clock { .. }) => Self::Clock,
            Entry::Input(Input::NetRx { .. }) => Self::NetRx,
            Entry::Input(Input::BlkDone { .. } | Input::DiskResized { .. })
            | Entry::BlkReadLocal { .. } => Self::Disk,
            Entry::Input(Input::Console { .. }) => Self::Console,
            Entry::Input(Input::Entropy { .. }) => Self::Entropy,
            Entry::Input(Input::PowerOff) => Self::PowerOff,
            Entry::Mark => Self::Mark,
            Entry::Digest(_) => Self::Digest,
        }
    }

    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Clock => "clock",
            Self::NetRx => "network packets received",
            Self::Disk => "disk completions",
            Self::Console => "console input",
            Self::Entropy => "random numbers",
            Self::PowerOff => "power off",
            Self::Mark => "marks",
            Self::Digest => "digests",
        }
    }
}

/// Records of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindTotals {
    /// How many.
    pub records: u64,
    /// Their bytes in the log.
    pub bytes: u64,
}

/// What the log of a recording holds, from the first step that replay can begin with.
#[derive(Debug, Clone)]
pub struct RecordingInfo {
    /// Where replay can begin.
    pub first: LogPos,
    /// The last record that can be read.
    pub last: LogPos,
    /// How the log ends.
    pub end: ReplayEnd,
    /// Records of each kind, in the order of [`EntryKind::ALL`].
    pub kinds: [KindTotals; 8],
    /// Wall clock at guest time 0, in nanoseconds since the Unix epoch.
    wall_base_ns: u64,
    /// Clock inputs: step, guest time there, rate from there on; the first is that of the beginning.
    clocks: Vec<ClockBase>,
}

impl RecordingInfo {
    /// Reads the log of a recording.
    ///
    /// # Errors
    /// [`OpenRecordingError`]: it has no beginning.
    pub fn scan(recording: &Arc<RecordingDir>) -> Result<Self, OpenRecordingError> {
        let no_start = || OpenRecordingError::NoStart(recording.path().to_owned());
        let first_step = recording.start_steps().first().copied().ok_or_else(no_start)?;
        let at = |s: &super::SegmentFile| s.icount == first_step;
        let index = recording.segments().iter().position(at).ok_or_else(no_start)?;
        let header = recording.segments()[index].header.and_then(Result::ok);
        let (first, base) = header.map(|h| (h.start, h.clock)).unwrap_or_default();
        let mut info = Self {
            first,
            last: first,
            end: ReplayEnd::Whole,
            kinds: Default::default(),
            wall_base_ns: recording.start().config.rtc_base_ns,
            clocks: vec![ClockBase {
                mtime: base.derived(first.icount),
                at: first.icount,
                rate: base.rate,
            }],
        };
        let mut cursor = Cursor::open(recording, index)?;
        let mut encoder = Encoder::new(first, base);
        let mut bytes = Vec::new();
        info.end = loop {
            match cursor.next() {
                Ok(record) => info.count(&record, &mut encoder, &mut bytes),
                Err(end) => break end,
            }
        };
        info.last = encoder.end();
        Ok(info)
    }

    fn count(&mut self, record: &Record, encoder: &mut Encoder, bytes: &mut Vec<u8>) {
        bytes.clear();
        // What was read has a length that the log takes.
        let is_counted = encoder.append(record, bytes).is_ok();
        let kind = EntryKind::of(&record.entry);
        let totals = &mut self.kinds[kind as usize];
        totals.records += u64::from(is_counted);
        totals.bytes += bytes.len() as u64;
        if kind == EntryKind::Clock {
            let clock = encoder.clock();
            let before = self.mtime_at(record.icount);
            // Guest time never goes back.
            self.clocks.push(ClockBase { mtime: clock.mtime.max(before), ..clock });
        }
    }

    /// Guest time at a step, in ticks of 100 ns, behind what the log has for it.
    #[must_use]
    pub fn mtime_at(&self, icount: u64) -> u64 {
        let at = self.clocks.partition_point(|c| c.at <= icount).saturating_sub(1);
        self.clocks.get(at).map_or(0, |clock| clock.derived(icount.max(clock.at)))
    }

    /// Wall clock of the guest at a step, in nanoseconds since the Unix epoch.
    #[must_use]
    pub fn wall_ns_at(&self, icount: u64) -> u64 {
        self.wall_base_ns.saturating_add(self.mtime_at(icount).saturating_mul(NS_PER_TICK))
    }

    /// Guest time from the first step to the last, in nanoseconds.
    #[must_use]
    pub fn duration_ns(&self) -> u64 {
        let ticks = self.mtime_at(self.last.icount) - self.mtime_at(self.first.icount);
        ticks.saturating_mul(NS_PER_TICK)
    }

    /// The step at a moment: the first one at which it has come. Moments outside the recording are its first or last step.
    #[must_use]
    pub fn position_at(&self, when: When) -> u64 {
        let mtime = match when {
            When::Icount(icount) => {
                return icount.clamp(self.first.icount, self.last.icount);
            }
            When::Elapsed(time) => {
                let ticks = time.as_nanos() / u128::from(NS_PER_TICK);
                let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
                self.mtime_at(self.first.icount).saturating_add(ticks)
            }
            When::Wall(ns) => ns.saturating_sub(self.wall_base_ns) / NS_PER_TICK,
        };
        let next = self.clocks.partition_point(|c| c.mtime < mtime);
        let Some(clock) = next.checked_sub(1).and_then(|at| self.clocks.get(at)) else {
            return self.first.icount;
        };
        let behind = u128::from(mtime - clock.mtime) << 16;
        let steps = behind.div_ceil(u128::from(clock.rate.max(1)));
        let by_rate = clock.at.saturating_add(u64::try_from(steps).unwrap_or(u64::MAX));
        let most = self.clocks.get(next).map_or(self.last.icount, |c| c.at);
        by_rate.min(most).clamp(self.first.icount, self.last.icount)
    }

    /// Bytes of all records.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.kinds.iter().map(|k| k.bytes).sum()
    }
}

//! What a divergence came from.
//!
//! # Failure
//! Nothing is guessed: what the evidence does not tell is said to be unknown, with what is missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use machine::Machine;
use machine::debug::WatchKind;
use machine::engine::EngineKind;
use machine::ram::{PAGE_SIZE, is_zero};
use serde::Serialize;

use super::bench::{Arrival, Before, Bench, Followed, Goal, Manner, Step, View};
use super::compare::{Differences, HartRegisters, hex, value_of};
use super::report::{Part, RECORDING_DIR, ReadReportError, Report, STATE_FILE, Side};
use super::search::{Run, Runs, Search};
use crate::recording::{OpenRecordingError, RecordingDir, ReplayEnd, Stop, Timeline, Watch};
use crate::snapshot::{SnapshotError, SnapshotItem, SnapshotReader};

/// Most instructions that are listed when more than one is needed.
const STEPS_MAX: u64 = 64;

/// Most steps that are looked through one by one.
const TRACED_MAX: u64 = 100_000;

/// Why there is nothing to look at.
#[derive(Debug, thiserror::Error)]
pub enum AnalyseError {
    /// The report is no good.
    #[error(transparent)]
    Report(#[from] ReadReportError),
    /// It is the primary's.
    #[error(
        "{} is the primary's side, without a log: the secondary's, {}, has what is needed; copy it here",
        dir.display(), place
    )]
    Primary {
        /// The report.
        dir: PathBuf,
        /// Where the other one is.
        place: String,
    },
    /// It has no recording.
    #[error("{} has no recording to replay: {reason}", dir.display())]
    NoRecording {
        /// The report.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// The recording cannot be opened.
    #[error(transparent)]
    Recording(#[from] OpenRecordingError),
    /// The state cannot be read.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// No engine is left to try.
    #[error(
        "this host cannot have the JIT: run this on an x86-64 host, or with --engines interpreter"
    )]
    NoEngine,
}

/// What came of running the machine in a manner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trial {
    /// The manner.
    pub manner: Manner,
    /// The step that it began at.
    pub from: u64,
    /// The step that it came to.
    pub icount: u64,
    /// The machine's digest there.
    #[serde(serialize_with = "hex")]
    pub digest: u64,
    /// Whether that is all as in the log.
    pub agrees: bool,
    /// How the replay ended.
    pub end: Option<String>,
}

impl Trial {
    fn new(manner: Manner, from: u64, arrival: &Arrival) -> Self {
        let end = arrival.end.as_ref().filter(|end| **end != ReplayEnd::Whole);
        Self {
            manner,
            from,
            icount: arrival.icount,
            digest: arrival.digest,
            agrees: arrival.agrees(),
            end: end.map(ToString::to_string),
        }
    }
}

/// Two manners make something else of one state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineDifference {
    /// What the others are measured by.
    pub reference: Manner,
    /// What differs from it.
    pub other: Manner,
    /// The step up to which the states are the same.
    pub from: u64,
    /// A step at which they are not.
    pub to: u64,
    /// Whether neither end can be moved. If not, they differ only after all that was run before.
    pub is_narrow: bool,
    /// What the reference does there: the last steps of it.
    pub steps: Vec<Step>,
    /// The step of the reference that made what differs, if there is one.
    pub made_by: Option<u64>,
    /// The states at the end of it: left the reference's, right the other's.
    pub differences: Differences,
}

/// The guest's last write to memory that was found changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LastWrite {
    /// Guest physical address.
    #[serde(serialize_with = "hex")]
    pub gpa: u64,
    /// The step that made it; none: the recording has none.
    pub icount: Option<u64>,
    /// First step of what was looked through.
    pub since: u64,
}

/// The secondary's machine was not what its log makes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StateDifference {
    /// The step.
    pub icount: u64,
    /// Left what the log makes, right what was kept.
    pub differences: Differences,
    /// Of the first byte of memory that differs.
    pub last_write: Option<LastWrite>,
    /// A beginning in the recording that was wrong already.
    pub wrong_since: Option<u64>,
}

/// What it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Cause {
    /// The engines.
    Engines(Box<EngineDifference>),
    /// Something outside of the secondary's machine.
    Secondary(Box<StateDifference>),
    /// Nothing but the digest.
    Digest,
    /// Something outside of the primary's machine.
    Primary,
    /// The evidence does not tell.
    Unknown {
        /// One line.
        reason: String,
    },
}

impl Cause {
    /// Whether the evidence tells what it was.
    #[must_use]
    pub fn is_told(&self) -> bool {
        match self {
            Self::Engines(difference) => difference.is_narrow,
            Self::Secondary(_) | Self::Digest | Self::Primary => true,
            Self::Unknown { .. } => false,
        }
    }

    fn unknown(reason: impl Into<String>) -> Self {
        Self::Unknown { reason: reason.into() }
    }
}

/// What was tried, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Analysis {
    /// The report, unless a recording alone was looked at.
    pub report: Option<Report>,
    /// The recording.
    pub recording: PathBuf,
    /// What was run.
    pub trials: Vec<Trial>,
    /// What it was.
    pub cause: Cause,
}

/// Looks at the secondary's report in `dir`, with these engines. `told` gets words on how far it is.
///
/// # Errors
/// [`AnalyseError`].
pub fn analyse(
    dir: &Path,
    engines: &[EngineKind],
    told: &mut dyn FnMut(&str),
) -> Result<Analysis, AnalyseError> {
    let report = Report::read(dir)?;
    if report.side == Side::Primary {
        let host =
            report.peer.as_ref().map_or_else(String::new, |peer| format!("on host {peer}, "));
        let place = format!("{host}divergence/{}-DATE-{}", report.vm, Side::Secondary);
        return Err(AnalyseError::Primary { dir: dir.to_owned(), place });
    }
    if let Part::Missing(reason) = &report.recording {
        return Err(AnalyseError::NoRecording { dir: dir.to_owned(), reason: reason.clone() });
    }
    let recording = Arc::new(RecordingDir::open(&dir.join(RECORDING_DIR))?);
    let mut work = Work { recording, engines, trials: Vec::new(), told };
    let cause = work.find(dir, &report)?;
    let (recording, trials) = (work.recording.path().to_owned(), work.trials);
    Ok(Analysis { report: Some(report), recording, trials, cause })
}

/// Looks for what two engines differ in on a recording.
///
/// # Errors
/// [`AnalyseError`].
pub fn analyse_recording(
    dir: &Path,
    engines: &[EngineKind],
    told: &mut dyn FnMut(&str),
) -> Result<Analysis, AnalyseError> {
    let recording = Arc::new(RecordingDir::open(dir)?);
    let mut work = Work { recording, engines, trials: Vec::new(), told };
    let cause = work.find_between_engines()?;
    let (recording, trials) = (work.recording.path().to_owned(), work.trials);
    Ok(Analysis { report: None, recording, trials, cause })
}

/// Manners that are tried from the last right digest on, in this order.
const MANNERS: [Manner; 4] =
    [Manner::Interpreter, Manner::JitSingly, Manner::JitAtOnce, Manner::Jit];

/// What a replay from one beginning says.
enum Verdict {
    Engines(Box<EngineDifference>),
    /// All make the same, and the log says so, too.
    AllRight(Manner),
    /// All make the same, and the log says something else.
    AllWrong {
        arrival: Arrival,
        rights: u64,
    },
}

struct Work<'a> {
    recording: Arc<RecordingDir>,
    engines: &'a [EngineKind],
    trials: Vec<Trial>,
    told: &'a mut dyn FnMut(&str),
}

impl Work<'_> {
    /// The manners that are wanted and can be had.
    fn manners(&self, bench: &mut Bench) -> Result<Vec<Manner>, AnalyseError> {
        let has_jit = bench.can_have(Manner::Jit);
        let mut manners = MANNERS.to_vec();
        manners.retain(|m| self.engines.contains(&m.engine()));
        manners.retain(|m| has_jit || m.engine() != EngineKind::Jit);
        if manners.is_empty() { Err(AnalyseError::NoEngine) } else { Ok(manners) }
    }

    fn follow(&mut self, bench: &mut Bench, manner: Manner) -> Followed {
        let from = bench.icount();
        (self.told)(&format!("replays from step {from}: {manner}"));
        let mut next = from.saturating_add(TOLD_STEPS);
        let told = &mut self.told;
        let followed = bench.follow(manner, &mut |icount| {
            if icount >= next {
                told(&format!("{manner}: right up to step {icount}"));
                next = icount.saturating_add(TOLD_STEPS);
            }
        });
        self.trials.push(Trial::new(manner, from, &followed.arrival));
        followed
    }

    /// Replays from a beginning of the recording, first in one manner, and from the last right digest on in all of them. With
    /// `lead` in that one, and in no other if it agrees with the log.
    fn try_from(&mut self, start: u64, lead: Option<Manner>) -> Result<Verdict, AnalyseError> {
        let mut bench = Bench::open(&self.recording, start)?;
        let manners = self.manners(&mut bench)?;
        let fastest = *manners.last().unwrap_or(&Manner::Interpreter);
        let (first, is_enough) = (lead.unwrap_or(fastest), lead.is_some());
        let followed = self.follow(&mut bench, first);
        if is_enough && followed.arrival.agrees() {
            return Ok(Verdict::AllRight(first));
        }
        let base = bench.icount();
        let mut tried = Vec::new();
        for manner in manners {
            (self.told)(&format!("compares from step {base} on: {manner}"));
            let arrival = bench.try_out(manner, followed.goal);
            self.trials.push(Trial::new(manner, base, &arrival));
            tried.push((manner, arrival));
        }
        // The reference is the first of them.
        let (reference, there) = tried.remove(0);
        let differs = |(_, arrival): &&(Manner, Arrival)| !arrival.is_same(&there);
        if let Some((other, arrival)) = tried.iter().find(differs) {
            let to = there.icount.min(arrival.icount);
            let found = self.narrow(bench, (reference, *other), to, followed.goal);
            return Ok(Verdict::Engines(Box::new(found)));
        }
        if !followed.arrival.is_same(&there) {
            // As it was after all that it had run before; it does not do so anew.
            let (_, view) = bench.view(reference, followed.goal);
            let found = EngineDifference {
                reference,
                other: first,
                from: base,
                to: followed.arrival.icount,
                is_narrow: false,
                steps: Vec::new(),
                made_by: None,
                differences: compare_views(&bench, &view, &followed.view, None),
            };
            return Ok(Verdict::Engines(Box::new(found)));
        }
        Ok(if there.agrees() {
            Verdict::AllRight(first)
        } else {
            Verdict::AllWrong { arrival: there, rights: followed.rights }
        })
    }

    /// Looks for the instruction between the base and the step `to`.
    fn narrow(
        &mut self,
        mut bench: Bench,
        (reference, other): (Manner, Manner),
        to: u64,
        goal: Goal,
    ) -> EngineDifference {
        let mut pair = Pair { bench: &mut bench, reference, other };
        let Some(search) = Search::begin(&mut pair, to) else {
            return large(&mut bench, (reference, other), to, goal);
        };
        let (told, mut next) = (&mut self.told, u64::MAX);
        let to = search.run(&mut |from, to| {
            if to - from <= next {
                told(&format!("it lies between steps {from} and {to}"));
                next = (to - from) / 16;
            }
        });
        let from = bench.icount();
        let listed = from.max(to.saturating_sub(STEPS_MAX));
        let steps = bench.trace(reference, listed, to);
        let differences = differences(&mut bench, (reference, other), Goal::Step(to), &steps);
        let made_by = made_by(&mut bench, reference, to, &differences);
        EngineDifference {
            reference,
            other,
            from,
            to,
            is_narrow: true,
            steps,
            made_by,
            differences,
        }
    }

    /// What made the secondary differ.
    fn find(&mut self, dir: &Path, report: &Report) -> Result<Cause, AnalyseError> {
        let starts = self.recording.start_steps();
        if starts.is_empty() {
            return Err(OpenRecordingError::NoStart(self.recording.path().to_owned()).into());
        }
        let before = report.last_right.unwrap_or(report.icount);
        let at = starts.partition_point(|start| *start <= before).max(1);
        let mut wrong_since = None;
        let mut last = None;
        for start in starts.iter().take(at).rev() {
            match self.try_from(*start, None)? {
                Verdict::Engines(difference) => return Ok(Cause::Engines(difference)),
                Verdict::AllRight(lead) => {
                    if let Some(engine) = self.not_tried(&report.engine) {
                        return Ok(not_excluded("secondary", engine));
                    }
                    return self.compare_state(dir, report, (*start, lead), wrong_since);
                }
                Verdict::AllWrong { arrival, rights } => {
                    let is_digest = report.digests.is_none_or(|d| d.secondary == arrival.digest);
                    let is_ours = arrival.icount == report.icount && is_digest;
                    if is_ours && rights > 0 {
                        // What the primary ran on is not known here.
                        let mut engines = ["jit", "interpreter"].into_iter();
                        let missing = engines.find_map(|engine| self.not_tried(engine));
                        return Ok(match missing {
                            Some(engine) => not_excluded("primary", engine),
                            None => Cause::Primary,
                        });
                    }
                    (wrong_since, last) = (Some(*start), Some((is_ours, arrival)));
                }
            }
        }
        let first = starts.first().copied().unwrap_or(0);
        Ok(Cause::unknown(match last {
            Some((true, _)) => format!(
                "the engines make what the secondary had, but its recording has no right digest behind its beginning at \
                 step {first}: either its memory was wrong already when that was taken, or the primary's was"
            ),
            Some((false, arrival)) => format!(
                "the engines agree with each other, and with neither replica: at step {} their digest is {:#018x}. The \
                 secondary's memory was wrong already when its recording began, at step {first}",
                arrival.icount, arrival.digest
            ),
            None => "the recording has no beginning".to_owned(),
        }))
    }

    /// The engine of this name, if there is one that was not tried.
    fn not_tried(&self, engine: &str) -> Option<EngineKind> {
        let engine = engine.parse().ok()?;
        let was_tried = self.trials.iter().any(|trial| trial.manner.engine() == engine);
        (!was_tried).then_some(engine)
    }

    /// The log makes of the machine at `start` what it says: what was kept is something else.
    fn compare_state(
        &mut self,
        dir: &Path,
        report: &Report,
        (start, manner): (u64, Manner),
        wrong_since: Option<u64>,
    ) -> Result<Cause, AnalyseError> {
        if let Part::Missing(reason) = &report.state {
            return Ok(Cause::unknown(format!(
                "the engines agree with the log, so that the secondary's machine was changed from outside; its state, \
                 which would show how, was not kept: {reason}"
            )));
        }
        (self.told)("compares the kept state with what the log makes");
        let mut bench = Bench::open(&self.recording, start)?;
        let arrival = bench.go_to_end(manner);
        let reader = SnapshotReader::open(&dir.join(STATE_FILE))?;
        let (here, kept) = (arrival.icount, reader.head().saved.icount);
        if here != kept {
            return Ok(Cause::unknown(format!(
                "the replay comes to step {here}, the kept state is of step {kept}"
            )));
        }
        let differences = compare_kept(&mut bench, reader)?;
        if differences.is_none() {
            return Ok(Cause::Digest);
        }
        let gpa = differences.memory.first().map(|run| run.gpa);
        let last_write = gpa.and_then(|gpa| self.last_write(gpa, manner.engine()));
        Ok(Cause::Secondary(Box::new(StateDifference {
            icount: here,
            differences,
            last_write,
            wrong_since,
        })))
    }

    /// The last write to a byte in the recording; none when that cannot be found out.
    fn last_write(&mut self, gpa: u64, engine: EngineKind) -> Option<LastWrite> {
        (self.told)(&format!("looks for the last write to {gpa:#x}"));
        let mut timeline = Timeline::open(self.recording.path(), Some(engine)).ok()?;
        let never = AtomicBool::new(false);
        let since = timeline.first();
        if timeline.goto(timeline.last(), &never) != Stop::Reached {
            return None;
        }
        timeline.set_watchpoints(vec![Watch {
            hart: None,
            va: gpa,
            len: 1,
            kind: WatchKind::Write,
        }]);
        let icount = match timeline.reverse_resume(&never) {
            Stop::Watchpoint { before, .. } => Some(before),
            Stop::Begin => None,
            _ => return None,
        };
        Some(LastWrite { gpa, icount, since })
    }

    /// The first thing that engines differ in on the whole recording.
    fn find_between_engines(&mut self) -> Result<Cause, AnalyseError> {
        let mut bench = Bench::open(&self.recording, 0)?;
        let manners = self.manners(&mut bench)?;
        drop(bench);
        let leads = [Manner::Jit, Manner::Interpreter, Manner::JitAtOnce];
        for lead in leads.into_iter().filter(|lead| manners.contains(lead)) {
            match self.try_from(0, Some(lead))? {
                Verdict::Engines(difference) => return Ok(Cause::Engines(difference)),
                Verdict::AllRight(_) => {}
                Verdict::AllWrong { arrival, .. } => {
                    return Ok(Cause::unknown(format!(
                        "the engines agree with each other, and not with the recording: at step {} their digest is \
                         {:#018x}. What recorded it was another build, or its memory was changed from outside",
                        arrival.icount, arrival.digest
                    )));
                }
            }
        }
        Ok(Cause::unknown("nothing differs: every engine makes all digests of the recording"))
    }
}

/// Two manners of running one machine.
struct Pair<'a> {
    bench: &'a mut Bench,
    reference: Manner,
    other: Manner,
}

impl Runs for Pair<'_> {
    type State = (u64, u64);
    type Before = Before;

    fn base(&self) -> u64 {
        self.bench.icount()
    }

    fn state(&mut self, run: Run, step: u64) -> (u64, u64) {
        let manner = match run {
            Run::Reference => self.reference,
            Run::Other => self.other,
        };
        let Arrival { icount, digest, .. } = self.bench.try_out(manner, Goal::Step(step));
        (icount, digest)
    }

    fn advance(&mut self, step: u64) -> Before {
        self.bench.advance(self.reference, step)
    }

    fn retreat(&mut self, before: Before) {
        self.bench.retreat(before);
    }
}

/// All that was tried is the same, but not all was tried.
fn not_excluded(side: &str, engine: EngineKind) -> Cause {
    Cause::unknown(format!(
        "what was run agrees, but the {side} may have run on the {engine}, which was not: name it with --engines, on a host \
         that can have it"
    ))
}

/// Steps between two words on how far a replay is.
const TOLD_STEPS: u64 = 5_000_000_000;

/// A difference that is not found again in less than all that lies between the base and the goal.
fn large(
    bench: &mut Bench,
    (reference, other): (Manner, Manner),
    to: u64,
    goal: Goal,
) -> EngineDifference {
    let from = bench.icount();
    let differences = differences(bench, (reference, other), goal, &[]);
    EngineDifference {
        reference,
        other,
        from,
        to,
        is_narrow: false,
        steps: Vec::new(),
        made_by: None,
        differences,
    }
}

/// What two manners make of the base.
fn differences(
    bench: &mut Bench,
    (reference, other): (Manner, Manner),
    goal: Goal,
    steps: &[Step],
) -> Differences {
    let (_, left) = bench.view(reference, goal);
    let (_, right) = bench.view(other, goal);
    compare_views(bench, &left, &right, steps.last().map(|step| step.hart))
}

/// The step between the base and `to` that makes the first thing that differs.
fn made_by(bench: &mut Bench, manner: Manner, to: u64, differences: &Differences) -> Option<u64> {
    if to - bench.icount() > TRACED_MAX {
        return None;
    }
    if let Some(run) = differences.memory.first() {
        let byte = |machine: &Machine| {
            let mut byte = [0];
            machine.ram().read(run.gpa, &mut byte).ok()?;
            Some(u64::from(byte[0]))
        };
        return bench.last_change(manner, to, &byte);
    }
    let differing = |h: &HartRegisters| h.registers.iter().find(|r| r.differs()).cloned();
    let (hart, register) = differences.harts.iter().find_map(|h| Some((h.hart, differing(h)?)))?;
    let value = |machine: &Machine| value_of(&machine.harts().get(hart)?.save(), &register.name);
    bench.last_change(manner, to, &value)
}

fn compare_views(bench: &Bench, left: &View, right: &View, ran: Option<usize>) -> Differences {
    let mut found = Differences::of(Some(bench.saved()), &left.saved, &right.saved, ran);
    for (page, left, right) in left.pages(right) {
        found.page(page, left, right);
    }
    found
}

/// Compares the machine on the bench with a kept one.
fn compare_kept(bench: &mut Bench, mut kept: SnapshotReader) -> Result<Differences, SnapshotError> {
    let saved = bench.save();
    let mut found = Differences::of(None, &saved, &kept.head().saved, None);
    let ram = bench.machine().ram();
    let page_of = |page: u32| {
        let first = page as usize * PAGE_SIZE;
        ram.bytes().get(first..first + PAGE_SIZE)
    };
    let zero = [0; PAGE_SIZE];
    let mut seen = BTreeSet::new();
    while let Some(item) = kept.next_item()? {
        let SnapshotItem::Pages(items) = item else { continue };
        for (page, data) in items {
            let unfit = || SnapshotError::Unfit {
                path: kept.path().to_owned(),
                reason: format!("it has a page {page}, which its machine has not"),
            };
            let here = page_of(page).ok_or_else(unfit)?;
            let there = data.as_deref().unwrap_or(&zero);
            seen.insert(page);
            found.page(page, here, there);
        }
    }
    for page in (0..ram.pages()).filter(|page| !seen.contains(page)) {
        if let Some(here) = page_of(page).filter(|here| !is_zero(here)) {
            found.page(page, here, &zero);
        }
    }
    Ok(found)
}

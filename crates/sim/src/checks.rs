//! What must hold, whatever happens: one checker for each invariant of the protocol.

use std::collections::{BTreeMap, BTreeSet};

use replica::{LogPos, Record};

use crate::toy::{Output, Toy};

/// A broken invariant, with the simulated time in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{invariant} at {at_us} us: {what}")]
pub struct Violation {
    /// Which.
    pub invariant: &'static str,
    /// When.
    pub at_us: u64,
    /// How.
    pub what: String,
}

/// Who runs the VM by the record, and since when it wanted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Runner {
    pub(crate) host: usize,
    pub(crate) generation: u64,
    pub(crate) decided_at: u64,
}

/// What the world outside has seen.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    pub(crate) now: u64,
    pub(crate) detection_us: u64,
    pub(crate) released: BTreeMap<u64, Output>,
    pub(crate) acked: BTreeSet<u64>,
    pub(crate) releases: u64,
    pub(crate) runner: Option<Runner>,
    pub(crate) last_release: Option<(usize, u64)>,
}

impl Checks {
    fn fail(&self, invariant: &'static str, what: String) -> Result<(), Violation> {
        Err(Violation { invariant, at_us: self.now, what })
    }

    /// INV-REPLICA-1: no released output that the one who runs the VM does not know of. `runner` is its machine, if it
    /// is up.
    pub(crate) fn replica_1_release(
        &mut self,
        host: usize,
        output: Output,
        runner: Option<&Toy>,
    ) -> Result<(), Violation> {
        self.releases += 1;
        self.acked.extend(output.acks);
        if let Some(known) = self.released.insert(output.icount, output)
            && known != output
        {
            return self.fail("INV-REPLICA-1", format!("{known:?} was released, now {output:?}"));
        }
        if let (Some(by), Some(toy)) = (self.runner, runner)
            && by.host != host
            && toy.outputs.get(&output.icount) != Some(&output)
        {
            let what = format!("host {host} released {output:?}, unknown to live host {}", by.host);
            return self.fail("INV-REPLICA-1", what);
        }
        Ok(())
    }

    /// INV-REPLICA-1: who goes live knows all that was released.
    pub(crate) fn replica_1_go_live(&self, toy: &Toy) -> Result<(), Violation> {
        if let Some(write) = self.acked.difference(&toy.writes).next() {
            return self.fail("INV-REPLICA-1", format!("acknowledged write {write} is lost"));
        }
        for (icount, output) in &self.released {
            if toy.outputs.get(icount) != Some(output) {
                return self
                    .fail("INV-REPLICA-1", format!("{output:?} is unknown to the survivor"));
            }
        }
        Ok(())
    }

    /// INV-REPLICA-2: the arbiter's history has a record that makes this host live, and it is the last to do so.
    pub(crate) fn replica_2_winner(
        &self,
        history: &[Record],
        name: &replica::HostId,
        generation: u64,
    ) -> Result<(), Violation> {
        let index = generation.wrapping_sub(1) as usize;
        match history.get(index) {
            Some(record) if record.live.as_ref() == Some(name) => {}
            other => {
                let what =
                    format!("{name} goes live by generation {generation}, which is {other:?}");
                return self.fail("INV-REPLICA-2", what);
            }
        }
        if self.runner.is_some_and(|runner| runner.generation >= generation) {
            return self.fail("INV-REPLICA-2", format!("generation {generation} goes back"));
        }
        let superseded = history[index..].iter().any(|record| record.live.as_ref() != Some(name));
        if superseded {
            return self.fail("INV-REPLICA-2", format!("{name} goes live after it was succeeded"));
        }
        Ok(())
    }

    /// INV-REPLICA-2: generations rise by one.
    pub(crate) fn replica_2_generations(&self, history: &[Record]) -> Result<(), Violation> {
        match history {
            [.., before, after] if after.generation != before.generation + 1 => {
                self.fail("INV-REPLICA-2", format!("{before:?} is followed by {after:?}"))
            }
            _ => Ok(()),
        }
    }

    /// INV-REPLICA-3: a host that was not named does not become live.
    pub(crate) fn replica_3_claimant(&self, history: &[Record]) -> Result<(), Violation> {
        match history {
            [.., before, after]
                if after.live.is_some()
                    && after.live != before.live
                    && before.live.is_some()
                    && after.live != before.secondary =>
            {
                self.fail("INV-REPLICA-3", format!("{before:?} is followed by {after:?}"))
            }
            _ => Ok(()),
        }
    }

    /// INV-REPLICA-3: when a host is named, it has received everything that was released.
    pub(crate) fn replica_3_named(&self, received: LogPos) -> Result<(), Violation> {
        match self.released.keys().next_back() {
            Some(&last) if last > received.icount => {
                let what = format!("named with the log up to {received}, released up to {last}");
                self.fail("INV-REPLICA-3", what)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// INV-REPLICA-4: who goes live has replayed its log to the end.
    pub(crate) fn replica_4_replayed(&self, toy: &Toy, at: LogPos) -> Result<(), Violation> {
        if toy.pos == at {
            return Ok(());
        }
        self.fail("INV-REPLICA-4", format!("goes live at {at}, replayed up to {}", toy.pos))
    }

    /// INV-REPLICA-5: a host that was succeeded stops releasing within the detection time.
    pub(crate) fn replica_5_release(&mut self, host: usize) -> Result<(), Violation> {
        self.last_release = Some((host, self.now));
        match self.runner {
            Some(runner)
                if runner.host != host && self.now > runner.decided_at + self.detection_us =>
            {
                self.fail("INV-REPLICA-5", format!("host {host} released long after {runner:?}"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// INV-REPLICA-5: the same for releases between the decision and going live.
    pub(crate) fn replica_5_go_live(&self, new: Runner) -> Result<(), Violation> {
        match self.last_release {
            Some((host, at)) if host != new.host && at > new.decided_at + self.detection_us => {
                self.fail("INV-REPLICA-5", format!("host {host} released at {at}, before {new:?}"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Lockstep: two machines at one position have one state.
    pub(crate) fn lockstep(&self, ours: u64, theirs: u64, at: LogPos) -> Result<(), Violation> {
        if ours == theirs {
            return Ok(());
        }
        self.fail("INV-LOCKSTEP", format!("states differ at {at}"))
    }

    /// INV-REPLICA-6: it healed.
    pub(crate) fn replica_6_healed(&self, healed: bool, states: &str) -> Result<(), Violation> {
        if healed {
            return Ok(());
        }
        self.fail("INV-REPLICA-6", format!("not protected again: {states}"))
    }
}

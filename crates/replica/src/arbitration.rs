//! Questions to the arbiter: a compare-and-set register for each VM, asked until the answer is known.
//!
//! # Invariants
//! Part of INV-REPLICA-2. A claim is repeated with the same record and the same expected generation, so that
//! repetition is harmless: the register either never had the expected generation since, or holds this very record, or
//! holds somebody else's.
//!
//! # Failure
//! No answer, or [`ArbiterReply::Unreachable`], says nothing about whether the claim was stored.

use serde::{Deserialize, Serialize};

use crate::config::{HostId, MonoTime};
use crate::event::Command;
use crate::node::Cx;

/// The arbiter's record of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Raised by one with every change; a VM without a record counts as generation 0.
    pub generation: u64,
    /// The host that may run the VM.
    pub live: Option<HostId>,
    /// The host that may take over.
    pub secondary: Option<HostId>,
    /// Tells claims apart that would look the same otherwise.
    pub nonce: u64,
}

/// The arbiter's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArbiterReply {
    /// The record as it is.
    Read(Option<Record>),
    /// The record was replaced.
    Won,
    /// The generation was not the expected one; the record as it is.
    Lost(Option<Record>),
    /// No answer; what was asked may have been done, or may still be done.
    Unreachable,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Question {
    Read,
    Claim { expected: u64, new: Record },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Asked { at: MonoTime },
    Pause { until: MonoTime },
}

/// A question to the arbiter under way.
#[derive(Debug, Clone)]
pub(crate) struct Inquiry {
    op: u64,
    question: Question,
    step: Step,
    failures: u32,
}

/// What the arbiter said in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Read(Option<Record>),
    Won(Record),
    Lost(Option<Record>),
}

impl Inquiry {
    /// Asks for the record.
    pub(crate) fn read(cx: &mut Cx<'_>) -> Self {
        Self::ask(cx, Question::Read)
    }

    /// Claims the generation after `expected` for the given roles.
    pub(crate) fn claim(
        cx: &mut Cx<'_>,
        expected: u64,
        live: Option<HostId>,
        secondary: Option<HostId>,
    ) -> Self {
        let nonce = cx.core.next_nonce();
        let new = Record { generation: expected.saturating_add(1), live, secondary, nonce };
        Self::ask(cx, Question::Claim { expected, new })
    }

    fn ask(cx: &mut Cx<'_>, question: Question) -> Self {
        let op = cx.core.next_op();
        let inquiry = Self { op, question, step: Step::Asked { at: cx.now }, failures: 0 };
        inquiry.send(cx);
        inquiry
    }

    fn send(&self, cx: &mut Cx<'_>) {
        cx.out.push(match &self.question {
            Question::Read => Command::ArbiterRead { op: self.op },
            Question::Claim { expected, new } => {
                Command::ArbiterCas { op: self.op, expected: *expected, new: new.clone() }
            }
        });
    }

    pub(crate) fn on_reply(
        &mut self,
        cx: &Cx<'_>,
        op: u64,
        reply: ArbiterReply,
    ) -> Option<Outcome> {
        if op != self.op {
            return None;
        }
        match (reply, &self.question) {
            (ArbiterReply::Unreachable, _) => {
                if matches!(self.step, Step::Asked { .. }) {
                    self.pause(cx);
                }
                None
            }
            (ArbiterReply::Read(record), Question::Read) => Some(Outcome::Read(record)),
            (ArbiterReply::Won, Question::Claim { new, .. }) => Some(Outcome::Won(new.clone())),
            (ArbiterReply::Lost(record), Question::Claim { new, .. }) => {
                if record.as_ref() == Some(new) {
                    Some(Outcome::Won(new.clone()))
                } else {
                    Some(Outcome::Lost(record))
                }
            }
            (ArbiterReply::Read(_), Question::Claim { .. })
            | (ArbiterReply::Won | ArbiterReply::Lost(_), Question::Read) => None,
        }
    }

    fn pause(&mut self, cx: &Cx<'_>) {
        let cfg = &cx.core.cfg;
        let backoff = cfg.arbiter_backoff_us.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.step = Step::Pause { until: cx.now.after(backoff.min(cfg.arbiter_backoff_max_us)) };
    }

    pub(crate) fn tick(&mut self, cx: &mut Cx<'_>) {
        match self.step {
            Step::Asked { at } => {
                if cx.now.micros_since(at) > cx.core.cfg.arbiter_timeout_us {
                    self.pause(cx);
                }
            }
            Step::Pause { until } => {
                if cx.now >= until {
                    self.step = Step::Asked { at: cx.now };
                    self.send(cx);
                }
            }
        }
    }

    /// Whether the arbiter failed to answer at least once.
    pub(crate) fn is_failing(&self) -> bool {
        self.failures > 0
    }
}

//! In what two states of a machine differ, for people.
//!
//! # Failure
//! However much differs, what is listed has a bound; the totals are of all of it.

use std::collections::VecDeque;

use machine::MachineSaved;
use machine::board::state::DeviceSaved;
use machine::hart::HartSaved;
use machine::io::BlkOp;
use machine::ram::{PAGE_SIZE, RAM_BASE};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// Runs of bytes that are listed.
const RUNS_MAX: usize = 64;
/// Bytes of a run that are listed.
const RUN_BYTES_MAX: usize = 32;
/// Fields of devices that are listed.
const FIELDS_MAX: usize = 64;
/// Data of a write that waits for its disk is compared by a hash, if it is longer than this.
const DATA_MAX: usize = 64;

const X_NAMES: [&str; 32] = [
    "x0 zero", "x1 ra", "x2 sp", "x3 gp", "x4 tp", "x5 t0", "x6 t1", "x7 t2", "x8 s0", "x9 s1",
    "x10 a0", "x11 a1", "x12 a2", "x13 a3", "x14 a4", "x15 a5", "x16 a6", "x17 a7", "x18 s2",
    "x19 s3", "x20 s4", "x21 s5", "x22 s6", "x23 s7", "x24 s8", "x25 s9", "x26 s10", "x27 s11",
    "x28 t3", "x29 t4", "x30 t5", "x31 t6",
];

const F_NAMES: [&str; 32] = [
    "f0 ft0", "f1 ft1", "f2 ft2", "f3 ft3", "f4 ft4", "f5 ft5", "f6 ft6", "f7 ft7", "f8 fs0",
    "f9 fs1", "f10 fa0", "f11 fa1", "f12 fa2", "f13 fa3", "f14 fa4", "f15 fa5", "f16 fa6",
    "f17 fa7", "f18 fs2", "f19 fs3", "f20 fs4", "f21 fs5", "f22 fs6", "f23 fs7", "f24 fs8",
    "f25 fs9", "f26 fs10", "f27 fs11", "f28 ft8", "f29 ft9", "f30 ft10", "f31 ft11",
];

/// A register in both states, and in the one that they come from, if that is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Register {
    /// Its name.
    pub name: String,
    /// Before.
    #[serde(serialize_with = "hex_option", skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// In the one.
    #[serde(serialize_with = "hex")]
    pub left: u64,
    /// In the other.
    #[serde(serialize_with = "hex")]
    pub right: u64,
}

impl Register {
    /// Whether the two states differ in it.
    #[must_use]
    pub fn differs(&self) -> bool {
        self.left != self.right
    }
}

pub(super) fn hex<S: serde::Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{value:#x}"))
}

pub(super) fn hex_option<S: serde::Serializer>(
    value: &Option<u64>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => hex(value, to),
        None => to.serialize_none(),
    }
}

fn hex_bytes<S: serde::Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    to.serialize_str(&text)
}

/// A hart's registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HartRegisters {
    /// The hart.
    pub hart: usize,
    /// All of its registers, or those that differ.
    pub registers: Vec<Register>,
}

/// Bytes side by side that all differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryRun {
    /// Guest physical address.
    #[serde(serialize_with = "hex")]
    pub gpa: u64,
    /// How many.
    pub bytes: usize,
    /// The first of them in the one.
    #[serde(serialize_with = "hex_bytes")]
    pub left: Vec<u8>,
    /// And in the other.
    #[serde(serialize_with = "hex_bytes")]
    pub right: Vec<u8>,
}

/// A field of the machine's saved state that is no register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Where it is.
    pub path: String,
    /// In the one.
    pub left: String,
    /// In the other.
    pub right: String,
}

/// All in which two states differ.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Differences {
    /// Registers by hart: all of those of the hart that ran, and else those that differ.
    pub harts: Vec<HartRegisters>,
    /// Memory.
    pub memory: Vec<MemoryRun>,
    /// Bytes of memory that differ.
    pub memory_bytes: u64,
    /// Pages of memory that differ.
    pub memory_pages: u64,
    /// Devices, and what else there is.
    pub devices: Vec<Field>,
}

impl Differences {
    /// Compares all but memory. Of the hart `ran` all registers are listed.
    pub(super) fn of(
        before: Option<&MachineSaved>,
        left: &MachineSaved,
        right: &MachineSaved,
        ran: Option<usize>,
    ) -> Self {
        let mut found = Self::default();
        for (hart, (a, b)) in left.harts.iter().zip(&right.harts).enumerate() {
            let before = before.and_then(|saved| saved.harts.get(hart));
            let mut registers = registers(before, a, b);
            if ran != Some(hart) {
                registers.retain(Register::differs);
            }
            if !registers.is_empty() {
                found.harts.push(HartRegisters { hart, registers });
            }
        }
        compare(&rest_of(left), &rest_of(right), &mut String::new(), &mut found.devices);
        found
    }

    /// Compares a page.
    pub(super) fn page(&mut self, page: u32, left: &[u8], right: &[u8]) {
        if left == right {
            return;
        }
        self.memory_pages += 1;
        let first = RAM_BASE + u64::from(page) * PAGE_SIZE as u64;
        let mut next = None;
        for (at, (a, b)) in left.iter().zip(right).enumerate().filter(|(_, (a, b))| a != b) {
            self.memory_bytes += 1;
            if next != Some(at) {
                if self.memory.len() == RUNS_MAX {
                    continue;
                }
                let gpa = first + at as u64;
                self.memory.push(MemoryRun { gpa, bytes: 0, left: vec![], right: vec![] });
            }
            next = Some(at + 1);
            let Some(run) = self.memory.last_mut() else { continue };
            run.bytes += 1;
            if run.bytes <= RUN_BYTES_MAX {
                run.left.push(*a);
                run.right.push(*b);
            }
        }
    }

    /// Whether there is no difference at all.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.memory_bytes == 0 && self.devices.is_empty() && self.registers_different() == 0
    }

    /// Registers in which they differ.
    #[must_use]
    pub fn registers_different(&self) -> usize {
        self.harts.iter().flat_map(|h| &h.registers).filter(|r| r.differs()).count()
    }
}

fn registers(before: Option<&HartSaved>, left: &HartSaved, right: &HartSaved) -> Vec<Register> {
    let before = before.map(values);
    let both = values(left).into_iter().zip(values(right));
    both.enumerate()
        .map(|(at, ((name, left), (_, right)))| {
            let before = before.as_ref().and_then(|all| all.get(at)).map(|(_, value)| *value);
            Register { name, before, left, right }
        })
        .collect()
}

/// A register by its name.
pub(super) fn value_of(hart: &HartSaved, name: &str) -> Option<u64> {
    values(hart).into_iter().find_map(|(known, value)| (known == name).then_some(value))
}

/// A hart's registers with their names.
fn values(hart: &HartSaved) -> Vec<(String, u64)> {
    let mut all = vec![("pc".to_owned(), hart.pc), ("mode".to_owned(), hart.mode as u64)];
    let named = |names: [&str; 32], values: &[u64]| {
        let named = names.into_iter().zip(values.iter().copied());
        named.map(|(name, value)| (name.to_owned(), value)).collect::<Vec<_>>()
    };
    all.extend(named(X_NAMES, &hart.x));
    all.extend(named(F_NAMES, &hart.f));
    if let Ok(Value::Object(csrs)) = serde_json::to_value(&hart.csr) {
        all.extend(csrs.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))));
    }
    all
}

/// What is not memory and no register, small enough to be compared field by field.
fn rest_of(saved: &MachineSaved) -> Value {
    let mut board = saved.board.clone();
    for slot in &mut board.slots {
        let DeviceSaved::Blk(blk) = &mut slot.device else { continue };
        for request in &mut blk.requests {
            if let BlkOp::Write { data, .. } = &mut request.op
                && data.len() > DATA_MAX
            {
                *data = Sha256::digest(&*data).to_vec();
            }
        }
    }
    let harts: VecDeque<Value> = saved
        .harts
        .iter()
        .map(|hart| {
            serde_json::json!({
                "pmp": hart.pmp,
                "reservation": hart.reservation,
                "waiting": hart.waiting,
                "state": hart.state,
                "steps": hart.steps,
            })
        })
        .collect();
    serde_json::json!({
        "config": saved.config,
        "icount": saved.icount,
        "clock": saved.clock,
        "current": saved.current,
        "turn_left": saved.turn_left,
        "harts": harts,
        "board": board,
        "halted": saved.halted,
    })
}

/// Lists the leaves in which two trees differ.
fn compare(left: &Value, right: &Value, path: &mut String, found: &mut Vec<Field>) {
    if left == right || found.len() == FIELDS_MAX {
        return;
    }
    let length = path.len();
    match (left, right) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            for ((name, a), b) in a.iter().zip(b.values()) {
                if length > 0 {
                    path.push('.');
                }
                path.push_str(name);
                compare(a, b, path, found);
                path.truncate(length);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (at, (a, b)) in a.iter().zip(b).enumerate() {
                path.push_str(&format!("[{at}]"));
                compare(a, b, path, found);
                path.truncate(length);
            }
        }
        _ => {
            let (left, right) = (left.to_string(), right.to_string());
            found.push(Field { path: path.clone(), left, right });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bytes_are_told_apart_and_counted_beyond_what_is_listed() {
        let (left, mut right) = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
        let mut found = Differences::default();
        found.page(7, &left, &right);
        assert!(found.is_none());
        right[5] = 1;
        right[6] = 2;
        right[4095] = 3;
        found.page(1, &left, &right);
        let runs: Vec<_> = found.memory.iter().map(|run| (run.gpa, run.right.clone())).collect();
        assert_eq!(runs, [(RAM_BASE + 0x1005, vec![1, 2]), (RAM_BASE + 0x1fff, vec![3])]);
        for at in (0..PAGE_SIZE).step_by(2) {
            right[at] = 9;
        }
        found.page(2, &left, &right);
        found.page(3, &left, &vec![1; PAGE_SIZE]);
        assert_eq!((found.memory.len(), found.memory_pages), (RUNS_MAX, 3));
        assert_eq!(found.memory_bytes, 3 + 2048 + 2 + 4096);
        assert!(found.memory.iter().all(|run| run.right.len() <= RUN_BYTES_MAX));
    }

    #[test]
    fn fields_are_named_by_their_place() {
        let left = serde_json::json!({ "a": [1, { "b": null }], "c": { "d": 1 } });
        let right = serde_json::json!({ "a": [1, { "b": 7 }], "c": { "e": 1 } });
        let mut found = Vec::new();
        compare(&left, &right, &mut String::new(), &mut found);
        let text: Vec<_> =
            found.iter().map(|f| format!("{} {} {}", f.path, f.left, f.right)).collect();
        assert_eq!(text, ["a[1].b null 7", r#"c {"d":1} {"e":1}"#]);
    }
}

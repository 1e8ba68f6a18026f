//! An arbiter for VMs that only this process knows: `understudy run`.

use std::collections::BTreeMap;

use super::{Arbiter, ArbiterError, CasOutcome, Record};

/// Records in memory.
#[derive(Debug, Default)]
pub struct MemoryArbiter {
    records: BTreeMap<String, Record>,
}

impl Arbiter for MemoryArbiter {
    fn read(&mut self, vm: &str) -> Result<Option<Record>, ArbiterError> {
        Ok(self.records.get(vm).cloned())
    }

    fn compare_and_set(
        &mut self,
        vm: &str,
        expected: Option<u64>,
        new: &Record,
    ) -> Result<CasOutcome, ArbiterError> {
        let current = self.records.get(vm);
        if current == Some(new) {
            return Ok(CasOutcome::Won);
        }
        if current.map(|r| r.generation) != expected {
            return Ok(CasOutcome::Lost { current: current.cloned() });
        }
        self.records.insert(vm.to_owned(), new.clone());
        Ok(CasOutcome::Won)
    }

    fn describe(&self) -> String {
        "memory of this process".to_owned()
    }
}

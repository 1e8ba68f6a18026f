//! Arbitration: of all who claim generation N+1 of a VM, exactly one is told that it won.
//!
//! # Place
//! Called by the run loop when the replica core asks for a claim; may block, so it runs on a thread of its own.
//!
//! # Invariants
//! - INV-ARBITER-1: for each VM and generation, at most one record is ever stored, so at most one claimant wins.
//! - INV-ARBITER-2: the stored generation never goes back.
//! - INV-ARBITER-3: a claim is repeatable: asking again with the same record (its nonce names the attempt) after an
//!   ambiguous answer tells how the first attempt ended.
//!
//! # Failure
//! [`ArbiterError::Unreachable`] means that nothing was changed. [`ArbiterError::Ambiguous`] means that the claim may
//! have been stored, or may still be: ask again with the same record, never assume either. Malformed data is not
//! repaired: somebody has to look.
//!
//! # Format
//! JSON: `{"version":1,"generation":7,"live":"a","secondary":null,"nonce":12345}`; while nobody is live, with `copies`, a
//! list of hosts, which earlier builds pass over.

pub mod directory;
pub mod etcd;
pub mod memory;

mod base64;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::ArbiterSection;

/// Version of the stored form.
pub const RECORD_VERSION: u32 = 1;
/// Generation of the first record of a VM.
pub const FIRST_GENERATION: u64 = 1;
/// Most bytes that a stored record may have.
pub const RECORD_BYTES_MAX: usize = 16 * 1024;

/// What is agreed about a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Raised by one with each change.
    pub generation: u64,
    /// The host that may release output.
    pub live: Option<String>,
    /// The host that holds the log, if the VM is protected.
    pub secondary: Option<String>,
    /// Drawn by the claimant for each attempt.
    pub nonce: u64,
    /// While nobody is live: the hosts whose disks have all that the VM did, as far as that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    #[serde(flatten)]
    record: Record,
}

impl Record {
    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let stored = Stored { version: RECORD_VERSION, record: self.clone() };
        serde_json::to_vec(&stored).expect("numbers and strings always have a JSON form")
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// One line that says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(format!("{} bytes are too many for a record", bytes.len()));
        }
        let version: Version = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if version.version != RECORD_VERSION {
            return Err(format!(
                "record version {} found, this build knows {RECORD_VERSION}",
                version.version
            ));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        Ok(stored.record)
    }
}

/// How a claim ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CasOutcome {
    /// The record is stored, by this call or by an earlier one with the same record.
    Won,
    /// Another record is in force, or none where one was expected.
    Lost {
        /// What is stored now.
        current: Option<Record>,
    },
}

/// Why an arbiter gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// Nothing was changed; asking again later is safe.
    #[error("arbiter {arbiter} is not reachable: {reason}")]
    Unreachable {
        /// Which arbiter.
        arbiter: String,
        /// What failed.
        reason: String,
    },
    /// A claim was sent and its fate is unknown.
    #[error("arbiter {arbiter} did not say how the claim ended: {reason}")]
    Ambiguous {
        /// Which arbiter.
        arbiter: String,
        /// What failed.
        reason: String,
    },
    /// The stored data makes no sense.
    #[error("arbiter {arbiter} holds malformed data at {place}: {reason}")]
    Malformed {
        /// Which arbiter.
        arbiter: String,
        /// File or key.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// The request makes no sense; nothing was sent.
    #[error("claim refused before it was sent: {reason}")]
    BadRequest {
        /// What is wrong.
        reason: String,
    },
}

/// A place that gives each generation of a VM to one claimant only.
pub trait Arbiter: Send {
    /// The record in force, or none when the VM was never claimed.
    ///
    /// # Errors
    /// [`ArbiterError::Unreachable`], [`ArbiterError::Malformed`] or [`ArbiterError::BadRequest`].
    fn read(&mut self, vm: &str) -> Result<Option<Record>, ArbiterError>;

    /// Stores `new` if the generation in force is `expected` (`None`: no record). `new.generation` has to be the next
    /// one: `expected + 1`, or [`FIRST_GENERATION`].
    ///
    /// # Errors
    /// Any [`ArbiterError`]; only after [`ArbiterError::Ambiguous`] may the record have been stored.
    fn compare_and_set(
        &mut self,
        vm: &str,
        expected: Option<u64>,
        new: &Record,
    ) -> Result<CasOutcome, ArbiterError>;

    /// One line for people: which kind, and where.
    fn describe(&self) -> String;
}

/// The arbiter that a host is configured for; a call to etcd takes no longer than `timeout`.
///
/// # Errors
/// The directory cannot be used, or an endpoint is no HTTP address.
pub fn open(section: &ArbiterSection, timeout: Duration) -> Result<Box<dyn Arbiter>, ArbiterError> {
    Ok(match section {
        ArbiterSection::Dir(dir) => Box::new(directory::DirArbiter::open(dir)?),
        ArbiterSection::Etcd(endpoints) => Box::new(etcd::EtcdArbiter::new(endpoints, timeout)?),
    })
}

/// Checks what holds for each kind of arbiter before anything is sent.
fn check_claim(vm: &str, expected: Option<u64>, new: &Record) -> Result<(), ArbiterError> {
    check_vm(vm)?;
    let next = match expected {
        None => Some(FIRST_GENERATION),
        Some(g) => g.checked_add(1),
    };
    if next != Some(new.generation) {
        let reason = format!("generation {} does not follow {expected:?}", new.generation);
        return Err(ArbiterError::BadRequest { reason });
    }
    if new.encode().len() > RECORD_BYTES_MAX {
        return Err(ArbiterError::BadRequest { reason: "the record is too big".to_owned() });
    }
    Ok(())
}

fn check_vm(vm: &str) -> Result<(), ArbiterError> {
    crate::name::check_name(vm).map_err(|e| ArbiterError::BadRequest { reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_form_is_as_documented() {
        let copies = Vec::new();
        let r = Record {
            generation: 7,
            live: Some("a".into()),
            secondary: None,
            nonce: u64::MAX,
            copies,
        };
        let text = String::from_utf8(r.encode()).unwrap();
        assert_eq!(
            text,
            r#"{"version":1,"generation":7,"live":"a","secondary":null,"nonce":18446744073709551615}"#
        );
        assert_eq!(Record::decode(text.as_bytes()), Ok(r));
    }

    #[test]
    fn other_versions_and_garbage_are_told_apart() {
        let e = Record::decode(br#"{"version":2,"anything":[]}"#).unwrap_err();
        assert_eq!(e, "record version 2 found, this build knows 1");
        for bad in ["", "{", "{}", r#"{"version":1}"#, "\u{0}", "null"] {
            assert!(Record::decode(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_configured_arbiter_is_opened() {
        let tmp = tempfile::tempdir().unwrap();
        let open = |section| open(&section, etcd::TIMEOUT_DEFAULT).map(|a| a.describe());
        let dir = open(ArbiterSection::Dir(tmp.path().into())).unwrap();
        assert_eq!(dir, format!("directory {}", tmp.path().display()));
        let etcd = open(ArbiterSection::Etcd(vec!["http://127.0.0.1:1/".into()])).unwrap();
        assert_eq!(etcd, "etcd http://127.0.0.1:1");
        assert!(open(ArbiterSection::Dir(tmp.path().join("none"))).is_err());
    }

    #[test]
    fn only_the_next_generation_can_be_claimed() {
        let new = |generation| Record {
            generation,
            live: None,
            secondary: None,
            nonce: 0,
            copies: Vec::new(),
        };
        assert!(check_claim("vm", None, &new(1)).is_ok());
        assert!(check_claim("vm", Some(4), &new(5)).is_ok());
        assert!(check_claim("vm", None, &new(2)).is_err());
        assert!(check_claim("vm", Some(4), &new(4)).is_err());
        assert!(check_claim("vm", Some(u64::MAX), &new(0)).is_err());
        assert!(check_claim("../vm", None, &new(1)).is_err());
    }
}

//! Configuration of fencing: how a host is kept from writing to shared disks for certain.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::{PeerSection, Problem, problem};

const TIMEOUT_S_DEFAULT: u32 = 60;
const ATTEMPTS_DEFAULT: u32 = 3;
const GRACE_MS_DEFAULT: u32 = 300;

/// How other hosts are fenced.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FenceSection {
    /// Command of the shell for hosts without a section of their own.
    pub command: Option<String>,
    /// Longest that one attempt may take, in seconds.
    pub timeout_s: u32,
    /// How often it is tried.
    pub attempts: u32,
    /// How long a host has to let go a lock by itself, in milliseconds: one that lives, and lost its place, does so at once.
    pub grace_ms: u32,
    /// By name of the host to be fenced.
    #[serde(rename = "host")]
    pub hosts: BTreeMap<String, FenceHost>,
}

impl Default for FenceSection {
    fn default() -> Self {
        Self {
            command: None,
            timeout_s: TIMEOUT_S_DEFAULT,
            attempts: ATTEMPTS_DEFAULT,
            grace_ms: GRACE_MS_DEFAULT,
            hosts: BTreeMap::new(),
        }
    }
}

/// How one host is fenced: by a command or by a fence agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FenceHost {
    /// Command of the shell.
    pub command: Option<String>,
    /// One of the fence agents that Pacemaker uses, such as `fence_ipmilan`.
    pub agent: Option<String>,
    /// What the agent is told, beside the action.
    #[serde(deserialize_with = "scalars")]
    pub options: BTreeMap<String, String>,
    /// What the agent is to do.
    pub action: FenceAction,
}

/// What a fence agent does to a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FenceAction {
    /// Off and on again; the agent sees to it that it was off.
    #[default]
    Reboot,
    /// Off, which is asked for afterwards.
    Off,
}

/// See [`FenceSection::method`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceMethod {
    /// Command of the shell.
    Command(String),
    /// A fence agent.
    Agent {
        /// Its program.
        agent: String,
        /// What it is told.
        options: BTreeMap<String, String>,
        /// What it is to do.
        action: FenceAction,
    },
}

impl FenceSection {
    /// Whether it says of no host how to fence it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.command.is_none() && self.hosts.is_empty()
    }

    /// How to fence a host, if there is a way.
    #[must_use]
    pub fn method(&self, host: &str) -> Option<FenceMethod> {
        let own = self.hosts.get(host);
        if let Some(FenceHost { agent: Some(agent), options, action, .. }) = own {
            let (agent, options) = (agent.clone(), options.clone());
            return Some(FenceMethod::Agent { agent, options, action: *action });
        }
        let command = own.and_then(|own| own.command.as_ref()).or(self.command.as_ref());
        command.cloned().map(FenceMethod::Command)
    }

    /// Longest that one attempt may take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s.into())
    }

    /// How long a host has to let go a lock by itself.
    #[must_use]
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.grace_ms.into())
    }

    pub(super) fn check(&self, peers: &BTreeMap<String, PeerSection>) -> Result<(), Problem> {
        let bounds = [
            ("timeout_s", self.timeout_s, 1..=3600),
            ("attempts", self.attempts, 1..=100),
            ("grace_ms", self.grace_ms, 0..=600_000),
        ];
        for (key, value, range) in bounds {
            if !range.contains(&value) {
                let (low, high) = range.into_inner();
                let text = format!("{key} is {value}, it has to be from {low} to {high}");
                return Err(problem(key, text));
            }
        }
        for (host, section) in &self.hosts {
            if !peers.contains_key(host) {
                return Err(problem("fence", format!("fence.host.{host}: no such peer")));
            }
            section.check(host)?;
        }
        Ok(())
    }
}

impl FenceHost {
    fn check(&self, host: &str) -> Result<(), Problem> {
        match (&self.command, &self.agent) {
            (Some(_), None) if !self.options.is_empty() => {
                Err(problem("options", format!("fence.host.{host}: options are for an agent")))
            }
            (Some(_), None) => Ok(()),
            (None, Some(agent)) if agent.is_empty() => {
                Err(problem("agent", format!("fence.host.{host}: agent has no name")))
            }
            (None, Some(_)) => self.options.iter().try_for_each(|(key, value)| {
                let is_line = |text: &str| !text.contains(['\n', '\r', '\0']);
                if key.is_empty() || key.contains('=') || !is_line(key) || !is_line(value) {
                    let text = format!("fence.host.{host}: option {key:?} is not of one line");
                    return Err(problem("options", text));
                }
                if key == "action" {
                    let text = format!("fence.host.{host}: action is a key of its own");
                    return Err(problem("options", text));
                }
                Ok(())
            }),
            (Some(_), Some(_)) | (None, None) => {
                let text = format!("fence.host.{host}: give either a command or an agent");
                Err(problem("fence", text))
            }
        }
    }
}

/// Texts, numbers and switches, as texts.
fn scalars<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Scalar {
        Text(String),
        Number(i64),
        Switch(bool),
    }
    let given = BTreeMap::<String, Scalar>::deserialize(from)?;
    let text = |scalar| match scalar {
        Scalar::Text(text) => text,
        Scalar::Number(number) => number.to_string(),
        // As the agents have it.
        Scalar::Switch(on) => u8::from(on).to_string(),
    };
    Ok(given.into_iter().map(|(key, scalar)| (key, text(scalar))).collect())
}

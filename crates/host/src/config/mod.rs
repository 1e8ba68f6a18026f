//! Configuration files of the daemon and of VMs: TOML, every key known, every mistake reported as one line.
//!
//! # Place
//! Read by the binary and the daemon before anything is started.
//!
//! # Failure
//! [`ConfigError`] names the file, the line where there is one, and what is wrong.

mod cloud_init;
mod fence;
mod firmware;
mod size;
mod vm;

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use machine::engine::EngineKind;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};

pub use self::cloud_init::CloudInitSection;
pub use self::fence::{FenceAction, FenceHost, FenceMethod, FenceSection};
pub use self::size::{parse_size, render_size};
pub use self::vm::{
    DiskMode, DiskSection, Drawn, LAG_MS, NetSection, ProtectionSection, ReadsFrom, VmConfig,
    stable_mac,
};
use crate::channel::Route;
use crate::name::check_name;
use crate::one_line::flatten;

/// Longest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Time without a sign of life after which a peer counts as lost, unless configured.
pub const DETECTION_MS_DEFAULT: u32 = 100;
/// Range of detection times that makes sense.
const DETECTION_MS: std::ops::RangeInclusive<u32> = 10..=60_000;

/// What is wrong with a configuration, as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}{}: {problem}", line.map(|l| format!(":{l}")).unwrap_or_default())]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// Line in the file, from 1.
    pub line: Option<usize>,
    /// What is wrong.
    pub problem: String,
}

/// Where a generation is claimed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArbiterSection {
    /// A directory on storage that all hosts share.
    Dir(PathBuf),
    /// Endpoints of etcd.
    Etcd(Vec<String>),
}

/// Whether the log is made shorter on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogCompression {
    /// By LZ4, where that makes it shorter.
    Lz4,
    /// Not at all.
    #[default]
    None,
}

/// Where another host is: its address, or that and more.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "PeerText")]
pub struct PeerSection {
    /// Where it listens, with port.
    pub address: String,
    /// Where it listens on the network of the log.
    pub log_address: Option<String>,
    /// The second path of the log, instead of `address`.
    pub fallback: Option<String>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a peer is \"HOST:PORT\" or { address = \"HOST:PORT\", log_address = \"HOST:PORT\" }"
)]
enum PeerText {
    Address(String),
    Table(PeerTable),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerTable {
    address: String,
    log_address: Option<String>,
    fallback: Option<String>,
}

impl From<PeerText> for PeerSection {
    fn from(text: PeerText) -> Self {
        match text {
            PeerText::Address(address) => Self { address, log_address: None, fallback: None },
            PeerText::Table(PeerTable { address, log_address, fallback }) => {
                Self { address, log_address, fallback }
            }
        }
    }
}

impl PeerSection {
    /// The ways that log and disks take to it, the better one first; `source` is this host's address on the network of
    /// the log.
    #[must_use]
    pub fn routes(&self, source: Option<IpAddr>) -> Vec<Route> {
        let second = Route::to(self.fallback.as_ref().unwrap_or(&self.address));
        match &self.log_address {
            Some(address) => vec![Route { address: address.clone(), source }, second],
            None => vec![second],
        }
    }
}

/// Configuration of a host's daemon.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Name of this host.
    pub name: String,
    /// Address that peers connect to, with port.
    pub listen: String,
    /// Path of the control socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Directory for what has to be remembered.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// File with the secret that all hosts share.
    pub secret_file: PathBuf,
    /// Who decides which host is live.
    pub arbiter: ArbiterSection,
    /// Addresses, with ports, of the other hosts, by name.
    #[serde(default)]
    pub peers: BTreeMap<String, PeerSection>,
    /// Address, with port, on the network of the log: peers connect to it for log and disks, and this host from it.
    #[serde(default)]
    pub log_address: Option<String>,
    /// Whether the log is made shorter.
    #[serde(default)]
    pub log_compression: LogCompression,
    /// Time without a sign of life after which a peer counts as lost, in milliseconds.
    #[serde(default = "default_detection_ms")]
    pub detection_ms: u32,
    /// Most bytes of disks that a new secondary is sent in a second, unless a VM says otherwise; written as `"200M"`.
    #[serde(default, deserialize_with = "optional_size")]
    pub resync_limit: Option<u64>,
    /// The engine that runs machines here: `interpreter` or `jit`; the fastest that this host can have when absent.
    #[serde(default, deserialize_with = "engine_by_name")]
    pub engine: Option<EngineKind>,
    /// How another host is kept from writing to shared disks.
    #[serde(default)]
    pub fence: FenceSection,
}

/// A size that is not zero.
fn optional_size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    match parse_size(&text).map_err(D::Error::custom)? {
        0 => Err(D::Error::custom("0 bytes in a second would never be done")),
        bytes => Ok(Some(bytes)),
    }
}

fn engine_by_name<'de, D: Deserializer<'de>>(from: D) -> Result<Option<EngineKind>, D::Error> {
    String::deserialize(from)?.parse().map(Some).map_err(D::Error::custom)
}

fn default_socket() -> PathBuf {
    PathBuf::from("/run/understudy/control.sock")
}

fn default_state_dir() -> PathBuf {
    PathBuf::from("/var/lib/understudy")
}

fn default_detection_ms() -> u32 {
    DETECTION_MS_DEFAULT
}

impl HostConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&read_text(path)?, &path.display().to_string())
    }

    /// Reads and checks a text; `file` is used in messages.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let config: Self = parse_toml(text, file)?;
        config.check().map_err(|problem| at(text, file, problem))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), Problem> {
        check_name(&self.name).map_err(|e| problem("name", e.to_string()))?;
        check_address("listen", &self.listen)?;
        if let Some(address) = &self.log_address {
            check_address("log_address", address)?;
            if self.log_source().is_none() {
                let text =
                    format!("log_address {address:?} has no IP address: this host sends from it");
                return Err(problem("log_address", text));
            }
        }
        for (peer, section) in &self.peers {
            check_name(peer).map_err(|e| problem(peer, e.to_string()))?;
            let more = section.log_address.iter().chain(&section.fallback);
            for address in std::iter::once(&section.address).chain(more) {
                check_address(peer, address)?;
            }
            if *peer == self.name {
                return Err(problem(peer, format!("peer {peer:?} is this host itself")));
            }
        }
        if let ArbiterSection::Etcd(endpoints) = &self.arbiter {
            let bad = endpoints.iter().find(|e| !e.starts_with("http://"));
            if let Some(bad) = bad {
                let text = format!("etcd endpoint {bad:?} does not start with http://");
                return Err(problem("arbiter", text));
            }
            if endpoints.is_empty() {
                return Err(problem("arbiter", "etcd needs at least one endpoint".to_owned()));
            }
        }
        self.fence.check(&self.peers)?;
        check_detection(self.detection_ms)
    }
}

impl HostConfig {
    /// This host's address on the network of the log.
    #[must_use]
    pub fn log_source(&self) -> Option<IpAddr> {
        let address: SocketAddr = self.log_address.as_ref()?.parse().ok()?;
        Some(address.ip())
    }
}

/// A mistake that TOML itself does not find, and the key that it is about.
struct Problem {
    key: String,
    text: String,
}

fn problem(key: &str, text: String) -> Problem {
    Problem { key: key.to_owned(), text }
}

fn check_address(key: &str, address: &str) -> Result<(), Problem> {
    let port = address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
    match port {
        Some((host, Ok(_))) if !host.is_empty() => Ok(()),
        _ => Err(problem(key, format!("address {address:?} is not of the form HOST:PORT"))),
    }
}

fn check_detection(ms: u32) -> Result<(), Problem> {
    if DETECTION_MS.contains(&ms) {
        return Ok(());
    }
    let text = format!("detection_ms is {ms}, it has to be from 10 to 60000");
    Err(problem("detection_ms", text))
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    let fail =
        |problem: String| ConfigError { file: path.display().to_string(), line: None, problem };
    let file = std::fs::File::open(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|e| fail(format!("cannot be read: {e}")))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(fail("longer than 1 MiB".to_owned()));
    }
    Ok(text)
}

fn parse_toml<T: DeserializeOwned>(text: &str, file: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|e| ConfigError {
        file: file.to_owned(),
        line: e.span().map(|span| line_of(text, span.start)),
        problem: flatten(e.message()),
    })
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

/// Finds the line of the key that a problem is about.
fn at(text: &str, file: &str, problem: Problem) -> ConfigError {
    let is_about = |line: &str| {
        let line = line.trim_start().trim_start_matches('"');
        let rest = line.strip_prefix(problem.key.as_str());
        rest.is_some_and(|r| r.trim_start_matches('"').trim_start().starts_with('='))
    };
    ConfigError {
        file: file.to_owned(),
        line: text.lines().position(is_about).map(|l| l + 1),
        problem: problem.text,
    }
}

#[cfg(test)]
mod tests;

//! What the demo asks a host's daemon, by the same commands that an operator has.
//!
//! # Failure
//! A daemon that is dead, stopped or not yet up gives no answer within [`ANSWER_MAX`]: `None`, never an endless wait.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How long a daemon may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// How long the parts of a failover took, as the new live host tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Failover {
    /// Until the loss of the peer was noticed, in microseconds.
    pub(super) detection_us: u64,
    /// Until the arbiter had decided.
    pub(super) arbitration_us: u64,
    /// Until the log was replayed to its end.
    pub(super) catch_up_us: u64,
    /// Until the machine's addresses were announced.
    pub(super) announce_us: u64,
    /// When, in milliseconds since the Unix epoch.
    pub(super) at_unix_ms: u64,
}

/// A machine as one host's daemon sees it; what the daemon does not say is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct VmView {
    name: String,
    /// `Protected` or `Not Protected`.
    pub(super) state: String,
    detail: Option<String>,
    reason: Option<String>,
    remedy: Option<String>,
    /// The host on which the machine is live.
    pub(super) live_host: Option<String>,
    /// The host of the secondary.
    pub(super) secondary_host: Option<String>,
    /// Counts the changes of the live machine and its secondary.
    pub(super) generation: u64,
    /// The last failover.
    pub(super) failover: Option<Failover>,
    progress: Option<Value>,
}

impl VmView {
    /// Whether a secondary can take over at once.
    pub(super) fn is_protected(&self) -> bool {
        self.state.eq_ignore_ascii_case("protected")
    }

    /// One line for people.
    pub(super) fn words(&self) -> String {
        let mut line = self.state.clone();
        for more in [&self.detail, &self.reason, &self.remedy]
            .into_iter()
            .flatten()
            .filter(|t| !t.is_empty())
        {
            line = format!("{line}, {more}");
        }
        if let Some(progress) = self.progress.as_ref().filter(|value| !value.is_null()) {
            line = format!("{line}, {progress}");
        }
        line
    }

    #[cfg(test)]
    pub(super) fn sample(state: &str, live: &str, secondary: &str, generation: u64) -> Self {
        Self {
            state: state.into(),
            live_host: Some(live.into()),
            secondary_host: Some(secondary.into()),
            generation,
            ..Self::default()
        }
    }
}

/// The machine called `name` in the answer to `status -o json`: a list of machines, or an object with one in `vms`.
fn find_vm(answer: &str, name: &str) -> Option<VmView> {
    let answer: Value = serde_json::from_str(answer).ok()?;
    let list = answer.as_array().or_else(|| answer.get("vms")?.as_array())?;
    list.iter().filter_map(|vm| VmView::deserialize(vm).ok()).find(|vm| vm.name == name)
}

/// Asks the daemon behind one control socket.
#[derive(Debug, Clone)]
pub(super) struct Control {
    exe: PathBuf,
    socket: PathBuf,
}

impl Control {
    /// For the daemon with this control socket; `exe` is this program.
    pub(super) fn new(exe: &Path, socket: &Path) -> Self {
        Self { exe: exe.to_owned(), socket: socket.to_owned() }
    }

    /// Whether the daemon answers at all.
    pub(super) fn answers(&self) -> bool {
        self.ask(&["status", "-o", "json"], ANSWER_MAX).is_ok_and(|output| output.status.success())
    }

    /// How the daemon sees the machine `name`.
    pub(super) fn view(&self, name: &str) -> Option<VmView> {
        let output = self.ask(&["status", "-o", "json"], ANSWER_MAX).ok()?;
        find_vm(&String::from_utf8_lossy(&output.stdout), name)
    }

    /// Has the daemon start the machine that `file` describes.
    pub(super) fn start(&self, file: &Path) -> anyhow::Result<()> {
        let path = file.to_str().context("the state directory's path is not UTF-8")?;
        let output = self.ask(&["start", path], Duration::from_secs(30))?;
        if !output.status.success() {
            bail!("start: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    fn ask(&self, words: &[&str], bound: Duration) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.exe);
        command.args(words).arg("--socket").arg(&self.socket);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        wait_output(command.spawn()?, bound)
    }
}

/// The output of a child, which is killed when it takes longer than `bound`. For children that say little: what they
/// write must fit a pipe.
fn wait_output(mut child: Child, bound: Duration) -> anyhow::Result<Output> {
    let begun = Instant::now();
    while child.try_wait()?.is_none() {
        if begun.elapsed() > bound {
            child.kill()?;
            child.wait()?;
            bail!("no answer within {} s", bound.as_secs());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child.wait_with_output()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn view_is_found_in_a_list_and_what_is_missing_is_empty() {
        let vm = r#"{"name":"redis","state":"Not Protected","detail":"Starting","reason":null,"live_host":"h1",
                     "lag_ms":3,"progress":0.5,"failover":{"detection_us":7}}"#;
        for answer in [format!("[{vm}]"), format!("{{\"vms\":[{vm}]}}")] {
            let view = find_vm(&answer, "redis").unwrap();
            assert_eq!(view.live_host.as_deref(), Some("h1"));
            assert_eq!(view.words(), "Not Protected, Starting, 0.5");
            assert_eq!(view.failover.as_ref().map(|f| f.detection_us), Some(7));
            assert!(!view.is_protected());
            assert_eq!(find_vm(&answer, "other"), None);
        }
        assert_eq!(find_vm("connection refused", "redis"), None);
    }

    #[test]
    fn command_without_end_is_killed() {
        let child = Command::new("sleep").arg("60").stdout(Stdio::null()).spawn().unwrap();
        let error = wait_output(child, Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.to_string(), "no answer within 0 s");
    }
}

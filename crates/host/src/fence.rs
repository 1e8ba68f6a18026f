//! Fencing: keeps another host from writing to shared disks, by a command or a fence agent whose word is certain.
//!
//! # Place
//! Called on a thread of its own by whoever waits for the lock of a shared image ([`crate::vm`]).
//!
//! # Invariants
//! - INV-FENCE-1: a host counts as fenced only when the command ended with status 0 within its time; for an agent's `off`,
//!   only when its status says `off` as well.
//!
//! # Format
//! A command has its words in the environment: UNDERSTUDY_VM, UNDERSTUDY_HOST (the one to be fenced),
//! UNDERSTUDY_GENERATION (the one that it has the lock by), UNDERSTUDY_DISK. An agent is told by lines `key=value` on its
//! standard input, as Pacemaker does: `action=reboot` or `action=off`, then `action=status`, which ends with status 2 for
//! off; and by the options of its configuration.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::config::{FenceAction, FenceMethod};
use crate::one_line::flatten;

/// How much of what it says is kept.
const OUTPUT_BYTES_MAX: usize = 2000;
/// How often a command is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How long what is left of its words is waited for when it has ended: something that it started may live on.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Status of an agent that was asked for the status of a host that is off.
const AGENT_SAYS_OFF: i32 = 2;
/// Where agents are, beside the daemon's own path.
const AGENT_DIRS: &str = "/usr/sbin:/sbin";

/// What a command is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FenceOrder {
    /// The VM.
    pub vm: String,
    /// The host to be fenced.
    pub host: String,
    /// The generation that it has the lock by.
    pub generation: u64,
    /// Index of the disk.
    pub disk: usize,
}

/// Fences a host; says in one line how that went.
///
/// # Errors
/// One line: the host may still write.
pub fn fence(
    method: &FenceMethod,
    order: &FenceOrder,
    timeout: Duration,
) -> Result<String, String> {
    match method {
        FenceMethod::Command(command) => {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", command]);
            let ended = run(&mut shell, order, "", timeout)?;
            if ended.status.success() {
                return Ok(ended.words("the fence command succeeded"));
            }
            Err(ended.words(&format!("the fence command failed ({})", ended.status)))
        }
        FenceMethod::Agent { agent, options, action } => {
            let ask = |action: &str| {
                let mut text = format!("action={action}\n");
                options.iter().for_each(|(key, value)| text += &format!("{key}={value}\n"));
                let mut command = Command::new(agent);
                let path = std::env::var("PATH").unwrap_or_default();
                command.env("PATH", format!("{path}:{AGENT_DIRS}"));
                run(&mut command, order, &text, timeout)
            };
            let verb = match action {
                FenceAction::Reboot => "reboot",
                FenceAction::Off => "off",
            };
            let ended = ask(verb)?;
            if !ended.status.success() {
                return Err(ended.words(&format!("{agent}: {verb} failed ({})", ended.status)));
            }
            if *action == FenceAction::Off {
                let status = ask("status")?;
                if status.status.code() != Some(AGENT_SAYS_OFF) {
                    let what = format!("{agent}: off succeeded, but its status is not off");
                    return Err(status.words(&format!("{what} ({})", status.status)));
                }
            }
            Ok(ended.words(&format!("{agent}: {verb} succeeded")))
        }
    }
}

struct Ended {
    status: ExitStatus,
    output: String,
}

impl Ended {
    fn words(&self, what: &str) -> String {
        if self.output.is_empty() { what.to_owned() } else { format!("{what}: {}", self.output) }
    }
}

/// Runs a command to its end, with a bound on its time and on what it says.
fn run(
    command: &mut Command,
    order: &FenceOrder,
    told: &str,
    timeout: Duration,
) -> Result<Ended, String> {
    let start = Instant::now();
    command.env("UNDERSTUDY_VM", &order.vm).env("UNDERSTUDY_HOST", &order.host);
    command.env("UNDERSTUDY_GENERATION", order.generation.to_string());
    command.env("UNDERSTUDY_DISK", order.disk.to_string());
    // A group of its own, so that all of it can be ended.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().map_err(|e| format!("cannot run {name}: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it all, or ends before, says by its status what it thinks of it.
        drop(stdin.write_all(told.as_bytes()));
    }
    let said = Arc::new(Mutex::new(Vec::new()));
    let (ended, all_read) = mpsc::channel::<()>();
    if let Some(pipe) = child.stdout.take() {
        collect(pipe, &said, ended.clone());
    }
    if let Some(pipe) = child.stderr.take() {
        collect(pipe, &said, ended);
    }
    let status = wait(&mut child, start, timeout);
    // Nobody sends: this waits until both ends are closed.
    let _ = all_read.recv_timeout(LAST_WORDS);
    let output = {
        let said = said.lock().unwrap_or_else(PoisonError::into_inner);
        flatten(&String::from_utf8_lossy(&said)).chars().filter(|c| !c.is_control()).collect()
    };
    match status {
        Ok(Some(status)) => Ok(Ended { status, output }),
        Ok(None) => Err(format!("{name} took longer than {} s, and was ended", timeout.as_secs())),
        Err(e) => Err(format!("cannot wait for {name}: {e}")),
    }
}

/// Waits for a command, and ends it with all that it started when its time is over; nothing then.
fn wait(
    child: &mut Child,
    start: Instant,
    timeout: Duration,
) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= timeout {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            if let Some(group) = group {
                // It may have ended just now.
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

/// Gathers what comes out of a pipe, up to a bound; reads on beyond it.
fn collect(
    mut pipe: impl std::io::Read + Send + 'static,
    said: &Arc<Mutex<Vec<u8>>>,
    ended: mpsc::Sender<()>,
) {
    let said = Arc::clone(said);
    let read = move || {
        let mut bytes = [0; 512];
        while let Ok(len @ 1..) = pipe.read(&mut bytes) {
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            let room = OUTPUT_BYTES_MAX.saturating_sub(said.len());
            said.extend_from_slice(&bytes[..len.min(room)]);
        }
        drop(ended);
    };
    if let Err(e) = std::thread::Builder::new().name("fence-words".to_owned()).spawn(read) {
        crate::log::line(&format!("cannot start a thread to read what a command says: {e}"));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn order() -> FenceOrder {
        FenceOrder { vm: "a".to_owned(), host: "h1".to_owned(), generation: 7, disk: 1 }
    }

    fn by_command(command: &str, seconds: u64) -> Result<String, String> {
        fence(&FenceMethod::Command(command.to_owned()), &order(), Duration::from_secs(seconds))
    }

    #[test]
    fn command_knows_what_to_fence_and_its_status_counts() {
        let said = by_command(
            "echo $UNDERSTUDY_VM $UNDERSTUDY_HOST; echo $UNDERSTUDY_GENERATION $UNDERSTUDY_DISK >&2",
            20,
        );
        let said = said.unwrap();
        assert!(said.starts_with("the fence command succeeded: "), "{said}");
        assert!(said.contains("a h1") && said.contains("7 1"), "{said}");
        let failed = by_command("echo no power switch answers; exit 3", 20).unwrap_err();
        assert!(
            failed.contains("exit status: 3") && failed.contains("no power switch"),
            "{failed}"
        );
    }

    #[test]
    fn command_that_takes_too_long_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let text = format!("(sleep 3; touch {}) & sleep 30", mark.display());
        let start = Instant::now();
        let failed = by_command(&text, 1).unwrap_err();
        assert!(failed.contains("longer than 1 s"), "{failed}");
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_secs(4));
        assert!(!mark.exists());
    }

    #[test]
    fn words_have_a_bound_and_what_lives_on_is_not_waited_for() {
        let said = by_command("sleep 5 & head -c 100000 /dev/zero | tr '\\0' x", 15).unwrap();
        assert!(said.len() < OUTPUT_BYTES_MAX + 100, "{}", said.len());
    }

    fn agent(agent: &str, options: &[(&str, &str)], action: FenceAction) -> FenceMethod {
        let text = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let options: BTreeMap<_, _> = options.iter().map(text).collect();
        FenceMethod::Agent { agent: agent.to_owned(), options, action }
    }

    #[test]
    fn agent_is_told_on_its_input_and_off_has_to_be_off() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (script, told) = (dir.path().join("fence_test"), dir.path().join("told"));
        let text = format!(
            "#!/bin/sh\ncat >> {}\ncase $(tail -n 2 {0}) in *action=status*) exit $(cat {1});; esac\n",
            told.display(),
            dir.path().join("says").display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let method = agent(script.to_str().unwrap(), &[("ip", "10.0.0.9")], FenceAction::Off);
        let time = Duration::from_secs(20);
        std::fs::write(dir.path().join("says"), "0").unwrap();
        let failed = fence(&method, &order(), time).unwrap_err();
        assert!(failed.contains("its status is not off"), "{failed}");
        std::fs::write(dir.path().join("says"), "2").unwrap();
        let said = fence(&method, &order(), time).unwrap();
        assert!(said.ends_with("off succeeded"), "{said}");
        let all = std::fs::read_to_string(&told).unwrap();
        let one = "action=off\nip=10.0.0.9\naction=status\nip=10.0.0.9\n";
        assert_eq!(all, one.repeat(2));
        let none = agent("fence_that_is_not_there", &[], FenceAction::Off);
        assert!(fence(&none, &order(), time).unwrap_err().contains("cannot run"));
    }

    /// Of the package fence-agents; needs no hardware.
    #[test]
    fn agents_of_the_distribution_are_understood() {
        if !std::path::Path::new("/usr/sbin/fence_dummy").exists() {
            eprintln!("skipped: no fence_dummy (package fence-agents)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("status");
        std::fs::write(&file, "on").unwrap();
        let options = [("status_file", file.to_str().unwrap())];
        let time = Duration::from_secs(60);
        let said = fence(&agent("fence_dummy", &options, FenceAction::Off), &order(), time);
        assert!(said.unwrap().contains("off succeeded"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "off");
        let said = fence(&agent("fence_dummy", &options, FenceAction::Reboot), &order(), time);
        assert!(said.unwrap().contains("reboot succeeded"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "on");
    }
}

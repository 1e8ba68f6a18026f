//! Runs guests under `understudy run` for tests, with a bound on every wait.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::Write as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guest::{GuestBuilder, GuestFiles, GuestKind};

/// Longest that a guest may take for one thing on a busy machine.
const LIMIT: Duration = Duration::from_secs(200);
const LOOK: Duration = Duration::from_millis(10);

/// The program under test.
pub(crate) fn understudy() -> Command {
    Command::new(env!("CARGO_BIN_EXE_understudy"))
}

/// The guest, built if the cache does not have it.
pub(crate) fn guest(kind: GuestKind) -> GuestFiles {
    let built = GuestBuilder::new(guest::default_cache_dir()).build(kind);
    built.unwrap_or_else(|e| panic!("cannot build the guest {}: {e}", kind.name()))
}

/// `understudy run` with what every guest needs; more may be added.
pub(crate) fn run_command(guest: &GuestFiles, harts: u8, append: &str) -> Command {
    let mut command = understudy();
    command.args(["run", "--memory", "256M", "--smp", &harts.to_string(), "--kernel"]);
    command.arg(&guest.kernel).arg("--append").arg(format!("{} {append}", guest.append));
    command
}

/// A guest that runs, ended when this is dropped.
pub(crate) struct Running {
    child: Child,
    typed: ChildStdin,
    console: Collected,
    words: Collected,
}

/// What comes out of a pipe, gathered by a thread.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<(Vec<u8>, bool)>>);

impl Collected {
    fn of(mut pipe: impl std::io::Read + Send + 'static) -> Self {
        let all = Self::default();
        let theirs = all.clone();
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(len @ 1..) = pipe.read(&mut buf) {
                theirs.with(|state| state.0.extend_from_slice(&buf[..len]));
            }
            theirs.with(|state| state.1 = true);
        });
        all
    }

    fn with<T>(&self, look: impl FnOnce(&mut (Vec<u8>, bool)) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn text(&self) -> String {
        self.with(|state| String::from_utf8_lossy(&state.0).into_owned())
    }
}

/// How a run ended.
pub(crate) struct Ended {
    /// Exit status.
    pub(crate) code: Option<i32>,
    /// All that the guest wrote to its console.
    pub(crate) console: String,
    /// All that the program said.
    pub(crate) words: String,
}

impl Running {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> Self {
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().expect("the program under test runs");
        let typed = child.stdin.take().expect("standard input is a pipe");
        let console = Collected::of(child.stdout.take().expect("standard output is a pipe"));
        let words = Collected::of(child.stderr.take().expect("standard error is a pipe"));
        Self { child, typed, console, words }
    }

    fn report(&self) -> String {
        format!("console:\n{}\nwords:\n{}", self.console.text(), self.words.text())
    }

    /// Waits until the guest has written `text`.
    pub(crate) fn wait_for(&self, text: &str) {
        self.wait_for_times(text, 1);
    }

    /// Waits until the guest has written `text` so many times.
    pub(crate) fn wait_for_times(&self, text: &str, times: usize) {
        let has_come = || self.console.text().matches(text).count() >= times;
        let deadline = Instant::now() + LIMIT;
        while !has_come() {
            let is_over = self.console.with(|state| state.1) && !has_come();
            assert!(!is_over, "the guest ended before {text:?}; {}", self.report());
            assert!(Instant::now() < deadline, "{text:?} did not come; {}", self.report());
            std::thread::sleep(LOOK);
        }
    }

    /// How many times the guest has written `text`.
    pub(crate) fn times(&self, text: &str) -> usize {
        self.console.text().matches(text).count()
    }

    /// Logs in as root at the prompt that comes after `text` was written for the `times`th time, 0 meaning at once. What is
    /// typed while the guest asks the terminal what it is gets lost, so it is typed again.
    pub(crate) fn log_in(&mut self, text: &str, times: usize, password: &str) {
        let after = |s: &Self| -> String {
            let all = s.console.text();
            let at = times.checked_sub(1).and_then(|n| all.match_indices(text).nth(n));
            at.map_or(all.clone(), |(at, _)| all[at..].to_owned())
        };
        self.wait_for_times(text, times);
        let deadline = Instant::now() + LIMIT;
        let wait = |s: &Self, what: &str, long: Duration| -> bool {
            let until = Instant::now() + long;
            while !after(s).contains(what) {
                if Instant::now() > until {
                    return false;
                }
                std::thread::sleep(LOOK);
            }
            true
        };
        assert!(wait(self, "login: ", LIMIT), "nobody asks for a name; {}", self.report());
        loop {
            self.type_line("root");
            if wait(self, "Password: ", Duration::from_secs(10)) {
                break;
            }
            assert!(Instant::now() < deadline, "nobody asks for a password; {}", self.report());
        }
        self.type_line(password);
        // What is typed before the shell asks for it gets lost as well.
        assert!(wait(self, "root@", LIMIT), "there is no shell; {}", self.report());
    }

    /// Types at the console.
    pub(crate) fn type_line(&mut self, line: &str) {
        writeln!(self.typed, "{line}").expect("the program under test reads its input");
    }

    /// Waits until the guest has powered off.
    pub(crate) fn wait(mut self) -> Ended {
        let deadline = Instant::now() + LIMIT;
        let all_read = |s: &Self| s.console.with(|state| state.1) && s.words.with(|state| state.1);
        loop {
            let status = self.child.try_wait().expect("the child can be waited for");
            if let (Some(status), true) = (status, all_read(&self)) {
                let (console, words) = (self.console.text(), self.words.text());
                return Ended { code: status.code(), console, words };
            }
            assert!(Instant::now() < deadline, "the guest does not end; {}", self.report());
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

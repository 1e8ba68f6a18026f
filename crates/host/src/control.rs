//! The daemon's control socket: requests and answers as lines of JSON, and consoles as raw bytes.
//!
//! # Place
//! The daemon starts a [`Server`] with its [`Handler`]; the command line uses a [`Client`].
//!
//! # Failure
//! A line that is no request is answered with [`ErrorCode::BadRequest`] and the connection goes on; one that is too
//! long ends it. The socket of a daemon that crashed is replaced; that of one that answers is not.
//!
//! # Format
//! A line of JSON each way, for instance `{"op":"stop","vm":"web"}` and `{"answer":"done"}`. After the answer
//! `{"answer":"console"}` the connection carries the console's bytes, both ways. What takes time is answered by any number of
//! lines `{"answer":"progress",…}` before the answer.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest line.
pub const LINE_BYTES_MAX: u64 = 1 << 20;
/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 64;
/// How long a stuck client may hold up an answer.
const WRITE_TIME_MAX: Duration = Duration::from_secs(10);

/// What is asked of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// State of one VM or of all.
    Status {
        /// The VM.
        vm: Option<String>,
    },
    /// Start a VM.
    Start {
        /// The contents of its configuration file.
        config: String,
        /// Where the file is, for messages and relative paths.
        path: PathBuf,
        /// Even if the arbiter's record is for hosts that, as the operator says, are gone for good.
        #[serde(default)]
        force: bool,
        /// Even if another host's copies of its disks are newer, or may be: what they have more is lost.
        #[serde(default)]
        accept_stale: bool,
    },
    /// Power a VM off.
    Stop {
        /// The VM.
        vm: String,
    },
    /// Let the secondary go live in a planned way.
    Failover {
        /// The VM.
        vm: String,
    },
    /// Make a secondary.
    Protect {
        /// The VM.
        vm: String,
        /// The host to make it on; the best one when absent.
        host: Option<String>,
    },
    /// Give the secondary up.
    Unprotect {
        /// The VM.
        vm: String,
    },
    /// Take a snapshot of a VM that runs here.
    CreateSnapshot {
        /// The VM.
        vm: String,
        /// The snapshot's name; made from the time when absent.
        name: Option<String>,
    },
    /// The snapshots on this host.
    ListSnapshots {
        /// The VM; all of them when absent.
        vm: Option<String>,
    },
    /// Start a VM, or a clone of it, from a snapshot.
    RestoreSnapshot {
        /// The VM that it was taken of.
        vm: String,
        /// The snapshot.
        name: String,
        /// Even if what is on the VM's disks now is lost.
        #[serde(default)]
        force: bool,
        /// What another VM that is started from it is to be; the same VM when absent.
        #[serde(default)]
        clone: Option<CloneRequest>,
    },
    /// Delete a snapshot.
    DeleteSnapshot {
        /// The VM.
        vm: String,
        /// The snapshot.
        name: String,
    },
    /// Limit a disk of a VM that runs here; what is absent has no limit.
    LimitDisk {
        /// The VM.
        vm: String,
        /// Index of the disk.
        disk: u8,
        /// Reads, writes and discards in a second.
        iops: Option<u64>,
        /// How many of them may come at once.
        iops_burst: Option<u64>,
        /// Bytes in a second.
        bytes_per_second: Option<u64>,
        /// How many of them may come at once.
        bytes_burst: Option<u64>,
    },
    /// Make a disk of a VM that runs here bigger.
    ResizeDisk {
        /// The VM.
        vm: String,
        /// Index of the disk.
        disk: u8,
        /// Its size in bytes from then on.
        size: u64,
    },
    /// Move the image of a disk of a VM that runs or follows here to another path of this host.
    MoveDisk {
        /// The VM.
        vm: String,
        /// Index of the disk.
        disk: u8,
        /// Where to, an absolute path at which nothing is.
        to: PathBuf,
        /// Delete the old image, rather than to leave it as `NAME.moved`.
        #[serde(default)]
        delete: bool,
    },
    /// Make this connection a console.
    Console {
        /// The VM.
        vm: String,
        /// Console index: 0 is the UART.
        dev: u8,
    },
}

/// A VM that begins in a snapshot's state with an identity of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneRequest {
    /// Its name.
    pub name: String,
    /// The directory of its disks and its configuration; beside those of the VM that it comes from when absent.
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// Whether its network devices are attached to the same networks.
    #[serde(default)]
    pub connect: bool,
}

/// A snapshot on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// The VM.
    pub vm: String,
    /// The snapshot.
    pub name: String,
    /// When it was taken: a date with time.
    pub taken: Option<String>,
    /// Guest time since power-on, in milliseconds.
    pub guest_ms: Option<u64>,
    /// Steps that the machine had made.
    pub icount: Option<u64>,
    /// The snapshot that it builds on.
    pub parent: Option<String>,
    /// Its size on this host's disk, without what it builds on.
    pub bytes: u64,
    /// Why it cannot be used, as one line.
    pub problem: Option<String>,
}

/// The daemon's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Response {
    /// It is done, or under way where it takes time.
    Done,
    /// State.
    Status {
        /// The VMs, by name.
        vms: Vec<VmStatus>,
    },
    /// It goes on; more lines follow.
    Progress(Progress),
    /// The snapshot is complete and durable.
    SnapshotTaken {
        /// Its name.
        name: String,
        /// Pages of memory in it, in bytes.
        memory_bytes: u64,
        /// Chunks of disks in it, in bytes.
        disk_bytes: u64,
        /// Its size on this host's disk.
        file_bytes: u64,
        /// How long the guest stood still, in microseconds.
        pause_us: u64,
        /// Whether it builds on an earlier one, and has only what has changed since.
        is_increment: bool,
        /// Steps that the machine had made.
        icount: u64,
    },
    /// Snapshots.
    Snapshots {
        /// By VM, the oldest first.
        snapshots: Vec<SnapshotInfo>,
    },
    /// It runs.
    Restored {
        /// The VM.
        vm: String,
        /// Its configuration file.
        file: PathBuf,
    },
    /// From here on the connection is a console.
    Console,
    /// It was not done.
    Error {
        /// What kind of failure.
        code: ErrorCode,
        /// One line for people.
        message: String,
    },
}

impl Response {
    /// A failure.
    #[must_use]
    pub fn error(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Error { code, message: message.into() }
    }
}

/// What kind of failure it is; the command line's exit code depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense.
    BadRequest,
    /// There is no such VM, host or console.
    NotFound,
    /// It takes a secondary, and there is none.
    NotProtected,
    /// Arbitration said no.
    Refused,
    /// Anything else.
    Failed,
}

/// What a host is to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Runs it and releases its output.
    Primary,
    /// Follows it.
    Secondary,
    /// Does not run it.
    Stopped,
}

/// Whether a VM survives the loss of a host, in the words of vSphere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protection {
    /// It does.
    Protected,
    /// It does not; see [`Detail`].
    #[serde(rename = "Not Protected")]
    NotProtected,
}

/// Why a VM is not protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// A secondary is being made.
    Starting,
    /// There is no host for one, or none was made yet.
    #[serde(rename = "Need Secondary")]
    NeedSecondary,
    /// Nobody wants one.
    Disabled,
    /// There is nothing to protect.
    #[serde(rename = "VM not Running")]
    VmNotRunning,
}

/// How long the parts of the last failover took.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverTimes {
    /// From the last sign of life to the loss being noticed, in microseconds.
    pub detection_us: u64,
    /// Arbitration, in microseconds.
    pub arbitration_us: u64,
    /// Replaying the rest of the log, in microseconds.
    pub catch_up_us: u64,
    /// Announcing the addresses and starting to run, in microseconds.
    pub announce_us: u64,
    /// When it was complete, in milliseconds since the Unix epoch.
    pub at_unix_ms: u64,
}

/// How far something that takes time is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is going on.
    pub phase: String,
    /// How much of it is done, 0 to 100.
    pub percent: u8,
}

/// State of a VM as this host knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Name of the VM.
    pub name: String,
    /// What this host is to it.
    pub role: Role,
    /// Whether it survives the loss of a host.
    pub state: Protection,
    /// Why not.
    pub detail: Option<Detail>,
    /// What happened, as one line.
    pub reason: Option<String>,
    /// What to do about it, as one line.
    pub remedy: Option<String>,
    /// The host that runs it.
    pub live_host: Option<String>,
    /// The host that follows.
    pub secondary_host: Option<String>,
    /// Generation in force.
    pub generation: u64,
    /// Distance of the secondary, in milliseconds.
    pub lag_ms: u64,
    /// Log bandwidth.
    pub log_bytes_per_s: u64,
    /// What of it, and of all else, is sent to the other replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_bytes_per_s: Option<u64>,
    /// Which way the log takes, where it may take two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
    /// Steps that the machine has made.
    pub icount: u64,
    /// Digests of a primary that this host has compared with its own, so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests: Option<u64>,
    /// The last failover that this host took part in.
    pub failover: Option<FailoverTimes>,
    /// What is under way.
    pub progress: Option<Progress>,
    /// How long the guest stood still when this host last began to protect it, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protect_pause_us: Option<u64>,
    /// The engine that runs this host's replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// How the last fencing of another host went, as one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<String>,
    /// Which host's copy of a disk failed, and which serves, as one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_problem: Option<String>,
    /// What this host has copied of the disks to a secondary, last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disk_copies: Vec<DiskCopy>,
}

/// What was copied of a disk, or is being copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCopy {
    /// Index of the disk.
    pub disk: u8,
    /// The host that gets it.
    pub to: String,
    /// Whether all is sent.
    pub is_done: bool,
    /// Bytes sent so far.
    pub bytes_done: u64,
    /// Bytes to send, as far as known; holes of a disk that is copied whole count, and are not sent.
    pub bytes_total: u64,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Why all of it is copied; nothing where only what differs is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
}

/// What the daemon does with requests; called on the connections' threads.
pub trait Handler: Send + Sync + 'static {
    /// Answers a request; [`Request::Console`] goes to [`Self::console`]. `tell` hears how far it is, if it takes time.
    fn handle(&self, request: Request, tell: &mut dyn FnMut(Progress)) -> Response;

    /// Finds a console; what is returned is then called with the connection, and keeps it as long as it likes.
    ///
    /// # Errors
    /// The answer to give when there is no such console.
    fn console(&self, vm: &str, dev: u8) -> Result<ServeConsole, Response>;
}

/// Serves a console on a connection; see [`crate::console::ConsoleHub::serve`].
pub type ServeConsole = Box<dyn FnOnce(UnixStream) + Send>;

/// Why the control socket is not served or not reached.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The system refused.
    #[error("cannot {action} control socket {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another daemon answers there.
    #[error("another daemon serves {path}")]
    InUse {
        /// The socket.
        path: String,
    },
    /// The path is taken by something that is no socket.
    #[error("{path} exists and is no socket")]
    NotASocket {
        /// The path.
        path: String,
    },
    /// The daemon's answer makes no sense.
    #[error("the daemon's answer is malformed: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> ControlError {
    ControlError::Io { action, path: path.display().to_string(), source }
}

/// The serving side; dropping it removes the socket and takes no more connections.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `path`; `mode` is the socket's (0o600, or 0o660 for a group).
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn start(path: &Path, mode: u32, handler: Arc<dyn Handler>) -> Result<Self, ControlError> {
        let fail = |action| move |e| io_error(action, path, e);
        remove_stale(path)?;
        // The socket gets its name only when it has its mode, so nobody can connect in between.
        let mut unnamed = path.as_os_str().to_owned();
        unnamed.push(format!(".{}", std::process::id()));
        let unnamed = PathBuf::from(unnamed);
        let listener = UnixListener::bind(&unnamed).map_err(fail("create"))?;
        let named = fs::set_permissions(&unnamed, PermissionsExt::from_mode(mode))
            .and_then(|()| fs::rename(&unnamed, path));
        if let Err(e) = named {
            drop(fs::remove_file(&unnamed));
            return Err(io_error("name", path, e));
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stopping);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&listener, &theirs, &handler))
            .map_err(fail("start a thread for"))?;
        Ok(Self { path: path.to_owned(), stopping, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // A connection wakes the thread, which then sees that it is to end.
        let woken = UnixStream::connect(&self.path).is_ok();
        drop(fs::remove_file(&self.path));
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            // A panic of the thread was already reported by the panic hook.
            drop(thread.join());
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ControlError> {
    let name = || path.display().to_string();
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => Err(ControlError::NotASocket { path: name() }),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(ControlError::InUse { path: name() }),
        Ok(_) => fs::remove_file(path).map_err(|e| io_error("replace", path, e)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io_error("look at", path, e)),
    }
}

fn accept(listener: &UnixListener, stopping: &AtomicBool, handler: &Arc<dyn Handler>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = listener.accept();
        if stopping.load(Ordering::Acquire) {
            return;
        }
        let Ok((stream, _)) = accepted else {
            // No descriptor is free: those who have one need a moment to finish.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            let full = Response::error(ErrorCode::Failed, "too many connections to the daemon");
            // The client sees the end of the connection in any case.
            drop(write_line(&stream, &full));
            continue;
        }
        let (handler, counter) = (Arc::clone(handler), Arc::clone(&open));
        let spawned =
            std::thread::Builder::new().name("control-client".to_owned()).spawn(move || {
                serve(stream, handler.as_ref());
                counter.fetch_sub(1, Ordering::Relaxed);
            });
        if spawned.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Serves one client until it leaves, sends too much, or does not take its answers.
fn serve(stream: UnixStream, handler: &dyn Handler) {
    let Ok(reading) = stream.try_clone() else { return };
    if stream.set_write_timeout(Some(WRITE_TIME_MAX)).is_err() {
        return;
    }
    let mut reader = BufReader::new(reading);
    while let Ok(Some(line)) = read_line(&mut reader) {
        let response = match serde_json::from_slice(&line) {
            Ok(Request::Console { vm, dev }) => match handler.console(&vm, dev) {
                Ok(serve_console) => {
                    if write_line(&stream, &Response::Console).is_ok() {
                        serve_console(stream);
                    }
                    return;
                }
                Err(response) => response,
            },
            // Who does not listen any more is found out at the answer.
            Ok(request) => {
                let mut tell = |p| drop(write_line(&stream, &Response::Progress(p)));
                handler.handle(request, &mut tell)
            }
            Err(e) => Response::error(ErrorCode::BadRequest, format!("not a request: {e}")),
        };
        if write_line(&stream, &response).is_err() {
            return;
        }
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "the line has no end")),
    }
}

fn write_line(mut stream: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The asking side.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon.
    ///
    /// # Errors
    /// [`ControlError::Io`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let stream = UnixStream::connect(path).map_err(|e| io_error("connect to", path, e))?;
        Ok(Self { path: path.to_owned(), reader: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The connection failed, or the answer makes no sense. A refusal of the daemon is a [`Response::Error`].
    pub fn call(&mut self, request: &Request) -> Result<Response, ControlError> {
        self.call_telling(request, &mut |_| ())
    }

    /// As [`Self::call`]; `tell` hears how far it is.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_telling(
        &mut self,
        request: &Request,
        tell: &mut dyn FnMut(&Progress),
    ) -> Result<Response, ControlError> {
        write_line(self.reader.get_ref(), request)
            .map_err(|e| io_error("write to", &self.path, e))?;
        loop {
            match self.read_answer()? {
                Response::Progress(progress) => tell(&progress),
                answer => return Ok(answer),
            }
        }
    }

    fn read_answer(&mut self) -> Result<Response, ControlError> {
        let line = read_line(&mut self.reader).map_err(|e| io_error("read from", &self.path, e))?;
        let malformed = |reason: String| ControlError::Malformed { reason };
        let line = line.ok_or_else(|| malformed("the connection was closed".to_owned()))?;
        serde_json::from_slice(&line).map_err(|e| malformed(e.to_string()))
    }

    /// Makes the connection a console: the stream, and what of its bytes has arrived already; or the refusal.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn console(
        mut self,
        vm: &str,
        dev: u8,
    ) -> Result<Result<(UnixStream, Vec<u8>), Response>, ControlError> {
        match self.call(&Request::Console { vm: vm.to_owned(), dev })? {
            Response::Console => {
                let early = self.reader.buffer().to_vec();
                Ok(Ok((self.reader.into_inner(), early)))
            }
            other => Ok(Err(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::ConsoleHub;

    const LIMIT: Duration = Duration::from_secs(30);

    struct Echo(ConsoleHub);

    fn status() -> VmStatus {
        VmStatus {
            name: "web".into(),
            role: Role::Primary,
            state: Protection::NotProtected,
            detail: Some(Detail::NeedSecondary),
            reason: None,
            remedy: None,
            live_host: Some("alpha".into()),
            secondary_host: None,
            generation: 3,
            lag_ms: 0,
            log_bytes_per_s: 0,
            wire_bytes_per_s: None,
            log_path: None,
            icount: 9,
            digests: None,
            failover: Some(FailoverTimes { detection_us: 1, ..Default::default() }),
            progress: None,
            protect_pause_us: None,
            engine: Some("jit".into()),
            fenced: None,
            disk_problem: None,
            disk_copies: Vec::new(),
        }
    }

    impl Handler for Echo {
        fn handle(&self, request: Request, tell: &mut dyn FnMut(Progress)) -> Response {
            match request {
                Request::DeleteSnapshot { .. } => {
                    (0..3).for_each(|percent| tell(Progress { phase: "x".into(), percent }));
                    Response::Done
                }
                Request::Status { .. } => Response::Status { vms: vec![status()] },
                Request::Stop { vm } => Response::error(ErrorCode::NotFound, format!("no {vm}")),
                _ => Response::Done,
            }
        }

        fn console(&self, _vm: &str, dev: u8) -> Result<ServeConsole, Response> {
            if dev > 0 {
                return Err(Response::error(ErrorCode::NotFound, "no such console"));
            }
            let hub = self.0.clone();
            let echo = hub.clone();
            Ok(Box::new(move |stream| {
                drop(hub.serve(stream, move |bytes| echo.push(bytes)));
            }))
        }
    }

    fn start(dir: &Path) -> (Server, PathBuf) {
        let path = dir.join("sock");
        let hub = ConsoleHub::new();
        hub.push(b"hello ");
        (Server::start(&path, 0o600, Arc::new(Echo(hub))).unwrap(), path)
    }

    #[test]
    fn requests_are_answered_over_a_private_socket_that_goes_away() {
        let tmp = tempfile::tempdir().unwrap();
        let (server, path) = start(tmp.path());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut client = Client::connect(&path).unwrap();
        let answer = client.call(&Request::Status { vm: None }).unwrap();
        assert_eq!(answer, Response::Status { vms: vec![status()] });
        let answer = client.call(&Request::Stop { vm: "x".into() }).unwrap();
        assert_eq!(answer, Response::error(ErrorCode::NotFound, "no x"));
        let slow = Request::DeleteSnapshot { vm: "x".into(), name: "y".into() };
        let mut told = Vec::new();
        let answer = client.call_telling(&slow, &mut |p| told.push(p.percent)).unwrap();
        assert_eq!((answer, told), (Response::Done, vec![0, 1, 2]));
        let again = Server::start(&path, 0o600, Arc::new(Echo(ConsoleHub::new())));
        assert!(matches!(again, Err(ControlError::InUse { .. })));
        drop(server);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_wire_is_as_documented() {
        let text = serde_json::to_string(&status()).unwrap();
        assert_eq!(
            text,
            r#"{"name":"web","role":"primary","state":"Not Protected","detail":"Need Secondary","reason":null,"remedy":null,"live_host":"alpha","secondary_host":null,"generation":3,"lag_ms":0,"log_bytes_per_s":0,"icount":9,"failover":{"detection_us":1,"arbitration_us":0,"catch_up_us":0,"announce_us":0,"at_unix_ms":0},"progress":null,"engine":"jit"}"#
        );
        let request = Request::Stop { vm: "web".into() };
        assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"op":"stop","vm":"web"}"#);
        assert_eq!(serde_json::to_string(&Response::Done).unwrap(), r#"{"answer":"done"}"#);
        let request = Request::CreateSnapshot { vm: "web".into(), name: None };
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"op":"create_snapshot","vm":"web","name":null}"#
        );
        let progress = Response::Progress(Progress { phase: "writing".into(), percent: 7 });
        assert_eq!(
            serde_json::to_string(&progress).unwrap(),
            r#"{"answer":"progress","phase":"writing","percent":7}"#
        );
        let status: Request = serde_json::from_str(r#"{"op":"status"}"#).unwrap();
        assert_eq!(status, Request::Status { vm: None });
    }

    #[test]
    fn lines_that_are_no_requests_are_answered_and_endless_ones_are_cut_off() {
        let tmp = tempfile::tempdir().unwrap();
        let (_server, path) = start(tmp.path());
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        for bad in ["rubbish\n", "{\"op\":\"fly\"}\n", "\n", "{\"op\":\"stop\",\"vm\":3}\n"] {
            (&stream).write_all(bad.as_bytes()).unwrap();
            let line = read_line(&mut reader).unwrap().unwrap();
            assert!(String::from_utf8(line).unwrap().contains("bad_request"));
        }
        let endless = vec![b'x'; usize::try_from(LINE_BYTES_MAX).unwrap() + 10];
        drop((&stream).write_all(&endless));
        assert!(!matches!(read_line(&mut reader), Ok(Some(_))));
    }

    #[test]
    fn a_console_takes_the_connection_over() {
        let tmp = tempfile::tempdir().unwrap();
        let (_server, path) = start(tmp.path());
        let refused = Client::connect(&path).unwrap().console("web", 1).unwrap().unwrap_err();
        assert_eq!(refused, Response::error(ErrorCode::NotFound, "no such console"));
        let (mut stream, mut seen) =
            Client::connect(&path).unwrap().console("web", 0).unwrap().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"world").unwrap();
        while seen.len() < 11 {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            seen.extend(byte);
        }
        assert_eq!(seen, b"hello world");
    }

    #[test]
    fn the_socket_of_a_crashed_daemon_is_replaced_and_a_file_is_not() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("sock");
        drop(UnixListener::bind(&path).unwrap());
        let (server, _) = start(tmp.path());
        drop(server);
        fs::write(&path, "precious").unwrap();
        let error = Server::start(&path, 0o600, Arc::new(Echo(ConsoleHub::new()))).unwrap_err();
        assert!(matches!(error, ControlError::NotASocket { .. }));
        assert!(Client::connect(&path).is_err());
    }
}

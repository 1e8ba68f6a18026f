//! The host daemon: accepts peers and commands, and has a [`Vm`] for each VM that this host knows.
//!
//! # Place
//! Started by `understudy host`; everything that concerns one VM is in [`crate::vm`].
//!
//! # Failure
//! A stranger gets no further than the channel's handshake. A peer's connection that makes no sense is closed and
//! logged; no VM is touched by it.

mod snapshots;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use crate::arbiter::{self, CasOutcome};
use crate::channel::{Link, Listener, Received, Secret};
use crate::config::{HostConfig, LogCompression};
use crate::control::{
    ErrorCode, Handler, Progress, Protection, Request, Response, Role, ServeConsole, Server,
    VmStatus,
};
use crate::disk::Limits;
use crate::log::line;
use crate::name::check_name;
use crate::one_line::one_line;
use crate::vm::{
    BULK, ChangeDiskError, Definition, Env, LOG, Preamble, StartOutcome, Vm, standing,
};

/// Time for a peer's first frame.
const PREAMBLE_TIME_MAX: Duration = Duration::from_secs(2);
/// Time for a question to the arbiter.
const ARBITER_TIME_MAX: Duration = Duration::from_secs(2);
/// Most VMs that peers can make this host know.
const VMS_MAX: usize = 256;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The secret cannot be used.
    #[error(transparent)]
    Secret(#[from] crate::channel::SecretError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The control socket cannot be served.
    #[error(transparent)]
    Control(#[from] crate::control::ControlError),
    /// A directory cannot be made.
    #[error("cannot make directory {path}")]
    Directory {
        /// The directory.
        path: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    env: Arc<Env>,
    /// Guards the list alone; no other lock is taken while it is held but those of new VMs.
    vms: Mutex<BTreeMap<String, Arc<Vm>>>,
    /// For each VM a lock that is held while its snapshots are read or added to, and alone while one is deleted. The map's
    /// own guards the map alone.
    stores: Mutex<BTreeMap<String, Arc<RwLock<()>>>>,
}

fn make_dir(path: &Path) -> Result<(), DaemonError> {
    std::fs::create_dir_all(path)
        .map_err(|source| DaemonError::Directory { path: path.display().to_string(), source })
}

/// Runs the daemon until the process is killed.
///
/// # Errors
/// [`DaemonError`] when it cannot start.
pub fn run(config: HostConfig) -> Result<(), DaemonError> {
    let secret = Secret::load(&config.secret_file)?;
    make_dir(&config.state_dir)?;
    crate::divergence::report::clear_partial(&config.state_dir);
    if let Some(parent) = config.socket.parent() {
        make_dir(parent)?;
    }
    let compresses = config.log_compression == LogCompression::Lz4;
    let mut listener =
        Listener::bind(config.listen.as_str(), secret.clone(), &config.name, compresses)
            .map_err(|source| DaemonError::Listen { address: config.listen.clone(), source })?;
    if let Some(address) = &config.log_address
        && let Err(e) = listener.also(address.as_str())
    {
        // The other path serves; a card that is broken must not keep this host from it.
        line(&format!("cannot listen on log_address {address}: {e}; peers use the second path"));
    }
    let log_source = config.log_source();
    let env = Arc::new(Env {
        host: config.name,
        secret,
        peers: config.peers,
        log_source,
        compresses,
        arbiter: config.arbiter,
        state_dir: config.state_dir,
        detection_ms: config.detection_ms,
        engine: config.engine,
        fence: config.fence,
        resync_limit: config.resync_limit,
        is_terminal: false,
    });
    let daemon = Arc::new(Daemon::new(env));
    let _server = Server::start(&config.socket, 0o660, Arc::new(Control(Arc::clone(&daemon))))?;
    line(&format!(
        "host {} listens on {}, control socket {}",
        daemon.env.host,
        config.listen,
        config.socket.display()
    ));
    loop {
        match listener.next(Duration::from_secs(3600)) {
            Some(Ok(link)) => {
                let daemon = Arc::clone(&daemon);
                let spawned = std::thread::Builder::new()
                    .name("accept".to_owned())
                    .spawn(move || daemon.accept(link));
                if let Err(e) = spawned {
                    line(&format!("cannot start a thread for a peer: {e}"));
                }
            }
            Some(Err((address, e))) => {
                line(&format!("connection from {address} refused: {}", one_line(&e)))
            }
            None => {}
        }
    }
}

impl Daemon {
    fn new(env: Arc<Env>) -> Self {
        Self { env, vms: Mutex::default(), stores: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Option<Arc<Vm>> {
        self.lock().get(name).cloned()
    }

    fn find_or_make(&self, name: &str, detection_ms: u32) -> Result<Arc<Vm>, String> {
        check_name(name).map_err(|e| e.to_string())?;
        let mut vms = self.lock();
        if let Some(vm) = vms.get(name) {
            return Ok(Arc::clone(vm));
        }
        if vms.len() >= VMS_MAX {
            return Err(format!("this host knows {VMS_MAX} VMs already"));
        }
        let vm = Arc::new(Vm::new(&self.env, name, detection_ms)?);
        vms.insert(name.to_owned(), Arc::clone(&vm));
        Ok(vm)
    }

    fn accept(&self, mut link: Link) {
        let peer = format!("{} ({})", link.peer, link.address);
        let preamble: Preamble = match link.receiver.recv(Some(PREAMBLE_TIME_MAX)) {
            Ok(Received::Frame(frame)) => match postcard::from_bytes(&frame) {
                Ok(preamble) => preamble,
                Err(e) => {
                    return line(&format!(
                        "peer {peer} said something else than what it wants: {e}"
                    ));
                }
            },
            Ok(_) => return line(&format!("peer {peer} did not say what it wants")),
            Err(e) => return line(&format!("peer {peer}: {}", one_line(&e))),
        };
        let detection_ms = preamble.detection_ms.clamp(10, 60_000);
        link.sender.set_patience(Preamble { detection_ms, ..preamble.clone() }.patience());
        let vm = match self.find_or_make(&preamble.vm, detection_ms) {
            Ok(vm) => vm,
            Err(e) => return line(&format!("peer {peer}: {e}")),
        };
        match link.purpose.as_str() {
            LOG => vm.accept_log(link, preamble.session),
            BULK => {
                if let Err(e) = vm.accept_bulk(link, preamble.session) {
                    line(&format!("peer {peer}: {e}"));
                }
            }
            other => line(&format!("peer {peer} wants {other:?}, which is not known here")),
        }
    }

    fn start(&self, text: String, path: PathBuf, force: bool, accept_stale: bool) -> Response {
        let parsed = Definition::parse(text, path).and_then(|d| d.placed(&self.env.state_dir));
        let definition = match parsed {
            Ok(definition) => definition,
            Err(e) => return Response::error(ErrorCode::BadRequest, e),
        };
        if let Some(response) = self.half_restored(&definition.config.name) {
            return response;
        }
        self.start_defined(definition, force, accept_stale)
    }

    fn start_defined(&self, definition: Definition, force: bool, accept_stale: bool) -> Response {
        let name = definition.config.name.clone();
        let detection = definition.config.protection.detection_ms.unwrap_or(self.env.detection_ms);
        let vm = match self.find_or_make(&name, detection) {
            Ok(vm) => vm,
            Err(e) => return Response::error(ErrorCode::Failed, e),
        };
        if !vm.is_spare() {
            return Response::error(
                ErrorCode::Failed,
                format!("VM {name} is running or followed here already"),
            );
        }
        if let Err(refused) = self.check_copies(&definition, force, accept_stale) {
            return refused;
        }
        if force && let Err(e) = self.take_from_lost_hosts(&name) {
            return Response::error(ErrorCode::Failed, format!("VM {name}: {e}"));
        }
        match vm.start(definition) {
            StartOutcome::Running => Response::Done,
            StartOutcome::Refused { live: Some(host), generation } => {
                live_elsewhere(&name, &host, generation)
            }
            StartOutcome::Refused { live: None, generation } => Response::error(
                ErrorCode::Refused,
                format!(
                    "VM {name}: another host changed the arbiter's record (generation {generation}); try again"
                ),
            ),
            StartOutcome::Failed { reason } => Response::error(ErrorCode::Failed, reason),
        }
    }

    /// Refuses a start from copies of disks that are not the newest, as far as the arbiter's record tells.
    fn check_copies(
        &self,
        definition: &Definition,
        force: bool,
        accept_stale: bool,
    ) -> Result<(), Response> {
        let name = &definition.config.name;
        if !standing::has_copies(definition) {
            return Ok(());
        }
        let failed = |e: &dyn std::error::Error| Response::error(ErrorCode::Failed, one_line(e));
        let mut arbiter =
            arbiter::open(&self.env.arbiter, ARBITER_TIME_MAX).map_err(|e| failed(&e))?;
        let current = arbiter.read(name).map_err(|e| failed(&e))?;
        let is_elsewhere =
            current.as_ref().and_then(|r| r.live.as_ref()).is_some_and(|h| *h != self.env.host);
        if is_elsewhere && !force {
            // The start is refused for that reason.
            return Ok(());
        }
        match standing::check(definition, &self.env, current.as_ref()) {
            Ok(()) => Ok(()),
            Err(stale) if accept_stale && stale.is_startable => {
                line(&format!("vm {name}: started all the same, as asked: {}", stale.reason));
                Ok(())
            }
            Err(stale) => Err(Response::error(ErrorCode::Refused, stale.reason)),
        }
    }

    /// Frees the arbiter's record of a VM whose hosts are gone for good, as the operator says. Should one of them live all
    /// the same, it loses its next arbitration and stops.
    fn take_from_lost_hosts(&self, name: &str) -> Result<(), String> {
        let mut arbiter =
            arbiter::open(&self.env.arbiter, ARBITER_TIME_MAX).map_err(|e| one_line(&e))?;
        let Some(current) = arbiter.read(name).map_err(|e| one_line(&e))? else { return Ok(()) };
        if current.live.is_none() {
            return Ok(());
        }
        let mut nonce = [0; 8];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| e.to_string())?;
        let free = arbiter::Record {
            generation: current.generation.saturating_add(1),
            live: None,
            secondary: None,
            nonce: u64::from_le_bytes(nonce),
            copies: standing::newest(&current),
        };
        let host = |h: &Option<String>| h.clone().unwrap_or_else(|| "none".to_owned());
        line(&format!(
            "vm {name}: forced, the record was generation {}: live {}, secondary {}",
            current.generation,
            host(&current.live),
            host(&current.secondary)
        ));
        match arbiter
            .compare_and_set(name, Some(current.generation), &free)
            .map_err(|e| one_line(&e))?
        {
            CasOutcome::Won => Ok(()),
            CasOutcome::Lost { .. } => {
                Err("a host changed the arbiter's record just now: it is not gone".to_owned())
            }
        }
    }

    /// The VM, if it is live here; otherwise an answer that says where to ask.
    fn live(&self, name: &str) -> Result<(Arc<Vm>, VmStatus), Response> {
        let not_found = || {
            Response::error(ErrorCode::NotFound, format!("no VM {name} on host {}", self.env.host))
        };
        let vm = self.find(name).ok_or_else(not_found)?;
        let status = vm.status();
        if status.role == Role::Primary {
            return Ok((vm, status));
        }
        let text = match &status.live_host {
            Some(host) => format!("VM {name} runs on host {host}: ask there"),
            None => format!("VM {name} does not run on host {}", self.env.host),
        };
        Err(Response::error(ErrorCode::NotFound, text))
    }

    fn change_disk(
        &self,
        name: &str,
        change: impl FnOnce(&Vm) -> Result<(), ChangeDiskError>,
    ) -> Result<(), Response> {
        let (vm, _) = self.live(name)?;
        change(&vm).map_err(|e| {
            let code = match &e {
                ChangeDiskError::NoDisk { .. } => ErrorCode::NotFound,
                ChangeDiskError::Size { .. } => ErrorCode::BadRequest,
                ChangeDiskError::Image { .. } | ChangeDiskError::NotTold { .. } => {
                    ErrorCode::Failed
                }
            };
            Response::error(code, e.to_string())
        })
    }

    fn failover(&self, name: &str) -> Result<(), Response> {
        let (vm, status) = self.live(name)?;
        if status.state != Protection::Protected {
            let why = status.reason.unwrap_or_else(|| "it is not protected".to_owned());
            return Err(Response::error(
                ErrorCode::NotProtected,
                format!("VM {name} cannot fail over: {why}"),
            ));
        }
        vm.switch_over();
        Ok(())
    }

    fn protect(&self, name: &str, host: Option<String>) -> Result<(), Response> {
        let (vm, _) = self.live(name)?;
        if let Some(host) = &host
            && !self.env.peers.contains_key(host)
        {
            let known: Vec<_> = self.env.peers.keys().map(String::as_str).collect();
            let text = format!("no host {host} among the peers ({})", known.join(", "));
            return Err(Response::error(ErrorCode::NotFound, text));
        }
        if let Some(reason) = vm.unprotectable() {
            return Err(Response::error(ErrorCode::Failed, format!("VM {name}: {reason}")));
        }
        if let Some(disk) = vm.unlocked() {
            let text = format!(
                "VM {name} writes to {disk} without a lock, so that it cannot be protected: stop it, give the disk \
                 lock = \"PATH\", on a file system that all hosts share, and start it again"
            );
            return Err(Response::error(ErrorCode::BadRequest, text));
        }
        vm.set_protection(Some(true), host);
        Ok(())
    }

    fn status(&self, name: Option<&str>) -> Response {
        let vms: Vec<_> =
            self.lock().values().filter(|v| name.is_none_or(|n| n == v.name())).cloned().collect();
        match name {
            Some(name) if vms.is_empty() => Response::error(
                ErrorCode::NotFound,
                format!("no VM {name} on host {}", self.env.host),
            ),
            _ => Response::Status { vms: vms.iter().map(|v| v.status()).collect() },
        }
    }
}

fn live_elsewhere(name: &str, host: &str, generation: u64) -> Response {
    Response::error(
        ErrorCode::Refused,
        format!(
            "VM {name} is live on host {host} by the arbiter's record (generation {generation}); \
             stop it there, or wait until its secondary has taken over; only if that host and its \
             secondary are gone for good: understudy start --force"
        ),
    )
}

#[cfg(test)]
mod tests;

#[derive(Debug)]
struct Control(Arc<Daemon>);

impl Handler for Control {
    fn handle(&self, request: Request, tell: &mut dyn FnMut(Progress)) -> Response {
        let daemon = &self.0;
        let done = |result: Result<(), Response>| result.err().unwrap_or(Response::Done);
        match request {
            Request::Status { vm } => daemon.status(vm.as_deref()),
            Request::Start { config, path, force, accept_stale } => {
                daemon.start(config, path, force, accept_stale)
            }
            Request::Stop { vm } => done(daemon.live(&vm).map(|(vm, _)| vm.power_off())),
            Request::Failover { vm } => done(daemon.failover(&vm)),
            Request::Protect { vm, host } => done(daemon.protect(&vm, host)),
            Request::Unprotect { vm } => {
                done(daemon.live(&vm).map(|(vm, _)| vm.set_protection(Some(false), None)))
            }
            Request::CreateSnapshot { vm, name } => daemon.create_snapshot(&vm, name, tell),
            Request::ListSnapshots { vm } => daemon.list_snapshots(vm.as_deref()),
            Request::RestoreSnapshot { vm, name, force, clone } => {
                daemon.restore_snapshot(&vm, &name, force, clone, tell)
            }
            Request::DeleteSnapshot { vm, name } => daemon.delete_snapshot(&vm, &name, tell),
            Request::LimitDisk { vm, disk, iops, iops_burst, bytes_per_second, bytes_burst } => {
                let limits = Limits { iops, bytes_per_second, iops_burst, bytes_burst };
                done(daemon.change_disk(&vm, |vm| vm.limit_disk(disk, limits)))
            }
            Request::MoveDisk { vm, disk, to, delete } => {
                let Some(vm) = daemon.find(&vm) else {
                    let text = format!("no VM {vm} on host {}", daemon.env.host);
                    return Response::error(ErrorCode::NotFound, text);
                };
                let mut told = |percent| {
                    tell(Progress { phase: "copying the disk".to_owned(), percent });
                };
                let moved = vm.move_disk(disk, &to, delete, &mut told);
                done(moved.map_err(|e| Response::error(ErrorCode::Failed, e)))
            }
            Request::ResizeDisk { vm, disk, size } => {
                done(daemon.change_disk(&vm, |vm| vm.resize_disk(disk, size)))
            }
            Request::Console { .. } => {
                Response::error(ErrorCode::BadRequest, "not a request for an answer")
            }
        }
    }

    fn console(&self, name: &str, dev: u8) -> Result<ServeConsole, Response> {
        let (vm, _) = self.0.live(name)?;
        let Some(hub) = vm.console(dev).cloned() else {
            return Err(Response::error(
                ErrorCode::NotFound,
                format!("VM {name} has no console {dev}"),
            ));
        };
        Ok(Box::new(move |stream: UnixStream| {
            let typed = |bytes: &[u8]| vm.type_at(dev, bytes);
            if let Err(e) = hub.serve(stream, typed) {
                line(&format!("console of VM {}: {e}", vm.name()));
            }
        }))
    }
}

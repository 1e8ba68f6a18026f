//! `understudy run`: one unprotected VM in this terminal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use host::arbiter::memory::MemoryArbiter;
use host::channel::Secret;
use host::config::{
    ArbiterSection, CloudInitSection, DiskMode, DiskSection, NetSection, ProtectionSection,
    VmConfig, parse_size,
};
use host::console::{ConsoleHub, ConsoleView, Viewed};
use host::passt::PortForward;
use host::recording::{About, RecordLimit, RecordOptions, parse_duration, start};
use host::vm::{Definition, Env, Origin, StartOutcome, Vm};
use machine::engine::EngineKind;
use machine::io::HaltReason;

use super::terminal::{Keyboard, Typed, show};
use super::{engine_line, failure, say, usage};

/// Options of `run`, named as QEMU's.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Memory.
    #[arg(short, long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    memory: u64,
    /// Harts (virtual CPUs).
    #[arg(long, value_name = "N", default_value_t = 1)]
    smp: u8,
    /// Linux kernel image or ELF executable.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    append: String,
    /// Firmware for M-mode; without it the machine provides the SBI itself to a kernel, and boots a disk by Debian's OpenSBI
    /// and U-Boot.
    #[arg(long, value_name = "FILE")]
    bios: Option<PathBuf>,
    /// U-Boot for S-mode, which the firmware starts, instead of Debian's.
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    u_boot: Option<PathBuf>,
    /// A disk; may be given several times.
    #[arg(long, value_name = "path=FILE[,format=raw|qcow2]|nbd=URL[,readonly][,iops=N][,bps=SIZE]...", value_parser = parse_disk)]
    disk: Vec<DiskSection>,
    /// A network device; may be given several times.
    #[arg(long, value_name = "bridge=NAME|tap=NAME|macvtap=CARD|passt[,mac=MAC]", value_parser = parse_net)]
    net: Vec<NetSection>,
    /// Forward a port of this host to the guest, by passt; may be given several times.
    #[arg(short = 'p', long, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    publish: Vec<PortForward>,
    #[command(flatten)]
    cloud_init: CloudInitArgs,
    /// Virtio consoles, beside the UART.
    #[arg(long, value_name = "N", default_value_t = 0)]
    consoles: u8,
    /// Name of the VM: its MAC addresses are made from it.
    #[arg(long, default_value = "vm")]
    name: String,
    /// The engine that runs it [default: the fastest that this host can have].
    #[arg(long, value_name = "interpreter|jit")]
    engine: Option<EngineKind>,
    /// Say at the end what the engine had in memory and has done.
    #[arg(long)]
    stats: bool,
    /// Record the run into a new directory, for `understudy replay` and `understudy debug`.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Keep no more of the recording than this, of the latest: a size on the disk (2G) or a time (10m).
    #[arg(long, value_name = "SIZE|TIME", requires = "record")]
    record_limit: Option<RecordLimit>,
    /// Time between snapshots in a recording, from which replays can begin; 0s: none but those that a limit needs.
    #[arg(long, value_name = "TIME", default_value = "60s", requires = "record", value_parser = parse_duration)]
    snapshot_interval: Duration,
    /// Time between the digests in a recording; 0: none but the last.
    #[arg(long, value_name = "MS", default_value_t = 1000, requires = "record")]
    digest_interval: u32,
}

/// What cloud-init in the guest is told, by one more disk.
#[derive(Debug, Args)]
struct CloudInitArgs {
    /// User data for cloud-init in the guest, cloud-config for instance.
    #[arg(long, value_name = "FILE")]
    cloud_init: Option<PathBuf>,
    /// Public SSH keys for cloud-init's default user, one a line.
    #[arg(long, value_name = "FILE")]
    ssh_key: Option<PathBuf>,
    /// The guest's name, for cloud-init [default: the VM's].
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
}

impl CloudInitArgs {
    fn section(self) -> Option<CloudInitSection> {
        let is_asked =
            self.cloud_init.is_some() || self.ssh_key.is_some() || self.hostname.is_some();
        let seed = std::env::temp_dir().join(format!("understudy-{}.seed", std::process::id()));
        is_asked.then_some(CloudInitSection {
            user_data: self.cloud_init,
            ssh_key: self.ssh_key,
            hostname: self.hostname,
            seed: Some(seed),
        })
    }
}

/// The seed of a VM in the terminal, gone when dropped.
struct Seed(Option<PathBuf>);

impl Drop for Seed {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // It was not made if the VM did not start.
            drop(std::fs::remove_file(path));
        }
    }
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    text.split(',').map(|part| match part.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (part, None),
    })
}

fn parse_count(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn parse_disk(text: &str) -> Result<DiskSection, String> {
    let mut disk = DiskSection::default();
    for pair in pairs(text) {
        match pair {
            ("path", Some(path)) => disk.path = path.into(),
            ("readonly", None | Some("on")) => disk.readonly = true,
            ("readonly" | "backing", Some("off")) => {}
            ("nbd", Some(url)) => {
                disk.nbd = Some(url.parse()?);
                // It is where every host reaches it.
                disk.mode = DiskMode::Shared;
            }
            ("nbd-timeout", Some(time)) => disk.nbd_timeout = Some(parse_duration(time)?),
            ("format", Some(format)) => disk.format = Some(format.parse()?),
            ("backing", Some("on")) => disk.backing = true,
            ("aio", Some(aio)) => disk.aio = aio.parse()?,
            ("iops", Some(n)) => disk.iops = Some(parse_count(n)?),
            ("iops-burst", Some(n)) => disk.iops_burst = Some(parse_count(n)?),
            ("bps", Some(n)) => disk.bytes_per_second = Some(parse_size(n)?),
            ("bps-burst", Some(n)) => disk.bytes_burst = Some(parse_size(n)?),
            (key, _) => {
                return Err(format!(
                    "unknown part {key:?}: a disk is path=FILE[,format=raw|qcow2][,backing=on] or nbd=URL[,nbd-timeout=30s], and \
                     [,readonly][,iops=N][,bps=SIZE][,iops-burst=N][,bps-burst=SIZE][,aio=auto|io_uring|threads]"
                ));
            }
        }
    }
    if disk.path.as_os_str().is_empty() == disk.nbd.is_none() {
        return Err("a disk needs either path=FILE or nbd=URL".to_owned());
    }
    Ok(disk)
}

fn parse_net(text: &str) -> Result<NetSection, String> {
    let mut net = NetSection::default();
    for pair in pairs(text) {
        match pair {
            ("bridge", Some(name)) => net.bridge = Some(name.to_owned()),
            ("tap", Some(name)) => net.tap = Some(name.to_owned()),
            ("macvtap", Some(name)) => net.macvtap = Some(name.to_owned()),
            ("passt", None) => net.passt = true,
            ("mac", Some(mac)) => net.mac = Some(mac.to_owned()),
            (key, _) => {
                return Err(format!(
                    "unknown part {key:?}: a network device is bridge=NAME, tap=NAME, macvtap=CARD or passt, and mac=MAC"
                ));
            }
        }
    }
    Ok(net)
}

/// The network devices; ports that are forwarded go to the first one with passt, which is added if there is none.
fn nets(mut nets: Vec<NetSection>, ports: Vec<PortForward>) -> Vec<NetSection> {
    if !ports.is_empty() {
        match nets.iter_mut().find(|net| net.passt) {
            Some(net) => net.ports = ports,
            None => nets.push(NetSection { passt: true, ports, ..NetSection::default() }),
        }
    }
    nets
}

fn definition(args: RunArgs) -> anyhow::Result<Definition> {
    let mut config = VmConfig {
        name: args.name,
        memory: args.memory,
        harts: args.smp,
        kernel: args.kernel,
        initrd: args.initrd,
        bios: args.bios,
        u_boot: args.u_boot,
        append: args.append,
        consoles: args.consoles,
        rngs: 1,
        disks: args.disk,
        nets: nets(args.net, args.publish),
        cloud_init: args.cloud_init.section(),
        protection: ProtectionSection {
            enabled: false,
            digest_interval_ms: args.digest_interval,
            ..ProtectionSection::default()
        },
    };
    config.check().map_err(usage)?;
    config.add_seed(Path::new(""));
    let about = About {
        vm: config.name.clone(),
        host: super::host_name(),
        build: start::BUILD.to_owned(),
        ..About::default()
    };
    let record = args.record.map(|dir| RecordOptions {
        dir,
        limit: args.record_limit.unwrap_or_default(),
        snapshot_interval: args.snapshot_interval,
        about,
    });
    let (text, file, origin) = (String::new(), PathBuf::new(), Origin::PowerOn);
    Ok(Definition { text, file, config, record, origin })
}

/// Runs the VM until it powers off or is stopped; the exit status is the guest's.
pub(crate) fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let (engine, has_stats) = (args.engine, args.stats);
    let definition = definition(args)?;
    let _seed = Seed(definition.config.cloud_init.as_ref().and_then(|c| c.seed.clone()));
    live(definition, engine, has_stats)
}

/// Runs a VM in this terminal until it powers off or is stopped.
pub(crate) fn live(
    definition: Definition,
    engine: Option<EngineKind>,
    has_stats: bool,
) -> anyhow::Result<ExitCode> {
    let (vm, hub, mut view) = start(definition, engine)?;
    let keyboard = Keyboard::open()?;
    let code = serve(&vm, &hub, &mut view, &keyboard);
    drop(keyboard);
    if has_stats && let Some(engine) = vm.engine() {
        say(&engine_line(&engine));
    }
    code
}

/// Starts a VM in this process, with a view of its console from the first byte on.
pub(crate) fn start(
    definition: Definition,
    engine: Option<EngineKind>,
) -> anyhow::Result<(Vm, ConsoleHub, ConsoleView)> {
    let env = Arc::new(Env {
        host: "localhost".to_owned(),
        secret: Secret::new(&[0; 16])?,
        peers: BTreeMap::new(),
        log_source: None,
        compresses: false,
        arbiter: ArbiterSection::Dir(PathBuf::new()),
        state_dir: PathBuf::from("."),
        detection_ms: 1000,
        engine,
        fence: host::config::FenceSection::default(),
        resync_limit: None,
        is_terminal: true,
    });
    let name = definition.config.name.clone();
    let vm = Vm::with_arbiter(&env, &name, 1000, Box::new(MemoryArbiter::default()))
        .map_err(anyhow::Error::msg)?;
    let hub = vm.console(0).cloned().ok_or_else(|| anyhow::anyhow!("no console"))?;
    let view = hub.attach().ok_or_else(|| anyhow::anyhow!("no console"))?;
    match vm.start(definition) {
        StartOutcome::Running => {}
        StartOutcome::Failed { reason } => return Err(failure(1, reason)),
        StartOutcome::Refused { .. } => return Err(failure(5, "the VM was refused")),
    }
    Ok((vm, hub, view))
}

fn serve(
    vm: &Vm,
    hub: &ConsoleHub,
    view: &mut ConsoleView,
    keyboard: &Keyboard,
) -> anyhow::Result<ExitCode> {
    loop {
        while let Ok(typed) = keyboard.typed.try_recv() {
            match typed {
                Typed::Bytes(bytes) => vm.type_at(0, &bytes),
                Typed::Stop => vm.power_off(),
                Typed::Detach => {
                    say("\r\na VM in the terminal cannot be left alone: Ctrl-a x stops it\r")
                }
                Typed::End => {}
            }
        }
        let halted = vm.halted();
        match view.next(Duration::from_millis(if halted.is_some() { 0 } else { 5 })) {
            Viewed::Bytes(bytes) => {
                show(&bytes);
                continue;
            }
            Viewed::TimedOut => {}
            Viewed::Ended => {
                say(
                    "\r\nsome of the console's output was lost: this terminal took it too slowly\r",
                );
                *view = hub.attach().ok_or_else(|| anyhow::anyhow!("no console"))?;
                show(&view.scrollback);
                continue;
            }
        }
        match halted {
            None => {}
            Some(HaltReason::PowerOff { code }) => {
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
            }
            Some(HaltReason::Operator) => return Ok(ExitCode::SUCCESS),
            Some(HaltReason::GuestFault { reason }) => return Err(failure(1, reason)),
        }
    }
}

//! Configuration of a VM, and the machine made from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use machine::config::{BootImages, DiskConfig, HARTS_MAX, MachineConfig, NetConfig, VIRTIO_SLOTS};
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};

use super::{
    CloudInitSection, ConfigError, DETECTION_MS_DEFAULT, Problem, at, check_detection, firmware,
    optional_size, parse_size, parse_toml, problem, read_text,
};
use crate::disk::lock::default_path;
use crate::disk::{Aio, DiskFormat, DiskSource, Limits, NbdUrl, PATIENCE_DEFAULT};
use crate::name::check_name;
use crate::passt::{PORTS_MAX, PortForward};
use crate::recording::parse_duration;

const MEMORY_BYTES_MIN: u64 = 32 << 20;
const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// Longest firmware, kernel or initial RAM disk.
const BOOT_FILE_BYTES_MAX: u64 = 2 << 30;
const APPEND_BYTES_MAX: usize = 4096;
const LAG_MS_DEFAULT: u32 = 300;
/// What [`ProtectionSection::lag_ms`] may be. Log, its replay and the news of that take up to 30 ms each: with less than this
/// range has, a secondary that keeps up would slow its primary. With more, it would have gigabytes of log in its memory.
pub const LAG_MS: std::ops::RangeInclusive<u32> = 200..=2_000;
const DIGEST_INTERVAL_MS_DEFAULT: u32 = 1000;
const FLIGHT_RECORDER_DEFAULT: Duration = Duration::from_secs(300);
const FLIGHT_RECORDER_BYTES_DEFAULT: u64 = 1 << 30;

/// How a disk is kept on the hosts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskMode {
    /// Each host has its own copy.
    #[default]
    Mirrored,
    /// One image that all hosts reach.
    Shared,
}

/// Where a secondary has the data of reads from, for a disk that is shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadsFrom {
    /// They come with the log.
    #[default]
    Log,
    /// It reads them itself.
    Local,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSection {
    /// The image: a file or a block device. Empty when it is an NBD export.
    #[serde(default)]
    pub path: PathBuf,
    /// The NBD export, as a URL.
    #[serde(default, deserialize_with = "nbd_url")]
    pub nbd: Option<NbdUrl>,
    /// How long a request to an NBD server that is gone is tried again; written as `"30s"`.
    #[serde(default, deserialize_with = "some_duration")]
    pub nbd_timeout: Option<Duration>,
    /// What it is; raw when absent, unless it looks like something else.
    pub format: Option<DiskFormat>,
    /// Whether backing files of a qcow2 image may be read.
    #[serde(default)]
    pub backing: bool,
    /// How it is kept on the hosts.
    #[serde(default)]
    pub mode: DiskMode,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// What carries out requests that take longer.
    #[serde(default)]
    pub aio: Aio,
    /// Most reads, writes and discards in a second.
    pub iops: Option<u64>,
    /// How many of them may come at once after a pause; a tenth of a second's when absent.
    pub iops_burst: Option<u64>,
    /// Most bytes read and written in a second; written as `"50M"`.
    #[serde(default, deserialize_with = "some_size")]
    pub bytes_per_second: Option<u64>,
    /// How many of them may come at once after a pause; a tenth of a second's when absent.
    #[serde(default, deserialize_with = "some_size")]
    pub bytes_burst: Option<u64>,
    /// The lock file of a shared image: beside a file that is one, when absent.
    pub lock: Option<PathBuf>,
    /// Where a secondary has the data of reads from, for a shared disk.
    #[serde(default)]
    pub reads: ReadsFrom,
}

impl DiskSection {
    /// Whether other hosts write to the same image, so that it takes a lock to do so.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        let has_lock = self.nbd.is_none() || self.lock.is_some();
        self.mode == DiskMode::Shared && !self.readonly && has_lock
    }

    /// The lock file of a shared image.
    #[must_use]
    pub fn lock_path(&self) -> PathBuf {
        self.lock.clone().unwrap_or_else(|| default_path(&self.path))
    }

    fn check_lock(&self) -> Result<(), Problem> {
        if self.lock.is_some() && !self.is_locked() {
            let text = "lock is for disks with mode = \"shared\" that are not readonly";
            return Err(problem("lock", text.to_owned()));
        }
        if self.reads == ReadsFrom::Local && self.mode != DiskMode::Shared {
            let text = "reads is for disks with mode = \"shared\"; a mirrored one is read on each host anyway";
            return Err(problem("reads", text.to_owned()));
        }
        let has_no_file = self.path.starts_with("/dev");
        if self.is_locked() && self.lock.is_none() && has_no_file {
            let text = format!(
                "{} is no file that a lock file could be beside: give the disk lock = \"PATH\", on a file system that \
                 all hosts share",
                self.path.display()
            );
            return Err(problem("path", text));
        }
        Ok(())
    }
}

impl DiskSection {
    /// The limits of its requests.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            iops: self.iops,
            bytes_per_second: self.bytes_per_second,
            iops_burst: self.iops_burst,
            bytes_burst: self.bytes_burst,
        }
    }

    /// Where the image is and what it is.
    #[must_use]
    pub fn source(&self) -> DiskSource {
        if let Some(url) = &self.nbd {
            let patience = self.nbd_timeout.unwrap_or(PATIENCE_DEFAULT);
            return DiskSource::nbd(url.clone(), patience, self.format);
        }
        DiskSource { has_backing: self.backing, ..DiskSource::file(&self.path, self.format) }
    }

    /// Where it is, for people.
    #[must_use]
    pub fn place(&self) -> String {
        self.nbd.as_ref().map_or_else(|| self.path.display().to_string(), ToString::to_string)
    }

    /// What a new file for this disk is made as.
    #[must_use]
    pub fn image_format(&self) -> DiskFormat {
        self.format.unwrap_or(DiskFormat::Raw)
    }

    fn check(&self) -> Result<(), Problem> {
        let is_qcow2 = self.format == Some(DiskFormat::Qcow2);
        match (&self.nbd, self.path.as_os_str().is_empty()) {
            (None, true) => return Err(problem("disk", "a disk needs path or nbd".to_owned())),
            (Some(_), false) => {
                return Err(problem("nbd", "a disk has either path or nbd".to_owned()));
            }
            (Some(_), true) if self.mode != DiskMode::Shared => {
                let text = "an NBD export is one disk that all hosts reach: say mode = \"shared\"";
                return Err(problem("nbd", text.to_owned()));
            }
            (Some(_), true) if is_qcow2 => {
                let text = "an NBD export is raw: let the server open the qcow2 image";
                return Err(problem("format", text.to_owned()));
            }
            (Some(_), true) | (None, false) => {}
        }
        if is_qcow2 && self.mode == DiskMode::Shared && !self.readonly {
            let text = "a qcow2 disk cannot be shared, because each host keeps its tables in memory: make it raw, or mode = \"mirrored\"";
            return Err(problem("mode", text.to_owned()));
        }
        if self.backing && !is_qcow2 {
            return Err(problem("backing", "backing is for format = \"qcow2\"".to_owned()));
        }
        self.check_lock()?;
        self.check_limits()
    }

    fn check_limits(&self) -> Result<(), Problem> {
        let limits = [
            ("iops", self.iops),
            ("iops_burst", self.iops_burst),
            ("bytes_per_second", self.bytes_per_second),
            ("bytes_burst", self.bytes_burst),
        ];
        match limits.into_iter().find(|(_, value)| *value == Some(0)) {
            None => Ok(()),
            Some((key, _)) => {
                let text = format!("{key} is 0: a disk without a limit has no such key");
                Err(problem(key, text))
            }
        }
    }
}

/// A network device: with a bridge that its tap is attached to, with a tap or macvtap of that name that exists already, with
/// a macvtap on a network card, with passt, or with none of them: then what it sends goes nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetSection {
    /// Bridge to attach a new tap to.
    pub bridge: Option<String>,
    /// Name of the tap.
    pub tap: Option<String>,
    /// Network card to make a macvtap on.
    pub macvtap: Option<String>,
    /// Whether it is passt's, which takes no right and cannot be protected.
    pub passt: bool,
    /// Ports of the host that lead to the guest, with passt; written as `"8022:22"`.
    pub ports: Vec<PortForward>,
    /// MAC address of the guest's side; made from the VM's name when absent.
    pub mac: Option<String>,
}

/// How the VM is protected.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProtectionSection {
    /// Whether a secondary is wanted.
    pub enabled: bool,
    /// Hosts that may hold the secondary, best first; empty: any peer.
    pub hosts: Vec<String>,
    /// Time without a sign of life after which the other side counts as lost, in milliseconds; the daemon's when
    /// absent.
    pub detection_ms: Option<u32>,
    /// How far the secondary may be behind without slowing the primary much, in milliseconds ([`LAG_MS`]): a failover has to catch up with
    /// as much, at the speed of the host that takes over.
    pub lag_ms: u32,
    /// Time between digests, in milliseconds; 0: none.
    pub digest_interval_ms: u32,
    /// How much of the VM's past the secondary keeps on its host's disk, for `understudy debug`; written as `"5m"`, `"0s"`:
    /// nothing.
    #[serde(deserialize_with = "duration")]
    pub flight_recorder: Duration,
    /// Most bytes on the disk that it keeps for that; written as `"1G"`.
    #[serde(deserialize_with = "size")]
    pub flight_recorder_size: u64,
    /// Most bytes of disks that a new secondary is sent in a second; the daemon's when absent; written as `"200M"`.
    #[serde(deserialize_with = "optional_size")]
    pub resync_limit: Option<u64>,
}

impl Default for ProtectionSection {
    fn default() -> Self {
        Self {
            enabled: true,
            hosts: Vec::new(),
            detection_ms: None,
            lag_ms: LAG_MS_DEFAULT,
            digest_interval_ms: DIGEST_INTERVAL_MS_DEFAULT,
            flight_recorder: FLIGHT_RECORDER_DEFAULT,
            flight_recorder_size: FLIGHT_RECORDER_BYTES_DEFAULT,
            resync_limit: None,
        }
    }
}

/// Configuration of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name of the VM, unique among all hosts.
    pub name: String,
    /// RAM in bytes; written as `"512M"`.
    #[serde(deserialize_with = "size")]
    pub memory: u64,
    /// Number of harts.
    #[serde(default = "one")]
    pub harts: u8,
    /// Kernel: Linux `Image` or ELF.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Firmware that runs in M-mode; without it the machine provides the SBI to a kernel.
    pub bios: Option<PathBuf>,
    /// U-Boot for S-mode, which the firmware starts when there is no kernel.
    pub u_boot: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub append: String,
    /// Number of virtio consoles, beside the UART.
    #[serde(default)]
    pub consoles: u8,
    /// Number of virtio entropy devices.
    #[serde(default = "one")]
    pub rngs: u8,
    /// Disks.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskSection>,
    /// Network devices.
    #[serde(default, rename = "net")]
    pub nets: Vec<NetSection>,
    /// What its cloud-init is told.
    pub cloud_init: Option<CloudInitSection>,
    /// How it is protected.
    #[serde(default)]
    pub protection: ProtectionSection,
}

fn one() -> u8 {
    1
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_size(&text).map_err(serde::de::Error::custom)
}

fn some_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    size(deserializer).map(Some)
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text).map_err(serde::de::Error::custom)
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

fn nbd_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NbdUrl>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

/// What the host draws for a new machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drawn {
    /// Wall-clock time at `mtime` 0, in nanoseconds since the Unix epoch.
    pub rtc_base_ns: u64,
    /// Seed for the guest kernel.
    pub rng_seed: Vec<u8>,
}

impl VmConfig {
    /// Reads and checks a file. Relative paths in it count from its directory.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let base = path.parent().unwrap_or(Path::new(""));
        Self::parse(&read_text(path)?, &path.display().to_string(), base)
    }

    /// Reads and checks a text; `file` is used in messages, relative paths count from `base`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str, file: &str, base: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = parse_toml(text, file)?;
        config.find_problem().map_err(|problem| at(text, file, problem))?;
        let boot = [&mut config.kernel, &mut config.initrd, &mut config.bios, &mut config.u_boot];
        let files = config.disks.iter_mut().flat_map(|disk| {
            let path = disk.nbd.is_none().then_some(&mut disk.path);
            path.into_iter().chain(&mut disk.lock)
        });
        let seed = config.cloud_init.iter_mut().flat_map(CloudInitSection::paths);
        for path in boot.into_iter().flatten().chain(files).chain(seed) {
            *path = base.join(&*path);
        }
        config.add_seed(base);
        Ok(config)
    }

    /// Adds the disk with what cloud-init is told, if it is told something; `base` is where it goes when nothing better is
    /// known. For configurations that were not read from a file.
    pub fn add_seed(&mut self, base: &Path) {
        if let Some(section) = &self.cloud_init {
            self.disks.push(section.disk(&self.name, &self.disks, base));
        }
    }

    /// Writes the disk with what cloud-init is told; a machine that ran before keeps the one that is there.
    ///
    /// # Errors
    /// One line.
    pub fn write_seed(&self, is_new: bool) -> Result<(), String> {
        let (Some(section), Some(disk)) = (&self.cloud_init, self.disks.last()) else {
            return Ok(());
        };
        if !is_new && disk.path.exists() {
            return Ok(());
        }
        section.write(&self.name, &disk.path).map_err(|e| format!("VM {}: {e}", self.name))
    }

    /// Checks a configuration that was not read from a file.
    ///
    /// # Errors
    /// One line.
    pub fn check(&self) -> Result<(), String> {
        self.find_problem().map_err(|problem| problem.text)
    }

    fn find_problem(&self) -> Result<(), Problem> {
        check_name(&self.name).map_err(|e| problem("name", e.to_string()))?;
        if self.memory < MEMORY_BYTES_MIN || !self.memory.is_multiple_of(MEMORY_STEP_BYTES) {
            let text = "memory has to be a multiple of 2M, and at least 32M".to_owned();
            return Err(problem("memory", text));
        }
        if self.harts == 0 || self.harts > HARTS_MAX {
            let text = format!("harts is {}, it has to be from 1 to {HARTS_MAX}", self.harts);
            return Err(problem("harts", text));
        }
        if self.append.len() > APPEND_BYTES_MAX || self.append.contains('\0') {
            let text = "append is longer than 4096 bytes, or has a zero byte".to_owned();
            return Err(problem("append", text));
        }
        self.check_boot()?;
        let devices = self.disks.len()
            + usize::from(self.cloud_init.is_some())
            + self.nets.len()
            + usize::from(self.consoles)
            + usize::from(self.rngs);
        if devices > VIRTIO_SLOTS {
            let text = format!(
                "{devices} devices (disks, nets, consoles, rngs), the board has {VIRTIO_SLOTS} slots"
            );
            return Err(problem("name", text));
        }
        for disk in &self.disks {
            disk.check()?;
            let is_bare = disk.nbd.is_some() && !disk.readonly && disk.lock.is_none();
            if is_bare && self.protection.enabled {
                let text = "an NBD export that a protected VM writes to needs lock = \"PATH\", on a file system that all hosts share";
                return Err(problem("nbd", text.to_owned()));
            }
        }
        for net in &self.nets {
            net.check()?;
        }
        if let (Some(reason), true) = (self.unprotectable(), self.protection.enabled) {
            let text = format!("{reason}; or write enabled = false into [protection]");
            return Err(problem("passt", text));
        }
        self.macs().map_err(|text| problem("mac", text))?;
        for host in &self.protection.hosts {
            check_name(host).map_err(|e| problem("hosts", e.to_string()))?;
        }
        let lag_ms = self.protection.lag_ms;
        if !LAG_MS.contains(&lag_ms) {
            let (least, most) = (LAG_MS.start(), LAG_MS.end());
            let text = format!("lag_ms is {lag_ms}, it has to be from {least} to {most}");
            return Err(problem("lag_ms", text));
        }
        check_detection(self.protection.detection_ms.unwrap_or(DETECTION_MS_DEFAULT))
    }

    fn check_boot(&self) -> Result<(), Problem> {
        if self.kernel.is_some() && self.u_boot.is_some() {
            return Err(problem("u_boot", "u_boot is given beside a kernel".to_owned()));
        }
        let is_given = self.kernel.is_some() || self.bios.is_some() || self.u_boot.is_some();
        if !is_given && self.disks.is_empty() {
            let text = "neither kernel nor bios is given, and no disk to boot from".to_owned();
            return Err(problem("name", text));
        }
        Ok(())
    }

    /// Why it cannot have a secondary, if it cannot.
    #[must_use]
    pub fn unprotectable(&self) -> Option<String> {
        let index = self.nets.iter().position(|net| net.passt)?;
        Some(format!(
            "a VM with passt cannot be protected (network device {index}): its connections are in the passt process, and end \
             with the host; give it a bridge, a tap or a macvtap"
        ))
    }

    /// MAC addresses of the network devices, in order.
    ///
    /// # Errors
    /// One line, when an address is malformed, no unicast address, or given twice.
    pub fn macs(&self) -> Result<Vec<[u8; 6]>, String> {
        let mut macs = Vec::new();
        for (index, net) in self.nets.iter().enumerate() {
            let mac = match &net.mac {
                Some(text) => parse_mac(text)?,
                None => stable_mac(&self.name, index),
            };
            if macs.contains(&mac) {
                return Err(format!("MAC address of network device {index} is in use twice"));
            }
            macs.push(mac);
        }
        Ok(macs)
    }

    /// The machine, for disks of these sizes in bytes (see [`crate::disk::Image::size`]).
    ///
    /// # Errors
    /// One line, when the number of sizes is not that of the disks or a MAC address is wrong.
    pub fn machine_config(
        &self,
        disk_sizes: &[u64],
        drawn: Drawn,
    ) -> Result<MachineConfig, String> {
        if disk_sizes.len() != self.disks.len() {
            let (found, wanted) = (disk_sizes.len(), self.disks.len());
            return Err(format!("VM {}: {found} disk sizes for {wanted} disks", self.name));
        }
        let disk = |(index, (section, size)): (usize, (&DiskSection, &u64))| DiskConfig {
            size: *size,
            readonly: section.readonly,
            serial: serial(&self.name, index),
        };
        Ok(MachineConfig {
            harts: self.harts,
            ram_size: self.memory,
            nets: self.macs()?.into_iter().map(|mac| NetConfig { mac }).collect(),
            disks: self.disks.iter().zip(disk_sizes).enumerate().map(disk).collect(),
            consoles: self.consoles,
            rngs: self.rngs,
            rtc_base_ns: drawn.rtc_base_ns,
            rng_seed: drawn.rng_seed,
        })
    }

    /// Reads the files that the machine boots: those named, or this host's firmware when there is a disk and neither a
    /// kernel nor a `bios`. A `bios` alone is all that boots.
    ///
    /// # Errors
    /// One line that names the file and what it is for, or the package that has it.
    pub fn boot_images(&self) -> Result<BootImages, String> {
        let read = |what: &str, path: &Option<PathBuf>| {
            path.as_ref().map(|p| self.read_boot_file(what, p)).transpose()
        };
        let (mut bios, mut kernel) = (self.bios.clone(), self.kernel.clone());
        if kernel.is_none() && (bios.is_none() || self.u_boot.is_some()) {
            let found = firmware::find(bios.as_deref(), self.u_boot.as_deref());
            let found = found.map_err(|e| format!("VM {}: {e}", self.name))?;
            (bios, kernel) = (Some(found.bios), Some(found.u_boot));
        }
        Ok(BootImages {
            bios: read("bios", &bios)?,
            kernel: read("kernel", &kernel)?,
            initrd: read("initrd", &self.initrd)?,
            append: self.append.clone(),
        })
    }

    fn read_boot_file(&self, what: &str, path: &Path) -> Result<Arc<[u8]>, String> {
        let fail = |reason: &dyn std::fmt::Display| {
            format!("VM {}: cannot read {what} {}: {reason}", self.name, path.display())
        };
        let meta = std::fs::metadata(path).map_err(|e| fail(&e))?;
        if !meta.is_file() {
            return Err(fail(&"it is not a regular file"));
        }
        if meta.len() == 0 {
            return Err(fail(&"it is empty"));
        }
        if meta.len() > BOOT_FILE_BYTES_MAX.min(self.memory) {
            return Err(fail(&"it is bigger than the VM's memory"));
        }
        std::fs::read(path).map(Into::into).map_err(|e| fail(&e))
    }
}

impl NetSection {
    fn check(&self) -> Result<(), Problem> {
        let names = [("bridge", &self.bridge), ("tap", &self.tap), ("macvtap", &self.macvtap)];
        for (key, name) in names {
            if let Some(name) = name {
                crate::tap::check_interface_name(name).map_err(|e| problem(key, e))?;
            }
        }
        let ways =
            [self.passt, self.macvtap.is_some(), self.tap.is_some() || self.bridge.is_some()];
        if ways.iter().filter(|is_given| **is_given).count() > 1 {
            let text =
                "a network device has one of bridge (with or without tap), tap, macvtap and passt"
                    .to_owned();
            return Err(problem("net", text));
        }
        if !self.ports.is_empty() && !self.passt {
            let text = "ports are forwarded by passt alone: write passt = true".to_owned();
            return Err(problem("ports", text));
        }
        if self.ports.len() > PORTS_MAX {
            return Err(problem("ports", format!("more than {PORTS_MAX} ports are forwarded")));
        }
        Ok(())
    }
}

/// A MAC address that depends on the VM's name and the device's index alone: locally administered, unicast.
#[must_use]
pub fn stable_mac(vm: &str, index: usize) -> [u8; 6] {
    let hash = Sha256::new().chain_update(b"understudy mac ").chain_update(vm);
    let hash = hash.chain_update([0]).chain_update((index as u64).to_le_bytes()).finalize();
    [0x52, 0x54, hash[0], hash[1], hash[2], hash[3]]
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("MAC address {text:?} is not of the form 52:54:00:12:34:56");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
        if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(format!("MAC address {text:?} is not that of a single device"));
    }
    Ok(mac)
}

/// Serial number of a disk: at most 20 bytes, the same on each host.
fn serial(vm: &str, index: usize) -> String {
    let start: String = vm.chars().take(16).collect();
    format!("{start}-{index}")
}

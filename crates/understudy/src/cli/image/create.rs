//! `understudy image create`: a stock Debian on a disk image, installed by its own packages in a VM.
//!
//! # Failure
//! What is not finished is in a directory beside the image, which is removed at the end, or by the next try.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use guest::{BootLoader, GuestBuilder, Installer, StockOptions};
use host::config::{DiskSection, ProtectionSection, VmConfig, parse_size};
use host::console::Viewed;
use host::disk::DiskFormat;
use host::vm::{Definition, Origin};

use crate::cli::{failure, run, say, usage};

/// Smallest disk that the system and its first upgrades fit on.
const SIZE_MIN: u64 = 2 << 30;
const INSTALLER_MEMORY: u64 = 1 << 30;
/// Longest time without a sign of life of the installer, on a slow host.
const SILENCE_MAX: Duration = Duration::from_secs(1800);
/// Lines of the installer that are kept for a failure.
const TAIL_BYTES_MAX: usize = 64 << 10;

/// Systems that can be installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum System {
    /// Debian for riscv64.
    Debian,
}

/// How the firmware finds the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Boot {
    /// By GRUB, an EFI program.
    Efi,
    /// By U-Boot itself, from extlinux.conf.
    Extlinux,
}

/// Options of `image create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The system.
    system: System,
    /// The image to make, a raw one.
    out: PathBuf,
    /// Size of the disk.
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    size: u64,
    /// Debian's suite.
    #[arg(long, value_name = "NAME", default_value = "trixie")]
    suite: String,
    /// Another package to install; may be given several times.
    #[arg(long = "package", value_name = "NAME")]
    packages: Vec<String>,
    /// File of the public SSH keys that may log in as root.
    #[arg(long, value_name = "FILE")]
    ssh_key: Option<PathBuf>,
    /// Name of the machine.
    #[arg(long, value_name = "NAME", default_value = "debian")]
    hostname: String,
    /// Password of root; without it nobody can log in by one.
    #[arg(long, value_name = "PASSWORD")]
    root_password: Option<String>,
    /// The boot loader.
    #[arg(long, value_enum, default_value_t = Boot::Efi)]
    boot: Boot,
    /// Install cloud-init, which sets up each machine that is made from the image.
    #[arg(long)]
    cloud_init: bool,
    /// Replace an image that is there.
    #[arg(long)]
    force: bool,
}

impl CreateArgs {
    fn options(&self) -> anyhow::Result<StockOptions> {
        let ssh_keys = self.ssh_key.as_ref().map(|path| {
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
        });
        let options = StockOptions {
            suite: self.suite.clone(),
            packages: self.packages.clone(),
            boot: match self.boot {
                Boot::Efi => BootLoader::Efi,
                Boot::Extlinux => BootLoader::Extlinux,
            },
            cloud_init: self.cloud_init,
            hostname: self.hostname.clone(),
            ssh_keys: ssh_keys.transpose()?,
            root_password: self.root_password.clone(),
        };
        options.check().map_err(usage)?;
        Ok(options)
    }
}

/// Makes the image.
pub(crate) fn run(args: CreateArgs) -> anyhow::Result<ExitCode> {
    let System::Debian = args.system;
    let options = args.options()?;
    if args.size < SIZE_MIN || !args.size.is_multiple_of(1 << 20) {
        return Err(usage("the size has to be a multiple of 1M, and at least 2G"));
    }
    let out = &args.out;
    if !args.force && fs::symlink_metadata(out).is_ok() {
        return Err(failure(1, format!("{} is there already: --force replaces it", out.display())));
    }
    let started = Instant::now();
    let progress = |text: &str| say(&format!("{:4} s  {text}", started.elapsed().as_secs()));
    let work = WorkDir::beside(out)?;
    let disk = work.0.join("disk.img");
    let sparse = File::create(&disk).and_then(|file| file.set_len(args.size));
    sparse.with_context(|| format!("cannot make {}", disk.display()))?;
    let builder = GuestBuilder::new(guest::default_cache_dir());
    let installer = builder.installer(&options, &work.0, &progress)?;
    install(&installer, &disk, &progress)?;
    fs::rename(&disk, out).with_context(|| format!("cannot make {}", out.display()))?;
    progress(&format!("{} is ready", out.display()));
    if options.ssh_keys.is_none() && options.root_password.is_none() && !options.cloud_init {
        say("nobody can log in to it: there is neither an SSH key nor a password, nor cloud-init");
    }
    Ok(ExitCode::SUCCESS)
}

/// A directory for what is not finished, gone when dropped.
struct WorkDir(PathBuf);

impl WorkDir {
    fn beside(out: &Path) -> anyhow::Result<Self> {
        let name = out.file_name().ok_or_else(|| usage("the image needs a name"))?;
        let path = out.with_file_name(format!("{}.making", name.to_string_lossy()));
        let made = || -> std::io::Result<()> {
            if path.exists() {
                fs::remove_dir_all(&path)?;
            }
            fs::create_dir(&path)
        };
        made().with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next try.
        drop(fs::remove_dir_all(&self.0));
    }
}

fn definition(installer: &Installer, disk: &Path) -> Definition {
    let section = |path: &Path, readonly| DiskSection {
        path: path.to_owned(),
        format: Some(DiskFormat::Raw),
        readonly,
        ..DiskSection::default()
    };
    let config = VmConfig {
        name: "installer".to_owned(),
        memory: INSTALLER_MEMORY,
        harts: 1,
        kernel: Some(installer.kernel.clone()),
        initrd: Some(installer.initrd.clone()),
        bios: None,
        u_boot: None,
        append: installer.append.clone(),
        consoles: 0,
        rngs: 1,
        disks: vec![section(disk, false), section(&installer.packages, true)],
        nets: Vec::new(),
        cloud_init: None,
        protection: ProtectionSection {
            enabled: false,
            digest_interval_ms: 0,
            ..ProtectionSection::default()
        },
    };
    Definition {
        text: String::new(),
        file: PathBuf::new(),
        config,
        record: None,
        origin: Origin::PowerOn,
    }
}

/// Runs the installer to its end.
fn install(installer: &Installer, disk: &Path, progress: &dyn Fn(&str)) -> anyhow::Result<()> {
    let (vm, _, mut view) = run::start(definition(installer, disk), None)?;
    let mut heard = Heard::default();
    heard.take(&std::mem::take(&mut view.scrollback), progress);
    let mut last = Instant::now();
    loop {
        let halted = vm.halted();
        match view.next(Duration::from_millis(if halted.is_some() { 0 } else { 100 })) {
            Viewed::Bytes(bytes) => {
                heard.take(&bytes, progress);
                last = Instant::now();
            }
            Viewed::Ended => anyhow::bail!("the installer's console was lost"),
            Viewed::TimedOut if halted.is_some() => return heard.end(),
            Viewed::TimedOut if last.elapsed() > SILENCE_MAX => {
                anyhow::bail!("the installer has said nothing for {} s", SILENCE_MAX.as_secs())
            }
            Viewed::TimedOut => {}
        }
    }
}

/// What the installer has said.
#[derive(Default)]
struct Heard {
    line: Vec<u8>,
    tail: String,
    is_done: bool,
    reason: Option<String>,
}

impl Heard {
    fn take(&mut self, bytes: &[u8], progress: &dyn Fn(&str)) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                self.hear(line.trim_end(), progress);
            } else if self.line.len() < TAIL_BYTES_MAX {
                self.line.push(byte);
            }
        }
    }

    fn hear(&mut self, line: &str, progress: &dyn Fn(&str)) {
        if let Some(step) = line.strip_prefix(guest::STEP) {
            progress(step);
        } else if let Some(reason) = line.strip_prefix(guest::FAILED) {
            self.reason = Some(reason.to_owned());
        } else if line == guest::DONE {
            self.is_done = true;
        } else if self.tail.len() < TAIL_BYTES_MAX {
            self.tail += line;
            self.tail.push('\n');
        }
    }

    fn end(self) -> anyhow::Result<()> {
        if self.is_done {
            return Ok(());
        }
        say(self.tail.trim_end());
        let reason = self.reason.unwrap_or_else(|| "it ended before it was done".to_owned());
        Err(failure(1, format!("the installation failed: {reason}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installer_is_heard_line_by_line() {
        let steps = std::cell::RefCell::new(Vec::new());
        let progress = |text: &str| steps.borrow_mut().push(text.to_owned());
        let mut heard = Heard::default();
        heard.take(b"boot\r\nunderstudy: st", &progress);
        heard.take(b"ep one\r\nunderstudy: failed: no room: x\r\n", &progress);
        assert_eq!(steps.borrow().as_slice(), ["one"]);
        let error = heard.end().unwrap_err().to_string();
        assert_eq!(error, "the installation failed: no room: x");
        let mut heard = Heard::default();
        heard.take(b"understudy: installed\r\n", &progress);
        assert!(heard.end().is_ok());
    }
}

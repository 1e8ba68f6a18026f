//! A stock Debian for a disk: which packages it has, and the installer that puts them there inside a VM of its own.
//!
//! # Place
//! Called by the binary's `image create`. What is made here boots as a machine with two disks: the one to install on,
//! and behind it, read-only, the one with the packages. `init/install.sh` does the work there, with Debian's own tools,
//! as root of that machine; nobody needs to be root on this one.
//!
//! # Invariants
//! - INV-GUEST-5: what an option puts into a file that a shell reads was checked here; all else goes as files.
//!
//! # Failure
//! The installer says how far it is and why it gave up on its console, see [`STEP`], [`FAILED`] and [`DONE`].

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::apt::{self, Apt, Package, make_dir};
use crate::cpio::FileTree;
use crate::image::Packages;
use crate::{APPLETS, BuildGuestError, GuestBuilder, SUITE, kernel, key, with_fresh_lists};

/// How a line on the installer's console starts that says what it does now.
pub const STEP: &str = "understudy: step ";
/// How the line starts that says why it gave up.
pub const FAILED: &str = "understudy: failed: ";
/// The line that says that all is done.
pub const DONE: &str = "understudy: installed";

/// Raised when what is installed changes without a change of the script.
const RECIPE: u32 = 1;
const SCRIPT: &str = include_str!("init/install.sh");
/// What apt calls the packages that every Debian has.
const ESSENTIAL: &str = "?essential";
/// What a stock system has beside them.
const SYSTEM: &[&str] = &[
    "apt",
    "ca-certificates",
    "dbus",
    "debian-archive-keyring",
    "dosfstools",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "linux-image-riscv64",
    "login",
    "nano",
    "netbase",
    "openssh-server",
    "procps",
    "systemd-repart",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "tzdata",
    "udev",
    "zstd",
];
const CLOUD_INIT: &[&str] = &["cloud-init", "sudo"];
/// What the installer itself runs.
const TOOLS: &[&str] = &["busybox-static", "dosfstools", "dpkg", "e2fsprogs", "fdisk", "tar"];
const PROGRAMS: &[&str] = &[
    "usr/bin/busybox",
    "usr/bin/dpkg-deb",
    "usr/bin/tar",
    "usr/sbin/mke2fs",
    "usr/sbin/mkfs.vfat",
    "usr/sbin/sfdisk",
];
const TEXT_BYTES_MAX: usize = 64 << 10;

/// Who loads the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootLoader {
    /// GRUB, started as `\EFI\BOOT\BOOTRISCV64.EFI`.
    Efi,
    /// U-Boot itself, by `/boot/extlinux/extlinux.conf`.
    Extlinux,
}

impl BootLoader {
    fn name(self) -> &'static str {
        match self {
            Self::Efi => "efi",
            Self::Extlinux => "extlinux",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Efi => "grub-efi-riscv64",
            Self::Extlinux => "u-boot-menu",
        }
    }
}

/// What to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockOptions {
    /// Debian's suite.
    pub suite: String,
    /// Packages beside those that every image has.
    pub packages: Vec<String>,
    /// Who loads the kernel.
    pub boot: BootLoader,
    /// Whether cloud-init sets each machine up.
    pub cloud_init: bool,
    /// The machine's name.
    pub hostname: String,
    /// Public keys that may log in as root, one a line.
    pub ssh_keys: Option<String>,
    /// root's password.
    pub root_password: Option<String>,
}

impl Default for StockOptions {
    fn default() -> Self {
        Self {
            suite: SUITE.to_owned(),
            packages: Vec::new(),
            boot: BootLoader::Efi,
            cloud_init: false,
            hostname: "debian".to_owned(),
            ssh_keys: None,
            root_password: None,
        }
    }
}

impl StockOptions {
    /// Checks what people may have mistyped, and what a shell reads later.
    ///
    /// # Errors
    /// One line.
    pub fn check(&self) -> Result<(), String> {
        let is_word = |text: &str, more: &str| {
            let mut chars = text.chars();
            chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
                && chars.all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        if !is_word(&self.suite, "-") {
            return Err(format!("{:?} is no suite of Debian", self.suite));
        }
        if let Some(bad) = self.packages.iter().find(|name| !is_word(name, "+-.:=~")) {
            return Err(format!("{bad:?} is no name of a package"));
        }
        if !is_word(&self.hostname, "-.") || self.hostname.len() > 64 {
            return Err(format!("{:?} is no host name", self.hostname));
        }
        if let Some(keys) = &self.ssh_keys {
            let mut lines = keys.lines().map(str::trim).filter(|line| !line.is_empty());
            if keys.len() > TEXT_BYTES_MAX || keys.contains("PRIVATE KEY") {
                return Err("the SSH key is not a public key".to_owned());
            }
            if lines.clone().count() == 0 || lines.any(|line| !line.contains(' ')) {
                return Err("the file of SSH keys has no public key in each line".to_owned());
            }
        }
        match &self.root_password {
            Some(text) if text.is_empty() || text.contains(['\n', '\0']) || text.len() > 256 => {
                Err("root's password has to be one line of at most 256 bytes".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn names(&self) -> Vec<&str> {
        let mut names = vec![ESSENTIAL];
        names.extend(SYSTEM);
        names.push(self.boot.package());
        names.extend(if self.cloud_init { CLOUD_INIT } else { &[] });
        names.extend(self.packages.iter().map(String::as_str));
        names
    }
}

/// An installer that is ready to boot. Its files are where the caller wanted them, but for the kernel in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installer {
    /// Kernel, an uncompressed RISC-V `Image`.
    pub kernel: PathBuf,
    /// Initial RAM disk with the installer.
    pub initrd: PathBuf,
    /// Image of the disk with the packages, for the second disk, read-only.
    pub packages: PathBuf,
    /// Kernel command line.
    pub append: String,
}

impl GuestBuilder {
    /// Names an image by what it would be made of: the versions of all packages, the script, the options. The same name,
    /// the same system, but for keys that its packages draw.
    ///
    /// # Errors
    /// [`BuildGuestError`].
    pub fn stock_key(&self, options: &StockOptions) -> Result<String, BuildGuestError> {
        let _lock = self.lock()?;
        let apt = self.stock_apt(options)?;
        with_fresh_lists(&apt, self.refresh, || {
            let all = apt.closure(&options.names(), &[])?;
            let stems: Vec<String> = all.into_iter().map(|package| package.stem).collect();
            Ok(key(&stems, &format!("{RECIPE}{SCRIPT}{options:?}")))
        })
    }

    /// Fetches the packages and makes the installer in the directory `work`. `progress` hears what is done, in a few words.
    ///
    /// # Errors
    /// [`BuildGuestError`]; what is in `work` then is useless.
    pub fn installer(
        &self,
        options: &StockOptions,
        work: &Path,
        progress: &dyn Fn(&str),
    ) -> Result<Installer, BuildGuestError> {
        let _lock = self.lock()?;
        progress("fetching packages");
        let apt = self.stock_apt(options)?;
        let tools = Apt::new(&self.cache, "riscv64", &[SUITE], self.mirror.as_deref())?;
        let (kernel, tools) = with_fresh_lists(&tools, self.refresh, || {
            let kernel = kernel::fetch(&tools, &self.cache)?;
            Ok((kernel, tools.unpacked(&tools.closure(TOOLS, &[])?)?))
        })?;
        let (essential, all, debs) = with_fresh_lists(&apt, self.refresh, || {
            let essential = apt.closure(&[ESSENTIAL], &[])?;
            let all = apt.closure(&options.names(), &[])?;
            let debs = apt.debs(&all)?;
            Ok((essential, all, debs))
        })?;
        progress(&format!("preparing {} packages", all.len()));
        let packages = work.join("packages.img");
        make_package_disk(&debs, work, &packages)?;
        let mut tree = installer_tree(&kernel, &Packages::new(tools))?;
        add_answers(&mut tree, options, &apt.sources(), &essential, &all);
        let initrd = work.join("initrd");
        crate::write_cpio(&tree, &initrd)?;
        Ok(Installer {
            kernel: kernel.image,
            initrd,
            packages,
            append: "console=ttyS0 panic=-1 quiet".to_owned(),
        })
    }

    fn stock_apt(&self, options: &StockOptions) -> Result<Apt, BuildGuestError> {
        Apt::new(&self.cache, "riscv64", &[&options.suite], self.mirror.as_deref())
    }
}

fn installer_tree(kernel: &kernel::Kernel, tools: &Packages) -> Result<FileTree, BuildGuestError> {
    let mut tree = crate::base_tree();
    for program in PROGRAMS {
        tools.add_program(&mut tree, program)?;
    }
    tools.add_file(&mut tree, "etc/mke2fs.conf")?;
    for applet in APPLETS.split_whitespace().chain(["chroot", "sed"]) {
        let path = format!("usr/bin/{applet}");
        if !tree.contains(&path) {
            tree.add_symlink(&path, "busybox");
        }
    }
    tree.add_file("init", 0o755, include_str!("init/init.sh").into());
    tree.add_file("guest.sh", 0o644, SCRIPT.into());
    let modules = [&kernel.modules, &kernel.disk_modules, &kernel.install_modules];
    crate::add_modules(&mut tree, modules.into_iter().flatten())?;
    Ok(tree)
}

fn add_answers(
    tree: &mut FileTree,
    options: &StockOptions,
    sources: &str,
    essential: &[Package],
    all: &[Package],
) {
    let mut add = |name: &str, text: String| {
        tree.add_file(&format!("install/{name}"), 0o600, text.into());
    };
    let list = |packages: &[Package]| -> String {
        packages.iter().map(|package| format!("{} {}.deb\n", package.name, package.stem)).collect()
    };
    add("boot", format!("{}\n", options.boot.name()));
    add("hostname", format!("{}\n", options.hostname));
    add("essential", list(essential));
    add("packages", list(all));
    add("debian.sources", sources.to_owned());
    if let Some(keys) = &options.ssh_keys {
        add("authorized_keys", format!("{}\n", keys.trim_end()));
    }
    if let Some(password) = &options.root_password {
        add("password", format!("root:{password}\n"));
    }
}

/// Makes an ext4 with the packages, without their compression: undoing that takes an emulated processor minutes, and
/// this one seconds.
fn make_package_disk(debs: &[PathBuf], work: &Path, to: &Path) -> Result<(), BuildGuestError> {
    let dir = work.join("debs");
    make_dir(&dir)?;
    let mut bytes = 0;
    for deb in debs {
        let name = deb.file_name().unwrap_or_default();
        bytes += repack(deb, &dir.join(name), work)?.next_multiple_of(4096);
    }
    let size = (bytes + bytes / 20 + (16 << 20)).next_multiple_of(1 << 20);
    crate::make_ext4(to, size, &dir, &["-O", "^has_journal"])?;
    fs::remove_dir_all(&dir).map_err(|source| BuildGuestError::Cache { path: dir, source })
}

/// Writes `deb` anew with its two archives uncompressed, see deb(5); returns its size.
fn repack(deb: &Path, to: &Path, work: &Path) -> Result<u64, BuildGuestError> {
    let members = [("control.tar", "--ctrl-tarfile"), ("data.tar", "--fsys-tarfile")];
    let parts: Vec<(&str, PathBuf)> =
        members.iter().map(|(name, _)| (*name, work.join(name))).collect();
    for ((_, path), (_, option)) in parts.iter().zip(members) {
        let cannot = |source| BuildGuestError::Cache { path: path.clone(), source };
        let out = File::create(path).map_err(cannot)?;
        apt::run_into(Command::new("dpkg-deb").arg(option).arg(deb), Stdio::from(out))?;
    }
    write_ar(to, &parts).map_err(|source| BuildGuestError::Cache { path: to.to_owned(), source })
}

fn write_ar(to: &Path, parts: &[(&str, PathBuf)]) -> io::Result<u64> {
    let mut out = File::create(to)?;
    out.write_all(b"!<arch>\n")?;
    out.write_all(ar_head("debian-binary", 4).as_bytes())?;
    out.write_all(b"2.0\n")?;
    for (name, path) in parts {
        let mut part = File::open(path)?;
        let size = part.metadata()?.len();
        out.write_all(ar_head(name, size).as_bytes())?;
        io::copy(&mut part, &mut out)?;
        if !size.is_multiple_of(2) {
            out.write_all(b"\n")?;
        }
    }
    Ok(out.metadata()?.len())
}

fn ar_head(name: &str, size: u64) -> String {
    format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, "100644")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_would_do_harm_are_refused() {
        let good = StockOptions {
            ssh_keys: Some("ssh-ed25519 AAAA me@here\n".to_owned()),
            root_password: Some("a $(b) 'c".to_owned()),
            packages: vec!["g++".to_owned(), "vim-tiny=2:9.1~1".to_owned()],
            ..StockOptions::default()
        };
        assert_eq!(good.check(), Ok(()));
        for bad in [
            StockOptions { suite: "../x".to_owned(), ..good.clone() },
            StockOptions { packages: vec!["-oX".to_owned()], ..good.clone() },
            StockOptions { packages: vec!["a b".to_owned()], ..good.clone() },
            StockOptions { hostname: "a b".to_owned(), ..good.clone() },
            StockOptions {
                ssh_keys: Some("-----BEGIN OPENSSH PRIVATE KEY-----".to_owned()),
                ..good.clone()
            },
            StockOptions { ssh_keys: Some("\n".to_owned()), ..good.clone() },
            StockOptions { root_password: Some("a\nb".to_owned()), ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn repacked_package_is_the_same_package() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        fs::write(
            tree.join("DEBIAN/control"),
            "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: m <m@m.m>\nDescription: d\n",
        )
        .unwrap();
        fs::write(tree.join("file"), "contents").unwrap();
        let deb = dir.path().join("a.deb");
        if apt::run(Command::new("dpkg-deb").arg("--build").arg(&tree).arg(&deb)).is_err() {
            return;
        }
        let again = dir.path().join("b.deb");
        let size = repack(&deb, &again, dir.path()).unwrap();
        assert_eq!(size, fs::metadata(&again).unwrap().len());
        for what in ["--contents", "--info"] {
            let of = |deb: &Path| apt::run(Command::new("dpkg-deb").arg(what).arg(deb)).unwrap();
            let lines = |text: String| {
                text.lines().filter(|l| !l.contains("size")).map(str::to_owned).collect::<Vec<_>>()
            };
            assert_eq!(lines(of(&deb)), lines(of(&again)));
        }
    }
}

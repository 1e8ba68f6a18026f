//! Builds test and demo guests from Debian's riscv64 packages: a stock kernel and a small initial RAM disk.
//!
//! # Place
//! Called by the binary's demo and by tests, on any thread. Calls `apt-get`, `dpkg-deb` and `mke2fs`; needs no root. The
//! mirror is the one that the machine's apt configuration names.
//!
//! # Invariants
//! - INV-GUEST-1: what the cache holds under a final name is whole: it is made in a work directory and renamed.
//! - INV-GUEST-2: one process at a time changes a cache; others wait for its lock.
//! - INV-GUEST-3: the kernel's bytes are Debian's.
//! - INV-GUEST-4: the same package versions and the same recipe give the same bytes.
//!
//! # Failure
//! Without network a guest that was built before is used again; otherwise the error says in one line what is missing.
//! A killed run leaves at most a work directory, which the next run removes.

#![forbid(unsafe_code)]

mod apt;
mod bench;
mod cpio;
mod debian;
mod elf;
mod image;
mod kernel;
mod services;
mod stock;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use apt::{Apt, WorkDir, make_dir, rename, write};
pub use cpio::FileTree;
use image::Packages;
use kernel::Kernel;
pub use services::compiler_work;
pub use stock::{BootLoader, DONE, FAILED, Installer, STEP, StockOptions};

/// Debian release that guests come from; the first with riscv64 as an official architecture.
const SUITE: &str = "trixie";
/// Raised when the way of building changes without a change of a script.
const RECIPE: u32 = 3;
/// Size of the disk made for a Redis guest.
const DISK_BYTES: u64 = 64 << 20;
/// Packages that only graphics programs load at run time, and that are large.
const LEFT_OUT: &[&str] = &["libllvm", "libz3-", "mesa-libgallium"];
/// Names that busybox gets in a guest.
const APPLETS: &str = "[ arp awk base64 basename cat chmod chown clear cmp cp cttyhack cut date dd df diff dirname dmesg \
     du echo egrep env expr false find free grep head hexdump hostname id ifconfig insmod ip kill less ln ls lsmod md5sum \
     mkdir mknod mktemp more mount mv nc nproc od pidof ping poweroff printf ps pwd readlink reboot reset rm rmdir rmmod \
     route sed seq setsid sh sha256sum sleep sort stat stty sync tail tar tee telnet test time timeout top touch tr true \
     tty umount uname uniq uptime usleep vi wc wget which xargs yes";

/// Why a guest could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildGuestError {
    /// A program of Debian's is not installed.
    #[error(
        "cannot run {program}, which building guests needs (a Debian system with apt is required)"
    )]
    ToolMissing {
        /// Its name.
        program: String,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A program said no: no network, no such package, a wrong signature.
    #[error("{program} failed: {reason}")]
    ToolFailed {
        /// Its name.
        program: String,
        /// The line in which it says why.
        reason: String,
    },
    /// The machine's apt configuration names no archive of Debian.
    #[error(
        "no Debian mirror in this machine's apt configuration; name one with GuestBuilder::mirror"
    )]
    NoMirror,
    /// A package has not what it should have.
    #[error("{what} not found")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// A file of the cache cannot be read or written.
    #[error("cannot use {path} in the guest cache")]
    Cache {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
}

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKind {
    /// A busybox shell on the console, after the line `understudy: shell ready`.
    Minimal,
    /// Redis on port 6379 at the address `understudy.ip=A.B.C.D/N` of the kernel command line, its append-only file
    /// synced before each answer and kept on `/dev/vda` if that is there; says `understudy: redis ready`.
    Redis,
    /// Debian's stress-ng, openssl and python3: runs a list of commands (see [`write_with_run_list`]) or the one in
    /// `understudy.run="..."`, prints `understudy: exit CODE COMMAND` for each and powers off.
    Tools,
    /// Debian's compiler, interpreters and compressors for the bench: runs `/bench/NAME` for each line NAME that it reads
    /// from the console (see [`write_with_files`]) and prints `understudy: exit CODE NAME`; `end` powers off.
    Bench,
    /// Debian with systemd, up to a login prompt on the console.
    Debian,
    /// PostgreSQL on port 5432, Redis on 6379 and iperf3 on 5201 at the address `understudy.ip=A.B.C.D/N` of the kernel
    /// command line, with gcc and fio: what people protect. PostgreSQL's data are on `/dev/vda` if that is there; the
    /// database is made at the first boot. Says `understudy: NAME ready` for each service and `understudy: services
    /// ready` after the last; then each line `NAME COMMAND...` on the console is run, between `understudy: run NAME` and
    /// `understudy: exit CODE NAME`, and `end` powers off.
    Services,
}

impl GuestKind {
    /// Name in the cache and for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Minimal => "minimal",
            Self::Redis => "redis",
            Self::Tools => "tools",
            Self::Bench => "bench",
            Self::Debian => "debian",
            Self::Services => "services",
        }
    }

    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Minimal => &["busybox-static"],
            Self::Redis => &["busybox-static", "redis-server"],
            Self::Tools => &["busybox-static", "stress-ng", "openssl", "python3-minimal"],
            Self::Bench => bench::PACKAGES,
            Self::Debian => debian::PACKAGES,
            Self::Services => services::PACKAGES,
        }
    }

    fn left_out(self) -> &'static [&'static str] {
        match self {
            Self::Minimal | Self::Redis | Self::Tools => LEFT_OUT,
            Self::Bench => bench::LEFT_OUT,
            Self::Services => services::LEFT_OUT,
            Self::Debian => &[],
        }
    }

    fn script(self) -> &'static str {
        match self {
            Self::Minimal => include_str!("init/minimal.sh"),
            Self::Redis => include_str!("init/redis.sh"),
            Self::Tools => include_str!("init/tools.sh"),
            Self::Bench => include_str!("init/bench.sh"),
            Self::Services => include_str!("init/services.sh"),
            Self::Debian => "",
        }
    }

    /// Kernel command line. Debian's console is called dumb where nobody answers what it would ask a terminal.
    fn append(self) -> &'static str {
        match self {
            Self::Debian => {
                "console=ttyS0 panic=-1 TERM=dumb systemd.tty.term.console=dumb systemd.tty.term.ttyS0=dumb"
            }
            Self::Minimal | Self::Redis | Self::Tools | Self::Bench | Self::Services => {
                "console=ttyS0 panic=-1"
            }
        }
    }

    /// What its recipe has beside its script.
    fn made_by(self) -> &'static [&'static str] {
        match self {
            Self::Minimal | Self::Redis | Self::Tools => &[],
            Self::Bench => &[include_str!("bench.rs")],
            Self::Debian => &[include_str!("debian.rs")],
            Self::Services => &[include_str!("services.rs")],
        }
    }

    /// Bytes of the disk that it keeps data on, if it does.
    fn disk_bytes(self) -> Option<u64> {
        match self {
            Self::Redis => Some(DISK_BYTES),
            Self::Services => Some(services::DISK_BYTES),
            Self::Minimal | Self::Tools | Self::Bench | Self::Debian => None,
        }
    }
}

/// A guest that is ready to boot; the files stay in the cache and must not be changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFiles {
    /// Kernel, an uncompressed RISC-V `Image`.
    pub kernel: PathBuf,
    /// Initial RAM disk, an uncompressed cpio archive.
    pub initrd: PathBuf,
    /// Kernel command line; add the guest's own parameters behind it.
    pub append: String,
    /// A disk image with an empty ext4 to copy for each machine, for guests that keep data.
    pub disk: Option<PathBuf>,
    /// File names of the Debian packages in it, without `.deb`.
    pub packages: Vec<String>,
    /// What it was built by; other values are built anew.
    recipe: String,
}

/// Builds guests in a cache directory.
#[derive(Debug, Clone)]
pub struct GuestBuilder {
    cache: PathBuf,
    mirror: Option<String>,
    refresh: bool,
}

/// The cache directory for guests: `$XDG_CACHE_HOME/understudy`, or `~/.cache/understudy`.
#[must_use]
pub fn default_cache_dir() -> PathBuf {
    let set =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("understudy")
}

impl GuestBuilder {
    /// A builder with its cache in `cache_dir`, which is made if needed.
    #[must_use]
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self { cache: cache_dir.into(), mirror: None, refresh: false }
    }

    /// Takes packages from this Debian mirror instead of the one in the machine's apt configuration.
    #[must_use]
    pub fn mirror(mut self, url: impl Into<String>) -> Self {
        self.mirror = Some(url.into());
        self
    }

    /// Looks for newer packages even if the guest was built before.
    #[must_use]
    pub fn refresh(mut self, refresh: bool) -> Self {
        self.refresh = refresh;
        self
    }

    /// The guest, built now if the cache does not have it. May take a minute the first time, when it fetches about
    /// 130 MB.
    ///
    /// # Errors
    /// [`BuildGuestError`]; nothing half-made is left behind.
    pub fn build(&self, kind: GuestKind) -> Result<GuestFiles, BuildGuestError> {
        let _lock = self.lock()?;
        let latest = self.cache.join("guests").join(format!("{}.json", kind.name()));
        if !self.refresh
            && let Some(files) = cached(&latest, kind)
        {
            return Ok(files);
        }
        let apt = Apt::new(&self.cache, "riscv64", &[SUITE], self.mirror.as_deref())?;
        with_fresh_lists(&apt, self.refresh, || self.build_from(&apt, kind, &latest))
    }

    fn build_from(
        &self,
        apt: &Apt,
        kind: GuestKind,
        latest: &Path,
    ) -> Result<GuestFiles, BuildGuestError> {
        let kernel = kernel::fetch(apt, &self.cache)?;
        let packages = apt.closure(kind.packages(), kind.left_out())?;
        let mut names = vec![kernel.stem.clone()];
        names.extend(packages.iter().map(|package| package.stem.clone()));
        let home = self.cache.join("guests").join(format!(
            "{}-{}",
            kind.name(),
            key(&names, &recipe(kind))
        ));
        if !home.exists() {
            let roots = apt.unpacked(&packages)?;
            let tree = file_tree(kind, &kernel, &Packages::new(roots))?;
            let work = WorkDir::new(&self.cache.join("guests"))?;
            let ready = work.path().join("ready");
            make_dir(&ready)?;
            write_cpio(&tree, &ready.join("initrd"))?;
            if let Some(bytes) = kind.disk_bytes() {
                make_disk(&ready.join("disk"), bytes, work.path())?;
            }
            rename(&ready, &home)?;
        }
        let files = GuestFiles {
            kernel: kernel.image,
            initrd: home.join("initrd"),
            append: kind.append().to_owned(),
            disk: kind.disk_bytes().map(|_| home.join("disk")),
            packages: names,
            recipe: recipe(kind),
        };
        let text = serde_json::to_string_pretty(&files)
            .expect("paths in the cache are UTF-8 or refused before");
        let draft = latest.with_extension("new");
        write(&draft, &text)?;
        rename(&draft, latest)?;
        Ok(files)
    }

    /// The `etcd` program for this machine: the installed one, or Debian's package unpacked in the cache.
    ///
    /// # Errors
    /// [`BuildGuestError`]; nothing half-made is left behind.
    pub fn etcd(&self) -> Result<PathBuf, BuildGuestError> {
        let installed = std::env::var_os("PATH")
            .into_iter()
            .flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
            .map(|dir| dir.join("etcd"))
            .find(|path| path.is_file());
        match installed {
            Some(path) => Ok(path),
            None => self.fetch_etcd(),
        }
    }

    fn fetch_etcd(&self) -> Result<PathBuf, BuildGuestError> {
        let _lock = self.lock()?;
        let suite = apt::host_suite();
        let suites: Vec<&str> = suite.as_deref().into_iter().chain([SUITE]).collect();
        let apt = Apt::new(&self.cache, &apt::host_arch()?, &suites, self.mirror.as_deref())?;
        with_fresh_lists(&apt, self.refresh, || {
            let closure = apt.closure(&["etcd-server"], &[])?;
            let package = closure.into_iter().find(|package| package.name == "etcd-server");
            let package = package
                .ok_or(BuildGuestError::NotFound { what: "package etcd-server".to_owned() })?;
            let mut roots = apt.unpacked(&[package])?;
            let path =
                roots.pop().map(|root| root.join("usr/bin/etcd")).filter(|path| path.is_file());
            path.ok_or(BuildGuestError::NotFound { what: "etcd in its package".to_owned() })
        })
    }

    /// Waits until this process alone uses the cache; until the file is dropped.
    fn lock(&self) -> Result<File, BuildGuestError> {
        let path = self.cache.join("lock");
        if self.cache.to_str().is_none() {
            let source =
                std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path is not UTF-8");
            return Err(BuildGuestError::Cache { path, source });
        }
        make_dir(&self.cache.join("guests"))?;
        let lock = File::create(&path).and_then(|file| file.lock().map(|()| file));
        lock.map_err(|source| BuildGuestError::Cache { path, source })
    }
}

/// Runs `make` with package lists that exist; once more with new ones if it fails, since a mirror drops old packages.
fn with_fresh_lists<T>(
    apt: &Apt,
    refresh: bool,
    make: impl Fn() -> Result<T, BuildGuestError>,
) -> Result<T, BuildGuestError> {
    apt.update(refresh)?;
    match make() {
        Err(BuildGuestError::ToolFailed { .. }) if !refresh => {
            apt.update(true)?;
            make()
        }
        result => result,
    }
}

fn cached(latest: &Path, kind: GuestKind) -> Option<GuestFiles> {
    let files: GuestFiles = serde_json::from_str(&fs::read_to_string(latest).ok()?).ok()?;
    let paths = [Some(&files.kernel), Some(&files.initrd), files.disk.as_ref()];
    (files.recipe == recipe(kind) && paths.into_iter().flatten().all(|path| path.is_file()))
        .then_some(files)
}

fn recipe(kind: GuestKind) -> String {
    let parts =
        [include_str!("init/init.sh"), kind.script(), include_str!("init/tools.list"), APPLETS];
    let parts: Vec<String> =
        parts.iter().chain(kind.made_by()).map(|&part| part.to_owned()).collect();
    format!("{RECIPE}-{}", key(&parts, SUITE))
}

fn key(parts: &[String], more: &str) -> String {
    let mut hash = Sha256::new();
    for part in parts.iter().map(String::as_str).chain([more]) {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Directories and what the kernel itself needs.
fn base_tree() -> FileTree {
    let mut tree = FileTree::new();
    for dir in ["dev", "proc", "sys", "etc", "usr/bin", "usr/lib"] {
        tree.add_dir(dir);
    }
    for (link, target) in
        [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib"), ("usr/sbin", "bin")]
    {
        tree.add_symlink(link, target);
    }
    // The kernel opens it for init before devtmpfs is mounted.
    tree.add_char_device("dev/console", 5, 1);
    tree
}

fn add_modules<'a>(
    tree: &mut FileTree,
    modules: impl Iterator<Item = &'a (String, PathBuf)>,
) -> Result<(), BuildGuestError> {
    let mut order = String::new();
    for (name, path) in modules {
        let bytes = fs::read(path)
            .map_err(|source| BuildGuestError::Cache { path: path.clone(), source })?;
        tree.add_file(&format!("modules/{name}"), 0o644, bytes);
        order = order + name + "\n";
    }
    tree.add_file("modules/order", 0o644, order.into());
    Ok(())
}

fn file_tree(
    kind: GuestKind,
    kernel: &Kernel,
    packages: &Packages,
) -> Result<FileTree, BuildGuestError> {
    if kind == GuestKind::Debian {
        return debian::file_tree(packages);
    }
    let mut tree = base_tree();
    packages.add_program(&mut tree, "usr/bin/busybox")?;
    match kind {
        GuestKind::Bench => bench::add_programs(&mut tree, packages)?,
        GuestKind::Services => services::add_programs(&mut tree, packages)?,
        GuestKind::Minimal | GuestKind::Redis | GuestKind::Tools | GuestKind::Debian => {}
    }
    for applet in APPLETS.split_whitespace() {
        let path = format!("usr/bin/{applet}");
        if !tree.contains(&path) {
            tree.add_symlink(&path, "busybox");
        }
    }
    tree.add_file("init", 0o755, include_str!("init/init.sh").into());
    tree.add_file("guest.sh", 0o644, kind.script().into());
    let disk_modules =
        if kind == GuestKind::Minimal { &[] } else { kernel.disk_modules.as_slice() };
    add_modules(&mut tree, kernel.modules.iter().chain(disk_modules))?;
    match kind {
        GuestKind::Minimal | GuestKind::Bench | GuestKind::Debian | GuestKind::Services => {}
        GuestKind::Redis => packages.add_program(&mut tree, "usr/bin/redis-server")?,
        GuestKind::Tools => add_tools(&mut tree, packages)?,
    }
    Ok(tree)
}

fn add_tools(tree: &mut FileTree, packages: &Packages) -> Result<(), BuildGuestError> {
    for program in ["usr/bin/stress-ng", "usr/bin/openssl", "usr/bin/python3"] {
        packages.add_program(tree, program)?;
    }
    // Loaded at run time, when a thread ends.
    packages.add_library(tree, "libgcc_s.so.1")?;
    packages.add_file(tree, "etc/ssl/openssl.cnf")?;
    tree.add_symlink("usr/lib/ssl/openssl.cnf", "/etc/ssl/openssl.cnf");
    packages.add_dir(tree, "usr/lib/python3.13");
    tree.add_file("run.list", 0o644, include_str!("init/tools.list").into());
    Ok(())
}

fn write_cpio(tree: &FileTree, path: &Path) -> Result<(), BuildGuestError> {
    let written = File::create(path).and_then(|file| {
        let mut out = std::io::BufWriter::new(file);
        tree.write_cpio(&mut out)?;
        out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
    });
    written.map_err(|source| BuildGuestError::Cache { path: path.to_owned(), source })
}

fn make_disk(path: &Path, bytes: u64, work: &Path) -> Result<(), BuildGuestError> {
    let empty = work.join("empty");
    make_dir(&empty)?;
    make_ext4(path, bytes, &empty, &[])
}

/// Makes an image of an ext4 with the files of `dir`: the same files, the same bytes.
fn make_ext4(path: &Path, size: u64, dir: &Path, more: &[&str]) -> Result<(), BuildGuestError> {
    let sparse = File::create(path).and_then(|file| file.set_len(size));
    sparse.map_err(|source| BuildGuestError::Cache { path: path.to_owned(), source })?;
    let uuid = "c0ffee00-0000-4000-8000-000000000001";
    let mut mke2fs = Command::new("mke2fs");
    // It lives where a user's PATH often does not reach.
    let places = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    mke2fs
        .env("PATH", places)
        .env("E2FSPROGS_FAKE_TIME", "1000000000")
        .args(["-q", "-F", "-t", "ext4", "-m", "0"])
        .args(more);
    mke2fs.args(["-E", &format!("root_owner=0:0,lazy_itable_init=0,hash_seed={uuid}"), "-U", uuid]);
    apt::run(mke2fs.arg("-d").arg(dir).arg(path)).map(drop)
}

/// Writes the initial RAM disk of a [`GuestKind::Tools`] guest to `path`, with `commands` (one a line) to run.
///
/// # Errors
/// [`BuildGuestError::Cache`] when a file cannot be read or written.
pub fn write_with_run_list(
    guest: &GuestFiles,
    commands: &str,
    path: &Path,
) -> Result<(), BuildGuestError> {
    let mut tree = FileTree::new();
    tree.add_file("run.list", 0o644, format!("{commands}\n").into());
    write_with_files(guest, &tree, path)
}

/// Writes a guest's initial RAM disk to `path`, with the files of `tree` added.
///
/// # Errors
/// [`BuildGuestError::Cache`] when a file cannot be read or written.
pub fn write_with_files(
    guest: &GuestFiles,
    tree: &FileTree,
    path: &Path,
) -> Result<(), BuildGuestError> {
    let mut bytes = fs::read(&guest.initrd)
        .map_err(|source| BuildGuestError::Cache { path: guest.initrd.clone(), source })?;
    let written = tree.write_cpio(&mut bytes).and_then(|()| fs::write(path, &bytes));
    written.map_err(|source| BuildGuestError::Cache { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_guest_of_another_recipe_or_without_files_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, initrd) = (dir.path().join("k"), dir.path().join("i"));
        fs::write(&kernel, "k").unwrap();
        fs::write(&initrd, "i").unwrap();
        let mut files = GuestFiles {
            kernel,
            initrd: initrd.clone(),
            append: String::new(),
            disk: None,
            packages: vec![],
            recipe: recipe(GuestKind::Minimal),
        };
        let latest = dir.path().join("minimal.json");
        fs::write(&latest, serde_json::to_string(&files).unwrap()).unwrap();
        assert_eq!(cached(&latest, GuestKind::Minimal), Some(files.clone()));
        assert_eq!(cached(&latest, GuestKind::Redis), None);
        fs::remove_file(&initrd).unwrap();
        assert_eq!(cached(&latest, GuestKind::Minimal), None);
        files.recipe.clear();
        assert_ne!(recipe(GuestKind::Redis), recipe(GuestKind::Tools));
    }

    #[test]
    fn run_list_follows_the_archive_it_belongs_to() {
        let dir = tempfile::tempdir().unwrap();
        let initrd = dir.path().join("initrd");
        write_cpio(&FileTree::new(), &initrd).unwrap();
        let guest = GuestFiles {
            kernel: PathBuf::new(),
            initrd: initrd.clone(),
            append: String::new(),
            disk: None,
            packages: vec![],
            recipe: String::new(),
        };
        let out = dir.path().join("out");
        write_with_run_list(&guest, "true", &out).unwrap();
        let (base, all) = (fs::read(initrd).unwrap(), fs::read(out).unwrap());
        assert!(all.starts_with(&base) && all[base.len()..].starts_with(b"070701"));
    }

    #[test]
    fn disk_is_the_same_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        if make_disk(&a, DISK_BYTES, dir.path()).is_err() {
            return;
        }
        make_disk(&b, DISK_BYTES, dir.path()).unwrap();
        assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
    }

    #[test]
    fn useless_cache_directory_is_a_plain_error() {
        let error = GuestBuilder::new("/proc/no/such").build(GuestKind::Minimal).unwrap_err();
        assert!(error.to_string().starts_with("cannot use /proc/no/such"), "{error}");
    }
}

//! Fetches Debian packages of any architecture with `apt-get`, as any user, into directories of its own.
//!
//! # Place
//! Called by [`crate::GuestBuilder`] with the cache's lock held. The mirror is the machine's own: whatever its apt
//! configuration names for Debian's archive; proxies and other settings of the machine stay in force.
//!
//! # Invariants
//! - The machine's own package database and lists are only read, never written.
//! - Packages are taken only if they are signed with Debian's archive keys.
//! - An unpacked package appears under its final name whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::BuildGuestError;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A package to fetch, as apt named it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    /// Package name.
    pub(crate) name: String,
    /// Version, with its epoch.
    pub(crate) version: String,
    /// File name without `.deb`; unique for name, version and architecture.
    pub(crate) stem: String,
}

impl Package {
    /// Reads a file name such as `zlib1g_1%3a1.3-1_riscv64.deb`.
    fn from_file_name(file_name: &str) -> Option<Self> {
        let stem = file_name.strip_suffix(".deb")?;
        let mut parts = stem.split('_');
        let (name, version, _arch) = (parts.next()?, parts.next()?, parts.next()?);
        let safe = |c: char| c.is_ascii_alphanumeric() || "+-.~%_".contains(c);
        (parts.next().is_none() && !name.starts_with('-') && stem.chars().all(safe)).then(|| Self {
            name: name.to_owned(),
            version: version.replace("%3a", ":"),
            stem: stem.to_owned(),
        })
    }
}

/// apt with its own state, for one architecture and suite.
#[derive(Debug)]
pub(crate) struct Apt {
    root: PathBuf,
    arch: String,
    suites: Vec<String>,
    mirrors: Vec<String>,
}

impl Apt {
    /// apt for `arch`, trying `suites` in turn; `cache` is where its state and the unpacked packages live.
    pub(crate) fn new(
        cache: &Path,
        arch: &str,
        suites: &[&str],
        mirror: Option<&str>,
    ) -> Result<Self, BuildGuestError> {
        let mirrors = match mirror {
            Some(url) => vec![url.to_owned()],
            None => machine_mirrors()?,
        };
        let suites: Vec<String> = suites.iter().map(|&s| s.to_owned()).collect();
        let name = match suites.as_slice() {
            [suite] if suite != crate::SUITE => format!("apt-{arch}-{suite}"),
            _ => format!("apt-{arch}"),
        };
        Ok(Self { root: cache.join(name), arch: arch.to_owned(), suites, mirrors })
    }

    /// Fetches the package lists, unless they are there and `refresh` is false.
    pub(crate) fn update(&self, refresh: bool) -> Result<(), BuildGuestError> {
        if !refresh && self.root.join("updated").exists() {
            return Ok(());
        }
        for dir in ["state/lists/partial", "cache/archives/partial", "etc", "unpacked"] {
            make_dir(&self.root.join(dir))?;
        }
        write(&self.root.join("state/status"), "")?;
        let mut last = BuildGuestError::NoMirror;
        for mirror in &self.mirrors {
            for suite in &self.suites {
                let line = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
                write(&self.root.join("etc/sources.list"), &line)?;
                let mut update = self.command("apt-get");
                update.args(["-o", "APT::Update::Error-Mode=any", "update"]);
                match run(&mut update) {
                    Ok(_) => return write(&self.root.join("updated"), &line),
                    Err(e) => last = e,
                }
            }
        }
        Err(last)
    }

    /// The packages `names` and all that they depend on, without those whose name starts with one of `without`.
    pub(crate) fn closure(
        &self,
        names: &[&str],
        without: &[&str],
    ) -> Result<Vec<Package>, BuildGuestError> {
        let mut install = self.command("apt-get");
        install.args(["-qq", "--print-uris", "--no-install-recommends", "install"]).args(names);
        let listing = run(&mut install)?;
        let mut packages: Vec<Package> = listing
            .lines()
            .filter_map(|line| Package::from_file_name(line.split_whitespace().nth(1)?))
            .filter(|package| !without.iter().any(|start| package.name.starts_with(start)))
            .collect();
        packages.sort();
        Ok(packages)
    }

    /// The directory that `package` is unpacked in, fetching it if needed.
    pub(crate) fn unpacked(&self, packages: &[Package]) -> Result<Vec<PathBuf>, BuildGuestError> {
        let home = self.root.join("unpacked");
        let missing: Vec<&Package> =
            packages.iter().filter(|p| !home.join(&p.stem).exists()).collect();
        if !missing.is_empty() {
            let work = WorkDir::new(&home)?;
            self.download(work.path(), &missing)?;
            for package in missing {
                let tree = work.path().join("tree");
                unpack(&work.path().join(format!("{}.deb", package.stem)), &tree)?;
                rename(&tree, &home.join(&package.stem))?;
            }
        }
        Ok(packages.iter().map(|p| home.join(&p.stem)).collect())
    }

    /// Unpacks `package` in `work`, without keeping it: for big packages of which little is needed.
    pub(crate) fn unpack_once(
        &self,
        package: &Package,
        work: &WorkDir,
    ) -> Result<PathBuf, BuildGuestError> {
        self.download(work.path(), &[package])?;
        let tree = work.path().join("tree");
        unpack(&work.path().join(format!("{}.deb", package.stem)), &tree)?;
        Ok(tree)
    }

    /// The packages' files, fetched if needed; they stay in the cache.
    pub(crate) fn debs(&self, packages: &[Package]) -> Result<Vec<PathBuf>, BuildGuestError> {
        let home = self.root.join("debs");
        let path = |package: &Package| home.join(format!("{}.deb", package.stem));
        let missing: Vec<&Package> = packages.iter().filter(|p| !path(p).exists()).collect();
        if !missing.is_empty() {
            let work = WorkDir::new(&home)?;
            self.download(work.path(), &missing)?;
            for package in missing {
                let name = format!("{}.deb", package.stem);
                rename(&work.path().join(&name), &home.join(&name))?;
            }
        }
        Ok(packages.iter().map(path).collect())
    }

    /// For the apt of a system made from these packages: where they come from, and where its updates will.
    pub(crate) fn sources(&self) -> String {
        let used = fs::read_to_string(self.root.join("updated")).unwrap_or_default();
        let mut words = used.split_whitespace().skip(2);
        let (Some(mirror), Some(suite)) = (words.next(), words.next()) else {
            return String::new();
        };
        let has_updates = !["sid", "unstable"].contains(&suite);
        let mut text = source(
            mirror,
            &if has_updates { format!("{suite} {suite}-updates") } else { suite.to_owned() },
        );
        if let Some(security) = security_mirror().filter(|_| has_updates) {
            text += "\n";
            text += &source(&security, &format!("{suite}-security"));
        }
        text
    }

    fn download(&self, dir: &Path, packages: &[&Package]) -> Result<(), BuildGuestError> {
        let mut get = self.command("apt-get");
        get.current_dir(dir).args(["-qq", "download"]);
        get.args(packages.iter().map(|p| format!("{}={}", p.name, p.version)));
        run(&mut get).map(drop)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let root = self.root.display();
        for option in [
            format!("Dir::State={root}/state"),
            format!("Dir::State::lists={root}/state/lists"),
            format!("Dir::State::status={root}/state/status"),
            format!("Dir::Cache={root}/cache"),
            format!("Dir::Etc::sourcelist={root}/etc/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("APT::Architecture={}", self.arch),
            format!("APT::Architectures::={}", self.arch),
            format!("APT::Architectures={}", self.arch),
            "APT::Sandbox::User=".to_owned(),
            "APT::Update::Post-Invoke::=true".to_owned(),
            "APT::Install-Recommends=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::http::Timeout=20".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// Base addresses of Debian's archive in the machine's apt configuration, the most likely first.
fn machine_mirrors() -> Result<Vec<String>, BuildGuestError> {
    let mut list = Command::new("apt-get");
    list.args(["indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Created-By: Packages"]);
    let known = mirrors_from_targets(&run(&mut list)?);
    if known.is_empty() { Err(BuildGuestError::NoMirror) } else { Ok(known) }
}

fn source(mirror: &str, suites: &str) -> String {
    format!(
        "Types: deb\nURIs: {mirror}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
}

/// The archive of security updates in the machine's apt configuration.
fn security_mirror() -> Option<String> {
    let mut list = Command::new("apt-get");
    list.args(["indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Created-By: Packages"]);
    let targets = run(&mut list).ok()?;
    let uri = targets.lines().find_map(|line| line.strip_prefix("Debian-Security|"))?;
    (!uri.contains(char::is_whitespace)).then(|| uri.to_owned())
}

/// Entries labelled `Debian` come first; those without a label (no lists fetched yet) after them, the security archive
/// and other labels not at all.
fn mirrors_from_targets(targets: &str) -> Vec<String> {
    let mut mirrors: Vec<String> = Vec::new();
    for wanted in ["Debian", ""] {
        for line in targets.lines() {
            let Some((label, uri)) = line.split_once('|') else { continue };
            let other_archive =
                uri.contains("security") || uri.contains(char::is_whitespace) || uri.is_empty();
            if label == wanted && !other_archive && !mirrors.iter().any(|m| m == uri) {
                mirrors.push(uri.to_owned());
            }
        }
    }
    mirrors
}

/// Architecture of this machine in Debian's terms.
pub(crate) fn host_arch() -> Result<String, BuildGuestError> {
    Ok(run(Command::new("dpkg").arg("--print-architecture"))?.trim().to_owned())
}

/// Code name of the Debian release that this machine runs, if it says so.
pub(crate) fn host_suite() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok()?;
    if !release.lines().any(|line| line.trim() == "ID=debian") {
        return None;
    }
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(name.trim_matches('"').to_owned())
}

/// Runs a command to its end; its standard output, or an error with the line that says why.
pub(crate) fn run(command: &mut Command) -> Result<String, BuildGuestError> {
    run_into(command, Stdio::piped())
}

/// The same with another place for its standard output.
pub(crate) fn run_into(command: &mut Command, out: Stdio) -> Result<String, BuildGuestError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|source| BuildGuestError::ToolMissing { program: program.clone(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let reason = words
        .lines()
        .find(|line| line.starts_with("E:") || line.starts_with("W:"))
        .or_else(|| words.lines().next_back())
        .unwrap_or("no reason given");
    Err(BuildGuestError::ToolFailed { program, reason: reason.trim().to_owned() })
}

fn unpack(deb: &Path, tree: &Path) -> Result<(), BuildGuestError> {
    run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(tree))?;
    fs::remove_file(deb).map_err(|source| BuildGuestError::Cache { path: deb.to_owned(), source })
}

/// A directory beside its final place that is gone, with all in it, when dropped.
#[derive(Debug)]
pub(crate) struct WorkDir(PathBuf);

impl WorkDir {
    /// A new one in `home`, which is made if needed. What a killed run left behind is removed: the lock that the
    /// caller holds makes sure that nobody else works there.
    pub(crate) fn new(home: &Path) -> Result<Self, BuildGuestError> {
        let path = home.join(".work");
        if path.exists() {
            fs::remove_dir_all(&path)
                .map_err(|source| BuildGuestError::Cache { path: path.clone(), source })?;
        }
        make_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // A directory that cannot be removed now is removed by the next run.
        drop(fs::remove_dir_all(&self.0));
    }
}

pub(crate) fn make_dir(path: &Path) -> Result<(), BuildGuestError> {
    fs::create_dir_all(path)
        .map_err(|source| BuildGuestError::Cache { path: path.to_owned(), source })
}

pub(crate) fn write(path: &Path, text: &str) -> Result<(), BuildGuestError> {
    fs::write(path, text).map_err(|source| BuildGuestError::Cache { path: path.to_owned(), source })
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), BuildGuestError> {
    fs::rename(from, to).map_err(|source| BuildGuestError::Cache { path: to.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_give_name_and_version_with_epoch() {
        let package = Package::from_file_name("zlib1g_1%3a1.3.dfsg-1+b1_riscv64.deb").unwrap();
        assert_eq!(
            (package.name.as_str(), package.version.as_str()),
            ("zlib1g", "1:1.3.dfsg-1+b1")
        );
        assert_eq!(package.stem, "zlib1g_1%3a1.3.dfsg-1+b1_riscv64");
        for bad in ["a_1_all", "a_1.deb", "../a_1_all.deb", "-o_1_all.deb", "a_1_all_x.deb"] {
            assert_eq!(Package::from_file_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn debian_comes_first_and_other_archives_are_left_out() {
        let targets = "Debian-Security|http://m/debian-security/\nNode|http://n/x/\n|http://k/debian/\n\
                       Debian|http://m/debian/\nDebian|http://m/debian/\n|http://k/debian-security/\n";
        assert_eq!(mirrors_from_targets(targets), ["http://m/debian/", "http://k/debian/"]);
    }

    #[test]
    fn failing_tool_gives_one_line_with_the_reason() {
        let error =
            run(Command::new("sh").args(["-c", "echo x >&2; echo 'E: no network' >&2; exit 3"]))
                .unwrap_err();
        assert_eq!(error.to_string(), "sh failed: E: no network");
        assert!(run(&mut Command::new("/nonexistent/tool")).is_err());
    }
}

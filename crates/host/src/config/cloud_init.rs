//! What a VM's cloud-init is told: a NoCloud seed, as one more disk behind the others.
//!
//! # Place
//! The seed is written on the host that starts the VM, before its first boot. It is a mirrored disk that is only read, so
//! that a secondary gets a copy like any other.
//!
//! # Format
//! A FAT volume `CIDATA` with the files `user-data` and `meta-data`, see [`crate::fat`]. The instance is named after the VM
//! and what it is told, so that cloud-init acts again when that changes.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::DiskSection;
use crate::disk::DiskFormat;
use crate::fat;

/// Longest file that is taken.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// What cloud-init is told when nothing was said.
const NO_USER_DATA: &str = "#cloud-config\n{}\n";

/// What cloud-init is told. At least one thing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CloudInitSection {
    /// File of the user data, cloud-config for instance.
    pub user_data: Option<PathBuf>,
    /// File of public SSH keys for the default user, one a line.
    pub ssh_key: Option<PathBuf>,
    /// The machine's name; the VM's when absent.
    pub hostname: Option<String>,
    /// Where the seed is kept: beside the first disk, or else beside the VM's file, when absent.
    pub seed: Option<PathBuf>,
}

impl CloudInitSection {
    /// Paths in it that count from a directory.
    pub(super) fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        [&mut self.user_data, &mut self.ssh_key, &mut self.seed].into_iter().flatten()
    }

    /// The disk of a VM with this name and these other disks.
    #[must_use]
    pub fn disk(&self, vm: &str, disks: &[DiskSection], base: &Path) -> DiskSection {
        let beside = disks.first().map(|disk| disk.path.as_path());
        let is_file = |path: &&Path| path.is_absolute() && !path.starts_with("/dev");
        let dir = beside.filter(is_file).and_then(Path::parent).unwrap_or(base);
        let path = self.seed.clone().unwrap_or_else(|| dir.join(format!("{vm}.seed")));
        DiskSection {
            path,
            format: Some(DiskFormat::Raw),
            readonly: true,
            ..DiskSection::default()
        }
    }

    /// Writes the seed.
    ///
    /// # Errors
    /// One line.
    pub fn write(&self, vm: &str, to: &Path) -> Result<(), String> {
        let image = self.image(vm)?;
        let draft = to.with_extension("seed-new");
        let written = || {
            let mut file = std::fs::File::create(&draft)?;
            file.write_all(&image)?;
            file.sync_all()?;
            std::fs::rename(&draft, to)
        };
        written().map_err(|e| format!("cannot write cloud-init's seed {}: {e}", to.display()))
    }

    fn image(&self, vm: &str) -> Result<Vec<u8>, String> {
        let read = |path: &Option<PathBuf>| path.as_deref().map(read_text).transpose();
        let user_data = read(&self.user_data)?.unwrap_or_else(|| NO_USER_DATA.to_owned());
        let keys = read(&self.ssh_key)?.unwrap_or_default();
        let hostname = self.hostname.as_deref().unwrap_or(vm);
        // Strings of JSON are strings of YAML.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let mut meta = format!("local-hostname: {}\n", quoted(hostname));
        let keys: Vec<String> =
            keys.lines().map(str::trim).filter(|line| !line.is_empty()).map(quoted).collect();
        if !keys.is_empty() {
            meta += &format!("public-keys: [{}]\n", keys.join(", "));
        }
        let hash = Sha256::new().chain_update(&user_data).chain_update([0]).chain_update(&meta);
        let id: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let meta = format!("instance-id: {}\n{meta}", quoted(&format!("{vm}-{id}")));
        let files = [("user-data", user_data.as_bytes()), ("meta-data", meta.as_bytes())];
        fat::image("CIDATA", &files).map_err(|e| format!("cloud-init's seed: {e}"))
    }
}

fn read_text(path: &Path) -> Result<String, String> {
    let fail = |reason: &dyn std::fmt::Display| format!("cannot read {}: {reason}", path.display());
    let meta = std::fs::metadata(path).map_err(|e| fail(&e))?;
    if !meta.is_file() || meta.len() > TEXT_BYTES_MAX {
        return Err(fail(&"it is no file of at most 1 MiB"));
    }
    std::fs::read_to_string(path).map_err(|e| fail(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_says_what_was_asked_for_and_names_the_instance_by_it() {
        let dir = tempfile::tempdir().unwrap();
        let (user_data, key) = (dir.path().join("user.yaml"), dir.path().join("key.pub"));
        std::fs::write(&user_data, "#cloud-config\npackages: []\n").unwrap();
        std::fs::write(&key, "ssh-ed25519 AAAA \"me\"\n\n").unwrap();
        let mut section = CloudInitSection {
            user_data: Some(user_data.clone()),
            ssh_key: Some(key),
            ..CloudInitSection::default()
        };
        let text = |section: &CloudInitSection| {
            String::from_utf8_lossy(&section.image("web").unwrap()).into_owned()
        };
        let first = text(&section);
        assert!(first.contains("public-keys: [\"ssh-ed25519 AAAA \\\"me\\\"\"]\n"));
        assert!(first.contains("local-hostname: \"web\"\n") && first.contains("packages: []"));
        let id = |text: &str| {
            text.lines()
                .find_map(|line| line.split_once("instance-id: \"web-"))
                .unwrap()
                .1
                .to_owned()
        };
        assert_eq!(id(&first), id(&text(&section)));
        section.hostname = Some("other".to_owned());
        assert_ne!(id(&first), id(&text(&section)));
        std::fs::remove_file(user_data).unwrap();
        assert!(section.image("web").unwrap_err().starts_with("cannot read /"));
    }

    #[test]
    fn seed_is_beside_the_first_disk_or_the_file() {
        let section = CloudInitSection::default();
        let at = |disks: &[DiskSection]| section.disk("web", disks, Path::new("/vms")).path;
        let disk = |path: &str| DiskSection { path: path.into(), ..DiskSection::default() };
        assert_eq!(at(&[]), Path::new("/vms/web.seed"));
        assert_eq!(at(&[disk("/srv/a.img"), disk("/x/b")]), Path::new("/srv/web.seed"));
        assert_eq!(at(&[disk("/dev/vg/web")]), Path::new("/vms/web.seed"));
    }
}

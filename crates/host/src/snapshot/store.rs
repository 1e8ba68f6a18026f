//! The snapshots of a VM on this host, by name.
//!
//! # Place
//! Used by the daemon's connections. Who changes anything here is alone: see [`crate::daemon`].
//!
//! # Invariants
//! - INV-STORE-1: after whatever step a crash comes, each snapshot that is there loads as it did before.
//! - INV-STORE-2: a snapshot that others build on goes only when they have taken over what they need of it.
//!
//! # Failure
//! A file that is damaged or of another version is listed with what is wrong with it, and can be deleted.
//!
//! # Format
//! `STATE_DIR/snapshots/VM`, for its owner alone: `NAME.snapshot` as in [`super::file`], `images/SHA256` with what the
//! machines booted, and `restoring` with the name of a snapshot while the VM's disks are being replaced by its disks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use eventlog::LogPos;
use machine::config::BootImages;
use sha2::{Digest as _, Sha256};

use super::{HASH_BYTES, SnapshotError, SnapshotHead, SnapshotId, SnapshotReader, chain};
use crate::name::check_name;

const SUFFIX: &str = ".snapshot";
const PARTIAL: &str = ".partial";
const IMAGES: &str = "images";
const RESTORING: &str = "restoring";
/// Most files of a VM that are looked at.
const FILES_MAX: usize = 1 << 16;
/// Largest boot image that is read.
const IMAGE_BYTES_MAX: u64 = 2 << 30;

/// Why something cannot be done with a VM's snapshots.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none of that name.
    #[error("there is no snapshot {name} of VM {vm} on this host")]
    NotFound {
        /// The VM.
        vm: String,
        /// The name.
        name: String,
    },
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] crate::name::NameError),
    /// A file is no good.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What a machine booted is not there, or is something else.
    #[error("{}: {reason}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The operating system said no.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

/// What is known of a snapshot without reading all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its identity.
    pub id: SnapshotId,
    /// What it builds on.
    pub parent: Option<SnapshotId>,
    /// When it was taken, in milliseconds since the Unix epoch.
    pub taken_unix_ms: u64,
    /// Position in the log of that run.
    pub pos: LogPos,
    /// Guest time, in ticks of 100 ns.
    pub mtime: u64,
    images: [Option<[u8; HASH_BYTES]>; 3],
}

/// A snapshot on this host.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Length of the file.
    pub bytes: u64,
    /// What is in it, or what is wrong with it.
    pub facts: Result<Facts, SnapshotError>,
}

impl Entry {
    fn id(&self) -> Option<SnapshotId> {
        self.facts.as_ref().ok().map(|facts| facts.id)
    }

    fn parent(&self) -> Option<SnapshotId> {
        self.facts.as_ref().ok()?.parent
    }
}

/// A VM's snapshots on this host.
#[derive(Debug, Clone)]
pub struct Store {
    vm: String,
    dir: PathBuf,
}

fn root(state_dir: &Path) -> PathBuf {
    state_dir.join("snapshots")
}

impl Store {
    /// Those of a VM, if there are any.
    ///
    /// # Errors
    /// [`StoreError::Name`].
    pub fn new(state_dir: &Path, vm: &str) -> Result<Self, StoreError> {
        check_name(vm)?;
        Ok(Self { vm: vm.to_owned(), dir: root(state_dir).join(vm) })
    }

    /// The directory for what the host has to remember.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        self.dir.parent().and_then(Path::parent).unwrap_or(Path::new("."))
    }

    /// Those of all VMs that have any.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn all(state_dir: &Path) -> Result<Vec<Self>, StoreError> {
        let names = names_in(&root(state_dir))?;
        Ok(names.iter().filter_map(|vm| Self::new(state_dir, vm).ok()).collect())
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// Where they are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file that a snapshot of this name has or would have.
    ///
    /// # Errors
    /// [`StoreError::Name`].
    pub fn path_of(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name)?;
        Ok(self.dir.join(format!("{name}{SUFFIX}")))
    }

    /// All of them, the oldest first.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let mut entries = Vec::new();
        for file in names_in(&self.dir)? {
            let Some(name) = file.strip_suffix(SUFFIX).filter(|n| check_name(n).is_ok()) else {
                continue;
            };
            let path = self.dir.join(&file);
            let bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
            let facts = SnapshotReader::open(&path).map(|reader| facts_of(&reader.into_head()));
            entries.push(Entry { name: name.to_owned(), path, bytes, facts });
        }
        let taken = |e: &Entry| e.facts.as_ref().map_or(0, |facts| facts.taken_unix_ms);
        entries.sort_by(|a, b| (taken(a), &a.name).cmp(&(taken(b), &b.name)));
        Ok(entries)
    }

    fn not_found(&self, name: &str) -> StoreError {
        StoreError::NotFound { vm: self.vm.clone(), name: name.to_owned() }
    }

    /// The files of a snapshot, itself first, then what it builds on.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn chain(&self, name: &str) -> Result<Vec<PathBuf>, StoreError> {
        let path = self.path_of(name)?;
        if !path.exists() {
            return Err(self.not_found(name));
        }
        let files: BTreeMap<_, _> =
            self.entries()?.into_iter().filter_map(|e| Some((e.id()?, e.path))).collect();
        Ok(chain::chain_of(&path, |id| files.get(&id).cloned())?)
    }

    /// Makes room for a new one, and clears away what a crash has left.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn prepare(&self) -> Result<(), StoreError> {
        for dir in [self.dir.clone(), self.dir.join(IMAGES)] {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700).create(&dir).map_err(io("make directory", &dir))?;
        }
        self.clean()
    }

    /// Removes what no snapshot needs: files that were not completed, boot images, an empty directory.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn clean(&self) -> Result<(), StoreError> {
        let images = self.dir.join(IMAGES);
        for dir in [&self.dir, &images] {
            for file in names_in(dir)?.iter().filter(|file| file.ends_with(PARTIAL)) {
                remove(&dir.join(file))?;
            }
        }
        let entries = self.entries()?;
        let mut used = BTreeSet::new();
        for entry in &entries {
            // What one needs that cannot be read is not known.
            let Ok(facts) = &entry.facts else { return Ok(()) };
            used.extend(facts.images.iter().flatten().map(hex));
        }
        for file in names_in(&images)?.iter().filter(|file| !used.contains(*file)) {
            remove(&images.join(file))?;
        }
        Ok(())
    }

    /// Removes the directories when nothing is in them.
    pub fn remove_if_empty(&self) {
        for dir in [&self.dir.join(IMAGES), &self.dir] {
            // One that is not empty stays.
            drop(fs::remove_dir(dir));
        }
    }

    /// Keeps what the machine boots, under the SHA-256 given.
    ///
    /// # Errors
    /// [`StoreError::Io`]; nothing that is not whole has the name then.
    pub fn put_images(
        &self,
        images: &BootImages,
        hashes: &[Option<[u8; HASH_BYTES]>; 3],
    ) -> Result<(), StoreError> {
        let all = [&images.bios, &images.kernel, &images.initrd];
        for (bytes, hash) in all.into_iter().zip(hashes) {
            let (Some(bytes), Some(hash)) = (bytes, hash) else { continue };
            let path = self.dir.join(IMAGES).join(hex(hash));
            if !path.exists() {
                write_whole(&path, bytes)?;
            }
        }
        Ok(())
    }

    /// What the machine of a snapshot booted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn images(&self, head: &SnapshotHead) -> Result<BootImages, StoreError> {
        let read = |hash: &Option<[u8; HASH_BYTES]>| {
            hash.as_ref().map(|hash| self.image(hash)).transpose()
        };
        let [bios, kernel, initrd] = &head.images;
        Ok(BootImages {
            bios: read(bios)?,
            kernel: read(kernel)?,
            initrd: read(initrd)?,
            append: head.append.clone(),
        })
    }

    fn image(&self, hash: &[u8; HASH_BYTES]) -> Result<Arc<[u8]>, StoreError> {
        let path = self.dir.join(IMAGES).join(hex(hash));
        let mut bytes = Vec::new();
        let file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(StoreError::Image { path, reason: "what the VM booted is missing" });
            }
            file => file.map_err(io("read", &path))?,
        };
        file.take(IMAGE_BYTES_MAX).read_to_end(&mut bytes).map_err(io("read", &path))?;
        if Sha256::digest(&bytes)[..] != hash[..] {
            return Err(StoreError::Image { path, reason: "it is not what the VM booted" });
        }
        Ok(bytes.into())
    }

    /// Deletes a snapshot; those that build on it take over what they need. `tell` hears of each, with percents.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is lost then.
    pub fn delete(&self, name: &str, tell: &mut dyn FnMut(String, u8)) -> Result<(), StoreError> {
        let entries = self.entries()?;
        let one = entries.iter().find(|e| e.name == name).ok_or_else(|| self.not_found(name))?;
        let children: Vec<_> = match one.id() {
            Some(id) => entries.iter().filter(|e| e.parent() == Some(id)).collect(),
            // Nobody can load what builds on it.
            None => Vec::new(),
        };
        for (index, child) in children.iter().enumerate() {
            let percent = u8::try_from(index * 100 / children.len()).unwrap_or(100);
            tell(format!("merging {name} into {}", child.name), percent);
            chain::merge(&one.path, &child.path, &child.path)?;
        }
        remove(&one.path)?;
        sync_dir(&self.dir)?;
        self.clean()?;
        self.remove_if_empty();
        Ok(())
    }

    /// Notes that the VM's disks are about to be replaced by those of a snapshot.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn begin_restoring(&self, name: &str) -> Result<(), StoreError> {
        write_whole(&self.dir.join(RESTORING), name.as_bytes())
    }

    /// The VM's disks have been replaced.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn end_restoring(&self) -> Result<(), StoreError> {
        remove(&self.dir.join(RESTORING))?;
        sync_dir(&self.dir)
    }

    /// The snapshot whose disks have replaced some of the VM's, but not all, when that was interrupted.
    #[must_use]
    pub fn restoring(&self) -> Option<String> {
        fs::read_to_string(self.dir.join(RESTORING)).ok().filter(|name| check_name(name).is_ok())
    }
}

fn facts_of(head: &SnapshotHead) -> Facts {
    Facts {
        id: head.id,
        parent: head.parent,
        taken_unix_ms: head.taken_unix_ms,
        pos: head.pos,
        mtime: head.saved.clock.mtime(head.saved.icount),
        images: head.images,
    }
}

fn hex(hash: &[u8; HASH_BYTES]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The names in a directory, none when there is no directory.
fn names_in(dir: &Path) -> Result<Vec<String>, StoreError> {
    let files = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        files => files.map_err(io("read", dir))?,
    };
    let mut names = Vec::new();
    for file in files.take(FILES_MAX) {
        let file = file.map_err(io("read", dir))?;
        names.extend(file.file_name().to_str().map(str::to_owned));
    }
    names.sort_unstable();
    Ok(names)
}

fn remove(path: &Path) -> Result<(), StoreError> {
    fs::remove_file(path).map_err(io("remove", path))
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}

/// Writes a file that is whole once it has its name.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(PARTIAL);
    let partial = PathBuf::from(partial);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options
        .open(&partial)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&partial, path));
    if let Err(source) = written {
        drop(fs::remove_file(&partial));
        return Err(io("write", path)(source));
    }
    path.parent().map_or(Ok(()), sync_dir)
}

#[cfg(test)]
mod tests;

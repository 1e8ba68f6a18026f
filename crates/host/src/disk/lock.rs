//! The lock of a shared image: who may write to it, and in which generation of the VM.
//!
//! # Place
//! Taken by the vCPU thread before a machine runs ([`crate::vm`]), given to the [`super::Image`], which asks it before each
//! write on the disk's thread.
//!
//! # Invariants
//! - INV-IMAGELOCK-1: nothing is written to a shared image but by who holds its lock, or held it when the write began.
//! - INV-IMAGELOCK-2: a lock is let go after the last write by it has ended: its file is closed when the image is dropped,
//!   which the disk's thread does at its end, or when the process dies. So a host that was frozen between the decision to
//!   write and the write has the lock throughout, whatever it does when it wakes up.
//! - INV-IMAGELOCK-3: the generation in the file never goes back while it names the same VM.
//! - INV-IMAGELOCK-4: who holds a lock that was broken finds out before each write, if the last look was longer ago than
//!   [`LOOK_EVERY`].
//!
//! A lock is an open-file-description lock of the whole file (flock(2)): the kernel drops it with the last descriptor, so
//! with the process at the latest. NFS carries it to the server, as a lock of all bytes, and drops it when the client's
//! lease is over. Breaking a lock puts another file in the place of the locked one; that is for hosts that were fenced, when
//! the file system does not know that they are gone. Then, and only then, INV-IMAGELOCK-1 rests on the fencing.
//!
//! # Failure
//! A lock file that cannot be read says nothing about who has the lock: its holder takes it for lost. A torn one counts as
//! one of nobody.
//!
//! # Format
//! Image lock v1: one line of JSON, `{"version":1,"vm":"a","host":"h1","generation":7,"taken_unix_ms":1750000000000}`,
//! filled up with blanks to [`RECORD_BYTES`], so that one write replaces it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A holder looks this often at the file while it writes.
pub const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Version of the file.
const VERSION: u32 = 1;
/// Bytes of the file.
const RECORD_BYTES: usize = 512;
/// How often a file that is replaced while it is being locked is tried anew.
const TRIES: usize = 8;

/// Who has a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Version of the file.
    version: u32,
    /// The VM.
    pub vm: String,
    /// The host.
    pub host: String,
    /// Generation of the arbiter's record by which that host runs the VM.
    pub generation: u64,
    /// When it took the lock, in milliseconds since the Unix epoch.
    pub taken_unix_ms: u64,
}

impl Holder {
    /// Who takes a lock.
    #[must_use]
    pub fn new(vm: &str, host: &str, generation: u64, taken_unix_ms: u64) -> Self {
        let (vm, host) = (vm.to_owned(), host.to_owned());
        Self { version: VERSION, vm, host, generation, taken_unix_ms }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("numbers and strings always have a form");
        // Names have a bound far below it.
        bytes.resize(bytes.len().max(RECORD_BYTES - 1), b' ');
        bytes.push(b'\n');
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|holder: &Self| holder.version == VERSION)
    }

    /// Whether this is of a later decision of the arbiter than `mine`.
    fn is_after(&self, mine: &Self) -> bool {
        self.vm == mine.vm
            && (self.generation > mine.generation
                || self.generation == mine.generation && self.host != mine.host)
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in generation {} of VM {}", self.host, self.generation, self.vm)
    }
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeLockError {
    /// Somebody has it.
    #[error("image lock {path} is held by {}", .by.as_ref().map_or_else(|| "somebody".to_owned(), ToString::to_string))]
    Held {
        /// The file.
        path: String,
        /// Who, if the file says so.
        by: Option<Holder>,
    },
    /// It was taken by a later decision of the arbiter.
    #[error(
        "image lock {path} was taken by {by}, which is newer than generation {mine}; if the arbiter's records were made \
         anew, remove that file"
    )]
    Overtaken {
        /// The file.
        path: String,
        /// By whom.
        by: Holder,
        /// The generation that asked.
        mine: u64,
    },
    /// The system refused.
    #[error("cannot {action} image lock {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// The lock file, and when it was last found in its place. Guards these alone; no other lock is taken while it is held.
#[derive(Debug)]
struct State {
    file: File,
    looked: Instant,
}

/// A lock that was taken.
#[derive(Debug)]
pub struct ImageLock {
    path: PathBuf,
    holder: Holder,
    /// Whether it was had from a host that was fenced, which may have the image open yet.
    was_broken: bool,
    state: Mutex<State>,
    lost: OnceLock<String>,
}

/// The name of an image's lock file, unless the configuration gives one.
#[must_use]
pub fn default_path(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

impl ImageLock {
    /// Takes the lock, if nobody has it.
    ///
    /// # Errors
    /// See [`TakeLockError`].
    pub fn take(path: &Path, holder: &Holder) -> Result<Arc<Self>, TakeLockError> {
        let name = || path.display().to_string();
        let io = |action| move |source| TakeLockError::Io { action, path: name(), source };
        for _ in 0..TRIES {
            let file = open(path, false).map_err(io("open"))?;
            if !flock(&file).map_err(io("lock"))? {
                return Err(TakeLockError::Held { path: name(), by: read(&file).ok().flatten() });
            }
            if !is_in_place(&file, path).map_err(io("find"))? {
                // It was replaced or removed just before it was locked.
                continue;
            }
            if let Some(by) = read(&file).map_err(io("read"))?
                && by.is_after(holder)
            {
                let mine = holder.generation;
                return Err(TakeLockError::Overtaken { path: name(), by, mine });
            }
            write(&file, holder).map_err(io("write"))?;
            return Ok(Self::held(path, holder, file, false));
        }
        Err(io("lock")(io::Error::other("it is replaced again and again")))
    }

    /// Takes the lock from `from`, a host that was fenced for certain and that has it all the same.
    ///
    /// # Errors
    /// See [`TakeLockError`]; it is still held if somebody else has it now.
    pub fn take_from(
        path: &Path,
        holder: &Holder,
        from: &Holder,
    ) -> Result<Arc<Self>, TakeLockError> {
        let name = || path.display().to_string();
        let io = |action| move |source| TakeLockError::Io { action, path: name(), source };
        let present = open(path, false).and_then(|file| read(&file)).map_err(io("read"))?;
        if present.as_ref() != Some(from) {
            return Err(TakeLockError::Held { path: name(), by: present });
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", holder.generation));
        let beside = PathBuf::from(beside);
        let file = open(&beside, false).map_err(io("make"))?;
        if !flock(&file).map_err(io("lock"))? {
            return Err(TakeLockError::Held { path: name(), by: None });
        }
        let put = write(&file, holder).and_then(|()| std::fs::rename(&beside, path));
        put.map_err(io("replace"))?;
        Ok(Self::held(path, holder, file, true))
    }

    fn held(path: &Path, holder: &Holder, file: File, was_broken: bool) -> Arc<Self> {
        let state = Mutex::new(State { file, looked: Instant::now() });
        let (path, holder) = (path.to_owned(), holder.clone());
        Arc::new(Self { path, holder, was_broken, state, lost: OnceLock::new() })
    }

    /// Who holds it.
    #[must_use]
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Whether it was had from a host that was fenced, which may have the image open yet.
    #[must_use]
    pub fn was_broken(&self) -> bool {
        self.was_broken
    }

    /// Why it is not held any more, if that is known.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// From now on nothing is written by it.
    pub fn give_up(&self, reason: &str) {
        // The first reason is the one that counts.
        drop(self.lost.set(reason.to_owned()));
    }

    /// Whether its holder may write, which is looked at anew now and then. Called right before each write.
    ///
    /// # Errors
    /// One line: it is lost. It stays so.
    pub fn check(&self) -> Result<(), String> {
        if let Some(reason) = self.lost() {
            return Err(reason.to_owned());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now.duration_since(state.looked) < LOOK_EVERY {
            return Ok(());
        }
        match self.look(&mut state) {
            Ok(()) => {
                state.looked = now;
                Ok(())
            }
            Err(reason) => {
                let reason = format!("image lock {} is lost: {reason}", self.path.display());
                self.give_up(&reason);
                Err(reason)
            }
        }
    }

    /// Whether the file that is locked is in its place, and names this holder.
    fn look(&self, state: &mut State) -> Result<(), String> {
        let text = |e: io::Error| e.to_string();
        let present = match OpenOptions::new().read(true).open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // Somebody removed it, and nobody else took it yet.
                let file = open(&self.path, true).map_err(text)?;
                if !flock(&file).map_err(text)? {
                    return Err("the file was removed, and somebody else has it now".to_owned());
                }
                write(&file, &self.holder).map_err(text)?;
                state.file = file;
                return Ok(());
            }
            Err(e) => return Err(text(e)),
        };
        let says = read(&present).map_err(text)?;
        let (theirs, mine) =
            (present.metadata().map_err(text)?, state.file.metadata().map_err(text)?);
        if (theirs.dev(), theirs.ino()) == (mine.dev(), mine.ino())
            && says.as_ref() == Some(&self.holder)
        {
            return Ok(());
        }
        Err(match says {
            Some(by) => format!("it was taken by {by}"),
            None => "the file is another one now".to_owned(),
        })
    }
}

/// Opens or makes a lock file; only makes it with `is_new`.
fn open(path: &Path, is_new: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644);
    // A lock file that is a FIFO or a device would be a mistake: opening it must not wait.
    options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    let file = options.create(!is_new).create_new(is_new).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// Locks the file; says whether nobody else had it.
fn flock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn is_in_place(file: &File, path: &Path) -> io::Result<bool> {
    let mine = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(theirs) => Ok((theirs.dev(), theirs.ino()) == (mine.dev(), mine.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn read(file: &File) -> io::Result<Option<Holder>> {
    let mut bytes = [0; RECORD_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Holder::decode(&bytes[..filled]))
}

fn write(file: &File, holder: &Holder) -> io::Result<()> {
    let bytes = holder.encode();
    file.write_all_at(&bytes, 0)?;
    file.set_len(bytes.len() as u64)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(host: &str, generation: u64) -> Holder {
        Holder::new("vm", host, generation, 1)
    }

    fn expire(lock: &ImageLock) {
        lock.state.lock().unwrap().looked = Instant::now().checked_sub(LOOK_EVERY).unwrap();
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = default_path(&dir.path().join("disk.img"));
        assert!(path.ends_with("disk.img.lock"));
        (dir, path)
    }

    #[test]
    fn one_holder_at_a_time_and_generations_rise() {
        let (_dir, path) = place();
        let first = ImageLock::take(&path, &holder("h1", 5)).unwrap();
        match ImageLock::take(&path, &holder("h2", 6)) {
            Err(TakeLockError::Held { by: Some(by), .. }) => assert_eq!(by, holder("h1", 5)),
            other => panic!("{other:?}"),
        }
        expire(&first);
        first.check().unwrap();
        drop(first);
        let second = ImageLock::take(&path, &holder("h2", 6)).unwrap();
        assert!(!second.was_broken());
        drop(second);
        for late in [holder("h1", 5), holder("h1", 6)] {
            match ImageLock::take(&path, &late) {
                Err(TakeLockError::Overtaken { by, .. }) => assert_eq!(by, holder("h2", 6)),
                other => panic!("{other:?}"),
            }
        }
        // Of another VM, a generation says nothing.
        ImageLock::take(&path, &Holder::new("other", "h1", 1, 1)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap().len(), RECORD_BYTES);
    }

    #[test]
    fn broken_lock_is_lost_for_good_and_the_new_one_excludes_others() {
        let (_dir, path) = place();
        let frozen = ImageLock::take(&path, &holder("h1", 5)).unwrap();
        let other = ImageLock::take_from(&path, &holder("h2", 7), &holder("h3", 5));
        assert!(matches!(other, Err(TakeLockError::Held { .. })));
        let broken = ImageLock::take_from(&path, &holder("h2", 7), &holder("h1", 5)).unwrap();
        assert!(broken.was_broken());
        // Between two looks the old holder relies on having been fenced.
        expire(&frozen);
        let lost = frozen.check().unwrap_err();
        assert!(lost.contains("taken by h2 in generation 7"), "{lost}");
        assert_eq!(frozen.lost(), Some(lost.as_str()));
        drop(frozen);
        expire(&broken);
        broken.check().unwrap();
        let third = ImageLock::take(&path, &holder("h3", 9));
        assert!(matches!(third, Err(TakeLockError::Held { by: Some(by), .. }) if by.host == "h2"));
    }

    #[test]
    fn removed_file_is_made_again_by_its_holder_alone() {
        let (_dir, path) = place();
        let lock = ImageLock::take(&path, &holder("h1", 5)).unwrap();
        std::fs::remove_file(&path).unwrap();
        expire(&lock);
        lock.check().unwrap();
        assert!(matches!(
            ImageLock::take(&path, &holder("h2", 6)),
            Err(TakeLockError::Held { .. })
        ));
        std::fs::remove_file(&path).unwrap();
        let _new = ImageLock::take(&path, &holder("h2", 6)).unwrap();
        expire(&lock);
        assert!(lock.check().unwrap_err().contains("taken by h2"));
    }

    #[test]
    fn torn_file_is_of_nobody_and_what_is_no_file_is_refused() {
        let (dir, path) = place();
        std::fs::write(&path, "{\"version\":1,\"vm\":\"v").unwrap();
        let lock = ImageLock::take(&path, &holder("h1", 5)).unwrap();
        lock.give_up("another host won");
        assert_eq!(lock.check().unwrap_err(), "another host won");
        let refused = ImageLock::take(dir.path(), &holder("h1", 5));
        assert!(matches!(refused, Err(TakeLockError::Io { .. })));
        assert!(ImageLock::take(Path::new("/dev/null"), &holder("h1", 5)).is_err());
    }
}

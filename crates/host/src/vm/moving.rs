//! Moves the image of a disk to another path of this host, while its machine runs here or follows.
//!
//! # Place
//! [`Vm::move_disk`] copies on the daemon's connection's thread; the vCPU thread, which alone gives requests to the disk, lets
//! the new image take the old one's place ([`Switch`]). Where a disk is on this host is remembered here, and asked for
//! wherever a definition comes to this host ([`place_disks`]).
//!
//! # Invariants
//! - INV-MOVING-1: before the first request goes to the new image, it has, durably, what the old one has, and so its record.
//! - INV-MOVING-2: after a crash at any step the image at the place that is remembered has everything: the place changes once,
//!   while no request is carried out.
//!
//! # Failure
//! Until the place has changed nothing has happened; the new file is removed. The old image stays, under another name.
//!
//! # Format
//! `STATE_DIR/disks/VM.json`: a list of `{"from":"/srv/a.img","to":"/fast/a.img"}`, where `from` is the path in the VM's
//! definition.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::vcpu::Mail;
use super::{Env, Vm};
use crate::config::VmConfig;
use crate::disk::copy::{CopyItem, CopyPhase};
use crate::disk::mirror::MirrorWriter;
use crate::disk::record;
use crate::one_line::one_line;

/// Items on their way to the new file.
const ITEMS: usize = 32;
/// How long the guest may stand still for the last part.
const SWITCH_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the vCPU thread may take to begin with that.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Where a disk is that was moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Moved {
    from: PathBuf,
    to: PathBuf,
}

fn list_path(state_dir: &Path, vm: &str) -> PathBuf {
    state_dir.join("disks").join(format!("{vm}.json"))
}

fn read_list(state_dir: &Path, vm: &str) -> Result<Vec<Moved>, String> {
    let path = list_path(state_dir, vm);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| format!("{} is malformed: {e}", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(format!("cannot read {}: {e}", path.display())),
    }
}

fn write_list(state_dir: &Path, vm: &str, list: &[Moved]) -> Result<(), String> {
    let path = list_path(state_dir, vm);
    let write = || {
        let dir = path.parent().unwrap_or(state_dir);
        fs::create_dir_all(dir)?;
        let new = path.with_extension("json.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(list)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|e: std::io::Error| format!("cannot write {}: {e}", path.display()))
}

/// Lets a VM's definition say where its disks are on this host.
///
/// # Errors
/// One line: what this host remembers of it cannot be read.
pub(crate) fn place_disks(config: &mut VmConfig, state_dir: &Path) -> Result<(), String> {
    let moved = read_list(state_dir, &config.name)?;
    for disk in &mut config.disks {
        if let Some(moved) = moved.iter().find(|moved| moved.from == disk.path) {
            disk.path.clone_from(&moved.to);
        }
    }
    Ok(())
}

/// Remembers that the disk at `from` is at `to` now; says what to write to take that back.
fn remember(state_dir: &Path, vm: &str, from: &Path, to: &Path) -> Result<Vec<Moved>, String> {
    let before = read_list(state_dir, vm)?;
    let mut list = before.clone();
    match list.iter_mut().find(|moved| moved.to == from) {
        Some(moved) => moved.to = to.to_owned(),
        None => list.push(Moved { from: from.to_owned(), to: to.to_owned() }),
    }
    list.retain(|moved| moved.from != moved.to);
    write_list(state_dir, vm, &list)?;
    Ok(before)
}

/// Gives the copy at `to` what is known of the one at `from`, of which it is a copy.
fn carry_record(state_dir: &Path, from: &Path, to: &Path) -> Result<(), String> {
    let source = record::record_path(from, state_dir);
    let Some((_, mut known)) = record::RecordFile::open(&source)? else { return Ok(()) };
    let target = record::record_path(to, state_dir);
    (known.file, known.closed) = (record::file_id(to), None);
    let mut write = || record::RecordFile::create(&target)?.store(&mut known);
    write().map_err(|e| format!("cannot write {}: {e}", target.display()))
}

/// What the vCPU thread is asked for: to let a new image take a disk's place.
#[derive(Debug)]
pub(crate) struct Switch {
    pub(crate) dev: u8,
    to: PathBuf,
    /// The new image is complete and durable.
    complete: Receiver<Result<(), String>>,
    told: Sender<Result<PathBuf, String>>,
}

impl Switch {
    /// Waits until the new image is what the old one was when its copy was frozen.
    pub(crate) fn wait(&self) -> Result<(), String> {
        let late = |_| "the last part of the disk took too long to copy".to_owned();
        self.complete.recv_timeout(SWITCH_TIME_MAX).map_err(late)?
    }

    /// Where the disk is from now on, durably; `open` then opens it there. Takes all of it back if that fails.
    pub(crate) fn carry_out<T>(
        &self,
        env: &Env,
        vm: &str,
        from: &Path,
        open: impl FnOnce(&Path) -> Result<T, String>,
    ) -> Result<T, String> {
        carry_record(&env.state_dir, from, &self.to)?;
        let before = remember(&env.state_dir, vm, from, &self.to)?;
        let opened = open(&self.to);
        if opened.is_err() {
            write_list(&env.state_dir, vm, &before)?;
        }
        opened
    }

    /// Says how it went: where the disk was.
    pub(crate) fn tell(self, result: Result<PathBuf, String>) {
        // Who asked may be gone.
        drop(self.told.send(result));
    }
}

impl Vm {
    /// Moves the image of a disk to the path `to`; what was there before stays beside its name, or is deleted.
    ///
    /// # Errors
    /// One line: the disk is where it was.
    pub fn move_disk(
        &self,
        disk: u8,
        to: &Path,
        delete: bool,
        tell: &mut dyn FnMut(u8),
    ) -> Result<(), String> {
        let _one_at_a_time =
            self.moving.try_lock().map_err(|_| "another disk is being moved".to_owned())?;
        let index = usize::from(disk);
        let (port, section) = {
            let inner = self.shared.lock();
            let port = inner.ports.as_ref().and_then(|ports| ports.disks.get(index)).cloned();
            let config = inner.definition.as_ref().map(|definition| &definition.config);
            (port, config.and_then(|config| config.disks.get(index)).cloned())
        };
        let (Some(port), Some(section)) = (port, section) else {
            return Err(format!("VM {} has no disk {disk} on this host", self.name()));
        };
        if !port.is_kept {
            return Err(format!("disk {disk} is shared or read-only: move it when the VM is off"));
        }
        if !to.is_absolute() || to.symlink_metadata().is_ok() {
            return Err(format!("{} has to be the absolute path of a new file", to.display()));
        }
        let is_copying = |phase| !matches!(phase, CopyPhase::Done | CopyPhase::Failed);
        if port.handle.status().copy.is_some_and(|copy| is_copying(copy.phase)) {
            return Err("the disk is being copied to another host: try again later".to_owned());
        }
        let writer = MirrorWriter::create_as(to, section.image_format(), port.handle.size());
        let mut writer = writer.map_err(|e| one_line(&e))?;
        let image = fs::metadata(&section.path).map_err(|e| e.to_string())?;
        writer.belong_as(&image).map_err(|e| one_line(&e))?;
        let (sink, items) = sync_channel(ITEMS);
        port.handle.begin_copy(Box::new(sink));
        let status = || port.handle.status().copy;
        loop {
            match items.recv_timeout(Duration::from_millis(50)) {
                Ok(item) => drop(apply(&mut writer, &item)?),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(INTERRUPTED.to_owned()),
            }
            let Some(copy) = status() else { continue };
            let looked = (copy.chunks_total - copy.chunks_pending) * 100 / copy.chunks_total.max(1);
            tell(u8::try_from(looked).unwrap_or(100));
            if copy.phase == CopyPhase::Converged {
                break;
            }
        }
        // What is left to make durable while the guest stands still is little then.
        writer.sync().map_err(|e| one_line(&e))?;
        let (done, complete) = mpsc::channel();
        let (told, answer) = mpsc::channel();
        let switch = Switch { dev: disk, to: to.to_owned(), complete, told };
        self.shared.mailbox.post(Mail::SwitchDisk(Box::new(switch)));
        let finished = finish(writer, &items);
        let is_whole = finished.is_ok();
        drop(done.send(finished));
        let answer = answer.recv_timeout(ANSWER_TIME_MAX);
        match answer.unwrap_or_else(|_| Err("the VM is not here any more".to_owned())) {
            Ok(from) => put_away(&self.env.state_dir, &from, delete),
            Err(e) => {
                if is_whole {
                    drop(record::remove(&record::record_path(to, &self.env.state_dir)));
                    drop(fs::remove_file(to));
                }
                Err(e)
            }
        }
    }
}

const INTERRUPTED: &str =
    "the copy was interrupted, by that for a new secondary perhaps: try again";

fn apply(writer: &mut MirrorWriter, item: &CopyItem) -> Result<bool, String> {
    writer.apply(item).map_err(|e| one_line(&e))
}

/// Takes what is left of the frozen disk, and gives the new file its name.
fn finish(mut writer: MirrorWriter, items: &Receiver<CopyItem>) -> Result<(), String> {
    loop {
        let item = items.recv_timeout(ANSWER_TIME_MAX).map_err(|_| INTERRUPTED.to_owned())?;
        if apply(&mut writer, &item)? {
            return writer.finish().map(drop).map_err(|e| one_line(&e));
        }
    }
}

/// Nobody uses the image at `from` any more, and nothing is known of it.
fn put_away(state_dir: &Path, from: &Path, delete: bool) -> Result<(), String> {
    let path = record::record_path(from, state_dir);
    record::remove(&path).map_err(|e| format!("cannot remove {}: {e}", path.display()))?;
    if !fs::metadata(from).is_ok_and(|meta| meta.is_file()) {
        return Ok(());
    }
    let mut aside = from.to_owned().into_os_string();
    aside.push(".moved");
    let put = if delete { fs::remove_file(from) } else { fs::rename(from, &aside) };
    put.map_err(|e| format!("the disk was moved, but {} is still there: {e}", from.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_remembered_through_several_moves_and_back() {
        let tmp = tempfile::tempdir().unwrap();
        let state = tmp.path();
        let [a, b, c] = ["/a", "/b", "/c"].map(Path::new);
        let text = "name = \"vm\"\nmemory = \"64M\"\nkernel = \"/k\"\n[[disk]]\npath = \"/a\"\n";
        let place = || {
            let mut config = VmConfig::parse(text, "vm.toml", Path::new("/")).unwrap();
            place_disks(&mut config, state).unwrap();
            config.disks[0].path.clone()
        };
        assert_eq!(place(), a);
        remember(state, "vm", a, b).unwrap();
        assert_eq!(place(), b);
        let before = remember(state, "vm", b, c).unwrap();
        assert_eq!(place(), c);
        write_list(state, "vm", &before).unwrap();
        assert_eq!(place(), b);
        remember(state, "vm", b, a).unwrap();
        assert_eq!((place().as_path(), read_list(state, "vm").unwrap().len()), (a, 0));
        fs::write(list_path(state, "vm"), "rubbish").unwrap();
        assert!(read_list(state, "vm").unwrap_err().contains("malformed"));
    }
}

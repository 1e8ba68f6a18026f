//! From a snapshot to a machine that can be started: the same VM again, or a clone with an identity of its own.
//!
//! # Place
//! Called on a connection's thread, before the right to run the VM is asked for; [`super::origin`] goes on when that is
//! won.
//!
//! # Invariants
//! - INV-RESTORE-1: the machine of a VM that is restored is that of the snapshot in all that [`machine::Machine::digest`]
//!   sees, but for the base of its real-time clock.
//! - INV-RESTORE-2: a clone writes to no disk, uses no MAC address and no name of the VM that it comes from.
//!
//! # Failure
//! Nothing that anybody uses has changed, and nothing is left behind, when this fails.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use machine::config::MachineConfig;
use toml::{Table, Value};

use super::clock::rtc_base_after_pause;
use super::definition::{Definition, draw};
use super::origin::{Origin, Prepared, StagedDisk};
use crate::config::{DiskMode, DiskSection, Drawn};
use crate::disk::mirror::MirrorWriter;
use crate::disk::record::record_path;
use crate::disk::{Image, OpenImageError, OpenMode};
use crate::name::check_name;
use crate::one_line::one_line;
use crate::snapshot::store::{Store, StoreError};
use crate::snapshot::{SnapshotError, SnapshotHead, chain};

/// What a snapshot is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The VM that it was taken of.
    Same {
        /// Even if what is on its disks now is lost.
        force: bool,
    },
    /// Another VM.
    Clone {
        /// Its name.
        name: String,
        /// The directory of its disks and its configuration; beside those of the VM that it comes from when absent.
        dir: Option<PathBuf>,
        /// Whether its network devices are attached to the networks of the VM that it comes from.
        connect: bool,
    },
}

/// Why a snapshot is not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is asked for cannot be.
    #[error("{0}")]
    Usage(String),
    /// Something else.
    #[error("{0}")]
    Failed(String),
}

impl From<SnapshotError> for RestoreError {
    fn from(e: SnapshotError) -> Self {
        Self::Store(e.into())
    }
}

fn usage(text: impl Into<String>) -> RestoreError {
    RestoreError::Usage(text.into())
}

/// Files of a clone, removed again when it is dropped, unless [`Created::keep`] was called.
#[derive(Debug, Default)]
pub struct Created(Vec<PathBuf>);

impl Created {
    /// The clone runs: they are its own.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        for path in &self.0 {
            // One that was not written yet is not there.
            drop(fs::remove_file(path));
        }
    }
}

/// Makes ready what the snapshot `name` is to become: a definition to be started, and what was made for a clone, which is to
/// be kept once that runs. `tell` hears how far it is.
///
/// # Errors
/// [`RestoreError`].
pub fn prepare(
    store: &Store,
    name: &str,
    target: &Target,
    tell: &mut dyn FnMut(String, u8),
) -> Result<(Definition, Created), RestoreError> {
    let chain = store.chain(name)?;
    let mut head = chain::head(&chain)?;
    let (text, file) = head.definition.clone().ok_or_else(|| {
        usage(format!("snapshot {name} does not say what VM it is of: it cannot be started"))
    })?;
    let parsed = Definition::parse(text, file).and_then(|d| d.placed(store.state_dir()));
    let mut definition = parsed.map_err(RestoreError::Failed)?;
    check(&definition, &head).map_err(RestoreError::Failed)?;
    if definition.config.name != store.vm() {
        let (is, wanted) = (&definition.config.name, store.vm());
        return Err(RestoreError::Failed(format!("it is of VM {is}, not of {wanted}")));
    }
    let mut created = Created::default();
    if let Target::Clone { name: clone, dir, connect } = target {
        definition = clone_of(&definition, clone, dir.as_deref(), *connect)?;
        let made = draw().and_then(|drawn| machine_of(&definition, &head, drawn));
        let rtc_base_ns = head.saved.config.rtc_base_ns;
        let config = made.map_err(RestoreError::Failed)?;
        head.saved.config = MachineConfig { rtc_base_ns, ..config };
        created = claim_files(&definition, &head)?;
    }
    let config = &mut head.saved.config;
    let mtime = head.saved.clock.mtime(head.saved.icount);
    config.rtc_base_ns = rtc_base_after_pause(mtime, config.rtc_base_ns);
    let mut disks = stage_all(&definition, &head, &chain, target, store.state_dir())?;
    let machine = load(store, &chain, &head, &mut disks, tell)?;
    let disks = disks.into_iter().flatten().collect();
    let mut prepared = Prepared::new(machine).with_disks(disks);
    if matches!(target, Target::Same { .. }) {
        prepared = prepared.of_snapshot(store.clone(), name.to_owned(), head.id);
    }
    definition.origin = Origin::state(prepared);
    Ok((definition, created))
}

/// The machine that a definition describes, with disks as in the snapshot.
fn machine_of(
    definition: &Definition,
    head: &SnapshotHead,
    drawn: Drawn,
) -> Result<MachineConfig, String> {
    let sizes: Vec<u64> = head.saved.config.disks.iter().map(|disk| disk.size).collect();
    definition.config.machine_config(&sizes, drawn)
}

/// A definition and a machine that do not belong together were put together by somebody else.
fn check(definition: &Definition, head: &SnapshotHead) -> Result<(), String> {
    let saved = &head.saved.config;
    let drawn = Drawn { rtc_base_ns: saved.rtc_base_ns, rng_seed: saved.rng_seed.clone() };
    let has_disks = head.disks.len() == saved.disks.len()
        && saved
            .disks
            .iter()
            .zip(&head.disks)
            .zip(head.saved.disk_sizes())
            .all(|((disk, &bytes), size)| bytes == if disk.readonly { 0 } else { size });
    if has_disks && machine_of(definition, head, drawn)? == *saved {
        return Ok(());
    }
    Err("the snapshot's definition is not that of its machine".to_owned())
}

/// The definition of a clone: other name, other disks, MAC addresses made from the name, no networks unless they are wanted.
fn clone_of(
    original: &Definition,
    name: &str,
    dir: Option<&Path>,
    connect: bool,
) -> Result<Definition, RestoreError> {
    check_name(name).map_err(|e| usage(e.to_string()))?;
    if name == original.config.name {
        return Err(usage("a clone needs a name of its own"));
    }
    let broken = |e: &dyn std::fmt::Display| RestoreError::Failed(format!("its definition: {e}"));
    let mut table: Table = toml::from_str(&original.text).map_err(|e| broken(&e))?;
    let text = |path: &Path| match path.to_str() {
        Some(text) => Ok(Value::from(text)),
        None => Err(usage(format!("{} is no path that a definition can have", path.display()))),
    };
    let config = &original.config;
    table.insert("name".to_owned(), Value::from(name));
    for (key, path) in [
        ("kernel", &config.kernel),
        ("initrd", &config.initrd),
        ("bios", &config.bios),
        ("u_boot", &config.u_boot),
    ] {
        if let Some(path) = path {
            table.insert(key.to_owned(), text(path)?);
        }
    }
    for (index, disk) in tables(&mut table, "disk").enumerate() {
        let present = &config.disks[index];
        if let Some(export) = present.nbd.as_ref().filter(|_| !present.readonly) {
            if dir.is_none() {
                return Err(usage(format!(
                    "{export} is an NBD export: say --disk-dir for the clone's disks"
                )));
            }
            for key in ["nbd", "nbd_timeout", "mode"] {
                disk.remove(key);
            }
        } else if present.nbd.is_some() {
            continue;
        }
        let path = match dir {
            _ if present.readonly => present.path.clone(),
            Some(dir) => dir.join(format!("{name}-disk{index}.img")),
            None if is_device(&present.path) => {
                let path = present.path.display();
                return Err(usage(format!(
                    "{path} is a block device: say --disk-dir for the clone's disks"
                )));
            }
            None => present.path.with_file_name(format!("{name}-disk{index}.img")),
        };
        disk.insert("path".to_owned(), text(&path)?);
        // Its own is beside its image.
        disk.remove("lock");
    }
    for net in tables(&mut table, "net") {
        net.remove("mac");
        // A tap is one VM's alone.
        if net.remove("tap").is_some() && connect {
            return Err(usage(
                "the VM has a tap of its own, which a clone cannot share: leave --connect out",
            ));
        }
        if !connect {
            net.remove("bridge");
        }
    }
    let file = match dir {
        Some(dir) => dir.join(format!("{name}.toml")),
        None => original.file.with_file_name(format!("{name}.toml")),
    };
    let head = format!("# A clone of VM {}, made from a snapshot.\n", config.name);
    let text = head + &toml::to_string(&table).map_err(|e| broken(&e))?;
    Definition::parse(text, file).map_err(RestoreError::Failed)
}

/// The tables of an array, none when there is no such array.
fn tables<'a>(table: &'a mut Table, key: &str) -> impl Iterator<Item = &'a mut Table> {
    let array = table.get_mut(key).and_then(Value::as_array_mut);
    array.into_iter().flatten().filter_map(Value::as_table_mut)
}

fn is_present(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Takes the names of a clone's files, of which none may be there, and writes its definition.
fn claim_files(definition: &Definition, head: &SnapshotHead) -> Result<Created, RestoreError> {
    let sections = definition.config.disks.iter().zip(&head.disks);
    let disks = sections.filter(|(_, bytes)| **bytes > 0).map(|(section, _)| section.path.clone());
    let disks: Vec<PathBuf> = disks.collect();
    if let Some(path) = disks.iter().find(|path| is_present(path)) {
        return Err(usage(format!("{} exists: choose another name or --disk-dir", path.display())));
    }
    let file = &definition.file;
    let mut options = OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(0o644).open(file);
    let mut opened = match opened {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(usage(format!(
                "{} exists: choose another name or --disk-dir",
                file.display()
            )));
        }
        opened => opened.map_err(|e| failed("create", file, &e))?,
    };
    let created = Created(disks.into_iter().chain([file.clone()]).collect());
    let text = definition.text.as_bytes();
    let written = opened.write_all(text).and_then(|()| opened.sync_all());
    written.map_err(|e| failed("write", file, &e))?;
    Ok(created)
}

fn failed(action: &str, path: &Path, e: &std::io::Error) -> RestoreError {
    RestoreError::Failed(format!("cannot {action} {}: {e}", path.display()))
}

/// Makes room for the contents of the disks, by index; those that are only read stay as they are.
fn stage_all(
    definition: &Definition,
    head: &SnapshotHead,
    chain: &[PathBuf],
    target: &Target,
    state_dir: &Path,
) -> Result<Vec<Option<StagedDisk>>, RestoreError> {
    let sections = definition.config.disks.iter().zip(head.saved.disk_sizes());
    let is_lost = |d: &&DiskSection| !d.readonly && (d.nbd.is_some() || is_present(&d.path));
    let lost = definition.config.disks.iter().filter(is_lost);
    let paths: Vec<_> = lost.map(DiskSection::place).collect();
    if *target == (Target::Same { force: false }) && !paths.is_empty() {
        return Err(usage(format!(
            "what is on the disks of VM {} now ({}) would be replaced and lost: say --force if that is meant",
            definition.config.name,
            paths.join(", ")
        )));
    }
    let mut staged = Vec::new();
    for (dev, (section, disk_size)) in (0u8..).zip(sections) {
        if section.readonly {
            let image = Image::open(section.source().settled(), OpenMode::ReadOnly);
            let size = image.map_err(|e| RestoreError::Failed(one_line(&e)))?.size();
            if size != disk_size {
                let path = section.place();
                return Err(RestoreError::Failed(format!(
                    "{path}, which the VM only reads, has {size} bytes now, and had {disk_size}"
                )));
            }
            staged.push(None);
            continue;
        }
        let mode = match section.mode {
            DiskMode::Mirrored => OpenMode::Exclusive,
            DiskMode::Shared => OpenMode::Shared,
        };
        let present = match Image::open_again(section.source().settled(), mode) {
            Ok(image) => Some(image),
            // There is none, or one that is no disk any more.
            Err(OpenImageError::BadSize { .. }) => None,
            Err(_) if section.nbd.is_none() && !is_present(&section.path) => None,
            Err(e) => return Err(RestoreError::Failed(one_line(&e))),
        };
        let record = record_path(&section.path, state_dir);
        staged.push(Some(stage(section, disk_size, present, (dev, chain), record)?));
    }
    Ok(staged)
}

fn stage(
    section: &DiskSection,
    size: u64,
    present: Option<Image>,
    (dev, chain): (u8, &[PathBuf]),
    record: PathBuf,
) -> Result<StagedDisk, RestoreError> {
    let path = &section.path;
    match present {
        Some(image) if image.is_device() => {
            if image.size() != size {
                let (path, has) = (section.place(), image.size());
                let text = format!("{path} has {has} bytes, the snapshot's disk {size}");
                return Err(RestoreError::Failed(text));
            }
            Ok(StagedDisk::Device { image, dev, chain: chain.to_vec(), record })
        }
        present => {
            // A link keeps leading to the file.
            let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            let writer = MirrorWriter::create_as(&path, section.image_format(), size);
            let writer = writer.map_err(|e| RestoreError::Failed(one_line(&e)))?;
            if let Some(replaced) = present.as_ref().and_then(|image| image.metadata().ok()) {
                let given = writer.belong_as(&replaced);
                given.map_err(|e| RestoreError::Failed(one_line(&e)))?;
            }
            Ok(StagedDisk::File { writer, present, record })
        }
    }
}

/// Loads the machine, and writes the disks beside their names.
fn load(
    store: &Store,
    chain: &[PathBuf],
    head: &SnapshotHead,
    disks: &mut [Option<StagedDisk>],
    tell: &mut dyn FnMut(String, u8),
) -> Result<machine::Machine, RestoreError> {
    let images = store.images(head)?;
    let total: u64 = chain.iter().map(|file| fs::metadata(file).map_or(0, |meta| meta.len())).sum();
    let mut told = std::time::Instant::now();
    let machine = chain::load_as(chain, head, images, &mut |piece| {
        if told.elapsed() >= super::snapshots::LOOK {
            told = std::time::Instant::now();
            let percent = piece.bytes_read * 100 / total.max(1);
            tell("reading memory and disks".to_owned(), u8::try_from(percent).unwrap_or(100));
        }
        let Some((dev, index, Some(data))) = piece.chunk else { return Ok(()) };
        let Some(Some(StagedDisk::File { writer, .. })) = disks.get_mut(usize::from(dev)) else {
            return Ok(());
        };
        let unfit = |e| SnapshotError::Unfit { path: chain[0].clone(), reason: one_line(&e) };
        writer.write_chunk(index, &data).map_err(unfit)
    })?;
    for disk in disks.iter().flatten() {
        if let StagedDisk::File { writer, .. } = disk {
            writer.sync().map_err(|e| RestoreError::Failed(one_line(&e)))?;
        }
    }
    Ok(machine)
}

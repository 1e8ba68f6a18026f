//! The receiving side of a mirror: what copy of a disk is here, and making it the sender's, whole or in what differs.
//!
//! # Place
//! On the host that gets the mirror; fed with the [`CopyItem`]s of [`super::copy`], from a peer.
//!
//! # States
//! ```text
//!   opened --Start without base--> a file beside the image, which takes its name when all is here
//!          --Start with a base---> the image itself, in the extents that differ
//! ```
//!
//! # Invariants
//! - INV-RESYNC-1: a copy that is not whole is never taken for one: what is written in place is marked in the record before
//!   (INV-JOURNAL-3), what is written beside has another name.
//! - INV-RESYNC-2: an interrupted resync leaves marks that hold, so that the next one need not copy everything.
//!
//! # Failure
//! Dropped before [`DiskReceiver::finish`], a file beside the image is removed; an image written in place stays, marked as
//! being copied.

use std::path::{Path, PathBuf};

use super::bitmap::Bitmap;
use super::copy::{CHUNK_BYTES, CopyItem};
use super::journal::Journal;
use super::mirror::{MirrorError, MirrorWriter};
use super::record::{self, Statement, extents};
use super::{Image, OpenMode};
use crate::config::DiskSection;
use crate::one_line::one_line;

#[derive(Debug)]
enum Mode {
    Opened,
    Beside(MirrorWriter),
    /// With the chunks that are not zero, where those that do not come are.
    InPlace {
        image: Image,
        given: Option<Bitmap>,
    },
}

/// A disk that is being received.
#[derive(Debug)]
pub struct DiskReceiver {
    section: DiskSection,
    state_dir: PathBuf,
    vm: String,
    disk: u8,
    size: u64,
    /// The copy that is here, held so that nobody else uses it, or why there is none that helps.
    present: Result<Image, String>,
    journal: Option<Journal>,
    mode: Mode,
    statements: Vec<Statement>,
}

impl DiskReceiver {
    /// Looks for this host's copy of a disk of `size` bytes. Of one that is not `kept`, no record is.
    #[must_use]
    pub fn open(
        section: &DiskSection,
        state_dir: &Path,
        (vm, disk): (&str, u8),
        size: u64,
        is_kept: bool,
    ) -> Self {
        let mut receiver = Self {
            section: section.clone(),
            state_dir: state_dir.to_owned(),
            vm: vm.to_owned(),
            disk,
            size,
            present: Err("it is read-only".to_owned()),
            journal: None,
            mode: Mode::Opened,
            statements: Vec::new(),
        };
        if is_kept {
            receiver.present = receiver.look();
        }
        receiver
    }

    fn open_journal(&self) -> Journal {
        Journal::open(&self.section.path, &self.state_dir, &self.vm, self.disk, self.size)
    }

    fn look(&mut self) -> Result<Image, String> {
        if !self.section.path.exists() {
            return Err("it has no copy".to_owned());
        }
        let image = Image::open_again(self.section.source().settled(), OpenMode::Exclusive)
            .map_err(|e| one_line(&e))?;
        if image.size() != self.size {
            return Err(format!("its copy has {} bytes, the disk {}", image.size(), self.size));
        }
        let journal = self.open_journal();
        if let (Some(why), false) = (journal.unknown(), image.is_device()) {
            return Err(why.to_owned());
        }
        self.journal = Some(journal);
        Ok(image)
    }

    /// What can be said of the copy that is here, or why nothing helps.
    ///
    /// # Errors
    /// One line.
    pub fn have(&self) -> Result<Vec<Statement>, String> {
        match (&self.present, &self.journal) {
            (Ok(_), Some(journal)) => match journal.unknown() {
                None => Ok(journal.statements()),
                Some(why) => Err(why.to_owned()),
            },
            (Err(why), _) => Err(why.clone()),
            (Ok(_), None) => Err("it has no record".to_owned()),
        }
    }

    /// Applies an item. True when it was the end: then [`Self::finish`] is due.
    ///
    /// # Errors
    /// One line; the receiver is then good for nothing but being dropped.
    pub fn apply(&mut self, item: &CopyItem) -> Result<bool, String> {
        match item {
            CopyItem::Start { base, extents } => {
                self.begin(base.is_some(), extents).map(|()| false)
            }
            CopyItem::Stated { statements } => {
                self.statements.clone_from(statements);
                Ok(false)
            }
            CopyItem::Chunk { index, data } => self.chunk(*index, data).map(|()| false),
            CopyItem::Zero { index } => self.zero(*index).map(|()| false),
            CopyItem::End { .. } => Ok(true),
            CopyItem::Failed { reason } => Err(format!("the sender gave up the copy: {reason}")),
        }
    }

    fn begin(&mut self, is_incremental: bool, marks: &[u8]) -> Result<(), String> {
        if !matches!(self.mode, Mode::Opened) {
            return Err("the copy of a disk begins twice".to_owned());
        }
        let none = Err("taken".to_owned());
        let present = std::mem::replace(&mut self.present, none);
        if is_incremental {
            let (Ok(image), Some(journal)) = (present, &mut self.journal) else {
                return Err("changes of a disk come that is not here".to_owned());
            };
            let marks = Bitmap::from_bytes(extents(self.size), marks);
            journal.begin_resync(&marks.ok_or("the marks of a disk are malformed")?)?;
            self.mode = Mode::InPlace { image, given: None };
            return Ok(());
        }
        if let (Ok(image), Some(journal)) = (&present, &mut self.journal)
            && image.is_device()
        {
            journal.begin_whole()?;
            let given = Some(Bitmap::empty(self.size.div_ceil(CHUNK_BYTES)));
            self.mode = Mode::InPlace { image: present?, given };
            return Ok(());
        }
        // A link keeps leading to the file.
        let path = &self.section.path;
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let writer = MirrorWriter::create_as(&path, self.section.image_format(), self.size);
        self.mode = Mode::Beside(writer.map_err(|e| one_line(&e))?);
        Ok(())
    }

    fn range(&self, index: u64) -> Result<(u64, u64), String> {
        let offset = index.checked_mul(CHUNK_BYTES).filter(|offset| *offset < self.size);
        let offset = offset
            .ok_or_else(|| one_line(&MirrorError::BadChunk { index, len: 0, size: self.size }))?;
        Ok((offset, (self.size - offset).min(CHUNK_BYTES)))
    }

    fn note_write(&mut self, offset: u64, len: u64) -> Result<(), String> {
        match &mut self.journal {
            Some(journal) => journal.before_write(offset, len, Vec::new),
            None => Ok(()),
        }
    }

    fn chunk(&mut self, index: u64, data: &[u8]) -> Result<(), String> {
        let (offset, len) = self.range(index)?;
        if data.len() as u64 != len {
            let (len, size) = (data.len(), self.size);
            return Err(one_line(&MirrorError::BadChunk { index, len, size }));
        }
        if matches!(self.mode, Mode::InPlace { .. }) {
            self.note_write(offset, len)?;
        }
        match &mut self.mode {
            Mode::Opened => Err("a disk's chunk comes before the copy begins".to_owned()),
            Mode::Beside(writer) => writer.write_chunk(index, data).map_err(|e| one_line(&e)),
            Mode::InPlace { image, given } => {
                given.iter_mut().for_each(|given| given.set(index));
                image.write(offset, data)
            }
        }
    }

    fn zero(&mut self, index: u64) -> Result<(), String> {
        let (offset, len) = self.range(index)?;
        if matches!(self.mode, Mode::InPlace { .. }) {
            self.note_write(offset, len)?;
        }
        match &mut self.mode {
            Mode::Opened => Err("a disk's chunk comes before the copy begins".to_owned()),
            Mode::Beside(writer) => writer.zero_chunk(index).map_err(|e| one_line(&e)),
            Mode::InPlace { image, given } => {
                given.iter_mut().for_each(|given| given.clear(index));
                image.zero(offset, len)
            }
        }
    }

    /// Makes the copy durable and the disk's. It is at least as new as what the VM did in `generation`.
    ///
    /// # Errors
    /// One line: nothing is a whole copy that was none before.
    pub fn finish(mut self, generation: u64) -> Result<(), String> {
        match std::mem::replace(&mut self.mode, Mode::Opened) {
            Mode::Opened => Err("a disk's copy ends before it begins".to_owned()),
            Mode::Beside(writer) => {
                let path = record::record_path(&self.section.path, &self.state_dir);
                // From here on until the end nothing is known about whatever has the image's name.
                record::remove(&path)
                    .map_err(|e| format!("cannot remove {}: {e}", path.display()))?;
                writer.finish().map_err(|e| one_line(&e))?;
                if self.statements.is_empty() {
                    return Ok(());
                }
                self.open_journal().complete(&self.statements, generation)
            }
            Mode::InPlace { image, given } => {
                let chunks = self.size.div_ceil(CHUNK_BYTES);
                for index in given.iter().flat_map(|given| (0..chunks).filter(|i| !given.get(*i))) {
                    let (offset, len) = self.range(index)?;
                    image.zero(offset, len)?;
                }
                image.flush()?;
                let journal = self.journal.as_mut().ok_or("a disk has no record")?;
                journal.complete(&self.statements, generation)
            }
        }
    }
}

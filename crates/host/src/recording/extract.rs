//! What crossed the border of a recorded machine, taken out while it is replayed: packets and the contents of disks.
//!
//! # Format
//! Packets go to a pcapng file (the IETF's draft-ietf-opsawg-pcapng): a section, an Ethernet interface for each network
//! device, an enhanced packet block for each frame, with its direction as seen from the guest and the guest's wall clock in
//! nanoseconds. A packet that left work to the host (a checksum, segments) is written as the frames that the work makes of
//! it. Disks go to sparse raw images.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use machine::config::MachineConfig;
use machine::io::{BlkOp, BlkStatus, Input, Output, OutputKind};
use machine::offload::{Work, frame};

use super::player::Observer;
use crate::offload::finish;

/// Nanoseconds in a tick of guest time.
const NS_PER_TICK: u64 = 100;
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const LINK_ETHERNET: u16 = 1;
const OPTION_NAME: u16 = 2;
const OPTION_TIME_RESOLUTION: u16 = 9;
const OPTION_FLAGS: u16 = 2;
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
const SECTOR_BYTES: u64 = 512;

/// Why something cannot be taken out.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// The operating system said no.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The image that a disk is to start from cannot be used.
    #[error("cannot use {} as disk {dev}: {reason}", path.display())]
    Base {
        /// The image.
        path: PathBuf,
        /// Index of the disk.
        dev: u8,
        /// One line.
        reason: String,
    },
}

/// Writes the packets of a replay.
#[derive(Debug)]
struct Pcap {
    file: BufWriter<File>,
    path: PathBuf,
    wall_base_ns: u64,
    packets: u64,
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend_from_slice(&code.to_le_bytes());
    out.extend_from_slice(&(value.len() as u16).to_le_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

impl Pcap {
    fn create(path: &Path, config: &MachineConfig) -> std::io::Result<Self> {
        let file = BufWriter::new(create(path)?);
        let wall_base_ns = config.rtc_base_ns;
        let mut pcap = Self { file, path: path.to_owned(), wall_base_ns, packets: 0 };
        let mut section = BYTE_ORDER.to_le_bytes().to_vec();
        section.extend_from_slice(&[1, 0, 0, 0]);
        section.extend_from_slice(&u64::MAX.to_le_bytes());
        pcap.block(SECTION_HEADER, &section)?;
        for dev in 0..config.nets.len() {
            let mut interface = LINK_ETHERNET.to_le_bytes().to_vec();
            interface.extend_from_slice(&[0; 6]);
            option(&mut interface, OPTION_NAME, format!("net{dev}").as_bytes());
            option(&mut interface, OPTION_TIME_RESOLUTION, &[9]);
            option(&mut interface, 0, &[]);
            pcap.block(INTERFACE, &interface)?;
        }
        Ok(pcap)
    }

    fn block(&mut self, kind: u32, body: &[u8]) -> std::io::Result<()> {
        let len = (12 + body.len().next_multiple_of(4)) as u32;
        self.file.write_all(&kind.to_le_bytes())?;
        self.file.write_all(&len.to_le_bytes())?;
        self.file.write_all(body)?;
        self.file.write_all(&[0; 3][..body.len().next_multiple_of(4) - body.len()])?;
        self.file.write_all(&len.to_le_bytes())
    }

    fn packet(&mut self, mtime: u64, dev: u8, packet: &[u8], flags: u32) -> std::io::Result<()> {
        let frames = match Work::of(packet) {
            Ok(work) => finish(packet, &work),
            // The device has dropped it.
            Err(_) => return Ok(()),
        };
        let ns = self.wall_base_ns.saturating_add(mtime.saturating_mul(NS_PER_TICK));
        for packet in frames {
            let frame = frame(&packet);
            let mut body = u32::from(dev).to_le_bytes().to_vec();
            body.extend_from_slice(&((ns >> 32) as u32).to_le_bytes());
            body.extend_from_slice(&(ns as u32).to_le_bytes());
            body.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            body.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            body.extend_from_slice(frame);
            body.resize(body.len().next_multiple_of(4), 0);
            option(&mut body, OPTION_FLAGS, &flags.to_le_bytes());
            option(&mut body, 0, &[]);
            self.block(ENHANCED_PACKET, &body)?;
            self.packets += 1;
        }
        Ok(())
    }
}

fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// The contents of a disk as far as a replay shows them: what the guest wrote, and what it was given to read.
#[derive(Debug)]
struct DiskOut {
    file: File,
    path: PathBuf,
    size: u64,
    dev: u8,
    /// It began as the image that the recorded machine had, as far as is known.
    has_base: bool,
    /// Requests that are not done.
    waiting: BTreeMap<u64, BlkOp>,
    /// A bit for each sector whose contents are known.
    known: Vec<u64>,
    /// What was read in the recording is not what the image has.
    mismatch: Option<String>,
}

impl DiskOut {
    fn create(path: &Path, dev: u8, size: u64, base: Option<&Path>) -> Result<Self, ExtractError> {
        let fail = |source| ExtractError::Write { path: path.to_owned(), source };
        let file = create(path).map_err(fail)?;
        if let Some(base) = base {
            let refuse = |reason: String| ExtractError::Base { path: base.to_owned(), dev, reason };
            let mut from = File::open(base).map_err(|e| refuse(e.to_string()))?;
            let found = from.metadata().map_err(|e| refuse(e.to_string()))?.len();
            if found != size {
                drop(std::fs::remove_file(path));
                return Err(refuse(format!("it has {found} bytes, the recorded disk {size}")));
            }
            let mut to = file.try_clone().map_err(fail)?;
            std::io::copy(&mut from, &mut to).map_err(fail)?;
        }
        file.set_len(size).map_err(fail)?;
        let words = size.div_ceil(SECTOR_BYTES * 64);
        Ok(Self {
            file,
            path: path.to_owned(),
            size,
            dev,
            has_base: base.is_some(),
            waiting: BTreeMap::new(),
            known: vec![0; usize::try_from(words).unwrap_or(0)],
            mismatch: None,
        })
    }

    fn grow(&mut self, size: u64) -> std::io::Result<()> {
        self.file.set_len(size)?;
        let before = self.size;
        self.size = size;
        let words = size.div_ceil(SECTOR_BYTES * 64);
        self.known.resize(usize::try_from(words).unwrap_or(0), 0);
        // What is new is zero.
        self.know(before, size - before);
        Ok(())
    }

    fn know(&mut self, offset: u64, len: u64) {
        for sector in offset / SECTOR_BYTES..(offset + len).div_ceil(SECTOR_BYTES) {
            if let Some(word) = self.known.get_mut((sector / 64) as usize) {
                *word |= 1 << (sector % 64);
            }
        }
    }

    fn done(&mut self, id: u64, status: BlkStatus, data: &[u8]) -> std::io::Result<()> {
        let Some(op) = self.waiting.remove(&id).filter(|_| status == BlkStatus::Ok) else {
            return Ok(());
        };
        match op {
            BlkOp::Read { offset, .. } => {
                if self.has_base {
                    let mut here = vec![0; data.len()];
                    self.file.read_exact_at(&mut here, offset)?;
                    if here != data && self.mismatch.is_none() {
                        self.mismatch =
                            Some(format!("the guest read something else at {offset:#x}"));
                    }
                }
                self.file.write_all_at(data, offset)?;
                self.know(offset, data.len() as u64);
            }
            BlkOp::Write { offset, data } => {
                self.file.write_all_at(&data, offset)?;
                self.know(offset, data.len() as u64);
            }
            BlkOp::Discard { offset, len } | BlkOp::WriteZeroes { offset, len } => {
                crate::disk::write_zeroes(&self.file, offset, len)?;
                self.know(offset, len);
            }
            BlkOp::Flush => {}
        }
        Ok(())
    }
}

/// A disk that was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskExtract {
    /// The image.
    pub path: PathBuf,
    /// Index of the disk.
    pub dev: u8,
    /// Size in bytes.
    pub size: u64,
    /// Bytes whose contents the recording shows.
    pub known_bytes: u64,
    /// The image that it began as.
    pub has_base: bool,
    /// Why that is not the one that the recorded machine had.
    pub mismatch: Option<String>,
}

/// What is to be taken out of a replay, beside the UART's output.
#[derive(Debug)]
pub struct Extract<F> {
    console: F,
    pcap: Option<Pcap>,
    disks: Vec<Option<DiskOut>>,
    failed: Option<ExtractError>,
}

impl<F: FnMut(&[u8])> Extract<F> {
    /// Nothing yet but the UART's output, to `console`.
    pub fn new(console: F, disks: usize) -> Self {
        Self { console, pcap: None, disks: (0..disks).map(|_| None).collect(), failed: None }
    }

    /// Packets to a file that must not exist.
    ///
    /// # Errors
    /// [`ExtractError`].
    pub fn pcap(&mut self, path: &Path, config: &MachineConfig) -> Result<(), ExtractError> {
        let pcap = Pcap::create(path, config);
        let fail = |source| ExtractError::Write { path: path.to_owned(), source };
        self.pcap = Some(pcap.map_err(fail)?);
        Ok(())
    }

    /// The contents of a disk to a file that must not exist; `base` is the disk as it was at the beginning.
    ///
    /// # Errors
    /// [`ExtractError`].
    pub fn disk(
        &mut self,
        dev: u8,
        path: &Path,
        base: Option<&Path>,
        config: &MachineConfig,
    ) -> Result<(), ExtractError> {
        let size = config.disks.get(usize::from(dev)).map_or(0, |disk| disk.size);
        let out = DiskOut::create(path, dev, size, base)?;
        if let Some(slot) = self.disks.get_mut(usize::from(dev)) {
            *slot = Some(out);
        }
        Ok(())
    }

    /// Requests of the machine as it is at the beginning that are not done.
    pub fn outstanding(&mut self, requests: Vec<OutputKind>) {
        for kind in requests {
            self.request(kind);
        }
    }

    fn request(&mut self, kind: OutputKind) {
        if let OutputKind::Blk { dev, id, op } = kind
            && let Some(Some(disk)) = self.disks.get_mut(usize::from(dev))
        {
            disk.waiting.insert(id, op);
        }
    }

    fn note(&mut self, path: impl FnOnce(&Self) -> PathBuf, result: std::io::Result<()>) {
        if let Err(source) = result
            && self.failed.is_none()
        {
            self.failed = Some(ExtractError::Write { path: path(self), source });
        }
    }

    fn packet(&mut self, mtime: u64, dev: u8, packet: &[u8], flags: u32) {
        let Some(pcap) = &mut self.pcap else { return };
        let result = pcap.packet(mtime, dev, packet, flags);
        self.note(|s| s.pcap.as_ref().map_or_else(PathBuf::new, |p| p.path.clone()), result);
    }

    /// Completes the files: frames that were written, and each disk.
    ///
    /// # Errors
    /// [`ExtractError`] with the first thing that went wrong.
    pub fn finish(mut self) -> Result<(u64, Vec<DiskExtract>), ExtractError> {
        let mut packets = 0;
        if let Some(mut pcap) = self.pcap.take() {
            packets = pcap.packets;
            let flushed = pcap.file.flush();
            let path = pcap.path.clone();
            self.note(|_| path, flushed);
        }
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        let disks = self.disks.into_iter().flatten().map(|disk| {
            let sectors: u64 = disk.known.iter().map(|word| u64::from(word.count_ones())).sum();
            DiskExtract {
                known_bytes: sectors * SECTOR_BYTES,
                path: disk.path,
                dev: disk.dev,
                size: disk.size,
                has_base: disk.has_base,
                mismatch: disk.mismatch,
            }
        });
        Ok((packets, disks.collect()))
    }
}

impl<F: FnMut(&[u8])> Observer for Extract<F> {
    fn output(&mut self, mtime: u64, output: &Output) {
        match &output.kind {
            OutputKind::Console { dev: 0, bytes } => (self.console)(bytes),
            OutputKind::NetTx { dev, packet } => self.packet(mtime, *dev, packet, OUTBOUND),
            kind @ OutputKind::Blk { .. } => self.request(kind.clone()),
            OutputKind::Console { .. } | OutputKind::EntropyWanted { .. } => {}
        }
    }

    fn input(&mut self, mtime: u64, _: u64, input: &Input) {
        match input {
            Input::NetRx { dev, packet } => self.packet(mtime, *dev, packet, INBOUND),
            Input::BlkDone { dev, id, status, data } => {
                if let Some(Some(disk)) = self.disks.get_mut(usize::from(*dev)) {
                    let result = disk.done(*id, *status, data);
                    let at = usize::from(*dev);
                    let path = |s: &Self| {
                        s.disks[at].as_ref().map_or_else(PathBuf::new, |d| d.path.clone())
                    };
                    self.note(path, result);
                }
            }
            Input::DiskResized { dev, size } => {
                let at = usize::from(*dev);
                if let Some(Some(disk)) = self.disks.get_mut(at) {
                    let (result, path) = (disk.grow(*size), disk.path.clone());
                    self.note(|_| path, result);
                }
            }
            Input::Clock { .. }
            | Input::Console { .. }
            | Input::Entropy { .. }
            | Input::PowerOff => {}
        }
    }
}

#[cfg(test)]
mod tests;

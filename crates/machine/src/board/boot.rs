//! Puts firmware, kernel, initial RAM disk and device tree into RAM and says where the harts start.
//!
//! ```text
//! 0x8000_0000 firmware | 0x8020_0000 kernel (or behind the firmware) | … | initrd | device tree, fw_dynamic info
//! ```
//! The device tree starts at the last 2 MiB boundary, below 3 GiB, that leaves room for it, as QEMU places it; the
//! initial RAM disk ends right below.
//!
//! # Failure
//! Images come from the operator and may be anything: each is checked, a bad one is [`LoadError`] with one clear
//! line, and then RAM may hold parts of the others.
//!
//! # References
//! Linux `Documentation/arch/riscv/boot-image-header.rst` and `boot.rst`; OpenSBI `docs/firmware/fw_dynamic.md`.

use crate::config::{BootImages, MachineConfig};
use crate::ram::{GuestRam, PAGE_SIZE, RAM_BASE};

use super::{elf, fdt};

const MIB: u64 = 1 << 20;
const ALIGN: u64 = 2 * MIB;
/// Address of the kernel, unless firmware is in the way.
pub const KERNEL_BASE: u64 = RAM_BASE + ALIGN;
/// The device tree lies below this address, so that 32-bit firmware code reaches it.
const FDT_LIMIT: u64 = 3072 * MIB;
/// Room behind the device tree, which firmware extends in place.
const FDT_SLACK: u64 = 64 << 10;
/// Most bytes of a kernel command line.
pub const APPEND_MAX: usize = 16 << 10;

const IMAGE_HEADER_BYTES: usize = 64;
const INFO_BYTES: u64 = 48;
const INFO_MAGIC: u64 = 0x4942_534f;
const INFO_VERSION: u64 = 2;
const NEXT_MODE_S: u64 = 1;
/// A file of which nothing is known.
const UNKNOWN: &str = "in an unknown format";

/// Why the machine cannot boot what it was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Neither firmware nor kernel.
    #[error("there is neither firmware nor a kernel to boot")]
    NothingToBoot,
    /// An image without contents.
    #[error("the {what} is empty")]
    Empty {
        /// Which image.
        what: &'static str,
    },
    /// The kernel is in a format that the machine does not load.
    #[error("the kernel is {found}; give a RISC-V Linux Image or a RISC-V ELF executable")]
    KernelFormat {
        /// What it looks like.
        found: &'static str,
    },
    /// A Linux image whose header contradicts itself.
    #[error("the kernel's image header is bad: {problem}")]
    BadImage {
        /// What is wrong.
        problem: &'static str,
    },
    /// An ELF file that cannot be loaded.
    #[error("the {what} is no usable ELF executable: {problem}")]
    BadElf {
        /// Which image.
        what: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// Something does not fit.
    #[error("the {what} does not fit into RAM: it needs {bytes:#x} bytes at {gpa:#x}")]
    TooBig {
        /// Which image.
        what: &'static str,
        /// Where it goes.
        gpa: u64,
        /// Bytes it needs.
        bytes: u64,
    },
    /// The initial RAM disk has no place.
    #[error(
        "the initial RAM disk of {bytes:#x} bytes does not fit between the kernel and the device tree"
    )]
    NoRoomForInitrd {
        /// Its size.
        bytes: u64,
    },
    /// The kernel and the firmware, or one of them and the device tree, want the same memory.
    #[error("the {what} overlaps the {with}")]
    Overlap {
        /// Which image.
        what: &'static str,
        /// What it overlaps.
        with: &'static str,
    },
    /// A command line that is too long.
    #[error("the kernel command line has {len} bytes; {APPEND_MAX} are allowed")]
    AppendTooLong {
        /// Its length.
        len: usize,
    },
    /// The RAM given is not the one of the configuration.
    #[error("RAM has {found:#x} bytes instead of {expected:#x}")]
    RamSize {
        /// As configured.
        expected: u64,
        /// As given.
        found: u64,
    },
}

/// Where the harts start. In M-mode every hart starts at `pc`; in S-mode hart 0 alone, the others waiting for the
/// SBI to start them. Register a0 is the number of the hart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootState {
    /// First instruction.
    pub pc: u64,
    /// Register a1: address of the device tree.
    pub a1: u64,
    /// Register a2: address of the `fw_dynamic_info`, 0 without firmware.
    pub a2: u64,
    /// Whether the harts start in M-mode, in firmware.
    pub machine_mode: bool,
}

/// An image in RAM: addresses from `start` to before `end`.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    what: &'static str,
    entry: u64,
    start: u64,
    end: u64,
}

impl Loaded {
    fn check_apart(&self, other: &Self) -> Result<(), LoadError> {
        if self.start < other.end && other.start < self.end {
            return Err(LoadError::Overlap { what: self.what, with: other.what });
        }
        Ok(())
    }
}

/// Loads everything.
///
/// # Errors
/// [`LoadError`].
pub fn load(
    config: &MachineConfig,
    images: &BootImages,
    ram: &mut GuestRam,
) -> Result<BootState, LoadError> {
    if ram.size() != config.ram_size {
        return Err(LoadError::RamSize { expected: config.ram_size, found: ram.size() });
    }
    if images.append.len() > APPEND_MAX {
        return Err(LoadError::AppendTooLong { len: images.append.len() });
    }
    let bios = images.bios.as_deref().map(|image| load_bios(image, ram)).transpose()?;
    let kernel_base =
        bios.map_or(KERNEL_BASE, |bios| bios.end.next_multiple_of(ALIGN).max(KERNEL_BASE));
    let load = |image: &[u8], ram: &mut GuestRam| match load_kernel(image, kernel_base, ram) {
        // Firmware starts whatever there is, for instance U-Boot without a header.
        Err(LoadError::KernelFormat { found: UNKNOWN }) if bios.is_some() => {
            load_raw(image, kernel_base, ram)
        }
        loaded => loaded,
    };
    let kernel = images.kernel.as_deref().map(|image| load(image, ram)).transpose()?;
    if let (Some(bios), Some(kernel)) = (&bios, &kernel) {
        kernel.check_apart(bios)?;
    }
    let Some(first) = bios.or(kernel) else { return Err(LoadError::NothingToBoot) };

    let loaded: Vec<Loaded> = bios.into_iter().chain(kernel).collect();
    let (fdt, info) = place_fdt(config, images, &loaded, ram)?;
    if let Some(bios) = bios {
        write_info(info, kernel.map_or(0, |kernel| kernel.entry), ram)?;
        return Ok(BootState { pc: bios.entry, a1: fdt, a2: info, machine_mode: true });
    }
    Ok(BootState { pc: first.entry, a1: fdt, a2: 0, machine_mode: false })
}

fn put(what: &'static str, gpa: u64, data: &[u8], ram: &mut GuestRam) -> Result<(), LoadError> {
    ram.write(gpa, data).map_err(|_| LoadError::TooBig { what, gpa, bytes: data.len() as u64 })
}

fn load_bios(image: &[u8], ram: &mut GuestRam) -> Result<Loaded, LoadError> {
    let what = "firmware";
    if image.is_empty() {
        return Err(LoadError::Empty { what });
    }
    if elf::is_elf(image) {
        return load_elf(what, image, ram);
    }
    put(what, RAM_BASE, image, ram)?;
    Ok(Loaded { what, entry: RAM_BASE, start: RAM_BASE, end: RAM_BASE + image.len() as u64 })
}

fn load_kernel(image: &[u8], base: u64, ram: &mut GuestRam) -> Result<Loaded, LoadError> {
    let what = "kernel";
    if image.is_empty() {
        return Err(LoadError::Empty { what });
    }
    if elf::is_elf(image) {
        return load_elf(what, image, ram);
    }
    if image.get(0x38..0x3c) == Some(b"RSC\x05") {
        let bytes = check_image(image)?;
        if ram.offset(base, bytes).is_none() {
            return Err(LoadError::TooBig { what, gpa: base, bytes });
        }
        put(what, base, image, ram)?;
        return Ok(Loaded { what, entry: base, start: base, end: base + bytes });
    }
    Err(LoadError::KernelFormat { found: guess_format(image) })
}

fn load_raw(image: &[u8], base: u64, ram: &mut GuestRam) -> Result<Loaded, LoadError> {
    let what = "kernel";
    put(what, base, image, ram)?;
    Ok(Loaded { what, entry: base, start: base, end: base + image.len() as u64 })
}

/// Bytes that a Linux image takes in memory, its zeroed part included.
fn check_image(image: &[u8]) -> Result<u64, LoadError> {
    if image.len() < IMAGE_HEADER_BYTES {
        return Err(LoadError::BadImage { problem: "the file ends within it" });
    }
    let field = |at: usize| -> Result<u64, LoadError> {
        image
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_le_bytes)
            .ok_or(LoadError::BadImage { problem: "the file ends within it" })
    };
    let (text_offset, image_size, flags) = (field(8)?, field(16)?, field(24)?);
    if flags & 1 != 0 {
        return Err(LoadError::BadImage { problem: "the kernel is big-endian" });
    }
    if !text_offset.is_multiple_of(ALIGN) {
        return Err(LoadError::BadImage { problem: "text_offset is no multiple of 2 MiB" });
    }
    // The size covers the zeroed data behind the file; kernels before 3.17 left it out, a signature may exceed it.
    Ok(image_size.max(image.len() as u64))
}

fn guess_format(image: &[u8]) -> &'static str {
    let at = |offset: usize, magic: &[u8]| {
        image.get(offset..).is_some_and(|tail| tail.starts_with(magic))
    };
    if at(0, &[0x1f, 0x8b]) {
        "compressed with gzip"
    } else if at(0, &[0x28, 0xb5, 0x2f, 0xfd]) {
        "compressed with zstd"
    } else if at(0, b"\xfd7zXZ\0") {
        "compressed with xz"
    } else if at(0x202, b"HdrS") {
        "an x86 bzImage"
    } else if at(0, b"MZ") && at(4, b"zimg") {
        "a compressed EFI image (zboot)"
    } else if at(0x38, b"ARM\x64") {
        "an arm64 Image"
    } else if at(0, b"MZ") {
        "an EFI executable"
    } else if at(0, &[0x27, 0x05, 0x19, 0x56]) {
        "a U-Boot uImage"
    } else {
        UNKNOWN
    }
}

fn load_elf(what: &'static str, image: &[u8], ram: &mut GuestRam) -> Result<Loaded, LoadError> {
    let elf = elf::parse(what, image)?;
    let mut loaded = Loaded { what, entry: 0, start: u64::MAX, end: 0 };
    let mut entry = None;
    for segment in &elf.segments {
        let in_ram = |gpa: u64| ram.offset(gpa, segment.mem_bytes).is_some();
        // Some linkers leave the physical address 0 or relative.
        let gpa = if in_ram(segment.paddr) { segment.paddr } else { segment.vaddr };
        if !in_ram(gpa) {
            return Err(LoadError::TooBig { what, gpa: segment.paddr, bytes: segment.mem_bytes });
        }
        put(what, gpa, segment.data, ram)?;
        zero(gpa + segment.data.len() as u64, gpa + segment.mem_bytes, what, ram)?;
        let into = elf.entry.wrapping_sub(segment.vaddr);
        if into < segment.mem_bytes {
            entry = entry.or(Some(gpa + into));
        }
        loaded.start = loaded.start.min(gpa);
        loaded.end = loaded.end.max(gpa + segment.mem_bytes);
    }
    // An entry may also be given as a physical address.
    let physical = (loaded.start..loaded.end).contains(&elf.entry).then_some(elf.entry);
    let problem = "its entry point is in no segment";
    loaded.entry = entry.or(physical).ok_or(LoadError::BadElf { what, problem })?;
    Ok(loaded)
}

fn zero(from: u64, to: u64, what: &'static str, ram: &mut GuestRam) -> Result<(), LoadError> {
    let mut gpa = from;
    while gpa < to {
        let len = (to - gpa).min(PAGE_SIZE as u64);
        put(what, gpa, &[0; PAGE_SIZE][..len as usize], ram)?;
        gpa += len;
    }
    Ok(())
}

/// Puts the device tree and the initial RAM disk, which it names, into RAM; returns the addresses of the tree and of
/// the room for the firmware's information behind it.
fn place_fdt(
    config: &MachineConfig,
    images: &BootImages,
    loaded: &[Loaded],
    ram: &mut GuestRam,
) -> Result<(u64, u64), LoadError> {
    let initrd = images.initrd.as_deref().filter(|image| !image.is_empty());
    // The addresses take the same room whatever they are.
    let bytes = fdt::build(config, &images.append, initrd.map(|_| (0, 0))).len() as u64;
    let area = bytes.next_multiple_of(8) + FDT_SLACK + INFO_BYTES;
    let top = (RAM_BASE + ram.size()).min(FDT_LIMIT);
    let at = top
        .checked_sub(area)
        .map(|at| at & !(ALIGN - 1))
        .filter(|&at| at > RAM_BASE)
        .ok_or(LoadError::TooBig { what: "device tree", gpa: RAM_BASE, bytes: area })?;
    let tree = Loaded { what: "device tree", entry: at, start: at, end: at + area };
    for image in loaded {
        image.check_apart(&tree)?;
    }

    let mut range = None;
    if let Some(initrd) = initrd {
        let len = initrd.len() as u64;
        let no_room = LoadError::NoRoomForInitrd { bytes: len };
        let start = at.checked_sub(len).ok_or(no_room.clone())? & !(PAGE_SIZE as u64 - 1);
        let lowest =
            loaded.iter().filter(|l| l.start < at).map(|l| l.end).max().unwrap_or(RAM_BASE);
        if start < lowest.max(RAM_BASE) {
            return Err(no_room);
        }
        put("initial RAM disk", start, initrd, ram)?;
        range = Some((start, start + len));
    }
    put("device tree", at, &fdt::build(config, &images.append, range), ram)?;
    Ok((at, at + area - INFO_BYTES))
}

/// Writes the `fw_dynamic_info`: magic, version, next address, next mode, options, boot hart.
fn write_info(info: u64, next: u64, ram: &mut GuestRam) -> Result<(), LoadError> {
    let words = [INFO_MAGIC, INFO_VERSION, next, NEXT_MODE_S, 0, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put("firmware information", info, &bytes, ram)
}

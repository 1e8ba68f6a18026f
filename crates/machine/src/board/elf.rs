//! Reads the parts of an ELF executable that a boot loader needs.
//!
//! # Failure
//! The file is untrusted: each field is checked against the file before it is used.

use super::boot::LoadError;

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: u64 = 56;
const PT_LOAD: u32 = 1;
const EM_RISCV: u16 = 243;

/// A loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) data: &'a [u8],
    pub(super) vaddr: u64,
    pub(super) paddr: u64,
    /// Bytes in memory; what exceeds the data is zero.
    pub(super) mem_bytes: u64,
}

/// A checked executable.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment<'a>>,
}

pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

pub(super) fn parse<'a>(what: &'static str, image: &'a [u8]) -> Result<Elf<'a>, LoadError> {
    let bad = |problem: &'static str| LoadError::BadElf { what, problem };
    if image.len() < HEADER_BYTES {
        return Err(bad("the file ends within the header"));
    }
    if image[4] != 2 {
        return Err(bad("it is not a 64-bit file"));
    }
    if image[5] != 1 {
        return Err(bad("it is not little-endian"));
    }
    if u16_at(image, 18) != EM_RISCV {
        return Err(bad("it is not for RISC-V"));
    }
    if !matches!(u16_at(image, 16), 2 | 3) {
        return Err(bad("it is not an executable"));
    }
    let (table, entry_bytes, count) = (u64_at(image, 32), u16_at(image, 54), u16_at(image, 56));
    if u64::from(entry_bytes) != SEGMENT_BYTES {
        return Err(bad("its program headers have an unknown size"));
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let header = table
            .checked_add(index * SEGMENT_BYTES)
            .and_then(|at| slice(image, at, SEGMENT_BYTES))
            .ok_or_else(|| bad("the file ends within the program headers"))?;
        let (file_bytes, mem_bytes) = (u64_at(header, 32), u64_at(header, 40));
        if u32_at(header, 0) != PT_LOAD || mem_bytes == 0 {
            continue;
        }
        if file_bytes > mem_bytes {
            return Err(bad("a segment is longer in the file than in memory"));
        }
        let data = slice(image, u64_at(header, 8), file_bytes)
            .ok_or_else(|| bad("the file ends within a segment"))?;
        segments.push(Segment {
            data,
            vaddr: u64_at(header, 16),
            paddr: u64_at(header, 24),
            mem_bytes,
        });
    }
    if segments.is_empty() {
        return Err(bad("it has nothing to load"));
    }
    Ok(Elf { entry: u64_at(image, 24), segments })
}

fn slice(image: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    image.get(at..at.checked_add(usize::try_from(len).ok()?)?)
}

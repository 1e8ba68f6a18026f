//! SiFive test finisher: how the guest powers the machine off or resets it.

use super::{BoardRequest, BusFault};

/// Bytes of the register region.
pub(super) const FINISHER_SIZE: u64 = 0x1000;
/// Value that means "power off, all is well"; also in the device tree.
pub(super) const PASS: u32 = 0x5555;
/// Value that means "power off with the code in the upper half".
pub(super) const FAIL: u32 = 0x3333;
/// Value that means "reset"; also in the device tree.
pub(super) const RESET: u32 = 0x7777;

/// What a write to the finisher asks for, if anything.
pub(super) fn write(offset: u64, size: u8, value: u64) -> Result<Option<BoardRequest>, BusFault> {
    if !matches!(size, 2 | 4) {
        return Err(BusFault);
    }
    if offset != 0 {
        return Ok(None);
    }
    let code = if size == 4 { (value >> 16) as u16 } else { 0 };
    Ok(match value as u32 & 0xffff {
        PASS => Some(BoardRequest::PowerOff { code: 0 }),
        FAIL => Some(BoardRequest::PowerOff { code }),
        RESET => Some(BoardRequest::Reset),
        _ => None,
    })
}

/// The finisher reads as zero.
pub(super) fn read(size: u8) -> Result<u64, BusFault> {
    if matches!(size, 2 | 4) { Ok(0) } else { Err(BusFault) }
}

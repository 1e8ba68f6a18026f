//! Memory for generated code, mapped twice: once to write, once to execute.
//!
//! # Invariants
//! - INV-ARENA-1: no mapping is writable and executable at once.
//! - INV-ARENA-2: the executable mapping lies below 2^31, so that an entry point fits in four bytes and every jump in a
//!   relative displacement.
//! - INV-ARENA-3: one thread writes, and never while it executes.

#![expect(unsafe_code, reason = "maps memory that is executed")]

use std::ffi::c_void;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `MAP_32BIT` of Linux on x86-64: an address below 2^31.
const MAP_32BIT: u32 = 0x40;

/// Memory for generated code.
#[derive(Debug)]
pub(crate) struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mappings belong to this value alone, whichever thread has it.
unsafe impl Send for Arena {}

impl Arena {
    /// An arena of `len` bytes, a multiple of the page size; `None` when this host gives no such memory.
    pub(crate) fn new(len: usize) -> Option<Self> {
        let fd = memfd_create("understudy-jit", MemfdFlags::CLOEXEC).ok()?;
        ftruncate(&fd, len as u64).ok()?;
        let null = std::ptr::null_mut();
        let low = MapFlags::SHARED | MapFlags::from_bits_retain(MAP_32BIT);
        let rx = ProtFlags::READ | ProtFlags::EXEC;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let executable = unsafe { mmap(null, len, rx, low, &fd, 0) }.ok()?;
        let executable = NonNull::new(executable)?;
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: as above.
        let writable = unsafe { mmap(null, len, rw, MapFlags::SHARED, &fd, 0) };
        let Some(writable) = writable.ok().and_then(NonNull::new) else {
            // SAFETY: the mapping was made above and nothing refers to it.
            let _ = unsafe { munmap(executable.as_ptr(), len) };
            return None;
        };
        let arena = Self { writable: writable.cast(), executable, len };
        (arena.base() + len as u64 <= 1 << 31).then_some(arena)
    }

    /// Address of the first byte, for execution.
    pub(crate) fn base(&self) -> u64 {
        self.executable.as_ptr() as u64
    }

    /// Size in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Writes code at an offset.
    ///
    /// # Panics
    /// When it does not fit.
    pub(crate) fn write(&mut self, offset: usize, code: &[u8]) {
        assert!(offset <= self.len && code.len() <= self.len - offset, "code fits its arena");
        // SAFETY: the offset is within the mapping.
        let to = unsafe { self.writable.add(offset) };
        // SAFETY: `to` has room for all of `code` (asserted), is mapped writable, and `code` cannot overlap a mapping that
        // no slice is ever made of.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), to.as_ptr(), code.len()) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`; code of it runs only while the arena is borrowed.
        let _ = unsafe { munmap(self.writable.as_ptr().cast(), self.len) };
        // SAFETY: as above.
        let _ = unsafe { munmap(self.executable.as_ptr(), self.len) };
    }
}

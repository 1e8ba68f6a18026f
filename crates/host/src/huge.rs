//! Huge pages for guest RAM.
//!
//! A killed process gives its memory back before it closes its sockets: with small pages that takes some 100 ms for each
//! GiB, and its peer learns of its death that much later. Huge pages make it a hundredth, and the guest a little faster.

#![expect(unsafe_code, reason = "madvise on memory that somebody else owns")]

use rustix::mm::{Advice, madvise};

/// Asks the kernel for huge pages under `ram`. It is a wish: where it is not granted, nothing changes.
pub(crate) fn advise(ram: &[u8]) {
    const PAGE: usize = 4096;
    let start = ram.as_ptr().align_offset(PAGE);
    if start >= ram.len() {
        return;
    }
    let len = (ram.len() - start) / PAGE * PAGE;
    let ptr = ram[start..].as_ptr().cast_mut().cast();
    // SAFETY: the range lies within `ram` and is mapped as long as that is borrowed; this advice changes neither contents
    // nor protection, so that nobody who reads or writes the memory can tell.
    let _ = unsafe { madvise(ptr, len, Advice::LinuxHugepage) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_stay() {
        let mut ram = vec![0u8; 5 << 20];
        ram[4096] = 7;
        advise(&ram);
        advise(&ram[..100]);
        advise(&[]);
        assert_eq!((ram[4095], ram[4096], ram[4097]), (0, 7, 0));
    }
}

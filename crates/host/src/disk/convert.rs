//! Copies the contents of one image into another one: only what is not zero, in pieces.
//!
//! # Place
//! `understudy image convert`.

use super::Image;
use super::copy::CHUNK_BYTES;
use super::mirror::MirrorWriter;
use crate::one_line::one_line;

/// Chunks read at once.
const CHUNKS_PER_READ: u64 = 16;

/// Is given the index and the data of a chunk.
type TakeChunk<'a> = dyn FnMut(u64, &[u8]) -> Result<(), String> + 'a;

/// Calls `take` with the index of each chunk that is not all zero, and its data.
fn each_chunk(source: &Image, take: &mut TakeChunk<'_>) -> Result<(), String> {
    let size = source.size();
    let mut at = 0;
    while let Some(data) = source.next_data(at).filter(|data| *data < size) {
        let first = data / CHUNK_BYTES;
        let start = first * CHUNK_BYTES;
        let len = (size - start).min(CHUNKS_PER_READ * CHUNK_BYTES);
        let bytes = source.read(start, usize::try_from(len).unwrap_or(0))?;
        for (index, chunk) in (first..).zip(bytes.chunks(CHUNK_BYTES as usize)) {
            if chunk.iter().any(|byte| *byte != 0) {
                take(index, chunk)?;
            }
        }
        at = start + len;
    }
    Ok(())
}

/// Copies `source` into a new image; returns how many bytes were written. `tell` is called with how many bytes of the disk have
/// been gone through.
///
/// # Errors
/// One line that names the image.
pub fn copy_to_new(
    source: &Image,
    target: &mut MirrorWriter,
    tell: &mut dyn FnMut(u64),
) -> Result<u64, String> {
    let mut written = 0;
    each_chunk(source, &mut |index, chunk| {
        written += chunk.len() as u64;
        tell(index * CHUNK_BYTES);
        target.write_chunk(index, chunk).map_err(|e| one_line(&e))
    })?;
    Ok(written)
}

/// Copies `source` over an image that holds something already and is at least as big, and flushes it.
///
/// # Errors
/// One line that names the image.
pub fn copy_over(source: &Image, target: &Image, tell: &mut dyn FnMut(u64)) -> Result<u64, String> {
    if target.size() < source.size() {
        let (path, has, needs) = (target.path().display(), target.size(), source.size());
        return Err(format!("{path} has {has} bytes, and the disk has {needs}"));
    }
    let (mut written, mut zeroed_to) = (0, 0);
    each_chunk(source, &mut |index, chunk| {
        let at = index * CHUNK_BYTES;
        target.zero(zeroed_to, at - zeroed_to)?;
        zeroed_to = at + chunk.len() as u64;
        written += chunk.len() as u64;
        tell(at);
        target.write(at, chunk)
    })?;
    target.zero(zeroed_to, target.size() - zeroed_to)?;
    target.flush()?;
    Ok(written)
}

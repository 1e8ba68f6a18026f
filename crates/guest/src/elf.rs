//! Reads from ELF files what packing a guest needs: needed libraries, the interpreter, a kernel module's `.modinfo`.
//!
//! # Failure
//! Any offset that does not lie in the file gives `None` or an empty list; nothing here panics on a damaged file.

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
/// More entries than any real file has.
const ENTRIES_MAX: usize = 65_536;

/// A view of a 64-bit little-endian ELF file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    file_size: u64,
}

impl<'a> Elf<'a> {
    /// The view, if this is such a file.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        bytes.starts_with(b"\x7fELF\x02\x01").then_some(Self { bytes })
    }

    fn u16_at(&self, at: u64) -> Option<u16> {
        self.slice(at, 2)?.try_into().ok().map(u16::from_le_bytes)
    }

    fn u32_at(&self, at: u64) -> Option<u32> {
        self.slice(at, 4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn u64_at(&self, at: u64) -> Option<u64> {
        self.slice(at, 8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn slice(&self, at: u64, len: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(at).ok()?;
        let end = usize::try_from(at.checked_add(len)?).ok()?;
        self.bytes.get(start..end)
    }

    fn text_at(&self, at: u64) -> Option<&'a str> {
        let rest = self.bytes.get(usize::try_from(at).ok()?..)?;
        let end = rest.iter().position(|&b| b == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }

    fn segments(&self) -> Vec<Segment> {
        let read = |index: u64| -> Option<Segment> {
            let at = self.u64_at(32)?.checked_add(index * u64::from(self.u16_at(54)?))?;
            Some(Segment {
                kind: self.u32_at(at)?,
                offset: self.u64_at(at.checked_add(8)?)?,
                vaddr: self.u64_at(at.checked_add(16)?)?,
                file_size: self.u64_at(at.checked_add(32)?)?,
            })
        };
        (0..u64::from(self.u16_at(56).unwrap_or(0))).map_while(read).collect()
    }

    /// Path of the dynamic linker that the file asks for.
    pub(crate) fn interpreter(&self) -> Option<&'a str> {
        let segment = self.segments().into_iter().find(|s| s.kind == PT_INTERP)?;
        self.text_at(segment.offset)
    }

    /// Names of the shared libraries that the file needs (`DT_NEEDED`), in the file's order.
    pub(crate) fn needed(&self) -> Vec<&'a str> {
        let segments = self.segments();
        let Some(dynamic) = segments.iter().find(|s| s.kind == PT_DYNAMIC) else {
            return Vec::new();
        };
        let mut names = Vec::new();
        let mut strings = None;
        for index in 0..ENTRIES_MAX as u64 {
            let Some(at) = dynamic.offset.checked_add(index * 16) else { break };
            match (self.u64_at(at), self.u64_at(at.saturating_add(8))) {
                (Some(DT_NEEDED), Some(value)) => names.push(value),
                (Some(DT_STRTAB), Some(value)) => strings = Some(value),
                (None | Some(0), _) | (_, None) => break,
                _ => {}
            }
        }
        let Some(strings) = strings.and_then(|vaddr| file_offset(&segments, vaddr)) else {
            return Vec::new();
        };
        names.into_iter().filter_map(|name| self.text_at(strings.checked_add(name)?)).collect()
    }

    /// The `key=value` pairs of a kernel module's `.modinfo` section.
    pub(crate) fn modinfo(&self) -> Vec<(&'a str, &'a str)> {
        let Some(section) = self.section(".modinfo") else { return Vec::new() };
        section
            .split(|&b| b == 0)
            .filter_map(|pair| std::str::from_utf8(pair).ok()?.split_once('='))
            .collect()
    }

    fn section(&self, name: &str) -> Option<&'a [u8]> {
        let table = self.u64_at(40)?;
        let entry = u64::from(self.u16_at(58)?);
        let header = |index: u16| table.checked_add(u64::from(index) * entry);
        let names = self.u64_at(header(self.u16_at(62)?)?.checked_add(24)?)?;
        (0..self.u16_at(60)?).find_map(|index| {
            let at = header(index)?;
            let found = self.text_at(names.checked_add(u64::from(self.u32_at(at)?))?)?;
            if found != name {
                return None;
            }
            self.slice(self.u64_at(at.checked_add(24)?)?, self.u64_at(at.checked_add(32)?)?)
        })
    }
}

fn file_offset(segments: &[Segment], vaddr: u64) -> Option<u64> {
    segments.iter().filter(|s| s.kind == PT_LOAD).find_map(|s| {
        let into = vaddr.checked_sub(s.vaddr)?;
        (into < s.file_size).then(|| s.offset.checked_add(into)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_executable_needs_libc_and_an_interpreter() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        assert!(elf.interpreter().is_some_and(|path| path.contains("ld-")));
        assert!(elf.needed().iter().any(|name| name.starts_with("libc.so")));
    }

    #[test]
    fn damaged_files_give_nothing_and_do_not_panic() {
        let mut bytes = std::fs::read("/proc/self/exe").unwrap();
        bytes.truncate(4096);
        for at in (16..64).chain(64..512).step_by(3) {
            let mut copy = bytes.clone();
            copy[at..at + 8].fill(0xff);
            let elf = Elf::parse(&copy).unwrap();
            elf.interpreter();
            elf.needed();
            elf.modinfo();
        }
        assert!(Elf::parse(b"\x7fELF\x01\x01").is_none());
    }
}

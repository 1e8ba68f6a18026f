//! Guest memory as a debugger reads it: without an effect on the machine, and RAM alone.
//!
//! # Failure
//! Devices are not read, since a read may change them. What no address leads to is not there: reads end before it.

use machine::Machine;
use machine::ram::PAGE_SIZE;

/// What addresses mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// Those that a hart uses.
    Virtual(usize),
    /// Guest physical ones.
    Physical,
}

impl Space {
    /// The hart whose they are.
    pub(crate) fn hart(self) -> Option<usize> {
        match self {
            Self::Virtual(hart) => Some(hart),
            Self::Physical => None,
        }
    }
}

/// The guest physical address of `at`.
pub(crate) fn translate(machine: &Machine, space: Space, at: u64) -> Option<u64> {
    match space {
        Space::Virtual(hart) => machine.debug_translate(hart, at),
        Space::Physical => Some(at),
    }
}

/// Reads into `data` as far as there is RAM; says how many bytes.
pub(crate) fn read(machine: &Machine, space: Space, at: u64, data: &mut [u8]) -> usize {
    let mut done = 0;
    while done < data.len() {
        let Some(here) = at.checked_add(done as u64) else { break };
        let in_page = PAGE_SIZE - (here % PAGE_SIZE as u64) as usize;
        let end = data.len().min(done + in_page);
        let Some(gpa) = translate(machine, space, here) else { break };
        if machine.ram().read(gpa, &mut data[done..end]).is_err() {
            break;
        }
        done = end;
    }
    done
}

#[cfg(test)]
mod tests {
    use machine::hart::Mode;

    use super::super::samples::{DATA, machine};
    use super::*;

    #[test]
    fn reads_end_where_ram_does_and_go_through_the_page_table() {
        let mut machine = machine();
        let mut data = [0; 16];
        assert_eq!(read(&machine, Space::Physical, DATA, &mut data[..8]), 8);
        assert_eq!(&data[..4], b"ABCD");
        assert_eq!(read(&machine, Space::Virtual(1), 0x8200_0000 - 4, &mut data), 4);
        for outside in [0x1000_0000, 0, u64::MAX - 3, 0x8200_0000] {
            assert_eq!(read(&machine, Space::Physical, outside, &mut data), 0, "{outside:#x}");
        }
        assert_eq!(read(&machine, Space::Virtual(2), DATA, &mut data), 0, "there is no such hart");
        // A page table that maps the first page of the address space to the data, and nothing else.
        let tables = [0x8000_2000u64, 0x8000_3000, 0x8000_4000];
        for (table, to, flags) in
            [(tables[0], tables[1], 1), (tables[1], tables[2], 1), (tables[2], DATA, 0xcf)]
        {
            machine.ram_mut().write(table, &(to >> 12 << 10 | flags).to_le_bytes()).unwrap();
        }
        let hart = &mut machine.harts_mut()[0];
        (hart.mode, hart.csr.satp) = (Mode::Supervisor, 8 << 60 | tables[0] >> 12);
        assert_eq!(read(&machine, Space::Virtual(0), 0, &mut data), 16);
        assert_eq!(&data[..4], b"ABCD");
        assert_eq!(read(&machine, Space::Virtual(0), 0xffc, &mut data), 4);
        assert_eq!(read(&machine, Space::Virtual(0), DATA, &mut data), 0);
    }
}

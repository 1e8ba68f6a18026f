//! `monitor xp`: physical memory in words.

use machine::Machine;

use super::memory::{self, Space};

/// Most bytes that one command shows.
const BYTES_MAX: u64 = 64 << 10;
const ROW_BYTES: usize = 16;

/// What to show and how: `[/COUNT][xdoc][bhwg] ADDRESS`, as GDB's `x` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Examine {
    count: u64,
    /// One of `x`, `d`, `u`, `o`, `c`.
    form: char,
    /// Bytes of a word.
    size: usize,
    at: u64,
}

/// Reads the command's arguments.
pub(crate) fn parse(arguments: &str) -> Result<Examine, String> {
    let usage =
        || "xp [/COUNT][x|d|u|o|c][b|h|w|g] ADDRESS, for instance: xp /8xg 0x80200000".to_owned();
    let mut wanted = Examine { count: 1, form: 'x', size: 4, at: 0 };
    let mut rest = arguments.trim();
    if let Some(format) = rest.strip_prefix('/') {
        let (format, address) = format.split_once(char::is_whitespace).ok_or_else(usage)?;
        rest = address.trim();
        let digits = format.len() - format.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (count, letters) = format.split_at(digits);
        if !count.is_empty() {
            wanted.count = count.parse().map_err(|_| usage())?;
        }
        for letter in letters.chars() {
            match letter {
                'x' | 'd' | 'u' | 'o' => wanted.form = letter,
                'c' => (wanted.form, wanted.size) = ('c', 1),
                'b' => wanted.size = 1,
                'h' => wanted.size = 2,
                'w' => wanted.size = 4,
                'g' => wanted.size = 8,
                _ => return Err(usage()),
            }
        }
    }
    wanted.at = number(rest).ok_or_else(usage)?;
    let bytes = wanted.count.checked_mul(wanted.size as u64);
    match bytes.filter(|&bytes| (1..=BYTES_MAX).contains(&bytes)) {
        Some(bytes) if wanted.at.checked_add(bytes).is_some() => Ok(wanted),
        _ => Err(format!("xp shows 1 to {BYTES_MAX} bytes, all of them below the end of memory")),
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The memory in rows, up to where there is no RAM.
pub(crate) fn show(machine: &Machine, wanted: Examine) -> String {
    let mut data = vec![0; wanted.count as usize * wanted.size];
    let len = memory::read(machine, Space::Physical, wanted.at, &mut data);
    data.truncate(len - len % wanted.size);
    let mut text = String::new();
    for (row, at) in data.chunks(ROW_BYTES).zip((wanted.at..).step_by(ROW_BYTES)) {
        text.push_str(&format!("{at:#018x}:"));
        for word in row.chunks(wanted.size) {
            text.push(' ');
            text.push_str(&one(word, wanted.form));
        }
        text.push('\n');
    }
    if data.len() < wanted.count as usize * wanted.size {
        text.push_str(&format!("{:#x} is not RAM\n", wanted.at + data.len() as u64));
    }
    text
}

fn one(word: &[u8], form: char) -> String {
    let mut bytes = [0; 8];
    bytes[..word.len()].copy_from_slice(word);
    let value = u64::from_le_bytes(bytes);
    let unused = 64 - 8 * word.len() as u32;
    match form {
        'd' => format!("{}", (value << unused).cast_signed() >> unused),
        'u' => format!("{value}"),
        'o' => format!("{value:#o}"),
        'c' => format!("{:?}", char::from(word[0])),
        _ => format!("{value:#0width$x}", width = 2 + 2 * word.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{DATA, machine};
    use super::*;

    fn shown(arguments: &str) -> String {
        show(&machine(), parse(arguments).unwrap())
    }

    #[test]
    fn words_are_shown_as_asked_for() {
        assert_eq!(DATA, 0x8000_1000);
        let cases = [
            ("0x80001000", "0x0000000080001000: 0x44434241\n"),
            ("/2xg 0x80001000", "0x0000000080001000: 0xffffffff44434241 0x0000000000000000\n"),
            ("/1db 0x80001004", "0x0000000080001004: -1\n"),
            ("/2uh 2147487744", "0x0000000080001000: 16961 17475\n"),
            ("/3c 0x80001000", "0x0000000080001000: 'A' 'B' 'C'\n"),
            ("/ob 0x80001000", "0x0000000080001000: 0o101\n"),
        ];
        for (arguments, expected) in cases {
            assert_eq!(shown(arguments), expected, "{arguments}");
        }
        assert_eq!(shown("/17xb 0x80001000").lines().count(), 2);
    }

    #[test]
    fn what_is_not_ram_is_said_and_not_read() {
        assert_eq!(shown("/4xw 0x10000000"), "0x10000000 is not RAM\n");
        assert!(shown("/4xg 0x81fffff0").ends_with("0x82000000 is not RAM\n"));
        for bad in ["", "/", "/4xq 0", "x", "/0xw 0", "/99999xg 0", "/2xg 0xffffffffffffffff", "/x"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

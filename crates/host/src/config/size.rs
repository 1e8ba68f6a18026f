//! Sizes as people write them: `512M`, `2G`.

const UNITS: [(&str, u32); 5] = [("", 0), ("K", 10), ("M", 20), ("G", 30), ("T", 40)];

/// Bytes of a size such as `512M`: a number and one of `K`, `M`, `G`, `T` (powers of 1024), small or capital, with
/// `iB` or `B` behind it if wanted; a number alone is bytes.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("size {text:?} is not a number with K, M, G or T, such as \"512M\"");
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_uppercase();
    let unit = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
    let shift = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("size {text:?} is too big"))
}

/// A size in the biggest unit that divides it.
#[must_use]
pub fn render_size(bytes: u64) -> String {
    let fits = |(_, shift): &&(&str, u32)| bytes != 0 && bytes.is_multiple_of(1 << shift);
    let (name, shift) = UNITS.iter().rev().find(fits).unwrap_or(&UNITS[0]);
    format!("{}{name}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_rendered() {
        for (text, bytes) in
            [("0", 0), ("512M", 512 << 20), ("2G", 2 << 30), ("1k", 1024), ("3 GiB", 3 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "M", "-1M", "1.5G", "1X", "12MM", "99999999999T", "0x10"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(render_size(512 << 20), "512M");
        assert_eq!(render_size(1025), "1025");
        assert_eq!(render_size(0), "0");
    }
}

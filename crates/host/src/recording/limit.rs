//! How much a recording may keep.

use std::str::FromStr;
use std::time::Duration;

use crate::config::parse_size;

/// Most that a recording keeps; what is older is dropped, behind a snapshot. With both, the one that is reached first counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecordLimit {
    /// Bytes on the disk, of log and snapshots together.
    pub bytes: Option<u64>,
    /// The last of this time, at least.
    pub time: Option<Duration>,
}

impl RecordLimit {
    /// Whether everything is kept.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl FromStr for RecordLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(time) = parse_duration(text) {
            return Ok(Self { time: Some(time), bytes: None });
        }
        parse_size(text).map(|bytes| Self { bytes: Some(bytes), time: None }).map_err(|_| {
            format!("{text:?} is neither a size such as 2G nor a time such as 10m or 90s")
        })
    }
}

/// A time such as `1h30m`, `90s` or `250ms`: numbers with `h`, `m`, `s` or `ms`.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time such as 10m, 1m30s or 250ms");
    let (mut rest, mut total) = (text, Duration::ZERO);
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, tail) = tail.split_at(letters);
        let ms = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => return Err(wrong()),
        };
        let part = Duration::from_millis(number.checked_mul(ms).ok_or_else(wrong)?);
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = tail;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_sizes_or_times() {
        let bytes = |bytes| RecordLimit { bytes: Some(bytes), time: None };
        let ms = |ms| RecordLimit { time: Some(Duration::from_millis(ms)), bytes: None };
        for (text, limit) in [
            ("2G", bytes(2 << 30)),
            ("512M", bytes(512 << 20)),
            ("10m", ms(600_000)),
            ("1h30m", ms(5_400_000)),
            ("1m30s250ms", ms(90_250)),
        ] {
            assert_eq!(text.parse(), Ok(limit), "{text}");
        }
        for bad in ["", "m", "10x", "-1m", "1.5h", "99999999999999999999h", "18446744073709551615h"]
        {
            assert!(bad.parse::<RecordLimit>().is_err(), "{bad}");
        }
    }
}

//! Moments in a recording, as people name them.

use std::str::FromStr;
use std::time::Duration;

use super::limit::parse_duration;

/// A moment in a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// A step of the machine.
    Icount(u64),
    /// Guest time since the recording began.
    Elapsed(Duration),
    /// The guest's wall clock, in nanoseconds since the Unix epoch.
    Wall(u64),
}

/// A text that names no moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no step (a number), no time since the start (90s, 1m30s, 250ms) and no date (2026-01-31T12:00:00Z)"
)]
pub struct BadWhen(String);

impl FromStr for When {
    type Err = BadWhen;

    fn from_str(text: &str) -> Result<Self, BadWhen> {
        if let Ok(icount) = text.parse() {
            return Ok(Self::Icount(icount));
        }
        if let Ok(time) = parse_duration(text) {
            return Ok(Self::Elapsed(time));
        }
        parse_rfc3339(text).map(Self::Wall).ok_or_else(|| BadWhen(text.to_owned()))
    }
}

/// Days since 1970-01-01 of a date of the proleptic Gregorian calendar.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    // Years that begin in March have their leap day at the end.
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468
}

/// The date of a day, counted from 1970-01-01.
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

fn number(text: &str, digits: usize) -> Option<i64> {
    let is_number = text.len() == digits && text.bytes().all(|c| c.is_ascii_digit());
    is_number.then(|| text.parse().ok())?
}

fn parse_rfc3339(text: &str) -> Option<u64> {
    let (date, rest) = text.split_at_checked(10)?;
    let (time, zone) = rest.get(1..)?.split_at_checked(8)?;
    let date: Vec<&str> = date.split('-').collect();
    let time: Vec<&str> = time.split(':').collect();
    let ([year, month, day], [hour, minute, second]) = (date.as_slice(), time.as_slice()) else {
        return None;
    };
    let (year, month, day) = (number(year, 4)?, number(month, 2)?, number(day, 2)?);
    let (hour, minute, second) = (number(hour, 2)?, number(minute, 2)?, number(second, 2)?);
    let is_date = (1..=12).contains(&month) && (1..=31).contains(&day);
    let separator = *text.as_bytes().get(10)?;
    if !is_date
        || hour > 23
        || minute > 59
        || second > 60
        || !matches!(separator, b'T' | b't' | b' ')
    {
        return None;
    }
    let (nanos, zone) = match zone.strip_prefix('.') {
        Some(fraction) => {
            let digits =
                fraction.len() - fraction.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (digits, zone) = fraction.split_at(digits);
            if digits.is_empty() || digits.len() > 9 {
                return None;
            }
            (format!("{digits:0<9}").parse::<i64>().ok()?, zone)
        }
        None => (0, zone),
    };
    let offset_s = match zone {
        "Z" | "z" => 0,
        _ => {
            let (sign, zone) = zone.split_at_checked(1)?;
            let (hours, minutes) = zone.split_once(':')?;
            let seconds = number(hours, 2)? * 3600 + number(minutes, 2)? * 60;
            match sign {
                "+" => seconds,
                "-" => -seconds,
                _ => return None,
            }
        }
    };
    let seconds =
        days_of(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset_s;
    u64::try_from(seconds.checked_mul(1_000_000_000)?.checked_add(nanos)?).ok()
}

/// A moment, in milliseconds since the Unix epoch, as a date.
#[must_use]
pub fn rfc3339(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let (year, month, day) = date_of(i64::try_from(seconds / 86_400).unwrap_or(0));
    let s = seconds % 86_400;
    let (hour, minute, second) = (s / 3600, s / 60 % 60, s % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_steps_times_and_dates() {
        let wall = |text: &str| text.parse::<When>().unwrap();
        assert_eq!(wall("12345"), When::Icount(12345));
        assert_eq!(wall("1m30s"), When::Elapsed(Duration::from_secs(90)));
        assert_eq!(wall("1970-01-01T00:00:00Z"), When::Wall(0));
        assert_eq!(wall("2026-11-23T04:45:00.25Z"), When::Wall(1_795_409_100_250_000_000));
        assert_eq!(wall("2026-11-23T05:45:00.25+01:00"), wall("2026-11-23T04:45:00.25Z"));
        assert_eq!(wall("2024-02-29 23:59:59Z"), When::Wall(1_709_251_199_000_000_000));
        for bad in [
            "",
            "x",
            "2026-13-01T00:00:00Z",
            "2026-11-23",
            "2026-11-23T04:45:00",
            "1969-12-31T00:00:00Z",
        ] {
            assert!(bad.parse::<When>().is_err(), "{bad}");
        }
    }

    #[test]
    fn dates_are_written_as_they_are_read() {
        for day in 0..40_000u64 {
            let ms = day * 86_400_000 + 3_723_004;
            let text = rfc3339(ms);
            assert_eq!(text.parse(), Ok(When::Wall(ms * 1_000_000)), "{text}");
        }
        assert_eq!(rfc3339(1_795_409_100_250), "2026-11-23T04:45:00.250Z");
    }
}

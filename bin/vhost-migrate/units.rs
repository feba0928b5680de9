//! Sizes, rates and times on the command line, and sizes in output.

use std::time::Duration;

/// The unit letters, in the order of their powers of 1024.
const LETTERS: &str = "BKMGTPE";

const ZERO_TIME_ADVICE: &str = "nothing is done within no time: leave the option out for the usual limit";

/// Parses a size in bytes as `qemu-img` does: `4096`, `64K`, `1.5M`, `1G`, and also `64KiB`, `1GiB`. Units are powers
/// of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse(text).map(|(bytes, _)| bytes).ok_or_else(|| {
        format!("'{text}' is not a size: write for example 4096, 64K, 1.5M or 1G (powers of 1024; KiB, MiB and GiB mean the same)")
    })
}

/// Parses a rate in bytes per second: a size with a unit and an optional `/s`, for example `500MiB/s`, `1G/s` or `64K`.
/// A number alone is refused, because it is rarely meant as bytes. `0` is allowed.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let example = "write for example 500MiB/s, 1G/s or 4096B/s";
    match parse(text.strip_suffix("/s").unwrap_or(text)) {
        Some((bytes, has_unit)) if has_unit || bytes == 0 => Ok(bytes),
        Some(_) => Err(format!("'{text}' has no unit: {example}")),
        None => Err(format!("'{text}' is not a rate: {example}")),
    }
}

/// Parses a size that can't be 0.
pub(crate) fn nonzero_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("a size of 0 is none".into()),
        bytes => Ok(bytes),
    }
}

/// Parses a limit of a rate, which can't be 0.
pub(crate) fn rate_limit(text: &str) -> Result<u64, String> {
    match rate(text)? {
        0 => Err("a limit of 0 lets nothing pass: leave the option out for no limit".into()),
        bytes => Ok(bytes),
    }
}

/// Parses a time in milliseconds: `50`, `50ms` or `0.5s`.
pub(crate) fn milliseconds(text: &str) -> Result<u64, String> {
    let (number, factor) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1.0),
        (None, Some(number)) => (number, 1e3),
        (None, None) => (text, 1.0),
    };
    let value: Option<f64> = number.trim_end().parse().ok();
    // A longer time than a week is probably a mistake.
    let milliseconds = value.map(|value| value * factor).filter(|ms| (0.0..=604_800_000.0).contains(ms));
    milliseconds.map(|ms| ms.round() as u64).ok_or_else(|| {
        format!("'{text}' is not a time: write a number of milliseconds, for example 50, 50ms or 0.5s, up to a week")
    })
}

/// Parses a limit of a time in milliseconds, which can't be 0.
pub(crate) fn milliseconds_limit(text: &str) -> Result<u64, String> {
    match milliseconds(text)? {
        0 => Err(ZERO_TIME_ADVICE.into()),
        milliseconds => Ok(milliseconds),
    }
}

/// Parses a limit of a time in seconds, which can't be 0.
pub(crate) fn seconds_limit(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        Duration::ZERO => Err(ZERO_TIME_ADVICE.into()),
        time => Ok(time),
    }
}

/// Parses a time in seconds, fractions allowed, up to a day.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let value: Option<f64> = text.strip_suffix('s').unwrap_or(text).trim_end().parse().ok();
    value
        .filter(|seconds| (0.0..=86_400.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("'{text}' is not a time: write a number of seconds, for example 10 or 0.5, up to a day"))
}

/// Parses a number with or without a unit. Returns the bytes, and true if there is a unit.
fn parse(text: &str) -> Option<(u64, bool)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let unit = unit.trim_start();
    let letter = unit.strip_suffix("iB").filter(|letter| *letter != "B").unwrap_or(unit);
    let shift = match letter {
        "" if unit.is_empty() => 0,
        _ => 10 * LETTERS.find(letter.to_ascii_uppercase().as_str()).filter(|_| letter.len() == 1)?,
    };
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(1 << shift)?,
        Err(_) if number.contains('.') => {
            let bytes = number.parse::<f64>().ok()? * (1u64 << shift) as f64;
            (bytes < 9e18).then_some(bytes as u64)?
        }
        Err(_) => return None,
    };
    Some((bytes, !unit.is_empty()))
}

/// Formats a size: 1536 as `1.5 KiB`.
pub(crate) fn format_bytes(bytes: f64) -> String {
    let mut value = bytes;
    let mut units = ["B", "KiB", "MiB", "GiB"].into_iter();
    let unit = loop {
        let Some(unit) = units.next() else { break "TiB" };
        if value.abs() < 1024.0 {
            break unit;
        }
        value /= 1024.0;
    };
    if unit == "B" { format!("{value:.0} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_like_qemu_img() {
        let cases =
            [("4096", 4096), ("64K", 65536), ("64k", 65536), ("64KiB", 65536), ("1.5M", 1_572_864), ("1G", 1 << 30)];
        for (text, expected) in
            cases.into_iter().chain([("1GiB", 1 << 30), ("1T", 1 << 40), ("7 B", 7), ("7E", 7 << 60)])
        {
            assert_eq!(size(text), Ok(expected), "{text}");
        }
        for wrong in
            ["", "GiB", "-1", "1GB", "1e99", "nan", "12 parsecs", "1..5M", "1iB", "1BiB", "16E", "200MiB/s", "1KM"]
        {
            let message = size(wrong).unwrap_err();
            assert!(message.starts_with(&format!("'{wrong}' is not a size")), "{message}");
        }
    }

    #[test]
    fn a_rate_needs_a_unit() {
        for (text, expected) in [("500MiB/s", 500 << 20), ("1G/s", 1 << 30), ("64K", 65536), ("500B/s", 500), ("0", 0)]
        {
            assert_eq!(rate(text), Ok(expected), "{text}");
        }
        assert!(rate("500").unwrap_err().contains("'500' has no unit"));
        assert!(rate("500/s").unwrap_err().contains("has no unit"));
        assert!(rate("fast").unwrap_err().contains("is not a rate"));
        assert!(rate_limit("0").unwrap_err().contains("leave the option out"));
    }

    #[test]
    fn times_are_milliseconds_with_or_without_their_unit() {
        for (text, expected) in [("50", 50), ("50ms", 50), ("50 ms", 50), ("0.5s", 500), ("2s", 2000), ("0", 0)] {
            assert_eq!(milliseconds(text), Ok(expected), "{text}");
        }
        for wrong in ["", "ms", "-1", "fifty", "5m", "nan", "inf", "1e99s"] {
            assert!(milliseconds(wrong).unwrap_err().contains("is not a time"), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_reads_best() {
        let cases = [(0.0, "0 B"), (1023.0, "1023 B"), (1536.0, "1.5 KiB"), (f64::from(1u32 << 30), "1.0 GiB")];
        for (value, expected) in cases {
            assert_eq!(format_bytes(value), expected);
        }
        assert_eq!(format_bytes((1u64 << 52) as f64), "4096.0 TiB");
    }
}

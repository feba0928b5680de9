//! Sizes and rates as users write them, and as they like to read them.

/// Parses `4096`, `64KiB`, `1.5MiB`, `1GiB`, and with a trailing `/s` a rate, to bytes (per second).
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let number = text.strip_suffix("/s").unwrap_or(text).trim();
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("B", 0)];
    let (digits, shift) =
        units.iter().find_map(|(unit, shift)| Some((number.strip_suffix(unit)?, *shift))).unwrap_or((number, 0));
    let value: f64 = digits.trim().parse().map_err(|_| advice(text))?;
    let bytes = value * f64::from(1u32 << (shift % 32)) * if shift >= 32 { 4_294_967_296.0 } else { 1.0 };
    if !(0.0..=9e18).contains(&bytes) {
        return Err(advice(text));
    }
    Ok(bytes as u64)
}

fn advice(text: &str) -> String {
    format!("'{text}' is not a size: write for example 4096, 64KiB, 200MiB/s or 1GiB")
}

/// `1536` as `1.5 KiB`.
pub(crate) fn show(bytes: f64) -> String {
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
    fn sizes_parse_as_people_write_them() {
        let cases = [("4096", 4096), ("64KiB", 65536), ("1.5MiB", 1_572_864), ("200MiB/s", 209_715_200)];
        for (text, expected) in cases.into_iter().chain([("1GiB", 1 << 30), ("1TiB", 1 << 40), ("7 B", 7)]) {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for wrong in ["", "GiB", "-1", "1GB", "1e99", "nan", "12 parsecs"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_reads_best() {
        let cases = [(0.0, "0 B"), (1023.0, "1023 B"), (1536.0, "1.5 KiB"), (f64::from(1u32 << 30), "1.0 GiB")];
        for (value, expected) in cases {
            assert_eq!(show(value), expected);
        }
        assert_eq!(show((1u64 << 52) as f64), "4096.0 TiB");
    }
}

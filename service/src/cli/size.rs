//! Sizes, rates and times as people write and read them.

use std::fmt;
use std::str::FromStr;

/// Bytes, written with the binary suffixes K, M, G or T, or none.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is no size; write a whole number with K, M, G or T, like 512M");
        let last = text.chars().last().ok_or_else(wrong)?;
        let shift = match last.to_ascii_uppercase() {
            'K' => 10,
            'M' => 20,
            'G' => 30,
            'T' => 40,
            '0'..='9' => 0,
            _ => return Err(wrong()),
        };
        let digits = if shift == 0 {
            text
        } else {
            &text[..text.len() - 1]
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let too_big = || format!("`{text}` is too big");
        let number: u64 = digits.parse().map_err(|_| too_big())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_big)
    }
}

impl fmt::Display for Size {
    /// Three significant digits and a binary unit; exact with less than a KiB, and for whole units.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut unit = 0;
        while unit + 1 < UNITS.len() && self.0 >> (10 * (unit + 1)) > 0 {
            unit += 1;
        }
        let whole = self.0 >> (10 * unit);
        if whole << (10 * unit) == self.0 {
            return write!(f, "{whole} {}", UNITS[unit]);
        }
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let value = self.0 as f64 / (1_u64 << (10 * unit)) as f64;
        write!(f, "{} {}", three_digits(value), UNITS[unit])
    }
}

/// A pace: pages per second, or as fast as it goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DirtyRate(pub Option<u64>);

impl FromStr for DirtyRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Self(None));
        }
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse::<u64>() {
            Ok(rate) if digits && rate > 0 => Ok(Self(Some(rate))),
            _ => Err(format!(
                "`{text}` is no rate; write pages per second, at least 1, or `max`"
            )),
        }
    }
}

impl fmt::Display for DirtyRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => write!(f, "{rate}"),
            None => f.write_str("max"),
        }
    }
}

/// Microseconds as a reader likes them: `850 µs`, `12.3 ms`, `1.24 s`.
pub(crate) fn duration(us: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = us as f64;
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", three_digits(value / 1e3)),
        _ => format!("{} s", three_digits(value / 1e6)),
    }
}

/// Bytes in so many microseconds, per second.
pub(crate) fn rate(bytes: u64, us: u64) -> Size {
    let per_second = u128::from(bytes) * 1_000_000 / u128::from(us.max(1));
    Size(u64::try_from(per_second).unwrap_or(u64::MAX))
}

fn three_digits(value: f64) -> String {
    match value {
        0.0..9.995 => format!("{value:.2}"),
        0.0..99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("64M", 64 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
    }

    #[test]
    fn what_is_no_size_says_how_to_write_one() {
        for text in [
            "", "M", "1.5G", "-1", "+1", "1 G", "1GiB", "1Ω", "0x10", "１G",
        ] {
            assert!(
                text.parse::<Size>().unwrap_err().contains("like 512M"),
                "{text}"
            );
        }
        for text in ["99999999999999999999", "99999999T"] {
            assert!(text.parse::<Size>().unwrap_err().contains("too big"));
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 30, "1 GiB"),
            (1 << 20 | 1 << 19, "1.50 MiB"),
            ((20 << 20) + 1, "20.0 MiB"),
            ((612 << 20) + 5000, "612 MiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn rates_are_pages_per_second_or_max() {
        assert_eq!("max".parse(), Ok(DirtyRate(None)));
        assert_eq!("1000".parse(), Ok(DirtyRate(Some(1000))));
        for text in ["0", "", "MAX", "-1", "1.5", "+5"] {
            assert!(text.parse::<DirtyRate>().is_err(), "{text}");
        }
        assert_eq!(rate(1 << 30, 500_000), Size(2 << 30));
        assert_eq!(rate(5, 0), Size(5_000_000));
    }

    #[test]
    fn times_are_shown_with_three_digits() {
        for (us, text) in [
            (0, "0 µs"),
            (999, "999 µs"),
            (12_340, "12.3 ms"),
            (999_960, "1000 ms"),
            (1_240_000, "1.24 s"),
        ] {
            assert_eq!(duration(us), text);
        }
    }
}

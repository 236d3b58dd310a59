//! Numbers for people: units that fit the largest value of an axis, and ticks that are round in that unit.

/// What an axis measures, and how its numbers are divided to be short.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    /// As written behind numbers.
    pub(super) unit: &'static str,
    /// One of the unit, in bytes, bytes per second, microseconds or percent.
    pub(super) size: f64,
}

/// What a plot shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Quantity {
    Bytes,
    BytesPerSecond,
    Percent,
}

impl Quantity {
    /// The scale in which `max` has one to four digits.
    pub(super) fn scale(self, max: f64) -> Scale {
        const BYTES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        const RATES: [&str; 5] = ["B/s", "KiB/s", "MiB/s", "GiB/s", "TiB/s"];
        let names = match self {
            Self::Percent => {
                return Scale {
                    unit: "%",
                    size: 1.0,
                };
            }
            Self::Bytes => BYTES,
            Self::BytesPerSecond => RATES,
        };
        let mut scale = Scale {
            unit: names[0],
            size: 1.0,
        };
        for unit in &names[1..] {
            // 1024 MiB are easier to read than 1.0 GiB beside 0.2 GiB.
            if max < scale.size * 1024.0 * 2.0 {
                break;
            }
            scale = Scale {
                unit,
                size: scale.size * 1024.0,
            };
        }
        scale
    }
}

/// The scale for times up to `max_us`.
pub(super) fn time_scale(max_us: u64) -> Scale {
    let (unit, size) = match max_us {
        0..2_000 => ("µs", 1.0),
        2_000..2_000_000 => ("ms", 1e3),
        2_000_000..300_000_000 => ("s", 1e6),
        300_000_000..18_000_000_000 => ("min", 60e6),
        _ => ("h", 3600e6),
    };
    Scale { unit, size }
}

/// Where an axis from 0 to `max` has its marks: about `wanted` of them, 1, 2 or 5 times a power of ten apart.
pub(super) fn ticks(max: f64, wanted: f64) -> Vec<f64> {
    if !(max > 0.0 && max.is_finite()) {
        return vec![0.0];
    }
    let rough = max / wanted;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(rough);
    let mut marks = Vec::new();
    let mut number = 0.0;
    while number * step <= max * 1.0001 && marks.len() < 64 {
        marks.push(number * step);
        number += 1.0;
    }
    marks
}

/// The end of an axis that has to reach `max`: a little above it, so that a line at the top is seen.
pub(super) fn axis_end(max: f64) -> f64 {
    if max > 0.0 && max.is_finite() {
        max * 1.06
    } else {
        1.0
    }
}

/// A number in three significant digits, without an exponent and without zeros that say nothing.
pub(super) fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[expect(clippy::cast_precision_loss, reason = "for a plot")]
pub(super) fn real(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_fit_the_largest_value() {
        for (max, unit) in [
            (0.0, "B/s"),
            (2000.0, "B/s"),
            (3000.0, "KiB/s"),
            (1.5e9, "MiB/s"),
            (5e9, "GiB/s"),
            (1e30, "TiB/s"),
        ] {
            assert_eq!(Quantity::BytesPerSecond.scale(max).unit, unit, "{max}");
        }
        assert_eq!(time_scale(170_000).unit, "ms");
        assert_eq!(time_scale(90_000_000).unit, "s");
        assert_eq!(time_scale(u64::MAX).unit, "h");
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(10.0, 5.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.3, 3.0).len(), 4);
        for max in [1e-9, 0.7, 1.0, 3.3, 99.0, 1234.5, 1e18] {
            let marks = ticks(max, 5.0);
            assert!((3..=9).contains(&marks.len()), "{max}: {marks:?}");
        }
        for max in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(ticks(max, 5.0), [0.0]);
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (1234.4, "1234"),
            (12.34, "12.3"),
            (2.0, "2"),
            (0.5, "0.5"),
            (0.0004, "0"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}

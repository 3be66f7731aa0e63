//! Numbers with units: `1h30m`, `64KiB`.

use std::time::Duration;

/// What is longer is a slip: some other unit was meant.
pub(super) const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 3600);

/// Reads `30s`, `1.5h`, `1h 30m`: units from the longest to the shortest, each once. A number alone is seconds.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if let Some(number) = Number::all_of(rest) {
        return number.times(Duration::from_secs(1));
    }
    let mut sum = Duration::ZERO;
    let mut shorter_than = Duration::MAX;
    while !rest.is_empty() {
        let (number, after) = Number::first_of(rest)?;
        let after = after.trim_start();
        let end = after
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit = match unit.to_ascii_lowercase().as_str() {
            "ms" | "millisecond" | "milliseconds" => Duration::from_millis(1),
            "s" | "sec" | "second" | "seconds" => Duration::from_secs(1),
            "m" | "min" | "minute" | "minutes" => Duration::from_secs(60),
            "h" | "hour" | "hours" => Duration::from_secs(3600),
            "d" | "day" | "days" => Duration::from_secs(24 * 3600),
            _ => return None,
        };
        if unit >= shorter_than {
            return None;
        }
        shorter_than = unit;
        sum = sum.checked_add(number.times(unit)?)?;
        rest = after.trim_start();
    }
    (shorter_than != Duration::MAX).then_some(sum)
}

/// Reads `1048576`, `64KiB`, `2 MB`. `K`, `M` and `G` alone are not known: they mean 1000 to some, and 1024 to others.
pub(super) fn bytes(text: &str) -> Option<usize> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit: usize = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(unit)
}

/// Digits, with a decimal point among them perhaps.
struct Number<'a>(&'a str);

impl<'a> Number<'a> {
    fn all_of(text: &'a str) -> Option<Self> {
        match Self::first_of(text)? {
            (number, "") => Some(number),
            _ => None,
        }
    }

    fn first_of(text: &'a str) -> Option<(Self, &'a str)> {
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, rest) = text.split_at(end);
        let is_number = number.starts_with(|c: char| c.is_ascii_digit())
            && number.ends_with(|c: char| c.is_ascii_digit())
            && number.matches('.').count() <= 1;
        is_number.then_some((Self(number), rest))
    }

    fn times(&self, unit: Duration) -> Option<Duration> {
        if let Ok(number) = self.0.parse::<u32>() {
            return unit.checked_mul(number);
        }
        let seconds = self.0.parse::<f64>().ok()? * unit.as_secs_f64();
        Duration::try_from_secs_f64(seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_in_their_order() {
        for (text, millis) in [
            ("30", 30_000),
            ("0.1", 100),
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000),
            (" 30 s ", 30_000),
            ("30 seconds", 30_000),
            ("100ms", 100),
            ("1.5h", 5_400_000),
            ("1h30m", 5_400_000),
            ("1h 30min", 5_400_000),
            ("1d 1ms", 86_400_001),
            ("5000000000ms", 5_000_000_000),
        ] {
            assert_eq!(
                duration(text),
                Some(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for text in [
            "",
            "s",
            "-1",
            "-1s",
            "+1s",
            "1,5s",
            "1.s",
            ".5",
            "1..5s",
            "30x",
            "30m1h",
            "1h1h",
            "1h30",
            "1e3",
            "inf",
            "nan",
            "NaNs",
            "1h-1m",
            "٣s",
            "99999999999999999999999d",
        ] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn bytes_have_units_that_mean_one_thing() {
        for (text, number) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("1MiB", 1 << 20),
            ("64 KiB", 65_536),
            ("2mb", 2_000_000),
            ("512 B", 512),
        ] {
            assert_eq!(bytes(text), Some(number), "{text}");
        }
        for text in [
            "",
            "B",
            "1K",
            "1M",
            "-1",
            "1.5MiB",
            "1 MiB2",
            "99999999999GiB",
            "1MiBs",
        ] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }
}

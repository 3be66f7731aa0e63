//! Numbers with units: `1h30m`, `64KiB`.

use std::time::Duration;

/// The longest duration: whoever writes a longer one meant another unit.
pub(super) const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 3600);

/// Reads `30s`, `1.5h`, `1h 30m`: units from the longest to the shortest, each once. A number alone is seconds.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut sum = Duration::ZERO;
    let mut last_unit = f64::INFINITY;
    loop {
        let (number, after) = split(rest, |c| c.is_ascii_digit() || c == '.');
        let (unit, after) = split(after.trim_start(), |c| c.is_ascii_alphabetic());
        let millis = match unit.to_ascii_lowercase().as_str() {
            "" if number == text.trim() => 1000.0,
            "ms" | "millisecond" | "milliseconds" => 1.0,
            "s" | "sec" | "second" | "seconds" => 1000.0,
            "m" | "min" | "minute" | "minutes" => 60_000.0,
            "h" | "hour" | "hours" => 3_600_000.0,
            "d" | "day" | "days" => 86_400_000.0,
            _ => return None,
        };
        let is_digit = |c: char| c.is_ascii_digit();
        if millis >= last_unit || !number.starts_with(is_digit) || !number.ends_with(is_digit) {
            return None;
        }
        last_unit = millis;
        let seconds = number.parse::<f64>().ok()? * millis / 1000.0;
        sum = sum.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        rest = after.trim_start();
        if rest.is_empty() {
            return Some(sum);
        }
    }
}

/// Reads `1048576`, `64KiB`, `2 MB`. `K`, `M` and `G` alone are refused: to some they mean 1000, and to others 1024.
pub(super) fn bytes(text: &str) -> Option<usize> {
    let (number, unit) = split(text.trim(), |c| c.is_ascii_digit());
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

/// What `text` begins with, as long as `belongs` says so, and the rest.
fn split(text: &str, belongs: fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !belongs(c)).unwrap_or(text.len()))
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

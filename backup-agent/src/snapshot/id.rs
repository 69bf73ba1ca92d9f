//! Names that sort by time: `20260102T030405006Z-89abcdef`.

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};

/// The time now, in milliseconds, as an id has it and as RFC 3339.
pub fn now() -> (String, String) {
    let now = Timestamp::now();
    let text = |format| now.to_zoned(TimeZone::UTC).strftime(format).to_string();
    (text("%Y%m%dT%H%M%S%3fZ"), text("%Y-%m-%dT%H:%M:%S.%3fZ"))
}

/// A new id for a snapshot or a layer and the time it stands for, in RFC 3339.
pub fn new() -> Result<(String, String), std::io::Error> {
    let (time, rfc3339) = now();
    Ok((format!("{time}-{}", random_hex::<4>()?), rfc3339))
}

/// The UTC time in an id, or in RFC 3339 as S3 writes it: the digits from year to milliseconds, whatever is between them.
/// `None` where they are no time.
pub fn time(text: &str) -> Option<Timestamp> {
    let mut digits = text.bytes().filter(u8::is_ascii_digit);
    let mut number = |length| {
        (0..length).try_fold(0, |number, _| {
            Some(10 * number + i16::from(digits.next()? - b'0'))
        })
    };
    let year = number(4)?;
    let mut small = || i8::try_from(number(2)?).ok();
    let date = [small()?, small()?];
    let clock = [small()?, small()?, small()?];
    let nanos = i32::from(number(3).unwrap_or_default()) * 1_000_000;
    let time = DateTime::new(year, date[0], date[1], clock[0], clock[1], clock[2], nanos);
    TimeZone::UTC.to_timestamp(time.ok()?).ok()
}

/// `N` random bytes in hexadecimal.
pub fn random_hex<const N: usize>() -> Result<String, std::io::Error> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(hex(&bytes))
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from(DIGITS[usize::from(digit)]));
        }
    }
    text
}

/// Bytes from their hexadecimal, in lower case and of just that length.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// Whether the text has the form of an id. Ids become keys and file names, so nothing else may pass.
pub fn is_valid(text: &str) -> bool {
    let Some((time, suffix)) = text.split_once('-') else {
        return false;
    };
    time.len() == 19
        && time.bytes().enumerate().all(|(at, byte)| match at {
            8 => byte == b'T',
            18 => byte == b'Z',
            _ => byte.is_ascii_digit(),
        })
        && suffix.len() == 8
        && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_valid_unique_and_sort_by_time() {
        let (first, time) = new().expect("the kernel has random bytes");
        let (second, _) = new().expect("the kernel has random bytes");
        assert!(is_valid(&first), "{first}");
        assert_ne!(first, second);
        assert!(first[..19] <= second[..19]);
        assert_eq!(time.len(), "2026-01-02T03:04:05.006Z".len());
        let parsed = time.parse::<Timestamp>().expect("it is RFC 3339");
        for text in [&first, &time] {
            assert_eq!(super::time(text), Some(parsed));
        }
        let whole = "2026-01-02T03:04:05Z";
        assert_eq!(super::time(whole), whole.parse().ok());
    }

    #[test]
    fn bytes_come_back_from_their_hexadecimal_and_from_nothing_else() {
        let bytes = [0, 1, 0x7f, 0xa9, 0xff];
        assert_eq!(hex(&bytes), "00017fa9ff");
        assert_eq!(unhex("00017fa9ff"), Some(bytes));
        for bad in [
            "",
            "00017fa9f",
            "00017fa9ff0",
            "00017fa9ff00",
            "00017FA9FF",
            "00017fa9g0",
            "+0017fa9ff",
        ] {
            assert_eq!(unhex::<5>(bad), None, "{bad}");
        }
    }

    #[test]
    fn digits_that_are_no_time_have_none() {
        for bad in [
            "20261301T000000000Z-89abcdef",
            "20260101T250000000Z-89abcdef",
            "latest",
        ] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_could_leave_the_prefix_is_no_id() {
        for bad in [
            "",
            "latest",
            "../../etc/passwd",
            "20260102T030405006Z",
            "20260102T030405006Z-89abcde/",
            "20260102T030405006Z-89abcdef0",
            "20260102X030405006Z-89abcdef",
        ] {
            assert!(!is_valid(bad), "{bad}");
        }
        assert!(is_valid("20260102T030405006Z-89abcdef"));
    }
}

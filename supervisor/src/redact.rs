//! Takes secrets out of what the gateway wrote before it failed: the values that we know, in whatever way they are escaped, and
//! keys that can be told by their shape.

use crate::log::terminal::{is_invisible, sequence};
use crate::secret::REDACTED;

/// A variable with one of these in its name, in any case and without `_` and `-`, holds a secret.
const NAMES: &str = "secret passw pwd passphrase passcode apikey privatekey";

/// Likewise with one of these at the end, numbers aside: `ENCRYPTION_KEY_2`.
const ENDS: &str = "key keys pass pin pw";

/// Likewise, unless its value is a short word or number: `MAX_TOKENS=4096`.
const VAGUE: &str = "token credential creds auth cookie session signature bearer";
const LONGEST_WORD: usize = 7;

/// How keys of well-known services begin.
const PREFIXES: &str = "sk- pk- rk_ sk_ ghp_ gho_ github_pat_ xox AKIA ASIA AIza eyJ";
const SHORTEST_KEY: usize = 8;

/// Shorter values are words and numbers that stand everywhere.
const SHORTEST_VALUE: usize = 4;

/// Whether a variable is to be hidden.
pub fn is_secret(name: &str, value: &str) -> bool {
    let name = name.replace('-', "_").to_ascii_lowercase();
    let joined = name.replace('_', "");
    let has = |words: &str| words.split(' ').any(|word| joined.contains(word));
    let stem = |text| str::trim_end_matches(text, |c: char| c.is_ascii_digit());
    let mut ends = ENDS.split(' ');
    let mut parts = name.split('_');
    let is_word = value.len() <= LONGEST_WORD
        && (value.chars().all(|c| c.is_ascii_lowercase())
            || value.chars().all(|c| c.is_ascii_digit()));
    has(NAMES)
        || ends.any(|end| stem(&joined).ends_with(end))
        || parts.any(|part| stem(part) == "key")
        || has(VAGUE) && !is_word
}

/// The last `shown` bytes of `text`, without the values in `known` and without keys.
pub fn redact(text: &[u8], shown: usize, known: &[&str]) -> String {
    let (before, after) = text.split_at(text.len().saturating_sub(shown));
    let before = plain(&String::from_utf8_lossy(before));
    let text = plain(&String::from_utf8_lossy(text));
    let mut known = known.to_vec();
    known.retain(|value| value.len() >= SHORTEST_VALUE);
    // One may be a part of another.
    known.sort_by_key(|value| std::cmp::Reverse(value.len()));
    // From here on it is shown.
    let begin = text.floor_char_boundary(before.len().min(text.len()));
    let mut rest = text.as_str();
    let mut clean = String::with_capacity(after.len());
    let mut is_start = true;
    while let Some(next) = rest.chars().next() {
        let mut likely = known.iter().filter(|value| may_begin(rest, value));
        let value = likely.find_map(|value| length(rest, value));
        let found = value.map(|value| (0, value));
        let found = found.or_else(|| key(rest, is_start));
        let (kept, gone) = found.unwrap_or((next.len_utf8(), 0));
        let at = text.len() - rest.len();
        let unshown = begin.saturating_sub(at).min(kept);
        clean.push_str(&rest[rest.ceil_char_boundary(unshown).min(kept)..kept]);
        if gone > 0 && at + kept + gone > begin {
            clean.push_str(REDACTED);
        }
        is_start = gone > 0 || !next.is_ascii_alphanumeric();
        rest = &rest[kept + gone..];
    }
    clean
}

/// Without what a terminal does not show, which may stand inside of anything, and other control characters.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let hidden = sequence(rest.as_bytes());
        let is_shown = matches!(c, '\n' | '\t') || !c.is_control() && !is_invisible(c);
        if hidden == 0 && is_shown {
            plain.push(c);
        }
        rest = &rest[rest.ceil_char_boundary(hidden.max(c.len_utf8()))..];
    }
    plain
}

/// A quick look: whether the first character is that of `value`, or may be an escaped one.
fn may_begin(text: &str, value: &str) -> bool {
    let (text, value) = (text.as_bytes()[0], value.as_bytes()[0]);
    text == value || b"%\\'+".contains(&text) || value.is_ascii_control()
}

/// How long `value` is at the beginning of `text`, if it is there.
fn length(text: &str, value: &str) -> Option<usize> {
    let as_it_is = text.strip_prefix(value);
    let rest = as_it_is.or_else(|| value.chars().try_fold(text, after))?;
    Some(text.len() - rest.len())
}

/// `text` after `c`, which may be written as in an address (`%2F`, `+`), in JSON, by Node.js or in a shell (`\n`, `\'`, `\x2f`,
/// `\u002f`), and escaped again, which makes more backslashes and percent signs.
fn after(text: &str, c: char) -> Option<&str> {
    let bare = without_backslashes(text);
    let escaped = Some(bare).filter(|bare| bare.len() < text.len());
    let letter = match c {
        '\n' => Some('n'),
        '\t' => Some('t'),
        '\r' => Some('r'),
        _ => None,
    };
    let (bytes, units) = (&mut [0; 4], &mut [0; 2]);
    coded(text, '%', 2, c.encode_utf8(bytes).bytes().map(u32::from))
        .or_else(|| {
            coded(
                escaped?,
                'u',
                4,
                c.encode_utf16(units).iter().copied().map(u32::from),
            )
        })
        .or_else(|| coded(escaped?, 'x', 2, [u32::from(c)].into_iter()))
        .or_else(|| text.strip_prefix("'\\''").filter(|_| c == '\''))
        .or_else(|| text.strip_prefix(c))
        .or_else(|| bare.strip_prefix(c))
        .or_else(|| escaped?.strip_prefix(letter?))
        .or_else(|| text.strip_prefix('+').filter(|_| c == ' '))
        // `plain` has removed it.
        .or_else(|| c.is_control().then_some(text))
}

/// Without as many as escaping thrice makes of one; not all, since there may be thousands at every place.
fn without_backslashes(text: &str) -> &str {
    let count = text.bytes().take(8).take_while(|byte| *byte == b'\\');
    &text[count.count()..]
}

/// `text` after each of `numbers`, written as `mark` and so many hexadecimal digits.
fn coded(
    text: &str,
    mark: char,
    width: usize,
    mut numbers: impl Iterator<Item = u32>,
) -> Option<&str> {
    numbers.try_fold(text, |text, number| {
        let mut digits = without_backslashes(text).strip_prefix(mark)?;
        while u32::from_str_radix(digits.get(..width)?, 16) != Ok(number) {
            digits = digits.strip_prefix("25")?;
        }
        Some(&digits[width..])
    })
}

/// How much stands before a key at the beginning of `text`, and how long the key is.
fn key(text: &str, is_start: bool) -> Option<(usize, usize)> {
    let until = |text: &str, ends: &str| {
        let end = text.find(|c: char| c.is_whitespace() || ends.contains(c));
        end.unwrap_or(text.len())
    };
    if let Some(address) = text.strip_prefix("://") {
        return Some((3, address[..until(address, "/\"'")].rfind('@')?));
    }
    for scheme in ["bearer ", "basic "] {
        let begin = text.get(..scheme.len());
        if begin.is_some_and(|begin| begin.eq_ignore_ascii_case(scheme)) {
            let key = until(&text[scheme.len()..], "\"',;)}]\\");
            return Some((scheme.len(), key));
        }
    }
    let has_prefix = |prefix| is_start && text.starts_with(prefix);
    PREFIXES.split(' ').find(|prefix| has_prefix(*prefix))?;
    let is_of_key = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let length = text.find(|c| !is_of_key(c)).unwrap_or(text.len());
    (length >= SHORTEST_KEY).then_some((0, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str) -> String {
        redact(
            text.as_bytes(),
            text.len(),
            &["hunter2 and", "multi\nline \"value\""],
        )
    }

    #[test]
    fn keys_are_told_by_their_shape() {
        for secret in [
            "sk-proj-4f8Aq2",
            "sk-ant-api03-x9",
            "ghp_16C7e42F292c69",
            "xoxb-12345-abc",
            "AKIAIOSFODNN7EXAMPLE",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N",
        ] {
            for line in [
                format!("refused {secret} at once"),
                format!("[{secret}]"),
                format!("x={secret}&y"),
                format!("{{\"v\":\"{secret}\"}}"),
                format!("https://h.example/{secret}?a=1"),
                secret.to_owned(),
                format!(
                    "\u{1b}[31m{}\u{1b}[1m{}\u{1b}[0m",
                    &secret[..9],
                    &secret[9..]
                ),
            ] {
                let clean = clean(&line);
                assert!(
                    !clean.contains(&secret[secret.len() - 6..]),
                    "{line}: {clean}"
                );
                assert!(clean.contains(REDACTED), "{line}: {clean}");
            }
        }
        for line in [
            "Authorization: Bearer swordfish",
            "bearer swordfish",
            "{\\\"a\\\":\\\"Basic swordfish\\\"}",
            "postgres://user:swordfish@db:5432/x",
            "postgres://user:p@swordfish@db:5432/x",
            "redis://:swordfish@db",
        ] {
            let clean = clean(line);
            assert!(
                !clean.contains("swordfish") && clean.contains(REDACTED),
                "{line}: {clean}"
            );
        }
    }

    #[test]
    fn what_is_known_goes_however_it_is_escaped() {
        let values = [
            "p@ss/word+x y",
            "k'ey with \"a\" quote",
            "back\\slash\\",
            "100%25%of it",
            "multi\nline\r\n\tvalue",
            "gr\u{fc}\u{df}e \u{1f511}",
            "C:\\new\\table",
        ];
        let percent = |value: &str, keep: fn(u8) -> bool| {
            let one = |byte: u8| {
                if keep(byte) {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02x}")
                }
            };
            value.bytes().map(one).collect::<String>()
        };
        let json = |value: &str| {
            serde_json::Value::from(value)
                .to_string()
                .trim_matches('"')
                .to_owned()
        };
        for value in values {
            let component = percent(value, |byte| {
                byte.is_ascii_alphanumeric() || b"-_.!~*'()".contains(&byte)
            });
            let units = value.encode_utf16();
            let ascii: Vec<_> = units.map(|unit| format!("\\u{unit:04X}")).collect();
            for form in [
                value.to_owned(),
                percent(value, |_| false).to_uppercase(),
                percent(value, |_| false),
                percent(&component.replace("%25", "%"), |byte| {
                    byte.is_ascii_alphanumeric()
                }),
                component.replace("%20", "+"),
                component,
                json(value),
                json(&json(value)),
                json(value).replace('/', "\\/"),
                ascii.concat(),
                value
                    .replace('\\', "\\\\")
                    .replace('\'', "\\'")
                    .replace('\n', "\\n")
                    .replace('\r', "\\r")
                    .replace('\t', "\\t"),
                value.replace('\'', "'\\''"),
                value
                    .chars()
                    .map(|c| {
                        if c.is_ascii() {
                            format!("\\x{:02x}", u32::from(c))
                        } else {
                            c.to_string()
                        }
                    })
                    .collect(),
            ] {
                let text = format!("before '{form}' after");
                let clean = redact(text.as_bytes(), text.len(), &[value]);
                // Escaped, the last character may be a backslash more.
                let clean = clean.replace('\\', "");
                assert_eq!(clean, "before '[redacted]' after", "{form}");
            }
        }
        assert_eq!(clean("xhunter2 andy"), "x[redacted]y");
        assert_eq!(clean("a multi\nline \"value\" b"), "a [redacted] b");
    }

    #[test]
    fn a_secret_goes_wherever_what_is_shown_begins() {
        let value = "\u{e4}\u{f6} top-----secret\nphrase \"x\" \u{1f511}";
        let json = serde_json::Value::from(value).to_string();
        let red: Vec<String> = value.chars().map(|c| format!("\u{1b}[31m{c}")).collect();
        let red = red.concat();
        for form in [value, &json[1..json.len() - 1], &red] {
            let text = format!("before {form} rest of it");
            for shown in 0..=text.len() {
                let clean = redact(text.as_bytes(), shown, &[value]);
                let mut parts = "before [redacted] rest of it".match_indices("");
                let is_end = |(at, _): (usize, &str)| clean == "before [redacted] rest of it"[at..];
                assert!(parts.any(is_end), "{shown}: {clean}");
            }
        }
    }

    #[test]
    fn names_of_secrets_are_told_from_others() {
        for name in [
            "SMTP_PASS",
            "DB_PASSWORD",
            "API_PIN",
            "OPENAI_API_KEY",
            "ENCRYPTION_KEY_2",
            "KEY3",
            "GH_TOKEN",
            "api-key",
            "MY_SECRET_1",
            "PGPASS2",
            "PROVIDER_API_KEYS",
            "PROVIDER_KEY_PROD",
            "AUTH_MODE",
        ] {
            assert!(is_secret(name, "swordfish"), "{name}");
        }
        for name in [
            "HOME",
            "PATH",
            "KEYBOARD",
            "PINNED_VERSION",
            "PASSES",
            "LANG",
            "NODE_ENV",
        ] {
            assert!(!is_secret(name, "swordfish"), "{name}");
        }
        for (name, value, is_it) in [
            ("MAX_TOKENS", "4096", false),
            ("AUTH_MODE", "token", false),
            ("GH_TOKEN", "abc1234", true),
            ("API_PIN", "8472", true),
            ("SMTP_PASS", "hunter", true),
        ] {
            assert_eq!(is_secret(name, value), is_it, "{name}");
        }
    }

    #[test]
    fn what_a_person_needs_stays() {
        for line in [
            "Error: Cannot find module '/usr/lib/node_modules/thing/dist/entry.js'\n",
            "    at Module._load (node:internal/modules/cjs/loader:1104:27)\n",
            "2026-11-22T09:00:45.123Z [gateway] listen EADDRINUSE: address already in use 127.0.0.1:18789\n",
            "SqliteError: database disk image is malformed (code 11, SQLITE_CORRUPT_INDEX)\n",
            "{\"level\":\"error\",\"code\":\"ERR_DLOPEN_FAILED\",\"pid\":42}\n",
            "invalid configuration: gateway.port must be a number, got \"abc\"\n",
            "cannot reach https://h.example/login?u=bob@h.example\n",
            "Node.js v26.12.1\n",
        ] {
            assert_eq!(clean(line), line);
        }
        assert_eq!(clean("a\u{7}\u{1b}[2Kb\r\n\tc"), "ab\n\tc");
    }

    #[test]
    fn any_bytes_are_text_in_the_end() {
        let mut state = 1_u64;
        let noise = |state: &mut u64| {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_be_bytes()[0]
        };
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..200).map(|_| noise(&mut state)).collect();
            let clean = redact(&bytes, 150, &["\u{e9}\u{e9}\u{e9}\u{e9}"]);
            assert!(!clean.contains('\u{1b}'));
        }
    }
}

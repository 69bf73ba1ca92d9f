//! Takes out of text whatever looks like a secret: for what the gateway wrote before it failed, which nobody has checked.
//!
//! What is known goes wherever it is; beyond that it is a matter of looks, and a word too many is gone rather than one too
//! few: values after names that sound like it, credentials after their scheme, and long runs that no language has.

mod looks;

use crate::secret::REDACTED;
pub use looks::is_secret_name;
use looks::redact_run;

/// What may stand between a scheme and its credential.
const SCHEMES: [&str; 3] = ["bearer", "basic", "token"];

/// Shorter values are words and numbers that stand everywhere.
const MIN_KNOWN: usize = 4;

/// `text` without what is in `known` and what looks like a secret. `is_cut`: what came before it is not there, so that it may
/// begin in the middle of one.
pub fn redact(text: &[u8], is_cut: bool, known: &[&str]) -> String {
    let mut text = plain(&String::from_utf8_lossy(text));
    let mut known: Vec<&str> = known
        .iter()
        .copied()
        .filter(|one| one.len() >= MIN_KNOWN)
        .collect();
    // One may be a part of another.
    known.sort_by_key(|one| std::cmp::Reverse(one.len()));
    if is_cut {
        text = without_rest(&text, &known).to_owned();
    }
    for secret in known {
        let escaped = serde_json::Value::from(secret).to_string();
        for form in [secret, &escaped[1..escaped.len() - 1]] {
            if text.contains(form) {
                text = text.replace(form, REDACTED);
            }
        }
    }
    text.split_inclusive('\n').map(redact_line).collect()
}

/// Without the codes of terminals, which could stand in the middle of anything, and other control characters.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' => {
                if rest.next() == Some('[') {
                    let _ = rest.find(|c| ('@'..='~').contains(c));
                }
            }
            '\n' | '\t' => plain.push(c),
            c if c.is_control() => {}
            c => plain.push(c),
        }
    }
    plain
}

/// The longest end of a known secret that `text` begins with is taken off.
fn without_rest<'a>(text: &'a str, known: &[&str]) -> &'a str {
    let ends = known.iter().flat_map(|secret| {
        let starts = secret.char_indices().skip(1).map(|(at, _)| at);
        starts.filter_map(|at| text.strip_prefix(&secret[at..]))
    });
    let rest = ends.min_by_key(|rest| rest.len()).unwrap_or(text);
    // A long run may be the end of one that is not known.
    rest.trim_start_matches(is_of_run)
}

fn is_of_run(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-+/=.~".contains(c)
}

fn redact_line(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    // What the last word makes of the next one.
    let mut is_secret = false;
    while !rest.is_empty() {
        let gap = rest.find(is_of_run).unwrap_or(rest.len());
        let (between, after) = rest.split_at(gap);
        clean.push_str(between);
        let length = after.find(|c| !is_of_run(c)).unwrap_or(after.len());
        let (run, after) = after.split_at(length);
        rest = after;
        if run.is_empty() {
            break;
        }
        // `user:password@host` of an address.
        if let Some(user) = run.strip_prefix("//").filter(|_| clean.ends_with(':'))
            && let Some(at) = user_end(user, rest)
        {
            clean.push_str("//");
            clean.push_str(REDACTED);
            rest = &rest[at..];
            continue;
        }
        if run.chars().all(|c| c == '=') {
            clean.push_str(run);
            continue;
        }
        let (name, value) = match run.split_once('=') {
            Some((name, value)) if !value.trim_matches('=').is_empty() => (Some(name), value),
            _ => (None, run),
        };
        if let Some(name) = name.filter(|name| is_secret_name(name)) {
            clean.push_str(name);
            clean.push('=');
            clean.push_str(REDACTED);
            rest = without_value(rest, None);
            continue;
        }
        let is_scheme = SCHEMES
            .iter()
            .any(|scheme| value.eq_ignore_ascii_case(scheme));
        if is_secret && !is_scheme {
            let quote = clean.chars().next_back().filter(|c| "\"'".contains(*c));
            clean.push_str(REDACTED);
            rest = without_value(rest, quote);
            is_secret = false;
            continue;
        }
        let follows = rest.trim_start_matches(['"', '\'', '\\', ' ']);
        let names = is_secret_name(run.trim_end_matches('='))
            && (follows.starts_with([':', '=']) || run.ends_with('='));
        is_secret |= names || (is_scheme && !value.eq_ignore_ascii_case("token"));
        if let Some(name) = name {
            clean.push_str(name);
            clean.push('=');
        }
        clean.push_str(&redact_run(value));
    }
    clean
}

/// What follows a value of which the beginning is gone already.
fn without_value(rest: &str, quote: Option<char>) -> &str {
    let is_end = |c: char| match quote {
        Some(quote) => c == quote || c == '\\',
        None => c.is_whitespace() || "\"'&,;)}]\\".contains(c),
    };
    rest.find(is_end).map_or("", |end| &rest[end..])
}

/// Where the host begins behind `user`, when an `@` says that it was one.
fn user_end(user: &str, rest: &str) -> Option<usize> {
    let end = rest
        .find(|c: char| c.is_whitespace() || "/\"'".contains(c))
        .unwrap_or(rest.len());
    let at = rest[..end].rfind('@')?;
    (!user.contains('/')).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str) -> String {
        redact(
            text.as_bytes(),
            false,
            &["hunter2 and", "multi\nline \"value\""],
        )
    }

    #[test]
    fn what_looks_like_a_secret_goes() {
        for secret in [
            "sk-proj-4f8Aq2",
            "sk-ant-api03-x9",
            "ghp_16C7e42F292c69",
            "xoxb-12345-abc",
            "AKIAIOSFODNN7EXAMPLE",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N",
            "4f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c",
            "c2VjcmV0c2VjcmV0L3NlY3JldHNlY3JldDEyMw==",
            "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
            "AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw",
            "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
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
                // A name in a path is looked at by itself.
                if line.contains("example/") && secret.contains('/') {
                    continue;
                }
                let clean = clean(&line);
                assert!(
                    !clean.contains(&secret[secret.len() - 6..]),
                    "{line}: {clean}"
                );
                assert!(clean.contains(REDACTED), "{line}: {clean}");
            }
        }
    }

    #[test]
    fn what_is_named_a_secret_goes_however_short() {
        for line in [
            "password=swordfish",
            "password: swordfish",
            "\"password\": \"swordfish\"",
            "DB_PASSWORD='swordfish'",
            "Authorization: Bearer swordfish",
            "authorization: swordfish",
            "bearer swordfish",
            "Basic swordfish",
            "--api-key=swordfish",
            "cookie: sid=swordfish",
            "?X-Amz-Signature=swordfish",
            "{\\\"token\\\":\\\"swordfish\\\"}",
            "postgres://user:swordfish@db:5432/x",
            "redis://:swordfish@db",
            "OPENAI_API_KEY = swordfish",
            "key=swordfish",
            "password: \"my swordfish, too\"",
            "password=p@s:swordfish",
            "{\"secret\":\"a$b swordfish\"}",
        ] {
            let clean = clean(line);
            assert!(!clean.contains("swordfish"), "{line}: {clean}");
        }
    }

    #[test]
    fn what_is_known_goes_wherever_it_is() {
        assert_eq!(clean("xhunter2 andy"), "x[redacted]y");
        assert_eq!(clean("a multi\nline \"value\" b"), "a [redacted] b");
        assert_eq!(clean("a multi\\nline \\\"value\\\" b"), "a [redacted] b");
        let known = ["top secret phrase"];
        for at in 1..known[0].len() {
            let cut = format!("{} rest of it", &known[0][at..]);
            let clean = redact(cut.as_bytes(), true, &known);
            assert!(
                clean.ends_with("rest of it") && clean.len() < 14,
                "{cut}: {clean}"
            );
        }
        assert_eq!(redact(b"4f9a8b7c rest", true, &[]), " rest");
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
            "Node.js v24.21.0\n",
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
            let clean = redact(&bytes, true, &["\u{e9}\u{e9}\u{e9}\u{e9}"]);
            assert!(!clean.contains('\u{1b}'));
        }
    }
}

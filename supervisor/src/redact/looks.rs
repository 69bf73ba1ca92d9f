//! What gives a secret away by itself: the name of a variable, or how a run of characters begins, how long it is and what it
//! is made of. What one word says about the next is for whoever walks the line.

use std::borrow::Cow;

use crate::secret::REDACTED;

/// A name with one of these in it, whatever its case and without `_` and `-`, names a secret.
const NAMES: [&str; 12] = [
    "token",
    "secret",
    "passw",
    "pwd",
    "passphrase",
    "apikey",
    "credential",
    "auth",
    "cookie",
    "session",
    "signature",
    "bearer",
];

/// How keys of well-known services begin.
const PREFIXES: [&str; 12] = [
    "sk-",
    "pk-",
    "rk_",
    "sk_",
    "ghp_",
    "gho_",
    "github_pat_",
    "xox",
    "AKIA",
    "ASIA",
    "AIza",
    "eyJ",
];
/// With such a beginning and a digit, with a digit, or at all.
const LONG_WITH_PREFIX: usize = 8;
const LONG_IF_MIXED: usize = 20;
const LONG: usize = 40;

/// Whether a variable of this name holds a secret.
pub fn is_secret_name(name: &str) -> bool {
    let name: String = name
        .chars()
        .filter(|c| !matches!(c, '_' | '-'))
        .map(|c| c.to_ascii_lowercase())
        .collect();
    NAMES.iter().any(|part| name.contains(part)) || name.ends_with("key")
}

/// A path is looked at name by name, everything else as a whole too.
pub(super) fn redact_run(run: &str) -> Cow<'_, str> {
    let is_path = run.starts_with('/') || run.starts_with("./") || run.starts_with("../");
    if !is_path && is_like_secret(run) {
        return Cow::from(REDACTED);
    }
    if !run.split(['/', '.']).any(is_like_secret) {
        return Cow::from(run);
    }
    let names = run.split_inclusive(['/', '.']).map(|part| {
        let name = part.trim_end_matches(['/', '.']);
        if is_like_secret(name) {
            format!("{REDACTED}{}", &part[name.len()..])
        } else {
            part.to_owned()
        }
    });
    Cow::from(names.collect::<String>())
}

fn is_like_secret(run: &str) -> bool {
    let has = |is: fn(&char) -> bool| run.chars().any(|c| is(&c));
    let has_prefix = PREFIXES.iter().any(|prefix| run.starts_with(prefix));
    let has_digit = has(char::is_ascii_digit);
    // Base64 has slashes too, but capitals as well and no dot.
    let is_file = run.split('/').nth(1).is_some()
        && run.split('/').all(|name| name.len() < LONG_IF_MIXED)
        && (run.contains('.') || !has(char::is_ascii_uppercase));
    let is_long = run.len() >= LONG || run.len() >= LONG_IF_MIXED && has_digit;
    is_long && !is_file || run.len() >= LONG_WITH_PREFIX && has_prefix && has_digit
}

//! JSON that others wrote, read in place: what is looked for is found by scanning, and no tree of values is built.
//!
//! Invariant: reading takes no memory beyond the text and a byte for each level of nesting, and a time that is linear in the text.

use std::borrow::Cow;

use serde_core::de::IgnoredAny;

/// Deepest nesting of what is accepted. Clients of ours read by recursion, and many stop at this.
const MAX_DEPTH: usize = 128;

/// Longest text that is compared, as it is written.
const MAX_TEXT: usize = 1024;

/// One value of a document that is well formed, without white space around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Json<'a>(&'a str);

impl<'a> Json<'a> {
    /// A whole document, unless it is malformed or nested too deeply.
    pub fn read(text: &'a str) -> Option<Self> {
        serde_json::from_str::<IgnoredAny>(text).ok()?;
        let text = text.trim_matches([' ', '\t', '\n', '\r']);
        let (_, depth) = value(text.as_bytes(), 0)?;
        (depth <= MAX_DEPTH).then_some(Self(text))
    }

    pub const NULL: Self = Self("null");

    pub fn raw(self) -> &'a str {
        self.0
    }

    pub fn is_array(self) -> bool {
        self.0.starts_with('[')
    }

    /// The text of a string that is not longer than `most` bytes as it is written.
    pub fn text(self, most: usize) -> Option<Cow<'a, str>> {
        let is_plain = !self.0.contains('\\');
        match self.0.strip_prefix('"')?.strip_suffix('"')? {
            inner if inner.len() > most => None,
            inner if is_plain => Some(Cow::Borrowed(inner)),
            _ => serde_json::from_str(self.0).ok().map(Cow::Owned),
        }
    }

    /// The field of this name in an object; the last of several, as in JavaScript.
    pub fn field(self, name: &str) -> Option<Self> {
        let bytes = self.0.as_bytes();
        let mut found = None;
        let mut at = inside(bytes)?;
        while let Some(b'"') = bytes.get(at) {
            let end = string(bytes, at)?;
            let start = space(bytes, space(bytes, end) + 1);
            let (over, _) = value(bytes, start)?;
            if is_named(self.0.get(at..end)?, name) {
                found = self.0.get(start..over).map(Self);
            }
            at = space(bytes, space(bytes, over) + 1);
        }
        found
    }

    /// Whether this has a field of that name with that text.
    pub fn is(self, name: &str, text: &str) -> bool {
        let found = self.field(name).and_then(|found| found.text(MAX_TEXT));
        found.is_some_and(|found| found == text)
    }

    /// The value below these names.
    pub fn at(self, names: &[&str]) -> Option<Self> {
        names.iter().try_fold(self, |json, name| json.field(name))
    }

    /// Appends this without white space and without the fields whose names `is_dropped`, however deep. All else is as it
    /// was written: numbers that no type holds, escapes, the order of fields, and names that come twice.
    pub fn copy_without(self, is_dropped: fn(&str) -> bool, out: &mut Vec<u8>) {
        let bytes = self.0.as_bytes();
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            if *byte == b'"' {
                let end = string(bytes, at).unwrap_or(bytes.len());
                let after = space(bytes, end);
                let is_name = bytes.get(after) == Some(&b':');
                let text = &bytes[at..end];
                if is_name && is_any(text, is_dropped) {
                    at = without_field(bytes, after + 1, out);
                } else {
                    out.extend_from_slice(text);
                    at = end;
                }
            } else {
                if !is_space(*byte) {
                    out.push(*byte);
                }
                at += 1;
            }
        }
    }
}

/// Steps over the value of a field that is dropped and over one of the commas around it; gives the place behind.
fn without_field(bytes: &[u8], colon: usize, out: &mut Vec<u8>) -> usize {
    let over = value(bytes, space(bytes, colon)).map_or(bytes.len(), |(over, _)| over);
    let next = space(bytes, over);
    if bytes.get(next) == Some(&b',') {
        return next + 1;
    }
    out.pop_if(|last| *last == b',');
    next
}

/// Whether `is_dropped` is true of a name as it is written. One that is no text, such as half a surrogate, might be any.
fn is_any(written: &[u8], is_dropped: fn(&str) -> bool) -> bool {
    let Ok(written) = std::str::from_utf8(written) else {
        return true;
    };
    let name = Json(written).text(usize::MAX);
    name.is_none_or(|name| is_dropped(&name))
}

fn is_named(written: &str, name: &str) -> bool {
    Json(written)
        .text(usize::MAX)
        .is_some_and(|found| found == name)
}

/// Where the first field of an object begins.
fn inside(bytes: &[u8]) -> Option<usize> {
    (bytes.first() == Some(&b'{')).then(|| space(bytes, 1))
}

/// Where the value that begins here is over, and how deeply it is nested.
fn value(bytes: &[u8], start: usize) -> Option<(usize, usize)> {
    let (mut at, mut depth, mut deepest) = (start, 0_usize, 0);
    loop {
        match bytes.get(at)? {
            b'"' => at = string(bytes, at)?,
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
                at += 1;
            }
            b']' | b'}' => {
                depth = depth.checked_sub(1)?;
                at += 1;
            }
            b',' | b':' => at += 1,
            byte if is_space(*byte) => at += 1,
            _ => at = word(bytes, at),
        }
        if depth == 0 {
            return Some((at, deepest));
        }
    }
}

/// Where the string that begins here is over.
fn string(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// Likewise a number, `true`, `false` or `null`.
fn word(bytes: &[u8], start: usize) -> usize {
    let is_over = |byte: &u8| is_space(*byte) || b",:]}".contains(byte);
    let rest = bytes.iter().skip(start);
    start + rest.take_while(|byte| !is_over(byte)).count()
}

/// The first place from here on that has no white space.
fn space(bytes: &[u8], start: usize) -> usize {
    let rest = bytes.iter().skip(start);
    start + rest.take_while(|byte| is_space(**byte)).count()
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Json<'_> {
        Json::read(text).expect("is well formed")
    }

    fn copied(text: &str) -> String {
        let mut out = Vec::new();
        read(text).copy_without(|name| name.contains("token"), &mut out);
        String::from_utf8(out).expect("is text")
    }

    #[test]
    fn fields_are_found_as_javascript_finds_them() {
        let json = read(" {\"a\" : {\"b\":[1,{\"c\":2}], \"\\u0062\" : 3 } , \"d\":\"}\\\"{\"}\n");
        assert_eq!(json.at(&["a", "b"]).map(Json::raw), Some("3"));
        let text = json.field("d").and_then(|found| found.text(9));
        assert_eq!(text.as_deref(), Some("}\"{"));
        assert_eq!(json.field("d").and_then(|found| found.text(3)), None);
        for names in [&["c"][..], &["a", "c"], &["d", "a"], &["a", "b", "c"]] {
            assert_eq!(json.at(names), None, "{names:?}");
        }
        assert_eq!(read("{}").field("a"), None);
        assert_eq!(read("[\"a\",1]").field("a"), None);
    }

    #[test]
    fn what_is_malformed_or_too_deep_is_not_read() {
        let nested = |depth| "[".repeat(depth) + &"]".repeat(depth);
        assert!(Json::read(&nested(MAX_DEPTH)).is_some());
        for text in ["", "{", "{} {}", "{\"a\"}", "nul", "\"a", "[1,]", "\u{a0}1"] {
            assert_eq!(Json::read(text), None, "{text}");
        }
        assert_eq!(Json::read(&nested(MAX_DEPTH + 1)), None);
        assert_eq!(Json::read(&nested(500_000)), None);
    }

    #[test]
    fn everything_but_the_dropped_fields_is_as_it_was_written() {
        for (text, wanted) in [
            (r#"{"token":1}"#, "{}"),
            (r#"{ "a" : 1 , "token" : {"b":[1,"}"]} }"#, r#"{"a":1}"#),
            (
                r#"{"token":1,"a":2,"tokens":",","b":3}"#,
                r#"{"a":2,"b":3}"#,
            ),
            (
                r#"[{"a":["token",{"token":[]},2]},"token"]"#,
                r#"[{"a":["token",{},2]},"token"]"#,
            ),
        ] {
            assert_eq!(copied(text), wanted);
        }
        // Escaped, and half of a pair of surrogates.
        assert_eq!(copied(r#"{"\u0074oken":1,"\ud800":2,"a":3}"#), r#"{"a":3}"#);
        let odd = r#"{"b":1e400,"a":123456789012345678901234567890,"a":"\ud83d\/é","c":-0.0}"#;
        assert_eq!(copied(odd), odd);
    }
}

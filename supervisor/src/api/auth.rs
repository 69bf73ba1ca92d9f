//! Who may ask: the holder of the service token, in either header.
//!
//! With both headers set (the Worker passes on what it was sent) one that is valid is enough. All of them are compared,
//! always, so the time of an answer tells nothing.

use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderValue};

use crate::secret::Secret;

const SERVICE_TOKEN: &str = "x-openagents-service-token";

pub fn is_authorized(headers: &HeaderMap, token: &Secret) -> bool {
    let bearers = headers
        .get_all(AUTHORIZATION)
        .iter()
        .map(|value| bearer(value.as_bytes()));
    let plain = headers
        .get_all(SERVICE_TOKEN)
        .iter()
        .map(HeaderValue::as_bytes);
    bearers
        .chain(plain)
        .fold(false, |valid, guess| token.matches(guess) | valid)
}

/// What follows `Bearer `; the scheme's case does not matter (RFC 9110, 11.1). Anything else matches no token.
fn bearer(value: &[u8]) -> &[u8] {
    match value.split_at_checked(7) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token,
        _ => b"",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn is_valid(headers: &[(&'static str, &str)]) -> bool {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().expect("is a header"));
        }
        is_authorized(&map, &Secret::new(TOKEN.into()))
    }

    #[test]
    fn the_token_is_taken_from_either_header() {
        let bearer = format!("Bearer {TOKEN}");
        assert!(is_valid(&[("authorization", &bearer)]));
        assert!(is_valid(&[("authorization", &format!("bearer {TOKEN}"))]));
        assert!(is_valid(&[(SERVICE_TOKEN, TOKEN)]));
        assert!(is_valid(&[
            ("authorization", "Bearer wrong"),
            (SERVICE_TOKEN, TOKEN)
        ]));
        assert!(is_valid(&[
            ("authorization", &bearer),
            (SERVICE_TOKEN, "wrong")
        ]));
        assert!(is_valid(&[
            ("authorization", "Basic x"),
            ("authorization", &bearer)
        ]));
    }

    #[test]
    fn nothing_else_is_valid() {
        assert!(!is_valid(&[]));
        assert!(!is_valid(&[("authorization", TOKEN)]));
        assert!(!is_valid(&[("authorization", "Bearer ")]));
        assert!(!is_valid(&[("authorization", &format!("Basic {TOKEN}"))]));
        assert!(!is_valid(&[("authorization", &format!("Bearer  {TOKEN}"))]));
        assert!(!is_valid(&[(SERVICE_TOKEN, &TOKEN[..31])]));
        assert!(!is_valid(&[(SERVICE_TOKEN, &format!("{TOKEN}0"))]));
        assert!(!is_valid(&[("cookie", TOKEN)]));
    }
}

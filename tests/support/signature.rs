//! Checks a presigned request the way S3 does: Signature Version 4 in the query, computed again from what arrived
//! (AWS documentation, "Authenticating Requests: Using Query Parameters").

use ring::hmac::{self, HMAC_SHA256, Key};

use crate::tree::{hex, sha256_hex};

/// What the server knows about its one client.
#[derive(Clone, Debug)]
pub struct Identity {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: Option<String>,
    pub region: String,
}

/// The parts of a request that are signed, as they came over the wire.
pub struct Signed<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub query: &'a [(String, String)],
    /// Names in lower case.
    pub headers: &'a [(String, String)],
}

/// Headers that change what a request does: whoever could add one to a signed request could change it.
const MUST_BE_SIGNED: [&str; 4] = ["host", "content-md5", "if-match", "if-none-match"];

/// Why the request is refused.
pub fn check(identity: &Identity, request: &Signed) -> Result<(), &'static str> {
    let parameter = |name: &str| {
        let found = request.query.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| decode(value))
    };
    if parameter("X-Amz-Algorithm").as_deref() != Some("AWS4-HMAC-SHA256") {
        return Err("it is not signed");
    }
    let token = parameter("X-Amz-Security-Token");
    if token.as_deref().map(str::as_bytes) != identity.session_token.as_deref().map(str::as_bytes) {
        return Err("the session token is not the right one");
    }
    let credential = parameter("X-Amz-Credential").ok_or("it has no credential")?;
    let date = parameter("X-Amz-Date").ok_or("it has no date")?;
    let (id, scope) = credential
        .split_once('/')
        .ok_or("its credential has no scope")?;
    if id != identity.access_key_id {
        return Err("the access key is not known");
    }
    let day = date.get(..8).ok_or("its date is none")?;
    if scope != format!("{day}/{}/s3/aws4_request", identity.region) {
        return Err("its scope is another one");
    }
    let expires: u32 = parameter("X-Amz-Expires")
        .and_then(|text| text.parse().ok())
        .ok_or("it never expires")?;
    if expires > 3600 {
        return Err("it is valid for longer than an hour");
    }
    let names = parameter("X-Amz-SignedHeaders").ok_or("it signs no headers")?;
    let names: Vec<&str> = names.split(';').collect();
    let is_there = |name: &str| request.headers.iter().any(|(key, _)| key == name);
    if MUST_BE_SIGNED
        .iter()
        .any(|name| is_there(name) && !names.contains(name))
    {
        return Err("a header that matters is not signed");
    }

    let mut query: Vec<String> = request
        .query
        .iter()
        .filter(|(key, _)| key != "X-Amz-Signature")
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    query.sort_unstable();
    let mut headers = String::new();
    for name in &names {
        let (_, value) = request
            .headers
            .iter()
            .find(|(key, _)| key == name)
            .ok_or("a header that was signed is missing")?;
        headers.extend([name, ":", value.trim(), "\n"]);
    }
    let canonical = format!(
        "{}\n{}\n{}\n{headers}\n{}\nUNSIGNED-PAYLOAD",
        request.method,
        request.path,
        query.join("&"),
        names.join(";")
    );
    let text = format!(
        "AWS4-HMAC-SHA256\n{date}\n{scope}\n{}",
        sha256_hex(canonical.as_bytes())
    );
    let mut key = format!("AWS4{}", identity.secret_access_key).into_bytes();
    for step in [day, identity.region.as_str(), "s3", "aws4_request"] {
        key = sign(&key, step.as_bytes());
    }
    if parameter("X-Amz-Signature") == Some(hex(&sign(&key, text.as_bytes()))) {
        Ok(())
    } else {
        Err("the signature is wrong")
    }
}

fn sign(key: &[u8], text: &[u8]) -> Vec<u8> {
    hmac::sign(&Key::new(HMAC_SHA256, key), text)
        .as_ref()
        .to_vec()
}

/// Undoes percent encoding.
pub fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        let code = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match (
            first,
            code.and_then(|code| u8::from_str_radix(code, 16).ok()),
        ) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

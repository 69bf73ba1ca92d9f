//! A small HTTP client that can also send what no client should.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Value,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Whether it has the form that every answer has.
    pub fn is_enveloped(&self) -> bool {
        let fields = self.body.as_object().map(serde_json::Map::len);
        let is_json = self.header("content-type") == Some("application/json");
        let is_text = |name: &str| {
            self.body[name]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        };
        let fits = if self.status < 400 {
            self.body["ok"] == true && self.body["data"].is_object() && fields == Some(2)
        } else {
            self.body["ok"] == false && is_text("error") && is_text("code") && fields == Some(3)
        };
        is_json && fits
    }

    /// `code` of an error.
    pub fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or("none")
    }
}

/// One request on a connection of its own.
pub fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if !body.is_empty() {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    let answer = raw(address, &bytes);
    parse(&answer).unwrap_or_else(|| panic!("no answer to {method} {path}: {answer:?}"))
}

/// Sends bytes and returns everything that comes back.
pub fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("somebody listens");
    stream
        .set_read_timeout(Some(Duration::from_mins(1)))
        .expect("is a valid time");
    // Whoever refuses a request may close before all of it is sent; the answer is what counts.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// All answers that came over a connection, one after the other; nothing when they are not all whole.
pub fn answers(mut bytes: &str) -> Option<Vec<Response>> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_once("\r\n\r\n")?;
        if head.starts_with("HTTP/1.1 100") {
            bytes = rest;
            continue;
        }
        let length = parse(&format!("{head}\r\n\r\n"))?
            .header("content-length")?
            .parse()
            .ok()?;
        let body = rest.get(..length)?;
        answers.push(parse(&format!("{head}\r\n\r\n{body}"))?);
        bytes = &rest[length..];
    }
    Some(answers)
}

/// An answer as it came over the wire; a body that is not JSON is null.
pub fn parse(answer: &str) -> Option<Response> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    Some(Response {
        status,
        headers,
        body: serde_json::from_str(body).unwrap_or_default(),
    })
}

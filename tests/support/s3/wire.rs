//! Requests and answers on the wire, and what can go wrong with them there: shared by the server in memory and by the
//! proxy in front of a real one.

use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use super::{BUCKET, Effect, Kind};
use crate::signature::decode;

/// Pieces of an answer that comes slowly, and the time between them.
const PIECES: usize = 16;
const PIECE_DELAY: Duration = Duration::from_millis(4);

/// A request as it came over the wire.
pub struct Incoming {
    pub method: String,
    /// As sent: percent-encoded.
    pub path: String,
    pub query: Vec<(String, String)>,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Incoming {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn parameter(&self, name: &str) -> Option<String> {
        let found = self.query.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| decode(value))
    }

    /// As it came, but as the only request of its connection.
    pub fn to_bytes(&self) -> Vec<u8> {
        let query = self
            .query
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let query: Vec<String> = query.collect();
        let mut head = format!("{} {}", self.method, self.path);
        if !query.is_empty() {
            head = format!("{head}?{}", query.join("&"));
        }
        head.push_str(" HTTP/1.1\r\nConnection: close\r\n");
        for (name, value) in &self.headers {
            write!(head, "{name}: {value}\r\n").expect("a string takes everything");
        }
        head.push_str("\r\n");
        [head.as_bytes(), &self.body].concat()
    }

    /// What it is about; `None` for a request that S3 does not have.
    pub fn about(&self) -> Option<About> {
        let host = self.header("host").unwrap_or_default();
        let is_virtual_host = host.starts_with(&format!("{BUCKET}."));
        let plain = decode(&self.path);
        let plain = plain.trim_start_matches('/');
        let (bucket, key) = if is_virtual_host {
            (BUCKET, plain)
        } else {
            plain.split_once('/').unwrap_or((plain, ""))
        };
        Some(About {
            kind: self.kind(key)?,
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            place: self.parameter("prefix").unwrap_or_else(|| key.to_owned()),
            is_virtual_host,
        })
    }

    fn kind(&self, key: &str) -> Option<Kind> {
        let is_upload = self.parameter("uploadId").is_some();
        Some(match (self.method.as_str(), is_upload) {
            ("GET", false) if self.parameter("uploads").is_some() => Kind::ListUploads,
            ("GET", false) if key.is_empty() => Kind::List,
            ("GET", false) => Kind::Get,
            ("HEAD", false) => Kind::Head,
            ("PUT", false) => Kind::Put,
            ("PUT", true) => Kind::Part,
            ("POST", false) if self.parameter("uploads").is_some() => Kind::Create,
            ("POST", true) => Kind::Complete,
            ("DELETE", false) => Kind::Delete,
            ("DELETE", true) => Kind::Abort,
            _ => return None,
        })
    }
}

/// What a request is about.
pub struct About {
    pub kind: Kind,
    pub bucket: String,
    pub key: String,
    /// The key, or the prefix of a listing.
    pub place: String,
    /// The bucket was part of the host name.
    pub is_virtual_host: bool,
}

#[derive(Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    /// One of another server, without its body.
    pub fn of_head(head: &str) -> Self {
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let headers = lines.filter_map(|line| line.split_once(':'));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
        Self {
            status: status.and_then(|text| text.parse().ok()).unwrap_or(0),
            headers: headers
                .filter(|(name, _)| !name.eq_ignore_ascii_case("connection"))
                .collect(),
            body: Vec::new(),
        }
    }

    /// Takes the length of the body out of the headers.
    pub fn take_length(&mut self) -> Option<usize> {
        let is_length = |(name, _): &(String, String)| name.eq_ignore_ascii_case("content-length");
        let at = self.headers.iter().position(is_length)?;
        self.headers.remove(at).1.parse().ok()
    }

    pub fn refusal(status: u16, code: &str) -> Self {
        Self::new(
            status,
            format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>on the tests' order</Message></Error>"
            ),
        )
    }

    /// The same answer without a header.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.headers
            .retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let found = headers.find(|(known, _)| known.eq_ignore_ascii_case(name))?;
        Some(&found.1)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// How a request goes on.
pub enum Begun {
    /// No answer will come.
    Over,
    /// This is the answer, and nothing is done.
    Refused(Answer),
    /// It is for the service to judge.
    GoesOn,
}

/// What goes wrong with a request before anybody has done what it asks for.
pub fn begin(
    effect: Option<Effect>,
    stream: &TcpStream,
    reader: &mut BufReader<TcpStream>,
    incoming: &mut Incoming,
) -> io::Result<Begun> {
    match effect {
        Some(Effect::ResetBefore) => {
            reset(stream)?;
            Ok(Begun::Over)
        }
        Some(Effect::Stall) => {
            stall(reader)?;
            Ok(Begun::Over)
        }
        Some(Effect::Status {
            status,
            code,
            retry_after,
        }) => {
            let mut answer = Answer::refusal(status, code);
            if let Some(seconds) = retry_after {
                answer = answer.with("Retry-After", seconds.to_string());
            }
            if (300..400).contains(&status) {
                answer = answer.with("Location", "http://127.0.0.1:9/elsewhere");
            }
            Ok(Begun::Refused(answer))
        }
        Some(Effect::WrongUpload) => {
            alter(&mut incoming.body);
            Ok(Begun::GoesOn)
        }
        _ => Ok(Begun::GoesOn),
    }
}

/// Sends the answer, or what is left of it; whether the connection goes on.
pub fn deliver(
    effect: Option<Effect>,
    kind: Kind,
    mut answer: Answer,
    mut stream: &TcpStream,
    reader: &mut BufReader<TcpStream>,
) -> io::Result<bool> {
    match effect {
        Some(Effect::WrongContent) => alter(&mut answer.body),
        Some(Effect::WrongTag) => {
            let tags = answer.headers.iter_mut();
            for (_, tag) in tags.filter(|(name, _)| name.eq_ignore_ascii_case("etag")) {
                "\"another\"".clone_into(tag);
            }
        }
        _ => {}
    }
    let head = head(&answer).into_bytes();
    let body: &[u8] = if kind == Kind::Head {
        b""
    } else {
        &answer.body
    };
    let half = &body[..body.len() / 2];
    match effect {
        Some(Effect::LoseAnswer) => return Ok(false),
        Some(Effect::StallAfter) => stall(reader)?,
        Some(Effect::Truncate) => stream.write_all(&[&head, half].concat())?,
        Some(Effect::ResetInBody) => {
            stream.write_all(&[&head, half].concat())?;
            reset(stream)?;
        }
        Some(Effect::ResetAfter) => {
            stream.write_all(&[&head, body].concat())?;
            reset(stream)?;
        }
        Some(Effect::StallInBody) => {
            stream.write_all(&[&head, half].concat())?;
            stall(reader)?;
        }
        Some(Effect::Slow) => {
            let whole = [&head, body].concat();
            for piece in whole.chunks(whole.len().div_ceil(PIECES)) {
                stream.write_all(piece)?;
                std::thread::sleep(PIECE_DELAY);
            }
            return Ok(true);
        }
        _ => {
            stream.write_all(&[&head, body].concat())?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn alter(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 1;
    }
}

fn head(answer: &Answer) -> String {
    let mut head = format!(
        "HTTP/1.1 {} Status\r\nContent-Length: {}\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        write!(head, "{name}: {value}\r\n").expect("a string takes everything");
    }
    head.push_str("\r\n");
    head
}

/// Takes the next request; `None` at the end of the connection.
pub fn receive(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Incoming>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let query = pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
    let mut incoming = Incoming {
        method,
        path,
        query: query.collect(),
        headers,
        body: Vec::new(),
    };
    let length = incoming
        .header("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    incoming.body = vec![0; length];
    reader.read_exact(&mut incoming.body)?;
    Ok(Some(incoming))
}

/// Says nothing more until the client goes away.
fn stall(reader: &mut BufReader<TcpStream>) -> io::Result<()> {
    io::copy(reader, &mut io::sink()).map(drop)
}

fn reset(stream: &TcpStream) -> io::Result<()> {
    // A connection that is closed without lingering is reset.
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?;
    Ok(())
}

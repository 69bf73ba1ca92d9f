//! An S3 server for benchmarks, in memory and in a process of its own: as fast as loopback is, for any client, counting what
//! it is asked and slower on order. It checks no signature and no checksum; the tests have a server that does.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use e2e::signature::decode;

use crate::Outcome;

/// A page of a listing, as in S3.
const PAGE: usize = 1000;
/// Nothing here depends on when an object was written, but every client wants to be told.
const LAST_MODIFIED: (&str, &str) = ("2026-01-01T00:00:00.000Z", "Thu, 01 Jan 2026 00:00:00 GMT");
/// Answers up to this size go out in one write.
const SMALL: usize = 64 << 10;

/// Requests since the last count, and the bytes of their bodies and of the answers'.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    pub requests: u64,
    pub received: u64,
    pub sent: u64,
}

/// The server as its client sees it; it ends when this is dropped, or when the benchmark dies.
pub struct Server {
    pub address: SocketAddr,
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Server {
    /// Runs this program again as the server.
    pub fn start() -> Outcome<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("serve")
            // Memory that was touched once is kept: a page fault for each of its pages is no work of a store.
            .env("MALLOC_MMAP_THRESHOLD_", "33554432")
            .env("MALLOC_TRIM_THRESHOLD_", "17179869184")
            .env("MALLOC_ARENA_MAX", "2")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take().ok_or("the server has no input")?;
        let mut answers = BufReader::new(child.stdout.take().ok_or("the server has no output")?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        let address = line.trim().parse()?;
        Ok(Self {
            address,
            child,
            orders,
            answers,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn order(&mut self, order: &str) -> Outcome<String> {
        writeln!(self.orders, "{order}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line)
    }

    /// Drops every object of a bucket.
    pub fn clear(&mut self, bucket: &str) -> Outcome {
        self.order(&format!("clear {bucket}")).map(drop)
    }

    /// Every answer comes this much later.
    pub fn delay(&mut self, by: Duration) -> Outcome {
        self.order(&format!("delay {}", by.as_millis())).map(drop)
    }

    /// What came since the last call.
    pub fn take_traffic(&mut self) -> Outcome<Traffic> {
        let line = self.order("take")?;
        let numbers: Vec<u64> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [requests, received, sent] = numbers[..] else {
            return Err(format!("the server answers {line:?}").into());
        };
        Ok(Traffic {
            requests,
            received,
            sent,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stretch of bytes that several objects and answers may share.
type Piece = (Arc<Vec<u8>>, Range<usize>);

fn piece(bytes: Vec<u8>) -> Piece {
    let all = 0..bytes.len();
    (Arc::new(bytes), all)
}

fn length(pieces: &[Piece]) -> usize {
    pieces.iter().map(|(_, range)| range.len()).sum()
}

#[derive(Clone)]
struct Object {
    pieces: Vec<Piece>,
    tag: String,
    /// Type and the client's own headers, given back as they came.
    headers: Vec<(String, String)>,
}

#[derive(Default)]
struct Inner {
    /// By bucket and key, a slash between them. Every bucket exists.
    objects: BTreeMap<String, Object>,
    /// Parts, with what the object is to be given back with, by the id of the upload.
    uploads: BTreeMap<String, (Object, BTreeMap<u32, Vec<Piece>>)>,
    traffic: Traffic,
    delay: Duration,
    count: u64,
}

type Shared = Arc<Mutex<Inner>>;

fn lock(shared: &Shared) -> MutexGuard<'_, Inner> {
    shared.lock().expect("no thread of the server panics")
}

/// The server's own process: tells its address, then obeys a line at a time until there are no more.
pub fn serve() -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let shared = Shared::default();
    let state = Arc::clone(&shared);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = Arc::clone(&state);
            // A client that goes away in the middle is no fault of the server.
            std::thread::spawn(move || drop(connection(&state, &stream)));
        }
    });
    for line in io::stdin().lines() {
        let line = line?;
        let (order, what) = line.split_once(' ').unwrap_or((&line, ""));
        let mut inner = lock(&shared);
        match order {
            "clear" => {
                let prefix = format!("{what}/");
                inner.objects.retain(|key, _| !key.starts_with(&prefix));
                inner.uploads.clear();
            }
            "delay" => inner.delay = Duration::from_millis(what.parse()?),
            _ => {}
        }
        let traffic = match order {
            "take" => std::mem::take(&mut inner.traffic),
            _ => inner.traffic,
        };
        println!("{} {} {}", traffic.requests, traffic.received, traffic.sent);
    }
    Ok(())
}

struct Request {
    method: String,
    /// Bucket and key, decoded.
    path: String,
    query: Vec<(String, String)>,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    body: Arc<Vec<u8>>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        find(&self.query, name)
    }

    /// The body as part of an object.
    fn piece(&self) -> Piece {
        (Arc::clone(&self.body), 0..self.body.len())
    }

    /// What an object is given back with.
    fn kept_headers(&self) -> Vec<(String, String)> {
        let is_kept = |name: &str| name == "content-type" || name.starts_with("x-amz-meta-");
        let kept = self.headers.iter().filter(|(name, _)| is_kept(name));
        kept.cloned().collect()
    }
}

fn find<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = pairs.iter().find(|(key, _)| key == name);
    found.map(|(_, value)| value.as_str())
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<Piece>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: vec![piece(body.into())],
        }
    }

    fn xml(element: &str, content: &str) -> Self {
        let xml = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{element} xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{content}</{element}>"
        );
        Self::new(200, xml).with("Content-Type", "application/xml")
    }

    fn refusal(status: u16, code: &str) -> Self {
        Self::new(status, format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>"))
            .with("Content-Type", "application/xml")
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

fn connection(shared: &Shared, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(SMALL, stream);
    let mut out = stream;
    while let Some((request, received)) = receive(&mut reader, out)? {
        let delay = lock(shared).delay;
        // The network between client and store; it is what is measured.
        std::thread::sleep(delay);
        let answer = answer(shared, &request);
        let is_head = request.method == "HEAD";
        let size = length(&answer.body);
        {
            let mut inner = lock(shared);
            inner.traffic.requests += 1;
            inner.traffic.received += received;
            inner.traffic.sent += if is_head { 0 } else { size as u64 };
        }
        let mut head = format!(
            "HTTP/1.1 {} Status\r\nContent-Length: {size}\r\nx-amz-request-id: 1\r\n",
            answer.status
        );
        for (name, value) in &answer.headers {
            // A string takes everything.
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if is_head {
            out.write_all(&bytes)?;
        } else if size <= SMALL {
            for (piece, range) in &answer.body {
                bytes.extend_from_slice(&piece[range.clone()]);
            }
            out.write_all(&bytes)?;
        } else {
            out.write_all(&bytes)?;
            for (piece, range) in &answer.body {
                out.write_all(&piece[range.clone()])?;
            }
        }
    }
    Ok(())
}

/// The next request and how many bytes its body took on the wire.
fn receive(reader: &mut impl BufRead, mut out: &TcpStream) -> io::Result<Option<(Request, u64)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = decode(path).trim_start_matches('/').to_owned();
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let query = pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decode(name), decode(&value.replace('+', " "))))
        .collect();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request {
        method,
        path,
        query,
        headers,
        body: Arc::default(),
    };
    if request.header("expect").is_some() {
        out.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let length: u64 = request
        .header("content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let mut body = reader.take(length);
    let streaming = request.header("x-amz-content-sha256");
    if streaming.is_some_and(|kind| kind.starts_with("STREAMING-")) {
        request.body = Arc::new(unchunk(&mut body, &request)?);
        io::copy(&mut body, &mut io::sink())?;
    } else {
        // The length is the client's word, and it is a benchmark's.
        let mut bytes = Vec::with_capacity(usize::try_from(length).map_err(io::Error::other)?);
        body.read_to_end(&mut bytes)?;
        request.body = Arc::new(bytes);
    }
    Ok(Some((request, length)))
}

/// A body of `aws-chunked` encoding: each chunk behind its length and signature, then trailers.
fn unchunk(body: &mut impl BufRead, request: &Request) -> io::Result<Vec<u8>> {
    let size = request.header("x-amz-decoded-content-length");
    let size = size.and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(size);
    loop {
        let mut line = String::new();
        body.read_line(&mut line)?;
        let digits = line.trim_end().split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(digits, 16).map_err(io::Error::other)?;
        if size == 0 {
            return Ok(bytes);
        }
        body.take(size).read_to_end(&mut bytes)?;
        body.read_line(&mut String::new())?;
    }
}

fn answer(shared: &Shared, request: &Request) -> Answer {
    let key = request
        .path
        .split_once('/')
        .map_or("", |(_, key)| key)
        .to_owned();
    let upload = request.parameter("uploadId");
    let mut inner = lock(shared);
    match (request.method.as_str(), key.as_str()) {
        ("GET", "") => bucket(&inner, request),
        ("HEAD" | "PUT", "") => Answer::new(200, ""),
        ("POST", "") => delete_many(&mut inner, request),
        ("GET" | "HEAD", _) => get(&inner, request),
        ("PUT", _) => match upload {
            Some(id) => part(&mut inner, request, id),
            None => put(&mut inner, request),
        },
        ("POST", _) => match upload {
            Some(id) => complete(&mut inner, request, id, &key),
            None => create(&mut inner, request, &key),
        },
        ("DELETE", _) => {
            match upload {
                Some(id) => drop(inner.uploads.remove(id)),
                None => drop(inner.objects.remove(&request.path)),
            }
            Answer::new(204, "")
        }
        _ => Answer::refusal(405, "MethodNotAllowed"),
    }
}

/// A tag that no other object has, and that nobody takes for a checksum.
fn next_tag(inner: &mut Inner) -> String {
    inner.count += 1;
    format!("\"{}-1\"", inner.count)
}

fn get(inner: &Inner, request: &Request) -> Answer {
    let Some(object) = inner.objects.get(&request.path) else {
        return Answer::refusal(404, "NoSuchKey");
    };
    let size = length(&object.pieces);
    let mut answer = Answer {
        status: 200,
        headers: object.headers.clone(),
        body: Vec::new(),
    }
    .with("ETag", &object.tag)
    .with("Last-Modified", LAST_MODIFIED.1)
    .with("Accept-Ranges", "bytes");
    let Some(wanted) = request.header("range") else {
        answer.body.clone_from(&object.pieces);
        return answer;
    };
    let Some(range) = bounds(wanted, size) else {
        return Answer::refusal(416, "InvalidRange");
    };
    answer.status = 206;
    let mut from = 0;
    for (piece, within) in &object.pieces {
        let start = range.start.clamp(from, from + within.len()) - from;
        let end = range.end.clamp(from, from + within.len()) - from;
        if start < end {
            let range = within.start + start..within.start + end;
            answer.body.push((Arc::clone(piece), range));
        }
        from += within.len();
    }
    let content_range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
    answer.with("Content-Range", content_range)
}

fn bounds(range: &str, size: usize) -> Option<Range<usize>> {
    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
    let range = match (from, to) {
        ("", last) => size.saturating_sub(last.parse().ok()?)..size,
        (from, "") => from.parse().ok()?..size,
        (from, to) => from.parse().ok()?..size.min(to.parse::<usize>().ok()? + 1),
    };
    (!range.is_empty()).then_some(range)
}

fn put(inner: &mut Inner, request: &Request) -> Answer {
    let found = inner.objects.get(&request.path);
    let is_refused = match (request.header("if-match"), request.header("if-none-match")) {
        (Some(wanted), _) => found.is_none_or(|object| object.tag != wanted),
        (_, Some(_)) => found.is_some(),
        _ => false,
    };
    if is_refused {
        return Answer::refusal(412, "PreconditionFailed");
    }
    let source = request.header("x-amz-copy-source").map(decode);
    let pieces = match &source {
        None => vec![request.piece()],
        Some(source) => match inner.objects.get(source.trim_start_matches('/')) {
            Some(object) => object.pieces.clone(),
            None => return Answer::refusal(404, "NoSuchKey"),
        },
    };
    let tag = next_tag(inner);
    let object = Object {
        pieces,
        tag: tag.clone(),
        headers: request.kept_headers(),
    };
    inner.objects.insert(request.path.clone(), object);
    let answer = match source {
        None => Answer::new(200, ""),
        Some(_) => Answer::xml(
            "CopyObjectResult",
            &format!(
                "<ETag>{tag}</ETag><LastModified>{}</LastModified>",
                LAST_MODIFIED.0
            ),
        ),
    };
    answer.with("ETag", tag)
}

fn create(inner: &mut Inner, request: &Request, key: &str) -> Answer {
    let tag = next_tag(inner);
    let id = format!("upload-{}", inner.count);
    let object = Object {
        pieces: Vec::new(),
        tag,
        headers: request.kept_headers(),
    };
    inner.uploads.insert(id.clone(), (object, BTreeMap::new()));
    let bucket = request.path.split('/').next().unwrap_or_default();
    let content = format!(
        "<Bucket>{bucket}</Bucket><Key>{}</Key><UploadId>{id}</UploadId>",
        escape(key)
    );
    Answer::xml("InitiateMultipartUploadResult", &content)
}

fn part(inner: &mut Inner, request: &Request, id: &str) -> Answer {
    let number = request.parameter("partNumber");
    let Some(number) = number.and_then(|text| text.parse().ok()) else {
        return Answer::refusal(400, "InvalidPart");
    };
    let tag = next_tag(inner);
    let Some((_, parts)) = inner.uploads.get_mut(id) else {
        return Answer::refusal(404, "NoSuchUpload");
    };
    parts.insert(number, vec![request.piece()]);
    Answer::new(200, "").with("ETag", tag)
}

fn complete(inner: &mut Inner, request: &Request, id: &str, key: &str) -> Answer {
    let Some((mut object, parts)) = inner.uploads.remove(id) else {
        return Answer::refusal(404, "NoSuchUpload");
    };
    object.pieces = parts.into_values().flatten().collect();
    let content = format!("<Key>{}</Key><ETag>{}</ETag>", escape(key), object.tag);
    inner.objects.insert(request.path.clone(), object);
    Answer::xml("CompleteMultipartUploadResult", &content)
}

fn delete_many(inner: &mut Inner, request: &Request) -> Answer {
    let bucket = request.path.trim_end_matches('/');
    let text = String::from_utf8_lossy(&request.body);
    for key in text.split("<Key>").skip(1) {
        let key = key.split("</Key>").next().unwrap_or_default();
        let key = key
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&quot;", "\"")
            .replace("&#39;", "'")
            .replace("&amp;", "&");
        inner.objects.remove(&format!("{bucket}/{key}"));
    }
    Answer::xml("DeleteResult", "")
}

/// Questions about a bucket: where it is, and what it holds, in either version of the listing.
fn bucket(inner: &Inner, request: &Request) -> Answer {
    if request.parameter("location").is_some() {
        return Answer::xml("LocationConstraint", "");
    }
    let bucket = request.path.trim_end_matches('/');
    let text = |name| request.parameter(name).unwrap_or_default();
    let (prefix, delimiter) = (text("prefix"), text("delimiter"));
    let after = ["continuation-token", "start-after", "marker"]
        .into_iter()
        .find_map(|name| request.parameter(name))
        .unwrap_or_default();
    let page = request.parameter("max-keys");
    let page = page.and_then(|text| text.parse().ok()).unwrap_or(PAGE);
    let shown = |key: &str| match text("encoding-type") {
        "url" => encode(key),
        _ => escape(key),
    };

    let base = format!("{bucket}/");
    let mut from = match after {
        "" => format!("{base}{prefix}"),
        after => format!("{base}{prefix}").max(format!("{base}{after}\0")),
    };
    let mut entries = Vec::new();
    let mut last = String::new();
    let is_cut = loop {
        let Some((path, object)) = inner.objects.range(from.clone()..).next() else {
            break false;
        };
        let Some(key) = path.strip_prefix(&base) else {
            break false;
        };
        let Some(rest) = key.strip_prefix(prefix) else {
            break false;
        };
        if entries.len() == page {
            break true;
        }
        let folder = match delimiter {
            "" => None,
            delimiter => rest.find(delimiter).map(|at| &rest[..at + delimiter.len()]),
        };
        if let Some(folder) = folder {
            let folder = format!("{prefix}{folder}");
            entries.push(format!(
                "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>",
                shown(&folder)
            ));
            // Past everything in it: no character of a key comes after the last one of all.
            last = format!("{folder}\u{10ffff}");
            from = format!("{base}{last}");
        } else {
            entries.push(format!(
                "<Contents><Key>{}</Key><LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                shown(key),
                LAST_MODIFIED.0,
                escape(&object.tag),
                length(&object.pieces)
            ));
            from = format!("{path}\0");
            key.clone_into(&mut last);
        }
    };
    let mut xml = format!(
        "<Name>{bucket}</Name><Prefix>{}</Prefix><MaxKeys>{page}</MaxKeys><KeyCount>{}</KeyCount><IsTruncated>{is_cut}</IsTruncated>",
        shown(prefix),
        entries.len()
    );
    if is_cut {
        for name in ["NextContinuationToken", "NextMarker"] {
            // A string takes everything.
            let _ = write!(xml, "<{name}>{}</{name}>", shown(&last));
        }
    }
    if !text("encoding-type").is_empty() {
        xml.push_str("<EncodingType>url</EncodingType>");
    }
    xml.push_str(&entries.concat());
    Answer::xml("ListBucketResult", &xml)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // A string takes everything.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

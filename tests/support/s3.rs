//! An S3 server of the tests' own, in memory and on loopback: strict where the protocol is, counting what it is asked,
//! and misbehaving on order. One bucket, named [`BUCKET`]; every request must be signed by its one client.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use self::service::{judge, tag};
use crate::signature::{Identity, decode};

mod service;

pub const BUCKET: &str = "the-bucket";
/// Far longer than anything takes, so that only a missing event fails a test.
const DEADLINE: Duration = Duration::from_mins(1);

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Get,
    Head,
    Put,
    Delete,
    List,
    Create,
    Part,
    Complete,
    Abort,
}

/// How a request goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing is done, and this is the answer.
    Status {
        status: u16,
        code: &'static str,
        retry_after: Option<u32>,
    },
    /// Nothing is done, and the connection is reset.
    ResetBefore,
    /// It is done, and the connection is reset in the middle of the answer's body.
    ResetInBody,
    /// It is done, and the answer ends early, in order, behind the right length.
    Truncate,
    /// Nothing is done, and no answer ever comes.
    Stall,
    /// It is done, and the answer stops in the middle of its body.
    StallInBody,
    /// It is done, and the connection is closed without an answer.
    LoseAnswer,
    /// It is done, and no answer ever comes.
    StallAfter,
    /// The answer's body is not what is stored.
    WrongContent,
    /// It waits for [`S3::release`], then all is well.
    Hold,
}

/// One misbehaviour: of requests of this kind whose key contains `key`, `skip` pass and the next `times` go wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: Kind,
    pub key: &'static str,
    pub skip: u32,
    pub times: u32,
    pub effect: Effect,
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Request {
    pub kind: Kind,
    pub key: String,
    /// Bytes of its body, and of the answer's.
    pub received: usize,
    pub sent: usize,
    pub status: u16,
    /// The bucket was part of the host name.
    pub is_virtual_host: bool,
}

/// An object and its tag: computing it for every range of a large object would take longer than all else.
struct Object {
    bytes: Vec<u8>,
    tag: String,
}

impl Object {
    fn new(bytes: Vec<u8>) -> Self {
        let tag = tag(&bytes);
        Self { bytes, tag }
    }
}

#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
struct Inner {
    objects: BTreeMap<String, Object>,
    /// Object and parts by upload id.
    uploads: BTreeMap<String, (String, BTreeMap<u32, Vec<u8>>)>,
    requests: Vec<Request>,
    arrivals: Vec<(Kind, String)>,
    faults: Vec<Fault>,
    complaints: Vec<String>,
    next_upload: u32,
    page: usize,
    is_held: bool,
    ignores_conditions: bool,
    has_no_bucket: bool,
    is_stopped: bool,
}

struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    identity: Identity,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no thread of the server panics")
    }
}

/// The server; it stops when this is dropped.
pub struct S3 {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Default for S3 {
    fn default() -> Self {
        Self::start()
    }
}

impl S3 {
    /// A server whose client has a key and no session.
    pub fn start() -> Self {
        Self::start_for(Identity {
            access_key_id: "key-id-of-the-tests".to_owned(),
            secret_access_key: "secret-key-of-the-tests/+=".to_owned(),
            session_token: None,
            region: "auto".to_owned(),
        })
    }

    pub fn start_for(identity: Identity) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                page: 1000,
                ..Inner::default()
            }),
            changed: Condvar::new(),
            identity,
        });
        let server = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if server.lock().is_stopped {
                    return;
                }
                let shared = Arc::clone(&server);
                if let Ok(stream) = stream {
                    // A client that was killed ends its connection in the middle; that is no fault of the server.
                    std::thread::spawn(move || drop(serve(&shared, &stream)));
                }
            }
        });
        Self { address, shared }
    }

    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    pub fn add_fault(&self, kind: Kind, key: &'static str, times: u32, effect: Effect) {
        self.add(Fault {
            kind,
            key,
            skip: 0,
            times,
            effect,
        });
    }

    pub fn add(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    pub fn clear_faults(&self) {
        self.shared.lock().faults.clear();
    }

    /// Takes every write whatever its condition, as some services do.
    pub fn ignore_conditions(&self) {
        self.shared.lock().ignores_conditions = true;
    }

    pub fn remove_bucket(&self) {
        self.shared.lock().has_no_bucket = true;
    }

    /// Keys on one page of a listing.
    pub fn set_page(&self, keys: usize) {
        self.shared.lock().page = keys;
    }

    pub fn objects(&self) -> BTreeMap<String, Vec<u8>> {
        let inner = self.shared.lock();
        let objects = inner.objects.iter();
        objects
            .map(|(key, object)| (key.clone(), object.bytes.clone()))
            .collect()
    }

    pub fn put(&self, key: &str, bytes: Vec<u8>) {
        self.shared
            .lock()
            .objects
            .insert(key.to_owned(), Object::new(bytes));
    }

    pub fn remove(&self, key: &str) {
        self.shared.lock().objects.remove(key);
    }

    /// Uploads in parts that were neither completed nor aborted.
    pub fn open_uploads(&self) -> usize {
        self.shared.lock().uploads.len()
    }

    /// What was asked since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        let mut inner = self.shared.lock();
        inner.arrivals.clear();
        std::mem::take(&mut inner.requests)
    }

    /// How many requests of this kind have arrived since [`Self::take_requests`], answered or not.
    pub fn arrivals(&self, kind: Kind, key: &str) -> usize {
        let inner = self.shared.lock();
        let is_meant = |(known, of): &&(Kind, String)| *known == kind && of.contains(key);
        inner.arrivals.iter().filter(is_meant).count()
    }

    /// Waits until a request of this kind has arrived since [`Self::take_requests`], answered or not.
    pub fn wait_for(&self, kind: Kind, key: &str) {
        let has_come = |inner: &mut Inner| {
            !inner
                .arrivals
                .iter()
                .any(|(known, of)| *known == kind && of.contains(key))
        };
        let inner = self.shared.lock();
        let (inner, wait) = self
            .shared
            .changed
            .wait_timeout_while(inner, DEADLINE, has_come)
            .expect("no thread of the server panics");
        let arrivals = inner.arrivals.clone();
        drop(inner);
        assert!(
            !wait.timed_out(),
            "{kind:?} of {key} never came, but {arrivals:?}"
        );
    }

    /// Lets go what [`Effect::Hold`] holds.
    pub fn release(&self) {
        self.shared.lock().is_held = false;
        self.shared.changed.notify_all();
    }

    /// Fails if any request broke a rule of the protocol.
    pub fn assert_no_complaints(&self) {
        let complaints = self.shared.lock().complaints.clone();
        assert!(
            complaints.is_empty(),
            "the server complains: {complaints:#?}"
        );
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Ok(mut inner) = self.shared.inner.lock() {
            inner.is_stopped = true;
            inner.is_held = false;
        }
        self.shared.changed.notify_all();
        // The listening thread looks at the mark when somebody connects.
        drop(TcpStream::connect(self.address));
    }
}

/// A request as it came over the wire.
struct Incoming {
    method: String,
    /// As sent: percent-encoded.
    path: String,
    query: Vec<(String, String)>,
    /// Names in lower case.
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Incoming {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let found = self.query.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| decode(value))
    }

    fn kind(&self, key: &str) -> Option<Kind> {
        let is_upload = self.parameter("uploadId").is_some();
        Some(match (self.method.as_str(), is_upload) {
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

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    fn refusal(status: u16, code: &str) -> Self {
        Self::new(
            status,
            format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>on the tests' order</Message></Error>"
            ),
        )
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// Serves one connection to its end.
fn serve(shared: &Shared, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(incoming) = receive(&mut reader)? {
        let host = incoming.header("host").unwrap_or_default();
        let is_virtual_host = host.starts_with(&format!("{BUCKET}."));
        let plain = decode(&incoming.path);
        let (bucket, key) = if is_virtual_host {
            (BUCKET, plain.trim_start_matches('/'))
        } else {
            plain
                .trim_start_matches('/')
                .split_once('/')
                .unwrap_or((plain.trim_matches('/'), ""))
        };
        let Some(kind) = incoming.kind(key) else {
            shared.lock().complaints.push(format!(
                "{} {} is no request",
                incoming.method, incoming.path
            ));
            return Ok(());
        };
        let place = incoming
            .parameter("prefix")
            .unwrap_or_else(|| key.to_owned());
        let effect = arrive(shared, kind, &place);
        match effect {
            Some(Effect::ResetBefore) => return reset(stream),
            Some(Effect::Stall) => return stall(&mut reader),
            Some(Effect::Hold) => hold(shared),
            _ => {}
        }
        let mut answer = match effect {
            Some(Effect::Status {
                status,
                code,
                retry_after,
            }) => {
                let answer = Answer::refusal(status, code);
                match retry_after {
                    Some(seconds) => answer.with("Retry-After", seconds.to_string()),
                    None => answer,
                }
            }
            _ => judge(shared, &incoming, bucket, key, kind),
        };
        if effect == Some(Effect::WrongContent) {
            let middle = answer.body.len() / 2;
            answer.body[middle] ^= 1;
        }
        shared.lock().requests.push(Request {
            kind,
            key: place,
            received: incoming.body.len(),
            sent: answer.body.len(),
            status: answer.status,
            is_virtual_host,
        });
        shared.changed.notify_all();
        let head = head(&answer);
        let body: &[u8] = if kind == Kind::Head {
            b""
        } else {
            &answer.body
        };
        let half = &body[..body.len() / 2];
        let mut out = stream;
        match effect {
            Some(Effect::LoseAnswer) => return Ok(()),
            Some(Effect::StallAfter) => return stall(&mut reader),
            Some(Effect::Truncate) => return out.write_all(&[head.as_bytes(), half].concat()),
            Some(Effect::ResetInBody) => {
                out.write_all(&[head.as_bytes(), half].concat())?;
                return reset(stream);
            }
            Some(Effect::StallInBody) => {
                out.write_all(&[head.as_bytes(), half].concat())?;
                return stall(&mut reader);
            }
            _ => out.write_all(&[head.as_bytes(), body].concat())?,
        }
    }
    Ok(())
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

fn receive(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Incoming>> {
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

/// Notes the request and finds what is to go wrong with it.
fn arrive(shared: &Shared, kind: Kind, key: &str) -> Option<Effect> {
    let mut inner = shared.lock();
    inner.arrivals.push((kind, key.to_owned()));
    let mut effect = None;
    for fault in &mut inner.faults {
        if fault.kind != kind || !key.contains(fault.key) {
            continue;
        }
        if fault.skip > 0 {
            fault.skip -= 1;
        } else if fault.times > 0 {
            fault.times -= 1;
            effect = Some(fault.effect);
            break;
        }
    }
    if effect == Some(Effect::Hold) {
        inner.is_held = true;
    }
    shared.changed.notify_all();
    effect
}

fn hold(shared: &Shared) {
    let inner = shared.lock();
    let released = shared
        .changed
        .wait_timeout_while(inner, DEADLINE, |inner| inner.is_held);
    drop(released.expect("no thread of the server panics"));
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

//! An S3 server of the tests' own, in memory and on loopback: strict where the protocol is, counting what it is asked,
//! and misbehaving on order. One bucket, named [`BUCKET`]; every request must be signed by its one client.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;

use self::service::{judge, tag};
use self::wire::{Answer, Begun, Incoming, begin, deliver, receive};
use crate::signature::Identity;

mod service;
pub mod wire;

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
    /// A listing of the uploads in parts that are open.
    ListUploads,
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
    /// The request's body is another one when it arrives.
    WrongUpload,
    /// The answer's entity tag is another one.
    WrongTag,
    /// It is done, and the connection is reset behind the answer.
    ResetAfter,
    /// It is done, and the answer comes a few bytes at a time.
    Slow,
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

/// An upload in parts.
struct Upload {
    object: String,
    begun: Timestamp,
    parts: BTreeMap<u32, Vec<u8>>,
}

#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
struct Inner {
    objects: BTreeMap<String, Object>,
    /// By upload id.
    uploads: BTreeMap<String, Upload>,
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

/// Another service's way to answer: it is told what a request is about, and may let the server do what it asks for.
type Manner = Box<dyn FnMut(&Asked<'_>, &mut dyn FnMut() -> Answer) -> Answer + Send>;

/// A request as a [`Manner`] sees it.
pub struct Asked<'a> {
    pub kind: Kind,
    pub key: &'a str,
    pub incoming: &'a Incoming,
}

struct Shared {
    inner: Mutex<Inner>,
    manner: Mutex<Option<Manner>>,
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
            manner: Mutex::new(None),
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

    /// Answers as another service does, from now on.
    pub fn behave(
        &self,
        manner: impl FnMut(&Asked<'_>, &mut dyn FnMut() -> Answer) -> Answer + Send + 'static,
    ) {
        *self.manner() = Some(Box::new(manner));
    }

    /// Answers by itself again.
    pub fn behave_well(&self) {
        *self.manner() = None;
    }

    fn manner(&self) -> MutexGuard<'_, Option<Manner>> {
        let manner = self.shared.manner.lock();
        manner.expect("no thread of the server panics")
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

    /// Lets so much time go by for the open ones.
    pub fn age_uploads(&self, by: Duration) {
        for upload in self.shared.lock().uploads.values_mut() {
            upload.begun -= by;
        }
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

/// Serves one connection to its end.
fn serve(shared: &Shared, stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(mut incoming) = receive(&mut reader)? {
        let Some(about) = incoming.about() else {
            shared.lock().complaints.push(format!(
                "{} {} is no request",
                incoming.method, incoming.path
            ));
            return Ok(());
        };
        let effect = arrive(shared, about.kind, &about.place);
        if effect == Some(Effect::Hold) {
            hold(shared);
        }
        let answer = match begin(effect, stream, &mut reader, &mut incoming)? {
            Begun::Over => return Ok(()),
            Begun::Refused(answer) => answer,
            Begun::GoesOn => {
                let mut manner = shared.manner.lock().expect("no manner panics");
                let mut serve = || judge(shared, &incoming, &about);
                let asked = Asked {
                    kind: about.kind,
                    key: &about.place,
                    incoming: &incoming,
                };
                match manner.as_mut() {
                    Some(manner) => manner(&asked, &mut serve),
                    None => serve(),
                }
            }
        };
        shared.lock().requests.push(Request {
            kind: about.kind,
            key: about.place,
            received: incoming.body.len(),
            sent: answer.body.len(),
            status: answer.status,
            is_virtual_host: about.is_virtual_host,
        });
        shared.changed.notify_all();
        if !deliver(effect, about.kind, answer, stream, &mut reader)? {
            return Ok(());
        }
    }
    Ok(())
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

//! A proxy between an agent and an S3 server, real or in memory: passes requests on as they are, or lets them go wrong, or
//! holds each until a test lets it pass. Requests keep their `Host`, so signatures stay right.

use std::io::{self, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::agent::Place;
use crate::s3::wire::{Answer, Begun, Incoming, begin, deliver, receive};
use crate::s3::{Effect, Kind};

/// Says what goes wrong with a request of this kind about this key.
type Plan = Box<dyn FnMut(Kind, &str) -> Option<Effect> + Send>;

/// Between two looks whether whom a test waits for has ended without another request.
const LOOK: Duration = Duration::from_millis(1);

/// Far longer than anything takes, so that only what hangs fails a test.
const DEADLINE: Duration = Duration::from_mins(1);

struct Inner {
    plan: Plan,
    /// Requests so far.
    arrived: u64,
    /// Every request waits to be let pass.
    is_gated: bool,
    waiting: u64,
    may_pass: u64,
    passed: u64,
    /// Requests of which it is not settled yet what they do on the server.
    under_way: u64,
    /// Connections that are open, and where the last one came from.
    connections: u64,
    newest: Option<SocketAddr>,
    is_stopped: bool,
}

struct Shared {
    upstream: SocketAddr,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no thread of the proxy panics")
    }
}

/// The proxy; it stops when this is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// In front of a store that has requests.
    pub fn start(place: &Place) -> Self {
        let upstream = match place {
            Place::Memory(s3) => s3.address,
            Place::Moto(moto, _) => moto.address,
            Place::Directory(_) => panic!("a directory has no requests"),
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            upstream,
            inner: Mutex::new(Inner {
                plan: Box::new(|_, _| None),
                arrived: 0,
                is_gated: false,
                waiting: 0,
                may_pass: 0,
                passed: 0,
                under_way: 0,
                connections: 0,
                newest: None,
                is_stopped: false,
            }),
            changed: Condvar::new(),
        });
        let proxy = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if proxy.lock().is_stopped {
                    return;
                }
                let shared = Arc::clone(&proxy);
                if let Ok(stream) = stream {
                    let mut inner = proxy.lock();
                    inner.connections += 1;
                    inner.newest = stream.peer_addr().ok();
                    drop(inner);
                    proxy.changed.notify_all();
                    std::thread::spawn(move || {
                        // Either end may go away in the middle; that is no fault of the proxy.
                        drop(serve(&shared, &stream));
                        shared.lock().connections -= 1;
                        shared.changed.notify_all();
                    });
                }
            }
        });
        Self { address, shared }
    }

    /// The setting `RUNTIME_S3_ENDPOINT` that leads through it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets requests go wrong as `plan` says, from now on.
    pub fn plan(&self, plan: impl FnMut(Kind, &str) -> Option<Effect> + Send + 'static) {
        self.shared.lock().plan = Box::new(plan);
    }

    /// Lets nothing go wrong any more.
    pub fn behave(&self) {
        self.plan(|_, _| None);
    }

    /// Requests that have come, answered or not.
    pub fn arrived(&self) -> u64 {
        self.shared.lock().arrived
    }

    /// Waits until it is settled what every request that has come does on the server.
    pub fn settle(&self) {
        self.wait_while(|inner| inner.under_way > 0);
    }

    /// Waits, after the end of whoever sent requests, until the last of them has come and is settled.
    pub fn drain(&self) {
        // Connections are taken in their order, so with this one every earlier one has been.
        let last = TcpStream::connect(self.address).expect("the proxy listens");
        let address = last.local_addr().ok();
        self.wait_while(|inner| inner.newest != address);
        drop(last);
        self.wait_while(|inner| inner.connections > 0);
    }

    fn wait_while(&self, is_busy: impl Fn(&Inner) -> bool) {
        let waited =
            self.shared
                .changed
                .wait_timeout_while(self.shared.lock(), DEADLINE, |inner| is_busy(inner));
        let wait = waited.expect("no thread of the proxy panics").1;
        assert!(!wait.timed_out(), "a request never ends");
    }

    /// Holds every request until [`Self::pass_one`], or lets all go.
    pub fn gate(&self, is_gated: bool) {
        self.shared.lock().is_gated = is_gated;
        self.shared.changed.notify_all();
    }

    /// Waits for a request, lets it pass and waits for its answer; false when `has_ended` says that none will come.
    pub fn pass_one(&self, has_ended: impl Fn() -> bool) -> bool {
        let mut inner = self.shared.lock();
        while inner.waiting == 0 {
            if has_ended() {
                return false;
            }
            inner = self.wait(inner);
        }
        inner.may_pass += 1;
        let after = inner.passed;
        self.shared.changed.notify_all();
        while inner.passed == after {
            inner = self.wait(inner);
        }
        true
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        let waited = self.shared.changed.wait_timeout(inner, LOOK);
        waited.expect("no thread of the proxy panics").0
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Ok(mut inner) = self.shared.inner.lock() {
            inner.is_stopped = true;
            inner.is_gated = false;
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
            return Ok(());
        };
        let effect = arrive(shared, about.kind, &about.place);
        let goes_on = exchange(
            shared,
            stream,
            &mut reader,
            &mut incoming,
            about.kind,
            effect,
        );
        shared.lock().passed += 1;
        shared.changed.notify_all();
        if !goes_on? {
            return Ok(());
        }
    }
    Ok(())
}

/// Notes the request, waits until it may pass, and finds what is to go wrong with it.
fn arrive(shared: &Shared, kind: Kind, key: &str) -> Option<Effect> {
    let mut inner = shared.lock();
    inner.arrived += 1;
    inner.waiting += 1;
    shared.changed.notify_all();
    let is_held = |inner: &mut Inner| inner.is_gated && inner.may_pass == 0;
    let waited = shared.changed.wait_while(inner, is_held);
    inner = waited.expect("no thread of the proxy panics");
    inner.waiting -= 1;
    inner.under_way += 1;
    inner.may_pass = inner.may_pass.saturating_sub(1);
    (inner.plan)(kind, key)
}

fn exchange(
    shared: &Shared,
    stream: &TcpStream,
    reader: &mut BufReader<TcpStream>,
    incoming: &mut Incoming,
    kind: Kind,
    effect: Option<Effect>,
) -> io::Result<bool> {
    let answer = match begin(effect, stream, reader, incoming) {
        Ok(Begun::Over) => Ok(None),
        Ok(Begun::Refused(answer)) => Ok(Some(answer)),
        Ok(Begun::GoesOn) => forward(shared.upstream, incoming, kind).map(Some),
        Err(error) => Err(error),
    };
    shared.lock().under_way -= 1;
    shared.changed.notify_all();
    match answer? {
        Some(answer) => deliver(effect, kind, answer, stream, reader),
        None => Ok(false),
    }
}

/// Sends a request on a connection of its own and takes the answer.
fn forward(upstream: SocketAddr, incoming: &Incoming, kind: Kind) -> io::Result<Answer> {
    let mut server = TcpStream::connect(upstream)?;
    server.set_nodelay(true)?;
    server.write_all(&incoming.to_bytes())?;
    let mut bytes = Vec::new();
    let head = loop {
        let mut buffer = [0; 16 << 10];
        let length = server.read(&mut buffer)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&buffer[..length]);
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let mut body = bytes.split_off(head);
    let mut answer = Answer::of_head(&String::from_utf8_lossy(&bytes));
    let length = answer.take_length().unwrap_or(0);
    if kind == Kind::Head {
        body = vec![0; length];
    }
    let have = body.len();
    body.resize(length.max(have), 0);
    server.read_exact(&mut body[have..])?;
    answer.body = body;
    Ok(answer)
}

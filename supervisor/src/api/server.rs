//! Takes connections and bounds them: how many, how long a request head may take, how large it may be.
//! Nobody can keep others out by connecting: every connection is taken at once, and with all places taken another one goes.
//!
//! Invariant: no connection and no request ends the process. A panic in a handler is a 500 (releases unwind, see the
//! workspace's profile); an `accept` that fails is logged and waited out.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{Instant, sleep, timeout};

use super::envelope::{Answer, Problem};
use super::listen::Listeners;
use super::places::{Places, Stage};
use super::routes::{self, Context, Handled};
use super::wire::Wire;
use crate::log::log;

/// The orchestrator needs one. Strangers have to make this many between somebody's connection and its first bytes to push it
/// out, and at their fastest that takes them ten milliseconds. More would cost more memory, and descriptors.
pub const MAX_CONNECTIONS: usize = 256;

/// Taken in a row, before they and others get a turn: one by one would be slower than strangers can connect. Much fewer than
/// there are places, since the first of them has to be heard before it goes.
const BATCH: usize = 32;

/// For the head of a request, and between two of them: idle and slow connections go.
pub const HEAD_TIME_LIMIT: Duration = Duration::from_secs(10);

/// Likewise where places are few because descriptors are: what somebody holds and does not use is missing elsewhere.
const SHORT_HEAD_TIME_LIMIT: Duration = Duration::from_secs(1);
const FEW_PLACES: usize = 16;

/// hyper's smallest. Heads beyond it get its 431.
const BUFFER: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;

/// Longest life of a connection; then for the answer under way.
const MAX_LIFE: Duration = Duration::from_hours(1);
const LAST_ANSWER: Duration = Duration::from_mins(10);

/// When `accept` fails, and no connection without a token can be ended for it.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// For answers under way when the process is done.
const DRAIN: Duration = Duration::from_millis(500);

pub struct Server {
    places: Arc<Semaphore>,
    all: usize,
    closing: watch::Sender<()>,
}

impl Server {
    /// Serves in the background from now on, this many connections at once; the task ends when it is drained.
    pub fn start(
        listeners: Listeners,
        context: Arc<Context>,
        all: usize,
    ) -> (Self, JoinHandle<()>) {
        let places = Arc::new(Semaphore::new(all));
        let closing = watch::Sender::new(());
        let quiet_limit = if all < FEW_PLACES {
            SHORT_HEAD_TIME_LIMIT
        } else {
            HEAD_TIME_LIMIT
        };
        let accepting = accept(
            listeners,
            context,
            places.clone(),
            quiet_limit,
            closing.clone(),
        );
        let server = Self {
            places,
            all,
            closing,
        };
        (server, tokio::spawn(accepting))
    }

    /// Lets answers under way leave, within a moment.
    pub async fn drain(self) {
        self.closing.send_replace(());
        let all = u32::try_from(self.all).expect("is small");
        let _ = timeout(DRAIN, self.places.acquire_many(all)).await;
    }
}

async fn accept(
    listeners: Listeners,
    context: Arc<Context>,
    places: Arc<Semaphore>,
    quiet_limit: Duration,
    closing: watch::Sender<()>,
) {
    let mut closed = closing.subscribe();
    let mut taken = Places::default();
    let mut failures = 0_u64;
    let mut batch = 0;
    loop {
        let accepted = tokio::select! {
            accepted = listeners.accept() => accepted,
            _ = closed.changed() => return,
        };
        match accepted {
            Ok(stream) => {
                if failures > 0 {
                    log!(Info, "connections are accepted again", failures = failures);
                    failures = 0;
                }
                // Answers are single small writes; waiting to merge them only delays.
                let _ = stream.set_nodelay(true);
                if places.available_permits() == 0 {
                    taken.shed();
                }
                let Ok(place) = places.clone().acquire_owned().await else {
                    return;
                };
                let stage = Stage::new();
                let connection = serve(
                    stream,
                    context.clone(),
                    closing.subscribe(),
                    stage.clone(),
                    quiet_limit,
                    place,
                );
                taken.add(tokio::spawn(connection).abort_handle(), stage);
                batch = (batch + 1) % BATCH;
                if batch == 0 {
                    yield_now().await;
                }
            }
            Err(error) => {
                if failures == 0 {
                    let reason = error.to_string();
                    log!(Error, "cannot accept a connection", reason = reason);
                }
                failures += 1;
                if is_short(&error) && taken.shed_stranger() {
                    // Its descriptor is free once its task has ended.
                    yield_now().await;
                } else {
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Descriptors have run out, ours or the machine's.
fn is_short(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// One connection, to its end. It may be without a request for as long as `quiet_limit`.
pub async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    context: Arc<Context>,
    mut closing: watch::Receiver<()>,
    stage: Stage,
    quiet_limit: Duration,
    _place: OwnedSemaphorePermit,
) {
    let service = service_fn(|request| {
        let handled = contained(|| routes::handle(context.clone(), request, &stage));
        let stage = stage.clone();
        async move {
            let answer = answered(handled).await;
            stage.end();
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .max_buf_size(BUFFER)
        .max_headers(MAX_HEADERS)
        // Who has sent all of a request may say so, and is answered.
        .half_close(true)
        .serve_connection(Wire(TokioIo::new(stream)), service);
    let mut connection = std::pin::pin!(connection);
    // One timer that is set when it is due: hyper's own is set anew for each request.
    let mut quiet = std::pin::pin!(sleep(quiet_limit));
    loop {
        tokio::select! {
            biased;
            // Broken connections are the peer's business: nothing of them is logged.
            _ = connection.as_mut() => return,
            // Published once, when we close.
            _ = closing.changed() => break,
            () = quiet.as_mut() => {}
        }
        let now = Instant::now();
        if now >= stage.opened() + MAX_LIFE {
            break;
        }
        let limit = stage.quiet_since().unwrap_or(now) + quiet_limit;
        if now >= limit {
            return;
        }
        quiet.as_mut().reset(limit);
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(LAST_ANSWER, connection).await;
}

/// Runs a handler so that its panic is an answer too.
fn contained(handler: impl FnOnce() -> Handled) -> Handled {
    catch_unwind(AssertUnwindSafe(handler)).unwrap_or_else(|_| Handled::Now(bug()))
}

/// Likewise, in a task of its own, for what takes time.
async fn answered(handled: Handled) -> Answer {
    match handled {
        Handled::Now(answer) => answer,
        Handled::Later(answer) => tokio::spawn(answer).await.unwrap_or_else(|_| bug()),
    }
}

fn bug() -> Answer {
    Problem::Internal("the request met a bug in the runtime".to_owned()).answer()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::sync::mpsc;

    use super::*;
    use crate::config::{Checked, Config};
    use crate::status::Status;

    const REQUEST: &[u8] =
        b"GET /v1/status HTTP/1.1\r\nAuthorization: Bearer 0123456789abcdef0123456789abcdef\r\n\r\n";

    /// Serves one end of a connection that holds so many bytes; gives the other end.
    fn connect(room: usize) -> DuplexStream {
        let variables = vec![(
            "RUNTIME_SERVICE_TOKEN".into(),
            "0123456789abcdef0123456789abcdef".into(),
        )];
        let config = Config::read(&variables, Vec::new(), Vec::new(), &Checked::default());
        let config = config.expect("the token is all that is needed");
        let (published, status) = watch::channel(Status::boot());
        let (events, _) = mpsc::unbounded_channel();
        let context = Arc::new(Context::new(
            Arc::new(config),
            status,
            events,
            MAX_CONNECTIONS,
        ));
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned();
        let place = place.expect("nobody else takes it");
        let (client, server) = duplex(room);
        let (closing, closed) = watch::channel(());
        tokio::spawn(async move {
            serve(
                server,
                context,
                closed,
                Stage::new(),
                HEAD_TIME_LIMIT,
                place,
            )
            .await;
            drop((published, closing));
        });
        client
    }

    /// Counted from the connection's opening and from the end of each request, and not for all of them together.
    #[tokio::test(start_paused = true)]
    async fn a_connection_has_ten_seconds_for_each_request() {
        let opened = Instant::now();
        let mut client = connect(64 * 1024);
        for _ in 0..3 {
            sleep(HEAD_TIME_LIMIT * 9 / 10).await;
            client.write_all(REQUEST).await.expect("it is open");
            let mut answer = [0; 4096];
            let count = client.read(&mut answer).await.expect("it is open");
            assert!(answer[..count].starts_with(b"HTTP/1.1 200"));
        }
        // Half a head does not count.
        client.write_all(&REQUEST[..20]).await.expect("it is open");
        let rest = client.read(&mut [0; 1]).await;
        assert_eq!(rest.expect("it is closed"), 0);
        assert_eq!(opened.elapsed().as_secs(), 9 * 3 + 10);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_read_ends_the_connection() {
        let mut client = connect(REQUEST.len());
        client.write_all(REQUEST).await.expect("it is open");
        sleep(HEAD_TIME_LIMIT + Duration::from_secs(1)).await;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.expect("it is closed");
        assert_eq!(answer.len(), REQUEST.len(), "what there was room for");
    }

    #[test]
    fn a_panic_in_a_handler_is_a_500() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("can be built");
        let at_once = contained(|| panic!("on purpose"));
        let later = Handled::Later(Box::pin(async { panic!("on purpose") }));
        for handled in [at_once, later] {
            assert_eq!(runtime.block_on(answered(handled)).status(), 500);
        }
    }
}

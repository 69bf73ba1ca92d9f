//! Takes connections and bounds them: how many, how long a request head may take, how large it may be.
//! Nobody can keep others out by connecting: every connection is taken at once, and with all places taken another one goes.
//!
//! Invariant: no connection and no request ends the process. A panic in a handler is a 500 (releases unwind, see the
//! workspace's profile); an `accept` that fails is logged and waited out.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

use super::envelope::{Answer, Problem};
use super::places::{Places, Stage};
use super::routes::{self, Context};
use super::wire::Wire;
use crate::log::log;

/// The orchestrator needs one. Strangers have to make this many between somebody's connection and its first bytes to push it
/// out, and at their fastest that takes them ten milliseconds. More would cost more memory, and descriptors.
const MAX_CONNECTIONS: usize = 256;

/// Taken in a row, before they and others get a turn: one by one would be slower than strangers can connect. Much fewer than
/// there are places, since the first of them has to be heard before it goes.
const BATCH: usize = 32;

/// Connections that the kernel holds until they are taken, if its `somaxconn` allows (listen(2)). One too many is dropped, and
/// tried again by whoever wants it after a second.
const BACKLOG: u32 = 4096;

/// For the head of a request, and between two of them: idle and slow connections go.
const HEAD_TIME_LIMIT: Duration = Duration::from_secs(10);

/// hyper's smallest. Heads beyond it get its 431.
const BUFFER: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;

/// Longest life of a connection, so that one whose peer reads nothing goes too; then for the answer under way.
const MAX_LIFE: Duration = Duration::from_hours(1);
const LAST_ANSWER: Duration = Duration::from_mins(10);

/// When `accept` fails it is mostly for lack of descriptors: others have to end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// For answers under way when the process is done.
const DRAIN: Duration = Duration::from_millis(500);

pub struct Server {
    places: Arc<Semaphore>,
    closing: watch::Sender<()>,
}

impl Server {
    /// Serves in the background from now on.
    pub fn start(listener: TcpListener, context: Arc<Context>) -> Self {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let closing = watch::Sender::new(());
        tokio::spawn(accept(listener, context, places.clone(), closing.clone()));
        Self { places, closing }
    }

    /// Lets answers under way leave, within a moment.
    pub async fn drain(self) {
        self.closing.send_replace(());
        let all = u32::try_from(MAX_CONNECTIONS).expect("is small");
        let _ = timeout(DRAIN, self.places.acquire_many(all)).await;
    }
}

/// Binds the address of the API.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // The port of the one before, whose connections the kernel still remembers.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(
    listener: TcpListener,
    context: Arc<Context>,
    places: Arc<Semaphore>,
    closing: watch::Sender<()>,
) {
    let mut closed = closing.subscribe();
    let mut taken = Places::default();
    let mut failures = 0_u64;
    let mut batch = 0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closed.changed() => return,
        };
        match accepted {
            Ok((stream, _)) => {
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
                let stage = Stage::default();
                let connection = serve(
                    stream,
                    context.clone(),
                    closing.subscribe(),
                    stage.clone(),
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
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, to its end.
pub async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    context: Arc<Context>,
    mut closing: watch::Receiver<()>,
    stage: Stage,
    _place: OwnedSemaphorePermit,
) {
    let service = service_fn(move |request| {
        let waits = routes::waits(&request);
        let handler = routes::handle(context.clone(), request, stage.clone());
        let answer = contained(handler, waits);
        let stage = stage.clone();
        async move {
            let answer = answer.await;
            stage.end();
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_LIMIT)
        .max_buf_size(BUFFER)
        .max_headers(MAX_HEADERS)
        .serve_connection(Wire(TokioIo::new(stream)), service);
    let mut connection = std::pin::pin!(connection);
    // Broken connections are the peer's business: nothing of them is logged.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = sleep(MAX_LIFE) => {}
        // Published once, when we close.
        _ = closing.changed() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(LAST_ANSWER, connection).await;
}

/// Runs a handler so that its panic is an answer too. One that `waits` goes on when its caller hangs up; for the rest, a task
/// of its own would be a fifth of the work.
async fn contained(handler: impl Future<Output = Answer> + Send + 'static, waits: bool) -> Answer {
    let answer = if waits {
        tokio::spawn(handler).await.ok()
    } else {
        AssertUnwindSafe(handler).catch_unwind().await.ok()
    };
    answer.unwrap_or_else(|| {
        Problem::Internal("the request met a bug in the runtime".to_owned()).answer()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_in_a_handler_is_a_500() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let runtime = runtime.expect("can be built");
        for waits in [false, true] {
            let handler = contained(async { panic!("on purpose") }, waits);
            assert_eq!(runtime.block_on(handler).status(), 500);
        }
    }
}

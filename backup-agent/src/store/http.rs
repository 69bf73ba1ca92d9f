//! One HTTP request to the service, bounded in time and bytes.

use std::{
    io,
    num::NonZeroU64,
    pin::{Pin, pin},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Method, Request, StatusCode, Uri,
    body::{Body, Bytes},
    header::{HeaderValue, PROXY_AUTHORIZATION},
};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::time::{Instant, sleep_until, timeout_at};
use url::Url;

use super::{StoreError, connect::Connector, network::Network, resolve::Resolver, tls};
use crate::log;

/// Longest wait for a connection. Two round trips across the world take half a second; a lost packet or two, three more.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes of an answer that has begun.
const STALL: Duration = Duration::from_secs(20);
/// A store that says nothing for so long is named in the log, and again each time that the silence has doubled.
const SILENCE: Duration = Duration::from_secs(2);
/// Idle connections are dropped before the usual services drop them.
const IDLE: Duration = Duration::from_secs(15);
/// The slowest upstream for which a part still counts as on its way, in bytes per second.
const SLOWEST: u64 = 128 * 1024;

/// A pool of connections.
pub struct Http {
    client: Client<HttpsConnector<Connector>, Full<Bytes>>,
    /// What a proxy wants to see with each request that it reads: those for http.
    authorization: Option<HeaderValue>,
    /// Bytes per second, both ways together.
    bandwidth: Option<NonZeroU64>,
    /// When what has been sent and received would have been through at that rate.
    through: Mutex<Instant>,
    /// None while the store answers.
    silence: Mutex<Option<Silence>>,
}

/// All requests together have had no answer.
#[derive(Clone, Copy)]
struct Silence {
    since: Instant,
    tell_at: Instant,
}

/// What came back.
pub struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Http {
    pub fn new(network: &Network, bandwidth: Option<NonZeroU64>) -> Self {
        let mut tcp = HttpConnector::new_with_resolver(Resolver::default());
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let proxy = network.proxy.clone();
        let authorization = proxy.as_ref().and_then(|proxy| proxy.authorization.clone());
        let connector = Connector { tcp, proxy };
        let connector = HttpsConnector::from((connector, tls::client(&network.authorities)));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Self {
            client,
            authorization,
            bandwidth,
            through: Mutex::new(Instant::now()),
            silence: Mutex::new(None),
        }
    }

    /// Waits for what the store sends, at most `limit`. The first `transfer` of it is for what is sent to the store.
    async fn wait<T>(
        &self,
        host: &str,
        transfer: Duration,
        limit: Duration,
        mut answer: Pin<&mut (dyn Future<Output = T> + Send)>,
    ) -> Result<T, StoreError> {
        let deadline = Instant::now() + limit;
        loop {
            let tell_at = self.tell_at(transfer);
            if let Ok(answer) = timeout_at(deadline.min(tell_at), &mut answer).await {
                return Ok(answer);
            }
            if Instant::now() >= deadline {
                return Err(StoreError::Stalled {
                    host: host.to_owned(),
                    after: limit,
                });
            }
            self.tell(host);
        }
    }

    fn tell_at(&self, transfer: Duration) -> Instant {
        let mut silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        let since = Instant::now();
        let begun = Silence {
            since,
            tell_at: since + SILENCE,
        };
        silence.get_or_insert(begun).tell_at + transfer
    }

    fn tell(&self, host: &str) {
        let mut silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        // Of several requests one tells.
        if let Some(silence) = silence.as_mut().filter(|silence| silence.tell_at <= now) {
            let silent = now - silence.since;
            silence.tell_at = now + silent;
            let fields = [
                ("host", host.into()),
                ("silentSeconds", silent.as_secs().into()),
            ];
            log::write(log::Level::Warn, "the store does not answer", &fields);
        }
    }

    /// Something came from the store.
    fn heard(&self) {
        *self.silence.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Waits until these bytes, after those of earlier requests, would be through.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a rate is not meant to the byte"
    )]
    async fn pace(&self, bytes: usize) {
        let Some(rate) = self.bandwidth else { return };
        let takes = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        let end = {
            let Ok(mut through) = self.through.lock() else {
                return;
            };
            *through = Instant::now().max(*through) + takes;
            *through
        };
        sleep_until(end).await;
    }

    /// Sends one request and takes an answer of at most `limit` bytes.
    pub async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: HeaderMap,
        body: Bytes,
        limit: usize,
    ) -> Result<Response, StoreError> {
        // Errors name the host only: the address carries the signature.
        let host = url.host_str().unwrap_or_default().to_owned();
        self.pace(body.len()).await;
        let transfer = Duration::from_secs(body.len() as u64 / SLOWEST);
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.headers_mut() = headers;
        if let Some(value) = self
            .authorization
            .clone()
            .filter(|_| url.scheme() == "http")
        {
            request.headers_mut().insert(PROXY_AUTHORIZATION, value);
        }
        *request.uri_mut() = url
            .as_str()
            .parse::<Uri>()
            .map_err(|_| StoreError::Protocol("the address cannot be sent"))?;
        let request = pin!(self.client.request(request));
        let patience = CONNECT + STALL + transfer;
        let response = self.wait(&host, transfer, patience, request).await?;
        let response = response.map_err(|error| broken(&host, &error))?;
        let (parts, mut incoming) = response.into_parts();
        let expected = usize::try_from(incoming.size_hint().lower()).unwrap_or(limit);
        let mut body = Vec::with_capacity(expected.min(limit));
        loop {
            self.heard();
            let frame = pin!(incoming.frame());
            let frame = self.wait(&host, Duration::ZERO, STALL, frame).await?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| broken(&host, &error))?;
            if let Some(data) = frame.data_ref() {
                if body.len() + data.len() > limit {
                    return Err(StoreError::TooLong);
                }
                body.extend_from_slice(data);
            }
        }
        self.pace(body.len()).await;
        Ok(Response {
            status: parts.status,
            headers: parts.headers,
            body: body.into(),
        })
    }
}

/// The error of a connection that cannot be made or breaks.
fn broken(host: &str, error: &(dyn std::error::Error + 'static)) -> StoreError {
    let host = host.to_owned();
    let mut cause = Some(error);
    while let Some(now) = cause {
        if let Some(error) = now.downcast_ref::<rustls::Error>()
            && let Some(reason) = tls::explain(error)
        {
            return StoreError::Untrusted { host, reason };
        }
        let is_parse = now
            .downcast_ref::<hyper::Error>()
            .is_some_and(hyper::Error::is_parse);
        // The words of tokio-rustls, which has no type for it.
        let reason = match now.to_string().as_str() {
            _ if is_parse => "it does not answer in HTTP",
            "tls handshake eof" => "it ends the connection when TLS begins",
            _ => {
                cause = deeper(now);
                continue;
            }
        };
        return StoreError::Transport {
            host,
            reason: format!("{reason}; check http or https and the port in RUNTIME_S3_ENDPOINT"),
        };
    }
    StoreError::Transport {
        host,
        reason: innermost(error),
    }
}

/// The cause at the bottom: the layers above say "client error" and the like.
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = deeper(cause) {
        cause = next;
    }
    cause.to_string()
}

/// The next cause. An error of input and output gives the source of what it wraps, and not that itself.
fn deeper<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a (dyn std::error::Error + 'static)> {
    match error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref)
    {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

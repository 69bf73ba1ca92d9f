//! One HTTP request to the service, bounded in time and bytes. TLS by rustls with the Mozilla roots built in: the image
//! has no certificate store of its own.

use std::{num::NonZeroU64, sync::Mutex, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Method, Request, StatusCode, Uri,
    body::{Body, Bytes},
};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

use super::StoreError;

/// Longest wait for a connection. Two round trips across the world take half a second; a lost packet or two, three more.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes of an answer that has begun.
const STALL: Duration = Duration::from_secs(20);
/// Idle connections are dropped before the usual services drop them.
const IDLE: Duration = Duration::from_secs(15);
/// The slowest upstream for which a part still counts as on its way, in bytes per second.
const SLOWEST: u64 = 128 * 1024;

/// A pool of connections.
pub struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// Bytes per second, both ways together.
    bandwidth: Option<NonZeroU64>,
    /// When what has been sent and received would have been through at that rate.
    through: Mutex<Instant>,
}

/// What came back.
pub struct Response {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Http {
    pub fn new(bandwidth: Option<NonZeroU64>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Self {
            client,
            bandwidth,
            through: Mutex::new(Instant::now()),
        }
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
        let transport = |reason: String| StoreError::Transport {
            host: host.clone(),
            reason,
        };
        let stalled = |after| StoreError::Stalled {
            host: host.clone(),
            after,
        };
        self.pace(body.len()).await;
        let patience = CONNECT + STALL + Duration::from_secs(body.len() as u64 / SLOWEST);
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.headers_mut() = headers;
        *request.uri_mut() = url
            .as_str()
            .parse::<Uri>()
            .map_err(|_| StoreError::Protocol("the address cannot be sent"))?;
        let response = timeout(patience, self.client.request(request))
            .await
            .map_err(|_| stalled(patience))?
            .map_err(|error| transport(innermost(&error)))?;
        let (parts, mut incoming) = response.into_parts();
        let expected = usize::try_from(incoming.size_hint().lower()).unwrap_or(limit);
        let mut body = Vec::with_capacity(expected.min(limit));
        loop {
            let frame = timeout(STALL, incoming.frame())
                .await
                .map_err(|_| stalled(STALL))?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| transport(innermost(&error)))?;
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

/// The cause at the bottom: the layers above say "client error" and the like.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

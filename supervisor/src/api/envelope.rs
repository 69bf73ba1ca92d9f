//! The stable form of every answer, and the closed list of what can go wrong with a request.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use crate::agent::{Failure, code};

pub type Answer = Response<Pieces>;

/// hyper copies each piece of a body before it writes it, and keeps the copy until the client has read it.
const PIECE: usize = 16 * 1024;

/// Seconds after which trying again may help: about the start of a gateway, and a moment of a store's trouble.
const GATEWAY_RETRY: &str = "5";
const BUSY_RETRY: &str = "5";
const STORE_RETRY: &str = "30";

/// A request that cannot be served. The sentence in it, if any, is for a person and free of secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    InvalidRequest(&'static str),
    /// Not a request at all, with the status that HTTP has for what is wrong.
    Unreadable(StatusCode),
    Unauthorized,
    NotFound,
    /// With what is allowed.
    MethodNotAllowed(&'static str),
    UnknownRequest,
    Fenced,
    BackupDisabled(String),
    /// As many requests of its kind wait already as may.
    Busy,
    GatewayUnavailable(String),
    StoreUnavailable(String),
    Timeout(String),
    Internal(String),
}

impl Problem {
    /// Before a restore has succeeded, and again once the root is lost.
    pub fn not_restored() -> Self {
        Self::BackupDisabled(
            "no restore has succeeded yet, so a backup could hide good data".to_owned(),
        )
    }

    fn parts(&self) -> (StatusCode, &'static str, &str) {
        match self {
            Self::InvalidRequest(reason) => (StatusCode::BAD_REQUEST, "invalid_request", reason),
            Self::Unreadable(status) => (
                *status,
                "invalid_request",
                "this cannot be read as a request of HTTP/1.1, or its head is too large",
            ),
            Self::Unauthorized => (
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "a valid service token is required",
            ),
            Self::NotFound => (
                StatusCode::NOT_FOUND,
                "not_found",
                "there is nothing at this path",
            ),
            Self::MethodNotAllowed(_) => (
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "this path does not take this method",
            ),
            Self::UnknownRequest => (
                StatusCode::NOT_FOUND,
                "unknown_request",
                "the gateway knows no such pairing request",
            ),
            Self::Fenced => (
                StatusCode::CONFLICT,
                "fenced",
                "another instance has taken over this store; this one takes no more backups",
            ),
            Self::BackupDisabled(reason) => (StatusCode::CONFLICT, "backup_disabled", reason),
            Self::Busy => (
                StatusCode::SERVICE_UNAVAILABLE,
                "busy",
                "too many requests of this kind are waiting for their answers; try again later",
            ),
            Self::GatewayUnavailable(reason) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "gateway_unavailable",
                reason,
            ),
            Self::StoreUnavailable(reason) => {
                (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", reason)
            }
            Self::Timeout(reason) => (StatusCode::GATEWAY_TIMEOUT, "timeout", reason),
            Self::Internal(reason) => (StatusCode::INTERNAL_SERVER_ERROR, "internal", reason),
        }
    }

    pub fn body(&self) -> Value {
        let (_, code, error) = self.parts();
        json!({ "ok": false, "error": error, "code": code })
    }

    pub fn answer(&self) -> Answer {
        let (status, ..) = self.parts();
        let mut answer = json(status, &self.body());
        let headers = answer.headers_mut();
        match self {
            // Who has no token gets no connection to keep either.
            Self::Unauthorized => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            // What is left of its body is not read.
            Self::InvalidRequest(_) => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Self::MethodNotAllowed(allowed) => {
                headers.insert(ALLOW, HeaderValue::from_static(allowed));
            }
            // A body of it may be on its way, and is not read.
            Self::Busy => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static(BUSY_RETRY));
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Self::GatewayUnavailable(_) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static(GATEWAY_RETRY));
            }
            Self::StoreUnavailable(_) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static(STORE_RETRY));
            }
            _ => {}
        }
        answer
    }
}

impl From<Failure> for Problem {
    /// What the agent's exit code means to a caller.
    fn from(failure: Failure) -> Self {
        match failure.code {
            code::FENCED => Self::Fenced,
            // Interrupted is: by our own shutdown. The next life takes the backup.
            code::UNREACHABLE | code::INTERRUPTED => Self::StoreUnavailable(failure.error),
            code::TIMEOUT => Self::Timeout(failure.error),
            _ if failure.word.is_some() => Self::BackupDisabled(failure.error),
            _ => Self::Internal(failure.error),
        }
    }
}

pub fn success(status: StatusCode, data: Value) -> Answer {
    rendered(status, body(data))
}

/// The body of an answer that succeeds.
pub fn body(data: Value) -> Bytes {
    let mut envelope = json!({ "ok": true });
    envelope["data"] = data;
    Bytes::from(envelope.to_string())
}

/// Likewise, with data that `write` appends as JSON, of about this size.
pub fn body_of(size: usize, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    const START: &[u8] = br#"{"ok":true,"data":"#;
    let mut body = Vec::with_capacity(START.len() + size + 256);
    body.extend_from_slice(START);
    write(&mut body);
    body.push(b'}');
    body
}

fn json(status: StatusCode, body: &Value) -> Answer {
    rendered(status, Bytes::from(body.to_string()))
}

/// An answer with a body that is JSON.
pub fn rendered(status: StatusCode, body: Bytes) -> Answer {
    let mut answer = Response::new(Pieces(body));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A body that is handed over piece by piece, so that a client that does not read costs no more than one.
pub struct Pieces(Bytes);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let size = self.0.len().min(PIECE);
        let piece = (size > 0).then(|| self.0.split_to(size));
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

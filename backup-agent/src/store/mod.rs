//! The store: a flat space of objects below one prefix, in a directory or on S3.
//!
//! Keys are relative to the instance. Every call is bounded in time and memory; what is transient has been retried already
//! when an error comes back.

mod connect;
mod dir;
mod http;
pub mod network;
mod probe;
pub mod proxy;
mod resolve;
mod retry;
mod s3;
pub mod tls;

pub use self::{probe::probe, retry::twice};

use std::{fmt, io, pin::Pin, sync::Arc, time::Duration};

use hyper::body::Bytes;
use jiff::Timestamp;
use tokio::sync::mpsc;

use crate::{
    config::{Config, Location},
    error::Error,
};

/// What a call of the store comes back with.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + 'a>>;

/// A piece of an object under way. All but the last are of one size, as R2 asks of multipart uploads.
pub struct Part {
    pub bytes: Bytes,
    /// No part follows. A channel that closes without this was abandoned by its sender: nothing is made visible.
    pub is_last: bool,
}

/// Largest object that [`Store::get`] takes: records and heads have a few hundred bytes for each layer.
pub const SMALL_OBJECT: usize = 1 << 20;

/// Keys that begin so are objects of [`probe`], removed at its end unless it is killed.
const PROBE: &str = "probe-";

/// An object that another tool wrote.
#[derive(Debug)]
pub struct Object {
    /// A directory's ends in `/`.
    pub key: String,
    pub size: u64,
    /// Another one when the content changes.
    pub tag: String,
}

/// A place that keeps objects.
pub trait Store {
    /// A small object whole, and its entity tag.
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, (Vec<u8>, String)>;

    /// Exactly `length` bytes from `offset` on; [`StoreError::TooShort`] when the object has fewer.
    fn get_range<'a>(&'a self, key: &'a str, offset: u64, length: usize) -> Pending<'a, Bytes>;

    /// Writes a small object if its tag is `expected`, or, for `None`, if there is none; gives the new tag.
    /// [`StoreError::Conflict`] when it is not so.
    fn put_if<'a>(
        &'a self,
        key: &'a str,
        bytes: Vec<u8>,
        expected: Option<&'a str>,
    ) -> Pending<'a, String>;

    /// Writes an object of any size from parts as they arrive. It becomes visible whole or not at all.
    fn upload<'a>(&'a self, key: &'a str, parts: mpsc::Receiver<Part>) -> Pending<'a, ()>;

    /// Every key that begins with `prefix`, which is empty or ends in `/`.
    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<String>>;

    /// Every object that another tool wrote below `prefix`, which ends in `/`, however deep.
    fn walk<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<Object>>;

    /// Tag, as [`Store::walk`] has it, and modification time in nanoseconds of what another tool wrote.
    fn stat<'a>(&'a self, key: &'a str) -> Pending<'a, (String, Option<i64>)>;

    /// Removes an object; one that is not there is removed already.
    fn delete<'a>(&'a self, key: &'a str) -> Pending<'a, ()>;

    /// Removes what writers that died before then left: probes and files under way. Likewise open uploads in parts, which
    /// have only the time of their begin, that are older than `uploads_before`. Gives their number.
    fn sweep(&self, before: Timestamp, uploads_before: Timestamp) -> Pending<'_, u64>;

    /// Lets go of what interrupted uploads hold on the store.
    fn abort_uploads(&self) -> Pending<'_, ()>;
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("no such object")]
    NotFound,
    #[error("the object is larger than anything of its kind")]
    TooLong,
    #[error("the object ends before what was asked for")]
    TooShort,
    #[error("it was changed by somebody else meanwhile")]
    Conflict,
    #[error("the service answered {status}{}{code}{}", if code.is_empty() { "" } else { " " }, Advice(*status, code, hint.as_deref()))]
    Status {
        status: u16,
        /// The service's word, such as `SlowDown`; never its prose, which may repeat the request.
        code: String,
        /// From `Retry-After`.
        retry_after: Option<Duration>,
        /// What the answer itself says that helps.
        hint: Option<String>,
    },
    #[error("{place} is no S3 service: {what}; check RUNTIME_S3_ENDPOINT")]
    NotS3 { place: String, what: &'static str },
    #[error(
        "the listing cannot be trusted: {0}; check what is between this machine and the service, or use another one"
    )]
    Listing(&'static str),
    #[error(
        "the service gives the whole object when it is asked for a range; use one that serves ranges"
    )]
    NoRanges,
    #[error("cannot talk to {host}: {reason}")]
    Transport { host: String, reason: String },
    #[error("cannot trust {host}: {reason}")]
    Untrusted { host: String, reason: String },
    #[error("{host} did not answer within {} s", .after.as_secs())]
    Stalled { host: String, after: Duration },
    #[error("the answer makes no sense: {0}")]
    Protocol(&'static str),
    #[error("its file system has no locks ({0}); {NO_LOCKS}")]
    NoLocks(io::Error),
    #[error("the upload was abandoned")]
    Abandoned,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What to do about a file system without locks.
const NO_LOCKS: &str = "mount it with locks (NFS: nfsvers=4), or set RUNTIME_STORE_UNFENCED=allow if no second writer can \
                        ever exist";

/// What an operator should look at.
struct Advice<'a>(u16, &'a str, Option<&'a str>);

impl fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(status, code, hint) = *self;
        let advice = match (status, code) {
            _ if hint.is_some() => hint.unwrap_or_default(),
            (300..=399, _) => "check RUNTIME_S3_ENDPOINT and RUNTIME_S3_REGION",
            (_, "RequestTimeTooSkewed") => "set this machine's clock",
            (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => {
                "the session token is no longer valid: renew RUNTIME_S3_SESSION_TOKEN and the keys"
            }
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch") => {
                "check the S3 credentials (RUNTIME_S3_ACCESS_KEY_ID, RUNTIME_S3_SECRET_ACCESS_KEY) and RUNTIME_S3_REGION"
            }
            // What is missing depends on the request: see `Error::advice`.
            (_, "AccessDenied") => return Ok(()),
            (401 | 403, _) => {
                "check the S3 credentials, what they may do, and this machine's clock"
            }
            (404, "NoSuchBucket") => {
                "check the bucket's name in RUNTIME_STORE, and that RUNTIME_S3_ENDPOINT names no bucket"
            }
            (404, _) => "check RUNTIME_S3_ENDPOINT and the bucket's name",
            (407, _) => "the proxy wants a user and a password: http://user:password@host",
            _ => return Ok(()),
        };
        write!(f, "; {advice}")
    }
}

impl StoreError {
    /// Whether the same request may succeed a moment later.
    fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, code, .. } => {
                // An error behind a success is one that the service met while it worked.
                matches!(status, 200 | 408 | 429 | 500..=599)
                    // Two conditional writes met inside of the service: ours was not judged.
                    || (*status == 409 && code == "ConditionalRequestConflict")
                    || code == "RequestTimeout"
                    // The body was altered on its way, and Content-MD5 said so.
                    || code == "BadDigest"
            }
            Self::Transport { .. } | Self::Stalled { .. } | Self::Protocol(_) => true,
            Self::NotFound
            | Self::TooLong
            | Self::TooShort
            | Self::Conflict
            | Self::NotS3 { .. }
            | Self::Listing(_)
            | Self::NoRanges
            | Self::Untrusted { .. }
            | Self::NoLocks(_)
            | Self::Abandoned
            | Self::Io(_) => false,
        }
    }
}

/// Opens the configured store. `bound`: what is left of the whole operation's time.
pub fn open(config: &Config, bound: Duration) -> Result<Arc<dyn Store>, Error> {
    let folder = format!("{}/", config.instance);
    open_at(&config.location, &folder, bound, config.is_unfenced_allowed)
}

/// Opens what is at `folder` of a location: empty, or ends in `/`. `is_unfenced`: there is no second writer.
pub fn open_at(
    location: &Location,
    folder: &str,
    bound: Duration,
    is_unfenced: bool,
) -> Result<Arc<dyn Store>, Error> {
    Ok(match location {
        Location::Directory(path) => Arc::new(
            dir::Directory::new(path.join(folder), is_unfenced)
                .map_err(Error::local("read", "random bytes"))?,
        ),
        Location::S3(bucket) => Arc::new(s3::S3::new(bucket, folder, bound)?),
    })
}

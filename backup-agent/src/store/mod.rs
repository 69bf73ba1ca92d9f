//! The store: a flat space of objects below one prefix, in a directory or on S3.
//!
//! Keys are relative to the instance. Every call is bounded in time and memory; what is transient has been retried already
//! when an error comes back.

mod dir;
mod http;
mod retry;
mod s3;

pub use self::retry::twice;

use std::{io, pin::Pin, sync::Arc, time::Duration};

use hyper::body::Bytes;
use jiff::Timestamp;
use tokio::sync::mpsc;

use crate::{
    config::{Config, Location},
    error::Error,
    snapshot::id,
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

/// Keys that begin so are objects of [`check_conditions`], removed at its end unless it is killed.
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
    #[error("the service answered {status}{}{code}{}", if code.is_empty() { "" } else { " " }, advice(*status))]
    Status {
        status: u16,
        /// The service's word, such as `SlowDown`; never its prose, which may repeat the request.
        code: String,
        /// From `Retry-After`.
        retry_after: Option<Duration>,
    },
    #[error("cannot talk to {host}: {reason}")]
    Transport { host: String, reason: String },
    #[error("{host} did not answer within {} s", .after.as_secs())]
    Stalled { host: String, after: Duration },
    #[error("the answer makes no sense: {0}")]
    Protocol(&'static str),
    #[error("the upload was abandoned")]
    Abandoned,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What an operator should look at.
fn advice(status: u16) -> &'static str {
    match status {
        300..=399 => "; check RUNTIME_S3_ENDPOINT and RUNTIME_S3_REGION",
        401 | 403 => "; check the S3 credentials, what they may do, and this machine's clock",
        404 => "; check the bucket's name",
        _ => "",
    }
}

impl StoreError {
    /// Whether the same request may succeed a moment later.
    fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, code, .. } => {
                matches!(status, 408 | 429 | 500..=599)
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
            | Self::Abandoned
            | Self::Io(_) => false,
        }
    }
}

/// Opens the configured store. `bound`: what is left of the whole operation's time.
pub fn open(config: &Config, bound: Duration) -> Result<Arc<dyn Store>, Error> {
    open_at(&config.location, &format!("{}/", config.instance), bound)
}

/// Opens what is at `folder` of a location: empty, or ends in `/`.
pub fn open_at(
    location: &Location,
    folder: &str,
    bound: Duration,
) -> Result<Arc<dyn Store>, Error> {
    Ok(match location {
        Location::Directory(path) => Arc::new(
            dir::Directory::new(path.join(folder)).map_err(Error::local("read", "random bytes"))?,
        ),
        Location::S3(bucket) => Arc::new(s3::S3::new(bucket, folder, bound)?),
    })
}

/// Finds out whether the store honours conditional writes, on an object of its own.
pub async fn check_conditions(store: &dyn Store) -> Result<(), Error> {
    let suffix = id::random_hex::<8>().map_err(Error::local("read", "random bytes"))?;
    let key = format!("{PROBE}{suffix}");
    let broken = is_broken(store, &key).await;
    let deleted = store.delete(&key).await;
    match broken.map_err(Error::store("probe", &key))? {
        Some(broken) => Err(Error::Unfenced { broken }),
        None => deleted.map_err(Error::store("delete", &key)),
    }
}

async fn is_broken(store: &dyn Store, key: &str) -> Result<Option<&'static str>, StoreError> {
    match store.put_if(key, b"first".to_vec(), None).await {
        // A retry after a lost answer meets the first try's own object.
        Ok(_) | Err(StoreError::Conflict) => {}
        Err(error) => return Err(error),
    }
    let tries = [
        (None, "it replaced an object under If-None-Match"),
        (
            Some("\"00000000000000000000000000000000\""),
            "it replaced an object under an If-Match that does not match",
        ),
    ];
    for (expected, broken) in tries {
        match store.put_if(key, b"second".to_vec(), expected).await {
            Err(StoreError::Conflict) => {}
            Ok(_) => return Ok(Some(broken)),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

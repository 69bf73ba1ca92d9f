//! Requests to the service: signed, sent, tried again, their answers judged.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use hyper::{
    HeaderMap, Method,
    body::Bytes,
    header::{CONTENT_RANGE, ETAG, HeaderName, HeaderValue, RANGE},
};
use jiff::Timestamp;
use md5::{Digest, Md5};
use rusty_s3::{Bucket, Credentials, signing::sign};
use tokio::time::Instant;
use url::{Position, Url};

use super::{
    listing,
    refusal::{code, is_web_page, refusal},
};
use crate::store::{
    StoreError,
    http::{Http, Response},
    retry::retry,
};

/// Validity of a signature: longer than the longest attempt, shorter than anyone needs to replay it.
const EXPIRY: Duration = Duration::from_mins(15);
/// Largest answer that is not an object: a page of a listing has at most 1,000 keys of at most 1 KiB, each in XML.
pub const ANSWER: usize = 4 << 20;

pub const WRONG_FORM: StoreError =
    StoreError::Protocol("it is not of the form that S3 gives it; check RUNTIME_S3_ENDPOINT");

/// A request before it is signed.
pub struct Ask<'a> {
    pub method: Method,
    /// None of a request to the bucket itself.
    pub object: Option<&'a str>,
    /// In the order of their names.
    pub query: &'a [(&'a str, &'a str)],
    /// Signed, with names in lower case and in their order.
    pub headers: &'a [(&'a str, &'a str)],
    /// Not signed: a proxy may ask for more than was asked of it.
    pub range: Option<HeaderValue>,
    pub body: Bytes,
    /// Largest body of an answer.
    pub limit: usize,
}

impl<'a> Ask<'a> {
    pub fn new(method: Method, object: Option<&'a str>, query: &'a [(&'a str, &'a str)]) -> Self {
        Self {
            method,
            object,
            query,
            headers: &[],
            range: None,
            body: Bytes::new(),
            limit: ANSWER,
        }
    }

    pub fn get(object: Option<&'a str>, query: &'a [(&'a str, &'a str)]) -> Self {
        Self::new(Method::GET, object, query)
    }
}

/// What requests need, shared with the tasks that send parts.
pub struct Remote {
    pub http: Http,
    pub bucket: Bucket,
    pub credentials: Credentials,
    pub deadline: Instant,
    /// What every key begins with; credentials may be limited to it.
    pub prefix: String,
}

impl Remote {
    /// One attempt of a request. It is signed afresh, as signatures age while we wait.
    pub async fn attempt(&self, ask: &Ask<'_>) -> Result<Response, StoreError> {
        let answer = self.exchange(ask).await?;
        if answer.status.is_success() {
            // A range may be of a page that somebody keeps; whatever is kept has a tag.
            let is_object = ask.range.is_some() && answer.headers.contains_key(ETAG);
            if is_web_page(&answer) && !is_object {
                return Err(self.not_s3("it answers with a web page"));
            }
            return Ok(answer);
        }
        match refusal(&answer) {
            StoreError::NotFound if ask.object.is_none() => Err(self.no_bucket()),
            StoreError::NotFound if code(&answer).is_empty() => {
                self.check_bucket().await.and(Err(StoreError::NotFound))
            }
            error => Err(error),
        }
    }

    /// Finds out whether there is such a bucket: only then is an object absent of which the service says nothing.
    async fn check_bucket(&self) -> Result<(), StoreError> {
        let prefix = self.prefix.as_str();
        let query = [("list-type", "2"), ("max-keys", "1"), ("prefix", prefix)];
        let answer = self.exchange(&Ask::get(None, &query)).await?;
        match answer.status.as_u16() {
            200 if is_web_page(&answer) => Err(self.not_s3("it answers with a web page")),
            200 => listing::root(&answer.body, self.bucket.name()).map(drop),
            _ => match refusal(&answer) {
                StoreError::NotFound => Err(self.no_bucket()),
                error => Err(error),
            },
        }
    }

    /// The error of a 404 about the bucket itself.
    fn no_bucket(&self) -> StoreError {
        self.not_s3("it answers 404 to a listing of the bucket")
    }

    fn not_s3(&self, what: &'static str) -> StoreError {
        let url = self.bucket.base_url();
        StoreError::NotS3 {
            place: url[..Position::AfterPort].to_owned(),
            what,
        }
    }

    async fn exchange(&self, ask: &Ask<'_>) -> Result<Response, StoreError> {
        let method = match ask.method {
            Method::PUT => rusty_s3::Method::Put,
            Method::POST => rusty_s3::Method::Post,
            Method::HEAD => rusty_s3::Method::Head,
            Method::DELETE => rusty_s3::Method::Delete,
            _ => rusty_s3::Method::Get,
        };
        let url: Url = sign(
            &Timestamp::now(),
            method,
            match ask.object {
                Some(object) => self.bucket.object_url(object),
                None => self.bucket.base_url().clone(),
            },
            self.credentials.key(),
            self.credentials.secret(),
            self.credentials.token(),
            self.bucket.region(),
            EXPIRY.as_secs(),
            ask.query.iter().copied(),
            ask.headers.iter().copied(),
        );
        let mut headers = HeaderMap::new();
        for (name, value) in ask.headers {
            let name = HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| StoreError::Protocol("a header cannot be sent"))?;
            headers.insert(name, header_value(value)?);
        }
        if let Some(range) = &ask.range {
            headers.insert(RANGE, range.clone());
        }
        let (method, body) = (ask.method.clone(), ask.body.clone());
        self.http.send(method, &url, headers, body, ask.limit).await
    }

    /// A request that is tried again while the failure is transient.
    pub async fn send(&self, ask: &Ask<'_>) -> Result<Response, StoreError> {
        self.send_until(ask, &|_| Ok(())).await
    }

    /// The same, where an answer that `parse` cannot use counts as a failure too: S3 may answer 200 and then an error.
    pub async fn send_and<T>(
        &self,
        ask: &Ask<'_>,
        parse: impl Fn(&Response) -> Result<T, StoreError> + Sync,
    ) -> Result<T, StoreError> {
        let is_right = |answer: &Response| parse(answer).map(drop);
        parse(&self.send_until(ask, &is_right).await?)
    }

    /// One function for all requests: the compiler would make a copy of it for each.
    async fn send_until(
        &self,
        ask: &Ask<'_>,
        is_right: &(dyn Fn(&Response) -> Result<(), StoreError> + Sync),
    ) -> Result<Response, StoreError> {
        retry(self.deadline, || async {
            let answer = self.attempt(ask).await?;
            is_right(&answer).map(|()| answer)
        })
        .await
    }

    /// Writes an object, or a part of one, and gives its tag: whoever took the bytes has one for them.
    pub async fn put(
        &self,
        object: &str,
        query: &[(&str, &str)],
        bytes: Bytes,
        condition: Option<(&str, &str)>,
    ) -> Result<String, StoreError> {
        let sum = checksum(&bytes);
        let mut headers = vec![(CONTENT_MD5, sum.as_str())];
        headers.extend(condition);
        let ask = Ask {
            headers: &headers,
            body: bytes,
            ..Ask::new(Method::PUT, Some(object), query)
        };
        entity_tag(&self.send(&ask).await?)
    }
}

/// The body's own checksum, which every S3 service compares with what arrived.
const CONTENT_MD5: &str = "content-md5";

fn checksum(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(Md5::digest(bytes))
}

/// No operation is bounded by more than this; it keeps the sum of clock and bound in range.
pub fn deadline(bound: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(bound)
        .unwrap_or_else(|| now + Duration::from_hours(8760))
}

pub fn header_value(text: &str) -> Result<HeaderValue, StoreError> {
    HeaderValue::from_str(text).map_err(|_| StoreError::Protocol("a tag cannot be sent back"))
}

pub fn entity_tag(answer: &Response) -> Result<String, StoreError> {
    let tag = answer
        .headers
        .get(ETAG)
        .and_then(|value| value.to_str().ok());
    tag.map(str::to_owned).ok_or(StoreError::Protocol(
        "it has no ETag, as S3 gives it; check RUNTIME_S3_ENDPOINT",
    ))
}

/// A tag without quotes and without the mark of a weak one: services and proxies differ in both.
pub fn plain_tag(tag: &str) -> String {
    let tag = tag.trim();
    let tag = tag.strip_prefix("W/").unwrap_or(tag);
    tag.trim_matches('"').to_owned()
}

/// The bytes that a range is of: first, last, and the size of the object where it is known: `bytes 0-9/100`.
pub fn content_range(answer: &Response) -> Option<(u64, u64, Option<u64>)> {
    let range = answer.headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (bytes, size) = range.trim().strip_prefix("bytes")?.split_once('/')?;
    let (first, last) = bytes.trim().split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, size.parse().ok()))
}

/// Where the tools that copy files to S3 keep a file's time (rclone, s3fs): seconds since 1970, with or without a fraction.
const MTIME: &str = "x-amz-meta-mtime";

/// When the file that became this object was written, where that is known, in nanoseconds since 1970.
pub fn file_time(answer: &Response) -> Option<i64> {
    parse_time(answer.headers.get(MTIME)?.to_str().ok()?)
}

/// A time of [`MTIME`] in nanoseconds.
fn parse_time(text: &str) -> Option<i64> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let nanos = format!("{fraction:0<9}").get(..9)?.parse::<u32>().ok()?;
    let seconds = seconds.parse::<i64>().ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(i64::from(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_compared_without_what_services_put_around_them() {
        for tag in ["\"abc\"", "W/\"abc\"", "abc", " \"abc\" "] {
            assert_eq!(plain_tag(tag), "abc", "{tag}");
        }
    }

    #[test]
    fn times_of_files_may_have_a_fraction() {
        for (text, want) in [
            ("1700000000.123456789", Some(1_700_000_000_123_456_789)),
            ("1700000000.5", Some(1_700_000_000_500_000_000)),
            ("1700000000", Some(1_700_000_000_000_000_000)),
            ("yesterday", None),
            ("1.x", None),
            ("99999999999999", None),
        ] {
            assert_eq!(parse_time(text), want, "{text}");
        }
    }
}

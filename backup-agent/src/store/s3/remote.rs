//! Requests to the service: signed, sent, tried again, their answers judged.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use hyper::{
    HeaderMap, Method,
    body::Bytes,
    header::{CONTENT_RANGE, ETAG, HeaderName, HeaderValue, RETRY_AFTER},
};
use jiff::{Timestamp, fmt::rfc2822::DateTimeParser};
use md5::{Digest, Md5};
use rusty_s3::{Bucket, Credentials, S3Action};
use tokio::time::Instant;
use url::Url;

use crate::store::{
    StoreError,
    http::{Http, Response},
    retry::retry,
};

/// Validity of a signature: longer than the longest attempt, shorter than anyone needs to replay it.
pub const EXPIRY: Duration = Duration::from_mins(15);
/// Largest answer that is not an object: a page of a listing has at most 1,000 keys of at most 1 KiB, each in XML.
pub const ANSWER: usize = 4 << 20;

/// Signs a request: its address and headers.
pub type Action<'a> = dyn Fn(&Remote) -> (Url, HeaderMap) + Sync + 'a;

const WRONG_FORM: StoreError = StoreError::Protocol("it is not of the form that S3 gives it");

/// What requests need, shared with the tasks that send parts.
pub struct Remote {
    pub http: Http,
    pub bucket: Bucket,
    pub credentials: Credentials,
    pub deadline: Instant,
}

impl Remote {
    /// One attempt of a request; `action` signs it afresh, as signatures age while we wait.
    pub async fn attempt(
        &self,
        method: Method,
        action: &Action<'_>,
        body: Bytes,
        limit: usize,
    ) -> Result<Response, StoreError> {
        let (url, headers) = action(self);
        let answer = self.http.send(method, &url, headers, body, limit).await?;
        if answer.status.is_success() {
            Ok(answer)
        } else {
            Err(refusal(&answer))
        }
    }

    /// A request that is tried again while the failure is transient.
    pub async fn send(
        &self,
        method: Method,
        action: &Action<'_>,
        body: Bytes,
        limit: usize,
    ) -> Result<Response, StoreError> {
        self.send_until(method, action, body, limit, &|_| true)
            .await
    }

    /// The same, where an answer that `parse` cannot use counts as a failure too: S3 may answer 200 and then an error.
    pub async fn send_and<T>(
        &self,
        method: Method,
        action: &Action<'_>,
        body: Bytes,
        limit: usize,
        parse: impl Fn(&Response) -> Option<T> + Sync,
    ) -> Result<T, StoreError> {
        let is_right = |answer: &Response| parse(answer).is_some();
        let answer = self.send_until(method, action, body, limit, &is_right);
        parse(&answer.await?).ok_or(WRONG_FORM)
    }

    /// One function for all requests: the compiler would make a copy of it for each.
    async fn send_until(
        &self,
        method: Method,
        action: &Action<'_>,
        body: Bytes,
        limit: usize,
        is_right: &(dyn Fn(&Response) -> bool + Sync),
    ) -> Result<Response, StoreError> {
        retry(self.deadline, || async {
            let answer = self.attempt(method.clone(), action, body.clone(), limit);
            let answer = answer.await?;
            is_right(&answer).then_some(answer).ok_or(WRONG_FORM)
        })
        .await
    }

    pub async fn put(
        &self,
        object: &str,
        bytes: Bytes,
        condition: Option<(&'static str, &str)>,
    ) -> Result<Response, StoreError> {
        let sum = checksum(&bytes);
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static(CONTENT_MD5), header_value(&sum)?);
        if let Some((name, value)) = condition {
            headers.insert(HeaderName::from_static(name), header_value(value)?);
        }
        let action = |remote: &Self| {
            let mut put = remote.bucket.put_object(Some(&remote.credentials), object);
            put.headers_mut().insert(CONTENT_MD5, sum.as_str());
            if let Some((name, value)) = condition {
                put.headers_mut().insert(name, value);
            }
            (put.sign(EXPIRY), headers.clone())
        };
        self.send(Method::PUT, &action, bytes, ANSWER).await
    }
}

/// The body's own checksum, which every S3 service compares with what arrived.
pub const CONTENT_MD5: &str = "content-md5";

pub fn checksum(bytes: &[u8]) -> String {
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
    tag.map(str::to_owned)
        .ok_or(StoreError::Protocol("it has no ETag"))
}

/// Size of the whole object that a range came from: `Content-Range: bytes 0-9/100`.
pub fn whole_size(answer: &Response) -> Option<u64> {
    let range = answer.headers.get(CONTENT_RANGE)?.to_str().ok()?;
    range.rsplit_once('/')?.1.parse().ok()
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

/// The error that an unsuccessful answer stands for.
fn refusal(answer: &Response) -> StoreError {
    let text = String::from_utf8_lossy(&answer.body);
    let code = text
        .split_once("<Code>")
        .and_then(|(_, rest)| rest.split_once("</Code>"))
        .map(|(code, _)| code)
        .filter(|code| code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric()))
        .unwrap_or_default();
    match (answer.status.as_u16(), code) {
        // A missing bucket is a wrong setting, not an empty store.
        (404, code) if code != "NoSuchBucket" => StoreError::NotFound,
        (412, _) => StoreError::Conflict,
        (status, code) => StoreError::Status {
            status,
            code: code.to_owned(),
            retry_after: answer
                .headers
                .get(RETRY_AFTER)
                .and_then(|value| wish(value.to_str().ok()?)),
        },
    }
}

/// How long a `Retry-After` says to wait: a number of seconds, or until a date (RFC 9110, section 10.2.3). One that has
/// passed is no wish.
fn wish(text: &str) -> Option<Duration> {
    let wait = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let until = DateTimeParser::new().parse_timestamp(text).ok()?;
        until.duration_since(Timestamp::now()).try_into().ok()?
    };
    (!wait.is_zero()).then_some(wait)
}

#[cfg(test)]
mod tests {
    use hyper::StatusCode;

    use super::*;

    fn answer(status: u16, body: &str) -> Response {
        Response {
            status: StatusCode::from_u16(status).expect("a status"),
            headers: HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static("7"))]),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    #[test]
    fn answers_become_the_errors_they_stand_for() {
        let busy = refusal(&answer(503, "<Error><Code>SlowDown</Code></Error>"));
        assert_eq!(busy.to_string(), "the service answered 503 SlowDown");
        assert!(
            matches!(busy, StoreError::Status { retry_after: Some(wait), .. } if wait.as_secs() == 7)
        );
        assert!(matches!(refusal(&answer(412, "")), StoreError::Conflict));
        assert!(matches!(
            refusal(&answer(404, "<Code>NoSuchKey</Code>")),
            StoreError::NotFound
        ));
        assert!(matches!(
            refusal(&answer(404, "<Code>NoSuchBucket</Code>")),
            StoreError::Status { status: 404, .. }
        ));
    }

    #[test]
    fn a_wish_to_wait_is_a_number_or_a_date() {
        assert_eq!(wish("7"), Some(Duration::from_secs(7)));
        assert_eq!(wish("Sun, 06 Nov 1994 08:49:37 GMT"), None);
        assert_eq!(wish("0"), None);
        let soon = Timestamp::now() + Duration::from_mins(1);
        let soon = soon.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let wait = wish(&soon).expect("it is a date").as_secs();
        assert!((50..=60).contains(&wait), "{wait}");
        assert_eq!(wish("soon"), None);
    }

    #[test]
    fn prose_of_the_service_is_not_repeated() {
        let error = refusal(&answer(403, "<Code>a b&amp;c</Code> X-Amz-Signature=abc"));
        assert_eq!(
            error.to_string(),
            "the service answered 403; check the S3 credentials, what they may do, and this machine's clock"
        );
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

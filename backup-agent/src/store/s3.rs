//! A store on R2, S3 or whatever speaks its protocol. Requests are signed by rusty-s3; the signature is in the query, so
//! no address is ever logged or put into an error.

use std::{sync::Mutex, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use hyper::{
    HeaderMap, Method, StatusCode,
    body::Bytes,
    header::{CONTENT_RANGE, ETAG, HeaderName, HeaderValue, RETRY_AFTER},
};
use md5::{Digest, Md5};
use rusty_s3::{
    Bucket, Credentials, S3Action, UrlStyle,
    actions::{AbortMultipartUpload, CreateMultipartUpload, ListObjectsV2},
};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use url::Url;

use super::{
    Part, Pending, SMALL_OBJECT, Store, StoreError,
    http::{Http, Response},
    retry::retry,
};
use crate::{config, error::Error};

/// Validity of a signature: longer than the longest attempt, shorter than anyone needs to replay it.
const EXPIRY: Duration = Duration::from_mins(15);
/// Parts of one upload that are on their way at once. Two keep the line busy while the next part is compressed.
const IN_FLIGHT: usize = 2;
/// Largest answer that is not an object: a page of a listing has at most 1,000 keys of at most 1 KiB, each in XML.
const ANSWER: usize = 4 << 20;

/// Objects below one prefix of a bucket.
pub struct S3 {
    remote: std::sync::Arc<Remote>,
    prefix: String,
    /// Multipart uploads begun and neither completed nor aborted: object and upload id.
    open: Mutex<Vec<(String, String)>>,
}

/// What requests need, shared with the tasks that send parts.
struct Remote {
    http: Http,
    bucket: Bucket,
    credentials: Credentials,
    deadline: Instant,
}

impl S3 {
    /// A store below `<prefix>/<instance>/`; nothing is requested yet.
    pub fn new(place: &config::Bucket, instance: &str, bound: Duration) -> Result<Self, Error> {
        let style = if place.is_virtual_host {
            UrlStyle::VirtualHost
        } else {
            UrlStyle::Path
        };
        let (name, region) = (place.name.clone(), place.region.clone());
        let bucket = Bucket::new(place.endpoint.clone(), style, name, region)
            .map_err(|error| Error::Settings(vec![format!("cannot use RUNTIME_STORE: {error}")]))?;
        let (id, secret) = (&place.access_key_id, place.secret_access_key.expose());
        let credentials = match &place.session_token {
            Some(token) => Credentials::new_with_token(id, secret, token.expose()),
            None => Credentials::new(id, secret),
        };
        Ok(Self {
            remote: std::sync::Arc::new(Remote {
                http: Http::new(),
                bucket,
                credentials,
                // The clock of the operation starts with the store, give or take a millisecond.
                deadline: deadline(bound),
            }),
            prefix: format!("{}{instance}/", place.prefix),
            open: Mutex::default(),
        })
    }

    fn object(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn forget(&self, upload_id: &str) {
        if let Ok(mut open) = self.open.lock() {
            open.retain(|(_, known)| known != upload_id);
        }
    }

    async fn upload_in_parts(
        &self,
        object: String,
        first: Part,
        mut parts: mpsc::Receiver<Part>,
    ) -> Result<(), StoreError> {
        let upload_id = self.remote.create_upload(&object).await?;
        if let Ok(mut open) = self.open.lock() {
            open.push((object.clone(), upload_id.clone()));
        }
        let mut tags: Vec<Option<String>> = Vec::new();
        let mut flying: JoinSet<Result<(usize, String), StoreError>> = JoinSet::new();
        let mut next = Some(first);
        while let Some(part) = next.take() {
            let number = tags.len();
            tags.push(None);
            let (remote, object, id) = (self.remote.clone(), object.clone(), upload_id.clone());
            flying.spawn(async move {
                let tag = remote.put_part(&object, &id, number, part.bytes).await?;
                Ok((number, tag))
            });
            if !part.is_last {
                next = Some(parts.recv().await.ok_or(StoreError::Abandoned)?);
            }
            // At the end all must land; before it, one place must be free.
            while flying.len() >= if part.is_last { 1 } else { IN_FLIGHT } {
                let landed = flying.join_next().await;
                let (number, tag) = landed
                    .ok_or(StoreError::Protocol("a part was lost"))?
                    .map_err(|_| StoreError::Protocol("a part ended without a result"))??;
                tags[number] = Some(tag);
            }
        }
        let tags: Vec<String> = tags.into_iter().flatten().collect();
        self.remote.complete(&object, &upload_id, &tags).await?;
        self.forget(&upload_id);
        Ok(())
    }
}

impl Store for S3 {
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, (Vec<u8>, String)> {
        Box::pin(async move {
            let object = self.object(key);
            let action = |remote: &Remote| {
                let get = remote.bucket.get_object(Some(&remote.credentials), &object);
                (get.sign(EXPIRY), HeaderMap::new())
            };
            let (answer, ()) = self
                .remote
                .send(Method::GET, action, Bytes::new(), SMALL_OBJECT)
                .await?;
            let tag = entity_tag(&answer)?;
            Ok((answer.body.to_vec(), tag))
        })
    }

    fn get_range<'a>(&'a self, key: &'a str, offset: u64, length: usize) -> Pending<'a, Bytes> {
        Box::pin(async move {
            if length == 0 {
                return Ok(Bytes::new());
            }
            let object = self.object(key);
            let range = format!("bytes={offset}-{}", offset + length as u64 - 1);
            let range = header_value(&range)?;
            let action = |remote: &Remote| {
                let get = remote.bucket.get_object(Some(&remote.credentials), &object);
                let headers = HeaderMap::from_iter([(hyper::header::RANGE, range.clone())]);
                (get.sign(EXPIRY), headers)
            };
            retry(self.remote.deadline, || async {
                let answer = self
                    .remote
                    .attempt(Method::GET, action, Bytes::new(), length.max(ANSWER))
                    .await
                    .map_err(|error| match error {
                        StoreError::Status { status: 416, .. } => StoreError::TooShort,
                        other => other,
                    })?;
                if whole_size(&answer).is_some_and(|size| size < offset + length as u64) {
                    return Err(StoreError::TooShort);
                }
                // A cut body must not pass for the end of the object, nor a whole object for a range of it.
                let is_partial = answer.status == StatusCode::PARTIAL_CONTENT;
                if answer.body.len() != length || !(is_partial || offset == 0) {
                    return Err(StoreError::Protocol(
                        "it is not the range that was asked for",
                    ));
                }
                Ok(answer.body)
            })
            .await
        })
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        bytes: Vec<u8>,
        expected: Option<&'a str>,
    ) -> Pending<'a, String> {
        Box::pin(async move {
            let (name, value) = match expected {
                Some(tag) => ("if-match", tag),
                None => ("if-none-match", "*"),
            };
            let object = self.object(key);
            let put = self
                .remote
                .put(&object, bytes.into(), Some((name, value)))
                .await;
            match put {
                // If-Match on an object that is gone.
                Err(StoreError::NotFound) if expected.is_some() => Err(StoreError::Conflict),
                Err(error) => Err(error),
                Ok(answer) => entity_tag(&answer),
            }
        })
    }

    fn upload<'a>(&'a self, key: &'a str, mut parts: mpsc::Receiver<Part>) -> Pending<'a, ()> {
        Box::pin(async move {
            let object = self.object(key);
            let first = parts.recv().await.ok_or(StoreError::Abandoned)?;
            if first.is_last {
                self.remote.put(&object, first.bytes, None).await?;
                return Ok(());
            }
            self.upload_in_parts(object, first, parts).await
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<String>> {
        Box::pin(async move {
            let full = self.object(prefix);
            let mut keys = Vec::new();
            let mut token: Option<String> = None;
            loop {
                let page = token.clone();
                let action = |remote: &Remote| {
                    let mut list = remote.bucket.list_objects_v2(Some(&remote.credentials));
                    list.with_prefix(full.as_str());
                    if let Some(token) = &page {
                        list.with_continuation_token(token.as_str());
                    }
                    (list.sign(EXPIRY), HeaderMap::new())
                };
                let (_, page) = self
                    .remote
                    .send_and(Method::GET, action, Bytes::new(), ANSWER, |answer| {
                        let text = std::str::from_utf8(&answer.body).ok()?;
                        ListObjectsV2::parse_response(text).ok()
                    })
                    .await?;
                let relative = page
                    .contents
                    .iter()
                    .filter_map(|object| object.key.strip_prefix(&self.prefix));
                keys.extend(relative.map(str::to_owned));
                match page.next_continuation_token {
                    // A service that hands out the same page for ever must not hold us for ever.
                    next @ Some(_) if next != token => token = next,
                    _ => return Ok(keys),
                }
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> Pending<'a, ()> {
        Box::pin(async move {
            let object = self.object(key);
            let action = |remote: &Remote| {
                let delete = remote
                    .bucket
                    .delete_object(Some(&remote.credentials), &object);
                (delete.sign(EXPIRY), HeaderMap::new())
            };
            let deleted = self
                .remote
                .send(Method::DELETE, action, Bytes::new(), ANSWER)
                .await;
            match deleted {
                Ok(_) | Err(StoreError::NotFound) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn abort_uploads(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            let open = match self.open.lock() {
                Ok(mut open) => std::mem::take(&mut *open),
                Err(_) => return Ok(()),
            };
            for (object, upload_id) in open {
                let action = |remote: &Remote| {
                    let (bucket, credentials) = (&remote.bucket, Some(&remote.credentials));
                    let abort = AbortMultipartUpload::new(bucket, credentials, &object, &upload_id);
                    (abort.sign(EXPIRY), HeaderMap::new())
                };
                // One try: there is no time for more, and the service's lifecycle rule removes the rest.
                self.remote
                    .attempt(Method::DELETE, action, Bytes::new(), ANSWER)
                    .await?;
            }
            Ok(())
        })
    }
}

impl Remote {
    /// One attempt of a request; `action` signs it afresh, as signatures age while we wait.
    async fn attempt(
        &self,
        method: Method,
        action: impl Fn(&Self) -> (Url, HeaderMap),
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
    async fn send(
        &self,
        method: Method,
        action: impl Fn(&Self) -> (Url, HeaderMap),
        body: Bytes,
        limit: usize,
    ) -> Result<(Response, ()), StoreError> {
        self.send_and(method, action, body, limit, |_| Some(()))
            .await
    }

    /// The same, where an answer that `parse` cannot use counts as a failure too: S3 may answer 200 and then an error.
    async fn send_and<T>(
        &self,
        method: Method,
        action: impl Fn(&Self) -> (Url, HeaderMap),
        body: Bytes,
        limit: usize,
        parse: impl Fn(&Response) -> Option<T>,
    ) -> Result<(Response, T), StoreError> {
        retry(self.deadline, || async {
            let answer = self
                .attempt(method.clone(), &action, body.clone(), limit)
                .await?;
            match parse(&answer) {
                Some(parsed) => Ok((answer, parsed)),
                None => Err(StoreError::Protocol(
                    "it is not of the form that S3 gives it",
                )),
            }
        })
        .await
    }

    async fn put(
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
        let (answer, ()) = self.send(Method::PUT, action, bytes, ANSWER).await?;
        Ok(answer)
    }

    async fn create_upload(&self, object: &str) -> Result<String, StoreError> {
        let action = |remote: &Self| {
            let create = remote
                .bucket
                .create_multipart_upload(Some(&remote.credentials), object);
            (create.sign(EXPIRY), HeaderMap::new())
        };
        let (_, upload_id) = self
            .send_and(Method::POST, action, Bytes::new(), ANSWER, |answer| {
                let text = std::str::from_utf8(&answer.body).ok()?;
                let parsed = CreateMultipartUpload::parse_response(text).ok()?;
                Some(parsed.upload_id().to_owned())
            })
            .await?;
        Ok(upload_id)
    }

    async fn put_part(
        &self,
        object: &str,
        upload_id: &str,
        number: usize,
        bytes: Bytes,
    ) -> Result<String, StoreError> {
        let number = u16::try_from(number + 1)
            .map_err(|_| StoreError::Protocol("the object has too many parts"))?;
        let sum = checksum(&bytes);
        let headers =
            HeaderMap::from_iter([(HeaderName::from_static(CONTENT_MD5), header_value(&sum)?)]);
        let action = |remote: &Self| {
            let credentials = Some(&remote.credentials);
            let mut put = remote
                .bucket
                .upload_part(credentials, object, number, upload_id);
            put.headers_mut().insert(CONTENT_MD5, sum.as_str());
            (put.sign(EXPIRY), headers.clone())
        };
        let (answer, ()) = self.send(Method::PUT, action, bytes, ANSWER).await?;
        entity_tag(&answer)
    }

    async fn complete(
        &self,
        object: &str,
        upload_id: &str,
        tags: &[String],
    ) -> Result<(), StoreError> {
        let (bucket, credentials) = (&self.bucket, Some(&self.credentials));
        let tags = || tags.iter().map(String::as_str);
        let body = bucket
            .complete_multipart_upload(credentials, object, upload_id, tags())
            .body();
        let action = |remote: &Self| {
            let credentials = Some(&remote.credentials);
            let complete =
                remote
                    .bucket
                    .complete_multipart_upload(credentials, object, upload_id, tags());
            (complete.sign(EXPIRY), HeaderMap::new())
        };
        let done = self
            .send_and(Method::POST, action, body.into(), ANSWER, |answer| {
                let text = std::str::from_utf8(&answer.body).ok()?;
                text.contains("<CompleteMultipartUploadResult")
                    .then_some(())
            })
            .await;
        match done {
            // No such upload: an earlier try completed it and its answer was lost. The layer is read back by its sha256
            // before it is ever used, so its being there is all that matters here.
            Err(StoreError::NotFound) => {
                let action = |remote: &Self| {
                    let head = remote.bucket.head_object(Some(&remote.credentials), object);
                    (head.sign(EXPIRY), HeaderMap::new())
                };
                self.send(Method::HEAD, action, Bytes::new(), ANSWER)
                    .await?;
                Ok(())
            }
            other => other.map(|_| ()),
        }
    }
}

/// The body's own checksum, which every S3 service compares with what arrived.
const CONTENT_MD5: &str = "content-md5";

fn checksum(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(Md5::digest(bytes))
}

/// No operation is bounded by more than this; it keeps the sum of clock and bound in range.
fn deadline(bound: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(bound)
        .unwrap_or_else(|| now + Duration::from_hours(8760))
}

fn header_value(text: &str) -> Result<HeaderValue, StoreError> {
    HeaderValue::from_str(text).map_err(|_| StoreError::Protocol("a tag cannot be sent back"))
}

fn entity_tag(answer: &Response) -> Result<String, StoreError> {
    let tag = answer
        .headers
        .get(ETAG)
        .and_then(|value| value.to_str().ok());
    tag.map(str::to_owned)
        .ok_or(StoreError::Protocol("it has no ETag"))
}

/// Size of the whole object that a range came from: `Content-Range: bytes 0-9/100`.
fn whole_size(answer: &Response) -> Option<u64> {
    let range = answer.headers.get(CONTENT_RANGE)?.to_str().ok()?;
    range.rsplit_once('/')?.1.parse().ok()
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
                .and_then(|value| value.to_str().ok()?.parse().ok())
                .map(Duration::from_secs),
        },
    }
}

#[cfg(test)]
mod tests {
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
    fn prose_of_the_service_is_not_repeated() {
        let error = refusal(&answer(403, "<Code>a b&amp;c</Code> X-Amz-Signature=abc"));
        assert_eq!(
            error.to_string(),
            "the service answered 403; check the S3 credentials, what they may do, and this machine's clock"
        );
    }
}

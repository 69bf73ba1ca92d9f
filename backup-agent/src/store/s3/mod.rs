//! A store on R2, S3 or whatever speaks its protocol. Requests are signed by rusty-s3; the signature is in the query, so
//! no address is ever logged or put into an error.

mod multipart;
mod remote;
mod uploads;

use std::{sync::Arc, time::Duration};

use hyper::{HeaderMap, Method, StatusCode, body::Bytes};
use jiff::Timestamp;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle, actions::ListObjectsV2};
use tokio::sync::mpsc;

use self::{
    multipart::Multipart,
    remote::{ANSWER, EXPIRY, Remote, deadline, entity_tag, file_time, header_value, whole_size},
};
use super::{
    Object, PROBE, Part, Pending, SMALL_OBJECT, Store, StoreError, http::Http, retry::retry,
};
use crate::{config, error::Error, snapshot::id};

/// Objects below one prefix of a bucket.
pub struct S3 {
    remote: Arc<Remote>,
    prefix: String,
    multipart: Multipart,
}

impl S3 {
    /// A store below `<prefix>/<folder>`; nothing is requested yet.
    pub fn new(place: &config::Bucket, folder: &str, bound: Duration) -> Result<Self, Error> {
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
            remote: Arc::new(Remote {
                http: Http::new(place.bandwidth),
                bucket,
                credentials,
                // The clock of the operation starts with the store, give or take a millisecond.
                deadline: deadline(bound),
            }),
            prefix: format!("{}{folder}", place.prefix),
            multipart: Multipart::default(),
        })
    }

    fn object(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Objects whose keys begin so, each with the service's word on when it was last written.
    async fn objects(&self, prefix: &str) -> Result<Vec<(Object, Option<Timestamp>)>, StoreError> {
        let full = self.object(prefix);
        let mut objects = Vec::new();
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
            let page = self
                .remote
                .send_and(Method::GET, &action, Bytes::new(), ANSWER, |answer| {
                    let text = std::str::from_utf8(&answer.body).ok()?;
                    let page = ListObjectsV2::parse_response(text).ok()?;
                    let is_whole = page.contents.iter().all(|object| object.size.is_some());
                    is_whole.then_some(page)
                })
                .await?;
            for object in page.contents {
                if let Some(key) = object.key.strip_prefix(&self.prefix) {
                    let modified = object.last_modified.as_deref().and_then(id::time);
                    let found = Object {
                        key: key.to_owned(),
                        size: object.size.unwrap_or_default(),
                        tag: object.etag.unwrap_or_default(),
                    };
                    objects.push((found, modified));
                }
            }
            match page.next_continuation_token {
                // A service that hands out the same page for ever must not hold us for ever.
                next @ Some(_) if next != token => token = next,
                _ => return Ok(objects),
            }
        }
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
            let answer = self
                .remote
                .send(Method::GET, &action, Bytes::new(), SMALL_OBJECT)
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
                    .attempt(Method::GET, &action, Bytes::new(), length.max(ANSWER))
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
            self.multipart
                .upload(&self.remote, object, first, parts)
                .await
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<String>> {
        Box::pin(async move {
            let objects = self.objects(prefix).await?;
            Ok(objects.into_iter().map(|(object, _)| object.key).collect())
        })
    }

    fn walk<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<Object>> {
        Box::pin(async move {
            let objects = self.objects(prefix).await?;
            Ok(objects.into_iter().map(|(object, _)| object).collect())
        })
    }

    fn stat<'a>(&'a self, key: &'a str) -> Pending<'a, (String, Option<i64>)> {
        Box::pin(async move {
            let object = self.object(key);
            let action = |remote: &Remote| {
                let head = remote
                    .bucket
                    .head_object(Some(&remote.credentials), &object);
                (head.sign(EXPIRY), HeaderMap::new())
            };
            let answer = self
                .remote
                .send(Method::HEAD, &action, Bytes::new(), ANSWER)
                .await?;
            Ok((entity_tag(&answer)?, file_time(&answer)))
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
                .send(Method::DELETE, &action, Bytes::new(), ANSWER)
                .await;
            match deleted {
                Ok(_) | Err(StoreError::NotFound) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn sweep(&self, before: Timestamp, uploads_before: Timestamp) -> Pending<'_, u64> {
        Box::pin(async move {
            let mut removed = 0;
            for (object, modified) in self.objects(PROBE).await? {
                if modified.is_some_and(|time| time < before) {
                    self.delete(&object.key).await?;
                    removed += 1;
                }
            }
            for upload in uploads::list(&self.remote, &self.prefix).await? {
                if upload.is_older(uploads_before) {
                    let action =
                        |remote: &Remote| uploads::abort(remote, &upload.object, &upload.id);
                    let aborted = self
                        .remote
                        .send(Method::DELETE, &action, Bytes::new(), ANSWER)
                        .await;
                    match aborted {
                        Ok(_) | Err(StoreError::NotFound) => removed += 1,
                        Err(error) => return Err(error),
                    }
                }
            }
            Ok(removed)
        })
    }

    fn abort_uploads(&self) -> Pending<'_, ()> {
        Box::pin(self.multipart.abort(&self.remote))
    }
}

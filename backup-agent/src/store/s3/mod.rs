//! A store on R2, S3 or whatever speaks its protocol. Requests are signed by rusty-s3; the signature is in the query, so
//! no address is ever logged or put into an error.

mod listing;
mod multipart;
mod refusal;
mod remote;
mod uploads;
mod xml;

use std::{sync::Arc, time::Duration};

use hyper::{Method, StatusCode, body::Bytes};
use jiff::Timestamp;
use rusty_s3::{Bucket, Credentials, UrlStyle};
use tokio::sync::mpsc;

use self::{
    listing::Listed,
    multipart::Multipart,
    remote::{
        ANSWER, Ask, Remote, content_range, deadline, entity_tag, file_time, header_value,
        plain_tag,
    },
};
use super::{
    Object, PROBE, Part, Pending, SMALL_OBJECT, Store, StoreError,
    http::{Http, Response},
    retry::retry,
};
use crate::{config, error::Error};

/// Objects below one prefix of a bucket.
pub struct S3 {
    remote: Arc<Remote>,
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
                http: Http::new(&place.network, place.bandwidth),
                bucket,
                credentials,
                // The clock of the operation starts with the store, give or take a millisecond.
                deadline: deadline(bound),
                prefix: format!("{}{folder}", place.prefix),
            }),
            multipart: Multipart::default(),
        })
    }

    fn object(&self, key: &str) -> String {
        format!("{}{key}", self.remote.prefix)
    }

    /// Objects whose keys begin so, each with the service's word on when it was last written.
    async fn objects(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let mut objects = listing::list(&self.remote, &self.object(prefix)).await?;
        for (object, _) in &mut objects {
            object.key.drain(..self.remote.prefix.len());
        }
        Ok(objects)
    }
}

/// The bytes of an answer, if they are the range that was asked for.
fn cut(answer: Response, offset: u64, length: usize) -> Result<Bytes, StoreError> {
    let end = offset + length as u64;
    let range = content_range(&answer);
    let is_right = match range {
        Some((.., Some(size))) if size < end => return Err(StoreError::TooShort),
        // Some services call a range 200.
        Some((first, last, _)) => first == offset && last + 1 == end,
        // The whole object, or a range that does not say which.
        None => answer.status == StatusCode::PARTIAL_CONTENT || offset == 0,
    };
    if is_right && answer.body.len() == length {
        Ok(answer.body)
    } else if range.is_none() && answer.status == StatusCode::OK {
        Err(StoreError::NoRanges)
    } else {
        Err(StoreError::Protocol(
            "it is not the range that was asked for",
        ))
    }
}

/// The forms in which a service may want its own tag back. A weak one never matches (RFC 9110, section 13.1.1), and it is
/// a proxy that made it weak.
fn forms(tag: &str) -> Vec<String> {
    let mut forms = vec![format!("\"{}\"", plain_tag(tag))];
    if forms[0] != tag {
        forms.push(tag.to_owned());
    }
    forms
}

impl Store for S3 {
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, (Vec<u8>, String)> {
        Box::pin(async move {
            let object = self.object(key);
            let ask = Ask {
                limit: SMALL_OBJECT,
                ..Ask::get(Some(&object), &[])
            };
            let answer = self.remote.send(&ask).await?;
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
            let ask = Ask {
                range: Some(header_value(&range)?),
                limit: length.max(ANSWER),
                ..Ask::get(Some(&object), &[])
            };
            retry(self.remote.deadline, || async {
                match self.remote.attempt(&ask).await {
                    Ok(answer) => cut(answer, offset, length),
                    Err(StoreError::Status { status: 416, .. }) => Err(StoreError::TooShort),
                    Err(StoreError::TooLong) => Err(StoreError::NoRanges),
                    Err(error) => Err(error),
                }
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
            let object = self.object(key);
            let bytes = Bytes::from(bytes);
            let (name, values) = match expected {
                // A service may take an empty condition for none.
                Some(tag) if plain_tag(tag).is_empty() => return Err(StoreError::Conflict),
                Some(tag) => ("if-match", forms(tag)),
                None => ("if-none-match", vec!["*".to_owned()]),
            };
            let mut put = Err(StoreError::Conflict);
            for value in &values {
                let condition = Some((name, value.as_str()));
                put = self
                    .remote
                    .put(&object, &[], bytes.clone(), condition)
                    .await;
                match put {
                    // If-Match on an object that is gone.
                    Err(StoreError::NotFound) if expected.is_some() => {
                        return Err(StoreError::Conflict);
                    }
                    Err(StoreError::Conflict) => {}
                    _ => break,
                }
            }
            put
        })
    }

    fn upload<'a>(&'a self, key: &'a str, mut parts: mpsc::Receiver<Part>) -> Pending<'a, ()> {
        Box::pin(async move {
            let object = self.object(key);
            let first = parts.recv().await.ok_or(StoreError::Abandoned)?;
            if first.is_last {
                return self
                    .remote
                    .put(&object, &[], first.bytes, None)
                    .await
                    .map(drop);
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
            let ask = Ask::new(Method::HEAD, Some(&object), &[]);
            let answer = self.remote.send(&ask).await?;
            Ok((plain_tag(&entity_tag(&answer)?), file_time(&answer)))
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> Pending<'a, ()> {
        Box::pin(async move {
            let object = self.object(key);
            let ask = Ask::new(Method::DELETE, Some(&object), &[]);
            match self.remote.send(&ask).await {
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
            for upload in uploads::list(&self.remote, &self.remote.prefix).await? {
                if upload.is_older(uploads_before) {
                    let query = [("uploadId", upload.id.as_str())];
                    let aborted = self
                        .remote
                        .send(&uploads::abort(&upload.object, &query))
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

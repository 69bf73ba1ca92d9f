//! Uploads in parts, several of them on their way at once. One that is neither completed nor aborted costs its owner money:
//! those of this run are remembered until then. Those that a killed run left behind are for a prune to find.

use std::sync::{Arc, Mutex};

use hyper::{HeaderMap, Method, body::Bytes, header::HeaderName};
use rusty_s3::{S3Action, actions::CreateMultipartUpload};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    remote::{ANSWER, CONTENT_MD5, EXPIRY, Remote, checksum, entity_tag, header_value},
    uploads,
};
use crate::store::{Part, StoreError};

/// Multipart uploads begun and neither completed nor aborted: object and upload id.
#[derive(Default)]
pub struct Multipart {
    open: Mutex<Vec<(String, String)>>,
}

impl Multipart {
    /// Uploads an object of several parts, of which this is the first: as many at once as their sender has memory for.
    pub async fn upload(
        &self,
        remote: &Arc<Remote>,
        object: String,
        first: Part,
        mut parts: mpsc::Receiver<Part>,
    ) -> Result<(), StoreError> {
        let upload_id = create(remote, &object).await?;
        if let Ok(mut open) = self.open.lock() {
            open.push((object.clone(), upload_id.clone()));
        }
        let mut tags: Vec<Option<String>> = Vec::new();
        let mut flying: JoinSet<Result<(usize, String), StoreError>> = JoinSet::new();
        let mut next = Some(first);
        while let Some(part) = next.take() {
            let number = tags.len();
            tags.push(None);
            let (remote, object, id) = (remote.clone(), object.clone(), upload_id.clone());
            flying.spawn(async move {
                let tag = put_part(&remote, &object, &id, number, part.bytes).await?;
                Ok((number, tag))
            });
            if !part.is_last {
                next = Some(parts.recv().await.ok_or(StoreError::Abandoned)?);
            }
            // At the end all must land; before it, none may have failed.
            while let Some(landed) = match next {
                Some(_) => flying.try_join_next(),
                None => flying.join_next().await,
            } {
                let (number, tag) =
                    landed.map_err(|_| StoreError::Protocol("a part ended without a result"))??;
                tags[number] = Some(tag);
            }
        }
        let tags: Vec<String> = tags.into_iter().flatten().collect();
        complete(remote, &object, &upload_id, &tags).await?;
        self.forget(&upload_id);
        Ok(())
    }

    /// Aborts what is under way.
    pub async fn abort(&self, remote: &Remote) -> Result<(), StoreError> {
        let open = match self.open.lock() {
            Ok(mut open) => std::mem::take(&mut *open),
            Err(_) => return Ok(()),
        };
        for (object, upload_id) in open {
            let action = |remote: &Remote| uploads::abort(remote, &object, &upload_id);
            // One try: there is no time for more, and the next prune removes the rest.
            remote
                .attempt(Method::DELETE, &action, Bytes::new(), ANSWER)
                .await?;
        }
        Ok(())
    }

    fn forget(&self, upload_id: &str) {
        if let Ok(mut open) = self.open.lock() {
            open.retain(|(_, known)| known != upload_id);
        }
    }
}

async fn create(remote: &Remote, object: &str) -> Result<String, StoreError> {
    let action = |remote: &Remote| {
        let create = remote
            .bucket
            .create_multipart_upload(Some(&remote.credentials), object);
        (create.sign(EXPIRY), HeaderMap::new())
    };
    let upload_id = remote
        .send_and(Method::POST, &action, Bytes::new(), ANSWER, |answer| {
            let text = std::str::from_utf8(&answer.body).ok()?;
            let parsed = CreateMultipartUpload::parse_response(text).ok()?;
            Some(parsed.upload_id().to_owned())
        })
        .await?;
    Ok(upload_id)
}

async fn put_part(
    remote: &Remote,
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
    let action = |remote: &Remote| {
        let credentials = Some(&remote.credentials);
        let mut put = remote
            .bucket
            .upload_part(credentials, object, number, upload_id);
        put.headers_mut().insert(CONTENT_MD5, sum.as_str());
        (put.sign(EXPIRY), headers.clone())
    };
    let answer = remote.send(Method::PUT, &action, bytes, ANSWER).await?;
    entity_tag(&answer)
}

async fn complete(
    remote: &Remote,
    object: &str,
    upload_id: &str,
    tags: &[String],
) -> Result<(), StoreError> {
    let (bucket, credentials) = (&remote.bucket, Some(&remote.credentials));
    let tags = || tags.iter().map(String::as_str);
    let body = bucket
        .complete_multipart_upload(credentials, object, upload_id, tags())
        .body();
    let action = |remote: &Remote| {
        let credentials = Some(&remote.credentials);
        let complete =
            remote
                .bucket
                .complete_multipart_upload(credentials, object, upload_id, tags());
        (complete.sign(EXPIRY), HeaderMap::new())
    };
    let done = remote
        .send_and(Method::POST, &action, body.into(), ANSWER, |answer| {
            let text = std::str::from_utf8(&answer.body).ok()?;
            text.contains("<CompleteMultipartUploadResult")
                .then_some(())
        })
        .await;
    match done {
        // No such upload: an earlier try completed it and its answer was lost. The layer is read back by its sha256
        // before it is ever used, so its being there is all that matters here.
        Err(StoreError::NotFound) => {
            let action = |remote: &Remote| {
                let head = remote.bucket.head_object(Some(&remote.credentials), object);
                (head.sign(EXPIRY), HeaderMap::new())
            };
            remote
                .send(Method::HEAD, &action, Bytes::new(), ANSWER)
                .await?;
            Ok(())
        }
        other => other,
    }
}

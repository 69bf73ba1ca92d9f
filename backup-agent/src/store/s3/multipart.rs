//! Uploads in parts, several of them on their way at once. One that is neither completed nor aborted costs its owner money:
//! those of this run are remembered until then. Those that a killed run left behind are for a prune to find.

use std::{
    fmt::Write,
    sync::{Arc, Mutex},
};

use hyper::{Method, body::Bytes};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    refusal::failure,
    remote::{Ask, Remote, WRONG_FORM},
    uploads, xml,
};
use crate::store::{Part, StoreError, http::Response};

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
            let query = [("uploadId", upload_id.as_str())];
            // One try: there is no time for more, and the next prune removes the rest.
            remote.attempt(&uploads::abort(&object, &query)).await?;
        }
        Ok(())
    }

    fn forget(&self, upload_id: &str) {
        if let Ok(mut open) = self.open.lock() {
            open.retain(|(_, known)| known != upload_id);
        }
    }
}

/// What this child of an answer's document says; services differ in what they call the document. S3 may answer 200 and
/// then find an error, which comes in its place.
fn said(answer: &Response, child: &str) -> Result<String, StoreError> {
    let root = xml::parse(&answer.body).ok_or(WRONG_FORM)?;
    match root.text(child) {
        Some(text) if root.name != "Error" => Ok(text.to_owned()),
        _ => Err(failure(&root).unwrap_or(WRONG_FORM)),
    }
}

async fn create(remote: &Remote, object: &str) -> Result<String, StoreError> {
    let ask = Ask::new(Method::POST, Some(object), &[("uploads", "")]);
    remote
        .send_and(&ask, |answer| said(answer, "UploadId"))
        .await
}

async fn put_part(
    remote: &Remote,
    object: &str,
    upload_id: &str,
    number: usize,
    bytes: Bytes,
) -> Result<String, StoreError> {
    /// S3 takes no more.
    const MOST: usize = 10_000;
    if number >= MOST {
        return Err(StoreError::Protocol("the object has too many parts"));
    }
    let number = (number + 1).to_string();
    let query = [("partNumber", number.as_str()), ("uploadId", upload_id)];
    remote.put(object, &query, bytes, None).await
}

async fn complete(
    remote: &Remote,
    object: &str,
    upload_id: &str,
    tags: &[String],
) -> Result<(), StoreError> {
    let mut body = String::from("<CompleteMultipartUpload>");
    for (number, tag) in (1..).zip(tags) {
        let tag = xml::escape(tag);
        let _ = write!(
            body,
            "<Part><ETag>{tag}</ETag><PartNumber>{number}</PartNumber></Part>"
        );
    }
    body.push_str("</CompleteMultipartUpload>");
    let query = [("uploadId", upload_id)];
    let ask = Ask {
        body: body.into(),
        ..Ask::new(Method::POST, Some(object), &query)
    };
    let parse = |answer: &Response| said(answer, "ETag").map(drop);
    match remote.send_and(&ask, parse).await {
        // No such upload: an earlier try completed it and its answer was lost. The layer is read back by its sha256
        // before it is ever used, so its being there is all that matters here.
        Err(StoreError::NotFound) => {
            let head = Ask::new(Method::HEAD, Some(object), &[]);
            remote.send(&head).await.map(drop)
        }
        other => other,
    }
}

//! Uploads in parts that nobody completed: the one request of ours that rusty-s3 does not have.

use hyper::{HeaderMap, Method, body::Bytes};
use instant_xml::FromXml;
use jiff::Timestamp;
use rusty_s3::{S3Action, actions::AbortMultipartUpload, signing::sign};
use url::Url;

use super::remote::{ANSWER, EXPIRY, Remote};
use crate::{snapshot::id, store::StoreError};

/// A page of `ListMultipartUploads`: a thousand uploads, those of the first keys. The next run sees what is behind them.
#[derive(FromXml)]
#[xml(
    rename = "ListMultipartUploadsResult",
    ns("http://s3.amazonaws.com/doc/2006-03-01/")
)]
struct Page {
    uploads: Vec<Upload>,
}

/// An upload that was begun and neither completed nor aborted.
#[derive(FromXml)]
#[xml(rename = "Upload", ns("http://s3.amazonaws.com/doc/2006-03-01/"))]
pub struct Upload {
    #[xml(rename = "Key")]
    pub object: String,
    #[xml(rename = "UploadId")]
    pub id: String,
    #[xml(rename = "Initiated")]
    initiated: Option<String>,
}

impl Upload {
    pub fn is_older(&self, than: Timestamp) -> bool {
        let begun = self.initiated.as_deref().and_then(id::time);
        begun.is_some_and(|begun| begun < than)
    }
}

/// Open uploads of objects whose keys begin so.
pub async fn list(remote: &Remote, prefix: &str) -> Result<Vec<Upload>, StoreError> {
    let action = |remote: &Remote| (address(remote, prefix), HeaderMap::new());
    let parse = |body: &Bytes| {
        let page: Page = instant_xml::from_str(std::str::from_utf8(body).ok()?).ok()?;
        Some(page.uploads)
    };
    let mut uploads = remote
        .send_and(Method::GET, &action, Bytes::new(), ANSWER, |answer| {
            parse(&answer.body)
        })
        .await?;
    uploads.retain(|upload| upload.object.starts_with(prefix));
    Ok(uploads)
}

fn address(remote: &Remote, prefix: &str) -> Url {
    let (bucket, credentials) = (&remote.bucket, &remote.credentials);
    sign(
        &Timestamp::now(),
        rusty_s3::Method::Get,
        bucket.base_url().clone(),
        credentials.key(),
        credentials.secret(),
        credentials.token(),
        bucket.region(),
        EXPIRY.as_secs(),
        [("prefix", prefix), ("uploads", "")].into_iter(),
        std::iter::empty(),
    )
}

/// The request that aborts one.
pub fn abort(remote: &Remote, object: &str, upload_id: &str) -> (Url, HeaderMap) {
    let (bucket, credentials) = (&remote.bucket, Some(&remote.credentials));
    let abort = AbortMultipartUpload::new(bucket, credentials, object, upload_id);
    (abort.sign(EXPIRY), HeaderMap::new())
}

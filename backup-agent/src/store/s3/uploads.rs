//! Uploads in parts that nobody completed.

use hyper::Method;
use jiff::Timestamp;

use super::{
    refusal::failure,
    remote::{Ask, Remote, WRONG_FORM},
    xml,
};
use crate::{
    snapshot::id,
    store::{StoreError, http::Response},
};

/// An upload that was begun and neither completed nor aborted.
pub struct Upload {
    pub object: String,
    pub id: String,
    initiated: Option<Timestamp>,
}

impl Upload {
    pub fn is_older(&self, than: Timestamp) -> bool {
        self.initiated.is_some_and(|begun| begun < than)
    }
}

/// Open uploads of objects whose keys begin so: a thousand, those of the first keys. The next run sees what is behind them.
pub async fn list(remote: &Remote, prefix: &str) -> Result<Vec<Upload>, StoreError> {
    let query = [("prefix", prefix), ("uploads", "")];
    let parse = |answer: &Response| {
        let root = xml::parse(&answer.body).ok_or(WRONG_FORM)?;
        if let Some(error) = failure(&root) {
            return Err(error);
        }
        let uploads = root.all("Upload").map(|upload| {
            Some(Upload {
                object: upload.text("Key")?.to_owned(),
                id: upload.text("UploadId")?.to_owned(),
                initiated: upload.text("Initiated").and_then(id::time),
            })
        });
        uploads.collect::<Option<Vec<Upload>>>().ok_or(WRONG_FORM)
    };
    let mut uploads = remote.send_and(&Ask::get(None, &query), parse).await?;
    uploads.retain(|upload| upload.object.starts_with(prefix));
    Ok(uploads)
}

/// The request that aborts one; `query` names its id.
pub fn abort<'a>(object: &'a str, query: &'a [(&'a str, &'a str)]) -> Ask<'a> {
    Ask::new(Method::DELETE, Some(object), query)
}

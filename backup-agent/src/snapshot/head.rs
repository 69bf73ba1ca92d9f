//! The head, `head.json`: the one mutable object. It names the newest snapshot and the writer who may name the next one.
//!
//! It moves by compare-and-swap only, so of two writers one always learns about the other, and no snapshot is overwritten.

use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    log,
    snapshot::{
        id,
        record::{FORMAT, LARGEST, too_long},
        sealed,
    },
    store::{Store, StoreError, twice},
};

/// Key of the head below the instance.
pub const KEY: &str = "head.json";

/// The content of the head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    pub format: u32,
    /// The newest snapshot; none yet where a runtime took an empty store.
    pub snapshot: Option<String>,
    /// Sequence of that snapshot, 0 when there is none.
    pub sequence: u64,
    /// Boot id of the runtime that holds the head.
    pub writer: String,
}

/// The head as it was seen, with what a swap compares.
#[derive(Debug, Clone)]
pub struct Seen {
    pub head: Head,
    pub etag: String,
}

/// Some services give the tag of one and the same content in several forms. Of a damaged head the tag is all there is.
impl PartialEq for Seen {
    fn eq(&self, other: &Self) -> bool {
        self.head == other.head && (!self.head.is_unreadable() || self.etag == other.etag)
    }
}

/// The outcome of a swap.
pub enum Swap {
    /// The head is ours; the tag of what is there now.
    Moved(String),
    /// Somebody else's head is there.
    Lost(Option<Seen>),
}

/// Reads the head; `None` when the store has none.
pub async fn read(store: &dyn Store) -> Result<Option<Seen>, Error> {
    twice(|| read_once(store)).await
}

async fn read_once(store: &dyn Store) -> Result<Option<Seen>, Error> {
    match store.get(KEY).await {
        Ok((bytes, etag)) => {
            let head = judge(&bytes)?;
            Ok(Some(Seen { head, etag }))
        }
        Err(StoreError::NotFound) => Ok(None),
        Err(StoreError::TooLong) => Err(too_long(KEY)),
        Err(error) => Err(Error::store("read", KEY)(error)),
    }
}

/// Reads the head for work that does not depend on it: one that is damaged is [`Head::unreadable`].
pub async fn look(store: &dyn Store) -> Result<Option<Seen>, Error> {
    let error = match read(store).await {
        Err(error @ Error::Damaged { .. }) => error,
        other => return other,
    };
    log::warn(
        "going on without the head",
        &[("error", error.to_string().into())],
    );
    let etag = match store.get(KEY).await {
        // It was written anew meanwhile.
        Ok((bytes, _)) if judge(&bytes).is_ok() => return read(store).await,
        Ok((_, etag)) => etag,
        Err(StoreError::NotFound) => return Ok(None),
        // Its tag is unknown, so nobody can replace it.
        Err(StoreError::TooLong) => String::new(),
        Err(error) => return Err(Error::store("read", KEY)(error)),
    };
    let head = Head::unreadable();
    Ok(Some(Seen { head, etag }))
}

impl Head {
    /// Stands for a head that is damaged: of no snapshot, and nobody's.
    fn unreadable() -> Self {
        Self {
            format: FORMAT,
            snapshot: None,
            sequence: 0,
            writer: String::new(),
        }
    }

    /// Whether this stands for a head that is damaged.
    pub fn is_unreadable(&self) -> bool {
        self.writer.is_empty()
    }
}

/// What the bytes of a head say, if that can be believed.
pub fn judge(bytes: &[u8]) -> Result<Head, Error> {
    let head: Head = sealed::open(KEY, bytes)?;
    let reason = if head.format != FORMAT {
        let format = head.format;
        format!("it has format {format}, this tool reads {FORMAT}")
    } else if head.sequence > LARGEST {
        "it has an absurd sequence".to_owned()
    } else if head.is_unreadable() {
        "it names no writer".to_owned()
    } else if head.writer.contains(char::is_control) {
        "it has control characters".to_owned()
    } else if let Some(id) = head.snapshot.as_deref().filter(|id| !id::is_valid(id)) {
        format!("{id:?} is no snapshot's id")
    } else {
        return Ok(head);
    };
    Err(Error::Damaged {
        key: KEY.to_owned(),
        reason,
    })
}

/// Moves the head, if it still is what was seen (`None`: if there is none).
pub async fn swap(store: &dyn Store, seen: Option<&Seen>, next: &Head) -> Result<Swap, Error> {
    let bytes = sealed::seal(next);
    let mut expected = seen.map(|seen| seen.etag.clone());
    let mut is_first = true;
    loop {
        match store.put_if(KEY, bytes.clone(), expected.as_deref()).await {
            Ok(etag) => return Ok(Swap::Moved(etag)),
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(Error::store("write", KEY)(error)),
        }
        // Our own write may have taken effect while its answer was lost: look before judging.
        match read(store).await? {
            Some(now) if now.head == *next => return Ok(Swap::Moved(now.etag)),
            // Nobody moved it: what came wrong is its tag.
            Some(now) if is_first && seen.is_some_and(|seen| seen.head == now.head) => {
                expected = Some(now.etag);
                is_first = false;
            }
            now => return Ok(Swap::Lost(now)),
        }
    }
}

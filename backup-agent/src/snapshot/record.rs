//! The record of a snapshot, `snapshots/<id>.json`: a snapshot exists when this object does.

use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    snapshot::{id, sealed},
    store::{Store, StoreError, twice},
    tree::miss::Unread,
};

/// Version of the layout of records, heads and layers that this code reads and writes.
pub const FORMAT: u32 = 1;
/// Largest number that is believed: the largest that every reader of JSON keeps exactly. Thousands of them can be added up.
pub const LARGEST: u64 = 1 << 53;
/// Most layers of a snapshot. Each is twice as large as the next one, so a writer makes 70 at most; a reader holds some
/// memory and a descriptor for each.
const MOST_LAYERS: usize = 128;

/// One snapshot: immutable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub format: u32,
    pub id: String,
    /// The snapshot that this one follows.
    pub parent: Option<String>,
    /// The parent's plus one: clocks may jump, this does not.
    pub sequence: u64,
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    /// Who wrote it: a runtime's boot id.
    pub writer: String,
    /// Version of the tool that wrote it.
    pub tool: String,
    pub consistency: Consistency,
    /// Why it is not of one instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What could not be read: the snapshot has of it, and of everything below, what the one before had.
    #[serde(default)]
    pub unread: Unread,
    /// Times that the tree was read.
    pub rounds: u32,
    /// The longest time for which the gateway was stopped meanwhile, in milliseconds, rounded up.
    pub pause_ms: Option<u64>,
    /// Written beside the history on purpose (`backup --fork`).
    pub fork: bool,
    pub totals: Totals,
    /// Oldest first; a later layer's word on a path wins.
    pub layers: Vec<Layer>,
}

/// Whether the tree was as the snapshot has it at any one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// Nothing changed between the first file read and the last, or nothing that could change it ran meanwhile.
    Instant,
    /// Each file is as it was when it was read.
    PerFile,
}

/// What the whole snapshot holds and what this one added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Entries of every type, the root included.
    pub entries: u64,
    /// Regular files, hard links not counted.
    pub files: u64,
    /// Bytes of the files' contents, holes not counted.
    pub bytes: u64,
    /// Bytes of the layers that this snapshot brought to the store.
    pub stored_bytes: u64,
    /// Entries left out with a warning: fifos, devices, what the gateway's user may not read.
    pub skipped: u64,
}

/// One object of `layers/` and the place of its index in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Layer {
    pub id: String,
    /// Bytes of the object.
    pub size: u64,
    /// Bytes of the tar stream in it.
    pub raw_size: u64,
    /// Of the object.
    pub sha256: String,
    /// Where the index's content starts in the object.
    pub index_offset: u64,
    /// Compressed bytes of the index.
    pub index_size: u64,
    /// Of the index's compressed bytes.
    pub index_sha256: String,
}

impl Layer {
    /// The error of whoever finds it other than it was written.
    pub fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Damaged {
            key: layer_key(&self.id),
            reason: reason.into(),
        }
    }
}

/// Key of a record below the instance.
pub fn key(snapshot: &str) -> String {
    format!("snapshots/{snapshot}.json")
}

/// Key of a layer below the instance.
pub fn layer_key(layer: &str) -> String {
    format!("layers/{layer}.tar.zst")
}

/// Reads one record.
pub async fn read(store: &dyn Store, snapshot: &str) -> Result<Record, Error> {
    twice(|| read_once(store, snapshot)).await
}

async fn read_once(store: &dyn Store, snapshot: &str) -> Result<Record, Error> {
    let key = key(snapshot);
    let (bytes, _) = store.get(&key).await.map_err(|error| match error {
        StoreError::NotFound => Error::UnknownSnapshot {
            id: snapshot.to_owned(),
        },
        StoreError::TooLong => too_long(&key),
        other => Error::store("read", &key)(other),
    })?;
    judge(snapshot, &bytes)
}

/// The error of a sealed object that is larger than any that was written.
pub fn too_long(key: &str) -> Error {
    Error::Damaged {
        key: key.to_owned(),
        reason: "it is larger than 1 MiB".to_owned(),
    }
}

/// What the bytes of a record say, if that can be believed.
pub fn judge(snapshot: &str, bytes: &[u8]) -> Result<Record, Error> {
    let key = key(snapshot);
    let record: Record = sealed::open(&key, bytes)?;
    let reason = if record.format != FORMAT {
        let format = record.format;
        Some(format!("it has format {format}, this tool reads {FORMAT}"))
    } else if record.id != snapshot {
        Some(format!("it is the record of {:?}", record.id))
    } else {
        record.lie()
    };
    match reason {
        Some(reason) => Err(Error::Damaged { key, reason }),
        None => Ok(record),
    }
}

impl Record {
    /// What no writer has ever written: found here, once, because everybody adds these numbers up.
    fn lie(&self) -> Option<String> {
        if self.layers.len() > MOST_LAYERS {
            return Some(format!("it names {} layers", self.layers.len()));
        }
        for layer in &self.layers {
            if !id::is_valid(&layer.id) {
                return Some(format!("{:?} is no layer's id", layer.id));
            }
            let numbers = [
                layer.size,
                layer.raw_size,
                layer.index_offset,
                layer.index_size,
            ];
            if numbers.iter().any(|number| *number > LARGEST) {
                return Some(format!("it gives layer {} an absurd size", layer.id));
            }
        }
        let totals = &self.totals;
        let numbers = [
            self.sequence,
            totals.entries,
            totals.files,
            totals.bytes,
            totals.stored_bytes,
            totals.skipped,
            self.unread.count,
        ];
        let mut words = [&self.time, &self.writer, &self.tool]
            .into_iter()
            .chain(&self.reason)
            .chain(&self.unread.paths);
        if words.any(|word| word.contains(char::is_control)) {
            return Some("it has control characters".to_owned());
        }
        let is_absurd = numbers.iter().any(|number| *number > LARGEST);
        is_absurd.then(|| "it has an absurd number".to_owned())
    }
}

/// Ids of every record of the instance, oldest first.
pub async fn list(store: &dyn Store) -> Result<Vec<String>, Error> {
    let names = store
        .list("snapshots/")
        .await
        .map_err(Error::store("list", "snapshots/"))?;
    let mut ids: Vec<String> = names
        .iter()
        .filter_map(|key| key.strip_prefix("snapshots/")?.strip_suffix(".json"))
        .filter(|id| id::is_valid(id))
        .map(str::to_owned)
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

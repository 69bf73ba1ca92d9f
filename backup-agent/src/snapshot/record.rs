//! The record of a snapshot, `snapshots/<id>.json`: a snapshot exists when this object does.

use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    snapshot::{id, sealed},
    store::{Store, StoreError},
};

/// Version of the layout of records, heads and layers that this code reads and writes.
pub const FORMAT: u32 = 1;

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
    /// Entries left out with a warning: fifos, devices, what could not be read.
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
    let key = key(snapshot);
    let (bytes, _) = store.get(&key).await.map_err(|error| match error {
        StoreError::NotFound => Error::UnknownSnapshot {
            id: snapshot.to_owned(),
        },
        other => Error::store("read", &key)(other),
    })?;
    let record: Record = sealed::open(&key, &bytes)?;
    let mut reason = None;
    if record.format != FORMAT {
        reason = Some(format!(
            "it has format {}, this tool reads {FORMAT}",
            record.format
        ));
    } else if record.id != snapshot {
        reason = Some(format!("it is the record of {}", record.id));
    } else if let Some(layer) = record.layers.iter().find(|layer| !id::is_valid(&layer.id)) {
        reason = Some(format!("{:?} is no layer's id", layer.id));
    }
    match reason {
        Some(reason) => Err(Error::Damaged { key, reason }),
        None => Ok(record),
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

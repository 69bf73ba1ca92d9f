//! The local index: every entry of the last snapshot with the stamp that tells a changed file from an unchanged one.

use std::{fs::File, path::Path};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    archive::{
        entry::{Entry, Kind},
        index::{IndexReader, IndexWriter},
    },
    error::Error,
    snapshot::id::hex,
    tree::{
        exclude::Excludes,
        read,
        scan::{self, Found, Verdict},
    },
};

/// First line of the local index.
#[derive(Serialize, Deserialize)]
struct LocalHeader {
    snapshot: String,
    /// The file systems' clock when the walk began. What has a later change time may have changed again unseen.
    started: i64,
}

/// The time that file systems give to files now: it advances in ticks of some milliseconds.
pub fn file_clock() -> Result<i64, Error> {
    let now =
        clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map_err(Error::local("read", "the clock"))?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

/// Writes a local index: the header, then every entry with its stamp.
pub struct LocalIndex(IndexWriter);

impl LocalIndex {
    pub fn new(file: File, snapshot: &str, started: i64) -> Result<Self, Error> {
        let header = LocalHeader {
            snapshot: snapshot.to_owned(),
            started,
        };
        let line = serde_json::to_vec(&header)
            .expect("a header has string keys and no failing serializer");
        IndexWriter::new(file)
            .and_then(|mut index| {
                index.line(&line)?;
                Ok(Self(index))
            })
            .map_err(Error::local("write", "the index under way"))
    }

    pub fn entry(&mut self, entry: &Entry) -> Result<(), Error> {
        self.0
            .entry(entry)
            .map_err(Error::local("write", "the index under way"))
    }

    pub fn finish(self) -> Result<(), Error> {
        self.0
            .finish()
            .and_then(|file| file.sync_all())
            .map_err(Error::local("write", "the index under way"))
    }
}

/// How to judge a file that changed in the same tick of the clock as the walk that wrote the index.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Racy {
    /// Read it and compare its hash.
    Read,
    /// Count it as changed.
    Changed,
}

/// Whether the tree is exactly what the index of `snapshot` has. Stops at the first difference.
pub fn is_tree_same(
    root: &Path,
    excludes: &Excludes,
    index: File,
    snapshot: &str,
    racy: Racy,
) -> Result<bool, Error> {
    let Ok(mut index) = IndexReader::new(index) else {
        return Ok(false);
    };
    let header: Option<LocalHeader> = index
        .line()
        .ok()
        .flatten()
        .and_then(|line| serde_json::from_slice(line).ok());
    let Some(header) = header.filter(|header| header.snapshot == snapshot) else {
        return Ok(false);
    };
    let visit = |found: Found<'_>| {
        // A damaged index is as good as none: everything is read again.
        let known = index.entry().ok().flatten().ok_or(Walk::Differs)?;
        let is_racy = found
            .entry
            .stamp
            .is_none_or(|stamp| stamp.ctime >= header.started);
        if !scan::is_same(&found.entry, &known) {
            return Err(Walk::Differs);
        }
        if is_racy && (racy == Racy::Changed || !has_hash(&found, &known)) {
            return Err(Walk::Differs);
        }
        Ok(Verdict::Taken)
    };
    // What could not be kept then cannot be kept now; a word about it each time would bury the others.
    match scan::walk(root, excludes, visit, |_, _| ()) {
        Ok(()) => Ok(matches!(index.entry(), Ok(None))),
        Err(Walk::Differs) => Ok(false),
        Err(Walk::Failed(error)) => Err(error),
    }
}

enum Walk {
    Differs,
    Failed(Error),
}

impl From<Error> for Walk {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Whether a file's content is what the index says; other types have nothing but their status.
fn has_hash(found: &Found<'_>, known: &Entry) -> bool {
    if known.kind != Kind::File {
        return true;
    }
    let Ok(Some(mut content)) = read::open(found.parent, found.name) else {
        return false;
    };
    let mut sum = Sha256::new();
    let all = content.read(drop, |bytes| {
        sum.update(bytes);
        Ok(())
    });
    all.is_ok() && known.sha256 == Some(hex(&sum.finalize()))
}

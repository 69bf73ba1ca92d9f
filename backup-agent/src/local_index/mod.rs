//! The local index: what the last snapshot says about each path, with the stamp that tells a changed file from an
//! unchanged one, and with the layers that have a word on it.

mod adopt;
mod compare;

use std::fs::File;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub use self::{
    adopt::{Trust, adopt, restamp},
    compare::{Doubts, Judgement, Racy, could_repeat, is_equal, is_tree_same, unit},
};
use crate::{
    archive::{
        ahead::Ahead,
        entry::{self, Entry},
        index::{IndexReader, IndexWriter},
        line::Scope,
        spool::Spool,
    },
    error::Error,
};

/// What errors call the file.
const UNDER_WAY: &str = "the index under way in RUNTIME_STATE";

/// First line of the local index.
#[derive(Serialize, Deserialize)]
struct LocalHeader {
    /// The snapshot that this is about.
    snapshot: String,
    /// The file systems' clock when the walk began. What has a later change time may have changed again unseen.
    started: i64,
}

/// The earliest time that file systems give to what changes from now on: it advances in ticks of some milliseconds.
pub fn file_clock() -> Result<i64, Error> {
    clock(ClockId::CLOCK_REALTIME_COARSE)
}

/// The latest time that file systems have given until now: some give finer ones than ticks.
pub fn fine_clock() -> Result<i64, Error> {
    clock(ClockId::CLOCK_REALTIME)
}

fn clock(id: ClockId) -> Result<i64, Error> {
    let now = clock_gettime(id).map_err(Error::local("read", "the clock"))?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

/// Writes a local index: the header, then every entry with its stamp.
pub struct LocalIndex(IndexWriter);

impl LocalIndex {
    /// An index of `snapshot`; `started`: the [`file_clock`] before the walk that it is about.
    pub fn new(file: File, snapshot: &str, started: i64) -> Result<Self, Error> {
        let header = LocalHeader {
            snapshot: snapshot.to_owned(),
            started,
        };
        let line = serde_json::to_vec(&header)
            .expect("a header has string keys and no failing serializer");
        IndexWriter::new(file, Scope::Local)
            .and_then(|mut index| {
                index.line(&line)?;
                Ok(Self(index))
            })
            .map_err(Error::local("write", UNDER_WAY))
    }

    pub fn entry(&mut self, entry: &Entry) -> Result<(), Error> {
        self.0
            .entry(entry)
            .map_err(Error::local("write", UNDER_WAY))
    }

    /// Ends it. It is not synced: what a power cut leaves of it fails its checksum, and it is made again from the layers.
    pub fn finish(self) -> Result<(), Error> {
        self.0
            .finish()
            .map(drop)
            .map_err(Error::local("write", UNDER_WAY))
    }
}

/// The index cannot be read: it is as good as none.
#[derive(Debug)]
pub struct Unreadable;

impl From<Unreadable> for Error {
    fn from(_: Unreadable) -> Self {
        let reason = std::io::Error::from(std::io::ErrorKind::InvalidData);
        Self::local("read", "the local index")(reason)
    }
}

/// Reads a local index beside a walk.
pub struct Known {
    /// Changes after this time may have been missed.
    pub started: i64,
    entries: Option<Ahead>,
    next: Option<Entry>,
    /// Number of layers of the snapshot.
    layers: usize,
}

impl Known {
    /// An index without an entry.
    pub fn nothing() -> Self {
        Self {
            started: 0,
            entries: None,
            next: None,
            layers: 0,
        }
    }

    /// The index of `snapshot`, which has that many layers.
    pub fn open(index: &Spool, snapshot: &str, layers: usize) -> Result<Self, Unreadable> {
        let mut lines = IndexReader::new(index.reader()).map_err(|_| Unreadable)?;
        let line = lines.line().ok().flatten().ok_or(Unreadable)?;
        let header: LocalHeader = serde_json::from_slice(line).map_err(|_| Unreadable)?;
        if header.snapshot != snapshot {
            return Err(Unreadable);
        }
        let mut known = Self {
            started: header.started,
            entries: Some(Ahead::new(lines).map_err(|_| Unreadable)?),
            next: None,
            layers,
        };
        known.advance()?;
        Ok(known)
    }

    /// The next entry that is before `path` in the order of the walk: nothing was met there.
    pub fn before(&mut self, path: &[u8]) -> Result<Option<Entry>, Unreadable> {
        match &self.next {
            Some(entry) if entry::compare(&entry.path, path).is_lt() => self.advance(),
            _ => Ok(None),
        }
    }

    /// The entry at `path`, after all before it were taken.
    pub fn at(&mut self, path: &[u8]) -> Result<Option<Entry>, Unreadable> {
        match &self.next {
            Some(entry) if entry.path == path => self.advance(),
            _ => Ok(None),
        }
    }

    /// The next entry, after the walk.
    pub fn rest(&mut self) -> Result<Option<Entry>, Unreadable> {
        self.advance()
    }

    fn advance(&mut self) -> Result<Option<Entry>, Unreadable> {
        let next = match &mut self.entries {
            Some(entries) => entries.next().map_err(|_| Unreadable)?,
            None => None,
        };
        let known = |number: &u32| (*number as usize) < self.layers;
        if next
            .as_ref()
            .is_some_and(|entry| !entry.layers.iter().all(known))
        {
            return Err(Unreadable);
        }
        Ok(std::mem::replace(&mut self.next, next))
    }
}

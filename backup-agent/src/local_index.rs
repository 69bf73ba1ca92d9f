//! The local index: what the last snapshot says about each path, with the stamp that tells a changed file from an
//! unchanged one, and with the layers that have a word on it.

use std::{
    fs::File,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::{
    archive::{
        entry::{Entry, Kind, compare},
        index::{IndexReader, IndexWriter},
        merge::Merge,
        spool::{Spool, SpoolReader},
    },
    error::Error,
    tree::{
        exclude::Excludes,
        read,
        scan::{self, Found, Verdict},
    },
};

/// First line of the local index.
#[derive(Serialize, Deserialize)]
struct LocalHeader {
    /// The snapshot that this is about.
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
    /// An index of `snapshot`; `started`: the [`file_clock`] before the walk that it is about.
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

    /// Ends it. It is not synced: what a power cut leaves of it fails its checksum, and it is made again from the layers.
    pub fn finish(self) -> Result<(), Error> {
        self.0
            .finish()
            .map(drop)
            .map_err(Error::local("write", "the index under way"))
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
    /// Read ahead on a thread of its own: the walk is the longer half of the work.
    ahead: Option<Receiver<Result<Vec<Entry>, Unreadable>>>,
    batch: std::vec::IntoIter<Entry>,
    next: Option<Entry>,
    /// Number of layers of the snapshot.
    layers: usize,
}

/// Entries that are handed over at once.
const BATCH: usize = 256;

impl Known {
    /// An index without an entry.
    pub fn nothing() -> Self {
        Self {
            started: 0,
            ahead: None,
            batch: Vec::new().into_iter(),
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
        let (sender, ahead) = sync_channel(2);
        thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || read_ahead(lines, &sender))
            .map_err(|_| Unreadable)?;
        let mut known = Self {
            started: header.started,
            ahead: Some(ahead),
            batch: Vec::new().into_iter(),
            next: None,
            layers,
        };
        known.advance()?;
        Ok(known)
    }

    /// The next entry that is before `path` in the order of the walk: nothing was met there.
    pub fn before(&mut self, path: &[u8]) -> Result<Option<Entry>, Unreadable> {
        match &self.next {
            Some(entry) if compare(&entry.path, path).is_lt() => self.advance(),
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
        if self.batch.len() == 0
            && let Some(ahead) = &self.ahead
        {
            // The end comes as an empty batch; a thread that ends without a word has failed.
            self.batch = ahead.recv().map_err(|_| Unreadable)??.into_iter();
            if self.batch.len() == 0 {
                self.ahead = None;
            }
        }
        let next = self.batch.next();
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

/// Reads an index to its end, for as long as somebody takes what it has.
fn read_ahead(
    mut lines: IndexReader<SpoolReader>,
    sender: &SyncSender<Result<Vec<Entry>, Unreadable>>,
) {
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        while batch.len() < BATCH {
            match lines.entry() {
                Ok(Some(entry)) => batch.push(entry),
                Ok(None) => break,
                Err(_) => {
                    let _ = sender.send(Err(Unreadable));
                    return;
                }
            }
        }
        let is_end = batch.is_empty();
        if sender.send(Ok(batch)).is_err() || is_end {
            return;
        }
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

/// Whether what was found is not what the index has.
pub fn is_changed(found: &Found<'_>, known: &Entry, started: i64, racy: Racy) -> bool {
    if !scan::is_same(&found.entry, known) {
        return true;
    }
    let stamp = found.entry.stamp;
    stamp.is_none_or(|stamp| stamp.ctime >= started)
        && (racy == Racy::Changed || !is_equal(found, known))
}

/// Whether what was found has the content and attributes that the index has.
pub fn is_equal(found: &Found<'_>, known: &Entry) -> bool {
    match known.kind {
        Kind::File => read::open(found.parent, found.name)
            .ok()
            .flatten()
            .is_some_and(|content| read::is_equal(&content, known)),
        Kind::Dir => found.directory.is_some_and(|directory| {
            read::xattrs(directory).is_ok_and(|xattrs| xattrs == known.xattrs)
        }),
        Kind::Symlink | Kind::Hardlink | Kind::Deleted => true,
    }
}

/// Why a comparison ended early.
enum Walk {
    /// The tree is not what the index has, or the index cannot be read.
    Differs,
    Failed(Error),
}

impl From<Error> for Walk {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Unreadable> for Walk {
    fn from(_: Unreadable) -> Self {
        Self::Differs
    }
}

/// Whether the tree is exactly what the index has. Stops at the first difference.
pub fn is_tree_same(
    root: &Path,
    excludes: &Excludes,
    mut known: Known,
    racy: Racy,
) -> Result<bool, Error> {
    let started = known.started;
    let visit = |found: Found<'_>| {
        while let Some(gone) = known.before(&found.entry.path)? {
            if gone.kind != Kind::Deleted {
                return Err(Walk::Differs);
            }
        }
        match known.at(&found.entry.path)? {
            Some(entry) if !is_changed(&found, &entry, started, racy) => Ok(Verdict::Taken),
            _ => Err(Walk::Differs),
        }
    };
    // What could not be kept then cannot be kept now; a word about it each time would bury the others.
    let walked = scan::walk(root, excludes, visit, |_, _| ());
    let rest = walked.and_then(|()| {
        while let Some(gone) = known.rest()? {
            if gone.kind != Kind::Deleted {
                return Err(Walk::Differs);
            }
        }
        Ok(())
    });
    match rest {
        Ok(()) => Ok(true),
        Err(Walk::Differs) => Ok(false),
        Err(Walk::Failed(error)) => Err(error),
    }
}

/// How far the tree on the disk is known to be the snapshot's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// It was just restored: only the stamps are new.
    Restored,
    /// Nothing is known: what looks alike is read and compared.
    Compare,
}

/// Writes the local index of a snapshot out of its layers' indexes, with stamps from the disk.
pub fn adopt(
    root: &Path,
    excludes: &Excludes,
    merge: &mut Merge,
    snapshot: &str,
    file: File,
    trust: Trust,
) -> Result<(), Error> {
    let mut index = LocalIndex::new(file, snapshot, file_clock()?)?;
    let mut next = merge.next()?;
    let visit = |found: Found<'_>| {
        while let Some(word) =
            next.take_if(|word| compare(&word.entry.path, &found.entry.path).is_lt())
        {
            index.entry(&word.entry)?;
            next = merge.next()?;
        }
        if let Some(word) = next.take_if(|word| word.entry.path == found.entry.path) {
            let mut entry = word.entry;
            if trust == Trust::Restored && entry.kind != Kind::Deleted {
                // The owner may be another one here.
                let restored = found.entry;
                entry = Entry {
                    sha256: entry.sha256,
                    extents: entry.extents,
                    xattrs: entry.xattrs,
                    layers: entry.layers,
                    ..restored
                };
            } else if scan::is_alike(&found.entry, &entry) && is_equal(&found, &entry) {
                entry.stamp = found.entry.stamp;
            }
            index.entry(&entry)?;
            next = merge.next()?;
        }
        Ok::<_, Error>(Verdict::Taken)
    };
    scan::walk(root, excludes, visit, |_, _| ())?;
    while let Some(word) = next {
        index.entry(&word.entry)?;
        next = merge.next()?;
    }
    index.finish()
}

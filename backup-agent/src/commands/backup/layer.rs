//! Writes one layer, and the local index of the snapshot that it makes: the old index and the log of changes, merged.

use std::{
    collections::HashMap,
    fs::File,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use super::changes::{CAPTURED, Log, Skipped};
use crate::{
    archive::{
        entry::{self, Entry, Kind, Numbers, Stamp},
        extents::{Extent, runs},
        parts::SMALLEST,
        spool::Spool,
        writer::{Halt, LayerWriter},
    },
    error::Error,
    local_index::{Known, LocalIndex, Unreadable},
    snapshot::record::{Layer, Totals},
    tree::{
        cursor::Cursor,
        miss::{Miss, Unread},
        read::{self, Content, Data},
        scan::{self, open_root},
    },
};

/// Which layers have a word on a path, in the numbers of the new snapshot.
pub struct Words {
    /// For each layer of the old snapshot; none if it is taken over.
    numbers: Vec<Option<u32>>,
    /// Of the layer that is being written.
    own: u32,
}

impl Words {
    pub fn new(taken: &[bool]) -> Self {
        let mut own = 0;
        let numbers = taken.iter().map(|taken| {
            let number = (!taken).then_some(own);
            own += u32::from(!taken);
            number
        });
        let numbers = numbers.collect();
        Self { numbers, own }
    }

    /// The layers that go on having a word on it.
    fn left(&self, entry: &Entry) -> Numbers {
        let number = |old: &u32| self.numbers.get(*old as usize).copied().flatten();
        entry.layers.iter().filter_map(number).collect()
    }

    /// Whether the layer that decides about it stays.
    fn is_kept(&self, entry: &Entry) -> bool {
        let last = entry.layers.last();
        last.is_some_and(|old| self.numbers.get(*old as usize).copied().flatten().is_some())
    }
}

/// What a layer is made from.
pub struct Inputs {
    pub root: PathBuf,
    /// The index that the changes were found beside.
    pub known: Known,
    /// The changes.
    pub log: Log,
    /// Their contents; without it they are read now.
    pub captured: Option<Spool>,
}

/// How a layer is written.
#[derive(Clone, Copy)]
pub struct Manner {
    /// Each file is read once before it is written, because one could not be read to its end.
    pub is_careful: bool,
    /// By then everything has to have arrived on the store: what does not fit any more is left for the next run.
    pub until: Instant,
    /// Bytes that are read at most before any has arrived: [`UNKNOWN`], or less after tries that could keep nothing.
    pub most_unknown: u64,
}

/// Two parts: one to fill while the other one is on its way.
pub const UNKNOWN: u64 = 2 * SMALLEST;

/// Why a layer is no good.
pub enum End {
    Halt(Halt),
    /// The same has to be tried again: with this layer of the old snapshot left alone, or carefully.
    Again {
        pinned: Option<u32>,
    },
}

impl From<Halt> for End {
    fn from(halt: Halt) -> Self {
        Self::Halt(halt)
    }
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Halt(error.into())
    }
}

impl From<Unreadable> for End {
    fn from(unreadable: Unreadable) -> Self {
        Self::Halt(unreadable.into())
    }
}

/// What became of a layer.
pub struct Written {
    pub layer: Layer,
    pub totals: Totals,
    pub skipped: Skipped,
    pub unread: Unread,
    /// The time was up before all changes were written.
    pub is_part: bool,
}

/// A layer under way, on a thread with the gateway user's rights; its own files were opened before.
pub struct Pass {
    inputs: Inputs,
    manner: Manner,
    begun: Instant,
    words: Words,
    layer: LayerWriter,
    index: LocalIndex,
    totals: Totals,
    skipped: Skipped,
    unread: Unread,
    /// Files with several names whose first one went away meanwhile, and the name that stands in for it.
    lost: HashMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Pass {
    pub fn new(
        inputs: Inputs,
        manner: Manner,
        words: Words,
        layer: LayerWriter,
        index: LocalIndex,
    ) -> Self {
        Self {
            inputs,
            manner,
            begun: Instant::now(),
            words,
            layer,
            index,
            totals: Totals::default(),
            skipped: Skipped::default(),
            unread: Unread::default(),
            lost: HashMap::new(),
        }
    }

    /// Writes it all.
    pub fn run(mut self) -> Result<Written, End> {
        let root = &self.inputs.root;
        let root = open_root(root).map_err(Error::local("open", root))?;
        let mut tree = Cursor::new(root);
        let captured = self.inputs.captured.take();
        let mut is_part = false;
        while let Some(change) = self.inputs.log.next()? {
            if self.is_late() {
                is_part = true;
                self.leave_rest(change)?;
                break;
            }
            while let Some(known) = self.inputs.known.before(&change.path)? {
                self.pass_on(known, &mut tree)?;
            }
            let known = self.inputs.known.at(&change.path)?;
            let layers = known
                .as_ref()
                .map_or_else(Numbers::new, |known| self.words.left(known));
            if change.kind == Kind::Deleted {
                self.hide(change.path, layers, None)?;
            } else {
                let from = captured
                    .as_ref()
                    .map_or(Contents::Tree(&mut tree), Contents::Captured);
                self.put(change, layers, from, known, false)?;
            }
        }
        while let Some(known) = self.inputs.known.rest()? {
            self.pass_on(known, &mut tree)?;
        }
        self.index.finish()?;
        let layer = self.layer.finish()?;
        self.totals.stored_bytes = layer.size;
        Ok(Written {
            layer,
            totals: self.totals,
            skipped: self.skipped,
            unread: self.unread,
            is_part,
        })
    }

    /// Whether what was written until now just fits into the time that is left, judged by how fast it has arrived.
    fn is_late(&self) -> bool {
        let until = self.manner.until;
        // Until something has arrived, nobody knows how long that takes. Frames that are full go on by themselves, and so does
        // a full part: this ends.
        while self.layer.landed() == 0
            && self.layer.behind() > self.manner.most_unknown
            && Instant::now() < until
        {
            if self.manner.most_unknown < UNKNOWN {
                // Less than a part: it is on its way only when the layer ends.
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let left = until.saturating_duration_since(Instant::now());
        let (passed, landed) = (self.begun.elapsed(), self.layer.landed());
        if landed == 0 {
            return left < passed;
        }
        let needed = passed.as_millis() * u128::from(self.layer.behind()) / u128::from(landed);
        // The last fifth is for the index, and for a store that gets slower.
        needed > left.as_millis() * 4 / 5
    }

    /// Leaves everything from this change on to the next run, which compares the tree with the index of this one.
    fn leave_rest(&mut self, from: Entry) -> Result<(), End> {
        let mut next = Some(from);
        while let Some(mut known) = self.inputs.known.rest()? {
            while let Some(change) = &next
                && entry::compare(&change.path, &known.path).is_lt()
            {
                next = self.inputs.log.next()?;
            }
            if next.as_ref().is_some_and(|next| next.path == known.path) {
                // Where only the content told that it has changed, the next look would take it for the same.
                known.stamp = None;
            }
            let mut layers = self.words.left(&known);
            if !self.words.is_kept(&known) {
                if known.kind != Kind::Dir {
                    // Its layer is taken over. The next run finds it anew.
                    self.hide(known.path, layers, None)?;
                    continue;
                }
                // A deletion would stand for all that is in it.
                self.layer.add(&known)?;
                layers.push(self.words.own);
            }
            known.layers = layers;
            self.count(&known);
            self.index.entry(&known)?;
        }
        Ok(())
    }

    /// A path that has not changed.
    fn pass_on(&mut self, mut known: Entry, tree: &mut Cursor) -> Result<(), End> {
        let layers = self.words.left(&known);
        if self.words.is_kept(&known) {
            known.layers = layers;
            self.count(&known);
            return Ok(self.index.entry(&known)?);
        }
        if known.kind == Kind::Deleted {
            self.hide(known.path, layers, known.stamp)
        } else {
            self.put(known, layers, Contents::Tree(tree), None, true)
        }
    }

    /// Puts a path into the layer; `layers` are those that stay and have a word on it, too. `old`: what the old snapshot has of
    /// it, unless that is the entry itself (`is_old`).
    fn put(
        &mut self,
        mut entry: Entry,
        mut layers: Numbers,
        contents: Contents<'_>,
        old: Option<Entry>,
        is_old: bool,
    ) -> Result<(), End> {
        let miss = self.write(&mut entry, contents)?;
        match miss {
            Ok(()) => {
                layers.push(self.words.own);
                entry.layers = layers;
                self.count(&entry);
                Ok(self.index.entry(&entry)?)
            }
            Err(Miss::Unread(_)) => {
                self.unread.add(entry.display());
                let stamp = entry.stamp;
                let old = if is_old { Some(entry.clone()) } else { old };
                self.keep(entry.path, stamp, layers, old)
            }
            Err(miss) => {
                if let Miss::LeftOut(reason) = miss {
                    self.skipped.add(&entry.path, reason);
                }
                // As if it were not there: an older layer must not fill in for it.
                self.hide(entry.path, layers, None)
            }
        }
    }

    /// Leaves a path that cannot be read as the old snapshot has it. `stamp`: of what is there.
    fn keep(
        &mut self,
        path: Vec<u8>,
        stamp: Option<Stamp>,
        mut layers: Numbers,
        old: Option<Entry>,
    ) -> Result<(), End> {
        let stamp = stamp.map(|stamp| Stamp {
            is_unread: true,
            ..stamp
        });
        let Some(old) = old.filter(|old| old.kind != Kind::Deleted) else {
            // The index has that it is there: what goes on being unread is no change.
            return self.hide(path, layers, stamp);
        };
        if !self.words.is_kept(&old) {
            if old.kind == Kind::File {
                let pinned = old.layers.last().copied();
                return Err(End::Again { pinned });
            }
            self.layer.add(&old)?;
            layers.push(self.words.own);
        }
        self.count(&old);
        Ok(self.index.entry(&Entry {
            stamp,
            layers,
            ..old
        })?)
    }

    /// Puts an entry into the layer, or says why it cannot be read; then the entry is what it was.
    fn write(
        &mut self,
        entry: &mut Entry,
        contents: Contents<'_>,
    ) -> Result<Result<(), Miss>, End> {
        if entry.kind == Kind::Hardlink
            && let Some(first) = &entry.link
            && let Some(stand_in) = self.lost.get(first)
        {
            let first = first.clone();
            if let Some(other) = stand_in {
                entry.link = Some(other.clone());
            } else {
                let mut file = Entry {
                    kind: Kind::File,
                    link: None,
                    ..entry.clone()
                };
                let written = self.write_file(&mut file, contents)?;
                if written.is_ok() {
                    self.lost.insert(first, Some(file.path.clone()));
                    *entry = file;
                }
                return Ok(written);
            }
        }
        if entry.kind == Kind::File {
            let is_linked = entry.stamp.is_some_and(|stamp| stamp.is_linked);
            let written = self.write_file(entry, contents)?;
            if written.is_err() && is_linked {
                self.lost.insert(entry.path.clone(), None);
            }
            return Ok(written);
        }
        self.layer.add(entry)?;
        Ok(Ok(()))
    }

    fn write_file(
        &mut self,
        entry: &mut Entry,
        contents: Contents<'_>,
    ) -> Result<Result<(), Miss>, End> {
        let tree = match contents {
            Contents::Captured(captured) => {
                let data = captured_data(captured, entry)?;
                // What is in a file of ours has to be readable.
                return match self.layer.add_file(entry, &data)? {
                    Err(Miss::Unread(errno)) => Err(Error::local("read", CAPTURED)(errno).into()),
                    other => Ok(other),
                };
            }
            Contents::Tree(tree) => tree,
        };
        let (mut found, content) = match self.open(entry, tree) {
            Ok(opened) => opened,
            Err(miss) => return Ok(Err(miss)),
        };
        let written = self.layer.add_file(&mut found, content.data())?;
        if written.is_err() {
            return Err(End::Again { pinned: None });
        }
        *entry = found;
        Ok(Ok(()))
    }

    /// Opens a file; what is recorded is the file that was opened, not the one that was listed.
    fn open(&mut self, entry: &Entry, tree: &mut Cursor) -> Result<(Entry, Content), Miss> {
        let (parent, name) = tree.parent(&entry.path)?;
        let content = read::open(parent, &name)?;
        let mut found = scan::entry(&entry.path, Kind::File, content.status());
        found.xattrs = self.skipped.attributes(content.file(), &found)?;
        found.keep_lost(entry);
        if self.manner.is_careful {
            content
                .data()
                .read(|error| read::miss(&error), |_| Ok(()))?;
        }
        Ok((found, content))
    }

    /// Deletes a path, if any of the older layers has it. `stamp`: of what is there and cannot be read.
    fn hide(
        &mut self,
        path: Vec<u8>,
        mut layers: Numbers,
        stamp: Option<Stamp>,
    ) -> Result<(), End> {
        if !layers.is_empty() {
            self.layer.delete(&path)?;
            layers.push(self.words.own);
        } else if stamp.is_none() {
            return Ok(());
        }
        Ok(self.index.entry(&Entry {
            stamp,
            layers,
            ..Entry::deleted(path)
        })?)
    }

    fn count(&mut self, entry: &Entry) {
        self.totals.entries += u64::from(entry.kind != Kind::Deleted);
        if entry.kind == Kind::File {
            self.totals.files += 1;
            self.totals.bytes += entry.data();
        }
    }
}

/// Where the bytes of files come from.
enum Contents<'a> {
    Captured(&'a Spool),
    /// As they are now.
    Tree(&'a mut Cursor),
}

/// The bytes of a captured file.
fn captured_data(captured: &Spool, entry: &Entry) -> Result<Data, Error> {
    let file: File = captured
        .file()
        .try_clone()
        .map_err(Error::local("open", entry.display()))?;
    let start = entry.extents.iter().find_map(|extent| match extent {
        Extent::Data { offset, .. } => Some(*offset),
        Extent::Hole { .. } => None,
    });
    Ok(Data::packed(
        file,
        runs(&entry.extents),
        start.unwrap_or_default(),
    ))
}

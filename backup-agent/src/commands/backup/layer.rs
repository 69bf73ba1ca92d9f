//! Writes one layer, and the local index of the snapshot that it makes: the old index and the log of changes, merged.

use std::{collections::HashMap, fs::File, path::PathBuf};

use super::changes::{Log, Skipped};
use crate::{
    archive::{
        entry::{Entry, Kind, Numbers},
        extents::{Extent, runs},
        spool::Spool,
        writer::{Halt, LayerWriter},
    },
    error::Error,
    local_index::{Known, LocalIndex},
    snapshot::record::{Layer, Totals},
    tree::{
        cursor::Cursor,
        read::{self, Data},
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

/// A layer under way, on a thread with the gateway user's rights; its own files were opened before.
pub struct Pass {
    inputs: Inputs,
    words: Words,
    layer: LayerWriter,
    index: LocalIndex,
    totals: Totals,
    skipped: Skipped,
    /// Files with several names whose first one went away meanwhile, and the name that stands in for it.
    lost: HashMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Pass {
    pub fn new(inputs: Inputs, words: Words, layer: LayerWriter, index: LocalIndex) -> Self {
        Self {
            inputs,
            words,
            layer,
            index,
            totals: Totals::default(),
            skipped: Skipped::default(),
            lost: HashMap::new(),
        }
    }

    /// Writes it all. What could not be read any more is among what was skipped.
    pub fn run(mut self) -> Result<(Layer, Totals, Skipped), Halt> {
        let root = &self.inputs.root;
        let root = open_root(root).map_err(Error::local("open", root))?;
        let mut tree = Cursor::new(root);
        let captured = self.inputs.captured.take();
        while let Some(change) = self.inputs.log.next()? {
            while let Some(known) = self.inputs.known.before(&change.path)? {
                self.pass_on(known, &mut tree)?;
            }
            let known = self.inputs.known.at(&change.path)?;
            let layers = known.map_or_else(Numbers::new, |known| self.words.left(&known));
            if change.kind == Kind::Deleted {
                self.hide(change.path, layers)?;
            } else {
                let from = captured
                    .as_ref()
                    .map_or(Contents::Tree(&mut tree), Contents::Captured);
                self.put(change, layers, from)?;
            }
        }
        while let Some(known) = self.inputs.known.rest()? {
            self.pass_on(known, &mut tree)?;
        }
        self.index.finish()?;
        let layer = self.layer.finish()?;
        self.totals.stored_bytes = layer.size;
        Ok((layer, self.totals, self.skipped))
    }

    /// A path that has not changed.
    fn pass_on(&mut self, mut known: Entry, tree: &mut Cursor) -> Result<(), Halt> {
        let layers = self.words.left(&known);
        if self.words.is_kept(&known) {
            known.layers = layers;
            self.count(&known);
            return Ok(self.index.entry(&known)?);
        }
        if known.kind == Kind::Deleted {
            self.hide(known.path, layers)
        } else {
            self.put(known, layers, Contents::Tree(tree))
        }
    }

    /// Puts a path into the layer; `layers` are those that stay and have a word on it, too.
    fn put(
        &mut self,
        entry: Entry,
        mut layers: Numbers,
        contents: Contents<'_>,
    ) -> Result<(), Halt> {
        let path = entry.path.clone();
        let Some(mut entry) = self.write(entry, contents)? else {
            self.skipped.add(&path, "it cannot be read");
            // As if it were not there: an older layer must not fill in for it.
            return self.hide(path, layers);
        };
        layers.push(self.words.own);
        entry.layers = layers;
        self.count(&entry);
        Ok(self.index.entry(&entry)?)
    }

    /// Puts an entry into the layer; `None` when it cannot be read.
    fn write(&mut self, mut entry: Entry, contents: Contents<'_>) -> Result<Option<Entry>, Halt> {
        if entry.kind == Kind::Hardlink
            && let Some(first) = entry.link.take_if(|first| self.lost.contains_key(first))
        {
            if let Some(Some(other)) = self.lost.get(&first) {
                entry.link = Some(other.clone());
            } else {
                entry.kind = Kind::File;
                let written = self.write_file(entry, contents)?;
                let path = written.as_ref().map(|file| file.path.clone());
                self.lost.insert(first, path);
                return Ok(written);
            }
        }
        if entry.kind == Kind::File {
            let path = entry.path.clone();
            let is_linked = entry.stamp.is_some_and(|stamp| stamp.is_linked);
            let written = self.write_file(entry, contents)?;
            if written.is_none() && is_linked {
                self.lost.insert(path, None);
            }
            return Ok(written);
        }
        self.layer.add(&entry)?;
        Ok(Some(entry))
    }

    fn write_file(
        &mut self,
        mut entry: Entry,
        contents: Contents<'_>,
    ) -> Result<Option<Entry>, Halt> {
        let tree = match contents {
            Contents::Captured(captured) => {
                let data = captured_data(captured, &entry)?;
                self.layer.add_file(&mut entry, &data)?;
                return Ok(Some(entry));
            }
            Contents::Tree(tree) => tree,
        };
        let Ok((parent, name)) = tree.parent(&entry.path) else {
            return Ok(None);
        };
        let Ok(Some(content)) = read::open(parent, &name) else {
            return Ok(None);
        };
        // What is recorded is the file that was opened, not the one that was listed.
        let mut entry = scan::entry(&entry.path, Kind::File, content.status());
        entry.xattrs = self.skipped.attributes(content.file(), &entry);
        self.layer.add_file(&mut entry, content.data())?;
        Ok(Some(entry))
    }

    /// Deletes a path, if any of the older layers has it.
    fn hide(&mut self, path: Vec<u8>, mut layers: Numbers) -> Result<(), Halt> {
        if layers.is_empty() {
            return Ok(());
        }
        self.layer.delete(&path)?;
        layers.push(self.words.own);
        Ok(self.index.entry(&Entry {
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

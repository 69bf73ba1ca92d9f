//! A snapshot's tree out of the indexes of its layers: of all the words on a path, the newest layer's counts.
//!
//! Indexes are read side by side as streams, so it takes the same memory for any number of paths.

use std::cmp::Ordering;

use super::{
    entry::{Entry, compare},
    index::IndexReader,
    layer_index::LayerIndex,
    spool::SpoolReader,
};
use crate::{error::Error, snapshot::record::Layer};

/// The paths of a snapshot in the order of a walk, deletions among them.
pub struct Merge {
    /// Oldest first.
    sources: Vec<Source>,
}

/// What a snapshot says about one path.
pub struct Word {
    /// With the numbers of all layers that have a word on the path.
    pub entry: Entry,
    /// Number of the layer whose word this is.
    pub layer: usize,
    /// Which of that layer's entries, counted from 0.
    pub ordinal: u64,
}

impl Merge {
    /// The merge of all layers of a snapshot, oldest first.
    pub fn new<'a>(indexes: impl IntoIterator<Item = &'a LayerIndex>) -> Result<Self, Error> {
        let sources = indexes.into_iter().map(Source::new);
        let sources = sources.collect::<Result<_, _>>()?;
        Ok(Self { sources })
    }

    /// The next path.
    pub fn next(&mut self) -> Result<Option<Word>, Error> {
        let mut words: Vec<usize> = Vec::new();
        let mut lowest: Option<&[u8]> = None;
        for (number, source) in self.sources.iter().enumerate() {
            let Some(entry) = &source.next else { continue };
            match lowest.map_or(Ordering::Less, |path| compare(&entry.path, path)) {
                Ordering::Less => {
                    words.clear();
                    words.push(number);
                    lowest = Some(&entry.path);
                }
                Ordering::Equal => words.push(number),
                Ordering::Greater => {}
            }
        }
        let mut decided = None;
        for &number in &words {
            let source = &mut self.sources[number];
            let ordinal = source.taken;
            decided = source.take()?.map(|entry| (entry, number, ordinal));
        }
        Ok(decided.map(|(mut entry, layer, ordinal)| {
            let numbers = words.iter().map(|number| u32::try_from(*number));
            // There is a layer for each backup at most; the kernel runs out of descriptors long before.
            entry.layers = numbers.map(|number| number.unwrap_or(u32::MAX)).collect();
            Word {
                entry,
                layer,
                ordinal,
            }
        }))
    }
}

/// The entries of one layer, in order.
pub struct Source {
    layer: Layer,
    lines: IndexReader<SpoolReader>,
    next: Option<Entry>,
    taken: u64,
}

impl Source {
    pub fn new(index: &LayerIndex) -> Result<Self, Error> {
        let lines = index.lines()?;
        let mut source = Self {
            layer: index.layer.clone(),
            lines,
            next: None,
            taken: 0,
        };
        source.next = source.read()?;
        Ok(source)
    }

    /// The next entry; the one behind it is read already, so that the order is known to be right.
    pub fn take(&mut self) -> Result<Option<Entry>, Error> {
        let after = self.read()?;
        if let (Some(before), Some(after)) = (&self.next, &after)
            && compare(&before.path, &after.path) != Ordering::Less
        {
            let reason = format!(
                "{}: the index is not in the order of a walk",
                after.display()
            );
            return Err(self.layer.damaged(reason));
        }
        self.taken += 1;
        Ok(std::mem::replace(&mut self.next, after))
    }

    fn read(&mut self) -> Result<Option<Entry>, Error> {
        self.lines.entry().map_err(|error| {
            self.layer
                .damaged(format!("its index cannot be read: {error}"))
        })
    }
}

//! Makes the local index of a snapshot that was taken elsewhere or long ago: the words come from its layers, the stamps from
//! the tree on the disk. What has no stamp counts as changed at the next backup.

use std::{fs::File, path::Path};

use super::{
    LocalIndex,
    compare::{is_equal, lacks_attributes},
    file_clock,
};
use crate::{
    archive::{
        entry::{Entry, Kind, compare},
        merge::Merge,
    },
    error::Error,
    tree::{
        exclude::Excludes,
        scan::{self, Met, Verdict},
    },
};

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
    let visit = |met: Met<'_>| {
        // What cannot be looked at keeps its words and gets no stamp: the next backup judges it.
        let Met::Entry(found) = met else {
            return Ok(Verdict::Taken);
        };
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
                let mut restored = found.entry.clone();
                if let Some(stamp) = &mut restored.stamp {
                    stamp.is_bare = !entry.xattrs.is_empty() && lacks_attributes(found, &entry);
                }
                entry = Entry {
                    sha256: entry.sha256,
                    extents: entry.extents,
                    xattrs: entry.xattrs,
                    layers: entry.layers,
                    ..restored
                };
            } else if scan::is_alike(&found.entry, &entry) && is_equal(found, &entry) == Ok(true) {
                entry.stamp = found.entry.stamp;
            }
            index.entry(&entry)?;
            next = merge.next()?;
        }
        Ok::<_, Error>(Verdict::Taken)
    };
    scan::walk(root, excludes, visit)?;
    while let Some(word) = next {
        index.entry(&word.entry)?;
        next = merge.next()?;
    }
    index.finish()
}

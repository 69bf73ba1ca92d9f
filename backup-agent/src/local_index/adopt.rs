//! Makes the local index of a snapshot that was taken elsewhere or long ago: the words come from its layers, the stamps from
//! the tree on the disk. What has no stamp counts as changed at the next backup.

use std::{ffi::CString, fs::File, path::Path};

use nix::{fcntl::AtFlags, sys::stat::fstatat};

use super::{
    LocalIndex, UNDER_WAY,
    compare::{is_equal, lacks_attributes},
    file_clock,
};
use crate::{
    archive::{
        entry::{Entry, Kind, Stamp, compare},
        index::{IndexReader, IndexWriter},
        line::Scope,
        merge::Merge,
        spool::Spool,
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

/// Copies an index, with new stamps for the entries of the tree's root whose change times alone are not what it has: moving
/// them, as a restore does on a mount point, changes those.
pub fn restamp(index: &Spool, root: &Path, file: File) -> Result<(), Error> {
    let failed = || Error::local("read", UNDER_WAY);
    let mut lines = IndexReader::new(index.reader()).map_err(failed())?;
    let header = lines.line().map_err(failed())?.map(<[u8]>::to_vec);
    let mut copy = IndexWriter::new(file, Scope::Local).map_err(failed())?;
    copy.line(&header.unwrap_or_default()).map_err(failed())?;
    let directory = scan::open_root(root).map_err(Error::local("open", root))?;
    while let Some(mut entry) = lines.entry().map_err(failed())? {
        if let Some(stamp) = entry.stamp.as_mut()
            && let Ok(name) = CString::new(entry.path.as_slice())
            && !entry.path.contains(&b'/')
        {
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW | AtFlags::AT_EMPTY_PATH;
            // What is gone, or somebody else's by now, keeps its stamp and counts as changed.
            if let Ok(status) = fstatat(&directory, name.as_c_str(), flags) {
                let found = scan::entry(&entry.path, entry.kind, &status);
                // The root itself is not the directory that the index was made of.
                let is_same_file =
                    entry.path.is_empty() || found.stamp.is_some_and(|now| now.ino == stamp.ino);
                let is_alike = (found.mode, found.uid, found.gid, found.mtime)
                    == (entry.mode, entry.uid, entry.gid, entry.mtime)
                    && (entry.kind != Kind::File || found.size == entry.size);
                if let Some(now) = found.stamp.filter(|_| is_same_file && is_alike) {
                    *stamp = Stamp {
                        is_bare: stamp.is_bare,
                        ..now
                    };
                }
            }
        }
        copy.entry(&entry).map_err(failed())?;
    }
    copy.finish().map(drop).map_err(failed())
}

//! Compares a tree with what an index has. What cannot be told counts as a difference: it costs a read, or a file more in a
//! snapshot, and never a change that goes unseen.

use std::path::Path;

use super::{Known, Unreadable};
use crate::{
    archive::entry::{Entry, Kind},
    error::Error,
    tree::{
        exclude::Excludes,
        read,
        scan::{self, Found, Verdict},
    },
};

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

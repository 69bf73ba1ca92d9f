//! One path of a snapshot: all that a restore needs to make it again, and the order of paths. Its form in an index is the
//! line's business.

use std::{cmp::Ordering, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::extents::{Extent, Extents};
use crate::{error::Error, snapshot::id::hex};

/// Longest path (`PATH_MAX`): no program can open a longer one by its name. Each line of an index has a whole path, so
/// without a bound a deep tree would cost the square of its depth.
pub const LONGEST_PATH: usize = 4096;
/// Longest name of a component (`NAME_MAX`).
pub const LONGEST_NAME: usize = 255;
/// The root's path in an index: an empty name is easily taken for a missing one.
pub(super) const ROOT: &str = ".";

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Dir,
    File,
    Symlink,
    /// Another name of a file that comes earlier in the walk.
    Hardlink,
    /// Nothing any more: hides what older layers have under this path. Has no other member.
    Deleted,
}

/// One path with all that a restore needs to make it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative, components joined by `/`; empty for the root.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub mtime: i64,
    /// Logical bytes of a file, holes included; 0 for other types.
    pub size: u64,
    /// Target of a symbolic link as it is written there, or path of the file that a hard link is a name of.
    pub link: Option<Vec<u8>>,
    /// Of a file's data extents in order.
    pub sha256: Option<[u8; 32]>,
    pub extents: Extents,
    /// The `user.*` attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Only in the local index: what tells a changed file from an unchanged one. Without it the entry counts as changed.
    pub stamp: Option<Stamp>,
    /// Only in the local index: the layers that have a word on this path, oldest first, by their numbers in the snapshot's
    /// list. The last one's word is this entry.
    pub layers: Numbers,
}

/// Numbers of layers. Few paths have a word in more, so most take no memory of their own.
pub type Numbers = SmallVec<[u32; 4]>;

/// The part of a file's status that changes with it and cannot be set by its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Nanoseconds since the epoch.
    pub ctime: i64,
    pub ino: u64,
    /// The file has more than one name.
    pub is_linked: bool,
    /// What has this stamp on the disk could not be read: the entry is what the snapshot before had.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_unread: bool,
}

/// Order of a depth-first walk with sorted directories: component by component, by bytes.
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    // A name has no byte below the separator, once that counts as the lowest of all.
    let rank = |byte: u8| if byte == b'/' { 0 } else { byte };
    let common = a.len().min(b.len());
    match a[..common].iter().zip(&b[..common]).find(|(a, b)| a != b) {
        Some((a, b)) => rank(*a).cmp(&rank(*b)),
        None => a.len().cmp(&b.len()),
    }
}

/// About the bytes that an entry with `data` bytes of content takes in a tar stream: a header, nearly always an extended
/// one too, and what fills the last block.
pub fn weight(data: u64) -> u64 {
    const HEADERS: u64 = 1536;
    const BLOCK: u64 = 512;
    data.div_ceil(BLOCK)
        .saturating_mul(BLOCK)
        .saturating_add(HEADERS)
}

impl Entry {
    /// A path with nothing under it: a deletion, or the start of another entry.
    pub fn deleted(path: Vec<u8>) -> Self {
        Self {
            path,
            kind: Kind::Deleted,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: 0,
            size: 0,
            link: None,
            sha256: None,
            extents: Extents::new(),
            xattrs: BTreeMap::new(),
            stamp: None,
            layers: Numbers::new(),
        }
    }

    /// Bytes of a file's content, holes left out.
    pub fn data(&self) -> u64 {
        let lengths = self.extents.iter().map(|extent| match extent {
            Extent::Data { length, .. } => *length,
            Extent::Hole { .. } => 0,
        });
        lengths.fold(0, u64::saturating_add)
    }

    /// About the bytes that it takes in a tar stream.
    pub fn weight(&self) -> u64 {
        weight(self.data())
    }

    /// The error of whoever cannot make it; `source`: the key of what it came from.
    pub fn damaged(&self, source: &str, reason: &str) -> Error {
        Error::Damaged {
            key: source.to_owned(),
            reason: format!("{}: {reason}", self.display()),
        }
    }

    /// The path for people.
    pub fn display(&self) -> String {
        display(&self.path)
    }
}

/// A path for people: control characters and what is not UTF-8 are escaped, so that a name cannot play tricks on a terminal.
pub fn display(path: &[u8]) -> String {
    if path.is_empty() {
        return ROOT.to_owned();
    }
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text.extend(["\\x", &hex(&[*byte])]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_sort_as_a_walk_meets_them() {
        let walk: [&[u8]; 8] = [
            b"", b"a", b"a/\x01", b"a/b", b"a/b/c", b"a/c", b"a\x01", b"a.b",
        ];
        for pair in walk.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn names_cannot_write_to_a_terminal() {
        assert_eq!(display(b"a\x1b[2Jb\xff"), "a\\u{1b}[2Jb\\xff");
        assert_eq!(display(b""), ".");
    }
}

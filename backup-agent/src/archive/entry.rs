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

/// Rights that named users and groups have on it (acl(5)).
pub const ACCESS: &str = "system.posix_acl_access";
/// Capabilities that a program gets when it is executed (capabilities(7)).
pub const CAPABILITIES: &str = "security.capability";
/// Attributes outside of `user.*` that a snapshot keeps. The second one is the ACL of what will be made in a directory.
pub const SYSTEM: [&str; 3] = [ACCESS, "system.posix_acl_default", CAPABILITIES];

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
    /// The `user.*` attributes, and those of [`SYSTEM`].
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Nanoseconds since the epoch.
    pub ctime: i64,
    pub ino: u64,
    /// The file has more than one name.
    pub is_linked: bool,
    /// What has this stamp on the disk could not be read: the entry is what the snapshot before had.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_unread: bool,
    /// The disk could not keep all attributes that the entry has: what it lacks of them is no change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_bare: bool,
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

    /// The mode that gives nobody a right that is not theirs while there is no ACL: with one, the bits of the group are the
    /// most that it gives anybody (acl(5), "CORRESPONDENCE BETWEEN ACL ENTRIES AND FILE PERMISSION BITS").
    pub fn plain_mode(&self) -> u32 {
        let Some(acl) = self.xattrs.get(ACCESS) else {
            return self.mode;
        };
        self.mode & !0o070 | rights_of_group(acl) << 3
    }

    /// Keeps the attributes that the disk could not keep of `known`, if this is the same file.
    pub fn keep_lost(&mut self, known: &Self) {
        if let (Some(stamp), Some(last)) = (&mut self.stamp, known.stamp)
            && last.is_bare
            && last.ino == stamp.ino
            && self.kind == known.kind
        {
            stamp.is_bare = true;
            for (name, value) in &known.xattrs {
                let place = self.xattrs.entry(name.clone());
                place.or_insert_with(|| value.clone());
            }
        }
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

/// What an ACL gives the group of a file itself. As an attribute it is a version and entries of eight bytes: tag, rights, id
/// (`linux/posix_acl_xattr.h`).
fn rights_of_group(acl: &[u8]) -> u32 {
    const GROUP: u16 = 0x04;
    const MASK: u16 = 0x10;

    let entries = acl.get(4..).unwrap_or_default().chunks_exact(8);
    let rights = |tag: u16| {
        let mut entries = entries.clone();
        let entry = entries.find(|entry| entry[..2] == tag.to_le_bytes());
        entry.map(|entry| u32::from(entry[2] & 7))
    };
    rights(GROUP).unwrap_or(0) & rights(MASK).unwrap_or(7)
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
    fn without_its_acl_the_group_has_no_more_than_its_own_rights() {
        let acl = |entries: &[(u8, u8)]| {
            let entries = entries.iter().flat_map(|(tag, rights)| {
                let id = [0xff; 4];
                [[*tag, 0, *rights, 0], id].concat()
            });
            [2, 0, 0, 0].into_iter().chain(entries).collect::<Vec<u8>>()
        };
        // Owner, a named user, group, mask, others.
        let full = acl(&[(1, 6), (2, 7), (4, 5), (0x10, 7), (0x20, 0)]);
        for (acl, want) in [
            (full.clone(), 0o650),
            (acl(&[(1, 6), (2, 7), (4, 7), (0x10, 4)]), 0o640),
            (acl(&[(1, 6), (4, 4)]), 0o640),
            (full[..full.len() - 12].to_vec(), 0o650),
            (Vec::new(), 0o600),
        ] {
            let mut entry = Entry::deleted(Vec::new());
            entry.mode = 0o670;
            assert_eq!(entry.plain_mode(), 0o670);
            entry.xattrs.insert(ACCESS.to_owned(), acl);
            assert_eq!(format!("{:o}", entry.plain_mode()), format!("{want:o}"));
        }
    }

    #[test]
    fn names_cannot_write_to_a_terminal() {
        assert_eq!(display(b"a\x1b[2Jb\xff"), "a\\u{1b}[2Jb\\xff");
        assert_eq!(display(b""), ".");
    }
}

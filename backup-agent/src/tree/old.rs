//! The tree that a restore will replace, as a source of files: what is right in there need not come from the store. Any doubt
//! about a file says no, and it is fetched.

use std::{
    borrow::Cow,
    ffi::{CStr, CString},
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::AtFlags,
    unistd::{UnlinkatFlags, linkat, unlinkat},
};

use super::{
    cursor::{Cursor, create},
    read, scan,
    status::Status,
};
use crate::{
    archive::entry::{Entry, Kind, Stamp, display},
    error::Error,
};

/// A tree to take files from.
pub struct Old {
    tree: Cursor,
    /// Nobody else works in it: a file may be in both trees at once.
    is_quiet: bool,
}

impl Old {
    /// The tree below `root`.
    pub fn new(root: OwnedFd, is_quiet: bool) -> Self {
        Self {
            tree: Cursor::new(root),
            is_quiet,
        }
    }

    /// The file at an entry's path, if it looks right, and, where nobody else works, is right.
    pub fn find(&mut self, entry: &Entry, status: &Status) -> Option<Match<'_>> {
        let (parent, name) = self.tree.parent(&entry.path).ok()?;
        let content = read::open(parent, &name).ok()?;
        let found = scan::entry(&entry.path, Kind::File, content.status());
        let is_alone = content.status().st_nlink == 1;
        if !is_alone || !status.fits(found, entry) {
            return None;
        }
        let is_quiet = self.is_quiet;
        if is_quiet && read::is_equal(&content, entry) != Ok(true) {
            return None;
        }
        Some(Match {
            parent,
            name,
            content,
            is_quiet,
        })
    }
}

/// A file of the old tree that an entry can be made of.
pub struct Match<'a> {
    parent: BorrowedFd<'a>,
    name: CString,
    content: read::Content,
    is_quiet: bool,
}

impl Match<'_> {
    /// Puts it into the new tree; `false`, and nothing is there, if it turned out to be another one.
    pub fn put(
        &self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry: &Entry,
        status: &mut Status,
        source: &str,
    ) -> Result<bool, Error> {
        let path = || display(&entry.path);
        if self.is_quiet {
            let flags = AtFlags::empty();
            linkat(self.parent, self.name.as_c_str(), parent, name, flags)
                .map_err(Error::local("make", path()))?;
            return Ok(true);
        }
        let mut file = create(parent, name).map_err(Error::local("make", path()))?;
        copy(&self.content, &mut file, entry.size).map_err(Error::local("write", path()))?;
        let lost = status.lost.clone();
        let is_whole = status.set(&file, entry, source)?;
        // The copy is judged, not the original: somebody may have written to that meanwhile. What this disk cannot keep is no
        // difference.
        let mut want = Cow::Borrowed(entry);
        if !is_whole {
            let stamp = want.stamp.unwrap_or_default();
            want.to_mut().stamp = Some(Stamp {
                is_bare: true,
                ..stamp
            });
        }
        let copied = read::open(parent, name);
        let is_right = copied.and_then(|copied| read::is_equal(&copied, &want)) == Ok(true);
        if !is_right {
            status.lost = lost;
            unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)
                .map_err(Error::local("remove", path()))?;
        }
        Ok(is_right)
    }
}

/// Copies a file's data, in the kernel where it can, and keeps its holes. One that shrank meanwhile comes out wrong.
fn copy(content: &read::Content, file: &mut File, size: u64) -> std::io::Result<()> {
    for &(offset, length) in content.data().runs() {
        let mut from = content.file();
        from.seek(SeekFrom::Start(offset))?;
        file.seek(SeekFrom::Start(offset))?;
        std::io::copy(&mut from.take(length), file)?;
    }
    file.set_len(size)
}

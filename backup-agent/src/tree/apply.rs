//! Makes a tree out of entries, in a directory that nobody else writes to: a fresh one, or one that an earlier run of the same
//! has begun to fill.
//!
//! Entries come from a store that may be hostile. Every name is one component opened below its parent's descriptor, links
//! are made and never followed. Three passes over the snapshot, each in the order of a walk: directories first, then files
//! layer by layer, at last links, and the status of directories from the inside out, because whatever is made in one
//! changes its time.

use std::{
    ffi::CStr,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat},
};
use sha2::{Digest, Sha256};

use super::{
    cursor::{Cursor, create, is_above},
    miss::Unread,
    old::Old,
    read::{self, Content},
    scan::{self, DIRECTORY},
    status::{Status, forget_acls},
};
use crate::{
    archive::{
        entry::{Entry, Kind, Stamp, display},
        extents::Extent,
        reader::RawStream,
        writer::Halt,
    },
    error::Error,
    progress,
    snapshot::id::hex,
};

/// Unpacks entries below one directory.
pub struct Applier {
    tree: Cursor,
    /// An earlier run has made a part of the tree, out of the same entries.
    is_resumed: bool,
    /// The tree that will be replaced: what is right in there need not come from the store.
    old: Option<Old>,
    status: Status,
    /// Directories around the last entry of the last pass, whose status is still to be set.
    open: Vec<Entry>,
    /// Key of what the entries come from, for errors.
    source: String,
    pub files: u64,
    pub bytes: u64,
}

impl Applier {
    /// An applier into `root`: an empty directory, or with `is_resumed` one that an earlier run has begun to fill.
    /// `is_owner_kept`: the caller may give files away (it is root).
    pub fn new(
        root: OwnedFd,
        is_resumed: bool,
        is_owner_kept: bool,
        old: Option<Old>,
        source: String,
    ) -> Result<Self, Error> {
        forget_acls(&root).map_err(Error::local("remove the ACL of", "."))?;
        let status = fstat(&root).map_err(Error::local("look at", "."))?;
        Ok(Self {
            tree: Cursor::new(root),
            is_resumed,
            old,
            status: Status::new(is_owner_kept, (status.st_uid, status.st_gid)),
            open: Vec::new(),
            source,
            files: 0,
            bytes: 0,
        })
    }

    /// First pass: makes a directory, with a mode that lets the other passes in.
    pub fn directory(&mut self, entry: &Entry) -> Result<(), Error> {
        if entry.path.is_empty() {
            return Ok(());
        }
        let (parent, name) = self.tree.place(entry, &self.source)?;
        match mkdirat(parent, name.as_c_str(), Mode::S_IRWXU) {
            Err(Errno::EEXIST) if self.is_resumed => {
                // It may have got the mode and the ACL that it has at last.
                let (way, flags) = (Mode::S_IRWXU, FchmodatFlags::NoFollowSymlink);
                fchmodat(parent, name.as_c_str(), way, flags)
                    .and_then(|()| openat(parent, name.as_c_str(), DIRECTORY, Mode::empty()))
                    .and_then(forget_acls)
                    .map_err(Error::local("open", entry.display()))
            }
            made => made.map_err(Error::local("make", entry.display())),
        }
    }

    /// First pass, after the directories around it: leaves a file that is right there already, or takes it over from the old
    /// tree.
    pub fn reuse(&mut self, entry: &Entry) -> Result<bool, Error> {
        let is_taken = self.is_whole(entry)? || self.take_over(entry)?;
        if is_taken {
            self.files += 1;
            self.bytes += entry.data();
        }
        Ok(is_taken)
    }

    /// Whether an earlier run has made this file, to its end.
    fn is_whole(&mut self, entry: &Entry) -> Result<bool, Error> {
        if !self.is_resumed {
            return Ok(false);
        }
        let (parent, name) = self.tree.place(entry, &self.source)?;
        let Ok(content) = read::open(parent, &name) else {
            return Ok(false);
        };
        let found = scan::entry(&entry.path, Kind::File, content.status());
        let mut wanted = entry.clone();
        wanted.stamp = found.stamp.map(|stamp| Stamp {
            is_bare: true,
            ..stamp
        });
        if !self.status.fits(found, entry) || read::is_equal(&content, &wanted) != Ok(true) {
            return Ok(false);
        }
        if !entry.xattrs.is_empty() {
            // What the disk cannot keep of it was lost to the earlier run, and has to be told by this one.
            let _ = self.status.set(content.file(), entry)?;
        }
        Ok(true)
    }

    fn take_over(&mut self, entry: &Entry) -> Result<bool, Error> {
        let old = self.old.as_mut();
        let Some(found) = old.and_then(|old| old.find(entry, &self.status)) else {
            return Ok(false);
        };
        let (parent, name) = self.tree.place(entry, &self.source)?;
        if self.is_resumed {
            make_way(parent, &name).map_err(Error::local("remove", entry.display()))?;
        }
        found.put(parent, &name, entry, &mut self.status)
    }

    /// How much of a file an earlier run has written, from its start on. What cannot be gone on with is removed.
    pub fn written(&mut self, entry: &Entry) -> Result<u64, Error> {
        if !self.is_resumed {
            return Ok(0);
        }
        let (parent, name) = self.tree.place(entry, &self.source)?;
        let content = read::open(parent, &name).ok();
        let status = content.as_ref().map(Content::status);
        // A part has one name, or the file would change under the other one; no attributes yet; and less than the whole length: what
        // has that has been judged already, and is not right.
        let is_bare = content.as_ref().is_some_and(|content| {
            read::xattrs(content.file()).is_ok_and(|found| found.all.is_empty() && !found.is_cut)
        });
        if let Some(status) = status.filter(|status| status.st_nlink == 1 && is_bare)
            && (1..entry.size).contains(&read::size(status))
        {
            return Ok(read::size(status));
        }
        make_way(parent, &name).map_err(Error::local("remove", entry.display()))?;
        Ok(0)
    }

    /// Second pass: writes a file.
    pub fn file(&mut self, entry: &Entry, raw: &mut RawStream) -> Result<(), Halt> {
        let covered = entry.extents.iter().try_fold(0_u64, |sum, extent| {
            let (Extent::Data { length, .. } | Extent::Hole { length }) = extent;
            sum.checked_add(*length)
        });
        if covered != Some(entry.size) || i64::try_from(entry.size).is_err() {
            return Err(entry
                .damaged(&self.source, "its extents do not add up to its size")
                .into());
        }
        let path = || display(&entry.path);
        let mut written = self.written(entry)?;
        let is_continued = written > 0;
        let (parent, name) = self.tree.place(entry, &self.source)?;
        let file = if is_continued {
            go_on(parent, &name)
        } else {
            create(parent, &name)
        };
        let mut file = file.map_err(Error::local("make", path()))?;
        let mut sum = Sha256::new();
        for extent in &entry.extents {
            let (Extent::Data { length, .. } | Extent::Hole { length }) = *extent;
            let done = written.min(length);
            written -= done;
            match *extent {
                Extent::Hole { length } => {
                    let step = i64::try_from(length).unwrap_or(i64::MAX);
                    file.seek(SeekFrom::Current(step))
                        .map_err(Error::local("write", path()))?;
                }
                Extent::Data { layer, .. } if layer != 0 => {
                    return Err(entry
                        .damaged(&self.source, "it is in a layer that is not named")
                        .into());
                }
                Extent::Data { offset, length, .. } => {
                    add(&mut file, done, &mut sum).map_err(Error::local("read", path()))?;
                    // Beyond what is there already, so that the reader goes on to the frames that were asked for.
                    raw.read(offset.saturating_add(done), length - done, |bytes| {
                        sum.update(bytes);
                        progress::add(bytes.len() as u64);
                        Ok(file
                            .write_all(bytes)
                            .map_err(Error::local("write", path()))?)
                    })?;
                }
            }
        }
        // A hole at the end is only a length.
        if matches!(entry.extents.last(), Some(Extent::Hole { .. })) {
            file.set_len(entry.size)
                .map_err(Error::local("write", path()))?;
        }
        let got = sum.finalize().into();
        if entry.sha256 != Some(got) && is_continued {
            // Not what the store gave to the earlier run. The next one begins anew.
            make_way(parent, &name).map_err(Error::local("remove", path()))?;
            let changed = std::io::Error::from(std::io::ErrorKind::InvalidData);
            return Err(Error::local("go on with", path())(changed).into());
        }
        if entry.sha256 != Some(got) {
            let want = entry.sha256.map_or("none".to_owned(), |sum| hex(&sum));
            let reason = format!("expected sha256 {want}, got {}", hex(&got));
            return Err(entry.damaged(&self.source, &reason).into());
        }
        self.files += 1;
        self.bytes += entry.data();
        let _ = self.status.set(&file, entry)?;
        Ok(())
    }

    /// Last pass: makes links, and gives directories their status when everything below them is done.
    pub fn complete(&mut self, entry: Entry) -> Result<(), Error> {
        self.leave_until(&entry.path)?;
        match entry.kind {
            Kind::Dir => self.open.push(entry),
            Kind::Symlink => self.symlink(&entry)?,
            Kind::Hardlink => self.hard_link(&entry)?,
            Kind::File | Kind::Deleted => {}
        }
        Ok(())
    }

    /// Ends the tree: what is left open gets its status, and everything reaches the disk. Gives what the new tree lacks.
    pub fn finish(mut self) -> Result<(u64, u64, Unread), Error> {
        while let Some(directory) = self.open.pop() {
            self.close(&directory)?;
        }
        nix::unistd::syncfs(self.tree.root()).map_err(Error::local("sync", "the restored tree"))?;
        Ok((self.files, self.bytes, self.status.lost))
    }

    /// Gives directories that do not contain `path` their status.
    fn leave_until(&mut self, path: &[u8]) -> Result<(), Error> {
        while let Some(inner) = self.open.pop_if(|inner| !is_above(&inner.path, path)) {
            self.close(&inner)?;
        }
        Ok(())
    }

    fn close(&mut self, directory: &Entry) -> Result<(), Error> {
        let fd = if directory.path.is_empty() {
            self.tree.root_again()?
        } else {
            let (parent, name) = self.tree.place(directory, &self.source)?;
            openat(parent, name.as_c_str(), DIRECTORY, Mode::empty())
                .map_err(Error::local("open", directory.display()))?
        };
        let _ = self.status.set(fd, directory)?;
        Ok(())
    }

    fn symlink(&mut self, entry: &Entry) -> Result<(), Error> {
        let path = || display(&entry.path);
        let Some(target) = &entry.link else {
            return Err(entry.damaged(&self.source, "the link has no target"));
        };
        let (parent, name) = self.tree.place(entry, &self.source)?;
        if self.is_resumed {
            make_way(parent, &name).map_err(Error::local("remove", path()))?;
        }
        symlinkat(&target[..], parent, name.as_c_str()).map_err(Error::local("make", path()))?;
        self.status.set_link(parent, &name, entry)
    }

    fn hard_link(&mut self, entry: &Entry) -> Result<(), Error> {
        let not_here = || entry.damaged(&self.source, "it is a link to no file of this snapshot");
        let target = entry.link.as_deref().ok_or_else(not_here)?;
        // By descriptors again: a symbolic link that an earlier entry made is not walked through.
        let mut from = Cursor::new(self.tree.root_again()?);
        let (directory, old) = from.parent(target).map_err(|_| not_here())?;
        let status = fstatat(directory, old.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|_| not_here())?;
        if status.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(not_here());
        }
        let (parent, name) = self.tree.place(entry, &self.source)?;
        if self.is_resumed {
            make_way(parent, &name).map_err(Error::local("remove", entry.display()))?;
        }
        let flags = AtFlags::empty();
        linkat(directory, old.as_c_str(), parent, name.as_c_str(), flags)
            .map_err(Error::local("make", display(&entry.path)))
    }
}

/// Removes what an earlier run made in the place of an entry, which is no directory.
fn make_way(parent: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::ENOENT) => Ok(()),
        removed => removed,
    }
}

/// Opens a file that an earlier run has begun to write.
fn go_on(parent: BorrowedFd<'_>, name: &CStr) -> Result<File, Errno> {
    let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty()).map(File::from)
}

/// Reads that many bytes from where the file is, and adds them to a sum.
fn add(file: &mut File, length: u64, sum: &mut Sha256) -> std::io::Result<()> {
    let mut buffer = vec![0; usize::try_from(length.min(1 << 16)).unwrap_or(1 << 16)];
    let mut left = length;
    while left > 0 {
        let step = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        file.read_exact(&mut buffer[..step])?;
        sum.update(&buffer[..step]);
        left -= step as u64;
    }
    Ok(())
}

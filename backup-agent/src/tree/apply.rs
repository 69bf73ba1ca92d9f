//! Makes a tree out of entries, in a fresh directory that nobody else writes to.
//!
//! Entries come from a store that may be hostile. Every name is one component opened below its parent's descriptor, links
//! are made and never followed. Three passes over the snapshot, each in the order of a walk: directories first, then files
//! layer by layer, at last links, and the status of directories from the inside out, because whatever is made in one
//! changes its time.

use std::{
    ffi::CString,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, fchmod, fstat, fstatat, futimens, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat},
};
use sha2::{Digest, Sha256};

use super::{
    cursor::{Cursor, is_above},
    read,
    scan::{self, DIRECTORY},
};
use crate::{
    archive::{
        entry::{Entry, Kind, display},
        extents::Extent,
        reader::RawStream,
        writer::Halt,
    },
    error::Error,
    log, progress,
    snapshot::id::hex,
};

/// Unpacks entries below one directory.
pub struct Applier {
    tree: Cursor,
    /// The tree that will be replaced: what is right in there need not come from the store.
    old: Option<Old>,
    /// Owners can be given to files.
    is_owner_kept: bool,
    /// User and group of the new tree, and of everything in it where owners are not kept.
    owner: (u32, u32),
    is_without_xattrs: bool,
    /// Directories around the last entry of the last pass, whose status is still to be set.
    open: Vec<Entry>,
    /// Key of what the entries come from, for errors.
    source: String,
    pub files: u64,
    pub bytes: u64,
}

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
}

impl Applier {
    /// An applier into `root`, an empty directory. `is_owner_kept`: the caller may give files away (it is root).
    pub fn new(
        root: OwnedFd,
        is_owner_kept: bool,
        old: Option<Old>,
        source: String,
    ) -> Result<Self, Error> {
        let status = fstat(&root).map_err(Error::local("look at", "."))?;
        Ok(Self {
            tree: Cursor::new(root),
            old,
            is_owner_kept,
            owner: (status.st_uid, status.st_gid),
            is_without_xattrs: false,
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
        let (parent, name) = self.place(entry)?;
        mkdirat(parent, name.as_c_str(), Mode::S_IRWXU)
            .map_err(Error::local("make", entry.display()))
    }

    /// First pass, after the directories around it: takes a file over from the old tree, if it is right there already.
    pub fn reuse(&mut self, entry: &Entry) -> Result<bool, Error> {
        let Some(old) = &mut self.old else {
            return Ok(false);
        };
        let Ok((old_parent, old_name)) = old.tree.parent(&entry.path) else {
            return Ok(false);
        };
        let Ok(Some(content)) = read::open(old_parent, &old_name) else {
            return Ok(false);
        };
        let mut found = scan::entry(&entry.path, Kind::File, content.status());
        if !self.is_owner_kept {
            // Whoever owns the new tree has to own what is in it.
            if (found.uid, found.gid) != self.owner {
                return Ok(false);
            }
            (found.uid, found.gid) = (entry.uid, entry.gid);
        }
        let is_alone = content.status().st_nlink == 1;
        if !is_alone || !scan::is_alike(&found, entry) {
            return Ok(false);
        }
        let is_quiet = old.is_quiet;
        if is_quiet && !read::is_equal(&content, entry) {
            return Ok(false);
        }
        let source = &self.source;
        let (parent, name) = self
            .tree
            .parent(&entry.path)
            .map_err(|refusal| refusal.into_error(source.clone(), entry))?;
        let path = || display(&entry.path);
        if is_quiet {
            let flags = AtFlags::empty();
            linkat(
                old_parent,
                old_name.as_c_str(),
                parent,
                name.as_c_str(),
                flags,
            )
            .map_err(Error::local("make", path()))?;
        } else {
            let parent = parent
                .try_clone_to_owned()
                .map_err(Error::local("open", path()))?;
            let mut file = create(parent.as_fd(), &name).map_err(Error::local("make", path()))?;
            copy(&content, &mut file, entry.size).map_err(Error::local("write", path()))?;
            self.set_status(&file, entry)?;
            // The copy is judged, not the original: somebody may have written to that meanwhile.
            let is_right = read::open(&parent, &name)
                .ok()
                .flatten()
                .is_some_and(|copied| read::is_equal(&copied, entry));
            if !is_right {
                unlinkat(&parent, name.as_c_str(), UnlinkatFlags::NoRemoveDir)
                    .map_err(Error::local("remove", path()))?;
                return Ok(false);
            }
        }
        self.files += 1;
        self.bytes += entry.data();
        Ok(true)
    }

    /// Second pass: writes a file.
    pub fn file(&mut self, entry: &Entry, raw: &mut RawStream) -> Result<(), Halt> {
        let covered = entry.extents.iter().try_fold(0_u64, |sum, extent| {
            let (Extent::Data { length, .. } | Extent::Hole { length }) = extent;
            sum.checked_add(*length)
        });
        if covered != Some(entry.size) || i64::try_from(entry.size).is_err() {
            return Err(self
                .refuse(entry, "its extents do not add up to its size")
                .into());
        }
        let path = || display(&entry.path);
        let (parent, name) = self.place(entry)?;
        let mut file = create(parent, &name).map_err(Error::local("make", path()))?;
        let mut sum = Sha256::new();
        for extent in &entry.extents {
            match *extent {
                Extent::Hole { length } => {
                    let step = i64::try_from(length).unwrap_or(i64::MAX);
                    file.seek(SeekFrom::Current(step))
                        .map_err(Error::local("write", path()))?;
                }
                Extent::Data { layer, .. } if layer != 0 => {
                    return Err(self
                        .refuse(entry, "it is in a layer that is not named")
                        .into());
                }
                Extent::Data { offset, length, .. } => {
                    raw.read(offset, length, |bytes| {
                        sum.update(bytes);
                        progress::add(bytes.len() as u64);
                        Ok(file
                            .write_all(bytes)
                            .map_err(Error::local("write", path()))?)
                    })?;
                    self.bytes += length;
                }
            }
        }
        // A hole at the end is only a length.
        if matches!(entry.extents.last(), Some(Extent::Hole { .. })) {
            file.set_len(entry.size)
                .map_err(Error::local("write", path()))?;
        }
        let got = hex(&sum.finalize());
        if entry.sha256.as_ref() != Some(&got) {
            let want = entry.sha256.as_deref().unwrap_or("none");
            let reason = format!("expected sha256 {want}, got {got}");
            return Err(self.refuse(entry, &reason).into());
        }
        self.files += 1;
        Ok(self.set_status(&file, entry)?)
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

    /// Ends the tree: what is left open gets its status, and everything reaches the disk.
    pub fn finish(mut self) -> Result<(u64, u64), Error> {
        while let Some(directory) = self.open.pop() {
            self.close(&directory)?;
        }
        nix::unistd::syncfs(self.tree.root()).map_err(Error::local("sync", "the restored tree"))?;
        Ok((self.files, self.bytes))
    }

    fn refuse(&self, entry: &Entry, reason: &str) -> Error {
        Error::Damaged {
            key: self.source.clone(),
            reason: format!("{}: {reason}", entry.display()),
        }
    }

    /// The directory that an entry is in, and its name there.
    fn place(&mut self, entry: &Entry) -> Result<(BorrowedFd<'_>, CString), Error> {
        let source = &self.source;
        self.tree
            .parent(&entry.path)
            .map_err(|refusal| refusal.into_error(source.clone(), entry))
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
            let (parent, name) = self.place(directory)?;
            openat(parent, name.as_c_str(), DIRECTORY, Mode::empty())
                .map_err(Error::local("open", directory.display()))?
        };
        self.set_status(fd, directory)
    }

    fn symlink(&mut self, entry: &Entry) -> Result<(), Error> {
        let path = || display(&entry.path);
        let Some(target) = &entry.link else {
            return Err(self.refuse(entry, "the link has no target"));
        };
        let is_owner_kept = self.is_owner_kept;
        let (parent, name) = self.place(entry)?;
        symlinkat(&target[..], parent, name.as_c_str()).map_err(Error::local("make", path()))?;
        if is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(parent, name.as_c_str(), Some(uid), Some(gid), flags)
                .map_err(Error::local("set the owner of", path()))?;
        }
        let time = time_spec(entry.mtime);
        let flags = UtimensatFlags::NoFollowSymlink;
        utimensat(parent, name.as_c_str(), &time, &time, flags)
            .map_err(Error::local("set the time of", path()))
    }

    fn hard_link(&mut self, entry: &Entry) -> Result<(), Error> {
        let not_here = || Error::Damaged {
            key: self.source.clone(),
            reason: format!(
                "{}: it is a link to no file of this snapshot",
                entry.display()
            ),
        };
        let target = entry.link.as_deref().ok_or_else(not_here)?;
        // By descriptors again: a symbolic link that an earlier entry made is not walked through.
        let mut from = Cursor::new(self.tree.root_again()?);
        let (directory, old) = from.parent(target).map_err(|_| not_here())?;
        let status = fstatat(directory, old.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|_| not_here())?;
        if status.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(not_here());
        }
        let (parent, name) = self.place(entry)?;
        let flags = AtFlags::empty();
        linkat(directory, old.as_c_str(), parent, name.as_c_str(), flags)
            .map_err(Error::local("make", display(&entry.path)))
    }

    /// Owner first (it clears set-id bits), then attributes, mode, time.
    fn set_status(&mut self, fd: impl AsFd, entry: &Entry) -> Result<(), Error> {
        let path = || display(&entry.path);
        if self.is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            fchown(&fd, Some(uid), Some(gid)).map_err(Error::local("set the owner of", path()))?;
        }
        for (name, value) in &entry.xattrs {
            if !name.starts_with("user.") {
                return Err(self.refuse(entry, "it has an attribute that is not user.*"));
            }
            let flags = rustix::fs::XattrFlags::empty();
            match rustix::fs::fsetxattr(&fd, name.as_str(), value, flags) {
                Ok(()) => {}
                Err(rustix::io::Errno::NOTSUP) if self.is_without_xattrs => {}
                Err(rustix::io::Errno::NOTSUP) => {
                    self.is_without_xattrs = true;
                    log::warn(
                        "this file system keeps no extended attributes; they are left out",
                        &[("path", path().into())],
                    );
                }
                Err(error) => return Err(Error::local("set an attribute of", path())(error)),
            }
        }
        let mut mode = Mode::from_bits_truncate(entry.mode);
        if !self.is_owner_kept && (entry.uid, entry.gid) != self.owner {
            // They lent the rights of somebody else.
            mode.remove(Mode::S_ISUID | Mode::S_ISGID);
        }
        fchmod(&fd, mode).map_err(Error::local("set the mode of", path()))?;
        let time = time_spec(entry.mtime);
        futimens(&fd, &time, &time).map_err(Error::local("set the time of", path()))
    }
}

fn create(parent: BorrowedFd<'_>, name: &CString) -> Result<File, Errno> {
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    openat(parent, name.as_c_str(), flags, private).map(File::from)
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

fn time_spec(nanos: i64) -> TimeSpec {
    TimeSpec::new(
        nanos.div_euclid(1_000_000_000),
        nanos.rem_euclid(1_000_000_000),
    )
}

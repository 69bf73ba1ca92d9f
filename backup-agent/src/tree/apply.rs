//! Makes a tree out of entries, in a fresh directory that nobody else writes to.
//!
//! Entries come from a store that may be hostile. Every name is one component opened below its parent's descriptor, links
//! are made and never followed, and the order of the walk is enforced, so that no entry can replace or reach through
//! another.

use std::{
    cmp::Ordering,
    ffi::CString,
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{AtFlags, OFlag, openat},
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, mkdirat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchown, fchownat, linkat, symlinkat},
};
use sha2::{Digest, Sha256};

use crate::{
    archive::{
        entry::{Entry, Extent, Kind, compare, display},
        reader::RawStream,
        writer::Halt,
    },
    error::Error,
    log,
    snapshot::id::hex,
    tree::scan::DIRECTORY,
};

/// Longest name of a component (`NAME_MAX`).
const LONGEST_NAME: usize = 255;

/// Unpacks entries below one directory.
pub struct Applier {
    /// The directories down to the last entry; the first is the root of the new tree.
    levels: Vec<Level>,
    last: Option<Vec<u8>>,
    /// Owners can be given to files.
    is_owner_kept: bool,
    is_without_xattrs: bool,
    /// Key of what the entries come from, for errors.
    source: String,
    pub files: u64,
    pub bytes: u64,
}

struct Level {
    fd: OwnedFd,
    /// Its status is set when everything below is done, or its mtime would not stay.
    entry: Entry,
}

impl Applier {
    /// An applier into `root`, an empty directory. `is_owner_kept`: the caller may give files away (it is root).
    pub fn new(root: OwnedFd, is_owner_kept: bool, source: String) -> Self {
        let placeholder = Entry {
            path: Vec::new(),
            kind: Kind::Dir,
            mode: 0o700,
            uid: Uid::effective().as_raw(),
            gid: Gid::effective().as_raw(),
            mtime: 0,
            size: 0,
            link: None,
            sha256: None,
            extents: Vec::new(),
            xattrs: std::collections::BTreeMap::new(),
            stamp: None,
        };
        Self {
            levels: vec![Level {
                fd: root,
                entry: placeholder,
            }],
            last: None,
            is_owner_kept,
            is_without_xattrs: false,
            source,
            files: 0,
            bytes: 0,
        }
    }

    /// Makes one entry.
    pub fn apply(&mut self, entry: Entry, raw: &mut RawStream) -> Result<(), Halt> {
        self.check_order(&entry)?;
        if entry.path.is_empty() {
            if entry.kind != Kind::Dir {
                return Err(self.refuse(&entry, "the root is not a directory").into());
            }
            self.levels[0].entry = entry;
            return Ok(());
        }
        let (parent, name) = match entry.path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&entry.path[..slash], &entry.path[slash + 1..]),
            None => (&b""[..], &entry.path[..]),
        };
        if name.is_empty() || name == b"." || name == b".." || name.len() > LONGEST_NAME {
            return Err(self.refuse(&entry, "the name cannot be a file's").into());
        }
        let Ok(name) = CString::new(name) else {
            return Err(self.refuse(&entry, "the name cannot be a file's").into());
        };
        self.leave_until(parent)?;
        if self
            .levels
            .last()
            .is_none_or(|level| level.entry.path != parent)
        {
            return Err(self
                .refuse(&entry, "it is in no directory of this snapshot")
                .into());
        }
        match entry.kind {
            Kind::Dir => self.enter(entry, &name)?,
            Kind::File => self.file(&entry, &name, raw)?,
            Kind::Symlink => self.symlink(&entry, &name)?,
            Kind::Hardlink => self.hard_link(&entry, &name)?,
        }
        Ok(())
    }

    /// Ends the tree: what is left open gets its status, and everything reaches the disk.
    pub fn finish(mut self) -> Result<(u64, u64), Error> {
        if self.last.is_none() {
            return Err(Error::Damaged {
                key: self.source,
                reason: "its index has no paths".to_owned(),
            });
        }
        let root = self.levels[0].fd.try_clone();
        while let Some(level) = self.levels.pop() {
            self.set_status(&level.fd, &level.entry)?;
        }
        let root = root.map_err(Error::local("open", "the restored tree"))?;
        nix::unistd::syncfs(root).map_err(Error::local("sync", "the restored tree"))?;
        Ok((self.files, self.bytes))
    }

    fn check_order(&mut self, entry: &Entry) -> Result<(), Error> {
        let is_next = match &self.last {
            None => entry.path.is_empty(),
            Some(last) => compare(last, &entry.path) == Ordering::Less,
        };
        if !is_next {
            return Err(self.refuse(entry, "the index is not in the order of a walk"));
        }
        self.last = Some(entry.path.clone());
        Ok(())
    }

    fn refuse(&self, entry: &Entry, reason: &str) -> Error {
        Error::Damaged {
            key: self.source.clone(),
            reason: format!("{}: {reason}", entry.display()),
        }
    }

    /// Closes directories until `parent` is the innermost one.
    fn leave_until(&mut self, parent: &[u8]) -> Result<(), Error> {
        let is_above = |outer: &[u8]| {
            outer.is_empty()
                || parent
                    .strip_prefix(outer)
                    .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        while self.levels.len() > 1
            && self
                .levels
                .last()
                .is_some_and(|level| !is_above(&level.entry.path))
        {
            if let Some(level) = self.levels.pop() {
                self.set_status(&level.fd, &level.entry)?;
            }
        }
        Ok(())
    }

    fn parent(&self) -> impl AsFd {
        self.levels
            .last()
            .expect("the root's level is only popped by finish")
            .fd
            .as_fd()
    }

    fn enter(&mut self, entry: Entry, name: &CString) -> Result<(), Error> {
        let path = || display(&entry.path);
        mkdirat(self.parent(), name.as_c_str(), Mode::S_IRWXU)
            .map_err(Error::local("make", path()))?;
        let fd = openat(self.parent(), name.as_c_str(), DIRECTORY, Mode::empty())
            .map_err(Error::local("open", path()))?;
        self.levels.push(Level { fd, entry });
        Ok(())
    }

    fn file(&mut self, entry: &Entry, name: &CString, raw: &mut RawStream) -> Result<(), Halt> {
        let covered = entry.extents.iter().try_fold(0_u64, |sum, extent| {
            let (Extent::Data { length, .. } | Extent::Hole { length }) = extent;
            sum.checked_add(*length)
        });
        if covered != Some(entry.size) {
            return Err(self
                .refuse(entry, "its extents do not add up to its size")
                .into());
        }
        let path = || display(&entry.path);
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        let fd = openat(self.parent(), name.as_c_str(), flags, private)
            .map_err(Error::local("make", path()))?;
        let mut file = File::from(fd);
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

    fn symlink(&mut self, entry: &Entry, name: &CString) -> Result<(), Error> {
        let path = || display(&entry.path);
        let Some(target) = &entry.link else {
            return Err(self.refuse(entry, "the link has no target"));
        };
        symlinkat(&target[..], self.parent(), name.as_c_str())
            .map_err(Error::local("make", path()))?;
        if self.is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(self.parent(), name.as_c_str(), Some(uid), Some(gid), flags)
                .map_err(Error::local("set the owner of", path()))?;
        }
        let time = time_spec(entry.mtime);
        utimensat(
            self.parent(),
            name.as_c_str(),
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
        .map_err(Error::local("set the time of", path()))
    }

    fn hard_link(&mut self, entry: &Entry, name: &CString) -> Result<(), Error> {
        let not_here = || self.refuse(entry, "it is a link to no file of this snapshot");
        let target = entry.link.as_deref().ok_or_else(not_here)?;
        // Down to the target one component at a time: a symbolic link that an earlier entry made is not walked through.
        let mut components = target.split(|byte| *byte == b'/').peekable();
        let mut directory = self.levels[0]
            .fd
            .try_clone()
            .map_err(Error::local("open", "."))?;
        while let Some(component) = components.next() {
            let component = CString::new(component).map_err(|_| not_here())?;
            if matches!(component.to_bytes(), b"" | b"." | b"..") {
                return Err(not_here());
            }
            if components.peek().is_some() {
                let flags =
                    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                directory = openat(&directory, component.as_c_str(), flags, Mode::empty())
                    .map_err(|_| not_here())?;
                continue;
            }
            let status = fstatat(
                &directory,
                component.as_c_str(),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            )
            .map_err(|_| not_here())?;
            if status.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
                return Err(not_here());
            }
            linkat(
                &directory,
                component.as_c_str(),
                self.parent(),
                name.as_c_str(),
                AtFlags::empty(),
            )
            .map_err(Error::local("make", display(&entry.path)))?;
        }
        Ok(())
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
        let mode = Mode::from_bits_truncate(entry.mode);
        fchmod(&fd, mode).map_err(Error::local("set the mode of", path()))?;
        let time = time_spec(entry.mtime);
        futimens(&fd, &time, &time).map_err(Error::local("set the time of", path()))
    }
}

fn time_spec(nanos: i64) -> TimeSpec {
    TimeSpec::new(
        nanos.div_euclid(1_000_000_000),
        nanos.rem_euclid(1_000_000_000),
    )
}

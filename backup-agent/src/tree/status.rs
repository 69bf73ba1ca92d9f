//! The status of what is made in a tree: owner, attributes, mode, time. Where owners cannot be given, everything belongs to
//! its maker, and the set-id bits of other owners' files are dropped: they would lend the wrong rights.

use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    fcntl::AtFlags,
    sys::{
        stat::{Mode, UtimensatFlags, fchmod, futimens, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchown, fchownat},
};

use super::scan;
use crate::{
    archive::entry::{Entry, display},
    error::Error,
    log,
};

/// How entries get their status in one tree.
pub struct Status {
    /// Owners can be given to files.
    is_owner_kept: bool,
    /// User and group of the new tree, and of everything in it where owners are not kept.
    owner: (u32, u32),
    is_without_xattrs: bool,
}

impl Status {
    pub fn new(is_owner_kept: bool, owner: (u32, u32)) -> Self {
        Self {
            is_owner_kept,
            owner,
            is_without_xattrs: false,
        }
    }

    /// Whether something with the status of `found` may be in the tree as this entry.
    pub fn fits(&self, mut found: Entry, entry: &Entry) -> bool {
        if !self.is_owner_kept {
            // Whoever owns the new tree has to own what is in it.
            if (found.uid, found.gid) != self.owner {
                return false;
            }
            (found.uid, found.gid) = (entry.uid, entry.gid);
        }
        scan::is_alike(&found, entry)
    }

    /// Owner first (it clears set-id bits), then attributes, mode, time.
    pub fn set(&mut self, fd: impl AsFd, entry: &Entry, source: &str) -> Result<(), Error> {
        let path = || display(&entry.path);
        if self.is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            fchown(&fd, Some(uid), Some(gid)).map_err(Error::local("set the owner of", path()))?;
        }
        for (name, value) in &entry.xattrs {
            if !name.starts_with("user.") {
                return Err(entry.damaged(source, "it has an attribute that is not user.*"));
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

    /// A symbolic link has an owner and a time, and nothing else.
    pub fn set_link(
        &self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry: &Entry,
    ) -> Result<(), Error> {
        let path = || display(&entry.path);
        if self.is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(parent, name, Some(uid), Some(gid), flags)
                .map_err(Error::local("set the owner of", path()))?;
        }
        let time = time_spec(entry.mtime);
        let flags = UtimensatFlags::NoFollowSymlink;
        utimensat(parent, name, &time, &time, flags)
            .map_err(Error::local("set the time of", path()))
    }
}

/// A time in nanoseconds since the epoch, as the kernel takes it.
pub fn time_spec(nanos: i64) -> TimeSpec {
    TimeSpec::new(
        nanos.div_euclid(1_000_000_000),
        nanos.rem_euclid(1_000_000_000),
    )
}

//! The status of what is made in a tree: owner, attributes, mode, time. Where owners cannot be given, everything belongs to
//! its maker, and the set-id bits of other owners' files are dropped: they would lend the wrong rights.
//!
//! What the file system cannot keep of it, or the caller may not give, is named and counted, and no reason to fail.

use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::{
        stat::{FileStat, Mode, UtimensatFlags, fchmod, fstat, fstatat, futimens, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchown, fchownat},
};
use rustix::fs::{XattrFlags, fremovexattr, fsetxattr};

use super::{
    miss::{Miss, Unread},
    read, scan,
};
use crate::{
    archive::{
        entry::{CAPABILITIES, Entry, SYSTEM, display},
        line::USER,
    },
    error::Error,
    log,
};

/// Losses that are named in the log. On a file system without attributes there may be one for each file.
const MOST_NAMED: u64 = 16;
/// Set-user-id and set-group-id.
const SET_IDS: Mode = Mode::S_ISUID.union(Mode::S_ISGID);
/// These and the sticky bit.
const SPECIAL: Mode = SET_IDS.union(Mode::S_ISVTX);

/// How entries get their status in one tree.
pub struct Status {
    /// Owners can be given to files.
    is_owner_kept: bool,
    /// User and group of the new tree, and of everything in it where owners are not kept.
    owner: (u32, u32),
    /// What came back without a part of its status.
    pub lost: Unread,
}

/// What one entry has to do without, with the reasons.
#[derive(Default)]
struct Losses(Vec<String>);

impl Losses {
    /// Whether it was done. What a file system is too small or too simple for is a loss, and every other error is one.
    fn note(
        &mut self,
        what: &str,
        done: Result<(), impl Into<Errno>>,
        entry: &Entry,
    ) -> Result<bool, Error> {
        let errno: Errno = match done {
            Ok(()) => return Ok(true),
            Err(error) => error.into(),
        };
        match errno {
            Errno::ENOSPC
            | Errno::EDQUOT
            | Errno::ERANGE
            | Errno::E2BIG
            | Errno::EOPNOTSUPP
            | Errno::ENOSYS
            | Errno::EPERM
            | Errno::EACCES
            | Errno::EINVAL
            | Errno::EOVERFLOW
            | Errno::ENAMETOOLONG => {
                self.0.push(format!("{what}: {}", errno.desc()));
                Ok(false)
            }
            other => Err(Error::local("set the status of", display(&entry.path))(
                other,
            )),
        }
    }

    /// The kernel moves a time that the file system cannot keep to the nearest that it can, without a word.
    fn note_time(
        &mut self,
        is_set: bool,
        time: &TimeSpec,
        look: impl FnOnce() -> Result<FileStat, Errno>,
        entry: &Entry,
    ) -> Result<(), Error> {
        if is_set && i32::try_from(time.tv_sec()).is_err() {
            let found = look().map_err(Error::local("look at", display(&entry.path)))?;
            if found.st_mtime != time.tv_sec() {
                let loss = "its time: the file system cannot keep it";
                self.0.push(loss.to_owned());
            }
        }
        Ok(())
    }
}

impl Status {
    pub fn new(is_owner_kept: bool, owner: (u32, u32)) -> Self {
        Self {
            is_owner_kept,
            owner,
            lost: Unread::default(),
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

    /// Owner first: that clears set-id bits and capabilities. The mode is that without an ACL, so that nobody has a right too
    /// many before the ACL is there, or where it cannot be. Gives whether nothing was lost.
    pub fn set(&mut self, fd: impl AsFd, entry: &Entry, source: &str) -> Result<bool, Error> {
        let fd = fd.as_fd();
        let mut losses = Losses::default();
        let mut is_owned = (entry.uid, entry.gid) == self.owner;
        if self.is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            is_owned = losses.note("its owner", fchown(fd, Some(uid), Some(gid)), entry)?;
        }
        let flags = XattrFlags::empty();
        for (name, value) in &entry.xattrs {
            if name.starts_with(USER) {
                losses.note(
                    name,
                    fsetxattr(fd, name.as_str(), value, flags).map_err(errno),
                    entry,
                )?;
            } else if !SYSTEM.contains(&name.as_str()) {
                return Err(entry.damaged(source, "it has an attribute that is not user.*"));
            }
        }
        Self::set_mode(fd, entry, is_owned, &mut losses)?;
        for (name, value) in &entry.xattrs {
            if name == CAPABILITIES && !(self.is_owner_kept && is_owned) {
                // They would be lent by somebody else.
                losses
                    .0
                    .push(format!("{name}: it belongs to another user now"));
            } else if !name.starts_with(USER) {
                losses.note(
                    name,
                    fsetxattr(fd, name.as_str(), value, flags).map_err(errno),
                    entry,
                )?;
            }
        }
        let time = time_spec(entry.mtime);
        let is_set = losses.note("its time", futimens(fd, &time, &time), entry)?;
        losses.note_time(is_set, &time, || fstat(fd), entry)?;
        Ok(self.lose(entry, &losses))
    }

    fn set_mode(
        fd: BorrowedFd<'_>,
        entry: &Entry,
        is_owned: bool,
        losses: &mut Losses,
    ) -> Result<(), Error> {
        let all = Mode::from_bits_truncate(entry.plain_mode());
        let mut mode = all;
        if !is_owned {
            // They lent the rights of somebody else.
            mode.remove(SET_IDS);
        }
        let is_set = losses.note("its mode", fchmod(fd, mode), entry)?;
        if !is_set {
            // Some file systems know no more than who may read, write and execute.
            let done = fchmod(fd, mode.difference(SPECIAL));
            losses.note("its mode", done, entry)?;
        } else if all.intersects(SPECIAL) {
            // The kernel drops some of them without a word.
            let found = fstat(fd).map_err(Error::local("look at", display(&entry.path)))?;
            if !Mode::from_bits_truncate(found.st_mode).contains(all & SPECIAL) {
                losses.0.push("a set-id or sticky bit".to_owned());
            }
        }
        Ok(())
    }

    /// A symbolic link has an owner and a time, and nothing else.
    pub fn set_link(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        entry: &Entry,
    ) -> Result<(), Error> {
        let mut losses = Losses::default();
        if self.is_owner_kept {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            let done = fchownat(parent, name, Some(uid), Some(gid), flags);
            losses.note("its owner", done, entry)?;
        }
        let time = time_spec(entry.mtime);
        let flags = UtimensatFlags::NoFollowSymlink;
        let done = utimensat(parent, name, &time, &time, flags);
        let is_set = losses.note("its time", done, entry)?;
        let look = || fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        losses.note_time(is_set, &time, look, entry)?;
        let _ = self.lose(entry, &losses);
        Ok(())
    }

    /// Takes note of what an entry lost; whether that is nothing.
    fn lose(&mut self, entry: &Entry, losses: &Losses) -> bool {
        if losses.0.is_empty() {
            return true;
        }
        self.lost.add(entry.display());
        if self.lost.count <= MOST_NAMED {
            log::warn(
                "restored without a part of its status",
                &[
                    ("path", entry.display().into()),
                    ("lost", losses.0.join("; ").into()),
                ],
            );
        }
        false
    }
}

/// Removes what a new directory has got from the one that it was made in: everything that is made in there would get it, too.
pub fn forget_acls(directory: impl AsFd) -> Result<(), Errno> {
    use rustix::io::Errno as Error;

    for name in SYSTEM.iter().filter(|name| **name != CAPABILITIES) {
        match fremovexattr(&directory, *name) {
            Ok(()) | Err(Error::NODATA | Error::NOTSUP | Error::NOSYS) => {}
            Err(error) => return Err(errno(error)),
        }
    }
    Ok(())
}

/// Gives a directory, whose mode is right, the attributes of another one, on the same file system: what that could keep, this can.
pub fn hand_over_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    let attributes = |of| match read::xattrs(of) {
        Ok(attributes) => Ok(attributes.all),
        Err(Miss::Unread(errno)) => Err(errno),
        Err(Miss::Gone | Miss::LeftOut(_)) => Err(Errno::EIO),
    };
    let new = attributes(from)?;
    for (name, _) in attributes(to)?
        .iter()
        .filter(|(name, _)| !new.contains_key(*name))
    {
        fremovexattr(to, name.as_str()).map_err(errno)?;
    }
    for (name, value) in &new {
        fsetxattr(to, name.as_str(), value, XattrFlags::empty()).map_err(errno)?;
    }
    Ok(())
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// A time in nanoseconds since the epoch, as the kernel takes it.
pub fn time_spec(nanos: i64) -> TimeSpec {
    TimeSpec::new(
        nanos.div_euclid(1_000_000_000),
        nanos.rem_euclid(1_000_000_000),
    )
}

//! Which directory the root of a tree is: a wiped or detached one has the same name as the one that was there before.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, Mode, OFlags, StatxFlags, fstatfs, open, statx},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The type of overlayfs in statfs(2).
const OVERLAYFS: i64 = 0x794c_7630;

/// What tells a directory from another one that was made later under the same name. Inode numbers are used again at once,
/// so the time of birth counts too, where the file system knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootId {
    device: u64,
    inode: u64,
    born: i64,
}

impl RootId {
    /// Of an open directory.
    pub fn of(directory: impl AsFd) -> Result<Self, Error> {
        Self::read(directory.as_fd()).map_err(Error::local("look at", "the root"))
    }

    /// Of the directory at a path; `None` if there is none, or a link.
    pub fn at(root: &Path) -> Result<Option<Self>, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = open(root, flags, Mode::empty());
        match opened.and_then(|directory| Self::read(directory.as_fd())) {
            Ok(id) => Ok(Some(id)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(Error::local("look at", root)(error)),
        }
    }

    fn read(directory: BorrowedFd<'_>) -> Result<Self, Errno> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let status = statx(directory, c"", AtFlags::EMPTY_PATH, wanted)?;
        let born = status.stx_btime;
        // There the first write to a directory of a lower layer makes a copy of it, which is born later.
        let is_overlay = fstatfs(directory)?.f_type == OVERLAYFS;
        Ok(Self {
            device: rustix::fs::makedev(status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            born: if is_overlay {
                0
            } else {
                born.tv_sec.saturating_mul(1_000_000_000) + i64::from(born.tv_nsec)
            },
        })
    }
}

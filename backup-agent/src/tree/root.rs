//! Which directory the root of a tree is: a wiped or detached one has the same name as the one that was there before.

use std::{os::fd::AsFd, path::Path};

use rustix::{
    fs::{AtFlags, CWD, Statx, StatxFlags, fchown, fstatfs, statx},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::scan::open_root;
use crate::error::Error;

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
        let status = statx(directory, c"", AtFlags::EMPTY_PATH, WANTED);
        Ok(Self::new(
            &status.map_err(Error::local("look at", "the root"))?,
        ))
    }

    /// Of whatever is at a path; `None` if nothing is there.
    pub fn at(root: &Path) -> Result<Option<Self>, Error> {
        match statx(CWD, root, AtFlags::SYMLINK_NOFOLLOW, WANTED) {
            Ok(status) => Ok(Some(Self::new(&status))),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(Error::local("look at", root)(error)),
        }
    }

    fn new(status: &Statx) -> Self {
        let born = status.stx_btime;
        let born = born.tv_sec.saturating_mul(1_000_000_000) + i64::from(born.tv_nsec);
        // What has no device of its own (overlayfs, btrfs) gets another number with each mount, as when a container starts again.
        let is_numbered_anew = status.stx_dev_major == 0 && born != 0;
        Self {
            device: if is_numbered_anew {
                0
            } else {
                rustix::fs::makedev(status.stx_dev_major, status.stx_dev_minor)
            },
            inode: status.stx_ino,
            born,
        }
    }
}

/// Makes the first change to a root, so that it stays the same directory from now on.
///
/// One of a lower layer of overlayfs, as in the image of a container, is born again when it is first written to.
pub fn settle(root: &Path) {
    const OVERLAYFS: u64 = 0x794c_7630;

    let Ok(root) = open_root(root) else { return };
    let is_overlay =
        fstatfs(&root).is_ok_and(|status| u64::try_from(status.f_type) == Ok(OVERLAYFS));
    if is_overlay {
        // Where that is not allowed, nobody else writes to it.
        let _ = fchown(&root, None, None);
    }
}

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

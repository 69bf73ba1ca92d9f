//! Which directory the root of a tree is: a wiped or detached one has the same name as the one that was there before.

use std::{os::fd::AsFd, path::Path};

use rustix::{
    fs::{AtFlags, CWD, Statx, StatxFlags, statx},
    io::Errno,
};
use serde::{Deserialize, Serialize};

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
        Self {
            device: rustix::fs::makedev(status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            born: born.tv_sec.saturating_mul(1_000_000_000) + i64::from(born.tv_nsec),
        }
    }
}

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

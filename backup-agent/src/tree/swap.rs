//! Puts a restored tree in the place of the old one.
//!
//! The new tree grows in a directory beside the root and is exchanged with it in one step (renameat2(2),
//! `RENAME_EXCHANGE`). Where the root is a mount point there is no beside, and some file systems cannot exchange: there the
//! entries are replaced one by one, and a kill in the middle is mended by the next restore.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::open,
    sys::stat::{FileStat, Mode, UtimensatFlags, fstat, utimensat},
    unistd::fchown,
};
use rustix::fs::{CWD, RenameFlags, StatxAttributes, StatxFlags, renameat_with, statx};

use super::{identity::Identity, read::xattrs, scan::DIRECTORY};
use crate::error::Error;

/// Name of the working directory where it has to be inside of the root; `exclude` leaves it out.
const INSIDE: &str = ".restoring";

/// The directory in which the new tree is made.
pub struct Staging {
    path: PathBuf,
    fd: OwnedFd,
}

impl Staging {
    /// Makes an empty directory for a tree that will replace `root`, owned by `identity`. What an earlier restore left
    /// behind is removed.
    pub fn new(root: &Path, identity: Option<Identity>) -> Result<Self, Error> {
        let parent = root.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(Error::local("make", parent))?;
        let path = place(root, parent);
        remove(&path).map_err(Error::local("remove", &path))?;
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(Error::local("make", &path))?;
        let fd = open(&path, DIRECTORY, Mode::empty()).map_err(Error::local("open", &path))?;
        if let Some(identity) = identity {
            // Inside of the root its owner could have swapped the directory for another between the two calls above.
            let status = fstat(&fd).map_err(Error::local("look at", &path))?;
            if status.st_uid != 0 {
                return Err(Error::local("trust", &path)(Errno::EPERM));
            }
            fchown(&fd, Some(identity.uid), Some(identity.gid))
                .map_err(Error::local("set the owner of", &path))?;
        }
        Ok(Self { path, fd })
    }

    /// Where the directory is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of the directory.
    pub fn fd(&self) -> Result<OwnedFd, Error> {
        self.fd
            .try_clone()
            .map_err(Error::local("open", &self.path))
    }

    /// Puts the finished tree in the place of `root` and removes the old one.
    pub fn put_in_place(self, root: &Path) -> Result<(), Error> {
        let swap = |flags| renameat_with(CWD, &self.path, CWD, root, flags);
        match swap(RenameFlags::EXCHANGE) {
            Ok(()) => {
                remove(&self.path).map_err(Error::local("remove the old tree in", &self.path))
            }
            Err(rustix::io::Errno::NOENT) => {
                swap(RenameFlags::NOREPLACE).map_err(Error::local("make", root))
            }
            // Another file system, a mount point, a lower layer of an overlay, a file system that cannot.
            Err(
                rustix::io::Errno::XDEV
                | rustix::io::Errno::BUSY
                | rustix::io::Errno::INVAL
                | rustix::io::Errno::NOSYS,
            ) => self.replace_entries(root),
            Err(error) => Err(Error::local("replace", root)(error)),
        }
    }

    fn replace_entries(self, root: &Path) -> Result<(), Error> {
        let names = |path: &Path| -> io::Result<Vec<_>> {
            fs::read_dir(path)?
                .map(|entry| Ok(entry?.file_name()))
                .collect()
        };
        // Before anything is moved out: that changes the time.
        let status = fstat(&self.fd).map_err(Error::local("look at", &self.path))?;
        for name in names(root).map_err(Error::local("list", root))? {
            let old = root.join(name);
            if old != self.path {
                remove(&old).map_err(Error::local("remove", old))?;
            }
        }
        for name in names(&self.path).map_err(Error::local("list", &self.path))? {
            let place = root.join(&name);
            renameat_with(&self.fd, &name, CWD, &place, RenameFlags::NOREPLACE)
                .map_err(Error::local("make", place))?;
        }
        self.hand_over_status(&status, root)
            .map_err(Error::local("set the status of", root))
    }

    /// Gives the root the status that the working directory had, and removes that.
    fn hand_over_status(&self, status: &FileStat, root: &Path) -> io::Result<()> {
        let fd = open(root, DIRECTORY, Mode::empty())?;
        fchown(&fd, Some(status.st_uid.into()), Some(status.st_gid.into()))?;
        for (name, value) in xattrs(self.fd.as_fd())? {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::fsetxattr(&fd, name.as_str(), &value, flags)?;
        }
        nix::sys::stat::fchmod(&fd, Mode::from_bits_truncate(status.st_mode))?;
        let time = nix::sys::time::TimeSpec::new(status.st_mtime, status.st_mtime_nsec);
        // Before the time is set: inside of the root, this changes it.
        remove(&self.path)?;
        Ok(utimensat(
            &fd,
            ".",
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )?)
    }
}

impl Drop for Staging {
    /// Nothing stays behind, however the restore ends: out of time or interrupted, its future is dropped where it was.
    fn drop(&mut self) {
        // The thread that unpacks may make another entry or two before it notices.
        const TRIES: u32 = 10;
        let _ = (0..TRIES).any(|_| remove(&self.path).is_ok());
    }
}

/// Where the new tree of this root grows.
fn place(root: &Path, parent: &Path) -> PathBuf {
    if is_mount_point(root, parent) {
        return root.join(INSIDE);
    }
    let mut name = std::ffi::OsString::from(".");
    name.push(root.file_name().unwrap_or_default());
    name.push(INSIDE);
    parent.join(name)
}

/// Removes what a restore that was killed left beside the root: the new tree in part, or the old one. Whether there was any.
pub fn sweep(root: &Path) -> io::Result<bool> {
    let path = place(root, root.parent().unwrap_or(Path::new("/")));
    let is_there = fs::symlink_metadata(&path).is_ok();
    remove(&path).map(|()| is_there)
}

fn is_mount_point(root: &Path, parent: &Path) -> bool {
    let (Ok(here), Ok(above)) = (fs::symlink_metadata(root), fs::symlink_metadata(parent)) else {
        return false;
    };
    // A bind mount has the device of what it was bound from, but says so itself (Linux 5.8).
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    let is_mounted = statx(CWD, root, flags, StatxFlags::BASIC_STATS)
        .is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    here.dev() != above.dev() || is_mounted
}

/// Removes whatever is at a path, following nothing; what is not there is removed already.
pub fn remove(path: &Path) -> io::Result<()> {
    let status = match fs::symlink_metadata(path) {
        Ok(status) => status,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !status.is_dir() {
        return fs::remove_file(path);
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // A directory that its owner made read-only, as module caches are.
            make_writable(path)?;
            fs::remove_dir_all(path)
        }
        other => other,
    }
}

fn make_writable(directory: &Path) -> io::Result<()> {
    fs::set_permissions(directory, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_writable(&entry.path())?;
        }
    }
    Ok(())
}

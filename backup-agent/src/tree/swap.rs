//! Puts a restored tree in the place of the old one.
//!
//! The new tree grows in a directory beside the root and is exchanged with it in one step (renameat2(2),
//! `RENAME_EXCHANGE`). Where the root is a mount point there is no beside, and some file systems cannot exchange: there the
//! entries are moved one by one, back again if one of them cannot be, and a kill in the middle is mended by the next
//! restore.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{DirBuilderExt, MetadataExt},
        },
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

use super::{identity::Identity, remove::remove, scan::DIRECTORY, status::hand_over_attributes};
use crate::{error::Error, log};

/// Name of the working directory where it has to be inside of the root; `exclude` leaves it out.
const INSIDE: &str = ".restoring";

/// The directory in which the new tree is made, in a working directory that is root's.
pub struct Staging {
    /// The working directory: it has the new tree, and the old one on its way out.
    work: PathBuf,
    path: PathBuf,
    fd: OwnedFd,
}

impl Staging {
    /// Makes an empty directory for a tree that will replace `root`, owned by `identity`. What an earlier restore left
    /// behind is removed.
    pub fn new(root: &Path, identity: Option<Identity>) -> Result<Self, Error> {
        let parent = root.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(Error::local("make", parent))?;
        if let Some(mount) = mount_below(root)? {
            // Whatever is mounted there would be emptied with the old tree.
            return Err(Error::local("replace", mount)(Errno::EBUSY));
        }
        let work = place(root, parent);
        remove(&work)?;
        let make = |path: &Path, mode| {
            let made = DirBuilder::new().mode(mode).create(path);
            made.map_err(Error::local("make", path))
        };
        // Root's, and no more than a way for the owner of what is in it.
        make(&work, 0o711)?;
        let path = work.join("new");
        make(&path, 0o700)?;
        let fd = open(&path, DIRECTORY, Mode::empty()).map_err(Error::local("open", &path))?;
        if let Some(identity) = identity {
            // Inside of the root its owner could have swapped the directory for another between the calls above.
            let status = fstat(&fd).map_err(Error::local("look at", &path))?;
            if status.st_uid != 0 {
                return Err(Error::local("trust", &path)(Errno::EPERM));
            }
            fchown(&fd, Some(identity.uid), Some(identity.gid))
                .map_err(Error::local("set the owner of", &path))?;
        }
        Ok(Self { work, path, fd })
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
        use rustix::io::Errno;

        match renameat_with(CWD, &self.path, CWD, root, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(Errno::NOENT) => {
                fs::rename(&self.path, root).map_err(Error::local("make", root))?;
            }
            // Another file system, a mount point, a lower layer of an overlay, a file system that cannot.
            Err(Errno::XDEV | Errno::BUSY | Errno::INVAL | Errno::NOSYS) => {
                self.replace_entries(root)?;
            }
            Err(error) => return Err(Error::local("replace", root)(error)),
        }
        if let Err(error) = remove(&self.work) {
            // The tree is there. The next restore says it again, and then it is an error.
            log::warn(
                "the old tree is still there in part",
                &[("error", crate::error::Chain(&error).to_string().into())],
            );
        }
        Ok(())
    }

    fn replace_entries(&self, root: &Path) -> Result<(), Error> {
        // Before anything is moved out: that changes the time.
        let status = fstat(&self.fd).map_err(Error::local("look at", &self.path))?;
        let old = self.work.join("old");
        fs::create_dir(&old).map_err(Error::local("make", &old))?;
        let mut moved = Vec::new();
        if let Err(error) = self.exchange_entries(root, &old, &mut moved) {
            for (from, to) in moved.into_iter().rev() {
                fs::rename(&to, &from).map_err(Error::local("move back", &to))?;
            }
            return Err(error);
        }
        self.hand_over_status(&status, root)
            .map_err(Error::local("set the status of", root))
    }

    /// Notes every move in `moved`.
    fn exchange_entries(
        &self,
        root: &Path,
        old: &Path,
        moved: &mut Vec<(PathBuf, PathBuf)>,
    ) -> Result<(), Error> {
        let names = |path: &Path| -> io::Result<Vec<_>> {
            fs::read_dir(path)?
                .map(|entry| Ok(entry?.file_name()))
                .collect()
        };
        let mut stuck = Vec::new();
        for name in names(root).map_err(Error::local("list", root))? {
            let (from, to) = (root.join(&name), old.join(&name));
            if from == self.work {
                continue;
            }
            match fs::rename(&from, &to) {
                Ok(()) => moved.push((from, to)),
                // In a lower layer of an overlay, a directory stays where it is until it goes.
                Err(error) if error.kind() == io::ErrorKind::CrossesDevices => stuck.push(from),
                Err(error) => return Err(Error::local("move", from)(error)),
            }
        }
        for path in stuck {
            remove(&path)?;
        }
        for name in names(&self.path).map_err(Error::local("list", &self.path))? {
            let (from, to) = (self.path.join(&name), root.join(&name));
            fs::rename(&from, &to).map_err(Error::local("make", &to))?;
            moved.push((from, to));
        }
        Ok(())
    }

    /// Gives the root the status that the new tree had, and removes the working directory.
    fn hand_over_status(&self, status: &FileStat, root: &Path) -> io::Result<()> {
        let fd = open(root, DIRECTORY, Mode::empty())?;
        fchown(&fd, Some(status.st_uid.into()), Some(status.st_gid.into()))?;
        nix::sys::stat::fchmod(&fd, Mode::from_bits_truncate(status.st_mode))?;
        hand_over_attributes(self.fd.as_fd(), fd.as_fd())?;
        let time = nix::sys::time::TimeSpec::new(status.st_mtime, status.st_mtime_nsec);
        // Before the time is set: inside of the root, this changes it. What is left is told about later.
        let _ = remove(&self.work);
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
        let _ = (0..TRIES).any(|_| remove(&self.work).is_ok());
    }
}

/// Where the working directory of this root is.
fn place(root: &Path, parent: &Path) -> PathBuf {
    if is_mount_point(root, parent) {
        return root.join(INSIDE);
    }
    let mut name = OsString::from(".");
    name.push(root.file_name().unwrap_or_default());
    name.push(INSIDE);
    parent.join(name)
}

/// Removes what a restore that was killed left beside the root: the new tree in part, or the old one. Whether there was any.
pub fn sweep(root: &Path) -> Result<bool, Error> {
    let work = place(root, root.parent().unwrap_or(Path::new("/")));
    let is_there = fs::symlink_metadata(&work).is_ok();
    remove(&work).map(|()| is_there)
}

/// A mount point below a directory, if there is one.
fn mount_below(root: &Path) -> Result<Option<PathBuf>, Error> {
    const MOUNTS: &str = "/proc/self/mountinfo";
    let root = match fs::canonicalize(root) {
        Ok(root) => root,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::local("find", root)(error)),
    };
    let mounts = fs::read(MOUNTS).map_err(Error::local("read", MOUNTS))?;
    let point = |line: &[u8]| unescaped(line.split(|byte| *byte == b' ').nth(4)?);
    let points = mounts.split(|byte| *byte == b'\n').filter_map(point);
    let mut points = points.map(|point| PathBuf::from(OsString::from_vec(point)));
    Ok(points.find(|point| *point != root && point.starts_with(&root)))
}

/// A path of /proc/self/mountinfo, in which white space and backslashes are octal numbers.
fn unescaped(text: &[u8]) -> Option<Vec<u8>> {
    let mut parts = text.split(|byte| *byte == b'\\');
    let mut path = parts.next()?.to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(3)?;
        path.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()?);
        path.extend_from_slice(rest);
    }
    Some(path)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescaped(b"/a\\040b\\134"), Some(b"/a b\\".to_vec()));
        assert_eq!(unescaped(b"/plain"), Some(b"/plain".to_vec()));
        assert_eq!(unescaped(b"/cut\\04"), None);
    }
}

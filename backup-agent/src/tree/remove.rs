//! Removes a tree that somebody else made: however deep, however many names, with a few descriptors; no link is followed and
//! no mount entered.
//!
//! Recursion ends at a fixed depth. What is deeper is moved to the top of the tree and removed from there.

use std::{
    ffi::{CStr, CString},
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, openat, renameat},
    sys::stat::{Mode, fchmod, fstat},
    unistd::{UnlinkatFlags, unlinkat},
};
use rustix::fs::{AtFlags, CWD, chmodat};

use super::scan::DIRECTORY;
use crate::error::Error;

/// Directories that are open at once.
const DEEPEST: usize = 64;
/// Looks at one directory until it has to be empty: one for each level of a deep tree. Somebody who goes on making files
/// would hold this up for ever.
const MOST_LOOKS: usize = 1 << 20;

/// Removes whatever is at a path; what is not there is removed already.
pub fn remove(path: &Path) -> Result<(), Error> {
    // Asked first: where nothing can be written, the kernel does not say that there is nothing to remove.
    if matches!(path.symlink_metadata(), Err(error) if error.kind() == ErrorKind::NotFound) {
        return Ok(());
    }
    let name = CString::new(path.as_os_str().as_bytes());
    let name = name.map_err(Error::local("remove", path))?;
    remove_at(AT_FDCWD, &name, path)
}

/// Removes whatever has that name in a directory; `path` is what errors call it. Others may remove it at the same time.
pub fn remove_at(directory: BorrowedFd<'_>, name: &CStr, path: &Path) -> Result<(), Error> {
    let failed = || Error::local("remove", path);
    if is_gone(directory, name).map_err(failed())? {
        return Ok(());
    }
    let top = match enter(directory, name) {
        Ok(top) => top,
        Err(Errno::ENOENT) => return Ok(()),
        Err(error) => return Err(failed()(error)),
    };
    let mut removal = Removal {
        top: top.as_fd(),
        path: path.to_owned(),
        moved: 0,
    };
    removal.empty(&top, 0)?;
    match unlinkat(directory, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(failed()(error)),
    }
}

/// One tree on its way out.
struct Removal<'a> {
    top: BorrowedFd<'a>,
    /// Of the directory that is being emptied, for errors.
    path: PathBuf,
    /// Directories that were moved to the top.
    moved: u64,
}

impl Removal<'_> {
    fn empty(&mut self, directory: &OwnedFd, depth: usize) -> Result<(), Error> {
        for _ in 0..MOST_LOOKS {
            let mut is_empty = true;
            let mut names = openat(directory, ".", DIRECTORY, Mode::empty())
                .and_then(Dir::from_fd)
                .map_err(Error::local("list", &self.path))?;
            for entry in names.iter() {
                let entry = entry.map_err(Error::local("list", &self.path))?;
                if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                    is_empty = false;
                    self.remove(directory, entry.file_name(), depth)?;
                }
            }
            if is_empty {
                return Ok(());
            }
        }
        Err(Error::local("remove", &self.path)(Errno::ENOTEMPTY))
    }

    fn remove(&mut self, directory: &OwnedFd, name: &CStr, depth: usize) -> Result<(), Error> {
        self.path.push(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let place = self.path.clone();
        let failed = |error: Errno| Error::local("remove", &place)(error);
        if !is_gone(directory.as_fd(), name).map_err(failed)? {
            let inner = match enter(directory.as_fd(), name) {
                Ok(inner) => inner,
                Err(Errno::ENOENT) => {
                    self.path.pop();
                    return Ok(());
                }
                Err(error) => return Err(failed(error)),
            };
            if depth < DEEPEST {
                self.empty(&inner, depth + 1)?;
                match unlinkat(directory, name, UnlinkatFlags::RemoveDir) {
                    // The next look finds what was put there meanwhile.
                    Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY) => {}
                    Err(error) => return Err(failed(error)),
                }
            } else {
                self.lift(directory, name).map_err(failed)?;
            }
        }
        self.path.pop();
        Ok(())
    }

    /// Moves a directory to the top, under a name that is free there.
    fn lift(&mut self, directory: &OwnedFd, name: &CStr) -> Result<(), Errno> {
        loop {
            let free = self.moved.to_string();
            self.moved += 1;
            match renameat(directory, name, self.top, free.as_str()) {
                Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                other => return other,
            }
        }
    }
}

/// Removes what can be removed by its name alone: anything but a directory that has something in it.
fn is_gone(directory: BorrowedFd<'_>, name: &CStr) -> Result<bool, Errno> {
    let refused = match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(true),
        // Which of the two it is that says "a directory" depends on the file system.
        Err(error @ (Errno::EISDIR | Errno::EPERM)) => error,
        Err(error) => return Err(error),
    };
    match unlinkat(directory, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
        Err(Errno::ENOTDIR) => Err(refused),
        // A mount point, among others.
        Err(error) => Err(error),
    }
}

/// Opens a directory such that what is in it can be removed: its owner may have made it read-only, as module caches are.
fn enter(directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let fd = match openat(directory, name, DIRECTORY, Mode::empty()) {
        Err(Errno::EACCES) => {
            let place = openat(directory, name, DIRECTORY | OFlag::O_PATH, Mode::empty())?;
            change_mode(&place, Mode::S_IRWXU.bits())?;
            openat(directory, name, DIRECTORY, Mode::empty())?
        }
        other => other?,
    };
    if fstat(&fd)?.st_mode & Mode::S_IRWXU.bits() != Mode::S_IRWXU.bits() {
        // Where it is not ours, the removal says what is wrong.
        let _ = fchmod(&fd, Mode::S_IRWXU);
    }
    Ok(fd)
}

/// Changes the mode of what is open without any right on it (`O_PATH`): fchmod(2) takes no such descriptor.
pub fn change_mode(place: &OwnedFd, mode: u32) -> Result<(), Errno> {
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    let mode = rustix::fs::Mode::from_raw_mode(mode);
    let changed = chmodat(CWD, path, mode, AtFlags::empty());
    changed.map_err(|error| Errno::from_raw(error.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::{fs, io, os::unix::fs::PermissionsExt};

    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_goes_and_what_its_links_lead_to_stays() -> io::Result<()> {
        let folder =
            std::env::temp_dir().join(format!("backup-agent-remove-{}", std::process::id()));
        let top = folder.join("top");
        fs::create_dir_all(&top)?;
        fs::write(folder.join("kept"), "kept")?;
        let mut fd = nix::fcntl::open(&top, DIRECTORY, Mode::empty())?;
        let levels = 3 * 4096;
        for level in 0..levels {
            mkdirat(&fd, "d", Mode::S_IRWXU)?;
            if level % 1000 == 0 {
                // Names that the removal makes itself.
                mkdirat(&fd, "0", Mode::S_IRWXU)?;
                mkdirat(&fd, "1", Mode::empty())?;
                nix::unistd::symlinkat(&folder.join("kept"), &fd, "link")?;
            }
            fd = openat(&fd, "d", DIRECTORY, Mode::empty())?;
        }
        fs::create_dir_all(top.join("shut/inner"))?;
        fs::set_permissions(top.join("shut"), fs::Permissions::from_mode(0o500))?;
        remove(&top).map_err(|error| io::Error::other(error.to_string()))?;
        assert!(!top.exists());
        assert_eq!(fs::read(folder.join("kept"))?, b"kept");
        fs::remove_dir_all(folder)
    }
}

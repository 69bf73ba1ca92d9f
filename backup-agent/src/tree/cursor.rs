//! Finds the places of paths below a root, by descriptors only: each component is opened in the one before and no link is
//! followed, so no path leads out of the tree, whatever was planted there.

use std::{
    ffi::{CStr, CString},
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

use super::{miss::Miss, scan::DIRECTORY};
use crate::{
    archive::entry::{Entry, LONGEST_NAME},
    error::Error,
};

/// Opens directories below a root one component at a time, and keeps those open that the next path needs too.
pub struct Cursor {
    root: OwnedFd,
    path: Vec<u8>,
    /// Each with the length of its own path.
    levels: Vec<(usize, OwnedFd)>,
}

/// Why a path cannot be reached.
pub enum Refusal {
    /// A component that no file can have.
    Name,
    /// What should be its directory is none.
    Orphan,
    Failed(Errno),
}

impl From<Refusal> for Miss {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Name | Refusal::Orphan => Self::Gone,
            Refusal::Failed(errno) => errno.into(),
        }
    }
}

impl Refusal {
    /// As the error of whoever wanted to make `entry`, which came from `source`.
    fn into_error(self, source: &str, entry: &Entry) -> Error {
        let reason = match self {
            Self::Name => "the name cannot be a file's",
            Self::Orphan => "it is in no directory of this snapshot",
            Self::Failed(errno) => return Error::local("open", entry.display())(errno),
        };
        entry.damaged(source, reason)
    }
}

impl Cursor {
    pub fn new(root: OwnedFd) -> Self {
        Self {
            root,
            path: Vec::new(),
            levels: Vec::new(),
        }
    }

    /// The root itself.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Another descriptor of the root.
    pub fn root_again(&self) -> Result<OwnedFd, Error> {
        self.root.try_clone().map_err(Error::local("open", "."))
    }

    /// Where to make an entry, which came from `source`: the directory that it is in, and its name there.
    pub fn place(
        &mut self,
        entry: &Entry,
        source: &str,
    ) -> Result<(BorrowedFd<'_>, CString), Error> {
        self.parent(&entry.path)
            .map_err(|refusal| refusal.into_error(source, entry))
    }

    /// The directory that `path` is in, and the name there.
    pub fn parent(&mut self, path: &[u8]) -> Result<(BorrowedFd<'_>, CString), Refusal> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], path),
        };
        while let Some((length, _)) = self.levels.last()
            && !is_above(&self.path[..*length], parent)
        {
            self.levels.pop();
        }
        let mut at = self.levels.last().map_or(0, |(length, _)| *length);
        self.path.truncate(at);
        while at < parent.len() {
            let start = if at == 0 { 0 } else { at + 1 };
            let end = parent[start..]
                .iter()
                .position(|byte| *byte == b'/')
                .map_or(parent.len(), |slash| start + slash);
            let component = checked(&parent[start..end])?;
            let outer = self.levels.last().map_or(&self.root, |(_, fd)| fd);
            let fd =
                openat(outer, component.as_c_str(), DIRECTORY, Mode::empty()).map_err(|errno| {
                    match errno {
                        Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => Refusal::Orphan,
                        other => Refusal::Failed(other),
                    }
                })?;
            self.levels.push((end, fd));
            self.path.truncate(at);
            self.path.extend_from_slice(&parent[at..end]);
            at = end;
        }
        let fd = self.levels.last().map_or(&self.root, |(_, fd)| fd);
        Ok((fd.as_fd(), checked(name)?))
    }
}

/// Makes a file at a place, for its owner alone; there must be none.
pub fn create(parent: BorrowedFd<'_>, name: &CStr) -> Result<File, Errno> {
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    openat(parent, name, flags, private).map(File::from)
}

/// A component, if it can be a file's name.
fn checked(name: &[u8]) -> Result<CString, Refusal> {
    if matches!(name, b"" | b"." | b"..") || name.len() > LONGEST_NAME {
        return Err(Refusal::Name);
    }
    CString::new(name).map_err(|_| Refusal::Name)
}

/// Whether `path` is `directory` or below it.
pub fn is_above(directory: &[u8], path: &[u8]) -> bool {
    directory.is_empty()
        || path
            .strip_prefix(directory)
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

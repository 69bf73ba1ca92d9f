//! Puts a new tree in the place of an old one. The old one survives every failure: it is removed only after the new one is
//! whole and in its place.
//!
//! The two directories are exchanged in one step (renameat2(2), `RENAME_EXCHANGE`). Where the root is a mount point or the
//! file system cannot exchange, the entries are moved one by one: all old ones out, then the new ones in; or, when one of them
//! cannot be moved, all of them back. A run that is killed meanwhile is finished by the next one ([`settle`]).

use std::{
    collections::HashSet,
    ffi::{CStr, CString, OsString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::stat::{FileStat, Mode, UtimensatFlags, fchmod, fstat, utimensat},
    unistd::fchown,
};
use rustix::fs::{
    AtFlags, CWD, OFlags, RenameFlags, mkdirat, openat, renameat, renameat_with, unlinkat,
};
use serde::{Deserialize, Serialize};

use super::{
    remove::change_mode,
    root::RootId,
    staging::{INSIDE, Journal, NEW, Work, is_there, names, open_directory, rename_free},
    status::{hand_over_attributes, time_spec},
};
use crate::{
    archive::entry::display,
    error::{Chain, Error},
    log,
};

/// The entries of the old tree while they are moved out, and the new ones in.
const OLD: &CStr = c"old";
/// The same while they are moved back.
const BACK: &CStr = c"back";
/// What others put in the way meanwhile.
const LATE: &CStr = c"late";
/// Where that ends up in the root, when the old tree stays.
const ASIDE: &str = ".restoring-aside";

/// Looks at the root for entries to move out. Somebody who goes on making some would hold this up for ever.
const MOST_LOOKS: u32 = 16;
/// Tries to put an entry where somebody puts another one again and again.
const MOST_TRIES: u32 = 10_000;
/// Entries that are named.
const MOST_NAMED: usize = 16;

/// What a swap by moves has to know after a kill.
///
/// An entry of the root is one of the new tree when its name is among `names` and nothing has that name in the new tree's
/// directory any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moves {
    /// The names in the root of the new tree.
    names: Vec<Vec<u8>>,
    /// Of the new root: moving entries changes its time, and may take a right more than it has.
    new: Status,
    /// Of the old root.
    old: Status,
}

/// The status of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Status {
    uid: u32,
    gid: u32,
    mode: u32,
    mtime: i64,
}

impl Status {
    fn of(status: &FileStat) -> Self {
        Self {
            uid: status.st_uid,
            gid: status.st_gid,
            mode: status.st_mode & 0o7777,
            mtime: status
                .st_mtime
                .saturating_mul(1_000_000_000)
                .saturating_add(status.st_mtime_nsec),
        }
    }

    fn set(self, directory: impl AsFd) -> Result<(), Errno> {
        fchown(&directory, Some(self.uid.into()), Some(self.gid.into()))?;
        fchmod(&directory, Mode::from_bits_truncate(self.mode))?;
        let time = time_spec(self.mtime);
        utimensat(
            &directory,
            ".",
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )
    }
}

/// What a look at the working directory found, and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// No swap was under way.
    Nothing,
    /// The root is the old tree; a new one may be there in part.
    Untouched,
    /// The root is the new tree.
    Replaced,
}

/// Puts the new tree in the place of the root. `true`: its entries were moved one by one.
pub fn replace(work: &Work, root: &Path) -> Result<bool, Error> {
    use rustix::io::Errno;

    let exchange = || renameat_with(&work.fd, NEW, CWD, root, RenameFlags::EXCHANGE);
    let exchanged = match exchange() {
        Err(Errno::ACCESS) => {
            let new = WayIn::open(work.fd.as_fd(), NEW);
            let old = WayIn::open(CWD, root);
            let exchanged = exchange();
            drop((new, old));
            exchanged
        }
        exchanged => exchanged,
    };
    match exchanged {
        Ok(()) => Ok(false),
        Err(Errno::NOENT) => fill(work, root).map(|()| false),
        // Another file system, a mount point, a lower layer of an overlay, a file system that cannot.
        Err(Errno::XDEV | Errno::BUSY | Errno::INVAL | Errno::NOSYS) => {
            replace_entries(work, root).map(|()| true)
        }
        Err(error) => Err(Error::local("replace", root)(error)),
    }
}

/// Puts the new tree at a path where there is nothing, or an empty directory.
pub fn fill(work: &Work, target: &Path) -> Result<(), Error> {
    use rustix::io::Errno;

    match renameat(&work.fd, NEW, CWD, target) {
        Ok(()) => Ok(()),
        // A mount point, or a lower layer of an overlay.
        Err(Errno::XDEV | Errno::BUSY) => {
            let swap = Swap::open(work, target, begin(work, target)?)?;
            let found = names(&swap.root).map_err(swap.failed("list"))?;
            if found.iter().all(|name| swap.is_own(name)) {
                swap.replace()
            } else {
                swap.go_back()?;
                Err(Error::local("fill", target)(Errno::NOTEMPTY))
            }
        }
        Err(error) => Err(Error::local("make", target)(error)),
    }
}

fn replace_entries(work: &Work, root: &Path) -> Result<(), Error> {
    let swap = Swap::open(work, root, begin(work, root)?)?;
    let Err(error) = swap.replace() else {
        return Ok(());
    };
    match swap.go_back() {
        Ok(()) => Err(error),
        Err(second) => {
            tell_error("the old tree cannot be put back yet", &second);
            Err(Error::RootHalf {
                root: root.to_owned(),
                source: Box::new(error),
            })
        }
    }
}

/// Writes down what a run after a kill has to know.
fn begin(work: &Work, root: &Path) -> Result<Moves, Error> {
    let new = open_directory(&work.fd, NEW).map_err(work.failed("open a folder in"))?;
    let root_fd = open_directory(CWD, root).map_err(Error::local("open", root))?;
    let status = |fd: &OwnedFd| fstat(fd).map_err(Error::local("look at", root));
    let moves = Moves {
        names: (names(&new)
            .map_err(work.failed("list a folder in"))?
            .into_iter())
        .map(CString::into_bytes)
        .collect(),
        new: Status::of(&status(&new)?),
        old: Status::of(&status(&root_fd)?),
    };
    let journal = work
        .journal()?
        .ok_or(Error::Internal("journal of the restore"))?;
    // Before the journal says that moves have begun: without the first of these folders it means that they have ended, and with
    // the second one that they go back.
    work.folder(OLD)?;
    match unlinkat(&work.fd, BACK, AtFlags::REMOVEDIR) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(work.failed("remove a folder in")(error)),
    }
    work.write(
        &Journal {
            moves: Some(moves.clone()),
            ..journal
        },
        true,
    )?;
    Ok(moves)
}

/// Finishes or undoes what an earlier run has begun, and discards what is left of it.
pub fn settle(work: &Work, root: &Path) -> Result<Settled, Error> {
    let Some(journal) = work.journal()? else {
        for name in [OLD, BACK] {
            if is_there(&work.fd, name).map_err(work.failed("look at"))? {
                // It had reached the disk before that folder was filled: it was lost or altered since.
                let error = "its journal is lost, and its folders `old` and `back` may hold entries of the root; move those back, \
                             then remove it";
                return Err(Error::local("trust", &work.path)(io::Error::other(error)));
            }
        }
        return Ok(Settled::Nothing);
    };
    if let Some(moves) = journal.moves {
        // Whatever keeps it from its end leaves entries of both trees in the root.
        let replaced = end(work, root, moves).map_err(|error| Error::RootHalf {
            root: root.to_owned(),
            source: Box::new(error),
        });
        if !replaced? {
            return Ok(Settled::Untouched);
        }
    } else if RootId::at(root)? != Some(journal.tree) {
        return Ok(Settled::Untouched);
    }
    work.discard(NEW)?;
    work.discard(LATE)?;
    work.end()?;
    Ok(Settled::Replaced)
}

/// Goes on with moving entries; whether the root is the new tree then.
fn end(work: &Work, root: &Path, moves: Moves) -> Result<bool, Error> {
    let is_back = is_there(&work.fd, BACK).map_err(work.failed("look at"))?;
    let is_out = is_there(&work.fd, OLD).map_err(work.failed("look at"))?;
    if !is_back && !is_out {
        return Ok(true);
    }
    let swap = Swap::open(work, root, moves)?;
    log::info(
        "finishing a swap of the root that was cut short",
        &[("root", root.display().to_string().into())],
    );
    if !is_back {
        match swap.replace() {
            Ok(()) => return Ok(true),
            Err(error) => tell_error(
                "the swap cannot be finished: putting the old tree back",
                &error,
            ),
        }
    }
    swap.go_back()?;
    Ok(false)
}

fn tell_error(message: &'static str, error: &Error) {
    log::warn(message, &[("error", Chain(error).to_string().into())]);
}

/// Entries on their way.
struct Swap<'a> {
    work: &'a Work,
    path: &'a Path,
    root: OwnedFd,
    new: OwnedFd,
    moves: Moves,
    /// The names of the new tree.
    names: HashSet<Vec<u8>>,
}

impl<'a> Swap<'a> {
    fn open(work: &'a Work, path: &'a Path, moves: Moves) -> Result<Self, Error> {
        let root = open_directory(CWD, path).map_err(Error::local("open", path))?;
        let new = open_directory(&work.fd, NEW).map_err(work.failed("open a folder in"))?;
        let names = moves.names.iter().cloned().collect();
        // An owner that is not root needs the right to write to move entries; at the end each gets the mode that it has to have.
        for (directory, status) in [(&root, moves.old), (&new, moves.new)] {
            let _ = fchmod(directory, Mode::from_bits_truncate(status.mode | 0o200));
        }
        Ok(Self {
            work,
            path,
            root,
            new,
            moves,
            names,
        })
    }

    fn failed(&self, op: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        Error::local(op, self.path)
    }

    /// An error about an entry of the root.
    fn failed_at(&self, op: &'static str, name: &CStr) -> impl FnOnce(rustix::io::Errno) -> Error {
        let name = OsString::from_vec(name.to_bytes().to_vec());
        Error::local(op, self.path.join(name))
    }

    /// All old entries out, then all new ones in.
    fn replace(&self) -> Result<(), Error> {
        let old = self.work.folder(OLD)?;
        let mut late = Vec::new();
        for _ in 0..MOST_LOOKS {
            let mut is_done = true;
            for name in names(&self.root).map_err(self.failed("list"))? {
                if self.is_own(&name) || self.is_new(&name)? {
                    continue;
                }
                is_done = false;
                let moved = carry(self.root.as_fd(), &name, old.as_fd());
                if !moved.map_err(self.failed_at("move", &name))? {
                    self.set_aside(&name, &mut late)?;
                }
            }
            if is_done {
                break;
            }
        }
        for name in names(&self.new).map_err(self.work.failed("list a folder in"))? {
            if !self.is_own(&name) {
                self.put(self.new.as_fd(), &name, &mut late)?;
            }
        }
        self.moves
            .new
            .set(&self.root)
            .and_then(|()| hand_over_attributes(self.new.as_fd(), self.root.as_fd()))
            .map_err(Error::local("set the status of", self.path))?;
        // From here on the new tree is the root.
        self.work.discard(OLD)?;
        self.tell(
            &late,
            "removed what was written while the tree was replaced",
        );
        Ok(())
    }

    /// All new entries out, then all old ones back. What others have made in their places meanwhile is kept, too.
    fn go_back(&self) -> Result<(), Error> {
        if is_there(&self.work.fd, OLD).map_err(self.work.failed("look at"))? {
            let turned = renameat(&self.work.fd, OLD, &self.work.fd, BACK);
            turned.map_err(self.work.failed("rename a folder in"))?;
        }
        for name in names(&self.root).map_err(self.failed("list"))? {
            if self.is_new(&name)? {
                let moved = carry(self.root.as_fd(), &name, self.new.as_fd());
                moved.map_err(self.failed_at("move", &name))?;
            }
        }
        let back = open_directory(&self.work.fd, BACK);
        let back = back.map_err(self.work.failed("open a folder in"))?;
        let mut late = Vec::new();
        for name in names(&back).map_err(self.work.failed("list a folder in"))? {
            self.put(back.as_fd(), &name, &mut late)?;
        }
        let late = self.keep_late()?;
        if let Err(errno) = self.moves.old.set(&self.root) {
            // All of the tree is there, and a root that nobody may change has not changed.
            let error = Error::local("set the status of", self.path)(errno);
            tell_error("the root has another time or owner now", &error);
        }
        self.tell(
            &late,
            "set aside what was written while the tree was replaced",
        );
        let journal = self
            .work
            .journal()?
            .ok_or(Error::Internal("journal of the restore"))?;
        self.work.write(
            &Journal {
                moves: None,
                ..journal
            },
            true,
        )?;
        let removed = unlinkat(&self.work.fd, BACK, AtFlags::REMOVEDIR);
        removed.map_err(self.work.failed("remove a folder in"))
    }

    /// The working directory itself, which is in the root of a mount point.
    fn is_own(&self, name: &CStr) -> bool {
        self.work.path.parent() == Some(self.path) && name.to_bytes() == INSIDE.as_bytes()
    }

    /// Whether an entry of the root is one of the new tree.
    fn is_new(&self, name: &CStr) -> Result<bool, Error> {
        if !self.names.contains(name.to_bytes()) {
            return Ok(false);
        }
        let is_still_there = is_there(&self.new, name);
        Ok(!is_still_there.map_err(self.work.failed("look into"))?)
    }

    /// Moves an entry into the root. Whatever is in its way there is set aside first.
    fn put(&self, from: BorrowedFd<'_>, name: &CStr, late: &mut Vec<String>) -> Result<(), Error> {
        for _ in 0..MOST_TRIES {
            let is_moved = carry(from, name, self.root.as_fd());
            if is_moved.map_err(self.failed_at("make", name))? {
                return Ok(());
            }
            self.set_aside(name, late)?;
        }
        Err(self.failed_at("make", name)(rustix::io::Errno::EXIST))
    }

    /// Moves an entry of the root out of the way.
    fn set_aside(&self, name: &CStr, late: &mut Vec<String>) -> Result<(), Error> {
        let folder = self.work.folder(LATE)?;
        let mut number = late.len();
        let place = loop {
            let free = CString::new(number.to_string()).unwrap_or_default();
            match mkdirat(&folder, &*free, rustix::fs::Mode::RWXU) {
                Ok(()) => break open_directory(&folder, &free),
                Err(rustix::io::Errno::EXIST) => number += 1,
                Err(error) => break Err(error),
            }
        };
        let place = place.map_err(self.work.failed("make a folder in"))?;
        match carry(self.root.as_fd(), name, place.as_fd()) {
            // It is gone again.
            Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed_at("move", name)(error)),
            Ok(_) => {
                late.push(display(name.to_bytes()));
                Ok(())
            }
        }
    }

    /// Gives back to the root what was set aside, under a name of its own. What that is.
    fn keep_late(&self) -> Result<Vec<String>, Error> {
        let late = match open_directory(&self.work.fd, LATE) {
            Ok(late) => late,
            Err(rustix::io::Errno::NOENT) => return Ok(Vec::new()),
            Err(error) => return Err(self.work.failed("open a folder in")(error)),
        };
        let (uid, gid) = (self.moves.old.uid.into(), self.moves.old.gid.into());
        let mut kept = Vec::new();
        // For the owner of the tree to look at, and for its next snapshot.
        let list = |folder: &OwnedFd| -> Result<_, rustix::io::Errno> {
            fchown(folder, Some(uid), Some(gid))
                .map_err(|errno| rustix::io::Errno::from_raw_os_error(errno as i32))?;
            names(folder)
        };
        for number in list(&late).map_err(self.work.failed("give away a folder in"))? {
            let folder = open_directory(&late, &number).and_then(|folder| list(&folder));
            let inner = folder.map_err(self.work.failed("give away a folder in"))?;
            kept.extend(inner.iter().map(|name| display(name.to_bytes())));
        }
        let mut number = 0_u64;
        loop {
            let suffix = (number > 0).then(|| format!("-{number}"));
            let name = format!("{ASIDE}{}", suffix.unwrap_or_default());
            let free = CString::new(name).unwrap_or_default();
            let is_moved = rename_free(self.work.fd.as_fd(), LATE, self.root.as_fd(), &free);
            if is_moved.map_err(self.failed_at("make", &free))? {
                return Ok(kept);
            }
            number += 1;
        }
    }

    fn tell(&self, late: &[String], message: &'static str) {
        if late.is_empty() {
            return;
        }
        let named: Vec<&str> = late.iter().take(MOST_NAMED).map(String::as_str).collect();
        let fields = [
            ("root", self.path.display().to_string().into()),
            ("entries", named.into()),
            ("count", late.len().into()),
        ];
        log::warn(message, &fields);
    }
}

/// A directory that its owner may write to, until this is dropped: it cannot be moved to another directory otherwise, as `..` in it
/// changes (rename(2)). Root may always.
struct WayIn {
    directory: OwnedFd,
    mode: u32,
}

impl WayIn {
    /// `None` where it is no such directory: the next try says what is wrong.
    fn open(parent: BorrowedFd<'_>, path: impl rustix::path::Arg) -> Option<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(parent, path, flags, rustix::fs::Mode::empty()).ok()?;
        let mode = fstat(&directory).ok()?.st_mode & 0o7777;
        change_mode(&directory, mode | 0o200).ok()?;
        Some(Self { directory, mode })
    }
}

impl Drop for WayIn {
    fn drop(&mut self) {
        // It was allowed a moment ago.
        let _ = change_mode(&self.directory, self.mode);
    }
}

/// Moves an entry to a directory where nothing has its name; `false`: something has.
///
/// A directory that has parts in a lower layer of an overlay cannot be renamed: it is made anew, and what is in it is moved.
fn carry(from: BorrowedFd<'_>, name: &CStr, to: BorrowedFd<'_>) -> Result<bool, rustix::io::Errno> {
    use rustix::io::Errno;

    match rename_free(from, name, to, name) {
        Err(Errno::XDEV) => {}
        Err(Errno::ACCESS) => {
            let _way = WayIn::open(from, name);
            return rename_free(from, name, to, name);
        }
        moved => return moved,
    }
    let inner = match open_directory(from, name) {
        Ok(inner) => inner,
        Err(Errno::NOTDIR | Errno::LOOP) => return Err(Errno::XDEV),
        Err(error) => return Err(error),
    };
    match mkdirat(to, name, rustix::fs::Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(false),
        Err(error) => return Err(error),
    }
    let made = open_directory(to, name)?;
    let errno = |error: nix::Error| Errno::from_raw_os_error(error as i32);
    let status = Status::of(&fstat(&inner).map_err(errno)?);
    // Somebody may go on making entries.
    for _ in 0..MOST_LOOKS {
        for entry in names(&inner)? {
            if !carry(inner.as_fd(), &entry, made.as_fd())? {
                return Err(Errno::EXIST);
            }
        }
        match unlinkat(from, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                let handed = status
                    .set(&made)
                    .and_then(|()| hand_over_attributes(inner.as_fd(), made.as_fd()));
                return handed.map(|()| true).map_err(errno);
            }
        }
    }
    Err(Errno::NOTEMPTY)
}

/// A mount point below a directory, if there is one.
pub fn mount_below(root: &Path) -> Result<Option<PathBuf>, Error> {
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

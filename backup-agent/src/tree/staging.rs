//! The working directory of a restore: the new tree grows in it, and what an earlier run left there is used or removed.
//!
//! It belongs to the caller (root) and lies beside the tree that will be replaced, or inside of it where that is a mount
//! point. A journal in it says which snapshot the new tree is of and how far the swap has come, so that any later run can go on.

use std::{
    ffi::{CStr, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::{errno::Errno, sys::stat::Mode, unistd::fchown};
use rustix::fs::{
    AtFlags, CWD, Dir, FlockOperation, OFlags, RenameFlags, StatxAttributes, StatxFlags, Timespec,
    Timestamps, flock, fstat, mkdirat, openat, renameat, renameat_with, statat, statx, unlinkat,
    utimensat,
};
use serde::{Deserialize, Serialize};

use super::{
    identity::{Identity, with_identity},
    remove::{remove, remove_at},
    root::RootId,
    scan::DIRECTORY,
    swap::{self, Settled},
};
use crate::{error::Error, interrupt::Finality, log, snapshot::sealed};

/// Name of the working directory where it has to be inside of the root; `exclude` leaves it out.
pub const INSIDE: &str = ".restoring";

/// The new tree.
pub const NEW: &CStr = c"new";
/// What is to be removed.
const GONE: &CStr = c"gone";
const JOURNAL: &CStr = c"restore.json";
const JOURNAL_UNDER_WAY: &CStr = c"restore.json.new";
/// Far more than the names of a root that anyone has: what is longer is not ours.
const LONGEST_JOURNAL: u64 = 256 << 20;

/// What the directory holds, for the run after this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Journal {
    /// What the new tree is made of; only a restore of the same goes on with it.
    pub source: Option<String>,
    /// The directory of the new tree. Once the root is this directory, the two have been exchanged.
    pub tree: RootId,
    /// Entries are being moved one by one.
    pub moves: Option<swap::Moves>,
}

/// The working directory.
pub struct Work {
    pub path: PathBuf,
    pub fd: OwnedFd,
}

/// Opens a directory and no link to one.
pub fn open_directory(
    parent: impl AsFd,
    path: impl rustix::path::Arg,
) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = OFlags::from_bits_retain(DIRECTORY.bits().cast_unsigned());
    openat(parent, path, flags, rustix::fs::Mode::empty())
}

/// Whether there is anything of that name.
pub fn is_there(parent: impl AsFd, name: &CStr) -> Result<bool, rustix::io::Errno> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The names in a directory.
pub fn names(directory: impl AsFd) -> Result<Vec<std::ffi::CString>, rustix::io::Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

impl Work {
    /// The working directory at that path; `None` where there is nothing, or something that is not the caller's own.
    fn existing(path: &Path) -> Result<Option<Self>, Error> {
        let failed = || Error::local("open", path);
        let fd = match open_directory(CWD, path) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
                return Ok(None);
            }
            Err(error) => return Err(failed()(error)),
        };
        let status = fstat(&fd).map_err(failed())?;
        let is_ours = status.st_uid == nix::unistd::geteuid().as_raw();
        let path = path.to_owned();
        Ok(is_ours.then_some(Self { path, fd }))
    }

    /// Keeps other restores of the same root away, as long as this is open; `false`: one is under way.
    fn lock(&self) -> Result<bool, Error> {
        match flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            // Or a file system without locks. The lock of the state folder is there, too.
            Ok(())
            | Err(
                rustix::io::Errno::NOLCK
                | rustix::io::Errno::NOTSUP
                | rustix::io::Errno::INVAL
                | rustix::io::Errno::NOSYS
                | rustix::io::Errno::BADF,
            ) => Ok(true),
            Err(error) => Err(Error::local("lock", &self.path)(error)),
        }
    }

    /// Makes the directory, or takes the one that is there, for this run alone.
    fn claim(path: &Path, root: &Path) -> Result<Self, Error> {
        /// Somebody else removes it at each of these.
        const TRIES: u32 = 100;
        for _ in 0..TRIES {
            let Some(work) = Self::existing(path)? else {
                remove(path)?;
                // No more than a way for the owner of what is in it.
                let mode = rustix::fs::Mode::from_raw_mode(0o711);
                match mkdirat(CWD, path, mode) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => continue,
                    Err(error) => return Err(Error::local("make", path)(error)),
                }
            };
            if !work.lock()? {
                break;
            }
            // The run that had the lock may have removed it meanwhile.
            if RootId::at(path)? == Some(RootId::of(&work.fd)?) {
                return Ok(work);
            }
        }
        Err(Error::InUse {
            root: root.to_owned(),
            reason: "another restore of it is under way; wait until that has ended".to_owned(),
        })
    }

    pub fn failed(&self, op: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        Error::local(op, &self.path)
    }

    /// The journal; `None` where there is none that can be believed.
    pub fn journal(&self) -> Result<Option<Journal>, Error> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(&self.fd, JOURNAL, flags, rustix::fs::Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("read the journal in")(error)),
        };
        let mut bytes = Vec::new();
        let read = file.take(LONGEST_JOURNAL).read_to_end(&mut bytes);
        read.map_err(Error::local("read the journal in", &self.path))?;
        Ok(sealed::open("the journal of a restore", &bytes).ok())
    }

    /// Writes the journal. `is_synced`: it reaches the disk, as it has to while entries are moved. The first one reaches it with the
    /// new tree, before any swap.
    pub fn write(&self, journal: &Journal, is_synced: bool) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let flags = OFlags::WRONLY
                | OFlags::CREATE
                | OFlags::TRUNC
                | OFlags::NOFOLLOW
                | OFlags::CLOEXEC;
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            let mut file = File::from(openat(&self.fd, JOURNAL_UNDER_WAY, flags, mode)?);
            file.write_all(&sealed::seal(journal))?;
            if is_synced {
                file.sync_all()?;
            }
            renameat(&self.fd, JOURNAL_UNDER_WAY, &self.fd, JOURNAL)?;
            Ok(())
        };
        write().map_err(Error::local("write the journal in", &self.path))
    }

    /// Ends what the journal is about: it has nothing to say any more.
    pub fn end(&self) -> Result<(), Error> {
        for name in [JOURNAL, JOURNAL_UNDER_WAY] {
            match unlinkat(&self.fd, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(self.failed("end the journal in")(error)),
            }
        }
        Ok(())
    }

    /// Puts something of this directory where it will be removed; one rename, however much it is.
    pub fn discard(&self, name: &CStr) -> Result<(), Error> {
        let failed = || self.failed("empty");
        let gone = self.folder(GONE)?;
        let mut number = 0_u64;
        loop {
            let free = number.to_string();
            match renameat(&self.fd, name, &gone, free.as_str()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => return Ok(()),
                Err(
                    rustix::io::Errno::EXIST
                    | rustix::io::Errno::NOTEMPTY
                    | rustix::io::Errno::NOTDIR,
                ) => number += 1,
                Err(error) => return Err(failed()(error)),
            }
        }
    }

    /// A folder of this directory, made where it is not there.
    pub fn folder(&self, name: &CStr) -> Result<OwnedFd, Error> {
        let mode = rustix::fs::Mode::from_raw_mode(0o700);
        match mkdirat(&self.fd, name, mode) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(self.failed("make a folder in")(error)),
        }
        open_directory(&self.fd, name).map_err(self.failed("open a folder in"))
    }

    /// Removes what was discarded, and the directory when nothing else is in it.
    fn clear(&self) -> Result<(), Error> {
        remove_at(self.fd.as_fd(), GONE, &self.path)?;
        self.leave();
        Ok(())
    }

    /// Removes the directory, if it is empty: not while a restore can still go on in it.
    fn leave(&self) {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        let before = fs::symlink_metadata(parent);
        let removed = unlinkat(CWD, &self.path, AtFlags::REMOVEDIR);
        let is_inside = self.path.file_name() == Some(INSIDE.as_ref());
        if let (Ok(()), Ok(before), true) = (removed, before, is_inside) {
            // That has changed the time of the root.
            let time = Timespec {
                tv_sec: before.mtime(),
                tv_nsec: before.mtime_nsec(),
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            // Where that fails, the next snapshot has another time of the root.
            let _ = utimensat(CWD, parent, &times, AtFlags::SYMLINK_NOFOLLOW);
        }
    }

    /// Removes on a thread, which ends with the program: what is left then is removed by the next run.
    async fn clear_on_thread(&self) -> Result<(), Error> {
        let (path, fd) = (self.path.clone(), self.fd.try_clone());
        let fd = fd.map_err(Error::local("open", &self.path))?;
        with_identity(None, "remover", move || Self { path, fd }.clear()).await?
    }
}

/// Finishes or undoes a swap of this root that was cut short, and begins to remove what is left of old trees.
pub fn settle(root: &Path) -> Result<Settled, Error> {
    let mut settled = Settled::Nothing;
    for path in places(root) {
        let Some(work) = Work::existing(&path)? else {
            continue;
        };
        // Its own run does both.
        if !work.lock()? {
            continue;
        }
        match swap::settle(&work, root)? {
            Settled::Nothing => {}
            found => settled = found,
        }
        if is_there(&work.fd, GONE).map_err(work.failed("look at"))? {
            // Without the lock: a restore of this run takes that.
            if let Some(work) = Work::existing(&path)? {
                let clear = move || report(work.clear());
                let thread = thread::Builder::new().name("remover".to_owned());
                thread
                    .spawn(clear)
                    .map_err(Error::local("start", "a thread that removes"))?;
            }
        }
    }
    Ok(settled)
}

/// Removes what restores that ended badly left beside this root. The next one of them begins anew.
pub fn sweep(root: &Path) -> Result<u64, Error> {
    let mut swept = 0;
    for path in places(root) {
        let Some(work) = Work::existing(&path)? else {
            continue;
        };
        if !work.lock()? {
            continue;
        }
        let has_moves = work
            .journal()?
            .is_some_and(|journal| journal.moves.is_some());
        let mut is_left = is_there(&work.fd, GONE).map_err(work.failed("look at"))?;
        // What could not be ended when this run began is left as it is.
        if !has_moves && is_there(&work.fd, NEW).map_err(work.failed("look at"))? {
            is_left = true;
            work.end()?;
            work.discard(NEW)?;
        }
        work.clear()?;
        swept += u64::from(is_left);
    }
    Ok(swept)
}

fn report(cleared: Result<(), Error>) {
    if let Err(error) = cleared {
        log::warn(
            "a part of an old tree cannot be removed; the next run tries again",
            &[("error", error.sentence().into())],
        );
    }
}

/// Where a restore makes the new tree.
pub struct Staging {
    /// What the new tree will replace.
    root: PathBuf,
    work: Work,
    path: PathBuf,
    fd: OwnedFd,
    /// An earlier run made a part of it.
    is_resumed: bool,
    /// A swap was begun: what is left is for [`settle`] to judge.
    is_swapping: AtomicBool,
}

impl Drop for Staging {
    /// A restore that was cut off before it made anything leaves nothing.
    fn drop(&mut self) {
        let is_empty = || unlinkat(&self.work.fd, NEW, AtFlags::REMOVEDIR).is_ok();
        if !self.is_swapping.load(Ordering::Relaxed) && is_empty() && self.work.end().is_ok() {
            let _ = unlinkat(&self.work.fd, GONE, AtFlags::REMOVEDIR);
            self.work.leave();
        }
    }
}

impl Staging {
    /// A directory for a tree that will replace `root`, owned by `identity`. It has what an earlier run made of the same
    /// `source`, or is empty.
    pub fn open(
        root: &Path,
        identity: Option<Identity>,
        source: Option<String>,
    ) -> Result<Self, Error> {
        let parent = root.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(Error::local("make", parent))?;
        if let Some(mount) = swap::mount_below(root)? {
            // Whatever is mounted there would be emptied with the old tree.
            return Err(Error::local("replace", mount)(Errno::EBUSY));
        }
        let work = Work::claim(&place(root, parent), root)?;
        swap::settle(&work, root)?;
        // Another owner could not go on with it.
        let owner = identity.map(|identity| (identity.uid.as_raw(), identity.gid.as_raw()));
        let source = source.map(|source| format!("{source} for {owner:?}"));
        let path = work.path.join("new");
        let known = work.journal()?;
        let is_kept = |journal: &Journal| source.is_some() && journal.source == source;
        let mut kept = None;
        if let Some(journal) = known.filter(is_kept) {
            kept = match open_directory(&work.fd, NEW) {
                Ok(fd) => Some(fd).filter(|fd| RootId::of(fd).is_ok_and(|id| id == journal.tree)),
                Err(_) => None,
            };
        }
        let is_resumed = kept.is_some();
        let fd = match kept {
            Some(fd) => fd,
            None => match Self::make(&work, identity, source) {
                Ok(fd) => fd,
                Err(error) => {
                    // A full disk, perhaps: nothing stays that takes room.
                    work.end()?;
                    remove_at(work.fd.as_fd(), NEW, &work.path)?;
                    work.clear()?;
                    return Err(error);
                }
            },
        };
        // The run before may have given it the status of the restored root.
        nix::sys::stat::fchmod(&fd, Mode::S_IRWXU).map_err(Error::local("open", &path))?;
        if is_resumed {
            log::info(
                "going on with what an earlier restore has unpacked",
                &[("path", path.display().to_string().into())],
            );
        }
        Ok(Self {
            root: root.to_owned(),
            work,
            path,
            fd,
            is_resumed,
            is_swapping: AtomicBool::new(false),
        })
    }

    fn make(
        work: &Work,
        identity: Option<Identity>,
        source: Option<String>,
    ) -> Result<OwnedFd, Error> {
        work.discard(NEW)?;
        let fd = work.folder(NEW)?;
        if let Some(identity) = identity {
            fchown(&fd, Some(identity.uid), Some(identity.gid))
                .map_err(Error::local("set the owner of a folder in", &work.path))?;
        }
        let journal = Journal {
            source,
            tree: RootId::of(&fd)?,
            moves: None,
        };
        work.write(&journal, false)?;
        Ok(fd)
    }

    /// Where the new tree is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of the new tree's root.
    pub fn fd(&self) -> Result<OwnedFd, Error> {
        self.fd
            .try_clone()
            .map_err(Error::local("open", &self.path))
    }

    /// An earlier run made a part of the tree.
    pub fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    /// Puts the whole new tree in the place of the root. When this fails, the old tree is there as it was; where even that
    /// failed, the error says so. `true`: entries were moved one by one, which changes their stamps.
    pub fn replace(&self) -> Result<bool, Error> {
        self.is_swapping.store(true, Ordering::Relaxed);
        swap::replace(&self.work, &self.root)
    }

    /// Puts the new tree at a path where there is nothing yet, or an empty directory.
    pub fn fill(&self) -> Result<(), Error> {
        self.is_swapping.store(true, Ordering::Relaxed);
        swap::fill(&self.work, &self.root)
    }

    /// Ends it after the new tree is in its place: the old one is removed, as far as there is time. What was left.
    pub async fn finish(self, last: &Finality) -> Option<String> {
        let remove = async {
            swap::settle(&self.work, &self.root)?;
            self.work.clear_on_thread().await
        };
        let left = match last.unless_hurried(remove).await {
            Some(Ok(())) => return None,
            Some(Err(error)) => error.sentence(),
            None => "there was no more time".to_owned(),
        };
        let place = self.work.path.display();
        let warning = format!(
            "the new tree is in place; a part of the old one is left in {place} until the next run removes it: {left}"
        );
        log::warn(
            "a part of the old tree is left",
            &[("reason", warning.as_str().into())],
        );
        Some(warning)
    }

    /// Gives up: what was unpacked is of no use. What cannot be removed now is removed by the next run.
    pub async fn give_up(self) {
        let remove = move || {
            let work = &self.work;
            work.end()?;
            remove_at(work.fd.as_fd(), NEW, &work.path)?;
            work.clear()
        };
        report(with_identity(None, "remover", remove).await.flatten());
    }
}

/// Where the working directory of a root can be.
fn places(root: &Path) -> [PathBuf; 2] {
    let parent = root.parent().unwrap_or(Path::new("/"));
    [beside(root, parent), root.join(INSIDE)]
}

/// Where the working directory of this root has to be.
fn place(root: &Path, parent: &Path) -> PathBuf {
    if is_mount_point(root, parent) {
        root.join(INSIDE)
    } else {
        beside(root, parent)
    }
}

fn beside(root: &Path, parent: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(root.file_name().unwrap_or_default());
    name.push(INSIDE);
    parent.join(name)
}

fn is_mount_point(root: &Path, parent: &Path) -> bool {
    let (Ok(here), Ok(above)) = (fs::symlink_metadata(root), fs::symlink_metadata(parent)) else {
        return false;
    };
    // A bind mount has the device of what it was bound from, but says so itself (Linux 5.8).
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let is_mounted = statx(CWD, root, flags, StatxFlags::BASIC_STATS)
        .is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    here.dev() != above.dev() || is_mounted
}

/// Renames, unless something has the new name. `false`: something has.
pub fn rename_free(
    from: BorrowedFd<'_>,
    name: &CStr,
    to: BorrowedFd<'_>,
    new: &CStr,
) -> Result<bool, rustix::io::Errno> {
    match renameat_with(from, name, to, new, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => Ok(false),
        // A file system without that flag: the look before is the best there is.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            if is_there(to, new)? {
                return Ok(false);
            }
            renameat(from, name, to, new).map(|()| true)
        }
        Err(error) => Err(error),
    }
}

//! Walks a tree depth first, directories sorted, by descriptors only: no path is ever resolved twice, so nothing that is
//! moved or swapped during the walk leads out of the tree.

use std::{
    collections::HashMap,
    ffi::CStr,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat, readlinkat},
    sys::{
        resource::{Resource, getrlimit},
        stat::{FileStat, Mode, SFlag, fstat, fstatat},
    },
};
use rustix::fs::RawDir;

use super::{exclude::Excludes, miss::Miss, read};
use crate::{
    archive::entry::{Entry, Kind, LONGEST_NAME, LONGEST_PATH, Stamp},
    error::Error,
};

/// An entry met on the walk.
pub struct Found<'a> {
    /// What the status says; hash, extents and attributes are empty.
    pub entry: Entry,
    /// The directory that it is in.
    pub parent: BorrowedFd<'a>,
    pub name: &'a CStr,
    /// A directory's own descriptor.
    pub directory: Option<BorrowedFd<'a>>,
    /// Bytes on the disk.
    pub allocated: u64,
}

/// What a walk comes to, in the order of the paths.
pub enum Met<'a> {
    Entry(&'a Found<'a>),
    /// A path that the walk could not look at, with everything below it. Never [`Miss::Gone`].
    Missed(&'a [u8], Miss),
}

/// What the visitor made of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Taken,
    /// It turned out to be unreadable or gone.
    Skipped,
}

/// Flags with which every directory is opened.
pub const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

struct Level {
    fd: OwnedFd,
    names: Names,
    /// Length of the walk's path at this directory.
    path: usize,
}

/// Opens the root of a tree; a link in its last place is not followed.
pub fn open_root(root: &Path) -> Result<OwnedFd, Errno> {
    open(root, DIRECTORY, Mode::empty())
}

/// Visits every entry that is not left out, the root first, until the visitor fails.
pub fn walk<E: From<Error>>(
    root: &Path,
    excludes: &Excludes,
    mut visit: impl FnMut(Met<'_>) -> Result<Verdict, E>,
) -> Result<(), E> {
    let mut failed = None;
    let visit: &mut Visitor<'_> = &mut |met| match visit(met) {
        Ok(verdict) => Some(verdict),
        Err(error) => {
            failed = Some(error);
            None
        }
    };
    walk_all(root, excludes, visit)?;
    failed.map_or(Ok(()), Err)
}

/// `None` ends the walk.
type Visitor<'a> = dyn FnMut(Met<'_>) -> Option<Verdict> + 'a;

/// One function for all visitors: the compiler would make a copy of it for each.
fn walk_all(root: &Path, excludes: &Excludes, visit: &mut Visitor<'_>) -> Result<(), Error> {
    let fd = open_root(root).map_err(Error::local("open", root))?;
    let status = fstat(&fd).map_err(Error::local("look at", root))?;
    let names = sorted_names(&fd).map_err(Error::local("list", root))?;
    let found = Found {
        entry: entry(b"", Kind::Dir, &status),
        parent: fd.as_fd(),
        name: c".",
        directory: Some(fd.as_fd()),
        allocated: 0,
    };
    if visit(Met::Entry(&found)).is_none() {
        return Ok(());
    }
    let most_levels = most_levels();
    let mut links = Links::new();
    let mut path: Vec<u8> = Vec::new();
    let mut levels = vec![Level { fd, names, path: 0 }];
    while let Some(level) = levels.last_mut() {
        path.truncate(level.path);
        let Some(start) = level.names.starts.pop() else {
            levels.pop();
            continue;
        };
        let name = name_at(&level.names.bytes, start);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.to_bytes());
        let outcome = if name.to_bytes().len() > LONGEST_NAME || path.len() > LONGEST_PATH {
            let reason = "its path is longer than 4,096 bytes, or its name than 255";
            Err(Miss::LeftOut(reason))
        } else {
            let parent = level.fd.as_fd();
            match one(parent, name, &path, excludes, &mut links, visit) {
                Some(outcome) => outcome,
                None => return Ok(()),
            }
        };
        let miss = match outcome {
            Ok(None) | Err(Miss::Gone) => continue,
            // A run with a higher limit has what is below.
            Ok(Some(_)) if levels.len() >= most_levels => Miss::Unread(Errno::EMFILE),
            Ok(Some((fd, names))) => {
                levels.push(Level {
                    fd,
                    names,
                    path: path.len(),
                });
                continue;
            }
            Err(miss) => miss,
        };
        if visit(Met::Missed(&path, miss)).is_none() {
            return Ok(());
        }
    }
    Ok(())
}

/// A walk holds a descriptor for each level, and a restore three at the worst; others need some, too.
fn most_levels() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    usize::try_from(limit / 4).unwrap_or(usize::MAX).max(16)
}

/// The first names of files that have several, by device and inode. Their number is whoever makes the tree's to choose, so
/// their memory has a bound; behind it, each name counts as a file of its own.
struct Links {
    first: HashMap<(u64, u64), Box<[u8]>>,
    room: usize,
}

impl Links {
    /// Bytes for all of them.
    const ROOM: usize = 16 << 20;
    /// What one takes beside its path.
    const COST: usize = 64;

    fn new() -> Self {
        Self {
            first: HashMap::new(),
            room: Self::ROOM,
        }
    }

    fn remember(&mut self, key: (u64, u64), path: &[u8]) {
        if let Some(room) = self.room.checked_sub(Self::COST + path.len()) {
            self.room = room;
            self.first.insert(key, path.into());
        }
    }
}

/// Visits one entry; gives what is in it, for a directory, or why it cannot be looked at. `None` ends the walk.
fn one(
    parent: BorrowedFd<'_>,
    name: &CStr,
    path: &[u8],
    excludes: &Excludes,
    links: &mut Links,
    visit: &mut Visitor<'_>,
) -> Option<Result<Option<(OwnedFd, Names)>, Miss>> {
    let status = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(status) => status,
        Err(error) => return Some(Err(error.into())),
    };
    let allocated = u64::try_from(status.st_blocks).unwrap_or(0) * 512;
    let mut visit = |entry, directory| {
        visit(Met::Entry(&Found {
            entry,
            parent,
            name,
            directory,
            allocated,
        }))
    };
    let kind = SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits());
    // A link is judged with its target, below.
    if kind != SFlag::S_IFLNK && excludes.matches(path, kind == SFlag::S_IFDIR) {
        return Some(Ok(None));
    }
    match kind {
        SFlag::S_IFDIR => {
            let opened = openat(parent, name, DIRECTORY, Mode::empty())
                .and_then(|fd| Ok((fstat(&fd)?, sorted_names(&fd)?, fd)));
            let (status, names, fd) = match opened {
                Ok(opened) => opened,
                Err(error) => return Some(Err(error.into())),
            };
            visit(entry(path, Kind::Dir, &status), Some(fd.as_fd()))?;
            return Some(Ok(Some((fd, names))));
        }
        SFlag::S_IFREG => {
            let key = (status.st_dev, status.st_ino);
            let mut entry = entry(path, Kind::File, &status);
            let has_names = status.st_nlink > 1;
            if has_names && let Some(first) = links.first.get(&key) {
                entry.kind = Kind::Hardlink;
                entry.size = 0;
                entry.link = Some(first.to_vec());
                visit(entry, None)?;
            } else if visit(entry, None)? == Verdict::Taken && has_names {
                links.remember(key, path);
            }
        }
        SFlag::S_IFLNK => {
            let target = match readlinkat(parent, name) {
                Ok(target) => target,
                Err(error) => return Some(Err(link_miss(error))),
            };
            if !excludes.matches_link(path, target.as_bytes()) {
                let mut entry = entry(path, Kind::Symlink, &status);
                entry.link = Some(target.into_vec());
                visit(entry, None)?;
            }
        }
        // Nobody expects a socket back: its process is gone.
        SFlag::S_IFSOCK => {}
        SFlag::S_IFIFO => return Some(Err(Miss::LeftOut("it is a fifo"))),
        _ => return Some(Err(Miss::LeftOut("it is a device"))),
    }
    Some(Ok(None))
}

/// Why a link cannot be read: what is no link any more says EINVAL (readlink(2)).
fn link_miss(error: Errno) -> Miss {
    match error {
        Errno::EINVAL => Miss::Gone,
        other => other.into(),
    }
}

/// What is left to visit of a directory. In one piece: there may be millions.
struct Names {
    bytes: Vec<u8>,
    /// Where each name begins, in the descending order of the names, so that the next one is at the end.
    starts: Vec<usize>,
}

/// The name that begins there; each ends in a NUL.
fn name_at(bytes: &[u8], start: usize) -> &CStr {
    CStr::from_bytes_until_nul(&bytes[start..]).expect("every name was stored with its NUL")
}

/// Bytes of names that the kernel is asked for at once.
const LISTED: usize = 16 << 10;

fn sorted_names(fd: &OwnedFd) -> Result<Names, Errno> {
    let mut buffer = [MaybeUninit::uninit(); LISTED];
    let mut listed = RawDir::new(fd, &mut buffer);
    let (mut bytes, mut starts) = (Vec::new(), Vec::new());
    while let Some(entry) = listed.next() {
        let entry = entry.map_err(|error| Errno::from_raw(error.raw_os_error()))?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            starts.push(bytes.len());
            bytes.extend_from_slice(name.to_bytes_with_nul());
        }
    }
    // Of two names, each ends in a byte that is lower than any of the other's.
    starts.sort_unstable_by(|&a, &b| bytes[b..].cmp(&bytes[a..]));
    Ok(Names { bytes, starts })
}

/// An entry from a status.
pub fn entry(path: &[u8], kind: Kind, status: &FileStat) -> Entry {
    Entry {
        kind,
        mode: status.st_mode & 0o7777,
        uid: status.st_uid,
        gid: status.st_gid,
        mtime: nanos(status.st_mtime, status.st_mtime_nsec),
        size: if kind == Kind::File {
            read::size(status)
        } else {
            0
        },
        stamp: Some(Stamp {
            ctime: nanos(status.st_ctime, status.st_ctime_nsec),
            ino: status.st_ino,
            is_linked: status.st_nlink > 1,
            is_unread: false,
            is_bare: false,
        }),
        ..Entry::deleted(path.to_vec())
    }
}

/// Whether what the walk found is what the index has: every change of a file changes one of these.
pub fn is_same(found: &Entry, known: &Entry) -> bool {
    let stamp = known.stamp.map(|stamp| Stamp {
        is_bare: false,
        ..stamp
    });
    found.stamp == stamp && is_alike(found, known)
}

/// Whether the two have the same status, as far as an owner can set it.
pub fn is_alike(found: &Entry, known: &Entry) -> bool {
    found.path == known.path
        && found.kind == known.kind
        && found.mode == known.mode
        && (found.uid, found.gid) == (known.uid, known.gid)
        && found.size == known.size
        && found.mtime == known.mtime
        && found.link == known.link
}

/// Nanoseconds since the epoch; times outside of the years 1678 to 2262 are moved to the nearest end.
fn nanos(seconds: i64, nanos: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

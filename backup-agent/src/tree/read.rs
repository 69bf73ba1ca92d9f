//! Reading one file of a tree that may change, or be swapped for a trap, at any moment.

use std::{collections::BTreeMap, ffi::CStr, fs::File, io, os::fd::AsFd, os::unix::fs::FileExt};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat},
    unistd::lseek,
};
use sha2::{Digest, Sha256};

use super::{holes, miss::Miss};
use crate::archive::{
    entry::{Entry, SYSTEM},
    extents::{self, Runs},
    line::USER,
};

/// Bytes that are read at once. More would be memory that the allocator gets from the kernel, and zeroed, for every file.
const CHUNK: usize = 64 << 10;
/// Bytes of one entry's attributes, names and values. Some file systems keep hundreds of megabytes for a file, and every
/// index has them in a line; one value of the largest size is well below.
const MOST_ATTRIBUTES: usize = 128 << 10;

/// The bytes of a regular file: runs of data, with holes between them.
pub struct Data {
    file: File,
    runs: Runs,
    /// Where in `file` they are one after the other; `None`: each is at its own offset.
    packed_at: Option<u64>,
}

/// A regular file, opened, with its status and the places of its data as they were then.
pub struct Content {
    data: Data,
    status: FileStat,
}

/// Opens a regular file without following a link or waiting for the other end of a fifo. What is no regular file (any more)
/// is [`Miss::Gone`].
pub fn open(parent: impl AsFd, name: &CStr) -> Result<Content, Miss> {
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    let file = match openat(parent, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::EACCES | Errno::EPERM) => return Err(Miss::LeftOut("it cannot be read")),
        Err(error) => return Err(error.into()),
    };
    let status = fstat(&file)?;
    if status.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(Miss::Gone);
    }
    let runs = find_runs(&file, &status)?;
    let data = Data {
        file,
        runs,
        packed_at: None,
    };
    Ok(Content { data, status })
}

impl Content {
    /// The file's status when it was opened: what was read is what this describes.
    pub fn status(&self) -> &FileStat {
        &self.status
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.data.file
    }

    /// Its bytes.
    pub fn data(&self) -> &Data {
        &self.data
    }
}

impl Data {
    /// Data that were put into `file` one run after the other from `start` on.
    pub fn packed(file: File, runs: Runs, start: u64) -> Self {
        Self {
            file,
            runs,
            packed_at: Some(start),
        }
    }

    /// Where the data are, as offset and length, ascending.
    pub fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    /// Whether a file of this size has holes.
    pub fn is_sparse(&self, size: u64) -> bool {
        let data: u64 = self.runs.iter().map(|(_, length)| length).sum();
        data != size
    }

    /// Gives all data to `each`, exactly as many bytes as [`Self::runs`] says: a file that grew is cut, one that shrank is
    /// filled with zeros, because its header is written already. What the disk cannot give is not made up: it goes to
    /// `failed`.
    pub fn read<E>(
        &self,
        failed: impl FnOnce(io::Error) -> E,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let largest = self.runs.iter().map(|(_, length)| *length).max();
        let largest = usize::try_from(largest.unwrap_or(0)).unwrap_or(CHUNK);
        let mut buffer = vec![0; largest.min(CHUNK)];
        let mut packed_at = self.packed_at;
        for &(offset, length) in &self.runs {
            let mut at = packed_at.unwrap_or(offset);
            let end = at + length;
            packed_at = packed_at.map(|_| end);
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                let buffer = &mut buffer[..want];
                let got = match self.file.read_at(buffer, at) {
                    Ok(0) => {
                        buffer.fill(0);
                        want
                    }
                    Ok(got) => got,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(failed(error)),
                };
                each(&buffer[..got])?;
                at += got as u64;
            }
        }
        Ok(())
    }
}

/// The logical size.
pub fn size(status: &FileStat) -> u64 {
    u64::try_from(status.st_size).unwrap_or(0)
}

fn find_runs(file: &File, status: &FileStat) -> Result<Runs, Miss> {
    let allocated = u64::try_from(status.st_blocks).unwrap_or(0) * 512;
    holes::find_runs(size(status), allocated, |from, whence| {
        let from = i64::try_from(from).map_err(|_| Errno::EFBIG)?;
        lseek(file, from, whence).map(|position| u64::try_from(position).unwrap_or(0))
    })
}

/// Whether an open file has the content and the attributes of an entry, holes at the same places.
pub fn is_equal(content: &Content, known: &Entry) -> Result<bool, Miss> {
    let data = content.data();
    if extents::runs(&known.extents) != data.runs || !has_xattrs(&data.file, known)? {
        return Ok(false);
    }
    let mut sum = Sha256::new();
    data.read(
        |error| miss(&error),
        |bytes| {
            sum.update(bytes);
            Ok(())
        },
    )?;
    Ok(known.sha256 == Some(sum.finalize().into()))
}

/// Whether a file or directory has the attributes of an entry, as far as the disk can keep them.
pub fn has_xattrs(file: impl AsFd, known: &Entry) -> Result<bool, Miss> {
    let found = xattrs(file)?.all;
    let is_bare = known.stamp.is_some_and(|stamp| stamp.is_bare);
    let is_known = |(name, value): (&String, &Vec<u8>)| known.xattrs.get(name) == Some(value);
    Ok(found == known.xattrs || (is_bare && found.iter().all(is_known)))
}

/// What an error of reading an open file means: the file is there, so it is no absence.
pub fn miss(error: &io::Error) -> Miss {
    Miss::Unread(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// The attributes of an open file or directory that a snapshot has.
pub struct Attributes {
    pub all: BTreeMap<String, Vec<u8>>,
    /// It has more of `user.*` than a snapshot takes, or some that cannot be read: none of those is here.
    pub is_cut: bool,
}

/// The attributes in `user.*` of an open file or directory, and what else gives rights on it. An ACL cannot be left out: the
/// mode without it means something else.
pub fn xattrs(file: impl AsFd) -> Result<Attributes, Miss> {
    use rustix::fs::{fgetxattr, flistxattr, flistxattr_query};
    use rustix::io::Errno;

    // The kernel's own limits: XATTR_LIST_MAX and XATTR_SIZE_MAX.
    const LIMIT: usize = 65_536;

    let failed = |error: Errno| Miss::Unread(nix::errno::Errno::from_raw(error.raw_os_error()));

    // Asking for the size first saves the buffer for the many files that have none.
    let needed = match flistxattr_query(&file) {
        Ok(0) | Err(Errno::NOTSUP) => {
            return Ok(Attributes {
                all: BTreeMap::new(),
                is_cut: false,
            });
        }
        Ok(needed) => needed,
        Err(error) => return Err(failed(error)),
    };
    let mut names = vec![0_u8; needed.max(LIMIT)];
    let length = flistxattr(&file, &mut names[..]).map_err(failed)?;
    let (mut all, mut is_cut) = (BTreeMap::new(), false);
    let mut room = MOST_ATTRIBUTES;
    for name in names[..length].split(|byte| *byte == 0) {
        let Ok(name) = std::str::from_utf8(name) else {
            continue;
        };
        let is_own = name.starts_with(USER);
        if !is_own && !SYSTEM.contains(&name) {
            continue;
        }
        let mut value = vec![0_u8; LIMIT];
        match fgetxattr(&file, name, &mut value[..]) {
            Ok(length) => {
                let left = room.checked_sub(if is_own { name.len() + length } else { 0 });
                is_cut |= left.is_none();
                room = left.unwrap_or(0);
                value.truncate(length);
                all.insert(name.to_owned(), value);
            }
            // It was removed meanwhile.
            Err(Errno::NODATA) => {}
            Err(Errno::ACCESS | Errno::PERM) if is_own => is_cut = true,
            Err(error) => return Err(failed(error)),
        }
        if is_cut {
            all.retain(|name, _| !name.starts_with(USER));
        }
    }
    Ok(Attributes { all, is_cut })
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;

    /// What was five bytes long when it was opened.
    fn five_bytes(file: File) -> Data {
        Data {
            file,
            runs: smallvec![(0, 5)],
            packed_at: None,
        }
    }

    fn read(data: &Data) -> Result<Vec<u8>, io::ErrorKind> {
        let mut all = Vec::new();
        let done = data.read(
            |error| error.kind(),
            |bytes| {
                all.extend_from_slice(bytes);
                Ok(())
            },
        );
        done.map(|()| all)
    }

    #[test]
    fn a_file_that_shrank_is_filled_and_one_that_cannot_be_read_is_not() {
        let path = std::env::temp_dir().join(format!("backup-agent-read-{}", std::process::id()));
        std::fs::write(&path, "ab").expect("can write");
        let file = File::open(&path).expect("can open");
        assert_eq!(read(&five_bytes(file)), Ok(b"ab\0\0\0".to_vec()));
        // Opened for writing only: every read fails, as on a bad disk.
        let file = File::options().write(true).open(&path).expect("can open");
        assert!(read(&five_bytes(file)).is_err());
        std::fs::remove_file(path).expect("can remove");
    }
}

//! Why an entry of the tree cannot be taken. An error of the file system is never taken for an absence: what is unread stays
//! in the snapshot as the last one has it.

use nix::errno::Errno;

/// Paths that are named in records, answers and `status`, and the bytes that they may take together.
const MOST_NAMED: usize = 16;
const MOST_BYTES: usize = 4096;

/// Why an entry cannot be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Miss {
    /// It is not there any more, or something else is in its place.
    Gone,
    /// It is there, and no snapshot can have it.
    LeftOut(&'static str),
    /// Nobody can tell what it is: the disk, the network or the machine's memory failed.
    Unread(Errno),
}

impl From<Errno> for Miss {
    /// What a system call on a name in the tree means, if it fails.
    fn from(errno: Errno) -> Self {
        match errno {
            // ENOTDIR and ELOOP: a component was swapped for a file or a link meanwhile.
            Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP => Self::Gone,
            Errno::EACCES | Errno::EPERM => Self::LeftOut(errno.desc()),
            other => Self::Unread(other),
        }
    }
}

/// What could not be read: counted, the first paths named.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Unread {
    pub count: u64,
    pub paths: Vec<String>,
}

impl Unread {
    /// Adds a path, as people read it.
    pub fn add(&mut self, path: String) {
        let bytes: usize = self.paths.iter().map(String::len).sum();
        if self.paths.contains(&path) {
            return;
        }
        self.count += 1;
        if self.paths.len() < MOST_NAMED && bytes + path.len() <= MOST_BYTES {
            self.paths.push(path);
        }
    }

    /// Adds what another pass over the same tree could not read.
    pub fn join(&mut self, other: Self) {
        let named = other.paths.len() as u64;
        for path in other.paths {
            self.add(path);
        }
        self.count += other.count - named;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_that_a_name_leads_nowhere_is_an_absence() {
        for errno in [Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP] {
            assert_eq!(Miss::from(errno), Miss::Gone);
        }
        for errno in [Errno::EACCES, Errno::EPERM] {
            assert!(matches!(Miss::from(errno), Miss::LeftOut(_)), "{errno}");
        }
        for errno in [
            Errno::EIO,
            Errno::EBADMSG,
            Errno::ENFILE,
            Errno::EMFILE,
            Errno::ENOMEM,
            Errno::ESTALE,
            Errno::ETIMEDOUT,
            Errno::EUCLEAN,
            Errno::EINTR,
            Errno::ENXIO,
        ] {
            assert_eq!(Miss::from(errno), Miss::Unread(errno));
        }
    }

    #[test]
    fn unread_paths_are_counted_once_and_bounded() {
        let mut unread = Unread::default();
        for number in 0..100 {
            unread.add(format!("path-{number}"));
        }
        assert_eq!((unread.count, unread.paths.len()), (100, MOST_NAMED));
        let mut other = Unread::default();
        other.add("path-0".to_owned());
        other.add("x".repeat(MOST_BYTES + 1));
        unread.join(other);
        assert_eq!((unread.count, unread.paths.len()), (101, MOST_NAMED));
    }
}

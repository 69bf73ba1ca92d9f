//! The directory that the gateway lives in: made before the first start after a restore, and recognised before each later one.
//!
//! An error is not an absence: only a path that leads to nothing says that the root is gone.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, lchown};
use std::path::Path;

use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::process::User;

/// Which directory it is. The number of an inode is used again once it is free; its birth tells the new one.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds, where the file system keeps it.
    birth: Option<(i64, u32)>,
}

impl Identity {
    pub fn is_same(&self, other: &Self) -> bool {
        let births = self.birth.zip(other.birth);
        (self.device, self.inode) == (other.device, other.inode)
            && births.is_none_or(|(ours, theirs)| ours == theirs)
    }
}

/// What the path leads to, if anything.
pub fn identify(root: &Path) -> io::Result<Option<Identity>> {
    let found = match fs::metadata(root) {
        Ok(found) => found,
        Err(error) if is_absence(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(Identity {
        device: found.dev(),
        inode: found.ino(),
        birth: birth(root),
    }))
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// The standard library does not tell it with musl. A kernel or a filter that refuses the call leaves it unknown.
fn birth(root: &Path) -> Option<(i64, u32)> {
    let found = statx(CWD, root, AtFlags::empty(), StatxFlags::BTIME).ok()?;
    let is_kept = found.stx_mask & StatxFlags::BTIME.bits() != 0;
    let time = found.stx_btime;
    // Some file systems say that they keep it and answer 0.
    (is_kept && time.tv_sec != 0).then_some((time.tv_sec, time.tv_nsec))
}

/// Whether nothing is there. What cannot be read may be anything.
pub fn is_empty(root: &Path) -> bool {
    match fs::read_dir(root) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => is_absence(&error),
    }
}

/// Why nothing can be started in the root.
#[derive(Debug)]
pub enum Fault {
    /// It is not the directory that it was: only a restore helps.
    Lost(&'static str),
    /// It could not be made, and why.
    Absent(Option<io::Error>),
    Unreadable(io::Error),
}

/// Before a start. The first one since a restore (`known` is none) makes the root where there is none; each later one finds that
/// same root. With the root comes what went wrong with making it, which need not matter.
pub fn ready(
    root: &Path,
    user: &User,
    known: Option<Identity>,
) -> Result<(Identity, Option<io::Error>), Fault> {
    let problem = match known {
        None => make(root, user).err(),
        Some(_) => None,
    };
    match (identify(root).map_err(Fault::Unreadable)?, known) {
        (Some(found), None) => Ok((found, problem)),
        (Some(found), Some(known)) if known.is_same(&found) => Ok((found, None)),
        (None, None) => Err(Fault::Absent(problem)),
        (None, Some(_)) => Err(Fault::Lost(
            "it is not there: it was removed, or its volume is detached",
        )),
        (Some(_), Some(_)) => Err(Fault::Lost("another directory is in its place")),
    }
}

/// A tree that does not exist yet, or a fresh volume that belongs to root, becomes the gateway's.
fn make(root: &Path, user: &User) -> io::Result<()> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root);
    made?;
    settle(root);
    let us = nix::unistd::geteuid();
    if us.is_root() && user.is_apart() && fs::symlink_metadata(root)?.uid() == us.as_raw() {
        lchown(root, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    }
    Ok(())
}

/// A folder of a container's image is copied by its first change, and the copy has a birth of its own. So a change that changes
/// nothing comes before the root is remembered. Where it is refused, a restart may take the copy for another root and restore.
fn settle(root: &Path) {
    if statfs(root).is_ok_and(|found| found.filesystem_type() == OVERLAYFS_SUPER_MAGIC) {
        let _ = fs::metadata(root).and_then(|found| fs::set_permissions(root, found.permissions()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_known_by_device_inode_and_birth_where_there_is_one() {
        let root = |device, inode, birth| Identity {
            device,
            inode,
            birth,
        };
        let known = root(1, 2, Some((3, 4)));
        for (other, is_same) in [
            (root(1, 2, Some((3, 4))), true),
            (root(1, 2, None), true),
            (root(9, 2, Some((3, 4))), false),
            (root(1, 9, Some((3, 4))), false),
            (root(1, 2, Some((9, 4))), false),
            (root(1, 2, Some((3, 9))), false),
            (root(1, 9, None), false),
        ] {
            assert_eq!(known.is_same(&other), is_same, "{other:?}");
            assert_eq!(other.is_same(&known), is_same, "{other:?}");
        }
    }

    #[test]
    fn only_a_path_that_leads_to_nothing_is_an_absence() {
        let folder = std::env::temp_dir().join(format!("supervisor-root-{}", std::process::id()));
        let root = folder.join("a/root");
        let absent = |path: &Path| matches!(identify(path), Ok(None));
        assert!(absent(&root) && is_empty(&root));
        make(&root, &User::caller()).expect("can make folders");
        assert!(is_empty(&root) && !is_empty(&folder));
        let first = identify(&root).expect("is readable").expect("is there");
        assert!(first.is_same(&identify(&root).expect("is readable").expect("is there")));
        // The other one is made first: the number of an inode is used again.
        fs::create_dir(folder.join("other")).expect("can make a folder");
        fs::remove_dir(&root).expect("is empty");
        fs::rename(folder.join("other"), &root).expect("can rename");
        let second = identify(&root).expect("is readable").expect("is there");
        assert!(!second.is_same(&first));
        fs::write(folder.join("file"), "").expect("can write");
        assert!(absent(&folder.join("file/root")));
        std::os::unix::fs::symlink("loop", folder.join("loop")).expect("can link");
        assert!(identify(&folder.join("loop")).is_err());
        fs::remove_dir_all(folder).expect("can remove");
    }
}

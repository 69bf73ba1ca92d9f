//! Compares a tree with what an index has. What cannot be told counts as a difference: it costs a read, or a file more in a
//! snapshot, and never a change that goes unseen.

use std::{collections::HashSet, path::Path};

use super::{Known, Unreadable, fine_clock};
use crate::{
    archive::entry::{Entry, Kind},
    error::Error,
    tree::{
        exclude::Excludes,
        miss::Miss,
        read,
        scan::{self, Found, Met, Verdict},
    },
};

/// How to judge a file that may have changed without its times telling.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Racy {
    /// Read it and compare its hash.
    Read,
    /// Count it as changed.
    Changed,
}

/// What the times of files cannot tell since an index was made.
pub struct Doubts<'a> {
    /// The file systems' clock when the walk of the index began.
    pub started: i64,
    /// That clock when the walk had ended, or later. It may have been set back since.
    pub ended: i64,
    /// Inodes of the files that processes can change without the kernel setting a time.
    pub unseen: &'a HashSet<u64>,
    pub racy: Racy,
}

/// What a comparison says about a path that an index has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    Same,
    Changed,
    /// It has to be read to tell, and cannot be.
    Unread,
}

impl Doubts<'_> {
    /// Compares what was found with what the index has.
    pub fn judge(&self, found: &Found<'_>, known: &Entry) -> Result<Judgement, Error> {
        let Some(stamp) = found.entry.stamp else {
            return Ok(Judgement::Changed);
        };
        if let Some(last) = known.stamp.filter(|last| last.is_unread) {
            // What the index has is older than what could not be read then.
            let is_the_same = (last.ctime, last.ino) == (stamp.ctime, stamp.ino);
            let is_unread = is_the_same && matches!(read_all(found), Err(Miss::Unread(_)));
            return Ok(if is_unread {
                Judgement::Unread
            } else {
                Judgement::Changed
            });
        }
        if !scan::is_same(&found.entry, known) {
            // A directory that was renamed, as the root is by a restore: its attributes tell.
            let is_renamed = known.kind == Kind::Dir
                && known.stamp.is_some_and(|last| last.ino == stamp.ino)
                && scan::is_alike(&found.entry, known)
                && self.racy == Racy::Read;
            return Ok(match is_renamed.then(|| is_equal(found, known)) {
                Some(Ok(true)) => Judgement::Same,
                _ => Judgement::Changed,
            });
        }
        if !self.unseen.contains(&stamp.ino)
            && !could_repeat(stamp.ctime, self.started, self.ended)?
        {
            return Ok(Judgement::Same);
        }
        Ok(match self.racy {
            Racy::Changed => Judgement::Changed,
            Racy::Read => match is_equal(found, known) {
                Ok(true) => Judgement::Same,
                Err(Miss::Unread(_)) => Judgement::Unread,
                Ok(false) | Err(Miss::Gone | Miss::LeftOut(_)) => Judgement::Changed,
            },
        })
    }
}

/// Whether a change between `since` and now, both by the file systems' clock, can have given a file this time once more.
///
/// A time that is later than now and than `ended`, where a clock was behind for a while, cannot be that of such a change.
pub fn could_repeat(ctime: i64, since: i64, ended: i64) -> Result<bool, Error> {
    Ok(ctime.saturating_add(unit(ctime)) > since && ctime <= ended.max(fine_clock()?))
}

/// Nanoseconds for which a file system that gave this time gives the same one: of some, times are whole seconds (ext4 with
/// inodes of 128 bytes), two (FAT), or any part of one, down to 100 ns (NTFS). A cut time is earlier than the clock was.
pub fn unit(time: i64) -> i64 {
    const SECOND: i64 = 1_000_000_000;
    if time % SECOND == 0 {
        return 2 * SECOND;
    }
    let mut unit = SECOND / 10;
    while time % unit != 0 {
        unit /= 10;
    }
    unit
}

/// Whether what was found has the content and attributes that the index has.
pub fn is_equal(found: &Found<'_>, known: &Entry) -> Result<bool, Miss> {
    match (known.kind, found.directory) {
        (Kind::File, _) => read::is_equal(&read::open(found.parent, found.name)?, known),
        (Kind::Dir, Some(directory)) => read::has_xattrs(directory, known),
        (Kind::Dir, None) => Ok(false),
        (Kind::Symlink | Kind::Hardlink | Kind::Deleted, _) => Ok(true),
    }
}

/// Whether a file or directory does not have the attributes that the index has, though it was made so a moment ago.
pub fn lacks_attributes(found: &Found<'_>, known: &Entry) -> bool {
    let has_all = match found.directory {
        Some(directory) => read::has_xattrs(directory, known),
        None => read::open(found.parent, found.name)
            .and_then(|content| read::has_xattrs(content.file(), known)),
    };
    has_all == Ok(false)
}

/// Reads all that a snapshot has of a file or directory, to see whether that works again.
fn read_all(found: &Found<'_>) -> Result<(), Miss> {
    if let Some(directory) = found.directory {
        return read::xattrs(directory).map(drop);
    }
    let content = read::open(found.parent, found.name)?;
    content
        .data()
        .read(|error| read::miss(&error), |_| Ok(()))?;
    read::xattrs(content.file()).map(drop)
}

/// Why a comparison ended early.
enum Walk {
    /// The tree is not what the index has, or the index cannot be read.
    Differs,
    Failed(Error),
}

impl From<Error> for Walk {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Unreadable> for Walk {
    fn from(_: Unreadable) -> Self {
        Self::Differs
    }
}

/// Whether the tree is exactly what the index has. Stops at the first difference.
pub fn is_tree_same(
    root: &Path,
    excludes: &Excludes,
    mut known: Known,
    ended: i64,
    unseen: &HashSet<u64>,
    racy: Racy,
) -> Result<bool, Error> {
    let doubts = Doubts {
        started: known.started,
        ended,
        unseen,
        racy,
    };
    let visit = |met: Met<'_>| {
        // What no snapshot can have was left out of this one, too.
        let found = match met {
            Met::Entry(found) => found,
            Met::Missed(_, Miss::Unread(_)) => return Err(Walk::Differs),
            Met::Missed(..) => return Ok(Verdict::Taken),
        };
        while let Some(gone) = known.before(&found.entry.path)? {
            if gone.kind != Kind::Deleted {
                return Err(Walk::Differs);
            }
        }
        match known.at(&found.entry.path)? {
            Some(entry) if doubts.judge(found, &entry)? == Judgement::Same => Ok(Verdict::Taken),
            _ => Err(Walk::Differs),
        }
    };
    let walked = scan::walk(root, excludes, visit);
    let rest = walked.and_then(|()| {
        while let Some(gone) = known.rest()? {
            if gone.kind != Kind::Deleted {
                return Err(Walk::Differs);
            }
        }
        Ok(())
    });
    match rest {
        Ok(()) => Ok(true),
        Err(Walk::Differs) => Ok(false),
        Err(Walk::Failed(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_time_counts_for_as_long_as_its_file_system_gives_it_again() {
        for (time, want) in [
            (1_700_000_000 * SECOND, 2 * SECOND),
            (1_700_000_000 * SECOND + 500_000_000, SECOND / 10),
            (1_700_000_000 * SECOND + 10_000_000, SECOND / 100),
            (1_700_000_000 * SECOND + 3_000_000, SECOND / 1000),
            (1_700_000_000 * SECOND + 123_456_000, 1000),
            (1_700_000_000 * SECOND + 123_456_700, 100),
            (1_700_000_000 * SECOND + 123_456_789, 1),
        ] {
            assert_eq!(unit(time), want, "{time}");
        }
    }

    #[test]
    fn a_change_can_repeat_the_time_of_its_own_unit_and_none_that_is_still_to_come()
    -> Result<(), Error> {
        let since = 1_700_000_000 * SECOND + 723_456_789;
        for (time, want) in [
            (since - 1, false),
            (since, true),
            (since + 1, true),
            // Of the same moment, cut to microseconds, and of the one before.
            (since - 789, true),
            (since - 1789, false),
            (1_700_000_000 * SECOND, true),
            (1_699_999_998 * SECOND, false),
            (i64::MAX, false),
        ] {
            assert_eq!(could_repeat(time, since, since)?, want, "{time}");
        }
        // The clock was set back by the time of a century.
        let century = 100 * 365 * 24 * 3600 * SECOND;
        let (since, ended) = (since + century, since + century + SECOND);
        for (time, want) in [
            (since - 1, false),
            (since, true),
            (ended, true),
            (ended + 1, false),
        ] {
            assert_eq!(could_repeat(time, since, ended)?, want, "{time}");
        }
        Ok(())
    }
}

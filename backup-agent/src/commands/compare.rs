//! `restore --dry-run`: how the root differs from a snapshot. Nothing is written, and no data is fetched.

use std::{cmp::Ordering, fmt::Write};

use nix::unistd::Uid;
use serde_json::json;

use super::Answer;
use crate::{
    archive::{
        entry::{Entry, Kind, compare, display},
        layer_index::LayerIndex,
        merge::{Merge, Word},
    },
    config::Config,
    error::Error,
    local_index::is_equal,
    snapshot::record::Record,
    tree::{
        exclude::Excludes,
        identity::with_identity,
        miss::Miss,
        root::RootId,
        scan::{self, Found, Met, Verdict},
    },
};

/// Paths that are printed; the rest is counted.
const MOST_PATHS: usize = 1000;

/// What a restore would do to the root.
#[derive(Default)]
struct Changes {
    added: u64,
    changed: u64,
    removed: u64,
    /// Bytes of the files that would come from the snapshot.
    bytes: u64,
    lines: String,
    printed: usize,
}

impl Changes {
    fn note(&mut self, sign: char, path: &[u8]) {
        if self.printed < MOST_PATHS {
            self.printed += 1;
            // Writing to a string cannot fail.
            let _ = writeln!(self.lines, "{sign} {}", display(path));
        }
    }

    fn add(&mut self, entry: &Entry) {
        self.added += 1;
        self.bytes += entry.data();
        self.note('+', &entry.path);
    }

    fn change(&mut self, entry: &Entry) {
        self.changed += 1;
        self.bytes += entry.data();
        self.note('~', &entry.path);
    }

    fn remove(&mut self, path: &[u8]) {
        self.removed += 1;
        self.note('-', path);
    }
}

/// Compares the root with a snapshot, path by path.
pub async fn run(
    config: &Config,
    record: &Record,
    indexes: &[LayerIndex],
) -> Result<Answer, Error> {
    let mut merge = Merge::new(indexes)?;
    let root = config.root.clone();
    let is_owner_kept = Uid::effective().is_root() && config.identity.is_none();
    let changes = with_identity(config.identity, "walk", move || {
        let mut changes = Changes::default();
        let mut next = alive(&mut merge)?;
        let visit = |met: Met<'_>| {
            let path = match &met {
                Met::Entry(found) => &found.entry.path[..],
                Met::Missed(path, _) => path,
            };
            while let Some(word) = next.take_if(|word| compare(&word.entry.path, path).is_lt()) {
                changes.add(&word.entry);
                next = alive(&mut merge)?;
            }
            let found = match &met {
                Met::Entry(found) => found,
                Met::Missed(_, Miss::Unread(errno)) => {
                    return Err(Error::local("read", display(path))(*errno));
                }
                Met::Missed(..) => {
                    // A snapshot has no such thing, and a restore removes it.
                    changes.remove(path);
                    return Ok(Verdict::Taken);
                }
            };
            match next.take_if(|word| compare(&word.entry.path, path) == Ordering::Equal) {
                None => changes.remove(path),
                Some(word) => {
                    if !is_right(found, &word.entry, is_owner_kept) {
                        changes.change(&word.entry);
                    }
                    next = alive(&mut merge)?;
                }
            }
            Ok::<_, Error>(Verdict::Taken)
        };
        // Also what a backup leaves out: a restore replaces all of the root.
        if RootId::at(&root)?.is_some() {
            scan::walk(&root, &Excludes::none(), visit)?;
        }
        while let Some(word) = next {
            changes.add(&word.entry);
            next = alive(&mut merge)?;
        }
        Ok::<_, Error>(changes)
    })
    .await??;
    let mut text = changes.lines;
    let unprinted =
        (changes.added + changes.changed + changes.removed).saturating_sub(MOST_PATHS as u64);
    if unprinted > 0 {
        let _ = writeln!(text, "… and {unprinted} more");
    }
    let _ = writeln!(
        text,
        "snapshot {}: {} to add, {} to change, {} to remove",
        record.id, changes.added, changes.changed, changes.removed
    );
    let json = json!({
        "snapshot": record.id,
        "time": record.time,
        "dryRun": true,
        "added": changes.added,
        "changed": changes.changed,
        "removed": changes.removed,
        "bytes": changes.bytes,
    });
    Ok(Answer::new(text, json))
}

/// The next path that the snapshot has.
fn alive(merge: &mut Merge) -> Result<Option<Word>, Error> {
    loop {
        match merge.next()? {
            Some(word) if word.entry.kind == Kind::Deleted => {}
            other => return Ok(other),
        }
    }
}

fn is_right(found: &Found<'_>, entry: &Entry, is_owner_kept: bool) -> bool {
    let mut status = found.entry.clone();
    if !is_owner_kept {
        (status.uid, status.gid) = (entry.uid, entry.gid);
    }
    scan::is_alike(&status, entry) && is_equal(found, entry) == Ok(true)
}

//! When the tree on the disk is kept: it is the wanted snapshot already, or goes on from the newest one. Only a root that is
//! known to be the same directory is judged at all; any doubt says no, and the tree is restored.

use crate::{
    archive::entry::Kind,
    config::Config,
    error::Error,
    local_index::{Known, Racy, is_tree_same},
    snapshot::{head::Seen, record::Record},
    state::{Described, State, Which},
    tree::{
        identity::with_identity,
        miss::Miss,
        scan::{self, Met, Verdict},
        writers::{self, LONGEST_LOOK},
    },
};

/// Whether the tree on the disk goes on from the newest snapshot, with nobody else's in between: then it is the same or
/// newer, and replacing it would lose what was written since (a restart after a crash, with the disk still there).
///
/// A tree that lost more than half of its files, or nine tenths of its bytes, while nobody was looking is taken for damage, not
/// for news.
pub async fn is_continued(
    config: &Config,
    state: &State,
    seen: Option<&Seen>,
) -> Result<bool, Error> {
    let is_ours = seen.is_some_and(|seen| {
        // The last run may have been killed between moving the head and writing that down.
        Some(seen) == state.facts.seen().as_ref()
            || Some(&seen.head.writer) == state.facts.writer.as_ref()
    });
    if !is_ours || state.facts.is_fenced || !state.is_root_known(&config.root)? {
        return Ok(false);
    }
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let (files, bytes, is_unread) = with_identity(config.identity, "walk", move || {
        let (mut files, mut bytes, mut is_unread) = (0_u64, 0_u64, false);
        let visit = |met: Met<'_>| {
            match met {
                Met::Entry(found) => {
                    files += u64::from(found.entry.kind == Kind::File);
                    bytes = bytes.saturating_add(found.entry.size);
                }
                Met::Missed(_, miss) => is_unread |= matches!(miss, Miss::Unread(_)),
            }
            Ok::<_, Error>(Verdict::Taken)
        };
        scan::walk(&root, &excludes, visit).map(|()| (files, bytes, is_unread))
    })
    .await??;
    let known = state.facts.snapshot.as_ref();
    let (known_files, known_bytes) = known.map_or((0, 0), |known| (known.files, known.bytes));
    // What cannot be read is not lost: it must not count against the tree.
    Ok(is_unread || (files * 2 >= known_files && bytes.saturating_mul(10) >= known_bytes))
}

/// Whether the tree is exactly this snapshot's: its index is there, and a walk finds nothing else.
pub async fn is_there_already(
    config: &Config,
    state: &State,
    record: &Record,
) -> Result<bool, Error> {
    let is_known = |known: &Described| known.id == record.id;
    if !state.facts.snapshot.as_ref().is_some_and(is_known) || !state.is_root_known(&config.root)? {
        return Ok(false);
    }
    let index = state.index(Which::Last)?;
    let known = index.and_then(|index| Known::open(&index, &record.id, record.layers.len()).ok());
    let Some(known) = known else {
        return Ok(false);
    };
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let (ended, mut unseen) = (state.ended(), state.facts.unseen.clone());
    let watch = writers::watch(config.gateway_user(), config.identity, LONGEST_LOOK);
    let is_apart = config.identity.is_some();
    with_identity(config.identity, "walk", move || {
        let now = watch.finish();
        if is_apart && !now.is_complete {
            return Ok(false);
        }
        unseen.extend(&now.inodes);
        is_tree_same(&root, &excludes, known, ended, &unseen, Racy::Read)
    })
    .await?
}

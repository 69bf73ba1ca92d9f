//! From a tree that was unpacked to the root that it replaces. Until the swap every failure leaves the old tree as it was; after
//! it the new tree is in place, and what fails then is a warning.

use std::path::Path;

use crate::{
    archive::layer_index::LayerIndex,
    commands::{
        describe,
        unpack::{reindex, restamp},
    },
    config::Config,
    error::Error,
    interrupt::Finality,
    local_index::Trust,
    log,
    snapshot::record::Record,
    state::State,
    tree::{root::RootId, staging::Staging},
};

/// Opens the working directory of a root or a target, on a thread: much may have to be looked at there.
pub async fn stage(root: &Path, config: &Config, source: Option<String>) -> Result<Staging, Error> {
    let (root, identity) = (root.to_owned(), config.identity);
    let staging = tokio::task::spawn_blocking(move || Staging::open(&root, identity, source));
    staging
        .await
        .map_err(|_| Error::Internal("root's thread"))?
}

/// Does file work of the swap on a thread. It is done to its end, whatever becomes of who waits for it.
async fn on_thread<T: Send + 'static>(
    staging: Staging,
    work: fn(&Staging) -> Result<T, Error>,
) -> Result<(Staging, Result<T, Error>), Error> {
    let done = tokio::task::spawn_blocking(move || {
        let done = work(&staging);
        (staging, done)
    });
    done.await.map_err(|_| Error::Internal("root's thread"))
}

/// Where the store did not answer, the next try goes on with what was unpacked, and half of two trees stays as it is. After any
/// other failure the new tree would only take room on a disk that may be full.
pub async fn keep_or_give_up<T>(
    staging: Staging,
    unpacked: Result<T, Error>,
) -> Result<(Staging, T), Error> {
    match unpacked {
        Ok(unpacked) => Ok((staging, unpacked)),
        Err(error @ (Error::Store { .. } | Error::RootHalf { .. })) => Err(error),
        Err(error) => {
            staging.give_up().await;
            Err(error)
        }
    }
}

/// Puts the new tree at a target; gives a warning.
pub async fn fill_target(staging: Staging, last: &Finality) -> Result<Option<String>, Error> {
    last.reach();
    let (staging, filled) = on_thread(staging, Staging::fill).await?;
    let (staging, ()) = keep_or_give_up(staging, filled).await?;
    Ok(staging.finish(last).await)
}

/// What the new tree is.
pub struct New<'a> {
    pub record: &'a Record,
    pub indexes: &'a [LayerIndex],
    /// Nobody else works in the root. Otherwise the index under way is that of the new tree already.
    pub is_quiet: bool,
}

/// Puts the new tree in the place of the root and remembers it, with what `hold` says of the head; gives a warning.
pub async fn replace_root(
    config: &Config,
    state: &mut State,
    staging: Staging,
    new: &New<'_>,
    last: &Finality,
    hold: impl FnOnce(&mut State),
) -> Result<Option<String>, Error> {
    let known = state.facts.clone();
    state.forget_tree()?;
    last.reach();
    let (staging, replaced) = on_thread(staging, Staging::replace).await?;
    if matches!(replaced, Err(ref error) if !matches!(error, Error::RootHalf { .. })) {
        // The old tree is there, and all that is known of it holds.
        state.facts = known;
        state.save()?;
    }
    let (staging, are_moved) = keep_or_give_up(staging, replaced).await?;
    hold(state);
    let remembered = async {
        if !new.is_quiet {
            if are_moved {
                restamp(config, state).await?;
            }
            state.keep_index()?;
        }
        state.remember_tree(RootId::at(&config.root)?, Some(describe(new.record)))
    };
    if let Err(error) = remembered.await {
        // Of the tree, the working directory tells the next run. Of the head, nothing else does.
        state.facts.snapshot = None;
        state.facts.root = None;
        let warning = not_remembered(&error);
        return Ok(Some(match state.save() {
            Ok(()) => warning,
            Err(_) => format!("{warning}; restore it again before the next backup"),
        }));
    }
    let left = staging.finish(last).await;
    if !new.is_quiet || left.is_some() {
        return Ok(left);
    }
    // After the old tree is gone, of which files are part of the new one: that changes their stamps.
    let index = async {
        let (root, indexes) = (&config.root, new.indexes);
        reindex(config, state, root, new.record, indexes, Trust::Restored).await?;
        state.keep_index()?;
        state.remember_tree(RootId::at(&config.root)?, Some(describe(new.record)))
    };
    let indexed = last.unless_hurried(index).await.unwrap_or(Ok(()));
    Ok(indexed.err().as_ref().map(not_remembered))
}

/// The tree is there, but what the next backup would start from is not.
fn not_remembered(error: &Error) -> String {
    let warning = format!(
        "the new tree is in place, but the next backup has to compare all of it: {}",
        error.sentence()
    );
    log::warn(
        "the restored tree cannot be remembered",
        &[("reason", warning.as_str().into())],
    );
    warning
}

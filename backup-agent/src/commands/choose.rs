//! Which snapshot is meant: one by its id, or the latest that the head, and without it the records, know of.

use crate::{
    config::Config,
    error::Error,
    snapshot::{
        head::{self, Seen},
        history::absent_though_listed,
        record::{self, Record},
    },
    store::Store,
};

/// The head, for work on this snapshot: for the latest it has to be readable, and for whoever claims it.
pub async fn seen(
    store: &dyn Store,
    wanted: &str,
    is_claimer: bool,
) -> Result<Option<Seen>, Error> {
    if wanted == "latest" || is_claimer {
        head::read(store).await
    } else {
        head::look(store).await
    }
}

/// The record that was asked for.
pub async fn choose(
    config: &Config,
    store: &dyn Store,
    wanted: &str,
    seen: Option<&Seen>,
) -> Result<Record, Error> {
    if wanted != "latest" {
        return record::read(store, wanted).await;
    }
    if let Some(snapshot) = seen.and_then(|seen| seen.head.snapshot.as_deref()) {
        return record::read(store, snapshot)
            .await
            .map_err(|error| match error {
                Error::UnknownSnapshot { id } => Error::Damaged {
                    key: record::key(&id),
                    reason: "the head names it, and it is not there".to_owned(),
                },
                other => other,
            });
    }
    // Without a word of the head, the newest record is the latest: its writer was killed before the head moved.
    match record::list(store).await?.last() {
        Some(newest) => record::read(store, newest)
            .await
            .map_err(|error| match error {
                // Nothing removes the newest one: an instance that has snapshots is not to be taken for an empty one.
                Error::UnknownSnapshot { id } => absent_though_listed(&id),
                other => other,
            }),
        None => Err(no_snapshot(config)),
    }
}

/// The error of whoever wanted the latest one of none.
pub fn no_snapshot(config: &Config) -> Error {
    Error::NoSnapshot {
        instance: config.instance.clone(),
        store: config.location.to_string(),
    }
}
